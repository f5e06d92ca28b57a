"""The Python files of the repository, and what they import."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ["kernels", "models", "train"]  # an arrow: each may import itself and those before it
FILES = sorted(f for p in [*PACKAGES, "tests"] for f in (ROOT / p).rglob("*.py"))
SOURCES = [f for f in FILES if f.relative_to(ROOT).parts[0] in PACKAGES]


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(module: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert all(alias.name != "*" for alias in node.names), (
                f"line {node.lineno}: star import"
            )
            found.append(node.module)
    return found
