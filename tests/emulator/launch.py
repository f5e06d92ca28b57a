"""Triton kernels on the emulator: specialised and compiled by Triton, then run by `machine`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels import backend
from tests.emulator import machine
from tests.emulator.machine import Options, Program, Report, decode

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90")
# the interpreter's defaults; debug: no device asserts
LAUNCHED = {"enable_fp_fusion": True, "debug": False, "instrumentation_mode": ""}
# in Triton's cache these builds are apart: they have no machine code
APART = {"trislat_emulator": "ptx"}
_compiled: dict = {}
_lock = threading.RLock()


def _without_ptxas(self=None, stages=None, options=None, language=None, capability=None):
    """A hook of Triton's: compile as far as PTX. Without arguments: a key for its cache."""
    if stages is None:
        return "emulator", "emulator"
    stages["cubin"] = lambda source, metadata: b""


def prepare(kernel, args: tuple, target: str, constants: dict) -> tuple[Program, object, dict]:
    """Compile a JITFunction for these arguments.

    Returns the decoded kernel, Triton's compiled one, and the values of its parameters by name.
    """
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    builder = make_backend(gpu)
    given = LAUNCHED | constants
    with _lock:
        if kernel not in _compiled:
            _compiled[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, builder
            )
        bound, specialization, rest = _compiled[kernel](*args, **given)
        key = kernel, target, str(specialization), str(sorted(rest.items(), key=str))
        if key not in _compiled:
            options, signature, constexprs, attributes = kernel._pack_args(
                builder, given, bound, specialization, rest
            )
            source = ASTSource(kernel, signature, constexprs, attributes)
            hook = knobs.runtime.add_stages_inspection_hook
            knobs.runtime.add_stages_inspection_hook = _without_ptxas
            try:
                compiled = compile(source, gpu, options.__dict__, _env_vars=APART)
            finally:
                knobs.runtime.add_stages_inspection_hook = hook
            passed = [name for name, kind in signature.items() if kind != "constexpr"]
            _compiled[key] = decode(compiled.asm["ptx"]), compiled, passed
    program, compiled, passed = _compiled[key]
    return program, compiled, {name: bound[name] for name in passed}


def launch(
    kernel,
    grid: tuple[int, ...],
    *args,
    target: str = "sm_90",
    options: Options | None = None,
    program: Program | None = None,
    **constants,
) -> Report:
    """Run `kernel[grid](*args, **constants)`, compiled for `target`, over the CPU tensors' memory.

    `program` replaces the compiled kernel: a hand-edited one, in tests.
    """
    decoded, compiled, values = prepare(kernel, args, target, constants)
    if any(getattr(value, "is_cuda", False) for value in values.values()):
        raise ValueError("the emulator runs over CPU tensors")
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise NotImplementedError(f"{decoded.name} wants global scratch memory")
    program = program or decoded
    report = machine.run(program, grid, values, metadata.num_warps, metadata.shared, options)
    report.ptx = compiled.asm["ptx"]
    return report


@contextmanager
def emulated(
    target: str, options: Options | None = None, seen: Callable[[Report], None] | None = None
) -> Iterator[None]:
    """Run CPU tensors' ops as kernels compiled for `target` inside the block.

    `seen` gets the report of every launch. Inside `backend.assume(name)` they are compiled for
    that GPU where the emulator knows it, and have its tiles in any case.
    """

    def run(kernel, grid, args, constants):
        assumed = backend.target(next(a for a in args if hasattr(a, "data_ptr")))
        known = assumed if assumed in TARGETS else target
        report = launch(kernel, grid, *args, target=known, options=options, **constants)
        if seen:
            seen(report)

    with backend.run_compiled(target, run):
        yield
