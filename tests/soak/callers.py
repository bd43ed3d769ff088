"""Those who ask: each kind of caller does its thing, and goes on as a good client does where something breaks."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import aiohttp
from attempts import Asker, Attempt, Left, OnEvent, Stream, code_of, reads_on
from connections import ASKING
from excuses import REDIS, excuse
from fleet import ADMIN_KEY, RESUME_S, Replica
from journal import Journal
from questions import MODELS, OWN, SHARED, TENANTS, Question

_NEAR_S = 8.0
_RECOVERS_WITHIN_S = 120.0
"""A caller that has been excused has its answer by then, whatever else breaks meanwhile."""
_POPULAR = 30
_HERD = 6
ONLY_IF_CACHED = {"Cache-Control": "only-if-cached"}
NO_STORE = {"Cache-Control": "no-store"}
NO_CACHE = {"Cache-Control": "no-cache"}


@dataclass
class Visit:
    """One thing that a caller wants, over all attempts that it takes."""

    kind: str
    question: Question
    began_at: float
    headers: dict[str, str]
    tried: int = 0


class Callers:
    """So many at a time, each drawing what it does next."""

    def __init__(
        self,
        asker: Asker,
        session: aiohttp.ClientSession,
        replicas: list[Replica],
        journal: Journal,
        *,
        seed: int,
        by_number: float,
    ) -> None:
        self._asker = asker
        self._session = session
        self._replicas = replicas
        self._journal = journal
        self._draw = random.Random(f"callers {seed}")
        self._seed = seed
        self._by_number = by_number
        """The share of the streams that have no event ids, and so are resumed by a number alone."""
        self._numbers = count(1)
        self._stop = asyncio.Event()
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (40, self._asks_what_others_ask),
            (14, self._asks_something_new),
            (4, self._asks_with_others),
            (14, self._is_cut_and_resumes),
            (4, self._reads_slowly),
            (8, self._leaves),
            (4, self._wants_only_what_is_stored),
            (2, self._wants_only_what_is_stored_of_something_new),
            (3, self._wants_nothing_stored),
            (3, self._wants_it_anew),
            (2, self._purges),
            (2, self._cancels),
        ]

    async def run(self, callers: int) -> None:
        """Until `stop`; whoever has begun by then comes to an end."""
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(self._caller())

    def stop(self) -> None:
        self._stop.set()

    async def _caller(self) -> None:
        weights, kinds = zip(*self._kinds, strict=True)
        while not self._stop.is_set():
            [kind] = self._draw.choices(kinds, weights)
            await kind()
            await asyncio.sleep(self._draw.random() * 0.1)

    # What is asked, and of whom

    def _question(self, text: str, *, model: str = "") -> Question:
        draw = self._draw
        return Question(
            model or draw.choices(MODELS, (6, 2, 2))[0],
            draw.choice(("chat", "chat", "completions")),
            text,
            draw.choice(TENANTS),
        )

    def _popular(self) -> Question:
        number = self._draw.randrange(_POPULAR)
        return self._question(f"{'long' if number % 3 == 0 else 'short'} question {number}", model=MODELS[number % 3])

    def _new(self, size: str = "", *, model: str = "") -> Question:
        size = size or self._draw.choice(("short", "long"))
        return self._question(f"{size} new question {next(self._numbers)} of {self._seed}", model=model)

    def _replica(self, *not_these: Replica) -> Replica:
        """As a balancer chooses: mostly one that is up."""
        others = [each for each in self._replicas if each not in not_these] or self._replicas
        listed = [each for each in others if each.listed]
        return self._draw.choice(listed if listed and self._draw.random() < 0.9 else others)

    def _visit(self, kind: str, question: Question, headers: dict[str, str] | None = None) -> Visit:
        return Visit(kind, question, self._journal.now(), headers or {})

    # Kinds of callers

    async def _asks_what_others_ask(self) -> None:
        await self._ask(self._visit("ask", self._popular()))

    async def _asks_something_new(self) -> None:
        await self._ask(self._visit("new", self._new()))

    async def _asks_with_others(self) -> None:
        """Identical requests at the same time, over all replicas, are one call where nothing breaks."""
        visit = self._visit("herd", self._new("long", model=self._draw.choice((SHARED, OWN))))
        await asyncio.gather(*[self._ask(replace(visit)) for _ in range(_HERD)])
        began_at, ended_at = visit.began_at, self._journal.now()
        # What was broken just before may still make a replica fly alone.
        if not any(self._journal.faults(began_at - 5.0, ended_at)):
            calls = self._journal.calls[visit.question.identity]
            good = [call for call in calls if not call.fault]
            if len(good) == len(calls):
                self._journal.check("a herd is one call", holds=len(calls) == 1, detail=f"{visit.question}: {len(calls)}")

    async def _is_cut_and_resumes(self) -> None:
        """Cuts itself off a few times, and goes on elsewhere."""
        draw = self._draw
        cuts = [draw.randint(0, 25) for _ in range(draw.randint(1, 3))]

        async def on_event(stream: Stream) -> None:
            if cuts and stream.events >= cuts[0]:
                cuts.pop(0)
                raise Left

        question = self._popular() if draw.random() < 0.4 else self._new("long")
        await self._ask_stream(self._visit("cut", question), on_event, comes_back=True)

    async def _reads_slowly(self) -> None:
        # However finely the answer is cut.
        pauses = iter(range(20, 400, 20))
        due = next(pauses)

        async def on_event(stream: Stream) -> None:
            nonlocal due
            if stream.events >= due:
                due = next(pauses, 10**9)
                await asyncio.sleep(0.2)

        await self._ask_stream(self._visit("slow", self._new("huge", model=SHARED)), on_event)

    async def _leaves(self) -> None:
        question = self._new() if self._draw.random() < 0.7 else self._popular()
        headers = self._draw.choice(({}, {}, NO_STORE, NO_CACHE))
        after_s = self._draw.random() * 0.6
        asking = asyncio.ensure_future(self._attempt_once(self._visit("leave", question, headers)))
        await asyncio.wait([asking], timeout=after_s)
        if asking.done():
            await asking
            return
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self._journal.outcomes["leave", "left"] += 1

    async def _attempt_once(self, visit: Visit) -> None:
        if self._draw.random() < 0.5:
            attempt = await self._asker.whole(self._replica(), visit.question, visit.headers)
        else:
            attempt = await self._asker.stream(self._replica(), self._stream(visit), visit.headers)
        self._is_over(visit, attempt)

    async def _wants_only_what_is_stored(self) -> None:
        await self._stored(self._visit("only-if-cached", self._popular(), ONLY_IF_CACHED))

    async def _wants_only_what_is_stored_of_something_new(self) -> None:
        visit = self._visit("only-if-cached, new", self._new(), ONLY_IF_CACHED)
        found = await self._stored(visit)
        self._journal.check("nothing is found that was never asked", holds=found is not True, detail=str(visit))
        calls = self._journal.calls.get(visit.question.identity)
        self._journal.check("only-if-cached calls no model", holds=not calls, detail=str(visit))

    async def _wants_nothing_stored(self) -> None:
        visit = self._visit("no-store", self._new(), NO_STORE)
        if await self._ask(visit):
            found = await self._stored(replace(visit, headers=ONLY_IF_CACHED))
            self._journal.check("no-store stores nothing", holds=found is not True, detail=str(visit))

    async def _wants_it_anew(self) -> None:
        await self._ask(self._visit("no-cache", self._popular(), NO_CACHE))

    async def _purges(self) -> None:
        """What was purged is found no more, on no replica, a second later."""
        name = f"tag {next(self._numbers)} of {self._seed}"
        visit = self._visit("purge", self._new("short"), {"Gateway-Cache-Tags": f'"{name}"'})
        if not await self._ask(visit):
            return
        if await self._purge(visit, name):
            await asyncio.sleep(1.0)
            found = await self._stored(replace(visit, headers=ONLY_IF_CACHED))
            broken = any(window.kind in REDIS for window in self._journal.faults(visit.began_at, self._journal.now()))
            if not broken:
                self._journal.check("what is purged is gone", holds=found is not True, detail=str(visit))

    async def _purge(self, visit: Visit, tag: str) -> bool:
        replica = self._replica()
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        return await self._does(visit, "purge itself", replica, f"{replica.origin}/admin/purge", headers, {"tag": tag})

    async def _does(
        self, visit: Visit, kind: str, replica: Replica, url: str, headers: dict[str, str], body: Any = None
    ) -> bool:
        """Whether what is no question was done; a violation where it was not, and nothing excuses that."""
        attempt = Attempt(replica, visit.question, self._journal.now())
        ASKING.set(attempt)
        try:
            async with self._session.post(url, json=body, headers=headers) as response:
                attempt.status, attempt.body = response.status, await response.read()
        except (aiohttp.ClientError, ConnectionError) as error:
            attempt.became, attempt.body = "cut", repr(error).encode()
        else:
            attempt.became = "whole" if attempt.status < 300 else "refused"
            attempt.code = code_of(json.loads(attempt.body)) if attempt.body else ""
        attempt.ended_at = self._journal.now()
        return self._is_over(replace(visit, kind=kind), attempt) and attempt.became == "whole"

    async def _cancels(self) -> None:
        """A stream that its caller has cancelled gives nothing any more."""
        visit = self._visit("cancel", self._new("long"))
        stream = self._stream(visit)

        async def on_event(stream: Stream) -> None:
            if stream.events == 3:
                raise Left

        attempt = await self._asker.stream(self._replica(), stream, {}, on_event)
        if attempt.became != "left" or not stream.stream_id:
            self._is_over(visit, attempt)
            return
        replica, headers = self._replica(), {"Authorization": f"Bearer {stream.question.tenant}"}
        url = f"{replica.base_url}/streams/{stream.stream_id}/cancel"
        if not await self._does(visit, "cancel itself", replica, url, headers):
            return
        stream.cancelled = True
        resumed = await self._asker.resume(self._replica(), stream)
        if any(window.kind in REDIS for window in self._journal.faults(visit.began_at - 2.0, self._journal.now())):
            return
        if resumed.became not in ("cut", "refused", "broken"):
            holds = resumed.became == "nothing more"
            self._journal.check("what is cancelled is over", holds=holds, detail=f"{resumed}, cancelled at {replica.name}")

    # How they go on

    async def _ask(self, visit: Visit) -> bool:
        """Until there is an answer, in a mode drawn by lot. False where the caller has given up."""
        if self._draw.random() < 0.6:
            return await self._ask_stream(visit, reads_on)
        attempt: Attempt | None = None
        while not attempt or attempt.became != "whole":
            replica = self._replica(*([attempt.replica] if attempt else []))
            attempt = await self._asker.whole(replica, visit.question, visit.headers)
            if not self._is_over(visit, attempt) or not await self._may_go_on(visit, attempt):
                return False
        return True

    async def _ask_stream(self, visit: Visit, on_event: OnEvent, *, comes_back: bool = False) -> bool:
        """The same as a stream; one that is cut is resumed elsewhere, or asked for anew where that cannot be."""
        stream, attempt = self._stream(visit), None
        while True:
            replica = self._replica(*([attempt.replica] if attempt else []))
            if attempt is not None and self._can_resume(stream, attempt):
                if attempt.became == "left":
                    await asyncio.sleep(self._draw.random() * min(1.0, RESUME_S / 4))
                attempt = await self._asker.resume(replica, stream, on_event)
                self._journal.outcomes["resume", attempt.became] += 1
            else:
                stream = self._stream(visit)
                attempt = await self._asker.stream(replica, stream, visit.headers, on_event)
            if attempt.became in ("whole", "nothing more"):
                self._is_over(visit, attempt)
                return True
            if attempt.became == "left" and comes_back:
                continue
            if not self._is_over(visit, attempt) or not await self._may_go_on(visit, attempt):
                return False

    def _stream(self, visit: Visit) -> Stream:
        draw = self._draw
        usage, ids = draw.random() < 0.3, draw.random() >= self._by_number
        return Stream(visit.question, self._journal.now(), usage=usage, ids=ids)

    @staticmethod
    def _can_resume(stream: Stream, attempt: Attempt) -> bool:
        if not stream.stream_id:
            return False
        return attempt.became in ("cut", "left") or attempt.code in ("shutting_down", "store_unavailable")

    async def _stored(self, visit: Visit) -> bool | None:
        """Whether it is stored; None where nobody can say."""
        attempt = await self._asker.whole(self._replica(), visit.question, visit.headers)
        if attempt.code == "not_cached":
            self._journal.outcomes[visit.kind, "not cached"] += 1
            return False
        return True if self._is_over(visit, attempt) and attempt.became == "whole" else None

    def _is_over(self, visit: Visit, attempt: Attempt) -> bool:
        """Counts what has become of an attempt; False, and a violation, where nothing excuses it."""
        journal = self._journal
        journal.outcomes[visit.kind, attempt.became] += 1
        if attempt.became in ("whole", "nothing more", "left"):
            if attempt.cache_status:
                journal.served[_shape(attempt.cache_status)] += 1
            return True
        fault = excuse(journal, attempt, visit.began_at)
        if fault:
            journal.excused[attempt.code or attempt.became, fault] += 1
        else:
            near = [str(window) for window in journal.faults(attempt.began_at - _NEAR_S, attempt.ended_at + _NEAR_S)]
            journal.violate("an error that nothing excuses", f"{visit.kind}: {attempt}; faults about then: {near}")
        return bool(fault)

    async def _may_go_on(self, visit: Visit, attempt: Attempt) -> bool:
        """Waits before the next attempt; False where it has been too long."""
        if attempt.became == "whole":
            return True
        visit.tried += 1
        if self._journal.now() - visit.began_at > _RECOVERS_WITHIN_S:
            self._journal.violate("no answer in the end", f"{visit.kind} after {visit.tried} attempts: {attempt}")
            return False
        await asyncio.sleep(min(1.0, 0.05 * 2**visit.tried))
        return True


def _shape(cache_status: str) -> str:
    """Without its numbers."""
    return "; ".join(part for part in cache_status.split("; ") if not part.startswith(("ttl=", "fwd-status=")))
