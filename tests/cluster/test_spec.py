"""YAML specs: all errors at once, nearest names, overrides; every preset loads."""

from pathlib import Path

import pytest
import yaml

from cluster.errors import SpecError
from cluster.spec import load_spec, parse_spec
from serving.spec import ServingSpec
from training.spec import TrainingSpec

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "base_model": "base",
    "method": {"kind": "lora"},
    "data": {"train": "rows.arrow"},
    "output": {"name": "mine"},
}


def message(data: dict[str, object]) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(TrainingSpec, data)
    return caught.value.message


def test_all_errors_come_at_once_each_with_its_path() -> None:
    text = message({**GOOD, "epochs": -1, "zero": {"stage": 4}, "data": {}, "precison": "bf16"})
    assert "4 errors" in text
    for part in ("epochs: ", "zero.stage: ", "data.train: required", "precison: unknown key"):
        assert part in text


def test_an_unknown_key_gets_the_nearest_known_one() -> None:
    assert "did you mean 'precision'?" in message({**GOOD, "precison": "bf16"})
    assert "did you mean 'alpha'?" in message({**GOOD, "method": {"kind": "lora", "alhpa": 1}})
    of_another = message({**GOOD, "method": {"kind": "ia3", "r": 8}})
    assert "method.ia3.r: unknown key" in of_another
    assert "'r'" not in of_another


def test_an_unknown_method_gets_the_nearest_known_one() -> None:
    text = message({**GOOD, "method": {"kind": "prefix_tunning"}})
    assert "'prefix_tunning'" in text
    assert "did you mean 'prefix_tuning'?" in text
    assert "method.kind: required" in message({**GOOD, "method": {}})


def test_a_wrong_choice_gets_the_nearest_known_one() -> None:
    assert "did you mean 'bf16'?" in message({**GOOD, "precision": "bf61"})


def test_rules_between_fields() -> None:
    assert "needs stage 3" in message({**GOOD, "zero": {"offload_parameters": True}})
    assert "needs stage 1, 2 or 3" in message(
        {**GOOD, "zero": {"stage": 0, "offload_optimizer": True}}
    )
    on_gpu = {**GOOD, "optimizer": {"kind": "cpu_adam"}, "workers": {"gpus": 1}}
    assert "set zero.offload_optimizer" in message(on_gpu)
    lstm = {"kind": "p_tuning", "encoder": "lstm"}
    small = {"kind": "proxy_tuning", "small_base": "small", "expert": lstm}
    for method in (lstm, small):
        text = message({**GOOD, "method": method, "precision": "fp16"})
        assert "p_tuning with encoder lstm needs a GPU" in text
    for other in ({"precision": "bf16"}, {"precision": "fp16", "workers": {"gpus": 1}}):
        assert parse_spec(TrainingSpec, {**GOOD, "method": lstm, **other}).method.kind == "p_tuning"


def test_a_base_over_several_gpus_is_refused_with_what_fits_one() -> None:
    engine = {"base_model": "base", "tensor_parallel": 1}
    assert parse_spec(ServingSpec, {"name": "a", "engine": engine}).engine.tensor_parallel == 1
    with pytest.raises(SpecError) as caught:
        parse_spec(ServingSpec, {"name": "a", "engine": engine | {"tensor_parallel": 2}})
    for part in ("engine.tensor_parallel: is 2", "on one GPU", "`quantization`", "replicas.max"):
        assert part in caught.value.message


def test_overrides_are_yaml_and_reach_nested_keys(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    overrides = ["method.r=4", "optimizer.betas=[0.8, 0.9]", "output.name=other"]
    spec = load_spec(TrainingSpec, path, overrides)
    assert (spec.method.kind, getattr(spec.method, "r", 0)) == ("lora", 4)
    assert spec.optimizer.betas == (0.8, 0.9)
    assert spec.output.name == "other"


def test_a_share_may_be_written_without_a_point(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.dump(GOOD))
    for text, expected in (("5e-2", 0.05), ("1E-1", 0.1), (".5", 0.5), ("./5e-2", "./5e-2")):
        spec = load_spec(TrainingSpec, tmp_path / "a.yaml", [f"data.validation={text}"])
        assert spec.data.validation == expected
    assert "less than 1" in message({**GOOD, "data": {"train": "rows", "validation": "5e0"}})


@pytest.mark.parametrize(
    ("override", "part"),
    [("method.r", "key=value"), ("=3", "key=value"), ("seed.x=3", "value, not a section"),
     ("method.r=[", "not valid YAML")],
)  # fmt: skip
def test_malformed_overrides_are_named(tmp_path: Path, override: str, part: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "seed": 1}))
    with pytest.raises(SpecError, match=part):
        load_spec(TrainingSpec, path, [override])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "not a mapping"), ("a: [", "not valid YAML"), ("", "not a mapping"),
        ("seed: 1\ndata: {train: a, train: b}\n", "(?s)'train' is given twice.*line 2"),
    ],
)  # fmt: skip
def test_files_that_are_no_spec(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=part):
        load_spec(TrainingSpec, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"gone\.yaml: cannot be read"):
        load_spec(TrainingSpec, tmp_path / "gone.yaml")


@pytest.mark.parametrize("key", ["epochs", "optimizer.learning_rate", "method.alpha"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_are_finite(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(SpecError, match="finite"):
        load_spec(TrainingSpec, path, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["store", "output.store"])
def test_the_store_is_the_specs_or_the_environments(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def store(own: str | None = None) -> str:
        if key == "store":
            service = {"name": "a", "engine": {"base_model": "base"}}
            return parse_spec(ServingSpec, service | ({"store": own} if own else {})).store
        output = GOOD["output"] | ({"store": own} if own else {})
        return parse_spec(TrainingSpec, GOOD | {"output": output}).output.store

    monkeypatch.delenv("GRAFT_STORE", raising=False)
    assert store() == str(Path("graft-store").absolute())
    monkeypatch.setenv("GRAFT_STORE", "s3://bucket/adapters")
    assert store() == "s3://bucket/adapters"
    assert store("s3://own") == "s3://own"


def test_a_spec_never_changes() -> None:
    spec = parse_spec(TrainingSpec, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 1  # type: ignore[misc]


TRAINING = sorted([*ROOT.glob("configs/training/*.yaml"), *ROOT.glob("configs/demo/*.yaml")])
TRAINING = [path for path in TRAINING if path.name != "serving.yaml"]
SERVING = sorted([*ROOT.glob("configs/serving/*.yaml"), ROOT / "configs/demo/serving.yaml"])


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_training_preset_loads_and_its_files_are_there(path: Path) -> None:
    spec = load_spec(TrainingSpec, path)
    assert (ROOT / spec.data.train).exists()
    # The demo has no encoder-decoder; that preset's base is the user's.
    assert spec.task == "seq_2_seq_lm" or (ROOT / spec.base_model / "config.json").exists()


@pytest.mark.parametrize("path", SERVING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_serving_preset_loads(path: Path) -> None:
    load_spec(ServingSpec, path)


def test_there_is_a_training_preset_for_every_method() -> None:
    from training.methods import METHODS

    presets = (ROOT / "configs/training").glob("*.yaml")
    assert {load_spec(TrainingSpec, path).method.kind for path in presets} == set(METHODS)
