"""A run's folder, checkpoints, log, threads and ends."""
