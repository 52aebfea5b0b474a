"""Tiny operators on one thread: beside a busy neighbour each barrier of a second one costs milliseconds."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
