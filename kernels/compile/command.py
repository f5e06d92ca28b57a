"""python -m kernels.compile [--target sm_90,gfx942] [--dtype fp16] [--hot] [--json FILE]
       python -m kernels.compile --markdown FILE --also OTHER_VENV/bin/python

Builds every kernel for GPUs that need not be there and reports registers, spills and shared memory.

Two steps, each in processes of its own because Triton decides at import whether it interprets or
compiles:

1. record: the public ops run at the full models' channel counts on a few rows in Triton's
   interpreter, with the tile sizes of each target, and every launch is noted with its argument
   types, constants and options. So what is built is what is launched, never a copy of it.
2. build: each distinct launch is compiled for its targets, disassembled and counted.

What comes out depends on the version of Triton. `--also PYTHON` builds the same launches, recorded
once, with another interpreter's Triton too, and `--markdown` writes one table of both, from fresh
builds: its seconds are of compilations.

Exit status 1: a build failed, asked for more shared memory than the target has, or spilled in a
kernel marked hot.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
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
from kernels.checks import new_file
from kernels.compile.report import describe, document, merged

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POINTEES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


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
# The names in kernels.compile.workloads, whose import would load Triton
OPS = (
    "attention,norms,coordinates,gaussians,similarity,rotary,serialized,"
    "convolution,surfaces,meshes,radiance,scales"
)

# Kernels that a training step spends its time in: a spill there is a defect
HOT = re.compile(
    r"attention|norm|gelu|blend|ssim|sum_uses|conv|statistics|gradients|dual|average"
    r"|vertex_bwd|fields_bwd|raster|silhouette|sum_runs|sum_pieces|march"
)


# What `backend.launch` passes on to Triton beside constexpr arguments
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Build:
    """One launch: a kernel with the types and constants it was launched with."""

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]  # argument name, Triton type; "constexpr" for None
    aligned: tuple[int, ...]  # positions of arguments divisible by 16
    ones: tuple[str, ...]  # integer arguments that were 1
    constants: tuple[tuple[str, object], ...]

    @property
    def hot(self) -> bool:
        """Whether a spill in it is a defect."""
        return bool(HOT.search(self.kernel))

    @property
    def dtype(self) -> str:
        """The narrowest floating-point type among the arguments: what the op was called with."""
        present = {kind.removeprefix("*") for _, kind in self.types}
        return next((name for name in DTYPES if name in present), "int")


def launched(kernel, args: tuple, constants: dict) -> Build:
    """What Triton specialises an interpreted kernel for when it is launched with these arguments
    and constants.
    """
    generic = kernel.kwargs["do_not_specialize"] or ()
    types, aligned, ones = [], [], []
    for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            types.append((name, "*" + POINTEES[value.dtype]))
            divisible = value.data_ptr() % 16 == 0
        elif value is None:
            types.append((name, "constexpr"))
            divisible = False
        else:
            types.append(
                (
                    name,
                    "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64",
                )
            )
            divisible = isinstance(value, int) and value % 16 == 0
            ones += [name] if isinstance(value, int) and value == 1 and name not in generic else []
        if divisible and name not in generic:
            aligned.append(position)
    where = kernel.fn.__module__, kernel.fn.__name__
    return Build(
        *where, tuple(types), tuple(aligned), tuple(ones), tuple(sorted(constants.items()))
    )


def _record(ops: list[str], dtypes: list[str], targets: list[str]) -> dict[Build, list[str]]:
    """Run the ops of kernels.compile.workloads in the interpreter; every distinct launch and the targets
    that make it.
    """
    from kernels.compile.workloads import WORKLOADS

    builds: dict[Build, list[str]] = {}
    for dtype, target in itertools.product(dtypes, targets):

        def note(kernel, grid, args, constants, target=target):
            build = launched(kernel, args, constants)
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
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        )
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
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
    # NVIDIA keeps this much of every block's for itself
    reserved = 1024 if target.backend == "cuda" else 0
    by_shared = target.shared_unit // (shared + reserved) if shared else 32
    return max(0, min(by_registers, by_shared, target.warps // warps, 32))


def _verdict(row: dict, target: Target, target_name: str) -> str | None:
    """Why a finished build is unacceptable, if it is."""
    if row["shared"] > target.shared_block:
        return (
            f"shared memory {row['shared']} B exceeds the {target.shared_block} B of {target_name}"
        )
    if row["hot"] and row["spills"]:
        return f"{row['spills']} spills in a hot kernel"
    return None


def source(build: Build, target: Target) -> tuple:
    """What Triton compiles one launch from: an ASTSource, a GPUTarget and options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    options = {k: v for k, v in build.constants if k in OPTIONS}
    constants = {k: v for k, v in build.constants if k not in options}
    types = dict(build.types)
    constants |= {name: None for name, kind in types.items() if kind == "constexpr"}
    constants |= {name: 1 for name in build.ones}  # Triton makes an argument of 1 a constant
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    if target.backend == "hip":
        options.pop("maxnreg", None)
    attributes = {(i,): [["tt.divisibility", 16]] for i in build.aligned}
    made = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "enable_fp_fusion": True} | options
    return made, GPUTarget(target.backend, target.arch, target.warp), options


def _build(build: Build, target_name: str) -> dict:
    """Compile one launch for one target; returns its row of the table."""
    from triton.compiler import CompilationError, compile
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import PTXASError

    target = TARGETS[target_name]
    made, gpu, options = source(build, target)
    row = {**asdict(build), "dtype": build.dtype, "target": target_name, "hot": build.hot}
    began = time.perf_counter()
    try:
        compiled = compile(made, target=gpu, options=options)
    except (
        CompilationError,
        CompileTimeAssertionFailure,
        PTXASError,
        RuntimeError,
        ValueError,
    ) as error:
        return row | {"failure": f"{type(error).__name__}: {str(error)[-400:]}"}
    row["seconds"] = round(time.perf_counter() - began, 2)
    row |= (_read_nvidia if target.backend == "cuda" else _read_amd)(compiled)
    row["shared"], row["warps"] = compiled.metadata.shared, compiled.metadata.num_warps
    row["shared_limit"] = f"{100 * row['shared'] / target.shared_block:.0f} %"
    row["blocks_per_unit"] = _blocks_per_unit(target, row["registers"], row["shared"], row["warps"])
    failure = _verdict(row, target, target_name)
    return row | ({"failure": failure} if failure else {})


def _recorded(args: argparse.Namespace) -> str:
    """The launches as JSON text, made by another process whose Triton interprets."""
    command = [sys.executable, "-m", "kernels.compile", "--record"]
    command += ["--op", args.op, "--dtype", args.dtype, "--target", args.target]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nrecording the launches failed")
    return done.stdout.splitlines()[-1]


def _read(text: str) -> dict[Build, list[str]]:
    """Launches and their targets, from what `_recorded` returned."""
    builds = {}
    for fields in json.loads(text):
        targets = fields.pop("targets")
        pairs = {key: tuple((k, v) for k, v in fields[key]) for key in ("types", "constants")}
        lists = {key: tuple(fields[key]) for key in ("aligned", "ones")}
        builds[Build(**fields | pairs | lists)] = targets
    return builds


def _wanted(build: Build, args: argparse.Namespace) -> bool:
    line = describe(asdict(build) | {"dtype": build.dtype})
    unwanted = args.without and re.search(args.without, line)
    return args.kernel in build.kernel and (build.hot or not args.hot) and not unwanted


def _build_all(builds: dict[Build, list[str]], workers: int) -> list[dict]:
    """The rows of all builds; failures are printed as they come."""
    rows = []
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_build, build, target)
            for build, found in builds.items()
            for target in found
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            if "failure" in rows[-1]:
                print(
                    f"FAILED {describe(rows[-1])} for {rows[-1]['target']}: {rows[-1]['failure']}",
                    flush=True,
                )
    return rows


def _build_with(python: str, launches: str, args: argparse.Namespace, folder: Path) -> dict:
    """The report of another interpreter's Triton on the same launches."""
    (folder / "launches.json").write_text(launches)
    command = [
        python,
        "-m",
        "kernels.compile",
        "--launches",
        str(folder / "launches.json"),
        "--kernel",
        args.kernel,
    ]
    command += ["--json", str(folder / "rows.json"), "--workers", str(args.workers)] + [
        "--hot"
    ] * args.hot
    command += ["--without", args.without] if args.without else []
    done = subprocess.run(command, capture_output=True, text=True)
    if not (folder / "rows.json").exists():
        raise SystemExit(f"{done.stdout}{done.stderr}\n{python} built nothing")
    print(
        "\n".join(
            line for line in done.stdout.splitlines() if line.startswith(("triton", "FAILED"))
        ),
        flush=True,
    )
    return json.loads((folder / "rows.json").read_text())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--target", default=DEFAULT_TARGETS, help=f"comma-separated; of {', '.join(TARGETS)}"
    )
    parser.add_argument(
        "--dtype",
        default="fp16,bf16,fp32",
        help=f"of {','.join(DTYPES)}, the ops' tensors; comma-separated",
    )
    parser.add_argument(
        "--op", default=OPS, help=f"of {OPS.replace(',', ', ')}; comma-separated (default: all)"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--without",
        help="leave out launches whose line in the table matches this regular expression",
    )
    parser.add_argument(
        "--hot",
        action="store_true",
        help="only the kernels that a training step spends its time in",
    )
    parser.add_argument("--json", type=new_file, help="also write the rows here")
    parser.add_argument(
        "--markdown", type=new_file, help="also write the table here, from fresh builds"
    )
    parser.add_argument("--also", help="a Python with another Triton that builds the same launches")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="builds at a time (default: one a CPU core)",
    )
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launches", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = {"target": TARGETS, "dtype": DTYPES, "op": OPS.split(",")}
    for name, names in known.items():
        if unknown := [x for x in getattr(args, name).split(",") if x not in names]:
            parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(names)}")
    for path in (args.json, args.markdown):
        if path and path.is_dir():
            parser.error(f"{path} is a folder: name a file in it")
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    if args.also and not shutil.which(args.also):
        parser.error(f"--also {args.also} is no Python that can be run")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _parse(argv)
    if args.record:
        found = _record(args.op.split(","), args.dtype.split(","), args.target.split(","))
        print(
            json.dumps([asdict(build) | {"targets": targets} for build, targets in found.items()])
        )
        return 0
    launches = args.launches.read_text() if args.launches else _recorded(args)
    recorded = _read(launches)
    chosen = {build: targets for build, targets in recorded.items() if _wanted(build, args)}
    if not chosen:
        known = ", ".join(sorted({build.kernel for build in recorded}))
        print(
            f"no launch matches --kernel {args.kernel!r}, --hot and --without; the kernels are "
            f"{known}",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        if args.markdown:
            os.environ["TRITON_CACHE_DIR"] = folder
        import triton

        print(
            f"triton {triton.__version__}, torch {torch.__version__}: {len(chosen)} launches",
            flush=True,
        )
        began, rows = time.perf_counter(), _build_all(chosen, args.workers)
        # as another version's rows come: lists where there were tuples
        rows = json.loads(json.dumps(rows))
        reports = [{"triton": triton.__version__, "torch": torch.__version__, "rows": rows}]
        if args.also:
            reports = sorted(
                [*reports, _build_with(args.also, launches, args, Path(folder))],
                key=lambda r: r["triton"],
            )
    print(merged(reports))
    failures = sum("failure" in row for report in reports for row in report["rows"])
    kernels = len({(row["module"], row["kernel"]) for row in rows})
    builds = sum(len(report["rows"]) for report in reports)
    print(
        f"\n{kernels} kernels, {builds} builds, {failures} failures, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if args.json:
        args.json.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1))
    if args.markdown:
        args.markdown.write_text(
            document(reports, {name: target.shared_block for name, target in TARGETS.items()})
        )
    return int(failures > 0)
