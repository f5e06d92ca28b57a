"""The materials of a glTF file, with their textures.

Of a material the base colour and the emission are taken; of the old specular-glossiness extension,
the diffuse colour. Pictures are decoded once and shared by the materials that show them.
"""

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

WRAP = {10497: "repeat", 33071: "clamp", 33648: "mirror"}
NEAREST = 9728
NEAREST_SMALLER = (9728, 9984, 9986)  # of minFilter, which decides where there is no magFilter


class Materials:
    """The materials of a file by their numbers, each made once."""

    def __init__(self, data: GltfData, note: Callable[[str], None]):
        self.data = data
        self.note = note
        self._made: dict[tuple, Finish] = {}
        self._pictures: dict[int, np.ndarray] = {}
        self._changed: dict[tuple, np.ndarray] = {}  # with another alpha

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
        r, g, b, opacity = (float(x) for x in base.get(factor, (1, 1, 1, 1)))
        mode = material.get("alphaMode", "OPAQUE")
        cutoff = float(material.get("alphaCutoff", 0.5))
        made = Finish(Material((r, g, b), linear=True, unlit=UNLIT in extensions))
        name = material.get("name", number)
        if slot in base:
            source, made.material.sampler = self._texture(base[slot], name)
            made.placement = _placement(base[slot])
            made.material.texture = self._with_alpha(source, name, mode, opacity, cutoff)
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
            source, made.material.emission_sampler = self._texture(info, name)
            made.emission_placement = _placement(info)
            made.material.emission_texture = self._with_alpha(source, name, "OPAQUE", 1.0, 0.5)

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
                f"texture of material {name!r} is in no format that can be read"
                + (f": {named} is not supported" if named else f": {texture}")
            )
        return source, Sampler(nearest, (wrap[0], wrap[1]))

    def _with_alpha(
        self, source: int, name, mode: str, opacity: float, cutoff: float
    ) -> np.ndarray:
        """A picture [H, W, 4] whose alpha is what an alpha mode makes of it."""
        if source not in self._pictures:
            self._pictures[source] = self._picture(source, name)
        pixels = self._pictures[source]
        if mode == "BLEND":
            return pixels
        key = (source, (opacity, cutoff) if mode == "MASK" else None)
        if key not in self._changed:
            alpha = np.full(pixels.shape[:2], 255, np.uint8)
            if mode == "MASK":
                alpha[pixels[..., 3] / 255 * opacity < cutoff] = 0
            changed = pixels
            if not np.array_equal(alpha, pixels[..., 3]):
                changed = pixels.copy()
                changed[..., 3] = alpha
            self._changed[key] = changed
        return self._changed[key]

    def _picture(self, number: int, material) -> np.ndarray:
        image = self.data.entry("images", number)
        if "bufferView" in image:
            data = self.data.view(image["bufferView"])
        else:
            data = self.data.file(image["uri"])
        uri = image.get("uri", "")
        short_uri = uri if len(uri) < 99 else ""
        label = repr(image.get("name") or short_uri or number)
        return decode(data, self.data.path.name, f"{label} of material {material!r}")


def _placement(info: dict) -> Placement:
    """The placement of a texture: its set of coordinates, moved by KHR_texture_transform."""
    moved = info.get("extensions", {}).get(TRANSFORM, {})
    coordinates = moved.get("texCoord", info.get("texCoord", 0))
    su, sv = (float(x) for x in moved.get("scale", (1, 1)))
    ou, ov = (float(x) for x in moved.get("offset", (0, 0)))
    made = Placement((su, sv), (ou, ov), float(moved.get("rotation", 0)), coordinates)
    if not np.isfinite([su, sv, ou, ov, made.rotation]).all():
        raise ValueError(f"a texture is placed by {replace(made, coordinates=0)}, not by numbers")
    return made
