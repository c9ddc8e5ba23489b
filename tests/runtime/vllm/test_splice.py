"""Streams joined at every place, with tokens without text, stop strings and engines that die."""

from __future__ import annotations

import random

import pytest

from servegym.runtime.vllm.splice import Piece, Splice
from tests.runtime.vllm.fake_engine import answer, is_partial, text_of

PROMPT = [7, 8, 9]


def choices(prompt: list[int], tokens: list[int], sizes: random.Random, finish: str = "length") -> list[dict]:
    """A stream as vLLM cuts it."""
    made, at = [], 0
    while at < len(tokens):
        some = tokens[at : at + sizes.randint(1, 3)]
        text = text_of(tokens[: at + len(some)])[len(text_of(tokens[:at])) :]
        at += len(some)
        made.append({"index": 0, "text": text, "token_ids": some, "finish_reason": None})
    made[0]["prompt_token_ids"] = prompt
    made[-1]["finish_reason"] = finish
    return made


def whole(pieces: list[Piece]) -> tuple[str, list[int]]:
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids]


@pytest.mark.parametrize("seed", range(30))
def test_cut_anywhere_the_answer_is_the_same(seed):
    sizes = random.Random(seed)
    tokens = answer(PROMPT, 40)
    splice, pieces = Splice(max_tokens=40), []
    while not splice.finished:
        splice.begin_leg()
        done = splice.tokens
        leg = choices([*PROMPT, *done], answer([*PROMPT, *done], 40 - len(done)), sizes)
        for choice in leg[: sizes.randint(1, len(leg))]:
            piece = splice.push(choice)
            if piece is not None:
                pieces.append(piece)
        tail = splice.tokens[len(splice.tokens) - splice.doubtful :]
        whole_characters = [k for k, token in enumerate(tail) if not is_partial(token)]
        if not splice.finished:
            splice.take_back(len(tail) - 1 - max(whole_characters, default=-1))
    assert whole(pieces) == (text_of(tokens), tokens)
    assert splice.prompt == PROMPT
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["length"]


def test_a_token_without_text_is_held_back_and_generated_again():
    splice = Splice()
    partial = next(t for t in range(2, 99) if is_partial(t))
    first = {"text": " 3", "token_ids": [3], "prompt_token_ids": PROMPT, "finish_reason": None}
    assert splice.push(first).token_ids == [3]
    assert splice.push({"text": "", "token_ids": [partial], "finish_reason": None}) is None
    assert splice.tokens == [3]
    splice.begin_leg()
    piece = splice.push({"text": f" {partial}+4", "token_ids": [partial, 4], "finish_reason": None})
    assert piece == Piece(f" {partial}+4", [partial, 4])
    assert splice.tokens == [3, partial, 4]


@pytest.mark.parametrize(
    ("stops", "keeps", "shown", "reason"),
    [
        (["lo w"], False, "hel", "lo w"),
        (["lo w"], True, "hello w", "lo w"),
        (["world", "o"], False, "hell", "o"),
        (["xyz"], False, "hello world", None),
    ],
)
def test_a_stop_string_across_the_seam_ends_the_answer(stops, keeps, shown, reason):
    splice = Splice(stops, keeps)
    shown_so_far, pieces = "", []
    for k, character in enumerate("hello world"):
        if k == 4:
            splice.begin_leg()
        choice = {"text": character, "token_ids": [k], "finish_reason": "length" if k == 10 else None}
        pieces.append(splice.push({**choice, "prompt_token_ids": PROMPT}))
        shown_so_far += pieces[-1].text
        assert (shown if reason else "hello world").startswith(shown_so_far)  # nothing is taken back
        if splice.finished:
            break
    assert shown_so_far == shown
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop" if reason else "length", reason)


def test_an_answer_that_lacks_only_its_end_is_ended():
    splice = Splice(max_tokens=1)
    splice.push({"text": " 3", "token_ids": [3], "prompt_token_ids": PROMPT, "finish_reason": None})
    assert splice.is_exhausted() and not splice.finished
    assert splice.exhaust().finish_reason == "length"
    assert splice.finished


@pytest.mark.parametrize(
    "choice",
    [
        {"text": "a", "token_ids": [1]},  # does not tell the prompt
        {"text": "a", "token_ids": ["1"], "prompt_token_ids": [1]},
        {"text": "a", "token_ids": 5, "prompt_token_ids": [1]},
        {"text": 5, "token_ids": [1], "prompt_token_ids": [1]},
        {"text": "a", "token_ids": [1], "prompt_token_ids": [True]},
    ],
)
def test_what_no_vllm_sends_is_refused(choice):
    with pytest.raises(ValueError):
        Splice().push(choice)
