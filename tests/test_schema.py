"""Schemathesis, with all its checks, against the description that a running gateway serves."""

import json
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from served import Served

ADMIN_KEY = "admin-key"
CONFIG = """
[admin]
key_env = "ADMIN_KEY"
[[upstreams]]
name = "simulated"
kind = "simulated"
models = ["simulated"]
default = true
ttft_s = 0.0
tokens_per_s = 1e6
length_tokens = 3
"""
load_all_checks()


@schemathesis.serializer("application/x-ndjson")
def lines(_, value):
    """What is drawn is text already, or what is wrong in its place."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else json.dumps(value).encode()


CHECKED = [CHECKS.get_one(name) for name in CHECKS.get_all_names()]
NOT_CHECKED = {
    "positive_data_acceptance": {
        "POST /v1/chat/completions": "the model may refuse what its API allows: an n of a million",
        "POST /v1/completions": "the same",
        "GET /v1/streams/{id}": "Last-Event-ID has to name the stream of the path",
        "POST /admin/explain": "the request has to be one of that API",
        "POST /admin/purge": "one selector at least, or all: true and none",
        "POST /admin/recordings": "they are everyone's or a caller's, not both",
    },
    "negative_data_rejection": {
        "POST /admin/recordings": "a line that is wrong is told in the answer, and all others are taken in",
    },
}
"""By check and operation, and why."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("schema")
    (directory / "config.toml").write_text(CONFIG)
    with Served(directory, ADMIN_KEY=ADMIN_KEY, GATEWAY_LOG_ACCESS="false") as gateway:
        yield gateway


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.name.lower())
def test_schemathesis_finds_nothing(served, subtests, mode):
    bounded = settings(
        max_examples=30,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    schema = schemathesis.openapi.from_url(served.base_url.removesuffix("/v1") + "/openapi.json")
    for operation in (each.ok() for each in schema.get_all_operations()):
        with subtests.test(operation.label), suppress(Unsatisfiable):  # where there is nothing that could be wrong
            conforms(operation, mode, bounded)


def conforms(operation, mode, bounded):
    checks = [check for check in CHECKED if operation.label not in NOT_CHECKED.get(check.__name__, {})]
    key = ADMIN_KEY if operation.path.startswith("/admin") else "mine"

    @given(operation.as_strategy(generation_mode=mode))
    @bounded
    def check(case):
        case.call_and_validate(checks=checks, headers={"Authorization": f"Bearer {key}"}, timeout=10)

    check()
