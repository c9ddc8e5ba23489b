"""Decode attention against its reference; the Triton kernel by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from servegym.runtime.engine.attention import gathered_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # heads, kv_heads, head_dim, block_tokens, table width
    (8, 2, 64, 16, 12),
    (4, 4, 16, 1, 70),
    (6, 2, 32, 4, 60),
    (8, 2, 128, 16, 9),
]


def plain_decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Decode attention a request at a time, in float64."""
    group = q.shape[1] // keys.shape[2]
    rows = []
    for query, table, length in zip(q.double(), tables, lengths.tolist(), strict=True):
        k, v = (
            cache[table].flatten(0, 1)[:length].double().repeat_interleave(group, 1)
            for cache in (keys, values)
        )
        weights = (torch.einsum("hd,thd->ht", query, k) / query.shape[-1] ** 0.5).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(rows).to(q.dtype)


def case(heads, kv_heads, dim, block_tokens, width, dtype, device="cpu"):
    """Three requests of the least, the most and some context, in scattered blocks among others' garbage."""
    generator = torch.Generator().manual_seed(heads)
    blocks = 3 * width + 2
    cache = torch.randn(2, blocks, block_tokens, kv_heads, dim, generator=generator).to(device, dtype)
    q = torch.randn(3, heads, dim, generator=generator).to(device, dtype)
    tables = torch.randperm(blocks, generator=generator)[: 3 * width].view(3, width).to(device)
    lengths = torch.tensor([1, width * block_tokens, width * block_tokens // 2 + 1], dtype=torch.int32)
    return q, *cache, tables, lengths.to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_decode(shape):
    q, keys, values, tables, lengths = case(*shape, torch.float32)
    mask = torch.arange(tables.shape[1] * keys.shape[1]) < lengths[:, None]
    out = gathered_decode(q, keys, values, tables, mask[:, None, None])
    torch.testing.assert_close(out, plain_decode(q, keys, values, tables, lengths), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def paged_decode():
    """The kernel, compiled for a GPU or interpreted (tests/conftest.py)."""
    pytest.importorskip("triton")
    from servegym.runtime.engine import paged_decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_decode, "LEAST_TOKENS", 64)  # contexts that an interpreter can do have parts, too
        yield paged_decode.paged_decode


# The interpreter multiplies the bits of bfloat16 as integers; on a GPU it is what models use.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_paged_decode(paged_decode, shape, dtype):
    q, keys, values, tables, lengths = case(*shape, dtype, DEVICE)
    out = paged_decode(q, keys, values, tables, lengths)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    expected = plain_decode(q, keys, values, tables, lengths)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_paged_decode_reads_no_further_than_it_should(paged_decode):
    """Neither blocks beyond a request's length nor table entries that name none."""
    q, keys, values, tables, lengths = case(4, 2, 64, 16, 10, torch.float32, DEVICE)
    expected = paged_decode(q, keys, values, tables, lengths)
    used = -(-lengths // 16)
    mine = torch.cat([table[:n] for table, n in zip(tables, used.tolist(), strict=True)])
    spoiled = torch.ones(len(keys), dtype=torch.bool, device=DEVICE)
    spoiled[mine] = False
    for cache in (keys, values):
        cache[spoiled] = float("nan")
    for table, n in zip(tables, used.tolist(), strict=True):
        table[n:] = 10**6
    assert torch.equal(paged_decode(q, keys, values, tables, lengths), expected)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from servegym.runtime.engine import paged_decode as room

def compiled(kernel, pointers, integers, **constants):
    signature = {**pointers, **integers, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    aligned = [n for n in names if n in pointers or n in ("block_stride", "token_stride")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

pointers = {**dict.fromkeys(("q", "keys", "values"), "*bf16"), "tables": "*i64", "lengths": "*i32"}
pointers["parts"] = "*fp32"
integers = {"scale": "fp32", "table_stride": "i32", "block_stride": "i32", "token_stride": "i32"}
part = compiled(
    room._part, pointers, integers, HEADS=32, KV_HEADS=8, DIM=128, BLOCK=16, ROWS=16, SPLITS=8,
    LEAST=room.LEAST_TOKENS, TILE=room.TILE_TOKENS,
)
outputs = {"parts": "*fp32", "lengths": "*i32", "result": "*bf16"}
join = compiled(room._join, outputs, {}, HEADS=32, DIM=128, SPLITS=8, LEAST=room.LEAST_TOKENS)
print(part.metadata.shared, join.metadata.shared)
"""


def test_the_kernel_compiles_for_a_gpu_that_is_not_here():
    """Llama-3.1-8B's, for Hopper; in a process of its own, since here Triton may interpret."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = [int(part) for part in done.stdout.split()]
    assert max(shared) < 64 << 10  # three programs and more fit a processor, which has 228 KiB
    assert shared[0] > 2 * 128 * 64 * 2  # keys and values are read ahead
