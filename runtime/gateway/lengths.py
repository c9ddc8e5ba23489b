"""Tokens before they are known: of prompts by a tokenizer or by bytes, of outputs by what came before.

Without a tokenizer a prompt of b bytes counts as b / r tokens. r starts at 4 and is learned from the `usage`
of answers: (sum of prompt bytes) / (sum of prompt tokens), where each answer takes a hundredth off the weight
of those before it.

The output of a request is predicted as the mean of its class's answers so far, likewise over about the last
hundred, within its own bounds (max_tokens, min_tokens, ignore_eos). A class starts at 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from servegym.errors import InputError
from servegym.runtime.gateway.asks import Ask

BYTES_PER_TOKEN = 4.0
OUTPUT_TOKENS = 256.0
MEMORY = 0.99  # weight of all earlier answers when one more comes
TOKENIZED_BYTES = 1 << 14  # of a longer prompt the rest counts by bytes, so that no decision takes long

Encode = Callable[[bytes], Sequence[int]]


def load_tokenizer(path: str | None) -> Encode | None:
    """The encoder of a tokenizer.json; None for None.

    Raises:
        InputError: no such file, no tokenizer in it, or the package is missing.
    """
    if path is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("gateway", "tokenizer", path, "install the package `tokenizers`") from error
    if not Path(path).is_file():
        raise InputError("gateway", "tokenizer", path, "there is no such file; give a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare exceptions
        raise InputError(path, "tokenizer", str(error), "give a tokenizer.json") from error
    return lambda text: tokenizer.encode(text.decode("utf-8", "replace")).ids


class _Mean:
    """A mean whose older values fade."""

    def __init__(self, start: float) -> None:
        self._sum, self._weight = start, 1.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = self._sum * MEMORY + value
        self._weight = self._weight * MEMORY + weight

    @property
    def value(self) -> float:
        return self._sum / self._weight


class Lengths:
    """Counts prompts, predicts outputs, learns from answers."""

    def __init__(self, encode: Encode | None = None) -> None:
        self._encode = encode
        self._bytes_per_token = _Mean(BYTES_PER_TOKEN)
        self._output: dict[str, _Mean] = {}

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a prompt per token, as learned so far."""
        return self._bytes_per_token.value

    def prompt(self, ask: Ask) -> tuple[int, Sequence[int]]:
        """Tokens of a prompt, at least 1, and the ids of as many leading ones as are known.

        A chat's are not: its template is the engine's.
        """
        if isinstance(ask.prompt, list):
            return max(len(ask.prompt), 1), ask.prompt
        if self._encode is None:
            return max(round(len(ask.prompt) / self.bytes_per_token), 1), ()
        ids = self._encode(ask.prompt[:TOKENIZED_BYTES])
        rest = max(len(ask.prompt) - TOKENIZED_BYTES, 0)
        tokens = max(len(ids) + round(rest / self.bytes_per_token), 1)
        return tokens, () if ask.is_chat else ids

    def output(self, ask: Ask) -> int:
        """Predicted output tokens, at least 1."""
        mean = self._output.get(ask.service)
        tokens = max(round(OUTPUT_TOKENS if mean is None else mean.value), ask.least_tokens, 1)
        return min(tokens, ask.most_tokens) if ask.most_tokens else tokens

    def learn(
        self, service: str, prompt_bytes: int, prompt_tokens: int | None, output_tokens: int | None
    ) -> None:
        """An answer has ended; None where its usage is not known, 0 bytes where the prompt was no text."""
        if prompt_bytes and prompt_tokens:
            self._bytes_per_token.add(prompt_bytes / BYTES_PER_TOKEN, prompt_tokens / BYTES_PER_TOKEN)
        if output_tokens:
            self._output.setdefault(service, _Mean(float(output_tokens))).add(float(output_tokens))
