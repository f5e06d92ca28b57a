"""The host's lists as tensors on a device, without waiting for it."""

import torch
from torch import Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device, which is not waited for."""
    if device.type != "cpu":
        table = table.pin_memory()  # from pageable memory the copy would wait
    return table.to(device, non_blocking=True)


@torch.library.custom_op("trislat::table", mutates_args=())
def _table(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64)
    return to_device(table.view(-1, columns), device)


@_table.register_fake
def _(numbers, columns, device):
    return torch.empty(len(numbers) // columns, columns, dtype=torch.int64, device=device)


def make_table(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    """The host's numbers, `columns` to a row, as int64 on a device, which is not waited for.
    torch.compile keeps it whole: pinned memory cannot be traced.
    """
    return torch.ops.trislat.table(numbers, columns, device)


def make_index(rows: list[int], device: torch.device) -> Tensor:
    """The host's numbers [n] int64 on a device, which is not waited for; a list as an index would
    be copied, which waits.
    """
    return make_table(rows, 1, device).view(-1)
