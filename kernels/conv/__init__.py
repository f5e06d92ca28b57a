"""Sparse convolutions."""
