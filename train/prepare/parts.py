"""Parts of a dataset for several machines: `--part K/N` takes every N-th object.

Objects are counted in the order of their sha256, so every machine agrees on who has which. A part
keeps its own table, metadata_K_of_N.csv, for two machines cannot write one file. Once the tables of
all parts are in a folder, whoever ends last, or runs again there, joins them to metadata.csv.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.data.metadata import read_metadata, write_metadata


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, numbered from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read K/N; ValueError for anything else."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(int(match[1]), int(match[2])) if match else None
        if part is None or not 1 <= part.number <= part.count:
            raise ValueError(f"part {text!r} is not K/N with K in 1 to N")
        return part

    @property
    def table(self) -> str:
        """The name of the part's own table."""
        return self._table(self.number)

    def _table(self, number: int) -> str:
        return "metadata.csv" if self.count == 1 else f"metadata_{number}_of_{self.count}.csv"

    def of(self, names: Iterable[str]) -> set[str]:
        """Take this part of objects, by sha256."""
        return set(sorted(names)[self.number - 1 :: self.count])

    def join(self, out: Path) -> list[int]:
        """Join the tables of all parts to metadata.csv; returns the numbers of absent ones.

        With one part there is nothing to join.
        """
        numbers = range(1, self.count + 1) if self.count > 1 else ()
        absent = [n for n in numbers if not (out / self._table(n)).is_file()]
        if self.count == 1 or absent:
            return absent
        joined = None
        # again where another part wrote its table meanwhile: its join may have come first
        while joined != (rows := [r for n in numbers for r in read_metadata(out, self._table(n))]):
            write_metadata(out, rows, tag=str(self.number))
            joined = rows
        return []


WHOLE = Part()
