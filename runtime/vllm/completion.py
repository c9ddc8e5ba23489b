"""A client's completion request, and the requests to engines that together answer it.

A request may move from engine to engine when its next token depends on nothing but the tokens so far: then
prompt and generated tokens, sent as a new prompt, go on where the other engine stopped. Fields that keep
other state with the engine, such as penalties that count output tokens or a grammar, pin it to its engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from servegym.errors import InputError

WHERE = "POST /v1/completions"
# Fields that keep their meaning in every leg of a move.
_PLAIN = {
    "model", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "user", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "seed",
    "skip_special_tokens", "spaces_between_special_tokens", "add_special_tokens", "allowed_token_ids",
    "logit_bias", "repetition_penalty", "priority", "cache_salt", "session_id", "request_id",
    "return_token_ids", "vllm_xargs",
}  # fmt: skip
# Fields that keep state with the engine, unless they have one of these values.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
}
_DEFAULT_TOKENS = 16  # OpenAI's, and vLLM's


class Completion:
    """One request as the client sent it.

    Attributes:
        body: its fields.
        stream, include_usage, wants_ids: what the answer looks like.
        prompt: text or token ids.
        max_tokens: None where the engine's own limit holds.
        stops: strings that end the answer; looked for here, because an engine sees only its own part of it.
        pinned: the field that ties the request to its engine, "" where it may move.
        headers: what goes to engines with each leg.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.stream = body.get("stream") is True
        options = body.get("stream_options")
        self.include_usage = isinstance(options, Mapping) and options.get("include_usage") is True
        self.wants_ids = body.get("return_token_ids") is True
        self.keeps_stop = body.get("include_stop_str_in_output") is True
        self.prompt = body.get("prompt")
        self.max_tokens = body.get("max_tokens", _DEFAULT_TOKENS)
        self.pinned = _pinning_field(body)
        self.headers: dict[str, str] = {}
        stop = body.get("stop") or []
        self.stops: list[str] = [] if self.pinned else [stop] if isinstance(stop, str) else stop

    def leg(self, tokens: Sequence[int] | None, generated: int) -> dict[str, Any]:
        """The request for the rest of the answer.

        Args:
            tokens: prompt and generated tokens so far; None before the first engine told the prompt's tokens.
            generated: how many of them are generated.
        """
        body = dict(self.body)
        body.update(stream=True, return_token_ids=True)
        for field in ("stop", "stream_options"):
            body.pop(field, None)
        if tokens is None:
            return body
        body.update(prompt=list(tokens), add_special_tokens=False)
        body.pop("request_id", None)  # the engine may still know the earlier leg by it
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens - generated
        if "min_tokens" in body:
            body["min_tokens"] = max(0, (body["min_tokens"] or 0) - generated)
        return body

    def prompt_estimate(self) -> int:
        """Tokens of the prompt; about a quarter of its bytes while it is text."""
        if isinstance(self.prompt, str):
            return max(1, len(self.prompt.encode(errors="replace")) // 4)
        return max(1, len(self.prompt)) if isinstance(self.prompt, list) else 1


def read_completion(data: bytes) -> Completion:
    """Parse a body. What an engine would refuse is left to the engine: it is pinned and sent as it came.

    Raises:
        InputError: for what is no JSON object.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(WHERE, "body", data[:40], f"is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise InputError(WHERE, "body", type(body).__name__, "give a JSON object")
    return Completion(body)


def _pinning_field(body: dict[str, Any]) -> str:
    if not _is_one_prompt(body.get("prompt")):
        return "prompt"
    if body.get("seed") is not None and body.get("temperature") != 0:
        return "seed"  # the generator's state stays behind
    for field, valid in (("max_tokens", _is_count), ("min_tokens", _is_count), ("stop", _is_stop)):
        if body.get(field) is not None and not valid(body[field]):
            return field
    if body.get("stop") and body.get("min_tokens"):
        return "min_tokens"  # stop strings count only behind them, which the text does not show
    for field, value in body.items():
        if field not in _PLAIN and value is not None and value not in _HARMLESS.get(field, ()):
            return field
    return ""


def _is_one_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_stop(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and all(isinstance(one, str) and one for one in strings)
