"""Options of the suites, and what a run was asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging as transformers_logging

from fastqadapter_benchmarks.settings import SETTINGS, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastqadapter benchmarks")
    default = Settings()
    group.addoption("--full", action="store_true", help="all shapes and sweeps, not the few of a quick run")
    group.addoption("--model", default=default.model, help="folder, hub id, or demo")
    group.addoption("--data", default=default.data, help="preference pairs, one JSON object a line, or demo")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    group.addoption("--threads", type=int, default=default.threads)
    group.addoption("--rounds", type=int, default=default.rounds, help="every competitor runs once in each")
    group.addoption("--peers", nargs="+", default=[], help="only competitors with one of these words in their label")


def pytest_configure(config: pytest.Config) -> None:
    transformers_logging.disable_progress_bar()
    names = ("full", "model", "data", "device", "threads", "rounds")
    options = {name: config.getoption(name) for name in names}
    config.stash[SETTINGS] = Settings(**options, peers=tuple(config.getoption("peers")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `full` is not for a quick run."""
    if not config.stash[SETTINGS].full:
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.config.stash[SETTINGS]


@pytest.fixture(autouse=True)
def threads(settings: Settings) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    yield
    torch.set_num_threads(before)
