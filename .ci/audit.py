"""Fails where a version that is installed, or that requirements.lock beside it names, is known to be vulnerable.

Who knows that is a service on the network: where it cannot be asked, this says so, and does not fail.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

AUDITOR = "pip-audit>=2.10,<3"
INSTALL_WITHIN_S = 90
AUDIT_WITHIN_S = 40
LOCK = Path(__file__).parent / "requirements.lock"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Not among what is audited: the auditor has some thirty dependencies of its own.
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        try:
            subprocess.run([python, "-m", "pip", "install", "-q", AUDITOR], check=True, timeout=INSTALL_WITHIN_S)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"NOT AUDITED: pip-audit cannot be installed: {error}")
            return 0
        installed = audit(python, "what is installed", "--path", sysconfig.get_path("purelib"))
        locked = audit(python, LOCK.name, "-r", str(LOCK), "--disable-pip")
    return 1 if installed or locked else 0


def audit(python: str, what: str, *arguments: str) -> int:
    """How many known vulnerabilities there are."""
    command = [python, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_WITHIN_S, check=False)
        told = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"NOT AUDITED: {what}: the service does not answer within {AUDIT_WITHIN_S} s")
        return 0
    except (ValueError, KeyError, TypeError):
        print(f"NOT AUDITED: {what}: the service cannot be asked: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return 0
    return report(what, told)


def report(what: str, told: list[dict]) -> int:
    known = [each for each in told if "skip_reason" not in each]
    found = [(each["name"], each["version"], one) for each in known for one in each["vulns"]]
    for name, version, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no version yet"
        print(f"VULNERABLE: {what}: {name} {version}: {one['id']}, fixed in {fixed}")
    left = [each["name"] for each in told if "skip_reason" in each]
    if not known:
        print(f"NOT AUDITED: {what}: the service knows none of {len(told)} packages, so nothing is known")
    else:
        print(
            f"audited: {what}: {len(known)} packages, {len(found)} vulnerabilities; not known: {', '.join(left) or 'none'}"
        )
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
