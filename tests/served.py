"""The gateway as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from running import RedisServer
from scripted import ScriptedUpstream

PROGRAM = (sys.executable, "-m", "gateway")
# The tree that the tests are in is what they test, wherever the environment has one installed from.
ENVIRON = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])}


def variables(**settings: object) -> dict[str, str]:
    """``log_access="false"`` is ``[log] access``; None: not set."""
    return {f"GATEWAY_{name.upper()}": str(value) for name, value in settings.items() if value is not None}


def asking(upstream: ScriptedUpstream, redis: RedisServer, **settings: object) -> dict[str, str]:
    """The environment of a gateway on that Redis, under a prefix of its own, which asks that upstream."""
    values = {
        "redis_url": redis.url,
        "redis_prefix": f"t{os.urandom(6).hex()}",
        "redis_lookup_timeout_s": 2,
        "upstreams": json.dumps([upstream.configured()]),
    }
    return variables(**values | settings)


class Served:
    """``gateway serve`` in ``directory``, started and announced; without ``wait`` it has yet to `announce` itself."""

    def __init__(self, directory: Path, *arguments: str, wait: bool = True, **environ: str) -> None:
        environ = {**ENVIRON, "HOME": str(directory), "TMPDIR": str(directory), **environ}
        command = [*PROGRAM, "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, cwd=directory, env=environ, stderr=subprocess.PIPE, text=True)
        self.said = ""
        if wait:
            self.announce()

    def announce(self) -> None:
        """Waits until it listens, and learns where."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.said += line
            if line.startswith("listening on "):
                self.base_url = line.split()[-1]
            if line.startswith("upstream"):
                return
        raise AssertionError(f"it ended with code {self.process.wait()}: {self.said}")

    def hear(self, text: str) -> str:
        """Waits until it says that, and tells the whole line."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.said += line
            if text in line:
                return line
        raise AssertionError(f"it ended with code {self.process.wait()}: {self.said}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr
        self.process.stderr.close()

    @property
    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    @property
    def workers(self) -> list[int]:
        """The processes that serve, where there are several."""
        commands = {child: Path(f"/proc/{child}/cmdline") for child in self.children}
        return [child for child, command in commands.items() if b"--worker\0" in command.read_bytes()]

    def chat(self, content: str = "hi") -> tuple[str, Any]:
        """The ``Cache-Status`` and the body."""
        body = {"model": "simulated", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.headers["Cache-Status"], json.load(response)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code after that signal; what was printed is in ``said``."""
        self.process.send_signal(number)
        assert self.process.stderr
        self.said += self.process.stderr.read()
        return self.process.wait(20)


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether that process ends before long."""
    deadline = time.monotonic() + within_s
    while _runs(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _runs(pid: int) -> bool:
    try:
        # Who has ended may still wait to be buried by its new parent.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
