"""What Prometheus is told (https://prometheus.io/docs/instrumenting/exposition_formats/).

Nothing is registered anywhere: what happens often is counted where it happens, by an addition, and all is brought into
Prometheus' form when somebody asks. A snapshot is JSON, so that it can travel between the workers of one port. No label
holds what a caller has written.
"""

import asyncio
import platform
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from gateway import __version__
from gateway.observe import Histogram, RequestDetails, StoreState, UpstreamState

Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]
Snapshot = list[dict[str, Any]]
"""Families, each with its name, type, help and samples: JSON."""

_EXACT = {
    path: path
    for path in (
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/health", "/readyz", "/metrics",
        "/openapi.json", "/",
    )
}  # fmt: skip
_BELOW = (
    ("/v1/streams/", "/v1/streams/{id}"),
    ("/v1/models/", "/v1/models/{model}"),
    ("/v1/", "/v1/{path}"),
    ("/admin", "/admin/"),
)
_LEFT = 499
_HIT = "gateway; hit"
_STALE = ("stale-while-revalidate", "stale-if-error", "max-stale")
_LAG_EVERY_S = 0.25
_LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


# Requests


class _Row:
    """The requests that are alike in all that is told of them."""

    __slots__ = ("bytes", "count", "duration", "first_token")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.duration = Histogram()
        self.first_token = Histogram()


class RequestCounts:
    """A `Sink`: on the way of every request, so no more than some additions."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int, str], _Row] = {}

    def __call__(self, details: RequestDetails) -> None:
        _, _, path, status, duration_s, bytes_sent, cache_status, _, _, _, first_token_s = details
        told = _HIT if cache_status.startswith(_HIT) and cache_status[-1].isdigit() else _without_ttl(cache_status)
        key = _EXACT.get(path) or _endpoint(path), status if status == _LEFT else status // 100, told
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = _Row()
        row.count += 1
        row.bytes += bytes_sent
        row.duration.add(duration_s)
        if first_token_s is not None:
            row.first_token.add(first_token_s)

    def families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "gateway_requests", "Requests that have ended; 499: the caller has left before.", labels=_REQUEST
        )
        sent = CounterMetricFamily("gateway_sent_bytes", "Bytes of answers' bodies.", labels=["endpoint"])
        cache = CounterMetricFamily(
            "gateway_cache_requests",
            "Requests by what Cache-Status says of them: outcome, and detail (why).",
            labels=["outcome", "detail"],
        )
        statuses: dict[tuple[str, str], int] = {}
        outcomes: dict[tuple[str, str], int] = {}
        bytes_sent: dict[str, int] = {}
        durations: dict[str, Histogram] = {}
        first_tokens: dict[str, Histogram] = {}
        for (endpoint, status, cache_status), row in self._rows.items():
            outcome, detail = outcome_of(cache_status)
            _count(statuses, (endpoint, str(status) if status == _LEFT else f"{status}xx"), row.count)
            _count(bytes_sent, endpoint, row.bytes)
            durations.setdefault(endpoint, Histogram()).merge(row.duration)
            first_tokens.setdefault(outcome, Histogram()).merge(row.first_token)
            if detail != "local":
                _count(outcomes, (outcome, detail), row.count)
        for labels, number in statuses.items():
            requests.add_metric(labels, number)
        for labels, number in outcomes.items():
            cache.add_metric(labels, number)
        for endpoint, number in bytes_sent.items():
            sent.add_metric([endpoint], number)
        yield from (requests, cache, sent)
        yield _histograms("gateway_request_duration_seconds", "Until a request has ended.", "endpoint", durations)
        yield _histograms(
            "gateway_first_token_seconds", "Until the first token of a stream has left.", "outcome", first_tokens
        )


_REQUEST = ["endpoint", "status"]


def _endpoint(path: str) -> str:
    """What serves a path: callers can ask for any."""
    return next((endpoint for start, endpoint in _BELOW if path.startswith(start)), "other")


def _without_ttl(cache_status: str) -> str:
    """``Cache-Status`` without the one number in it that may be any."""
    start = cache_status.find("; ttl=")
    if start < 0:
        return cache_status
    end = cache_status.find(";", start + 1)
    return cache_status[:start] if end < 0 else cache_status[:start] + cache_status[end:]


def outcome_of(cache_status: str) -> tuple[str, str]:
    """What was done for a request, in one word, and its detail: what the members of ``Cache-Status`` come to."""
    _, *members = cache_status.split("; ")
    named = dict(member.partition("=")[::2] for member in members)
    detail = named.get("detail", "")
    if detail in ("resumed", "relayed"):
        return detail, ""
    if detail in _STALE:
        return "stale", detail
    if "hit" in named or "collapsed" in named:
        return ("hit" if "hit" in named else "collapsed"), detail
    if "fwd" not in named:
        return "none", detail
    bypassed = named["fwd"] == "bypass" or detail == "no-store"
    return ("bypass" if bypassed else "miss"), detail


def _count(counts: dict[Any, int], key: Any, number: int) -> None:
    counts[key] = counts.get(key, 0) + number


def _histograms(name: str, text: str, label: str, found: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for value, histogram in found.items():
        if any(histogram.counts):
            family.add_metric([value] if label else [], _buckets(histogram), histogram.total)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """As Prometheus wants them: each with all that is below it."""
    buckets, below = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets


# The event loop


class Lag:
    """By how much the event loop is late: whatever else it does, every token waits for that."""

    def __init__(self) -> None:
        self.seconds = Histogram(_LAG_BOUNDS)
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_LAG_EVERY_S, self._look, loop, loop.time() + _LAG_EVERY_S)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self.seconds.add(max(0.0, loop.time() - due_s))
        self.open()


# All of one process


class Serving(Protocol):
    """What is being served."""

    draining: bool
    streams: int

    @property
    def count(self) -> int: ...


class Flight(Protocol):
    """One running upstream call, or the mirror of another replica's."""

    readers: int

    @property
    def resolution(self) -> str | None: ...


class Flights(Protocol):
    takeovers: int

    @property
    def running(self) -> Collection[Flight]: ...


class Tally(Protocol):
    def totals(self) -> Mapping[str, float]: ...


class Sources(NamedTuple):
    """Where each fact is known."""

    running: Serving
    flights: Flights
    tally: Tally
    store: Callable[[], StoreState]
    upstreams: Callable[[], Iterable[UpstreamState]]
    limits: Callable[[], Mapping[str, Mapping[str, float]]]
    """By what they limit: how many there are ``now``, the ``limit``, and how often one more was ``refused``."""


class Worker(NamedTuple):
    """One of the processes that serve a port, as its supervisor knows it."""

    place: int
    restarts: int
    snapshot: Snapshot | None
    """None where it has not answered in time."""


class Metrics:
    """What one process has to tell, or all workers of a port."""

    def __init__(self, sources: Sources) -> None:
        self.requests = RequestCounts()
        self.lag = Lag()
        self.of_workers: Callable[[], Awaitable[Collection[Worker]]] | None = None
        """Asks all workers, where there are several."""
        self._sources = sources
        self._process = ProcessCollector(registry=None)

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The exposition, in the format that the ``Accept`` header asks for, and its type."""
        workers = await self.of_workers() if self.of_workers else ()
        return exposition(_of_workers(workers) if workers else _restored([({}, self.snapshot())]), accept)

    def snapshot(self) -> Snapshot:
        return [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [[sample.name, sample.labels, sample.value] for sample in family.samples],
            }
            for family in self._families()
        ]

    def _families(self) -> Iterator[Metric]:
        version = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("gateway_build", "What runs.", value=version)
        yield from self.requests.families()
        yield from self._served()
        yield from _store_families(self._sources.store())
        yield from _limit_families(self._sources.limits())
        yield from _upstream_families(list(self._sources.upstreams()))
        yield _histograms(
            "gateway_event_loop_lag_seconds", "By how much the event loop is late.", "", {"": self.lag.seconds}
        )
        yield from self._process.collect()

    def _served(self) -> Iterator[Metric]:
        running, flights = self._sources.running, self._sources.flights
        roles = {"leads": 0, "follows": 0}
        followers = 0
        for flight in flights.running:
            roles["follows" if flight.resolution == "followed" else "leads"] += 1
            followers += max(0, flight.readers - 1)
        yield GaugeMetricFamily("gateway_requests_running", "Requests that are being served.", running.count)
        yield GaugeMetricFamily("gateway_streams_open", "Streams that are being written.", running.streams)
        yield GaugeMetricFamily("gateway_draining", "1: the process is to end.", running.draining)
        text = "Upstream calls that this process leads, and those of other replicas that it follows."
        yield _by("gateway_flights", text, GaugeMetricFamily, "role", roles)
        text = "Callers of running flights beyond the first of each: calls that were saved."
        yield GaugeMetricFamily("gateway_flight_followers", text, followers)
        text = "Flights gone on with in the place of a replica that was gone."
        yield CounterMetricFamily("gateway_takeovers", text, flights.takeovers)
        totals = self._sources.tally.totals()
        yield CounterMetricFamily("gateway_stored", "Answers that were stored.", totals.get("stored", 0))
        text = "Time that models would have taken for what came without a call."
        yield CounterMetricFamily("gateway_saved_seconds", text, totals.get("saved_seconds", 0))
        tokens = {kind: totals.get(f"saved_{kind}_tokens", 0) for kind in ("prompt", "completion")}
        yield _by("gateway_saved_tokens", "Tokens that nobody had to pay.", CounterMetricFamily, "kind", tokens)


def _by(name: str, text: str, kind: Kind, label: str, found: Mapping[str, float]) -> Metric:
    family = kind(name, text, labels=[label])
    for value, number in found.items():
        family.add_metric([value], number)
    return family


def _store_families(state: StoreState) -> Iterator[Metric]:
    yield GaugeMetricFamily("gateway_store_up", "1: the store answers in time.", state.available)
    text = "Times that the store has become unavailable."
    yield CounterMetricFamily("gateway_store_outages", text, state.outages)
    text = "Commands that failed: unavailable, refused (read-only, out of memory, no right), corrupt."
    yield _by("gateway_store_failures", text, CounterMetricFamily, "kind", state.failures)
    text = "Lookups that were given up because no answer had come in time."
    yield CounterMetricFamily("gateway_store_late_lookups", text, state.late_lookups)


def _limit_families(told: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    places = {what: found for what, found in told.items() if what not in ("held_bytes", "lag")}
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    now, most = ({what: found[name] for what, found in places.items()} for name in ("now", "limit"))
    yield _by("gateway_limit_taken", "How many there are of what is limited.", gauge, "limit", now)
    yield _by("gateway_limit_places", "How many there may be; 0: any number.", gauge, "limit", most)
    refused = counter("gateway_limit_refused", "What was refused for a limit.", labels=["limit", "scope"])
    for what, found in told.items():
        refused.add_metric([what, "all"], found["refused"])
        if "refused_to_tenants" in found:
            refused.add_metric([what, "tenant"], found["refused_to_tenants"])
    yield refused
    held = told["held_bytes"]
    yield gauge("gateway_held_bytes", "Bytes that are held for requests and answers.", held["now"])
    yield gauge("gateway_held_bytes_limit", "How many there may be; 0: any number.", held["limit"])
    lag = told["lag"]
    text = "By how much the event loop is late for newcomers, as long as that is limited."
    yield gauge("gateway_sustained_lag_seconds", text, lag["now"])
    yield gauge("gateway_sustained_lag_limit_seconds", "How late it may be; 0: any time.", lag["limit"])
    yield gauge(
        "gateway_refused_share", "Of newcomers, which are refused because the event loop is late.", lag["refused_share"]
    )
    connections = told["connections"]
    text = "Idle connections that were closed to make room."
    yield counter("gateway_connections_evicted", text, connections["evicted"])
    text = "Connections that were not taken for want of file descriptors."
    yield counter("gateway_connections_unaccepted", text, connections["unaccepted"])


def _upstream_families(states: Collection[UpstreamState]) -> Iterator[Metric]:
    def by_name(name: str, text: str, kind: Kind, value: Callable[[UpstreamState], float]) -> Metric:
        return _by(name, text, kind, "upstream", {state.name: value(state) for state in states})

    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    yield by_name("gateway_upstream_calls", "Calls, retries included.", counter, lambda each: each.calls.made)
    text = "Calls made because another one had failed."
    yield by_name("gateway_upstream_retries", text, counter, lambda each: each.calls.retries)
    text = (
        "Calls that failed, by kind: a class of statuses, timeout, unreachable, broke, reported (in a 200), busy (no slot)."
    )
    errors = CounterMetricFamily("gateway_upstream_errors", text, labels=["upstream", "kind"])
    for state in states:
        for kind, number in state.calls.errors.items():
            errors.add_metric([state.name, kind], number)
    yield errors
    yield by_name("gateway_upstream_calls_running", "Calls under way.", gauge, lambda each: each.running)
    yield by_name("gateway_upstream_calls_queued", "Calls that wait for a slot.", gauge, lambda each: each.queued)
    yield by_name("gateway_upstream_ejected", "1: it is left alone, or being probed.", gauge, lambda each: each.ejected)
    text = "From when a call is sent until it begins to answer."
    found = {state.name: state.calls.first_token for state in states}
    yield _histograms("gateway_upstream_first_token_seconds", text, "upstream", found)


# All of one port


def _of_workers(workers: Collection[Worker]) -> Iterable[Metric]:
    """Each worker has its own series, by its place. A sum would fall whenever one is replaced, and Prometheus would take
    that for a start anew of them all.
    """
    up = GaugeMetricFamily("gateway_worker_up", "1: the worker in this place answers.", labels=["worker"])
    restarts = CounterMetricFamily(
        "gateway_worker_restarts", "Workers that took the place of one that had died.", labels=["worker"]
    )
    for worker in workers:
        up.add_metric([str(worker.place)], worker.snapshot is not None)
        restarts.add_metric([str(worker.place)], worker.restarts)
    told = [({"worker": str(worker.place)}, worker.snapshot) for worker in workers if worker.snapshot]
    return [up, restarts, *_restored(told)]


def _restored(snapshots: Iterable[tuple[dict[str, str], Snapshot]]) -> Iterable[Metric]:
    """The families of all snapshots, with the labels of each."""
    families: dict[str, Metric] = {}
    for labels, snapshot in snapshots:
        for told in snapshot:
            family = families.get(told["name"])
            if family is None:
                family = families[told["name"]] = Metric(told["name"], told["help"], told["type"])
            for name, own, value in told["samples"]:
                family.add_sample(name, {**own, **labels}, value)
    return families.values()


class _Collected:
    """Metrics as what `prometheus_client` calls a collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return ()


def exposition(families: Iterable[Metric], accept: str) -> tuple[bytes, str]:
    """The families as text, in the format that the ``Accept`` header asks for, and its type."""
    registry = CollectorRegistry()
    registry.register(_Collected(families))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
