"""What a request asks for, read from its headers and body as far as they can be understood.

    x-gateway-inference-objective   service class (Gateway API Inference Extension)
    x-slo-ttft-ms, x-slo-tpot-ms    service level, in place of the class's (llm-d)
    x-session-id                    the conversation; the body's `prompt_cache_key` where it is absent
    priority (body)                 as vLLM's: lower is more urgent; in place of the class's

Nothing here fails: what is missing, of another type or out of range counts as not said, and the engine has
the last word on the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from servegym.runtime.gateway.settings import DEFAULT_CLASS, ServiceClass

CLASS_HEADER = "x-gateway-inference-objective"
SESSION_HEADER = "x-session-id"
SLO_HEADERS = {"ttft_s": "x-slo-ttft-ms", "tpot_s": "x-slo-tpot-ms"}
PARSED_BYTES = 1 << 20  # larger bodies are not parsed, which would take more than some 10 ms
MOST_TOKENS = 1 << 24
# Types of parts whose bytes are no tokens; in a prompt they are `MEDIUM` and a digest.
NO_TEXT = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file")
MEDIUM = b"\0"
_STREAMS = re.compile(rb'"stream"\s*:\s*true')  # in a body that is not parsed


@dataclass(slots=True)
class Ask:
    """A request for generated tokens.

    Attributes:
        prompt: its text, parts in order; or its token ids where the client sent these; emptied once it is in
            the books, which keep what follows from it.
        is_chat: engines put the text into a template of the model's before they tokenise it.
        most_tokens, least_tokens: bounds on its output; 0 where there is none.
        service: name of its class. ttft_s, tpot_s, weight, priority: what it may expect.
        session: name of its conversation, a digest of what the client sent; or None.
        streams: whether the answer comes token by token.
    """

    prompt: bytes | list[int]
    is_chat: bool = False
    most_tokens: int = 0
    least_tokens: int = 0
    service: str = DEFAULT_CLASS
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    weight: float = 1.0
    priority: int = 0
    session: str | None = None
    streams: bool = False


def read_ask(headers: Mapping[str, str], body: bytes, classes: Mapping[str, ServiceClass]) -> Ask:
    """The ask behind a request.

    Args:
        headers: by lower-case name.
        body: JSON of OpenAI's API, or anything.
        classes: by name, with `default`.
    """
    fields = _parse(body)
    name = headers.get(CLASS_HEADER, DEFAULT_CLASS)
    name = name if name in classes else DEFAULT_CLASS
    service = classes[name]
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    most = next((n for key in names if (n := _whole(fields.get(key), 1, MOST_TOKENS))), 0)
    least = _whole(fields.get("min_tokens"), 1, MOST_TOKENS) or 0
    priority = _whole(fields.get("priority"), -32768, 32767)
    key = headers.get(SESSION_HEADER) or fields.get("prompt_cache_key")
    return Ask(
        prompt=_prompt(fields) or body,
        is_chat="prompt" not in fields,
        most_tokens=most,
        least_tokens=most if fields.get("ignore_eos") is True else least,
        service=name,
        ttft_s=_seconds(headers.get(SLO_HEADERS["ttft_s"]), service.ttft_s),
        tpot_s=_seconds(headers.get(SLO_HEADERS["tpot_s"]), service.tpot_s),
        weight=service.weight,
        priority=service.priority if priority is None else priority,
        session=_digest(key) if isinstance(key, str) and key else None,
        streams=fields.get("stream") is True if fields else _STREAMS.search(body) is not None,
    )


def _digest(name: str) -> str:
    """Names are the clients', and as long as they like."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _parse(body: bytes) -> dict[str, Any]:
    if len(body) > PARSED_BYTES:
        return {}
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _whole(value: object, least: int, most: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if least <= value <= most else None


def _seconds(text: str | None, default: float) -> float:
    """A header in milliseconds."""
    try:
        seconds = float(text) / 1e3 if text else default
    except ValueError:
        return default
    return seconds if 0 < seconds <= 1e6 else default


def _prompt(fields: dict[str, Any]) -> bytes | list[int]:
    """The prompt of a completion, a chat or a response; empty where there is none."""
    prompt = fields.get("prompt", fields.get("input"))
    if isinstance(prompt, list) and set(map(type, prompt)) == {int}:
        return prompt
    found = fields.get("messages") if prompt is None else prompt
    text = "".join(_texts(found))
    return text.encode("utf-8", "surrogatepass")


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    """The strings of nested messages, in order; roles are parts of the prompt, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and value.get("type") in NO_TEXT and depth < 8:
        part = {key: item for key, item in value.items() if key != "type"}
        # Other images are another prompt.
        yield MEDIUM.decode() + _digest("".join(_texts(part, depth + 1)))
    elif isinstance(value, list | dict) and depth < 8:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, depth + 1)
