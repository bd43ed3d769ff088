import pytest

from gateway.core.sentinel_url import SentinelUrl


@pytest.mark.parametrize(
    ("url", "sentinels", "plain"),
    [
        ("redis+sentinel://a/main", (("a", 26379),), "redis://sentinel/0"),
        ("rediss+sentinel://a:1,b:2/main/", (("a", 1), ("b", 2)), "rediss://sentinel/0"),
        ("redis+sentinel://[::1]:7,[fe80::2],c:9/main/3", (("::1", 7), ("fe80::2", 26379), ("c", 9)), "redis://sentinel/3"),
        ("redis+sentinel://me:p%40ss@a/main/2?client_name=x", (("a", 26379),), "redis://me:p%40ss@sentinel/2?client_name=x"),
    ],
)
def test_what_a_url_says(url, sentinels, plain):
    assert SentinelUrl.is_one(url)
    parsed = SentinelUrl.parse(url)
    assert (parsed.tls, parsed.sentinels, parsed.service, parsed.plain) == (url[5] == "s", sentinels, "main", plain)


def test_it_is_shown_without_credentials_and_options():
    parsed = SentinelUrl.parse("rediss+sentinel://me:secret@a,[::1]:7/main/2?sentinel_password=secret")
    assert parsed.shown == "rediss+sentinel://a:26379,[::1]:7/main"


@pytest.mark.parametrize("url", ["redis://a", "sentinel://a/main", "embedded", "unix:///redis+sentinel"])
def test_other_urls_are_not_of_this_kind(url):
    assert not SentinelUrl.is_one(url)


@pytest.mark.parametrize(
    "rest",
    [
        "", "/main", "a", "a/", "a//0", "a/main/x", "a/main/0/1", "a,/main", "a:/main", "a:x/main", "a:0/main",
        "a:65536/main", "::1/main", "[::1/main", "user:pass/word@a/main", "user:pa?ss@a/main", "a b/main", "a/ma in",
    ],
)  # fmt: skip
def test_what_does_not_parse_is_not_shown(rest):
    with pytest.raises(ValueError, match="must be") as caught:
        SentinelUrl.parse(f"redis+sentinel://{rest}")
    assert "pass" not in str(caught.value).replace("user:password@", "")
