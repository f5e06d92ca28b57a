"""notebooks/jobs.py: time is shared among steps, and nothing runs on after its limit."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.scripts import notebook_script

script = notebook_script("jobs")
Step = script.Step
PLAN = [Step("first", 60, 40), Step("second", 20, 10), Step("third", 20, 0)]


@pytest.mark.parametrize(
    ("left", "steps", "seconds"),
    [
        (200, PLAN, 60 + 100 * 0.8),
        (100, PLAN, 60),
        (90, PLAN, 60 + 10 * 0.8),
        (60, PLAN, 60),
        (59, PLAN, None),
        (200, PLAN[1:2], 200),
        (10, [], None),
    ],
    ids=str,
)
def test_time_is_shared_and_the_last_go_first(left, steps, seconds):
    assert script.allotted(left, steps) == (None if seconds is None else pytest.approx(seconds))


def jobs(folder: Path, **changes) -> script.Jobs:
    return script.Jobs(folder, folder, dict(os.environ), **changes)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_logs_and_statuses_of_commands_side_by_side(tmp_path):
    waits = "import time, pathlib, sys; pathlib.Path(sys.argv[1]).touch()\n"
    waits += "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    # each waits for the other
    commands = {"a": [*python(waits), "x", "y"], "b": [*python(waits), "y", "x"]}
    commands["bad"] = python("print('oh'); raise SystemExit(3)")
    ended = jobs(tmp_path).run(commands, time.monotonic() + 60, at_once=2)
    assert [ended[name].status for name in ("a", "b", "bad")] == [0, 0, 3]
    assert (tmp_path / "bad.log").read_text() == "oh\n"


def test_at_the_limit_a_command_may_save_and_its_children_are_gone(tmp_path):
    child = "import time; time.sleep(600)"
    code = f"""
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-S", "-c", {child!r}]).pid, flush=True)
try:
    while True: time.sleep(0.01)
except KeyboardInterrupt:
    print("saved", flush=True)
"""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    commands = {"saves": python(code), "deaf": python(deaf), "late": python("open('late', 'w')")}
    began = time.monotonic()
    ended = jobs(tmp_path, grace=0.5).run(commands, began + 1.5, at_once=2)
    assert [how.status for how in ended.values()] == [None] * 3 and time.monotonic() - began < 30
    assert ended["saves"].seconds > 1 and ended["late"].seconds == 0
    assert not (tmp_path / "late").exists()
    pid, saved = (tmp_path / "saves.log").read_text().split()
    assert saved == "saved" and gone(int(pid))


def gone(pid: int) -> bool:
    """Wait for a process to end; one that nobody waited for counts as ended."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_what_ends_the_plan_ends_its_commands(tmp_path):
    def stop():
        if (tmp_path / "a.log").stat().st_size:
            raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        jobs(tmp_path, meanwhile=stop).run({"a": python(code)}, time.monotonic() + 60)
    assert gone(int((tmp_path / "a.log").read_text()))
