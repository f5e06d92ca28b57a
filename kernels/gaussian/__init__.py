"""Splatting: Gaussians to pictures."""
