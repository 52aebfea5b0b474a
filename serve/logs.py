"""Logging of every Tandem process: one line an event, `time level logger message`, on standard error.

Messages are `what key=value …`; prompts and generated text never appear. The level comes from TANDEM_LOG_LEVEL.
"""

from __future__ import annotations

import logging
import os
import sys
import time


class _Formatter(logging.Formatter):
    """UTC with milliseconds; control characters escaped, so that no request can forge a line."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.exc_info:
            return text
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure_logging(*, rank: int | None = None) -> None:
    """Send Tandem's and its libraries' log records to standard error. Call once, in a process's entry point.

    The records of a peer of a group of ranks say which `rank` it is.
    """
    handler = logging.StreamHandler(sys.stderr)
    who = "" if rank is None else f"rank={rank} "
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s %(name)s {who}%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    level = os.environ.get("TANDEM_LOG_LEVEL", "INFO").upper()
    for package in ("serve", "models"):
        logging.getLogger(package).setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
    # Which files run: a stray module on the path is the kind of mistake that no other symptom explains.
    logging.getLogger(__name__).info("process started pid=%s package=%s", os.getpid(), os.path.dirname(__file__))
