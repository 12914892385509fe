"""Every method under every ZeRO stage, from what the tests find: docs/stages.md.

    python docs/stages.py

Runs tests/training/test_stages.py and makes the page of its report. Needs about three minutes on
two cores. `make docs` runs it.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "stages.md"
TESTS = "tests/training/test_stages.py"
WORDS = ("train", "save", "load", "resume")
LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
HEAD = f"""# Methods and ZeRO stages

Written by `make docs` from what [{TESTS}](../{TESTS}) finds; do not edit. A row is a preset of [configs/training](../configs/training), or one with [other options](../tests/presets.py), on a tiny Llama; two workers over gloo, float32, on CPU, with {{versions}}.

- **train**: after some steps, weights and moments are within 1e-5 of those of one worker without DeepSpeed.
- **save**: the adapter is within 1e-5 of stage 0's; at stages 1 and 2 it is the same bytes.
- **load**: plain PEFT, or `training.load_adapter` where PEFT lacks the method, gives the trained model's logits within 1e-5.
- **resume**: a run from the checkpoint of the middle ends with the same adapter and the same moments, byte for byte.

| method | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 | not defined |
|---|---|---|---|---|---|
"""  # noqa: E501
BASES = """
## Bases
Each kind of method on a tiny base of each family, with `gradient_checkpointing`: it learns (✓), or is refused before its first step, with these words. `graft train` finds what follows from names, kinds and sizes before it submits the job; what a base does with rows, such as whether they can be packed, its workers find when they start.

"""  # noqa: E501

IMPOSSIBLE = """
## Settings
What is refused on any base, and the words.

"""


def report() -> Iterator[ElementTree.Element]:
    """The test cases, as pytest reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.xml"
        options = [f"--junit-xml={path}", "-o", "junit_family=xunit1"]  # which has properties
        command = [sys.executable, "-m", "pytest", "-q", TESTS, *options]
        subprocess.run(command, cwd=ROOT, check=False)
        yield from ElementTree.parse(path).iter("testcase")


def outcome(case: ElementTree.Element, word: str) -> tuple[str, str | None]:
    """(what a cell says of a word, why it is not defined and the cell says nothing)."""
    if (skipped := case.find("skipped")) is not None:
        return "", skipped.get("message")
    is_bad = case.find("failure") is not None or case.find("error") is not None
    return (f"**{word} fails**" if is_bad else word), None


def page(cases: Iterator[ElementTree.Element]) -> str:
    """The whole page."""
    cells: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    fits: dict[str, dict[str, str]] = defaultdict(dict)
    refusals: list[str] = []
    impossible: list[str] = []
    for case in cases:
        name = case.get("name", "")
        if match := re.fullmatch(r"test_(\w+)\[(.+)-([0-3])\]", name):
            word, row, stage = match.groups()
            if word not in WORDS:
                continue
            text, reason = outcome(case, word)
            cells[row][stage].append(text)
            if reason and word not in reasons[row][reason]:
                reasons[row][reason].append(word)
        elif match := re.fullmatch(r"test_fit\[(\w+)-(\w+)\]", name):
            fits[match[1]][match[2]] = _fit(case, refusals)
        elif match := re.fullmatch(r"test_refuse\[(.+)\]", name):
            impossible.append(f"- {match[1]}: {_refusal(case) or '**fails**'}")
    lines = [_row(row, cells[row], reasons[row]) for row in cells]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    table = HEAD.format(versions=versions) + "\n".join(lines) + "\n"
    return table + _bases(fits, refusals) + IMPOSSIBLE + "\n".join(impossible) + "\n"


def _row(row: str, cells: dict[str, list[str]], reasons: dict[str, list[str]]) -> str:
    told = [f"{', '.join(words)}: {reason}" for reason, words in reasons.items()]
    by_stage = " | ".join(", ".join(filter(None, cells[stage])) for stage in "0123")
    return f"| {row} | {by_stage} | {'; '.join(told)} |"


def _refusal(case: ElementTree.Element) -> str | None:
    """What the code said, on one line."""
    found = [p.get("value", "") for p in case.iter("property") if p.get("name") == "refused"]
    return " ".join(found[0].split()) if found else None


def _fit(case: ElementTree.Element, refusals: list[str]) -> str:
    """A mark, or the number of a refusal."""
    mark, _ = outcome(case, "it")
    refused = _refusal(case)
    if mark != "it" or refused is None:
        return "✓" if mark == "it" else mark
    if refused not in refusals:
        refusals.append(refused)
    return f"[{refusals.index(refused) + 1}]"


def _bases(fits: dict[str, dict[str, str]], refusals: list[str]) -> str:
    families = list(next(iter(fits.values())))
    lines = [f"| method | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(of[f] for f in families)} |" for row, of in fits.items()]
    notes = [f"{number}. {text}" for number, text in enumerate(refusals, 1)]
    return BASES + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    text = page(report())
    PAGE.write_text(text)
    if "fails" in text:
        sys.exit(f"{PAGE} has failures")
