"""The bundle: a trained policy as a folder that needs neither torch nor trust.

    policy.onnx           logits [C, 1] of one question; numbers of instances and candidates vary
    policy.safetensors    the same weights, for the numpy form and for other runtimes
    golden.safetensors    observations with the logits and answers that a correct runtime gives
    manifest.json         what the policy sees and answers, its origin, the SHA-256 of the other files
    manifest.json.sha256  the SHA-256 of the manifest, as sha256sum writes it
    README.md             the same for people

`servegym.runtime.graph` says what the graph reads, `servegym.runtime.feed` makes it of an observation.
Nothing is unpickled. A changed byte, another observation schema or a wrong golden answer is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors import SafetensorError
from safetensors.numpy import load_file

from servegym.agents.policy import Observation
from servegym.agents.task import Task, read_task
from servegym.envs.cluster.decisions import kinds_of
from servegym.envs.cluster.schema import schema_hash
from servegym.errors import InputError
from servegym.models.features import ARRAYS, ILLEGAL
from servegym.runtime.feed import Scorer

FORMAT = 4
MANIFEST, WEIGHTS, GRAPH, GOLDEN, CARD = (
    "manifest.json",
    "policy.safetensors",
    "policy.onnx",
    "golden.safetensors",
    "README.md",
)
TOLERANCE = 1e-4  # absolute and relative, on logits; float32 sums in another order differ by about 1e-6


class BundlePolicy:
    """An exported policy in ONNX Runtime; one thread, so that a decision's time is predictable.

    Any thread may ask; one after the other they use the same memory.

    Attributes:
        name: the policy's name in tables.
        manifest: what manifest.json says.
        task: what it was trained for.
        kinds: the questions that it answers.
        rows: request rows R of the observations that it reads.
    """

    needs_oracle = False

    def __init__(self, graph: Path, manifest: dict[str, Any], task: Task) -> None:
        self.name = str(manifest["policy"])
        self.manifest = manifest
        self.task = task
        self.kinds = kinds_of(task.decisions)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_reuse = False  # 10% faster; what is in between takes some 100 kB
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._lock, self._scorer = threading.Lock(), Scorer(session)
        self.rows = self._scorer.rows

    def reset(self, lanes: int, seed: int) -> None:
        """Nothing to forget: the policy has no memory."""

    def logits(self, obs: Observation) -> np.ndarray:
        """Scores of all candidates, float32 [B, C]; illegal ones have -1e9.

        Raises:
            InputError: for an observation of more request rows.
        """
        out = np.full(obs["mask"].shape, ILLEGAL, np.float32)
        for lane in range(len(out)):
            with self._lock:
                legal, scores = self._scorer.score({name: obs[name][lane : lane + 1] for name in ARRAYS})
                out[lane, legal] = scores
        return out

    def act(self, obs: Observation) -> np.ndarray:
        """The legal candidate of the highest score, int64 [B].

        Raises:
            FloatingPointError: that score is not finite.
        """
        if len(obs["kind"]) > 1:
            scores = self.logits(obs)
            answers = scores.argmax(axis=1)  # NaN, where there is one
            for row, answer in zip(scores, answers, strict=True):
                _require_finite(row[answer])
            return answers
        with self._lock:
            legal, scores = self._scorer.score(obs)
            best = scores.argmax()
            _require_finite(scores[best])
        return legal[best : best + 1]


def _require_finite(score: float) -> None:
    if not math.isfinite(score):  # of one number ten times as fast as numpy
        raise FloatingPointError("a score is not finite")


def load_bundle(folder: str | Path) -> BundlePolicy:
    """Load an exported policy after checking format, hashes, schema and golden answers.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        _check_hash(folder / name, expected)
    observed = manifest["schema"].get("hash")
    if observed != schema_hash():
        hint = f"this version observes {schema_hash()}; export the checkpoint again with it"
        raise InputError(folder / MANIFEST, "schema.hash", observed, hint)
    task = read_task(folder / MANIFEST, manifest["task"])
    try:
        policy = BundlePolicy(folder / GRAPH, manifest, task)
    except Exception as error:  # onnxruntime's errors have no common base class
        raise InputError(
            folder / GRAPH, "graph", str(error).splitlines()[0], "export the bundle again"
        ) from error
    for group in read_golden(folder / GOLDEN):
        check_golden(folder / GRAPH, policy.logits(group), group)
    return policy


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (Path(folder) / MANIFEST).is_file()


def sha256(path: Path) -> str:
    """Hex digest of a file.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(path, "file", error.strerror, _why_unread(error)) from error


def _why_unread(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "not readable by this user"
    return "the bundle is incomplete; export it again"


def _check_hash(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise InputError(path, "sha256", found, f"expected {expected}; the file was changed after export")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    found = sha256(path)
    try:
        expected = (folder / f"{MANIFEST}.sha256").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(folder, f"{MANIFEST}.sha256", str(error), _why_unread(error)) from error
    if expected != digest_line(found):
        raise InputError(
            path, "sha256", found, f"{MANIFEST}.sha256 says otherwise; the file was changed after export"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, "JSON", str(error), "the bundle is damaged; export it again") from error
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: Any) -> None:
    """Refuse a manifest that lacks what loading relies on, or that vouches for other files."""
    hint = "the bundle is damaged; export it again"
    if not isinstance(manifest, dict):
        raise InputError(path, "JSON", type(manifest).__name__, hint)
    if manifest.get("format") != FORMAT:
        raise InputError(path, "format", manifest.get("format"), f"this version reads format {FORMAT}")
    for name, kind in (("policy", str), ("schema", dict), ("files", dict), ("task", dict)):
        if not isinstance(manifest.get(name), kind):
            raise InputError(path, name, manifest.get(name), hint)
    if set(manifest["files"]) != {GRAPH, WEIGHTS, GOLDEN, CARD}:
        expected = ", ".join((GRAPH, WEIGHTS, GOLDEN, CARD))
        raise InputError(path, "files", sorted(manifest["files"]), f"expected {expected}")


def digest_line(digest: str) -> str:
    """The manifest's line as sha256sum writes it."""
    return f"{digest}  {MANIFEST}\n"


def read_golden(path: Path) -> list[dict[str, np.ndarray]]:
    """The golden groups, one a shape: arrays of an observation with `logits` [B, C] and `answers` [B].

    Raises:
        InputError: for a file that is not safetensors.
    """
    try:
        flat = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(path, "safetensors", str(error), "the bundle is damaged; export it again") from error
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in flat.items():
        group, name = key.split(".", 1)
        groups.setdefault(group, {})[name] = array
    return [groups[key] for key in sorted(groups)]


def check_golden(where: object, logits: np.ndarray, golden: dict[str, np.ndarray]) -> None:
    """Compare the scores of a runtime with the golden ones on legal candidates.

    Raises:
        InputError: naming the largest deviation.
    """
    legal = golden["mask"] != 0
    expected = golden["logits"]
    if logits.shape != expected.shape:
        raise InputError(where, "golden logits", logits.shape, f"expected shape {expected.shape}")
    deviation = np.abs(logits - expected)[legal] - TOLERANCE * np.abs(expected)[legal]
    if not (deviation <= TOLERANCE).all():
        raise InputError(where, "golden logits", float(deviation.max()), f"deviate by more than {TOLERANCE}")
    chosen = np.take_along_axis(expected, golden["answers"][:, None], 1)
    own = np.take_along_axis(expected, logits.argmax(axis=1)[:, None], 1)
    if not (chosen - own <= TOLERANCE * (1 + np.abs(chosen))).all():
        raise InputError(
            where, "golden answers", logits.argmax(axis=1).tolist(), f"expected {golden['answers'].tolist()}"
        )
