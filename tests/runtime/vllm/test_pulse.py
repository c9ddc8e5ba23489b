"""When an engine of which nothing is heard counts as hung."""

from __future__ import annotations

import asyncio
import time

import pytest

from servegym.runtime.vllm.pulse import Pulse

STALL_S = 1.0  # long beside the times for which a busy machine lets a test wait


async def wait_in_vain(pulse: Pulse) -> float:
    """Seconds until it is over."""
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no progress"):
        async with pulse.listening():
            await asyncio.sleep(60)
    return time.monotonic() - start


def test_silence_lasts_as_long_as_the_count_rises_and_no_longer():
    async def case() -> None:
        pulse = Pulse(STALL_S)
        waiting = asyncio.create_task(wait_in_vain(pulse))
        for generated in (5, 6, 7, 100):
            await asyncio.sleep(0.5 * STALL_S)
            progressed_at = time.monotonic()
            pulse.told(generated)
        for _ in range(2):
            await asyncio.sleep(0.2 * STALL_S)
            pulse.told(100)
        assert await waiting > 2.5 * STALL_S
        assert STALL_S <= time.monotonic() - progressed_at < 2 * STALL_S

    asyncio.run(case())


def test_progress_before_a_wait_does_not_shorten_it():
    async def case() -> None:
        pulse = Pulse(STALL_S)
        await asyncio.sleep(STALL_S)  # idle
        assert STALL_S <= await wait_in_vain(pulse) < 2 * STALL_S

    asyncio.run(case())


def test_an_engine_that_starts_anew_counts_anew():
    async def case() -> None:
        pulse = Pulse(STALL_S)
        for generated in (1e6, 0):
            pulse.told(generated)
        waiting = asyncio.create_task(wait_in_vain(pulse))
        for generated in (1, 2, 3, 4):
            await asyncio.sleep(0.5 * STALL_S)
            pulse.told(generated)
        assert await waiting > 2.5 * STALL_S

    asyncio.run(case())


def test_what_is_heard_in_time_and_other_errors_pass():
    async def case() -> None:
        pulse = Pulse(STALL_S)
        for _ in range(3):
            async with pulse.listening():
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.2 * STALL_S)  # nothing of it is left behind
        with pytest.raises(TimeoutError, match="of another clock"):
            async with pulse.listening():
                raise TimeoutError("of another clock")
        task = asyncio.create_task(wait_in_vain(Pulse(60.0)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(case())
