"""LLaMA-7B on A10 from the figures that Llumnix (OSDI'24) published, for comparison with that system.

Figure 10 gives, for requests of 256 to 8192 tokens, the time of a decode step and of a prefill (recompute);
the copy of a request over the network is fitted to a line.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.costs.fitting import as_curve, as_surface, relative_error
from servegym.envs.costs.geometry import GIB, geometry
from servegym.envs.costs.profile import Device, Error, Link, Profile, Provenance

LENGTHS = np.asarray([256, 512, 1024, 2048, 4096, 8192])
DECODE_MS = np.asarray([52.0, 47.0, 44.3, 43.6, 43.3, 43.5])
PREFILL_MS = np.asarray([58.0, 110.0, 220.0, 436.0, 940.0, 1995.0])
BATCHED_TOKENS = 8192
BANDWIDTH = 600e9  # bytes/s, data sheet of the A10
KV_TOKENS = 13_616  # 851 blocks of 16: a 24 GB A10 at 90% less weights and activations
COPY_S, COPY_S_PER_TOKEN = 15e-3, 0.211e-3  # blocking copy of a request, 64 Gb/s network


def build_llumnix() -> Profile:
    """The profile `a10-llama-7b`; fitted to every other length, its error is that on the rest."""
    model = geometry("llama-7b")
    kept, rest = np.arange(0, 6, 2), np.arange(1, 6, 2)
    batch = BATCHED_TOKENS / LENGTHS
    # A step is fixed time + time a sequence + the KV cache's bytes over the bandwidth.
    context_us = model.kv_bytes_per_token / BANDWIDTH * 1e6
    per_sequence, base = np.polyfit(batch[kept], DECODE_MS[kept], 1)
    fixed_us = base * 1e3 - context_us * BATCHED_TOKENS
    weights = 1 / PREFILL_MS[kept]  # relative errors count
    quadratic, linear, start = np.polyfit(LENGTHS[kept], PREFILL_MS[kept], 2, w=weights)
    prefill = np.polyval([quadratic, linear, start], LENGTHS)
    held_out = {
        "decode_step": relative_error(base + per_sequence * batch[rest], DECODE_MS[rest]),
        "prefill": relative_error(prefill[rest], PREFILL_MS[rest]),
    }
    return _profile(fixed_us, per_sequence * 1e3, context_us, (start, linear, quadratic), held_out)


def _profile(
    fixed_us: float,
    sequence_us: float,
    context_us: float,
    prefill_ms: tuple[float, float, float],
    held_out: dict[str, Error],
) -> Profile:
    model = geometry("llama-7b")
    start, linear, quadratic = (max(x, 0.0) * 1e3 for x in prefill_ms)
    knee = int((fixed_us - start) / linear)  # up to here the weights' pass takes longer than arithmetic
    tokens = np.asarray([1, knee, 16384])
    batches, contexts = np.asarray([0, 1, 1024]), np.asarray([0, 8192])
    chunks = np.asarray([0, *(2**k for k in range(6, 15))])
    past = np.asarray([0, 4096, 16384])
    work = chunks[:, None] * (chunks[:, None] + 2 * past)
    return Profile(
        "a10-llama-7b",
        model,
        Device("NVIDIA A10", memory_bytes=24 * GIB),
        tensor_parallel=1,
        kv_blocks=KV_TOKENS // 16,
        block_tokens=16,
        token_budget=12800,  # Llumnix's max_num_batched_tokens
        max_seqs=256,
        linear=as_curve(tokens, np.maximum(fixed_us, start + linear * tokens)),
        head=as_curve(np.asarray([0, 1024]), sequence_us * np.asarray([0, 1024])),
        decode_attention=as_surface(batches, contexts, context_us * batches[:, None] * contexts),
        prefill_attention=as_surface(chunks, past, quadratic * work),
        network=Link(
            seconds_per_call=COPY_S, bytes_per_second=round(model.kv_bytes_per_token / COPY_S_PER_TOKEN)
        ),
        provenance=Provenance(
            "Llumnix, OSDI'24, figure 10 and its artifact (alibaba/llm-scheduling-artifact)",
            "vLLM as in the Llumnix artifact",
            "2024",
            held_out,
            (
                "a decode step: fixed time, time a sequence, KV bytes at the data sheet's 600 GB/s; lengths "
                "256, 1024 and 4096 are fitted, 512, 2048 and 8192 held out",
                "assumed: the decode batch of the figure holds 8192 tokens in all, whatever their length",
                "no swap: the figures hold none",
            ),
        ),
    )
