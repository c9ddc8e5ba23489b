"""A calibration of an engine that serves already, such as a vLLM server on a GPU of its own, over HTTP.

It needs prefix caching, for chunks with a past, and nobody else who asks meanwhile. What no client can see
is left out of the profile: swaps, transfers between engines, the engine's start. Nor can one see pipeline
stages, with which a request gets one token a round of batches: such an engine looks slower than it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import aiohttp
import numpy as np

from servegym.envs.costs.profile import Device, Geometry
from servegym.errors import InputError
from servegym.runtime.calibrate.calibration import Calibration, Options, blank
from servegym.runtime.calibrate.fit import errors, fit, with_parts
from servegym.runtime.calibrate.measure import measure, typical
from servegym.runtime.calibrate.shapes import LEAST_CONTEXT, Design, Limits, Shape, design
from servegym.runtime.calibrate.streams import SLACK, WITNESSES, StreamBench, open_session
from servegym.runtime.gateway.readings import parse_metrics
from servegym.runtime.vllm.leg import PATH
from servegym.runtime.vllm.player import NULL_BLOCKS

MOST_CONTEXT = 8192  # of the longest request that is measured, unless more is asked for
_HITS = re.compile(r"^vllm:prefix_cache_hits(?:_total)?(?:\{.*\})? (\S+)$", re.MULTILINE)
_ENGINE = re.compile(r"^vllm:num_requests_running(?:\{.*\})? ", re.MULTILINE)

_NOTES = (
    "measured over HTTP, as gaps between the tokens of streams",
    "prefill was measured beside at least one decode",
    f"of larger batches {WITNESSES} requests were streamed: what the front end takes for the others is in no "
    "iteration",
    "no fixed overhead: it is in the head's first point",
    "iterations are as the engine schedules them: asynchronously where it is vLLM on a GPU and not told "
    "otherwise, for which a scenario says engine = { async_scheduling = true }",
)


@dataclass(frozen=True)
class Served:
    """What an engine says of itself.

    Attributes:
        model: its name there.
        max_tokens: of a request, prompt and output.
        kv_blocks, block_tokens: its KV cache.
        software: who it is.
    """

    url: str
    model: str
    max_tokens: int
    kv_blocks: int
    block_tokens: int
    software: str


async def look(url: str) -> Served:
    """Ask an engine who it is.

    Raises:
        InputError: nobody there, no vLLM, or one that cannot be measured.
    """
    try:
        async with open_session() as session:
            return await _look(session, url)
    except InputError:
        raise
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
        hint = "give the address of a vLLM server that is up, and its key, if any, in OPENAI_API_KEY"
        raise InputError(url, "engine", str(error) or repr(error), hint) from error


async def _look(session: aiohttp.ClientSession, url: str) -> Served:
    page = await _text(session, f"{url}/metrics")
    reading, engines = parse_metrics(page), len(_ENGINE.findall(page))
    if engines != 1:
        raise InputError(url, "engines", engines, "measure one: start it without --data-parallel-size")
    if "\nvllm:spec_decode_" in page:
        hint = "an iteration then gives several tokens; start it without"
        raise InputError(url, "speculative decoding", "on", hint)
    if not reading.blocks or not reading.block_tokens:
        raise InputError(url, "vllm:cache_config_info", None, "is missing from its /metrics")
    (card, *_) = (await _json(session, f"{url}/v1/models"))["data"]
    version = (await _json(session, f"{url}/version"))["version"]
    served = Served(
        url, str(card["id"]), int(card["max_model_len"]), reading.blocks - NULL_BLOCKS, reading.block_tokens,
        f"vLLM {version}",
    )  # fmt: skip
    if not await _caches_prefixes(session, served):
        hint = "chunks with a past need it; start the engine with --enable-prefix-caching"
        raise InputError(url, "prefix cache", "off", hint)
    return served


async def _text(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url, raise_for_status=True) as response:
        return await response.text()


async def _json(session: aiohttp.ClientSession, url: str) -> dict:  # type: ignore[type-arg]
    async with session.get(url, raise_for_status=True) as response:
        return await response.json()  # type: ignore[no-any-return]


async def _caches_prefixes(session: aiohttp.ClientSession, served: Served) -> bool:
    """Whether the same prompt, asked twice, is found the second time."""
    prompt = [1] * (served.block_tokens + 1)
    for _ in range(2):
        body = {"model": served.model, "prompt": prompt, "max_tokens": 1}
        async with session.post(served.url + PATH, json=body, raise_for_status=True) as response:
            await response.read()
    return any(float(hits) > 0 for hits in _HITS.findall(await _text(session, f"{served.url}/metrics")))


def served_design(limits: Limits, size: int, seed: int) -> Design:
    """The shapes of `design` as far as a client can bring them about.

    One chunk at most, with a decode beside it, and with whole blocks of earlier tokens: as many as the prefix
    cache can hold. There is room in the KV cache for what the decodes generate until they are measured.
    """

    def possible(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
        return tuple(dict.fromkeys(s for s in map(as_possible, shapes) if limits.fits(s) and has_room(s)))

    def as_possible(shape: Shape) -> Shape:
        if not shape.chunks:
            return shape
        contexts = shape.contexts or (LEAST_CONTEXT,)
        past = shape.chunks[0][1]
        new = min(sum(new for new, _ in shape.chunks), limits.token_budget - len(contexts))
        return Shape(contexts, ((new, past // limits.block_tokens * limits.block_tokens),))

    def has_room(shape: Shape) -> bool:
        lengths = [*(c + SLACK for c in shape.contexts), *(new + past for new, past in shape.chunks)]
        return sum(-(-length // limits.block_tokens) for length in lengths) <= limits.kv_blocks

    whole = design(limits, size=size, seed=seed)
    fitted = possible(whole.fitted)
    return Design(whole.axes, fitted, tuple(s for s in possible(whole.held_out) if s not in fitted))


def check(bench: StreamBench, served: Served, limits: Limits) -> list[str]:
    """Refuse limits that are not those of the engine; returns what it could not be asked.

    Raises:
        InputError: naming the flag.
    """
    return [*_check_seqs(bench, served, limits), *_check_budget(bench, served, limits)]


def _check_seqs(bench: StreamBench, served: Served, limits: Limits) -> Iterator[str]:
    """With a block or two for each of one request more than it may run, only the limit makes one wait."""
    if limits.kv_blocks < 2 * (limits.max_seqs + 1):
        yield f"not checked: max_seqs; {limits.kv_blocks} KV blocks may hold fewer requests"
        return
    running = bench.most_at_once()
    if running != limits.max_seqs:
        hint = f"the engine runs {running} of {limits.max_seqs + 1} requests; give its --max-num-seqs"
        raise InputError(served.url, "max_seqs", limits.max_seqs, hint)


def _check_budget(bench: StreamBench, served: Served, limits: Limits) -> Iterator[str]:
    """Beside a decode, one token less than the budget is computed at once, twice that in two parts."""
    one = limits.token_budget - 1
    for tokens, expected in ((one, 1), (2 * one, 2)):
        if tokens >= served.max_tokens:
            yield f"not checked: token_budget by {tokens} tokens; the engine takes {served.max_tokens}"
            continue
        found = bench.iterations(tokens)
        if found != expected:
            hint = f"it computes {tokens} tokens in {found} parts; give its --max-num-batched-tokens"
            raise InputError(served.url, "token_budget", limits.token_budget, hint)


def calibrate_served(
    served: Served,
    model: Geometry,
    vocabulary: int,
    options: Options,
    *,
    device: str,
    name: str,
    command: str,
    tensor_parallel: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure the iterations of an engine.

    Args:
        served: the engine.
        model: its geometry.
        options: how; `limits` as the engine was started.
        device, tensor_parallel: name of what it runs on, and how many of them.
        name, command, progress: as in `calibrate`.

    Raises:
        InputError: an engine that fails, that others use, or that was started with other limits.
    """
    limits = options.limits
    shapes = served_design(limits, options.size, options.seed)
    every = (*shapes.fitted, *shapes.held_out)
    with StreamBench(served.url, served.model, limits, vocabulary, options.seed) as bench:
        progress("limits")
        not_checked = check(bench, served, limits)
        seconds = measure(bench, every, rounds=options.rounds, seed=options.seed, progress=progress)
        first = median(bench.first_token() for _ in range(options.rounds))
        smallest = float(np.median(seconds[shapes.fitted.index(Shape((LEAST_CONTEXT,)))]))
        fitted, held_out = (tuple(map(bench.as_run, part)) for part in (shapes.fitted, shapes.held_out))
    ran = Design(shapes.axes, fitted, held_out)
    cache = limits.kv_blocks * limits.block_tokens * model.kv_bytes_per_token
    memory = (model.weight_bytes + cache) // tensor_parallel  # it has as much, at least
    fresh = blank(model, Device(device, memory_bytes=memory), served.software, limits, name, ran.axes)
    profile = with_parts(fresh, fit(ran.axes, ran.fitted, typical(seconds)[: len(fitted)]))
    origin = replace(
        profile.provenance,
        held_out=errors(profile, ran.held_out, typical(seconds)[len(fitted) :]),
        notes=(*_NOTES, *not_checked, command),
    )
    figures = {
        "an iteration of one decode, ms": 1e3 * smallest,
        "a first token beyond that: front end and network, ms": 1e3 * (first - smallest),
        "time that this client worked while it measured, at most, %": 100 * bench.busiest,
    }
    whole = replace(profile, tensor_parallel=tensor_parallel, provenance=origin)
    return Calibration(whole, ran, seconds, {}, figures)
