"""Latents -> a triangle mesh (published: SLatMeshDecoder).

N voxels become 64 N small cubes, whose fields become a surface. Two subdivisions after the
transformer give four times the resolution; each small cube predicts the signed distance, the
displacement and the colour of its corners and the weights that place the surface inside it (arXiv
2412.01506; the surface is that of FlexiCubes, arXiv 2308.05371). An untrained decoder puts the
surface around all active voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels import SILHOUETTES, Camera, Image, isosurface, render_mesh
from kernels.checks import check_tensors
from models.sparse import SparseTensor
from models.upsample import SubdivideBlock
from models.vae import VAE, Decoder

# world units; published training ends at 3, beyond whatever its cameras can see of the unit cube
NEAR = 1.0
FAR = 100.0
GROUPS = 32  # of the group norms, the last of which has model_channels / 8
SUBDIVIDED = 4  # cubes along the side of a voxel


@dataclass(frozen=True)
class MeshConfig:
    """The predictions of a corner: the published `representation_config`, parsed once."""

    use_color: bool = False  # and with it the normal_map
    # what moves them in training, see render_mesh; "edges" as published, "pixels" is ours
    silhouettes: str = "edges"

    @classmethod
    def parse(cls, published: dict) -> "MeshConfig":
        """Check and convert the published dict.

        Raises ValueError for a key or value that the published configuration does not know.
        """
        known = {f.name for f in fields_of(cls)}
        if unknown := sorted(published.keys() - known):
            raise ValueError(
                f"representation_config has unknown keys {unknown}; known are {sorted(known)}"
            )
        config = cls(**published)
        if not isinstance(config.use_color, bool):
            raise ValueError(f"use_color {config.use_color!r} is not true or false")
        if config.silhouettes not in SILHOUETTES:
            raise ValueError(
                f"silhouettes {config.silhouettes!r} is not one of {', '.join(SILHOUETTES)}"
            )
        return config

    @property
    def fields(self) -> dict[str, int]:
        """Channels of the output layer by published name, in order; corners with x fastest."""
        color = {"color": 8 * 6} if self.use_color else {}
        return {"sdf": 8, "deform": 8 * 3, "weights": 21} | color


@dataclass
class MeshScene:
    """The surface of one object. There may be none: no vertices and no faces."""

    vertices: Tensor  # [P, 3] world units, the object inside [-0.5, 0.5]^3
    faces: Tensor  # [F, 3] int32: rows of `vertices`, counter-clockwise seen from outside
    color: Tensor | None  # [P, 3] in [0, 1]; None where the decoder has none
    normal: Tensor | None  # [P, 3] the published normal_map channels, in [0, 1]
    tsdf_position: Tensor  # [T, 3] the corners of the object's cubes, world units
    tsdf_value: Tensor  # [T] their signed distance, negative inside
    regularization: Tensor  # [] consistency + 0.5 deviation + 0.2 mean size of the weights
    resolution: int  # cubes along a side of the grid
    silhouettes: str = "edges"  # what moves them, see render_mesh

    def render(self, camera: Camera, background: Tensor, ssaa: int = 1) -> Image:
        """Render the scene from V views on background [V, 3].

        ssaa > 1 renders that many times larger and shrinks (published evaluation: 4).
        """
        return self.render_batch([self], camera, [0] * len(camera), background, ssaa)

    @classmethod
    def render_batch(
        cls,
        scenes: Sequence["MeshScene"],
        camera: Camera,
        view_scene: Sequence[int],
        background: Tensor,
        ssaa: int = 1,
        *,
        offset: Tensor | None = None,  # of radiance fields alone
    ) -> Image:
        """Render V views of B scenes in one launch; models.render is the public name.

        Unlit colours (None without), alpha the coverage, depth the camera's z (0 in the
        background), normal (n + 1) / 2 of the faces in world axes (0.5 in the background); as
        `kernels.mesh.render`.
        """
        check_tensors(background=background)
        if background.shape != (len(camera), 3):
            raise ValueError(f"background must be [{len(camera)}, 3], not {list(background.shape)}")
        if len({scene.color is None for scene in scenes}) != 1:
            raise ValueError("the scenes of a batch must all have colours, or none of them")
        if len(kinds := {scene.silhouettes for scene in scenes}) != 1:
            raise ValueError(f"the scenes of a batch have different silhouettes: {sorted(kinds)}")
        attributes = None
        if scenes[0].color is not None:
            attributes = torch.cat([torch.cat([scene.color, scene.normal], 1) for scene in scenes])
        vertices = torch.cat([scene.vertices for scene in scenes])
        faces = torch.cat([scene.faces for scene in scenes])
        starts = (
            [0, *accumulate(len(scene.vertices) for scene in scenes)],
            [0, *accumulate(len(scene.faces) for scene in scenes)],
        )
        image = render_mesh(
            vertices, faces, attributes, *starts, camera, view_scene, NEAR, FAR, ssaa, kinds.pop()
        )
        color = None
        if attributes is not None:
            color = image.color + (1 - image.alpha) * rearrange(background, "v c -> v c 1 1")
        return Image(color, image.alpha, image.depth, image.normal, image.normal_map)

    @classmethod
    def penalties(cls, scenes: Sequence["MeshScene"]) -> dict[str, Tensor]:
        """The mean regularizer of the batch; a scene without surface keeps its share."""
        return {"regularization": torch.stack([scene.regularization for scene in scenes]).mean()}


class MeshDecoder(Decoder):
    """Latents [N, latent_channels] -> a MeshScene per sample (published: SLatMeshDecoder).

    In training mode quads have a centre and four triangles, in evaluation mode two triangles.
    `skip_weight`: how the 1x1x1 convolutions read their weights (models.upsample); published
    checkpoints need "spconv". Raises ValueError for model_channels that the group norms cannot
    divide.
    """

    NAME = "SLatMeshDecoder"
    PUBLISHED_ARGUMENTS = {"skip_weight": "spconv"}  # ours record theirs
    CONFIG = MeshConfig

    def __init__(self, *args, skip_weight: str = "linear", **kwargs):
        super().__init__(*args, **kwargs)
        C = self.model_channels
        if C % (8 * GROUPS):
            raise ValueError(
                f"model_channels {C} is not a multiple of {8 * GROUPS}: {GROUPS} groups "
                "normalise an eighth of them"
            )
        self.args["skip_weight"] = skip_weight
        self.upsample = nn.ModuleList(
            SubdivideBlock(channels, out, GROUPS, skip_weight)
            for channels, out in ((C, C // 4), (C // 4, C // 8))
        )
        self.out_layer = nn.Linear(C // 8, sum(self.config.fields.values()))  # no norm before it
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def fields(self, z: SparseTensor) -> SparseTensor:
        """The raw output layer on the 64 N cubes, channels in the published order."""
        h = self.trunk(z.feats, z.cache)
        cache = z.cache
        h = h.to(self.compute_dtype(z.feats))
        for block in self.upsample:
            h, cache = block(h, cache)
        return SparseTensor(self.out_layer(h.to(z.feats.dtype)), cache=cache)

    def forward(self, z: SparseTensor) -> list[MeshScene]:
        """One scene per sample.

        A sample without voxels, or whose field has one sign, gives a scene without faces.
        """
        fields = self.fields(z)
        resolution = SUBDIVIDED * self.resolution
        surfaces = isosurface(fields.cache, fields.feats, resolution, self.training)
        # on the host
        vertex_counts = surfaces.vertex_starts.diff().tolist()
        face_counts = surfaces.face_starts.diff().tolist()
        tsdf_counts = surfaces.tsdf_starts.diff().tolist()
        vertices = surfaces.vertices.split(vertex_counts)
        faces = surfaces.faces.split(face_counts)
        attributes = surfaces.attributes.split(vertex_counts)
        tsdf_position = surfaces.tsdf_position.split(tsdf_counts)
        tsdf_value = surfaces.tsdf_value.split(tsdf_counts)
        regularization = surfaces.regularizer.unbind()
        scenes = []
        for b, first in enumerate(surfaces.vertex_starts[:-1].tolist()):
            color = normal = None
            if self.config.use_color:
                color, normal = attributes[b].split(3, dim=1)
            scenes.append(
                MeshScene(
                    vertices=vertices[b],
                    faces=faces[b] - first,
                    color=color,
                    normal=normal,
                    tsdf_position=tsdf_position[b],
                    tsdf_value=tsdf_value[b],
                    regularization=regularization[b],
                    resolution=resolution,
                    silhouettes=self.config.silhouettes,
                )
            )
        return scenes


class MeshVAE(VAE):
    """An encoder of its own and a mesh decoder."""

    DECODER = MeshDecoder
