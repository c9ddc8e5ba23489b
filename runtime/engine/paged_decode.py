"""Decode attention that reads the paged cache in place: a Triton kernel, split along the context.

One program takes one request, one key head with its group of query heads, and one part of the context; a
second kernel joins the parts. Splits keep a GPU busy with few long requests, which alone would occupy few of
its processors (Flash-Decoding). Empty parts leave at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LEAST_TOKENS = 512  # context of a part, unless there are as many parts as may be
LEAST_SPLITS, MOST_SPLITS = 4, 32
PROGRAMS = 4096  # enough for any GPU
TILE_TOKENS = 64  # read at once


@triton.jit(do_not_specialize=["table_stride"])  # which changes with the longest context of a batch
def _part(
    q, keys, values, tables, lengths, parts, scale,
    table_stride, block_stride, token_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention of one request's group of heads to one part of its context: running maximum, sum, output."""
    # Heads first: they read neighbouring memory of the same blocks.
    head, request, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request)
    part_tokens = tl.maximum(LEAST, tl.cdiv(length, SPLITS))
    begin = split * part_tokens
    end = tl.minimum(begin + part_tokens, length)
    if begin < end:
        group: tl.constexpr = HEADS // KV_HEADS
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, DIM)
        mine = rows < group
        at = (request * HEADS + head * group + rows).to(tl.int64)
        query = tl.load(q + at[:, None] * DIM + dims, mask=mine[:, None], other=0.0)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, DIM], tl.float32)
        for start in range(begin, end, TILE):
            tokens = start + tl.arange(0, TILE)
            inside = tokens < end
            block = tl.load(
                tables + request.to(tl.int64) * table_stride + tokens // BLOCK, mask=inside, other=0
            )
            place = block.to(tl.int64) * block_stride + (tokens % BLOCK) * token_stride + head * DIM
            k = tl.load(keys + place[:, None] + dims, mask=inside[:, None], other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(inside[None, :], score, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            fade = tl.exp(top - new_top)
            weight = tl.exp(score - new_top[:, None])
            v = tl.load(values + place[:, None] + dims, mask=inside[:, None], other=0.0)
            out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            total = total * fade + tl.sum(weight, 1)
            top = new_top
        # A row of `parts`: the output of the part, its maximum and its sum.
        row = parts + (at * SPLITS + split) * (DIM + 2)
        tl.store(row[:, None] + dims, out, mask=mine[:, None])
        tl.store(row + DIM, top, mask=mine)
        tl.store(row + DIM + 1, total, mask=mine)


@triton.jit
def _join(
    parts, lengths, result,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Parts of one head of one request, weighted by their sums."""
    request, head = tl.program_id(0), tl.program_id(1)
    at = (request * HEADS + head).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    length = tl.load(lengths + request)
    used = splits * tl.maximum(LEAST, tl.cdiv(length, SPLITS)) < length
    row = parts + (at * SPLITS + splits) * (DIM + 2)
    top = tl.load(row + DIM, mask=used, other=-float("inf"))
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(row + DIM + 1, mask=used, other=0.0), 0)
    dims = tl.arange(0, DIM)
    out = tl.load(row[:, None] + dims, mask=used[:, None], other=0.0)
    out = tl.sum(out * weight[:, None], 0) / total
    tl.store(result + at * DIM + dims, out.to(result.dtype.element_ty))


def paged_decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """One query a request against its blocks.

    Args:
        q: [n, heads, head_dim]; head_dim a power of two from 16.
        keys, values: [blocks, block_tokens, kv_heads, head_dim], with equal strides.
        tables: int64 [n, width], each request's blocks; entries beyond its length are not read.
        lengths: int32 [n], at least 1.

    Returns:
        like q.
    """
    n, heads, dim = q.shape
    block_tokens, kv_heads = keys.shape[1:3]
    # By the batch, not by the lengths: a captured graph must launch the same for any of these.
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, n * kv_heads))
    splits = max(LEAST_SPLITS, min(MOST_SPLITS, wanted))
    parts = torch.empty(n * heads * splits * (dim + 2), dtype=torch.float32, device=q.device)
    result = torch.empty_like(q)
    _part[(kv_heads, n, splits)](
        q, keys, values, tables, lengths, parts, dim**-0.5,
        tables.stride(0), keys.stride(0), keys.stride(1),
        heads, kv_heads, dim, block_tokens, max(16, triton.next_power_of_2(heads // kv_heads)), splits,
        LEAST_TOKENS, TILE_TOKENS,
        num_warps=4,
    )  # fmt: skip
    _join[(n, heads)](parts, lengths, result, heads, dim, splits, LEAST_TOKENS)
    return result
