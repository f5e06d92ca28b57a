"""The laws of the repository, read from the syntax tree. Each test names every place at fault."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.source_files import FILES, PACKAGES, ROOT, SOURCES, imports, path, tree

LONGEST = 400  # lines of a file
EMPTY_OPENINGS = {"What", "Which", "Whether", "Of"}


def check(found: Iterator[str]) -> None:
    """Fail with every place that breaks a law."""
    places = list(found)
    assert not places, "\n" + "\n".join(places)


def test_imports_point_one_way():
    def broken():
        for file in SOURCES:
            own = file.relative_to(ROOT).parts[0]
            allowed = PACKAGES[: PACKAGES.index(own) + 1]
            for line, name in imports(file):
                top = name.split(".")[0]
                if top in [*PACKAGES, "tests"] and top not in allowed:
                    yield f"{path(file)}:{line}: {own} imports {name}"

    check(broken())


def test_no_relative_or_star_imports():
    def broken():
        for file in FILES:
            for line, name in imports(file):
                if name.startswith(".") or name.endswith(".*"):
                    yield f"{path(file)}:{line}: imports {name}"

    check(broken())


def test_no_test_module_is_imported():
    """Tests share what stands in tests/helpers, and fixtures of conftest.py."""

    def broken():
        for file in FILES:
            for line, name in imports(file):
                parts = name.split(".")
                module = any(part.startswith("test_") or part == "conftest" for part in parts[1:])
                if parts[0] == "tests" and module:
                    yield f"{path(file)}:{line}: imports {name}"

    check(broken())


def test_no_literal_device():
    def broken():
        for file in SOURCES:
            for node in ast.walk(tree(file)):
                if not isinstance(node, ast.Call):
                    continue
                if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                    yield f"{path(file)}:{node.lineno}: .cuda()"
                for keyword in node.keywords:
                    literal = isinstance(keyword.value, ast.Constant)
                    if keyword.arg == "device" and literal and keyword.value.value is not None:
                        yield f"{path(file)}:{node.lineno}: device={keyword.value.value!r}"

    check(broken())


def test_no_exception_is_caught_whatever_it_is():
    def broken():
        for file in SOURCES:
            for node in ast.walk(tree(file)):
                if not isinstance(node, ast.ExceptHandler):
                    continue
                named = ast.walk(node.type) if node.type else []
                caught = {n.id for n in named if isinstance(n, ast.Name)}
                if node.type is None or caught & {"Exception", "BaseException"}:
                    yield f"{path(file)}:{node.lineno}: catches everything"

    check(broken())


def test_importing_has_no_effects():
    """A bare call at module level is one, the registration of an op apart."""

    def broken():
        for file in SOURCES:
            for node in tree(file).body:
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    called = ast.unparse(node.value.func)
                    if not called.endswith((".register_autograd", ".register_fake")):
                        yield f"{path(file)}:{node.lineno}: {called} runs at import"

    check(broken())


def test_no_file_is_long():
    def broken():
        for file in FILES:
            lines = len(file.read_text().splitlines())
            if lines > LONGEST:
                yield f"{path(file)}: {lines} lines, at most {LONGEST}"

    check(broken())


def test_our_packages_are_imported_and_not_namesakes():
    for name in PACKAGES:
        assert Path(importlib.import_module(name).__file__).parent == ROOT / name


def test_public_functions_have_docstrings():
    def broken():
        for file in SOURCES:
            for node in tree(file).body:
                definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
                if not definition or node.name.startswith("_"):
                    continue
                is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
                short = node.end_lineno - node.lineno <= 12
                trivial = isinstance(node, ast.FunctionDef) and short
                if not (is_kernel or trivial or ast.get_docstring(node)):
                    yield f"{path(file)}:{node.lineno}: {node.name} has no docstring"

    check(broken())


def _documented(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, name, docstring) of a module and its public classes, functions and methods."""
    yield 1, "module", ast.get_docstring(tree(file)) or ""
    for node in ast.walk(tree(file)):
        definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if definition and not node.name.startswith("_"):
            yield node.lineno, node.name, ast.get_docstring(node) or ""


def test_docstrings_begin_with_one_line():
    """PEP 257: a summary in the first line, then a blank line."""

    def broken():
        for file in SOURCES:
            for line, name, text in _documented(file):
                if "\n" in text.split("\n\n")[0]:
                    yield f"{path(file)}:{line}: {name}"

    check(broken())


def test_docstrings_open_with_what_the_thing_does_or_is():
    def broken():
        for file in SOURCES:
            for line, name, text in _documented(file):
                opening = re.match(r"\w*", text)[0]
                if opening in EMPTY_OPENINGS:
                    yield f"{path(file)}:{line}: {name} opens with {opening!r}"

    check(broken())


def test_nothing_in_kernels_names_train():
    """Kernels serve any trainer: no import, and no string that one could be made of."""

    def broken():
        for file in (ROOT / "kernels").rglob("*.py"):
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if re.search(r"\btrain\b", line):
                    yield f"{path(file)}:{number}: {line.strip()}"

    check(broken())


def test_readme_has_the_two_commands_and_stays_short():
    readme = (ROOT / "README.md").read_text()
    lines = readme.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 110
    tests = "pip install -e '.[test]' && python -m pytest -n auto --dist worksteal"
    for command in ("pip install -e . && python -m train.gaussian", tests):
        assert f"\n{command}\n" in readme
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).is_file(), picture
