"""On systems without fcntl, Triton and much else of Linux, all but the kernels works."""

import ast
import errno
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers.mesh_files import box, write_obj
from tests.helpers.other_system import ROOT, environment
from tests.helpers.runs import TINY
from tests.helpers.source_files import SOURCES, path, tree
from train.run import folder as folders

CODE = """
import sys
from pathlib import Path

import torch

from kernels import backend
from train import gaussian, loop, mesh, radiance, reconstruct
from train.losses import PictureLoss
from train.losses.geometry import SurfaceLoss
from train.prepare import command as prepare


def train(module, *flags):
    name = module.__name__.removeprefix("train.")
    loss = SurfaceLoss if module is mesh else PictureLoss
    loop.main(name, module.PRESETS, module.build, flags, loss)


if __name__ == "__main__":
    once = ["--eval-objects", "1", "--out"]
    train(gaussian, *sys.argv[1].split(), *once, "runs/gaussian-001")
    train(gaussian, "--resume", "runs/gaussian-001", "--steps", "6")
    if sys.argv[2] != "0":  # there is time
        for module in (radiance, mesh):
            train(module, "--steps", "1", *once, f"runs/{module.__name__}")
    workers = sys.argv[2]
    quick = f"--views 6 --size 32 --supersample 1 --resolution 32 --workers {workers}".split()
    assert prepare.main(["in", "--out", "data", *quick]) == 0
    given = ["runs/gaussian-001", "in/box.obj", "--frames", "2", "--size", "32", "--views", "6"]
    assert reconstruct.main([*given, "--out", "out"]) == 0
    try:
        with backend.use("interpreter"):
            backend.name(torch.empty(0))
    except ImportError as error:
        assert "Triton is not installed" in str(error), error
    else:
        sys.exit("a kernel was asked for and nothing said that Triton is missing")
    exec(Path("snippet.py").read_text(encoding="utf-8"))
    assert qkv.grad.isfinite().all()
    assert image.color.shape == (2, 3, 128, 128) and image.color.amin() < 0.9
    image.color.mean().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    assert not {"fcntl", "triton", "resource"} & set(sys.modules)
    print("all of it")
"""


@pytest.mark.parametrize(
    "flags, workers",
    [
        ((*TINY, "--resolution", "32", "--steps", "5"), 0),
        pytest.param(("--steps", "5", "--workers", "2"), 2, marks=pytest.mark.slow),
    ],
    ids=["tiny", "demo"],
)
def test_what_a_newcomer_does_works_without_them(tmp_path, flags, workers):
    (tmp_path / "site").mkdir()
    write_obj(tmp_path / "in", "box", *box((1, 0.5, 0.2)))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert snippet.count("runs/gaussian-001") == 1
    (tmp_path / "snippet.py").write_text(snippet)
    (tmp_path / "script.py").write_text(CODE)
    done = subprocess.run(
        [sys.executable, "script.py", " ".join([*flags, "--save-every", "2"]), str(workers)],
        cwd=tmp_path,
        # a kernel is asked for through the interpreter, as there may be no GPU
        env=environment(tmp_path / "site") | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("all of it\n"), done.stdout + done.stderr
    run = tmp_path / "runs" / "gaussian-001"
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert f"{run.relative_to(tmp_path)} cannot be locked here: start no second" in done.stdout
    assert (tmp_path / "out" / "box" / "reconstruction.json").is_file()


# of Windows; others are looked up by name, where the system has them
SIGNALS = {"SIGINT", "SIGTERM", "SIG_IGN", "SIG_DFL"}


def test_no_source_names_a_signal_that_a_system_lacks():
    found = [
        f"{path(file)}:{node.lineno}: signal.{node.attr}"
        for file in SOURCES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "signal"
        if node.attr.startswith("SIG") and node.attr not in SIGNALS
        if node.attr not in ("SIG_BLOCK", "SIG_SETMASK", "SIG_UNBLOCK")
    ]
    assert not found, found


class Locks:
    """Stands for msvcrt: one holder of the first byte of a file, as Windows has it."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        self.holder = None

    def locking(self, number: int, mode: int, size: int) -> None:
        if mode == self.LK_UNLCK:
            assert self.holder == number
            self.holder = None
            return
        if self.holder is not None:
            raise PermissionError(errno.EACCES, "Permission denied")
        self.holder = number


def test_on_windows_a_folder_is_held_by_its_own_locks(tmp_path, monkeypatch):
    locks = Locks()
    monkeypatch.setattr(folders, "fcntl", None)
    monkeypatch.setattr(folders, "msvcrt", locks)
    for _ in range(2):
        with folders.locked(tmp_path):
            with pytest.raises(ValueError, match="in use by another"), folders.locked(tmp_path):
                pass
        assert locks.holder is None


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    reasons = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO]

    def refuse(file, kind):
        raise OSError(reasons.pop(0), "no locks")

    flock = SimpleNamespace(flock=refuse, LOCK_EX=0, LOCK_NB=0, LOCK_UN=0)
    monkeypatch.setattr(folders, "fcntl", flock)
    while len(reasons) > 1:
        with folders.locked(tmp_path):
            assert f"{tmp_path} cannot be locked here" in capsys.readouterr().out
    with pytest.raises(OSError, match="no locks"), folders.locked(tmp_path):
        pass
