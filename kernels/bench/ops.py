"""Ops that `python -m kernels.bench` measures, by name.

A new op is one line in OPS and a function `OP_cases(size, dtypes, device)` that yields
kernels.bench.case.Case.
"""

from kernels.bench import attention, conv, gaussian, mesh, norm, radiance, sweeps, voxels
from kernels.bench.case import Cases

OPS: dict[str, Cases] = {
    "window_attention": attention.window_attention_cases,
    "segment_attention": attention.segment_attention_cases,
    "serialized_attention": attention.serialized_attention_cases,
    "rotary_attention": attention.rotary_attention_cases,
    "attention_rows": sweeps.attention_rows_cases,
    "attention_window": sweeps.attention_window_cases,
    "attention_occupancy": sweeps.attention_occupancy_cases,
    "layer_norm": norm.layer_norm_cases,
    "add_layer_norm": norm.add_layer_norm_cases,
    "gelu": norm.gelu_cases,
    "ssim": norm.ssim_cases,
    "build_table": voxels.build_table_cases,
    "lookup": voxels.lookup_cases,
    "neighbours": voxels.neighbours_cases,
    "window_partition": voxels.window_partition_cases,
    "partition_window": sweeps.partition_window_cases,
    "partition_extent": sweeps.partition_extent_cases,
    "neighbours_extent": sweeps.neighbours_extent_cases,
    "cache_hit": voxels.cache_hit_cases,
    "splat": gaussian.splat_cases,
    "raymarch": radiance.raymarch_cases,
    "sparse_conv": conv.sparse_conv_cases,
    "subdivide_conv": conv.subdivide_conv_cases,
    "group_norm": conv.group_norm_cases,
    "pool": conv.pool_cases,
    "isosurface": mesh.isosurface_cases,
    "render_mesh": mesh.render_mesh_cases,
}
