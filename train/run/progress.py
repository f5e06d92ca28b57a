"""The progress of a long command: a bar in a terminal; elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines, at least


class Progress:
    """Counts to `total`, from `done` on.

    Where `stream` (default: standard error) is no terminal, as in a batch job's log, there are no
    carriage returns: the first update, the last and those with `now` give a line each, any other
    only where the line before is 30 s old. `clock` returns seconds. Nothing is shown at all unless
    `shown`.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        unit: str = "step",
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stream = stream or sys.stderr
        self.clock = clock
        self.total = total
        self.done = done
        self.unit = unit
        self.shown = shown
        terminal = shown and self.stream.isatty()
        self.bar = (
            tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, file=self.stream)
            if terminal
            else None
        )
        self.first = done
        self.begin = clock()
        self.last: float | None = None  # when the last line was written

    def update(self, note: str = "", now: bool = False, count: int = 1) -> None:
        """Count more as done; `note` says what else there is to know, `now` that a line is due."""
        self.done += count
        if self.bar:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        if self.bar or not self.shown:
            return
        seconds = self.clock()
        if now or self.last is None or self.done == self.total or seconds - self.last >= INTERVAL:
            self.last = seconds
            spent = seconds - self.begin
            left = spent / (self.done - self.first) * (self.total - self.done)
            times = f"{tqdm.format_interval(spent)}, {tqdm.format_interval(left)} to go"
            parts = [f"{self.unit} {self.done:,} of {self.total:,}", note, times]
            print("  ".join(part for part in parts if part), file=self.stream, flush=True)

    def expect(self, more: int) -> None:
        """Add to the total, or take from it where `more` is negative."""
        self.total += more
        if self.bar:
            self.bar.total = self.total

    @staticmethod
    def write(line: str) -> None:
        """Write a line to standard output, above the bar where there is one."""
        tqdm.write(line)

    def close(self) -> None:
        """End the bar."""
        if self.bar:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
