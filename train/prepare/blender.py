"""Mesh files of formats that need an application, converted to GLB by running Blender.

Blender is a program of the user's, run as a process of its own; nothing here imports it.
"""

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from train.meshes.read import CONVERTIBLE
from train.prepare.sources import Result, Source, with_path

SECONDS = 600  # for one file
# run inside Blender, with the file and the GLB to write as arguments; scripts in a file stay off
SCRIPT = """
import sys
import bpy

IMPORTERS = {
    "fbx": (("import_scene", "fbx"), ("wm", "fbx_import")),
    "dae": (("wm", "collada_import"),),
    "3ds": (("import_scene", "max3ds"),),
}
source, target = sys.argv[sys.argv.index("--") + 1 :]
suffix = source.rsplit(".", 1)[-1].lower()
if suffix == "blend":
    bpy.ops.wm.open_mainfile(filepath=source, load_ui=False, use_scripts=False)
else:
    bpy.ops.wm.read_factory_settings(use_empty=True)
    choices = IMPORTERS.get(suffix, (("wm", "usd_import"),))
    found = [(group, name) for group, name in choices if name in dir(getattr(bpy.ops, group))]
    if not found:
        sys.exit("this Blender has no importer of ." + suffix)
    group, name = found[0]
    getattr(getattr(bpy.ops, group), name)(filepath=source)
bpy.ops.export_scene.gltf(
    filepath=target, export_format="GLB", export_apply=True, use_visible=True
)
"""


def convert_all(
    sources: list[Source], program: str, out: Path, workers: int
) -> tuple[list[Source], list[Result]]:
    """Convert the sources that need it, several at once; the others pass.

    The results are kept as OUT/converted/SHA256/NAME.glb, by the content of the file alone, so
    that they are made once. Returns also a Result for each source that could not be converted.
    Raises ValueError where there is no such program.
    """
    if shutil.which(program) is None:
        raise ValueError(f"--blender {program} is no program that can be run")
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        made = list(pool.map(lambda source: _converted(source, program, out), sources))
    converted = [source for source in made if isinstance(source, Source)]
    return converted, [result for result in made if isinstance(result, Result)]


def _converted(source: Source, program: str, out: Path) -> Source | Result:
    if source.path.suffix.lower() not in CONVERTIBLE:
        return source
    try:
        return replace(source, converted=_convert(source.path, program, out))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Result(source, failure=with_path(source, reason))


def _convert(path: Path, program: str, out: Path) -> Path:
    """Convert one file; returns the GLB. ValueError with Blender's last words where none came."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    target = out.absolute() / "converted" / digest / f"{path.name}.glb"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{path.stem}.partial.glb")
    partial.unlink(missing_ok=True)
    command = [program, "--background", "--factory-startup", "--disable-autoexec"]
    command += ["--python-exit-code", "1", "--python-expr", SCRIPT, "--"]
    command += [str(path.absolute()), str(partial)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{program} did not convert it in {SECONDS} seconds") from error
    if done.returncode or not partial.is_file() or not partial.stat().st_size:
        words = done.stdout.decode(errors="replace").strip().splitlines()
        said = f": {words[-1]}" if words else ""
        raise ValueError(f"{program} did not convert it (exit status {done.returncode}){said}")
    partial.rename(target)
    return target
