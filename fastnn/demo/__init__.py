"""`python -m fastnn demo`: a real sentence encoder made faster with the same answers, and two models trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=_positive, default=20, help="timing rounds (default 20)")
    parser.add_argument("--batch", type=_positive, default=16, help="sentences in a batch, beside 1 (default 16)")
    parser.add_argument("--threads", type=_positive, help="torch's threads (default: as torch chooses)")
    parser.add_argument("--no-training", action="store_true", help="the encoder only, without the training runs")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the small GPT learns from")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to this file")


def run(arguments: argparse.Namespace) -> int:
    """The command: 0 where the answers are the same, however fast; 1 where they are not or fastnn is broken."""
    from .encoder import check_installed

    check_installed()
    from .show import demonstrate

    result = demonstrate(
        arguments.rounds, arguments.batch, arguments.threads, not arguments.no_training, arguments.text
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 1 if result["problems"] else 0
