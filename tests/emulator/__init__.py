"""Compiled Triton kernels on a CPU: executes the PTX that Triton made for an NVIDIA GPU.

The interpreter shows what a kernel means, this what was compiled: warp by warp, over CPU tensors'
own memory, with every access checked and the events counted that the hardware's counters would
count. For sm_80, sm_86, sm_89 and sm_90. A tool for tests: nothing outside tests/ imports it. It
needs g++; the executor is compiled on first use. TRITON_INTERPRET must not be set when Triton is
imported.

    python -m pytest --emulate sm_90 tests/norm    # kernel tests, as compiled for that GPU
    python -m tests.emulator gelu --gpu h100       # the work of an op, and a bound of its time

Arithmetic is IEEE and rounds once, fused where PTX says so. ex2, lg2, sin, cos, rsqrt, tanh, rcp
and div.full give the nearest float, where hardware is a few units off. Tensor cores accumulate in
fp32 one product after another (hardware: in groups, truncated); tf32 operands lose 13 bits. A
cp.async lands when it is waited for, and so does the result of a wgmma. Registers and shared
memory start as NaN patterns. `Options.seed` runs CTAs and warps in random order.

Checked: bounds (byte exact, of the launch's tensors) and alignment of every access; races in
shared memory (two warps without a barrier between, one of them changing bytes) and in global
memory (a byte written by one CTA and touched by another, neither atomically); one store whose
lanes write different values to one address; shared bytes and tensors of `Options.uninitialised`
read before they are written; barriers in diverged code, deadlock, an instruction budget. Two CTAs
that write the same value, and copies of an element that differ by a rounding, are notes only.

Not known: Hopper's TMA, mbarrier and clusters, sm_100, calls, vector atomics, setp of packed
pairs, device asserts, global scratch memory; they raise PtxUnsupported. Kernels whose CTAs wait for
each other are reported as races. Lanes of one warp are no hazard to each other but in one store.
Missing fence.proxy.async and wgmma.fence go unnoticed. It runs what ptxas is given, not what ptxas
makes of it.
"""

from tests.emulator.launch import TARGETS as TARGETS
from tests.emulator.launch import emulated as emulated
from tests.emulator.launch import launch as launch
from tests.emulator.launch import prepare as prepare
from tests.emulator.machine import Options as Options
from tests.emulator.machine import Program as Program
from tests.emulator.machine import PtxError as PtxError
from tests.emulator.machine import PtxUnsupported as PtxUnsupported
from tests.emulator.machine import decode as decode
from tests.emulator.machine import library as library
from tests.emulator.machine import run as run
