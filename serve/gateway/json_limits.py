"""How large and how deep a JSON value of a request may be, beyond the limit on the body: without recursion."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 32
"""Of lists and objects inside each other, in a schema or in a call's arguments. OpenAI allows schemas of 10."""


def is_within(value: Any, *, max_nodes: int, max_depth: int = MAX_DEPTH) -> bool:
    """Whether `value` has at most so many values inside, none of them deeper."""
    level, num_nodes = [value], 0
    for _ in range(max_depth + 1):
        num_nodes += len(level)
        if num_nodes > max_nodes:
            return False
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return True
    return False
