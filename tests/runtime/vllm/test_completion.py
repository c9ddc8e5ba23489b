"""Which requests may move, and what the legs of a move ask for."""

from __future__ import annotations

import json

import pytest

from servegym.errors import InputError
from servegym.runtime.vllm.completion import Completion, read_completion


def completion(**fields) -> Completion:
    return read_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": [1, 2, 3], "temperature": 0, "seed": 5},
        {"n": 1, "echo": False, "presence_penalty": 0.0, "logprobs": None, "suffix": None},
        {"stop": "x", "max_tokens": 5, "repetition_penalty": 1.1, "logit_bias": {"5": 1}},
        {"stop": ["x", "yy"], "ignore_eos": True, "min_tokens": 0},
    ],
)
def test_free_to_move(fields):
    assert completion(**fields).pinned == ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"seed": 5}, "seed"),
        ({"seed": 5, "temperature": 0.7}, "seed"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"something_new": 1}, "something_new"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": "x", "min_tokens": 3}, "min_tokens"),
    ],
)
def test_pinned_by(fields, field):
    assert completion(**fields).pinned == field


def test_the_first_leg_asks_for_ids_and_leaves_stop_strings_to_us():
    asked = completion(stop="x", stream=False, stream_options={"include_usage": True}, user="u")
    leg = asked.leg(None, 0)
    assert leg == {"model": "m", "prompt": "hi", "user": "u", "stream": True, "return_token_ids": True}
    assert asked.stops == ["x"] and not asked.stream and asked.include_usage


def test_a_later_leg_asks_for_the_rest():
    leg = completion(max_tokens=10, min_tokens=4, request_id="r", temperature=0).leg([1, 2, 3, 4], 3)
    assert leg["prompt"] == [1, 2, 3, 4] and leg["add_special_tokens"] is False
    assert (leg["max_tokens"], leg["min_tokens"], leg["temperature"]) == (7, 1, 0)
    assert "request_id" not in leg


def test_tokens_left_out_are_16_and_null_is_the_engines_limit():
    assert completion().leg([1, 2], 1)["max_tokens"] == 15
    unlimited = completion(max_tokens=None)
    assert unlimited.max_tokens is None and unlimited.leg([1, 2], 1)["max_tokens"] is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"5", b"\xff", b"null", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(InputError, match="v1/completions"):
        read_completion(data)
