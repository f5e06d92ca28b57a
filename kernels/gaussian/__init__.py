"""Gaussians -> pictures."""
