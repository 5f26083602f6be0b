"""How a server ends: it tells its viewers first."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from serve.web.server import Server

_LAST_WORDS = 0.3  # seconds in which the last messages leave


class PoliteServer(uvicorn.Server):
    """Ends its sessions, and sends what they have to say, before it closes connections."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._served = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in self.servers:  # not their sockets, which asyncio's loop still has
            listening.close()
        await asyncio.to_thread(self._served.close)
        await asyncio.sleep(_LAST_WORDS)
        await super().shutdown(sockets)
        if self.force_exit:  # a second Ctrl-C; uvicorn would leave the application running
            await self.lifespan.shutdown()
