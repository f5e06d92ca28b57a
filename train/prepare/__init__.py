"""Textured meshes -> a dataset."""
