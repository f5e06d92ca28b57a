"""PTX text to a program for the executor: registers get slots, instructions their handler's name.

The subset is what LLVM and Triton's inline assembly emit. Anything else raises PtxUnsupported.
"""

import re
import struct
from dataclasses import dataclass, field


class PtxUnsupported(Exception):
    """An instruction or operand that the emulator does not know."""


PLAIN, BRANCH, EXIT, BARRIER, ARRIVE = range(5)
GLOBAL, SHARED, LOCAL, GENERIC = range(4)
# as in executor.cpp
SHARED_BASE, SHARED_WINDOW, LOCAL_WINDOW = 1024, 1 << 60, 1 << 61
SPECIAL = (
    "%tid.x %ctaid.x %ctaid.y %ctaid.z %laneid %warpid %lanemask_ge %lanemask_gt %lanemask_lt "
    "%lanemask_le %lanemask_eq %nctaid.x %nctaid.y %nctaid.z"
).split()
ZERO = "%tid.y %tid.z %clusterid.x %cluster_ctarank %smid %clock %clock64 %globaltimer".split()
ONE = "%ntid.y %ntid.z %cluster_nctarank".split()
KIND = re.compile(r"[bus](8|16|32|64)|b?f16(x2)?|[us]16x2|f32|f64|tf32|pred|e4m3x2|e5m2x2")


def is_kind(word: str) -> bool:
    return bool(KIND.fullmatch(word))


def width(kind: str) -> int:
    """Bytes of a register that holds a value of type `kind`: two at least."""
    if kind == "pred":
        return 4
    if kind.endswith("x2"):
        return 2 if kind[0] == "e" else 4
    return max(2, int(re.search(r"\d+", kind)[0]) // 8)


@dataclass
class Instruction:
    """One decoded instruction: the handler's name, its operands, and where it came from."""

    name: str
    operands: list[int]
    text: str
    line: int  # of the PTX
    source: int  # index into Program.sources
    pred: int = -1
    negated: bool = False
    flow: int = PLAIN
    target: int | str = -1


@dataclass
class Program:
    """A kernel ready to run."""

    name: str = ""
    code: list[Instruction] = field(default_factory=list)
    image: bytearray = field(default_factory=bytearray)  # what a warp's registers start as
    special: list[tuple[int, int]] = field(default_factory=list)  # (which, slot)
    params: list[tuple] = field(default_factory=list)  # (position, offset, bytes, slot)
    widths: dict[str, int] = field(default_factory=dict)  # bytes of every parameter, in order
    globals: dict[str, bytes] = field(default_factory=dict)  # arrays in global and constant memory
    global_slots: list[tuple] = field(default_factory=list)  # (name, slot)
    sources: list[str] = field(default_factory=lambda: [""])
    shared: int = 0  # static bytes
    local: int = 0
    threads: int = 0
    # the narrowest access of each space: what its shadow memory tells apart
    granule: dict[int, int] = field(default_factory=lambda: {GLOBAL: 16, SHARED: 16})


def immediate(text: str, kind: str) -> int:
    """Return the bits of a literal, as an operand of type `kind`."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        bits = int(match[1], 16)
        if kind != "f64":
            return bits
        (value,) = struct.unpack("<f", struct.pack("<I", bits))
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return int(match[1], 16)
    text = text.rstrip("Uu")
    if re.fullmatch(r"-?\d+\.\d*", text) or (kind in ("f32", "f64") and text.isdigit()):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", float(text)), "little")
    digits = text.lstrip("-")
    value = int(digits, 8 if re.fullmatch(r"0[0-7]+", digits) else 0)
    return -value if text.startswith("-") else value


class Decoder:
    """The state of reading one module; `decode` of tests.emulator.instructions drives it."""

    def __init__(self):
        self.program = Program()
        self.slots: dict[tuple, int] = {}  # of constants, special registers and parameters
        self.size = 0
        self.fill: list[tuple[int, bytes]] = []
        self.symbols: dict[str, tuple[int, int]] = {}  # name -> space, address
        # braces: name -> slot, width; "name<" stands for a range of names
        self.scopes: list[dict[str, tuple[int, int]]] = [{}, {}]
        self.labels: dict[str, int] = {}
        self.known = dict.fromkeys(ZERO, 0) | dict.fromkeys(ONE, 1) | {"WARP_SZ": 32}
        self.where = 0

    def new(self, size: int) -> int:
        """Make a slot of 32 lanes of `size` bytes; a predicate takes one word."""
        slot = (self.size + 63) // 64 * 64
        self.size = slot + 32 * size
        return slot

    def once(self, *key, note: list | None = None, size: int = 4) -> int:
        """Return the slot of a key, made and noted as (*key, slot) when first asked for."""
        if key not in self.slots:
            self.slots[key] = self.new(size)
            if note is not None:
                note.append((*key, self.slots[key]))
        return self.slots[key]

    def constant(self, value: int, size: int) -> int:
        value &= (1 << 8 * size) - 1
        if (value, size) not in self.slots:
            self.fill.append((self.once(value, size, size=size), value.to_bytes(size, "little")))
        return self.slots[value, size]

    def register(self, name: str) -> tuple[int, int]:
        """Return slot and width of a register by name."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
            family = re.sub(r"\d+$", "<", name)
            if family in scope:
                scope[name] = self.new(scope[family][1]), scope[family][1]
                return scope[name]
        raise PtxUnsupported(f"register {name}")

    def named(self, name: str, size: int) -> int | None:
        """Return the slot of a special register or of a symbol's address, None for another name."""
        if name in self.known:
            return self.constant(self.known[name], size)
        if name in SPECIAL:
            return self.once(SPECIAL.index(name), note=self.program.special)
        return self.symbol(name, size) if name in self.symbols else None

    def symbol(self, name: str, size: int) -> int:
        space, address = self.symbols[name]
        if space == GLOBAL:
            return self.once(name, note=self.program.global_slots, size=8)
        return self.constant(address, size)

    def value(self, text: str, kind: str) -> int:
        """Return the slot of an operand read as `kind`: a register, a literal or a symbol."""
        size = width(kind)
        if text.startswith("%") or re.match(r"[A-Za-z_$]", text):
            slot = self.named(text, size)
            if slot is not None:
                return slot
            slot, found = self.register(text)
            if found != size:
                raise PtxUnsupported(f"operand {text} of {8 * found} bits for a {kind}")
            return slot
        if kind == "pred":
            return self.constant(-1 if immediate(text, "s32") else 0, 4)
        return self.constant(immediate(text, kind), size)

    def into(self, text: str, kind: str) -> int:
        """Return the slot of a destination; -1 for the sink `_`."""
        return -1 if text == "_" else self.value(text, kind)

    def address(self, text: str) -> tuple[int, int, int]:
        """Return slot, width and offset of `[base + offset]`."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text.strip())
        if not match:
            raise PtxUnsupported(f"address {text}")
        base, offset = match[1], immediate(match[2], "s64") if match[2] else 0
        if base in self.symbols:
            size = 8 if self.symbols[base][0] == GLOBAL else 4
            return self.symbol(base, size), size, offset
        if base[0].isdigit():
            return self.constant(immediate(base, "u64"), 8), 8, offset
        return *self.register(base), offset

    def narrow(self, space: int, size: int) -> None:
        """Note an access of `size` bytes."""
        for s in (GLOBAL, SHARED) if space == GENERIC else (space,):
            if s in self.program.granule:
                self.program.granule[s] = min(self.program.granule[s], size)

    def variable(self, text: str) -> None:
        """Place `.shared .align 16 .b8 name[length] = {...}` and the like."""
        pattern = (
            r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*"
            r"(\[(\d*)\])?\s*(?:=\s*([^;]*))?"
        )
        space, align, kind, name, array, length, numbers = re.match(pattern, text).groups()
        element = int(kind[1:]) // 8
        size = element * int(length or (0 if array else 1))
        program = self.program
        if space in ("global", "const"):
            bits = [immediate(n, kind) for n in re.findall(r"-?\w+", numbers or "")]
            mask = (1 << 8 * element) - 1
            data = b"".join((b & mask).to_bytes(element, "little") for b in bits)
            program.globals[name] = data.ljust(size, b"\0")
            self.symbols[name] = GLOBAL, 0
            return
        align = int(align or element)
        start = (getattr(program, space) + align - 1) // align * align
        setattr(program, space, start + size)
        self.symbols[name] = (SHARED, SHARED_BASE + start) if space == "shared" else (LOCAL, start)

    def declare(self, text: str) -> None:
        """Take `.reg .b32 %r<9>, %x` and variables; other directives change nothing here."""
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            size = width(match[1])
            for name in map(str.strip, match[2].split(",")):
                many = re.fullmatch(r"(.+<)\d+>", name)
                self.scopes[-1][many[1] if many else name] = 0 if many else self.new(size), size
        elif re.match(r"\.(shared|local|global|const)\b", text):
            self.variable(text)

    def location(self, text: str) -> None:
        """Take `.loc file line ... inlined_at file line`."""
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            caller = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)
            name = f"{match[1]}:{match[2]}" + (f" < {caller[1]}:{caller[2]}" if caller else "")
            if self.program.sources[self.where] != name:
                self.program.sources.append(name)
                self.where = len(self.program.sources) - 1

    def header(self, text: str) -> int:
        """Take what comes before the body of the entry; return where that begins."""
        entry = r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{"
        head = re.search(entry, text, re.S)
        if not head:
            raise PtxUnsupported("a module without an entry")
        for declared in re.finditer(r"\.(shared|global|const)\s[^;]*;", text[: head.start()]):
            self.variable(declared[0])
        self.program.name = head[1]
        parameter = (
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,\[]*?\s([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)"
        )
        for kind, name, length in re.findall(parameter, head[2].strip(), re.S):
            self.program.widths[name] = int(length or int(re.search(r"\d+", kind)[0]) // 8)
        if found := re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3]):
            self.program.threads = self.known["%ntid.x"] = int(found[1])
        return head.end()
