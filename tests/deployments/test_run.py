"""What is told of a deployment that did not start: our own sentence, not the traceback around it."""

from serve.deployments.run import own_error

REPORT = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor. Error:
ray::ServeReplica:tandem:model-x.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/somewhere/serve/replica.py", line 62, in build
    raise ConfigError(f"model: {error}", param="model") from error
models.source.SourceError: /models/x holds neither model.safetensors nor an index

The above exception was the direct cause of the following exception:

ray::ServeReplica:tandem:model-x.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
serve.errors.ConfigError: model: /models/x holds neither model.safetensors nor an index
"""


def test_the_error_of_a_failed_deployment_is_one_line():
    assert own_error(REPORT) == "model: /models/x holds neither model.safetensors nor an index"


def test_an_error_that_is_not_ours_is_left_to_be_shown_whole():
    assert own_error("Traceback ...\nValueError: no") is None
