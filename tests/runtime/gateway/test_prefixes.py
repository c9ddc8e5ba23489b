from hypothesis import given
from hypothesis import strategies as st

from servegym.runtime.gateway.prefixes import MOST_BLOCKS, PrefixIndex, byte_ids, token_ids


def test_an_id_names_all_that_stands_before():
    a, b = byte_ids(b"x" * 64 + b"y" * 64, 16), byte_ids(b"z" * 64 + b"y" * 64, 16)
    assert len(a) == 2
    assert a[1] != b[1]
    assert byte_ids(b"x" * 100, 16) == a[:1]
    assert byte_ids(b"x" * 63, 16) == []
    assert len(byte_ids(b"x" * 64 * (MOST_BLOCKS + 9), 16)) == MOST_BLOCKS


def test_token_blocks_continue_their_parent():
    whole = token_ids(list(range(40)), 16)
    assert len(whole) == 2
    assert token_ids(list(range(16, 32)), 16, parent=whole[0]) == whole[1:]


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=20),
    st.integers(1, 10),
    st.lists(st.integers(0, 2), max_size=12),
)
def test_what_was_sent_is_held_from_the_first_block_on(prompts, room, asked):
    index = PrefixIndex(room)
    for prompt in prompts:
        index.sent(token_ids(prompt, 1))
    assert len(index) <= room
    held = [block in index for block in token_ids(asked, 1)]
    assert held == sorted(held, reverse=True)  # a block outlives those that extend it
    assert index.leading(token_ids(asked, 1)) == sum(held)
    latest = token_ids(prompts[-1], 1)
    assert index.leading(latest) == min(len(latest), room)


def test_events_tell_what_is_held():
    index, tokens = PrefixIndex(100), list(range(48))
    ids = token_ids(tokens, 16)
    index.stored([101, 102], None, tokens[:32], 16)
    assert index.leading(ids) == 2
    index.stored([103], 102, tokens[32:], 16)
    assert index.leading(ids) == 3
    index.removed([103, 999])
    assert index.leading(ids) == 2
    index.stored([7], 999, [1] * 16, 16)  # of an unknown parent
    assert len(index) == 2
    index.clear()
    assert index.leading(ids) == 0


def test_a_block_that_two_copies_hold_goes_with_the_second():
    index, tokens = PrefixIndex(100), list(range(16))
    index.stored([1], None, tokens, 16)
    index.stored([2], None, tokens, 16)
    index.removed([1])
    assert index.leading(token_ids(tokens, 16)) == 1
    index.removed([2])
    assert index.leading(token_ids(tokens, 16)) == 0


def test_where_events_tell_of_tokens_what_was_sent_does_not_count():
    index = PrefixIndex(100)
    index.sent(token_ids([1] * 16, 16), of_tokens=True)
    assert len(index) == 1
    index.stored([1], None, [2] * 16, 16)
    index.sent(token_ids([3] * 16, 16), of_tokens=True)
    index.sent(byte_ids(b"x" * 64, 16))
    assert index.leading(token_ids([3] * 16, 16)) == 0
    assert index.leading(byte_ids(b"x" * 64, 16)) == 1
