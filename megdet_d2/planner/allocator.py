"""Simulates torch's caching allocator on a GPU: the memory that it holds beyond its tensors."""

import bisect
from collections.abc import Iterable

# c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp of torch
BLOCK = 512  # sizes are rounded up to its multiples
SMALL, SMALL_SEGMENT = 1 << 20, 2 << 20  # blocks up to 1 MiB share segments of 2 MiB
LARGE, LARGE_SEGMENT = 10 << 20, 20 << 20  # blocks below 10 MiB share segments of 20 MiB
ROUND_SEGMENT = 2 << 20  # larger ones get a segment of their size, rounded up


def reserved_bytes(events: Iterable[tuple[int, int]]) -> int:
    """Returns the most bytes that the allocator reserves on the GPU for these allocations.

    It takes the smallest free block that is large enough, and splits it. It gives no segment back,
    as torch does until it runs out of memory.

    Args:
        events: pairs of a storage's number and its bytes, negative where it is freed.
    """
    pools = {True: _Pool(), False: _Pool()}
    blocks: dict[int, tuple[bool, _Block]] = {}
    reserved = 0
    for number, size in events:
        if size > 0:
            size = -(-size // BLOCK) * BLOCK
            small = size <= SMALL
            block = pools[small].take(size, small)
            if block is None:
                segment = _segment(size)
                reserved += segment
                pools[small].add(_Block(segment))
                block = pools[small].take(size, small)
            assert block is not None
            blocks[number] = small, block
        elif size < 0:
            small, block = blocks.pop(number)
            pools[small].give(block)
    return reserved


def _segment(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_SEGMENT) * ROUND_SEGMENT


class _Block:
    """A block of a segment, with its neighbours."""

    _made = 0

    def __init__(self, size: int):
        self.size, self.free = size, True
        self.before: _Block | None = None
        self.after: _Block | None = None
        _Block._made += 1
        self.number = _Block._made  # in place of an address

    def key(self) -> tuple[int, int]:
        return self.size, self.number


class _Pool:
    """The free blocks of one kind of segments, by size."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[tuple[int, int], _Block] = {}

    def add(self, block: _Block) -> None:
        bisect.insort(self._keys, block.key())
        self._blocks[block.key()] = block

    def _remove(self, block: _Block) -> None:
        del self._keys[bisect.bisect_left(self._keys, block.key())]
        del self._blocks[block.key()]

    def take(self, size: int, small: bool) -> _Block | None:
        i = bisect.bisect_left(self._keys, (size, 0))
        if i == len(self._keys):
            return None
        block = self._blocks[self._keys[i]]
        self._remove(block)
        rest = block.size - size
        if rest >= (BLOCK if small else SMALL + 1):
            block.size = size
            remainder = _Block(rest)
            remainder.before, remainder.after = block, block.after
            if block.after is not None:
                block.after.before = remainder
            block.after = remainder
            self.add(remainder)
        block.free = False
        return block

    def give(self, block: _Block) -> None:
        block.free = True
        if block.after is not None and block.after.free:
            self._merge(block, block.after)
        if block.before is not None and block.before.free:
            first = block.before
            self._remove(first)
            first.size += block.size
            first.after = block.after
            if block.after is not None:
                block.after.before = first
            block = first
        self.add(block)

    def _merge(self, block: _Block, after: _Block) -> None:
        self._remove(after)
        block.size += after.size
        block.after = after.after
        if after.after is not None:
            after.after.before = block
