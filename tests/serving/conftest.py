"""One service for each module, over every kind of adapter, and a connection to it; or replicas."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from replicas import Loras
from service import VARIANTS, Running, publish, running

from serving.replica import Replica


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


@pytest.fixture(scope="module")
def loras(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Loras:
    return Loras(bases("llama"), tmp_path_factory.mktemp("loras"))


@pytest.fixture
def make(loras: Loras) -> Iterator[Callable[..., Replica]]:
    """Replicas that end with the test."""
    made: list[Replica] = []

    def replica(room: float = 100.0) -> Replica:
        made.append(loras.replica(room))
        return made[-1]

    yield replica
    for each in made:
        each.stop()
