"""Device, driver, versions and commit of a benchmark, as the results record them."""

import datetime
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
import triton


def device_name(device: torch.device) -> str:
    """Name a device as its vendor does; a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def file_name(name: str) -> str:
    """Make a device's file name, such as nvidia-h100-80gb-hbm3.json."""
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower())) + ".json"


def _first_line(*command: str) -> str:
    """The first line a command prints; "unknown" where it is absent, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    printed = done.stdout.strip()
    if done.returncode or not printed:
        return "unknown"
    return printed.splitlines()[0]


def commit() -> str:
    """Return the commit of these files in twelve digits, marked where they were changed since."""
    number = _first_line("git", "rev-parse", "--short=12", "HEAD")
    changed = _first_line("git", "status", "--porcelain", "--untracked-files=no")
    return number if changed == "unknown" else number + "+changes"


def today() -> str:
    """Return the date in UTC, such as 2026-11-30."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def environment(device: torch.device) -> dict[str, str]:
    """Collect what measured times depend on beside the sizes of a case."""
    driver = "none"
    if device.type == "cuda":
        driver = torch.version.hip or _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return {
        "device": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": today(),
    }
