"""Flags, presets and config.json.

Every value can be reached, and every impossible one is refused with its numbers.
"""

import re
from dataclasses import asdict, replace

import pytest

from train.config import Config, read_config, write_config
from train.decoders import DECODERS
from train.flags import from_cli
from train.gaussian import PRESETS


def parse(line: str = "", world: int = 1) -> Config:
    return from_cli("gaussian", PRESETS, line.split(), world)


def test_base_is_the_published_recipe():
    base = parse("--preset base --data somewhere")
    assert (base.steps, base.batch_size, base.views, base.lr, base.weight_decay) == (
        750_000,
        256,
        1,
        1e-4,
        0.0,
    )
    assert (base.final_lr, base.warmup, base.ema, base.max_norm, base.precision) == (
        1.0,
        0,
        0.9999,
        1.0,
        "fp16",
    )
    assert asdict(base.weights) == {
        "l1": 1.0,
        "ssim": 0.2,
        "lpips": 0.2,
        "kl": 1e-6,
        "volume": 1e4,
        "opacity": 1e-3,
    }
    assert (base.resolution, base.image_size, base.features) == (64, 512, "dinov2_vitl14_reg")
    size = base.model
    assert (size.channels, size.blocks, size.heads, size.window, size.latent, size.per_voxel) == (
        768,
        12,
        12,
        8,
        8,
        32,
    )
    assert base.lr_at(0) == base.lr_at(749_999) == 1e-4


def test_the_embedded_objects_have_rgb_features():
    assert (
        parse("--preset base").features == "rgb"
        and parse("--preset base --features other").features == "other"
    )


def test_small_fits_one_gpu():
    small = parse("--preset small")
    assert (
        small.batch_size,
        small.micro_batch,
        small.image_size,
        small.precision,
        small.resolution,
    ) == (16, 2, 256, "bf16", 64)
    assert (small.model.channels, small.model.blocks, small.model.heads, small.model.latent) == (
        384,
        6,
        6,
        8,
    )


def test_flags_replace_fields_of_the_preset_and_of_its_groups():
    config = parse(
        "--data a --data b --steps 7 --model.channels 96 --weights.kl 0 --deterministic "
        "--holdout-views 2"
    )
    assert (config.preset, config.data, config.steps, config.holdout_views) == (
        "demo",
        ("a", "b"),
        7,
        2,
    ) and config.deterministic
    assert config.model == replace(PRESETS["demo"].model, channels=96) and config.weights.kl == 0.0
    assert (
        config.model.per_voxel == PRESETS["demo"].model.per_voxel
        and config.weights.volume == PRESETS["demo"].weights.volume
    )


@pytest.mark.parametrize(
    ("line", "micro"),
    [
        ("--preset base --batch-size 1", 1),
        ("--preset base --batch-size 9", 1),
        ("--preset base --batch-size 6", 2),
    ],
)
def test_a_smaller_batch_shrinks_the_micro_batch(line, micro):
    assert parse(line).micro_batch == micro


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stepz 3", "unrecognized arguments: --stepz"),
        ("--step 3", "unrecognized arguments: --step"),  # no abbreviations
        ("--model.chanels 3", "unrecognized arguments"),
        ("--preset huge", "invalid choice: 'huge'"),
        ("--steps many", "'many' is not a whole number"),
        ("--steps 0", "steps 0 must be at least 1"),
        ("--lr nan", "error: lr nan must exceed 0 and be finite"),
        ("--lr inf", "error: lr inf must exceed 0"),
        ("--weight-decay inf", "error: weight_decay inf must be at least 0 and finite"),
        ("--weight-decay nan", "error: weight_decay nan"),
        ("--final-lr 2", "error: final_lr 2.0 must lie in [0, 1]"),
        ("--max-norm nan", "max_norm nan must exceed 0"),
        ("--model.mlp-ratio -1", "model.mlp_ratio -1.0 gives 64 channels no finite width"),
        ("--model.mlp-ratio 0.01", "model.mlp_ratio 0.01 gives 64 channels"),
        ("--model.mlp-ratio nan", "model.mlp_ratio nan"),
        ("--model.mlp-ratio inf", "model.mlp_ratio inf"),
        ("--model.logvar-init nan", "model.logvar_init nan must be finite"),
        ("--ema 1", "error: ema 1.0 must lie in [0, 1)"),
        ("--image-size 8", "image_size 8 must be at least 16"),
        ("--resolution 2000", "resolution 2000 must be at most 1024"),
        ("--precision fp8", "precision 'fp8' is not one of fp32, bf16, fp16"),
        ("--optimizer sgd", "optimizer 'sgd' is not one of adamw, muon"),
        ("--holdout-views 0", "holdout_views 0 must be at least 1"),
        ("--batch-size 6 --micro-batch 4", "batch_size 6 is not a multiple of micro_batch 4"),
        ("--resume run --out other", "cannot change out"),
        ("--resume run --lr 1", "--resume keeps the recorded config; it cannot change lr"),
        ("--resume nowhere", "nowhere is not a run folder"),
        ("--model.heads 0", "model.heads 0 must be at least 1"),
        (
            "--model.channels 96 --model.heads 5",
            "model.channels 96 must be model.heads 5 times a multiple of 8",
        ),
        ("--model.channels 512 --model.heads 2", "model.channels 512 must be model.heads 2 times"),
        ("--weights.l1 -1", "l1 -1.0"),
    ],
)
def test_impossible_values_exit_with_a_message(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(line)
    said = capsys.readouterr().err
    # usage and what is wrong
    assert stopped.value.code == 2 and message in said and len(said.splitlines()) == 2, said


@pytest.mark.parametrize(
    "presets", [recipe.presets for recipe in DECODERS.values()], ids=list(DECODERS)
)
def test_help_says_what_every_flag_is_and_its_defaults(presets, capsys):
    with pytest.raises(SystemExit, match="0"):
        from_cli("gaussian", presets, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    bare = re.findall(r"(--[a-z][\w.-]*) [A-Z]+ (?=\[|--)", said)
    assert not bare
    assert (
        f"learning rate [{presets['demo'].lr:g}, 0.0001, 0.0001]" in said
        and "clip gradients to this norm" in said
    )
    assert (
        f"new cosine [{presets['demo'].steps}, 100000, {presets['base'].steps}]" in said
        and "kept for evaluation [4]" in said
    )


def test_a_batch_must_divide_over_the_ranks(capsys):
    assert parse("--batch-size 8 --micro-batch 2", world=2).micro_batches(2) == 2
    for line in ("--batch-size 8 --micro-batch 4", "--batch-size 8"):
        with pytest.raises(SystemExit):
            parse(line, world=3)
        assert "batch_size 8 is not a multiple of 3 ranks x micro_batch" in capsys.readouterr().err


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = replace(Config(), lr=1.0, steps=100, warmup=10, final_lr=0.2)
    rates = [config.lr_at(step) for step in range(101)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[50] == pytest.approx(0.6)
        and rates[100] == pytest.approx(0.2)
    )
    assert max(rates) == max(rates[9:11]) and all(
        a > b for a, b in zip(rates[10:], rates[11:], strict=False)
    )


def test_config_json_round_trip(tmp_path):
    config = parse("--data a --lr 0.125 --model.channels 96 --out somewhere")
    write_config(config, "gaussian", tmp_path / "config.json")
    assert read_config(tmp_path / "config.json", "gaussian", PRESETS) == replace(config, out=None)
    resumed = parse(f"--resume {tmp_path} --steps 2000")
    assert resumed == replace(config, out=None, resume=str(tmp_path), steps=2000)


def test_a_full_disk_leaves_the_recorded_config(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    write_config(parse("--lr 0.5"), "gaussian", file)

    def full(self, data):
        self.open("w").close()  # created or emptied, as write_bytes does first
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "write_bytes", full)
    with pytest.raises(OSError, match="could not write .*config.json: .*No space left"):
        write_config(parse("--lr 0.25"), "gaussian", file)
    assert read_config(file, "gaussian", PRESETS).lr == 0.5 and list(tmp_path.iterdir()) == [file]


def test_bad_config_json_is_named(tmp_path):
    file = tmp_path / "config.json"
    write_config(parse(), "gaussian", file)
    with pytest.raises(
        ValueError,
        match="config.json does not describe a run of train.mesh: it is of another script",
    ):
        read_config(file, "mesh", PRESETS)
    whole = file.read_text()
    for old, new, said in (
        ('"lr": 0.006', '"lr": "abc"', "lr is 'abc', not float"),
        ('"lr": 0.006', '"lr": -1', "lr -1 must exceed 0"),
        ('"steps": 400', '"steps": 1.5', "steps is 1.5, not int"),
        ('"seed": 0', '"seed": true', "seed is True, not int"),
        ('"encoder": null', '"encoder": 3', "encoder is 3, not str or NoneType"),
        ('"data": []', '"data": "here"', "data is 'here', not list"),
        ('"heads": 2', '"heads": null', "model.heads is None, not int"),
    ):
        assert old in whole
        file.write_text(whole.replace(old, new))
        with pytest.raises(
            ValueError, match=f"config.json does not describe a run of train.gaussian: {said}"
        ):
            read_config(file, "gaussian", PRESETS)
    file.write_text(whole.replace('"lr": 0.006', '"lr": 1'))
    assert read_config(file, "gaussian", PRESETS).lr == 1
    for broken in (
        whole[:40],
        whole.replace('"lr"', '"rate"'),
        whole.replace('"heads"', '"hats"'),
        "[]",
        "null",
        '"\x80"',
    ):
        file.write_bytes(broken.encode("latin-1"))
        with pytest.raises(
            ValueError, match="config.json does not describe a run of train.gaussian"
        ):
            read_config(file, "gaussian", PRESETS)
        write_config(parse(), "gaussian", file)
