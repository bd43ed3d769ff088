"""The benchmark: `.venv/bin/python tests/bench [--quick] [--json] [--only servers|flights|compression|outage|overload]`.

The service in one process alone on one core, beside a bare comparator that does the same work with aiohttp and
redis-py and nothing else; Redis, the upstream and the load generator on another. Only the ratios mean something:
those of one run, since machines drift. The table goes to standard output, progress to standard error.
"""

import argparse
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import orjson
from compression import compression
from figures import QUICK, Extent, Figures, fresh_process, one_round
from flights import flights
from outage import outage
from overload import overload
from processes import BenchFailed, Cores
from stage import Stage, stage
from table import markdown

Part = Literal["servers", "flights", "compression", "outage", "overload"]


def main() -> int:
    options = _parser().parse_args()
    extent = QUICK if options.quick else Extent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measurements = _measure(extent, options.only)
    except BenchFailed as error:
        _say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(orjson.dumps({"extent": asdict(extent), "measurements": measurements}, option=orjson.OPT_INDENT_2).decode())
    else:
        print(markdown(measurements))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tests/bench", description="Measures the gateway beside a bare aiohttp server.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of some seconds: its numbers mean nothing")
    parser.add_argument("--json", action="store_true", help="all that was measured, instead of the table")
    parser.add_argument("--only", choices=get_args(Part), help="one part of it")
    return parser


def _measure(extent: Extent, only: Part | None) -> list[Figures]:
    """An entry a round of each part, and one for the figures that are taken once. Raises `BenchFailed`."""
    cores = Cores.of_this_machine()
    if cores.server is None or cores.server == cores.others:
        _say("warning: all processes share the processor, so the numbers say little")
    measurements: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, stage(cores, Path(directory)) as set_up:
        if only in (None, "servers"):
            measurements += _servers(set_up, extent)
        if only in (None, "flights"):
            measurements += flights(set_up, extent, _say)
        if only in (None, "compression"):
            _say("lookups of compressed recordings")
            measurements += compression(set_up.redis_socket, extent)
        if only in (None, "overload"):
            measurements += overload(set_up, extent, _say)
        if only in (None, "outage"):
            measurements += outage(set_up, extent, _say)
    return measurements


def _servers(set_up: Stage, extent: Extent) -> list[Figures]:
    """Of the gateway and the bare server. Raises `BenchFailed`."""
    starts = {"gateway": set_up.gateway, "bare": set_up.bare}
    fresh = {name: fresh_process(set_up, extent, start, _say) for name, start in starts.items()}
    measurements: list[Figures] = [{"fresh": fresh}]
    with set_up.gateway() as gateway, set_up.bare() as bare:
        for number in range(extent.rounds):
            _say(f"round {number + 1} of {extent.rounds}")
            # The order alternates, so that no server is always the first on a machine that warms up.
            servers = (gateway, bare) if number % 2 == 0 else (bare, gateway)
            measurements.append(one_round(set_up, extent, servers, _say))
    return measurements


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
