"""The README is held to the code: its metrics, its commands."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from servegym.cli import parse as parse_command
from servegym.envs.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
LINES = [line.split("  #")[0].strip() for line in BLOCKS.splitlines()]
COMMAND = re.compile(r"python (train|evaluate|export)\.py")


def test_every_metric_is_explained():
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.unit} | {metric.doc} |" in TEXT


def parses(line: str) -> None:
    words = shlex.split(line)
    parse_command([words[1].removesuffix(".py"), *words[2:]])  # leaves with a message where a flag is unknown


@pytest.mark.parametrize("line", [line for line in LINES if COMMAND.match(line)])
def test_commands_parse(line):
    parses(line)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("servegym ")])
def test_commands_of_the_console_script_parse(line):
    parse_command(shlex.split(line)[1:])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_commands_of_make_train_parse(tmp_path):
    make = ["make", "--dry-run", "--no-print-directory", "-C", str(ROOT), "train", f"VENV={tmp_path}"]
    output = subprocess.run(make, capture_output=True, text=True, check=True, timeout=30).stdout
    lines = [f"python {line.partition(' ')[2]}" for line in output.splitlines()]
    commands = [line for line in lines if COMMAND.match(line)]
    assert len(commands) == 3
    for line in commands:
        parses(line)


def test_mentioned_files_exist():
    for name in re.findall(r"\b(?:benchmarks|envs|agents|models|runtime)/[\w/]+\.py\b", TEXT):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"^make ([\w-]+)", BLOCKS, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
