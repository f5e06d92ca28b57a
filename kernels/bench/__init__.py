"""Benchmarks: times, errors, lower bounds and other implementations of every op."""
