"""The console script: `servegym COMMAND ...`; each command is a dataclass in `servegym.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from servegym import __version__
from servegym.errors import InputError

COMMANDS = {
    "train": "train a policy with PPO, or go on where a run stopped",
    "evolve": "search dispatch rules that teach networks",
    "evaluate": "play policies and heuristics on the same requests; table, JSON and plots",
    "export": "turn a checkpoint into a bundle that needs no torch",
    "calibrate": "measure the runtime here, or `calibrate engine` a vLLM server, and write a cost profile",
    "validate": "play a trace on real engines and in the model; measured beside predicted",
    "gateway": "route requests to engines with a policy, through Envoy",
    "migrator": "move requests between running vLLM servers as a bundle decides",
    "predictor": "serve llm-d's latency predictor from a profile",
    "timeline": "play an episode and write it as a trace for ui.perfetto.dev",
    "data": "list the workloads, or look into one",
    "profile": "list, show or build cost profiles",
    "scenarios": "list the scenarios",
    "heuristics": "list the heuristics",
}
# What a command can be asked for instead of its usual work, as a word behind its name.
SPECIAL = {("evaluate", "zoo"): "zoo", ("calibrate", "engine"): "calibrate_engine"}
# What optional dependencies are imported as.
EXTRAS = {
    **dict.fromkeys(("aiohttp", "envoy", "grpc", "hpack", "msgpack", "prometheus_client", "zmq"), "gateway"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}
BAD_INPUT, INTERRUPTED = 2, 130


class Command(Protocol):
    """A dataclass of flags."""

    def run(self) -> int:
        """Do the work; returns the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except InputError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # `servegym data | head`; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "servegym"):
            raise
        wanted = f"'servegym[{EXTRAS[package]}]'" if package in EXTRAS else "servegym"
        return _refuse(f"{error.name} is missing: pip install {wanted}")
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("servegym: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(f"servegym {__version__}")
        return 0
    return parse(arguments).run()


def parse(arguments: Sequence[str]) -> Command:
    """The command that such a line asks for; argparse's SystemExit where a flag is unknown.

    Raises:
        InputError: for an unknown command.
    """
    name = arguments[0]
    if name not in COMMANDS:
        raise InputError("servegym", "command", name, f"choose one of {', '.join(COMMANDS)}")
    special = SPECIAL.get((name, arguments[1] if len(arguments) > 1 else ""))
    words = 2 if special else 1
    import tyro  # late: where it is missing, `main` says so

    # Late: most commands need no torch.
    command = import_module(f"servegym.commands.{special or name}").Command
    prog = f"servegym {' '.join(arguments[:words])}"
    return tyro.cli(command, prog=prog, args=arguments[words:], config=(tyro.conf.DisallowNone,))


def _refuse(message: str) -> int:
    print(f"servegym: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(("usage: servegym COMMAND [--help] ...", "", *lines))


if __name__ == "__main__":
    sys.exit(main())
