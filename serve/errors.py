"""Every error that can reach a user, as one tree. Each class says when it is raised and carries a stable `code`.

    TandemError
    ├── InvalidRequest              the request can never succeed as it is
    │   ├── ContextTooLong          prompt and max_tokens exceed the model's positions
    │   └── ModelNotFound           no model of that name is served
    ├── ConfigError                 an option or a config file is wrong (start-up only)
    ├── Unavailable                 the request is fine, the server cannot take or finish it now
    │   ├── Overloaded              the bounded waiting queue is full
    │   ├── Draining                the process is shutting down
    │   ├── ReplicaLost             the replica's process or its connection ended
    │   └── EngineDead              the engine is unhealthy and its process ends
    ├── DeadlineExceeded            the request's own deadline passed
    └── RequestFailed               computing this request failed, and it alone
        └── Quarantined             replicas were lost while they had it, so no other one gets it

Only `serve/gateway/errors.py` knows HTTP statuses. Messages start lower-case, quote the value, name the remedy, and
hold no secrets and no prompt text.
"""

from __future__ import annotations


class TandemError(Exception):
    """Base of all errors a caller may see. `code` is part of the API and never changes; `param` names the field."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(TandemError):
    """The request can never succeed as it is: a value out of range, an unknown field, an unknown token."""

    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    """Prompt plus requested output exceed the model's positions, or the KV cache as a whole."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """No model of that name is served here."""

    code = "model_not_found"


class ConfigError(TandemError):
    """An option or a config file is wrong. Raised before anything starts; the message names the key's path."""

    code = "invalid_config"


class Unavailable(TandemError):
    """The request is fine but cannot be served now; another try, later or elsewhere, may succeed."""

    code = "unavailable"


class Overloaded(Unavailable):
    """The waiting queue is full. `retry_after_s` is computed from the queue's length and the measured service rate."""

    code = "overloaded"


class Draining(Unavailable):
    """The process is shutting down: it finishes what runs and takes nothing new."""

    code = "draining"


class ReplicaLost(Unavailable):
    """The replica's process or its connection ended while the request was with it."""

    code = "replica_lost"


class EngineDead(Unavailable):
    """The engine is unhealthy: its device is poisoned, its thread died or a step hangs. Its process ends."""

    code = "engine_dead"


class DeadlineExceeded(TandemError):
    """The request's own deadline passed, queued or running."""

    code = "deadline_exceeded"


class RequestFailed(TandemError):
    """Computing this request failed (its batch mates go on)."""

    code = "request_failed"


class Quarantined(RequestFailed):
    """Several replicas were lost while they computed this request, maybe because of it: no other one is risked."""

    code = "quarantined"


def by_code(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> TandemError:
    """The error of that `code`, as it was raised in another process. An unknown code gives the base class."""
    return _BY_CODE.get(code, TandemError)(message, param=param, retry_after_s=retry_after_s)


def _tree(cls: type[TandemError]) -> list[type[TandemError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


_BY_CODE = {cls.code: cls for cls in _tree(TandemError)}
CODES = tuple(_BY_CODE)
"""Every code there is: the values of a metric's label."""
