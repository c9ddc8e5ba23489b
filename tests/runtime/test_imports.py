"""A deployed policy imports neither torch nor numba, and runs where they and Gymnasium are not installed."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from servegym.runtime.export import Origin, export_bundle
from tests.runtime.test_bundle import network, observation

ROOT = Path(__file__).parents[2]
ASK = """
import numpy as np
from servegym.agents.heuristics import HEURISTICS, make_heuristic
from servegym.runtime.decider import Decider
from servegym.runtime.questions import ask_dispatch, ask_migrate
from servegym.runtime.view import ClusterView, InstanceSettings, InstanceView, RequestView

settings = InstanceSettings.of("a100-llama-3.1-8b", kv_blocks=512)
view = ClusterView([InstanceView(settings) for _ in range(4)], longest_output=64)
request = RequestView("r", 1.0, 500, 60)
view.arrived(request)
question = ask_dispatch(view, request)
decider = Decider({bundle!r}, budget_s=10.0)
view.dispatched(request, decider.decide(question).instance)
view.streamed(request)
for instance in view.instances:
    instance.infer_engine()
assert decider.decide(ask_migrate(view)) is not None
assert decider.counts["answered"] == 1 and decider.counts["mismatch"] == 1, decider.counts
for name, rule in HEURISTICS.items():
    if rule.kinds == ("dispatch",) and not rule.needs_oracle:
        policy = make_heuristic(name)
        policy.reset(1, 0)
        assert int(policy.act(question.obs)[0]) in question.actions, name
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(network(), [observation(2, 4)], folder, Origin("tiny"))
    return str(folder)


def run(python: str, script: str, **kwargs) -> None:
    done = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, timeout=300, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr


def test_no_heavy_import(bundle):
    check = "import sys\nfound = {'torch', 'numba'} & set(sys.modules)\nassert not found, found\n"
    run(sys.executable, ASK.format(bundle=bundle) + check, cwd=ROOT)


def test_heavy_packages_may_be_missing(bundle):
    missing = ("torch", "numba", "gymnasium", "scipy", "pyarrow", "rich", "tyro", "stable_baselines3", "onnx")
    block = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    run(sys.executable, block + ASK.format(bundle=bundle), cwd=ROOT)


@pytest.mark.slow
def test_three_packages_are_enough(bundle, tmp_path):
    """A fresh environment with numpy, onnxruntime, safetensors, and the package without dependencies."""
    venv.create(tmp_path / "lean", with_pip=True)
    python = str(tmp_path / "lean" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "numpy", "onnxruntime", "safetensors"], check=True, timeout=600)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True, timeout=600, cwd=tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(python, ASK.format(bundle=bundle), cwd=tmp_path, env=clean)
