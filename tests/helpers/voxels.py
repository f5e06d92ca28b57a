"""Voxel coordinates, and the rows of their windows."""

import torch


def voxels(counts, extent=(11, 7, 16), seed=0):
    """Distinct random voxels, `counts[b]` of them in sample b, shuffled inside the sample."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for b, n in enumerate(counts):
        cell = torch.randperm(extent[0] * extent[1] * extent[2], generator=generator)[:n]
        x = cell // (extent[1] * extent[2])
        y = cell // extent[2] % extent[1]
        z = cell % extent[2]
        parts.append(torch.stack([torch.full_like(x, b), x, y, z], 1))
    return torch.cat([torch.zeros(0, 4, dtype=torch.long), *parts]).int()


def groups(windows):
    """Rows of each non-empty window, in order."""
    starts = windows.starts.tolist()
    order = windows.order.tolist()
    return [order[a:b] for a, b in zip(starts, starts[1:], strict=False) if b > a]


def lists(windows):
    """(query rows, key rows) of every window."""
    order = windows.order.tolist()
    keys = windows.keys.tolist()
    ends = zip(windows.starts.tolist(), windows.starts[1:].tolist(), strict=False)
    key_ends = zip(windows.key_starts.tolist(), windows.key_starts[1:].tolist(), strict=False)
    return [(order[a:b], keys[c:d]) for (a, b), (c, d) in zip(ends, key_ends, strict=True)]
