"""vLLM's KV events over ZMQ: which token blocks each engine has cached.

An engine connects to us and publishes under a topic that names its address:

    --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq",
                         "endpoint": "tcp://127.0.0.1:5557", "topic": "kv@127.0.0.1:8101@MODEL"}'

Messages are [topic, sequence number, msgpack of [time, [event, ...], rank]]; an event is an array of its name
and fields in vLLM's order. A gap in the numbers means lost events: the engine's blocks are forgotten.
"""

from __future__ import annotations

from typing import Any

import msgpack
import zmq
import zmq.asyncio

from servegym.errors import InputError
from servegym.runtime.gateway.books import Books
from servegym.runtime.gateway.telemetry import Telemetry

MOST_BYTES = 64 << 20


class KVEvents:
    """Reads events into the books.

    Raises:
        InputError: the address cannot be bound.
    """

    def __init__(self, books: Books, telemetry: Telemetry, address: str) -> None:
        self._books, self._telemetry = books, telemetry
        self._next: dict[str, int] = {}
        self._socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
        self._socket.subscribe(b"kv@")
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            hint = f"cannot listen there: {error}"
            raise InputError("gateway", "kv_events", address, hint) from error

    async def run(self) -> None:
        """Read until cancelled."""
        try:
            while True:
                self.read(await self._socket.recv_multipart())
        finally:
            self._socket.close(linger=0)

    def read(self, message: list[bytes]) -> None:
        """Take in one message; what is no event of an engine of ours is skipped."""
        try:
            topic, number, payload = message
            address = topic.decode().split("@")[1]
            _, events, *_ = msgpack.unpackb(payload)
        except (ValueError, IndexError, TypeError, msgpack.UnpackException):
            self._telemetry.count("kv_events_unreadable")
            return
        if address not in self._books.by_address:
            return
        index = self._books.by_address[address].index
        sequence = int.from_bytes(number, "big")
        if self._next.get(address, sequence) != sequence:
            index.clear()
            self._telemetry.event("kv_events_lost", engine=address)
        self._next[address] = sequence + 1
        for event in events if isinstance(events, list) else ():
            _apply(index, event)


def _apply(index: Any, event: Any) -> None:
    """One event; those of other memories than the device's do not matter here."""
    if not isinstance(event, list) or not event:
        return
    name, *fields = event
    try:
        if name == "BlockStored":
            hashes, parent, tokens, block_tokens, *rest = fields
            if len(rest) < 2 or rest[1] in (None, "GPU"):
                index.stored(hashes, parent, tokens, block_tokens)
        elif name == "BlockRemoved":
            if len(fields) < 2 or fields[1] in (None, "GPU"):
                index.removed(fields[0])
        elif name == "AllBlocksCleared":
            index.clear()
    except (ValueError, TypeError, IndexError):
        return
