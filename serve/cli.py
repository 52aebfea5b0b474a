"""The command `tandem`: `serve` starts models and their gateway, `check` reads a config file and says what it holds,
`plan` says how a model is best split over some devices, `loadtest` puts a server under load (`loadtest/command.py`),
`k8s` checks Kubernetes manifests (`serve/kubernetes/command.py`).

Flags are the fields of `serve/options.py`, so each option is written once; their help is the fields' own docstring.
Heavy imports (Ray, torch) happen in the processes that need them, never here.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import dataclasses
import inspect
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from models.source import SourceError, embedded_names, local_kind
from serve.application import Application
from serve.config import load_config, parse_value
from serve.errors import ConfigError, TandemError
from serve.kubernetes.command import add_actions as add_kubernetes
from serve.logs import configure_logging
from serve.options import GatewayOptions, ModelOptions, ServeOptions
from serve.plan import PlanRequest, plan
from serve.preflight import check_machine, check_model
from serve.ranks.cost import LINKS
from serve.request import ModelCard

DEFAULT_MODELS = ("tandem-text", "tandem-image")
"""What `tandem serve` serves when nothing is named: the models that ship with the package."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `tandem` command. Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by force."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given[:1] == ["loadtest"]:  # it has actions and flags of its own
            from loadtest.command import main as load_test

            load_test(given[1:])
        arguments = _parser().parse_args(given)
        arguments.run(arguments)
    except TandemError as error:
        raise SystemExit(f"tandem: {error.message}") from None
    except KeyboardInterrupt:  # before there is anything to stop; later signals are handled
        raise SystemExit(130) from None


def _serve(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    configure_logging()
    if arguments.no_ray and arguments.ray_address:
        raise ConfigError("--no-ray and --ray-address exclude each other; give one of them")
    elastic = next((model.name for model in options.models if model.autoscaling_config is not None), None)
    if arguments.no_ray and elastic is not None:
        raise ConfigError(
            f"autoscaling_config of {elastic!r} needs Ray Serve, which starts and stops its replicas; leave out "
            f"--no-ray, or give num_replicas instead"
        )
    asyncio.run(_run(options, arguments))


async def _run(options: ServeOptions, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    application, stop = _application(options, arguments), asyncio.Event()
    _handle_signals(application, stop)
    starting = asyncio.create_task(application.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, TandemError):
            await starting
        application.kill()
        return
    try:
        url = starting.result()
    except BaseException:
        application.kill()
        raise
    _handle_signals(application, stop)  # again, for Ray has put handlers of its own in front
    _announce(url, application.cards(), time.monotonic() - began)
    failing = asyncio.create_task(application.failed())
    await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
    if failing.done() and not stop.is_set():
        application.kill()
        raise TandemError(failing.result())
    failing.cancel()
    _say(f"stopping: running requests have {options.gateway.drain_timeout_s:g} s to end; stop again to exit now")
    await application.drain(options.gateway.drain_timeout_s)
    _say("stopped")


def _application(options: ServeOptions, arguments: argparse.Namespace) -> Application:
    if arguments.no_ray:
        from serve.local import LocalApplication

        return LocalApplication(options)
    from serve.deployments.run import RayApplication

    return RayApplication(options, ray_address=arguments.ray_address)


def _handle_signals(application: Application, stop: asyncio.Event) -> None:
    """The first SIGTERM or Ctrl-C sets the event; the second ends everything at once."""

    def on_signal(number: int) -> None:
        if stop.is_set():
            application.kill()
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


def _announce(url: str, cards: list[ModelCard], seconds: float) -> None:
    _say(f"tandem {_version()} ready in {seconds:.1f} s")
    for card in cards:
        _say(
            f"  {card.name}  {card.kind}, {card.num_parameters / 1e6:.1f} M parameters, {card.device} {card.dtype}, "
            f"{card.threads} threads, {_abilities(card)}"
        )
        for rank in card.ranks:
            cache = f", KV cache {rank.kv_cache_tokens} tokens" if rank.kv_cache_tokens else ""
            _say(f"    rank {rank.rank}  {rank.device}, {rank.weight_bytes / 1e6:.1f} MB of weights{cache}")
    _say(f"  chat in the browser  {url}/")
    _say(f"  OpenAI API           {url}/v1")


def _abilities(card: ModelCard) -> str:
    """What a model can be asked for, in a line."""
    if card.image is None:
        return f"context {card.max_model_len} tokens, KV cache {card.kv_cache_tokens} tokens"
    image = card.image
    return f"{image.width}x{image.height} in {image.num_inference_steps} steps, up to {image.max_pixels} pixels"


def _check(arguments: argparse.Namespace) -> None:
    options = load_config(arguments.file)
    for model in options.models:
        if os.path.isdir(model.model) or model.model in embedded_names():
            check_model(model)
    print(f"{arguments.file}: valid, {len(options.models)} models")
    for model in options.models:
        print(f"  {model.name}: {model.model}, {_told_number(model)} replicas" + _told_ranks(model))
        try:
            check_machine(model)
        except ConfigError as error:  # the file may be meant for another one
            print(f"    not on this machine: {error.message}")


def _told_number(model: ModelOptions) -> str:
    scaling = model.autoscaling_config
    return str(model.num_replicas) if scaling is None else f"{scaling.min_replicas} to {scaling.max_replicas}"


def _told_ranks(model: ModelOptions) -> str:
    return f" of {model.num_ranks} ranks" if model.num_ranks > 1 else ""


def _plan(arguments: argparse.Namespace) -> None:
    given = {spec.name: getattr(arguments, spec.name) for spec in dataclasses.fields(PlanRequest)}
    print(plan(PlanRequest(**given)))


def _options(arguments: argparse.Namespace) -> ServeOptions:
    """Flags, or the config file with the gateway's flags on top. Raises ConfigError."""
    model_flags, gateway_flags = _given(arguments, ModelOptions), _given(arguments, GatewayOptions)
    if arguments.config is None:
        return _build(arguments.models or DEFAULT_MODELS, model_flags, gateway_flags)
    if arguments.models or model_flags:
        first = arguments.models[0] if arguments.models else _flag(next(iter(model_flags)))
        raise ConfigError(f"{first!r} and --config exclude each other; write the model and its options into the file")
    options = load_config(arguments.config)
    try:
        return dataclasses.replace(options, gateway=dataclasses.replace(options.gateway, **gateway_flags))
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def _build(models: Sequence[str], model_flags: dict[str, Any], gateway_flags: dict[str, Any]) -> ServeOptions:
    if len(models) > 1 and "served_model_name" in model_flags:
        raise ConfigError("--served-model-name names one model; use --config to name several")
    fitting = _fitting(models, model_flags)
    try:
        return ServeOptions(
            models=tuple(ModelOptions(model=model, **fitting[model]) for model in models),
            gateway=GatewayOptions(**gateway_flags),
        )
    except ValueError as error:
        first, _, rest = str(error).partition(" ")
        raise ConfigError(
            f"{_flag(first)} {rest}" if first in {**model_flags, **gateway_flags} else str(error)
        ) from None


def _fitting(models: Sequence[str], flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The flags of each model: those of one kind are for the models of that kind. A flag that fits none is left to all,
    to be refused by name. Raises ConfigError."""
    try:
        kinds = {model: flags.get("kind") or local_kind(model) for model in models}
    except SourceError as error:
        raise ConfigError(f"model: {error}") from None
    only = {spec.name: spec.metadata.get("only") for spec in dataclasses.fields(ModelOptions)}
    return {
        model: {
            name: value
            for name, value in flags.items()
            if only[name] is None or kind in (None, only[name]) or only[name] not in kinds.values()
        }
        for model, kind in kinds.items()
    }


def _given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    names = {spec.name for spec in dataclasses.fields(options)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in names and name != "model"
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tandem", description="Serve text and image models over the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"tandem {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start models and their gateway", description=inspect.getdoc(_serve_help))
    serve.set_defaults(run=_serve)
    serve.add_argument("models", nargs="*", metavar="MODEL", help="folder, hub id, or the name of an embedded model")
    serve.add_argument("--config", metavar="FILE", help="YAML file with any number of models")
    serve.add_argument("--no-ray", action="store_true", help="run as processes of this machine, without Ray")
    serve.add_argument("--ray-address", metavar="ADDRESS", help="join this Ray cluster instead of an embedded one")
    for title, options in (("model options", ModelOptions), ("gateway options", GatewayOptions)):
        group = serve.add_argument_group(title)
        for spec in dataclasses.fields(options):
            if spec.name != "model":
                _add_flag(group, options, spec)

    check = commands.add_parser("check", help="read a config file and report what is wrong with it")
    check.set_defaults(run=_check)
    check.add_argument("file", metavar="FILE")
    _add_plan(commands.add_parser("plan", help="say how a model is best split over some devices; reads no weights"))
    kubernetes = commands.add_parser("k8s", help="check Kubernetes manifests without a cluster")
    add_kubernetes(kubernetes.add_subparsers(required=True, metavar="ACTION"))
    commands.add_parser("loadtest", help="put a server under load and say what it carries", add_help=False)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or the name of an embedded model")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="how many there are")
    parser.add_argument(
        "--memory", type=float, required=True, metavar="G", dest="memory_gb", help="of one device, in GB (10^9 bytes)"
    )
    parser.add_argument("--link", choices=sorted(LINKS), default="nvlink", help="between devices")
    for spec in dataclasses.fields(ModelOptions):
        if spec.name in ("dtype", "quantization", "revision", "max_model_len", "max_num_seqs"):
            _add_flag(parser, ModelOptions, spec)
            parser.set_defaults(**{spec.name: spec.default})


def _serve_help() -> None:
    """Start MODEL ... (default: the embedded models) behind one OpenAI-compatible gateway, on Ray Serve."""


def _add_flag(group: Any, options: type, spec: dataclasses.Field[Any]) -> None:
    """One flag from one field. Absent flags leave no trace, so that defaults stay in `options.py` alone."""
    hint = typing.get_type_hints(options)[spec.name]
    parts = [part for part in typing.get_args(hint) if part is not types.NoneType] if _is_union(hint) else [hint]
    kind: Any = parts[0]
    text = _docs(options).get(spec.name, "").replace("%", "%%")
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": spec.name}
    if kind is bool:
        keywords["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is typing.Literal:
        keywords["choices"] = typing.get_args(kind)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        keywords.update(type=partial(parse_value, kind, _flag(spec.name)), metavar="JSON")
    elif typing.get_origin(kind) is tuple:
        keywords.update(nargs="+", metavar="NAME")
    else:
        keywords.update(type=kind, metavar="N" if kind in (int, float) else "TEXT")
    group.add_argument(_flag(spec.name), **keywords)


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _docs(options: type) -> dict[str, str]:
    """The docstrings below an options class's fields, on one line each."""
    body = ast.parse(inspect.getsource(options)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _say(text: str) -> None:
    print(text, flush=True)


def _version() -> str:
    try:
        return version("tandem-serve")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


if __name__ == "__main__":
    main()
