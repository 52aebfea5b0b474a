"""A config file is refused as a whole, with the key's path, the value and the remedy; what is right loads."""

import pytest

from serve.config import load_config, parse_config
from serve.errors import ConfigError


def refusal(data) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    return str(caught.value)


def test_models_and_gateway_load(tmp_path):
    file = tmp_path / "tandem.yaml"
    file.write_text(
        "models:\n  - {model: a, max_num_seqs: 8, served_model_name: [x, y]}\n  - model: org/b\ngateway: {port: 0}\n"
    )
    options = load_config(file)
    assert [model.name for model in options.models] == ["x", "org/b"]
    assert options.models[0].max_num_seqs == 8 and options.gateway.port == 0


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"models": [{"model": "a", "max_seqs": 4}]}, "models[0].max_seqs: unknown key; did you mean 'max_num_seqs'?"),
        ({"models": [{"model": "a"}], "gatway": {}}, "gatway: unknown key; did you mean 'gateway'?"),
        ({"models": [{"model": "a"}], "gateway": {"port": "80"}}, "gateway.port: '80' is not a whole number"),
        ({"models": [{"model": "a"}], "gateway": {"port": True}}, "gateway.port: True is not a whole number"),
        (
            {"models": [{"model": "a"}], "gateway": {"port": 70000}},
            "gateway.port is 70000; give a value from 0 to 65535",
        ),
        ({"models": [{"model": "a", "max_num_seqs": 0}]}, "models[0].max_num_seqs is 0; give a value from 1"),
        ({"models": [{"model": "a", "dtype": "int3"}]}, "models[0].dtype: 'int3' is not one of"),
        ({"models": [{"model": "a", "kind": "sound"}]}, "models[0].kind: 'sound' is not one of"),
        ({"models": [{"max_num_seqs": 4}]}, "models[0].model: is required"),
        ({"models": []}, "models is empty"),
        ({"models": {"model": "a"}}, "models: {'model': 'a'} is not a list"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "two models answer to 'a'"),
        ({"models": [{"model": "a", "max_num_batched_tokens": 4}]}, "below max_num_seqs (256)"),
        ({"models": [{"model": "a", "gpu_memory_utilization": float("nan")}]}, "gpu_memory_utilization"),
        ([], "start it with 'models:'"),
        (None, "start it with 'models:'"),
    ],
)
def test_wrong_config_names_path_value_and_remedy(data, expected):
    assert expected in refusal(data)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("models:\n  - model: a\nmodels:\n  - model: b\n")
    with pytest.raises(ConfigError, match="stands twice"):
        load_config(file)


def test_yaml_that_builds_python_objects_is_refused(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text("models: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(file)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_the_example_of_the_docstring_is_valid():
    import textwrap

    import yaml

    import serve.config

    block = serve.config.__doc__.split("checked as a whole before anything starts.")[1].split("Keys are")[0]
    options = parse_config(yaml.safe_load(textwrap.dedent(block)))
    assert [model.model for model in options.models] == ["Qwen/Qwen3-0.6B", "tandem-text"]
