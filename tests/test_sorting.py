"""Sorting more than fits into memory."""

import random

import pytest

from gateway.core.lines import Lines
from gateway.sorting import Sorter


@pytest.mark.parametrize(("most_bytes", "most_runs"), [(1 << 20, 64), (1000, 64), (100, 3), (1, 1)])
def test_all_records_come_out_in_order_whatever_fits(most_bytes, most_runs):
    records = [b"%x" % random.Random(number).getrandbits(80) for number in range(500)] * 2
    with Sorter(most_bytes, most_runs) as sorter:
        for record in records:
            sorter.add(record)
        assert list(sorter.sorted()) == sorted(records)
        assert len(sorter._runs) <= most_runs
        assert sum(map(len, sorter._records)) <= max(most_bytes, 0) + 21


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"\n\nab\n\ncdef\nx", b"abc\nabcd\nabcde\nabc"])
def test_lines_are_the_same_in_whatever_pieces_they_come(size, text):
    lines = Lines(4)
    found = [line for at in range(0, len(text), size) for line in lines.feed(text[at : at + size])] + lines.end()
    assert found == [line if len(line) <= 4 else None for line in text.removesuffix(b"\n").split(b"\n")] or not text
