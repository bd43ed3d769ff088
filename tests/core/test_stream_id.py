import re
import string

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.apis import APIS
from gateway.core.content import Trace
from gateway.core.recording import Identity
from gateway.core.stream_id import (
    NO_RUN,
    Cursor,
    StreamId,
    UnknownStream,
    flight_of,
    format_cursor,
    identity_digits,
    mint,
    open_token,
    parse_after,
    parse_cursor,
    traceable_digits,
)

SECRET = b"0123456789abcdef"
OWNER = "ab" * 16
ALPHABET = string.ascii_letters + string.digits + "-_"


def digits(count):
    return st.binary(min_size=count // 2, max_size=count // 2).map(bytes.hex)


STREAMS = st.builds(
    StreamId,
    kind=st.sampled_from(["flight", "hit"]),
    usage=st.booleans(),
    event_ids=st.booleans(),
    shared=st.booleans(),
    fresh=st.booleans(),
    api=st.sampled_from(sorted(APIS)),
    key=digits(40),
    flight=digits(16),
    run=digits(8),
    created=st.integers(0, 2**32 - 1),
    nonce=st.binary(min_size=8, max_size=8),
)
SECRETS = st.binary(min_size=16, max_size=64)
STREAM = StreamId(
    kind="hit", usage=True, event_ids=False, shared=False, fresh=True, api="completions", key="0f" * 20,
    flight="1e" * 8, run=NO_RUN, created=1741569952, nonce=b"12345678",
)  # fmt: skip
TOKEN, DIGITS = mint(SECRET, OWNER, STREAM)


GOLDEN = "rRZmrOzC0VfB1dvt3kpZ1U2e1462bb8bde02e482e69f9bc2e173fb0b7dc2008b"


def owned_by(owner):
    return lambda _: owner


def is_refused(token, secret=SECRET, owner=OWNER):
    with pytest.raises(UnknownStream):
        open_token(secret, owned_by(owner), token)
    return True


@given(SECRETS, st.text(st.characters(codec="utf-8")), STREAMS)
def test_a_token_tells_its_stream(secret, owner, stream):
    token, _ = mint(secret, owner, stream)
    assert re.fullmatch("[A-Za-z0-9_-]{80}", token)
    assert open_token(secret, owned_by(owner), token) == stream


@given(STREAMS, st.binary(min_size=2, max_size=2))
def test_the_owner_is_asked_for_as_the_stream_says(stream, other):
    asked = []
    token, _ = mint(SECRET, OWNER, stream)
    open_token(SECRET, lambda shared: asked.append(shared) or OWNER, token)
    assert asked == [stream.shared]


@given(STREAMS, st.sampled_from(["", "ab" * 15, OWNER + "a", OWNER.upper()]), st.integers(0, 15))
def test_another_owner_or_secret_is_refused(stream, owner, at):
    token, _ = mint(SECRET, OWNER, stream)
    assert is_refused(token, owner=owner)
    assert is_refused(token, secret=SECRET[:at] + b"x" + SECRET[at + 1 :])
    assert is_refused(token, secret=SECRET + b"0")


def test_a_shared_stream_is_no_tenants():
    token, _ = mint(SECRET, OWNER, STREAM._replace(shared=True))
    with pytest.raises(UnknownStream):
        open_token(SECRET, lambda shared: "everybody" if shared else OWNER, token)


def test_every_changed_character_is_refused():
    for at in range(len(TOKEN)):
        for char in ALPHABET + "+/=.\n é":
            if char != TOKEN[at]:
                assert is_refused(TOKEN[:at] + char + TOKEN[at + 1 :])


@pytest.mark.parametrize(
    "token",
    [
        "", ".", "A", "A" * 80, "_" * 80, "A" * 79, "=" * 80, "é" * 80, "\0" * 80, "٣" * 80, "\ud800" * 80,
        TOKEN[:-1], TOKEN[1:], TOKEN + "A", TOKEN + "=", TOKEN + "\n", " " + TOKEN, TOKEN * 2, TOKEN[:-1] + "é",
    ],
)  # fmt: skip
def test_what_is_no_token_is_refused(token):
    assert is_refused(token)


@given(st.text() | st.text(ALPHABET, min_size=80, max_size=80))
def test_garbage_raises_nothing_but_unknown_stream(token):
    assert is_refused(token)


@pytest.mark.parametrize("name", ["version", "flags", "api"])
def test_a_token_of_another_version_is_refused(monkeypatch, name):
    if name == "version":
        monkeypatch.setattr("gateway.core.stream_id._VERSION", 2)
    elif name == "api":
        monkeypatch.setattr("gateway.core.stream_id._APIS", ("chat", "completions", "other"))
    stream = STREAM._replace(api="other") if name == "api" else STREAM
    stream = stream._replace(fresh=2) if name == "flags" else stream
    token, _ = mint(SECRET, OWNER, stream)
    monkeypatch.undo()
    assert is_refused(token)


def test_every_api_has_its_number_and_keeps_it():
    for name in APIS:
        assert open_token(SECRET, owned_by(OWNER), mint(SECRET, OWNER, STREAM._replace(api=name))[0]).api == name
    assert [mint(SECRET, OWNER, STREAM._replace(api=name))[0][:4] for name in ("chat", "completions")] == ["ARMA", "ARMB"]


def test_a_token_of_today_is_read_tomorrow():
    assert TOKEN == "ARMBDw8PDw8PDw8PDw8PDw8PDw8PDw8eHh4eHh4eHgAAAABnzj-gMTIzNDU2NzhbuTvOqwe8IbKFVG1a"
    assert DIGITS == GOLDEN
    assert flight_of(SECRET, "chatcmpl-" + GOLDEN[:29]) == STREAM.flight


# The fresh identity


@given(STREAMS, STREAMS, st.text(max_size=3))
def test_the_identity_is_that_of_all_resumes_of_a_stream(stream, other, owner):
    token, found = mint(SECRET, owner, stream)
    assert re.fullmatch("[0-9A-Za-z]{22}[0-9a-f]{42}", found)
    assert identity_digits(SECRET, open_token(SECRET, owned_by(owner), token)) == found
    resumed = other._replace(flight=stream.flight, created=stream.created, nonce=stream.nonce)
    assert mint(SECRET, owner, resumed)[1] == found == traceable_digits(SECRET, stream.flight, stream.nonce)


@pytest.mark.parametrize("members", [{"flight": "00" * 8}, {"nonce": b"87654321"}])
def test_another_stream_has_another_identity(members):
    assert identity_digits(SECRET, STREAM._replace(**members)) != DIGITS
    assert identity_digits(SECRET + b"x", STREAM) != DIGITS


def name_of(shown):
    """The sixteen bytes behind the first 22 digits, of which the pair that counts least comes first."""
    alphabet = string.digits + string.ascii_uppercase + string.ascii_lowercase
    pairs = [alphabet.index(shown[at]) * 62 + alphabet.index(shown[at + 1]) for at in range(0, 22, 2)]
    return sum(pair * 3844**place for place, pair in enumerate(pairs)).to_bytes(16)


def test_outsiders_can_neither_read_nor_link_the_flight():
    shown = [traceable_digits(SECRET, STREAM.flight, bytes([number]) * 8) for number in range(100)]
    assert {name_of(digits)[:8] for digits in shown} == {bytes([number]) * 8 for number in range(100)}
    masked = {name_of(digits)[8:] for digits in shown}
    assert len(masked) == 100
    assert bytes.fromhex(STREAM.flight) not in masked


ORIGINALS = st.builds(
    lambda prefix, length: prefix + "x" * length,
    st.sampled_from(["", "chatcmpl-", "cmpl-", "gen_", "X-"]),
    st.integers(0, 70),
)


@given(SECRETS, digits(16), st.binary(min_size=8, max_size=8), ORIGINALS)
def test_a_shown_id_leads_back_to_its_flight(secret, flight, nonce, original):
    shown = orjson.loads(Identity.fresh(original, traceable_digits(secret, flight, nonce), 0.0).id)
    assert flight_of(secret, shown) == flight
    assert flight_of(secret, "resp_" + shown) == flight
    other = secret + b"x" if len(secret) < 64 else secret[1:]
    assert flight_of(other, traceable_digits(secret, flight, nonce)) is None


def test_with_any_other_character_it_is_another_id():
    for shown in (DIGITS[:29], DIGITS):
        for at in range(len(shown)):
            found = [char for char in string.printable + "ä" if flight_of(SECRET, shown[:at] + char + shown[at + 1 :])]
            assert found == [shown[at]]


def test_what_is_cut_is_another_id():
    assert [length for length in range(70) if flight_of(SECRET, (DIGITS + "000000")[:length])] == list(range(24, 65))
    assert not any(flight_of(SECRET, DIGITS[start:]) for start in range(1, 36))


@pytest.mark.parametrize(
    "shown",
    [
        "", "chatcmpl-", "chatcmpl-123", "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT", "0195c1e5-9a4e-7d6c-8d1c-3b1c2f0a9e77",
        "chatcmpl-" + "0" * 29, "chatcmpl-" + "0f" * 16, "v" * 64, DIGITS.swapcase(), DIGITS + "\n", TOKEN,
        "-" * 5000, "٣" * 32,
    ],
)  # fmt: skip
def test_any_other_id_leads_nowhere(shown):
    assert flight_of(SECRET, shown) is None


@given(st.text(max_size=23) | st.from_regex(r"[a-z]*-?[0-9A-Za-z]{22}[0-9a-f]{8,42}", fullmatch=True))
def test_no_text_is_taken_for_an_id_of_ours(shown):
    assert flight_of(SECRET, shown) is None


# Cursors


def position_of(text):
    trace = Trace()
    trace.add({"choices": [{"text": text}]})
    return trace.position()


POSITIONS = st.just("") | st.text("ab -").map(position_of)


@given(st.integers(0, 10**12 - 1), POSITIONS, st.booleans())
def test_a_cursor_survives_being_written(after, position, ended):
    written = format_cursor(TOKEN, after, position, ended).decode()
    assert parse_cursor(written, TOKEN) == Cursor(after, position, ended)
    assert parse_after(written.removeprefix(TOKEN + ".")) == Cursor(after, position, ended)


def test_a_cursor_reads_as_it_is_told():
    assert format_cursor("TOKEN", 12, "1f-abcdefgh") == b"TOKEN.12.1f-abcdefgh"
    assert format_cursor("TOKEN", 0) == b"TOKEN.0"
    assert format_cursor("TOKEN", 12, "1f-abcdefgh", ended=True) == b"TOKEN.12.1f-abcdefgh.end"
    assert format_cursor("TOKEN", 3, ended=True) == b"TOKEN.3.end"
    assert parse_after("0") == Cursor(0) == (0, "", False)


ODD_AFTER = [
    "", ".", "-1", "+1", "01", "1.", "1..", " 1", "1 ", "1\n", "1.0", "1e3", "0x1", "1_0", "٣", "²", "x", "1.x",
    "1.1f-abcdefg", "1.1f-abcdefgh.", "1.1f-abcdefgh\n", "1.1f-abcdefgh.2", ".1f-abcdefgh", "1" * 13, "9" * 5000,
    "1.end.end", "1.end.1f-abcdefgh", "1.ends", "1..end", "end",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_AFTER)
def test_an_odd_cursor_is_refused(text):
    for parse in (parse_after, lambda text: parse_cursor(f"{TOKEN}.{text}", TOKEN)):
        with pytest.raises(ValueError, match=r"cursor|position"):
            parse(text)


@given(st.text())
def test_any_text_is_a_cursor_or_a_value_error(text):
    try:
        cursor = parse_after(text)
    except ValueError:
        return
    assert format_cursor("T", *cursor).decode() == f"T.{text}"


@pytest.mark.parametrize(
    "text", ["", TOKEN, TOKEN + "1", "x" + TOKEN + ".1", TOKEN[1:] + ".1", TOKEN.swapcase() + ".1", ".1", "1"]
)
def test_a_cursor_of_another_stream_is_refused(text):
    with pytest.raises(ValueError, match="cursor"):
        parse_cursor(text, TOKEN)
