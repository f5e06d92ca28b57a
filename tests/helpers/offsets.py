"""python -m tests.helpers.offsets LAUNCHES.json: 32-bit products of row numbers that kernels use as
offsets, from Triton's own IR.

LAUNCHES are what `python -m kernels.compile --record` prints. A row number fits 32 bits; its
product with a stride may not (2304 channels overflow at 932 thousand rows), so it must be made in
64. Every 32-bit value of a kernel has a size: SMALL is bounded by constants of the launch, PROGRAM
a program's number, ROW whatever is read, passed or a program's number times its tile, PRODUCT a ROW
times more than 1. A PRODUCT that is an offset of a pointer, or is widened, was made too narrow.
"""

import json
import re
import sys
from pathlib import Path

import triton
import triton.language as tl

from kernels.compile.command import TARGETS, Build, _read, source

SMALL, PROGRAM, ROW, PRODUCT = range(4)
# of a picture (of fewer than 2^30 pixels) or a row
EXTENTS = {"H", "W", "TX", "TY", "size", "plane", "C", "R", "programs"}
NAME = r"%[\w#]+"
PASSES = ("minsi", "minui", "remsi", "remui")  # no larger than the smaller, at least


def intermediate(build) -> str:
    """The text of the kernel's Triton IR, functions inlined."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    made, gpu, options = source(build, TARGETS["sm_90"])
    backend, context, stages = make_backend(gpu), ir.context(), {}
    options = backend.parse_options(options)
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = made.make_ir(
        gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    backend.add_stages(stages, options, made.language)
    return str(stages["ttir"](module, {}))


def _multiply(a: int, b: int) -> int:
    low, high = sorted((a, b))
    if high == SMALL:
        return SMALL
    return ROW if high == PROGRAM else PRODUCT


class Sizes:
    """Of every value in one kernel's text; regions hand theirs on until nothing changes."""

    def __init__(self, text: str):
        self.of: dict[str, int] = {}
        self.ones: set[str] = set()
        self.found: set[str] = set()
        self.lines = text.splitlines()
        self.places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        before = None
        while before != self.of:
            before = dict(self.of)
            self._walk()

    def size(self, name: str) -> int:
        return self.of.get(name, SMALL)

    def grow(self, name: str, size: int) -> None:
        self.of[name] = max(self.size(name), size)

    def source(self) -> str:
        """The line of a kernel that the current line comes from."""
        place = self.place
        # a name, or the place in an inlined function and that of its call
        while "#" in place and '":' not in place:
            place = self.places[re.search(r"#loc\d*", place)[0]]
        file, number = re.match(r'"(.*?)":(\d+)', place).groups()
        return Path(file).read_text().splitlines()[int(number) - 1].strip()

    def _walk(self) -> None:
        # (result, names of what is carried) of the regions a line is in
        regions: list[tuple[str, list[str]]] = []
        for full in self.lines:
            self.place = (re.findall(r"loc\((#loc\d*)\)", full) or [""])[-1]
            line = re.sub(r" loc\(#loc\d*\)", "", full).strip()
            if line.startswith("tt.func"):
                for name, kind in re.findall(rf"({NAME}): (\S+?)[,) ]", line):
                    if kind in ("i32", "i64") and name[1:] not in EXTENTS:
                        self.grow(name, ROW)
            result = re.match(rf"({NAME})(?::\d+)? = ", line)
            if re.search(r"\bscf\.(for|while|if)\b", line):
                carried = re.findall(rf"({NAME}) = ({NAME})(?=[,)])", line)
                for place, (name, first) in enumerate(carried):
                    self.grow(name, self.size(first))
                    self._result(result, place, len(carried), self.size(first))
                loop = re.search(
                    rf"scf\.for(?: unsigned)? ({NAME}) = ({NAME}) to ({NAME}) step ({NAME})", line
                )
                if loop:  # what it counts to; by a tile's step it stays a row
                    self.grow(loop[1], max(self.size(loop[2]), self.size(loop[3])))
                regions.append((result[1] if result else "", [name for name, _ in carried]))
            elif line.startswith("scf.yield") and regions:
                values = re.findall(NAME, line.split(":")[0])
                name, carried = regions[-1]
                for place, value in enumerate(values):
                    if place < len(carried):
                        self.grow(carried[place], self.size(value))
                    self._result(re.match(rf"({NAME})", name), place, len(values), self.size(value))
            elif line.startswith("}"):
                if "else" not in line and "do" not in line and regions:
                    regions.pop()
            elif result:
                self._assign(result[1], line)

    def _result(self, result, place: int, count: int, size: int) -> None:
        if result:
            self.grow(result[1] if count == 1 else f"{result[1]}#{place}", size)

    def _assign(self, name: str, line: str) -> None:
        operation = re.search(r"= \"?([\w.]+)", line)[1]
        short, values = (
            operation.split(".")[-1],
            re.findall(NAME, line.split("=", 1)[1].split(" : ")[0]),
        )
        sizes = [self.size(v) for v in values]
        narrow = (
            re.search(r"(?:^|[x<])i32>*$", line.rsplit(" : ", 1)[-1].split(", ")[-1]) is not None
        )
        if short == "constant":
            if re.search(r"(?<![\d.])\b(?:dense<)?1>? :", line):
                self.ones.add(name)
            size = SMALL
        elif short == "get_program_id":
            size = PROGRAM
        elif short in ("load", "atomic_rmw", "fptosi", "trunci"):
            size = ROW
        elif short in ("muli", "shli"):
            size = max(sizes) if self.ones & set(values) else _multiply(*sizes)
        elif short in PASSES or (short == "andi" and narrow):
            size = min(sizes)
        elif short in ("cmpi", "cmpf", "make_range"):
            size = SMALL
        elif short == "addptr":
            if sizes[1] == PRODUCT and narrow:
                self.found.add(self.source())
            size = SMALL
        elif short in ("extsi", "extui"):
            if sizes[0] == PRODUCT:
                self.found.add(self.source())
            size = SMALL  # 64 bits from here on
        else:
            size = max(sizes, default=SMALL)
        if short in ("muli", "shli", "addi", "subi", "divsi") and not narrow:
            size = SMALL
        self.grow(name, size)


@triton.jit
def example(x_ptr, rows_ptr, TILE: tl.constexpr, C: tl.constexpr):
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(x_ptr + n * C, 1.0)  # too narrow
    tl.store(x_ptr + n.to(tl.int64) * C, 2.0)
    for i in range(0, tl.load(rows_ptr)):
        tl.store(x_ptr + tl.load(rows_ptr + i) * C, 3.0)  # too narrow
        tl.store(x_ptr + tl.load(rows_ptr + i).to(tl.int64) * C, 4.0)
    wide = tl.program_id(0).to(tl.int64) * TILE
    tl.store(x_ptr + wide * C, 5.0)


def main() -> None:
    """Print each kernel with its suspicious lines, as JSON."""
    found: dict[str, set[str]] = {}
    types, constants = (("x_ptr", "*fp32"), ("rows_ptr", "*i32")), (("C", 768), ("TILE", 64))
    builds = [
        Build("tests.helpers.offsets", "example", types, (), (), constants),
        *_read(Path(sys.argv[1]).read_text()),
    ]
    for build in builds:
        found.setdefault(f"{build.module}.{build.kernel}", set()).update(
            Sizes(intermediate(build)).found
        )
    print(json.dumps({name: sorted(lines) for name, lines in found.items()}))


if __name__ == "__main__":
    main()
