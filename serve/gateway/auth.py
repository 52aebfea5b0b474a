"""API keys, and who may call without one.

Keys are kept as hashes and compared in constant time, all of them for every request. A key may be followed by a name,
as in "KEY team-a", under which metrics count its caller. What a path needs is decided from the path the router sees,
exact names only, and everything not named here needs a key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.errors import ConfigError
from serve.gateway.errors import HostNotAllowed, Unauthorized
from serve.options import GatewayOptions

OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/docs", "/openapi.json"})
"""Called without a key: probes, documentation and the page, which has a field for the key."""
METRICS_PATH = "/metrics"
ENVIRONMENT_KEY = "TANDEM_API_KEY"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
NO_KEY, UNNAMED = "none", "unnamed"
"""Names of callers without a key, and of those whose key has no name."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys:
    """The keys of this server. Without any, everything is open."""

    def __init__(self, keys: Sequence[str], *, metrics_require_key: bool = False) -> None:
        split = [key.split(maxsplit=1) for key in keys]
        self._hashes = [_hash(key) for key, *_ in split]
        self._names = {_tenant(_hash(key)): name for key, *names in split for name in names}
        self._open = OPEN_PATHS if metrics_require_key else OPEN_PATHS | {METRICS_PATH}

    @classmethod
    def load(cls, options: GatewayOptions, environment: Mapping[str, str] = os.environ) -> Keys:
        """Keys from the options, their file and TANDEM_API_KEY. Raises ConfigError."""
        return cls(_collect(options, environment), metrics_require_key=options.metrics_require_key)

    @property
    def are_required(self) -> bool:
        return bool(self._hashes)

    def tenant(self, path: str, authorization: str | None) -> str:
        """The caller: a name made of its key's hash; empty without keys or on an open path. Raises Unauthorized."""
        if not self._hashes:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip()) if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # all of them, always
        if any(matches):
            return _tenant(given)
        if path in self._open:
            return ""
        if not authorization:
            raise Unauthorized("an API key is required; send it as 'Authorization: Bearer KEY'")
        raise Unauthorized("the API key is not valid")

    def name(self, tenant: str) -> str:
        """What metrics call a caller that `tenant` has returned: one of a few names, never the key."""
        return self._names.get(tenant, UNNAMED) if tenant else NO_KEY


class Hosts:
    """The names a server without keys on loopback answers to. Other web pages must not reach it by DNS rebinding."""

    def __init__(self, options: GatewayOptions, keys: Keys) -> None:
        is_private = options.host in LOOPBACK_NAMES and not keys.are_required and not options.allow_unauthenticated
        self._allowed = LOOPBACK_NAMES | {options.host} if is_private else None

    def check(self, host: str | None) -> None:
        """Raises HostNotAllowed for a Host header with another name."""
        if self._allowed is None or host is None:
            return
        if _without_port(host) not in self._allowed:
            raise HostNotAllowed(
                "this server is bound to loopback without keys and answers to localhost only; "
                "set an API key, or allow_unauthenticated, to use another name"
            )


def check_exposure(options: GatewayOptions, keys: Keys) -> None:
    """Raises ConfigError for a socket others can reach when nothing asks them for a key."""
    if options.host not in LOOPBACK_NAMES and not keys.are_required and not options.allow_unauthenticated:
        raise ConfigError(
            f"others can reach --host {options.host!r}, and there is no API key; give --api-key, --api-key-file or "
            f"{ENVIRONMENT_KEY}, bind 127.0.0.1, or say --allow-unauthenticated"
        )


def settle_keys(options: GatewayOptions, environment: Mapping[str, str] = os.environ) -> GatewayOptions:
    """`options` with all keys in `api_key`: for gateways on machines that have neither this file nor this environment.

    Raises ConfigError for what a gateway would refuse about keys and exposure, before anything is started.
    """
    settled = dataclasses.replace(options, api_key=tuple(_collect(options, environment)), api_key_file=None)
    check_exposure(settled, Keys(settled.api_key))
    return settled


def _collect(options: GatewayOptions, environment: Mapping[str, str]) -> list[str]:
    keys = [*options.api_key]
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {options.api_key_file!r} cannot be read: {_reason(error)}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {options.api_key_file!r} holds no key; write one a line")
        keys += found
    if environment.get(ENVIRONMENT_KEY):
        keys.append(environment[ENVIRONMENT_KEY])
    if any(not key.strip() or not key.isascii() or not key.isprintable() for key in keys):
        raise ConfigError("an API key is empty or holds other than printable ASCII characters")
    for key in keys:
        if (names := key.split()[1:]) and not (len(names) == 1 and _NAME.fullmatch(names[0])):
            raise ConfigError(
                "what follows an API key is its name: one word of at most 64 letters, digits, '.', '_' and '-'"
            )
    return list(dict.fromkeys(keys))


def _tenant(key_hash: bytes) -> str:
    return key_hash.hex()[:16]


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8 text"
