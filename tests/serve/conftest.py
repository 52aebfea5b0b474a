"""Fixtures of the channel's tests."""

import pytest


@pytest.fixture
def address(tmp_path) -> str:
    return f"unix:{tmp_path}/replica"
