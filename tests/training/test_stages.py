"""Every method under every ZeRO stage, by two workers: it trains, is saved, loads, and resumes.

The rows are the presets as `graft train` resolves them, on a tiny base, so that a new one is tried
as soon as its file is there. `make docs` makes docs/stages.md of what these tests find.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pytest
import torch
from adapters import load
from conftest import CONFIGS, byte_tokenizer, make_base
from presets import KINDS, QUANTIZED, ROWS, method_of
from workers import Case, Workers, difference, log_of, logits_of, run_case, state_of, weights_of

from cluster.adapter_folder import WEIGHTS, open_adapter_folder
from cluster.base_model import load_base
from cluster.errors import SpecError
from cluster.spec import parse_spec
from cluster.store import open_store
from cluster.tables import write_table
from training import load_adapter
from training.checkpoint import read_checkpoint
from training.command import resolved
from training.data import tokenize
from training.data_spec import DataSpec
from training.methods import METHODS, trainable_parameters
from training.place import Place
from training.runs import fetch_checkpoint, upload_checkpoint
from training.spec import TrainingSpec
from training.step import LossModel, collate

STEPS, HALF = 4, 2
STAGES = (0, 1, 2, 3)
ASKED = [72, 101, 108, 108, 111]
ALONE, CLIPPED, EVALUATED = "alone", "alone, clipped", "alone, clipped, evaluated"
_CLIPS = {"max_grad_norm": 0.5}
_EVALUATES = {
    "data": {"validation": 0.3},
    "evaluation": {"every_steps": 2, "generations": 1, "max_new_tokens": 2},
}
# How a step of eight rows is made: what one way's spec says beside the method. Two workers, but
# for those alone.
WAYS: Mapping[str, Mapping[str, Any]] = {
    ALONE: {"zero": {"stage": 0}},
    CLIPPED: {"zero": {"stage": 0}, "optimizer": _CLIPS},
    EVALUATED: {"zero": {"stage": 0}, "optimizer": _CLIPS, **_EVALUATES},
    **{f"{stage}": {"zero": {"stage": stage}} for stage in STAGES},
    "2, accumulated": {
        "zero": {"stage": 2, "offload_optimizer": True},
        "optimizer": _CLIPS,
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
    },
    "3, offloaded, evaluated": {
        "zero": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        "optimizer": _CLIPS,
        "gradient_checkpointing": True,
        **_EVALUATES,
    },
    "2, cpu_adam": {
        "zero": {"stage": 2, "offload_optimizer": True},
        "optimizer": {**_CLIPS, "kind": "cpu_adam"},
    },
    "3, cpu_adam": {
        "zero": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        "optimizer": {**_CLIPS, "kind": "cpu_adam"},
    },
    "0, bf16": {"zero": {"stage": 0}, "precision": "bf16"},
    "3, bf16": {"zero": {"stage": 3}, "precision": "bf16"},
}
# Settings that no job can have.
IMPOSSIBLE: Mapping[str, Mapping[str, Any]] = {
    "parameters offloaded that are not sharded": {"zero": {"stage": 2, "offload_parameters": True}},
    "optimiser states offloaded that are not sharded": {
        "zero": {"stage": 0, "offload_optimizer": True}
    },
    "a quantised base under stage 3": {"quantization": {"bits": 4}, "zero": {"stage": 3}},
    "cpu_adam on a GPU": {"optimizer": {"kind": "cpu_adam"}, "workers": {"gpus": 1}},
}
# Encoder-decoders and classifiers are test_tasks'.
FAMILIES = [family for family, config in CONFIGS.items() if not config().is_encoder_decoder]
# What the code refuses of a row on a family.
REFUSED = {
    *(
        ("ia3", family)
        for family in FAMILIES
        if family.endswith("_moe") or family in ("deepseek_v3", "gpt_oss", "mpt", "recurrent_gemma")
    ),
    ("bottleneck_houlsby", "recurrent_gemma"),
    ("bottleneck_houlsby", "gpt_oss"),
    # Whose experts all-linear means too.
    *(("dylora", family) for family in ("mixtral", "qwen3_moe", "deepseek_v3")),
    ("prefix_tuning", "deepseek_v3"),
    *(("llama_adapter", family) for family in {*FAMILIES} - {"llama", "mistral", "gpt2"}),
    # Whose rows cannot be packed.
    *(
        ("prefix_tuning", family)
        for family in FAMILIES
        if family in ("bloom", "gptj", "mpt", "gemma2", "gpt_oss", "recurrent_gemma")
        or "falcon" in family
    ),
}
# Rows that neither train nor resume, and why.
UNTRAINED = {"hard_prompt": "nothing is trained: there is no step, and no checkpoint to resume"}
TRAINED = [row for row in ROWS if row not in UNTRAINED]
# One row of each kind that trains, and those whose code is another's in part.
DISTINCT = [*(row for row in KINDS.values() if row in TRAINED), "child_tuning_free"]
# AdaLoRA keeps ranks by importance: rounded, other ranks are kept, and nothing is comparable.
ROUNDED = [row for row in DISTINCT if row != "adalora"]


def each(rows: Sequence[str], ways: Sequence[object]) -> pytest.MarkDecorator:
    """All ways of one row before the next row."""
    pairs = [(row, str(way)) for row in rows for way in ways]
    return pytest.mark.parametrize(("row", "way"), pairs)


class Runs:
    """Runs of the rows on tiny bases, each done when it is first asked for, into its own folder."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self._folder, self._workers = folder, workers
        self.base = make_base("llama", folder / "base")
        self._small_base = make_base("llama", folder / "small", seed=1)
        # Rows of very different lengths, so that counts matter; 8 do not divide them.
        rows = [{"prompt": "ab" * (i % 7 + 1), "completion": "cd" * (i % 5 + 1)} for i in range(29)]
        self._data, self._tokens = folder / "rows.parquet", folder / "tokens"
        write_table(pa.Table.from_pylist(rows), self._data)
        tokenize(DataSpec(train=str(self._data)), byte_tokenizer(), self._tokens)
        self._done: dict[Path, Exception | None] = {}

    def spec(self, row: str, way: str) -> TrainingSpec:
        """As the job would run it. Raises SpecError where a way does not fit a row."""
        method = method_of(row)
        if method["kind"] == "proxy_tuning":
            method["small_base"] = str(self._small_base)
        # Where all of a weight learns, or PiSSA's large ones, or an LSTM's, AdamW makes whole steps
        # of gradients that are but rounding.
        is_dense = method["kind"] == "full" or method.get("form") == "task_free"
        is_dense = is_dense or bool(method.get("modules_to_save"))
        is_large = is_dense or method.get("init") == "pissa" or method.get("encoder") == "lstm"
        optimizer = {
            "learning_rate": 0.001 if is_large else 0.005,
            "weight_decay": 0.01,
            "eps": 1e-6,  # so that the first step of a gradient near 0 is no whole one
        }
        workers = 1 if way.startswith(ALONE) else 2
        settings = WAYS[way] if way in WAYS else IMPOSSIBLE[way]
        document = {
            "base_model": str(self.base),
            "method": method,
            "output": {"name": "unused"},
            "max_steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 8 // workers,
            "workers": {"count": workers},
            "checkpoint_every_steps": HALF,
            "log_every_steps": 1,
            "seed": 5,
            "quantization": QUANTIZED.get(row),
            **settings,
            "data": {"train": str(self._data), **settings.get("data", {})},
            "optimizer": {"max_grad_norm": 0, **optimizer, **settings.get("optimizer", {})},
        }
        return resolved(parse_spec(TrainingSpec, document))

    def whole(self, row: str, way: str) -> Path:
        """The folder of the undisturbed run."""
        return self._run(row, way, self._folder / f"{row}-{way}", None)

    def resumed(self, row: str, way: str, before: str | None = None) -> Path:
        """The folder of a run from the middle of the one that went the way `before`, or `way`."""
        half = self.whole(row, before or way) / f"checkpoint-{HALF}"
        return self._run(row, way, self._folder / f"{row}-{way}-from-{before or way}", half)

    def _run(self, row: str, way: str, folder: Path, half: Path | None) -> Path:
        if folder not in self._done:
            case = Case(self.spec(row, way).model_dump(mode="json"), folder, half, ASKED)
            try:
                if way.startswith(ALONE):
                    run_case(case, self._tokens, Place())
                else:
                    self._workers.run([case], self._tokens)
                self._done[folder] = None
            except Exception as error:
                self._done[folder] = error
        if (error := self._done[folder]) is not None:
            raise error
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Workers(2) as workers:
        yield Runs(tmp_path_factory.mktemp("stages"), workers)


def bytes_of(run: Path) -> bytes:
    return (run / "adapter" / WEIGHTS).read_bytes()


def test_every_method_has_a_row() -> None:
    assert KINDS.keys() == METHODS.keys()


def skip_undefined(runs: Runs, row: str, way: str, word: str) -> None:
    """Skip what there is not, and say why."""
    if row in UNTRAINED and word in ("train", "resume"):
        pytest.skip(UNTRAINED[row])
    if row in QUANTIZED and way == "3":
        with pytest.raises(SpecError) as refused:
            runs.spec(row, way)
        pytest.skip("at stage 3: " + " ".join(refused.value.message.split()))


@pytest.mark.slow
@each([*ROWS, *QUANTIZED], STAGES)
def test_train(runs: Runs, row: str, way: str) -> None:
    """To the losses, weights and moments of one worker without DeepSpeed."""
    skip_undefined(runs, row, way, "train")
    # What dropout leaves out is each worker's own.
    reference = runs.whole(row, "0" if method_of(row).get("dropout") else ALONE)
    run = runs.whole(row, way)
    half, end = (read_checkpoint(run / f"checkpoint-{step}")[0] for step in (HALF, STEPS))
    assert max(float((end[k] - half[k]).abs().max()) for k in half if k.startswith("param/")) > 1e-4
    assert difference(end, state_of(reference)) < 1e-5
    check_told(run, reference)


def check_told(run: Path, reference: Path) -> None:
    """The losses of two runs are within 1e-5, and what else is told is alike."""
    for field, tolerance in (
        ("loss", {"rel": 0, "abs": 1e-5}), ("learning_rate", {}), ("grad_norm", {"rel": 1e-4})
    ):  # fmt: skip
        told, expected = ([line[field] for line in log_of(r)] for r in (run, reference))
        assert told == pytest.approx(expected, **tolerance), field


@pytest.mark.slow
@each([*ROWS, *QUANTIZED], STAGES)
def test_save(runs: Runs, row: str, way: str) -> None:
    """The same adapter at each stage; the same bytes where shards are of optimiser states alone,
    and so each number is made by the same operations."""
    skip_undefined(runs, row, way, "save")
    run, first = runs.whole(row, way), runs.whole(row, "0")
    assert difference(weights_of(run), weights_of(first)) < 1e-5
    if way != "3":
        assert bytes_of(run) == bytes_of(first)


@pytest.mark.slow
@each([*ROWS, *QUANTIZED], STAGES)
def test_load(runs: Runs, row: str, way: str) -> None:
    """To what the trained model says: by plain PEFT where the method is PEFT's."""
    skip_undefined(runs, row, way, "load")
    run, spec = runs.whole(row, way), runs.spec(row, way)
    base: Any = load(runs.base)
    if spec.quantization is not None:
        base = load_base(str(runs.base), torch.float32, spec.quantization).eval()
    folder = open_adapter_folder(run / "adapter").path
    is_pefts = METHODS[method_of(row)["kind"]].peft_type is None
    model: Any = (
        peft.PeftModel.from_pretrained(base, str(folder)).eval()
        if is_pefts
        else load_adapter(base, folder)
    )
    # What was trained of a proxy is its expert.
    model = getattr(model, "expert", model)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([ASKED])).logits[0, -1]
    assert (logits_V - logits_of(run)).abs().max() < 1e-5


@pytest.mark.slow
@each([*ROWS, *QUANTIZED], STAGES)
def test_resume(runs: Runs, row: str, way: str) -> None:
    """To the bytes of the undisturbed run."""
    skip_undefined(runs, row, way, "resume")
    check_resumed(runs, row, way)


def check_resumed(runs: Runs, row: str, way: str) -> None:
    whole, resumed = runs.whole(row, way), runs.resumed(row, way)
    assert not (resumed / f"checkpoint-{HALF}").exists()
    assert bytes_of(whole) == bytes_of(resumed)
    assert difference(state_of(whole), state_of(resumed)) == 0


@pytest.mark.slow
@each(DISTINCT, ["2, accumulated", "3, offloaded, evaluated"])
def test_however_a_step_is_made_the_run_is_the_same(runs: Runs, row: str, way: str) -> None:
    alone = runs.whole(row, EVALUATED if "evaluated" in way else CLIPPED)
    run = runs.whole(row, way)
    assert difference(weights_of(alone), weights_of(run)) < 1e-5
    assert difference(state_of(alone), state_of(run)) < 1e-5
    check_told(run, alone)
    if "offloaded" not in way:  # test_cpu_adam_is_adamw goes on with what is offloaded
        check_resumed(runs, row, way)


@pytest.mark.slow
@pytest.mark.timeout(900)  # of which compiling takes most, once on a machine
@each(["lora", "bitfit", "prompt_tuning", "full"], ["2, cpu_adam", "3, cpu_adam"])
def test_cpu_adam_is_adamw(runs: Runs, row: str, way: str) -> None:
    assert difference(state_of(runs.whole(row, CLIPPED)), state_of(runs.whole(row, way))) < 1e-5
    check_resumed(runs, row, way)


@pytest.mark.slow
@each(DISTINCT, STAGES)
def test_a_checkpoint_of_any_stage_resumes_on_one_worker_without_deepspeed(
    runs: Runs, row: str, way: str
) -> None:
    alone, resumed = runs.whole(row, ALONE), runs.resumed(row, ALONE, before=way)
    assert difference(weights_of(alone), weights_of(resumed)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "way"),
    [*((row, "3") for row in TRAINED), *((row, "3, offloaded, evaluated") for row in DISTINCT)],
)
def test_a_checkpoint_is_as_large_as_what_is_trained(
    runs: Runs, row: str, way: str, tmp_path: Path
) -> None:
    """In the store: weights and two moments in fp32 and next to nothing beside; for the tiny model
    here the names and the curve count, so they are taken apart. What a method must remember besides
    (where a mask's values stand, AdaLoRA's averages) is state of its optimiser too. The best
    weights, which other checkpoints have too, are there once for all."""
    state = {k: v for k, v in state_of(runs.whole(row, way)).items() if not k.startswith("best/")}
    trained = sum(value.numel() for key, value in state.items() if key.startswith("param/"))
    content = sum(value.nbytes for value in state.values())
    course = sum(value.nbytes for key, value in state.items() if key.startswith("course/"))
    assert content <= 1.1 * (3 * 4 * trained + course)
    assert course <= 2 * 4 * trained

    whole = runs.whole(row, way) / f"checkpoint-{STEPS}"
    store, names = open_store(str(tmp_path / "store")), ("step-1", "step-2")
    for name in names:
        shutil.copytree(whole, tmp_path / name)
        upload_checkpoint(store, f"runs/job/{name}", tmp_path / name)
    header = 150 * len(state)  # a tensor's line in a safetensors file
    for name in names:
        files = (tmp_path / "store/runs/job" / name).iterdir()
        assert sum(file.stat().st_size for file in files) <= 1.1 * content + header + 1000
    assert len(store.list("runs/job/best")) == ("evaluated" in way)
    fetch_checkpoint(store, "runs/job/step-2", tmp_path / "fetched")
    for file in whole.iterdir():
        assert (tmp_path / "fetched" / file.name).read_bytes() == file.read_bytes()


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Flat differences by tensor; values at indices are compared where each has them."""
    found: list[torch.Tensor] = []
    for key in (one.keys() | other.keys()) - {k for k in one | other if k.endswith(".indices")}:
        places = [weights.get(key.removesuffix("values") + "indices") for weights in (one, other)]
        if places == [None, None]:
            found.append((one[key] - other[key]).flatten())
            continue
        size = 1 + max(int(p[-1]) for p in places if p is not None)
        pair = [torch.zeros(size) for _ in places]
        for dense, at, weights in zip(pair, places, (one, other), strict=True):
            if at is not None:
                dense[at.long()] = weights[key]
        found.append(pair[0] - pair[1])
    return found


@pytest.mark.slow
@each(ROUNDED, ["0, bf16", "3, bf16"])
def test_bf16_follows_fp32(runs: Runs, row: str, way: str) -> None:
    """The base in bf16 and the adapter in fp32."""
    expected, found = weights_of(runs.whole(row, ALONE)), weights_of(runs.whole(row, way))
    largest = max(float(w.abs().max()) for key, w in expected.items() if "indices" not in key)
    assert all(w.dtype == torch.float32 for key, w in found.items() if "indices" not in key)
    away = torch.cat([part.abs() for part in differences(expected, found)])
    assert 0 < away.mean() < 0.1 * largest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", KINDS.values())
def test_fit(
    bases: Callable[[str], Path],
    family: str,
    row: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Each kind learns on each family, layers computed again in backward where it can, or is
    refused."""
    method = method_of(row)
    if method["kind"] == "proxy_tuning":
        method["small_base"] = str(bases(family))
    if method["kind"] == "hard_prompt":
        method["text"] = "ab"
    document = {"base_model": str(bases(family)), "method": method, "data": {"train": "unused"}}
    spec = parse_spec(TrainingSpec, {**document, "output": {"name": "unused"}})
    model: Any = None
    try:
        model = METHODS[spec.method.kind].attach(load(bases(family)), spec.method, spec.base_model)
        measured = LossModel(model, recomputes=True)
        assert (row, family) not in REFUSED
    except SpecError as error:
        record_property("refused", str(error).replace(str(bases(family)), "the base"))
        assert (row, family) in REFUSED
        if not str(error).startswith("gradient_checkpointing"):
            return
        measured = LossModel(model)
    ids = list(range(9))
    loss = measured(collate([(ids, ids)], torch.device("cpu")))
    trained = trainable_parameters(model)
    if trained:
        loss.backward()
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("settings", IMPOSSIBLE)
def test_refuse(runs: Runs, settings: str, record_property: Callable[[str, object], None]) -> None:
    with pytest.raises(SpecError) as refused:
        runs.spec("lora", settings)
    record_property("refused", refused.value.message)
