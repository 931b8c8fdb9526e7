"""Buffers: how many there are, and who sees what is written into them."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lorashard.storage.buffers import (
    BufferPool,
    ThreadBuffer,
    allocate_private,
    allocate_shared,
)

HUGE_PAGE = 2 * 2**20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_take_waits_until_a_buffer_is_free() -> None:
    pool = BufferPool(2, 100)
    first, _second = pool.take(100), pool.take(100)
    third: list[mmap.mmap] = []
    waiting = threading.Thread(target=lambda: third.append(pool.take(1)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    pool.give(first)
    waiting.join(5)
    assert third == [first]


def test_a_buffer_that_is_too_small_is_replaced_by_a_larger_one() -> None:
    pool = BufferPool(1, 100)
    large = pool.take(5 * 2**20)
    assert len(large) >= 5 * 2**20
    pool.give(large)
    assert pool.take(100) is large


def test_each_thread_keeps_a_buffer_of_its_own() -> None:
    buffer = ThreadBuffer()
    buffer.get(100)[:4] = b"here"
    other: list[bytes] = []
    thread = threading.Thread(target=lambda: other.append(bytes(buffer.get(100)[:4])))
    thread.start()
    thread.join()
    assert other == [bytes(4)]
    assert buffer.get(50)[:4] == b"here"
    assert len(buffer.get(50)) == 50
    assert len(buffer.get(5 * 2**20)) == 5 * 2**20


@pytest.mark.parametrize(
    ("allocate", "seen"), [(allocate_private, b"parent"), (allocate_shared, b"child!")]
)
def test_what_a_forked_child_writes(allocate: Callable[[int], mmap.mmap], seen: bytes) -> None:
    buffer = allocate(4096)
    buffer[:6] = b"parent"
    if (child := os.fork()) == 0:
        buffer[:6] = b"child!"
        os._exit(0)
    os.waitpid(child, 0)
    assert buffer[:6] == seen


@pytest.mark.parametrize("allocate", [allocate_private, allocate_shared])
def test_new_memory_is_zero(allocate: Callable[[int], mmap.mmap]) -> None:
    assert allocate(10_000)[:] == bytes(10_000)


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages here"
)
def test_private_memory_is_on_huge_pages() -> None:
    buffer = allocate_private(8 * HUGE_PAGE)
    buffer[:] = b"x" * len(buffer)
    assert huge_bytes(buffer) >= HUGE_PAGE


def huge_bytes(buffer: mmap.mmap) -> int:
    """How much of a mapping is on huge pages, by the kernel's account."""
    begin = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(area[1], 16) < begin + len(buffer) and begin < int(area[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += 1024 * int(line.split()[1])
    return total
