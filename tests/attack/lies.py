"""Lying counts and other types in binary formats: PNG, npz, PLY, safetensors, zipped weights."""

import io
import re
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

from tests.attack.damage import cut, flip

ZEROS = 1 << 20  # bytes that a block of a bomb unpacks to
HUGE = (0, 1 << 16, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)
LENGTHS = (0, 7, 10**6, 10**9, 10**12, 10**15, (1 << 63) - 1)


def bomb(megabytes: int, level: int = 9) -> bytes:
    """A deflate stream of zeros, a thousandth of them; its blocks are one, again and again."""
    packer = zlib.compressobj(level, wbits=-15)
    block = packer.compress(bytes(ZEROS)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + packer.flush()


def zlib_bomb(megabytes: int) -> bytes:
    """The same as a zlib stream, as PNG has it; its checksum is wrong, as it comes last."""
    return b"\x78\xda" + bomb(megabytes) + bytes(4)


# PNG


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    """A chunk of a PNG with its checksum, and another length where one is given."""
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a sound PNG."""
    found = []
    at = 8
    while at < len(data):
        size = struct.unpack_from(">I", data, at)[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png_counts(data: bytes, rng: np.random.Generator) -> bytes:
    """A PNG whose sizes lie, or whose texts or pixels unpack to far more than it has."""
    parts = chunks(data)
    head = parts[0][1]
    way = rng.integers(6)
    if way == 0:
        width, height = (int(HUGE[i]) for i in rng.integers(len(HUGE), size=2))
        parts[0] = b"IHDR", struct.pack(">II", width, height) + head[8:]
    elif way == 1:  # as many pixels as it says, of one colour
        side = int(rng.choice([3000, 9000, 12000, 40000]))
        parts[0] = b"IHDR", struct.pack(">II", side, side) + head[8:]
        parts = [part for part in parts if part[0] != b"IDAT"]
        parts.insert(1, (b"IDAT", zlib_bomb(min(4 * side * side >> 20, 2000))))
    elif way == 2:
        text = b"Comment\0\0" if rng.random() < 0.5 else b"Comment\0\1\0\0\0"
        parts.insert(1, (b"zTXt" if text[8:] == b"\0" else b"iTXt", text + zlib_bomb(700)))
    elif way == 3:
        parts[1:1] = [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 19)))] * 2000
    elif way == 4:
        parts.insert(1, (b"iCCP", b"profile\0\0" + zlib_bomb(700)))
    else:
        made = [chunk(*part) for part in parts]
        at = int(rng.integers(len(parts)))
        length = int(HUGE[rng.integers(len(HUGE))])
        made[at] = chunk(*parts[at], length)
        return data[:8] + b"".join(made)
    return data[:8] + b"".join(chunk(*part) for part in parts)


def png_types(data: bytes, rng: np.random.Generator) -> bytes:
    """The same picture in another mode or format, or no picture."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image = image.convert("RGBA")
    mode = str(rng.choice(["RGB", "L", "LA", "P", "1", "I;16", "CMYK", "F", "EPS"]))
    if mode == "EPS":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\nshowpage\n"
    if mode in ("LA", "P", "1", "I;16"):
        image = image.convert("L") if mode == "I;16" else image
    image = image.convert(mode)
    name = {"CMYK": "JPEG", "F": "TIFF"}.get(mode) or str(rng.choice(["PNG", "GIF", "BMP"]))
    if mode in ("LA", "I;16"):
        name = "PNG"
    target = io.BytesIO()
    image.save(target, name)
    return target.getvalue()


# npz


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    """An array with a header as it is given."""
    text = header.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text) % (1 << 16))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + body


def stored(arrays: dict[str, bytes], packed: bool = True) -> bytes:
    """A zip of these members."""
    target = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", kind) as archive:
        for name, content in arrays.items():
            archive.writestr(name, content)
    return target.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    """The members of a sound zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_bomb(name: str, head: bytes, megabytes: int) -> bytes:
    """A zip of one member: `head`, then zeros that its true sizes count."""
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + bomb(megabytes)
    size = len(head) + megabytes * ZEROS
    sizes = struct.pack("<III", 0, len(packed), size)
    encoded = name.encode()
    local = struct.pack("<IHHHHH", 0x04034B50, 20, 0, 8, 0, 33) + sizes
    local += struct.pack("<HH", len(encoded), 0) + encoded + packed
    central = struct.pack("<IHHHHHH", 0x02014B50, 20, 20, 0, 8, 0, 33) + sizes
    central += struct.pack("<HHHHHII", len(encoded), 0, 0, 0, 0, 0, 0) + encoded
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def npz_counts(data: bytes, rng: np.random.Generator) -> bytes:
    """An archive whose headers announce more than there is, or that unpacks to far more."""
    arrays = members(data)
    name = str(rng.choice(sorted(arrays)))
    way = rng.integers(5)
    dtype = "|u1" if name.startswith("indices") else "<f2"
    rows = int(LENGTHS[rng.integers(len(LENGTHS))])
    shape = (rows, 3) if dtype == "|u1" else (rows, int(LENGTHS[rng.integers(len(LENGTHS))]))
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
    if way == 0:
        return stored(arrays | {name: npy(head, bytes(99))})
    if way == 1:  # as large as it says
        columns = 3 if dtype == "|u1" else 1 << 16
        width = columns * (1 if dtype == "|u1" else 2)
        rows = (3000 << 20) // width
        head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({rows}, {columns}), }}\n"
        return zip_bomb(name, npy(head), 3000)
    if way == 2:
        nested = "(" * int(rng.choice([50, 5000])) + ")"
        return stored(arrays | {name: npy(head.replace(str(shape), nested))})
    if way == 3:
        return stored(arrays | {name: npy(head, version=int(rng.choice([2, 3])))})
    return _sizes(data, rng)


def _sizes(data: bytes, rng: np.random.Generator) -> bytes:
    """Other sizes of a member in the directory of a zip."""
    at = data.rindex(b"PK\x01\x02")
    field = at + int(rng.choice([20, 24, 42]))
    return data[:field] + struct.pack("<I", int(HUGE[rng.integers(len(HUGE))])) + data[field + 4 :]


def npz_types(data: bytes, rng: np.random.Generator) -> bytes:
    """Arrays of other types: pickled objects, text, structures, raw or encrypted members."""
    arrays = members(data)
    name = str(rng.choice(sorted(arrays)))
    way = rng.integers(6)
    if way == 0:
        at = data.rindex(b"PK\x01\x02") + 8  # flags: encrypted
        return data[:at] + b"\1" + data[at + 1 :]
    if way == 1:
        return stored({key.removesuffix(".npy"): b"raw" for key in arrays})
    if way == 2:
        return stored({key: b"raw" for key in arrays})
    if way == 3:
        target = io.BytesIO()
        kind = rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        with zipfile.ZipFile(target, "w", int(kind)) as archive:
            for key, content in arrays.items():
                archive.writestr(key, content)
        return target.getvalue()
    made = {key: np.lib.format.read_array(io.BytesIO(value)) for key, value in arrays.items()}
    old = made[name]
    others = [
        old.astype(object),
        old.astype(complex),
        old.astype("U5"),
        old.astype(bool),
        old.astype(">f8"),
        old.astype("i8") - 1000,
        old.astype("u8") + (1 << 63),
        old.astype("f8") * np.nan,
        old.astype("f8") * 1e300,
        np.array(5),
        old[None],
        old.ravel(),
        old[:0],
        old.astype("datetime64[s]") if old.dtype.kind == "u" else old.astype("S3"),
        np.zeros(3, [("a", "<i4")]),
    ]
    made[name] = others[rng.integers(len(others))]
    target = io.BytesIO()
    np.savez(target, **{key.removesuffix(".npy"): value for key, value in made.items()})
    return target.getvalue()


# PLY


def ply_counts(data: bytes, rng: np.random.Generator) -> bytes:
    """A PLY whose header announces other numbers of rows, or whose lists are longer."""
    head, end, body = data.partition(b"end_header\n")
    if rng.random() < 0.3 and len(body) > 8:
        at = int(rng.integers(len(body) - 4))
        return (
            head + end + body[:at] + rng.choice([b"\xff\xff\xff\x7f", b"\xff" * 4]) + body[at + 4 :]
        )
    found = list(re.finditer(rb"(element \w+ )(\d+)", head))
    match = found[rng.integers(len(found))]
    count = str(LENGTHS[rng.integers(len(LENGTHS))] * int(rng.choice([1, 1, -1]))).encode()
    return head[: match.end(1)] + count + head[match.end() :] + end + body


def ply_types(data: bytes, rng: np.random.Generator) -> bytes:
    """A PLY with another type, name or format in a line of its header."""
    head, end, body = data.partition(b"end_header\n")
    words = re.split(rb"([ \n])", head)
    others = b"char uchar int uint float double list vertex face x red property element ascii ply 0"
    places = range(0, len(words), 2)
    words[places[rng.integers(len(places))]] = rng.choice(others.split())
    return b"".join(words) + end + body


# safetensors and zipped weights


def tensor_counts(data: bytes, rng: np.random.Generator) -> bytes:
    """A file of tensors whose header is longer, or whose places are others."""
    if rng.random() < 0.3:
        return struct.pack("<Q", LENGTHS[rng.integers(len(LENGTHS))]) + data[8:]
    length = struct.unpack_from("<Q", data)[0]
    head = data[8 : 8 + length]
    found = list(re.finditer(rb"(?<=[\[,])\d+", head))
    match = found[rng.integers(len(found))]
    count = str(LENGTHS[rng.integers(len(LENGTHS))]).encode()
    head = head[: match.start()] + count + head[match.end() :]
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def tensor_types(data: bytes, rng: np.random.Generator) -> bytes:
    """A file of tensors of another type, whose sizes fit where the type is as wide."""
    length = struct.unpack_from("<Q", data)[0]
    head = data[8 : 8 + length]
    kinds = b"F32 I32 U32 F64 C64 F16 BF16 U8 BOOL F8_E4M3 F4 F8_E8M0 I64 X null".split()
    old, new = rng.choice([b"F32", b"I32"]), kinds[rng.integers(len(kinds))]
    changed = head.replace(old, new, 1 if rng.random() < 0.5 else -1)
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def weights_counts(data: bytes, rng: np.random.Generator) -> bytes:
    """Zipped weights whose pickle announces other sizes, that are compressed, or that unpack."""
    content = members(data)
    pickled = next(name for name in content if name.endswith("data.pkl"))
    way = rng.integers(4)
    if way == 0:
        return stored(content)
    if way == 1:
        return _sizes(data, rng)
    if way == 2:
        return zip_bomb(pickled, content[pickled][:40], 3000)
    text = content[pickled]
    found = [match.start() for match in re.finditer(rb"[KMJ]", text)]
    at = found[rng.integers(len(found))]
    wide = {b"K": 1, b"M": 2, b"J": 4}[text[at : at + 1]]
    lie = b"J" + struct.pack("<i", (1 << 31) - 1)
    content[pickled] = text[:at] + lie + text[at + 1 + wide :]
    return stored(content, packed=False)


def weights_types(data: bytes, rng: np.random.Generator) -> bytes:
    """Zipped weights whose pickle is damaged; the rest of the zip stays sound."""
    content = members(data)
    pickled = next(name for name in content if name.endswith("data.pkl"))
    change = flip if rng.random() < 0.7 else cut
    return stored(content | {pickled: change(content[pickled], rng)}, packed=False)
