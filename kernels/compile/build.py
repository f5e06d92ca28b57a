"""Compile one launch for an absent GPU and read its machine code."""

import importlib
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

SIXTEEN_BITS = ("fp16", "bf16")
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
    """Limits of a block on one GPU architecture, from the vendors' occupancy tables."""

    backend: str
    arch: int | str
    warp: int
    shared_block: int  # bytes of shared memory (LDS) a block may have
    shared_unit: int  # bytes a multiprocessor (compute unit) has for all its blocks
    registers: int  # 32-bit registers a multiprocessor has for all its threads
    warps: int  # resident warps (waves)
    blocks: int  # resident blocks


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 164 << 10, 65536, 64, 32),
    "sm_86": Target("cuda", 86, 32, 99 << 10, 100 << 10, 65536, 48, 16),
    "sm_89": Target("cuda", 89, 32, 99 << 10, 100 << 10, 65536, 48, 24),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 228 << 10, 65536, 64, 32),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 228 << 10, 65536, 64, 32),
    "sm_120": Target("cuda", 120, 32, 99 << 10, 100 << 10, 65536, 48, 24),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 131072, 32, 32),
    "gfx1100": Target("hip", "gfx1100", 32, 64 << 10, 128 << 10, 196608, 64, 32),
}


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
        """True where a spill is a defect."""
        return bool(HOT.search(self.kernel))

    @property
    def dtype(self) -> str:
        """Narrowest floating-point type among the arguments, with which the op was called."""
        present = {kind.removeprefix("*") for _, kind in self.types}
        return next((name for name in DTYPES if name in present), "int")


def _scalar_type(value: float) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def launched(kernel, args: tuple, constants: dict) -> Build:
    """Describe a launch of an interpreted kernel as Triton would specialise it."""
    generic = kernel.kwargs["do_not_specialize"] or ()
    types = []
    aligned = []
    ones = []
    for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            types.append((name, "*" + POINTEES[value.dtype]))
            divisible = value.data_ptr() % 16 == 0
        elif value is None:
            types.append((name, "constexpr"))
            divisible = False
        else:
            types.append((name, _scalar_type(value)))
            divisible = isinstance(value, int) and value % 16 == 0
            ones += [name] if isinstance(value, int) and value == 1 and name not in generic else []
        if divisible and name not in generic:
            aligned.append(position)
    return Build(
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        types=tuple(types),
        aligned=tuple(aligned),
        ones=tuple(ones),
        constants=tuple(sorted(constants.items())),
    )


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


def machine_code(compiled, target: Target) -> dict:
    """Read a built kernel's registers, spills, tensor-core instructions, asynchronous copies."""
    return _read_nvidia(compiled) if target.backend == "cuda" else _read_amd(compiled)


def blocks_per_unit(target: Target, registers: int, shared: int, warps: int) -> int:
    """Count the blocks a multiprocessor holds, by registers, shared memory and warps."""
    by_registers = target.registers // max(1, -(-registers // 8) * 8 * target.warp * warps)
    # NVIDIA keeps this much of every block's for itself
    reserved = 1024 if target.backend == "cuda" else 0
    by_shared = target.shared_unit // (shared + reserved) if shared else target.blocks
    return max(0, min(by_registers, by_shared, target.warps // warps, target.blocks))


def _verdict(row: dict, target: Target, target_name: str) -> str | None:
    """Say why a finished build is unacceptable, if it is."""
    if row["shared"] > target.shared_block:
        return (
            f"shared memory {row['shared']} B exceeds the {target.shared_block} B of {target_name}"
        )
    if row["hot"] and row["spills"]:
        return f"{row['spills']} spills in a hot kernel"
    # a compiler that lost the whole product has reported success
    if row["hot"] and row["dtype"] in SIXTEEN_BITS and row["products"] and not row["tensor_core"]:
        return f"no tensor-core instruction for {row['products']} products"
    return None


def source(build: Build, target: Target) -> tuple:
    """Make what Triton compiles one launch from: an ASTSource, a GPUTarget and options."""
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


def build_one(build: Build, target_name: str) -> dict:
    """Compile one launch for one target and return its row of the table."""
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
    row |= machine_code(compiled, target)
    row["products"] = _count(r"\btt\.dot\b", compiled.asm["ttir"])
    row["shared"] = compiled.metadata.shared
    row["warps"] = compiled.metadata.num_warps
    row["shared_limit"] = f"{100 * row['shared'] / target.shared_block:.0f} %"
    row["blocks_per_unit"] = blocks_per_unit(target, row["registers"], row["shared"], row["warps"])
    failure = _verdict(row, target, target_name)
    return row | ({"failure": failure} if failure else {})
