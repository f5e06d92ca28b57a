"""Any config and any batch: a run does its steps, or says in a line why it cannot.

Hypothesis draws them, the same ones each time, and shows the smallest that fails.
"""

import math
import re
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import Camera
from models import SparseTensor
from tests.helpers.decoders import CHANNELS, LATENT, RESOLUTION, small_vae
from tests.helpers.runs import own_data, rows, state
from train import loop
from train.data.batch import Batch, Meshes
from train.decoders import DECODERS
from train.losses.objective import Objective

SIDE = 24  # pixels
FIXED = (
    "--device cpu --save-every 1 --sample-every 100 --eval-objects 1 --steps 2 --workers 0".split()
)
# what a flag may be, from what no run can be to what most are
FLAGS = {
    "batch-size": st.integers(0, 4),
    "micro-batch": st.integers(0, 4),
    "views": st.integers(0, 5),
    "holdout-views": st.integers(0, 5),
    "image-size": st.sampled_from([1, 16, 17, 24]),
    "resolution": st.sampled_from([8, 8, 8, 16]),
    "precision": st.sampled_from(["fp32", "bf16", "fp16", "fp8"]),
    "optimizer": st.sampled_from(["adamw", "muon", "sgd"]),
    "augment": st.sampled_from(["none", "colour", "rotate", "both", "all"]),
    "direct": st.integers(-1, 3),
    "seed": st.integers(-1, 1 << 54),
    "lr": st.floats(0, 10),
    "warmup": st.integers(-1, 5),
    "final-lr": st.floats(0, 1.1),
    "weight-decay": st.floats(0, 10),
    "max-norm": st.floats(0, 10),
    "ema": st.floats(0, 1),
    "model.channels": st.sampled_from([8, 16, 24, 32]),
    "model.heads": st.integers(0, 4),
    "model.mlp-ratio": st.floats(0, 4),
    "model.window": st.integers(0, 9),
    "model.latent": st.integers(0, 9),
    "model.logvar-init": st.floats(-100, 100),
    "model.input-gain": st.floats(-1, 1e3),
    "model.branch-gain": st.floats(-1, 1e3),
    "weights.l1": st.floats(0, 1e3),
    "weights.ssim": st.floats(0, 1e3),
    "weights.kl": st.floats(0, 1e3),
}
SWITCHES = ("deterministic", "model.recompute")
LINE = re.compile(r"^python -m train\.\w+: .+$", re.MULTILINE)
SETTINGS = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def command_lines(draw) -> tuple[str, list[str]]:
    """A decoder, and flags of which a few differ from the smallest run's."""
    decoder = draw(st.sampled_from(sorted(DECODERS)))
    names = draw(st.lists(st.sampled_from([*FLAGS, *SWITCHES]), max_size=8, unique=True))
    flags = [*FIXED, "--batch-size", "2", "--views", "1", "--holdout-views", "2"]
    flags += ["--image-size", "24", *DECODERS[decoder].smallest.split()]
    for name in names:
        if name in SWITCHES:
            flags.append(draw(st.sampled_from([f"--{name}", f"--no-{name}"])))
        else:
            flags += [f"--{name}={draw(FLAGS[name])}"]
    return decoder, flags


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for a small dataset."""
    return [*map(str, own_data(tmp_path_factory.mktemp("data")))]


@pytest.fixture(scope="module", autouse=True)
def _undrawn():
    """Neither pictures nor scores: what is drawn here is the config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_samples", lambda run: None)
        patch.setattr(loop.report, "curves", lambda *_: None)
        patch.setattr(loop, "conclude", lambda run: None)
        yield


def does_or_refuses(data: list[str], capsys, command: tuple[str, list[str]]) -> bool:
    """Assert that a run does two steps, or is refused in a line; returns whether it ran."""
    decoder, flags = command
    recipe = DECODERS[decoder]
    capsys.readouterr()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        args = [*data, *flags, "--out", str(out)]
        try:
            loop.main(decoder, recipe.presets, recipe.build, args, recipe.loss)
        except SystemExit as stopped:
            message = capsys.readouterr().err
            assert stopped.code in (2, 3), message
            assert len(LINE.findall(message)) == 1 and "Traceback" not in message, message
            return False
        tensors, recorded = state(out)
        assert recorded["step"] == 2 and [row["step"] for row in rows(out)] == [1, 2]
        for name, t in tensors.items():
            assert t.isfinite().all(), name
        return True


@settings(max_examples=25, **SETTINGS)
@given(command_lines())
def test_a_run_does_its_steps_or_says_why_not(data, capsys, command):
    does_or_refuses(data, capsys, command)


@pytest.mark.slow
def test_many_runs_do_or_say_why_not(data, capsys):
    ends = []

    @settings(max_examples=300, **SETTINGS)
    @given(command_lines())
    def all_of_them(command):
        ends.append(does_or_refuses(data, capsys, command))

    all_of_them()
    assert 50 < sum(ends) < len(ends) - 50  # of both kinds


@st.composite
def batches(draw) -> Batch:
    """One to three objects of a few voxels and views, with features and pictures of any kind."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    views = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    cells = [torch.randperm(RESOLUTION**3, generator=generator)[:count] for count in counts]
    sides = [RESOLUTION**2, RESOLUTION, 1]
    coords = torch.cat(
        [
            torch.stack([torch.full_like(c, i), *(c // side % RESOLUTION for side in sides)], 1)
            for i, c in enumerate(cells)
        ]
    )
    features = torch.randn(len(coords), CHANNELS, generator=generator)
    image = torch.rand(views * len(counts), 4, SIDE, SIDE, generator=generator)
    alpha = draw(st.sampled_from(["any", "none", "full"]))
    if alpha != "any":
        image[:, 3] = float(alpha == "full")
    angles = torch.rand(2, len(image), generator=generator).tolist()
    radius = draw(st.floats(0.9, 10))
    vertices = torch.cat([torch.eye(3), torch.zeros(1, 3)]) / 2 - 0.25  # a tetrahedron's
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], dtype=torch.int32)
    order = range(len(counts) + 1)
    return Batch(
        features=features * 10.0 ** draw(st.integers(-6, 4)),
        coords=coords.int(),
        batch_size=len(counts),
        camera=Camera.orbit(angles[0], angles[1], radius, 0.7, SIDE, SIDE),
        view_scene=[i for i in range(len(counts)) for _ in range(views)],
        image=image,
        names=[str(i) for i in range(len(counts))],
        meshes=Meshes(
            vertices.repeat(len(counts), 1),
            faces.repeat(len(counts), 1),
            [i * len(vertices) for i in order],
            [i * len(faces) for i in order],
        ),
    )


def has_gradients(decoder: str, batch: Batch) -> None:
    """Assert that a step's loss and gradients of a batch are finite."""
    recipe = DECODERS[decoder]
    weights = asdict(next(iter(recipe.presets.values())).weights)
    weights = {name: weight for name, weight in weights.items() if "lpips" not in name}
    vae = small_vae(decoder)
    objective = Objective(vae, recipe.loss(), weights)
    x = SparseTensor(batch.features, batch.coords, batch.batch_size)
    noise = torch.zeros(len(batch.coords), LATENT)
    loss, terms = objective(x, noise, batch, torch.ones(len(batch.image), 3))
    loss.backward()
    for name, term in terms.items():
        assert term.isfinite().all() or name == "psnr" and term == math.inf, (name, term)
    for name, p in vae.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


@settings(max_examples=6, **SETTINGS)
@given(st.sampled_from(sorted(DECODERS)), batches())
def test_every_batch_has_finite_gradients(decoder, batch):
    has_gradients(decoder, batch)


@pytest.mark.slow
@settings(max_examples=200, **SETTINGS)
@given(st.sampled_from(sorted(DECODERS)), batches())
def test_many_batches_have_finite_gradients(decoder, batch):
    has_gradients(decoder, batch)
