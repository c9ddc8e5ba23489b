"""KV blocks of one instance: who holds which, the prefix cache, and the tensor that they name.

A prefix unit is as many blocks as the workload's prefix block has tokens (one, where there is no trace). Its
id is chained: it names all tokens up to its end, as vLLM's block hashes do. Units that no request holds stay
until their blocks are needed, the least recently used first; so they count as free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from servegym.runtime.engine.config import ModelConfig
from servegym.runtime.engine.request import Request


@dataclass(slots=True)
class Unit:
    """A cached prefix unit: its blocks, and how many requests hold it."""

    blocks: np.ndarray
    holders: int = 0


class Memory:
    """Books of the blocks 0 ... `blocks` - 1.

    Args:
        unit_tokens: tokens of a prefix unit, a multiple of `block_tokens`; 0 for no prefix cache.
    """

    def __init__(self, blocks: int, block_tokens: int, unit_tokens: int) -> None:
        self.blocks, self.block_tokens, self.unit_tokens = blocks, block_tokens, unit_tokens
        self.unit_blocks = unit_tokens // block_tokens
        self.empty = list(range(blocks - 1, -1, -1))
        self.units: dict[int, Unit] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # units without holders, least recently used first

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those of idle prefix units included."""
        return len(self.empty) + len(self.idle) * self.unit_blocks

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int]:
        """That many blocks, at most `free`; idle prefix units are forgotten where they are needed."""
        while len(self.empty) < count:
            key, _ = self.idle.popitem(last=False)
            self.give(self.units.pop(key).blocks)
        taken = self.empty[len(self.empty) - count :]
        del self.empty[len(self.empty) - count :]
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Blocks that nobody holds any more."""
        self.empty.extend(blocks)

    def new_table(self, r: Request) -> np.ndarray:
        """Room for all the blocks that r will ever have."""
        return np.zeros(self.blocks_of(len(r.ids)), np.int64)

    def grow(self, r: Request, tokens: int) -> None:
        """Blocks for the first `tokens` tokens of r."""
        more = self.blocks_of(tokens) - r.blocks
        if more > 0:
            if not r.blocks:
                r.table = self.new_table(r)
            r.table[r.blocks : r.blocks + more] = self.take(more)
            r.blocks += more

    def drop(self, r: Request) -> None:
        """Request r lets go of its KV; what it has computed of prefix units stays in the cache."""
        self.publish(r, r.computed)
        for key in reversed(
            r.shared
        ):  # the end of a prefix goes first, since it is of no use without the rest
            unit = self.units[key]
            unit.holders -= 1
            if unit.holders == 0:
                self.idle[key] = None
        self.give(r.table[len(r.shared) * self.unit_blocks : r.blocks].tolist())
        r.shared, r.blocks, r.computed, r.decoding = [], 0, 0, False

    # --- prefix cache -----------------------------------------------------------------------------------

    def match(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The leading ids that are cached and end within `tokens`."""
        found: list[int] = []
        if self.unit_tokens:
            for key in ids[: tokens // self.unit_tokens]:
                if key not in self.units:
                    break
                found.append(key)
        return found

    def adopt(self, r: Request, found: list[int]) -> None:
        """Request r, which has no KV, starts with the units `found`."""
        if found:
            r.table = self.new_table(r)
            for k, key in enumerate(found):
                r.table[k * self.unit_blocks : (k + 1) * self.unit_blocks] = self._hold(key)
        r.shared, r.blocks = found, len(found) * self.unit_blocks

    def publish(self, r: Request, tokens: int) -> None:
        """Share the prefix units within the first `tokens` tokens, which r has or computes next.

        Where another request has published the same, r gives up its own copy for that one. Should r still
        compute a part of it, then it writes there what the other has written or writes in the same iteration.
        """
        if not self.unit_tokens:
            return
        for key in r.prefix_ids[len(r.shared) : tokens // self.unit_tokens]:
            place = slice(len(r.shared) * self.unit_blocks, (len(r.shared) + 1) * self.unit_blocks)
            if key in self.units:
                self.give(r.table[place].tolist())
                r.table[place] = self._hold(key)
            else:
                self.units[key] = Unit(r.table[place].copy(), 1)
            r.shared.append(key)

    def _hold(self, key: int) -> np.ndarray:
        unit = self.units[key]
        self.idle.pop(key, None)
        unit.holders += 1
        return unit.blocks


def chained_ids(tokens: np.ndarray, unit_tokens: int) -> list[int]:
    """Ids of the full prefix units of `tokens`: each a hash of the one before and of its own tokens."""
    ids, last = [], b""
    for end in range(unit_tokens, len(tokens) + 1, unit_tokens):
        piece = np.ascontiguousarray(tokens[end - unit_tokens : end], np.int64)
        last = blake2b(last + piece.tobytes(), digest_size=8).digest()
        ids.append(int.from_bytes(last, "little"))
    return ids


def allocate_cache(
    config: ModelConfig, blocks: int, block_tokens: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Keys and values of all blocks, [layers, 2, blocks + 1, block_tokens, kv_heads, head_dim].

    The last block belongs to nobody: rows that only fill a batch up write there. Zeros, because what a mask
    hides is multiplied by zero, which does not hide a NaN.
    """
    shape = (config.layers, 2, blocks + 1, block_tokens, config.kv_heads, config.head_dim)
    return torch.zeros(shape, device=device, dtype=dtype)
