"""A folder's patterns mean what PEFT's `re` says of them, and none keeps it busy."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, make_adapter
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from cluster.adapter_folder import AdapterFolder
from cluster.errors import AdapterError
from serving.adapters import describe, lower
from serving.adapters.patterns import by_pattern, matching, without_patterns

Bases = Callable[[str], Path]
# Each alone has `re` busy for longer than anybody waits.
ENDLESS = [r"(\w+\w*\.?)+!", r"(a|[a-z._0-9]|\w|\.)*!", "(.?)" * 40 + "[.a-z]" * 40]
NAMES = ["model", "model.layers"] + [
    f"model.layers.{layer}{module}" for layer in (0, 1, 10, 11)
    for module in ("", ".self_attn.q_proj", ".self_attn.k_proj", ".mlp.up_proj", ".mlp.fc1")
]  # fmt: skip
PATTERNS = [
    "q_proj", "q.proj", "proj", "", ".*", r".*\.q_proj", r".*self_attn\.(q|k)_proj$", "^model", "$",
    r"model\.layers\.\d+\.mlp\..*", r"layers\.1\.(self_attn\.q_proj|mlp\.(up|down)_proj)", "q|fc1",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|fc1).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)", "[^.]+",
    r"(?i:MODEL).*", r"(?P<of>1)\.mlp\.fc1", r"1?\.mlp\.fc[0-9]", "l{2}", "f{c1", r"[\w.]{3,}1\b.*",
    r"\S+\B1", "[]m].*", "^model.layers.0.self_attn.q_proj", r".*\.1\..*(?:q_proj|fc\d)", "f.1|",
    r"(model|\.|layers|[0-9]+|self_attn|[qk]_proj)+", "[model.layers]*?", ".{10,30}", "x*", "(a*)*",
]  # fmt: skip


def folder(config: dict[str, Any]) -> AdapterFolder:
    return AdapterFolder(Path("/a"), {"peft_type": "LOKR", **config}, {})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_pefts_does(pattern: str) -> None:
    config = peft.LoKrConfig(target_modules=pattern)
    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    assert matching(folder({}), "target_modules", pattern, NAMES) == expected
    patterns = {pattern: 1, "fc1": 2, ".*1": 3, "model": 4}
    expected = {name: patterns.get(get_pattern_key(list(patterns), name)) for name in NAMES}
    found = by_pattern(folder({"rank_pattern": patterns}), "rank_pattern", NAMES)
    assert found == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize(
    "pattern",
    [r"(?=model).*", r"(?<!x)y", r"(.)\1", "(", "a)|(b", "[[:alpha:]]", "l{,2}", "a{2000}",
     "\ud800", r"\Z", "a" * 10**6],
)  # fmt: skip
def test_a_pattern_that_is_read_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match=r"in target_modules, which RE2 does not match"):
        matching(folder({}), "target_modules", pattern, NAMES)
    with pytest.raises(AdapterError, match=r"in rank_pattern, which RE2 does not match"):
        by_pattern(folder({"rank_pattern": {pattern: 1}}), "rank_pattern", NAMES)


def test_more_patterns_than_modules_can_have_are_refused() -> None:
    patterns = {str(number): 1 for number in range(10_001)}
    with pytest.raises(AdapterError, match="has 10,001 patterns in rank_pattern"):
        by_pattern(folder({"rank_pattern": patterns}), "rank_pattern", NAMES)


@pytest.mark.parametrize("endless", ENDLESS)
@pytest.mark.parametrize("variant", ["lora", "vera", "lokr"])
def test_no_pattern_keeps_the_interpreter(
    bases: Bases, tmp_path: Path, variant: str, endless: str
) -> None:
    made = make_adapter(variant, bases("llama"), tmp_path)
    target, path = describe(load(bases("llama")), "llama"), made / "adapter_config.json"
    sound = json.loads(path.read_text())
    for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern",
                  "alpha_pattern"):  # fmt: skip
        value = {endless: 3} if field in ("rank_pattern", "alpha_pattern") else endless
        path.write_text(json.dumps(sound | {field: value}))
        began_s = time.thread_time()
        with suppress(AdapterError):  # it matches nothing, so it may change nothing
            lower(made, target)
        assert time.thread_time() - began_s < 5


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": r".*\.(fc1|q_proj)"},
        {"target_modules": ["fc1", "gone", "", "mlp.up_proj"]},
        {"target_modules": ["fc1"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["fc1"], "exclude_modules": ["1.mlp.fc1", "gone"]},
        {"target_modules": ["fc1"], "layers_to_transform": [1, 11], "layers_pattern": "layers"},
        {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ],
)
def test_names_in_place_of_patterns_are_of_the_same_modules(given: dict[str, Any]) -> None:
    plain, named = peft.LoKrConfig(**given), peft.LoKrConfig(**given)
    without_patterns(folder(given), named, NAMES)
    for name in NAMES:
        is_target = bool(check_target_module_exists(plain, name))
        assert bool(check_target_module_exists(named, name)) == is_target, name


def test_ranks_by_pattern_reach_peft_by_name(bases: Bases, tmp_path: Path) -> None:
    """Of the kinds that read them, each in a way of its own."""
    base = bases("opt")
    options: dict[str, dict[str, Any]] = {
        "LoKrConfig": {"r": 2, "rank_pattern": {r"1\..*q_proj": 3}, "alpha_pattern": {"k_.*": 5}},
        "FourierFTConfig": {"n_frequency": 60, "n_frequency_pattern": {"q_.*": 7, "1.*fc1": 9}},
        "C3AConfig": {"block_size": 8, "block_size_pattern": {"q_.*": 4, "k_proj": 2}},
        "OSFConfig": {"effective_rank": 8, "rank_pattern": {r"\.q_": 4, "0.*k_proj$": 2}},
    }
    target = describe(load(base), "opt")
    for kind, given in options.items():
        torch.manual_seed(1)
        config = getattr(peft, kind)(target_modules=["q_proj", "k_proj", "fc1"], **given)
        model: Any = peft.get_peft_model(load(base), config)
        model.save_pretrained(str(tmp_path / kind))
        lower(tmp_path / kind, target)  # shapes tell the ranks
