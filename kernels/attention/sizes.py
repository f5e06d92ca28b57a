"""Tile sizes of the attention kernels, by dtype, head width, GPU and direction."""

from typing import NamedTuple

import torch

ANY = 2**31 - 1


class Tile(NamedTuple):
    """A size class: segments of `low` < length <= `high`.

    A program computes `rows` of them, with `step` rows of the other side at a time.
    """

    low: int
    high: int
    rows: int
    step: int
    num_warps: int
    num_stages: int


def tile_sizes(
    dtype: torch.dtype, pad_d: int, target: str, normed: bool, rotated: bool, separate: bool = False
) -> tuple[list[Tile], list[Tile]]:
    """Size classes, forward and backward.

    Not yet measured on a GPU: chosen so that nothing spills and shared memory suffices. The q/k
    norm holds more of a row in registers, and so does the rotation. The last class loops, from any
    length, and is the only one where keys are `separate` from the queries.
    """
    treated = normed or rotated
    # of 100 KB of shared memory a third stage leaves a multiprocessor one block instead of three
    short_stages = 3 if target == "sm_80" else 2
    ada = target.startswith("sm_8")  # or Ampere; on sm_120 ptxas spills with a second stage
    if target == "interpreter":  # a program costs milliseconds whatever its size
        forward = [
            Tile(0, 64, 64, 64, 4, 1),
            Tile(64, 256, 256, 256, 4, 1),
            Tile(256, ANY, 128, 256, 4, 1),
        ]
        backward = [
            Tile(0, 64, 64, 64, 4, 1),
            Tile(64, 256, 256, 128, 4, 1),
            Tile(256, ANY, 128, 256, 4, 1),
        ]
    # no tensor cores on NVIDIA: full fp32 products hold their operands in registers
    elif dtype == torch.float32:
        forward = [Tile(0, ANY, 32, 16, 4, 1)]
        step = 32 if pad_d <= 32 and not treated else 16
        backward = [Tile(0, ANY, 32, step, 8, 1)] if pad_d <= 64 else [Tile(0, ANY, 16, 16, 4, 1)]
        if pad_d <= 64 and not treated:
            backward = [
                Tile(0, 64, 64, 16, 8, 2 if target.startswith("sm_8") else 1),
                backward[0]._replace(low=64),
            ]
        # ptxas spills steps of 16 at 80 registers
        if pad_d == 64 and normed and rotated and target.startswith("sm_10"):
            forward = [Tile(0, ANY, 32, 32, 4, 1)]
        if pad_d == 64 and target.startswith("sm_8") and rotated and not normed:
            backward = [Tile(0, ANY, 16, 16, 4, 1)]
        if pad_d == 64 and target.startswith("sm_8") and separate and not treated:
            backward[-1] = backward[-1]._replace(num_warps=4)
    elif pad_d > 64:
        forward = [Tile(0, ANY, 64, 32, 4, 2)]
        backward = [Tile(0, 64, 64, 16, 4, 1), Tile(64, ANY, 64, 16, 4, 1)]
        if treated:
            forward = [Tile(0, ANY, 64, 32, 8, 2)]
            backward = [Tile(0, ANY, 32, 16, 8, 1)]
    elif target.startswith("gfx1"):  # 256 registers a thread, half of what gfx9 has
        forward = [Tile(0, ANY, 64, 32, 8, 1)]
        backward = [Tile(0, ANY, 16 if treated else 32, 16, 4, 1)]
    elif rotated:
        wide = target.startswith("sm_10") and pad_d <= 32 and dtype == torch.bfloat16
        warps = 8 if wide else 4  # bf16 spills there with 4, fp16 with 8
        forward = [Tile(0, 64, 64, 64, warps, 1), Tile(64, ANY, 64, 32, 4, 1)]
        backward = [Tile(0, 64, 64, 16, 8, 1), Tile(64, ANY, 64, 16, 8, 1)]
        # products from registers: a short segment's tile spills
        if not target.startswith(("sm_9", "sm_10")):
            forward = [Tile(0, ANY, 64, 32, 4, 2 if target.startswith("sm_12") else 1)]
        if target.startswith("sm_10"):  # steps of 16 spill with Triton 3.9
            backward = [Tile(0, 64, 64, 32, 4, 1), Tile(64, ANY, 64, 32, 4, 1)]
        if target.startswith(("sm_8", "sm_12")):
            backward = [Tile(0, ANY, 32, 16, 8, 1)]
        if target.startswith("sm_12") and not normed:  # that spills there
            backward = [Tile(0, ANY, 32, 16, *((4, 1) if pad_d <= 32 else (8, 2)))]
    elif target.startswith("gfx"):
        forward = [Tile(0, ANY, 64, 32, 4, 2)]
        backward = [
            Tile(0, 64, 64, 16, 4, 2),
            Tile(64, 128, 128, 16, 8, 1),
            Tile(128, ANY, 64, 16, 4, 2),
        ]
        if not normed:
            backward[2:] = [Tile(128, 256, 256, 16, 8, 1), Tile(256, ANY, 64, 16, 4, 2)]
    # 227 KB of shared memory, and products from it
    elif 90 <= int(target.removeprefix("sm_")) < 120:
        step = 64 if target == "sm_90" else 32
        forward = [
            Tile(0, 64, 64, 64, 4, 2),
            Tile(64, 128, 128, 128, 8, 2),
            Tile(128, ANY, 64, step, 4, 3),
        ]
        backward = [
            Tile(0, 64, 64, 32, 4, 2),
            Tile(64, 128, 128, 32, 8, 2),
            Tile(128, ANY, 64, 32, 4, 2),
        ]
        if not normed:
            backward[2:] = [Tile(128, 256, 256, 32, 8, 1), Tile(256, ANY, 64, 32, 4, 2)]
        if target.startswith("sm_10"):  # Triton 3.6 spills with a second stage
            backward[-1] = backward[-1]._replace(num_stages=1)
    elif normed:
        forward = [Tile(0, 64, 64, 64, 4, short_stages), Tile(64, ANY, 64, 64, 4, 3)]
        backward = [Tile(0, ANY, 64, 16, 4, 2 if ada else 1)]
    else:
        forward = [
            Tile(0, 64, 64, 64, 4, short_stages),
            Tile(64, 128, 128, 128, 8, 2),
            Tile(128, ANY, 64, 64, 4, 3),
        ]
        backward = [
            Tile(0, 64, 64, 32, 4, 1),
            Tile(64, 128, 128, 32, 8, 2 if ada else 1),
            Tile(128, ANY, 64, 32, 4, 3),
        ]
    return forward, backward
