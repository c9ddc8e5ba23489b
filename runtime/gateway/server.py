"""The picker's gRPC server: external processing and health."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from servegym.errors import InputError
from servegym.runtime.gateway.exchange import Exchange

PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
FRAME_BYTES = 1 << 16  # of a message around the body that it carries


class Processor(ext_proc.ExternalProcessorServicer):
    """Plays one `Exchange` a stream."""

    def __init__(self, open_exchange: Callable[[], Exchange]) -> None:
        self._open = open_exchange

    async def Process(  # noqa: N802
        self, request_iterator: AsyncIterator[ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        """Answer Envoy's messages until it closes the stream."""
        exchange = self._open()
        try:
            async for message in request_iterator:
                for response in exchange.answer(message):
                    if not message.observability_mode:
                        yield response
        finally:
            exchange.close()


class Server:
    """The gRPC server of a picker.

    Args:
        open_exchange: makes the state of a new exchange.
        most_bytes: of a request body.
    """

    def __init__(self, open_exchange: Callable[[], Exchange], most_bytes: int) -> None:
        limit = most_bytes + FRAME_BYTES
        options = [("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        self._health = health.aio.HealthServicer()
        ext_proc.add_ExternalProcessorServicer_to_server(Processor(open_exchange), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            InputError: the port is taken.
        """
        try:
            self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise InputError("gateway", "picker_port", port, "cannot listen there; choose another") from error
        await self._server.start()
        await self._health.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Tell health checks whether requests are welcome."""
        states = health_pb2.HealthCheckResponse
        for service in ("", "readiness", PROCESSOR):
            await self._health.set(service, states.SERVING if ready else states.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """End when the exchanges under way have ended, or after `grace_s`."""
        await self._server.stop(grace_s)
