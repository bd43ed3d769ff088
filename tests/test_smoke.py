async def test_a_stream_fills_what_both_modes_hit(start_gateway, upstream):
    gateway = await start_gateway()
    miss = await gateway.chat(stream=True)
    assert "fwd=miss" in miss.cache_status
    hit = await gateway.chat(stream=True)
    whole = await gateway.chat()
    assert "gateway; hit" in hit.cache_status
    assert "gateway; hit" in whole.cache_status
    assert len(upstream.asked) == 1
    assert whole.json["choices"][0]["message"]["content"] == "Hello world"
    assert hit.events[-1] == "[DONE]"
    assert len(hit.events) == len(miss.events) == 5
