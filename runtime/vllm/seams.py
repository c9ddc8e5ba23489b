"""What `servegym.runtime.vllm.scheduler` relies on inside vLLM, none of it public: is it still so?

Written against vLLM 0.32. `moved` names every change; the scheduler refuses to start with one, because a
victim that is not evicted, or a request that is evicted twice, would go unnoticed.
"""

from __future__ import annotations

import inspect
from typing import Any

WRITTEN_FOR = "0.32"
# Methods and their parameters.
METHODS = {
    "scheduler.schedule": ("self", "throttle_prefills"),
    "scheduler.add_request": ("self", "request"),
    "scheduler._preempt_request": ("self", "request", "timestamp", "drop_stale_output"),
    "scheduler._free_request": ("self", "request", "delay_free_blocks"),
    "scheduler.shutdown": ("self",),
    "manager.allocate_slots": ("self", "request", "num_new_tokens", "..."),
    "pool.get_num_free_blocks": ("self",),
    "request.__lt__": ("self", "other"),
}
# Statements in the bodies of methods, by which a victim is chosen and gives way.
STATEMENTS = {
    "scheduler.schedule": (
        "preempted_req = max(self.running, key=lambda r: (r.priority, r.arrival_time),)",
        "new_blocks = self.kv_cache_manager.allocate_slots(request, num_new_tokens,",
        "self._preempt_request(preempted_req, scheduled_timestamp,",
        "request_queue = self.waiting",
        "token_budget = self.max_num_scheduled_tokens",
        "while req_index < len(self.running) and token_budget > 0:",
    ),
    "scheduler._preempt_request": ("self.waiting.prepend_request(request)",),
    "scheduler.__init__": (
        "self.waiting = create_request_queue(self.policy)",
        "self.running: list[Request] = []",
    ),
    "scheduler.finish_requests": ("self.waiting.remove_requests(", "self._free_request(request"),
}
# Fields that __init__ sets.
FIELDS = {
    "scheduler": (
        "vllm_config", "scheduler_config", "max_num_running_reqs", "max_num_scheduled_tokens", "running",
        "waiting", "requests", "policy", "kv_cache_manager", "block_size", "num_spec_tokens",
    ),
    "manager": ("block_pool", "coordinator"),
    "request": (
        "request_id", "priority", "arrival_time", "status", "sampling_params", "max_tokens",
        "num_prompt_tokens", "num_computed_tokens", "num_preemptions", "is_prefill_chunk",
    ),
}  # fmt: skip
# What a queue of waiting requests must do.
QUEUE = (
    "add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_request",
    "remove_requests", "__bool__", "__len__", "__iter__",
)  # fmt: skip


def subjects() -> dict[str, Any]:
    """The classes, by the names that the tables use."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.request import Request

    return {"scheduler": AsyncScheduler, "manager": KVCacheManager, "pool": BlockPool, "request": Request}


def moved() -> list[str]:
    """What is not as it was, one line each; empty when all is well."""
    try:
        classes = subjects()
        from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
    except ImportError as error:
        return [f"an import is gone: {error}"]
    found = [*_moved_methods(classes), *_moved_statements(classes), *_moved_fields(classes)]
    if not hasattr(SchedulingPolicy, "PRIORITY"):
        found.append("SchedulingPolicy.PRIORITY is gone")
    abstract = set(RequestQueue.__abstractmethods__)
    found += [f"RequestQueue.{name} is gone" for name in QUEUE if name not in abstract]
    found += [f"RequestQueue wants {name}, too" for name in sorted(abstract - set(QUEUE))]
    return found


def _moved_methods(classes: dict[str, Any]) -> list[str]:
    found = []
    for path, expected in METHODS.items():
        owner, name = path.split(".")
        method = getattr(classes[owner], name, None)
        label = f"{classes[owner].__name__}.{name}"
        if method is None:
            found.append(f"{label} is gone")
            continue
        names = tuple(inspect.signature(method).parameters)
        shown = (*names[: len(expected) - 1], "...") if expected[-1] == "..." else names
        if shown != expected:
            found.append(f"{label} takes ({', '.join(names)}), not ({', '.join(expected)})")
    return found


def _moved_statements(classes: dict[str, Any]) -> list[str]:
    found = []
    for path, statements in STATEMENTS.items():
        owner, name = path.split(".")
        source = _source(classes[owner], name)
        found += [
            f"{classes[owner].__name__}.{name} no longer has `{statement}`"
            for statement in statements
            if _squeeze(statement) not in source
        ]
    return found


def _moved_fields(classes: dict[str, Any]) -> list[str]:
    found = []
    for owner, names in FIELDS.items():
        source = _source(classes[owner], "__init__")
        for name in names:
            if f"self.{name}=" not in source and f"self.{name}:" not in source:
                found.append(f"{classes[owner].__name__} no longer sets {name}")
    return found


def _source(owner: Any, name: str) -> str:
    """The code of a method in all base classes, without white space; nothing where it cannot be read."""
    bodies = [vars(base)[name] for base in owner.__mro__ if name in vars(base)]
    try:
        return "".join(_squeeze(inspect.getsource(body)) for body in bodies if inspect.isfunction(body))
    except OSError:
        return ""


def _squeeze(text: str) -> str:
    return "".join(text.split())
