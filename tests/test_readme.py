"""What README.md tells a newcomer to do works as it is written.

Its snippet runs in tests/run/test_systems.py.
"""

import re
from pathlib import Path

from tests.helpers.mesh_files import box, write_obj
from tests.helpers.runs import fresh
from train.gaussian import PRESETS
from train.prepare import command as prepare
from train.run import checkpoint

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_a_run_folder_holds_what_is_said(tmp_path):
    fresh(tmp_path / "run", "--steps", "2", "--save-every", "1", "--eval-objects", "1")
    text = " ".join(README.split())
    begin = text.index("`runs/gaussian-001` then holds")
    said = text[begin : text.index("from which `--resume` continues")]
    holds = set(re.findall(r"`([a-z]+\.\w+|[a-z]+/)`", said))
    (kept,) = re.findall(r"the last (\w+) `step_\*`", said)
    made = {f.name + "/" * f.is_dir() for f in (tmp_path / "run").iterdir() if f.name[0] != "."}
    assert holds == made and kept == {3: "three"}[checkpoint.KEEP]


def test_a_prepared_dataset_trains_with_the_flags_that_are_said(tmp_path):
    (flag,) = re.findall(r"`(--resolution \d+)` for the demo preset", README)
    assert flag == f"--resolution {PRESETS['demo'].resolution}"
    for name, size in (("a", (1, 0.2, 0.1)), ("b", (0.2, 1, 0.1))):
        write_obj(tmp_path / "in", name, *box(size))
    quick = "--views 6 --size 32 --supersample 1 --workers 1".split()
    assert (
        prepare.main([str(tmp_path / "in"), "--out", str(tmp_path / "data"), *quick, *flag.split()])
        == 0
    )
    assert (
        len(
            fresh(
                tmp_path / "run",
                "--steps",
                "1",
                "--eval-objects",
                "1",
                *flag.split(),
                "--data",
                str(tmp_path / "data"),
            )
        )
        == 1
    )
