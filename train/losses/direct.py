"""Direct supervision: decoded scenes against features and the true mesh, with nothing rendered.

The first steps of a run may learn so (`--direct STEPS`). Gaussians and radiance fields are compared
in the eight halves ("sub-cells") of every voxel, by their occupancy and colour in the `rgb`
features (train.prepare.voxelize). A mesh is compared with points of the true surface, by signed
distance and normal; which side is outside is told by the normals that views saw, for files disagree
on which way faces turn. Nothing is drawn at random, so a run repeats whatever it is split into.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels import SH0
from models import GaussianScene, MeshScene, RadianceScene, Scene
from train.data.batch import Batch
from train.data.rgb import HALVES, split_rgb
from train.losses.geometry import TRUNCATION

WEIGHTS = {
    "occupancy": 0.2,
    "sub_color": 1.0,
    "distance": 1.0,
    "surface": 0.5,
    "surface_normal": 0.5,
}
BLUR = 0.2  # voxel sides that a Gaussian is widened by before it fills a sub-cell
POINTS = 16384  # of a true surface
CORNERS = 4096  # of an object's cubes that are compared with it
FACES = 2048  # of its decoded surface
ROWS = 1024  # of a table of distances that is in memory
EVEN = (0.7548776662466927, 0.5698402909980532)  # steps of Roberts' sequence R2 in the square
SEEN = 0.3  # length of a mean normal, from which on its side is the outer one


def direct_terms(scenes: Sequence[Scene], batch: Batch, resolution: int) -> dict[str, Tensor]:
    """Compare the scenes of a batch with its features or meshes: unweighted terms by name.

    `resolution` counts voxels along a side of the cube. Gaussians and radiance fields: "occupancy"
    (cross-entropy) and "sub_color" (mean absolute difference), means over voxels. Meshes:
    "distance" (signed, of corners, in cubes), "surface" (distance of decoded faces, in cubes) and
    "surface_normal" (1 - cosine), means over objects. ValueError for features of other channels
    than rgb's, and for decoded meshes where the batch has no true ones.
    """
    if isinstance(scenes[0], MeshScene):
        return _of_meshes(scenes, batch, resolution)
    of = _gaussians if isinstance(scenes[0], GaussianScene) else _radiance
    return _of_cells(scenes, batch, resolution, of)


# halves of voxels


def _of_cells(
    scenes: Sequence[Scene], batch: Batch, resolution: int, of: Callable
) -> dict[str, Tensor]:
    """Cross-entropy of occupancy, and difference of colours where views saw them."""
    counts = torch.bincount(batch.coords[:, 0], minlength=batch.batch_size).tolist()
    middles = ((batch.coords[:, 1:] + 0.5) / resolution - 0.5).split(counts)
    parts = [of(scene, own, resolution) for scene, own in zip(scenes, middles, strict=True)]
    occupancy, color = (torch.cat(part) for part in zip(*parts, strict=True))  # [N, 8], [N, 8, 3]
    true = split_rgb(batch.features)
    true_color = rearrange(true.sub_color, "n (s c) -> n s c", c=3)
    seen = true.sub_seen > 0
    full = true.occupied
    known = seen | (full == 0)  # a surface that no view shows may be left out
    entropy = F.binary_cross_entropy(occupancy.clamp(1e-4, 1 - 1e-4), full, reduction="none")
    difference = (color - true_color).abs().mean(2)
    count = 8 * max(len(full), 1)
    return {
        "occupancy": (entropy * known).sum() / count,
        "sub_color": (difference * seen).sum() / count,
    }


def _middles(like: Tensor) -> Tensor:
    """The middles of a voxel's sub-cells, from its own middle, in voxel sides: [8, 3]."""
    return 0.25 * HALVES.to(like)


def _gaussians(scene: GaussianScene, middle: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Occupancy [N, 8] and colour [N, 8, 3] that a voxel's own Gaussians give its sub-cells."""
    N = len(middle)
    K = len(scene.center) // max(N, 1)
    split = lambda t: t.reshape(N, K, 1, t.shape[1])
    place = (split(scene.center) - middle[:, None, None]) * resolution
    away = place - _middles(place)  # [N, K, 8, 3]
    variance = (split(scene.scale) * resolution).square() + BLUR**2
    weight = torch.exp(-0.5 * (away.square() / variance).sum(3)) * split(scene.opacity)[..., 0]
    occupancy = 1 - (1 - weight.clamp(max=0.999)).prod(1)
    color = split(scene.color[:, 0] * SH0 + 0.5)[:, :, 0]
    mixed = torch.einsum("nks,nkc->nsc", weight, color)
    return occupancy, mixed / (weight.sum(1)[..., None] + 1e-2)


def _radiance(scene: RadianceScene, _: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Opacity [N, 8] of a ray through each sub-cell along an axis, and colour [N, 8, 3] there."""
    n = scene.trivec.shape[3]
    q = (_middles(scene.trivec)[[0, -1], 0] + 0.5) * n - 0.5  # of the two sides, in taps
    low = q.trunc().clamp(0, n - 2).long()
    factors = torch.lerp(scene.trivec[..., low], scene.trivec[..., low + 1], q - low)
    x, y, z = factors.unbind(2)  # [N, R, 2]
    products = torch.einsum("nrx,nry,nrz->nrxyz", x, y, z).flatten(2)  # [N, R, 8]
    density = F.softplus(torch.einsum("nr,nrs->ns", scene.density, products))
    color = torch.einsum("nrc,nrs->nsc", SH0 * scene.color[:, :, 0], products)
    return 1 - torch.exp(-density * (0.5 / resolution)), torch.sigmoid(color)


# surfaces


def _of_meshes(scenes: Sequence[MeshScene], batch: Batch, resolution: int) -> dict[str, Tensor]:
    if batch.meshes is None:
        raise ValueError("the batch has no meshes to compare surfaces with")
    rows = [
        _of_mesh(scene, *surface_points(batch, i, resolution)) for i, scene in enumerate(scenes)
    ]
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


@torch.no_grad()
def surface_points(batch: Batch, of: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of an object's true surface [P, 3], outward normals [P, 3], whether they are known.

    Each point stands for the same area. A normal is turned to the side of the mean one that views
    saw in its voxel; where they saw none, or two sides in equal shares, it is not known.
    """
    meshes = batch.meshes.part(of, of + 1)
    corner = meshes.vertices[meshes.faces.long()]  # [F, 3, 3]
    cross = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    area = cross.norm(dim=1).double().cumsum(0)
    number = torch.arange(POINTS, device=area.device, dtype=area.dtype) + 0.5
    face = torch.searchsorted(area, number / POINTS * area[-1]).clamp(max=len(area) - 1)
    # places in a triangle: of a sequence that fills the square evenly, the far half folded over
    u, v = (number * step % 1 for step in EVEN)
    far = u + v > 1
    u, v = torch.where(far, 1 - u, u), torch.where(far, 1 - v, v)
    weight = torch.stack([1 - u - v, u, v], 1).to(corner.dtype)
    point = (corner[face] * weight[..., None]).sum(1)
    normal = F.normalize(cross[face], dim=1)

    own = (batch.coords[:, 0] == of).nonzero()[:, 0]
    row = torch.full((resolution**3,), -1, device=own.device)
    row[_cell(batch.coords[own, 1:].long(), resolution)] = own
    inside = ((point + 0.5) * resolution).long().clamp(0, resolution - 1)
    voxel = row[_cell(inside, resolution)]
    outer = split_rgb(batch.features).normal[voxel.clamp(min=0)]
    side = (normal * outer).sum(1)
    return point, normal * side.sign()[:, None], (voxel >= 0) & (side.abs() > SEEN)


def _cell(coords: Tensor, resolution: int) -> Tensor:
    """Number the cells of a grid."""
    x, y, z = coords.unbind(1)
    return (x * resolution + y) * resolution + z


def _of_mesh(scene: MeshScene, point: Tensor, normal: Tensor, known: Tensor) -> dict[str, Tensor]:
    """The terms of one object; 0 where it has nothing to compare."""
    limit = TRUNCATION / scene.resolution
    corner = _spread(len(scene.tsdf_value), CORNERS, point.device)
    place = scene.tsdf_position[corner].detach()
    near = nearest(place, point)
    true = ((place - point[near]) * normal[near]).sum(1).clamp(-limit, limit)
    error = (scene.tsdf_value[corner] - true).abs() * scene.resolution
    terms = {"distance": _mean(error, known[near])}

    face = _spread(len(scene.faces), FACES, point.device)
    a, b, c = scene.vertices[scene.faces[face].long()].unbind(1)
    middle = (a + b + c) / 3
    near = nearest(middle.detach(), point)
    away = ((middle - point[near]) * normal[near]).sum(1).abs().clamp(max=limit)
    terms["surface"] = _mean(away * scene.resolution, known[near])
    ours = F.normalize(torch.linalg.cross(b - a, c - a), dim=1)
    terms["surface_normal"] = _mean(1 - (ours * normal[near]).sum(1), known[near])
    return terms


def nearest(place: Tensor, point: Tensor) -> Tensor:
    """Rows of the nearest points [P, 3] to places [Q, 3]: [Q]."""
    parts = [torch.cdist(some, point).argmin(1) for some in place.split(ROWS)]
    return torch.cat(parts) if parts else place.new_zeros(0, dtype=torch.long)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Numbers of at most `most` of `count` things, in even steps."""
    return torch.arange(0, count, max(-(-count // most), 1), device=device)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return (values * known).sum() / known.sum().clamp(min=1)
