"""A running application, wherever its processes live: what the command line needs of it.

`serve/local.py` runs one as child processes, `serve/deployments/run.py` on Ray Serve.
"""

from __future__ import annotations

from typing import Protocol

from serve.request import ModelCard


class Application(Protocol):
    """Models and gateways of one `ServeOptions`. Methods are called from one asyncio loop."""

    async def start(self) -> str:
        """Start everything; return the gateway's URL once every model answers. Raises ConfigError or Unavailable."""
        ...

    def cards(self) -> list[ModelCard]:
        """What is served, one card a model. Valid after `start`."""
        ...

    async def failed(self) -> str:
        """Return, with the reason, when the application cannot go on by itself. Usually never returns."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, let running requests end for at most `timeout_s`, then stop every process."""
        ...

    def kill(self) -> None:
        """Stop every process now. Safe at any time, also in a signal handler."""
        ...
