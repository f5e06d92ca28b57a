"""Voxel coordinates -> tables, neighbours, windows, other scales."""
