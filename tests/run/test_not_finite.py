"""Runs whose numbers are not finite stop, say where that begins and keep what was sound."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.finite import NotFinite
from tests.helpers.models import randomize, small_decoder, small_encoder
from tests.helpers.runs import TINY, fresh, refused, rows, state, train
from tests.helpers.source_files import ROOT
from train import loop, optimizer
from train.losses import objective
from train.run import checkpoint


def spoil(monkeypatch, at: int, harm) -> None:
    """Have every run do `harm(run)` before the step after `at` steps."""
    whole = loop.Run.step

    def step(self, batches):
        if self.done == at:
            with torch.no_grad():
                harm(self)
        return whole(self, batches)

    monkeypatch.setattr(loop.Run, "step", step)


def diverged(capsys, *flags) -> str:
    """The message of a run that stops because its numbers are not finite."""
    with pytest.raises(SystemExit) as stopped:
        train(*flags)
    assert stopped.value.code == 3
    return capsys.readouterr().err


def weight(name: str, value: float):
    """Harm for `spoil`: one value of a parameter becomes `value`."""
    return lambda run: run.vae.get_parameter(name).view(-1)[:1].fill_(value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_whose_weights_are_not_finite_stops_and_keeps_the_checkpoint_before(
    tmp_path, capsys, monkeypatch, precision
):
    flags = ["--precision", precision, "--save-every", "2", "--steps", "90", "--out", tmp_path]
    with monkeypatch.context() as patch:
        spoil(patch, 5, weight("encoder.blocks.0.mlp.mlp.2.weight", float("nan")))
        message = diverged(capsys, *TINY, *flags)
    assert [row["skipped"] for row in rows(tmp_path)] == [0] * 5 + [*range(1, 21)]
    assert (
        "20 steps in a row were skipped, the last is step 25: "
        "loss terms not finite: volume, opacity, kl; " in message
    )
    assert re.search(
        r"the first layer that is not finite is encoder\.blocks\.0\.mlp\.mlp\.2: "
        r"its output has [\d,]+ of [\d,]+ values not finite, "
        r"its weight has 1 of 1,024 values not finite",
        message,
    ), message
    sound = tmp_path / "checkpoints" / "step_00000004.safetensors"
    assert (
        f"the newest checkpoint from before that is {sound}\n"
        "continue with: python -m train.gaussian --resume" in message
    )
    assert (
        checkpoint.newest(tmp_path / "checkpoints") == sound
        and not (tmp_path / "evaluation.json").exists()
    )
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    train("--resume", tmp_path, "--steps", "6")
    assert [row["skipped"] for row in rows(tmp_path)] == [0] * 6


def test_fp16_lets_the_loss_scale_fall_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimizer, "LEAST_LOG2", 17.0)
    spoil(monkeypatch, 1, weight("decoder.input_layer.bias", float("inf")))
    message = diverged(capsys, *TINY, "--precision", "fp16", "--steps", "90", "--out", tmp_path)
    assert (
        len(rows(tmp_path)) == 1 + 4 + 20
        and "layer that is not finite is decoder.input_layer: its output" in message
    )
    assert (
        f"{tmp_path} has no checkpoint from before that" in message
        and "continue with" not in message
    )


def test_a_few_skipped_steps_stop_nothing(tmp_path, monkeypatch):
    whole = objective.weighted
    steps = []
    bad = {2, 3, 4, 6, 7, 8}  # 3 in a row, twice

    def poisoned(terms, weights):
        steps.append(len(steps) + 1)
        return whole(terms, weights) * (float("nan") if steps[-1] in bad else 1)

    monkeypatch.setattr(loop, "PATIENCE", 4)
    monkeypatch.setattr(objective, "weighted", poisoned)
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    log = fresh(tmp_path, "--steps", "10", "--save-every", "3")
    assert log[-1]["skipped"] == 6 and log[-1]["loss"] is not None
    names = [file.stem for file in checkpoint.files(tmp_path / "checkpoints")]
    assert names == [
        "step_00000005",
        "step_00000009",
        "step_00000010",
    ]  # due at 3 and 6, while steps were skipped: after them


def test_steps_that_were_skipped_before_an_interruption_count(tmp_path, capsys, monkeypatch):
    whole = objective.weighted
    monkeypatch.setattr(
        objective, "weighted", lambda terms, weights: whole(terms, weights) * float("nan")
    )
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    monkeypatch.setattr(loop, "PATIENCE", 5)
    fresh(tmp_path, "--steps", "3")
    message = diverged(capsys, "--resume", tmp_path, "--steps", "9")
    assert len(rows(tmp_path)) == 5
    assert (
        "every loss term is finite, their weighted sum is not; every layer's output is finite"
        in message
    )
    assert (
        "has no checkpoint from before that" in message
    )  # the only one was saved between skipped steps


def test_weights_that_a_step_makes_infinite_are_not_saved(tmp_path, capsys, monkeypatch):
    def harm(run):
        (layer,) = (p for name, p in run.vae.named_parameters() if name == "decoder.out_layer.bias")
        whole = run.optimizer.methods[-1].step
        monkeypatch.setattr(
            run.optimizer.methods[-1], "step", lambda: (whole(), layer.data.fill_(float("inf")))
        )

    spoil(monkeypatch, 2, harm)
    message = diverged(capsys, *TINY, "--steps", "9", "--save-every", "1", "--out", tmp_path)
    said = "model.decoder.out_layer.bias has 28 of 28 values not finite (and 1 other tensors of"
    assert f"step_00000003.safetensors is not saved: {said}" in message
    assert [f.stem for f in checkpoint.files(tmp_path / "checkpoints")] == [
        "step_00000001",
        "step_00000002",
    ]


def test_the_newest_sound_checkpoint_is_never_deleted(tmp_path):
    kept = lambda: [int(file.stem[5:]) for file in checkpoint.files(tmp_path)]
    save = lambda step, doubtful: checkpoint.save(
        tmp_path, step, {"a": torch.ones(2)}, {}, doubtful=doubtful
    )
    for step in range(1, 5):
        save(step, False)
    for step in range(5, 10):
        save(step, True)
    assert kept() == [4, 7, 8, 9] and checkpoint.newest_sound(tmp_path) == checkpoint.path(
        tmp_path, 4
    )
    for bad in (float("nan"), float("inf")):
        with pytest.raises(
            ValueError,
            match=r"step_00000010.* is not saved: average.a has 1 of 2 values not finite$",
        ):
            checkpoint.save(
                tmp_path, 10, {"b": torch.zeros(1), "average.a": torch.tensor([1.0, bad])}, {}
            )
    assert kept() == [4, 7, 8, 9]
    checkpoint.path(tmp_path, 9).write_bytes(b"short")
    save(10, True)
    assert kept() == [4, 8, 9, 10]
    save(11, False)
    assert kept() == [9, 10, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(tmp_path, dtype):
    model = randomize(small_encoder())
    prefix = tmp_path / "m"
    models.save_pretrained(model, prefix)
    weights = {name: t.to(dtype) for name, t in load_file(f"{prefix}.safetensors").items()}
    weights["blocks.0.attn.to_qkv.bias"][1:3] = torch.tensor([float("nan"), float("-inf")])
    save_file(weights, f"{prefix}.safetensors")
    said = r"m.safetensors: blocks\.0\.attn\.to_qkv\.bias has 2 of \d+ values not finite"
    with pytest.raises(ValueError, match=said):
        models.load_pretrained(prefix)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        models.vae.load_weights(model, weights, "m.safetensors")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    large = before["out_layer.bias"].double()
    large[0] = 1e300  # more than fp32 holds
    with pytest.raises(ValueError, match="m.safetensors: out_layer.bias has 1 of 8 values"):
        models.vae.load_weights(model, before | {"out_layer.bias": large}, "m.safetensors")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        model.out_layer.weight[0, 0] = float("nan")
    with pytest.raises(
        NotFinite,
        match=r"m.safetensors is not saved: out_layer.weight has 1 of \d+ values not finite",
    ):
        models.save_pretrained(model, prefix)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    "name", ["model.decoder.input_layer.bias", "average.encoder.input_layer.weight"]
)
def test_a_run_is_not_continued_from_weights_that_are_not_finite(
    tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    fresh(tmp_path, "--steps", "2", "--save-every", "1")
    tensors, recorded = state(tmp_path)
    tensors[name].view(-1)[:1] = float("nan")
    newest = checkpoint.newest(tmp_path / "checkpoints")
    save_file(tensors, newest, {"state": json.dumps(recorded)})
    message = refused(capsys, "--resume", tmp_path, "--steps", "4")
    assert f"{newest}: {name} has 1 of {tensors[name].numel()} values not finite" in message
    assert f"step_00000001.safetensors before it is whole: move {newest.name} to" in message
    newest.unlink()
    train("--resume", tmp_path, "--steps", "3")


def test_an_encoder_that_is_not_finite_is_not_frozen(tmp_path, capsys):
    encoder = models.Encoder(16, 50, 16, 8, 1, num_heads=1)
    models.save_pretrained(encoder, tmp_path / "e")
    weights = load_file(tmp_path / "e.safetensors")
    weights["input_layer.weight"][3] = float("nan")
    save_file(weights, tmp_path / "e.safetensors")
    message = refused(capsys, *TINY, "--encoder", tmp_path / "e", "--out", tmp_path / "run")
    assert (
        "e.safetensors: input_layer.weight has 50 of 800 values not finite" in message
        and not (tmp_path / "run").exists()
    )


def test_a_decoder_that_does_not_perturb_offsets_loads_what_was_published(tmp_path):
    published = randomize(small_decoder())
    tensors = {name: t.clone() for name, t in published.state_dict().items()}
    assert "offset_perturbation" in tensors
    args = published.args | {
        "representation_config": published.args["representation_config"] | {"perturb_offset": False}
    }
    decoder = models.GaussianDecoder(**args)
    decoder.load_state_dict(tensors, strict=True)
    x = models.SparseTensor(
        torch.randn(5, 4), torch.tensor([[0, 1, 2, i] for i in range(5)], dtype=torch.int32)
    )
    moved, plain = published.fields(x), decoder.fields(x)
    assert torch.equal(moved.feats, plain.feats)
    assert not torch.equal(published.scenes(moved)[0].center, decoder.scenes(plain)[0].center)
    args["representation_config"]["voxel_size"] = (
        1.0  # published code registers atanh(-1) then, and does not read it
    )
    decoder = models.GaussianDecoder(**args)
    assert decoder.offset_perturbation.isinf().any()
    models.save_pretrained(decoder, tmp_path / "m")
    again = models.load_pretrained(tmp_path / "m")
    assert torch.equal(again.offset_perturbation, decoder.offset_perturbation)
    weights = load_file(tmp_path / "m.safetensors")
    del weights["offset_perturbation"]  # as earlier versions saved it
    models.vae.load_weights(again, weights, "m")
    with pytest.raises(ValueError, match=r"missing \['offset_perturbation'\]"):
        models.vae.load_weights(published, weights, "m")


RANKS = """
import sys, torch
from train import loop
from train.gaussian import PRESETS, build
from train.losses.objective import Objective
whole = Objective.forward
def forward(self, *args):
    loss, terms = whole(self, *args)
    if self.training and loop.torch.distributed.get_rank() == 1 and self.calls >= 2:
        terms["kl"] = terms["kl"] * float("nan")
        loss = loss + 0 * terms["kl"]
    self.calls += 1
    return loss, terms
Objective.forward, Objective.calls = forward, 0
try:
    loop.main("gaussian", PRESETS, build, sys.argv[2:])
except SystemExit as stopped:
    open(sys.argv[1] + loop.torch.os.environ["RANK"], "w").write(str(stopped.code))
    raise
"""


@pytest.mark.slow
def test_all_ranks_stop_together(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    flags = [
        *TINY,
        "--micro-batch",
        "1",
        "--steps",
        "60",
        "--save-every",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    command = [*torchrun, str(tmp_path / "ranks.py"), str(tmp_path / "status"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, timeout=500, capture_output=True, text=True)
    assert [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)] == ["3", "3"], ended.stderr
    assert ended.stderr.count("20 steps in a row were skipped") == 1
    assert "loss terms not finite: kl; every layer's output is finite (rank 1 of 2)" in ended.stderr
    assert len(rows(tmp_path / "run")) == 22
    assert [f.stem for f in checkpoint.files(tmp_path / "run" / "checkpoints")] == [
        "step_00000001",
        "step_00000002",
    ]
