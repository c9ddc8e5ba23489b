"""A decoder-only transformer over a paged KV cache: RoPE, grouped queries, RMSNorm, SwiGLU.

Two runs of the same request give the same tokens as far as rounding allows. Sums in another order, because
the batch or the chunks of the prompt are others, move logits by about 1e-6 of their size in float32 and 1e-15
in float64; greedy decoding sees that only where the best two logits are closer than that. Nothing else
depends on what is in the batch: preemption, swap, migration and prefix reuse change no value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear, rms_norm, silu

from servegym.envs.costs.profile import Geometry
from servegym.errors import InputError
from servegym.runtime.engine.attention import attend
from servegym.runtime.engine.batch import Batch
from servegym.runtime.engine.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model and the tensors of a Hugging Face checkpoint that are stacked in it, by rows."""

    name: str
    parts: tuple[tuple[str, int], ...]
    columns: int | None  # None for vectors

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all parts, then columns."""
        rows = sum(rows for _, rows in self.parts)
        return (rows,) if self.columns is None else (rows, self.columns)


def parameters(c: ModelConfig) -> Iterator[Parameter]:
    """All tensors of a model; query, key and value are one, and so are gate and up."""
    yield Parameter("embed", (("model.embed_tokens.weight", c.vocabulary),), c.hidden)
    yield Parameter("norm", (("model.norm.weight", c.hidden),), None)
    if not c.tied:
        yield Parameter("head", (("lm_head.weight", c.vocabulary),), c.hidden)
    rows = {"q": c.heads * c.head_dim, "k": c.kv_heads * c.head_dim, "v": c.kv_heads * c.head_dim}
    for i in range(c.layers):
        layer = f"model.layers.{i}."
        qkv = [(f"{layer}self_attn.{x}_proj", n) for x, n in rows.items()]
        yield Parameter(f"{i}.qkv", tuple((f"{name}.weight", n) for name, n in qkv), c.hidden)
        if c.qkv_bias:
            yield Parameter(f"{i}.qkv_bias", tuple((f"{name}.bias", n) for name, n in qkv), None)
        if c.qk_norm:
            for x in "qk":
                yield Parameter(f"{i}.{x}_norm", ((f"{layer}self_attn.{x}_norm.weight", c.head_dim),), None)
        yield Parameter(f"{i}.out", ((f"{layer}self_attn.o_proj.weight", c.hidden),), rows["q"])
        mlp = tuple((f"{layer}mlp.{x}_proj.weight", c.intermediate) for x in ("gate", "up"))
        yield Parameter(f"{i}.gate_up", mlp, c.hidden)
        yield Parameter(f"{i}.down", ((f"{layer}mlp.down_proj.weight", c.hidden),), c.intermediate)
        for x in ("input", "post_attention"):
            yield Parameter(f"{i}.{x}_norm", ((f"{layer}{x}_layernorm.weight", c.hidden),), None)


def geometry(c: ModelConfig, bytes_per_value: int) -> Geometry:
    """The shape of a model as a profile names it."""
    return Geometry(
        c.name, layers=c.layers, hidden=c.hidden, intermediate=c.intermediate, heads=c.heads,
        kv_heads=c.kv_heads, head_dim=c.head_dim, vocabulary=c.vocabulary,
        parameters=sum(math.prod(p.shape) for p in parameters(c)), bytes_per_value=bytes_per_value,
    )  # fmt: skip


class Transformer:
    """A model's weights and its forward pass; instances share it.

    Args:
        device: `cpu` or `cuda`.
        dtype: one of `DTYPES`; float64 is for tests that want every rounding out of the way.
        weights: a folder of safetensors, or the seed of random weights.

    Raises:
        InputError: an unknown dtype or device, what CUDA cannot run, or weights that do not fit the config.
    """

    def __init__(
        self, config: ModelConfig, device: str = "cpu", dtype: str = "float32", weights: str | Path | int = 0
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(config.name, "dtype", dtype, f"choose one of {', '.join(DTYPES)}")
        if device.split(":")[0] not in ("cpu", "cuda"):
            raise InputError(config.name, "device", device, "choose cpu or cuda")
        if device != "cpu" and not torch.cuda.is_available():
            raise InputError(config.name, "device", device, "this torch sees no CUDA device")
        if device != "cpu":
            check_kernel(config, dtype)
        self.config, self.device, self.dtype = config, torch.device(device), DTYPES[dtype]
        # cuDNN would plan anew, for tens of ms, at every new size of a chunk. For the whole process: what
        # `sdpa_kernel` sets is not by thread, and each instance has its own.
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)
        if isinstance(weights, int):
            tensors = random_weights(config, weights, self.device, self.dtype)
        else:
            tensors = stored_weights(config, weights, self.device, self.dtype)
        self.embed, self.norm = tensors["embed"], tensors["norm"]
        self.head = tensors.get("head", self.embed)
        self.layers: list[dict[str, torch.Tensor]] = [{} for _ in range(config.layers)]
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            if part:
                self.layers[int(layer)][part] = tensor if self.device.type == "cuda" else by_column(tensor)
        self.cos, self.sin = rope_tables(config, self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """Logits after each request's last token, [S, vocabulary]; writes the batch's KV to the cache."""
        c = self.config
        turned = c.heads + c.kv_heads  # heads that are rotated: queries and keys
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        x = self.embed[batch.tokens]
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            h = rms_norm(x, (c.hidden,), layer["input_norm"], c.norm_eps)
            qkv = linear(h, layer["qkv"], layer.get("qkv_bias")).view(len(h), -1, c.head_dim)
            qk, v = qkv[:, :turned], qkv[:, turned:]
            if c.qk_norm:
                qk = self._normed(qk, layer)
            qk = rotate(qk, cos, sin)
            keys.flatten(0, 1).index_copy_(0, batch.slots, qk[:, c.heads :])
            values.flatten(0, 1).index_copy_(0, batch.slots, v)
            a = attend(qk[:, : c.heads].contiguous(), keys, values, batch)
            x = x + linear(a.flatten(1), layer["out"])
            h = rms_norm(x, (c.hidden,), layer["post_attention_norm"], c.norm_eps)
            gate, up = linear(h, layer["gate_up"]).chunk(2, -1)
            x = x + linear(silu(gate) * up, layer["down"])
        return linear(rms_norm(x[batch.last], (c.hidden,), self.norm, c.norm_eps), self.head)

    @torch.inference_mode()
    def next_tokens(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """The likeliest token after each request's last, int64 [S], without sampling."""
        return self.forward(batch, cache).argmax(-1)

    def _normed(self, qk: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
        c = self.config
        q = rms_norm(qk[:, : c.heads], (c.head_dim,), layer["q_norm"], c.norm_eps)
        return torch.cat((q, rms_norm(qk[:, c.heads :], (c.head_dim,), layer["k_norm"], c.norm_eps)), 1)


def check_kernel(c: ModelConfig, dtype: str) -> None:
    """Refuse what decode attention on CUDA (`paged_decode`) cannot take.

    Raises:
        InputError: naming the head's size or the dtype.
    """
    if c.head_dim < 16 or c.head_dim & (c.head_dim - 1):
        raise InputError(
            c.name, "head_dim", c.head_dim, "must be a power of two from 16 on CUDA; use the CPU"
        )
    if dtype == "float64":
        raise InputError(c.name, "dtype", dtype, "CUDA takes bfloat16 or float32; use the CPU")


def by_column(weights: torch.Tensor) -> torch.Tensor:
    """The same matrix, stored column by column.

    MKL then takes 20 to 30% less time for 4 to 15 tokens (10% more for fewer, and for 16 to 32), and an
    iteration of 16 tokens no longer takes less than one of 8.
    """
    return weights.t().contiguous().t() if weights.dim() == 2 else weights


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads [tokens, heads, head_dim]; pairs are (k, k + head_dim / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rope_tables(
    c: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [positions, 1, head_dim / 2]."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:  # slow waves are stretched, fast ones kept, those between blended (Llama 3.1)
        s = c.rope_scaling
        turns = s.original_positions * frequency / (2 * math.pi)
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s.factor)
    angle = torch.arange(c.positions, dtype=torch.float64)[:, None, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def random_weights(
    c: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights of unit gain, so that activations neither vanish nor explode and every token has its say.

    Queries have four times that: with uniform attention a long context would average out.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for p in parameters(c):
        if "norm" in p.name:
            tensors[p.name] = torch.ones(p.shape, device=device, dtype=dtype)
            continue
        tensor = torch.empty(p.shape, device=device, dtype=dtype).normal_(generator=generator)
        tensors[p.name] = tensor.div_((p.columns or 1) ** 0.5)
        if p.name.endswith("qkv"):
            tensor[: c.heads * c.head_dim].mul_(4.0)
    return tensors


def stored_weights(
    c: ModelConfig, folder: str | Path, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights from all *.safetensors of a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(folder, "weights", str(folder), "no *.safetensors there")
    places = {
        part: (p.name, row, row + rows)
        for p in parameters(c)
        for (part, rows), row in zip(p.parts, _starts(p), strict=True)
    }
    tensors = {p.name: torch.empty(p.shape, device=device, dtype=dtype) for p in parameters(c)}
    missing = dict.fromkeys(places)
    for file in files:
        try:
            with safe_open(file, "pt", device=str(device)) as shard:
                for part in missing.keys() & set(shard.keys()):
                    name, start, end = places[part]
                    target, found = tensors[name][start:end], shard.get_tensor(part)
                    if found.shape != target.shape:
                        hint = f"the config wants {tuple(target.shape)}"
                        raise InputError(file, part, tuple(found.shape), hint)
                    target.copy_(found)
                    del missing[part]
        except (OSError, SafetensorError) as error:
            raise InputError(file, "file", file.name, f"cannot be read: {error}") from error
    if missing:
        raise InputError(folder, "weights", next(iter(missing)), f"missing, with {len(missing) - 1} others")
    return tensors


def _starts(p: Parameter) -> list[int]:
    return [sum(rows for _, rows in p.parts[:k]) for k in range(len(p.parts))]
