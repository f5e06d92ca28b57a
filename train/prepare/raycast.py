"""Render views of a textured mesh by exact ray casts (Embree, through embreex).

A view is an RGBA image and the surface points behind it. Light does not move with the camera: a key
light, a top and a bottom light as wide as the sky, and 0.3 of ambient; both sides of every face
reflect, by Lambert's law, without shadows. Light multiplies display values, and so do an OBJ's
colours; glTF's base colour is first made in linear light, as its specification says. Emission is
added to what is reflected: an OBJ's in display values, glTF's in linear light.
"""

import numpy as np

from train.meshes.pictures import sample
from train.meshes.surface import CHUNK, Material, Mesh, earlier_copies

RADIUS = 2.0
FOV = np.deg2rad(40)
# no normal gets more than 1
AMBIENT = 0.3
KEY = 0.35
TOP = 0.3
BOTTOM = 0.1
KEY_DIRECTION = np.array([4.0, 1.0, 6.0]) / np.sqrt(53.0)
LAYERS = 16  # transparent surfaces that one ray can pass
CLEAR = 1 / 512  # light below this share of a pixel is not followed
STEP = 1e-5  # how far behind a transparent surface a ray goes on
NEAR = 0.1  # world units: a mesh that comes closer to the camera can be seen anywhere
COPIES = 8  # faces with the same corners that are drawn
RAYS = 1 << 18  # rays cast at once: some 100 MB of intermediates


def direction(i: int, count: int, r0: float = 0.0, r1: float = 0.0) -> tuple[float, float]:
    """Direction (yaw, pitch) in radians of quasi-random view i of `count`.

    The offsets r0, r1 in [0, 1) are drawn once per object. The Hammersley sequence of TRELLIS's
    render.py with its remap, which leaves a quarter of the views below the horizon.
    """
    u = (i + r0) / count
    v = r1
    digit = 0.5
    while i:
        v = v + digit * (i & 1)
        i = i >> 1
        digit = digit / 2
    u = 2 * u if u < 0.25 else 2 * u / 3 + 1 / 3
    return float(2 * np.pi * v), float(np.arccos(1 - 2 * u) - np.pi / 2)


def camera_to_world(yaw: float, pitch: float) -> np.ndarray:
    """Blender pose [4, 4] at RADIUS that looks at the origin.

    x points right, y up, the view goes along -z; the world's z points up.
    """
    back = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([-np.sin(yaw), np.cos(yaw), 0.0])  # z x back, also where the view is vertical
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, RADIUS * back], 1)
    return pose


class Caster:
    """An Embree scene of one normalised mesh."""

    def __init__(self, mesh: Mesh):
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self.mesh = mesh
        self.scene = EmbreeScene()
        # a ray meets one of several faces in one place; hundreds there would slow every ray
        kept = np.flatnonzero(earlier_copies(mesh.vertices, mesh.faces) < COPIES)
        self.kept = kept if len(kept) < len(mesh.faces) else None  # the faces of the scene
        faces = mesh.faces if self.kept is None else mesh.faces[kept]
        TriangleMesh(
            self.scene, mesh.vertices.astype(np.float32), np.ascontiguousarray(faces, np.int32)
        )
        self.flat = np.empty((len(mesh.faces), 3), np.float32)
        for first in range(0, len(mesh.faces), CHUNK):
            corners = mesh.vertices[mesh.faces[first : first + CHUNK]]
            normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
            length = np.linalg.norm(normal, axis=1, keepdims=True)
            self.flat[first : first + CHUNK] = normal / np.maximum(length, 1e-30)

    def render(
        self, pose: np.ndarray, size: int, samples: int
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Render a view: RGBA uint8 [size, size, 4], straight alpha, and the surface points in it.

        `samples` x `samples` rays a pixel under a box filter one pixel wide; alpha is coverage,
        colour is un-premultiplied. The points are (position [M, 3], weight [M] = share of a pixel,
        lit colour [M, 3], normal [M, 3] towards the viewer).
        """
        grid = (np.arange(size * samples) + 0.5) / (size * samples) * 2 - 1
        tangent = np.tan(FOV / 2)
        band = max(1, RAYS // (size * samples * samples)) * samples  # whole rows of pixels
        top, bottom, left, right = self._window(pose, size)
        x = grid[left * samples : right * samples]
        image = np.zeros((size, size, 4))
        points = []
        for row in range(0, size * samples, band):
            first = max(row, top * samples)
            last = min(row + band, bottom * samples)
            if first >= last or left >= right:
                continue
            y = grid[first:last]
            rays = np.stack(
                np.broadcast_arrays(x[None] * tangent, -y[:, None] * tangent, -1.0), -1
            ).reshape(-1, 3)
            rays = rays / np.sqrt(_dot(rays, rays))[:, None] @ pose[:3, :3].T
            color, hits = self._cast(pose[:3, 3].astype(np.float32), rays.astype(np.float32))
            pixels = color.reshape(4, len(y) // samples, samples, right - left, samples)
            rows = slice(first // samples, last // samples)
            for i, j in np.ndindex(samples, samples):
                image[rows, left:right] += pixels[:, :, i, :, j].transpose(1, 2, 0)
            points += [(p, w / samples**2, c, n) for p, w, c, n in hits]
        seen = image[top:bottom, left:right]
        seen /= samples**2
        seen[..., :3] /= np.maximum(seen[..., 3:], 1e-12)
        empty = (np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)), np.zeros((0, 3)))
        gathered = tuple(np.concatenate(column) for column in zip(empty, *points, strict=True))
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[top:bottom, left:right] = np.rint(seen.clip(0, 1) * 255)
        pixels[pixels[..., 3] == 0] = 0
        return pixels, gathered

    def _window(self, pose: np.ndarray, size: int) -> tuple[int, int, int, int]:
        """Find the rows and columns of pixels that the mesh can be seen in: rays miss elsewhere.

        Returns (first row, row after the last, first column, column after the last).
        """
        local = (self.mesh.vertices - pose[:3, 3]) @ pose[:3, :3]
        depth = -local[:, 2]
        if not depth.min(initial=1) > NEAR:
            return 0, size, 0, size
        place = local[:, :2] / depth[:, None] / np.tan(FOV / 2) * [1, -1]  # right, down
        low = np.floor((place.min(0, initial=1) + 1) / 2 * size).astype(int) - 1
        high = np.ceil((place.max(0, initial=-1) + 1) / 2 * size).astype(int) + 1
        (left, top), (right, bottom) = low.clip(0, size).tolist(), high.clip(0, size).tolist()
        return top, max(top, bottom), left, max(left, right)

    def _cast(self, origin: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, list]:
        """Cast N rays [N, 3] from one origin [3] front to back through transparent layers.

        Returns premultiplied RGBA [4, N], and each layer's points. (`take`, and channels one by
        one: numpy is several times slower where it picks rows by an array in brackets.)
        """
        result = np.zeros((4, len(ray)))
        through = np.ones(len(ray))
        hits = []
        live = np.arange(len(ray))
        last = np.full(len(ray), -1)
        origin = np.broadcast_to(origin, ray.shape).copy()
        towards = ray
        for _ in range(LAYERS):
            found = self.scene.run(origin, towards, output=True)
            hit = np.flatnonzero(found["primID"] >= 0)
            live = live[hit]
            face = found["primID"][hit]
            if self.kept is not None:
                face = self.kept.take(face)
            last = last[hit]
            if len(live) == 0:
                break
            towards = towards.take(hit, 0)
            point = origin.take(hit, 0) + found["tfar"][hit, None] * towards
            color, alpha, normal = self._shade(face, found["u"][hit], found["v"][hit], towards)
            # the same face again is rounding, not a second layer
            alpha = np.where(face == last, 0, alpha)
            weight = through[live] * alpha
            for channel in range(3):
                result[channel][live] += color[:, channel] * weight
            result[3][live] += weight
            through[live] -= weight
            shown = np.flatnonzero(weight > CLEAR)
            seen = (x.take(shown, 0) for x in (point, weight, color, normal))
            hits.append(tuple(seen))
            onward = np.flatnonzero(through[live] > CLEAR)
            towards = towards.take(onward, 0)
            origin = (point.take(onward, 0) + STEP * towards).astype(np.float32)
            last = face[onward]
            live = live[onward]
        return result, hits

    def _shade(self, face: np.ndarray, u: np.ndarray, v: np.ndarray, ray: np.ndarray):
        """Shade the points where rays [M, 3] meet faces at (u, v).

        Returns lit colour [M, 3], opacity [M] and normal [M, 3] towards the viewer.
        """
        corner = np.stack([1 - u - v, u, v], 1)
        mesh = self.mesh
        flat = self.flat.take(face, 0)
        smooth = np.einsum("mk,mkc->mc", corner, mesh.normals.take(face, 0))
        length = np.sqrt(_dot(smooth, smooth))[:, None]
        normal = np.where(length > 1e-6, smooth / np.maximum(length, 1e-6), flat)
        # files disagree on which way faces turn: the smooth normal follows the flat one, and that
        # the viewer
        towards = np.where(_dot(flat, ray) > 0, -1.0, 1.0)
        normal = normal * (np.where(_dot(normal, flat) < 0, -1.0, 1.0) * towards)[:, None]
        light = AMBIENT + KEY * np.maximum(normal @ KEY_DIRECTION, 0)
        light = light + TOP * (1 + normal[:, 2]) / 2 + BOTTOM * (1 - normal[:, 2]) / 2
        tint = np.einsum("mk,mkc->mc", corner, mesh.tint[face])
        uv = np.einsum("mk,mkc->mc", corner, mesh.uv[face])
        emission_uv = uv
        if mesh.emission_uv is not None:
            emission_uv = np.einsum("mk,mkc->mc", corner, mesh.emission_uv[face])
        color = np.zeros((len(face), 3))
        alpha = np.ones(len(face))
        used = mesh.material[face]
        for m in np.unique(used):
            here = used == m
            material = mesh.materials[m]
            albedo, alpha[here] = _albedo(material, tint[here], uv[here])
            seen = albedo if material.unlit else albedo * light[here, None]
            color[here] = _with_emission(material, seen, emission_uv[here])
        return color.clip(0, 1), alpha, normal


def _albedo(material: Material, tint: np.ndarray, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Display colour [M, 3] and opacity [M] of a material at M points, before any light."""
    albedo = tint.copy()
    albedo *= material.color
    alpha = np.full(len(tint), material.opacity)
    if material.texture is not None:
        texel = sample(material.texture, uv, material.sampler)
        albedo *= to_linear(texel[:, :3]) if material.linear else texel[:, :3]
        alpha *= texel[:, 3]
    if material.linear:
        albedo[:] = to_display(albedo)
    return albedo, alpha


def _with_emission(material: Material, seen: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Add what a material emits to the display colours [M, 3] that it reflects."""
    if not any(material.emission):
        return seen
    emitted = np.broadcast_to(material.emission, seen.shape)
    if material.emission_texture is not None:
        texel = sample(material.emission_texture, uv, material.emission_sampler)[:, :3]
        emitted = emitted * (to_linear(texel) if material.linear else texel)
    if material.linear:
        return to_display(to_linear(seen.clip(0, 1)) + emitted)
    return seen + emitted


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row product of a and b [M, 3]: [M]. numpy's own sums are slow along short axes."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def to_linear(color: np.ndarray) -> np.ndarray:
    """Display values to linear light (sRGB, IEC 61966-2-1), in [0, 1]."""
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def to_display(light: np.ndarray) -> np.ndarray:
    """Linear light, clipped to [0, 1], to display values: `to_linear` backwards."""
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
