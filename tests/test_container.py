"""What can be held of the image without an engine: how it starts, as whom, and that its health check tells the truth."""

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def instruction(pattern):
    return re.findall(rf"^ *{pattern}$", DOCKERFILE, re.MULTILINE)


def test_sigterm_reaches_the_gateway_which_reads_the_copied_configuration():
    (entrypoint,) = instruction(r"ENTRYPOINT (.*)")
    (path,) = instruction(r"COPY config\.toml (.*)")
    assert json.loads(entrypoint) == ["gateway", "serve", "--config", path]


def test_it_does_not_run_as_root():
    (user,) = instruction(r"USER (\d+):\d+")
    assert int(user) > 0


def test_both_stages_have_the_same_pinned_python():
    assert [image.split(" ")[0] for image in instruction("FROM (.*)")] == ["python:${PYTHON}"] * 2
    assert re.fullmatch(r"3\.\d+-slim-\w+", *instruction("ARG PYTHON=(.*)"))


def test_the_build_context_has_what_is_copied():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {name for names in instruction(r"COPY (?!--from)(.*) \S+") for name in names.split()}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_asks_the_configured_port_whatever_the_proxy(status, healthy):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    _, *program = json.loads(*instruction(r"CMD (\[.*\])"))
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        port = server.server_port
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        if status:
            thread.start()
        else:
            server.server_close()
        environ = {**os.environ, "GATEWAY_SERVER_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        run = subprocess.run([sys.executable, *program], env=environ, capture_output=True, timeout=20, check=False)
        if status:
            server.shutdown()
            thread.join()
    assert (run.returncode == 0) is healthy
