"""The counters of a launch in words: classes of instructions, sectors, wavefronts, and a bound.

The bound is of counted work over published rates, not a measurement: each resource alone, neither
latency nor their overlap, each byte of a launch once. Counts are of PTX; ptxas folds moves and
addresses, so issue slots and integer work are scaled by the static ratio of SASS to PTX.
"""

import math
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from tests.emulator.machine import SPACES, Instruction, Report


class Gpu(NamedTuple):
    """Published rates: per multiprocessor and cycle, or of the whole GPU in bytes a second."""

    target: str
    units: int
    clock: float  # Hz, boost
    tensor: int  # dense fp16 FLOPs with fp32 accumulators
    fp32: int  # lanes
    memory: float
    l2: float
    shared: int  # bytes of a multiprocessor
    warps: int


GPUS = {
    "h200": Gpu("sm_90", 132, 1.83e9, 4096, 128, 4.8e12, 5.5e12, 228 << 10, 64),
    "h100": Gpu("sm_90", 132, 1.83e9, 4096, 128, 3.35e12, 5.5e12, 228 << 10, 64),
    "a100": Gpu("sm_80", 108, 1.41e9, 2048, 64, 2.04e12, 4.5e12, 164 << 10, 64),
    "rtx4090": Gpu("sm_89", 128, 2.52e9, 512, 128, 1.01e12, 5.0e12, 100 << 10, 48),
}
REGISTERS = 65536  # of a multiprocessor
SFU = "ex2 lg2 rcp rsqrt sqrt sin cos tanh div".split()
CLASSES = (
    ("tensor", r"mma|wgmma\.\w*\d"),
    ("branch", r"branch|exit"),
    ("barrier", r"barrier"),
    ("shuffle", r"shfl|vote|redux|match|activemask|elect"),
    ("move", r"mov|pack|unpack"),
    ("other", r"nop|cp\.async\.|trap|wgmma"),
    ("atomic", r"atom"),
    ("ld global", r"cp\.async"),
    ("ld shared", r"ldmatrix"),
    ("st shared", r"stmatrix"),
    ("int", r"cvt\.int\.|selp|setp"),
    ("cvt", r"cvt"),
    ("sfu", rf"({'|'.join(SFU)})\.(?![usb])"),
    ("fp32", r".*\.f32$"),
    ("fp64", r".*\.f64$"),
    ("fp16", r".*\.b?f16(x2)?$"),
)


def classify(ins: Instruction) -> str:
    """Return the class that an instruction is counted in."""
    if re.match(r"(ld|st)\.", ins.name):
        return f"{ins.name[:2]} {SPACES[ins.first]}"
    if ins.name.startswith("cvt.int.") and "ld.param" in ins.text:
        return "move"
    return next((name for name, pattern in CLASSES if re.match(pattern, ins.name)), "int")


def flops(ins: Instruction) -> int:
    """Return the tensor-core FLOPs of one warp's instruction; tf32 counts double, as its time."""
    slow = 2 if "tf32" in ins.name else 1
    if match := re.match(r"mma\.m(\d+)n(\d+)k(\d+)", ins.name):
        return slow * 2 * math.prod(map(int, match.groups()))
    if re.match(r"wgmma\.\w*\d", ins.name):
        return 2 * 16 * ins.first * 16
    return 0


def summary(report: Report) -> dict:
    """Return the totals of a launch, by class and by memory."""
    classes, units, ideal = {}, {}, {}
    tensor = 0
    for i, ins in enumerate(report.program.code):
        count = int(report.executed[i])
        kind = classify(ins)
        classes[kind] = classes.get(kind, 0) + count
        units[kind] = units.get(kind, 0) + int(report.units[i])
        ideal[kind] = ideal.get(kind, 0) + int(report.ideal[i])
        tensor += flops(ins) * count
    total = lambda counts, *kinds: sum(counts.get(kind, 0) for kind in kinds)
    copied = "ld global", "st global", "atomic"
    return {
        "instructions": int(report.executed.sum()),
        "classes": {kind: n for kind, n in sorted(classes.items()) if n},
        "sectors": total(units, *copied),
        "sectors_ideal": total(ideal, *copied),
        "wavefronts": total(units, "ld shared", "st shared"),
        "wavefronts_ideal": total(ideal, "ld shared", "st shared"),
        "tensor_flops": tensor,
        "bytes": report.read_bytes + report.written_bytes,
        "barriers": report.barriers,
    }


@cache
def resources(ptx: str) -> dict:
    """Return registers, spilled bytes and the number of instructions after ptxas."""
    target = re.search(r"\.target\s+(\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        ptxas = get_ptxas(int(re.search(r"\d+", target)[0])).path
        command = [ptxas, "-v", f"--gpu-name={target}", source, "-o", cubin]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [knobs.nvidia.nvdisasm.path, "-c", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instruction = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(?!NOP)[A-Z]"
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "sass": len(re.findall(instruction, sass, re.M)),
    }


def bound(report: Report, gpu: str) -> dict:
    """Return the row of a launch: counts, what it occupies, and the least time it can take."""
    g, counted, used = GPUS[gpu], summary(report), resources(report.ptx)
    blocks = math.prod(report.grid)
    # the busiest multiprocessor has this much more than its share
    spread = math.ceil(blocks / g.units) * g.units / blocks
    cycle = spread / (g.units * g.clock)
    ratio = min(1.0, used["sass"] / len(report.program.code))
    lanes = lambda kind: 32 * counted["classes"].get(kind, 0)
    seconds = {
        "issue": ratio * counted["instructions"] / 4 * cycle,
        "fp32": lanes("fp32") / g.fp32 * cycle,
        "int": ratio * lanes("int") / 64 * cycle,
        "sfu": lanes("sfu") / 16 * cycle,
        "cvt": lanes("cvt") / 64 * cycle,
        "shuffle": lanes("shuffle") / 32 * cycle,
        "tensor": counted["tensor_flops"] / g.tensor * cycle,
        "shared": counted["wavefronts"] * cycle,
        "L1": counted["sectors"] / 4 * cycle,
        "L2": counted["bytes"] / g.l2,
        "memory": counted["bytes"] / g.memory,
    }
    worst = max(seconds, key=seconds.get)
    registers = -(-used["registers"] // 8) * 8 * 32 * report.warps
    by_shared = g.shared // (report.shared + 1024)
    resident = max(1, min(32, g.warps // report.warps, by_shared, REGISTERS // registers))
    waves = blocks / (resident * g.units)
    return counted | {
        "kernel": report.program.name,
        "grid": list(report.grid),
        "warps": report.warps,
        "registers": used["registers"],
        "spilled": used["spilled"],
        "shared": report.shared,
        "blocks": resident,
        "waves": round(waves, 3),
        "full": round(waves / math.ceil(waves), 3),
        "bound_us": round(seconds[worst] * 1e6, 3),
        "bottleneck": worst,
        "times_us": {name: round(value * 1e6, 3) for name, value in seconds.items()},
    }
