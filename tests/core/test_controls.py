import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.apis import RequestProblem
from gateway.core.controls import MAX_NAME_CHARS, MAX_TTL_S, NO_CONTROLS, Controls, from_body
from gateway.core.policy import NO_DIRECTIVES, Directives

NAMES = ["ttl", "s-maxage", "s-max-age", "no-cache", "no-store", "namespace", "use-cache", "no_cache", "sMaxAge"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=6)
CONTROLS = st.builds(
    Controls,
    directives=st.builds(
        Directives,
        no_cache=st.booleans(),
        no_store=st.booleans(),
        max_age_s=st.none() | st.integers(0, 99),
        min_fresh_s=st.just(3),
    ),
    ttl_s=st.none() | st.floats(0, 99),
    namespace=st.text(max_size=3),
    tags=st.sampled_from([(), ("a", "b")]),
)


def test_who_says_nothing_controls_nothing():
    assert Controls() == NO_CONTROLS == (NO_DIRECTIVES, None, "", ())
    assert from_body({}, NO_CONTROLS) == NO_CONTROLS


@pytest.mark.parametrize(
    ("cache", "controls"),
    [
        ({"ttl": 60}, Controls(ttl_s=60.0)),
        ({"ttl": 0}, Controls(ttl_s=0.0)),
        ({"ttl": 1.5}, Controls(ttl_s=1.5)),
        ({"ttl": MAX_TTL_S}, Controls(ttl_s=float(MAX_TTL_S))),
        ({"namespace": "team ä"}, Controls(namespace="team ä")),
        ({"namespace": "x" * MAX_NAME_CHARS}, Controls(namespace="x" * MAX_NAME_CHARS)),
        ({"namespace": ""}, NO_CONTROLS),
        ({"no-cache": True}, Controls(Directives(no_cache=True))),
        ({"no-store": True}, Controls(Directives(no_store=True))),
        ({"no-cache": False, "no-store": False}, NO_CONTROLS),
        ({"s-maxage": 600}, Controls(Directives(max_age_s=600))),
        ({"s-max-age": 600}, Controls(Directives(max_age_s=600))),
        ({"s-maxage": 600, "s-max-age": 5.9}, Controls(Directives(max_age_s=5))),
        ({"s-maxage": 0}, Controls(Directives(max_age_s=0))),
        ({"use-cache": 7, "no_cache": True, "noCache": 1, "s_maxage": "x", "other": [{}]}, NO_CONTROLS),
        (dict.fromkeys(NAMES), NO_CONTROLS),
    ],
)
def test_the_body_object_is_read_as_litellm_has_it(cache, controls):
    assert from_body(cache, NO_CONTROLS) == controls


def test_headers_win_and_directives_add_up():
    said = Controls(Directives(no_store=True, max_age_s=30, min_fresh_s=2, only_if_cached=True), 0.0, "header", ("a",))
    cache = {"ttl": 60, "namespace": "body", "no-cache": True, "no-store": False, "s-maxage": 600}
    assert from_body(cache, said) == said._replace(
        directives=Directives(no_cache=True, no_store=True, max_age_s=30, min_fresh_s=2, only_if_cached=True)
    )
    assert from_body({"s-maxage": 10}, said).directives.max_age_s == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("ttl", "s-maxage", "s-max-age")
            for value in (-1, -0.5, True, False, "60", [60], {}, math.nan, math.inf, MAX_TTL_S + 1, 10**400)
        ],
        *[(name, value) for name in ("no-cache", "no-store") for value in (1, 0, "true", [], 1.0)],
        *[("namespace", value) for value in (1, True, ["x"], {}, "x" * (MAX_NAME_CHARS + 1), "a\n", "\0", "\x7f", "\u202e")],
    ],
)
def test_a_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(RequestProblem) as problem:
        from_body({name: value}, Controls(ttl_s=1.0, namespace="header"))
    assert problem.value.param == f"cache.{name}"
    assert f"'cache.{name}'" in str(problem.value)
    assert str(problem.value).isprintable()


@given(BODIES, CONTROLS)
def test_any_object_is_read_or_is_a_problem_of_the_request(cache, said):
    try:
        found = from_body(cache, said)
    except RequestProblem as problem:
        assert problem.param.removeprefix("cache.") in cache  # noqa: PT017  # either is lawful
        return
    assert found.tags == said.tags
    assert (found.ttl_s is None or found.ttl_s >= 0) and len(found.namespace) <= MAX_NAME_CHARS  # noqa: PT018  # one law
    if said.directives.max_age_s is not None:
        assert found.directives.max_age_s <= said.directives.max_age_s
