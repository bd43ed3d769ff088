import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.apis import APIS
from gateway.core.content import Trace
from gateway.core.stream_id import (
    NO_RUN,
    Cursor,
    StreamId,
    UnknownStream,
    format_cursor,
    identity_digits,
    mint,
    open_token,
    parse_after,
    parse_cursor,
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
    assert DIGITS == "bdff8188a539322dde49f41c9f7edb7feedd26c842938033edb8a0ee74e3bc3e"


# The fresh identity


@given(STREAMS, STREAMS, st.text(max_size=3))
def test_the_identity_is_that_of_all_resumes_of_a_stream(stream, other, owner):
    token, found = mint(SECRET, owner, stream)
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert identity_digits(SECRET, open_token(SECRET, owned_by(owner), token)) == found
    resumed = other._replace(flight=stream.flight, created=stream.created, nonce=stream.nonce)
    assert mint(SECRET, owner, resumed)[1] == found


@pytest.mark.parametrize("members", [{"flight": "00" * 8}, {"created": 1}, {"nonce": b"87654321"}])
def test_another_stream_has_another_identity(members):
    assert identity_digits(SECRET, STREAM._replace(**members)) != DIGITS
    assert identity_digits(SECRET + b"x", STREAM) != DIGITS


def test_the_identity_tells_nothing_of_the_token():
    assert DIGITS[:20] not in open_token(SECRET, owned_by(OWNER), TOKEN).nonce.hex()
    assert bytes.fromhex(DIGITS)[:13] not in TOKEN.encode()


# Cursors


def position_of(text):
    trace = Trace()
    trace.add({"choices": [{"text": text}]})
    return trace.position()


POSITIONS = st.just("") | st.text("ab -").map(position_of)


@given(st.integers(0, 10**12 - 1), POSITIONS)
def test_a_cursor_survives_being_written(after, position):
    written = format_cursor(TOKEN, after, position).decode()
    assert parse_cursor(written, TOKEN) == Cursor(after, position)
    assert parse_after(written.removeprefix(TOKEN + ".")) == Cursor(after, position)


def test_a_cursor_reads_as_it_is_told():
    assert format_cursor("TOKEN", 12, "1f-abcdefgh") == b"TOKEN.12.1f-abcdefgh"
    assert format_cursor("TOKEN", 0) == b"TOKEN.0"
    assert parse_after("0") == Cursor(0) == (0, "")


ODD_AFTER = [
    "", ".", "-1", "+1", "01", "1.", "1..", " 1", "1 ", "1\n", "1.0", "1e3", "0x1", "1_0", "٣", "²", "x", "1.x",
    "1.1f-abcdefg", "1.1f-abcdefgh.", "1.1f-abcdefgh\n", "1.1f-abcdefgh.2", ".1f-abcdefgh", "1" * 13, "9" * 5000,
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
