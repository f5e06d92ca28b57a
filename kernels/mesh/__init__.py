"""Triangle meshes -> pictures."""
