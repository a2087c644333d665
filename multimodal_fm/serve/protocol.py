"""HTTP of uvicorn with deadlines for clients that stall: with a head that does not end, or an answer not taken."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER = 5.0  # seconds in which a client may go on sending after it was answered, so that it can read the answer


def with_deadlines(timeout: float) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config(http=...)` that ends a connection

    - whose request's head has not come `timeout` seconds after its first byte (or after the connection was made),
    - that takes nothing of its answer for `timeout` seconds,
    - that still sends its request's body, which is thrown away, `LINGER` seconds after the answer.
    """

    class Protocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None
        unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self.deadline, self.unread):
                if timer:
                    timer.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Whoever is waited for has a deadline, which further bytes do not move."""
            sends_head = self.conn.their_state is h11.IDLE and self.cycle is None
            sends_head = sends_head or (self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0]))
            cycle: Any = self.cycle  # None before the first request
            lingers = self.conn.their_state is h11.SEND_BODY and cycle.response_complete
            if not sends_head and not lingers:
                if self.deadline:
                    self.deadline.cancel()
                    self.deadline = None
            elif self.deadline is None:
                self.deadline = self.loop.call_later(LINGER if lingers else timeout, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_unread(self.transport.get_write_buffer_size())

        def _watch_unread(self, before: int) -> None:
            """Ends the connection where nothing has been taken since there were `before` bytes to be sent."""

            def look() -> None:
                now = self.transport.get_write_buffer_size()
                if now < before:
                    self._watch_unread(now)
                else:
                    self.transport.abort()

            self.unread = self.loop.call_later(timeout, look)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.unread:
                self.unread.cancel()
                self.unread = None

    return Protocol
