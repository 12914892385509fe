"""Adapters by bytes: what is counted, what moves, what host memory keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from safetensors.torch import load_file

from cluster.errors import AdapterError
from serving.adapters import LinearDelta, LoweredAdapter, describe, lower, moved, num_bytes
from serving.adapters.memory import _strided, _tensors
from serving.engine import Engine, EngineSpec
from serving.engine.host_tier import HostTier

CPU = torch.device("cpu")


def adapter_of(size: int) -> LoweredAdapter:
    """One of `size` bytes."""
    return LoweredAdapter({"m": LinearDelta(shift_O=torch.ones(size // 4))})


@pytest.mark.parametrize("variant", ["lora", "lora_patterns", "ia3", "prefix_tuning", "full"])
def test_an_adapter_counts_by_its_tensors_at_their_ranks(
    bases: Callable[[str], Path], tmp_path: Path, variant: str
) -> None:
    from adapters import load

    folder = make_adapter(variant, bases("llama"), tmp_path)
    lowered = lower(folder, describe(load(bases("llama")), "llama"))
    saved = sum(t.nbytes for t in load_file(folder / "adapter_model.safetensors").values())
    assert num_bytes(lowered) == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize(
    "variant",
    ["saved_modules", "layernorm", "bottleneck", "prompt_tuning", "prefix_tuning", "full"],
)
def test_nothing_of_an_adapter_stays_in_its_file(
    bases: Callable[[str], Path], tmp_path: Path, variant: str
) -> None:
    """The weights are mapped while they are read; what is written into the file later is not the
    adapter's."""
    from adapters import load

    folder = make_adapter(variant, bases("llama"), tmp_path)
    lowered = lower(folder, describe(load(bases("llama")), "llama"))
    before = [tensor.clone() for tensor in _strided(_tensors(lowered))]
    weights = folder / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert len(before) > 0
    for tensor, kept in zip(_strided(_tensors(lowered)), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_what_two_tensors_share_counts_once_and_sparse_ones_by_their_parts() -> None:
    shared = torch.ones(6, 10)
    sparse = torch.eye(8).to_sparse_csr()
    lowered = LoweredAdapter(
        {"a": LinearDelta(shared[:3].T, shared[3:]), "b": LinearDelta(sparse=sparse)}
    )
    plain, parts = 6 * 10 * 4, 8 * 4 + (9 + 8) * 8
    assert plain + parts <= num_bytes(lowered) <= plain + 2 * parts  # torch may keep both indices
    elsewhere = moved(lowered, torch.device("meta"))
    delta = elsewhere.deltas["a"]
    assert isinstance(delta, LinearDelta)
    assert delta.a_Ir is not None
    assert delta.a_Ir.is_meta
    assert delta.a_Ir.shape == (10, 3)


def test_host_memory_keeps_the_most_recently_used_within_its_bytes() -> None:
    tier = HostTier(1000, CPU)
    for name in "abc":
        tier.put(name, adapter_of(400), f"{name}@1")  # "a" leaves for "c"
    assert tier.get("a") is None
    assert tier.get("b") is not None
    tier.put("d", adapter_of(400), "d@1")  # "c" leaves: "b" was used since
    assert tier.get("c") is None
    assert tier.get("b") is not None
    tier.put("e", adapter_of(1200), "e@1")  # larger than the tier
    assert tier.get("e") is None
    assert (tier.num_bytes, tier.hits, tier.evictions) == (800, 2, 2)
    assert tier.refs == ["d@1", "b@1"]
    nothing = HostTier(0, CPU)
    nothing.put("a", adapter_of(400), "a@1")
    assert (nothing.get("a"), nothing.num_bytes) == (None, 0)


def test_an_adapter_larger_than_all_the_memory_is_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = Engine(EngineSpec(base_model=str(bases("llama")), adapters_gib=1e-7))
    with pytest.raises(AdapterError, match=r"GiB are over engine.adapters_gib"):
        engine.add_adapter("a", make_adapter("lora", bases("llama"), tmp_path))
