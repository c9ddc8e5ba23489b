"""A calibration of an engine that serves already, such as a vLLM server on a GPU of its own, over HTTP.

It needs prefix caching, for chunks with a past, and nobody else who asks meanwhile. What no client can see is
left out of the profile: swaps, transfers between engines, the engine's start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
from servegym.runtime.calibrate.streams import SLACK, StreamBench
from servegym.runtime.vllm.leg import PATH, EngineLostError
from servegym.runtime.vllm.player import NULL_BLOCKS, scrape

MOST_CONTEXT = 8192  # of the longest request that is measured, unless more is asked for
_HITS = re.compile(r"^vllm:prefix_cache_hits(?:_total)?(?:\{.*\})? (\S+)$", re.MULTILINE)

_NOTES = (
    "measured over HTTP, as gaps between the tokens of streams",
    "prefill was measured beside at least one decode",
    "no fixed overhead: it is in the head's first point",
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
        InputError: nobody there, no vLLM, or one without a prefix cache.
    """
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0)) as session:
            return await _look(session, url)
    except InputError:
        raise
    except (aiohttp.ClientError, EngineLostError, TimeoutError, ValueError, KeyError, TypeError) as error:
        hint = "give the address of a vLLM server that is up"
        raise InputError(url, "engine", str(error) or repr(error), hint) from error


async def _look(session: aiohttp.ClientSession, url: str) -> Served:
    reading = await scrape(session, url)
    if not reading.blocks or not reading.block_tokens:
        raise InputError(url, "vllm:cache_config_info", None, "is missing from its /metrics")
    (card, *_) = (await _get(session, f"{url}/v1/models"))["data"]
    version = (await _get(session, f"{url}/version"))["version"]
    served = Served(
        url, str(card["id"]), int(card["max_model_len"]), reading.blocks - NULL_BLOCKS, reading.block_tokens,
        f"vLLM {version}",
    )  # fmt: skip
    if not await _caches_prefixes(session, served):
        hint = "chunks with a past need it; start the engine with --enable-prefix-caching"
        raise InputError(url, "prefix cache", "off", hint)
    return served


async def _get(session: aiohttp.ClientSession, url: str) -> dict:  # type: ignore[type-arg]
    async with session.get(url) as response:
        response.raise_for_status()
        return await response.json()  # type: ignore[no-any-return]


async def _caches_prefixes(session: aiohttp.ClientSession, served: Served) -> bool:
    """Whether the same prompt, asked twice, is found the second time."""
    prompt = [1] * (served.block_tokens + 1)
    for _ in range(2):
        body = {"model": served.model, "prompt": prompt, "max_tokens": 1}
        async with session.post(served.url + PATH, json=body) as response:
            response.raise_for_status()
            await response.read()
    async with session.get(f"{served.url}/metrics") as response:
        return any(float(hits) > 0 for hits in _HITS.findall(await response.text()))


def served_design(limits: Limits, size: int, seed: int) -> Design:
    """The shapes of `design` as far as a client can bring them about.

    One chunk at most, with a decode beside it, and with whole blocks of earlier tokens: as many as the prefix
    cache can hold.
    """

    def possible(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
        return tuple(dict.fromkeys(s for s in map(as_possible, shapes) if limits.fits(s)))

    def as_possible(shape: Shape) -> Shape:
        if not shape.chunks:
            return shape
        contexts = shape.contexts or (LEAST_CONTEXT,)
        new, past = shape.chunks[0]
        new = min(new, limits.token_budget - len(contexts))
        return Shape(contexts, ((new, past // limits.block_tokens * limits.block_tokens),))

    whole = design(limits, size=size, seed=seed)
    fitted = possible(whole.fitted)
    return Design(whole.axes, fitted, tuple(s for s in possible(whole.held_out) if s not in fitted))


def calibrate_served(
    served: Served,
    model: Geometry,
    vocabulary: int,
    options: Options,
    *,
    device: str,
    name: str,
    command: str,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure the iterations of an engine.

    Args:
        served: the engine.
        model: its geometry.
        options: how; `limits` as the engine was started.
        device: name of what it runs on.
        name, command, progress: as in `calibrate`.

    Raises:
        InputError: an engine that fails or that others use.
    """
    limits = options.limits
    # Decodes grow while they are measured: a block more for each must be there.
    room = replace(limits, kv_blocks=limits.kv_blocks - limits.max_seqs * -(-SLACK // limits.block_tokens))
    shapes = served_design(room, options.size, options.seed)
    every = (*shapes.fitted, *shapes.held_out)
    with StreamBench(served.url, served.model, limits, vocabulary, options.seed) as bench:
        seconds = measure(bench, every, rounds=options.rounds, seed=options.seed, progress=progress)
        first = median(bench.first_token() for _ in range(options.rounds))
    count = len(shapes.fitted)
    cache = limits.kv_blocks * limits.block_tokens * model.kv_bytes_per_token
    accelerator = Device(device, memory_bytes=model.weight_bytes + cache)  # it has as much, at least
    fresh = blank(model, accelerator, served.software, limits, name, shapes.axes)
    profile = with_parts(fresh, fit(shapes.axes, shapes.fitted, typical(seconds)[:count]))
    origin = replace(
        profile.provenance,
        held_out=errors(profile, shapes.held_out, typical(seconds)[count:]),
        notes=(*_NOTES, command),
    )
    smallest = float(np.median(seconds[shapes.fitted.index(Shape((LEAST_CONTEXT,)))]))
    figures = {
        "an iteration of one decode, ms": 1e3 * smallest,
        "a first token beyond that: front end and network, ms": 1e3 * (first - smallest),
    }
    return Calibration(replace(profile, provenance=origin), shapes, seconds, {}, figures)
