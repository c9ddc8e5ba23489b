import asyncio

import msgpack
import pytest
import zmq
import zmq.asyncio

from servegym.errors import InputError
from servegym.runtime.gateway.kv_events import KVEvents
from servegym.runtime.gateway.prefixes import token_ids
from servegym.runtime.gateway.telemetry import Telemetry
from tests.runtime.gateway.running import free_port, until

TOPIC, TOKENS = b"kv@127.0.0.1:1@tiny", list(range(32))


def message(number: int, *events: list, topic: bytes = TOPIC) -> list[bytes]:
    return [topic, number.to_bytes(8, "big"), msgpack.packb([1.5, list(events), 0])]


def stored(*hashes: object, tokens=TOKENS, parent=None, medium="GPU") -> list:
    return ["BlockStored", list(hashes), parent, tokens, 16, None, medium]


@pytest.fixture
def events(make_books):
    found = KVEvents(make_books(2), Telemetry(), f"tcp://127.0.0.1:{free_port()}")
    yield found
    found._socket.close(linger=0)


def held(events: KVEvents) -> list[int]:
    return [engine.index.leading(token_ids(TOKENS, 16)) for engine in events._books.engines]


def test_blocks_that_an_engine_stores_and_drops(events):
    events.read(message(0, stored(b"a", b"b")))
    assert held(events) == [2, 0]
    events.read(message(1, ["BlockRemoved", [b"b"], "GPU"]))
    assert held(events) == [1, 0]
    events.read(message(2, ["AllBlocksCleared"]))
    assert held(events) == [0, 0]


def test_blocks_in_other_memories_do_not_count(events):
    events.read(message(0, stored(1, 2, medium="CPU")))
    assert held(events) == [0, 0]
    events.read(message(1, stored(1, 2), ["BlockRemoved", [1, 2], "CPU"]))
    assert held(events) == [2, 0]


def test_lost_messages_make_the_index_forget(events):
    events.read(message(0, stored(1, tokens=TOKENS[:16])))
    events.read(message(2, stored(2, tokens=TOKENS[16:], parent=1)))
    assert held(events) == [0, 0]
    events.read(message(3, stored(1, 2)))
    assert held(events) == [2, 0]


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [TOPIC, b"", b"\xc1"],
        [b"kv@", b"\0" * 8, b""],
        [b"\xff", b"\0" * 8, msgpack.packb([1, [], 0])],
        message(0, topic=b"kv@10.0.0.1:1@tiny"),
        message(0, 7, [], ["Unknown"], ["BlockStored"], ["BlockStored", 1, 2, 3, 4], ["BlockRemoved", 5]),
        message(0, ["BlockStored", [[1]], None, [1] * 16, 16], stored(1, tokens=["x", {}], parent=[])),
        message(0, ["BlockStored", [1], None, [1] * 16, 0], ["BlockStored", [1], None, [1] * 16, -3]),
        [TOPIC, b"\0" * 8, msgpack.packb([1, {"a": 1}, 0])],
        [TOPIC, b"\0" * 8, msgpack.packb(3)],
    ],
)
def test_what_is_no_event_is_skipped(events, parts):
    events.read(message(0, stored(1, 2)))
    events._next.clear()
    events.read(parts)
    assert held(events) == [2, 0]


def test_over_a_real_socket(make_books):
    async def test():
        address = f"tcp://127.0.0.1:{free_port()}"
        events = KVEvents(make_books(2), Telemetry(), address)
        with pytest.raises(InputError, match="kv_events"):
            KVEvents(events._books, Telemetry(), address)
        task = asyncio.create_task(events.run())
        engine = zmq.asyncio.Context.instance().socket(zmq.PUB)
        engine.connect(address)
        await asyncio.sleep(0.2)  # as long as the subscription takes to arrive
        await engine.send_multipart(message(0, stored(1, 2)))
        await until(lambda: held(events) == [2, 0])
        task.cancel()
        engine.close(linger=0)

    asyncio.run(test())
