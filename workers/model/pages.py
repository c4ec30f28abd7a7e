"""Pages of committed keys and values: reference counts, a free list, and one table a thread.

A page holds ``PAGE_ROWS`` rows. Tables that share a prefix share its full pages; only a partly filled last page is
copied at a fork, because both threads go on writing into it.
"""

from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import pairwise

import torch

PAGE_ROWS = 16

Slots = torch.Tensor | slice  # int64[n], or n consecutive ones, which are read and written without an index


class OutOfPages(Exception):
    """No page is free; nothing was taken."""


class PagePool:
    """Which pages are free, and how many tables hold each of the others."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages))  # a heap: low pages first, so that a thread's pages tend to be neighbours
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages with one holder each, or raise OutOfPages and take none."""
        if count > len(self._free):
            raise OutOfPages
        taken = [heappop(self._free) for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to each page."""
        for page in pages:
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Drop a holder of each page; a page without holders is free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heappush(self._free, page)


def pages_for(rows: int) -> int:
    """Pages that hold ``rows`` rows."""
    return -(-rows // PAGE_ROWS)


class PageTable:
    """The committed rows of one thread, in path order. Row r lies in slot ``slots(0, length)[r]``."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.length = 0
        self._gaps = 0
        self._slots = torch.empty(0, dtype=torch.int64)

    @property
    def capacity(self) -> int:
        return len(self.pages) * PAGE_ROWS

    def missing_pages(self, rows: int) -> int:
        """Pages to take before ``rows`` more rows can be committed."""
        return max(0, pages_for(self.length + rows) - len(self.pages))

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` more rows, or raise OutOfPages and change nothing."""
        if missing := self.missing_pages(rows):
            self._append(self._pool.take(missing))

    def slots(self, start: int, stop: int) -> torch.Tensor:
        """int64[stop - start]: where rows start..stop lie (a view)."""
        return self._slots[start:stop]

    def span(self, start: int, stop: int) -> slice | None:
        """The same slots as a slice if all of the table's are consecutive."""
        if self._gaps:
            return None
        first = self.pages[0] * PAGE_ROWS
        return slice(first + start, first + stop)

    def advance(self, rows: int) -> None:
        """Count ``rows`` more rows as committed; they must fit what was reserved."""
        if self.length + rows > self.capacity:
            raise ValueError("rows committed beyond the reserved pages")
        self.length += rows

    def fork(self) -> tuple["PageTable", tuple[int, int] | None]:
        """A second table over the same rows, and the (from, to) page copy it needs, if any.

        Raises:
            OutOfPages: the partly filled last page cannot be copied; nothing was taken.
        """
        full, part = divmod(self.length, PAGE_ROWS)
        copied = self._pool.take(1) if part else []
        shared = self.pages[:full]
        self._pool.share(shared)
        twin = PageTable(self._pool)
        twin._append(shared + copied)
        twin.length = self.length
        return twin, (self.pages[full], copied[0]) if part else None

    def release(self) -> None:
        """Give every page back; the table is empty afterwards and may be used again."""
        self._pool.give_back(self.pages)
        self.pages = []
        self.length = 0
        self._gaps = 0
        self._slots = self._slots[:0]

    def _append(self, pages: list[int]) -> None:
        self._gaps += sum(after != before + 1 for before, after in pairwise([*self.pages[-1:], *pages]))
        self.pages.extend(pages)
        firsts = torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE_ROWS
        self._slots = torch.cat([self._slots, (firsts + torch.arange(PAGE_ROWS)).flatten()])


def distinct_rows(tables: Iterable[PageTable]) -> int:
    """Committed rows of several tables, rows in shared pages counted once."""
    fill: dict[int, int] = {}
    for table in tables:
        for index, page in enumerate(table.pages):
            rows = min(PAGE_ROWS, table.length - index * PAGE_ROWS)
            if rows <= 0:
                break
            fill[page] = max(fill.get(page, 0), rows)
    return sum(fill.values())
