"""Logs of running flights: leases, appends, readers, take-overs and the bell, on every server they have to work on."""

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio.connection import AbstractConnection
from stores import (
    KEY,
    LOG,
    OTHER_LOG,
    RECORDING,
    Backend,
    batch,
    begun,
    commands_about,
    frame,
    of_flight,
    until,
)

from gateway.errors import StoreCorrupt, StoreFenced, StoreUnavailable
from gateway.ports import LOG_START, Appended, Claimed, Entry, FlightId, LogName, Mirrored, Page, Peeked, Writer
from gateway.store.redis import RedisStore

pytestmark = pytest.mark.usefixtures("nothing_goes_wrong_unnoticed")

FOLLOWS = Claimed(follow=LOG.flight)
LEADS = Claimed()
LANDED = Claimed(landed=True)


def writer_of(store: RedisStore, run: str = "00000001") -> Writer:
    return Writer(store.replica, run)


async def append(store: RedisStore, *batches: Any) -> Any:
    """The only result, or what it says went wrong."""
    [result] = await store.append(batches)
    if isinstance(result, Exception):
        raise result
    return result


async def everything(store: RedisStore, log: LogName = LOG, *, readers: int = 0) -> Page:
    """The whole log, whenever it is read."""
    return (await store.read(log, LOG_START, readers=readers))._replace(at_ms=0)


def kinds(page: Page) -> list[Any]:
    """What the entries are, in short."""
    return [
        entry.head or entry.run or entry.end or (entry.released and "released") or b"".join(entry.frames)
        for entry in page.entries
    ]


def text(page: Page) -> str:
    """The letters of all frames."""
    return (
        b"".join(frame for entry in page.entries for frame in entry.frames).decode().replace("data: ", "").replace("\n", "")
    )


async def lease_runs_out(backend: Backend) -> None:
    await backend.raw.pexpire(backend.key("lease", LOG), 1)
    async with asyncio.timeout(5):
        while await backend.raw.exists(backend.key("lease", LOG)):
            await asyncio.sleep(0.005)


async def refusing(call: Any) -> None:
    with pytest.raises(StoreFenced):
        await call


# Claims


async def test_the_first_who_looks_again_leads_and_the_others_follow(backend):
    one, two = await backend.store(), await backend.store()
    assert await one.claim(LOG, writer_of(one)) == LEADS
    assert await two.claim(OTHER_LOG, writer_of(two)) == FOLLOWS
    assert (await two.read(LOG, LOG_START, readers=1)).writer == str(writer_of(one))


async def test_of_many_who_look_again_at_once_one_leads(backend):
    stores = [await backend.store() for _ in range(3)]
    logs = [LogName(KEY, FlightId(f"{number:016x}")) for number in range(30)]
    claims = (store.claim(log, writer_of(store)) for store, log in zip(itertools.cycle(stores), logs, strict=False))
    claimed = await asyncio.gather(*claims)
    assert claimed.count(LEADS) == 1
    leader = logs[claimed.index(LEADS)].flight
    assert claimed.count(Claimed(follow=leader)) == 29


async def test_a_claim_whose_answer_was_lost_still_leads_when_it_is_made_again(backend):
    store = await backend.store()
    assert await store.claim(LOG, writer_of(store)) == LEADS
    assert await store.claim(LOG, writer_of(store)) == LEADS


@pytest.mark.parametrize(("later_us", "claimed"), [(-(10**15), LANDED), (-1, LANDED), (0, LEADS), (1, LEADS)])
async def test_a_recording_counts_for_a_claim_if_its_flight_began_later(backend, later_us, claimed):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    newer_than_us = int(RECORDING.meta.started_at * 1e6) + later_us
    assert await store.claim(LOG, writer_of(store), newer_than_us=newer_than_us) == claimed


async def test_any_recording_counts_for_a_claim_of_one_who_has_seen_none(backend):
    store = await backend.store()
    await store.store(KEY, begun(-RECORDING.meta.started_at, b"{}"))
    assert await store.claim(LOG, writer_of(store)) == LANDED


async def test_what_is_no_recording_does_not_count_for_a_claim(backend):
    store = await backend.store()
    await backend.raw.set(backend.name, "of another type")
    assert await store.claim(LOG, writer_of(store)) == LEADS


async def test_a_leader_that_gave_no_sign_of_life_is_not_followed(backend):
    store = await backend.store(lease_s=0.1)
    assert await store.claim(LOG, writer_of(store)) == LEADS
    async with asyncio.timeout(5):
        while await store.claim(OTHER_LOG, writer_of(store)) != LEADS:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", ["append", "end", "release", "store"])
async def test_newcomers_do_not_follow_a_flight_that_is_over_or_not_to_be_joined(backend, how):
    store = await backend.store()
    writer = writer_of(store)
    await store.claim(LOG, writer)
    await append(store, batch(writer, 0, "ab"))
    assert await store.claim(OTHER_LOG, writer) == FOLLOWS
    if how == "append":
        await append(store, batch(writer, 2, joinable=False))
    elif how == "end":
        await store.end(LOG, writer, b"over")
    elif how == "release":
        await store.release(LOG, writer)
    else:
        await store.store(KEY, begun(-1000, b"{}"), ends=LOG, writer=writer, end=b"over")
    newer_than_us = int(RECORDING.meta.started_at * 1e6)
    assert await store.claim(OTHER_LOG, writer, newer_than_us=newer_than_us) == LEADS


async def test_a_flight_that_newcomers_do_not_join_leaves_the_one_that_they_do(backend):
    store = await backend.store()
    leader, other = writer_of(store), writer_of(store, "00000002")
    await store.claim(LOG, leader)
    await append(store, batch(other, 0, "a", log=OTHER_LOG))
    await append(store, batch(other, 1, "b", log=OTHER_LOG, joinable=False))
    await store.end(OTHER_LOG, other, b"over")
    assert await store.claim(LogName(KEY, FlightId("d" * 16)), leader) == FOLLOWS


async def test_claims_and_lookups_of_one_turn_leave_in_one_pipeline(server, monkeypatch):
    store = await server.store()
    await store.claim(OTHER_LOG, writer_of(store))
    sent = []
    send = AbstractConnection.send_packed_command

    async def count(connection: AbstractConnection, command: Any, **options: Any) -> None:
        sent.append(b"".join(command))
        await send(connection, command, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    await asyncio.gather(
        *(call for _ in range(9) for call in (store.claim(LOG, writer_of(store)), store.lookup(KEY, "whole")))
    )
    assert [(packet.count(b"HMGET"), packet.count(b"EVALSHA")) for packet in sent] == [(9, 9)]


# Appends


@pytest.mark.parametrize("protocol", [2, 3])
async def test_what_is_appended_is_read_elsewhere(backend, protocol):
    one, two = await backend.store(protocol=protocol), await backend.store(protocol=protocol)
    writer = writer_of(one)
    await one.claim(LOG, writer)
    assert await append(one, batch(writer, 0, "abc", head=b"head")) == Appended(3)
    page = await everything(two)
    assert page._replace(entries=(), lease_s=0) == Page((), "3-1", exists=True, lease_s=0, writer=str(writer))
    assert 0 < page.lease_s <= 4
    head, first = page.entries
    assert head == Entry(0, at_us=head.at_us, head=b"head", by=writer.run)
    assert first == Entry(3, (frame("a"), frame("b"), frame("c")), first.at_us, by=writer.run)
    assert list(first.at_us) == [0, 1000, 2000]
    assert await append(one, batch(writer, 3, "d", head=b"another head")) == Appended(4)
    page = await two.read(LOG, page.cursor, readers=0)
    assert (text(page), page.cursor) == ("d", "4-1")
    later = await two.read(LOG, page.cursor, readers=0)
    assert later == page._replace(entries=(), lease_s=pytest.approx(4, abs=2), at_ms=later.at_ms)


async def test_a_log_needs_no_claim(backend):
    store = await backend.store()
    assert await append(store, batch(writer_of(store), 0, "a", joinable=False)) == Appended(1)
    assert await store.claim(OTHER_LOG, writer_of(store)) == LEADS


async def test_a_head_may_come_alone_and_comes_once(backend):
    store = await backend.store()
    writer = writer_of(store)
    assert await append(store, batch(writer, 0)) == Appended(0)
    assert not (await everything(store)).exists
    for _ in range(2):
        assert await append(store, batch(writer, 0, head=b"head")) == Appended(0)
    await append(store, batch(writer, 0, "a", head=b"head"))
    assert kinds(await everything(store)) == [b"head", frame("a")]


async def test_an_append_whose_answer_was_lost_is_not_doubled_when_it_is_made_again(backend):
    store = await backend.store()
    writer = writer_of(store)
    assert await append(store, batch(writer, 0, "abc")) == Appended(3)
    assert await append(store, batch(writer, 0, "abcd")) == Appended(3)
    assert await append(store, batch(writer, 3, "d")) == Appended(4)
    assert text(await everything(store)) == "abcd"


async def test_an_append_that_would_leave_a_gap_tells_where_to_go_on(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    assert await append(store, batch(writer, 5, "fg")) == Appended(2)
    assert text(await everything(store)) == "ab"


async def test_several_logs_are_appended_to_in_one_go_and_each_has_its_own_result(backend):
    store = await backend.store()
    writer = writer_of(store)
    logs = [LogName(f"{number:040x}", FlightId("f" * 16)) for number in range(20)]
    await append(store, batch(writer_of(store, "00000002"), 0, "a", log=logs[7]))
    results = await store.append([batch(writer, 0, "abc"[: number % 3], log=log) for number, log in enumerate(logs)])
    assert isinstance(results[7], StoreFenced)
    assert results[:7] + results[8:] == [Appended(number % 3) for number in range(20) if number != 7]
    assert await store.append([]) == []


async def test_a_heartbeat_keeps_the_lease_and_adds_nothing(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    for name in (backend.key("lease", LOG), backend.key("now")):
        await backend.raw.pexpire(name, 1000)
    assert await append(store, batch(writer, 2)) == Appended(2)
    for name in (backend.key("lease", LOG), backend.key("now")):
        assert await backend.raw.pttl(name) > 1000
    assert len((await everything(store)).entries) == 1


async def test_the_log_of_another_is_not_appended_to(backend):
    one, two = await backend.store(), await backend.store()
    await append(one, batch(writer_of(one), 0, "ab"))
    await refusing(append(two, batch(writer_of(two), 2, "x")))
    await refusing(append(two, batch(writer_of(two), 0, "x")))
    await refusing(append(one, batch(writer_of(one, "00000002"), 2)))
    assert text(await everything(one)) == "ab"


async def test_of_two_who_write_the_same_log_at_once_one_does(backend):
    one, two = await backend.store(), await backend.store()
    results = await asyncio.gather(*(store.append([batch(writer_of(store), 0, "ab")]) for store in (one, two)))
    assert sorted(type(result).__name__ for [result] in results) == ["Appended", "StoreFenced"]


async def test_a_lease_that_ran_out_is_taken_again_if_nobody_else_has_written(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    await lease_runs_out(backend)
    assert await append(store, batch(writer, 2, "c")) == Appended(3)


async def test_an_answer_that_was_lost_before_the_lease_was_fences_nobody_off(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    await append(store, batch(writer, 2, "cd"))
    await lease_runs_out(backend)
    assert await append(store, batch(writer, 2, "cde")) == Appended(4)


async def test_a_lost_log_is_written_anew_and_its_reader_goes_on_where_he_was(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "abcd", head=b"head"))
    cursor = (await everything(store)).cursor
    await backend.raw.delete(backend.key("log", LOG))
    page = await store.read(LOG, cursor, readers=1)
    assert (page.entries, page.cursor, page.exists) == ((), cursor, False)
    assert page.lease_s
    assert await append(store, batch(writer, 4, "e")) == Appended(0)
    assert await append(store, batch(writer, 0, "abc", head=b"head")) == Appended(3)
    assert (await store.read(LOG, cursor, readers=1)).entries == ()
    assert await append(store, batch(writer, 3, "def", head=b"head")) == Appended(6)
    [entry] = (await store.read(LOG, cursor, readers=1)).entries
    assert (entry.count, len(entry.frames)) == (6, 3)
    assert kinds(await everything(store))[0] == b"head"


async def test_who_has_lost_log_and_lease_writes_anew(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "abcd"))
    await backend.raw.delete(backend.key("log", LOG))
    await backend.raw.delete(backend.key("lease", LOG))
    assert await append(store, batch(writer, 4, "e")) == Appended(0)
    await refusing(append(store, batch(writer_of(store, "00000002"), 0, "x")))
    assert await append(store, batch(writer, 0, "abcde")) == Appended(5)


async def test_a_writer_that_was_replaced_is_fenced_off_even_when_nobody_holds_the_lease(backend):
    store = await backend.store()
    old, new = writer_of(store), writer_of(store, "00000002")
    await append(store, batch(old, 0, "ab"))
    await lease_runs_out(backend)
    assert await store.take_over(LOG, new, behind="00000001", joinable=True)
    await lease_runs_out(backend)
    await refusing(append(store, batch(old, 2, "x")))
    await refusing(append(store, batch(old, 2)))
    await refusing(store.end(LOG, old, b"over"))
    assert await append(store, batch(new, 2, "c")) == Appended(3)


@pytest.mark.parametrize("how", ["end", "release"])
async def test_nothing_is_appended_to_a_log_that_was_ended_or_given_up(backend, how):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    await (store.end(LOG, writer, b"over") if how == "end" else store.release(LOG, writer))
    before = await everything(store)
    await refusing(append(store, batch(writer, 2, "c")))
    assert await everything(store) == before
    assert before.lease_s == 0


async def test_frames_that_nobody_needs_any_more_are_dropped_in_whole_batches(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab", head=b"head"))
    await append(store, batch(writer, 2, "cd"))
    await append(store, batch(writer, 4, "ef", trim_to=3))
    assert text(await everything(store)) == "cdef"
    assert await append(store, batch(writer, 6, "g", trim_to=7)) == Appended(7)
    assert text(await everything(store)) == "g"
    assert await append(store, batch(writer, 7, trim_to=7)) == Appended(7)
    assert await append(store, batch(writer, 7, "h", trim_to=0)) == Appended(8)
    assert text(await everything(store)) == "gh"


async def test_the_request_is_kept_with_the_first_frames(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, request=b"asked"))
    assert (await store.peek(LOG)).request == b"asked"
    await append(store, batch(writer, 0, "ab", request=b"asked"))
    await append(store, batch(writer, 2, "c", request=b"something else"))
    assert (await store.peek(LOG)).request == b"asked"


# Readers


async def test_replicas_tell_each_other_how_many_readers_they_have(backend):
    one, two, three = [await backend.store() for _ in range(3)]
    writer = writer_of(one)
    assert (await append(one, batch(writer, 0, "a", readers=5))).listeners == 0
    await two.read(LOG, LOG_START, readers=2)
    await three.read(LOG, LOG_START, readers=1)
    assert (await append(one, batch(writer, 1, readers=5))).listeners == 3
    assert (await one.peek(LOG)).readers == 8
    await two.read(LOG, LOG_START, readers=0)
    assert (await append(one, batch(writer, 1, readers=0))).listeners == 1
    assert (await one.peek(LOG)).readers == 1


async def test_readers_of_a_replica_that_is_silent_do_not_count(backend):
    one, two = await backend.store(lease_s=0.1), await backend.store()
    writer = writer_of(two)
    await one.read(LOG, LOG_START, readers=3)
    await two.read(LOG, LOG_START, readers=1)  # so that the key outlives what the first has said
    await append(two, batch(writer, 0, "a", readers=1))
    async with asyncio.timeout(5):
        while (await append(two, batch(writer, 1, readers=1))).listeners:
            await asyncio.sleep(0.01)
    assert await backend.raw.hkeys(backend.key("readers", LOG)) == [two.replica.encode()]


async def test_a_page_has_no_room_for_all_of_a_long_log(backend):
    store = await backend.store()
    writer = writer_of(store)
    await store.append([batch(writer, number, "x") for number in range(600)])
    pages = [await everything(store)]
    while pages[-1].more:
        pages.append(await store.read(LOG, pages[-1].cursor, readers=0))
    assert [entry.count for page in pages for entry in page.entries] == list(range(1, 601))
    assert max(len(page.entries) for page in pages) == 256


async def test_a_page_that_holds_all_there_is_says_so(backend):
    store = await backend.store()
    await store.append([batch(writer_of(store), number, "x") for number in range(256)])
    page = await everything(store)
    assert (len(page.entries), page.more) == (256, False)


async def test_a_page_does_not_take_many_megabytes(backend):
    store = await backend.store()
    writer, large = writer_of(store), frame("x" * 400_000)
    for number in range(40):
        await append(store, replace(batch(writer, number), frames=[large], at_us=[number]))
    pages = [await everything(store)]
    while pages[-1].more:
        pages.append(await store.read(LOG, pages[-1].cursor, readers=0))
    assert [entry.frames for page in pages for entry in page.entries] == [(large,)] * 40
    assert max(len(page.entries) for page in pages) <= 16


async def test_a_log_that_nobody_has_written_is_not_there(backend):
    store = await backend.store()
    assert await everything(store) == Page((), LOG_START, exists=False, lease_s=0)
    assert await store.peek(LOG) == Peeked()
    assert await store.recording_of(LOG) is None


async def test_an_entry_that_does_not_load_is_corrupt(backend):
    store = await backend.store()
    await backend.raw.xadd(backend.key("log", LOG), {"d": b"", "t": b"no number"}, id="1-1")
    with pytest.raises(StoreCorrupt):
        await everything(store)
    assert store.available


# Take-over, release and end


async def test_a_log_is_taken_over_when_its_writer_has_lost_the_lease(backend):
    one, two = await backend.store(), await backend.store()
    old, new = writer_of(one), writer_of(two, "00000002")
    await one.claim(LOG, old)
    await append(one, batch(old, 0, "ab"))
    assert not await two.take_over(LOG, new, behind="00000001", joinable=True)
    await lease_runs_out(backend)
    assert await two.take_over(LOG, new, behind="00000001", joinable=True)
    await refusing(append(one, batch(old, 2, "x")))
    assert await append(two, batch(new, 2, "c")) == Appended(3)
    page = await everything(one)
    assert kinds(page) == [frame("a") + frame("b"), "00000002", frame("c")]
    assert [entry.count for entry in page.entries] == [2, 2, 3]
    assert page.writer == str(new)


@pytest.mark.parametrize("released", [False, True])
async def test_of_many_who_take_over_at_once_one_does(backend, released):
    stores = [await backend.store() for _ in range(4)]
    await append(stores[0], batch(writer_of(stores[0]), 0, "ab"))
    if released:
        await stores[0].release(LOG, writer_of(stores[0]))
    else:
        await lease_runs_out(backend)
    takers = [await backend.store() for _ in range(4)]
    assert sorted(
        await asyncio.gather(
            *(store.take_over(LOG, writer_of(store, "2"), behind="00000001", joinable=True) for store in takers)
        )
    ) == [
        False,
        False,
        False,
        True,
    ]
    assert kinds(await everything(stores[0])).count("2") == 1


async def test_a_take_over_whose_answer_was_lost_holds_when_it_is_made_again(backend):
    store = await backend.store()
    new = writer_of(store, "00000002")
    await append(store, batch(writer_of(store), 0, "ab"))
    await store.release(LOG, writer_of(store))
    assert await store.take_over(LOG, new, behind="00000001", joinable=True)
    assert await store.take_over(LOG, new, behind="00000001", joinable=True)
    assert kinds(await everything(store)).count("00000002") == 1


@pytest.mark.parametrize("joinable", [False, True])
async def test_newcomers_follow_a_log_that_was_taken_over_if_they_may(backend, joinable):
    store = await backend.store()
    await append(store, batch(writer_of(store), 0, "ab"))
    await store.release(LOG, writer_of(store))
    assert await store.take_over(LOG, writer_of(store, "00000002"), behind="00000001", joinable=joinable)
    assert await store.claim(OTHER_LOG, writer_of(store)) == (FOLLOWS if joinable else LEADS)


async def test_a_take_over_leaves_the_flight_that_newcomers_follow_by_now(backend):
    store = await backend.store()
    await append(store, batch(writer_of(store), 0, "ab"))
    await store.release(LOG, writer_of(store))
    await store.claim(OTHER_LOG, writer_of(store, "00000002"))
    assert await store.take_over(LOG, writer_of(store, "00000003"), behind="00000001", joinable=True)
    assert await store.claim(LogName(KEY, FlightId("d" * 16)), writer_of(store)) == Claimed(follow=OTHER_LOG.flight)


async def test_of_many_who_take_over_before_there_is_a_log_one_does_and_writes_it_from_its_beginning(backend):
    store = await backend.store()
    assert await store.take_over(LOG, writer_of(store), behind="00000001", joinable=True)
    assert not await store.take_over(LOG, writer_of(store, "00000002"), behind="00000001", joinable=True)
    await append(store, batch(writer_of(store), 0, "ab"))
    assert [entry.run for entry in (await everything(store)).entries] == [""]


async def test_what_has_ended_is_not_taken_over(backend):
    store = await backend.store()
    await append(store, batch(writer_of(store), 0, "ab"))
    await store.end(LOG, writer_of(store), b"over")
    assert not await store.take_over(LOG, writer_of(store, "00000002"), behind="00000001", joinable=True)
    assert not (await everything(store)).lease_s


async def test_a_log_that_is_given_up_can_be_taken_over_at_once(backend):
    one, two = await backend.store(), await backend.store()
    await append(one, batch(writer_of(one), 0, "ab"))
    cursor = (await everything(two)).cursor
    await two.release(LOG, writer_of(two))  # not its own: nothing happens
    assert (await everything(two)).lease_s
    await one.release(LOG, writer_of(one))
    page = await two.read(LOG, cursor, readers=1)
    assert kinds(page) == ["released"]
    assert page.lease_s == 0
    assert await two.take_over(LOG, writer_of(two), behind="00000001", joinable=True)
    assert kinds(await two.read(LOG, page.cursor, readers=1)) == ["00000001"]


async def test_who_claimed_and_wrote_nothing_tells_that_it_gives_up(backend):
    store = await backend.store()
    await store.claim(LOG, writer_of(store))
    await store.release(LOG, writer_of(store))
    page = await everything(store)
    assert (kinds(page), page.lease_s) == (["released"], 0)
    assert await backend.raw.pttl(backend.key("log", LOG)) > 0
    assert await store.claim(OTHER_LOG, writer_of(store)) == LEADS


async def test_the_end_is_the_last_that_a_log_tells(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab", readers=1, request=b"asked", head=b"head"))
    await store.end(LOG, writer, b"over", body=b"{}")
    page = await everything(store, readers=1)
    assert page.entries[-1] == Entry(2, at_us=page.entries[-1].at_us, end=b"over", body=b"{}", by=writer.run)
    assert (page.lease_s, page.writer) == (0, "")
    assert (await store.read(LOG, page.cursor, readers=1)).entries == ()
    left = Peeked(log=True, count=2, head=b"head", end=b"over", request=b"asked", readers=1, writer=str(writer))
    assert await store.peek(LOG) == left


async def test_an_end_whose_answer_was_lost_holds_when_it_is_made_again(backend):
    store = await backend.store()
    await append(store, batch(writer_of(store), 0, "ab"))
    await store.end(LOG, writer_of(store), b"over")
    await store.end(LOG, writer_of(store), b"over")
    assert kinds(await everything(store)).count(b"over") == 1
    await refusing(store.end(LOG, writer_of(store, "00000002"), b"over"))


@pytest.mark.parametrize(
    ("reader", "readers", "last"),
    [("another", 1, "released"), ("another", 0, b"over"), ("its own", 1, b"over")],
    ids=["another replica reads it", "another has read it", "its own does"],
)
async def test_a_log_that_is_not_to_be_ended_while_it_is_read_elsewhere_is_given_up(backend, reader, readers, last):
    one, two = await backend.store(), await backend.store()
    await append(one, batch(writer_of(one), 0, "ab", request=b"asked"))
    await (two if reader == "another" else one).read(LOG, LOG_START, readers=readers)
    await one.end(LOG, writer_of(one), b"over", unless_read=True)
    assert kinds(await everything(two))[-1] == last
    assert await two.take_over(LOG, writer_of(two, "00000002"), behind="00000001", joinable=True) == (last == "released")


async def test_the_log_of_another_is_not_ended(backend):
    one, two = await backend.store(), await backend.store()
    await append(one, batch(writer_of(one), 0, "ab"))
    await refusing(two.end(LOG, writer_of(two), b"over"))
    assert await append(one, batch(writer_of(one), 2, "c")) == Appended(3)


async def test_a_flight_that_ends_before_its_first_frame_says_so_too(backend):
    one, two = await backend.store(), await backend.store()
    await one.claim(LOG, writer_of(one))
    await one.end(LOG, writer_of(one), b"failed")
    page = await everything(two)
    assert [(entry.count, entry.end) for entry in page.entries] == [(0, b"failed")]
    assert not page.lease_s


async def test_the_end_of_a_lost_log_reaches_a_reader_who_is_further(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "abcd"))
    cursor = (await everything(store)).cursor
    await backend.raw.delete(backend.key("log", LOG))
    await store.end(LOG, writer, b"over")
    page = await store.read(LOG, cursor, readers=1)
    assert kinds(page) == [b"over"]
    assert (await store.read(LOG, page.cursor, readers=1)).entries == ()


# Recordings


@pytest.mark.parametrize("written", [True, False])
async def test_a_recording_is_stored_and_its_log_ended_in_one_step(backend, written):
    store = await backend.store()
    writer, recording = writer_of(store), of_flight(LOG)
    await append(store, batch(writer, 0, "ab"))
    if written:
        assert await store.store(KEY, recording, ends=LOG, writer=writer, end=b"over")
    else:
        await store.store(KEY, of_flight(OTHER_LOG, 1))
        assert not await store.store(KEY, recording, ends=LOG, writer=writer, end=b"over")
    page = await everything(store)
    assert kinds(page)[-1] == b"over"
    assert not page.lease_s
    # One that came too late is kept beside the other for a while: it may have been replayed already.
    assert (await store.recording_of(LOG)).meta == recording.meta
    assert (await store.peek(LOG)).recording
    assert (await store.lookup(KEY, "whole")).meta.flight == (LOG if written else OTHER_LOG).flight
    if not written:
        assert 0 < await backend.raw.pttl(backend.key("rec", LOG)) <= 300_000


async def test_who_has_lost_the_log_stores_no_recording(backend):
    store = await backend.store()
    old, new = writer_of(store), writer_of(store, "00000002")
    await append(store, batch(old, 0, "ab"))
    await store.release(LOG, old)
    await store.take_over(LOG, new, behind="00000001", joinable=True)
    await refusing(store.store(KEY, of_flight(LOG), ends=LOG, writer=old, end=b"over"))
    assert await store.lookup(KEY, "whole") is None
    assert await store.store(KEY, of_flight(LOG), ends=LOG, writer=new, end=b"over")
    await refusing(store.store(KEY, of_flight(LOG, 1), ends=LOG, writer=old, end=b"over"))
    assert (await store.lookup(KEY, "whole")).meta == of_flight(LOG).meta


async def test_a_recording_whose_log_was_ended_with_it_can_be_stored_again(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    for _ in range(2):
        assert await store.store(KEY, of_flight(LOG), ends=LOG, writer=writer, end=b"over")
    assert kinds(await everything(store)).count(b"over") == 1


async def test_the_end_of_a_lost_log_counts_the_frames_of_its_recording(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    await backend.raw.delete(backend.key("log", LOG))
    assert await store.store(KEY, of_flight(LOG, frames=5), ends=LOG, writer=writer, end=b"over")
    assert [(entry.count, entry.end) for entry in (await everything(store)).entries] == [(5, b"over")]


async def test_recordings_that_were_replaced_are_still_had_by_their_flight(backend):
    store = await backend.store()
    logs = [LogName(KEY, FlightId(f"{number:016x}")) for number in range(4)]
    for number, log in enumerate(logs):
        assert await store.store(KEY, of_flight(log, number))
    for log in logs:
        assert (await store.recording_of(log)).meta.flight == log.flight
        assert (await store.recording_of(log)).sse == RECORDING.sse
        assert (await store.peek(log)).recording
    assert (await store.lookup(KEY, "whole")).meta.flight == logs[-1].flight
    assert 0 < await backend.raw.pttl(backend.key("rec", logs[0])) <= 300_000
    assert await store.recording_of(LOG) is None


async def test_recordings_that_replace_each_other_at_once_are_all_kept(backend):
    stores = [await backend.store() for _ in range(2)]
    logs = [LogName(KEY, FlightId(f"{number:016x}")) for number in range(3)]
    await stores[0].store(KEY, of_flight(logs[2]))
    await asyncio.gather(*(store.store(KEY, of_flight(log)) for store, log in zip(stores, logs, strict=False)))
    for log in logs:
        assert await stores[0].recording_of(log)


async def test_a_recording_of_the_same_flight_or_of_none_is_overwritten(backend):
    store = await backend.store()
    await store.store(KEY, RECORDING)
    await store.store(KEY, of_flight(LOG))
    await store.store(KEY, of_flight(LOG))
    assert [name async for name in backend.raw.scan_iter(match=backend.key("rec*"))] == [backend.name.encode()]


async def test_a_recording_is_given_up_where_others_replace_it_faster_than_it_can_be_moved(backend, monkeypatch):
    monkeypatch.setattr("gateway.store.redis._STORE_TRIES", 1)
    store = await backend.store()
    await store.store(KEY, of_flight(LOG))
    assert await store.store(KEY, of_flight(OTHER_LOG))
    assert await store.recording_of(LOG) is None
    assert await store.recording_of(OTHER_LOG)


async def test_what_does_not_load_of_a_replaced_recording_is_corrupt(backend):
    store = await backend.store()
    await store.store(KEY, of_flight(LOG))
    await backend.raw.hset(backend.name, "meta", b"{")
    with pytest.raises(StoreCorrupt):
        await store.recording_of(LOG)


# The bell


class Ears:
    """A listener that counts."""

    def __init__(self) -> None:
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1

    async def rung(self) -> None:
        """Waits for a ring, and forgets it."""
        await until(lambda: self.rings > 0)
        self.rings = 0


async def until_nothing_rings(store: RedisStore, backend: Backend) -> None:
    """What rings on the way has come by when a later ring of another log has."""
    ears = Ears()
    await store.listen(OTHER_LOG.flight, ears.ring)
    await backend.raw.publish(backend.key("").partition(":")[0] + f":bell:{OTHER_LOG.flight}", b"")
    await ears.rung()
    store.stop_listening(OTHER_LOG.flight, ears.ring)


@pytest.mark.parametrize("protocol", [2, 3])
async def test_the_bell_rings_for_all_that_a_reader_has_to_know(backend, protocol):
    one, two = await backend.store(protocol=protocol), await backend.store(protocol=protocol)
    writer, new, ears = writer_of(one), writer_of(two, "00000002"), Ears()
    await two.listen(LOG.flight, ears.ring)
    await append(one, batch(writer, 0, "ab"))
    await ears.rung()
    await one.cancel(LOG, "a reader")
    await ears.rung()
    await one.release(LOG, writer)
    await ears.rung()
    await one.take_over(LOG, new, behind="00000001", joinable=True)
    await ears.rung()
    await one.end(LOG, new, b"over")
    await ears.rung()
    await append(one, batch(writer, 0, "ab", log=OTHER_LOG))
    await until_nothing_rings(two, backend)
    assert ears.rings == 0


async def test_the_bell_rings_for_a_log_that_ended_with_its_recording_and_not_for_heartbeats(backend):
    one, two = await backend.store(), await backend.store()
    writer, ears = writer_of(one), Ears()
    await two.listen(LOG.flight, ears.ring)
    await append(one, batch(writer, 0, "ab"))
    await ears.rung()
    await append(one, batch(writer, 2))
    await until_nothing_rings(two, backend)
    assert ears.rings == 0
    await one.store(KEY, of_flight(LOG), ends=LOG, writer=writer, end=b"over")
    await ears.rung()


async def test_all_who_listen_are_rung_and_who_no_longer_does_is_not(backend):
    store = await backend.store()
    stays, goes = Ears(), Ears()
    await asyncio.gather(store.listen(LOG.flight, stays.ring), store.listen(LOG.flight, goes.ring))
    await append(store, batch(writer_of(store), 0, "a"))
    await goes.rung()
    await stays.rung()
    store.stop_listening(LOG.flight, goes.ring)
    store.stop_listening(LOG.flight, goes.ring)
    await append(store, batch(writer_of(store), 1, "b"))
    await stays.rung()
    assert goes.rings == 0


async def test_who_listens_again_at_once_misses_nothing(backend):
    store = await backend.store()
    ears = Ears()
    for number in range(20):
        await store.listen(LOG.flight, ears.ring)
        store.stop_listening(LOG.flight, ears.ring)
        await store.listen(LOG.flight, ears.ring)
        await append(store, batch(writer_of(store), number, "a"))
        await ears.rung()
        store.stop_listening(LOG.flight, ears.ring)
    await until(lambda: not store._bell._channels)


async def test_many_logs_are_listened_to(backend):
    store = await backend.store()
    logs = [LogName(f"{number:040x}", FlightId(f"{number:016x}")) for number in range(100)]
    ears = {log: Ears() for log in logs}
    await asyncio.gather(*(store.listen(log.flight, ear.ring) for log, ear in ears.items()))
    await store.append([batch(writer_of(store), 0, "a", log=log) for log in logs])
    await until(lambda: all(ear.rings == 1 for ear in ears.values()))


async def test_a_listener_that_breaks_harms_no_other(backend, caplog):
    store = await backend.store()
    ears = Ears()

    def break_down() -> None:
        raise RuntimeError("broken")

    await store.listen(LOG.flight, break_down)
    await store.listen(LOG.flight, ears.ring)
    for number in range(2):
        await append(store, batch(writer_of(store), number, "a"))
        await ears.rung()
    assert [record.getMessage() for record in caplog.records] == ["a listener of the bell broke"] * 2


async def test_who_is_cancelled_while_the_bell_is_not_yet_heard_listens_no_more(backend):
    store = await backend.store()
    ears = Ears()
    for turns in range(6):
        listening = asyncio.create_task(store.listen(LOG.flight, ears.ring))
        for _ in range(turns):
            await asyncio.sleep(0)
        if listening.done():
            store.stop_listening(LOG.flight, ears.ring)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    await until(lambda: not store._bell._channels)
    await append(store, batch(writer_of(store), 0, "a"))
    await until_nothing_rings(store, backend)
    assert ears.rings == 0


async def test_the_writer_of_a_log_is_told_who_was_cancelled(backend):
    one, two = await backend.store(), await backend.store()
    told: dict[str, list[FlightId]] = {"one": [], "two": []}
    one.on_called(told["one"].append)
    two.on_called(told["two"].append)
    ears, writer = Ears(), writer_of(one)
    await two.listen(OTHER_LOG.flight, ears.ring)
    await append(one, batch(writer, 0, "ab"))
    await until_nothing_rings(one, backend)  # its connection stands
    await two.cancel(LOG, "a reader")
    await two.cancel(LOG, "another")
    await until(lambda: told["one"] == [LOG.flight] * 2)
    assert told["two"] == []
    cancelled = frozenset({"a reader", "another"})
    assert (await append(one, batch(writer, 2))).cancelled == cancelled
    assert (await everything(two)).cancelled == cancelled
    assert (await two.peek(LOG)).cancelled == cancelled


async def test_a_cancelled_reader_is_remembered_where_nobody_writes(backend):
    store = await backend.store()
    await store.cancel(LOG, "a reader")
    assert (await store.peek(LOG)).cancelled == {"a reader"}


async def test_a_closed_store_leaves_no_listener_waiting(backend):
    store = await backend.store()
    await store.close()
    async with asyncio.timeout(1):
        await store.listen(LOG.flight, Ears().ring)


# What the readers of a mirror have seen


async def seen_of(store: RedisStore, run: str) -> tuple[int, bool]:
    peeked = await store.peek(LOG, run)
    return peeked.mirrored, peeked.promised


async def test_a_mirror_tells_how_much_it_has_read_and_until_when_its_readers_see_nothing_else(backend):
    one, two = await backend.store(), await backend.store()
    await append(one, batch(writer_of(one), 0, "ab"))
    at_ms = (await two.read(LOG, LOG_START, readers=1)).at_ms
    assert at_ms > 0
    for number, promise_ms, promised in ((1, 60_000, True), (2, 0, False)):
        told = Mirrored("0000000a", "00000001", number, at_ms + promise_ms)
        await two.read(LOG, LOG_START, readers=1, mirrored=told)
        assert await seen_of(one, "0000000a") == (number, promised)
    await two.read(LOG, LOG_START, readers=0, mirrored=Mirrored("0000000b", "00000001", 1, 0))
    assert [await seen_of(one, run) for run in ("0000000a", "0000000b", "0000000c", "")] == [
        (2, False), (1, False), (0, False), (0, False)
    ]  # fmt: skip


async def test_a_mirror_that_takes_the_log_over_is_in_it_from_then_on(backend):
    one, two = await backend.store(), await backend.store()
    await append(one, batch(writer_of(one), 0, "ab"))
    await two.read(LOG, LOG_START, readers=1, mirrored=Mirrored("0000000a", "00000001", 1, 0))
    assert not await two.take_over(LOG, writer_of(two, "0000000a"), behind="00000001", joinable=True)
    assert await seen_of(one, "0000000a") == (1, False)
    await one.release(LOG, writer_of(one))
    assert await two.take_over(LOG, writer_of(two, "0000000a"), behind="00000001", joinable=True)
    assert await seen_of(one, "0000000a") == (2, True)


async def test_what_a_mirror_has_told_lives_as_long_as_the_log(backend):
    store = await backend.store(resume_s=20)
    writer, name = writer_of(store), backend.key("mirrored", LOG)
    await append(store, batch(writer, 0, "ab"))
    await store.read(LOG, LOG_START, readers=0, mirrored=Mirrored("0000000a", "00000001", 2, 0))
    assert 15_000 < await backend.raw.pttl(name) <= 20_000
    await backend.raw.pexpire(name, 1000)
    await append(store, batch(writer, 2))
    assert await backend.raw.pttl(name) > 10_000


async def test_what_was_read_of_a_log_that_was_lost_says_nothing_of_the_one_that_is_written_anew(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    await store.read(LOG, LOG_START, readers=1, mirrored=Mirrored("0000000a", "00000001", 2, 1 << 50))
    await append(store, batch(writer, 2, "c"))
    assert await seen_of(store, "0000000a") == (2, True)
    await backend.raw.delete(backend.key("log", LOG))
    await append(store, batch(writer, 0, "xyz"))
    assert await seen_of(store, "0000000a") == (0, False)


# Keys and commands


async def use_all(store: RedisStore) -> None:
    """Leaves every key that there is."""
    writer, other = writer_of(store), writer_of(store, "00000002")
    await store.store(KEY, of_flight(LogName(KEY, FlightId("1" * 16))))
    await store.store(KEY, of_flight(LogName(KEY, FlightId("2" * 16))))
    await append(store, batch(other, 0, "ab", log=OTHER_LOG, request=b"asked"))
    await store.end(OTHER_LOG, other, b"over")
    await store.claim(LOG, writer, newer_than_us=1 << 60)
    await append(store, batch(writer, 0, "ab", request=b"asked", readers=1))
    await store.cancel(LOG, "a reader")
    await append(store, batch(writer, 2, readers=1))
    await store.read(LOG, LOG_START, readers=1, mirrored=Mirrored("0000000a", "00000001", 2, 0))


async def test_a_deployment_that_was_killed_leaves_nothing_but_the_secret(backend):
    store = await backend.store(lease_s=5, resume_s=20)
    await use_all(store)
    lives = {
        name.decode(): await backend.raw.pttl(name) async for name in backend.raw.scan_iter(match=f"{backend.prefix}:*")
    }
    assert lives.pop(f"{backend.prefix}:secret") == -1
    assert 0 < lives.pop(f"{backend.prefix}:recent", 1) <= 30 * 86_400_000  # on a cluster it may come later
    longest = {
        **dict.fromkeys([backend.key("now"), backend.key("lease", LOG)], 4_000),
        **dict.fromkeys([backend.key(what, log) for what in ("log", "req") for log in (LOG, OTHER_LOG)], 20_000),
        backend.key("cancelled", LOG): 20_000,
        backend.key("mirrored", LOG): 20_000,
        backend.key("readers", LOG): 15_000,
        backend.key("rec", LogName(KEY, FlightId("1" * 16))): 20_000,
        backend.name: 60_000,
    }
    assert set(lives) == set(longest)
    assert all(0 < lives[name] <= life for name, life in longest.items())


async def test_all_keys_of_a_cache_key_share_a_slot(backend):
    store = await backend.store()
    await use_all(store)
    names = [name.decode() async for name in backend.raw.scan_iter(match=f"{backend.prefix}:*")]
    assert {name.partition("{")[2].partition("}")[0] for name in names} == {KEY, ""}
    assert {name for name in names if "{" not in name} <= {f"{backend.prefix}:secret", f"{backend.prefix}:recent"}


async def test_an_appends_lives_are_those_of_the_latest_sign_of_life(backend):
    store = await backend.store(resume_s=20)
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab", request=b"asked"))
    for what in ("log", "req"):
        await backend.raw.pexpire(backend.key(what, LOG), 1000)
    await append(store, batch(writer, 2))
    for what in ("log", "req"):
        assert await backend.raw.pttl(backend.key(what, LOG)) > 10_000


OPERATIONS: dict[str, Callable[[RedisStore, Writer], Any]] = {
    "claim": lambda store, writer: store.claim(LOG, writer),
    "append": lambda store, writer: store.append([batch(writer, 2, "c")]),
    "heartbeat": lambda store, writer: store.append([batch(writer, 2)]),
    "read": lambda store, _: store.read(LOG, LOG_START, readers=1, mirrored=Mirrored("0000000a", "00000001", 2, 0)),
    "take_over": lambda store, writer: store.take_over(LOG, writer, behind="00000001", joinable=True),
    "release": lambda store, writer: store.release(LOG, writer),
    "end": lambda store, writer: store.end(LOG, writer, b"over"),
    "store": lambda store, writer: store.store(KEY, of_flight(LOG), ends=LOG, writer=writer, end=b"over"),
    "peek": lambda store, _: store.peek(LOG),
    "recording_of": lambda store, _: store.recording_of(LOG),
    "cancel": lambda store, _: store.cancel(LOG, "a reader"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_every_operation_is_one_command(server, operation):
    store = await server.store()
    await append(store, batch(writer_of(store), 0, "ab"))
    act = OPERATIONS[operation]
    await act(store, writer_of(store))  # the server knows the script from now on
    await server.raw.delete(server.key("log", LOG))
    commands = await commands_about(server, lambda: act(store, writer_of(store)))
    scripts = [command for command in commands if command.startswith("EVAL")]
    assert len(scripts) == 1
    assert scripts[0].startswith("EVALSHA")


async def test_appends_to_many_logs_take_one_round_trip(server, monkeypatch):
    store = await server.store()
    writer = writer_of(store)
    logs = [LogName(f"{number:040x}", FlightId("f" * 16)) for number in range(50)]
    await append(store, batch(writer, 0, "a"))
    sent = []
    send = AbstractConnection.send_packed_command

    async def count(connection: AbstractConnection, command: Any, **options: Any) -> None:
        sent.append(b"".join(command))
        await send(connection, command, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    await store.append([batch(writer, 0, "a", log=log) for log in logs])
    assert [packet.count(b"EVALSHA") for packet in sent] == [50]


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_server_that_has_forgotten_the_scripts_is_told_them_again(server, operation):
    store = await server.store()
    await append(store, batch(writer_of(store), 0, "ab"))
    await server.raw.script_flush()
    await OPERATIONS[operation](store, writer_of(store))


async def test_a_server_that_has_forgotten_the_scripts_takes_a_whole_batch_of_appends_once(backend):
    store = await backend.store()
    writer = writer_of(store)
    await append(store, batch(writer, 0, "ab"))
    await backend.raw.script_flush()
    logs = [LogName(f"{number:040x}", FlightId("f" * 16)) for number in range(9)]
    assert await store.append([batch(writer, 0, "ab", log=log) for log in logs]) == [Appended(2)] * 9
    assert text(await everything(store, logs[4])) == "ab"


@pytest.mark.parametrize("ask", ["read", "append", "peek"])
async def test_a_key_of_another_type_is_corrupt_and_no_reason_to_give_the_store_up(backend, ask):
    store, name = await backend.store(), backend.key("log", LOG)
    asks: dict[str, Any] = {
        "read": lambda: store.read(LOG, LOG_START, readers=0),
        "append": lambda: append(store, batch(writer_of(store), 0, "a")),
        "peek": lambda: store.peek(LOG),
    }
    await backend.raw.set(name, "no stream")
    with pytest.raises(StoreCorrupt):
        await asks[ask]()
    assert store.available
    async with asyncio.timeout(5):
        while await backend.raw.exists(name):
            await asyncio.sleep(0.005)
    assert await asks[ask]()


async def test_replicas_have_names_of_their_own(backend):
    names = {(await backend.store()).replica for _ in range(5)}
    assert len(names) == 5
    assert all(name and "." not in name for name in names)


async def test_a_closed_store_refuses_everything(backend):
    store = await backend.store()
    await store.close()
    for act in OPERATIONS.values():
        with pytest.raises(StoreUnavailable):
            await act(store, writer_of(store))


@pytest.mark.parametrize("what", ["lease", "log", "readers", "cancelled", "mirrored"])
async def test_what_is_of_another_type_under_the_names_of_a_log_is_deleted_and_written_anew(backend, what, caplog):
    store = await backend.store()
    writer, name = writer_of(store), backend.key(what, LOG)
    await append(store, batch(writer, 0, "ab", request=b"asked"))
    await backend.raw.delete(name)
    await backend.raw.lpush(name, "of another type")
    text_then = ""
    async with asyncio.timeout(5):
        while text_then != "abc":
            with suppress(StoreCorrupt, StoreUnavailable):
                held = (await append(store, batch(writer, 0, "abc", request=b"asked"))).count
                await append(store, batch(writer, held, "abc"[held:]))
                text_then = text(await everything(store, readers=1))
                await store.peek(LOG, "0000000a")
            await asyncio.sleep(0.005)
    assert await backend.raw.type(name) != b"list"
    assert len([record for record in caplog.records if "do not load" in record.getMessage()]) <= 1


async def test_what_is_of_another_type_in_the_place_of_who_leads_is_deleted(backend):
    store = await backend.store()
    await backend.raw.lpush(backend.key("now"), "of another type")
    claimed = None
    async with asyncio.timeout(5):
        while claimed != LEADS:
            with suppress(StoreCorrupt):
                claimed = await store.claim(LOG, writer_of(store))
            await asyncio.sleep(0.005)
    assert await store.claim(OTHER_LOG, writer_of(store)) == FOLLOWS
