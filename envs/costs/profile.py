"""A profile: what one engine replica costs, measured once, kept as JSON and checked on load."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from servegym.envs.costs.reading import number, read_dataclass, rising
from servegym.errors import InputError

SCHEMA = 1
SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Geometry:
    """A language model's shape, whole model, before tensor parallelism."""

    name: str
    layers: int = number(1)
    hidden: int = number(1)
    intermediate: int = number(1)
    heads: int = number(1)
    kv_heads: int = number(1)
    head_dim: int = number(1)
    vocabulary: int = number(1)
    parameters: int = number(1)
    bytes_per_value: int = number(1, 8)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.bytes_per_value


@dataclass(frozen=True)
class Device:
    """The accelerator; `memory_bytes` is that of one of them."""

    name: str
    memory_bytes: int = number(1)


@dataclass(frozen=True)
class Curve:
    """Piecewise-linear cost: microseconds `us` at the rising integers `at`."""

    at: tuple[int, ...]
    us: tuple[float, ...]

    def check(self, where: object, path: str) -> None:
        """Raise `InputError` unless `at` rises from 0 or more and every cost is finite and not negative."""
        rising(where, f"{path}.at", self.at)
        _costs(where, f"{path}.us", self.us, len(self.at))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Microseconds at `x`; the last segment extends beyond the last point, the first value before it."""
        return extended(np.asarray(self.at), np.asarray(self.us), np.asarray(x))


@dataclass(frozen=True)
class Surface:
    """Bilinear cost: microseconds `us[row][column]` at rising integers."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    us: tuple[tuple[float, ...], ...]

    def check(self, where: object, path: str) -> None:
        """Raise `InputError` for axes that do not rise from 0, a wrong shape or a bad cost."""
        for name, axis in (("rows", self.rows), ("columns", self.columns)):
            rising(where, f"{path}.{name}", axis)
            if len(axis) < 2 or axis[0] != 0:
                raise InputError(where, f"{path}.{name}", list(axis[:2]), "needs two points, the first 0")
        if len(self.us) != len(self.rows):
            raise InputError(where, f"{path}.us", len(self.us), f"needs {len(self.rows)} rows")
        for i, row in enumerate(self.us):
            _costs(where, f"{path}.us[{i}]", row, len(self.columns))


@dataclass(frozen=True)
class Link:
    """A way for bytes to travel: seconds a call, bytes a second, and the part hidden under compute."""

    seconds_per_call: float = number(0.0)
    bytes_per_second: float = number(1.0)
    overlap: float = number(0.0, 1.0, default=0.0)


@dataclass(frozen=True)
class Start:
    """Seconds that a new engine spends in each stage before it serves."""

    bootstrap_s: float = number(0.0)
    weights_s: float = number(0.0)
    compile_s: float = number(0.0)
    memory_profile_s: float = number(0.0)
    graph_capture_s: float = number(0.0)
    other_s: float = number(0.0)


@dataclass(frozen=True)
class Error:
    """Relative error of one part on shapes that are no knots of it, in percent."""

    shapes: int = number(0)
    median_percent: float = number(0.0)
    p90_percent: float = number(0.0)
    max_percent: float = number(0.0)


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from.

    Attributes:
        held_out: error by part (linear, head, prefill_attention, decode_attention, ...) on held-out shapes.
        notes: what was derived or assumed, one sentence each.
    """

    source: str
    software: str
    date: str
    held_out: dict[str, Error] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """Costs of one engine replica: a model on `tensor_parallel` devices. Costs are of whole iterations.

    Attributes:
        kv_blocks: KV cache capacity in blocks of `block_tokens` tokens.
        token_budget, max_seqs: the engine's defaults for tokens and sequences in an iteration.
        overhead_us: fixed cost of an iteration.
        linear: linear layers, norms and activations, by tokens in the batch.
        collective: tensor-parallel collectives, by tokens in the batch.
        head: output head and sampler, by sequences.
        prefill_attention: by chunk (rows) and earlier tokens (columns), one sequence.
        decode_attention: by batch (rows) and mean context (columns).
        decode_skew: microseconds per token by which the longest context exceeds the mean, by batch.
        mixed_attention, mixed_skew: the same for decodes in an iteration that also prefills; None: as alone.
        mixed_launch_us: microseconds per decode and token of the longest chunk of such an iteration.
        chunked_us: microseconds that an iteration with prefill chunks takes beyond one without, whatever its
            tokens: an engine that replays CUDA graphs for decodes alone launches such an iteration eagerly.
        swap: device to host and back. network: replica to replica. start: a cold engine, by stage.
    """

    name: str
    model: Geometry
    device: Device
    tensor_parallel: int = number(1)
    kv_blocks: int = number(1)
    block_tokens: int = number(1)
    token_budget: int = number(1)
    max_seqs: int = number(1)
    overhead_us: float = number(0.0, default=0.0)
    linear: Curve = field(kw_only=True)
    collective: Curve | None = field(kw_only=True, default=None)
    head: Curve = field(kw_only=True)
    prefill_attention: Surface = field(kw_only=True)
    decode_attention: Surface = field(kw_only=True)
    decode_skew: Curve | None = field(kw_only=True, default=None)
    mixed_attention: Surface | None = field(kw_only=True, default=None)
    mixed_skew: Curve | None = field(kw_only=True, default=None)
    mixed_launch_us: float = number(0.0, default=0.0)
    chunked_us: float = number(0.0, default=0.0)
    swap: Link | None = field(kw_only=True, default=None)
    network: Link | None = field(kw_only=True, default=None)
    start: Start | None = field(kw_only=True, default=None)
    provenance: Provenance = field(kw_only=True)

    @property
    def kv_tokens(self) -> int:
        """KV cache capacity in tokens."""
        return self.kv_blocks * self.block_tokens

    def check(self, where: object, path: str) -> None:
        """Raise `InputError` where fields contradict each other."""
        if self.model.kv_heads > self.model.heads:
            raise InputError(where, "model.kv_heads", self.model.kv_heads, "cannot exceed model.heads")
        mixed = self.mixed_attention
        if mixed is not None and mixed.columns != self.decode_attention.columns:
            raise InputError(where, "mixed_attention.columns", None, "must be those of decode_attention")
        if self.token_budget < self.max_seqs:
            raise InputError(where, "token_budget", self.token_budget, "must be at least max_seqs")


def extended(at: np.ndarray, us: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Linear interpolation whose last segment goes on beyond the table, constant before it."""
    inside = np.interp(x, at, us)
    if len(at) < 2:
        return inside
    slope = (us[-1] - us[-2]) / (at[-1] - at[-2])
    return np.where(x > at[-1], us[-1] + max(slope, 0.0) * (x - at[-1]), inside)


def profile_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def profile_path(name_or_path: str | Path) -> Path:
    """The file of a shipped profile, or the path that was given.

    Raises:
        InputError: unknown name.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SHIPPED / f"{name_or_path}.json"
        if not path.is_file():
            known = ", ".join(profile_names())
            raise InputError("profile", "name", str(name_or_path), f"give a .json file or one of: {known}")
    return path


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name, or one from a JSON file.

    Raises:
        InputError: unknown name, unreadable file, other schema version, or a field that does not fit.
    """
    path = profile_path(name_or_path)
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise InputError(path, "file", path.name, f"cannot be read: {error}") from error
    return _read(path, modified)


@lru_cache(maxsize=32)
def _read(path: Path, modified: int) -> Profile:
    """The profile as the file stood at `modified`; checking it takes longer than a short simulation."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, "file", path.name, f"cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            path, "schema", found, f"this version reads schema {SCHEMA}; build the profile again"
        )
    return read_dataclass(Profile, {key: value for key, value in data.items() if key != "schema"}, path)


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write `profile` as JSON, one axis or table row a line."""
    text = _render({"schema": SCHEMA, **asdict(profile)})
    target = Path(path)
    try:
        partial = target.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise InputError(target, "file", target.name, f"cannot be written: {error}") from error


def _render(value: object, indent: int = 0) -> str:
    """JSON with nested objects and tables on lines of their own and plain lists on one."""
    pad = " " * (indent + 1)
    if isinstance(value, dict) and value:
        items = (f"{pad}{json.dumps(key)}: {_render(item, indent + 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple, str)):
        return "[\n" + ",\n".join(pad + json.dumps(item) for item in value) + "\n" + " " * indent + "]"
    return json.dumps(value, allow_nan=False)


def _costs(where: object, path: str, us: tuple[float, ...], length: int) -> None:
    if len(us) != length:
        raise InputError(where, path, len(us), f"needs {length} numbers, one for each point")
    for i, value in enumerate(us):
        if not 0 <= value < 1e12:
            raise InputError(where, f"{path}[{i}]", value, "must be finite and not negative, microseconds")
