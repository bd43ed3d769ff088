"""What a request comes down to: where it goes, whose it is, its key, and the plan of a call for its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from gateway.core.apis import APIS, Api, RequestProblem
from gateway.core.apis.base import IGNORED
from gateway.core.controls import NO_CONTROLS, Controls
from gateway.core.key import CacheKey, cache_key, canonical_text, sample_key, tenant_of
from gateway.core.pacing import Pace
from gateway.core.policy import Directives, ModelRules, RuleBook
from gateway.errors import InvalidRequest
from gateway.ports import Call, Served, Store, Upstream
from gateway.pump import Plan

# What a caller identifies itself with. It goes upstream only where the upstream has no key of its own.
CREDENTIAL_HEADERS = ("authorization", "api-key", "x-api-key", "openai-organization", "openai-project")
# What may always go upstream: none of it changes the answer.
FORWARDED_HEADERS = ("traceparent", "tracestate", "x-client-request-id")


_MAX_TENANTS = 4096


class Route(Protocol):
    """Where a request goes."""

    @property
    def upstream(self) -> Upstream: ...

    @property
    def model(self) -> str: ...

    @property
    def ignored_paths(self) -> tuple[str, ...]: ...


class Router(Protocol):
    """Knows which upstream serves a model."""

    def route(self, model: str) -> Route: ...


@dataclass(slots=True)
class CacheRules:
    """What the configuration says of the cache as a whole, as it is now."""

    shared: bool
    ignored_paths: tuple[str, ...]
    fresh_identity: bool
    pace: Pace
    models: RuleBook
    keep_requests: bool = True
    sample_order: Literal["turn", "random"] = "turn"
    sample_seed: int = 0

    def become(self, other: "CacheRules") -> None:
        """From now on says what the other one says."""
        self.models.become(other.models)
        for field in fields(self):
            if field.name != "models":
                setattr(self, field.name, getattr(other, field.name))


class Request(NamedTuple):
    """A caller's request, read. ``headers`` are found by their names in lower case."""

    api: Api
    body: dict[str, Any]
    headers: Mapping[str, str]
    controls: Controls = NO_CONTROLS
    event_ids: bool = False
    """Whether each event of a stream is to say from where to resume after it."""

    @property
    def directives(self) -> Directives:
        return self.controls.directives

    @property
    def streamed(self) -> bool:
        return self.body.get("stream") is True

    @property
    def usage(self) -> bool:
        """Whether the caller asked for usage in the stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


class Asked(NamedTuple):
    """What a request comes down to for the cache."""

    key: CacheKey
    owner: str
    namespace: str
    upstream: str
    model: str
    """The upstream's name of it."""
    canonical: bytes
    """What the key is made of, as JSON text."""
    ignored: tuple[str, ...]
    """The dotted paths that the configuration leaves out."""
    why_not: str
    """A word for why such a request is neither answered from the cache nor stored; empty if it is."""
    samples: int


class Tenants:
    """Whose entries those of a caller are."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[bytes, tuple[str, ...]], str] = {}

    def owner(self, headers: Mapping[str, str], *, shared: bool) -> str:
        """A digest of what the caller identified itself with, or a word for all callers together."""
        if shared:
            return "shared"
        asked = self._store.secret, tuple([headers.get(name, "") for name in CREDENTIAL_HEADERS])
        tenant = self._known.get(asked)
        if tenant is None:
            if len(self._known) >= _MAX_TENANTS:
                self._known.clear()
            tenant = self._known[asked] = tenant_of(*asked)
        return tenant


class Question(NamedTuple):
    """A request that may be answered from the cache: where it goes, whose it is, and its key."""

    request: Request
    route: Route
    rules: ModelRules
    shared: bool
    owner: str
    """By whom a stream of it can be resumed."""
    space: str
    """Whose answers it gets: the owner's, or those of a namespace."""
    key: CacheKey
    sample_of: CacheKey | None = None

    def tagged(self, tags: tuple[str, ...]) -> "Question":
        """The same, whose answer has those tags."""
        controls = self.request.controls._replace(tags=tags)
        return self._replace(request=self.request._replace(controls=controls))


class Questions:
    """Turns requests into questions, and questions into plans of calls."""

    def __init__(self, router: Router, store: Store, tenants: Tenants, rules: CacheRules) -> None:
        self._router = router
        self._store = store
        self._tenants = tenants
        self._rules = rules

    def route(self, request: Request) -> Route:
        """Where a request goes. Raises `InvalidRequest` and `ModelNotFound`."""
        try:
            request.api.validate(request.body)
        except RequestProblem as problem:
            raise InvalidRequest(str(problem), param=problem.param) from None
        return self._router.route(request.body["model"])

    def rules(self, request: Request, route: Route) -> ModelRules:
        """What the configuration says of answers to it."""
        return self._rules.models.of(request.body["model"], route.model)

    def _ignored(self, route: Route) -> tuple[str, ...]:
        return (*self._rules.ignored_paths, *route.ignored_paths)

    def question(self, request: Request, route: Route, rules: ModelRules) -> Question:
        """What is looked for in the cache. Raises `InvalidRequest`."""
        upstream = route.upstream
        shared = self._rules.shared and not upstream.passes_credential
        owner = space = self._tenants.owner(request.headers, shared=shared)
        if namespace := request.controls.namespace:
            # Who names a namespace shares it with all who do. But a credential that pays for its answers may be nobody's
            # who should see them: there it only tells one tenant's answers apart.
            space = f"{owner}/ns:{namespace}" if upstream.passes_credential else f"ns:{namespace}"
        try:
            key = self._key(request, route, space, Served(upstream.name, route.model))
        except RequestProblem as problem:
            raise InvalidRequest(str(problem), param=problem.param) from None
        return Question(request, route, rules, shared, owner, space, key)

    def _key(self, request: Request, route: Route, space: str, served: Served) -> CacheKey:
        return cache_key(
            self._store.secret,
            owner=space,
            api=request.api,
            route=served,
            body=request.body,
            ignored=self._ignored(route),
        )

    def asked(self, request: Request) -> Asked:
        """What a request comes down to for the cache. Raises `GatewayError`."""
        route = self.route(request)
        rules = self.rules(request, route)
        question = self.question(request, route, rules)
        ignored = self._ignored(route)
        return Asked(
            key=question.key,
            owner=question.space,
            namespace=request.controls.namespace,
            upstream=route.upstream.name,
            model=route.model,
            canonical=canonical_text(request.api, request.body, ignored),
            ignored=ignored,
            why_not="no-store" if request.directives.no_store else rules.why_not_ask(request.body),
            samples=rules.samples,
        )

    def plan(
        self,
        question: Question,
        *,
        joinable: bool = True,
        background: bool = False,
        newer_than_us: int = -1,
        why_not: str = "",
    ) -> Plan:
        """The call that answers a question, see `Plan`."""
        request, route = question.request, question.route
        ttl_s = self.ttl_s(question)
        why_not = why_not or ("" if ttl_s else "ttl")
        return Plan(
            self.call(request, route),
            route.upstream,
            question.key,
            joinable=joinable and not why_not,
            ttl_s=ttl_s,
            rules=question.rules,
            owner=question.space,
            namespace=request.controls.namespace,
            tags=request.controls.tags,
            sample_of=question.sample_of,
            why_not=why_not,
            tenant=self.tenant(request),
            background=background,
            newer_than_us=newer_than_us,
            noted=partial(_noted, question, why_not),
            request=partial(_kept, request) if self._rules.keep_requests else bytes,
            key_of=partial(self._key, request, route, question.space),
        )

    def tenant(self, request: Request) -> str:
        """Whose it is for ``[limits]``: whatever callers share, each has limits of its own."""
        return self._tenants.owner(request.headers, shared=False)

    @staticmethod
    def ttl_s(question: Question) -> float:
        """For how long the answer is to be fresh."""
        asked_s = question.request.controls.ttl_s
        return question.rules.ttl_s if asked_s is None else asked_s

    @staticmethod
    def call(request: Request, route: Route) -> Call:
        """What goes upstream."""
        names: Sequence[str] = FORWARDED_HEADERS
        if route.upstream.passes_credential:
            names = (*FORWARDED_HEADERS, *CREDENTIAL_HEADERS)
        headers = {name: request.headers[name] for name in names if name in request.headers}
        asked = request.body["model"]
        return Call(request.api, {**request.body, "model": route.model}, request.streamed, headers, asked)

    def plan_of(self, noted: bytes, headers: Mapping[str, str], key: CacheKey) -> Plan:
        """How to run a call again, from what was noted of its request. Raises `GatewayError`."""
        told = orjson.loads(noted)
        controls = Controls(ttl_s=told["ttl_s"], namespace=told["namespace"], tags=tuple(told["tags"]))
        request = Request(APIS[told["api"]], told["body"], headers, controls)
        route = self.route(request)
        rules = self.rules(request, route)
        sample_of = CacheKey(told["sample_of"]) if told["sample_of"] else None
        question = Question(request, route, rules, False, "", told["space"], key, sample_of)  # by place
        return self.plan(question, why_not=told["why_not"])


def of_sample(question: Question, sample: int) -> Question:
    """The question whose answer is kept as that sample."""
    if not sample:
        return question
    return question._replace(key=sample_key(question.key, sample), sample_of=question.key)


def _asked_body(request: Request) -> dict[str, Any]:
    """Nothing that is the caller's own business, and no credential."""
    return {name: value for name, value in request.body.items() if name not in IGNORED}


def _kept(request: Request) -> bytes:
    """What a recording keeps of the request."""
    return orjson.dumps({"api": request.api.name, "body": _asked_body(request)})


def _noted(question: Question, why_not: str) -> bytes:
    """What another replica needs to run the call again."""
    request = question.request
    return orjson.dumps(
        {
            "api": request.api.name,
            "body": _asked_body(request),
            "space": question.space,
            "namespace": request.controls.namespace,
            "tags": request.controls.tags,
            "ttl_s": request.controls.ttl_s,
            "sample_of": question.sample_of,
            "why_not": why_not,
        }
    )
