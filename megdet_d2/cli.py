"""The ``megdet`` command: ablations, reports and measurements around train_net.py.

megdet ablate configs/ablations/table3 --reduced
megdet report output/demo
"""

import argparse
import shlex
import sys

from megdet_d2.ablation import command as ablate
from megdet_d2.ensemble import command as ensemble
from megdet_d2.gradient_noise import command as variance
from megdet_d2.report import command as report

COMMANDS = {
    "ablate": (ablate, "train every row of an ablation over seeds, and tabulate"),
    "ensemble": (ensemble, "several detectors' boxes fused into one, and the AP of each and all"),
    "report": (report, "curves, tables and detections of one or more runs, as PNG and HTML"),
    "variance": (variance, "the gradient's variance against the mini-batch (Equations 2 to 4)"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user's is one line, without a traceback."""
    parser = argparse.ArgumentParser(prog="megdet", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__.splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run, opts=None, command=command)
        if module.TAKES_OVERRIDES:
            command.usage = (
                command.format_usage().removeprefix("usage: ").rstrip() + " [KEY VALUE ...]"
            )
            command.set_defaults(opts=[])
    # The overrides are what is left over. As a positional argument of its own argparse would take
    # every flag behind SOURCE for one of them.
    args, rest = parser.parse_known_args(argv)
    keys = rest[0::2]
    if rest and (args.opts is None or len(rest) % 2 or any(key.startswith("-") for key in keys)):
        args.command.error(f"unrecognized arguments: {' '.join(rest)}")
    args.opts = rest
    args.line = shlex.join(["megdet", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.run(args)
    except (OSError, FloatingPointError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
