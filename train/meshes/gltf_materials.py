"""The materials of a glTF file, with their textures.

Of a material the base colour and the emission are taken; of the old specular-glossiness extension,
the diffuse colour. Pictures are decoded once and shared by the materials that show them.
"""

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from train.meshes.gltf_data import GltfData
from train.meshes.gltf_extensions import (
    GLOSSINESS,
    READ_PICTURES,
    STRENGTH,
    TRANSFORM,
    UNLIT,
    UNREAD_PICTURES,
)
from train.meshes.pictures import Placement, Sampler, decode
from train.meshes.surface import GREY, Finish, Material
from train.meshes.untrusted import expect_number, expect_numbers, shown

WRAP = {10497: "repeat", 33071: "clamp", 33648: "mirror"}
NEAREST = 9728
NEAREST_SMALLER = (9728, 9984, 9986)  # of minFilter, which decides where there is no magFilter


class Materials:
    """The materials of a file by their numbers, each made once."""

    def __init__(self, data: GltfData, note: Callable[[str], None]):
        self.data = data
        self.note = note
        self._made: dict[tuple, Finish] = {}
        self._pictures: dict[tuple, np.ndarray] = {}  # by where their data stand

    def __getitem__(self, key: tuple[int | None, bool]) -> Finish:
        """Make the material of a number; of None, the one of faces with vertex colours or not."""
        if key not in self._made:
            number, colored = key
            if number is not None:
                self._made[key] = self._finish(number)
            elif colored:
                self._made[key] = Finish(Material((1.0, 1.0, 1.0), linear=True))
            else:
                self._made[key] = Finish(Material(GREY))
        return self._made[key]

    def _finish(self, number: int) -> Finish:
        material = self.data.entry("materials", number)
        extensions = material.get("extensions", {})
        base = material.get("pbrMetallicRoughness", {})
        factor = "baseColorFactor"
        slot = "baseColorTexture"
        if GLOSSINESS in extensions:
            base = extensions[GLOSSINESS]
            factor = "diffuseFactor"
            slot = "diffuseTexture"
        r, g, b, opacity = map(float, base.get(factor, (1, 1, 1, 1)))
        mode = material.get("alphaMode", "OPAQUE")
        cutoff = float(material.get("alphaCutoff", 0.5))
        made = Finish(Material((r, g, b), linear=True, unlit=UNLIT in extensions))
        name = material.get("name", number)
        if slot in base:
            source, sampler = self._texture(base[slot], name)
            made.placement = _placement(base[slot])
            made.material.texture = self._picture(source, name)
            if mode == "MASK":
                sampler = replace(sampler, mask=(opacity, cutoff))
            elif mode != "BLEND":
                sampler = replace(sampler, opaque=True)
            made.material.sampler = sampler
        if mode == "BLEND":
            made.material.opacity = min(max(opacity, 0.0), 1.0)
        elif mode == "MASK" and slot not in base:
            made.material.opacity = float(opacity >= cutoff)
        if not made.material.unlit:
            self._emission(made, material, name)
        return made

    def _emission(self, made: Finish, material: dict, name) -> None:
        """Add what a material emits."""
        extension = material.get("extensions", {}).get(STRENGTH, {})
        strength = float(extension.get("emissiveStrength", 1))
        r, g, b = (strength * float(x) for x in material.get("emissiveFactor", (0, 0, 0)))
        made.material.emission = (r, g, b)
        if "emissiveTexture" in material and any(made.material.emission):
            info = material["emissiveTexture"]
            source, sampler = self._texture(info, name)
            made.material.emission_sampler = replace(sampler, opaque=True)
            made.emission_placement = _placement(info)
            made.material.emission_texture = self._picture(source, name)

    def _texture(self, info: dict, name) -> tuple[int, Sampler]:
        """The number of a texture's image, and its sampler."""
        texture = self.data.entry("textures", info["index"])
        sampler = {}
        if "sampler" in texture:
            sampler = self.data.entry("samplers", texture["sampler"])
        nearest = sampler.get("minFilter") in NEAREST_SMALLER
        if "magFilter" in sampler:
            nearest = sampler["magFilter"] == NEAREST
        wrap = [WRAP.get(sampler.get(axis), "repeat") for axis in ("wrapS", "wrapT")]
        others = texture.get("extensions", {})
        source = texture.get("source")
        for extension in READ_PICTURES:
            source = others.get(extension, {}).get("source", source)
        if source is None:
            named = ", ".join(extension for extension in UNREAD_PICTURES if extension in others)
            raise ValueError(
                f"texture of material {shown(name)} is in no format that can be read"
                + (f": {named} is not supported" if named else f": {shown(texture)}")
            )
        return source, Sampler(nearest, (wrap[0], wrap[1]))

    def _picture(self, number: int, material) -> np.ndarray:
        """The picture [H, W, 4] of an image, decoded once for all that show it."""
        image = self.data.entry("images", number)
        uri = image.get("uri", "")
        if "bufferView" in image:
            key = "bufferView", image["bufferView"]
        else:
            found = None if uri.startswith("data:") else self.data.find(uri)
            key = "uri", os.path.realpath(found) if found else uri
        if key not in self._pictures:
            if "bufferView" in image:
                data = bytes(self.data.view(image["bufferView"]))
            else:
                data = self.data.file(image["uri"])
            short_uri = uri if len(uri) < 99 else ""
            label = shown(image.get("name") or short_uri or number)
            owner = self.data.path.name
            label = f"{label} of material {shown(material)}"
            self._pictures[key] = decode(data, owner, label, self.data.budget)
        return self._pictures[key]


def _placement(info: dict) -> Placement:
    """The placement of a texture: its set of coordinates, moved by KHR_texture_transform."""
    moved = info.get("extensions", {}).get(TRANSFORM, {})
    coordinates = moved.get("texCoord", info.get("texCoord", 0))
    su, sv = map(float, expect_numbers(moved.get("scale", [1, 1]), (2,), f"{TRANSFORM}.scale"))
    ou, ov = map(float, expect_numbers(moved.get("offset", [0, 0]), (2,), f"{TRANSFORM}.offset"))
    rotation = float(expect_number(moved.get("rotation", 0), f"{TRANSFORM}.rotation"))
    return Placement((su, sv), (ou, ov), rotation, coordinates)
