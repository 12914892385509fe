"""What every request for an answer may ask of it.

What a description tells is not OpenAI's: those fields are a table of the reference.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from serving.protocol.body import Body, Nothing, fault, neutral
from serving.protocol.forms import Form, ResponseFormat, Schema, StructuredOutputs

# OpenAI's limits, and two of ours.
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 2
# OpenAI has 4; lm-eval's local-completions sends all that a task has, and HumanEval has eight.
MAX_STOPS = 16
# OpenAI's schema has no limit, and each is looked at in every step.
MAX_BIASES = 1024

_TokenKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]


def _ranks(given: Any) -> Any:
    """vLLM's -1 is no limit."""
    return None if type(given) is int and given == -1 else given


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        False, description="The usage so far with every piece of a stream."
    )
    include_obfuscation: bool = False


class Sampling(Body):
    """What both kinds of completion share."""

    model: str = Field(
        min_length=1,
        description="The base; an adapter, as `name`, `name@version` or `name:alias`; or a "
        "weighted mix of up to eight adapters that change weights, as `a:0.7+b@3:-0.3`.",
    )
    max_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = None
    top_k: Annotated[int | None, BeforeValidator(_ranks)] = Field(
        None, description="Only so many of the most probable tokens are drawn from; -1 for all."
    )
    min_p: float | None = Field(
        None,
        description="Only tokens at least this share as probable as the most probable one are "
        "drawn from.",
    )
    adapter_rank: int | None = Field(
        None, description="Take so many of a DyLoRA's ranks; all if not given."
    )
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(
        None,
        description="Divides the logit of a token that occurs in prompt or answer if it is above "
        "0, else multiplies it.",
    )
    logit_bias: dict[_TokenKey, float] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] | None = Field(
        None, description="Tokens with which the answer ends, besides the end-of-sequence token."
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="Go on after the end-of-sequence token.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="What the answer must follow: one of `json` (a schema), `regex` (without "
        "look-around) and `choice` (texts).",
    )
    guided_json: Schema | None = Field(None, description="As `structured_outputs.json`.")
    guided_regex: str | None = Field(None, description="As `structured_outputs.regex`.")
    guided_choice: list[str] | None = Field(None, description="As `structured_outputs.choice`.")
    # Would change the answer, and is not served: only its neutral value is taken.
    allowed_token_ids: Annotated[Any, neutral()] = None
    bad_words: Nothing = None
    chat_template: Annotated[Any, neutral()] = None
    chat_template_kwargs: Nothing = None
    guided_grammar: Annotated[Any, neutral()] = None
    guided_whitespace_pattern: Annotated[Any, neutral()] = None
    include_stop_str_in_output: Annotated[Any, neutral(False)] = None
    length_penalty: Annotated[Any, neutral(1, 1.0)] = None
    min_tokens: Annotated[Any, neutral(0)] = None
    prompt_logprobs: Annotated[Any, neutral()] = None
    skip_special_tokens: Annotated[Any, neutral(True)] = None
    # -1 cuts a prompt to the context; one that is longer is refused here.
    truncate_prompt_tokens: Annotated[Any, neutral(-1)] = None
    use_beam_search: Annotated[Any, neutral(False)] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "needs stream = true")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if len(forms := self._forms()) > 1:
            first, second, *_ = forms
            raise fault(second, f"is given beside {first}; give one of them")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def form(self) -> Form | None:
        """The kind and rule that the answer must follow."""
        return next(iter(self._forms().values()), None)

    @property
    def names(self) -> dict[str, str]:
        """The fields by what the engine calls them, where that is otherwise."""
        form = next(iter(self._forms()), None)
        return {"response_format": form} if form else {}

    def _forms(self) -> dict[str, Form]:
        """Every form that is asked for, by its field."""
        asked: dict[str, Form | None] = {
            "response_format": self.response_format and self.response_format.form,
            "structured_outputs": self.structured_outputs and self.structured_outputs.form,
            "guided_json": None if self.guided_json is None else ("json_schema", self.guided_json),
            "guided_regex": None if self.guided_regex is None else ("regex", self.guided_regex),
            "guided_choice": None if self.guided_choice is None else ("choice", self.guided_choice),
        }
        return {name: form for name, form in asked.items() if form is not None}

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id, whose keys are text in JSON."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
