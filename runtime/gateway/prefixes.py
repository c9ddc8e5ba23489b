"""Which leading parts of prompts the engines hold in their KV caches.

A prompt is cut into blocks, and the id of a block is a hash of it and of the id before it, so that an id
names all that stands before, too. Two kinds of ids go side by side:

- of token blocks, where token ids are known, of an engine's own block size. What the engine holds is told by
  its KV events (`kv_events`), exactly.
- of byte blocks otherwise, and of chats always, whose template only the engine knows. An engine is taken to
  hold what was sent to it most recently, as much as its KV cache has room for (as llm-d and the Gateway API
  Inference Extension do).

Ids that collide cost a wrong estimate, no more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BYTES = 4  # of a byte block, for each token of the engine's block
MOST_BLOCKS = 512  # ids of a prompt; what comes later hardly decides


def byte_ids(text: bytes, block_tokens: int) -> list[int]:
    """Ids of the full byte blocks of a prompt."""
    size, ids, last = block_tokens * BYTES, [], 0
    for at in range(0, min(len(text), size * MOST_BLOCKS) - size + 1, size):
        last = hash((last, text[at : at + size]))
        ids.append(last)
    return ids


def token_ids(tokens: Sequence[int], block_tokens: int, parent: int = 0) -> list[int]:
    """Ids of the full blocks of tokens that follow the block `parent`."""
    ids, last = [], parent
    for at in range(0, min(len(tokens), block_tokens * MOST_BLOCKS) - block_tokens + 1, block_tokens):
        last = hash((last, tuple(tokens[at : at + block_tokens])))
        ids.append(last)
    return ids


class PrefixIndex:
    """Ids of the blocks that an engine holds, a container for `InstanceView.cached`.

    Args:
        room: blocks that fit its KV cache.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._sent: OrderedDict[int, None] = OrderedDict()
        self._held: dict[int, int] = {}  # id -> blocks of the engine that bear it
        self._names: dict[object, int] = {}  # the engine's hash of a block -> its id
        self._has_events = False

    def __contains__(self, block: object) -> bool:
        return block in self._sent or block in self._held

    def __len__(self) -> int:
        return len(self._sent) + len(self._held)

    def leading(self, ids: Sequence[int]) -> int:
        """How many of a prompt's blocks it holds from the first one on: all before one that it holds."""
        if not ids or (ids[0] not in self._sent and ids[0] not in self._held):
            return 0
        return bisect_left(range(1, len(ids)), True, key=lambda k: ids[k] not in self) + 1

    def sent(self, ids: Sequence[int], of_tokens: bool = False) -> None:
        """A prompt went to the engine; where events tell of token blocks, theirs is the last word on them."""
        if of_tokens and self._has_events:
            return
        for block in reversed(ids[: self.room]):  # a block outlives those that extend it
            self._sent[block] = None
            self._sent.move_to_end(block)
        while len(self._sent) > self.room:
            self._sent.popitem(last=False)

    def stored(
        self, hashes: Sequence[object], parent: object, tokens: Sequence[int], block_tokens: int
    ) -> None:
        """KV event: the engine stored blocks behind a parent; unknown parents leave it as it is."""
        self._has_events = True
        before = 0 if parent is None else self._names.get(parent)
        if before is None:
            return
        for name, block in zip(hashes, token_ids(tokens, block_tokens, before), strict=False):
            if name not in self._names:
                self._names[name] = block
                self._held[block] = self._held.get(block, 0) + 1

    def removed(self, hashes: Iterable[object]) -> None:
        """KV event: the engine dropped blocks."""
        for name in hashes:
            block = self._names.pop(name, None)
            if block is None:
                continue
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]

    def clear(self) -> None:
        """The engine's cache is empty, or nothing is known of it."""
        self._sent.clear()
        self._held.clear()
        self._names.clear()
