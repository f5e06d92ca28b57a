"""Print what becomes of damaged files, or write those of one case.

python -m tests.attack [--cases N] [KIND ...]    a line a kind: results, clear errors, failures
python -m tests.attack --write FOLDER KIND FAMILY SEED
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.attack.child import REFUSAL, Case, run, shown
from tests.attack.subjects import FAMILIES, KINDS, cases_of, subjects


def main() -> int:
    """The command; returns its exit code, 1 where a case failed."""
    parser = argparse.ArgumentParser("python -m tests.attack", description=__doc__)
    parser.add_argument("--cases", type=int, default=5, metavar="N", help="of each family")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("kinds", nargs="*", default=KINDS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = subjects(Path(folder) / "sound")
        if args.write:
            kind, family, seed = args.kinds
            for name in ("in", "outside"):
                (args.write / name).mkdir(parents=True)
            made[kind].prepare(Case(family, int(seed)), args.write / "in")
            return 0
        return _table({kind: made[kind] for kind in args.kinds}, args.cases, Path(folder))


def _table(made: dict, count: int, folder: Path) -> int:
    failed = []
    print(f"{'results / clear errors / failures':34}" + "".join(f"{f:>14}" for f in FAMILIES))
    for kind, subject in made.items():
        outcomes = run(cases_of(subject, count), subject, folder)
        ends = Counter((o.case.family, REFUSAL if o.end == REFUSAL else o.failed) for o in outcomes)
        cells = []
        for family in FAMILIES:
            cell = [ends[family, end] for end in (False, REFUSAL, True)]
            cells.append(f"{'/'.join(map(str, cell)) if sum(cell) else '-':>14}")
        print(f"{kind:34}" + "".join(cells), flush=True)
        failed += [f"{kind}: {shown(outcome)}" for outcome in outcomes if outcome.failed]
    print("\n".join(["", *failed]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
