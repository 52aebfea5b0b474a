"""The browser and the server that the playground's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import browser as chromium
import pytest
from playground_server import FakeServer, running_server


@pytest.fixture(scope="module")
def window() -> Iterator[chromium.Browser]:
    with chromium.browser() as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running_server() as fake:
        yield fake


@pytest.fixture
def tab(window: chromium.Browser, server: FakeServer) -> Iterator[chromium.Browser]:
    """The page, opened in an empty window of a desktop's size; it must not complain."""
    window.screen(1280, 800)
    window.open("about:blank")
    window.complaints()
    yield window
    complaints = [entry for entry in window.complaints() if "Failed to load resource" not in entry]
    assert complaints == []
