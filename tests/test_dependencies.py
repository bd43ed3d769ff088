"""What the gateway is made of: the image's lock agrees with the bounds, these hold at their lower end, and what the audit
has found is told as it is.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from served import Served

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = (ROOT / ".ci/requirements.lock").read_text("utf-8")


def locked():
    """Each requirement of the lock, with its digests."""
    for entry in LOCK.replace("\\\n", " ").splitlines():
        if entry and not entry.startswith("#"):
            requirement, *digests = re.split(r"\s+--hash=", entry.strip())
            yield Requirement(requirement), digests


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The lock


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_the_lock_has_each_dependency_within_its_bounds(text):
    wanted = Requirement(text)
    versions = [
        next(iter(found.specifier)).version
        for found, _ in locked()
        if canonicalize_name(found.name) == canonicalize_name(wanted.name)
    ]
    assert versions, f"{wanted.name} is missing: make the lock anew, by the command in its head"
    assert all(version in wanted.specifier for version in versions), f"make the lock anew: {wanted}, not {versions}"


def test_the_lock_has_one_version_of_each_and_its_digests_and_says_of_nobody_where_it_is_from():
    for requirement, digests in locked():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert digests
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests)
        assert requirement.url is None
    assert "://" not in LOCK


def test_the_lock_has_nothing_that_the_image_does_not_need():
    """Tools and extras would be in it if it were made of more than the dependencies."""
    names = {canonicalize_name(requirement.name) for requirement, _ in locked()}
    own = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    extras = {
        canonicalize_name(Requirement(text).name) for group in PROJECT["optional-dependencies"].values() for text in group
    }
    assert not names & (extras - own)


# The audit


def told(**members):
    return {"name": "some", "version": "1.0", **members}


def test_a_known_vulnerability_fails_and_is_named(audit, capsys):
    one = {"id": "CVE-1", "fix_versions": ["1.1"]}
    assert audit.report("what is installed", [told(vulns=[one]), told(name="other", vulns=[])]) == 1
    assert "VULNERABLE: what is installed: some 1.0: CVE-1, fixed in 1.1" in capsys.readouterr().out


def test_where_nothing_is_known_that_is_said_and_is_no_failure(audit, capsys):
    assert audit.report("what is installed", [told(skip_reason="not found")]) == 0
    assert capsys.readouterr().out.startswith("NOT AUDITED: ")


def test_what_is_not_known_is_named_beside_what_is(audit, capsys):
    assert audit.report("what is installed", [told(vulns=[]), told(name="ours", skip_reason="not found")]) == 0
    assert capsys.readouterr().out == "audited: what is installed: 1 packages, 0 vulnerabilities; not known: ours\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo connection refused >&2; exit 1", "the service cannot be asked: connection refused"),
        ("echo '{}'", "the service cannot be asked"),
        ("exec sleep 60", "does not answer within"),
    ],
)
def test_a_service_that_cannot_be_asked_is_no_failure_but_said(audit, capsys, tmp_path, monkeypatch, script, said):
    (auditor := tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    auditor.chmod(0o700)
    monkeypatch.setattr(audit, "AUDIT_WITHIN_S", 1)
    assert audit.audit(str(auditor), "what is installed") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NOT AUDITED: what is installed: ")
    assert said in printed


def test_an_auditor_that_finds_something_is_heard_whatever_its_exit_code(audit, capsys, tmp_path):
    found = json.dumps({"dependencies": [told(vulns=[{"id": "CVE-1", "fix_versions": []}])]})
    (auditor := tmp_path / "python").write_text(f"#!/bin/sh\necho '{found}'\nexit 1\n")
    auditor.chmod(0o700)
    assert audit.audit(str(auditor), "what is installed") == 1
    assert "no version yet" in capsys.readouterr().out


# What can be installed


def made(folder: Path) -> Path:
    """A new virtual environment's interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def serves(python: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss, a hit, and a request that is too deep to be one."""
    monkeypatch.setattr("served.PROGRAM", (str(python), "-W", "error", "-m", "gateway"))
    with Served(folder, GATEWAY_METRICS_PUBLIC="true") as served:
        assert served.chat()[0].startswith("gateway; fwd=miss")
        assert served.chat()[0].startswith("gateway; hit")
        nested = b'{"model": "simulated", "messages": [], "deep": ' + b"[" * 1000 + b"]" * 1000 + b"}"
        request = urllib.request.Request(f"{served.base_url}/chat/completions", nested, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        refused.value.close()
        assert refused.value.code == 400
        with urllib.request.urlopen(f"{served.base_url.removesuffix('/v1')}/metrics", timeout=10) as response:
            assert b"gateway_requests_total" in response.read()
        assert served.end() == 0


@pytest.mark.install
@pytest.mark.timeout(400)
def test_what_the_lock_names_is_all_that_the_image_needs(tmp_path, monkeypatch):
    python = made(tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", "--require-hashes", "-r", ".ci/requirements.lock")
    run(python, "-m", "pip", "install", "-q", "--no-deps", ".")
    run(python, "-m", "pip", "check")
    serves(python, tmp_path, monkeypatch)


@pytest.mark.install
@pytest.mark.timeout(400)
def test_the_lowest_versions_that_the_bounds_allow_will_do(tmp_path, monkeypatch):
    uv, python, lowest = (sys.executable, "-m", "uv"), tmp_path / "venv/bin/python", tmp_path / "lowest.txt"
    run(*uv, "venv", "-q", "-p", sys.executable, tmp_path / "venv")
    run(*uv, "pip", "compile", "-q", "-p", python, "--resolution", "lowest-direct", "pyproject.toml", "-o", lowest)
    run(*uv, "pip", "install", "-q", "-p", python, "-r", lowest)
    run(*uv, "pip", "install", "-q", "-p", python, "--no-deps", ".")
    serves(python, tmp_path, monkeypatch)
