"""What an iteration costs: integer picoseconds from tables, in numba, exact for whole decode stretches.

An iteration computes one token for each of `n` decoding requests and any number of prefill chunks:

    iteration = linear[tokens] + head[sequences] + rest
    rest = decode(n, context) alone, or with prefill chunks
           chunked + mixed(n, context) + launch * n * longest chunk + sum of prefill(chunk, past)
    decode(n, context) = base[n, j] + slope[n, j] * (context - n * knot[j]) + skew[n] * (top - context // n)

`mixed` is of the form of `decode`: one kernel then serves prefill and decodes, it splits no context over the
device, so that decodes cost up to twice as much, and it launches an empty thread block for each tile of the
longest chunk and each decode. `chunked` counts once, however many chunks there are: an engine that replays
CUDA graphs for decodes alone launches such an iteration kernel by kernel. `context` is the sum of the KV
lengths that the decodes read, `top` the longest of them, and j the segment of the mean context. As a stretch
of decode-only iterations goes on, `context` grows by n a step and `top - context // n` stays, so the sum over
k steps is a closed form per segment. All operands are int64: the closed form equals the sum of its steps to
the bit on every machine.
"""

from __future__ import annotations

from servegym.envs.cluster.kernel import inlined, kernel


@inlined
def segment_of(knots, p, x):
    """Index j of the last knot <= x in row p; the last segment extends beyond the table."""
    low, high = 0, knots.shape[1] - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if knots[p, middle] <= x:
            low = middle
        else:
            high = middle - 1
    return low


@inlined
def decode_ps(tables, p, n, context, top):
    """Decode attention of n requests with `context` KV tokens in all, the longest `top`; 0 for n = 0."""
    if n == 0:
        return 0
    mean = context // n
    j = segment_of(tables.decode_knot, p, mean)
    beyond = context - n * tables.decode_knot[p, j]
    return (
        tables.decode_base[p, n, j]
        + tables.decode_slope[p, n, j] * beyond
        + tables.decode_skew[p, n] * (top - mean)
    )


@inlined
def mixed_ps(tables, p, n, context, top, longest):
    """Decode attention as `decode_ps`, beside prefill chunks of up to `longest` tokens."""
    if n == 0:
        return 0
    mean = context // n
    j = segment_of(tables.decode_knot, p, mean)
    beyond = context - n * tables.decode_knot[p, j]
    return (
        tables.mixed_base[p, n, j]
        + tables.mixed_slope[p, n, j] * beyond
        + tables.mixed_skew[p, n] * (top - mean)
        + tables.mixed_launch[p] * n * longest
    )


@inlined
def prefill_ps(tables, p, chunk, past):
    """Attention of `chunk` new tokens over `past` earlier ones and themselves: bilinear on the grid."""
    a = min(segment_of(tables.chunk_knot, p, chunk), tables.chunk_knot.shape[1] - 2)
    b = min(segment_of(tables.past_knot, p, past), tables.past_knot.shape[1] - 2)
    past_0 = tables.past_knot[p, b]
    past_width = tables.past_knot[p, b + 1] - past_0
    step = past - past_0
    low, high = tables.prefill[p, a, b], tables.prefill[p, a + 1, b]
    low += (tables.prefill[p, a, b + 1] - low) * step // past_width
    high += (tables.prefill[p, a + 1, b + 1] - high) * step // past_width
    chunk_0 = tables.chunk_knot[p, a]
    return low + (high - low) * (chunk - chunk_0) // (tables.chunk_knot[p, a + 1] - chunk_0)


@inlined
def iteration_ps(tables, p, n, context, top, tokens, sequences, prefill_attention, longest):
    """One iteration: n decodes and prefill chunks whose attention sums to `prefill_attention`.

    `tokens` counts decodes and chunk tokens, `sequences` decodes and chunks; `longest` is the longest chunk.
    """
    if tokens > n:
        rest = tables.chunked[p] + prefill_attention + mixed_ps(tables, p, n, context, top, longest)
    else:
        rest = decode_ps(tables, p, n, context, top)
    return tables.linear[p, tokens] + tables.head[p, sequences] + rest


@kernel
def stretch_ps(tables, p, n, context, top, k):
    """Time of k decode-only iterations; equals the sum of `iteration_ps` over them to the bit."""
    step = tables.linear[p, n] + tables.head[p, n] + tables.decode_skew[p, n] * (top - context // n)
    total = k * step
    last = tables.decode_knot.shape[1] - 1
    j = segment_of(tables.decode_knot, p, context // n)
    while k > 0:
        steps = k
        if j < last:
            room = n * tables.decode_knot[p, j + 1] - context
            steps = min(k, (room + n - 1) // n)
        slope = tables.decode_slope[p, n, j]
        first = tables.decode_base[p, n, j] + slope * (context - n * tables.decode_knot[p, j])
        total += steps * first + slope * n * (steps * (steps - 1) // 2)
        context += steps * n
        k -= steps
        j += 1
    return total


@kernel
def steps_to_reach(tables, p, n, context, top, k, elapsed):
    """Least j in 1..k with `stretch_ps(j) >= elapsed`; k where even k steps fall short."""
    first = stretch_ps(tables, p, n, context, top, 1)
    last = stretch_ps(tables, p, n, context + (k - 1) * n, top + k - 1, 1)
    # Steps only grow longer, so the first bounds the answer from above and the last from below.
    high = min(k, (elapsed + first - 1) // first)
    low = min(max((elapsed + last - 1) // last, 1), k)
    while low < high:
        middle = (low + high) >> 1
        if stretch_ps(tables, p, n, context, top, middle) >= elapsed:
            high = middle
        else:
            low = middle + 1
    return low
