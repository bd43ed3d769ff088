"""The service over ports that are all in a test's hand."""

import secrets
from dataclasses import replace
from typing import Any

from fakes import FakeClock, FakeStore, HandUpstream

from gateway.core.pacing import Pace
from gateway.core.policy import ModelRules, RuleBook
from gateway.flights import Flights, Rules
from gateway.missing import Missing
from gateway.nearby import Nearby
from gateway.purges import Purges
from gateway.questions import CacheRules, Questions, Tenants
from gateway.service import Service
from gateway.streams import Streams
from gateway.tally import Tally
from gateway.upstreams.router import Route

RULES = ModelRules(ttl_s=60.0, max_recording_bytes=100_000, finish_reasons=frozenset({"stop", "tool_calls"}))


class OneRoute:
    stand_in = None

    def __init__(self, upstream: HandUpstream) -> None:
        self._upstream = upstream

    def route(self, model: str) -> Route:
        return Route(self._upstream, model)


class Core:
    """What one replica is made of, on a store that others may share, and an upstream that only it asks."""

    def __init__(
        self,
        store: FakeStore,
        clock: FakeClock,
        *,
        rules: Rules | None = None,
        model: dict[str, Any] | None = None,
        cache: dict[str, Any] | None = None,
    ) -> None:
        self.store, self.clock, self.upstream = store, clock, HandUpstream()
        self.purges, self.tally, tenants = Purges(store, clock, longest_s=3600), Tally(store), Tenants(store)
        self.flights = Flights(store, self.purges, clock, rules or Rules(), secrets.token_hex, self.tally)
        said: dict[str, Any] = {
            "shared": True,
            "ignored_paths": (),
            "fresh_identity": False,
            "pace": Pace(),
            **(cache or {}),
        }
        cache_rules = CacheRules(**said, models=RuleBook(replace(RULES, **(model or {}))))
        questions = Questions(OneRoute(self.upstream), store, tenants, cache_rules)
        missing = Missing(questions, Nearby(store, clock))
        self.service = Service(questions, store, self.flights, cache_rules, clock, self.purges, self.tally, missing)
        self.streams = Streams(self.service, questions, self.flights, store, tenants, clock, self.purges)

    async def close(self) -> None:
        await self.service.close()
        await self.purges.close()
        await self.tally.close()
