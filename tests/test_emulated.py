"""Every op as compiled for three GPUs, executed on the CPU: `python -m pytest -m slow`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_sixteen_bits.py", "tests/test_fuzz.py::test_random_inputs")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_every_op(target):
    """In a process of its own: kernels are compiled or interpreted, never both in one."""
    # a worker of pytest-xdist has set more than what the emulator asks
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERP"))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--emulate", target, *TESTS]
    done = subprocess.run([*command, "--cases", "4"], cwd=ROOT, env=kept, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-8000:]


def test_an_unknown_target_is_refused():
    command = [sys.executable, "-m", "pytest", "-q", "--emulate", "sm_7", "tests/test_emulated.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4
    assert "--emulate sm_7 is not one of sm_80, sm_86, sm_89, sm_90" in done.stderr
