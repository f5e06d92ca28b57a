"""Runs PTX over tensors' own memory: builds the executor, gives it memory and its shadow, reads
back counters and problems.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy
from torch import Tensor

FLAGS = (
    "-std=c++20 -O2 -ffp-contract=off -fno-math-errno -fno-trapping-math -shared -fPIC -pthread"
).split()
# as in executor.cpp
GLOBAL, SHARED = 0, 1
SPACES = ("global", "shared", "local", "generic")
SHARED_BASE = 1024
KINDS = (
    "out of bounds",
    "misaligned",
    "uninitialised read",
    "race: read after write",
    "race: write after read",
    "race: write after write",
    "race: the same value written twice",
    "access to bytes of a cp.async not waited for",
    "barrier in diverged code",
    "deadlock",
    "instruction budget used up",
    "trap",
    "two lanes store different values to one address",
    "copies of one element differ by rounding",
)
NOTES = {6, 13}  # no failure: the outcome depends on no order, or by a rounding
FATAL = {9, 10, 11}


def _layout(**names: str) -> numpy.dtype:
    """A C structure: its members by type."""
    pairs = [(name, kind) for kind, group in names.items() for name in group.split()]
    return numpy.dtype(pairs, align=True)


# as in executor.cpp
REGION = numpy.dtype("u8, u8, u4, u4, u8, u8")
ERROR = _layout(i4="kind pc other lane warp cta bytes space", u8="address")
LAUNCH = _layout(
    i4="x y z warps shared threads regions check_memory check_races most_errors random "
    "error_count error_total",
    u8="seed budget values region executed lanes units ideal errors read_bytes written_bytes "
    "barriers",
)


@dataclass
class Options:
    """How a launch is executed, and what is checked."""

    memory: bool = True  # global accesses lie in a tensor of the launch
    races: bool = True
    strict: bool = True  # raise PtxError when a check fails
    threads: int = 1  # CTAs at a time
    seed: int | None = None  # run CTAs and warps in random order
    budget: int = 20_000_000_000  # warp instructions of a launch
    uninitialised: Sequence[Tensor] = ()  # their bytes may not be read before they are written


class PtxUnsupported(Exception):
    """An instruction or operand that the emulator does not know."""


class Instruction(NamedTuple):
    """One instruction: the handler's name, what was written, and its first operand."""

    name: str
    text: str
    line: int  # of the PTX
    source: int  # index into Program.sources
    first: int  # of a load or store: the space; of a wgmma: its columns


@dataclass
class Program:
    """A decoded kernel."""

    handle: int  # the executor's
    name: str
    threads: int  # of a CTA
    shared: int  # static bytes
    granule: int  # bytes that the shadow of global memory tells apart
    parameters: list[int]  # bytes of each
    globals: list[list[int]]  # address and bytes of arrays in global memory
    sources: list[str]
    code: list[Instruction]


@dataclass
class Problem:
    """One failed check, the first of its kind at its instruction."""

    kind: str
    text: str
    note: bool


class PtxError(RuntimeError):
    """A launch broke a rule; `problems` has every distinct one."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(problem.text for problem in problems[:20]))


@dataclass
class Report:
    """The work of one launch. Arrays are per instruction of `program.code`."""

    program: Program
    grid: tuple[int, ...]
    warps: int
    shared: int
    executed: numpy.ndarray
    lanes: numpy.ndarray  # active ones, of all executions
    units: numpy.ndarray  # sectors of 32 bytes, or wavefronts of shared memory
    ideal: numpy.ndarray  # the fewest that would do
    read_bytes: int  # each byte once
    written_bytes: int
    barriers: int
    problems: list[Problem] = field(default_factory=list)
    ptx: str = ""


def _host() -> str:
    """The processor, as far as compiled code depends on it."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.machine() + platform.processor()
    keys = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({x for x in file.read_text().splitlines() if x.startswith(keys)}))


@cache
def library() -> ctypes.CDLL:
    """Load the executor, compiled by g++ on first use into the user's cache."""
    source = Path(__file__).with_name("executor.cpp")
    key = hashlib.sha256(source.read_bytes() + f"{FLAGS}{_host()}".encode()).hexdigest()[:16]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_home / "trislat-emulator"
    built = folder / f"{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that start together one compiles
        if not built.exists():
            _compile(source, built)
    loaded = ctypes.CDLL(str(built))
    loaded.ptx_decode.restype = ctypes.c_void_p
    loaded.ptx_decode.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)]
    loaded.ptx_launch.argtypes = [ctypes.c_void_p] * 2
    return loaded


def _compile(source: Path, built: Path) -> None:
    compiler = shutil.which("g++")
    if not compiler:
        raise RuntimeError("the emulator is compiled by g++, which is not installed")
    part = built.with_suffix(".part")
    for native in (["-march=native"], []):  # not every g++ knows every processor
        command = [compiler, *FLAGS, *native, "-o", part, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            part.replace(built)
            return
    raise RuntimeError(f"g++ could not compile {source.name}:\n{done.stderr[-2000:]}")


def decode(ptx: str) -> Program:
    """Return the one kernel of a PTX module, ready to run."""
    said = ctypes.c_char_p()
    handle = library().ptx_decode(ptx.encode(), ctypes.byref(said))
    if not handle:
        raise PtxUnsupported(said.value.decode())
    found = json.loads(said.value)
    code = [Instruction(*row) for row in found.pop("code")]
    return Program(handle=handle, code=code, **found)


def _bits(value, size: int) -> int:
    """A parameter's bits: a tensor's address, a float's nearest one of that size."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        packed = numpy.array(value, dtype=f"f{size}").tobytes()
        return int.from_bytes(packed, "little")
    return int(value or 0) & ((1 << 8 * size) - 1)


def _regions(program: Program, tensors: list[Tensor], options: Options):
    """The global memory that may be accessed, and its shadow's pages: zero until touched."""
    spans = dict(program.globals)
    for storage in (tensor.untyped_storage() for tensor in tensors):
        spans |= {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    poisoned = {tensor.untyped_storage().data_ptr() for tensor in options.uninitialised}
    pages, rows = [], []
    for begin, size in sorted(spans.items()):
        shadow = [0, 0]
        if options.races or poisoned:
            both = [mmap.mmap(-1, n * (size + 64)) for n in (1, 16 // program.granule)]
            shadow = [ctypes.addressof(ctypes.c_char.from_buffer(page)) for page in both]
            pages += both
        rows.append((begin, begin + size, program.granule, begin in poisoned, *shadow))
    return numpy.array(rows or [(0,) * 6], dtype=REGION), len(rows), pages


def run(
    program: Program,
    grid: Sequence[int],
    values: dict,
    warps: int | None = None,
    shared: int = 0,
    options: Options | None = None,
) -> Report:
    """Execute `program` once per CTA of `grid`; `values` are its parameters by name, in order.

    Tensors are used where they lie. `shared`: bytes of dynamic shared memory.
    """
    options = options or Options()
    grid = (*grid, 1, 1)[:3]
    warps = warps or program.threads // 32
    shared += program.shared
    # Triton's scratch pointers, the last parameters, are null
    given = zip(program.parameters, [*values.values(), None, None, None], strict=False)
    bits = numpy.array([_bits(value, size) for size, value in given] or [0], dtype="u8")
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    regions, known, pages = _regions(program, list(tensors.values()), options)
    counters = numpy.zeros((4, len(program.code)), dtype="u8")
    errors = numpy.zeros(64, dtype=ERROR)
    launch = numpy.zeros((), dtype=LAUNCH)
    fields = dict(zip("xyz", grid, strict=True))
    fields |= dict(warps=warps, shared=shared, threads=options.threads, regions=known)
    fields |= dict(check_memory=options.memory, check_races=options.races)
    fields |= dict(random=options.seed is not None, seed=options.seed or 0, budget=options.budget)
    fields |= dict(most_errors=len(errors))
    arrays = dict(values=bits, region=regions, errors=errors)
    arrays |= zip(("executed", "lanes", "units", "ideal"), counters, strict=True)
    for name, value in (fields | {k: a.ctypes.data for k, a in arrays.items()}).items():
        launch[name] = value
    library().ptx_launch(program.handle, launch.ctypes.data)
    del pages
    found = errors[: launch["error_count"]]
    problems = [_problem(program, grid, tensors, error) for error in found]
    totals = [int(launch[n]) for n in ("read_bytes", "written_bytes", "barriers")]
    report = Report(program, grid, warps, shared, *counters, *totals, problems)
    kinds = set(found["kind"].tolist())
    if kinds & FATAL or (options.strict and kinds - NOTES):
        raise PtxError(problems)
    return report


def _nearest(tensors: dict[str, Tensor], address: int) -> str:
    """The address as a byte of the nearest tensor."""
    found = []
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        byte, size = address - storage.data_ptr(), storage.nbytes()
        text = f"byte {byte} of {size} bytes of {name} {list(tensor.shape)} {tensor.dtype}"
        found.append((max(-byte, byte - size + 1, 0), text))
    return min(found)[1] if found else "no tensor"


def _problem(program: Program, grid: tuple, tensors: dict, error) -> Problem:
    def access(pc: int) -> str:
        ins = program.code[pc]
        return f"`{ins.text}` (PTX line {ins.line}, {program.sources[ins.source]})"

    kind, address, space = KINDS[error["kind"]], int(error["address"]), int(error["space"])
    cta, x, y = int(error["cta"]), grid[0], grid[1]
    text = f"{program.name}: {kind} at {access(error['pc'])}, "
    text += f"CTA {(cta % x, cta // x % y, cta // x // y)} "
    text += f"warp {error['warp']} lane {error['lane']}"
    if error["bytes"]:
        byte = address - (SHARED_BASE if space == SHARED else 0)
        local = f"byte {byte} of {'shared' if space == SHARED else 'local'} memory"
        where = _nearest(tensors, address) if space == GLOBAL else local
        text += f": {error['bytes']} bytes at {where}"
    if error["other"] >= 0:
        text += f", against {access(error['other'])}"
    return Problem(kind, text, int(error["kind"]) in NOTES)
