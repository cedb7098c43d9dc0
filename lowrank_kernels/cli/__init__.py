"""The command `lrk`: one module a subcommand, imported when its name is on the command line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
"""What a wrong option, file or environment raises: told in one line, without a traceback."""


class Command(NamedTuple):
    """A subcommand. Its module has ``add_parser(subparsers)`` and ``run(args) -> int``."""

    name: str
    help: str
    module: str


COMMANDS = (
    Command("doctor", "what of this package runs on this machine, which path each op takes, and why", "doctor"),
    Command("inspect", "what the compiler makes of every kernel, for any GPU, without one", "inspect"),
    Command("bench", "what each op costs here, beside plain PyTorch and PEFT's calls", "bench"),
    Command("tune", "settle on this device which way of running each op is right and fastest", "tune"),
    Command("train", "fine-tune a small language model with one method and report it as JSON", "train"),
    Command("demo", "fine-tune a small language model side by side with PEFT", "demo"),
    Command("adapters", "what adapters are, which engines read them rightly, and what differs between two", "adapters"),
    Command("convert", "write an adapter in the format of another engine, computing the same", "convert"),
    Command("merge", "merge adapters and deltas into a checkpoint, a tensor at a time", "merge"),
    Command("serve", "answer OpenAI-compatible requests with many adapters over one model", "serve"),
)


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as ValueErrors of one line and takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def _parser(chosen: Command | None) -> argparse.ArgumentParser:
    """The parser of all subcommands, with the options of the chosen one."""
    parser = Parser(
        prog="lrk",
        description="Kernels for frozen weights with small trained corrections.",
        epilog="lrk COMMAND --help tells a command's options.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        if command is chosen:
            importlib.import_module(f"{__name__}.{command.module}").add_parser(subparsers)
        else:
            subparsers.add_parser(command.name, help=command.help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lrk` with these arguments (default: the process's).

    Returns:
        0; 1 when the command found something wrong; 2 for a user's error, told in one line on stderr; 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # wherever it stands
    name = next((word for word in words if not word.startswith("-")), None)
    chosen = next((command for command in COMMANDS if command.name == name), None)
    try:
        args = _parser(chosen).parse_args(words)
        args.debug, args.given = debug, frozenset(word.partition("=")[0] for word in words if word.startswith("--"))
        return int(importlib.import_module(f"{__name__}.{args.command}").run(args) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough of it; the interpreter would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"lrk: {error}", file=sys.stderr)
        return 2
