"""Rendering of triangle meshes: rasterisation, attributes, antialiasing."""
