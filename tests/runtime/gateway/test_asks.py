import json

import pytest

from servegym.runtime.gateway.asks import MEDIUM, PARSED_BYTES, Ask, read_ask
from servegym.runtime.gateway.settings import ServiceClass

CLASSES = {"default": ServiceClass(), "batch": ServiceClass(30.0, 0.2, 0.5, 5)}


def ask(body: object, **headers: str) -> Ask:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_ask(named, body if isinstance(body, bytes) else json.dumps(body).encode(), CLASSES)


def test_a_completion():
    found = ask({"prompt": "hello", "max_tokens": 7, "stream": True, "min_tokens": 3})
    assert (found.prompt, found.most_tokens, found.least_tokens, found.streams) == (b"hello", 7, 3, True)
    assert (found.service, found.priority, found.session) == ("default", 0, None)


def test_a_chat_counts_roles_and_all_text_parts():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]},
    ]
    assert ask({"messages": messages}).prompt == b"systembe briefusertexthitextyou"
    assert ask({"messages": messages}).is_chat
    assert not ask({"prompt": "hi"}).is_chat


def test_the_same_conversation_begins_with_the_same_bytes():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    longer = [*turns, {"role": "user", "content": "c"}]
    assert ask({"messages": longer}).prompt.startswith(ask({"messages": turns}).prompt)


def test_token_ids_are_taken_as_they_are():
    assert ask({"prompt": [1, 2, 3]}).prompt == [1, 2, 3]
    assert isinstance(ask({"prompt": [1, True]}).prompt, bytes)


def test_class_session_and_service_level_come_from_headers():
    found = ask({"prompt": "x"}, x_gateway_inference_objective="batch", x_session_id="s", x_slo_ttft_ms="250")
    assert (found.service, found.priority, found.weight) == ("batch", 5, 0.5)
    assert (found.ttft_s, found.tpot_s) == (0.25, 0.2)
    assert found.session == ask({"prompt": "y", "prompt_cache_key": "s"}).session
    assert found.session != ask({"prompt": "x"}, x_session_id="t").session


def test_the_body_s_priority_wins_over_the_class_s():
    found = ask({"prompt": "x", "priority": -2}, x_gateway_inference_objective="batch")
    assert found.priority == -2


def test_ignore_eos_fixes_the_output():
    assert ask({"prompt": "x", "max_tokens": 9, "ignore_eos": True}).least_tokens == 9


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b'"text"',
        b'{"prompt": {"a": [1, {"b": null}]}}',
        b'{"max_tokens": 1e999, "priority": "high", "stream": "yes", "min_tokens": -4}',
        b'{"prompt": "\\ud800"}',
        json.dumps({"prompt": "x" * PARSED_BYTES}).encode(),
    ],
)
def test_what_cannot_be_understood_still_is_a_request(body):
    found = ask(body, x_slo_ttft_ms="soon", x_gateway_inference_objective="unknown")
    assert (found.most_tokens, found.least_tokens, found.priority, found.streams) == (0, 0, 0, False)
    assert (found.ttft_s, found.service) == (1.0, "default")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e12"])
def test_service_levels_out_of_range_count_as_not_said(value):
    assert ask({"prompt": "x"}, x_slo_tpot_ms=value).tpot_s == 0.05


def test_names_of_sessions_take_no_more_room_than_others():
    assert len(ask({"prompt": "x", "prompt_cache_key": "k" * 500_000}).session) == 32


def test_the_bytes_of_an_image_are_no_text_but_tell_it_from_others():
    def seen(data: str) -> bytes:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        content = [{"type": "text", "text": "what is this?"}, image]
        return ask({"messages": [{"role": "user", "content": content}]}).prompt

    assert b"what is this?" in seen("A" * 50_000)
    assert MEDIUM in seen("A")
    assert len(seen("A" * 50_000)) < 100
    assert seen("A" * 50_000) != seen("B" * 50_000)


def test_a_body_too_large_to_be_parsed_says_whether_it_streams():
    large = {"prompt": "x" * PARSED_BYTES, "stream": True}
    assert ask(json.dumps(large).encode()).streams
    assert ask(json.dumps(large, separators=(",", ":")).encode()).streams
    assert not ask(json.dumps({**large, "stream": False}).encode()).streams
