"""Windows along a space-filling curve, without waiting for the device.

N rows (batch, x, y, z), M windows, K attended rows. A sample's voxels are put in the order of their
code on the curve (Morton's z-order, or Hilbert's in Skilling's form, AIP Conf. Proc. 707, 381,
2004) and cut into ceil(n / window) runs of nearly equal length, whose rows are the queries. The
keys of a run are `window` consecutive rows around its middle, counted around the end: windows
overlap, so the keys are an index list in which rows repeat, not a permutation (the serialised
attention of microsoft/TRELLIS, after Point Transformer V3, arXiv 2312.10035). A sample of up to
`window` voxels is one window.

Where a run ends is computed in integers. The published code multiplies by n / windows in floating
point, which can leave out a sample's last row where that product comes out below an integer.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import tl, triton
from kernels.checks import check_whole
from kernels.voxels.cache import SpatialCache
from kernels.voxels.window import Windows, per_axis

BITS = 10  # of a coordinate in a code
TILE = 512  # rows per program; not yet measured on a GPU (the kernel is launch-bound)
# transposed: x and y change places
CURVES = ("z_order", "z_order_transposed", "hilbert", "hilbert_transposed")


@triton.jit
def _spread(x):
    """Move bit i of a coordinate to bit 3 i."""
    x = (x | (x << 16)) & 0x030000FF
    x = (x | (x << 8)) & 0x0300F00F
    x = (x | (x << 4)) & 0x030C30C3
    return (x | (x << 2)) & 0x09249249


@triton.jit(do_not_specialize=["N", "sx", "sy", "sz"])
def _codes(
    coords_ptr,
    codes_ptr,
    N,
    sx,
    sy,
    sz,
    HILBERT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = row < N
    c = coords_ptr + row.to(tl.int64) * 4
    x = tl.load(c + 1, mask=live, other=0) + sx
    y = tl.load(c + 2, mask=live, other=0) + sy
    z = tl.load(c + 3, mask=live, other=0) + sz
    if TRANSPOSED:
        x, y = y, x
    if HILBERT:
        for i in tl.static_range(BITS - 1):
            bit = 1 << (BITS - 1 - i)
            x = tl.where(x & bit != 0, x ^ (bit - 1), x)
            flip = y & bit != 0
            t = (x ^ y) & (bit - 1)
            x = x ^ tl.where(flip, bit - 1, t)
            y = tl.where(flip, y, y ^ t)
            flip = z & bit != 0
            t = (x ^ z) & (bit - 1)
            x = x ^ tl.where(flip, bit - 1, t)
            z = tl.where(flip, z, z ^ t)
        y ^= x
        z ^= y
        t = z >> 1  # becomes, in each bit, the parity of the bits of z above it
        t ^= t >> 1
        t ^= t >> 2
        t ^= t >> 4
        t ^= t >> 8
        x ^= t
        y ^= t
        z ^= t
    tl.store(codes_ptr + row, (_spread(x) << 2) | (_spread(y) << 1) | _spread(z), mask=live)


def _codes_torch(c: list[Tensor], hilbert: bool) -> Tensor:
    """`_codes` in plain torch, from the coordinates along three axes, [N] int32 each."""
    if hilbert:
        for bit in (1 << i for i in range(BITS - 1, 0, -1)):
            for axis in range(3):
                flip = c[axis] & bit != 0
                t = (c[0] ^ c[axis]) & (bit - 1)
                c[axis] = c[axis].where(flip, c[axis] ^ t)
                c[0] = c[0] ^ torch.where(flip, bit - 1, t)
        c[1] = c[1] ^ c[0]
        c[2] = c[2] ^ c[1]
        t = c[2] >> 1
        for i in (1, 2, 4, 8):
            t = t ^ (t >> i)
        c = [x ^ t for x in c]
    code = torch.zeros_like(c[0])
    for i in range(BITS):
        for axis in range(3):
            code |= (c[axis] >> i & 1) << (3 * i + 2 - axis)
    return code


@torch.library.custom_op("trislat::curve_codes", mutates_args=())
def _curve_codes(coords: Tensor, shift: list[int], hilbert: bool, transposed: bool) -> Tensor:
    if backend.is_torch(coords):
        c = [coords[:, a + 1] + shift[a] for a in range(3)]
        return _codes_torch([c[1], c[0], c[2]] if transposed else c, hilbert)
    codes = coords.new_empty(len(coords))
    N = len(coords)
    constants = dict(HILBERT=hilbert, TRANSPOSED=transposed, BITS=BITS, TILE=TILE, num_warps=4)
    backend.launch(_codes, (triton.cdiv(N, TILE),), coords, codes, N, *shift, **constants)
    return codes


@_curve_codes.register_fake
def _(coords, shift, hilbert, transposed):
    return coords.new_empty(coords.shape[0])


def curve_codes(
    voxels: SpatialCache,
    mode: str,  # one of CURVES
    shift: int | tuple[int, int, int] = 0,  # voxels per axis, added to the coordinates
) -> Tensor:  # [N] int32
    """The position of each voxel along a space-filling curve through 1024^3 voxels: 30 bits.

    x is the most significant axis. Raises ValueError for an unknown mode, a negative shift, and one
    that takes a coordinate beyond 1023.
    """
    if mode not in CURVES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(CURVES)}")
    shift = per_axis(shift, "shift_window", 0)
    for extent, s in zip(voxels.extent, shift, strict=True):
        if extent + s > 1 << BITS and len(voxels):
            raise ValueError(
                f"coordinate {extent - 1} shifted by {s} is beyond {(1 << BITS) - 1}, the last "
                "on the curve"
            )
    args = mode.startswith("hilbert"), mode.endswith("transposed")
    return torch.ops.trislat.curve_codes(voxels.coords, shift, *args)


def serialized_windows(
    voxels: Tensor | SpatialCache,  # coords [N, 4] int32 (batch, x, y, z), or a cache over them
    batch_size: int,
    window: int,  # rows that a query attends to
    mode: str = "z_order",  # one of CURVES
    shift_sequence: int = 0,  # rows along the curve by which the windows of a sample move, any sign
    # voxels per axis by which the curve moves, none negative
    shift_window: int | tuple[int, int, int] = 0,
) -> Windows:
    """Group voxels along a space-filling curve into overlapping windows.

    `Windows.keys` lists the rows that each window attends to. Given a cache nothing waits for the
    device; given coords they are checked, which waits once. Raises ValueError for a window below 1,
    a wrong batch size, and where SpatialCache and `curve_codes` do.
    """
    check_whole("window", window)
    cache = SpatialCache(voxels, batch_size) if isinstance(voxels, Tensor) else voxels
    if batch_size != cache.batch_size:
        raise ValueError(f"batch_size {batch_size} of a cache over {cache.batch_size} samples")
    codes = curve_codes(cache, mode, shift_window)
    # [N]: samples in order, along the curve
    line = ((cache.coords[:, 0].long() << 3 * BITS) | codes).argsort(stable=True)
    runs = [-(-n // window) for n in cache.counts]
    M = sum(runs)
    K = sum(min(n, window) * r for n, r in zip(cache.counts, runs, strict=True))
    arange = {"dtype": torch.int64, "device": line.device}
    starts = cache.starts.long()
    # n: rows of each sample; r: its windows; sample: of each window; i: its number in the sample
    n = starts.diff()
    r = (starts.diff() + window - 1) // window
    sample = torch.arange(batch_size, **arange).repeat_interleave(r, output_size=M)
    i = torch.arange(M, **arange) - (r.cumsum(0) - r)[sample]
    shift = torch.where(r > 1, shift_sequence, 0)
    # queries: the line, turned by the shift
    at = torch.arange(len(line), **arange)
    b = cache.coords[:, 0].long()
    order = line[starts[b] + (at - starts[b] + shift[b]) % n[b]]
    n = n[sample]
    r = r[sample]
    first = starts[sample]
    shift = shift[sample]
    q_starts = torch.cat([first + i * n // r, starts[-1:]])
    # keys: floor((i + 1/2) n / r - window / 2) + shift, and on
    length = n.clamp(max=window)
    k_starts = torch.cat([length.new_zeros(1), length.cumsum(0)])
    begin = torch.where(r > 1, ((2 * i + 1) * n - window * r) // (2 * r) + shift, 0)
    m = torch.arange(M, **arange).repeat_interleave(length, output_size=K)
    keys = line[first[m] + (torch.arange(K, **arange) - k_starts[m] + begin[m]) % n[m]]
    bound = min(window, max(cache.counts, default=0))
    return Windows(order.int(), q_starts.int(), bound, keys.int(), k_starts.int())


def curve_code_reference(x: int, y: int, z: int, hilbert: bool) -> int:
    """The code of one voxel, bit by bit (Skilling's AxestoTranspose)."""
    c = [x, y, z]
    if hilbert:
        for bit in (1 << i for i in range(BITS - 1, 0, -1)):
            for axis in range(3):
                if c[axis] & bit:
                    c[0] ^= bit - 1
                else:
                    t = (c[0] ^ c[axis]) & (bit - 1)
                    c[0] ^= t
                    if axis:
                        c[axis] ^= t
        c[1] ^= c[0]
        c[2] ^= c[1]
        t = 0
        for bit in (1 << i for i in range(BITS - 1, 0, -1)):
            t ^= bit - 1 if c[2] & bit else 0
        c = [v ^ t for v in c]
    return sum((c[axis] >> i & 1) << (3 * i + 2 - axis) for i in range(BITS) for axis in range(3))


def serialized_windows_reference(
    coords, batch_size, window, mode="z_order", shift_sequence=0, shift_window=0
):
    """[(query rows, key rows)] of every window in order, sample by sample."""
    shift = per_axis(shift_window, "shift_window", 0)
    found = []
    for b in range(batch_size):
        line = []
        for row, (sample, *c) in enumerate(coords.tolist()):
            if sample == b:
                x, y, z = (v + s for v, s in zip(c, shift, strict=True))
                x, y = (y, x) if mode.endswith("transposed") else (x, y)
                line.append((curve_code_reference(x, y, z, mode.startswith("hilbert")), row))
        n = len(line)
        line = [row for _, row in sorted(line)]
        runs = -(-n // window)
        for i in range(runs):
            if runs == 1:
                found.append((line, line))
                continue
            queries = range(i * n // runs + shift_sequence, (i + 1) * n // runs + shift_sequence)
            begin = ((2 * i + 1) * n - window * runs) // (2 * runs) + shift_sequence
            keys = [line[p % n] for p in range(begin, begin + window)]
            found.append(([line[p % n] for p in queries], keys))
    return found
