from dataclasses import replace

import pytest

from servegym.errors import InputError
from servegym.runtime.gateway.settings import (
    ServiceClass,
    Settings,
    parse_endpoints,
    read_classes,
    read_engines,
)

FINE = Settings(engines=("http://127.0.0.1:1",))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"engines": ()}, "engines"),
        ({"engines_file": "too.txt"}, "engines"),
        ({"scrape_s": 0.0}, "scrape_s"),
        ({"scrape_s": float("nan")}, "scrape_s"),
        ({"retries": -1}, "retries"),
        ({"port": 70000}, "port"),
        ({"profile": ("a", "b")}, "profile"),
        ({"kv_events": "tcp://127.0.0.1:1"}, "tokenizer"),
    ],
)
def test_flags_that_cannot_work_are_refused(change, told):
    FINE.check()
    with pytest.raises(InputError, match=told):
        replace(FINE, **change).check()


def test_engines_by_address():
    a, b = parse_endpoints(("http://127.0.0.1:8101/", "http://[::1]:8102"))
    assert (a.url, a.address) == ("http://127.0.0.1:8101", "127.0.0.1:8101")
    assert b.address == "[::1]:8102"


@pytest.mark.parametrize(
    "urls",
    [("127.0.0.1:1",), ("https://127.0.0.1:1",), ("http://127.0.0.1:x",), ("http://127.0.0.1:1/v1",),
     ("http://no.such.host.invalid:1",), ("http://127.0.0.1:1", "http://127.0.0.1:1/")],
)  # fmt: skip
def test_engines_that_are_none_are_refused(urls):
    with pytest.raises(InputError, match="engines"):
        parse_endpoints(urls)


def test_classes(tmp_path):
    file = tmp_path / "classes.toml"
    file.write_text("[chat]\nttft_s = 0.5\npriority = -1\n")
    assert read_classes(str(file)) == {"default": ServiceClass(), "chat": ServiceClass(0.5, priority=-1)}
    assert read_classes(None) == {"default": ServiceClass()}


@pytest.mark.parametrize(
    "text", ["[chat", "chat = 1", "[chat]\ncolour = 1", "[chat]\nttft_s = 0", "[chat]\npriority = 0.5",
             "[chat]\ntpot_s = nan", "[chat]\nweight = true"]
)  # fmt: skip
def test_classes_that_cannot_be_are_refused(tmp_path, text):
    (tmp_path / "classes.toml").write_text(text)
    with pytest.raises(InputError, match=r"classes\.toml"):
        read_classes(str(tmp_path / "classes.toml"))


def test_engines_may_stand_in_a_file(tmp_path):
    path = tmp_path / "engines"
    settings = Settings(engines_file=str(path))
    settings.check()
    for text in (None, "# none\n\n", "nonsense"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match="engines"):
            parse_endpoints(read_engines(settings))
    path.write_text("http://127.0.0.1:8101\n  # one\n\n http://127.0.0.1:8102 \n")
    assert [endpoint.port for endpoint in parse_endpoints(read_engines(settings))] == [8101, 8102]
