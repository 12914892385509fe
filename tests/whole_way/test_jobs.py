"""Training jobs on a real Ray cluster of two nodes, by the commands a user types: they publish, are
killed, fail, diverge, are stopped and go on."""

import re
from pathlib import Path

import pytest
from commands import Ended, graft, run
from conftest import RayCluster
from safetensors.torch import load_file
from training_jobs import Jobs
from workers import Case, Workers

from cluster.base_model import load_tokenizer
from cluster.local_copies import LocalCopies
from cluster.registry import Registry
from cluster.spec import parse_spec
from training.data import tokenize
from training.spec import TrainingSpec

# Most of it is spent on waiting for all jobs, in whichever test is first.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_worker_costs_nothing(
    jobs: Jobs, registry: Registry, workers: Workers, tmp_path: Path
) -> None:
    """SIGKILL in the middle: the job goes on from its last checkpoint, to the same bytes that
    two workers make without Ray and without disturbance."""
    killed = jobs.killed.result()
    ended = killed.ended
    assert ended.code == 0, ended.output
    resumed = re.search(r"going on from step (\d+)", ended.output)
    assert resumed is not None, ended.output
    assert 0 < int(resumed[1]) < 200
    # Two, one that Ray Train has not taken yet and one on its way, for a moment another one while
    # Ray Train deletes; and not the one that the new workers began from, of which it may never have
    # heard.
    kept = {key.split("/step-")[1] for key in killed.kept if "/step-" in key}
    names = {key.split("/")[0] for key in kept}
    assert 0 < len(names) <= 5, killed.kept
    assert not any(name.startswith(f"{int(resumed[1]):08d}-") for name in names), killed.kept
    # By then it was evaluated once: these weights are the best, and there once.
    assert len([key for key in killed.kept if "/best/" in key]) == 1
    measured = r"evaluation at step 200  loss \d+\.\d+  perplexity [\d.]+  exact match"
    assert re.search(measured, ended.output)

    version = registry.resolve("killed")
    spec = parse_spec(TrainingSpec, version.card["spec"])
    tokenize(spec.data, load_tokenizer(spec.base_model), tmp_path / "tokens")
    workers.run([Case(version.card["spec"], tmp_path)], tmp_path / "tokens")
    calm = tmp_path / "adapter/adapter_model.safetensors"
    copy = LocalCopies(registry, tmp_path / "cache").fetch(version)
    published = copy / "adapter_model.safetensors"
    assert published.read_bytes() == calm.read_bytes()


def test_several_adapters_survive_a_killed_worker_and_one_that_diverges(
    jobs: Jobs, registry: Registry, workers: Workers, tmp_path: Path
) -> None:
    """Each is what its solo run makes; what failed goes on as a job of its own."""
    ended = jobs.several.result()
    assert ended.code == 5, ended.output
    assert re.search(r"category-lora-16: going on from step \d+0", ended.output), ended.output
    assert "category-ia3: step 20/20  loss" in ended.output
    assert "1 of 5 adapters failed:\n  wild: training diverged at step" in ended.output
    assert "TensorBoard failed" not in ended.output
    published = ("category-lora-16", "category-lora-4", "category-lora-16-slow", "category-ia3")
    cards = {name: registry.resolve(name).card for name in published}
    jobs_of = {(card["job"]["id"], card["job"]["name"]) for card in cards.values()}
    assert jobs_of == {(ended.job, "sweep")}

    spec = parse_spec(TrainingSpec, cards["category-lora-16"]["spec"])
    tokenize(spec.data, load_tokenizer(spec.base_model), tmp_path / "tokens")
    compared = ("category-lora-4", "category-ia3")
    alone = [Case(cards[name]["spec"], tmp_path / name) for name in compared]
    workers.run(alone, tmp_path / "tokens")
    for name in compared:
        expected = load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        folder = LocalCopies(registry, tmp_path / "cache").fetch(registry.resolve(name))
        for key, weight in load_file(folder / "adapter_model.safetensors").items():
            assert (weight - expected[key]).abs().max() < 1e-4, (name, key)

    tamed = jobs.tamed.result()
    assert tamed.code == 0, tamed.output
    assert "published wild@1" in tamed.output
    assert "category-ia3" not in tamed.output
    assert registry.resolve("wild").card["job"]["continues"] == ended.job
    assert all(registry.resolve(name).ref == f"{name}@1" for name in published)


def test_a_job_that_fails_says_why(jobs: Jobs, registry: Registry) -> None:
    """The data's first rows are sound, so only the job meets the bad one."""
    ended = jobs.failed.result()
    assert ended.code == 5
    assert "row 299: column 'completion' holds NoneType" in ended.output
    assert "Traceback" not in ended.output
    assert "failed" not in registry.names()


def test_training_on_two_nodes_publishes_an_adapter(
    trained: Ended, registry: Registry, tmp_path: Path
) -> None:
    told = trained.output
    assert re.search(r"lora\.yaml: [\d,]+ of [\d,]+ parameters \(\d+\.\d+%\), 1,500 rows", told)
    assert re.search(r"step 6/6  loss \d+\.\d+  lr ", told)
    assert "published lora@1" in told
    version = registry.verify("lora")
    assert (version.method, version.card["spec"]["workers"]["count"]) == ("LORA", 2)
    assert version.card["metrics"]["step"] == 6
    assert version.card["data"]["kept"] == 1500
    assert set(version.card["libraries"]) >= {"torch", "peft", "ray", "deepspeed"}
    folder = LocalCopies(registry, tmp_path).fetch(version)
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)


def test_a_job_can_be_stopped_and_gone_on_from(jobs: Jobs, registry: Registry) -> None:
    """In fp16. It goes on from its last checkpoint, once, on another number of workers, with the
    loss scale that it had."""
    stopped = jobs.stopped.result()
    assert (stopped.too_early.code, "is RUNNING" in stopped.too_early.output) == (4, True)
    assert "STOPPED" in stopped.stop
    assert (stopped.followed.code, "STOPPED" in stopped.followed.output) == (5, True)
    assert "published" not in stopped.followed.output
    assert any(f"{stopped.job}/tensorboard/events.out.tfevents." in key for key in stopped.kept)

    resumed = stopped.resumed
    assert resumed.code == 0, resumed.output
    assert f"going on from step {stopped.last}: bitfit" in resumed.output
    assert "published stopped@1" in resumed.output
    before, after = (
        set(re.findall(r"loss scale ([\d,]+)", ended.output))
        for ended in (stopped.followed, resumed)
    )
    assert after
    assert after <= before
    assert registry.resolve("stopped").card["job"]["continues"] == stopped.job
    assert f"continued by {resumed.job} already" in stopped.too_late.output
    assert stopped.too_late.code == 4
    left = registry.store.list(f"runs/{stopped.job}")
    assert not any(key.endswith((".safetensors", "progress.json")) for key in left)


def test_jobs_are_listed_shown_and_logged(ray_cluster: RayCluster, trained: Ended) -> None:
    address = ("--address", ray_cluster.dashboard)
    assert re.search(rf"{trained.job} +lora +SUCCEEDED", graft("jobs", "list", *address))
    assert "SUCCEEDED" in graft("jobs", "show", trained.job, *address)
    assert "published lora@1" in graft("jobs", "logs", trained.job, *address)
    missing = run("jobs", "show", "nothing", *address)
    assert (missing.code, "'nothing': not on the cluster" in missing.output) == (3, True)
