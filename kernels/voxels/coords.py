"""Voxel coordinates [N, 4] (batch, x, y, z): their check, their extent and their packed keys."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.checks import check_tensors, check_whole

LIMIT = 1024  # coordinates are below it: 10 bits an axis
MOST_SAMPLES = 1024  # samples that are counted where the caller does not say how many there are


@dataclass(frozen=True)
class Extent:
    """Numbers of a coordinate set that the host knows, read once in `check_coords`."""

    counts: list[int]  # rows of each sample
    size: tuple[int, int, int]  # every coordinate is below it, per axis; 1 where there are no rows


def check_coords(coords: Tensor, batch_size: int | None = None) -> tuple[Extent, Tensor]:
    """Check a coordinate set [N, 4] int32 and read its extent, waiting once for the device.

    Returns the extent and `starts` [B + 1] int32, on the device: sample b owns rows starts[b] :
    starts[b + 1]. Without `batch_size` there are as many samples as the last row says.

    Raises ValueError, with the row that is wrong, for a missing batch column, another dtype,
    negative or too large coordinates, samples that are not in order or beyond batch_size, and
    duplicates. Raises TypeError for what is no tensor.
    """
    check_tensors(coords=coords)
    if coords.ndim == 2 and coords.shape[1] == 3:
        raise ValueError(
            f"The batch column is missing: coords are {list(coords.shape)}, (batch, x, y, z) is "
            "[N, 4]. Put the sample's index in front: torch.nn.functional.pad(coords, (1, 0), "
            "value=index), then torch.cat the samples"
        )
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords must be [N, 4] (batch, x, y, z), got {list(coords.shape)}")
    if coords.dtype != torch.int32:
        raise ValueError(f"coords must be torch.int32, got {coords.dtype}")
    if batch_size is not None:
        check_whole("batch_size", batch_size, 0)
    N = len(coords)
    samples = MOST_SAMPLES if batch_size is None else batch_size
    if N == 0:
        return Extent([0] * (batch_size or 0), (1, 1, 1)), coords.new_zeros((batch_size or 0) + 1)

    row = torch.arange(N, device=coords.device)

    def first(wrong: Tensor) -> Tensor:  # the first such row, N for none
        return torch.where(wrong, row, N).amin()

    def shifted(x: Tensor) -> Tensor:  # the value before, and for the first its own
        return torch.cat([x[:1], x[:-1]])

    batch = coords[:, 0].contiguous()
    numbers = torch.arange(samples + 1, dtype=torch.int32, device=coords.device)
    starts = torch.searchsorted(batch, numbers, out_int32=True)
    # meaningless for coordinates out of range, but those are reported first
    keys, order = pack(coords).sort(stable=True)
    second = torch.where((keys == shifted(keys)) & (row > 0), order, N)
    # an index without a dimension would be read
    twin = shifted(order).index_select(0, second.argmin()[None])
    facts = [
        first((coords < 0).any(1)),
        first((coords[:, 1:] >= LIMIT).any(1)),
        first(batch < shifted(batch)),
        first(batch >= samples),
        second.amin(),
        twin[0],
        batch[-1],
        *coords[:, 1:].amax(0),
    ]
    # the one wait for the device
    read = torch.cat([torch.stack([f.long() for f in facts]), starts.long()]).tolist()
    negative, large, unsorted, beyond, second, twin, last, *largest = read[: len(facts)]

    def at(i: int) -> str:
        return f"row {i} of coords is {coords[i].tolist()}"

    if negative < N:
        raise ValueError(f"{at(negative)}: negative")
    if large < N:
        raise ValueError(f"{at(large)}: above {LIMIT - 1}, the largest coordinate")
    if unsorted < N:
        raise ValueError(
            f"{at(unsorted)} after {coords[unsorted - 1].tolist()}: samples must be in order of "
            "their batch index"
        )
    if beyond < N:
        what = f"batch_size is {samples}"
        if batch_size is None:
            what = f"give batch_size for more than {MOST_SAMPLES} samples"
        raise ValueError(f"{at(beyond)}: {what}")
    if second < N:
        raise ValueError(
            f"rows {twin} and {second} of coords are the same voxel {coords[second].tolist()}"
        )
    samples = last + 1 if batch_size is None else batch_size
    ends = read[len(facts) :]
    counts = [b - a for a, b in pairwise(ends[: samples + 1])]
    return Extent(counts, tuple(c + 1 for c in largest)), starts[: samples + 1].contiguous()


def pack(coords: Tensor) -> Tensor:
    """The 64-bit key of each row of [..., 4]: batch | x | y | z, 10 bits an axis.

    Keys sort as (b, x, y, z) does.
    """
    b, x, y, z = coords.long().unbind(-1)
    return ((b * LIMIT + x) * LIMIT + y) * LIMIT + z


def unpack(keys: Tensor) -> Tensor:
    """The rows [..., 4] int32 of keys that `pack` made."""
    b = keys // LIMIT**3
    x = keys // LIMIT**2 % LIMIT
    y = keys // LIMIT % LIMIT
    z = keys % LIMIT
    return torch.stack([b, x, y, z], -1).int()
