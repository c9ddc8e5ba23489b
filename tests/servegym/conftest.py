from pathlib import Path

import pytest

from servegym.cli import main

FLEET = "1xa100-llama-3.1-8b+1xl40s-llama-3.1-8b"


def tiny_train(folder: Path, *arguments: str) -> list[str]:
    """README's training command at a size that takes a second."""
    return [
        *("train", "--scenario", "mixed", "--cluster", FLEET, "--requests", "40", "-n", "2000"),
        *("--n-envs", "8", "--group-size", "4", "--episodes", "8"),
        *("--ppo.n-steps", "32", "--ppo.batch-size", "128"),
        *("--network.hidden", "8", "--network.layers", "1", "--save-freq", "256", "--eval-freq", "1000"),
        *("--eval-episodes", "2", "-f", str(folder / "runs"), "--tensorboard-log", str(folder / "tb")),
        *arguments,
    ]


@pytest.fixture(scope="session")
def train_command():
    return tiny_train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(tiny_train(folder)) == 0
    return folder / "runs" / "Dispatch-v0" / "ppo-mixed-s0"


@pytest.fixture(scope="session")
def bundle(trained: Path) -> Path:
    """The bundle of that checkpoint."""
    assert main(["export", "-i", str(trained)]) == 0
    return trained.with_name("ppo-mixed-s0-bundle")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command that must be refused: exit code 2 and one line on stderr, which is returned."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("servegym: ")
        return lines[0]

    return run
