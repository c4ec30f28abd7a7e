"""Pages: nothing leaks, nothing is shared that is written to, and nothing is taken when not all can be had."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.model.pages import PAGE_ROWS, OutOfPages, PagePool, PageTable, distinct_rows, pages_for

PAGES = 12


class Tables(RuleBasedStateMachine):
    """Random reserve, advance, fork and release against a model that counts rows of data."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.tables: list[PageTable] = []

    @rule()
    def open(self) -> None:
        self.tables.append(PageTable(self.pool))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), rows=st.integers(1, 40))
    def write(self, data: st.DataObject, rows: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        free, length = self.pool.free, table.length
        if table.missing_pages(rows) > free:
            with pytest.raises(OutOfPages):
                table.reserve(rows)
            assert (self.pool.free, table.length) == (free, length)
        else:
            table.reserve(rows)
            table.advance(rows)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        free = self.pool.free
        partial = table.length % PAGE_ROWS > 0
        if partial and not free:
            with pytest.raises(OutOfPages):
                table.fork()
            assert self.pool.free == free
            return
        twin, copy = table.fork()
        assert (copy is not None) == partial
        assert free - self.pool.free == partial
        assert twin.length == table.length
        self.tables.append(twin)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))).release()

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        held = {page for table in self.tables for page in table.pages}
        assert self.pool.free == PAGES - len(held)

    @invariant()
    def a_page_that_is_written_to_has_one_holder(self) -> None:
        for table in self.tables:
            for page in table.pages[table.length // PAGE_ROWS :]:
                assert sum(page in other.pages for other in self.tables) == 1

    @invariant()
    def slots_are_the_pages_rows(self) -> None:
        for table in self.tables:
            expected = [page * PAGE_ROWS + row for page in table.pages for row in range(PAGE_ROWS)]
            assert table.slots(0, table.length).tolist() == expected[: table.length]

    def teardown(self) -> None:
        for table in self.tables:
            table.release()
        assert self.pool.free == PAGES


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(rows=st.integers(1, 60))
def test_distinct_rows_count_a_shared_prefix_once(rows: int) -> None:
    table = PageTable(PagePool(20))
    table.reserve(rows)
    table.advance(rows)
    twin, _ = table.fork()
    twin.reserve(5)
    twin.advance(5)
    shared = rows // PAGE_ROWS * PAGE_ROWS
    assert distinct_rows([table, twin]) == rows + (rows - shared) + 5


def test_rows_beyond_the_reserved_pages_are_refused() -> None:
    table = PageTable(PagePool(2))
    table.reserve(3)
    with pytest.raises(ValueError, match="reserved"):
        table.advance(PAGE_ROWS + 1)


def test_pages_for() -> None:
    assert [pages_for(rows) for rows in (0, 1, PAGE_ROWS, PAGE_ROWS + 1)] == [0, 1, 1, 2]
