"""Files of formats that need Blender, converted by a program that stands in for it."""

import sys
from pathlib import Path

import pytest

from tests.helpers.mesh_files import TRIANGLE, Gltf, box, write_obj
from tests.helpers.prepare import SMALL, command, metadata
from train.meshes.read import CONVERTIBLE, read_mesh
from train.prepare import blender

# what it does depends on what the file holds: it writes that GLB, or says it and ends
STAND_IN = """#!{python}
import sys
words = sys.argv[1:]
source, target = words[words.index("--") + 1 :]
compile(words[words.index("--python-expr") + 1], "script", "exec")
assert words[:3] == ["--background", "--factory-startup", "--disable-autoexec"]
assert words[words.index("--python-exit-code") + 1] == "1"
with open({log!r}, "a") as log:
    print(source, file=log)
data = open(source, "rb").read()
if data[:4] == b"glTF":
    open(target, "wb").write(data)
elif data[:4] == b"wait":
    import time
    time.sleep(60)
else:
    print("Blender 0.0", flush=True)
    print(data.decode(), file=sys.stderr)
    sys.exit(int(data[:1] == b"E"))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "blender"
    log = str(tmp_path / "log")
    path.write_text(STAND_IN.format(python=sys.executable, log=log))
    path.chmod(0o755)
    return path


def model(path: Path, size: float = 1.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    gltf = Gltf()
    return gltf.save(path, [gltf.primitive(TRIANGLE * [1, size, 1], mode=0 if size == 0 else 4)])


def test_files_are_converted_once_and_prepared(tmp_path, program, capsys):
    for number, suffix in enumerate(CONVERTIBLE):
        model(tmp_path / "in" / f"a{suffix}", 1 + number)
    write_obj(tmp_path / "in", "b", box()[0])
    flags = ("--out", tmp_path / "o", *SMALL, "--blender", program)
    assert command(tmp_path / "in", *flags) == 0
    made = len(CONVERTIBLE) + 1
    assert f"{made} objects ({made} made" in capsys.readouterr().out
    names = {row["local_path"] for row in metadata(tmp_path / "o")}
    assert names == {"b.obj", *(f"a{suffix}" for suffix in CONVERTIBLE)}
    assert len((tmp_path / "log").read_text().splitlines()) == len(CONVERTIBLE)
    assert command(tmp_path / "in", *flags) == 0
    assert f"{made} objects (0 made, {made} there already)" in capsys.readouterr().out
    assert len((tmp_path / "log").read_text().splitlines()) == len(CONVERTIBLE)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_file_that_is_not_converted_costs_itself_alone(tmp_path, program, capsys, monkeypatch):
    monkeypatch.setattr(blender, "SECONDS", 2)
    model(tmp_path / "in" / "good.fbx")
    model(tmp_path / "in" / "points.fbx", 0)
    for name, text in (("bad", "Error: version 6100"), ("none", "nothing"), ("slow", "wait")):
        (tmp_path / "in" / f"{name}.fbx").write_text(text)
    flags = ("--out", tmp_path / "o", *SMALL, "--blender", program)
    assert command(tmp_path / "in", *flags) == 0
    output = capsys.readouterr().out
    where = f"skipped {tmp_path}/in"
    said = f"{program} did not convert it"
    assert f"{where}/bad.fbx: {said} (exit status 1): Error: version 6100" in output
    assert f"{where}/none.fbx: {said} (exit status 0): nothing" in output
    assert f"{where}/slow.fbx: {said} in 2 seconds" in output
    assert f"{where}/points.fbx.glb has no faces: its points and lines are not shown" in output
    assert "1 objects (1 made, 0 there already)" in output


def test_without_the_program(tmp_path, capsys):
    path = model(tmp_path / "in" / "a.fbx")
    advice = "a.fbx: .fbx needs Blender: python -m train.prepare --blender PROGRAM converts it"
    with pytest.raises(ValueError, match=f"^{advice}"):
        read_mesh(path)
    assert command(tmp_path / "in", "--out", tmp_path / "o", *SMALL) == 1
    assert f"skipped {tmp_path}/in/{advice}" in capsys.readouterr().out
    assert command(path, "--out", tmp_path / "o", "--blender", tmp_path / "gone") == 2
    assert f"--blender {tmp_path}/gone is no program" in capsys.readouterr().err
