"""The public ops: Triton kernels on a GPU, vectorised torch on a CPU, the same functions and
gradients on both.

Shapes are written in one alphabet: B scenes, N voxels (rows of coords [N, 4] int32: batch, x, y,
z), M windows, H heads, D head channels, C channels, K taps, G Gaussians, F faces, V views; height
and width of pictures are H, W where there are no heads.

An op shadows the module it lives in: `kernels.splat` is the function, `from kernels.splat import
splat_reference` still reaches the module.
"""

from kernels.antialias import antialias as antialias
from kernels.attention import segment_attention as segment_attention
from kernels.attention import window_attention as window_attention
from kernels.cache import SpatialCache as SpatialCache
from kernels.camera import Camera as Camera
from kernels.camera import Image as Image
from kernels.conv import octant_order as octant_order
from kernels.conv import sparse_conv as sparse_conv
from kernels.conv import subdivide_conv as subdivide_conv
from kernels.conv import tap_order as tap_order
from kernels.gelu import gelu as gelu
from kernels.group_norm import group_norm as group_norm
from kernels.group_norm import group_norm_silu as group_norm_silu
from kernels.hash import build_table as build_table
from kernels.hash import lookup as lookup
from kernels.hash import neighbours as neighbours
from kernels.interpolate import interpolate as interpolate
from kernels.isosurface import Surfaces as Surfaces
from kernels.isosurface import isosurface as isosurface
from kernels.meshes import MeshLayout as MeshLayout
from kernels.meshes import make_mesh_layout as make_mesh_layout
from kernels.meshes import opposite_vertices as opposite_vertices
from kernels.norm import add_layer_norm as add_layer_norm
from kernels.norm import layer_norm as layer_norm
from kernels.norm import rms_norm as rms_norm
from kernels.norm import stream_norm as stream_norm
from kernels.normals import flat_normals as flat_normals
from kernels.pool import pool as pool
from kernels.pool import pooling as pooling
from kernels.pool import unpool as unpool
from kernels.rasterize import rasterize as rasterize
from kernels.raymarch import raymarch as raymarch
from kernels.render_mesh import face_camera as face_camera
from kernels.render_mesh import render_mesh as render_mesh
from kernels.splat import splat as splat
from kernels.ssim import ssim as ssim
from kernels.window import Windows as Windows
from kernels.window import full_windows as full_windows
from kernels.window import window_partition as window_partition
