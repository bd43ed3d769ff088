"""Secrets are taken out of texts, in every form in which they travel, and nothing else is."""

from base64 import b64encode
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.hiding import HIDDEN, Hider, credentials_of, written_secrets

SECRETS = st.text(st.characters(codec="ascii", categories=("L", "N", "P"), exclude_characters="*"), min_size=8, max_size=40)


@given(st.lists(SECRETS, min_size=1, max_size=4), st.text(), st.text())
def test_no_form_of_any_of_them_is_left(secrets, before, after):
    hide = Hider(secrets)
    for secret in secrets:
        for form in (secret, quote(secret, safe=""), b64encode(secret.encode()).decode()):
            hidden = hide(f"{before}{form}{after}")
            assert HIDDEN in hidden
            assert not [each for each in secrets if each in hidden]


@given(st.text())
def test_what_holds_no_secret_is_as_it_was(text):
    secret = "sk-0123456789"
    if secret not in text:
        assert Hider([secret])(text) == text


def test_what_is_short_is_no_secret():
    assert Hider(["", "a", "test"])("a test") == "a test"


def test_more_can_be_learned_and_what_was_known_stays_known():
    hide = Hider(["first-secret"])
    hide.learn(["second-secret"])
    assert hide("first-secret second-secret") == f"{HIDDEN} {HIDDEN}"
    assert "secret" not in repr(hide)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("embedded", []),
        ("redis://localhost", []),
        ("redis://:p%40ss@localhost", ["p@ss", ":p@ss"]),
        ("http://user:pass@proxy:1", ["pass", "user:pass"]),
        ("unix:///socket?password=pass&db=1", ["pass"]),
    ],
)
def test_the_credentials_in_a_url_are_its_passwords_and_what_a_proxy_is_sent(url, found):
    assert credentials_of(url) == found


def test_arguments_that_look_like_secrets_by_their_names_are_taken_for_some():
    arguments = {"model": "m", "api_key": "one", "apiKey": "two", "headers": {"X": "Bearer three"}, "n": 5, "tokens": ["t"]}
    assert set(written_secrets(arguments)) == {"one", "two", "Bearer three", "three"}
