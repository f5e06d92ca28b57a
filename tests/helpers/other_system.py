"""A Python that lacks what Windows lacks, or has otherwise: started by `command`, by no import.

Modules and functions of POSIX are absent, as is Triton; processes are spawned; a file that this
process has open, or mapped into memory, is neither replaced, renamed nor deleted; folders cannot be
opened, and what was opened for reading alone is not brought to the disk. What this cannot show:
paths with backslashes, other ends of lines, and what the libraries do there.
"""

import errno
import importlib.abc
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = {"fcntl", "grp", "pwd", "resource", "termios", "triton"}
LACKS = {
    os: "O_DIRECTORY O_NOFOLLOW O_NONBLOCK fork getpgid killpg sched_getaffinity setsid sync",
    signal: "SIGBUS SIGHUP pthread_sigmask",
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def environment(folder: Path) -> dict[str, str]:
    """Make the environment of such a Python; `folder` gets the file that it reads first."""
    start = "from tests.helpers.other_system import install\n\ninstall()\n"
    (folder / "sitecustomize.py").write_text(start)
    own = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONWARNDEFAULTENCODING": "1"}
    return os.environ | own


def install() -> None:
    """Take it all away from this process."""
    import fcntl

    for name in [name for name in sys.modules if name.split(".")[0] in ABSENT]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder())
    access = os.O_ACCMODE
    for module, names in LACKS.items():
        for name in names.split():
            delattr(module, name)
    shutil._use_fd_functions = False  # which open folders
    multiprocessing.set_start_method("spawn")
    warnings.filterwarnings("error", category=EncodingWarning, module=r"(kernels|models|train)\b")
    whole = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink")}

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & access == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading alone")
        whole["fsync"](number)

    def moved(name):
        def change(*paths, **options):
            for path in paths:
                _check_closed(path)
            whole[name](*paths, **options)

        return change

    os.fsync = fsync
    os.replace, os.rename = moved("replace"), moved("rename")
    os.unlink = os.remove = moved("unlink")


def _check_closed(path) -> None:
    """Raise PermissionError for a file, or a folder with one, that this process has open."""
    place = os.path.realpath(path)
    found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found += [line.rstrip("\n").split(maxsplit=5)[-1] for line in maps]
    if any(one == place or one.startswith(place + os.sep) for one in found):
        raise PermissionError(errno.EACCES, "another part of this process has it open", str(path))
