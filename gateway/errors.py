"""The taxonomy of failures, named by whose fault each one is.

Every error that may reach a caller knows its HTTP status and OpenAI's ``type`` and ``code``
(https://platform.openai.com/docs/guides/error-codes), so the edge needs no table. Anything that
reaches the edge and is not a `GatewayError` is a bug, and answers 500.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from gateway.core.faults import Fault


class GatewayError(Exception):
    """A failure that a caller may see as OpenAI's error object.

    ``param`` is the member of the request that is at fault, ``headers`` go out with the answer.
    """

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    detail: ClassVar[str] = ""
    """The word for it in ``Cache-Status``, where it is the cache's."""

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def reword(self, change: Callable[[str], str]) -> None:
        """Changes every text in it that others may have written."""
        self.message = change(self.message)
        self.args = (self.message,)
        self.headers = {name: change(value) for name, value in self.headers.items()}


def forget_traces(error: BaseException | None) -> None:
    """Lets go of all that ran where an error, and those that it came of, was raised.

    Whoever keeps an error that has been told keeps by its traces the request, the answer and itself: until the collector
    looks at everything, which with much in memory is seldom.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class RequestError(GatewayError):
    """The caller's fault; never retried."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """The body is not what the API takes."""


class Unauthorized(RequestError):
    """The key that opens this is missing or wrong."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class ModelNotFound(RequestError):
    """No configured upstream serves this model."""

    status = 404
    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' does not exist or is not configured here.", param="model")


class PathNotFound(RequestError):
    """Nothing is served at this path."""

    status = 404
    code = "unknown_url"


class MethodNotAllowed(RequestError):
    """The path is served, by other methods: the ``Allow`` header names them (RFC 9110 15.5.6)."""

    status = 405
    code = "method_not_allowed"


class BodyTooLarge(RequestError):
    """The request body is over ``[server] max_body_bytes``."""

    status = 413
    code = "request_too_large"


class HeadTooLarge(RequestError):
    """A line of the request's head is too long, or it has too many of them (RFC 6585 5)."""

    status = 431
    code = "request_head_too_large"


class RequestTooSlow(RequestError):
    """The request did not come within ``[server] read_timeout_s`` (RFC 9110 15.5.9)."""

    status = 408
    code = "request_too_slow"


class UnsupportedMediaType(RequestError):
    """The request body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class EntryNotFound(RequestError):
    """Nothing that loads is stored under this key."""

    status = 404
    code = "entry_not_found"


class UpstreamError(GatewayError):
    """The fault of the model's side."""

    status = 502
    type = "upstream_error"


class UpstreamRefused(UpstreamError):
    """The upstream answered with a status of its own: status, body and some headers go through as they came.

    ``content`` is the upstream's body, ``content_type`` what it called it.
    """

    code = "upstream_refused"

    def __init__(self, status: int, content: bytes, content_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"The upstream answered with status {status}.", headers=headers)
        self.status = status
        self.content = content
        self.content_type = content_type

    def body(self) -> dict[str, Any]:
        """The upstream's own error object, where it sent one: what a stream's error event shows."""
        ours = super().body()["error"]
        try:
            sent = json.loads(self.content)
        except ValueError:
            sent = None
        theirs = sent.get("error") if isinstance(sent, dict) else None
        return {"error": ours | theirs if isinstance(theirs, dict) else ours}

    def reword(self, change: Callable[[str], str]) -> None:
        super().reword(change)
        self.content = change(self.content.decode("latin-1")).encode("latin-1")
        self.content_type = change(self.content_type)


class UpstreamReported(UpstreamError):
    """The upstream reported an error inside an answer that had begun as a success; ``reported`` is its error object."""

    code = "upstream_reported"

    def __init__(self, reported: object) -> None:
        error = reported if isinstance(reported, dict) else {"message": str(reported)}
        message = error.get("message")
        super().__init__(message if isinstance(message, str) and message else "The upstream reported an error.")
        self.reported = {"type": self.type, "param": None, "code": self.code, **error, "message": self.message}
        for key in ("status", "code"):
            status = error.get(key)
            if isinstance(status, int) and not isinstance(status, bool) and 400 <= status <= 599:
                self.status = status
                break

    def body(self) -> dict[str, Any]:
        return {"error": self.reported}

    def reword(self, change: Callable[[str], str]) -> None:
        super().reword(change)
        self.reported = json.loads(change(json.dumps(self.reported)))


class UpstreamUnreachable(UpstreamError):
    """No answer could be had: refused, reset before the head, name not found."""

    code = "upstream_unreachable"


class UpstreamTimeout(UpstreamError):
    """The upstream took too long."""

    status = 504
    code = "upstream_timeout"


class UpstreamBroke(UpstreamError):
    """The upstream's answer is no answer: malformed, of a wrong kind, or cut off."""

    code = "upstream_broke"


class UpstreamBusy(UpstreamError):
    """It has as many calls as it may have at a time, and as many wait for their turn; or this one has waited too long."""

    status = 503
    code = "upstream_busy"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class StreamDiverged(UpstreamError):
    """A second run of the call said something else than the stream had already shown, so it cannot go on."""

    code = "stream_diverged"


class StreamLost(UpstreamError):
    """Who ran the call is gone, and nobody can go on with it."""

    code = "stream_lost"


class AnswerTooLarge(UpstreamError):
    """The answer is over ``[flights] max_flight_bytes``, so not all of it can be kept for a reader that needs it all."""

    code = "answer_too_large"


class StreamNotFound(RequestError):
    """No such stream: unknown, expired, or another tenant's."""

    status = 404
    code = "stream_not_found"


class StreamCancelled(RequestError):
    """The stream was cancelled, by this caller or because nobody was left to read it."""

    status = 499
    code = "stream_cancelled"


class ReaderTooSlow(RequestError):
    """The caller has fallen behind by more than a flight may keep."""

    status = 408
    code = "reader_too_slow"


class Unavailable(GatewayError):
    """The gateway itself cannot serve this now."""

    status = 503
    type = "gateway_error"
    code = "unavailable"


class StoreAway(Unavailable):
    """Only the store could answer, and it cannot be asked."""

    code = "store_unavailable"
    detail = "store-unavailable"


class PurgeUnfinished(StoreAway):
    """The store went away during a purge.

    ``marked``: whether the replicas have been told, so that nothing of what is meant is served any more; ``purged`` is how
    many entries of the ``scanned`` ones are gone.
    """

    def __init__(self, message: str, *, marked: bool, scanned: int, purged: int) -> None:
        super().__init__(message)
        self._progress = {"marked": marked, "scanned": scanned, "purged": purged}

    def body(self) -> dict[str, Any]:
        return {"error": super().body()["error"] | self._progress}


class NotCached(Unavailable):
    """The caller allowed only a stored answer, and there is none (RFC 9111 5.2.1.7)."""

    status = 504
    code = "not_cached"
    detail = "not-cached"


class NotRecorded(Unavailable):
    """In replay mode no model is asked, and there is no recording that would do.

    ``key`` is what it would be stored under, ``nearest`` what the explanation of a miss says of the nearest recording;
    ``request`` is the body that was asked, which its caller is not told again.
    """

    status = 504
    code = "not_recorded"
    detail = "not-recorded"

    def __init__(
        self,
        message: str,
        *,
        key: str = "",
        nearest: Mapping[str, Any] | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})  # OpenAI's clients: it will be missing again
        self.request = request
        self._told = {"key": key, "nearest": nearest} if key else {}

    def body(self) -> dict[str, Any]:
        return {"error": super().body()["error"] | self._told}


class Overloaded(Unavailable):
    """The process has taken on all that it may: see ``[limits]``."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class TenantOverloaded(RequestError):
    """The tenant has all that one may have at a time; in the form of OpenAI's own limits, which clients know."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class ShuttingDown(Unavailable):
    """The process is ending, and the time for running streams is over."""

    code = "shutting_down"


class InjectedFault(GatewayError):
    """What was asked for, or is configured, to see how a caller takes it."""

    code = "injected_fault"
    detail = "fault"

    def __init__(self, fault: "Fault") -> None:
        headers = {"Gateway-Fault": str(fault)}
        if fault.kind == "status":
            self.status = fault.status
            if fault.retry_after_s is not None:
                headers["Retry-After"] = str(fault.retry_after_s)
        super().__init__(f"This is a fault on demand: {fault}.", headers=headers)


class Retold(GatewayError):
    """An error that another replica met, as it told it."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        error = told["error"]
        super().__init__(str(error.get("message")), param=error.get("param"), headers=told["headers"])
        self.status = told["status"]
        self._error = error

    def body(self) -> dict[str, Any]:
        return {"error": self._error}


def told(error: GatewayError) -> dict[str, Any]:
    """What another replica needs to tell its callers the same (JSON)."""
    what: dict[str, Any] = {"status": error.status, "headers": error.headers, **error.body()}
    if isinstance(error, UpstreamRefused):
        what |= {"content": error.content.decode("latin-1"), "content_type": error.content_type}
    return what


def retold(what: Mapping[str, Any]) -> GatewayError:
    """The error that `told` wrote down."""
    if "content" in what:
        content = what["content"].encode("latin-1")
        return UpstreamRefused(what["status"], content, what["content_type"], what["headers"])
    return Retold(what)


def is_outage(error: GatewayError) -> bool:
    """Whether there is no answer for now, so that a stale one may stand in (RFC 5861 4): the upstream refused with 429 or
    5xx, took too long, could not be reached, or broke off; or it was not asked, since too many calls run already.
    """
    outage = isinstance(error, UpstreamError | Retold | Overloaded | TenantOverloaded)
    return outage and (error.status == 429 or error.status >= 500)


def is_broken_off(error: GatewayError) -> bool:
    """Whether a stream ended because the replica that ran its call is gone: who was shown nothing of it may ask anew."""
    return error.body()["error"].get("code") in (StreamDiverged.code, StreamLost.code)


class StoreError(Exception):
    """The store's fault. Never reaches a caller: the service counts it and goes on without the store."""


class StoreUnavailable(StoreError):
    """Refused, timed out, or not in a state to serve."""


class StoreFenced(StoreError):
    """The log has another writer now, or has ended: this one must write no more."""


class StoreCorrupt(StoreError):
    """What was stored does not load. The entry is deleted and counts as a miss."""


class UnknownCursor(StoreError):
    """A cursor that this store cannot have given: it is a caller's, and its fault."""


class ConfigError(Exception):
    """The configuration is wrong. ``problems`` lists everything that is, each with its dotted path."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class CommandFailed(Exception):
    """A command cannot do what it should; ``code`` is its exit code: 1 where it failed, 2 where it was called wrongly."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
