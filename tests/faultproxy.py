"""A TCP proxy that hurts connections on purpose: half-open, dripping, cut, or with bits flipped. It knows nothing of
what it carries. Runs in a thread of its own; `faults` is a script that connections take from the front, one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PIECE = 1 << 16


@dataclass(frozen=True)
class Hurt:
    """What happens to one connection, to the bytes of one direction, once `after` of them have passed.

    `half-open`: nothing more passes, and nobody is told. `drip`: a byte each `every_s`. `cut`: both sides are reset.
    `flip`: bit `bit` of the next byte is turned over, and all goes on as before.
    """

    kind: Literal["half-open", "drip", "cut", "flip"]
    after: int = 0
    direction: Literal["up", "down"] = "down"  # down: from the server to the caller
    every_s: float = 0.05
    bit: int = 0


class FaultProxy:
    """`with FaultProxy("127.0.0.1:8300") as proxy: …`, and callers connect to `proxy.target`."""

    def __init__(self, target: str, *faults: Hurt) -> None:
        host, port = target.rsplit(":", 1)
        self._server = (host, int(port))
        self.faults: deque[Hurt] = deque(faults)
        self.always: Hurt | None = None  # of connections that find the script empty
        self.connections = 0
        self.asked = bytearray()  # all that came from callers
        self._next_flip: int | None = None
        self.open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="fault-proxy")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0, limit=PIECE), self._loop
        )
        self._listener = listening.result(30)
        self.target = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def flip_next(self, bit: int) -> None:
        """Turns over bit number `bit`, counted over all bytes that come down from now on, once."""
        self._next_flip = bit

    async def _ended(self) -> None:
        self._listener.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        hurt = self.faults.popleft() if self.faults else self.always
        pair = [writer]
        self.open.add(writer)
        try:
            with contextlib.suppress(OSError):
                up_reader, up_writer = await asyncio.open_connection(*self._server, limit=PIECE)
                pair.append(up_writer)
                ways = [
                    asyncio.create_task(self._carry(reader, up_writer, "up", hurt)),
                    asyncio.create_task(self._carry(up_reader, writer, "down", hurt)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        except asyncio.CancelledError:  # the proxy ends
            pass
        finally:
            self.open.discard(writer)
            for each in pair:
                if hurt is not None and hurt.kind == "cut":
                    _reset(each)
                each.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str, hurt: Hurt | None
    ) -> None:
        passed = 0
        here = hurt if hurt is not None and hurt.direction == direction else None
        while data := await reader.read(PIECE):
            if direction == "up":
                self.asked += data
            elif self._next_flip is not None:
                data = self._flipped(data)
            if here is not None and passed + len(data) > here.after:
                clean = here.after - passed
                await _send(writer, data[:clean])
                rest = data[clean:]
                if here.kind == "cut":
                    return
                if here.kind == "half-open":
                    await asyncio.Event().wait()
                if here.kind == "drip":
                    await self._drip(reader, writer, rest, here.every_s)
                    return
                await _send(writer, bytes([rest[0] ^ (1 << here.bit)]) + rest[1:])
                here = None
            else:
                await _send(writer, data)
            passed += len(data)

    def _flipped(self, data: bytes) -> bytes:
        assert self._next_flip is not None
        byte, bit = divmod(self._next_flip, 8)
        if byte >= len(data):
            self._next_flip -= 8 * len(data)
            return data
        self._next_flip = None
        return data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :]

    async def _drip(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, every_s: float
    ) -> None:
        while data:
            for n in range(len(data)):
                await _send(writer, data[n : n + 1])
                await asyncio.sleep(every_s)
            data = await reader.read(PIECE)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """The other side sees a reset rather than an end."""
    held = writer.get_extra_info("socket")
    if held is not None:
        with contextlib.suppress(OSError):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def hurting(url: str, *faults: Hurt) -> Iterator[tuple[FaultProxy, str]]:
    """The proxy in front of `url`, and the URL of the proxy."""
    scheme, target = url.split("://")
    with FaultProxy(target, *faults) as proxy:
        yield proxy, f"{scheme}://{proxy.target}"
