"""Lines in order, however many there are: what does not fit into memory waits in temporary files."""

import heapq
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import IO, Self

_MOST_BYTES = 67_108_864
# Each is an open file.
_MOST_RUNS = 64
_END = b"\n"


class Sorter:
    """Sorts records of bytes, none of which holds a line end. A context: leaving it lets go of the files."""

    def __init__(self, most_bytes: int = _MOST_BYTES, most_runs: int = _MOST_RUNS) -> None:
        self._most_bytes = most_bytes
        self._most_runs = most_runs
        self._records: list[bytes] = []
        self._size = 0
        self._runs: list[IO[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, record: bytes) -> None:
        """Raises `OSError` where there is no room for temporary files."""
        self._records.append(record + _END)
        self._size += len(record)
        if self._size >= self._most_bytes:
            self._spill()

    def sorted(self) -> Iterator[bytes]:
        """All records, in order."""
        self._records.sort()
        for record in heapq.merge(*map(_read, self._runs), self._records):
            yield record.removesuffix(_END)

    def _spill(self) -> None:
        self._records.sort()
        if len(self._runs) < self._most_runs:
            self._write(self._records)
        else:
            runs, self._runs = self._runs, []
            self._write(heapq.merge(*map(_read, runs), self._records))
            for run in runs:
                run.close()
        self._records = []
        self._size = 0

    def _write(self, records: Iterable[bytes]) -> None:
        run = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack is one
        run.writelines(records)
        self._runs.append(run)


def _read(run: IO[bytes]) -> Iterator[bytes]:
    run.seek(0)
    return iter(run)
