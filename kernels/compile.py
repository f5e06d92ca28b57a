"""python -m kernels.compile [--target sm_90,gfx942] [--dtype fp16] [--json FILE]

Builds every kernel for GPUs that need not be there and reports registers, spills and shared memory. Two steps, each in
processes of its own because Triton decides at import whether it interprets or compiles:

1. record: the public ops run at the full models' channel counts on a few rows in Triton's interpreter, with the tile
   sizes of each target, and every launch is noted with its argument types, constants and options. So what is built is
   what is launched, never a copy of it.
2. build: each distinct launch is compiled for its targets, disassembled and counted.

Exit status 1: a build failed, asked for more shared memory than the target has, or spilled in a kernel marked hot.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import backend

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POINTEES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What a block may use on one GPU architecture, from the vendors' occupancy tables."""

    backend: str
    arch: int | str
    warp: int
    shared_block: int  # bytes of shared memory (LDS) a block may have
    shared_unit: int  # bytes a multiprocessor (compute unit) has for all its blocks
    registers: int  # 32-bit registers a multiprocessor has for all its threads
    warps: int  # resident warps (waves)


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 164 << 10, 65536, 64),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 228 << 10, 65536, 64),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 228 << 10, 65536, 64),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 131072, 32),
    "gfx1100": Target("hip", "gfx1100", 32, 64 << 10, 128 << 10, 196608, 64),
}
DEFAULT_TARGETS = "sm_80,sm_90,sm_100,gfx942"
OPS = "attention,norms,coordinates,gaussians,similarity,scales"  # the names in kernels.workloads, whose import would load Triton

# Kernels that a training step spends its time in: a spill there is a defect
HOT = re.compile(r"attention|norm|gelu|blend|ssim")


@dataclass(frozen=True)
class Build:
    """One launch: a kernel with the types and constants it was launched with."""

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]  # argument name, Triton type; "constexpr" for None
    aligned: tuple[int, ...]  # positions of arguments divisible by 16
    constants: tuple[tuple[str, object], ...]

    @property
    def dtype(self) -> str:
        """The narrowest floating-point type among the arguments: what the op was called with."""
        present = {kind.removeprefix("*") for _, kind in self.types}
        return next((name for name in DTYPES if name in present), "int")


def _record(ops: list[str], dtypes: list[str], targets: list[str]) -> dict[Build, list[str]]:
    """Run the ops of kernels.workloads in the interpreter; every distinct launch and the targets that make it."""
    from kernels.workloads import WORKLOADS  # defines the kernels, here in their interpreted form

    builds: dict[Build, list[str]] = {}
    for dtype, target in itertools.product(dtypes, targets):

        def note(kernel, grid, args, constants, target=target):
            names = kernel.arg_names
            types, aligned = [], []
            for position, (name, value) in enumerate(zip(names, args, strict=False)):
                if isinstance(value, Tensor):
                    types.append((name, "*" + POINTEES[value.dtype]))
                    divisible = value.data_ptr() % 16 == 0
                elif value is None:
                    types.append((name, "constexpr"))
                    divisible = False
                else:
                    types.append((name, "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"))
                    divisible = isinstance(value, int) and value % 16 == 0
                if divisible:
                    aligned.append(position)
            where = kernel.fn.__module__, kernel.fn.__name__
            build = Build(*where, tuple(types), tuple(aligned), tuple(sorted(constants.items())))
            found = builds.setdefault(build, [])
            if target not in found:
                found.append(target)

        with backend.use("interpreter"), backend.assume(target), backend.observe(note):
            for op in ops:
                WORKLOADS[op](DTYPES[dtype])
    return builds


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _read_nvidia(compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": _count(r"\b(?:STL|LDL)\b", sass),  # instructions that touch local memory
        "tensor_core": _count(r"\b(?:HGMMA|HMMA|QGMMA|UTCHMMA|UTC\w*MMA)", sass),
        "async_copies": _count(r"\b(?:LDGSTS|UTMALDG|UBLKCP)", sass),
    }


def _read_amd(compiled) -> dict:
    code = compiled.asm["amdgcn"]

    def directive(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": directive("vgpr_count"),
        "stack": directive("private_segment_fixed_size"),
        "spills": directive("vgpr_spill_count") + directive("sgpr_spill_count"),
        "tensor_core": _count(r"\bv_(?:mfma|wmma)", code),
        "async_copies": _count(r"\b(?:global|buffer)_load_lds", code),
    }


def _blocks_per_unit(target: Target, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor holds at once, by registers, shared memory and warps."""
    by_registers = target.registers // max(1, -(-registers // 8) * 8 * target.warp * warps)
    by_shared = target.shared_unit // (shared + 1024) if shared else 32
    return max(0, min(by_registers, by_shared, target.warps // warps, 32))


def _verdict(row: dict, target: Target, target_name: str) -> str | None:
    """Why a finished build is unacceptable, if it is."""
    if row["shared"] > target.shared_block:
        return f"shared memory {row['shared']} B exceeds the {target.shared_block} B of {target_name}"
    if row["hot"] and row["spills"]:
        return f"{row['spills']} spills in a hot kernel"
    return None


def _build(build: Build, target_name: str) -> dict:
    """Compile one launch for one target; returns its row of the table."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError, compile
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import PTXASError

    target = TARGETS[target_name]
    kernel = getattr(importlib.import_module(build.module), build.kernel)
    options = {k: v for k, v in build.constants if k in ("num_warps", "num_stages", "maxnreg")}
    constants = {k: v for k, v in build.constants if k not in options}
    types = dict(build.types)
    constants |= {name: None for name, kind in types.items() if kind == "constexpr"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    if target.backend == "hip":
        options.pop("maxnreg", None)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in build.aligned},
    )
    row = {**asdict(build), "dtype": build.dtype, "target": target_name, "hot": bool(HOT.search(build.kernel))}
    began = time.perf_counter()
    try:
        compiled = compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp),
            options={"num_warps": 4, "enable_fp_fusion": True} | options,
        )
    except (CompilationError, CompileTimeAssertionFailure, PTXASError, RuntimeError, ValueError) as error:
        return row | {"failure": f"{type(error).__name__}: {str(error)[-400:]}"}
    row["seconds"] = round(time.perf_counter() - began, 2)
    row |= (_read_nvidia if target.backend == "cuda" else _read_amd)(compiled)
    row["shared"], row["warps"] = compiled.metadata.shared, compiled.metadata.num_warps
    row["blocks_per_unit"] = _blocks_per_unit(target, row["registers"], row["shared"], row["warps"])
    failure = _verdict(row, target, target_name)
    return row | ({"failure": failure} if failure else {})


def describe(row: dict) -> str:
    """The row's constants in short."""
    constants = ", ".join(f"{k}={v}" for k, v in row["constants"] if k not in ("num_warps", "num_stages"))
    return f"{row['kernel']} {row['dtype']} ({constants})"


def table(rows: list[dict]) -> str:
    """Markdown, one line per kernel, specialisation and target."""
    head = ["kernel", "target", "regs", "stack B", "spills", "shared B", "warps", "blocks/unit", "mma", "async", "s", ""]
    keys = ["target", "registers", "stack", "spills", "shared", "warps", "blocks_per_unit", "tensor_core", "async_copies"]
    keys.append("seconds")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda r: (r["module"], r["kernel"], r["dtype"], str(r["constants"]), r["target"])):
        cells = [describe(row), *(str(row.get(k, "-")) for k in keys), row.get("failure", "")]
        lines.append("| " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__.split("\n\n")[1])
    parser.add_argument("--target", default=DEFAULT_TARGETS, help=f"comma-separated; of {', '.join(TARGETS)}")
    parser.add_argument("--dtype", default="fp16,bf16,fp32", help="of the ops' tensors; comma-separated")
    parser.add_argument("--op", default=OPS, help="of kernels.workloads; comma-separated")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    targets, dtypes, ops = args.target.split(","), args.dtype.split(","), args.op.split(",")
    for given, known in ((targets, TARGETS), (dtypes, DTYPES), (ops, OPS.split(","))):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
    if args.record:
        print(json.dumps([asdict(build) | {"targets": found} for build, found in _record(ops, dtypes, targets).items()]))
        return 0

    import triton

    command = [sys.executable, "-m", "kernels.compile", "--record"]
    command += ["--op", args.op, "--dtype", args.dtype, "--target", args.target]
    recorded = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if recorded.returncode:
        print(recorded.stderr, file=sys.stderr)
        return 1
    builds: dict[Build, list[str]] = {}
    for fields in json.loads(recorded.stdout.splitlines()[-1]):
        pairs = {key: tuple((k, v) for k, v in fields[key]) for key in ("types", "constants")}
        found = fields.pop("targets")
        builds[Build(**fields | pairs | {"aligned": tuple(fields["aligned"])})] = found
    builds = {build: found for build, found in builds.items() if args.kernel in build.kernel}
    print(f"triton {triton.__version__}, torch {torch.__version__}: {len(builds)} launches for {', '.join(targets)}", flush=True)
    began, rows = time.perf_counter(), []
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(_build, build, target) for build, found in builds.items() for target in found]
        for job in as_completed(jobs):
            rows.append(job.result())
            if "failure" in rows[-1]:
                print(f"FAILED {describe(rows[-1])} for {rows[-1]['target']}: {rows[-1]['failure']}", flush=True)
    print(table(rows))
    failures = sum("failure" in row for row in rows)
    kernels = len({(row["module"], row["kernel"]) for row in rows})
    print(f"\n{kernels} kernels, {len(rows)} builds, {failures} failures, {time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "torch": torch.__version__, "rows": rows}, indent=1))
    return int(failures > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
