"""Frames that gRPC peers may send, and those they may not; grpcio and Envoy play in other tests."""

import asyncio
import random
from contextlib import asynccontextmanager, suppress
from struct import pack, unpack

import pytest
from hpack import Encoder

from servegym.runtime.gateway import http2
from servegym.runtime.gateway.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MOST_FRAME,
    MOST_WINDOW,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    WINDOW,
    WINDOW_UPDATE,
    Connection,
    RefusedError,
)


def encoded(path: str) -> bytes:
    """Headers without a table of earlier ones."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode([(":method", "POST"), (":path", path), ("content-type", "application/grpc")])


HEAD = encoded("/echo")
OK, UNIMPLEMENTED, EXHAUSTED = b"\x0bgrpc-status\x010", b"\x0bgrpc-status\x0212", b"\x0bgrpc-status\x018"
LIMIT = 1 << 20


class Echo:
    """Answers a message with itself, unless it is mute; `no` with a refusal."""

    is_mute = False

    def __init__(self) -> None:
        self.closed = 0

    def message(self, data: bytes):
        if data == b"no":
            raise RefusedError(http2.INVALID_ARGUMENT, "no")
        if not self.is_mute:
            yield data

    def close(self) -> None:
        self.closed += 1


def frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + pack(">I", number) + payload


def message(data: bytes) -> bytes:
    return b"\0" + pack(">I", len(data)) + data


def opened(number: int, head: bytes = HEAD) -> bytes:
    return frame(HEADERS, END_HEADERS, number, head)


def said(number: int, data: bytes, flags: int = END_STREAM) -> bytes:
    return frame(DATA, flags, number, message(data))


class Peer:
    """The client's side, which says what the test wants."""

    def __init__(self, reader, writer, calls, connections) -> None:
        self.reader, self.writer, self.calls, self.connections = reader, writer, calls, connections

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def frames(self) -> tuple[int, int, int, bytes]:
        """The next frame: kind, flags, stream, payload."""
        head = await self.reader.readexactly(9)
        length = int.from_bytes(head[:3], "big")
        return head[3], head[4], unpack(">I", head[5:])[0], await self.reader.readexactly(length)

    async def next(self, *kinds: int) -> tuple[int, int, int, bytes]:
        """The next frame of these kinds."""
        while (found := await self.frames())[0] not in kinds:
            pass
        return found

    async def answer(self, number: int) -> tuple[bytes, bytes]:
        """All data of a stream, and its trailers."""
        body = b""
        while True:
            kind, flags, stream, payload = await self.next(DATA, HEADERS)
            assert stream == number
            if kind == DATA:
                assert len(payload) <= MOST_FRAME
                body += payload
            elif flags & END_STREAM:
                return body, payload

    async def broken(self) -> int:
        """The error code with which the connection ends."""
        code = unpack(">I", (await self.next(GOAWAY))[3][4:8])[0]
        assert await self.reader.read() == b""
        return code


@asynccontextmanager
async def connected(greets: bool = True):
    calls: list[Echo] = []
    connections: set[Connection] = set()

    def open_call(path: str):
        if path != "/echo":
            return None
        calls.append(Echo())
        return calls[-1]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(open_call, LIMIT, connections), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1 << 24)
    peer = Peer(reader, writer, calls, connections)
    if greets:
        peer.send(PREFACE, frame(SETTINGS, 0, 0), frame(SETTINGS, ACK, 0))
    try:
        yield peer
    finally:
        writer.close()
        server.close()
        async with asyncio.timeout(10):
            while connections:
                await asyncio.sleep(0.01)
        assert all(call.closed for call in calls)


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    "frames",
    [
        [opened(1), said(1, b"hello")],
        [frame(HEADERS, END_HEADERS | PADDED, 1, b"\3" + HEAD + b"\0\0\0"), said(1, b"hello")],
        [frame(HEADERS, END_HEADERS | PRIORITISED, 1, b"\0\0\0\0\7" + HEAD), said(1, b"hello")],
        [frame(HEADERS, 0, 1, HEAD[:5]), frame(CONTINUATION, 0, 1, HEAD[5:9]),
         frame(CONTINUATION, END_HEADERS, 1, HEAD[9:]), said(1, b"hello")],
        [opened(1), frame(DATA, PADDED | END_STREAM, 1, b"\2" + message(b"hello") + b"\0\0")],
        [opened(1), said(1, b"hello", 0), frame(DATA, END_STREAM, 1)],
        [opened(1), said(1, b"hello", 0), frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\0\1a\1b")],
        [opened(1), *(frame(DATA, 0, 1, bytes((b,))) for b in message(b"hello")), frame(DATA, END_STREAM, 1)],
        [frame(PRIORITY, 0, 1, b"\0\0\0\0\7"), frame(99, 255, 7, b"new"), opened(1), said(1, b"hello")],
    ],
)  # fmt: skip
@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_a_call_is_answered_however_it_is_framed(frames, cut):
    async def test():
        async with connected(greets=False) as peer:
            data = PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames)
            for at in range(0, len(data), cut):
                peer.send(data[at : at + cut])
                await asyncio.sleep(0)
            body, trailers = await peer.answer(1)
            assert body == message(b"hello")
            assert trailers.endswith(OK)

    run(test)


def test_a_call_that_its_client_ends_and_resets_at_once_gets_no_more():
    async def test():
        async with connected() as peer:
            peer.send(opened(1), said(1, b"hello", 0))
            await peer.next(DATA)
            peer.send(frame(DATA, END_STREAM, 1) + frame(RST_STREAM, 0, 1, pack(">I", 0)))
            peer.send(frame(PING, 0, 0, b"12345678"))
            assert (await peer.next(PING, HEADERS))[0] == PING

    run(test)


def test_what_comes_behind_the_end_of_a_call_is_not_answered():
    async def test():
        async with connected() as peer:
            peer.send(opened(1) + said(1, b"hello") + said(1, b"again"))
            assert (await peer.answer(1))[0] == message(b"hello")

    run(test)


def test_calls_go_on_side_by_side_and_headers_may_be_compressed():
    async def test():
        async with connected(greets=False) as peer:
            encoder = Encoder()
            fields = [(":path", "/echo"), ("x-a", "b" * 50)]
            peer.send(PREFACE, frame(SETTINGS, 0, 0))
            peer.send(opened(1, encoder.encode(fields)), opened(3, encoder.encode(fields)))
            encoder.header_table_size = 0  # as it is told
            peer.send(frame(SETTINGS, ACK, 0))
            for number in range(5, 25, 2):
                peer.send(opened(number, encoder.encode(fields)))
            for number in reversed(range(1, 25, 2)):
                peer.send(said(number, b"%d" % number))
                assert (await peer.answer(number))[0] == message(b"%d" % number)

    run(test)


def test_answers_wait_for_the_windows():
    async def test():
        async with connected(greets=False) as peer:
            long, short = b"x" * 200_000, b"y" * 50
            peer.send(PREFACE, frame(SETTINGS, 0, 0, pack(">HI", INITIAL_WINDOW, 10)))
            peer.send(opened(1), *(frame(DATA, 0, 1, message(long)[at : at + MOST_FRAME])
                                   for at in range(0, len(long) + 5, MOST_FRAME)))  # fmt: skip
            peer.send(frame(DATA, END_STREAM, 1))
            body = (await peer.next(DATA))[3]
            assert body == message(long)[:10]
            peer.send(frame(SETTINGS, 0, 0, pack(">HI", INITIAL_WINDOW, 15)))  # of open streams, too
            body += (await peer.next(DATA))[3]
            peer.send(frame(WINDOW_UPDATE, 0, 1, pack(">I", 1 << 20)))
            while len(body) < WINDOW:
                body += (await peer.next(DATA))[3]
            peer.send(opened(3), said(3, short))  # waits behind the connection's window
            peer.send(frame(WINDOW_UPDATE, 0, 3, pack(">I", 1 << 20)))
            peer.send(frame(PING, 0, 0, b"12345678"))
            assert (await peer.next(PING, DATA))[0] == PING
            assert len(body) == WINDOW
            peer.send(frame(WINDOW_UPDATE, 0, 0, pack(">I", 1 << 20)))
            answers = {1: body, 3: b""}
            for _ in range(2):
                while (found := await peer.next(DATA, HEADERS))[1] & END_STREAM == 0:
                    answers[found[2]] += found[3] if found[0] == DATA else b""
            assert answers == {1: message(long), 3: message(short)}

    run(test)


async def send_much(peer: Peer) -> int:
    """Messages until the client may be let send as many bytes again; how many that were."""
    peer.send(opened(1))
    sent = 0
    while sent < http2.REFILL:
        peer.send(*[frame(DATA, 0, 1, message(b"z" * 10_000))] * 20)
        sent += 20 * 10_005
        await peer.writer.drain()
    return sent


def test_the_client_is_let_send_more():
    async def test():
        async with connected() as peer:
            assert unpack(">HIHI", (await peer.next(SETTINGS))[3])[3] == 2 * http2.REFILL
            assert (await peer.next(WINDOW_UPDATE))[2:] == (0, pack(">I", MOST_WINDOW - WINDOW))
            Echo.is_mute = True
            sent = await send_much(peer)
            for number in (0, 1):
                _, _, stream, more = await peer.next(WINDOW_UPDATE)
                assert stream == number
                assert http2.REFILL <= unpack(">I", more)[0] <= sent

    try:
        run(test)
    finally:
        Echo.is_mute = False


def test_a_client_that_takes_no_answers_may_not_send_for_ever():
    async def test():
        async with connected() as peer:
            await peer.next(WINDOW_UPDATE)
            await send_much(peer)
            assert (await peer.next(WINDOW_UPDATE))[2] == 0
            peer.send(frame(PING, 0, 0, b"12345678"))
            assert (await peer.next(WINDOW_UPDATE, PING))[0] == PING
            peer.send(*(frame(WINDOW_UPDATE, 0, number, pack(">I", 1 << 25)) for number in (0, 1)))
            assert (await peer.next(WINDOW_UPDATE))[2] == 1

    run(test)


@pytest.mark.parametrize(
    ("frames", "status"),
    [
        ([opened(1, encoded("/nothing")), said(1, b"hello")], UNIMPLEMENTED),
        ([opened(1), frame(DATA, 0, 1, b"\1" + message(b"hello")[1:])], UNIMPLEMENTED),
        ([opened(1), frame(DATA, 0, 1, b"\0" + pack(">I", LIMIT + 1))], EXHAUSTED),
        ([opened(1), said(1, b"no", 0), said(1, b"hello", 0)], b"\x0bgrpc-status\x013"),
    ],
)
def test_what_is_refused_ends_its_own_call(frames, status):
    async def test():
        async with connected() as peer:
            peer.send(*frames)
            body, trailers = await peer.answer(1)
            assert body == b""
            assert trailers.startswith(b"\x88")  # headers and trailers in one
            assert status in trailers
            peer.send(opened(3), said(3, b"hello"))
            kind, _, number, payload = await peer.next(RST_STREAM, HEADERS)
            if kind == RST_STREAM:  # the client had not ended its call
                assert (number, payload) == (1, b"\0\0\0\0")
            assert (await peer.answer(3))[1].endswith(OK)

    run(test)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([frame(PUSH_PROMISE, 0, 1)], 1),
        ([frame(PING, 0, 0, b"short")], 6),
        ([frame(SETTINGS, 0, 0, b"12345")], 6),
        ([frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\0")], 1),
        ([frame(WINDOW_UPDATE, 0, 0, b"\0")], 6),
        ([frame(WINDOW_UPDATE, 0, 0, pack(">I", MOST_WINDOW))], 3),
        ([opened(1), frame(WINDOW_UPDATE, 0, 1, pack(">I", MOST_WINDOW))], 3),
        ([frame(DATA, 0, 1, b"early")], 1),
        ([frame(DATA, 0, 0, b"nowhere")], 1),
        ([frame(RST_STREAM, 0, 5, b"\0\0\0\0")], 1),
        ([opened(2)], 1),
        ([opened(1), opened(1)], 1),
        ([frame(HEADERS, 0, 1, HEAD), said(1, b"hello")], 1),
        ([frame(CONTINUATION, END_HEADERS, 1, HEAD)], 1),
        ([frame(HEADERS, 0, 1), *[frame(CONTINUATION, 0, 1, b"\0" * MOST_FRAME)] * 5], 11),
        ([opened(1, b"\xff\xff\xff\xff\xff")], 9),
        ([opened(1, b"\x41\xff")], 9),
        ([frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + HEAD)], 1),
        ([opened(1), frame(DATA, PADDED, 1)], 1),
        ([b"\xff\xff\xff\0\0\0\0\0\1"], 6),
    ],
)  # fmt: skip
def test_what_breaks_the_protocol_ends_the_connection(frames, code):
    async def test():
        async with connected() as peer:
            peer.send(*frames)
            assert await peer.broken() == code

    run(test)


def test_who_speaks_another_protocol_is_sent_away():
    async def test():
        async with connected(greets=False) as peer:
            peer.send(b"GET / HTTP/1.1\r\n\r\n")
            assert await peer.broken() == 1

    run(test)


def test_a_reset_or_lost_connection_ends_its_calls():
    async def test():
        async with connected() as peer:
            peer.send(opened(1), opened(3), said(1, b"hello", 0))
            await peer.next(DATA)
            peer.send(frame(RST_STREAM, 0, 1, b"\0\0\0\7"), said(1, b"late"), frame(PING, 0, 0, b"12345678"))
            assert (await peer.next(PING, DATA, HEADERS))[:2] == (PING, ACK)
            assert [call.closed for call in peer.calls] == [1, 0]

    run(test)


def test_leaving_lets_calls_end_and_takes_no_new_ones():
    async def test():
        async with connected() as peer:
            peer.send(opened(1), said(1, b"hello", 0))
            await peer.next(DATA)
            (connection,) = peer.connections
            connection.leave()
            assert (await peer.next(GOAWAY))[3] == pack(">II", 1, 0)
            peer.send(opened(3))
            assert (await peer.next(RST_STREAM))[2:] == (3, pack(">I", REFUSED_STREAM))
            assert not connection.is_idle
            peer.send(said(1, b"more"))
            assert (await peer.answer(1))[0] == message(b"more")
            assert connection.is_idle

    run(test)


def test_a_client_that_does_not_read_is_not_listened_to():
    async def test():
        async with connected() as peer:
            peer.writer.transport.set_write_buffer_limits(high=1 << 16)
            peer.reader._transport.pause_reading()
            ping, sent = frame(PING, 0, 0, b"12345678") * 1000, 0
            with suppress(TimeoutError):
                while sent < 1 << 26:
                    peer.send(ping)
                    await asyncio.wait_for(peer.writer.drain(), 0.5)
                    sent += len(ping)
            assert sent < 1 << 26  # the sockets' buffers are full, and the server's is bounded
            peer.reader._transport.resume_reading()
            peer.send(opened(1), said(1, b"hello"))
            assert (await peer.answer(1))[0] == message(b"hello")

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_nobody_would_send(seed):
    pick = random.Random(seed)

    def some() -> bytes:
        kind, number = pick.randrange(12), pick.choice((0, 1, 1, 3, 5, 1 << 31))
        payload = pick.choice((b"", HEAD, HEAD[:7], message(b"hello"), pick.randbytes(pick.randrange(40))))
        known = pick.choice((opened(1), opened(3), said(1, b"hello", 0), said(3, b"hello")))
        return known if pick.random() < 0.6 else frame(kind, pick.randrange(64), number, payload)

    async def once():
        async with connected() as peer:
            peer.send(*(some() for _ in range(30)), frame(PING, 0, 0, b"the last"))
            with suppress(asyncio.IncompleteReadError, ConnectionResetError):
                while (await peer.frames())[3] != b"the last":
                    pass

    async def test():
        for _ in range(100):
            await asyncio.wait_for(once(), 20)

    run(test)
