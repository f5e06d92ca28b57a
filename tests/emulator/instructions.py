"""What the operands of every PTX instruction are: the second half of the decoder.

`decode` gives an instruction the name of its handler in executor.cpp, which is its spelling less
the qualifiers that change nothing here, and the slots and numbers that the handler works on.
"""

import re
from collections.abc import Callable
from functools import partial

from tests.emulator.ptx import (
    ARRIVE,
    BARRIER,
    BRANCH,
    EXIT,
    GENERIC,
    GLOBAL,
    LOCAL,
    LOCAL_WINDOW,
    SHARED,
    SHARED_WINDOW,
    Decoder,
    Instruction,
    Program,
    PtxUnsupported,
    immediate,
    is_kind,
    width,
)

SPACES = {"global": GLOBAL, "shared": SHARED, "local": LOCAL, "const": GLOBAL, "param": None}
# qualifiers that change nothing here: rounding to nearest, hints, scopes, promises of convergence
IGNORED = set(
    "rn approx full uni sync aligned weak cta cluster gpu sys nc ca cg cs wb wt lu cv noftz L1 L2 "
    "evict_last evict_first evict_normal evict_unchanged no_allocate cache_hint unified".split()
)
NOTHING = tuple(
    "membar fence prefetch bar.warp nanosleep createpolicy griddepcontrol setmaxnreg pmevent "
    "discard applypriority".split()
)
ATOMIC = {"volatile", "acquire", "release", "relaxed", "mmio"}
# types of operands where they are not all of the instruction's type, "."
OPERANDS = {
    "shl": ". . u32",
    "shr": ". . u32",
    "bfe": ". . u32 u32",
    "bfi": ". . . u32 u32",
    "popc": "u32 .",
    "clz": "u32 .",
    "bfind": "u32 .",
    "selp": ". . . pred",
    "lop3": "b32 b32 b32 b32 b32",
    "prmt": "b32 b32 b32 b32",
    "shf": "b32 b32 b32 b32",
    "dp4a": "b32 b32 b32 b32",
}
# handled alike whatever the type of as many bits
BITS = "and or xor not mov selp shl popc clz brev bfi bfind prmt cnot".split()


def _list(text: str) -> list[str]:
    return [x.strip() for x in text.strip("{} ").split(",")]


def _space(words: list[str]) -> int | None:
    return next((SPACES[w] for w in words if w in SPACES), GENERIC)


def _plain(d: Decoder, ins: Instruction, op: str, words: list[str], ops: list[str], kind: str):
    """Arithmetic: one type for all operands but for those in OPERANDS and wide results."""
    if op in BITS and kind != "pred":
        words = [w for w in words if w != kind] + [f"b{8 * width(kind)}"]
    if op == "shr" and kind[0] == "b":
        kind = "u" + kind[1:]
        words = [*words[:-1], kind]
    if op == "mul" and kind[0] in "us" and not {"lo", "hi", "wide"} & set(words):
        words = ["lo", *words]
    kinds = [kind if k == "." else k for k in OPERANDS.get(op, ". " * len(ops)).split()]
    if "wide" in words:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        kinds = [wide, kind, kind, wide][: len(ops)]
    ins.name = ".".join([op, *words])
    ins.operands = [d.into(ops[0], kinds[0])]
    ins.operands += [d.value(o, k) for o, k in zip(ops[1:], kinds[1:], strict=True)]
    if ins.operands[0] < 0:
        ins.name = "nop"


def _mov(d, ins, words, ops, kind):
    if not any(o.startswith("{") for o in ops):
        return _plain(d, ins, "mov", words, ops, kind)
    pack = ops[1].startswith("{")
    wide, narrow = ops if pack else reversed(ops)
    names = _list(narrow)
    part = width(kind) // len(names)
    ins.name = f"{'pack' if pack else 'unpack'}.{width(kind)}.{part}"
    ins.operands = [d.value(wide, kind), len(names), *(d.into(n, f"b{8 * part}") for n in names)]


def _cvta(d, ins, words, ops, kind):
    _plain(d, ins, "mov", ["b64"], ops, "b64")
    window = {SHARED: SHARED_WINDOW, LOCAL: LOCAL_WINDOW}.get(_space(words))
    if window:
        ins.name = "sub.u64" if "to" in words else "add.u64"
        ins.operands.append(d.constant(window, 8))


def _cvt(d, ins, words, ops, kind):
    to, source = types = [w for w in words if is_kind(w)]
    rest = [w for w in words if not is_kind(w)]
    if not any(t[0] in "us" for t in types):
        ins.name = ".".join(["cvt", *rest, to, source])
        ins.operands = [d.value(ops[0], to), *(d.value(o, source) for o in ops[1:])]
        return
    # an integer may lie in a wider register
    placed = []
    for text, kind in zip(ops, types, strict=True):
        own = text.startswith("%") and d.named(text, 4) is None
        placed.append(d.register(text) if own else (d.value(text, kind), width(kind)))
    slots, widths = zip(*placed, strict=True)
    into, read = ([int(t[1:]), int(t[0] == "s")] if t[0] in "us" else None for t in types)
    if into and read:
        ins.name = f"cvt.int.{widths[0]}.{widths[1]}"
        ins.operands = [*slots, *read, *into, int("sat" in rest)]
    elif read:
        if rest:
            raise PtxUnsupported("rounding of an integer other than to nearest")
        ins.name, ins.operands = f"cvt.{to}.int{widths[1]}", [*slots, *read]
    else:
        mode = ["rni", "rzi", "rmi", "rpi"].index(next(w for w in rest if w.startswith("r")))
        ins.name, ins.operands = f"cvt.int{widths[0]}.{source}", [*slots, *into, mode]


def _setp(d, ins, words, ops, kind):
    if kind in ("f16x2", "bf16x2"):
        raise PtxUnsupported("setp of packed pairs")
    to = [d.into(name.strip(), "pred") for name in ops[0].split("|")]
    ins.name = f"setp.{words[0]}.{kind}"
    ins.operands = [*to, -1][:2] + [d.value(o, kind) for o in ops[1:3]]
    join = next((w for w in words if w in ("and", "or", "xor")), "")
    if join:
        ins.operands += [d.value(ops[3].lstrip("!"), "pred"), int(ops[3].startswith("!"))]
    else:
        ins.operands += [-1, 0]
    ins.operands.append(["", "and", "or", "xor"].index(join))


def _ld(d, ins, words, ops, kind, op="ld"):
    memory, registers = (ops[1], ops[0]) if op == "ld" else ops
    names, space = _list(registers), _space(words)
    signed = "s" if kind[0] == "s" and "x" not in kind else "u"
    bits = 32 if "x2" in kind else int(re.search(r"\d+", kind)[0])
    if space is None:
        return _parameter(d, ins, names, memory, bits, signed)
    held = [d.register(n) for n in names if re.match(r"[%A-Za-z$]", n)]
    size = held[0][1] if held else max(2, bits // 8)
    slots = []
    for n in names:
        literal = re.match(r"[-\d]", n)
        slots.append(d.constant(immediate(n, kind), size) if literal else d.into(n, f"b{8 * size}"))
    ins.name = f"{op}.{size}.{signed}{bits}"
    atomic = int(bool(ATOMIC & set(words)))
    ins.operands = [space, atomic, *d.address(memory), len(names), *slots]
    d.narrow(space, bits // 8)


def _parameter(d, ins, names, memory, bits, signed):
    """A load of a parameter: it is a register, filled when the warp starts."""
    match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", memory)
    if len(names) > 1 or not match:
        raise PtxUnsupported("a vector of parameters")
    into, size = d.register(names[0])
    position = list(d.program.widths).index(match[1])
    key = position, int(match[2] or 0), bits // 8
    slot = d.once(*key, note=d.program.params, size=8)
    ins.name = f"cvt.int.{size}.{max(2, bits // 8)}"
    ins.operands = [into, slot, bits, int(signed == "s"), 8 * size, 1, 0]


def _atom(d, ins, words, ops, kind, red=False):
    space = _space(words)
    words = [w for w in words if w not in SPACES and w not in ATOMIC | {"acq_rel"}]
    if any(w in ("v2", "v4", "v8") for w in words):
        raise PtxUnsupported("vector atomics")
    bits = f"b{8 * width(kind)}"
    if words[0] in ("exch", "cas", "and", "or", "xor"):
        kind = bits
    to, memory, *values = ["_", *ops] if red else ops
    ins.name = f"atom.{words[0]}.{kind}"
    slots = [d.value(_list(v)[0], bits) for v in values]
    ins.operands = [space, *d.address(memory), d.into(_list(to)[0], bits), *slots, -1][:7]
    d.narrow(space, width(kind))


def _cp(d, ins, words, ops, kind):
    if words[:2] == ["async", "commit_group"]:
        ins.name = "cp.async.commit"
    elif words[:2] in (["async", "wait_group"], ["async", "wait_all"]):
        ins.name, ins.operands = "cp.async.wait", [immediate(ops[0], "s32") if ops else -1]
    elif words[:1] == ["async"] and not {"bulk", "mbarrier"} & set(words):
        to, source = d.address(ops[0]), d.address(ops[1])
        if to[1] != 4:
            raise PtxUnsupported("a 64-bit shared address")
        partial = len(ops) > 3 and "policy" not in ops[3]
        size = d.value(ops[3], "u32") if partial else -1
        ins.name = "cp.async"
        ins.operands = [to[0], to[2], source[0], source[2], immediate(ops[2], "u32"), size]
        d.narrow(GLOBAL, 4)
        d.narrow(SHARED, 4)
    else:
        raise PtxUnsupported("cp." + ".".join(words))


def _bar(d, ins, words, ops, kind):
    if words[:1] in (["red"], ["cluster"]):
        raise PtxUnsupported("bar." + words[0])
    arrive = "arrive" in words
    ins.name, ins.flow = ("barrier.arrive", ARRIVE) if arrive else ("barrier", BARRIER)
    ins.operands = [*(d.value(o, "u32") for o in ops), -1][:2]


def _shfl(d, ins, words, ops, kind):
    to = [name.strip() for name in ops[0].split("|")]
    second = d.into(to[1], "pred") if len(to) > 1 else -1
    mode = ["up", "down", "bfly", "idx"].index(words[0])
    ins.name = "shfl"
    ins.operands = [d.into(to[0], "b32"), second, *(d.value(o, "b32") for o in ops[1:4]), mode]


def _vote(d, ins, words, ops, kind):
    ins.name = "vote." + ".".join(words)
    asked = d.value(ops[1].lstrip("!"), "pred")
    ins.operands = [d.value(ops[0], kind), asked, int(ops[1].startswith("!"))]


def _redux(d, ins, words, ops, kind, op="redux"):
    ins.name = ".".join([op, *words])
    ins.operands = [d.value(o, "b32") for o in ops[:2]]


def _elect(d, ins, words, ops, kind):
    lane, chosen = map(str.strip, ops[0].split("|"))
    ins.name, ins.operands = "elect", [d.into(lane, "b32"), d.value(chosen, "pred")]


def _ldmatrix(d, ins, words, ops, kind, load=True):
    if "m8n8" not in words or kind != "b16":
        raise PtxUnsupported("a matrix of this shape")
    memory, registers = (ops[1], ops[0]) if load else ops
    names = _list(registers)
    ins.name = "ldmatrix" if load else "stmatrix"
    ins.operands = [*d.address(memory), len(names), int("trans" in words), SHARED]
    ins.operands += [d.value(n, "b32") for n in names]
    d.narrow(SHARED, 16)


def _mma(d, ins, words, ops, kind):
    ins.name = "mma." + ".".join(w for w in words if w not in ("row", "col"))
    ins.operands = [d.value(n, "b32") for o in ops for n in _list(o)]


def _wgmma(d, ins, words, ops, kind):
    if words[0] in ("fence", "commit_group", "wait_group"):
        ins.name = "nop" if words[0] == "fence" else f"wgmma.{words[0]}"
        ins.operands = [immediate(o, "s32") for o in ops]
        return
    shape, result, kind, other = words[1:5]
    if result != "f32" or other != kind:
        raise PtxUnsupported("wgmma of these types")
    n = int(re.search(r"n(\d+)k", shape)[1])
    if ops[1].startswith("{"):
        a = [-1, *(d.value(r, "b32") for r in _list(ops[1]))]
    else:
        a = [d.value(ops[1], "b64"), -1, -1, -1, -1]
    signs = [immediate(o, "s32") for o in ops[4:6]]
    transposed = [immediate(o, "s32") for o in ops[6:]] or [0, 0]
    ins.name = f"wgmma.{kind}"
    ins.operands = [n, *a, d.value(ops[2], "b64"), d.value(ops[3], "pred"), *signs, *transposed]
    ins.operands += [d.value(r, "f32") for r in _list(ops[0])]
    d.narrow(SHARED, 16)


HANDLERS: dict[str, Callable] = {
    "mov": _mov,
    "cvta": _cvta,
    "cvt": _cvt,
    "setp": _setp,
    "ld": _ld,
    "ldu": _ld,
    "st": partial(_ld, op="st"),
    "atom": _atom,
    "red": partial(_atom, red=True),
    "cp": _cp,
    "bar": _bar,
    "barrier": _bar,
    "shfl": _shfl,
    "vote": _vote,
    "redux": _redux,
    "match": partial(_redux, op="match"),
    "elect": _elect,
    "ldmatrix": _ldmatrix,
    "stmatrix": partial(_ldmatrix, load=False),
    "mma": _mma,
    "wgmma": _wgmma,
}


def _instruction(d: Decoder, ins: Instruction, spelling: str, ops: list[str]) -> None:
    op, *rest = spelling.replace("::", ".").split(".")
    words = [w for w in rest if w not in IGNORED]
    kind = next((w for w in reversed(rest) if is_kind(w)), None)
    if ".".join([op, *rest]).startswith(NOTHING):
        ins.name = "nop"
    elif op == "bra":
        ins.name, ins.flow, ins.target = "branch", BRANCH, ops[0]
    elif op in ("ret", "exit"):
        ins.name, ins.flow = "exit", EXIT
    elif op == "trap":
        ins.name = "trap"
    elif op in HANDLERS:
        HANDLERS[op](d, ins, words, ops, kind)
    else:
        _plain(d, ins, op, words, ops, kind)


def _statement(d: Decoder, text: str, line: int) -> None:
    if not text or text.startswith("."):
        return d.declare(text)
    match = re.match(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
    if not match:
        raise PtxUnsupported(f"line {line}: {text}")
    pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", match[4])
    spelled = " ".join(text.split())
    ins = Instruction("", [], spelled, line, d.where, negated=bool(match[1]))
    if match[2]:
        ins.pred = d.register(match[2])[0]
    try:
        _instruction(d, ins, match[3], [o.strip() for o in pieces if o.strip()])
    except (PtxUnsupported, KeyError, IndexError, ValueError, TypeError) as error:
        raise PtxUnsupported(f"line {line}: `{spelled}`: {error!r}") from error
    d.program.code.append(ins)


def decode(text: str) -> Program:
    """Return the one kernel of a PTX module, ready to run."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    d = Decoder()
    position = d.header(text)
    line = text.count("\n", 0, position) + 1
    token = re.compile(
        r"\s*(?:([{}])|(\.(?:loc|file|pragma)\b[^\n]*)|([A-Za-z_$][\w$]*):(?!:)|([^;]*);)"
    )
    while len(d.scopes) > 1:
        match = token.match(text, position)
        brace, directive, label, statement = match.groups()
        start = match.start(match.lastindex)
        line += text.count("\n", position, start)
        if brace == "{":
            d.scopes.append({})
        elif brace:
            d.scopes.pop()
        elif directive:
            d.location(directive)
        elif label:
            d.labels[label] = len(d.program.code)
        else:
            _statement(d, statement.strip(), line)
        line += text.count("\n", start, match.end())
        position = match.end()
    program = d.program
    program.code.append(Instruction("exit", [], "end of the kernel", line, d.where, flow=EXIT))
    for ins in program.code:
        if ins.flow == BRANCH:
            ins.target = d.labels[ins.target]
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text, re.M))
    named = lambda m: files.get(m[1], m[1])
    program.sources = [re.sub(r"(\d+)(?=:)", named, source) for source in program.sources]
    # registers start as NaN: none may be read before it is written
    program.image = bytearray(b"\xff" * ((d.size + 63) // 64 * 64))
    for slot, data in d.fill:
        program.image[slot : slot + 32 * len(data)] = data * 32
    return program
