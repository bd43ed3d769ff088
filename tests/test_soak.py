"""The soak itself, for some seconds: its own checks are the test."""

import json
import subprocess
import sys
from pathlib import Path

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
