"""A model's geometry, read from a Hugging Face config.json: Llama, Qwen2 and Qwen3."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegym.errors import InputError

SHIPPED = Path(__file__).parent / "configs"
FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of slow rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """What the transformer needs to know of its shape.

    Attributes:
        qkv_bias: query, key and value projections have a bias (Qwen2).
        qk_norm: queries and keys are normalised per head (Qwen3).
        tied: the output head is the embedding.
        raw: config.json as it was read.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    raw: dict[str, Any]


def config_names() -> list[str]:
    """Names of the shipped configs, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_config(name_or_path: str | Path) -> ModelConfig:
    """A shipped config by name, a config.json, or a folder that has one.

    Raises:
        InputError: nothing there, not JSON, another family, or a field that is missing or does not fit.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path, name = path / "config.json", path.resolve().name
    elif path.suffix == ".json":
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
    else:
        name, path = str(name_or_path), SHIPPED / f"{name_or_path}.json"
        if not path.is_file():
            hint = f"give a config.json, a folder that has one, or one of: {', '.join(config_names())}"
            raise InputError("model", "config", name, hint)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, "file", path.name, f"cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(path, "file", type(raw).__name__, "must be a JSON object")
    return _Reader(path, raw).config(name)


class _Reader:
    """Fields of a config.json with their checks."""

    def __init__(self, where: Path, raw: dict[str, Any]) -> None:
        self.where, self.raw = where, raw

    def refuse(self, field: str, hint: str) -> InputError:
        return InputError(self.where, field, self.raw.get(field), hint)

    def number(self, field: str, default: float | None = None, source: dict[str, Any] | None = None) -> float:
        value = (self.raw if source is None else source).get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(self.where, field, value, "must be a positive number")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.number(field, default)
        if value != int(value):
            raise self.refuse(field, "must be an integer")
        return int(value)

    def config(self, name: str) -> ModelConfig:
        family = self.raw.get("model_type")
        if family not in FAMILIES:
            raise self.refuse("model_type", f"this runtime knows {', '.join(FAMILIES)}")
        if self.raw.get("hidden_act", "silu") != "silu":
            raise self.refuse("hidden_act", "this runtime knows silu")
        for field in ("use_sliding_window", "mlp_bias", "quantization_config"):
            if self.raw.get(field):
                raise self.refuse(field, "this runtime has none")
        if self.raw.get("attention_bias") and family != "qwen2":
            raise self.refuse("attention_bias", "this runtime has it for qwen2 only")
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        head_dim = self.integer("head_dim", max(hidden // heads, 1))
        if heads % kv_heads:
            raise self.refuse("num_key_value_heads", f"must divide num_attention_heads ({heads})")
        if head_dim % 2:
            raise self.refuse("head_dim", "must be even for rotary embeddings")
        theta, scaling = self.rope()
        return ModelConfig(
            name, family, self.integer("num_hidden_layers"), hidden, self.integer("intermediate_size"),
            heads, kv_heads, head_dim, self.integer("vocab_size"),
            self.integer("max_position_embeddings", 2048), self.number("rms_norm_eps", 1e-6), theta, scaling,
            qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
            tied=bool(self.raw.get("tie_word_embeddings", False)), raw=self.raw,
        )  # fmt: skip

    def rope(self) -> tuple[float, RopeScaling | None]:
        """Base and scaling; transformers 5 keeps both in `rope_parameters`."""
        field = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        scaling = self.raw.get(field) or {}
        if not isinstance(scaling, dict):
            raise self.refuse(field, "must be a JSON object")
        theta = self.number("rope_theta", scaling.get("rope_theta", 10_000.0))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise self.refuse(field, "this runtime knows the rope types default and llama3")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, positions = (self.number(name, source=scaling) for name in names)
        if high <= low:
            raise self.refuse(field, "high_freq_factor must exceed low_freq_factor")
        return theta, RopeScaling(factor, low, high, int(positions))
