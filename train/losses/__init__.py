"""Losses of pictures and of surfaces, and the objective that weights them."""
