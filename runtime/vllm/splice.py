"""Streams of several engines joined into the one that the client sees, each token once.

A token whose bytes do not yet end a character comes without text. It is held back until the text is there:
when the request moves meanwhile, the next engine generates it again, so that no byte is lost at the seam.
Several tokens in one chunk leave open which of them their text covers; `doubtful` counts those, and who knows
the tokenizer tells by `take_back` which are without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Piece:
    """A part of the answer for the client."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Splice:
    """The answer so far.

    Attributes:
        prompt: token ids of the prompt, once an engine told them.
        tokens: generated ones that will not be generated again.
        doubtful: of these the last ones, whose text may still be to come.
        finished: whether the answer is complete.
    """

    def __init__(
        self, stops: Sequence[str] = (), keeps_stop: bool = False, max_tokens: int | None = None
    ) -> None:
        self.prompt: list[int] | None = None
        self.tokens: list[int] = []
        self.doubtful = 0
        self.finished = False
        self._stops, self._keeps_stop, self._max_tokens = stops, keeps_stop, max_tokens
        self._lag = max((len(stop) for stop in stops), default=1) - 1
        self._pending: list[int] = []
        self._again = 0  # tokens that the client has and an engine generates once more
        self._text, self._shown = "", 0

    def begin_leg(self) -> None:
        """Another engine goes on behind `tokens`; what was held back is generated again."""
        self._pending, self.doubtful = [], 0

    def take_back(self, count: int) -> None:
        """Let the next engine generate the last tokens again; the client has them, but not their text."""
        del self.tokens[len(self.tokens) - count :]
        self._again, self.doubtful = self._again + count, 0

    def push(self, choice: Mapping[str, Any]) -> Piece | None:
        """Take a choice of an engine's chunk; returns what the client may see now.

        Raises:
            ValueError: for one that vLLM would not send; the engine is not to be believed.
        """
        ids, text, finish = choice.get("token_ids") or [], choice.get("text", ""), choice.get("finish_reason")
        if self.prompt is None:
            self.prompt = _ids(choice.get("prompt_token_ids"))
        if not isinstance(text, str):
            raise ValueError(f"text = {text!r}")
        self._pending += _ids(ids)
        if not text and finish is None:
            return None
        new, self._pending = self._pending, []
        self.tokens += new
        self._text += text
        self.doubtful = len(ids) - 1
        seen = min(self._again, len(new))
        self._again -= seen
        new = new[seen:]
        stop = self._find_stop(len(text))
        if stop is not None:
            return self._finish(new, "stop", stop)
        if finish is not None:
            return self._finish(new, finish, choice.get("stop_reason"))
        return Piece(self._show(max(self._shown, len(self._text) - self._lag)), new)

    def is_exhausted(self) -> bool:
        """Whether all that the client asked for is there, with its text, though no engine said so."""
        most = self._max_tokens
        return most is not None and not self.doubtful and 0 < most <= len(self.tokens)

    def exhaust(self) -> Piece:
        """End an exhausted answer whose engine died before it could."""
        return self._finish([], "length", None)

    def _find_stop(self, new: int) -> str | None:
        """The stop string that ends first in the new text, which is cut there."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            at = self._text.find(stop, max(0, len(self._text) - new - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = (at + len(stop), stop)
        if best is None:
            return None
        end, stop = best
        self._text = self._text[: end if self._keeps_stop else end - len(stop)]
        return stop

    def _finish(self, new: list[int], reason: str, stop_reason: int | str | None) -> Piece:
        self.finished = True
        return Piece(self._show(len(self._text)), new, reason, stop_reason)

    def _show(self, until: int) -> str:
        text, self._shown = self._text[self._shown : until], until
        return text


def _ids(ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise ValueError(f"token_ids = {str(ids)[:60]}")
    return ids
