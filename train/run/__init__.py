"""The parts of a run: folder, checkpoints, latents, reports, threads, device and resuming."""
