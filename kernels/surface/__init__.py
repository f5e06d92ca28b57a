"""Extraction of triangle meshes from fields on voxels (FlexiCubes)."""
