"""Metrics: they say what was done, their labels are few whatever callers send, and one scrape tells of all workers."""

import asyncio
import os
import signal
import string
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus import Samples
from running import Gateway, RedisServer
from scripted import Asked, ScriptedUpstream, say_hello
from served import Served, asking
from stores import until

from gateway.core.policy import Disposition
from gateway.metrics import Lag, RequestCounts, exposition, outcome_of
from gateway.observe import Histogram, RequestDetails

PATIENCE_S = 20.0
KEY = "open-sesame"
OUTCOMES = {"hit", "stale", "miss", "collapsed", "bypass", "resumed", "relayed", "none"}


async def scrape(session: aiohttp.ClientSession, url: str, accept: str = "", key: str = "") -> Samples:
    headers = {"Accept": accept, **({"Authorization": f"Bearer {key}"} if key else {})}
    async with session.get(url, headers=headers) as response:
        assert response.status == 200, await response.text()
        return Samples(await response.text())


async def scraped(gateway: Gateway) -> Samples:
    return await scrape(gateway.session, f"{gateway.origin}/metrics")


@pytest.fixture
def start(start_gateway):
    async def start(**sections):
        return await start_gateway(metrics={"public": True}, **sections)

    return start


# What is told of requests


@pytest.mark.parametrize(
    ("disposition", "outcome"),
    [
        (Disposition("hit", ttl_s=60), ("hit", "")),
        (Disposition("hit", "stale-while-revalidate", ttl_s=-2), ("stale", "stale-while-revalidate")),
        (Disposition("hit", "max-stale", ttl_s=-2), ("stale", "max-stale")),
        (Disposition("hit", "resumed", ttl_s=2), ("resumed", "")),
        (Disposition("stale", "stale-if-error", ttl_s=-2, fwd="stale", status=500), ("stale", "stale-if-error")),
        (Disposition("miss"), ("miss", "")),
        (Disposition("miss", status=200, stored=True), ("miss", "")),
        (Disposition("miss", "store-unavailable", status=200), ("miss", "store-unavailable")),
        (Disposition("miss", "max-age", fwd="request"), ("miss", "max-age")),
        (Disposition("miss", fwd="stale"), ("miss", "")),
        (Disposition("collapsed"), ("collapsed", "")),
        (Disposition("collapsed", "resumed"), ("resumed", "")),
        (Disposition("bypass", "no-store", fwd="request", status=200), ("bypass", "no-store")),
        (Disposition("bypass", "disabled", fwd="bypass"), ("bypass", "disabled")),
    ],
)
def test_the_outcome_is_what_cache_status_says(disposition, outcome):
    assert outcome_of(disposition.cache_status()) == outcome


@given(
    st.lists(
        st.builds(
            RequestDetails,
            request_id=st.text(),
            method=st.sampled_from(["GET", "POST", "\udcff"]),
            path=st.one_of(st.text(), st.text().map("/v1/{}".format), st.text().map("/v1/streams/{}".format)),
            status=st.integers(100, 599),
            duration_s=st.floats(0, 1000),
            bytes_sent=st.integers(0, 1 << 40),
            cache_status=st.builds(
                lambda ttl, detail: Disposition("hit", detail, ttl_s=ttl).cache_status(),
                st.integers(),
                st.sampled_from(["", "max-stale", "resumed"]),
            ),
            model=st.text(),
            upstream=st.text(),
            error=st.text(),
        )
    )
)
def test_whatever_callers_send_the_labels_are_few_and_every_request_is_counted(requests):
    counts = RequestCounts()
    for details in requests:
        counts(details)
    text, _ = exposition(counts.families(), "")
    samples = Samples(text.decode())
    told = samples.label_values() - {"2.5", "+Inf"}
    assert not {value for value in told if value.startswith("/")} - {
        "/", "/v1/{path}", "/v1/streams/{id}", "/v1/models/{model}", "/v1/models", "/admin/",
    }  # fmt: skip
    assert len(told) < 60
    if requests:
        assert samples("gateway_requests_total") == samples("gateway_request_duration_seconds_count") == len(requests)
        assert samples("gateway_sent_bytes_total") == sum(details.bytes_sent for details in requests)


@given(st.lists(st.floats(0, 1e6)), st.lists(st.floats(0, 1e6)))
def test_histograms_count_each_value_once_and_merge_to_what_one_would_have_counted(some, others):
    one, other, both = Histogram(), Histogram(), Histogram()
    for value in some:
        one.add(value)
        both.add(value)
    for value in others:
        other.add(value)
        both.add(value)
    one.merge(other)
    assert one.counts == both.counts
    assert sum(one.counts) == len(some) + len(others)
    assert one.total == pytest.approx(sum(some) + sum(others))


def test_a_value_on_a_bound_is_within_it():
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [1, 2, 1]


async def test_a_loop_that_is_blocked_is_seen_to_lag():
    lag = Lag()
    lag.open()
    try:
        time.sleep(0.4)  # noqa: ASYNC251  # it looks four times a second
        await until(lambda: any(lag.seconds.counts))
    finally:
        lag.close()
    assert lag.seconds.total > 0.1


async def test_what_was_done_for_callers_is_counted_by_outcome(start, upstream):
    gateway = await start(replay={"pace": "instant"})
    for _ in range(3):
        await gateway.chat("one", stream=True)
        await gateway.landed()
    await gateway.chat("two")
    await gateway.chat("three", headers={"Cache-Control": "no-store"})
    await gateway.chat("four", headers={"Cache-Control": "only-if-cached"})
    await gateway.chat("one", headers={"Cache-Control": "no-cache"})
    samples = await scraped(gateway)
    cache = "gateway_cache_requests_total"
    assert samples(cache, outcome="hit") == 2
    assert samples(cache, outcome="miss", detail="") == 2
    assert samples(cache, outcome="miss", detail="no-cache") == 1
    assert samples(cache, outcome="bypass", detail="no-store") == 1
    assert samples(cache, outcome="none", detail="not-cached") == 1
    assert samples.values(cache, "outcome") <= OUTCOMES
    chat = {"endpoint": "/v1/chat/completions"}
    assert samples("gateway_requests_total", **chat, status="2xx") == 6
    assert samples("gateway_requests_total", **chat, status="5xx") == 1
    assert samples("gateway_request_duration_seconds_count", **chat) == 7
    assert samples("gateway_first_token_seconds_count", outcome="hit") == 2
    assert samples("gateway_first_token_seconds_count") == 3, "only streams have first tokens"
    assert samples("gateway_sent_bytes_total", **chat) > 1000
    assert samples("gateway_saved_tokens_total", kind="prompt") == 6
    assert samples("gateway_stored_total") == 3
    assert samples("gateway_upstream_calls_total", upstream="scripted") == len(upstream.asked) == 4
    assert samples("gateway_upstream_first_token_seconds_count", upstream="scripted") == 4
    assert samples("gateway_store_up") == 1
    assert samples("gateway_store_late_lookups_total") == samples("gateway_store_outages_total") == 0
    assert samples("gateway_build_info") == 1
    assert samples("gateway_requests_running") == 1, "the scrape itself"
    assert samples("process_open_fds") > 3
    assert samples("process_resident_memory_bytes") > 1 << 20
    assert samples("process_start_time_seconds") > 1_700_000_000


async def test_what_is_under_way_is_seen_while_it_is_and_not_after(start, upstream):
    async def waits(asked: Asked) -> None:
        await asked.gate("answer")
        await say_hello(asked)

    upstream.script = waits
    gateway = await start(flights={"abandon_grace_s": 0.0})
    callers = [asyncio.create_task(gateway.chat("one", stream=True)) for _ in range(3)]
    await upstream.gate("answer").reached.wait()
    async with asyncio.timeout(PATIENCE_S):
        while (samples := await scraped(gateway))("gateway_flight_followers") < 2:
            pass
    assert samples("gateway_flights", role="leads") == samples("gateway_upstream_calls_running", upstream="scripted") == 1
    assert samples("gateway_requests_running") == 4
    assert samples("gateway_streams_open") == 0, "no head was sent"
    upstream.gate("answer").released.set()
    await asyncio.gather(*callers)
    await gateway.landed()
    samples = await scraped(gateway)
    assert samples("gateway_flights") == samples("gateway_flight_followers") == samples("gateway_streams_open") == 0
    assert samples("gateway_upstream_calls_running") == samples("gateway_upstream_calls_queued") == 0
    assert samples("gateway_cache_requests_total", outcome="collapsed") == 2


async def test_a_stream_that_is_being_written_and_one_that_is_resumed_are_counted(start, upstream):
    async def stops_in_the_middle(asked: Asked) -> None:
        await asked.head()
        await asked.event({"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]})
        await asked.gate("rest")
        await asked.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await asked.done()

    upstream.script = stops_in_the_middle
    gateway = await start()
    async with gateway.opened("one", stream=True) as response:
        await response.content.readline()
        assert (await scraped(gateway))("gateway_streams_open") == 1
        upstream.gate("rest").released.set()
        await response.read()
    async with gateway.session.get(f"{gateway.base_url}/streams/{response.headers['Gateway-Stream-Id']}") as again:
        await again.read()
    samples = await scraped(gateway)
    assert samples("gateway_streams_open") == 0
    assert samples("gateway_cache_requests_total", outcome="resumed") == 1
    assert samples("gateway_requests_total", endpoint="/v1/streams/{id}", status="2xx") == 1


async def test_what_upstreams_do_wrong_is_counted_by_kind(start, upstream):
    answers = iter([(429, "slow down"), (500, "oh"), (400, "no"), (200, "garbage")])

    async def fails(asked: Asked) -> None:
        status, text = next(answers, (0, ""))
        if status:
            await asked.answer({"error": {"message": text}} if status > 200 else b"<html>", status, "text/html")
        else:
            asked.reset()

    upstream.script = fails
    gateway = await start(retries={"max_retries": 1, "backoff_s": 0.0, "min_per_s": 1000.0}, ejection={"min_calls": 2})
    for content in ("one", "two", "three"):
        await gateway.chat(content)
    samples = await scraped(gateway)
    kinds = ("429", "4xx", "5xx", "broke", "unreachable")
    errors = {kind: samples("gateway_upstream_errors_total", upstream="scripted", kind=kind) for kind in kinds}
    assert errors == dict.fromkeys(kinds, 1)
    assert samples("gateway_upstream_retries_total", upstream="scripted") == 2
    assert samples("gateway_upstream_calls_total", upstream="scripted") == 5
    assert samples("gateway_upstream_ejected", upstream="scripted") == 1


async def test_an_outage_of_the_store_and_lookups_that_are_late_are_told(start, own_redis: RedisServer):
    gateway = await start(redis={"url": own_redis.url, "lookup_timeout_s": 0.05, "command_timeout_s": 0.1})
    await gateway.chat("one")
    own_redis.signal(signal.SIGSTOP)
    try:
        for number in range(5):
            await gateway.chat(f"late {number}")
        samples = await scraped(gateway)
    finally:
        own_redis.signal(signal.SIGCONT)
    assert samples("gateway_store_up") == 0
    assert samples("gateway_store_outages_total") == 1
    assert samples("gateway_store_failures_total", kind="unavailable") >= 3
    assert samples("gateway_store_late_lookups_total") >= 1
    assert samples("gateway_cache_requests_total", detail="store-unavailable") >= 3


async def test_the_format_is_the_one_that_is_asked_for_and_every_family_is_described(start):
    gateway = await start()
    await gateway.chat("one", stream=True)
    for accept in ("", "text/plain;version=0.0.4", "application/openmetrics-text;version=1.0.0"):
        async with gateway.session.get(f"{gateway.origin}/metrics", headers={"Accept": accept}) as response:
            assert response.content_type == (accept.partition(";")[0] or "text/plain")
            assert response.headers["Cache-Control"] == "no-store"
            assert Samples(await response.text()).undescribed() == []


async def test_no_label_holds_a_model_a_tenant_or_a_key(start, upstream):
    gateway = await start()
    marks = ["mark" + letter * 8 for letter in string.ascii_lowercase[:5]]
    headers = {"Authorization": f"Bearer {marks[0]}", "X-Request-Id": marks[1], "Gateway-Cache-Namespace": marks[2]}
    await gateway.chat(marks[3], model=marks[4], stream=True, headers=headers)
    async with gateway.session.get(f"{gateway.origin}/{marks[0]}?key={marks[0]}", headers=headers) as response:
        assert response.status == 404
    async with gateway.session.get(f"{gateway.origin}/metrics") as response:
        text = await response.text()
    assert not [mark for mark in marks if mark in text]


# Who may see them


async def test_by_default_metrics_are_not_for_everybody_but_whoever_looks_is_told_how_to_open_them(start_gateway):
    gateway = await start_gateway()
    async with gateway.session.get(f"{gateway.origin}/metrics") as response:
        text = await response.text()
    assert response.status == 404
    assert "[metrics] public" in text
    assert "gateway_requests" not in text


async def test_where_there_is_an_admin_key_it_opens_the_metrics(start_gateway):
    gateway = await start_gateway({"ADMIN": KEY}, admin={"key_env": "ADMIN"})
    for key, status in (("", 401), ("wrong", 401), (KEY, 200)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with gateway.session.get(f"{gateway.origin}/metrics", headers=headers) as response:
            assert response.status == status
            assert ("gateway_requests" in await response.text()) is (status == 200)


async def test_where_they_are_off_nothing_is_counted_and_nothing_told(start_gateway):
    gateway = await start_gateway(metrics={"enabled": False, "public": True})
    async with gateway.session.get(f"{gateway.origin}/metrics") as response:
        assert response.status == 404
        assert "public" not in await response.text()


# Several workers


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A connection a request: each may be any worker's."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


@pytest.mark.slow
async def test_one_scrape_tells_of_all_workers_also_of_one_that_hangs_or_was_replaced(
    shared_redis: RedisServer, upstream: ScriptedUpstream, session, tmp_path
):
    environ = asking(upstream, shared_redis, metrics_public="true")
    with ExitStack() as stack:
        served = Served(tmp_path, "--workers", "2", wait=False, **environ)
        stack.enter_context(served)
        await asyncio.to_thread(served.announce)
        metrics = f"{served.base_url.removesuffix('/v1')}/metrics"

        async def asked() -> None:
            body = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}]}
            async with session.post(f"{served.base_url}/chat/completions", json=body) as response:
                assert response.status == 200

        total = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await asked()
                total += 1
                samples = await scrape(session, metrics, "application/openmetrics-text")
                # Whichever worker is asked, it is told of what all have done.
                assert samples("gateway_requests_total", endpoint="/v1/chat/completions") == total
                if samples.values("gateway_requests_total", "worker") == {"0", "1"}:
                    break
        assert samples("gateway_worker_up") == 2
        assert samples("gateway_worker_restarts_total") == 0
        assert samples.values("process_start_time_seconds", "worker") == {"0", "1"}

        first = served.workers[0]
        os.kill(first, signal.SIGSTOP)
        samples = await scrape(session, metrics)
        assert samples("gateway_worker_up") == 1
        assert len(samples.values("process_start_time_seconds", "worker")) == 1
        os.kill(first, signal.SIGCONT)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    samples = await scrape(session, metrics)
                    if samples("gateway_worker_up") == 2 and samples("gateway_worker_restarts_total") == 1:
                        break
                except aiohttp.ClientError:
                    pass  # what was being asked of the killed one
        assert await asyncio.to_thread(served.end) == 0


async def test_limits_and_what_they_have_refused_are_told(start, upstream):
    async def waits(asked: Asked) -> None:
        await asked.gate("answer")
        await say_hello(asked)

    upstream.script = waits
    gateway = await start(limits={"max_flights": 1})
    running = asyncio.create_task(gateway.chat("one"))
    await upstream.gate("answer").reached.wait()
    assert (await gateway.chat("two")).status == 503
    samples = await scraped(gateway)
    assert samples("gateway_limit_taken", limit="flights") == samples("gateway_limit_places", limit="flights") == 1
    assert samples("gateway_limit_refused_total", limit="flights", scope="all") == 1
    assert samples("gateway_limit_refused_total", scope="tenant") == 0
    assert samples("gateway_held_bytes") > 0
    assert samples("gateway_held_bytes_limit") > samples("gateway_held_bytes")
    assert samples("gateway_refused_share") == samples("gateway_sustained_lag_limit_seconds") == 0
    assert samples("gateway_limit_refused_total", limit="lag", scope="all") == 0
    upstream.gate("answer").released.set()
    assert (await running).status == 200
    await gateway.landed()
    assert (await scraped(gateway))("gateway_limit_taken", limit="flights") == 0


async def test_how_late_the_loop_is_for_newcomers_is_told_and_whom_that_has_kept_out(start, upstream):
    gateway = await start(limits={"max_lag_s": 0.25})
    gateway.adjustable.probe.close()
    for now_s in range(3):
        gateway.limits.lag.add(0.5, float(now_s))
    assert (await gateway.chat("one")).status == 503
    samples = await scraped(gateway)
    assert samples("gateway_sustained_lag_seconds") == 0.5
    assert samples("gateway_sustained_lag_limit_seconds") == 0.25
    assert samples("gateway_refused_share") == 1
    assert samples("gateway_limit_refused_total", limit="lag", scope="all") == 1
