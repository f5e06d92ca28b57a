"""The kinds of the fields of a glTF document that are read: checked at once, before any is used."""

from train.meshes.gltf_extensions import APPLIED, DRACO
from train.meshes.untrusted import expect, expect_number, expect_numbers

TABLES = (
    "accessors",
    "buffers",
    "bufferViews",
    "images",
    "materials",
    "meshes",
    "nodes",
    "samplers",
    "scenes",
    "skins",
    "textures",
)
KINDS = {  # of the fields of their entries that are read, wherever they stand in one
    str: ("uri", "type", "alphaMode"),
    int: (
        "byteLength",
        "byteOffset",
        "byteStride",
        "buffer",
        "bufferView",
        "componentType",
        "count",
        "index",
        "material",
        "mesh",
        "mode",
        "sampler",
        "skin",
        "source",
        "texCoord",
        "inverseBindMatrices",
        "magFilter",
        "minFilter",
        "wrapS",
        "wrapT",
    ),
    dict: (
        "attributes",
        "extensions",
        "sparse",
        "pbrMetallicRoughness",
        "baseColorTexture",
        "diffuseTexture",
        "emissiveTexture",
    ),
}
KIND_OF = {field: kind for kind, fields in KINDS.items() for field in fields}
LISTS = {  # of fields that are lists: the kind of their entries
    "children": int,
    "nodes": int,
    "joints": int,
    "primitives": dict,
    "targets": dict,
}
NUMBERS = {  # of fields that are lists of numbers: how many there are
    "baseColorFactor": (4,),
    "diffuseFactor": (4,),
    "emissiveFactor": (3,),
    "weights": (),
}
OF_NODES = {"matrix": (16,), "rotation": (4,), "scale": (3,), "translation": (3,)}
SINGLE = ("alphaCutoff", "emissiveStrength")


def check_document(document) -> None:
    """Raise ValueError that says where a field is of another kind than the tables above say."""
    if not isinstance(document, dict):
        raise ValueError("it is not glTF 2.0")
    if "asset" not in document:
        raise ValueError("it has no 'asset'")
    version = expect(document["asset"], dict, "asset").get("version")
    if not str(version).startswith("2"):
        raise ValueError("it is not glTF 2.0")
    for field in ("extensionsRequired", "extensionsUsed"):
        for i, name in enumerate(expect(document.get(field) or [], list, field)):
            expect(name, str, f"{field}[{i}]")
    expect(document.get("scene", 0), int, "scene")
    for table in TABLES:
        for i, entry in enumerate(expect(document.get(table) or [], list, table)):
            where = f"{table}[{i}]"
            _check(expect(entry, dict, where), where)
            for name in OF_NODES if table == "nodes" else ():
                if name in entry:
                    expect_numbers(entry[name], OF_NODES[name], f"{where}.{name}")


def _check(value, where: str) -> None:
    if isinstance(value, list):
        for i, inner in enumerate(value):
            _check(inner, f"{where}[{i}]")
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        here = f"{where}.{name}"
        if name in KIND_OF:
            expect(inner, KIND_OF[name], here)
        elif name in LISTS:
            for i, entry in enumerate(expect(inner, list, here)):
                expect(entry, LISTS[name], f"{here}[{i}]")
        elif name in NUMBERS:
            expect_numbers(inner, NUMBERS[name], here)
        elif name in SINGLE:
            expect_number(inner, here)
        if name == "attributes":
            for attribute, number in inner.items():
                expect(number, int, f"{here}.{attribute}")
        if name == "extensions":  # others may mean other things by the same names
            known = (*APPLIED, DRACO)
            inner = {extension: inner[extension] for extension in known if extension in inner}
            for extension, content in inner.items():
                expect(content, dict, f"{here}.{extension}")
        if name != "extras":
            _check(inner, here)
