"""Textured meshes from OBJ, glTF, GLB and PLY files."""

from train.meshes.read import content_hash as content_hash
from train.meshes.read import normalize as normalize
from train.meshes.read import read_mesh as read_mesh
