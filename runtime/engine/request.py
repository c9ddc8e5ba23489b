"""A request in the runtime: its tokens, what is computed of it, and what has happened to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from servegym.errors import InputError

Tokens = Sequence[int] | np.ndarray


@dataclass(eq=False)
class Request:
    """One request; it ends after `output` tokens, whatever they are, as with `ignore_eos` in vLLM.

    Attributes:
        number: its place in the order of arrival, which breaks ties of priority.
        ids: int64 [prompt + output], the prompt, then the tokens generated so far.
        prefix_ids: chained ids of its full prefix blocks, of the prompt and of what it will generate.
        forced: `ids` holds the output, too, and replaces what the model would say.
        computed: tokens whose KV is here; streamed: tokens delivered; cached, lost, preemptions, migrations:
            as in `Records`.
        table: its KV blocks in the order of its tokens, the leading `shared` prefix blocks among them.
        hosted: tokens of KV in host memory, in the blocks `host_table`.
        decoding: its prompt is computed: one token an iteration from now on.
        arrived_s ... last_s, max_gap_s: seconds on the engine's clock; NaN until they are known.
    """

    number: int
    ids: np.ndarray
    prompt: int
    output: int
    priority: int = 0
    prefix_ids: Sequence[int] = ()
    forced: bool = False
    instance: int = -1
    arrived_s: float = np.nan
    dispatched_s: float = np.nan
    first_s: float = np.nan
    finished_s: float = np.nan
    last_s: float = np.nan
    max_gap_s: float = 0.0
    streamed: int = 0
    computed: int = 0
    decoding: bool = False
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    blocks: int = 0
    shared: list[int] = field(default_factory=list)
    hosted: int = 0
    host_table: list[int] = field(default_factory=list)
    preemptions: int = 0
    migrations: int = 0
    cached: int = 0
    lost: int = 0
    admitted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens known so far; the last one streamed has no KV yet."""
        return self.prompt + self.streamed

    def stream(self, token: int, now_s: float) -> None:
        """Deliver its next token."""
        if not self.forced:
            self.ids[self.tokens] = token
        self.streamed += 1
        self.decoding = True
        if self.streamed == 1:
            self.first_s = now_s
        else:
            self.max_gap_s = max(self.max_gap_s, now_s - self.last_s)
        self.last_s = now_s


def make_request(
    number: int,
    prompt: Tokens,
    output: int | Tokens,
    *,
    priority: int = 0,
    prefix_ids: Sequence[int] = (),
    arrived_s: float = np.nan,
) -> Request:
    """A request for so many tokens after `prompt`, or for exactly these tokens.

    Raises:
        InputError: an empty prompt, or no output.
    """
    forced = np.ndim(output) > 0
    tokens = np.asarray(output if forced else np.zeros(output), np.int64)
    if len(prompt) < 1 or len(tokens) < 1:
        hint = "needs a prompt and an output"
        raise InputError(f"request {number}", "tokens", (len(prompt), len(tokens)), hint)
    ids = np.concatenate([np.asarray(prompt, np.int64), tokens])
    return Request(
        number, ids, len(prompt), len(tokens), priority, tuple(prefix_ids), forced, arrived_s=arrived_s
    )
