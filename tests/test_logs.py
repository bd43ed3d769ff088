"""Where the log goes."""

import asyncio
import os
import re

from stores import until

from gateway import logs
from gateway.logs import Outlet


def test_what_was_written_comes_in_order_and_all_of_it():
    reading, writing = os.pipe()
    outlet = Outlet(writing)
    lines = [f"line {number} \udcff\n" for number in range(1000)]
    for line in lines:
        assert outlet.write(line) == len(line)
    outlet.close()
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read().decode() == "".join(lines).replace("\udcff", "\\udcff")


async def test_who_reads_late_is_told_where_how_many_lines_are_lost(monkeypatch):
    monkeypatch.setattr(logs, "_MOST_WAITING_BYTES", 100_000)
    reading, writing = os.pipe()
    outlet = Outlet(writing)
    lines = [f"line {number}\n" for number in range(50_000)]
    for line in lines:
        outlet.write(line)
    with os.fdopen(reading) as file:
        read = asyncio.ensure_future(asyncio.to_thread(file.readlines))
        await until(lambda: not outlet._waiting_bytes)
        outlet.write("the last one\n")
        outlet.close()
        os.close(writing)
        *seen, last = await read
    place = lost = 0
    for line in seen:
        if told := re.fullmatch(r"WARNING nobody has read the log: (\d+) lines are lost here\n", line):
            place, lost = place + int(told[1]), lost + int(told[1])
        else:
            assert line == lines[place]
            place += 1
    assert lost > 0
    assert place == len(lines)
    assert last == "the last one\n"


def test_a_reader_that_has_gone_harms_nobody():
    reading, writing = os.pipe()
    os.close(reading)
    outlet = Outlet(writing)
    for _ in range(3):
        outlet.write("a line\n")
    outlet.close()
    os.close(writing)
