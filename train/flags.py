"""The command line of a training script: a flag for every field of its config.

A preset is a whole Config; a flag replaces one of its fields (`--lr 1e-3`), a dotted flag a field
of a nested group (`--model.channels 96`, `--weights.kl 0`).
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin

from train.config import CHANGEABLE, Config, leaves, read_config, replaced

METAVARS = {int: "N", float: "X", str: "TEXT"}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with status 2; flags may stand among other arguments."""

    def error(self, message: str):
        """Print what is wrong, without the usage."""
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def complain(command: str, error: BaseException | str) -> None:
    """Print on one line of standard error what a command cannot use."""
    print(f"{command}: {' '.join(str(error).splitlines())}", file=sys.stderr)


def exit_status(
    command: str,
    step: Callable[[], int | None],
    interrupted: str = "interrupted",
    speaks: Callable[[], bool] = lambda: True,
) -> int:
    """Do what a command is for; returns its exit status.

    That is what `step` returns (None: 0); 2 where it raises ValueError or OSError, for what was
    given cannot be used; 130 for Ctrl-C. Each of these prints one line, unless `speaks` says that
    another rank does.
    """
    try:
        return step() or 0
    except (ValueError, OSError) as error:
        status, said = 2, error
    except KeyboardInterrupt:
        status, said = 130, interrupted
    if speaks():
        complain(command, said)
    return status


def _whole(text: str) -> int:
    """A whole number, also as 1e6."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _parser(script: str, presets: Mapping[str, Config]) -> argparse.ArgumentParser:
    name = f"python -m train.{script}"
    # not 50 flags before every error
    usage = f"{name} [--preset NAME] [--FLAG VALUE ...]   (--help lists the flags)"
    parser = argparse.ArgumentParser(
        name, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    first = next(iter(presets))
    parser.description = (
        "Values in brackets are the defaults of the presets "
        f"{', '.join(presets)}, or of all of them."
    )
    parser.add_argument(
        "--preset",
        choices=list(presets),
        help=f"where every other value comes from (default: {first})",
    )
    values = [{leaf.name: leaf.value for leaf in leaves(config)} for config in presets.values()]
    for leaf in leaves(presets[first]):
        flag = "--" + leaf.name.replace("_", "-")
        defaults = _defaults([value[leaf.name] for value in values])
        common = {"dest": leaf.name, "help": (leaf.help + defaults).replace("%", "%%")}
        if leaf.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(leaf.kind) is tuple:
            parser.add_argument(flag, action="append", metavar="PATH", **common)
        elif leaf.name != "preset":
            kinds = get_args(leaf.kind) or (leaf.kind,)
            kind = next(kind for kind in kinds if kind is not NoneType)
            parse = _whole if kind is int else kind
            parser.add_argument(flag, type=parse, metavar=METAVARS[kind], **common)
    return parser


def _shown(value) -> str:
    """A default as --help shows it."""
    if value is False:
        return "off"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _defaults(values: list) -> str:
    """A flag's value in each preset, in brackets for --help.

    Nothing where the flag's text says what its absence means.
    """
    if not any(value or value == 0 for value in values):
        return ""
    shown = [_shown(value) for value in values]
    if len(set(shown)) == 1:
        shown = shown[:1]
    return f" [{', '.join(shown)}]"


def _given_config(given: dict, script: str, presets: Mapping[str, Config]) -> Config:
    """The recorded config of --resume, or the preset: what the other flags then change."""
    for name, value in given.items():
        if value == "" or isinstance(value, tuple) and "" in value:
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    if not given.get("resume"):
        if "data" not in given:
            given.setdefault("features", "rgb")  # the embedded objects have no others
        return presets[given.get("preset", next(iter(presets)))]
    if fixed := sorted(given.keys() - {"resume", *CHANGEABLE}):
        raise ValueError(f"--resume keeps the recorded config; it cannot change {', '.join(fixed)}")
    return read_config(Path(given["resume"]) / "config.json", script, presets)


def from_cli(
    script: str,
    presets: Mapping[str, Config],
    argv: Sequence[str] | None = None,
    world: int = 1,
) -> Config:
    """Make the config that the flags describe, for `world` ranks.

    A wrong flag or value prints what is wrong and exits with status 2. With --batch-size but no
    --micro-batch, the preset's micro-batch shrinks to the largest that divides a rank's share. With
    --resume the recorded config is taken, and only flags that do not change the training may be
    given.
    """
    parser = _parser(script, presets)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    try:
        config = _given_config(given, script, presets)
        if "batch_size" in given and "micro_batch" not in given:
            share = max(given["batch_size"] // world, 1)
            given["micro_batch"] = next(
                m for m in range(min(config.micro_batch, share), 0, -1) if share % m == 0
            )
        config = replaced(config, given)
        config.micro_batches(world)
        return config
    except ValueError as error:
        parser.error(str(error))
