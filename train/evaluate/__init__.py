"""Scores of a trained checkpoint by a named protocol."""
