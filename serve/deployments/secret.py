"""The secret by which the processes of an application know each other: one for a cluster, as long as it lives.

The processes of an application before and after an update have to reach each other, or an update would end what runs.
Whoever may run code on the cluster can read it there, and could call the processes through Ray as well.
"""

from __future__ import annotations

import secrets

from ray.experimental.internal_kv import (  # as Serve itself does
    _internal_kv_get,
    _internal_kv_initialized,
    _internal_kv_put,
)

_KEY, _NAMESPACE = "secret", "tandem"


def cluster_secret() -> bytes:
    """32 bytes. Fresh ones where there is no cluster yet: the application is only built then, not run."""
    fresh = secrets.token_bytes(32)
    if not _internal_kv_initialized():
        return fresh
    _internal_kv_put(_KEY, fresh, overwrite=False, namespace=_NAMESPACE)
    kept: bytes = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    return kept
