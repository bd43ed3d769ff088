"""Web pages of other origins, as browsers ask for them: a question first, then the request (CORS)."""

import json

import pytest

PAGE = "https://chat.example"
CHAT = "/v1/chat/completions"
ASKED = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
PATHS = [CHAT, "/v1/embeddings", "/v1/models", "/v1/streams/unknown", "/v1/unknown"]


def told(response):
    """What the answer says to browsers."""
    return {name.lower(): value for name, value in response.headers.items() if name.lower().startswith("access-control-")}


async def preflight(gateway, path, origin):
    return await gateway.session.options(gateway.origin + path, headers={"Origin": origin, **ASKED})


async def request(gateway, origin, **members):
    body = {"model": "model-1", "messages": [{"role": "user", "content": "hi"}], **members}
    headers = {"Origin": origin, "Content-Type": "application/json"}
    response = await gateway.session.post(gateway.origin + CHAT, data=json.dumps(body), headers=headers)
    await response.read()
    return response


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_of_an_allowed_origin_may_ask_and_no_upstream_is_bothered(start_gateway, upstream, path):
    gateway = await start_gateway(server={"cors_origins": [PAGE]})
    response = await preflight(gateway, path, PAGE)
    assert response.status == 204
    assert told(response) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "POST",
        "access-control-allow-headers": "authorization,content-type",
        "access-control-max-age": "600",
        "access-control-expose-headers": "*",
    }
    assert response.headers["Vary"] == "Origin"
    assert not upstream.asked


@pytest.mark.parametrize("streamed", [True, False])
async def test_it_may_read_every_answer(start_gateway, streamed):
    """A miss, a hit, and an error."""
    gateway = await start_gateway(server={"cors_origins": [PAGE, "https://other.example"]})
    for members, status in (({}, 200), ({}, 200), ({"messages": 1}, 400)):
        response = await request(gateway, PAGE, stream=streamed, **members)
        assert response.status == status
        assert told(response) == {"access-control-allow-origin": PAGE, "access-control-expose-headers": "*"}
        assert response.headers["Vary"].split(", ")[-1] == "Origin"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://chat.example.evil.example"])
async def test_a_page_of_another_origin_may_neither_ask_nor_read(start_gateway, origin):
    gateway = await start_gateway(server={"cors_origins": [PAGE]})
    refused, answered = await preflight(gateway, CHAT, origin), await request(gateway, origin)
    assert (refused.status, answered.status) == (405, 200)
    for response in (refused, answered):
        assert "access-control-allow-origin" not in told(response)
        assert "Origin" in response.headers["Vary"].split(", ")


async def test_all_of_the_web_may_ask_where_that_is_wanted(start_gateway):
    gateway = await start_gateway(server={"cors_origins": ["*"]})
    for response in (await preflight(gateway, CHAT, PAGE), await request(gateway, PAGE)):
        assert told(response)["access-control-allow-origin"] == "*"
        assert "Origin" not in response.headers.get("Vary", "").split(", ")


async def test_by_default_no_page_may(start_gateway):
    gateway = await start_gateway()
    for response in (await preflight(gateway, CHAT, PAGE), await request(gateway, PAGE)):
        assert not told(response)


async def test_pages_are_told_nothing_outside_of_the_api(start_gateway):
    gateway = await start_gateway(server={"cors_origins": ["*"]})
    for path in ("/", "/healthz", "/metrics", "/admin/stats"):
        assert not told(await preflight(gateway, path, PAGE))
        assert not told(await gateway.session.get(gateway.origin + path, headers={"Origin": PAGE}))
