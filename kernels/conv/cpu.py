"""Sparse convolution on CPU tensors: the rows of each tap are gathered, multiplied and added.

R rows, G groups of T taps (M = G * T matrices of the weight), A channels in, C channels out. Rows
go in chunks, so memory beside inputs and outputs is bounded and a chunk's sums stay in a cache; no
row is added into twice by one tap, so results are deterministic. 16-bit operands are widened:
products and sums are fp32 (fp64 stays fp64).
"""

from collections.abc import Iterator

from torch import Tensor

from kernels.checks import wide

CHUNK = 2048  # rows of one product

# (matrix, rows of x, which of the chunk's rows they go to; None: all)
Live = list[tuple[int, Tensor, Tensor | None]]


def _chunks(taps: Tensor) -> Iterator[tuple[slice, int, Live]]:
    """The rows, group and live taps of each chunk of taps [R, G, T]."""
    R, G, T = taps.shape
    for first in range(0, R, CHUNK):
        span = slice(first, min(R, first + CHUNK))
        columns = taps[span].permute(1, 2, 0).contiguous()  # [G, T, rows]
        for g in range(G):
            live: Live = []
            for t, near in enumerate(columns[g]):
                rows = (near >= 0).nonzero()[:, 0]
                if len(rows) == len(near):
                    live.append((g * T + t, near, None))
                elif len(rows):
                    live.append((g * T + t, near[rows], rows))
            yield span, g, live


def product(x: Tensor, matrices: Tensor, bias: Tensor | None, taps: Tensor) -> Tensor:
    """Sum over taps of x [S, A] @ matrices [M, A, C], plus bias [C]: [R * G, C] in x's dtype.

    Row r of group g is at r * G + g.
    """
    R, G, _ = taps.shape
    C = matrices.shape[2]
    matrices = wide(matrices)
    out = x.new_empty(R, G, C)
    for span, g, live in _chunks(taps):
        total = matrices.new_zeros(span.stop - span.start, C)
        for m, near, rows in live:
            part = wide(x.index_select(0, near))
            if rows is None:
                total.addmm_(part, matrices[m])
            else:
                total.index_add_(0, rows, part @ matrices[m])
        out[span, g] = (total if bias is None else total + bias).to(x.dtype)
    return out.view(R * G, C)


def weight_gradient(x: Tensor, grad: Tensor, taps: Tensor) -> Tensor:
    """Sum over rows of grad [R * G, C] times the row of x [S, A] under each tap.

    Returns [C, M, A] in fp32 or fp64.
    """
    R, G, T = taps.shape
    A = x.shape[1]
    C = grad.shape[1]
    sums = wide(x[:0]).new_zeros(G * T, C, A)
    grad = grad.view(R, G, C)
    for span, g, live in _chunks(taps):
        for m, near, rows in live:
            up = grad[span, g]
            if rows is not None:
                up = up.index_select(0, rows)
            sums[m].addmm_(wide(up).mT, wide(x.index_select(0, near)))
    return sums.transpose(0, 1).contiguous()
