"""A base in 4 or 8 bits: what bitsandbytes and PEFT compute over it, for every method."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, make_adapter, variants_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cluster.base_model import load_base
from cluster.errors import AdapterError, BaseModelError
from cluster.quantization import QuantizationSpec
from cluster.quantized_linear import is_quantized, unpacked_weight
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest
from training import load_adapter

BITS = [4, 8]
# What they start from, or add to, are weights that are gone.
_OF_WEIGHTS = ("pissa", "olora", "parameters")
VARIANTS = [variant for variant in variants_of("llama") if variant not in _OF_WEIGHTS]
PROMPTS = [[72, 101, 108, 108, 111], list(range(40, 70)), [7]]
NEW_TOKENS = 24


def quantization(bits: int, **options: Any) -> QuantizationSpec:
    return QuantizationSpec.model_validate({"bits": bits, **options})


def library_config(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def library_base(base: Path, bits: int) -> Any:
    """transformers' own quantised model, untouched by ours."""
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=library_config(bits), device_map={"": "cpu"}
    )


def exact(model: Any) -> Any:
    """`model` with its linear modules in training mode: there alone bitsandbytes computes from
    whole activations and unpacked weights."""
    for module in model.eval().modules():
        if is_quantized(module):
            module.train()
    return model


def unpacked_base(base: Path, bits: int) -> Any:
    """The plain model of the weights that the quantised one has."""
    return library_base(base, bits).dequantize().float()


@pytest.fixture(scope="module", params=BITS)
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def engine(
    bits: int, bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Path]:
    """An engine over a quantised base, with every adapter, and the folder of these."""
    base, folder = bases("llama"), tmp_path_factory.mktemp("adapters")
    made = Engine(EngineSpec(base_model=str(base), quantization=quantization(bits)))
    for variant in VARIANTS:
        made.add_adapter(variant, make_adapter(variant, base, folder / variant))
    return made, folder


@torch.no_grad()
def greedy(model: Any, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_quantised_base_is_another_than_the_plain_one(
    engine: tuple[Engine, Path], bases: Callable[[str], Path]
) -> None:
    """Otherwise the tests below would show nothing."""
    (scored,) = engine[0].score([ScoreRequest(PROMPTS[1])])
    with torch.no_grad():
        plain = load(bases("llama"))(torch.tensor([PROMPTS[1]])).logits[0]
    assert (scored - plain).abs().max() > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_method_are_those_of_peft(
    engine: tuple[Engine, Path], bits: int, bases: Callable[[str], Path], variant: str
) -> None:
    made, folder = engine
    model = load_adapter(unpacked_base(bases("llama"), bits), folder / variant)
    for prompt, logits in zip(
        PROMPTS, made.score([ScoreRequest(prompt, variant) for prompt in PROMPTS]), strict=True
    ):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0, -len(prompt) :]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# A LoRA that was made on GPT-2's Conv1D.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_mixed_greedy_tokens_are_those_of_the_library(
    bits: int, bases: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """With a LoRA, with a DoRA, and without, over transformers' and PEFT's own quantised model."""
    base = bases(family)
    made = Engine(
        EngineSpec(base_model=str(base), quantization=quantization(bits), max_context_tokens=64)
    )
    references = {"": exact(library_base(base, bits))}
    for variant in ("lora", "dora"):
        folder = make_adapter(variant, base, tmp_path / variant)
        made.add_adapter(variant, folder)
        # PEFT's DoRA over bitsandbytes' own 8-bit module loses the scales of its weight on CPU.
        is_lost = (bits, variant) == (8, "dora")
        model = unpacked_base(base, bits) if is_lost else library_base(base, bits)
        references[variant] = exact(load_adapter(model, folder))
    cases = [(name, prompt) for prompt in PROMPTS for name in references]
    results = made.generate(
        [
            GenerationRequest(
                prompt_token_ids=prompt, adapter=name or None, max_tokens=NEW_TOKENS,
                ignore_eos=True,
            )
            for name, prompt in cases
        ]
    )  # fmt: skip
    for (name, prompt), result in zip(cases, results, strict=True):
        assert result.token_ids == greedy(references[name], prompt), (name, prompt)
    made.check()


def test_a_folder_that_was_saved_quantised_is_served(
    bits: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its own scales and no other quantisation of them; bitsandbytes' files, read as they are."""
    library_base(bases("llama"), bits).save_pretrained(tmp_path)
    spec = EngineSpec(base_model=str(bases("llama")), quantization=quantization(bits))
    saved = Engine(EngineSpec(base_model=str(tmp_path)))
    expected, found = (e.score([ScoreRequest(PROMPTS[1])])[0] for e in (Engine(spec), saved))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    Engine(EngineSpec(base_model=str(tmp_path), quantization=quantization(bits)))
    with pytest.raises(BaseModelError, match=r"saved quantised to .* leave quantization out"):
        Engine(EngineSpec(base_model=str(tmp_path), quantization=quantization(12 - bits)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_arithmetic_in_training_and_in_evaluation(
    bits: int, bases: Callable[[str], Path], dtype: str
) -> None:
    """And a bias that is trained in float32 is not cast, whatever comes in."""
    model = load_base(str(bases("opt")), getattr(torch, dtype), quantization(bits))
    layer = model.get_submodule("model.decoder.layers.0.fc1")
    layer.bias = torch.nn.Parameter(torch.full_like(layer.bias, 1 / 3, dtype=torch.float32))
    x = torch.randn(3, 5, 32, dtype=model.dtype, requires_grad=True)
    outputs: list[torch.Tensor] = []
    for training in (True, False):
        layer.train(training)
        outputs.append(layer(x))
        with torch.inference_mode():
            outputs.append(layer(x))
    expected = torch.nn.functional.linear(
        x, unpacked_weight(layer).to(x.dtype), layer.bias.to(x.dtype)
    )
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(output, outputs[0])
    (wanted,) = torch.autograd.grad(expected.float().square().sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad(outputs[0].float().square().sum(), x)
    torch.testing.assert_close(found, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)
    assert layer.bias.dtype == torch.float32


def test_what_a_quantised_base_cannot_tell_is_refused_by_name(
    bits: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    made = Engine(EngineSpec(base_model=str(bases("llama")), quantization=quantization(bits)))
    for variant in ("pissa", "olora"):
        folder = make_adapter(variant, bases("llama"), tmp_path / variant)
        with pytest.raises(AdapterError, match="cannot be told from a base in 4 or 8 bits"):
            made.add_adapter(variant, folder)
    made = Engine(EngineSpec(base_model=str(bases("gpt2")), quantization=quantization(bits)))
    for variant in ("fishmask", "full"):
        folder = make_adapter(variant, bases("gpt2"), tmp_path / variant)
        with pytest.raises(AdapterError, match="serve it over the plain base"):
            made.add_adapter(variant, folder)


def test_a_base_of_another_quantisation_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(bases("llama"))
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="saved quantised by 'gptq'"):
        load_base(str(tmp_path), torch.float32)


def test_importing_bitsandbytes_tells_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import cluster.base_model, peft, bitsandbytes"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "Failed to load" not in "".join(capfd.readouterr())
