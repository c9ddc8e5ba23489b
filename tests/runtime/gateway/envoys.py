"""A stand-in for Envoy: asks a real picker over gRPC, message by message as Envoy does, and talks to engines.

It buffers a request, shows it to the picker, tries the picked engines in order until one has sent the head of
its answer and the first byte behind it, and shows the picker as much of the answer as its mode and the
picker's override say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import grpc
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub

from servegym.runtime.gateway.exchange import CHUNK_BYTES, FILTER, HINT, LB, PICKED, SERVED, SET, SUBSET

# Ways of requests: as the Envoy of `servegym gateway` shows them, head and body one by one, and in pieces.
ONCE, BUFFERED, DUPLEX = MODES = "once", "buffered", "duplex"


@dataclass
class Answer:
    """What a client sees: status, body, whether the body is whole; and what the picker had said."""

    status: int = 0
    body: bytes = b""
    whole: bool = True
    picked: list[str] = field(default_factory=list)
    served: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def header_message(kind: str, end: bool, **headers: str) -> pb.ProcessingRequest:
    """`request_headers` or `response_headers`; _ in names stands for - and a leading _ for :."""
    message = pb.ProcessingRequest()
    target = getattr(message, kind)
    for name, value in headers.items():
        key = ":" + name[1:] if name.startswith("_") else name
        target.headers.headers.add(key=key.replace("_", "-"), raw_value=value.encode())
    target.end_of_stream = end
    message.metadata_context.SetInParent()
    return message


def request_messages(
    body: bytes, mode: str = ONCE, subset: list[str] | None = None, **headers: str
) -> list[pb.ProcessingRequest]:
    """What Envoy says of a request."""
    whole = pb.ProcessingRequest(request_body={"body": body, "end_of_stream": True})
    head = header_message("request_headers", False, _method="POST", _path="/v1/completions", **headers)
    first = whole if mode == ONCE else head
    first.protocol_config.request_body_mode = ProcessingMode.BUFFERED
    if subset is not None:
        first.metadata_context.filter_metadata[HINT].get_or_create_list(SUBSET).extend(subset)
    if mode == ONCE:
        fields = whole.attributes[FILTER].fields
        for name, value in headers.items():
            fields[f"request.headers['{name.replace('_', '-')}']"].string_value = value
        return [whole]
    if mode == BUFFERED:
        return [head, whole]
    head.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    head.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    bodies = [pb.ProcessingRequest(request_body={"body": piece}) for piece in pieces]
    return [head, *bodies, pb.ProcessingRequest(request_body={"end_of_stream": True})]


def picked_of(response: pb.ProcessingResponse) -> list[str]:
    """Engines that a response names, in the metadata and likewise in the header."""
    phase = response.WhichOneof("response")
    mutation = getattr(response, phase).response.header_mutation
    headers = {h.header.key: h.header.raw_value.decode() for h in mutation.set_headers}
    named = response.dynamic_metadata[LB][PICKED] if LB in response.dynamic_metadata else ""
    assert headers.get(PICKED, "") == named
    assert headers == (dict(response.dynamic_metadata[SET]) if SET in response.dynamic_metadata else {})
    return named.split(",") if named else []


class FakeEnvoy:
    """See above; DUPLEX as the Gateway API Inference Extension's gateways."""

    def __init__(self, port: int, mode: str = ONCE) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub = ExternalProcessorStub(self._channel)
        self._session = aiohttp.ClientSession()
        self._mode, self._duplex = mode, mode == DUPLEX

    async def close(self) -> None:
        await self._session.close()
        await self._channel.close()

    async def post(self, ask: dict | bytes, **headers: str) -> Answer:
        body = ask if isinstance(ask, bytes) else json.dumps(ask).encode()
        call, answer = self._stub.Process(), Answer()
        try:
            for message in request_messages(body, self._mode, **headers):
                await call.write(message)
            for _ in range(self._expected(body)):
                response = await call.read()
                if response.HasField("immediate_response"):
                    return _refused(response.immediate_response)
                answer.picked += picked_of(response)
            await self._try(answer, body, call)
        finally:
            call.cancel()
        return answer

    def _expected(self, body: bytes) -> int:
        return {ONCE: 1, BUFFERED: 2, DUPLEX: 1 + max(-(-len(body) // CHUNK_BYTES), 1)}[self._mode]

    async def _try(self, answer: Answer, body: bytes, call: grpc.aio.StreamStreamCall) -> None:
        for address in answer.picked:
            try:
                url = f"http://{address}/v1/completions"
                headers = {"endpoint-load-metrics-format": "JSON"}
                async with self._session.post(url, data=body, headers=headers) as response:
                    chunks = response.content.iter_any()
                    first = await anext(chunks, b"")
                    answer.status, answer.served = response.status, address
                    await self._show(answer, response, first, chunks, call)
                    return
            except (aiohttp.ClientError, OSError):
                if answer.status:  # it had begun: the client's stream ends here
                    answer.whole = False
                    return
        answer.status = 503

    async def _show(self, answer, response, first: bytes, chunks: AsyncIterator[bytes], call) -> None:
        orca = response.headers.get("endpoint-load-metrics")
        more = {"endpoint_load_metrics": orca} if orca else {}
        head = header_message("response_headers", False, _status=str(response.status), **more)
        head.metadata_context.filter_metadata[LB][SERVED] = answer.served
        await call.write(head)
        reply = await call.read()
        assert reply.HasField("response_headers")
        mutation = reply.response_headers.response.header_mutation
        assert ("endpoint-load-metrics" in mutation.remove_headers) == bool(orca)
        shows = self._duplex or reply.mode_override.response_body_mode == ProcessingMode.STREAMED
        piece = first
        while piece:
            answer.body += await self._pass(piece, False, call) if shows else piece
            piece = await anext(chunks, b"")
        if shows:
            answer.body += await self._pass(b"", True, call)

    async def _pass(self, piece: bytes, end: bool, call: grpc.aio.StreamStreamCall) -> bytes:
        await call.write(pb.ProcessingRequest(response_body={"body": piece, "end_of_stream": end}))
        reply = await asyncio.wait_for(call.read(), 10)
        assert reply.HasField("response_body")
        if not self._duplex:
            return piece
        streamed = reply.response_body.response.body_mutation.streamed_response
        assert streamed.end_of_stream == end
        return streamed.body


def _refused(refusal: pb.ImmediateResponse) -> Answer:
    headers = {h.header.key: h.header.raw_value.decode() for h in refusal.headers.set_headers}
    return Answer(refusal.status.code, refusal.body, headers=headers)
