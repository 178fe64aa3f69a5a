"""The command line: `python -m fastnn COMMAND`, or `fastnn COMMAND`.

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit status`, imported when it is asked for.
Exit status 2 means that it could not start: a wrong option, or an extra that is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": ("fastnn.info", "version, backends, instruction set, threads"),
    "demo": ("fastnn.demo", "a real sentence encoder, before and after"),
    "verify": ("fastnn.verify", "whether this machine computes what it should, in half a minute"),
    "compress": ("fastnn.compression.command", "a smaller, faster model in one file that was read back"),
    "bench": ("fastnn.bench.command", "every row against the machine's limit and the best alternative"),
    "run": ("fastnn.run", "any script, with the allocator settings that measure best here"),
}
"""Command -> its module and what it does."""


class MissingExtra(ImportError):
    """A command needs something that is not installed; the message says how to install it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="fastnn", description="Compiled-kernel acceleration for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))
    except MissingExtra as error:
        sys.stderr.write(f"fastnn {arguments.command}: {error}\n")
        return 2
