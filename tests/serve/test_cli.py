"""The command refuses what it cannot do, in one line that names flag, value and remedy, before anything starts."""

from __future__ import annotations

import dataclasses

import pytest
from fake_backend import card

from serve.cli import _announce, _options, _parser, main
from serve.errors import ConfigError
from serve.options import GatewayOptions, ModelOptions
from serve.request import ImageLimits, RankCard


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m", "--port", "99999"], "--port is 99999; give a value from 0 to 65535"),
        (["m", "--max-num-seqs", "0"], "--max-num-seqs is 0; give a value from 1"),
        (["m", "--max-num-batched-tokens", "4"], "--max-num-batched-tokens is 4, below max_num_seqs (256)"),
        (["a", "a"], "two models answer to 'a'"),
        (["a", "b", "--served-model-name", "x"], "--served-model-name names one model"),
        (["m", "--config", "file.yaml"], "'m' and --config exclude each other"),
        (["--dtype", "float16", "--config", "file.yaml"], "'--dtype' and --config exclude each other"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["m", "--no-ray", "--ray-address", "auto"], "--no-ray and --ray-address exclude each other"),
        (["m", "--no-ray", "--autoscaling-config", '{"max_replicas": 2}'], "autoscaling_config of 'm' needs Ray Serve"),
        (["m", "--num-replicas", "2", "--autoscaling-config", "{}"], "--num-replicas is 2, but autoscaling_config"),
        (["m", "--autoscaling-config", '{"min_replicas": 3}'], "min_replicas is 3, above max_replicas (1)"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, expected):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    message = str(ended.value.code)
    assert message.startswith("tandem: ") and expected in message and "\n" not in message


def folder(tmp_path, name, file):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text("{}")
    return str(tmp_path / name)


def test_a_flag_of_one_kind_is_for_the_models_of_that_kind(tmp_path):
    text, image = folder(tmp_path, "writer", "config.json"), folder(tmp_path, "drawer", "model_index.json")
    flags = ["--max-model-len", "64", "--max-num-images", "3", "--threads", "1"]
    writer, drawer = _options(_parser().parse_args(["serve", text, image, *flags])).models
    assert (writer.max_model_len, writer.max_num_images, writer.threads) == (64, 32, 1)
    assert (drawer.max_model_len, drawer.max_num_images, drawer.threads) == (None, 3, 1)


def test_a_flag_that_fits_no_model_is_refused_before_anything_starts(tmp_path):
    image = folder(tmp_path, "drawer", "model_index.json")
    with pytest.raises(SystemExit, match=r"max_model_len is an option of text models and means nothing for"):
        main(["serve", image, "--load-format", "dummy", "--no-ray", "--max-model-len", "64"])


@pytest.mark.parametrize("arguments", [["--max-seqs", "4"], ["m", "--port", "eighty"], ["m", "--dtype", "int3"]])
def test_unknown_flags_and_malformed_values_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2 and arguments[-2] in capsys.readouterr().err


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for spec in (*dataclasses.fields(ModelOptions), *dataclasses.fields(GatewayOptions)):
        assert spec.name == "model" or "--" + spec.name.replace("_", "-") in shown


def test_check_says_what_is_wrong_without_starting_anything(tmp_path, capsys):
    file = tmp_path / "tandem.yaml"
    file.write_text("models:\n  - {model: a, served_model_name: [x, y]}\n  - {model: org/b, num_replicas: 2}\n")
    main(["check", str(file)])
    assert capsys.readouterr().out.splitlines()[1:] == ["  x: a, 1 replicas", "  org/b: org/b, 2 replicas"]
    file.write_text("models:\n  - {model: a, max_seqs: 4}\n")
    with pytest.raises(SystemExit, match=r"models\[0\]\.max_seqs: unknown key; did you mean 'max_num_seqs'"):
        main(["check", str(file)])


def test_the_start_tells_what_each_model_can_be_asked_for(capsys):
    image = ImageLimits(
        width=64, height=48, num_inference_steps=12, guidance_scale=4.0, size_multiple=8, max_pixels=9216,
        max_steps=250, solvers=("flow_match_euler",),
    )  # fmt: skip
    picture = dataclasses.replace(card("drawer"), kind="image", max_model_len=0, kv_cache_tokens=0, image=image)
    _announce("http://127.0.0.1:1", [card("writer"), picture], 1.0)
    _, text, images, *_ = capsys.readouterr().out.splitlines()
    assert text.endswith("context 4096 tokens, KV cache 8192 tokens")
    assert images.endswith("1 threads, 64x48 in 12 steps, up to 9216 pixels")


def test_the_start_tells_what_each_rank_holds(capsys):
    ranks = (
        RankCard(rank=0, device="cuda:0", weight_bytes=8_030_000_000, kv_cache_tokens=9000),
        RankCard(rank=1, device="cuda:1", weight_bytes=7_900_000_000, kv_cache_tokens=9600),
    )
    alone, split = card("alone"), dataclasses.replace(card("split"), ranks=ranks)
    _announce("http://127.0.0.1:1", [alone, split], 1.0)
    _, first, second, *told, _, _ = capsys.readouterr().out.splitlines()
    assert "alone" in first and "split" in second
    assert told == [
        "    rank 0  cuda:0, 8030.0 MB of weights, KV cache 9000 tokens",
        "    rank 1  cuda:1, 7900.0 MB of weights, KV cache 9600 tokens",
    ]


def test_check_tells_ranks_and_what_this_machine_lacks(tmp_path, capsys, monkeypatch):
    def lacking(model):
        if model.num_ranks > 1:
            raise ConfigError("device is 'cuda' and there are none")

    monkeypatch.setattr("serve.cli.check_machine", lacking)
    file = tmp_path / "tandem.yaml"
    file.write_text("models:\n  - {model: org/a, tensor_parallel_size: 2, pipeline_parallel_size: 2}\n  - {model: b}\n")
    main(["check", str(file)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  org/a: org/a, 1 replicas of 4 ranks",
        "    not on this machine: device is 'cuda' and there are none",
        "  b: b, 1 replicas",
    ]
