"""Segments in order of length, so that lanes which work side by side end together."""

from kernels.backend import tl, triton


@triton.jit
def sort_by_length(used_ptr, order_ptr, begin, end, BLOCK: tl.constexpr):
    """Write the segments begin : end to `order`, of every BLOCK the longest first.

    A segment's place is the number of those that go before it.
    """
    for first in range(begin, end, BLOCK):
        lane = tl.arange(0, BLOCK)
        key = tl.load(used_ptr + first + lane, first + lane < end, -1) * BLOCK - lane
        place = tl.zeros([BLOCK], tl.int32)
        for part in range(0, BLOCK, 8):
            other = part + tl.arange(0, 8)
            rival = tl.load(used_ptr + first + other, first + other < end, -1) * BLOCK - other
            place += tl.sum((rival[:, None] > key[None, :]).to(tl.int32), 0)
        tl.store(order_ptr + first + place, (first + lane).to(tl.int32), first + lane < end)
    tl.debug_barrier()  # other lanes read what was written
