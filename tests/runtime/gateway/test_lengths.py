import pytest

from servegym.errors import InputError
from servegym.runtime.gateway.asks import Ask
from servegym.runtime.gateway.lengths import TOKENIZED_BYTES, Lengths, load_tokenizer


def words(text: bytes) -> list[int]:
    return [len(word) for word in text.split()]


def test_without_a_tokenizer_bytes_count_at_a_rate_that_is_learned():
    lengths, ask = Lengths(), Ask(b"x" * 1000)
    assert lengths.prompt(ask)[0] == 250
    for _ in range(50):
        lengths.learn("default", 1000, 500, 10)
    assert lengths.prompt(ask) == (500, ())
    assert lengths.bytes_per_token == pytest.approx(2.0, rel=0.01)


def test_a_tokenizer_counts_exactly_and_the_rest_of_a_long_prompt_by_bytes():
    lengths = Lengths(words)
    assert lengths.prompt(Ask(b"a bb ccc")) == (3, [1, 2, 3])
    tokens, ids = lengths.prompt(Ask(b"ab " * (2 * TOKENIZED_BYTES)))
    assert len(ids) == TOKENIZED_BYTES // 3 + 1
    assert tokens == len(ids) + round(5 * TOKENIZED_BYTES / 4)


def test_a_chat_is_counted_but_its_ids_are_the_template_s():
    assert Lengths(words).prompt(Ask(b"a bb", is_chat=True)) == (2, ())


def test_token_ids_count_as_they_are():
    assert Lengths().prompt(Ask([5, 6])) == (2, [5, 6])
    assert Lengths().prompt(Ask([]))[0] == 1


def test_outputs_are_predicted_by_class_within_the_request_s_bounds():
    lengths = Lengths()
    assert lengths.output(Ask(b"", most_tokens=16)) == 16
    assert lengths.output(Ask(b"")) == 256
    for _ in range(5):
        lengths.learn("chat", 0, None, 40)
    assert lengths.output(Ask(b"", service="chat")) == 40
    assert lengths.output(Ask(b"", service="other")) == 256
    assert lengths.output(Ask(b"", service="chat", least_tokens=60)) == 60


def test_recent_outputs_weigh_more():
    lengths = Lengths()
    for tokens in [10] * 100 + [100] * 300:
        lengths.learn("default", 0, None, tokens)
    assert 90 <= lengths.output(Ask(b"")) <= 100


def test_tokenizers_that_are_none_are_refused(tmp_path):
    assert load_tokenizer(None) is None
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"give a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_a_real_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = models.WordLevel({"[UNK]": 0, "hello": 1, "you": 2}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encode = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert encode is not None
    assert list(encode(b"hello you \xff")) == [1, 2, 0]
