"""How the weights of a base's linear modules are kept: in 4 or 8 bits, by bitsandbytes.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314) and LLM.int8() (arXiv:2208.07339). Training and
serving name it by the same spec. No torch here; the arithmetic is in cluster.quantized_linear.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.errors import BaseModelError
from cluster.spec import Spec


class QuantizationSpec(Spec):
    """Weights of the base's linear modules in 4 or 8 bits (bitsandbytes); embeddings, output
    embedding, norms and biases stay as they are. Products are computed in the dtype of the rest,
    from weights unpacked for the moment."""

    bits: Literal[4, 8] = Field(
        4,
        description="4: blocks of 64 values with a scale each (QLoRA, arXiv:2305.14314); 8: whole "
        "rows with a scale each (the weights of LLM.int8(), arXiv:2208.07339; activations are not "
        "rounded).",
    )
    quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="The 16 values of 4 bits; `nf4`, for normal weights, if not given."
    )
    double_quant: bool | None = Field(
        None, description="Keep the scales of 4-bit blocks in 8 bits too; true if not given."
    )

    @model_validator(mode="after")
    def _consistent(self) -> QuantizationSpec:
        if self.bits == 8 and (self.quant_type is not None or self.double_quant is not None):
            raise ValueError("quant_type and double_quant are of 4 bits; leave them out with 8")
        return self

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        double = "" if self.double_quant is False else ", double"
        return f"4 bits ({self.quant_type or 'nf4'}{double})"


def saved_quantization(path: str, config: dict[str, Any]) -> QuantizationSpec | None:
    """How the folder at `path`, of that config.json, was saved quantised; None if it was not.

    Raises:
        BaseModelError: by something else than bitsandbytes.
    """
    saved: Any = config.get("quantization_config")
    if not saved:
        return None
    method = saved.get("quant_method", "bitsandbytes") if isinstance(saved, dict) else saved
    if method != "bitsandbytes":
        raise BaseModelError(
            f"base_model {path}: is saved quantised by {str(method)[:40]!r}; bases of bitsandbytes "
            "are taken, and plain ones, which `quantization` quantises when they are loaded"
        )
    if saved.get("load_in_8bit"):
        return QuantizationSpec(bits=8, quant_type=None, double_quant=None)
    quant_type = saved.get("bnb_4bit_quant_type", "fp4")
    double = bool(saved.get("bnb_4bit_use_double_quant"))
    return QuantizationSpec(bits=4, quant_type=quant_type, double_quant=double)
