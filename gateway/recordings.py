"""Recordings on their way out of the store, and into it, as lines of JSON (`core.jsonl`). Never on the way of a request.

Keys are digests under a deployment's own secret, so they do not travel: what comes in is keyed as the same request would
be if a caller sent it here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from gateway.admin import Filters, fits
from gateway.core.apis import APIS
from gateway.core.jsonl import BadLine, Line, fingerprint
from gateway.core.key import MAX_SAMPLES, CacheKey, cache_key, sample_key
from gateway.core.lines import Lines
from gateway.core.policy import ModelRules, has_broken_arguments
from gateway.core.recording import Meta, content_digest
from gateway.eraser import store_is_needed
from gateway.errors import ConfigError, ModelNotFound, StoreCorrupt
from gateway.ports import Clock, Inspected, Inventory, Listed, Store
from gateway.purges import Purges
from gateway.questions import CacheRules, Route, Router, Tenants

log = logging.getLogger(__name__)

LONGEST_LINE_BYTES = 268_435_456
FOREVER_S = 3_155_760_000.0
"""A century."""
# How much is held at a time, however much there is in all.
_MOST_AT_ONCE = 32
_MANY_BYTES = 8_388_608
# From here on a thread does it: some milliseconds of JSON.
_MANY_BYTES_OF_JSON = 524_288
_READ_BYTES = 1_048_576
_MOST_ERRORS = 1000
_MOST_PROBLEMS = 20

Done = TypeVar("Done")
Whose = Literal["recorded", "everyone", "caller"]
Outcome = Literal["imported", "kept", "expired", "purged", "failed"]


class Terms(NamedTuple):
    """How recordings are taken in."""

    whose: Whose = "recorded"
    """Whom they are for: whom they were for where they come from, everyone, or the caller with ``headers``."""
    headers: Mapping[str, str] = {}
    ttl_s: float | None = None
    """For how long from now on they are fresh; None: for as long as they were to be when they were made."""


_AS_RECORDED = Terms()


class Failure(NamedTuple):
    """Why the recording on a line (1 is the first) was not taken in."""

    line: int
    message: str


class Taken:
    """What has become of the lines: each is counted under one outcome."""

    def __init__(self) -> None:
        self.counts: dict[Outcome, int] = dict.fromkeys(("imported", "kept", "expired", "purged", "failed"), 0)
        self.failures: list[Failure] = []

    def add(self, outcome: Outcome, line: int, message: str = "") -> None:
        self.counts[outcome] += 1
        if outcome == "failed" and len(self.failures) < _MOST_ERRORS:
            self.failures.append(Failure(line, message))

    def told(self) -> dict[str, Any]:
        errors = [failure._asdict() for failure in self.failures]
        found: dict[str, Any] = {"object": "cache.import"}
        return found | self.counts | {"errors": errors}


class Recordings:
    """Gives recordings out as lines, and takes lines in. Every method raises `GatewayError` only."""

    def __init__(  # noqa: PLR0913  # what a key is made of, and where it leads
        self,
        store: Store,
        inventory: Inventory,
        *,
        router: Router,
        tenants: Tenants,
        rules: CacheRules,
        purges: Purges,
        clock: Clock,
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._router = router
        self._tenants = tenants
        self._rules = rules
        self._purges = purges
        self._clock = clock

    # Out

    async def export(self, filters: Filters) -> AsyncIterator[bytes]:
        """Lines, several at a time, in the order of the store; now and then empty ones, where it looks for a long time.

        What is there all the time comes at least once. Raises `StoreAway`.
        """
        selectors, cursor, unreadable = filters.selectors(self._router), "", 0
        while True:
            with store_is_needed():
                page, cursor = await self._inventory.page(cursor)
            now = self._clock.now()
            meant = [each for each in page if self._is_served(each) and fits(each, filters, selectors, now)]
            for some in _bounded(meant, lambda each: each.meta.size_bytes):
                with store_is_needed():
                    found = await asyncio.gather(*(self._inspected(each.key) for each in some))
                lines = []
                for each in filter(None, found):
                    lines.append(await self._line(each))
                    await asyncio.sleep(0)  # others have their turn between two lines
                unreadable += lines.count(b"")
                yield b"".join(line + b"\n" for line in lines if line)
            if not meant:
                yield b"\n"
            if not cursor:
                break
        if unreadable:
            log.warning("%d recordings are not in an export: they do not load, or their requests are none", unreadable)

    def _is_served(self, listed: Listed) -> bool:
        return not (listed.replaced or self._purges.covers(listed.key, listed.meta))

    async def _inspected(self, key: CacheKey) -> Inspected | None:
        """None where it has gone by now, or does not load."""
        try:
            return await self._inventory.inspect(key)
        except StoreCorrupt:
            return None

    async def _line(self, inspected: Inspected) -> bytes:
        """Empty where it cannot be written."""
        recording = inspected.recording
        meta = recording.meta
        question = CacheKey(meta.sample_of or inspected.key)
        numbers = (n for n in range(MAX_SAMPLES) if sample_key(question, n) == inspected.key)
        try:
            ignored = self._ignored(self._recorded_route(meta))
            line = Line(recording, next(numbers, 0), question, fingerprint(self._store.secret), ignored)
            return await _worked(recording.size_bytes, line.dumps)
        except (BadLine, KeyError, ValueError) as error:
            log.debug("not exported: %s: %r", inspected.key, error)
            return b""

    # In

    async def take(self, lines: AsyncIterator[bytes | None], terms: Terms = _AS_RECORDED) -> Taken:
        """Stores what lines hold; of a question of which a later recording is there, that one stays.

        A line that cannot be taken in is told, and no reason to stop. None is a line that was too long. Raises `StoreAway`.
        """
        taken, number, size_bytes = Taken(), 0, 0
        waiting: list[tuple[int, bytes | None]] = []
        with store_is_needed():
            await self._inventory.recent(1)  # keys are digests under its secret, so it has to be known
            async for text in lines:
                number += 1
                if text is None or text.strip():
                    waiting.append((number, text))
                    size_bytes += len(text or b"")
                if len(waiting) >= _MOST_AT_ONCE or size_bytes >= _MANY_BYTES:
                    await self._take_all(waiting, terms, taken)
                    waiting, size_bytes = [], 0
            await self._take_all(waiting, terms, taken)
        return taken

    async def take_file(self, path: Path, *, whose: Whose) -> Taken:
        """Takes a file in, for good. Raises `ConfigError` with what is wrong with it."""
        try:
            taken = await self.take(_lines_of(path), Terms(whose, ttl_s=FOREVER_S))
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
        if taken.failures:
            raise ConfigError([f"{path}:{line}: {message}" for line, message in taken.failures[:_MOST_PROBLEMS]])
        return taken

    async def _take_all(self, waiting: Sequence[tuple[int, bytes | None]], terms: Terms, taken: Taken) -> None:
        """Beside each other: of one question the latest recording stays, whichever comes first."""

        async def take(number: int, text: bytes | None) -> None:
            try:
                taken.add(await self._take(text, terms), number)
            except BadLine as error:
                taken.add("failed", number, str(error))

        tasks: list[asyncio.Task[None]] = []
        try:
            for each in waiting:
                tasks.append(asyncio.get_running_loop().create_task(take(*each)))
                await asyncio.sleep(0)  # others have their turn between two lines
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        taken.failures.sort()

    async def _take(self, text: bytes | None, terms: Terms) -> Outcome:
        """Raises `BadLine`."""
        if text is None:
            raise BadLine(f"it is longer than {LONGEST_LINE_BYTES} bytes")
        line = await _worked(len(text), lambda: Line.loads(text))
        key, meta = self._placed(line, terms)
        now = self._clock.now()
        if terms.ttl_s is not None:
            # For ever is the same whenever it is said, so that the next export is, too.
            before_s = max(0.0, now - meta.written_at) if terms.ttl_s < FOREVER_S else 0.0
            meta = meta._replace(ttl_s=before_s + terms.ttl_s)
        life_s = meta.written_at + meta.ttl_s + meta.stale_s - now
        if life_s <= 0:
            return "expired"
        if self._purges.covers(key, meta):
            return "purged"
        recording = line.recording
        stored = await self._store.store(key, type(recording)(meta, *_parts(line)), life_s=life_s)
        return "imported" if stored else "kept"

    def _placed(self, line: Line, terms: Terms) -> tuple[CacheKey, Meta]:
        """Where it belongs here, and what is known of it then. Raises `BadLine`."""
        meta, body = line.recording.meta, line.body
        route = self._route(meta, body)
        upstream, model = (route.upstream.name, route.model) if route else (meta.upstream, meta.model)
        rules = self._rules.models.of((body or {}).get("model", model), model)
        _check_that_it_is_kept(line, rules)
        if body is None:
            if terms.whose != "recorded" or line.secret != fingerprint(self._store.secret):
                raise BadLine("request.body: was not kept, and its key means nothing under another secret")
            question, owner = CacheKey(line.key), meta.owner
        else:
            owner = self._space(line, route, terms)
            question = cache_key(
                self._store.secret,
                owner=owner,
                api=APIS[meta.api],
                route=(upstream, model),
                body=body,
                ignored=self._ignored(route),
            )
        if rules.samples > 1 and not meta.content:
            meta = meta._replace(content=content_digest(line.recording.body or b""))
        sample_of = question if line.sample else ""
        return sample_key(question, line.sample), meta._replace(
            owner=owner, upstream=upstream, model=model, sample_of=sample_of
        )

    def _space(self, line: Line, route: Route | None, terms: Terms) -> str:
        """Whose it is here. Raises `BadLine`."""
        meta = line.recording.meta
        passes = route is not None and route.upstream.passes_credential
        shared = self._rules.shared and not passes
        namespace = f"ns:{meta.namespace}" if meta.namespace else ""
        if namespace and not passes and (line.owner == "namespace" or terms.whose != "recorded"):
            return namespace
        if line.owner == "tenant" and terms.whose == "recorded":
            if line.secret != fingerprint(self._store.secret):
                raise BadLine("request.owner: is a tenant of another deployment: say whose it is to be here")
            return meta.owner
        if terms.whose != "caller" and not shared:
            raise BadLine(f"request.owner: is everyone, but {_why_not_shared(passes=passes)}: say whose it is to be")
        owner = self._tenants.owner(terms.headers, shared=shared)
        return f"{owner}/{namespace}" if namespace else owner

    def _route(self, meta: Meta, body: Mapping[str, Any] | None) -> Route | None:
        """Where such a request goes here: to the upstream that has answered, else to whom a caller would be sent.

        Raises `BadLine`.
        """
        if (route := self._recorded_route(meta)) or body is None:
            return route
        try:
            return self._router.route(body["model"])
        except ModelNotFound as error:
            raise BadLine(f"request.body.model: {error.message}") from None

    def _recorded_route(self, meta: Meta) -> "Route | None":
        """None where there is no upstream of that name."""
        try:
            route = self._router.fallback(f"{meta.upstream}/{meta.model}")
        except ModelNotFound:
            return None
        return _As(route.upstream, meta.model, route.ignored_paths) if route.upstream.name == meta.upstream else None

    def _ignored(self, route: Route | None) -> tuple[str, ...]:
        return (*self._rules.ignored_paths, *(route.ignored_paths if route else ()))


class _As(NamedTuple):
    """A `Route` to a model by the upstream's own name of it."""

    upstream: Any
    model: str
    ignored_paths: tuple[str, ...]


def _why_not_shared(*, passes: bool) -> str:
    if passes:
        return "here callers pay with their own keys, and have their own answers"
    return "here callers have their own answers ([cache] scope)"


def _check_that_it_is_kept(line: Line, rules: ModelRules) -> None:
    """An import stores nothing that would not be stored if the model said it now. Raises `BadLine`."""
    recording, body = line.recording, line.body
    api, asked = APIS[recording.meta.api], body or {}
    if why_not := rules.why_not_ask(asked) if body else "":
        raise BadLine(f"such an answer is not served here ({why_not})")
    why_not = rules.why_not_keep(
        reasons=dict(enumerate(recording.meta.finish_reasons)),
        choices=api.choices(asked),
        size_bytes=len(recording.sse or b""),
        limits_tokens=body is None or api.limits_tokens(asked),
    )
    if not why_not and has_broken_arguments(recording.body or b""):
        why_not = "tool-arguments"
    if why_not:
        raise BadLine(f"such an answer is not stored here ({why_not})")


def _parts(line: Line) -> tuple[Any, ...]:
    recording = line.recording
    return recording.sse, recording.marks, recording.body, recording.request


Item = TypeVar("Item")


def _bounded(items: Sequence[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in lists that are neither long nor large."""
    some: list[Item] = []
    size = 0
    for item in items:
        if some and (len(some) == _MOST_AT_ONCE or size + size_of(item) > _MANY_BYTES):
            yield some
            some, size = [], 0
        some.append(item)
        size += size_of(item)
    if some:
        yield some


async def _worked(size_bytes: int, work: Callable[[], Done]) -> Done:
    return await asyncio.to_thread(work) if size_bytes >= _MANY_BYTES_OF_JSON else work()


async def lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes | None]:
    """The lines of a text that comes in pieces; None for one that is too long."""
    lines = Lines(LONGEST_LINE_BYTES)
    async for piece in pieces:
        for line in lines.feed(piece):
            yield line
    for line in lines.end():
        yield line


def _lines_of(path: Path) -> AsyncIterator[bytes | None]:
    async def pieces() -> AsyncIterator[bytes]:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                yield piece

    return lines_of(pieces())
