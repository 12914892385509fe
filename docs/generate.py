"""Write docs/reference.md from the code: every spec field, what requests can ask, every error.

`make docs` runs it; a contract test runs it with `--check`, so the page cannot go stale.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic_core import PydanticUndefined

from cluster.errors import OUTCOMES
from cluster.spec import Spec
from serving.protocol import ChatRequest, CompletionRequest, StreamOptions
from serving.protocol.body import is_refused
from serving.protocol.sampling import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOPS,
    MAX_TEMPERATURE,
)
from serving.protocol.texts import MAX_BEST_OF, MAX_COMPLETION_LOGPROBS
from serving.spec import ServingSpec
from training.spec import TrainingSpec
from training.task_spec import UNDEFINED

PAGE = Path(__file__).parent / "reference.md"
HEAD = """# Reference

Written by `make docs` from the field descriptions in the code; do not edit.
Unknown keys are refused with the nearest known one, and all errors of a file are shown at once.
"""


def specs_in(annotation: object) -> Iterator[type[Spec]]:
    """Every Spec class inside `annotation`, unions and containers unwrapped."""
    if inspect.isclass(annotation) and issubclass(annotation, Spec):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from specs_in(argument)


def type_name(annotation: object) -> str:
    """`annotation` as a reader writes it, with links to the specs on this page."""
    classes = list(dict.fromkeys(specs_in(annotation)))
    if classes:
        return " or ".join(f"[{cls.__name__}](#{cls.__name__.lower()})" for cls in classes)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if inspect.isclass(annotation) and not arguments:
        return "none" if annotation is type(None) else annotation.__name__
    if typing.get_origin(annotation) is typing.Annotated:
        return type_name(arguments[0])
    inner = ", ".join(type_name(argument) for argument in arguments if argument is not Ellipsis)
    origin = typing.get_origin(annotation)
    if origin in (tuple, list):
        return f"list of {inner}"
    if origin is dict:
        return f"map of {inner}"
    return inner.replace(", ", " or ")


def spec_table(cls: type[Spec]) -> str:
    """One spec as a Markdown section."""
    doc = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    lines = [
        f"### {cls.__name__}",
        "",
        doc,
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in cls.model_fields.items():
        if field.default_factory is not None:
            is_spec = list(specs_in(field.annotation))
            default = "see type" if is_spec else f"`{field.get_default(call_default_factory=True)}`"
        elif field.default is PydanticUndefined:
            default = "required"
        else:
            default = "see type" if isinstance(field.default, Spec) else f"`{field.default}`"
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        lines.append(f"| `{name}` | {type_name(field.annotation)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def spec_section(title: str, root: type[Spec]) -> str:
    """`root` and every spec it holds, breadth first."""
    queue, done = [root], list[type[Spec]]()
    while queue:
        cls = queue.pop(0)
        if cls in done:
            continue
        done.append(cls)
        for field in cls.model_fields.values():
            queue.extend(specs_in(field.annotation))
    return f"## {title}\n\n" + "\n".join(spec_table(cls) for cls in done)


def extensions() -> str:
    """The parameters that OpenAI has not, or that mean more here, by their descriptions."""
    bodies = (CompletionRequest, ChatRequest)
    fields = {name: field for body in bodies for name, field in body.model_fields.items()}
    prefixed = {f"stream_options.{n}": f for n, f in StreamOptions.model_fields.items()}
    lines = ["| parameter | meaning |", "|---|---|"]
    for name, field in (fields | prefixed).items():
        if field.description:
            meaning = field.description.replace("|", "\\|")
            lines.append(f"| `{name}` | {meaning} |")
    return "\n".join(lines)


def not_served() -> str:
    """The parameters that only a value that changes nothing may have."""
    of_completions, of_chats = (
        {name for name, field in body.model_fields.items() if is_refused(field.metadata)}
        for body in (CompletionRequest, ChatRequest)
    )
    served = CompletionRequest.model_fields.keys() - of_completions
    return ", ".join(
        f"`{name}`" + (" of a chat" if name in served else "")
        for name in sorted(of_completions | of_chats)
    )


def request_section() -> str:
    """The limits of a request's parameters beside OpenAI's."""
    return f"""## Requests: `POST /v1/completions`, `POST /v1/chat/completions`

The limits are those of OpenAI's schema: `temperature` 0 to {MAX_TEMPERATURE}, `n` 1 to \
{MAX_CHOICES}, `best_of` up to {MAX_BEST_OF}, `logprobs` of a completion 0 to \
{MAX_COMPLETION_LOGPROBS}, `top_logprobs` 0 to {MAX_LOGPROBS}, `presence_penalty` and \
`frequency_penalty` -2 to 2, `logit_bias` -100 to 100. These differ:

| parameter | OpenAI's | here | why |
|---|---|---|---|
| `stop` | 4 texts | {MAX_STOPS} texts | lm-eval's local-completions sends all of a task's: \
HumanEval has eight |
| `top_p` | 0 to 1 | above 0, to 1 | 0 leaves no token to draw; `temperature` 0 is greedy |
| `logit_bias` | any number | {MAX_BIASES:,} tokens | each is looked at in every step |
| `max_tokens` of a completion | from 0 | from 1, or 0 with `echo` and `logprobs` | 0 alone asks \
for nothing |
| `strict` of a tool | its calls follow the schema | they do where a tool must be called \
(`tool_choice`); else it is taken and has no effect | OpenAI's own helpers always send it |

These are not OpenAI's, or mean more here; vLLM's have vLLM's names. OpenAI's own client takes \
them in `extra_body`.

{extensions()}

These would change an answer and are not served. Any other value than the one that changes \
nothing is refused by the parameter's name: {not_served()}. Parameters that nobody knows are taken \
and have no effect.
"""


def error_section() -> str:
    """The error table, as users meet it."""
    lines = [
        "## Errors",
        "",
        "| error | HTTP | `type` | `code` | exit code | retry helps | meaning |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for cls, outcome in OUTCOMES.items():
        doc = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
        retry = "yes" if cls.retryable else "no"
        lines.append(
            f"| `{cls.__name__}` | {outcome.status} | `{outcome.type}` | `{outcome.code}` "
            f"| {outcome.exit_code} | {retry} | {doc} |"
        )
    return "\n".join(lines) + "\n"


def undefined_section() -> str:
    """The methods that a task has not, and why."""
    lines = [
        "## Methods that a task has not",
        "",
        "| task | method | because it |",
        "|---|---|---|",
    ]
    lines += [f"| `{task}` | `{kind}` | {why} |" for (task, kind), why in UNDEFINED.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    sections = [
        HEAD,
        spec_section("Training: `graft train SPEC.yaml`", TrainingSpec),
        undefined_section(),
        spec_section("Serving: `graft serve SPEC.yaml`", ServingSpec),
        request_section(),
        error_section(),
    ]
    return "\n".join(sections)


if __name__ == "__main__":
    os.environ.pop("GRAFT_STORE", None)  # which stands for a default
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} is stale: run `make docs`")
    PAGE.write_text(page())
