"""List the commands of train, one line each: python -m train."""

import ast
from pathlib import Path

COMMANDS = (
    "prepare",
    "gaussian",
    "radiance",
    "mesh",
    "reconstruct",
    "evaluate",
    "export",
    "lpips",
    "memory",
    "timing",
    "bench",
)


def summary(command: str) -> str:
    """Read the first line of a command's docstring, without importing it."""
    folder = Path(__file__).parent
    file = folder / f"{command}.py"
    if not file.is_file():
        file = folder / command / "command.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0]


def main() -> None:
    """Print every command with the first line of what it does."""
    width = max(map(len, COMMANDS))
    for command in COMMANDS:
        print(f"python -m train.{command:<{width}}  {summary(command)}")


if __name__ == "__main__":
    main()
