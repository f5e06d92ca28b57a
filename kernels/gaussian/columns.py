"""Rows of a table to columns and back, as Triton functions.

A warp reads and writes rows as they lie in memory, whole sectors of 32 bytes, where columns read
one by one would touch a sector for 4 bytes of it.
"""

from kernels.backend import tl, triton


@triton.jit
def columns8(a):
    """Return the columns [N] of a [N, 2, 2, 2]."""
    even, odd = tl.split(a)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    a0, a4 = tl.split(a)
    a1, a5 = tl.split(b)
    a2, a6 = tl.split(c)
    a3, a7 = tl.split(d)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def load_columns(ptr, row, live, N: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows [N] of a table with WIDTH <= 16 columns, 0 where not live: 16 columns [N]."""
    # not [N, 16], which would read in as wide pieces as store_rows16 writes
    column = tl.arange(0, 2)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    at = row[:, None, None] * WIDTH + column
    table = tl.load(ptr + at, live[:, None, None] & (column < WIDTH), 0)
    even, odd = tl.split(tl.reshape(table, [N, 2, 2, 2, 2]))
    a0, a2, a4, a6, a8, a10, a12, a14 = columns8(even)
    a1, a3, a5, a7, a9, a11, a13, a15 = columns8(odd)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


@triton.jit
def store_rows8(ptr, row, live, a0, a1, a2, a3, a4, a5, a6, a7, N: tl.constexpr):
    """Store eight columns [N] as rows of a table."""
    table = tl.join(rows4(a0, a2, a4, a6), rows4(a1, a3, a5, a7))
    column = tl.arange(0, 8)[None, :]
    tl.store(ptr + row[:, None] * 8 + column, tl.reshape(table, [N, 8]), live[:, None])


@triton.jit
def rows4(a, b, c, d):
    """Return rows [N, 2, 2] of four columns."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def store_rows16(ptr, row, live, a, b, c, d, N: tl.constexpr, WIDTH: tl.constexpr):
    """Store columns [N], four each in a, b, c, d, as rows of a table with WIDTH <= 16 columns."""
    ab = tl.join(rows4(a[0], a[2], b[0], b[2]), rows4(a[1], a[3], b[1], b[3]))
    cd = tl.join(rows4(c[0], c[2], d[0], d[2]), rows4(c[1], c[3], d[1], d[3]))
    table = tl.reshape(tl.permute(tl.join(ab, cd), 0, 4, 1, 2, 3), [N, 16])
    column = tl.arange(0, 16)[None, :]
    tl.store(ptr + row[:, None] * WIDTH + column, table, live[:, None] & (column < WIDTH))
