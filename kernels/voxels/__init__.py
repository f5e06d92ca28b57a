"""Coordinates of voxels: tables, neighbours, windows and other scales."""
