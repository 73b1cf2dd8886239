"""Tensors between a sender and its receivers, each in a thread of its own: gloo connects them as it does processes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from student_trainer.rollout.transfer import Meta, Packed, Receiver, Sender, TransferError, divided, own_address, views

TENSORS = {
    "a": torch.arange(15.0).view(3, 5),
    "b": torch.arange(7).to(torch.bfloat16),
    "scalar": torch.tensor(9),
    "large": torch.randn(1000, generator=torch.Generator().manual_seed(0)),
    "last": torch.tensor([True, False, True]),
}
CHUNK_BYTES = 200


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """What `work` returns or raises comes in the list."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out


def receive(receiver: Receiver, metas: list[Meta]) -> tuple[str, dict[str, torch.Tensor]]:
    sha, found = hashlib.sha256(), {}
    for buffer, members in receiver.chunks(metas, CHUNK_BYTES):
        sha.update(buffer.numpy().data)
        found |= dict(views(buffer, members))
    return sha.hexdigest(), found


def test_every_receiver_gets_every_tensor_bit_for_bit_again_and_again() -> None:
    packed = Packed.of(TENSORS.items(), CHUNK_BYTES)
    assert len(packed.chunks) == len(list(divided(packed.metas, CHUNK_BYTES))) > 2
    sender = Sender("127.0.0.1", receivers=2, timeout_s=20)

    def receiver(rank: int) -> Any:
        joined = Receiver("127.0.0.1", sender.port, rank, 3, timeout_s=20)
        return [receive(joined, packed.metas) for _ in range(2)]

    threads = [in_thread(lambda rank=rank: receiver(rank)) for rank in (1, 2)]
    sender.open(lambda: False)
    for _ in range(2):
        sender.send(packed, lambda: False)
    for thread, out in threads:
        thread.join(20)
        assert len(out[0]) == 2, out
        for digest, found in out[0]:
            assert digest == packed.digest
            assert found.keys() == TENSORS.keys()
            for name, tensor in TENSORS.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)


def test_what_is_packed_is_a_copy_and_its_digest_says_what_it_is() -> None:
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    packed, again = Packed.of(tensors.items(), CHUNK_BYTES), Packed.of(TENSORS.items(), CHUNK_BYTES)
    assert packed.digest == again.digest
    tensors["a"][1, 2] += 1e-6 * tensors["a"][1, 2]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in packed.tensors())
    assert Packed.of(tensors.items(), CHUNK_BYTES).digest != packed.digest


def test_a_sender_waits_for_receivers_only_as_long_as_it_should() -> None:
    sender = Sender("127.0.0.1", receivers=1, timeout_s=0.3)
    with pytest.raises(TransferError, match=r"did not come within 0.3 s"):
        sender.open(lambda: False)
    began = time.monotonic()
    with pytest.raises(TransferError, match="answered before"):
        Sender("127.0.0.1", receivers=1, timeout_s=60).open(lambda: True)
    assert time.monotonic() - began < 5


def test_a_receiver_that_is_gone_is_noticed_as_an_error() -> None:
    packed = Packed.of(TENSORS.items(), CHUNK_BYTES)
    sender = Sender("127.0.0.1", receivers=1, timeout_s=3)

    def leaves() -> None:
        joined = Receiver("127.0.0.1", sender.port, 1, 2, timeout_s=3)
        next(iter(joined.chunks(packed.metas, CHUNK_BYTES)))  # one chunk of several

    thread, _ = in_thread(leaves)
    sender.open(lambda: False)
    with pytest.raises(TransferError, match="connection broke"):
        sender.send(packed, lambda: False)
    thread.join(20)


def test_the_address_from_which_another_is_reached() -> None:
    assert own_address("127.0.0.1", 80) == "127.0.0.1"
