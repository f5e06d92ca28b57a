"""Tiles and launches of the convolution's kernels.

R rows in G groups, M matrices of the weight [Co, M, Ci].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import triton
from kernels.conv import tiles as kernel
from kernels.conv.tables import TapPairs, TapRows

# channels of a program: wide and narrow accumulator
WIDTHS = ((128, 64), (128, 0), (64, 32), (64, 0), (32, 0), (16, 0))
# products in the time of one number from L2: published rates of tensor cores and of the cache
REUSE = {"sm_80": 70, "sm_90": 180, "sm_100": 220, "gfx942": 100}


class Tile(NamedTuple):
    """The tile of a program, of a product or of a weight gradient."""

    rows: int  # rows; of a weight gradient, output channels
    step: int  # input channels of a turn, at most; of a weight gradient, pairs of rows
    widest: int  # channels of the output; of a weight gradient, of the input
    num_warps: int
    num_stages: int


def product_tiles(dtype: torch.dtype, target: str) -> list[Tile]:
    """Tiles of products, from which `_choose` takes.

    Not yet measured on a GPU: chosen so that nothing spills and shared memory suffices.
    """
    if target == "interpreter":  # a program costs milliseconds whatever its size
        return [Tile(256, 256, 192, 4, 1)]
    # no tensor cores on NVIDIA: full fp32 products hold their operands in registers
    if dtype == torch.float32:
        return [Tile(64, 16, 64, 4, 3)]
    if target.startswith("gfx"):
        return [Tile(128, 32, 192, 8, 2)]
    # A row is the third load of a chain (list, taps, row): Triton gives each load of a chain the
    # same share of the stages, so that 7 stages put a row two steps ahead, 4 stages one step.
    if target == "sm_90":
        big = [Tile(256, 96, 192, 8, 4), Tile(128, 96, 192, 8, 7)]
        return [*big, Tile(64, 96, 96, 4, 7), Tile(64, 96, 64, 4, 7)]
    if target == "sm_100":  # few stages: Triton 3.6 spills with more
        return [Tile(128, 64, 192, 8, 4), Tile(64, 64, 64, 4, 2)]
    # of 32 rows, two warps more would repeat each other's products
    small = [Tile(64, 32, 96, 4, 7), Tile(64, 32, 64, 4, 7), Tile(32, 32, 96, 2, 7)]
    # elsewhere the cache keeps up with tensor cores, and larger tiles spill
    return [Tile(128, 32, 192, 8, 7), *small] if target == "sm_80" else small


def _gradient_tile(dtype: torch.dtype, target: str) -> Tile:
    """The tile of a weight gradient. Not yet measured on a GPU."""
    if target == "interpreter":
        return Tile(256, 256, 192, 4, 1)
    if dtype == torch.float32:
        return Tile(64, 16, 64, 4, 3)
    if target.startswith("gfx"):
        return Tile(64, 32, 96, 4, 2)
    # a row is the second load of a chain (pairs, row)
    if target in ("sm_90", "sm_100"):
        return Tile(64, 64, 192, 4, 3)
    return Tile(64, 32, 96, 4, 5)


def _widths(channels: int, widest: int, like: Tensor) -> tuple[int, int]:
    """The wide and the narrow part of a program's channels.

    They cover all channels with the least padding, then with the fewest programs, which read the
    rows again: where products are fast, that weighs more.
    """
    again = 64 if _reuse(like) > 128 else 16
    fitting = [w for w in WIDTHS if sum(w) <= widest]
    return min(fitting, key=lambda w: triton.cdiv(channels, sum(w)) * (sum(w) + again))


def _steps(channels: int, most: int) -> tuple[int, int]:
    """Input channels of a product, and products of a turn: together at most `most`.

    They cover all channels with little padding and few products.
    """
    powers = [1 << i for i in range(4, most.bit_length())]
    step = min(powers, key=lambda p: (triton.cdiv(channels, p) * (p + 16), -p))
    products = triton.cdiv(channels, step)
    return step, max(n for n in range(1, most // step + 1) if products % n == 0)


def _reuse(like: Tensor) -> int:
    return REUSE.get(backend.target(like), 33) if like.dtype != torch.float32 else 8


def _choose(tiles: list[Tile], rows: int, channels: int, groups: int, like: Tensor) -> Tile:
    """The tile with which the busiest multiprocessor has the least to do.

    That is products, or numbers from the cache. Larger tiles of rows have more taps that a row has
    not: 1/8 more products in 128 rows is what surfaces of 10k to 100k voxels have.
    """
    units = backend.multiprocessors(like)
    reuse = _reuse(like)

    def cost(tile: Tile) -> float:
        width = sum(_widths(channels, tile.widest, like))
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(channels, width) * groups
        work = max(tile.rows * width, reuse * (tile.rows + width))
        return triton.cdiv(programs, units) * work * (1 + tile.rows / 1024)

    return min(tiles, key=cost)


def _shares(programs: int, rows: int, like: Tensor) -> int:
    """Shares of the pairs of a weight gradient: 1.5 programs a multiprocessor or more, all busy.

    Each share writes a whole gradient, which is read again: as long as products of some rows take.
    In fp32, where products are slow, more shares cost little, and shorter sums are more exact.
    """
    units = backend.multiprocessors(like)
    sums = 4 * _reuse(like)
    busy = 8 * units if like.dtype == torch.float32 else 3 * units // 2
    least = triton.cdiv(busy, programs)

    def cost(n: int) -> float:
        return triton.cdiv(n * programs, units) * rows / n + sums * n * programs / units

    return min(range(least, 4 * least + 1), key=cost)


def _list_taps(taps: TapRows, rows: int) -> Tensor:
    """The taps of each tile of `rows` rows.

    [Q, tiles, 1 + T] int32: how many of the list's taps a tile has, and which.
    """
    Q, T, R = taps.rows.shape
    tiles = triton.cdiv(R, rows)
    lists = taps.rows.new_empty(Q, tiles, 1 + T)
    pad = triton.next_power_of_2(T)
    args = (taps.rows, lists, R)
    backend.launch(kernel._list_taps, (tiles, Q), *args, T=T, PAD_T=pad, ROWS=rows, num_warps=4)
    return lists


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: TapRows,
    groups: int = 1,
    back: bool = False,
    mirror: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """The sum over taps of x's rows times the weight [Co, M, Ci]: [R * groups, C].

    `back` multiplies by the weight's transpose; `mirror` takes the taps in the opposite order. The
    tile is chosen where none is given.
    """
    Q, T, R = taps.rows.shape
    G = groups
    parts = Q // G
    CO, _, CI = weight.shape
    C, A = (CI, CO) if back else (CO, CI)
    tiles = product_tiles(x.dtype, backend.target(x))
    if parts > 1:  # sums that go on from the part before take registers
        tiles = [t for t in tiles if t.rows < 256] or tiles
    tile = tile or _choose(tiles, R, C, G, x)
    wide, narrow = _widths(C, tile.widest, x)
    # the largest sums leave few registers: Triton 3.6 spills with 64 channels a turn
    large = tile.rows * (wide + narrow) >= 256 * 192
    step, steps = _steps(A, min(tile.step, 32) if large else tile.step)
    # one turn ahead is enough where a turn is of several products
    stages = tile.num_stages if steps == 1 else min(4, tile.num_stages)
    lists = _list_taps(taps, tile.rows)
    grid = (triton.cdiv(R, tile.rows) * triton.cdiv(C, wide + narrow), G)
    out = x.new_empty(R * G, C)
    sums = out if parts == 1 else x.new_empty(R * G, C, dtype=torch.float32)
    for part in range(parts):
        last = part == parts - 1
        before = None if part == 0 else sums
        given = (x, weight, bias if last else None, taps.rows, taps.order, lists)
        args = (*given, before, out if last else sums, R, part)
        backend.launch(
            kernel._conv_product,
            grid,
            *args,
            G=G,
            PARTS=parts,
            T=T,
            CI=CI,
            CO=CO,
            BACK=back,
            MIRROR=mirror,
            ROWS=tile.rows,
            STEP=step,
            STEPS=steps,
            WIDE=wide,
            NARROW=narrow,
            STAGES=stages,
            num_warps=tile.num_warps,
            num_stages=stages,
        )
    return out


def weight_gradient(x: Tensor, grad: Tensor, pairs: TapPairs) -> Tensor:
    """The sum over pairs of a row of grad [R * G, Co] times one of x [S, Ci]: [Co, M, Ci] fp32."""
    CI = x.shape[1]
    CO = grad.shape[1]
    M, R = pairs.rows.shape[1:]
    tile = _gradient_tile(x.dtype, backend.target(x))
    wide, narrow = _widths(CI, tile.widest, x)
    high = min(tile.rows, max(16, triton.next_power_of_2(CO)))
    warps = tile.num_warps
    # a warpgroup's products (wgmma, tcgen05) have 64 rows or more
    if backend.target(x) not in ("sm_90", "sm_100"):
        high = 32 if CO % high and high == 64 else high
        # four warps would repeat each other's products
        warps = 2 if high == 32 and x.dtype != torch.float32 else warps
    blocks = triton.cdiv(CO, high) * triton.cdiv(CI, wide + narrow)
    shares = _shares(blocks * M, R, x)
    shares = min(shares, triton.cdiv(R, 4 * tile.step))
    part = x.new_empty(shares, CO, M, CI, dtype=torch.float32)
    args = (x, grad, pairs.rows, pairs.count, part, R)
    backend.launch(
        kernel._conv_weight_gradient,
        (blocks, M, shares),
        *args,
        CI=CI,
        CO=CO,
        TILE_C=high,
        STEP=tile.step,
        WIDE=wide,
        NARROW=narrow,
        STAGES=tile.num_stages,
        num_warps=warps,
        num_stages=tile.num_stages,
    )
    return part[0] if shares == 1 else part.sum(0)
