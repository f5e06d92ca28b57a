"""Encode decoded scenes as files for other programs: Gaussians as PLY, meshes as GLB and OBJ.

Axes. In a scene z is up, as in the datasets and in Blender. What is up stays up:

    GLB, OBJ       y up, as glTF says: (x, y, z) becomes (x, z, -y), which train.meshes.read undoes
    PLY            y down by default, (x, -z, y): what 3D Gaussian splatting trains in (cameras of
                   COLMAP) and what TRELLIS writes. SuperSplat and other viewers of splats show such
                   files upright; --axes y-up or z-up is for those that take the axes as they are.

Lengths are those of the scene: the object's largest side is about 1.

Colours. A scene has display values with the light of the training views in them. An OBJ takes them
as they are, a GLB in linear light, with a material that no lamp lights again (KHR_materials_unlit).
A GLB without colours is lit: it would be a white patch.
"""

import json
import struct
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models import GaussianScene, MeshScene, Scene
from train.prepare.raycast import to_linear

# the axes of a file, in those of a scene, by rows
AXES = {
    "y-down": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0)),
    "y-up": ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0)),
    "z-up": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
}
# the same turns, about x by 90, -90 and 0 degrees, as quaternions (w, x, y, z)
COS_45 = 0.5**0.5
TURN = {
    "y-down": (COS_45, COS_45, 0.0, 0.0),
    "y-up": (COS_45, -COS_45, 0.0, 0.0),
    "z-up": (1.0, 0.0, 0.0, 0.0),
}
PROPERTIES = [
    *("x", "y", "z", "nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
]
LEAST = 2.0**-24  # of an opacity, and of what it lacks to 1: a viewer wants a finite logit
# of glTF: types of numbers, and what a view of the buffer is for
FLOAT, UINT = 5126, 5125
VERTICES, INDICES = 34962, 34963
UNLIT = "KHR_materials_unlit"


def _turned(points: Tensor, axes: str) -> Tensor:
    """Turn points or directions [N, 3] of a scene into the axes of a file, in float64."""
    return points.double().cpu() @ torch.tensor(AXES[axes], dtype=torch.float64).T


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply quaternions (w, x, y, z) [..., 4]: first b's rotation, then a's."""
    aw, av = a[..., :1], a[..., 1:]
    bw, bv = b[..., :1], b[..., 1:]
    vector = aw * bv + bw * av + torch.linalg.cross(av.expand_as(bv), bv)
    return torch.cat([aw * bw - (av * bv).sum(-1, keepdim=True), vector], -1)


def gaussian_ply(scene: GaussianScene, axes: str = "y-down") -> bytes:
    """Encode Gaussians with the properties that every viewer of splats reads, little endian.

    Opacities are logits, scales logarithms of standard deviations (with the least size that the
    decoder added), rotations (w, x, y, z), normals 0. What a file cannot hold is the screen-space
    filter, 0.1 px^2 with less opacity for the small: most viewers add 0.3 px^2 of their own.
    """
    opacity = scene.opacity.double().cpu().clamp(LEAST, 1 - LEAST)
    turn = torch.tensor(TURN[axes], dtype=torch.float64)
    columns = [
        _turned(scene.center, axes),
        torch.zeros(len(scene.center), 3, dtype=torch.float64),
        scene.color[:, 0].double().cpu(),
        torch.logit(opacity),
        scene.scale.double().cpu().log(),
        F.normalize(_product(turn, scene.rotation.double().cpu()), dim=-1),
    ]
    table = torch.cat(columns, 1).numpy().astype("<f4")
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(table)}",
        *(f"property float {name}" for name in PROPERTIES),
        "end_header",
    ]
    return ("\n".join(lines) + "\n").encode() + table.tobytes()


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Average the normals of the faces around each vertex, by their areas: [P, 3] of length 1.

    A vertex whose faces have no area gets z.
    """
    corners = vertices.double()[faces.long()]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = torch.zeros_like(vertices, dtype=torch.float64)
    for corner in range(3):
        total.index_add_(0, faces[:, corner].long(), normal)
    length = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return torch.where(length > 0, total / length.clamp(min=1e-300), z)


def mesh_glb(scene: MeshScene) -> bytes:
    """Encode a mesh as binary glTF 2.0: positions, normals and colours of vertices, y up."""
    vertices = scene.vertices.cpu()
    faces = scene.faces.cpu()
    attributes = {
        "POSITION": _turned(vertices, "y-up"),
        "NORMAL": _turned(vertex_normals(vertices, faces), "y-up"),
    }
    material = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
    if scene.color is not None:
        color = scene.color.double().cpu().clamp(0, 1)
        attributes["COLOR_0"] = torch.from_numpy(to_linear(color.numpy()))
        material["extensions"] = {UNLIT: {}}
    arrays = {name: value.numpy().astype("<f4") for name, value in attributes.items()}
    accessors = [
        {"bufferView": i, "componentType": FLOAT, "count": len(array), "type": "VEC3"}
        for i, array in enumerate(arrays.values())
    ]
    accessors[0]["min"] = arrays["POSITION"].min(0).tolist()
    accessors[0]["max"] = arrays["POSITION"].max(0).tolist()
    index = faces.numpy().astype("<u4").reshape(-1)
    accessors.append(
        {
            "bufferView": len(arrays),
            "componentType": UINT,
            "count": len(index),
            "type": "SCALAR",
        }
    )
    parts = [
        *((array.tobytes(), VERTICES) for array in arrays.values()),
        (index.tobytes(), INDICES),
    ]
    views = []
    start = 0
    for data, target in parts:
        views.append({"buffer": 0, "byteOffset": start, "byteLength": len(data), "target": target})
        start += len(data)
    named = {name: i for i, name in enumerate(arrays)}
    primitive = {"attributes": named, "indices": len(arrays), "material": 0}
    document = {
        "asset": {"version": "2.0", "generator": "trislat"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [material],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }
    if scene.color is not None:  # an empty list is not allowed
        document["extensionsUsed"] = [UNLIT]
    return _glb(document, b"".join(data for data, _ in parts))


def _glb(document: dict, data: bytes) -> bytes:
    """Join the two chunks of a GLB, each filled up to four bytes."""
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    data += b"\0" * (-len(data) % 4)
    chunks = b"".join(
        struct.pack("<I4s", len(chunk), kind) + chunk
        for chunk, kind in ((text, b"JSON"), (data, b"BIN\0"))
    )
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def mesh_obj(scene: MeshScene) -> bytes:
    """Encode a mesh as OBJ, y up: colours stand behind positions, as MeshLab and Blender read."""
    vertices = scene.vertices.cpu()
    faces = scene.faces.cpu()
    rows = _turned(vertices, "y-up")
    if scene.color is not None:
        rows = torch.cat([rows, scene.color.double().cpu().clamp(0, 1)], 1)
    normals = _turned(vertex_normals(vertices, faces), "y-up")
    lines = ["# trislat: y up, colours of vertices"]
    lines += ["v " + " ".join(f"{x:.7g}" for x in row) for row in rows.tolist()]
    lines += ["vn " + " ".join(f"{x:.5f}" for x in row) for row in normals.tolist()]
    lines += ["f " + " ".join(f"{i}//{i}" for i in row) for row in (faces + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()


def scene_npz(scene: Scene) -> bytes:
    """Encode everything that a scene holds as an npz of arrays by name, in its own axes.

    Absent parts are left out. `kind` is the name of its class.
    """
    arrays = {"kind": np.array(type(scene).__name__)}
    for name, value in vars(scene).items():
        if value is not None:
            arrays[name] = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    stream = BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()
