"""Attention over the paged KV cache: torch on any device, a Triton kernel for decodes on CUDA.

Shapes: queries [tokens, heads, head_dim]; one layer's keys and values [blocks, block_tokens, kv_heads,
head_dim]. Heads h * G ... h * G + G - 1 read key head h, with G = heads / kv_heads.
"""

from __future__ import annotations

import threading

import torch
from torch.nn.functional import scaled_dot_product_attention

from servegym.runtime.engine.batch import Batch, Chunk


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Attention of a whole batch, whose own keys and values are in the cache already."""
    decodes = len(batch.tables)
    if not batch.chunks:
        return _decode(q, keys, values, batch)
    parts = [_decode(q[:decodes], keys, values, batch)] if decodes else []
    parts += [prefill(q[c.start : c.end], keys, values, c) for c in batch.chunks]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> torch.Tensor:
    if batch.mask is not None:
        return gathered_decode(q, keys, values, batch.tables, batch.mask)
    from servegym.runtime.engine.paged_decode import paged_decode  # Triton comes with torch for CUDA only

    return paged_decode(q, keys, values, batch.tables, batch.lengths)


def gathered_decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """One query a request: gather its blocks, then attend with the group of heads in place of a sequence.

    All requests are padded to the longest, so that the time grows with batch times longest context.
    """
    (n, heads, dim), kv_heads = q.shape, keys.shape[2]
    k, v = (x.view(n, -1, kv_heads, dim).transpose(1, 2) for x in gather(keys, values, tables.view(-1)))
    out = scaled_dot_product_attention(q.view(n, kv_heads, heads // kv_heads, dim), k, v, attn_mask=mask)
    return out.reshape(n, heads, dim)


def prefill(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """A chunk of a prompt attends to what is before it and, causally, to itself."""
    (new, heads, dim), kv_heads = q.shape, keys.shape[2]
    total = chunk.past + new
    k, v = (
        x.view(-1, kv_heads, dim)[:total].transpose(0, 1)[:, None] for x in gather(keys, values, chunk.table)
    )
    # Key heads in place of a batch: the heads of a group then share keys without a copy.
    grouped = q.view(new, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    k, v = k.expand(-1, heads // kv_heads, -1, -1), v.expand(-1, heads // kv_heads, -1, -1)
    out = scaled_dot_product_attention(
        grouped, k, v, attn_mask=chunk.mask, is_causal=chunk.mask is None
    )  # [kv_heads, group, new, dim]
    return out.permute(2, 0, 1, 3).reshape(new, heads, dim)


_scratch = threading.local()


def gather(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some blocks, [blocks, block_tokens, kv_heads, head_dim]; valid until the next call.

    On the CPU they go to buffers that the thread keeps: fresh memory costs a page fault each 4 KiB, twenty
    times the copy itself.
    """
    if keys.is_cuda:
        return keys[blocks], values[blocks]
    size = keys[0].numel() * len(blocks)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.dtype != keys.dtype or buffer.shape[1] < size:
        _scratch.buffer = buffer = torch.empty(2, 2 * size, dtype=keys.dtype)
    shape = (len(blocks), *keys.shape[1:])
    return tuple(
        torch.index_select(cache, 0, blocks, out=half[:size].view(shape))
        for cache, half in zip((keys, values), buffer, strict=True)
    )  # type: ignore[return-value]
