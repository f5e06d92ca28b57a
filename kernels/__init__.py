"""The public ops: Triton kernels on a GPU, vectorised torch on a CPU, the same functions and gradients on both.

Shapes are written in one alphabet: B scenes, N voxels (rows of coords [N, 4] int32: batch, x, y, z), M windows, H heads,
D head channels, C channels, K taps, G Gaussians, V views; height and width of pictures are H, W where there are no heads.

An op shadows the module it lives in: `kernels.splat` is the function, `from kernels.splat import splat_reference` still
reaches the module.
"""

from kernels.attention import segment_attention as segment_attention
from kernels.attention import window_attention as window_attention
from kernels.cache import SpatialCache as SpatialCache
from kernels.camera import Camera as Camera
from kernels.camera import Image as Image
from kernels.hash import build_table as build_table
from kernels.hash import lookup as lookup
from kernels.hash import neighbours as neighbours
from kernels.norm import add_layer_norm as add_layer_norm
from kernels.norm import gelu as gelu
from kernels.norm import layer_norm as layer_norm
from kernels.norm import rms_norm as rms_norm
from kernels.pool import pool as pool
from kernels.pool import pooling as pooling
from kernels.pool import unpool as unpool
from kernels.splat import splat as splat
from kernels.ssim import ssim as ssim
from kernels.window import Windows as Windows
from kernels.window import full_windows as full_windows
from kernels.window import window_partition as window_partition
