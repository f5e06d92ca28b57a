"""Kinds of files that come from elsewhere: sound ones, and what reads them."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load, save

import models
from models import dinov2
from tests.attack import checkpoints, damage, lies, places
from tests.attack.child import Case
from tests.helpers.damaged_files import pristine
from tests.helpers.datasets import AA, RES, SIZE, make
from tests.helpers.dinov2 import TINY, random_weights
from tests.helpers.models import small_decoder, small_encoder
from train import lpips
from train.config import read_config, write_config
from train.data.dataset import Dataset
from train.data.metadata import ply_mesh, ply_points
from train.data.sampler import Sampler
from train.gaussian import PRESETS
from train.meshes.read import normalize, read_mesh
from train.optimizer import GradClipper, LossScale, Optimizer
from train.prepare.features import ImageFeatures, cells_of, read_points
from train.prepare.sources import Result, Source, hash_source, with_path
from train.run import checkpoint
from train.run.latents import Latents
from train.run.report import Log

FAMILIES = ("sound", "flips", "cuts", "counts", "types", "names", "places")
KINDS = (
    "OBJ",
    "MTL",
    "texture",
    "PLY text",
    "PLY binary",
    "GLB",
    "glTF",
    "glTF buffer",
    "transforms.json",
    "view",
    "mesh.ply",
    "metadata.csv",
    "features",
    "voxels",
    "checkpoint",
    "checkpoint's state",
    "config.json",
    "log.jsonl",
    "weights",
    "model.json",
    "latents",
    "weights.pth",
    "LPIPS",
)
Change = Callable[[bytes, np.random.Generator], bytes]
NAME = "dinov2_tiny"


@dataclass(frozen=True)
class Subject:
    """A kind of file: sound files, the one that is damaged, its reader, families of damage."""

    files: Mapping[str, bytes]  # by path
    victim: str
    read: Callable[[Path], None]  # of the folder
    families: Mapping[str, Change]
    names: str = ""  # a file that the victim names
    contained: bool = True  # what is read lies below the folder
    limited: bool = False  # its reader limits the memory of the process
    flat: Mapping[str, bytes] = field(init=False)

    def __post_init__(self):
        object.__setattr__(
            self, "flat", {Path(name).name: data for name, data in self.files.items()}
        )

    def write(self, folder: Path) -> None:
        """Write the sound files."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def prepare(self, case: Case, folder: Path) -> None:
        """Write the files of a case, beside a folder that nothing should reach."""
        self.write(folder)
        for name, data in self.flat.items():
            (folder.parent / "outside" / name).write_bytes(data)
        rng = np.random.default_rng([case.seed, *case.family.encode()])
        victim = folder / self.victim
        if case.family == "sound":
            return
        if case.family == "names":
            places.lay(folder, victim.parent)
            places.in_text(folder, victim, self.names, case.seed)
        elif case.family == "places":
            target = victim
            if self.names and case.seed >= 8 and rng.random() < 0.5:
                target = victim.parent / self.names
            places.instead(folder, target, case.seed)
        else:
            victim.write_bytes(self.families[case.family](victim.read_bytes(), rng))


def cases_of(subject: Subject, count: int) -> list[Case]:
    """The sound files once, then so many cases of every family that a kind has."""
    families = [*subject.families, *(["names"] if subject.names else []), "places"]
    return [Case("sound", 0), *(Case(name, seed) for name in families for seed in range(count))]


# readers: what each gives must be as its docstring says


def _mesh(name: str, folder: Path) -> None:
    source = hash_source(Source(folder / name, name, root=folder))
    if isinstance(source, Result):
        raise ValueError(source.failure)
    try:
        mesh = read_mesh(source.file, source.home)
        normalize(mesh)
    except (OSError, ValueError) as error:  # as train.prepare words it
        raise ValueError(with_path(source, str(error))) from error
    assert np.isfinite(mesh.vertices).all() and len(mesh.faces)
    assert 0 <= mesh.faces.min() and mesh.faces.max() < len(mesh.vertices)


def _dataset(folder: Path) -> None:
    data = Dataset([folder], resolution=RES, features="rgb", image_size=SIZE, meshes=True)
    item = data.item(data.names[0])
    assert item.image.min() >= 0 and item.image.max() <= 1 and item.features.isfinite().all()
    assert item.coords.min() >= 0 and item.coords.max() < RES
    assert item.camera.extrinsics.isfinite().all() and item.camera.intrinsics.isfinite().all()
    assert item.mesh[0].isfinite().all() and item.mesh[1].max() < len(item.mesh[0])
    data.title(data.names[0])


def _voxels(folder: Path) -> None:
    features = ImageFeatures(folder, "dinov2_vits14_reg", folder / "absent", torch.device("cpu"))
    file = features.voxels(RES, AA)
    cells_of(read_points(file), RES, file)


class _Encoder:
    """Stands for one that is asked where no latents are kept."""

    latent_channels = 4

    def __call__(self, x: models.SparseTensor) -> SimpleNamespace:
        return SimpleNamespace(mean=x.feats[:, :4])


def _latents(folder: Path) -> None:
    latents = Latents(_Encoder(), folder)
    coords = torch.arange(15, dtype=torch.int32).view(5, 3)
    batch = SimpleNamespace(
        features=torch.zeros(5, 6), coords=torch.nn.functional.pad(coords, (1, 0)), names=[AA]
    )
    found = latents._latents(AA, batch.features, batch.coords)
    assert found.shape == (5, 4) and found.isfinite().all()


def _model(folder: Path) -> None:
    model = models.load_pretrained(folder / "model")
    assert all(p.isfinite().all() for p in model.parameters())


def _config(folder: Path) -> None:
    read_config(folder / "config.json", "gaussian", PRESETS)


def _optimizer() -> Optimizer:
    model = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(torch.nn.Linear(3, 3))})
    named = [(f"a.{name}", p) for name, p in model.named_parameters()]
    return Optimizer(named, GradClipper(1.0), LossScale(), muon=True)


def _checkpoint(folder: Path) -> None:
    tensors, state = checkpoint.load(checkpoint.newest(folder))
    optimizer = _optimizer()
    try:
        optimizer.load(tensors, checkpoint.part(state, "optimizer"))
        optimizer.clip.load_state_dict(checkpoint.part(state, "clipper"))
        Sampler(7, 2).load_state_dict(checkpoint.part(state, "sampler"))
    except ValueError as error:  # as train.trainer.Run words it
        raise ValueError(f"step_00000001.safetensors: {error}") from error
    for p in optimizer.parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3)


def _log(folder: Path) -> None:
    with Log(folder / "log.jsonl", 3) as log:
        assert log.seconds >= 0 and all(row["step"] <= 3 for row in log.rows)


def _weights(folder: Path) -> None:
    dinov2.MODELS[NAME] = TINY["plain"]
    dinov2.load(NAME, folder / "weights.pth")


def _perceptual(folder: Path) -> None:
    try:
        lpips.convert(folder / "vgg16.ckpt")
    except ValueError as error:  # the rest of the real one is not there
        if "has no array VGG16_0/Conv_1/kernel" not in str(error):
            raise


# sound files


def _read(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _run_files(folder: Path) -> dict[str, bytes]:
    optimizer = _optimizer()
    for p in optimizer.parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3)
    state = {"step": 1, "optimizer": optimizer.state(), "clipper": optimizer.clip.state_dict()}
    state["sampler"] = Sampler(7, 2).state_dict(1)
    checkpoint.save(folder, 1, optimizer.tensors(), state)
    rows = [{"step": i, "loss": 0.5, "psnr": None, "seconds": 1.5 * i} for i in range(1, 6)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(PRESETS["demo"], "gaussian", folder / "config.json")
    # checksums would refuse most of it before the rest is looked at (tests.attack.runs has them)
    return {name: _unchecked(name, data) for name, data in _read(folder).items()}


def _unchecked(name: str, data: bytes) -> bytes:
    return checkpoints.earlier(data) if name.endswith(".safetensors") else data


def _model_files(model: torch.nn.Module, folder: Path) -> dict[str, bytes]:
    models.save_pretrained(model, folder / "model")
    files = _read(folder)
    weights = load(files["model.safetensors"])
    return files | {"model.safetensors": save(weights)}  # published ones have no checksums


TEXT = {"flips": damage.flip, "cuts": damage.cut, "counts": damage.number, "types": damage.word}
JSON = TEXT | {"counts": damage.inflate, "types": damage.swap}
PLY = TEXT | {"counts": lies.ply_counts, "types": lies.ply_types}
PNG = TEXT | {"counts": lies.png_counts, "types": lies.png_types}
NPZ = TEXT | {"counts": lies.npz_counts, "types": lies.npz_types}
TENSORS = TEXT | {"counts": lies.tensor_counts, "types": lies.tensor_types}
PICKLED = TEXT | {"counts": lies.weights_counts, "types": lies.weights_types}
STATE = TEXT | {
    "counts": partial(damage.in_state, damage.inflate),
    "types": partial(damage.in_state, damage.swap),
}
GLB = TEXT | {
    "counts": partial(damage.in_glb, damage.inflate),
    "types": partial(damage.in_glb, damage.swap),
}
CSV = TEXT | {"types": partial(damage.word, separator=b",")}


def subjects(folder: Path) -> dict[str, Subject]:
    """Make every kind; `folder` is for the files that they are made of."""
    for name in ("meshes", "data", "run", "encoder", "decoder", "tensors"):
        (folder / name).mkdir(parents=True)
    made = _meshes(folder / "meshes")
    data = _data_files(folder / "data")
    views = f"renders/{AA}"
    made["transforms.json"] = Subject(data, f"{views}/transforms.json", _dataset, JSON, "000.png")
    made["view"] = Subject(data, f"{views}/000.png", _dataset, PNG)
    made["mesh.ply"] = Subject(data, f"{views}/mesh.ply", _dataset, PLY)
    made["metadata.csv"] = Subject(data, "metadata.csv", _dataset, CSV)
    made["features"] = Subject(data, f"features/rgb_{RES}/{AA}.npz", _dataset, NPZ)
    made["voxels"] = Subject(data, f"voxels_{RES}/{AA}.ply", _voxels, PLY, contained=False)
    run = _run_files(folder / "run")
    state = "step_00000001.safetensors"
    made["checkpoint"] = Subject(run, state, _checkpoint, TENSORS, contained=False)
    made["checkpoint's state"] = Subject(run, state, _checkpoint, STATE, contained=False)
    made["config.json"] = Subject(run, "config.json", _config, JSON, contained=False)
    made["log.jsonl"] = Subject(run, "log.jsonl", _log, TEXT, contained=False)
    encoder = _model_files(small_encoder(), folder / "encoder")
    decoder = _model_files(small_decoder(), folder / "decoder")
    made["weights"] = Subject(encoder, "model.safetensors", _model, TENSORS, contained=False)
    made["model.json"] = Subject(decoder, "model.json", _model, JSON, contained=False)
    generator = torch.Generator().manual_seed(0)
    kept = {
        "mean": torch.randn(5, 4, generator=generator),
        "coords": torch.arange(15, dtype=torch.int32).view(5, 3),
    }
    latents = {f"{AA}.safetensors": save(kept)}
    made["latents"] = Subject(latents, f"{AA}.safetensors", _latents, TENSORS, contained=False)
    torch.save(random_weights(TINY["plain"]), folder / "tensors" / "weights.pth")
    pth = _read(folder / "tensors")
    made["weights.pth"] = Subject(pth, "weights.pth", _weights, PICKLED, contained=False)
    made["LPIPS"] = Subject(_package(), "vgg16.ckpt", _perceptual, TEXT, contained=False)
    return made


def _meshes(folder: Path) -> dict[str, Subject]:
    pristine(folder)
    files = _read(folder)

    def kind(names: str, victim: str, families: Mapping[str, Change], named: str = "") -> Subject:
        own = {name: files[name] for name in names.split()}
        return Subject(own, victim, partial(_mesh, next(iter(own))), families, named, limited=True)

    painted = "painted.obj painted.mtl painted.png"
    parts = "parts.gltf parts.bin"
    return {
        "OBJ": kind(painted, "painted.obj", TEXT, "painted.mtl"),
        "MTL": kind(painted, "painted.mtl", TEXT, "painted.png"),
        "texture": kind(painted, "painted.png", PNG),
        "PLY text": kind("text.ply", "text.ply", PLY),
        "PLY binary": kind("binary.ply", "binary.ply", PLY),
        "GLB": kind("whole.glb", "whole.glb", GLB),
        "glTF": kind(parts, "parts.gltf", JSON, "parts.bin"),
        "glTF buffer": kind(parts, "parts.bin", TEXT),
    }


def _data_files(folder: Path) -> dict[str, bytes]:
    make(folder, [AA])
    with np.load(folder / f"features/rgb_{RES}/{AA}.npz") as stored:
        centres = (stored["indices"] + 0.5) / RES - 0.5
    (folder / f"voxels_{RES}").mkdir()
    (folder / f"voxels_{RES}" / f"{AA}.ply").write_bytes(ply_points(centres))
    triangle = ply_mesh(np.eye(3) / 2, np.array([[0, 1, 2]]))
    return _read(folder) | {f"renders/{AA}/mesh.ply": triangle}


def _package() -> dict[str, bytes]:
    """A pickle as that of the LPIPS package, of one layer."""
    layer = {"kernel": np.ones((3, 3, 3, 64), np.float32), "bias": np.ones(64, np.float32)}
    data = pickle.dumps({"VGG16_0": {"Conv_0": layer}}, protocol=3)
    return {"vgg16.ckpt": data.replace(b"numpy._core", b"numpy.core")}
