"""Fields on voxels -> triangle meshes."""
