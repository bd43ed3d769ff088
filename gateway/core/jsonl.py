"""A recording as one line of JSON, in a file that people read, compare and keep beside their tests.

Format 1. The members of a line, in this order (those in brackets only where they say something)::

    v        1
    digest   of the question: the same in all files, whatever the deployment's secret; files are sorted by it
    request  api, upstream, model (the upstream's name of it), owner ("shared", "namespace" or "tenant"), namespace,
             [sample]: its number where several answers of one question are kept, [ignored]: paths that are not in the key,
             [tenant], [key], [secret]: digests that mean something only under the secret with this fingerprint,
             body: as the caller sent it, less what the store never keeps (`IGNORED`), canonical: what the key is made of;
             both null where requests are not kept
    answer   frames: the chunks of the stream; body: the answer in one piece, where the model did not stream it, or it is
             not what the frames come to
    timing   duration_us, [at_us]: when each frame arrived, in microseconds after the model was asked
    meta     written_at, started_at (Unix time), ttl_s, stale_s, flight, tags, [runs], [whole], [content]

Where JSON that is written compactly would differ from what the model sent, by as little as a space, it stands there as a
string, so that every byte survives whoever reads and writes the line. What can be told from the answer is not in the line:
it is found again when it is read, by the code that records.
"""

import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from gateway.core.apis import APIS, Api, RequestProblem
from gateway.core.apis.base import IGNORED
from gateway.core.key import MAX_SAMPLES, canonical_text
from gateway.core.recording import MalformedChunk, Meta, Recorder, Recording, body_spans, payload_of

VERSION = 1

_DIGEST_BYTES = 16
_LATEST_US = 1 << 63
_OWNERS = ("shared", "namespace", "tenant")
_NAMESPACE = "ns:"
# The ids of streams are made of them.
_FLIGHT, _RUN = re.compile("[0-9a-f]{16}"), re.compile("[0-9a-f]{8}")


class BadLine(ValueError):
    """A line that is no recording; the message says which member is wrong."""


class Line(NamedTuple):
    """A recording and what of its key is not in it. Its meta data have the owner, and no ``sample_of``."""

    recording: Recording
    sample: int = 0
    key: str = ""
    """That of the question, also where this is another sample than the first."""
    secret: str = ""
    """The fingerprint of the secret under which the key, and the owner if it is a tenant, are digests."""
    ignored: tuple[str, ...] = ()
    """The dotted paths that are left out of its canonical form."""

    @property
    def owner(self) -> str:
        return _owner_kind(self.recording.meta.owner)

    @property
    def body(self) -> dict[str, Any] | None:
        """The request's, where it is kept."""
        request = self.recording.request
        body: dict[str, Any] | None = orjson.loads(request)["body"] if request else None
        return body

    def dumps(self) -> bytes:
        """The line, without its end. Raises `BadLine` where the request is none."""
        meta, canonical = self.recording.meta, self._canonical()
        request = {
            "api": meta.api,
            "upstream": meta.upstream,
            "model": meta.model,
            "owner": self.owner,
            "namespace": meta.namespace,
            **({"sample": self.sample} if self.sample else {}),
            **({"ignored": self.ignored} if self.ignored else {}),
            **self._bound(canonical),
            "body": self.body,
            "canonical": None if canonical is None else orjson.Fragment(canonical),
        }
        answer, told = _answer(self.recording), _told(meta)
        timing: dict[str, Any] = {"duration_us": meta.duration_us}
        at_us = self.recording.marks.at_us.tolist() if self.recording.marks else []
        if "frames" in answer or set(at_us) != {meta.duration_us}:
            timing["at_us"] = at_us
        if meta.whole and "frames" in answer:
            told["whole"] = True
        line = {"v": VERSION, "digest": self._digest(canonical), "request": request}
        return orjson.dumps({**line, "answer": answer, "timing": timing, "meta": told})

    @classmethod
    def loads(cls, text: bytes) -> "Line":
        """Raises `BadLine`."""
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise BadLine(f"it is not JSON: {error}") from None
        return cls.of(value)

    @classmethod
    def of(cls, value: Any) -> "Line":
        """The same, of what was parsed."""
        line = _Members(value, "")
        if (version := line.take("v", int)) != VERSION:
            raise BadLine(f"v: {version} is no version that this gateway knows ({VERSION})")
        line.take("digest", str, "")
        asked, answer = _Members(line.take("request", dict), "request"), _Members(line.take("answer", dict), "answer")
        timing, told = (_Members(line.take(name, dict, {}), name) for name in ("timing", "meta"))
        line.end()
        api = _api(asked)
        body = asked.take("body", dict, None)
        asked.take("canonical", dict, None)
        if body is not None:
            body = _valid(api, body)
        meta = _meta(api, asked, told, body)
        found = cls(
            _recording(api, meta, answer, timing, b"" if body is None else _json({"api": api.name, "body": body})),
            _sample(asked),
            asked.take("key", str, ""),
            asked.take("secret", str, ""),
            tuple(asked.texts("ignored")),
        )
        for section in (asked, answer, timing, told):
            section.end()
        if body is None and not (found.key and found.secret):
            raise BadLine("request.body: is missing, so that nobody can tell its key")
        return found

    def _bound(self, canonical: bytes | None) -> dict[str, str]:
        """What means something only under one secret; most recordings have nothing of that."""
        tenant = self.recording.meta.owner.partition("/")[0] if self.owner == "tenant" else ""
        found = {"tenant": tenant, "key": self.key if canonical is None else ""}
        found = {name: value for name, value in found.items() if value}
        return found | {"secret": self.secret} if found else {}

    def _canonical(self) -> bytes | None:
        if (body := self.body) is None:
            return None
        try:
            return canonical_text(APIS[self.recording.meta.api], body, self.ignored)
        except RequestProblem as problem:
            raise BadLine(f"request.body: {problem}") from None

    def _digest(self, canonical: bytes | None) -> str:
        meta = self.recording.meta
        about = [meta.api, meta.upstream, meta.model, self.owner, meta.namespace, self.sample]
        if canonical is None:
            about.append(self.key)
        return blake2b(orjson.dumps(about) + (canonical or b""), digest_size=_DIGEST_BYTES).hexdigest()


def order_of(line: bytes) -> tuple[bytes, bytes]:
    """What lines are sorted by, and among those of one question: the latest recording comes first."""
    value = orjson.loads(line)
    request = value["request"]
    names = [request["namespace"], request["model"], request["api"], value["digest"], request.get("tenant", "")]
    return b"\0".join(map(orjson.dumps, names)), b"%020d" % (_LATEST_US - int(value["meta"]["started_at"] * 1e6))


def is_kept(name: str) -> bool:
    """Whether a line holds this member of a request's body, if the caller sent it."""
    return name not in IGNORED


def fingerprint(secret: bytes) -> str:
    """By which two deployments know that they share a secret; it tells nothing of it."""
    return blake2b(key=secret, person=b"fingerprint", digest_size=8).hexdigest()


# Writing


def _owner_kind(owner: str) -> str:
    if owner == "shared":
        return owner
    return "namespace" if owner.startswith(_NAMESPACE) else "tenant"


def _answer(recording: Recording) -> dict[str, Any]:
    """The least from which the very same recording follows."""
    frames = [payload_of(frame) for frame in recording.frames(None, usage=True)]
    body = recording.body or b""
    if recording.meta.whole:
        least: dict[str, Any] = {"body": _readable(body)}
        made = _split(APIS[recording.meta.api], body)
        return least if made == frames else {"frames": list(map(_readable, frames)), **least}
    least = {"frames": list(map(_readable, frames))}
    return least if _assembled(APIS[recording.meta.api], frames) == body else {**least, "body": _readable(body)}


def _assembled(api: Api, payloads: Sequence[bytes]) -> bytes:
    assembler = api.assembler()
    for payload in payloads:
        assembler.add(orjson.loads(payload))
    return _json(assembler.body())


def _split(api: Api, body: bytes) -> list[bytes] | None:
    try:
        return [_json(chunk) for chunk in api.split(orjson.loads(body))]
    except (AttributeError, TypeError, ValueError):
        return None


def _told(meta: Meta) -> dict[str, Any]:
    told: dict[str, Any] = {name: getattr(meta, name) for name in ("written_at", "started_at", "ttl_s", "stale_s", "flight")}
    told["tags"] = meta.tags
    return told | {name: value for name in ("runs", "content") if (value := getattr(meta, name))}


def _readable(text: bytes) -> Any:
    """JSON as it is, where writing it anew gives the same bytes; else as a string."""
    value = orjson.loads(text)
    try:
        same = not isinstance(value, str) and orjson.dumps(value) == text
    except TypeError:  # nested deeper than can be written
        same = False
    return orjson.Fragment(text) if same else text.decode()


# Reading


def exactly(value: Any) -> bytes:
    """The text that `_readable` has made readable. Raises `BadLine`."""
    return value.encode() if isinstance(value, str) else _json(value)


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except (TypeError, RecursionError):
        raise BadLine("it is nested too deeply") from None


class _Members:
    """The members of an object. Each is read once; `end` refuses what is left. Raises `BadLine`."""

    def __init__(self, value: Any, name: str) -> None:
        if not isinstance(value, dict):
            raise BadLine("it is not an object" if not name else f"{name}: must be an object")
        self._left, self._prefix = dict(value), f"{name}." if name else ""

    def take(self, name: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        value = self._left.pop(name, None)
        if value is None:
            if not default:
                raise BadLine(f"{self._prefix}{name}: is missing")
            return default[0]
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise BadLine(f"{self._prefix}{name}: has a wrong type")
        return value

    def take_any(self, name: str) -> Any:
        return self._left.pop(name, None)

    def number(self, name: str, default: float = 0.0) -> float:
        value: float = self.take(name, (int, float), default)
        if value < 0:
            raise BadLine(f"{self._prefix}{name}: must be 0 or more")
        return value

    def list_of(self, name: str, valid: Callable[[Any], bool]) -> list[Any]:
        values: list[Any] = self.take(name, list, [])
        for place, value in enumerate(values):
            if not valid(value):
                raise BadLine(f"{self._prefix}{name}.{place}: has a wrong type")
        return values

    def texts(self, name: str) -> list[str]:
        return self.list_of(name, lambda value: isinstance(value, str))

    def end(self) -> None:
        for name in self._left:
            raise BadLine(f"{self._prefix}{name}: is not a member of a recording")


def _api(asked: _Members) -> Api:
    name = asked.take("api", str)
    if name not in APIS:
        raise BadLine(f"request.api: must be one of {', '.join(APIS)}")
    return APIS[name]


def _valid(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    try:
        api.validate(body)
    except RequestProblem as problem:
        raise BadLine(f"request.body: {problem}") from None
    return {name: value for name, value in body.items() if is_kept(name)}


def _sample(asked: _Members) -> int:
    sample: int = asked.take("sample", int, 0)
    if not 0 <= sample < MAX_SAMPLES:
        raise BadLine(f"request.sample: must be from 0 to {MAX_SAMPLES - 1}")
    return sample


def _meta(api: Api, asked: _Members, told: _Members, body: dict[str, Any] | None) -> Meta:
    runs = told.list_of("runs", _is_run)
    return Meta(
        api=api.name,
        model=asked.take("model", str, str((body or {}).get("model", ""))),
        upstream=asked.take("upstream", str, ""),
        started_at=told.number("started_at"),
        written_at=told.number("written_at"),
        duration_us=0,
        ttl_s=told.number("ttl_s"),
        id="",
        whole=told.take("whole", bool, False),
        flight=_flight(told),
        runs=tuple((run, first) for run, first in runs),
        stale_s=told.number("stale_s"),
        namespace=(namespace := asked.take("namespace", str, "")),
        owner=_owner(asked, namespace),
        tags=tuple(told.texts("tags")),
        content=told.take("content", str, ""),
    )


def _flight(told: _Members) -> str:
    flight: str = told.take("flight", str, "")
    if flight and not _FLIGHT.fullmatch(flight):
        raise BadLine("meta.flight: must be 16 hexadecimal digits")
    return flight


def _is_run(value: Any) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [str, int] and bool(_RUN.fullmatch(value[0]))


def _owner(asked: _Members, namespace: str) -> str:
    kind, tenant = asked.take("owner", str, "namespace" if namespace else "shared"), asked.take("tenant", str, "")
    if kind not in _OWNERS:
        raise BadLine(f"request.owner: must be one of {', '.join(_OWNERS)}")
    if (kind == "shared" and namespace) or (kind == "namespace" and not namespace):
        raise BadLine("request.owner: does not fit the namespace")
    if kind == "shared":
        return "shared"
    space = f"{_NAMESPACE}{namespace}" if namespace else ""
    if kind == "namespace":
        return space
    return f"{tenant}/{space}" if space else str(tenant)


def _recording(api: Api, meta: Meta, answer: _Members, timing: _Members, request: bytes) -> Recording:
    body = None if (given := answer.take_any("body")) is None else exactly(given)
    payloads: list[bytes] | None = [exactly(frame) for frame in answer.take("frames", list, [])]
    if not payloads:
        if body is None:
            raise BadLine("answer: has neither frames nor body")
        meta = meta._replace(whole=True)
        payloads = _split(api, body)
    if not payloads:
        raise BadLine("answer.body: is not of the API's shape")
    at_us = timing.list_of("at_us", lambda value: type(value) is int and 0 <= value < _LATEST_US)
    duration_us = int(timing.number("duration_us", at_us[-1] if at_us else 0))
    at_us = at_us or [duration_us] * len(payloads)
    if len(at_us) != len(payloads):
        raise BadLine(f"timing.at_us: has {len(at_us)} times, and there are {len(payloads)} frames")
    return _recorded(api, meta._replace(duration_us=duration_us), list(zip(payloads, at_us, strict=True)), body, request)


def _recorded(api: Api, meta: Meta, frames: Sequence[tuple[bytes, int]], body: bytes | None, request: bytes) -> Recording:
    """As if the model had just said it."""
    assembler = api.assembler()
    recorder = Recorder(assembler if body is None else None)
    for place, (payload, at_us) in enumerate(frames):
        try:
            if recorder.add(payload, at_us):
                raise BadLine(f"answer.frames.{place}: reports an error, which is never stored")
        except MalformedChunk as error:
            raise BadLine(f"answer.frames.{place}: {error}") from None
    text = _json(assembler.body()) if body is None else body
    try:
        body_id, body_created = body_spans(text)
    except MalformedChunk as error:
        raise BadLine(f"answer.body: {error}") from None
    meta = meta._replace(
        id=recorder.id,
        frames=len(recorder.frames),
        finish_reasons=tuple(reason for _, reason in sorted(recorder.finish_reasons.items())),
        usage=recorder.usage,
        body_id=body_id,
        body_created=body_created,
    )
    return recorder.recording(meta, text, request)
