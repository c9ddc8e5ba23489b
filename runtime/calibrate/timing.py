"""What only hardware can say: copies, decode attention and the pause of a migration, timed on real instances.

Single iterations are those of `bench`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import RLock, Thread
from typing import NamedTuple

import torch

from servegym.envs.cluster.settings import Setting
from servegym.errors import InputError
from servegym.runtime.calibrate.machine import wait_for
from servegym.runtime.engine.attention import attend
from servegym.runtime.engine.batch import Batch
from servegym.runtime.engine.copier import BlockCopier, copy_blocks
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.migration import Migration, Phase
from servegym.runtime.engine.model import Transformer
from servegym.runtime.engine.request import make_request


def time_swap(instance: Instance, blocks: int, group: int) -> tuple[float, float]:
    """Seconds to copy so many scattered blocks to host memory, and back; `group` as in `SwapSpace`.

    Raises:
        InputError: more blocks than the instance or its host memory has.
    """
    if blocks > min(instance.setting.blocks, instance.setting.host_blocks):
        raise InputError("engine", "blocks", blocks, "the instance has fewer, or fewer in host memory")
    device = torch.randperm(instance.setting.blocks)[:blocks].tolist()
    host, swap = list(range(blocks)), instance.swap
    before, swap.group = swap.group, group
    with torch.cuda.stream(instance.stream), torch.inference_mode():
        out = _seconds(instance.model, lambda: swap.out(device, host))
        back = _seconds(instance.model, lambda: swap.back(host, device))
    swap.group = before
    return out, back


def time_transfer(source: Instance, target: Instance, blocks: int) -> float:
    """Seconds to copy so many scattered blocks from one instance to another."""
    ids = [torch.randperm(side.setting.blocks)[:blocks] for side in (source, target)]
    return _seconds(source.model, lambda: copy_blocks(source, target, *ids))


class Bandwidth(NamedTuple):
    """Decode attention of one layer: seconds, and KV bytes read a second."""

    seconds: float
    bytes_per_second: float


def decode_bandwidth(instance: Instance, batch: int, context: int, repeats: int = 20) -> Bandwidth:
    """Attention of `batch` decodes with `context` KV tokens each in scattered blocks, all layers in turn.

    The layers of an instance are more than caches hold, so that the KV comes from memory, as it does when a
    model decodes.

    Raises:
        InputError: more blocks than the instance has.
    """
    c, size = instance.model.config, instance.setting.block_tokens
    width = -(-context // size)
    if batch * width > instance.setting.blocks:
        raise InputError("engine", "kv_blocks", instance.setting.blocks, f"{batch * width} are needed")
    device, dtype = instance.model.device, instance.model.dtype
    tables = torch.randperm(instance.setting.blocks)[: batch * width].view(batch, width).to(device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    mask = (torch.arange(width * size) < context).expand(batch, 1, 1, -1) if device.type == "cpu" else None
    none = torch.zeros(batch, dtype=torch.int64, device=device)
    inputs = Batch(none, none, none, tables, lengths, mask, none)
    q = torch.randn(batch, c.heads, c.head_dim, device=device, dtype=dtype)

    def layers() -> None:
        for keys, values in instance.cache:
            attend(q, keys, values, inputs)

    with torch.inference_mode():
        layers()
        times = sorted(_seconds(instance.model, layers) for _ in range(repeats))
    seconds = times[repeats // 2] / c.layers
    read = 2 * batch * context * c.kv_heads * c.head_dim * q.element_size()
    return Bandwidth(seconds, read / seconds)


class Downtime(NamedTuple):
    """A migration of a request with `context` tokens of KV.

    Attributes:
        gap_s: between its last token at the source and its first at the target.
        stopped_s: of that, until all KV was at the target.
        step_s: between two of its tokens before.
        stages: live copies.
    """

    context: int
    gap_s: float
    stopped_s: float
    step_s: float
    stages: int


def migration_downtime(model: Transformer, setting: Setting, contexts: Sequence[int]) -> list[Downtime]:
    """Migrate a decoding request of each context between two instances, which do nothing else."""
    lock = RLock()
    instances = [Instance(model, setting, number, lock=lock) for number in range(2)]
    for instance in instances:
        instance.warm_up()
    failures: list[BaseException] = []
    copier = BlockCopier(instances, lock, failures.append)

    def serve(instance: Instance) -> None:
        try:
            instance.serve()
        except BaseException as error:  # handed to the thread that waits
            failures.append(error)

    threads = [Thread(target=serve, args=(instance,), daemon=True) for instance in instances]
    for thread in threads:
        thread.start()
    try:
        return [_migrate(instances, copier, context, failures) for context in contexts]
    finally:
        for instance, thread in zip(instances, threads, strict=True):
            instance.stop()
            thread.join()
        copier.close()


def _migrate(
    instances: list[Instance], copier: BlockCopier, context: int, failures: list[BaseException]
) -> Downtime:
    source, target = instances
    r = make_request(0, torch.randint(source.model.config.vocabulary, (context,)).tolist(), 64)
    source.submit(r)
    _until(lambda: r.streamed >= 8, failures)
    with source.lock:
        step = (r.last_s - r.first_s) / (r.streamed - 1)
        r.max_gap_s = 0.0
        moving = Migration(r, source.scheduler, target.scheduler, copier, last_blocks=2, stages=8)
        moving.begin()
    _until(lambda: r.streamed == r.output, failures)
    if moving.phase is not Phase.COMMITTED:
        raise RuntimeError(f"the migration of {context} tokens was given up")
    return Downtime(context, r.max_gap_s, copier.downtimes[-1][1], step, moving.stage)


def _until(true: Callable[[], bool], failures: list[BaseException]) -> None:
    while not true():
        if failures:
            raise failures[0]
        time.sleep(0.001)


def _seconds(model: Transformer, run: Callable[[], object]) -> float:
    """Seconds of `run`, with what it leaves to the device."""
    wait_for(model.device)
    start = time.perf_counter()
    run()
    wait_for(model.device)
    return time.perf_counter() - start
