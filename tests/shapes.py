"""Small textured meshes that tests of train.prepare write as OBJ files."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_obj(folder: Path, name: str, faces: str, materials: str = "", image: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if image is not None:
        Image.fromarray(image).save(folder / f"{name}.png")
    if materials:
        (folder / f"{name}.mtl").write_text(materials)
        faces = f"mtllib {name}.mtl\n" + faces
    (folder / f"{name}.obj").write_text(faces)
    return folder / f"{name}.obj"


def quad(z: float = 0.0, material: str = "m", uv: float = 0.0, half: float = 0.5) -> str:
    """A square in OBJ axes that faces +z; its texture coordinates start at `uv`."""
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    positions = [f"v {x} {y} {z}" for x, y in corners]
    textures = [f"vt {uv + x / half / 2 + 0.5} {uv + y / half / 2 + 0.5}" for x, y in corners]
    return "\n".join([*positions, *textures, f"usemtl {material}", "f -4/-4 -3/-3 -2/-2 -1/-1", ""])


def box(size=(1.0, 1.0, 1.0), colors: bool = True) -> tuple[str, str]:
    """A box in OBJ axes whose six sides have six colours: text of the OBJ and of the MTL."""
    v = [f"v {x * size[0] + 3} {y * size[1]} {z * size[2]}" for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    sides = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]  # -x +x -y +y -z +z
    f = [f"usemtl side{i}\nf {s}" for i, s in enumerate(sides)]
    mtl = [f"newmtl side{i}\nKd {0.2 + 0.1 * i} {0.9 - 0.1 * i} 0.5" for i in range(6)]
    return "\n".join(v + f) + "\n", "\n".join(mtl) + "\n"
