"""Modules of notebooks/, which is a folder of scripts and no package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def notebook_script(name: str) -> ModuleType:
    """Import notebooks/NAME.py as the scripts there import each other."""
    if str(ROOT / "notebooks") not in sys.path:
        sys.path.insert(0, str(ROOT / "notebooks"))
    return importlib.import_module(name)
