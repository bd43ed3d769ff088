import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.purge import Labels, Marks, Purge, Selector

LABELS = Labels(
    key="0f" * 20,
    model="gpt-4o-mini",
    namespace="team",
    tags=("blue", "green"),
    flight="1e" * 8,
    id="chatcmpl-1",
    sample_of="aa" * 20,
)
FITTING = {
    "key": LABELS.key, "flight": LABELS.flight, "id": LABELS.id, "namespace": "team", "model": "gpt-4o*", "tag": "green",
}  # fmt: skip
AT_US = 1_741_569_952_000_000


def test_a_selector_of_nothing_means_everything():
    assert Selector().matches(LABELS)
    assert Selector().matches(Labels("k", "m"))


@given(st.sets(st.sampled_from(sorted(FITTING))), st.sampled_from(sorted(FITTING)))
def test_all_that_is_set_has_to_fit(names, other):
    selector = Selector(**{name: FITTING[name] for name in names})
    assert selector.matches(LABELS)
    assert not selector._replace(**{other: "something else"}).matches(LABELS)


def test_a_question_is_meant_with_all_its_samples():
    assert Selector(key=LABELS.sample_of).matches(LABELS)
    assert not Selector(key="").matches(LABELS)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("gpt-4o-mini", True), ("gpt-*", True), ("*", True), ("gpt-4o-min?", True), ("gpt-[34]o*", True),
        ("gpt-4o", False), ("GPT-4o-mini", False), ("gpt-[!4]*", False), ("", False),
    ],
)  # fmt: skip
def test_a_model_may_be_a_pattern_and_its_case_counts(pattern, fits):
    assert Selector(model=pattern).matches(LABELS) is fits


@pytest.mark.parametrize("name", ["key", "flight", "id", "namespace", "tag"])
def test_nothing_else_is_a_pattern(name):
    assert not Selector(**{name: "*"}).matches(LABELS)


def test_the_empty_namespace_is_one_and_no_tag_is_none():
    assert Selector(namespace="").matches(LABELS._replace(namespace=""))
    assert not Selector(namespace="").matches(LABELS)
    assert not Selector(tag="").matches(LABELS)


@pytest.mark.parametrize(("started_at_us", "covered"), [(AT_US - 1, True), (AT_US, True), (AT_US + 1, False), (0, True)])
def test_a_purge_covers_what_began_by_then(started_at_us, covered):
    assert Purge(AT_US, Selector()).covers(LABELS, started_at_us / 1e6) is covered
    assert not Purge(AT_US, Selector(tag="red")).covers(LABELS, started_at_us / 1e6)


TEXTS = st.none() | st.text(max_size=5)
SELECTORS = st.builds(Selector, key=TEXTS, flight=TEXTS, id=TEXTS, namespace=TEXTS, model=TEXTS, tag=TEXTS)


@given(st.integers(-(2**63), 2**63 - 1), SELECTORS)
@example(AT_US, Selector())
def test_a_purge_survives_being_written(at_us, selector):
    assert Purge.loads(Purge(at_us, selector).dumps()) == Purge(at_us, selector)


def test_what_is_not_said_is_not_written():
    assert Purge(5, Selector(tag="a")).dumps() == b'{"at_us":5,"selector":{"tag":"a"}}'


@pytest.mark.parametrize(
    "value",
    [
        [], {}, None, 1, "x", {"at_us": 1}, {"selector": {}}, {"at_us": "x", "selector": {}},
        {"at_us": None, "selector": {}}, {"at_us": 1, "selector": None}, {"at_us": 1, "selector": []},
        {"at_us": 1, "selector": {"other": "x"}},
    ],
)  # fmt: skip
def test_what_is_no_purge_is_a_value_error(value):
    for data in (orjson.dumps(value), orjson.dumps(value)[:-1], b""):
        with pytest.raises(ValueError):  # noqa: PT011  # a JSON error is one, with words of its own
            Purge.loads(data)


FEW = st.sampled_from([None, "a", "b"])
FEW_PURGES = st.builds(
    Purge, st.integers(0, 3), st.builds(Selector, key=FEW, flight=FEW, id=FEW, namespace=FEW, model=FEW, tag=FEW)
)
NAMES = st.sampled_from(["", "a", "b"])
FEW_LABELS = st.builds(
    Labels, NAMES, NAMES, NAMES, st.lists(st.sampled_from(["a", "b"])).map(tuple), NAMES, NAMES, sample_of=NAMES
)


@given(st.lists(FEW_PURGES), FEW_LABELS, st.integers(0, 3), st.integers(0, 4))
def test_many_marks_cover_what_any_of_them_does(purges, labels, began_us, forgotten_us):
    marks = Marks()
    assert [marks.add(purge) for purge in purges] == [purge not in purges[:at] for at, purge in enumerate(purges)]
    assert bool(marks) is bool(purges)
    assert marks.cover(labels, began_us / 1e6) is any(purge.covers(labels, began_us / 1e6) for purge in purges)
    marks.forget(forgotten_us)
    left = [purge for purge in purges if purge.at_us >= forgotten_us]
    assert bool(marks) is bool(left)
    assert marks.cover(labels, began_us / 1e6) is any(purge.covers(labels, began_us / 1e6) for purge in left)
