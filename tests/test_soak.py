"""The soak itself, for some seconds: its own checks are the test. And what it excuses."""

import asyncio
import contextlib
import importlib
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from running import find_redis

SOAK = Path(__file__).parent / "soak"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(find_redis() is None or not Path("/proc/self/fd").exists(), reason="it needs Redis, and Linux' /proc")
def test_nothing_breaks_the_replicas_for_some_seconds():
    command = [sys.executable, str(SOAK), "--seconds", "20", "--seed", "1", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    told = json.loads(ran.stdout)
    assert told["passed"]
    assert told["violations"] == {}
    assert sum(told["requests"].values()) > 100
    assert {"Redis killed", "killed", "upstream away"} & told["faults_injected"].keys()
    assert min(told["checks"].values()) > 0


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(SOAK))
    names = ("attempts", "connections", "excuses", "journal", "questions")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


class Peer:
    """A replica as far as its callers see it, on a thread: it goes on while the caller's loop stands still."""

    def __init__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.name, self.lives, self.base_url = "replica 1", 1, f"http://127.0.0.1:{self.port}/v1"

    def answer_and_end(self, told):
        """Answers a request, says that the connection may be kept, and is gone as soon as it is ``told``."""
        connection, _ = self._listening.accept()
        with connection:
            connection.recv(65536)
            head = "HTTP/1.1 200 OK", "Cache-Status: gateway; hit", "X-Request-Id: one", "Content-Length: 2"
            connection.sendall("\r\n".join((*head, "", "{}")).encode())
            told.wait()

    def turn_away(self):
        """Closes a connection as soon as it is there."""
        self._listening.accept()[0].close()

    def close(self):
        self._listening.close()


@pytest.fixture
def peer():
    with contextlib.closing(Peer()) as peer:
        yield peer


async def test_a_kept_connection_whose_process_went_unnoticed_is_told_from_one_that_is_closed_at_once(soak, peer):
    journal, told = soak.journal.Journal(), threading.Event()
    question = soak.questions.Question("m-shared", "chat", "short question 1", "tenant-a")
    connector = soak.connections.Connector([peer], journal.now)
    async with aiohttp.ClientSession(connector=connector) as session:
        asker = soak.attempts.Asker(session, journal)
        answering = threading.Thread(target=peer.answer_and_end, args=(told,))
        answering.start()
        first = await asker.whole(peer, question, {})
        # All of its end falls between two turns of this loop, which then sends before it looks.
        told.set()
        answering.join()
        peer.lives += 1
        kept = await asyncio.create_task(asker.whole(peer, question, {}))
        turning_away = threading.Thread(target=peer.turn_away)
        turning_away.start()
        refused = await asker.whole(peer, question, {})
        turning_away.join()
    assert (first.became, kept.became, refused.became) == ("whole", "cut", "cut")
    assert b"Can not write request body" in kept.body
    assert kept.connection is first.connection
    assert (kept.connection.uses, kept.connection.life, refused.connection.life) == (2, 1, 2)
    assert kept.connection.closed_at >= kept.began_at
    assert "use 2 of the connection" in str(kept)
    assert "the first use of the connection" in str(refused)
    assert soak.excuses.excuse(journal, kept, kept.began_at) == soak.excuses.KEPT
    assert not soak.excuses.excuse(journal, refused, refused.began_at)


@pytest.mark.parametrize(("life", "status", "is_excused"), [(1, 0, True), (2, 0, False), (1, 200, False)])
def test_a_break_is_excused_only_on_a_connection_from_an_earlier_life_and_before_an_answer(soak, life, status, is_excused):
    replica = SimpleNamespace(name="replica 1", lives=2)
    connection = soak.connections.Connection(replica, life, 40000, 1.0)
    attempt = soak.attempts.Attempt(replica, None, 5.0, 5.0, "cut", status, connection=connection)
    assert bool(soak.excuses.excuse(soak.journal.Journal(), attempt, 5.0)) == is_excused
