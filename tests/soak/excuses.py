"""Which errors that a caller sees follow from a fault that was injected; any other one is the gateway's.

| what the caller sees                            | excused by                                                        |
|-------------------------------------------------|-------------------------------------------------------------------|
| the connection is refused or cut                | this replica was killed or ended meanwhile                        |
| the connection is cut before an answer          | or it was kept from an earlier life of this replica               |
| `shutting_down`, as status or as event          | this replica was being ended                                      |
| what an injected fault of an upstream is called | a call for this very question had that fault, or the upstream was |
|                                                 | away as a whole (unreachable, broken off or timed out)            |
| `store_unavailable`: only-if-cached, resuming,  | Redis, or this replica's wire to it, had a fault meanwhile or     |
| cancelling and purging only                     | just before, or the replica has just come up                      |
| `stream_not_found`, `stream_lost` when resuming | Redis, or a wire, had a fault since the stream began; or it was a |
|                                                 | hit whose recording has had its life                              |
| `stream_cancelled` when resuming                | a replica, Redis or a wire had a fault since the stream began:    |
|                                                 | who ran the call could not hear that somebody reads it elsewhere  |
| `stream_diverged` when resuming by `?after=n`   | a replica, Redis or a wire had a fault since the stream began: a   |
|                                                 | number alone does not say what was seen of a run that is gone      |

Never excused: any other `stream_diverged` (the answers are a pure function of the question), a time-out of the caller's, an
answer that is wrong, mixed, cut without an error, or has pieces out of order; any 500; any other code. An excused caller
asks again, or resumes, and must have its answer in the end. A machine that stalls (the soak itself is late) counts as a
fault of Redis: whoever shares its processors has made it one.
"""

from attempts import Attempt
from journal import Journal

# How long before a request a fault of an upstream may lie that its error tells of: followers join calls that have begun.
_JUST_BEFORE_S = 2.0
# A replica looks after Redis again after its cool-down; and only-if-cached waits for 5 s before it gives up.
_REDIS_BEFORE_S = 6.0
ENDED = ("killed", "ended")
KEPT = "kept from before"
REDIS = ("Redis killed", "Redis frozen", "Redis read-only", "wire cut", "wire silent", "machine stalled")
_AWAY_CODES = frozenset({"upstream_unreachable", "upstream_broke", "upstream_timeout"})
_LOST_CODES = frozenset({"stream_not_found", "stream_lost"})


def excuse(journal: Journal, attempt: Attempt, session_began_at: float) -> str:
    """The fault that this failure follows from; empty where there is none."""
    if attempt.became == "cut":
        return _of_replica(journal, attempt, ENDED) or _of_connection(attempt)
    if attempt.became not in ("refused", "broken"):
        return ""
    return _of_error(journal, attempt, session_began_at)


def _of_error(journal: Journal, attempt: Attempt, session_began_at: float) -> str:
    if attempt.code == "shutting_down":
        return _of_replica(journal, attempt, ("ended",))
    if attempt.code == "store_unavailable":
        return _of_redis(journal, attempt, attempt.began_at) or _of_replica(journal, attempt, ENDED)
    if attempt.code == "stream_cancelled" or (attempt.code == "stream_diverged" and attempt.counted):
        return _of_any(journal, attempt, session_began_at)
    if attempt.code == "stream_not_found" and attempt.ended_at > attempt.kept_until:
        return "it has had its life"
    if attempt.code in _LOST_CODES:
        return _of_redis(journal, attempt, session_began_at, any_wire=True)
    return _of_upstream(journal, attempt, session_began_at)


def _of_replica(journal: Journal, attempt: Attempt, kinds: tuple[str, ...]) -> str:
    for window in journal.faults(attempt.began_at, attempt.ended_at):
        if window.kind in kinds and window.target == attempt.replica.name:
            return window.kind
    return ""


def _of_connection(attempt: Attempt) -> str:
    """The process at its other end had gone before the request was sent: no gateway can have closed it since."""
    connection = attempt.connection
    return KEPT if connection and connection.is_to_a_process_that_is_gone and not attempt.status else ""


def _of_any(journal: Journal, attempt: Attempt, since: float) -> str:
    for window in journal.faults(since - _JUST_BEFORE_S, attempt.ended_at):
        if window.kind in (*ENDED, *REDIS, "frozen"):
            return window.kind
    return ""


def _of_redis(journal: Journal, attempt: Attempt, since: float, *, any_wire: bool = False) -> str:
    for window in journal.faults(since - _REDIS_BEFORE_S, attempt.ended_at):
        if window.kind in REDIS and (any_wire or window.target in ("", attempt.replica.name)):
            return window.kind
    return ""


def _of_upstream(journal: Journal, attempt: Attempt, session_began_at: float) -> str:
    # A resumed stream tells of the call that began with its session.
    since = min(attempt.began_at, session_began_at) - _JUST_BEFORE_S
    for call in journal.calls.get(attempt.question.identity, ()):
        if attempt.code in call.codes and call.began_at <= attempt.ended_at and call.ended_at >= since:
            return f"upstream {call.fault}"
    if attempt.code in _AWAY_CODES:
        for window in journal.faults(since, attempt.ended_at):
            if window.kind == "upstream away":
                return window.kind
    return ""
