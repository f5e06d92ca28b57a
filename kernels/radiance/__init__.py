"""Radiance field -> pictures."""
