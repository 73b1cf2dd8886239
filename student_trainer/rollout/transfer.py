"""Tensors from one sender to a server's processes through the hosts' memory: torch's gloo, in a group of its own beside
whatever groups either side has. Both sides say on the store when they are there, so that neither waits in a collective
for one that never comes.
"""

from __future__ import annotations

import datetime
import hashlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

dist: Any = torch.distributed  # much of what is used here is not in its stubs

CHUNK_BYTES = 64 * 2**20
"""Of tensors that travel together; a larger tensor goes alone."""
ALIGNMENT = 16
"""Bytes; a multiple of every dtype's size, so that a tensor can be looked at in place."""
POLL_S = 0.02
JOIN_S = 15.0
"""Longest that a receiver looks for its sender's store, which is there before it is told of."""


class TransferError(RuntimeError):
    """The other side ended, did not come in time, or has no such tensors."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What travels under one name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def padded_bytes(self) -> int:
        size = getattr(torch, self.dtype).itemsize
        for n in self.shape:
            size *= n
        return int(-(-size // ALIGNMENT) * ALIGNMENT)


def divided(metas: Sequence[Meta], chunk_bytes: int) -> Iterator[list[Meta]]:
    """Consecutive tensors of at most `chunk_bytes` together: both sides cut alike."""
    chunk: list[Meta] = []
    used = 0
    for meta in metas:
        if chunk and used + meta.padded_bytes > chunk_bytes:
            yield chunk
            chunk, used = [], 0
        chunk.append(meta)
        used += meta.padded_bytes
    if chunk:
        yield chunk


def views(buffer: Tensor, metas: Sequence[Meta]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a chunk's bytes, in place."""
    at = 0
    for meta in metas:
        dtype = getattr(torch, meta.dtype)
        count = 1
        for n in meta.shape:
            count *= n
        yield meta.name, buffer[at : at + count * dtype.itemsize].view(dtype).view(meta.shape)
        at += meta.padded_bytes


@dataclass
class Packed:
    """Tensors in chunks on the host, as they travel, and the SHA-256 of all chunks."""

    chunk_bytes: int = CHUNK_BYTES
    metas: list[Meta] = field(default_factory=list)
    chunks: list[Tensor] = field(default_factory=list)
    digest: str = ""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]], chunk_bytes: int = CHUNK_BYTES) -> Packed:
        packed, sha = cls(chunk_bytes), hashlib.sha256()
        waiting: list[tuple[Meta, Tensor]] = []
        used = 0

        def close() -> None:
            buffer = torch.zeros(sum(m.padded_bytes for m, _ in waiting), dtype=torch.uint8)
            for (_, place), (_, tensor) in zip(views(buffer, [m for m, _ in waiting]), waiting, strict=True):
                place.copy_(tensor)
            sha.update(buffer.numpy().data)
            packed.chunks.append(buffer)
            waiting.clear()

        for name, tensor in tensors:
            meta = Meta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            if waiting and used + meta.padded_bytes > chunk_bytes:
                close()
                used = 0
            waiting.append((meta, tensor.detach()))
            packed.metas.append(meta)
            used += meta.padded_bytes
        if waiting:
            close()
        packed.digest = sha.hexdigest()
        return packed

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for chunk, metas in zip(self.chunks, divided(self.metas, self.chunk_bytes), strict=True):
            yield from views(chunk, metas)


class Sender:
    """Rank 0: opens a store on a free port; the receivers get its address and port some other way.

    Args:
        address: of this machine, as the receivers reach it.
    """

    def __init__(self, address: str, receivers: int, timeout_s: float) -> None:
        self.address, self.receivers = address, receivers
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(
            address, 0, receivers + 1, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self.port = int(self._store.port)
        self._group: Any = None
        self._round = 0

    def open(self, given_up: Callable[[], bool]) -> None:
        """Waits until all receivers are there. Raises TransferError after the timeout, or where `given_up()`."""
        self._await("here", given_up)
        self._group = _group(self._store, 0, self.receivers + 1, self.address, self._timeout)

    def send(self, packed: Packed, given_up: Callable[[], bool]) -> None:
        """The bytes to all receivers, each of which must be in `Receiver.chunks`."""
        assert self._group is not None, "open() comes first"
        self._await(f"round{self._round}", given_up)
        self._round += 1
        for chunk in packed.chunks:
            _broadcast(self._group, chunk)

    def _await(self, what: str, given_up: Callable[[], bool]) -> None:
        keys = [f"{what}/{rank}" for rank in range(1, self.receivers + 1)]
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not self._store.check(keys):
            if given_up():
                raise TransferError("the server answered before it took the weights")
            if time.monotonic() > deadline:
                raise TransferError(f"the server's processes did not come within {self._timeout.total_seconds():g} s")
            time.sleep(POLL_S)


class Receiver:
    """Rank 1 and up: joins the sender's store."""

    def __init__(self, address: str, port: int, rank: int, world: int, timeout_s: float) -> None:
        timeout = datetime.timedelta(seconds=timeout_s)
        joining = min(timeout, datetime.timedelta(seconds=JOIN_S))
        self._rank = rank
        self._store = dist.TCPStore(address, port, world, is_master=False, timeout=joining, wait_for_workers=False)
        self._store.set_timeout(timeout)
        self._store.set(f"here/{rank}", "1")
        self._group = _group(self._store, rank, world, own_address(address, port), timeout)
        self._round = 0

    def chunks(self, metas: Sequence[Meta], chunk_bytes: int) -> Iterator[tuple[Tensor, list[Meta]]]:
        """New memory for each chunk, so that its tensors may be kept."""
        self._store.set(f"round{self._round}/{self._rank}", "1")
        self._round += 1
        for members in divided(metas, chunk_bytes):
            buffer = torch.empty(sum(m.padded_bytes for m in members), dtype=torch.uint8)
            _broadcast(self._group, buffer)
            yield buffer, members


def own_address(address: str, port: int) -> str:
    """Of the interface of this machine that `address` is reached from. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def _group(store: Any, rank: int, world: int, address: str, timeout: datetime.timedelta) -> Any:
    """Bound to the interface of `address`, not to what this machine's name happens to resolve to."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    try:
        return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world, options)
    except RuntimeError as error:
        raise TransferError(f"no connection: {_line(error)}") from error


def _broadcast(group: Any, buffer: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    try:
        group.broadcast([buffer], options).wait()
    except RuntimeError as error:
        raise TransferError(f"the connection broke: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
