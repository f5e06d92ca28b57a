"""Losses of pictures and of surfaces."""
