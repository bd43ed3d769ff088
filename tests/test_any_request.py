"""Whatever a caller sends: an answer that fits, or a 4xx with the error object; and the connection serves on."""

import json
import logging
from base64 import urlsafe_b64encode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw import nothing_is_left, tell
from scripted import stream, whole_answer

CHAT, LEGACY = b"/v1/chat/completions", b"/v1/completions"
ADMIN_KEY = "admin-key"
many = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# JSON, and what looks like it


def text_of(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


ODD_STRINGS = [
    rb'"\ud800"',
    rb'"\udc00\ud800"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    rb'"\u0000"',
    b'"\0"',
    b'"\n"',
    rb'"\x"',
    b'"',
    b'"\xf0\x9f"',
]
ODD_NUMBERS = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e-999",
    b"-0",
    b"-0.0",
    b"01",
    b"1.",
    b".5",
    b"+1",
    b"0x1",
    b"1_0",
]
HUGE = [
    b"9" * 400,
    b"-" + b"9" * 400,
    b"18446744073709551616",
    b"-9223372036854775809",
    b"9007199254740993",
    b"1" + b"0" * 5000,
]
DEEP = [b"[" * 200 + b"]" * 200, b"[" * 1500 + b"]" * 1500, b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 50_000]
odd = st.sampled_from([*ODD_STRINGS, *ODD_NUMBERS, *HUGE, *DEEP, b"", b"undefined", b"'a'", b"/**/1"])
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
).map(text_of)
leaves = st.one_of(plain, plain, plain, odd)
COMMON = [
    "model",
    "stream",
    "stream_options",
    "n",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "user",
    "metadata",
    "store",
    "cache",
]
FIELDS = [
    *COMMON,
    *["messages", "tools", "tool_choice", "functions", "response_format", "logprobs", "modalities", "audio", "prediction"],
]
FIELDS += [
    "prompt",
    "best_of",
    "echo",
    "suffix",
    "logit_bias",
    "service_tier",
    "prompt_cache_key",
    "include_usage",
    "role",
    "content",
    "name",
    "type",
    "text",
]
FIELDS += [
    "ttl",
    "namespace",
    "no-cache",
    "no-store",
    "s-maxage",
    "image_url",
    "input_audio",
    "web_search_options",
    "reasoning_effort",
]
names = st.one_of(st.sampled_from(FIELDS).map(text_of), st.text(max_size=5).map(text_of), st.sampled_from(ODD_STRINGS))


def written(pairs):
    return b"{%s}" % b",".join(b"%s:%s" % pair for pair in pairs)


def arrays(values):
    return st.lists(values, max_size=4).map(lambda items: b"[%s]" % b",".join(items))


def objects(values):
    return st.lists(st.tuples(names, values), max_size=5).map(written)


anything = st.recursive(leaves, lambda values: arrays(values) | objects(values), max_leaves=15)
GOOD = {
    b'"model"': [b'"model-1"'],
    b'"messages"': [
        b'[{"role":"user","content":"hi"}]',
        b'[{"role":"user","content":[{"type":"text","text":"hi"}]}]',
        b"[]",
    ],
    b'"prompt"': [b'"hi"', b'["a","b"]', b"[1,2]", b"[[1],[2]]"],
    b'"stream"': [b"true", b"false", b"null"],
    b'"n"': [b"1", b"2.0", b"128", b"1000000", b"99999999999999999999999", b"0", b"-1", b"1e400"],
    b'"cache"': [b"{}", b'{"no-cache":true}', b'{"ttl":1e300}', b'{"namespace":"a"}', b"null"],
    b'"stream_options"': [b'{"include_usage":true}', b"{}", b"null"],
}
good_members = st.one_of([st.tuples(st.just(name), st.sampled_from(values)) for name, values in GOOD.items()])
NEEDED = [(b'"model"', b'"model-1"'), (b'"messages"', b'[{"role":"user","content":"hi"}]'), (b'"prompt"', b'"hi"')]


@st.composite
def bodies(draw):
    """Good requests in which some members are of any kind, come twice, or have been cut off."""
    pairs = draw(st.sampled_from([NEEDED, NEEDED, NEEDED, []])) + draw(
        st.lists(good_members | st.tuples(names, anything), max_size=4)
    )
    text = written(draw(st.permutations(pairs)))
    return draw(st.sampled_from([text, text, text, text, text[:-1], b"\xef\xbb\xbf" + text, text + b"}", text + b"\0"]))


# Requests

visible = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30).map(
    lambda text: text.encode("latin-1")
)
FIELD_VALUES = {
    b"Cache-Control": [
        b"no-cache",
        b"no-store",
        b"max-age=9999999999999999999999",
        b"max-stale",
        b"only-if-cached",
        b"max-age=-1, ,=",
    ],
    b"Gateway-Cache-TTL": [b"0", b"1.5", b"-1", b"1e9", b"999999999999999", b"9999999999999999", b"?1", b'"a"', b"1;a=b"],
    b"Gateway-Cache-Namespace": [b"a", b'"a b"', b"a, b", b"()", b":YQ==:", b'"' + b"a" * 200 + b'"'],
    b"Gateway-Cache-Tags": [b"a, b", b'"a";x, b', b"(a b)", b",", b"a" * 200, b", ".join(b"t%d" % i for i in range(30))],
    b"Gateway-Event-Ids": [b"?1", b"?0", b"yes", b"?1, ?0"],
    b"X-Request-Id": [b"mine", b"a b", b"\xe9" * 10],
    b"Authorization": [b"Bearer a", b"Bearer", b"Basic \xff"],
    b"Last-Event-ID": [b"a.1", b".", b"1", b"a.99999999999999999999", b"a.1.%s" % (b"b" * 100)],
    b"Accept": [b"text/event-stream", b"*/*"],
    b"Content-Encoding": [b"identity", b"gzip", b"zstd", b"deflate", b"x"],
    b"traceparent": [b"00-0-0-0"],
}
fields = st.one_of([st.tuples(st.just(name), st.sampled_from(values) | visible) for name, values in FIELD_VALUES.items()])
kinds = st.sampled_from([b"application/json"] * 6 + [b"application/json; charset=latin-1", b"text/plain", b"", b"a/b+json"])


@st.composite
def requests(draw, methods, paths, content):
    method, path, body = draw(methods), draw(paths), draw(content)
    head = [b"%s %s HTTP/1.1" % (method, path), b"Host: x", b"Content-Type: " + draw(kinds)]
    head += [b"%s: %s" % field for field in draw(st.lists(fields, max_size=3))]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


@pytest.fixture
async def gateway(start_gateway, upstream):
    async def answer(asked):
        if asked.path.endswith("/completions") and asked.json.get("stream") is True:
            await stream(asked, "Hello")
        elif asked.path.endswith("/models"):
            await asked.answer({"data": [{"id": "model-1"}, {"id": 5}, {}, None]})
        else:
            await asked.answer(whole_answer("Hello"))

    upstream.script = answer
    started = await start_gateway({"ADMIN_KEY": ADMIN_KEY}, admin={"key_env": "ADMIN_KEY"})
    yield started
    await nothing_is_left(started)


async def check(gateway, caplog, request):
    caplog.clear()
    told = await tell(gateway, request)
    [answer] = told.answers
    if answer.status >= 400:
        error = answer.error
        # What `only-if-cached` is answered with (RFC 9111), and an event id whose digest is of nothing that was said.
        of_ours = answer.status < 500 or error["code"] in ("not_cached", "stream_diverged")
        assert of_ours, (request, answer)
    lied = any(f"Content-Encoding: {coding}".encode() in request for coding in ("gzip", "zstd", "deflate"))
    assert lied or not told.closed, request
    assert not [record for record in caplog.records if record.levelno > logging.INFO], request


@given(requests(st.sampled_from([b"POST", b"POST", b"QUERY"]), st.sampled_from([CHAT, LEGACY]), bodies()))
@many
async def test_any_question(gateway, caplog, request_):
    await check(gateway, caplog, request_)


SEGMENTS = [
    b"a",
    b"%00",
    b"%0d%0a",
    b"%ff",
    b"%2f",
    b"%2e%2e",
    b"..",
    b".",
    b"",
    b"model-1",
    b"%",
    b"%zz",
    b"a" * 2000,
    b"%c3%a9",
    b"*",
    b"a;b",
]
TOKENS = [urlsafe_b64encode(bytes(size)).rstrip(b"=") for size in (0, 1, 16, 40, 60, 80, 200)]
QUERIES = [
    b"",
    b"?after=1",
    b"?after=-1",
    b"?after=",
    b"?after=99999999999999999999",
    b"?after=1&after=2",
    b"?after=%00",
    b"?%ff",
    b"?;;&&=",
    b"?a[]=1",
]
segments = st.sampled_from([*SEGMENTS, *TOKENS])
paths = st.builds(
    lambda start, parts, query: b"/".join([start, *parts]) + query,
    st.sampled_from([b"", b"/v1", b"/v1/models", b"/v1/streams", b"/v1/embeddings", b"/admin", b"//v1", CHAT]),
    st.lists(segments, max_size=3),
    st.sampled_from(QUERIES),
).map(lambda path: path if path.startswith(b"/") else b"/" + path)
METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"QUERY"])


@given(requests(METHODS, paths, st.just(b"") | bodies()))
@many
async def test_any_path(gateway, caplog, request_):
    await check(gateway, caplog, request_)


RESUMED = st.builds(
    lambda token, what, query: b"/v1/streams/" + token + what + query,
    st.sampled_from(TOKENS) | st.just(b"TOKEN"),
    st.sampled_from([b"", b"/status", b"/cancel", b"/", b"/x", b"."]),
    st.sampled_from(
        [b"", b"?after=0", b"?after=2", b"?after=9999", b"?after=1.1-AAAAAAAA", b"?after=a", b"?after=1&after=0"]
    ),
)


@given(
    requests(st.sampled_from([b"GET", b"GET", b"POST"]), RESUMED, st.just(b"")),
    st.sampled_from([b"", b"TOKEN.1", b"TOKEN.2.1-AAAAAAAA"]),
)
@many
async def test_any_place_of_a_stream(gateway, caplog, request_, last_id):
    got = await gateway.chat(stream=True)
    token = got.headers["Gateway-Stream-Id"].encode()
    if last_id:
        request_ = request_.replace(b"Host: x", b"Host: x\r\nLast-Event-ID: " + last_id, 1)
    await check(gateway, caplog, request_.replace(b"TOKEN", token))


ADMIN = [b"", b"/", b"/entries", b"/entries/" + b"0" * 40, b"/entries/x", b"/purge", b"/stats", b"/explain", b"/nothing"]
ADMIN_QUERIES = [
    b"",
    b"?limit=1",
    b"?limit=0",
    b"?limit=1e9",
    b"?min_age_s=nan",
    b"?max_age_s=inf",
    b"?min_bytes=-1",
    b"?stale=true",
    b"?cursor=0",
]
ADMIN_QUERIES += [
    b"?cursor=%00",
    b"?cursor=99999999999999999999",
    b"?part=body",
    b"?part=x",
    b"?scan=true",
    b"?model=*",
    b"?tag=%ff",
    b"?x=1",
]
ADMIN_QUERIES += [b"?limit=1&limit=2", b"?cursor=1-2-3-4", b"?min_age_s=1e400", b"?min_bytes=" + b"9" * 5000]
administered = st.builds(
    lambda path, query: b"/admin" + path + query, st.sampled_from(ADMIN), st.sampled_from(ADMIN_QUERIES)
)
selectors = st.sampled_from(
    [
        b'"key"',
        b'"id"',
        b'"stream"',
        b'"namespace"',
        b'"model"',
        b'"tag"',
        b'"dry_run"',
        b'"api"',
        b'"request"',
        b'"headers"',
    ]
)
selected = st.lists(
    st.tuples(selectors, anything | st.sampled_from([b'"a"', b"true", b"{}", b'{"model":"m"}', b'"chat"'])), max_size=3
)


@given(requests(METHODS, administered, selected.map(written) | bodies()))
@many
async def test_any_administration(gateway, caplog, request_):
    lines = [line for line in request_.split(b"\r\n") if not line.startswith(b"Authorization")]
    lines.insert(1, b"Authorization: Bearer " + ADMIN_KEY.encode())
    await check(gateway, caplog, b"\r\n".join(lines))
