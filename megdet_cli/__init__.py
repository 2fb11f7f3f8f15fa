"""The ``megdet`` command: reads the command line, then imports what the command needs.

Importing ``megdet_d2`` imports torch and Detectron2, which takes seconds. So the arguments live in
this package beside it, and ``megdet --help`` or a mistyped flag answers at once.
"""

import argparse
import logging
import os
import shlex
import sys
import warnings
from typing import Protocol

from . import ablate, check, ensemble, plan, report, train, variance


class Command(Protocol):
    """A module with one command. Its docstring is the help text."""

    __doc__: str | None
    TAKES_OVERRIDES: bool  # KEY VALUE ... at the end of the line

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> None: ...


COMMANDS: dict[str, Command] = {
    "ablate": ablate,
    "check": check,
    "ensemble": ensemble,
    "plan": plan,
    "report": report,
    "train": train,
    "variance": variance,
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; reports a mistake of the user in one line.

    A training shows the traceback of its error.

    Args:
        argv: the words after ``megdet``; by default those of the process.
    """
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    args.line = shlex.join(["megdet", *words])
    _ignore_deprecations()
    try:
        args.run(args)
    except (OSError, FloatingPointError, ImportError, ValueError) as error:
        if args.shows_traceback:
            raise
        sys.exit(f"error: {error}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments: the command's own, its function as ``run``, and overrides as ``opts``.

    Raises:
        SystemExit: the command line has a mistake, or asks for help.
    """
    parser = argparse.ArgumentParser(
        prog="megdet",
        description="Checks data, trains detectors in Detectron2, runs ablations, draws reports.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.partition(".")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(shows_traceback=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command, opts=None)
        if module.TAKES_OVERRIDES:
            usage = command.format_usage().removeprefix("usage: ").rstrip()
            command.usage = f"{usage} [KEY VALUE ...]"
            command.set_defaults(opts=[])
    # Overrides are the words that are left over. If they were a positional argument, argparse would
    # take every flag after the first positional argument for an override.
    args, rest = parser.parse_known_args(argv)
    keys = rest[0::2]
    if rest and (args.opts is None or len(rest) % 2 or any(key.startswith("-") for key in keys)):
        args.command.error(f"unrecognized arguments: {' '.join(rest)}")
    args.opts = rest
    return args


def _ignore_deprecations() -> None:
    """Hides warnings that are about the code of torch and Detectron2, in child processes too.

    Filters of the user, by ``-W`` or ``PYTHONWARNINGS``, come before these.
    """
    # Detectron2 calls an old function of torch.fx, about which torch logs a line.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning, append=True)
    warnings.filterwarnings("ignore", "torch.meshgrid", append=True)
    filters = ["ignore::FutureWarning", "ignore:torch.meshgrid"]
    if users := os.environ.get("PYTHONWARNINGS"):
        filters.append(users)
    os.environ["PYTHONWARNINGS"] = ",".join(filters)
