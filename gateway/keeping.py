"""What a flight that has ended leaves: a recording, or a word for why there is none."""

import logging

from gateway.core.policy import has_broken_arguments
from gateway.core.recording import Meta, Recording, body_spans, content_digest, first_run
from gateway.errors import UpstreamBroke
from gateway.flight import Flight
from gateway.pump import Plan

log = logging.getLogger(__name__)


def may_be_kept(flight: Flight, plan: Plan) -> bool:
    """Whether, as far as is known, the answer will be stored."""
    fits = flight.recorder.size_bytes <= plan.rules.max_recording_bytes
    return plan.key is not None and not plan.why_not and not flight.purged and fits


def recorded(flight: Flight, plan: Plan, now: float, *, writable: bool) -> Recording | None:
    """The recording of a complete answer; None where it must not be stored, or cannot be, and the flight says why."""
    if plan.key is None:
        return None
    # Making one for a store that is away is a third of the work of a miss.
    flight.why_not = _why_not(flight, plan) if writable else "store-unavailable"
    if flight.why_not:
        log.debug("not stored (%s): %r", flight.why_not, flight)
        return None
    flight.why_not = "fallback" if flight.served else ""  # for whom it was not meant
    return flight.recorder.recording(_meta(flight, plan, now), flight.whole(), plan.request())


def _why_not(flight: Flight, plan: Plan) -> str:
    call, recorder = plan.call, flight.recorder
    if plan.why_not or flight.purged:
        return plan.why_not or "purged"
    if flight.overflowed:
        return "too-large"
    if flight.served and plan.key_of is None:
        return "fallback"
    return plan.rules.why_not_keep(
        reasons=recorder.finish_reasons,
        choices=call.api.choices(call.body),
        size_bytes=recorder.size_bytes,
        limits_tokens=call.api.limits_tokens(call.body),
    ) or _why_not_run(flight)


def _why_not_run(flight: Flight) -> str:
    try:
        return "tool-arguments" if has_broken_arguments(flight.whole()) else ""
    except UpstreamBroke as error:
        log.warning("not stored: %s", error)
        return "malformed"


def _runs(flight: Flight) -> tuple[tuple[str, int], ...]:
    """Whose frames these are; empty where the run that began the flight wrote them all."""
    return () if flight.id and flight.runs == [(first_run(flight.id), 0)] else tuple(flight.runs)


def _meta(flight: Flight, plan: Plan, now: float) -> Meta:
    body = flight.whole()
    body_id, body_created = body_spans(body)
    recorder, rules, served = flight.recorder, plan.rules, flight.served
    return Meta(
        api=plan.call.api.name,
        model=served.model if served else str(plan.call.body.get("model")),
        upstream=served.upstream if served else plan.upstream.name,
        started_at=flight.started_at,
        written_at=now,
        duration_us=flight.frames[-1].at_us,
        ttl_s=plan.ttl_s,
        id=recorder.id,
        frames=len(flight.frames),
        finish_reasons=tuple(reason for _, reason in sorted(recorder.finish_reasons.items())),
        usage=recorder.usage,
        body_id=body_id,
        body_created=body_created,
        whole=not flight.streamed,
        flight=flight.id or "",
        runs=_runs(flight),
        stale_s=rules.kept_stale_s,
        owner=plan.owner,
        namespace=plan.namespace,
        tags=plan.tags,
        sample_of=plan.sample_of or "",
        content=content_digest(body) if rules.samples > 1 else "",
    )
