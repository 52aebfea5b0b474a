"""Chat completions, driven over ASGI by hand: wire format, stop strings, usage, cancelling, failures."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_fakes import Client, FakeBackend, call, fake_gateway, ids

from serve.errors import DeadlineExceeded, Draining, EngineDead, Overloaded, ReplicaLost, RequestFailed

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def body(**fields):
    return {"model": "tiny", "messages": [USER], **fields}


def ask(*backends: FakeBackend, options=None, **fields):
    async def scenario():
        async with fake_gateway(*backends, **(options or {})) as gateway:
            return await call(gateway, PATH, body(**fields))

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def text(chunks, index=0) -> str:
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_whole_answer_has_openais_fields():
    answer = ask(FakeBackend(num_cached=16), max_tokens=8).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["created"] > 0
    assert answer["system_fingerprint"].startswith("fp_") and answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert choice["finish_reason"] == "length" and choice["index"] == 0 and choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8 and usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16


def test_stream_is_role_deltas_finish_usage_done():
    reply = ask(max_tokens=8, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.data()[-1] == "[DONE]" and reply.is_complete
    first, *middle, finish, last = reply.chunks()
    assert first["choices"][0]["delta"]["role"] == "assistant" and first["object"] == "chat.completion.chunk"
    assert all(chunk["choices"][0]["finish_reason"] is None and chunk["usage"] is None for chunk in middle)
    assert finish["choices"][0]["delta"] == {} and finish["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    assert text(reply.chunks()) == "Hello there"
    assert len({chunk["id"] for chunk in reply.chunks()}) == 1


def test_without_include_usage_no_chunk_has_usage():
    assert all("usage" not in chunk for chunk in ask(max_tokens=3, stream=True).chunks())


def test_continuous_usage_counts_up():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = ask(max_tokens=5, stream=True, stream_options=options).chunks()
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5


def test_one_event_per_choice_and_step():
    async def scenario():
        async with fake_gateway(FakeBackend(tokens_per_step=4)) as gateway:
            client = Client(gateway.app)
            reply = await client.request("POST", PATH, body(max_tokens=8, stream=True, n=2))
            deltas = [c for c in reply.chunks() if c["choices"][0]["delta"].get("content")]
            assert len(deltas) == 2 * 2
            assert [c["choices"][0]["index"] for c in deltas] == [0, 1, 0, 1]

    asyncio.run(scenario())


def test_half_a_character_is_never_sent():
    reply = ask(FakeBackend(reply=ids("né 日本 🎉")), max_tokens=100, stream=True)
    assert text(reply.chunks()) == "né 日本 🎉"
    assert all("�" not in part for part in reply.data())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
def test_stop_string_ends_the_choice_and_never_leaks(is_stream, tokens_per_step):
    backend = FakeBackend(reply=ids("one two STOP three four"), tokens_per_step=tokens_per_step, num_cached=8)
    reply = ask(backend, stop=[" STOP"], stream=is_stream, stream_options=usage_if(is_stream))
    if is_stream:
        chunks = reply.chunks()
        assert text(chunks) == "one two"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and reply.data()[-1] == "[DONE]"
        usage = chunks[-1]["usage"]
    else:
        [choice] = reply.json()["choices"]
        assert choice["message"]["content"] == "one two"
        assert choice["finish_reason"] == "stop" and choice["stop_reason"] == " STOP"
        usage = reply.json()["usage"]
    assert usage["completion_tokens"] == len(ids("one two STOP"))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 8
    assert not backend.open


def usage_if(is_stream):
    return {"include_usage": True} if is_stream else None


def test_stop_string_cancels_what_would_follow():
    backend = FakeBackend(reply=ids("one STOP" + " more" * 40))
    ask(backend, stop="STOP")
    assert backend.num_cancelled == 1


def test_each_choice_stops_by_itself():
    def reply(request):
        return ids("a STOP b") if request.sampling.seed % 2 == 0 else ids("never ending")

    backend = FakeBackend(reply=reply)
    choices = ask(backend, stop=["STOP"], n=3, seed=4).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["a ", "never ending", "a "]
    assert [request.sampling.seed for request in backend.requests] == [4, 5, 6]
    assert [request.n for request in backend.requests] == [1, 1, 1]


def test_unfinished_stop_string_is_given_back_at_the_end():
    assert ask(FakeBackend(reply=ids("one ST")), stop=["STOP"]).json()["choices"][0]["message"]["content"] == "one ST"


def test_stop_string_may_stay_in_the_text():
    answer = ask(FakeBackend(reply=ids("a STOP b")), stop=["STOP"], include_stop_str_in_output=True).json()
    assert answer["choices"][0]["message"]["content"] == "a STOP"


def test_stop_strings_wait_for_min_tokens():
    answer = ask(FakeBackend(reply=ids("xx yy xx zz")), stop=["x"], min_tokens=4).json()
    assert answer["choices"][0]["message"]["content"] == "xx yy "


def test_choices_without_stop_strings_are_one_backend_request():
    backend = FakeBackend()
    answer = ask(backend, n=3, max_tokens=4).json()
    assert len(answer["choices"]) == 3 and [request.n for request in backend.requests] == [3]
    assert answer["usage"]["completion_tokens"] == 12


def test_logprobs_have_token_bytes_and_alternatives():
    [choice] = ask(max_tokens=3, logprobs=True, top_logprobs=3).json()["choices"]
    entry = choice["logprobs"]["content"][0]
    assert entry["token"] == "H" and entry["bytes"] == [72] and -1 < entry["logprob"] < 0
    assert [top["logprob"] for top in entry["top_logprobs"]][1:] == [-2.0, -9999.0]


def test_alternatives_without_logprobs_are_refused():
    reply = ask(top_logprobs=2)
    assert reply.status == 400 and reply.json()["error"]["param"] == "top_logprobs"
    assert ask(top_logprobs=0, logprobs=False).status == 200


def test_streamed_logprobs_are_the_whole_ones():
    whole = ask(max_tokens=6, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    chunks = ask(max_tokens=6, logprobs=True, top_logprobs=1, stream=True).chunks()
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == whole


def test_max_tokens_defaults_to_what_is_left_of_the_context():
    backend = FakeBackend()
    ask(backend)
    [request] = backend.requests
    assert request.sampling.max_tokens == backend.card.max_model_len - len(request.prompt_token_ids)


def test_too_long_names_both_numbers():
    reply = ask(max_tokens=250)
    error = reply.json()["error"]
    assert reply.status == 400 and error["code"] == "context_length_exceeded"
    assert "19 tokens" in error["message"] and "250" in error["message"] and "256" in error["message"]


def test_newer_name_of_max_tokens_wins():
    backend = FakeBackend()
    ask(backend, max_tokens=3, max_completion_tokens=5)
    assert backend.requests[0].sampling.max_tokens == 5


def test_echo_puts_the_continued_message_first():
    messages = [USER, {"role": "assistant", "content": "Well, "}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True, "max_tokens": 2}
    assert ask(**fields).json()["choices"][0]["message"]["content"] == "Well, He"
    assert text(ask(**fields, stream=True).chunks()) == "Well, He"


def test_prompt_logprobs_and_token_ids_are_told_when_asked():
    answer = ask(max_tokens=2, prompt_logprobs=1, return_token_ids=True).json()
    assert answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"]) == 19
    [(token_id, entry)] = answer["prompt_logprobs"][1].items()
    assert entry["rank"] == 1 and int(token_id) == answer["prompt_token_ids"][1]
    assert answer["choices"][0]["token_ids"] == ids("He")


def test_seed_is_drawn_when_none_is_given():
    first, second = FakeBackend(), FakeBackend()
    ask(first), ask(second)
    assert first.requests[0].sampling.seed != second.requests[0].sampling.seed


def test_tenants_do_not_share_prefixes():
    backend = FakeBackend()

    async def scenario():
        async with fake_gateway(backend, api_key=("a", "b")) as gateway:
            for key in ("a", "b", "a"):
                await call(gateway, PATH, body(max_tokens=1), headers={"authorization": f"Bearer {key}"})

    asyncio.run(scenario())
    first, second, third = (request.cache_salt for request in backend.requests)
    assert first == third != second and "a" not in (first, second)


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Overloaded("full", retry_after_s=2.5), 429, 2.5),
        (Draining("bye"), 503, 5.0),
        (ReplicaLost("gone"), 503, 2.0),
        (EngineDead("dead"), 503, 5.0),
    ],
)
def test_refusals_are_http_errors(error, status, retry):
    reply = ask(FakeBackend(refusal=error), stream=True)
    assert reply.status == status and retry <= float(reply.headers["retry-after-ms"]) / 1000 <= 1.25 * retry + 1
    assert int(reply.headers["retry-after"]) - 1 <= float(reply.headers["retry-after-ms"]) / 1000
    assert reply.json()["error"]["code"] == error.code


@pytest.mark.parametrize("is_stream", [False, True])
def test_failure_before_the_first_byte_is_an_http_error(is_stream):
    reply = ask(FakeBackend(fail_after=(0, DeadlineExceeded("too late"))), stream=is_stream)
    assert reply.status == 504 and reply.json()["error"]["code"] == "deadline_exceeded"


def test_failure_after_the_first_byte_is_one_error_event_and_no_done():
    reply = ask(FakeBackend(fail_after=(3, RequestFailed("broken"))), stream=True)
    assert reply.status == 200 and reply.is_complete
    assert json.loads(reply.data()[-1])["error"]["code"] == "request_failed"
    assert sum("error" in json.loads(part) for part in reply.data()) == 1


def test_unexpected_failure_says_nothing_of_its_cause():
    reply = ask(FakeBackend(fail_after=(0, RuntimeError("/secret/path 0xdeadbeef"))))
    assert reply.status == 500 and "secret" not in reply.body.decode()


def test_replica_that_is_lost_before_the_first_event_is_replaced():
    lost = FakeBackend(fail_after=(0, ReplicaLost("gone")), replica_id="a")
    other = FakeBackend(replica_id="b")
    assert ask(lost, other, max_tokens=4).status == 200
    assert ask(other, lost, max_tokens=4).status == 200


def test_client_that_leaves_cancels_its_job():
    async def scenario(**fields):
        backend = FakeBackend(reply=ids("x") * 200)
        async with fake_gateway(backend) as gateway:
            client = Client(gateway.app)
            asking = asyncio.create_task(client.request("POST", PATH, body(**fields)))
            while not backend.open:
                await asyncio.sleep(0)
            backend.gate = asyncio.Event()
            client.left.set()
            await asking
            assert not backend.open and backend.num_cancelled == 1
            assert gateway.metric("tandem_cancellations_total", model="tiny") == 1

    asyncio.run(scenario(stream=True))
    asyncio.run(scenario(stream=False))


def test_client_that_leaves_while_the_request_is_queued_cancels_it():
    async def scenario():
        backend = FakeBackend(gate=asyncio.Event())
        async with fake_gateway(backend) as gateway:
            client = Client(gateway.app)
            asking = asyncio.create_task(client.request("POST", PATH, body(stream=True)))
            while not backend.open:
                await asyncio.sleep(0)
            client.left.set()
            await asking
            assert not backend.open and not client.reply.parts

    asyncio.run(scenario())


def test_silent_stream_gets_heartbeats_while_queued():
    async def scenario():
        backend = FakeBackend(gate=asyncio.Event())
        async with fake_gateway(backend, heartbeat_s=0.1) as gateway:
            client = Client(gateway.app)
            asking = asyncio.create_task(client.request("POST", PATH, body(stream=True, max_tokens=3)))
            await client.until(lambda reply: len(reply.parts) >= 2)
            assert all(part.startswith(b":") for part in client.reply.parts)
            backend.gate.set()
            reply = await asking
            assert reply.data()[-1] == "[DONE]" and text(reply.chunks()) == "Hel"

    asyncio.run(scenario())


def test_deadline_is_kept_even_when_the_replica_hangs(monkeypatch):
    from serve.gateway import exchange

    monkeypatch.setattr(exchange, "GRACE_S", 0.05)
    reply = ask(FakeBackend(gate=asyncio.Event()), timeout=0.05)
    assert reply.status == 504


def test_request_id_names_the_answer():
    async def scenario():
        async with fake_gateway() as gateway:
            reply = await call(gateway, PATH, body(max_tokens=1), headers={"x-request-id": "job-7"})
            assert reply.headers["x-request-id"] == "job-7" and reply.json()["id"] == "chatcmpl-job-7"
            reply = await call(gateway, PATH, body(max_tokens=1, request_id="mine"))
            assert reply.json()["id"] == "chatcmpl-mine"
            reply = await call(gateway, PATH, body(max_tokens=1), headers={"x-request-id": "a\x1b[31m b"})
            assert reply.headers["x-request-id"] != "a\x1b[31m b"

    asyncio.run(scenario())


def test_model_defaults_come_from_its_generation_config(monkeypatch):
    import gateway_fakes

    files = {**gateway_fakes.bundle(), "generation_config.json": b'{"temperature": 0.6, "top_k": 20, "top_p": "x"}'}
    monkeypatch.setattr(FakeBackend, "bundle", property(lambda self: files))
    backend = FakeBackend()
    ask(backend, temperature=0.1)
    ask(backend)
    given, default = (request.sampling for request in backend.requests)
    assert (given.temperature, given.top_k) == (0.1, 20) and (default.temperature, default.top_p) == (0.6, 1.0)
