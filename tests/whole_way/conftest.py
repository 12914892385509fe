"""One cluster, one store in a bucket, as two nodes without a shared folder would use it, and the
jobs that fill it; a test waits for its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Ended
from conftest import RayCluster
from training_jobs import STORE, Jobs, started
from workers import Workers

from cluster.registry import Registry


@pytest.fixture(scope="session", autouse=True)
def surroundings(ray_cluster: RayCluster, s3_endpoint: str) -> Iterator[None]:
    """The cluster's token and the bucket's, for this process and its children."""
    import boto3

    aws = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "test",
           "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (ray_cluster.env | aws).items():
            patch.setenv(key, value)
        client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_endpoint)
        client.create_bucket(Bucket="adapters")
        yield


@pytest.fixture
def registry(surroundings: None) -> Registry:
    return Registry(STORE)


@pytest.fixture(scope="session")
def jobs(
    ray_cluster: RayCluster,
    surroundings: None,
    bases: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("rows")
    with started(ray_cluster.dashboard, bases("llama"), folder) as jobs:
        yield jobs


@pytest.fixture(scope="session")
def trained(jobs: Jobs) -> Ended:
    """The job whose adapter is served."""
    ended = jobs.lora.result()
    assert ended.code == 0, ended.output
    return ended


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two, without Ray, for what a job must come to."""
    with Workers(2) as workers:
        yield workers
