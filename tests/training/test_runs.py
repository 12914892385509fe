"""A job's place in the store: whole checkpoints or none, one continuation, what may change."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import (
    BaseModelError,
    ConflictError,
    DataError,
    JobFailedError,
    NotFoundError,
    SpecError,
)
from cluster.registry import Registry
from cluster.spec import parse_spec
from cluster.store import Store, open_store
from training import job, worker
from training.checkpoint import Progress, read_checkpoint, write_checkpoint
from training.command import readable
from training.resume import continued_spec
from training.rows import micro_batches, write_rows
from training.runs import (
    Run,
    checkpoint_name,
    delete_folder,
    delete_unused,
    fetch_checkpoint,
    fetch_folder,
    finish,
    last_checkpoint,
    own_bests,
    published_adapters,
    read_failure,
    record_failure,
    record_rows,
    record_run,
    upload_checkpoint,
    upload_folder,
)
from training.spec import TrainingSpec

STATE = {"param/a": torch.arange(4.0), "exp_avg/a": torch.ones(4)}


def save(store: Store, job_id: str, step: int, folder: Path) -> str:
    key = f"runs/{job_id}/{checkpoint_name(step)}"
    write_checkpoint(folder, STATE, Progress(step=step))
    upload_folder(store, key, folder)
    return key


# For each number up to `sys.argv[3]` a process that ends, as by SIGKILL, in front of its write of
# that number, from 0: into the store of that number, of the folder of that number. Prints how each
# ended. Forked before anything is open, since most of the time goes by on imports.
DO_AND_DIE = """
import os, sys, obstore
from pathlib import Path
from cluster.registry import Registry
from cluster.store import open_store
from training.runs import upload_checkpoint
put = obstore.put
for number in range(int(sys.argv[3])):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    left = iter(range(number))
    def counted(*arguments, **options):
        if next(left, None) is None:
            os._exit(9)
        return put(*arguments, **options)
    obstore.put = counted
    store, folder = open_store(f"{sys.argv[1]}-{number}"), Path(f"{sys.argv[2]}-{number}")
    %s
    os._exit(0)
"""
SAVE = 'upload_checkpoint(store, "runs/job/step-00000020-beef", folder)'
PUBLISH = 'Registry(store).publish("mine", folder, card={"job": {"id": "job"}})'
WRITES = 4  # of either


def do_and_die(what: str, stores: Path, folders: Path) -> None:
    """Do it, dying in front of each write, and once without."""
    arguments = (str(stores), str(folders), str(WRITES + 1))
    command = [sys.executable, "-c", DO_AND_DIE % what, *arguments]
    done = subprocess.run(command, timeout=120, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["9"] * WRITES + ["0"]


def test_a_crash_at_any_point_of_a_save_leaves_the_checkpoint_before(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    run, best = Run("job", spec), {"best/param/a": torch.ones(4)}
    before: dict[int, str] = {}
    for writes in range(WRITES + 1):
        store = open_store(str(tmp_path / f"store-{writes}"))
        record_run(store, run)
        before[writes] = save(store, "job", 10, tmp_path / f"first-{writes}")
        write_checkpoint(tmp_path / f"second-{writes}", STATE | best, Progress(step=20))
    do_and_die(SAVE, tmp_path / "store", tmp_path / "second")
    for writes, key in before.items():
        store = open_store(str(tmp_path / f"store-{writes}"))
        found = last_checkpoint(store, run)
        assert found is not None
        is_whole = writes == WRITES
        assert (found == key) is not is_whole
        fetch_checkpoint(store, found, tmp_path / f"fetched-{writes}")
        state, progress = read_checkpoint(tmp_path / f"fetched-{writes}")
        assert progress.step == (20 if is_whole else 10)
        assert torch.equal(state["param/a"], STATE["param/a"])
        assert ("best/param/a" in state) is is_whole


def test_a_crash_at_any_point_of_publishing_can_be_gone_on_from(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    """To one version, whole: nobody sees what the crash left."""
    for writes in range(WRITES + 1):
        store = open_store(str(tmp_path / f"store-{writes}"))
        record_run(store, Run("job", spec))
        save(store, "job", 10, tmp_path / "one")
        make_adapter(tmp_path / f"adapter-{writes}")
    do_and_die(PUBLISH, tmp_path / "store", tmp_path / "adapter")
    for writes in range(WRITES + 1):
        store = open_store(str(tmp_path / f"store-{writes}"))
        registry = Registry(store)
        if writes == WRITES:
            with pytest.raises(ConflictError, match="has published mine@1"):
                continued_spec(store, "job", ())
            continue
        assert registry.names() == []
        record_run(store, Run("next", continued_spec(store, "job", ()), "job"))
        publish(store, "next", "mine", tmp_path / f"adapter-{writes}")
        assert len(registry.numbers("mine")) == 1
        assert registry.verify("mine").card == {"job": {"id": "next"}}


def test_best_weights_are_kept_while_a_checkpoint_names_them(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    store, known = open_store(spec.output.store), set[str]()
    keys: list[str] = []
    for step, best in ((10, 1.0), (20, 1.0), (30, 2.0)):
        folder = tmp_path / str(step) / "mine"  # as of one of several adapters
        write_checkpoint(folder, STATE | {"best/param/a": torch.full((4,), best)}, Progress(step))
        keys.append(f"runs/job/{checkpoint_name(step)}")
        known |= upload_checkpoint(store, keys[-1], folder.parent)
    assert len(known) == len(own_bests(store, "job")) == 2
    delete_folder(store, keys[0])
    assert delete_unused(store, "job", known) == known
    delete_folder(store, keys[1])
    (left,) = delete_unused(store, "job", known)
    assert own_bests(store, "job") == [left]
    fetch_checkpoint(store, keys[2], tmp_path / "fetched")
    state, _ = read_checkpoint(tmp_path / "fetched" / "mine")
    assert float(state["best/param/a"][0]) == 2.0


def test_one_job_goes_on_from_another_and_the_last_cleans_up(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    store = open_store(spec.output.store)
    first, second, third = Run("a", spec), Run("b", spec, "a"), Run("c", spec, "b")
    record_run(store, first)
    key = save(store, "a", 10, tmp_path / "one")
    record_run(store, second)
    with pytest.raises(ConflictError, match="continued by b already"):
        record_run(store, Run("late", spec, "a"))
    with pytest.raises(ConflictError, match="--resume b"):
        continued_spec(store, "a", ())
    # The second ended before its first checkpoint: the third starts from the first one's.
    record_run(store, third)
    assert last_checkpoint(store, third) == key
    newer = save(store, "c", 20, tmp_path / "two")
    assert last_checkpoint(store, third) == newer
    finish(store, third, "mine@1")
    assert {k.rsplit("/", 1)[-1] for k in store.list("runs")} == {"job.json", "outcome.json"}
    with pytest.raises(ConflictError, match="published mine@1"):
        continued_spec(store, "c", ())


def test_what_cannot_be_continued_is_refused_by_name(spec: TrainingSpec, tmp_path: Path) -> None:
    store = open_store(spec.output.store)
    with pytest.raises(NotFoundError, match=r"'gone': the store .* no record .* --store"):
        continued_spec(store, "gone", ())
    record_run(store, Run("job", spec))
    with pytest.raises(NotFoundError, match="before its first checkpoint"):
        continued_spec(store, "job", ())
    save(store, "job", 10, tmp_path / "one")
    assert continued_spec(store, "job", ["workers.count=1", "max_steps=30"]).workers.count == 1
    remedies = ["optimizer.learning_rate=1e-5", "precision=bf16"]
    assert continued_spec(store, "job", remedies).precision == "bf16"
    assert continued_spec(store, "job", ["micro_batch_size=1"]).global_batch_size == 8
    assert continued_spec(store, "job", ["data.lint.truncated=1"]).data.lint.truncated == 1
    refused: list[tuple[str, str]] = [
        ("method.r=4", "^method.r: 4 instead of 8 would not fit the checkpoint .* leave it, or"),
        ("method={kind: bitfit}", "^method.kind: 'bitfit' instead of 'lora' would not fit"),
        ("batch_size=4", "batch_size: 4 instead of 8"),
        ("data.train=/other.arrow", "^data.train: '/other.arrow' instead of '"),
        ("quantization={bits: 4}", "^quantization: .*'bits': 4.* instead of None would not fit"),
        ("evaluation={every_steps: 5, shown: 0}", "every_steps: 5 .*, evaluation.shown: 0 .* them"),
        ("output.store=/elsewhere", "output.store: "),
        ("workers.cuont=1", "did you mean 'count'"),
    ]
    for override, message in refused:
        with pytest.raises(SpecError, match=message):
            continued_spec(store, "job", [override])


def test_rows_that_changed_are_refused_by_name(spec: TrainingSpec, tmp_path: Path) -> None:
    store = open_store(spec.output.store)
    first, second, third = Run("a", spec), Run("b", spec, "a"), Run("c", spec, "b")

    def rows(name: str, numbers: range) -> dict[str, dict[str, str | None]]:
        """The keys of such rows, tokenised."""
        write_rows((([n], [n], n) for n in numbers), tmp_path / name)
        upload_folder(store, f"cache/tokens/{name}", tmp_path / name)
        return {"mine": {"tokens": f"cache/tokens/{name}", "validation": None}}

    for run in (first, second):
        record_run(store, run)
    record_rows(store, first, rows("before", range(20)))
    with pytest.raises(DataError, match=r"data /rows\.arrow: its rows .* job a began.* --resume b"):
        record_rows(store, second, rows("appended", range(30)))
    record_run(store, third)  # what was refused is not what counts
    record_rows(store, third, rows("tokenised-anew", range(20)))


def test_a_job_goes_on_with_the_rows_that_it_began_with(
    spec: TrainingSpec,
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [json.dumps({"prompt": f"{n}", "completion": "b"}) for n in range(8)]
    data.write_text("\n".join(rows[:7]))
    document = spec.model_dump(mode="json") | {"base_model": str(bases("llama"))}
    document["data"]["train"] = str(data)
    spec = parse_spec(TrainingSpec, document)

    def stop(*_: object) -> None:
        raise JobFailedError("stopped")

    monkeypatch.setattr(job, "_train", stop)
    with pytest.raises(JobFailedError):
        job.run_job(Run("a", spec))
    data.write_text("\n".join(rows))
    with pytest.raises(DataError, match="its rows are others than when job a began"):
        job.run_job(Run("b", spec, "a"))


def make_adapter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    save_file(STATE, folder / "adapter_model.safetensors")


def publish(store: Store, job_id: str, name: str, folder: Path) -> None:
    """A small adapter, as that job would."""
    make_adapter(folder)
    Registry(store).publish(name, folder, card={"job": {"id": job_id}})


def test_a_job_that_died_behind_its_publishing_does_not_publish_again(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    store = open_store(spec.output.store)
    record_run(store, Run("job", spec))
    save(store, "job", 10, tmp_path / "one")
    publish(store, "another", "mine", tmp_path / "adapter")
    Registry(store).publish("mine", tmp_path / "adapter", card={"job": "by hand"})
    store.create("adapters/mine/00000003/manifest.json", b"damaged")
    assert continued_spec(store, "job", ()) == spec
    publish(store, "job", "mine", tmp_path / "adapter")
    with pytest.raises(ConflictError, match=r"has published mine@4; train anew"):
        continued_spec(store, "job", ())
    assert not any("step-" in key for key in store.list("runs"))  # cleaned up behind it


def test_what_the_cluster_lacks_is_told(
    spec: TrainingSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    job.tell_room(spec, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0})
    said = capsys.readouterr().out
    assert said.startswith("waiting for 2 GPUs, of which the cluster has 0: if no more nodes")
    assert "CPU" not in said


def test_a_followed_log_shows_what_only_looks_like_noise() -> None:
    ray = "\x1b[36m(RayTrainWorker pid=7)\x1b[0m "
    for line in ("row 0: warnings.warn(x)  # Warning: world_rank=3", "answer: return func(*args)"):
        assert readable(ray + line) == line
    for noise in ("/a/b.py:3: UserWarning: x", "  warnings.warn(", "Loading weights:  0%"):
        assert readable(ray + noise) is None


def test_of_several_adapters_those_go_on_that_are_not_published(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    adapters: dict[str, Any] = {"a": {}, "b": {"method": {"r": 4}}, "c": {"seed": 7}}
    change: dict[str, Any] = {"zero": {"stage": 0}, "adapters": adapters}
    several = parse_spec(TrainingSpec, spec.model_dump(mode="json") | change)
    store = open_store(several.output.store)
    record_run(store, Run("job", several))
    for name, step in (("a", 5), ("b", 3)):
        write_checkpoint(tmp_path / "one" / name, STATE, Progress(step=step))
    key = f"runs/job/{checkpoint_name(8)}"
    upload_folder(store, key, tmp_path / "one")
    # What makes it whole is its own progress, not that of a part.
    with pytest.raises(NotFoundError, match="before its first checkpoint"):
        continued_spec(store, "job", ())
    (tmp_path / "one" / "progress.json").write_text("{}")
    upload_folder(store, key, tmp_path / "one")
    fetch_folder(store, key, tmp_path / "fetched")
    assert read_checkpoint(tmp_path / "fetched" / "b")[1].step == 3
    assert list(continued_spec(store, "job", ()).adapters) == ["a", "b", "c"]

    for name in ("a", "c"):
        publish(store, "job", name, tmp_path / "adapter")
    left = continued_spec(store, "job", ["adapters.b.optimizer.learning_rate=0.001"])
    assert list(left.each()) == ["b"]
    assert left.each()["b"].optimizer.learning_rate == 0.001
    for override, message in (
        ("adapters.b.method.r=8", r"adapters\.b\.method\.r: 8 .* would not fit the checkpoint"),
        ("adapters.b.seed=8", r"adapters\.b\.seed: 8 instead of 0"),
        ("adapters.new={seed: 1}", "adapters: job job has a, b, c; leave their names"),
    ):
        with pytest.raises(SpecError, match=message):
            continued_spec(store, "job", [override])
    record_run(store, Run("next", left, "job"))
    publish(store, "another", "b", tmp_path / "adapter")
    publish(store, "next", "b", tmp_path / "adapter")
    assert published_adapters(store, Run("next", several, "job")) == {
        "a": "a@1", "b": "b@2", "c": "c@1",
    }  # fmt: skip
    with pytest.raises(ConflictError, match=r"has published b@2"):
        continued_spec(store, "next", ())


def test_a_failure_that_one_worker_knows_is_told_to_all(spec: TrainingSpec) -> None:
    store = open_store(spec.output.store)
    assert read_failure(store, "job") is None
    record_failure(store, "job", "out of memory")
    record_failure(store, "job", "another reason")
    assert read_failure(store, "job") == "out of memory"


def test_a_fault_of_one_workers_node_ends_the_job(
    spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise BaseModelError("base model /base: is not on this node")

    monkeypatch.setattr(worker, "_train", fail)
    config = {"spec": spec.model_dump(mode="json"), "job_id": "job"}
    with pytest.raises(BaseModelError):  # Ray Train ends the others, which wait for this one
        worker.train_worker(config)
    told = worker.train_worker(config)  # the next attempt, on any node
    assert told == {worker.FAILURE: "base model /base: is not on this node"}


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("is_packed", [True, False])
def test_the_batch_is_the_same_for_any_number_of_workers(
    spec: TrainingSpec, workers: int, is_packed: bool
) -> None:
    rows = np.arange(spec.global_batch_size)
    share = (workers, spec.accumulation(workers))
    parts = [micro_batches(rows, rows + 1, r, *share, is_packed=is_packed) for r in range(workers)]
    assert sorted(int(i) for own in parts for part in own for i in part) == list(range(8))
    assert max(len(part) for own in parts for part in own) <= spec.micro_batch_size
