"""The Python files of the repository, their syntax trees and what they import."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ["kernels", "models", "train"]  # an arrow: each may import itself and those before it
FILES = sorted(f for p in [*PACKAGES, "tests"] for f in (ROOT / p).rglob("*.py"))
SOURCES = [f for f in FILES if f.relative_to(ROOT).parts[0] in PACKAGES]


def path(file: Path) -> str:
    """The file's path from the root of the repository."""
    return file.relative_to(ROOT).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions too.

    `from a import b` gives a and a.b: b may be a module.
    """
    found = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.append((node.lineno, module))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found
