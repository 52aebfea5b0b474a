"""Keys, hosts, request ids, headers, unknown routes: what holds for every route."""

from __future__ import annotations

import asyncio
import logging

import pytest
from gateway_fakes import FakeBackend, call, fake_gateway

from serve.errors import ConfigError
from serve.gateway.auth import OPEN_PATHS, Keys, check_exposure, settle_keys
from serve.gateway.errors import Unauthorized
from serve.options import GatewayOptions

CHAT = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 2}
EVIL_PATHS = [
    "/v1/models", "//v1/models", "/v1/../v1/models", "/V1/models", "/v1/models/", "/v1/chat/completions", "/tokenize",
    "/detokenize", "/health/../v1/models", "/docs/x", "/livez/", "/v1/models/../../livez", "/x", "", "/\x00",
    "/metrics/x",
]  # fmt: skip


def gateway_calls(*calls, options=None, backend=None):
    async def scenario():
        async with fake_gateway(*([backend] if backend else []), **(options or {})) as gateway:
            return [await call(gateway, path, body, headers=headers, method=m) for m, path, body, headers in calls]

    return asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_with_keys_everything_but_the_open_paths_asks_for_one(method):
    hosts = ["localhost", "x/health?", "x/health#", "a@b"]
    calls = [(method, path, None, {"host": host}) for path in EVIL_PATHS for host in hosts]
    for reply in gateway_calls(*calls, options={"api_key": ("k1",)}):
        assert reply.status == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"


def test_every_described_route_is_open_by_name_or_asks_for_a_key():
    async def scenario():
        async with fake_gateway(api_key=("k1",)) as gateway:
            paths = gateway.app.openapi()["paths"]
            for path, operations in paths.items():
                for method in operations:
                    reply = await call(gateway, path, None, method=method.upper())
                    assert (reply.status != 401) == (path in OPEN_PATHS | {"/metrics"}), path

    asyncio.run(scenario())


def test_any_of_the_keys_opens_and_others_do_not():
    good = [
        ("GET", "/v1/models", None, {"authorization": value}) for value in ("Bearer k1", "bearer k2", "Bearer  k1 ")
    ]
    bad = [
        ("GET", "/v1/models", None, {"authorization": value})
        for value in ("Bearer K1", "Basic k1", "k1", "Bearer", "Bearer \xff")
    ]
    replies = gateway_calls(*good, *bad, options={"api_key": ("k1", "k2")})
    assert [reply.status for reply in replies] == [200] * 3 + [401] * 5


def test_metrics_have_their_own_switch():
    ask = ("GET", "/metrics", None, {})
    assert gateway_calls(ask, options={"api_key": ("k",)})[0].status == 200
    assert gateway_calls(ask, options={"api_key": ("k",), "metrics_require_key": True})[0].status == 401


def test_keys_come_from_options_file_and_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# team-a\nfrom-file\n\n  other  \n")
    keys = Keys.load(GatewayOptions(api_key=("flag",), api_key_file=str(path)), {"TANDEM_API_KEY": "env"})
    for key in ("flag", "from-file", "other", "env"):
        assert keys.tenant("/v1/models", f"Bearer {key}")
    for other in ("nope", "# team-a", "team-a"):
        with pytest.raises(Unauthorized):
            keys.tenant("/v1/models", f"Bearer {other}")


@pytest.mark.parametrize("text", [None, "", "\n \n", "# only a comment", "caf\u00e9"])
def test_unusable_key_files_are_refused(tmp_path, text):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError):
        Keys.load(GatewayOptions(api_key_file=str(path)), {})


def test_settled_options_need_neither_file_nor_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text("from-file\nflag\n")
    options = GatewayOptions(host="0.0.0.0", api_key=("flag",), api_key_file=str(path))
    settled = settle_keys(options, {"TANDEM_API_KEY": "env"})
    assert settled.api_key == ("flag", "from-file", "env") and settled.api_key_file is None
    assert settle_keys(GatewayOptions(), {}) == GatewayOptions()
    with pytest.raises(ConfigError, match="--host"):
        settle_keys(GatewayOptions(host="0.0.0.0"), {})


def test_a_key_may_have_a_name_for_metrics(tmp_path):
    path = tmp_path / "keys"
    path.write_text("k1 team-a\nk2\n")
    keys = Keys.load(GatewayOptions(api_key=("k3   team-b",), api_key_file=str(path)), {})
    names = {key: keys.name(keys.tenant("/v1/models", f"Bearer {key}")) for key in ("k1", "k2", "k3")}
    assert names == {"k1": "team-a", "k2": "unnamed", "k3": "team-b"}
    assert keys.name("") == Keys([]).name("") == "none"
    with pytest.raises(Unauthorized):
        keys.tenant("/v1/models", "Bearer k1 team-a")
    with pytest.raises(ConfigError, match="its name"):
        Keys.load(GatewayOptions(api_key=("k4 two words",)), {})


def test_keys_are_not_kept():
    keys = Keys(["super-secret"])
    assert "super-secret" not in repr(vars(keys))


def test_reachable_socket_without_keys_is_refused_unless_asked_for():
    open_options = GatewayOptions(host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"--host '0\.0\.0\.0'.*--api-key"):
        check_exposure(open_options, Keys([]))
    check_exposure(open_options, Keys(["k"]))
    check_exposure(GatewayOptions(host="0.0.0.0", allow_unauthenticated=True), Keys([]))
    check_exposure(GatewayOptions(), Keys([]))


def test_other_names_do_not_reach_a_private_server():
    ok = [
        ("GET", "/v1/models", None, {"host": host})
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST")
    ]
    bad = [
        ("GET", "/v1/models", None, {"host": host})
        for host in ("evil.example", "127.0.0.1.evil.example", "169.254.1.1")
    ]
    assert [reply.status for reply in gateway_calls(*ok, *bad)] == [200] * 4 + [403] * 3
    assert {reply.status for reply in gateway_calls(*bad, options={"allow_unauthenticated": True})} == {200}


def test_unknown_routes_and_methods_answer_in_our_shape():
    unknown, method, trailing = gateway_calls(
        ("GET", "/nope", None, {}), ("GET", "/v1/chat/completions", None, {}), ("GET", "/v1/models/", None, {})
    )
    assert unknown.status == 404 and unknown.json()["error"]["code"] == "route_not_found"
    assert method.status == 405 and method.json()["error"]["code"] == "method_not_allowed"
    assert trailing.status == 404


def test_no_cors_and_security_headers():
    [reply] = gateway_calls(("GET", "/v1/models", None, {"origin": "https://evil.example"}))
    assert not any(name.startswith("access-control") for name in reply.headers)
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["cache-control"] == "no-store"


def test_models_are_listed_and_retrieved_also_by_names_with_slashes():
    from gateway_fakes import card

    backend = FakeBackend(card=card("org/model", aliases=("org/alias",)))
    listed, one, alias, missing = gateway_calls(
        ("GET", "/v1/models", None, {}),
        ("GET", "/v1/models/org/model", None, {}),
        ("GET", "/v1/models/org/alias", None, {}),
        ("GET", "/v1/models/../../etc/passwd", None, {}),
        backend=backend,
    )
    assert [model["id"] for model in listed.json()["data"]] == ["org/model", "org/alias"]
    assert one.json()["id"] == "org/model" and one.json()["object"] == "model" and one.json()["max_model_len"] == 256
    assert alias.json()["id"] == "org/alias" and alias.json()["root"] == "org/model"
    assert missing.status == 404 and "passwd" not in missing.body.decode()


def test_log_lines_hold_ids_and_numbers_but_no_text(caplog):
    headers = {"authorization": "Bearer very-secret", "x-request-id": "job-1"}
    with caplog.at_level(logging.INFO, logger="serve.gateway"):
        gateway_calls(("POST", "/v1/chat/completions", CHAT, headers), ("GET", "/secret-path\nx", None, {}))
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request ")]
    assert "id=job-1" in line and "status=200" in line and "model=tiny" in line and "output_tokens=2" in line
    assert "secret" not in caplog.text and "Hello" not in caplog.text


def test_metrics_count_requests_by_model_endpoint_and_outcome():
    async def scenario():
        async with fake_gateway(FakeBackend(num_cached=4)) as gateway:
            await call(gateway, "/v1/chat/completions", CHAT)
            await call(gateway, "/v1/chat/completions", {**CHAT, "stream": True})
            await call(gateway, "/v1/chat/completions", {**CHAT, "temperature": 9})
            await call(gateway, "/v1/completions", {"prompt": "a", "model": "random-name-1"})
            await call(gateway, "/v1/completions", {"prompt": "a", "model": "random-name-2"})
            m = gateway.metric
            assert m("tandem_requests_total", model="tiny", endpoint="chat", outcome="success") == 2
            assert m("tandem_requests_total", endpoint="chat", outcome="invalid") == 1
            assert m("tandem_rejections_total", model="unknown", reason="model_not_found") == 2
            assert m("tandem_output_tokens_total", model="tiny") == 4
            assert m("tandem_cached_tokens_total", model="tiny") == 8
            assert m("tandem_time_to_first_token_seconds_count", model="tiny") == 2
            assert m("tandem_inter_token_latency_seconds_count", model="tiny") == 2
            assert m("tandem_e2e_request_latency_seconds_count", model="tiny") == 2
            assert m("tandem_http_requests_in_flight") == 0
            text = (await call(gateway, "/metrics")).body.decode()
            assert "random-name" not in text and "tandem_requests_total" in text

    asyncio.run(scenario())


def test_probes_follow_the_replicas_and_the_drain():
    async def scenario():
        backend = FakeBackend()
        async with fake_gateway(backend) as gateway:

            async def statuses():
                return [(await call(gateway, path)).status for path in ("/livez", "/readyz", "/health")]

            assert await statuses() == [200, 200, 200]
            backend.is_alive = False
            assert await statuses() == [200, 503, 503]
            refused = await call(gateway, "/v1/chat/completions", CHAT)
            assert refused.status == 503 and refused.headers["retry-after"]
            backend.is_alive = True
            gateway.drain.begin()
            assert await statuses() == [200, 503, 200]
            census = (await call(gateway, "/health")).json()["models"]
            assert census == {"tiny": {"ready": 1, "draining": 0, "loading": 0, "may_sleep": False}}
            refused = await call(gateway, "/v1/chat/completions", CHAT)
            assert refused.json()["error"]["code"] == "draining" and refused.headers["connection"] == "close"

    asyncio.run(scenario())


def test_pages_need_no_network_and_run_only_their_own_scripts():
    page, docs = gateway_calls(("GET", "/", None, {}), ("GET", "/docs", None, {}))
    for reply in (page, docs):
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe-inline" not in reply.headers["content-security-policy"].split("script-src")[1].split(";")[0]
