"""What the documents say is what the code does: commands parse, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from presets import KINDS, QUANTIZED, ROWS

from cluster.cli import _build

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.md")]
    if page.name != "reference.md"
)
FENCES = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[str]:
    """Every command of the pages that begins so, its continuation lines joined."""
    text = "\n".join(page.read_text() for page in PAGES)
    shell = [block for language, block in FENCES.findall(text) if language in ("", "bash")]
    blocks = "\n".join(shell).replace("\\\n", " ")
    found = [line.strip() for line in blocks.splitlines() if line.strip().startswith(start)]
    return sorted(set(found))


def test_there_are_commands() -> None:
    assert len(commands("graft ")) > 8


@pytest.mark.parametrize("command", commands("graft "))
def test_every_graft_command_of_the_documents_parses(command: str) -> None:
    part: Any = typer.main.get_command(_build())  # type: ignore[arg-type]
    name, *arguments = shlex.split(command, comments=True)
    context: Any = None
    while hasattr(part, "resolve_command"):
        context = part.make_context(name, arguments, parent=context)
        name, part, arguments = part.resolve_command(
            context, [*context._protected_args, *context.args]
        )
    part.make_context(name, [*arguments], parent=context)
    for argument in arguments:
        if re.match(r"configs/.*\.yaml$", argument):
            assert (ROOT / argument).exists(), command


def test_every_make_target_of_the_documents_is_there() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"`make (\w+)|^make (\w+)", page.read_text(), re.MULTILINE)
        assert {one or other for one, other in named} <= targets, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_files_named_in_the_documents_are_there() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:tests|docs|configs|cluster|training|serving)/[\w./]*)`",
                               page.read_text()):  # fmt: skip
            assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), f"{page}: {path}"


def test_the_reference_is_fresh() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--check"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_table_of_stages_has_every_method_and_nothing_that_fails() -> None:
    stages, bases = (ROOT / "docs" / "stages.md").read_text().split("## Bases")
    for text, rows in ((stages, [*ROWS, *QUANTIZED]), (bases, list(KINDS.values()))):
        names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
        assert names[1:] == rows, "run `make docs`"
        assert "fails" not in text


def test_every_file_of_the_packages_is_packaged() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaged = set(project["tool"]["setuptools"]["packages"])
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in ("cluster", "training", "serving")
        for path in (ROOT / room).rglob("*.py")
    }
    assert found == packaged


def test_every_kernel_is_packaged() -> None:
    import tomllib
    from fnmatch import fnmatch

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]
    kernels = [path for kind in ("*.cpp", "*.h") for path in ROOT.glob(f"*/**/{kind}")]
    names = [path.relative_to(ROOT) for path in kernels]
    names = [name for name in names if not name.parts[0].startswith(".venv")]
    assert names
    for name in names:
        room, *rest = name.parts
        assert any(fnmatch("/".join(rest), pattern) for pattern in patterns[room]), name
