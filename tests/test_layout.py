"""The laws of the repository, read from the syntax tree."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.helpers.source_files import FILES, PACKAGES, ROOT, SOURCES, imports, tree


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file):
    own = file.relative_to(ROOT).parts[0]
    for name in imports(tree(file)):
        top = name.split(".")[0]
        if own in PACKAGES:
            assert top != "tests", f"{name} imported by the package {own}"
            if top in PACKAGES:
                assert PACKAGES.index(top) <= PACKAGES.index(own), f"{own} imports {name}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_literal_device_no_catch_all_no_import_effects(file):
    module = tree(file)
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            assert called != "cuda", f"line {node.lineno}: .cuda()"
            for keyword in node.keywords:
                if keyword.arg == "device" and isinstance(keyword.value, ast.Constant):
                    assert keyword.value.value is None, f"line {node.lineno}: literal device"
        if isinstance(node, ast.ExceptHandler):
            caught = (
                [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)]
                if node.type
                else ["everything"]
            )
            assert not {"Exception", "BaseException", "everything"} & set(caught), (
                f"line {node.lineno}: catches {caught}"
            )
    for node in (
        module.body
    ):  # a bare call at module level is an effect of importing, registering an op apart
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            assert called.endswith((".register_autograd", ".register_fake")), (
                f"line {node.lineno}: {called} runs at import"
            )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_above_600_lines(file):  # 400 once those that the formatter made longer are split
    assert len(file.read_text().splitlines()) <= 620


@pytest.mark.parametrize("name", PACKAGES)
def test_our_packages_are_imported_and_not_namesakes(name):
    assert Path(importlib.import_module(name).__file__).parent == ROOT / name


def test_public_functions_have_docstrings():
    for file in SOURCES:
        for node in tree(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
                trivial = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno <= 12
                assert is_kernel or trivial or ast.get_docstring(node), (
                    f"{file.name}:{node.lineno}: {node.name} has no docstring"
                )


def test_readme_has_the_two_commands_and_stays_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160
    tests = "pip install -e '.[test]' && python -m pytest -n auto --dist worksteal"
    for command in ("pip install -e . && python -m train.gaussian", tests):
        assert f"\n{command}\n" in readme
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).is_file(), picture
