"""One iteration's inputs as tensors: decodes first, one token each, then the chunks of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right

from servegym.runtime.engine.request import Request


@dataclass
class Chunk:
    """Tokens [start, end) of the batch, one request's; they attend to `past` earlier tokens and themselves.

    Attributes:
        table: int64, the blocks of all of its tokens.
        mask: [end - start, past + end - start], what each token attends to: bool, on CUDA a bias that
            FlashAttention need not read; None where `past` is 0.
    """

    start: int
    end: int
    past: int
    table: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Batch:
    """N tokens of S requests, the first B of which decode.

    Attributes:
        tokens, positions: int64 [N].
        slots: int64 [N], where the KV of each token goes: block * block_tokens + offset.
        tables: int64 [B, W], the blocks of the decoding requests; beyond a request's own any valid block.
        lengths: int32 [B], KV tokens that each decode reads, its own included.
        mask: bool [B, 1, 1, W * block_tokens], the tokens that each decode reads; None on CUDA.
        last: int64 [S], each request's last token in the batch.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor | None
    last: torch.Tensor
    chunks: list[Chunk] = field(default_factory=list)


def build_batch(
    decodes: list[Request], chunks: list[tuple[Request, int]], block_tokens: int, device: torch.device
) -> Batch:
    """The batch of an iteration in which `decodes` compute one token and each chunk so many."""
    at = np.array([r.computed for r in decodes], np.int64)
    width = int(at.max()) // block_tokens + 1 if decodes else 1
    tables = np.zeros((len(decodes), width), np.int64)
    for row, r in zip(tables, decodes, strict=True):
        row[: r.blocks] = r.table[: r.blocks]
    tokens = [np.array([r.ids[r.computed] for r in decodes], np.int64)]
    positions = [at]
    slots = [tables[np.arange(len(decodes)), at // block_tokens] * block_tokens + at % block_tokens]
    for r, new in chunks:
        span = np.arange(r.computed, r.computed + new)
        tokens.append(r.ids[r.computed : r.computed + new])
        positions.append(span)
        slots.append(r.table[span // block_tokens] * block_tokens + span % block_tokens)
    ends = np.cumsum([len(decodes), *(new for _, new in chunks)])
    packed = torch.from_numpy(np.concatenate([np.concatenate(p) for p in (tokens, positions, slots)]))
    on_cpu = device.type == "cpu"
    lengths = at + 1
    mask = np.arange(width * block_tokens) < lengths[:, None] if on_cpu else None
    token, position, slot = packed.to(device, non_blocking=True).view(3, -1)
    return Batch(
        tokens=token,
        positions=position,
        slots=slot,
        tables=torch.from_numpy(tables).to(device, non_blocking=True),
        lengths=torch.from_numpy(lengths.astype(np.int32)).to(device, non_blocking=True),
        mask=None if mask is None else torch.from_numpy(mask)[:, None, None],
        last=torch.from_numpy(np.concatenate([np.arange(len(decodes)), ends[1:] - 1])).to(device),
        chunks=[
            _chunk(r, new, int(end), block_tokens, device)
            for (r, new), end in zip(chunks, ends[1:], strict=True)
        ],
    )


def _chunk(r: Request, new: int, end: int, block_tokens: int, device: torch.device) -> Chunk:
    total = r.computed + new
    table = torch.from_numpy(r.table[: -(-total // block_tokens)]).to(device)
    return Chunk(end - new, end, r.computed, table, _mask(r.computed, total, device) if r.computed else None)


def _mask(past: int, total: int, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return causal_lower_right(total - past, total)
    return torch.arange(total) <= torch.arange(past, total)[:, None]
