"""A model that scales on Ray Serve: the policy's reading of what replicas report, and replicas that come and go."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from openai import OpenAI
from serving import Serving, eventually, serving
from tiny import tiny_folder

from serve.autoscaling import Signals
from serve.deployments.autoscaling import LoadPolicy, autoscaling_config
from serve.options import AutoscalingOptions

pytestmark = pytest.mark.ray


def context(reported: dict[str, Signals], *, target: int, running: int) -> SimpleNamespace:
    """What Serve shows a policy; the last point of a series is the newest."""
    names = Signals.__dataclass_fields__
    series = {
        name: {
            replica: [SimpleNamespace(value=99.0), SimpleNamespace(value=getattr(signals, name))]
            for replica, signals in reported.items()
        }
        for name in names
    }
    return SimpleNamespace(
        raw_metrics=series, target_num_replicas=target, current_num_replicas=running, deployment_name="model-m"
    )


def test_the_policy_takes_the_newest_report_of_every_replica():
    policy = LoadPolicy(max_replicas=9, upscale_delay_s=0.0)
    busy = {"a": Signals(work=1.0, jobs=4), "b": Signals(work=1.1, jobs=4)}
    assert policy(context(busy, target=2, running=2)) == (3, {})
    assert policy(context({}, target=2, running=0)) == (2, {})


def test_serve_gets_the_bounds_and_none_of_its_own_delays():
    options = AutoscalingOptions(min_replicas=0, max_replicas=5, downscale_to_zero_delay_s=7.0)
    config = autoscaling_config(options)
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, 0)
    assert AutoscalingOptions(**config.policy.policy_kwargs) == options
    assert config.policy.get_policy()(**config.policy.policy_kwargs)


SCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "target_kv_cache_usage": 0.1,
    "look_back_period_s": 1.0,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 1.0,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder: Path = tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", max_position_embeddings=4096)
    options = ("--served-model-name", "tiny", "--threads", "1", "--num-cpus", "0.1", "--max-num-seqs", "16")
    with serving(str(folder), *options, "--autoscaling-config", json.dumps(SCALING), timeout_s=180) as running:
        yield running


def num_replicas(server: Serving) -> float:
    return server.metric("tandem_replicas")


def complete(server: Serving, max_tokens: int) -> int:
    """Tokens of a streamed answer; the client itself never tries again."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)
    stream = client.completions.create(
        model="tiny", prompt=[5] * 64, max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )  # fmt: skip
    return [chunk.usage.completion_tokens for chunk in stream if chunk.usage][-1]


def test_replicas_come_with_load_go_without_and_come_again_and_no_request_fails(server):
    stop, answers = threading.Event(), []

    def ask(max_tokens: int) -> None:
        while not stop.is_set():
            answers.append(complete(server, max_tokens) == max_tokens)

    def clients(number: int, max_tokens: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=ask, args=(max_tokens,)) for _ in range(number)]
        for thread in threads:
            thread.start()
        return threads

    def end(threads: list[threading.Thread]) -> None:
        stop.set()
        for thread in threads:
            thread.join()
        stop.clear()

    many = clients(16, 1000)  # half of the cache, by the end of each
    eventually(lambda: num_replicas(server) == 2, within_s=120, every_s=0.5)
    end(many)
    few = clients(1, 8)
    eventually(lambda: num_replicas(server) == 1, within_s=120, every_s=0.5)
    end(few)
    eventually(lambda: num_replicas(server) == 0, within_s=120, every_s=0.5)

    assert [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["tiny"]
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert complete(server, 8) == 8
    assert len(answers) > 17 and all(answers)
    assert server.metric("tandem_scaling_events_total") >= 4
