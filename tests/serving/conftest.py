"""One service for each module, over every kind of adapter, and a connection to it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from service import VARIANTS, Running, publish, running


@pytest.fixture(scope="module")
def service(
    bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    with running(bases("llama"), folder) as service:
        publish(service.registry, bases("llama"), folder, *VARIANTS)
        service.registry.set_alias("lora", "stable", 1)
        yield service


@pytest.fixture
def http(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client
