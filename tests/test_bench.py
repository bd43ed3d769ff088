"""The benchmark runs to its end and finds all answers right. How fast they came says nothing: machines do other work."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
END_WITHIN_S = 240
# Rows of the table: those with figures of the bare server, those for which it has none, and those of something plain.
COMPARED, NOT_COMPARED, PLAIN = 14, 22, 35


@pytest.mark.slow
@pytest.mark.timeout(END_WITHIN_S + 30)
def test_a_quick_run_fills_the_table():
    command = [sys.executable, "tests/bench", "--quick"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=END_WITHIN_S)
        finally:
            process.send_signal(signal.SIGTERM)  # it ends its servers
    assert process.returncode == 0, errors
    head, _, *rows = output.splitlines()
    assert head == "| figure | gateway | bare | ratio | mark |"
    assert len(rows) == COMPARED + NOT_COMPARED + PLAIN
    figures = [row.strip("| ").split(" | ")[1:4] for row in rows]
    compared, alone = figures[:COMPARED] + figures[-PLAIN:], figures[COMPARED:-PLAIN]
    assert all(any(char.isdigit() for char in value) for values in compared for value in values), output
    assert all(any(char.isdigit() for char in value) for value, *_ in alone), output
    assert all(others == ["–", "–"] for _, *others in alone), output
