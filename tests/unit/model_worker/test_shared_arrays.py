from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from model_worker.shared_arrays import Arena, Disconnected, receive, send
from plait.dtypes import BY_NAME


@pytest.fixture
def pair() -> Iterator[tuple[Arena, Arena]]:
    """Two holders of one memory, as in two processes."""
    here = Arena.create()
    there = Arena(os.dup(here.fd))
    yield here, there
    here.close()
    there.close()


def sample(name: str, shape: tuple[int, ...]) -> Any:
    count = int(np.prod(shape))
    if name == "bytes":
        return np.array([b"x" * (i % 7) for i in range(count)], np.object_).reshape(shape)
    return (np.arange(count) % 5).astype(BY_NAME[name].numpy).reshape(shape)


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1,)])
def test_arrays_cross_unchanged(pair: tuple[Arena, Arena], name: str, shape: tuple[int, ...]) -> None:
    sent = [sample(name, shape), sample("int8", (3,)), sample(name, shape)]
    read = pair[1].read(pair[0].write(sent))
    for ours, theirs in zip(sent, read, strict=True):
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        assert theirs.tolist() == ours.tolist()


def test_strided_and_read_only_arrays_cross(pair: tuple[Arena, Arena]) -> None:
    strided = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    frozen = np.frombuffer(b"\1\0\2\0", "<i2")
    read = pair[1].read(pair[0].write([strided, frozen]))
    assert [r.tolist() for r in read] == [strided.tolist(), [1, 2]]


def test_memory_grows_while_views_of_before_live(pair: tuple[Arena, Arena]) -> None:
    small = pair[1].read(pair[0].write([np.arange(4)]))[0]
    large = np.arange(100_000)
    assert np.array_equal(pair[1].read(pair[0].write([large]))[0], large)
    assert small.shape == (4,)
    assert small.sum() == 6  # the same memory, still mapped


def test_no_side_can_shrink_the_memory(pair: tuple[Arena, Arena]) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("only memfd can be sealed")
    pair[0].write([np.arange(4)])
    with pytest.raises(PermissionError):
        os.ftruncate(pair[1].fd, 0)


def test_what_has_no_type_is_refused(pair: tuple[Arena, Arena]) -> None:
    with pytest.raises(TypeError, match="complex"):
        pair[0].write([np.zeros(1, np.complex64)])
    with pytest.raises(TypeError, match="not bytes"):
        pair[0].write([np.array(["text"], np.object_)])


@pytest.mark.parametrize("name", ["float32", "bytes"])
def test_no_table_leads_outside_of_the_memory(pair: tuple[Arena, Arena], name: str) -> None:
    table = pair[0].write([sample(name, (3, 5))])
    with pytest.raises(ValueError, match="table"):
        pair[1].read(table[:-1])
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        bad = bytearray(table)
        for at in rng.integers(0, len(bad), 2):
            bad[at] = rng.integers(0, 256)
        try:
            for array in pair[1].read(bytes(bad)):
                array.ravel().tolist()  # touches every element
        except ValueError:
            refused += 1
    assert refused > 1000


def test_frames_cross_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, 3, b"x" * 100_000)
        assert receive(theirs) == (3, b"x" * 100_000)
        send(ours, 4)
        assert receive(theirs) == (4, b"")
        ours.sendall(b"\1\0\0\0\xff\xff\xff\xff")
        with pytest.raises(ValueError, match="too long"):
            receive(theirs)
        ours.close()
        with pytest.raises(Disconnected):
            receive(theirs)
        with pytest.raises(Disconnected):
            send(theirs, 1)
