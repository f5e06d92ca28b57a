"""Small Triton kernels, some of them wrong on purpose, for the tests of the emulator."""

from kernels.backend import tl, triton


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def softmax(x, out, C, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * C + c, mask=c < C, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * C + c, e / tl.sum(e, 0), mask=c < C)


@triton.jit
def matmul(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, K, STEP):
        at = first + k
        a_mask = (m[:, None] < M) & (at[None, :] < K)
        b_mask = (at[:, None] < K) & (n[None, :] < N)
        a = tl.load(a_ptr + m[:, None] * K + at[None, :], mask=a_mask, other=0)
        b = tl.load(b_ptr + at[:, None] * N + n[None, :], mask=b_mask, other=0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def histogram(x, bins, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(bins + tl.load(x + i, mask=i < n, other=0), 1, mask=i < n)


@triton.jit
def orders(x, by_value, running, turned, R: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    v = tl.load(x + i)
    tl.store(by_value + i, tl.sort(v))
    tl.store(running + i, tl.cumsum(v, 1))
    tl.store(turned + i, tl.reshape(tl.trans(v), (R, C)))


@triton.jit
def everyone_writes(out, DIFFERENT: tl.constexpr):
    tl.store(out, tl.program_id(0) if DIFFERENT else 7)


@triton.jit
def read_neighbour(x, out):
    i = tl.program_id(0)
    tl.store(out + i, i)
    tl.store(x + i, tl.load(out + (i + 1) % tl.num_programs(0)))


@triton.jit
def read_other_warps(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + 1)
    tl.store(out + i, tl.load(out + (i + 64) % BLOCK))


@triton.jit
def scatter(out, index, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.load(index + i), i)


@triton.jit
def spin(flag):
    while tl.atomic_add(flag, 0) == 0:
        pass
