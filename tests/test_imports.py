"""The laws of imports: which file may use which. Each test names every place at fault."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.source_files import FILES, ROOT, SOURCES, imports, path, tree

MOST = 12  # files of ours that a file imports
# modules of kernels that models and train import beside the ops in kernels/__init__.py
MODULES = {"backend", "checks"}
# these hold ours beside published code, as the benchmarks do
COMPARE = {"train/bench.py", "train/published.py", "train/timing.py"}
# a command of bench/ under a name of its own, which nothing imports
COMMANDS = {"kernels/profile.py"}
MEASURING = {"cProfile", "time", "timeit", "torch.profiler", "torch.utils.benchmark"}
KERNELS = [file for file in SOURCES if path(file).startswith("kernels/")]


def ours(file: Path) -> Iterator[Path]:
    """Yield the files of the repository that a file imports, each once."""
    by_module = {path(f).removesuffix(".py").replace("/", "."): f for f in FILES}
    by_module |= {path(f.parent).replace("/", "."): f for f in FILES if f.name == "__init__.py"}
    found = {name for _, name in imports(file)}
    for name in sorted(found):
        # `from kernels.conv import op` names the package too, but uses the module alone
        inside = any(other.startswith(f"{name}.") and other in by_module for other in found)
        if name in by_module and by_module[name] != file and not inside:
            yield by_module[name]


def exported() -> set[str]:
    """Return the names that kernels/__init__.py gives to its users."""
    nodes = [n for n in tree(ROOT / "kernels/__init__.py").body if isinstance(n, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def has_kernels(file: Path) -> bool:
    functions = (n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef))
    return any("triton.jit" in ast.unparse(d) for f in functions for d in f.decorator_list)


def test_models_and_train_use_the_ops_of_kernels():
    allowed = exported() | MODULES
    broken = set()
    for file in SOURCES:
        for _, name in imports(file):
            top, *rest = name.split(".")
            if file in KERNELS or top != "kernels" or not rest or rest[0] in allowed:
                continue
            if not (rest[0] == "bench" and path(file) in COMPARE):
                broken.add(f"{path(file)}: {top}.{rest[0]}")
    assert not broken, sorted(broken)


def test_a_file_of_kernels_and_one_for_a_cpu_do_not_import_each_other():
    """What both need stands in a third file; the file of an op imports both."""
    gpu = {file for file in KERNELS if has_kernels(file)}
    cpu = {file for file in KERNELS if file.stem == "cpu" or file.stem.endswith("_cpu")}
    assert gpu and cpu and not gpu & cpu
    broken = set()
    for file in gpu | cpu:
        other = cpu if file in gpu else gpu
        broken |= {f"{path(file)}: {path(target)}" for target in ours(file) if target in other}
    assert not broken, sorted(broken)


def test_only_bench_and_compile_measure():
    broken = []
    for file in KERNELS:
        if path(file).startswith(("kernels/bench/", "kernels/compile/")):
            continue
        for line, name in imports(file):
            if path(file) in COMMANDS and name.startswith("kernels.bench"):
                continue
            if (
                name == "kernels.profile"
                or name in MEASURING
                or name.startswith(("kernels.bench", "kernels.compile"))
            ):
                broken.append(f"{path(file)}:{line}: {name}")
    assert not broken, broken


def test_no_file_imports_many_of_ours():
    counts = {path(file): len(set(ours(file))) for file in SOURCES if file.name != "__init__.py"}
    broken = {f"{name}: {n}" for name, n in counts.items() if n > MOST}
    assert not broken, sorted(broken)


def test_the_name_of_a_module_gives_the_module():
    """No package has an attribute in the place of one of its modules."""
    for file in KERNELS:
        if file.name.startswith("__"):
            continue
        name = path(file).removesuffix(".py").replace("/", ".")
        package, _, last = name.rpartition(".")
        module = importlib.import_module(name)
        assert getattr(importlib.import_module(package), last) is module, name
