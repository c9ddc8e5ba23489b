"""Writes bundles: network -> ONNX, safetensors, golden answers; checked in two runtimes before it appears."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from servegym import __version__
from servegym.agents.policy import Policy
from servegym.agents.task import Task
from servegym.envs.cluster import schema
from servegym.envs.cluster.decisions import kinds_of
from servegym.errors import InputError
from servegym.files import write_arrays
from servegym.models import numpy_policy
from servegym.models.dense import DenseNetwork
from servegym.models.features import ARRAYS
from servegym.runtime.bundle import (
    CARD,
    FORMAT,
    GOLDEN,
    GRAPH,
    MANIFEST,
    TOLERANCE,
    WEIGHTS,
    BundlePolicy,
    check_golden,
    digest_line,
    is_bundle,
    load_bundle,
    sha256,
)

ACTIONS = {
    "dispatch": "0 leaves the choice to the default rule, k >= 1 sends the request to instance row k - 1",
    "preempt": "0 leaves the victim to the engine, 1 + 2 row recomputes that request, 2 + 2 row swaps it",
    "migrate": "0 moves nothing (more) this time, k >= 1 moves from the instance in the third column of "
    "candidates to the one in the second",
    "move": "0 moves the default request, k >= 1 the request of row k - 1",
    "budget": "0 keeps the budget, k >= 1 sets it to the engine's token budget / 2^(k - 1), at least 16",
}
SCORES = "argmax of logits; candidates with mask 0 score at most -1e9"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Origin:
    """Where a policy comes from; goes into the manifest as it is.

    Attributes:
        policy: its name.
        command: the training command.
        revision: git revision of the code, or None.
        task: what the policy was trained for.
        decisions: decisions trained on.
        seed: training seed.
        traces: SHA-256 of each trace file by path; empty for embedded workloads.
        fallback: heuristic to play at a time-out, NaN or stale state.
    """

    policy: str
    command: str = ""
    revision: str | None = None
    task: Task = field(default_factory=Task)
    decisions: int = 0
    seed: int = 0
    traces: dict[str, str] = field(default_factory=dict)
    fallback: str = "least_tokens"


def export_bundle(
    network: DenseNetwork, observations: Sequence[Arrays], folder: Path, origin: Origin
) -> BundlePolicy:
    """Write a bundle and return it loaded.

    Args:
        network: the trained network.
        observations: batches of real observations, preferably of several fleet sizes; they become golden.
        folder: where the bundle goes; an older bundle there is replaced, anything else is refused.
        origin: goes into the manifest.

    Raises:
        InputError: the folder holds something else, or ONNX Runtime or numpy disagrees with torch; nothing
            is written then.
    """
    if folder.exists() and not (folder.is_dir() and (is_bundle(folder) or not any(folder.iterdir()))):
        raise InputError(folder, "output", str(folder), "exists and is no bundle; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        draft = Path(scratch) / "bundle"
        draft.mkdir()
        _write(network, observations, draft, origin)
        load_bundle(draft)
        if folder.exists():
            folder.replace(Path(scratch) / "old")
        draft.replace(folder)
    return load_bundle(folder)


def _write(network: DenseNetwork, observations: Sequence[Arrays], draft: Path, origin: Origin) -> None:
    weights = {name: value.detach().cpu().numpy() for name, value in network.named_parameters()}
    write_arrays(draft / WEIGHTS, {name: np.ascontiguousarray(value) for name, value in weights.items()})
    golden = [_golden(network, obs) for obs in observations]
    write_arrays(
        draft / GOLDEN, {f"{i}.{name}": a for i, group in enumerate(golden) for name, a in group.items()}
    )
    stored = load_file(draft / WEIGHTS)
    for group in golden:
        check_golden("numpy", numpy_policy.forward(stored, group)[0], group)
    _write_graph(stored, golden, draft / GRAPH)
    measured = decision_us(BundlePolicy(draft / GRAPH, {"policy": origin.policy}, origin.task), golden[0])
    manifest = _manifest(network, origin, measured)
    (draft / CARD).write_text(_card(manifest), encoding="utf-8")
    manifest["files"] = {name: sha256(draft / name) for name in (GRAPH, WEIGHTS, GOLDEN, CARD)}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (draft / f"{MANIFEST}.sha256").write_text(digest_line(sha256(draft / MANIFEST)), encoding="utf-8")


def _golden(network: DenseNetwork, obs: Arrays) -> dict[str, np.ndarray]:
    arrays = {name: np.ascontiguousarray(obs[name]) for name in ARRAYS}
    with torch.no_grad():
        logits = network({name: torch.from_numpy(a) for name, a in arrays.items()})[0].numpy()
    return {**arrays, "logits": logits, "answers": logits.argmax(axis=1)}


def _write_graph(weights: Arrays, golden: Sequence[Arrays], path: Path) -> None:
    import onnx  # late: training measures decisions, too, and does not need it

    from servegym.runtime.graph import build_graph

    rows = {group["requests"].shape[1] for group in golden}
    if len(rows) != 1:
        raise InputError("export", "request rows", sorted(rows), "observe one environment")
    onnx.save(build_graph(weights, rows.pop()), str(path))


def decision_us(policy: Policy, golden: Arrays, instances: int = 16, repeats: int = 1000) -> float:
    """Median microseconds of one decision among `instances` engines, observation in, answer out."""
    obs = resize(golden, instances)
    policy.reset(1, 0)
    samples = np.empty(repeats)
    for i in range(repeats):
        start = time.perf_counter_ns()
        policy.act(obs)
        samples[i] = time.perf_counter_ns() - start
    return float(np.median(samples)) / 1e3


def resize(obs: Arrays, instances: int) -> dict[str, np.ndarray]:
    """The first lane of an observation, its instances repeated or cut to a fleet of that size.

    The candidates of a dispatch, one an instance, follow; other questions keep theirs.
    """
    rows = np.arange(instances) % int(obs["instance_mask"][0].sum())
    size = schema.most_candidates(instances, obs["requests"].shape[1])
    kept = np.arange(size) % obs["mask"].shape[1]
    is_dispatch = schema.KINDS[obs["kind"][0]] == "dispatch"
    if is_dispatch:
        kept[: instances + 1] = np.concatenate([[0], 1 + rows])
    out = {name: np.ascontiguousarray(obs[name][:1]) for name in ARRAYS}
    out["instances"], out["instance_mask"] = obs["instances"][:1, rows], obs["instance_mask"][:1, rows]
    for name in ("edges", "mask", "candidates"):
        out[name] = obs[name][:1, kept].copy()
    out["candidates"][0, :, 1] %= instances
    if is_dispatch:
        out["candidates"][0, 1 : instances + 1, 1] = np.arange(instances)
        out["mask"][0, instances + 1 :] = 0
    return out


def _manifest(network: DenseNetwork, origin: Origin, measured_us: float) -> dict[str, Any]:
    packages = ("servegym", "torch", "onnx", "onnxruntime", "numpy", "safetensors")
    return {
        "format": FORMAT,
        "policy": origin.policy,
        "task": asdict(origin.task),
        "schema": {"hash": schema.schema_hash(), **schema.describe()},
        "actions": {kind: ACTIONS[kind] for kind in kinds_of(origin.task.decisions)},
        "answer": SCORES,
        "network": vars(network.config),
        "fallback": origin.fallback,
        "onnx": {"inputs": "servegym.runtime.graph", "output": "logits", "lanes": 1},
        "golden": {"tolerance": TOLERANCE},
        "decision_us": {"instances": 16, "runtime": "onnxruntime, 1 thread", "p50": round(measured_us, 1)},
        "training": {
            "command": origin.command, "revision": origin.revision, "seed": origin.seed,
            "decisions": origin.decisions, "traces": origin.traces,
        },
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in packages}},
    }  # fmt: skip


def _version(name: str) -> str | None:
    return __version__ if name == "servegym" else version(name)


def _card(manifest: dict[str, Any]) -> str:
    training, decision = manifest["training"], manifest["decision_us"]
    answers = "\n".join(f"  - {kind}: {text}" for kind, text in manifest["actions"].items())
    return f"""# {manifest["policy"]}

A policy for clusters that serve large language models, exported by ServeGym from `{manifest["task"]["env"]}`.

- load: `servegym.runtime.bundle.load_bundle("path/to/this/folder")`, without torch
- observation schema: `{manifest["schema"]["hash"]}` (features, units and scaling in {MANIFEST})
- answer: {manifest["answer"]}
{answers}
- one decision among {decision["instances"]} instances: {decision["p50"]} us (median, {decision["runtime"]})
- fall back to: `{manifest["fallback"]}`
- trained by: `{training["command"]}`
- seed {training["seed"]}, {training["decisions"]} decisions, revision {training["revision"] or "unknown"}
- check: `sha256sum -c {MANIFEST}.sha256`; a correct runtime reproduces {GOLDEN} within {TOLERANCE}
"""
