"""Ray's own word on Ray's own formats: what `serve deploy` and `ray start` would say of a file, without a cluster."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from serve.deployments.app import deployment_name
from serve.options import ServeOptions


def check_serve_config(text: str) -> Iterator[str]:
    """What is wrong with a Serve config file (KubeRay's `serveConfigV2`)."""
    try:
        data = yaml.safe_load(text)
        config = ServeDeploySchema.model_validate(data)
    except yaml.YAMLError as error:
        yield f"is not YAML: {error}"
        return
    except ValidationError as error:
        for detail in error.errors():
            yield f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        return
    yield from _unknown_keys(ServeDeploySchema, data, "")
    for application in config.applications:
        module, _, attribute = application.import_path.replace(":", ".").rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            yield f"import_path {application.import_path!r} leads nowhere: {error}"


def deployment_names(options: ServeOptions) -> set[str]:
    """The deployments of the application of these options."""
    return {"gateway", "hub", *(deployment_name(model) for model in options.models)}


def _unknown_keys(model: type[BaseModel], data: dict[str, Any], place: str) -> Iterator[str]:
    """Keys that Ray would ignore in silence."""
    for key, value in data.items():
        known = model.model_fields.get(key)
        if known is None:
            yield f"{place}{key}: Ray knows no such key; known are {', '.join(sorted(model.model_fields))}"
            continue
        inner = _model_in(known.annotation)
        for index, part in enumerate(value if isinstance(value, list) else [value]):
            if inner is not None and isinstance(part, dict):
                at = f"{place}{key}[{index}]." if isinstance(value, list) else f"{place}{key}."
                yield from _unknown_keys(inner, part, at)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)


@cache
def ray_start_options() -> frozenset[str]:
    """The long flags of `ray start`, without dashes."""
    command: Any = start
    return frozenset(name.removeprefix("--") for option in command.params for name in option.opts)
