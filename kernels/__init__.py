"""Public ops: Triton kernels on a GPU, vectorised torch on a CPU, the same gradients on both.

Letters of shapes, unless a module says otherwise: B scenes, N voxels (rows of coords [N, 4] int32:
batch, x, y, z), M windows, H heads, D head channels, C channels, K taps, G Gaussians, F faces, V
views; height and width of pictures are H, W where there are no heads.

Each op has a module in the package of its subject: `kernels.splat` is the function, and
`kernels.gaussian.splat` the module that it comes from.
"""

from kernels.attention.op import segment_attention as segment_attention
from kernels.attention.op import window_attention as window_attention
from kernels.backend import make_index as make_index
from kernels.backend import to_device as to_device
from kernels.camera import Camera as Camera
from kernels.camera import Image as Image
from kernels.conv.op import sparse_conv as sparse_conv
from kernels.conv.op import subdivide_conv as subdivide_conv
from kernels.conv.order import octant_order as octant_order
from kernels.conv.order import tap_order as tap_order
from kernels.conv.tables import ConvTables as ConvTables
from kernels.conv.tables import conv_tables as conv_tables
from kernels.conv.tables import octant_tables as octant_tables
from kernels.gaussian.splat import splat as splat
from kernels.mesh.antialias import antialias as antialias
from kernels.mesh.antialias import opposite_vertices as opposite_vertices
from kernels.mesh.attributes import flat_normals as flat_normals
from kernels.mesh.attributes import interpolate as interpolate
from kernels.mesh.packing import MeshLayout as MeshLayout
from kernels.mesh.packing import make_mesh_layout as make_mesh_layout
from kernels.mesh.rasterize import rasterize as rasterize
from kernels.mesh.render import SILHOUETTES as SILHOUETTES
from kernels.mesh.render import face_camera as face_camera
from kernels.mesh.render import render_mesh as render_mesh
from kernels.norm.gelu import gelu as gelu
from kernels.norm.group import group_norm as group_norm
from kernels.norm.layer import add_layer_norm as add_layer_norm
from kernels.norm.layer import layer_norm as layer_norm
from kernels.radiance.raymarch import raymarch as raymarch
from kernels.similarity import ssim as ssim
from kernels.surface.isosurface import Surfaces as Surfaces
from kernels.surface.isosurface import isosurface as isosurface
from kernels.views import SH0 as SH0
from kernels.voxels.cache import SpatialCache as SpatialCache
from kernels.voxels.curves import CURVES as CURVES
from kernels.voxels.curves import serialized_windows as serialized_windows
from kernels.voxels.hash import build_table as build_table
from kernels.voxels.hash import lookup as lookup
from kernels.voxels.hash import neighbours as neighbours
from kernels.voxels.pool import pool as pool
from kernels.voxels.pool import pooling as pooling
from kernels.voxels.pool import unpool as unpool
from kernels.voxels.window import Windows as Windows
from kernels.voxels.window import full_windows as full_windows
from kernels.voxels.window import window_partition as window_partition
