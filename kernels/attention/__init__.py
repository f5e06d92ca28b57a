"""Attention in windows of voxels."""
