"""What a request leaves in memory: it is gone with its last user, not when the collector looks at everything.

With thousands of streams open that is seldom, and an answer may be megabytes.
"""

import gc

import pytest
from raw import by_then
from scripted import chunk, say_hello

from gateway.flight import Flight
from gateway.reader import FlightReader, RecordingReader, StandIn
from gateway.service import Opened
from gateway.sharing import Shared

HELD = (Flight, FlightReader, RecordingReader, StandIn, Opened, Shared)


def nothing_is_left():
    """Of what was made since the collector was stopped: all that is in its youngest generation."""
    return not any(isinstance(each, HELD) for each in gc.get_objects(generation=0))


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def breaks_off(asked):
    await asked.head()
    await asked.event(chunk({"role": "assistant", "content": "Hel"}))
    asked.reset()


async def is_broken(asked):
    await asked.head()
    await asked.event(chunk({"content": "Hel"}))
    await asked.send(b"data: {\n\n")
    await asked.end()


async def reports(asked):
    await asked.head()
    await asked.event(chunk({"content": "Hel"}))
    await asked.event({"error": {"message": "no more"}})
    await asked.end()


async def refuses(asked):
    await asked.answer({"error": {"message": "no"}}, 500)


async def hangs_up(asked):
    asked.reset()


async def says_and_waits(asked):
    await asked.head()
    await asked.event(chunk({"content": "Hello"}))
    await asked.gone.wait()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("script", [say_hello, breaks_off, is_broken, reports, refuses, hangs_up])
@pytest.mark.usefixtures("no_collector")
async def test_nothing_of_a_request_waits_for_the_collector(start_gateway, upstream, script, streamed):
    upstream.script = script
    gateway = await start_gateway()
    for _ in range(2):
        await gateway.chat(stream=streamed)
    await by_then(nothing_is_left)


@pytest.mark.usefixtures("no_collector")
async def test_nothing_of_a_caller_who_leaves_waits_for_the_collector(start_gateway, upstream):
    upstream.script = says_and_waits
    gateway = await start_gateway(flights={"when_abandoned": "cancel", "abandon_grace_s": 0.0})
    async with gateway.opened(stream=True) as response:
        assert await response.content.readany()
        response.close()
    await by_then(nothing_is_left)


@pytest.mark.usefixtures("no_collector")
async def test_nothing_of_those_who_are_refused_waits_for_the_collector(start_gateway, upstream):
    upstream.script = says_and_waits
    gateway = await start_gateway(flights={"when_abandoned": "cancel", "abandon_grace_s": 0.0}, limits={"max_flights": 1})
    async with gateway.opened("first", stream=True) as response:
        assert await response.content.readany()
        for number in range(3):
            assert (await gateway.chat(f"no room {number}")).status == 503
        response.close()
    await by_then(nothing_is_left)


@pytest.mark.usefixtures("no_collector")
async def test_nothing_waits_for_the_collector_where_the_store_is_away(start_gateway, tmp_path):
    gateway = await start_gateway(redis={"url": f"unix://{tmp_path}/nobody"})
    for streamed in (True, False):
        assert (await gateway.chat(stream=streamed)).status == 200
    await by_then(nothing_is_left)
