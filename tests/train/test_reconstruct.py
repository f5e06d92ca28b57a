"""train.reconstruct: meshes and items to latents, to pictures beside the truth, to scores."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models import MeshScene
from models.dinov2 import MODELS
from tests.helpers.dinov2 import random_weights
from tests.helpers.mesh_files import box, quad, write_obj
from tests.helpers.meshes import ball
from tests.helpers.prepare import command
from tests.helpers.runs import fresh
from train import reconstruct
from train.data.dataset import EMBEDDED, Dataset
from train.data.latent_file import read_latent, write_latent
from train.data.metadata import ply_mesh
from train.decoders import DECODERS
from train.losses.pictures import composite, psnr
from train.meshes.read import normalize, read_mesh
from train.run import report, turntable
from train.run.trained import open_trained

CPU = torch.device("cpu")
QUICK = ["--size", "32", "--frames", "4"]


def run(*arguments) -> int:
    return reconstruct.main([*map(str, arguments), *QUICK])


def described(folder) -> dict:
    return json.loads((folder / "reconstruction.json").read_text())


def test_a_mesh_and_its_item_have_the_same_latents_in_the_published_layout(boxes, tmp_path, capsys):
    mesh = boxes / "meshes" / "tall.obj"
    assert run(boxes / "run", mesh, boxes / "data" / "tall", "flat", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    first, second, other = (tmp_path / "out" / name for name in ("tall", "tall-2", "flat"))
    with np.load(first / "latent.npz") as ours, np.load(second / "latent.npz") as same:
        assert set(ours.files) == {"coords", "feats"}
        coords, feats = ours["coords"], ours["feats"]
        assert (coords.dtype, feats.dtype, coords.shape[1:]) == (np.uint8, np.float32, (3,))
        assert feats.shape == (len(coords), 8)
        assert np.array_equal(coords, same["coords"]) and np.array_equal(feats, same["feats"])
    scores = [described(folder)["checkpoints"]["run"]["psnr"] for folder in (first, second, other)]
    assert scores[0] == scores[1] != scores[2]
    assert f"PSNR {scores[0]['full']:.2f} dB" in printed and "6 views are drawn" in printed
    for folder in (first, second, other):
        with Image.open(folder / "turntable.webp") as film:
            assert film.n_frames == 4
            columns = film.width // 32
        assert columns == 2 and (folder / "views.png").is_file()
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["flat", "objects.png", "tall", "tall-2"]


def test_several_objects_are_shown_side_by_side(boxes, tmp_path, monkeypatch):
    """With the view that --view names, the last where there are fewer; the unseen are named."""
    drawn = {}
    monkeypatch.setattr(report, "picture", lambda *given: drawn.update({given[3].name: given}))
    data = shutil.copytree(boxes / "data", tmp_path / "data")
    table = (data / "metadata.csv").read_text().splitlines()
    lines = [line.replace("train", "test") if "flat" in line else line for line in table]
    (data / "metadata.csv").write_text("\n".join(lines))
    copied = shutil.copytree(boxes / "run", tmp_path / "run")
    config = (copied / "config.json").read_text().replace(str(boxes / "data"), str(data))
    (copied / "config.json").write_text(config)
    mesh = boxes / "meshes" / "tall.obj"
    assert run(copied, mesh, "flat", "--view", 9, "--out", tmp_path / "out") == 0
    rows, columns, _, file = drawn["objects.png"]
    assert columns == ["tall", "flat\n(unseen)"] and file == tmp_path / "out" / "objects.png"
    views = drawn["views.png"][0]  # of the last object
    assert list(rows) == list(views) == ["truth", "Gaus-\nsians"]
    for name, pictures in rows.items():
        assert pictures.shape == (2, 3, 32, 32) and torch.equal(pictures[1], views[name][-1])


def test_the_psnr_is_that_of_the_held_out_views(boxes, tmp_path):
    assert run(boxes / "run", "flat", "--out", tmp_path) == 0
    trained = open_trained(boxes / "run", CPU)
    held = Dataset(
        [boxes / "data"], resolution=8, features="rgb", image_size=32, views="holdout",
        holdout_views=2,
    )  # fmt: skip
    name = next(name for name in held.names if held.title(name) == "flat")
    item = held.item(name)
    scene = trained.decode(item.coords, trained.encode(item.coords, item.features))
    values = []
    for background in (torch.zeros(2, 3), torch.ones(2, 3)):
        got = scene.render(item.camera, background).color.clamp(0, 1)
        values.append(psnr(got, composite(item.image, background)))
    expected = torch.cat(values).mean().item()
    own = described(tmp_path / "flat")
    assert own["checkpoints"]["run"]["psnr"]["full"] == pytest.approx(expected, abs=1e-3)
    assert own["voxels"] == len(item.coords) and own["checkpoints"]["run"]["psnr"]["pictures"] == 4


def test_checkpoints_on_one_encoder_share_its_latents_and_others_have_their_own(
    finished, frozen, tmp_path, capsys
):
    assert run(finished, frozen, "chair2", "--out", tmp_path / "shared") == 0
    assert "2 checkpoints share an encoder" in capsys.readouterr().out
    folder = tmp_path / "shared" / "chair2"
    rows = described(folder)["checkpoints"]
    assert [row["latent"] for row in rows.values()] == ["latent.npz"] * 2
    assert rows["straight"]["kind"] == "gaussian" and rows["field"]["kind"] == "radiance"
    with Image.open(folder / "turntable.webp") as film:
        assert film.width == 3 * 32  # the truth and two decoders
    moved = shutil.copytree(finished, tmp_path / "moved")
    encoder = models.load_pretrained(moved / "checkpoints" / "encoder")
    with torch.no_grad():
        encoder.out_layer.bias[0] += 1e-3  # another encoder
    models.save_pretrained(encoder, moved / "checkpoints" / "encoder")
    assert run(finished, moved, "chair2", "--out", tmp_path / "own") == 0
    assert "2 encoders, each checkpoint decodes latents of its own" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "own" / "chair2").glob("*.npz")}
    assert names == {"latent_straight.npz", "latent_moved.npz"}
    latent = tmp_path / "own" / "chair2" / "latent_moved.npz"
    assert run(finished, "--latent", latent, "--out", tmp_path / "no") == 2
    assert "was made by an encoder of sha256" in capsys.readouterr().err


def test_what_ships_shows_a_box_that_it_has_not_seen(tmp_path):
    """A sound decoder is far above the 10 to 18 dB of an untrained one."""
    mesh = write_obj(tmp_path / "model", "box", *box((0.8, 0.5, 1.0)))
    assert run("demo", mesh, "--views", 6, "--out", tmp_path / "out") == 0
    scores = described(tmp_path / "out" / "box")["checkpoints"]
    assert list(scores) == list(DECODERS)
    for kind, own in scores.items():
        assert own["psnr"]["full"] > 22, kind


def test_latents_alone_are_decoded_by_a_prefix(boxes, tmp_path, capsys):
    assert run(boxes / "run", "tall", "--out", tmp_path) == 0
    latent = tmp_path / "tall" / "latent.npz"
    decoder = boxes / "run" / "checkpoints" / "decoder"
    capsys.readouterr()
    assert run(decoder, "--latent", latent, "--out", tmp_path) == 0
    rows = (
        described(tmp_path / "tall")["checkpoints"],
        described(tmp_path / "latent")["checkpoints"],
    )
    assert rows[0]["run"]["scene"] == rows[1]["decoder"]["scene"] and not rows[1]["decoder"]["psnr"]
    assert rows[0]["run"]["scene"] in capsys.readouterr().out


def test_latents_are_read_as_they_were_written(tmp_path):
    rng = torch.Generator().manual_seed(0)
    cells = torch.randperm(16**3, generator=rng)[:40]
    coords = torch.stack([cells // 256, cells // 16 % 16, cells % 16], 1).int()
    feats = torch.randn(40, 8, generator=rng)
    file = tmp_path / "x.npz"
    write_latent(file, coords, feats, "a" * 64)
    order = cells.argsort()
    for encoder in (None, "a" * 64):
        read = read_latent(file, 16, 8, encoder)
        assert torch.equal(read[0], coords[order]) and torch.equal(read[1], feats[order])
    with pytest.raises(
        ValueError, match=r"x.npz was made by .* aaaaaaaaaaaa\.\.\.,.* bbbbbbbbbbbb"
    ):
        read_latent(file, 16, 8, "b" * 64)
    with pytest.raises(ValueError, match="voxel 256 is over the 255 of uint8"):
        write_latent(tmp_path / "y.npz", coords + 241, feats, "a" * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


COORDS = np.arange(9, dtype=np.uint8).reshape(3, 3)
FEATS = np.ones((3, 8), np.float32)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"coords": np.pad(COORDS, ((0, 0), (1, 0)))},
            r"\[3, 4\], not integers \[V, 3\] \(a batch",
        ),
        ({"coords": COORDS.astype(np.float32)}, "coords are float32"),
        ({"coords": COORDS[[0, 0, 2]]}, "rows 0 and 1 are the same voxel"),
        ({"coords": COORDS * 2}, r"voxel 2 at \[12, 14, 16\] is outside the 16\^3 grid"),
        ({"coords": COORDS[:0], "feats": FEATS[:0]}, "the object has no voxels"),
        ({"feats": FEATS[:, :5]}, "feats have 5 channels, but the decoder takes 8"),
        ({"feats": FEATS[:2]}, r"feats are float32 \[2, 8\], not floats \[3, 8\]"),
        ({"feats": FEATS.astype(int)}, "feats are int64"),
        ({"feats": FEATS * np.float32([[1], [np.nan], [1]])}, "feats of row 1 are not finite"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_latents_that_cannot_be_are_named(tmp_path, changed, message):
    np.savez(tmp_path / "bad.npz", **{"coords": COORDS, "feats": FEATS} | changed)
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        read_latent(tmp_path / "bad.npz", 16, 8)


def test_one_object_that_cannot_be_used_costs_no_other(boxes, tmp_path, capsys):
    bad = tmp_path / "bad.obj"
    bad.write_text("v 0 0 0\n")
    assert run(boxes / "run", bad, "flat", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"python -m train.reconstruct: {bad} has no faces\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["flat", "objects.png"]
    assert run(boxes / "run", bad, "--out", tmp_path / "none" / "at" / "all") == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chair2"], "chair2 is no checkpoint"),
        (["RUN"], "nothing to reconstruct"),
        (["RUN", "RUN", "flat"], "is given twice"),
        (["RUN", "sofa"], "no object of .*, which has: flat, tall"),
        (["RUN", "gone/sofa"], "and gone no dataset"),
        (["RUN", "gone.glb"], "gone.glb is not there"),
        (["RUN", "DATA"], "is a folder, but no run"),
        (["RUN", "flat", "--latent", "x.npz"], "decoded alone, without flat"),
        (["RUN", "flat", "--weights", "w.pth"], "w.pth are for image features, but rgb is read"),
        (["RUN", "flat", "--encoder", "RUN"], "these runs have their own"),
        (["RUN", "flat", "--views", "1"], "--views 1 is not in 2 to 1000"),
        (["RUN", "flat", "--view", "0"], "--view 0 is not in 1 to 1000"),
        (["RUN", "--latent", "x.npz", "--views", "9"], "decoded alone, without --views"),
        (["RUN", "flat", "--device", "tpu"], "device 'tpu'"),
        (["RUN/checkpoints/decoder", "flat"], "names no encoder: --encoder PREFIX"),
        (["RUN", f"{EMBEDDED}/chair2"], r"run reads rgb features at 8\^3: .* no column"),
        (["RUN", "flat", "--bogus"], "unrecognized arguments: --bogus"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value))[-24:],
)
def test_wrong_input_ends_with_one_line_and_nothing_written(
    boxes, tmp_path, capsys, arguments, message
):
    places = {"RUN": str(boxes / "run"), "DATA": str(boxes / "data")}
    filled = [a.replace("RUN", places["RUN"]).replace("DATA", places["DATA"]) for a in arguments]
    try:
        status = run(*filled, "--out", tmp_path / "out")
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("python -m train.reconstruct: ")
    assert re.search(message, error), error


def test_what_is_there_is_not_overwritten(boxes, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    assert run(boxes / "run", "flat", "--out", tmp_path) == 2
    assert "flat is there already" in capsys.readouterr().err
    (tmp_path / "a" / "objects.png").mkdir(parents=True)
    assert run(boxes / "run", "flat", "tall", "--out", tmp_path / "a") == 2
    assert "objects.png is there already: choose another --out" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for out, message in (("file", "is no folder"), ("file/x", "cannot be made: Not a directory")):
        assert run(boxes / "run", "flat", "--out", tmp_path / out) == 2
        assert f"{tmp_path / out} {message}" in capsys.readouterr().err
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names == {"flat", "a", "a/objects.png", "file"}


def test_numbers_that_are_not_finite_are_not_drawn(boxes, tmp_path, capsys):
    np.savez(tmp_path / "big.npz", coords=COORDS[:1], feats=FEATS[:1] * np.float32(3e38))
    assert run(boxes / "run", "--latent", tmp_path / "big.npz", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"the scene that {boxes / 'run'} decodes: center has 6 of 6 values not finite" in error
    assert not (tmp_path / "out").exists()


def test_textures_beside_the_folder_of_a_mesh_need_root(boxes, tmp_path, capsys):
    """A red square whose texture stands in another folder, as in many packages of models."""
    (tmp_path / "textures").mkdir()
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    Image.fromarray(red).save(tmp_path / "textures" / "red.png")
    materials = "newmtl m\nKd 1 1 1\nmap_Kd ../textures/red.png\n"
    mesh = write_obj(tmp_path / "model", "square", quad(), materials)
    assert run(boxes / "run", mesh, "--out", tmp_path / "out") == 2
    assert "--root" in capsys.readouterr().err
    assert run(boxes / "run", mesh, "--root", tmp_path, "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "square" / "turntable.png") as strip:
        pixels = np.asarray(strip.convert("RGB")).astype(int)
    assert (pixels[..., 0] > 3 * pixels[..., 1] + 20).sum() > 50


def test_two_items_of_one_name_are_told_apart_by_sha256(boxes, tmp_path, capsys):
    data = shutil.copytree(boxes / "data", tmp_path / "data")
    table = data / "metadata.csv"
    table.write_text(table.read_text().replace("tall.obj", "flat.obj"))
    assert run(boxes / "run", "flat", "--data", data, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "flat are 2 objects" in error
    sha = error.split("sha256, ")[1][:8]
    assert run(boxes / "run", sha, "--data", data, "--out", tmp_path / "out") == 0


def test_the_truth_of_a_file_and_of_an_item_are_drawn_by_the_same_cameras(tmp_path):
    """A solid that no turn or mirror maps to itself has one silhouette: middle and spread."""
    corners = "v 0 0 0\nv 1 0 0\nv 0 2 0\nv 0 0 0.5\n"
    file = write_obj(tmp_path, "solid", corners + "f 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    mesh = read_mesh(file)
    normalize(mesh)
    (tmp_path / "mesh.ply").write_bytes(ply_mesh(mesh.vertices, mesh.faces))
    matrices = turntable.poses(5)
    lit = turntable.draw_file(file, None, matrices, 64)
    grey = turntable.draw_shape(tmp_path / "mesh.ply", turntable.cameras(matrices, 64, CPU))
    spreads = []
    for ours, theirs in zip(lit, grey, strict=True):
        places = [(picture < 0.98).any(0).nonzero().float() for picture in (ours, theirs)]
        middles = torch.stack([place.mean(0) for place in places])
        spread = torch.stack([place.std(0) for place in places])
        assert middles.diff(dim=0).abs().max() < 0.5 and spread.diff(dim=0).abs().max() < 0.5
        spreads.append(torch.cat([middles[1], spread[1]]))
        assert spread[1, 0] > 1.4 * spread[1, 1]  # y, up in an OBJ, stands upright
    # another turn, or a mirrored one, would be seen
    assert (torch.stack(spreads)[1:] - torch.stack(spreads)[1:].flip(0)).abs().amax(1).min() > 1


def test_a_turn_shows_all_of_the_unit_cube():
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    uv, depth = turntable.cameras(turntable.poses(36), 64, CPU).project(corners)
    assert depth.min() > 1 and 0 < uv.min() and uv.max() < 1


def test_a_mesh_without_colours_is_shown_by_its_shape():
    vertices, faces, _ = ball(6)
    nothing = torch.zeros(0)
    scene = MeshScene(vertices, faces, None, None, nothing.view(0, 3), nothing, nothing.sum(), 32)
    camera = turntable.cameras(turntable.poses(2), 24, CPU)
    rows = turntable.look("mesh", scene, camera)
    assert list(rows) == ["mesh\nshape"] and rows["mesh\nshape"].shape == (2, 3, 24, 24)
    assert rows["mesh\nshape"].min() < 0.9


@pytest.mark.slow
def test_image_features_of_a_mesh_are_those_of_its_item(boxes, tmp_path, capsys):
    """With a network of random weights; without its file the message says how to get it."""
    name = "dinov2_vits14_reg-28"
    weights = tmp_path / "weights.pth"
    torch.save(random_weights(MODELS["dinov2_vits14_reg"]), weights)
    settings = "--size 32 --views 6 --holdout-views 2 --resolution 8 --workers 0 --supersample 1"
    own = ["--features", name, "--weights", weights, "--device", "cpu"]
    data = tmp_path / "data"
    assert command(boxes / "meshes", "--out", data, *settings.split(), *own) == 0
    flags = f"--resolution 8 --features {name} --model.window 4 --eval-objects 1 --steps 1"
    fresh(tmp_path / "run", "--data", data, *flags.split())
    mesh = boxes / "meshes" / "tall.obj"
    capsys.readouterr()
    assert run(tmp_path / "run", mesh, "--out", tmp_path / "out") == 2
    assert "need --weights FILE: curl -LO https://" in capsys.readouterr().err
    given = [tmp_path / "run", mesh, "tall", "--weights", weights, "--out", tmp_path / "out"]
    assert run(*given, "--device", "cpu") == 0
    with (
        np.load(tmp_path / "out" / "tall" / "latent.npz") as made,
        np.load(tmp_path / "out" / "tall-2" / "latent.npz") as known,
    ):
        assert np.array_equal(made["coords"], known["coords"])
        assert np.array_equal(made["feats"], known["feats"])
