"""Builds of every kernel for absent GPUs."""
