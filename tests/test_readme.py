"""The documents are held to the code: metrics, commands, flags, files."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from servegym.cli import parse as parse_command
from servegym.envs.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
PATHS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README, SERVING, METRICS_PAGE = (TEXTS[name] for name in ("README.md", "docs/serving.md", "docs/metrics.md"))
COMMAND = re.compile(r"python (train|evaluate|export)\.py")


def lines(text: str) -> list[str]:
    """The commands of a document, those of several lines joined."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = "\n".join(block for language, block in fences if not language).replace("\\\n", " ")
    return [" ".join(line.split("  #")[0].split()) for line in blocks.splitlines()]


LINES = [(name, line) for name, text in TEXTS.items() for line in lines(text)]
INLINE = [  # in running text, where flags are shown
    (name, line)
    for name, text in TEXTS.items()
    for line in re.findall(
        r"`((?:servegym|python \w+\.py) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    if "..." not in line
]


def test_every_metric_is_explained():
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.unit} | {metric.doc} |" in METRICS_PAGE


def parses(line: str) -> None:
    words = shlex.split(line)
    parse_command([words[1].removesuffix(".py"), *words[2:]])  # leaves with a message where a flag is unknown


@pytest.mark.parametrize(("name", "line"), [one for one in LINES if COMMAND.match(one[1])])
def test_commands_parse(name, line):
    parses(line)


@pytest.mark.parametrize(("name", "line"), [one for one in LINES if one[1].startswith("servegym ")])
def test_commands_of_the_console_script_parse(name, line):
    parse_command(shlex.split(line)[1:])


def test_all_documents_were_read():
    """No document's commands may slip through, for example behind another kind of fence."""
    for name, least in (
        ("README.md", 11),
        ("docs/serving.md", 9),
        ("docs/results.md", 3),
        ("CONTRIBUTING.md", 2),
    ):
        found = [
            line for at, line in LINES if at == name and (COMMAND.match(line) or line.startswith("servegym "))
        ]
        assert len(found) >= least, name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_commands_of_make_train_parse_and_stand_in_the_readme(tmp_path):
    make = ["make", "--dry-run", "--no-print-directory", "-C", str(ROOT), "train", f"VENV={tmp_path}"]
    output = subprocess.run(make, capture_output=True, text=True, check=True, timeout=30).stdout
    found = [f"python {line.partition(' ')[2]}" for line in output.splitlines()]
    commands = [line for line in found if COMMAND.match(line)]
    assert len(commands) == 3
    for line in commands:
        parses(line)
        assert line in lines(README)


def test_mentioned_files_exist():
    for at, text in TEXTS.items():
        for name in re.findall(r"\b(?:benchmarks|envs|agents|models|runtime|tests)/[\w/]+\.py\b", text):
            assert (ROOT / name).is_file(), (at, name)
        for name in re.findall(r"\bcheckpoints/[\w./-]*\w", text):
            assert (ROOT / name).exists(), (at, name)
        for name in re.findall(r"`(\w+-v0/[\w-]+-s0)`", text):
            assert (ROOT / "checkpoints" / name / "config.json").is_file(), (at, name)
        for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (at, target)


def test_links_lead_somewhere():
    for at, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, part = link.partition("#")
            if "://" in name:
                continue
            path = (ROOT / at).parent / name if name else ROOT / at
            assert path.exists(), (at, link)
            if part:
                titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert part in anchors, (at, link)


def test_every_benchmark_has_a_row():
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"report.py"}
    rows = re.findall(r"^\| `python benchmarks/([\w.]+)` \|", TEXTS["benchmarks/README.md"], re.MULTILINE)
    assert set(rows) == files and len(rows) == len(files)


def test_lines_are_short():
    for at, text in TEXTS.items():
        for line in text.splitlines():
            assert len(line) <= 130 or line.startswith("|"), (at, line)


@pytest.mark.parametrize(("name", "line"), INLINE)
def test_commands_in_running_text_exist(name, line, capsys):
    """Their first words are a command, and their flags are its own; values may be left out."""
    words = shlex.split(line)
    words = words[1:] if words[0] == "servegym" else [words[1].removesuffix(".py"), *words[2:]]
    with pytest.raises(SystemExit) as left:
        parse_command([*(word for word in words if word.isalpha()), "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert all(word.split("=")[0] in told for word in words if word.startswith("--"))


# --- the gateway's, the migrator's and the scheduler's pages ----------------------------------------------


def part(text: str, title: str) -> str:
    """A section of a document."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def first_cells(text: str, pattern: str) -> list[str]:
    """What stands in the first cells of tables."""
    return [
        name
        for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
        for name in re.findall(pattern, row)
    ]


def metrics_of(samples) -> set[str]:
    return {metric.name + "_total" * (metric.type == "counter") for metric in samples}


def test_metrics_of_the_gateway_are_explained():
    pytest.importorskip("prometheus_client")
    from types import SimpleNamespace

    from servegym.runtime.gateway import telemetry

    page = part(METRICS_PAGE, "Gateway")
    decider = SimpleNamespace(counts={})
    books = SimpleNamespace(engines=(), view=SimpleNamespace(instances=()))
    state = telemetry._State(SimpleNamespace(decider=decider, books=books), lambda: 0.0)
    names = metrics_of(telemetry.Telemetry().registry.collect()) | metrics_of(state.collect())
    assert set(first_cells(page, r"`(servegym_\w+)`")) == names


def test_events_of_the_gateway_are_explained():
    page = part(METRICS_PAGE, "Gateway")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime/gateway").glob("*.py"))
    said = set(re.findall(r"\.(?:event|log|count)\(\s*\"(\w+)\"", code))
    from servegym.runtime.decider import REASONS

    found = set(first_cells(page, r"`([a-z_]+)`"))
    assert found - {x for x in found if x.startswith("servegym_")} == said | set(REASONS)


def test_metrics_of_the_migrator_are_explained():
    pytest.importorskip("prometheus_client")
    from collections import Counter
    from types import SimpleNamespace

    from servegym.runtime.vllm.tally import Tally

    page = part(METRICS_PAGE, "Migrator")
    migrator = SimpleNamespace()
    tally = Tally(migrator)
    migrator.tally, migrator.decider = tally, SimpleNamespace(counts=Counter())
    migrator.urls, migrator.view = (), SimpleNamespace(instances=())
    found = set(first_cells(page, r"`([a-z_]+)`"))
    names = metrics_of(tally._registry.collect())
    assert {x for x in found if x.startswith("servegym_")} == names
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime/vllm").glob("*.py"))
    said = set(re.findall(r"(?:\.note\(|tally\.counts\[|self\.counts\[)\"(\w+)\"", code))
    assert found - names == said


@pytest.mark.parametrize("title", ["Gateway", "Between vLLM servers"])
def test_flags_exist_and_have_these_defaults(title):
    pytest.importorskip("aiohttp")
    from servegym.runtime.gateway.settings import Settings as Gateway
    from servegym.runtime.vllm.serve import Settings as Migrator

    kind = Gateway if title == "Gateway" else Migrator
    defaults = {field.name: field.default for field in fields(kind)}
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", part(SERVING, title), re.MULTILINE)
    assert len(rows) >= 8
    for flags, shown in rows:
        names = [flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)`", flags)]
        numbers = [float(x) for x in re.findall(r"\d+\.?\d*", shown)] if "`" not in shown else []
        for i, name in enumerate(names):
            name = name.removeprefix("no_") if name not in defaults else name
            assert name in defaults or name == "fallback", name
            if numbers:
                assert defaults[name] == numbers[i], name


def test_keys_of_the_scheduler_are_explained():
    from servegym.runtime.vllm.config import SchedulerConfig, read_config

    section = part(SERVING, "Inside vLLM")
    assert first_cells(section, r"`(\w+)`") == [field.name for field in fields(SchedulerConfig)]
    for text in (README, SERVING):
        (config,) = re.findall(r"--additional-config '(.*)'", text)
        read_config(json.loads(config))


def test_classes_are_such_as_the_gateway_reads(tmp_path):
    from servegym.runtime.gateway.settings import ServiceClass, read_classes

    (text,) = re.findall(r"```toml\n(.*?)```", SERVING, re.DOTALL)
    path = tmp_path / "classes.toml"
    path.write_text(text, encoding="utf-8")
    assert read_classes(str(path)).keys() == tomllib.loads(text).keys()
    used = {field for table in tomllib.loads(text).values() for field in table}
    assert used == {field.name for field in fields(ServiceClass)}
