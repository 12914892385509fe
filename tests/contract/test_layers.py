"""The arrows between the packages: who may import whom, and who may import torch or Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cluster", "training", "serving")
MODULES = {
    path.relative_to(ROOT)
    .with_suffix("")
    .as_posix()
    .replace("/", ".")
    .removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

# The shell of serving, outside in. A room may import the rooms named after it, and itself.
ROOMS = {
    "cluster": {"cluster"},
    "training": {"training", "cluster"},
    "serving.spec": {"serving.spec", "cluster"},
    "serving.protocol": {"serving.protocol", "cluster"},
    "serving.adapters": {"serving.adapters", "cluster"},
    "serving.engine": {"serving.engine", "serving.adapters", "serving.spec", "cluster"},
    "serving.background": set(),
    "serving.engine_thread": {"serving.engine", "serving.background", "cluster"},
    "serving.adapter_loader": {"serving.engine", "serving.adapters", "serving.background",
                               "cluster"},
    "serving.arrivals": {"serving.adapter_loader", "serving.engine_thread", "serving.adapters",
                         "cluster"},
    "serving.replica": {"serving.arrivals", "serving.adapter_loader", "serving.engine_thread",
                        "serving.engine", "serving.spec", "cluster"},
    "serving.store_reads": set(),
    "serving.catalogue": {"serving.store_reads", "cluster"},
    "serving.import_watch": {"cluster"},
    "serving.keys": {"cluster"},
    "serving.gateway": {"serving.gateway", "serving.catalogue", "serving.protocol", "serving.keys",
                        "serving.engine.request", "serving.engine.ranges", "serving.spec",
                        "serving.ingress", "serving.import_watch", "cluster"},
    "serving.ingress": set(),
    "serving.router": {"serving.reports", "cluster"},
    "serving.reports": set(),
    "serving.autoscaling": set(),
    "serving.deployment": {"serving.replica", "serving.gateway", "serving.router",
                           "serving.reports", "serving.autoscaling", "serving.engine.request",
                           "serving.spec", "cluster"},
    "serving.shutdown": {"cluster"},
    "serving.app": {"serving.deployment", "serving.shutdown", "serving.spec", "cluster"},
    "serving.asking": {"serving.protocol", "cluster"},
    "serving.outage": {"serving.asking", "cluster"},
    "serving.async_client": {"serving.asking", "serving.connection", "serving.batch_file",
                             "serving.outage", "serving.pace", "serving.local", "serving.protocol",
                             "serving.spec", "cluster"},
    "serving.client": {"serving.async_client", "serving.asking", "serving.event_loop",
                       "serving.spec"},
    "serving.event_loop": set(),
    "serving.connection": {"serving.asking", "cluster"},
    "serving.local": {"serving.gateway", "serving.replica", "serving.app", "serving.spec",
                      "cluster"},
    "serving.pace": {"cluster"},
    "serving.batch_file": {"serving.async_client", "serving.asking", "serving.outage",
                           "serving.journal", "serving.meanings", "serving.progress",
                           "serving.protocol", "cluster"},
    "serving.meanings": {"serving.async_client", "serving.journal", "cluster"},
    "serving.progress": set(),
    "serving.journal": {"cluster"},
    "serving.offline": {"serving.offline", "serving.replica", "serving.gateway",
                        "serving.catalogue", "serving.protocol", "serving.asking",
                        "serving.batch_file", "serving.journal", "serving.progress",
                        "serving.engine.request", "serving.spec", "cluster"},
    "serving.command": {"serving.app", "serving.asking", "serving.client", "serving.offline",
                        "serving.local",
                        "serving.keys", "serving.spec", "cluster"},
}  # fmt: skip

# Prefix of the importing module -> libraries that must not be loaded by importing it.
WITHOUT = {
    "cluster.errors": {"torch", "ray", "transformers", "obstore", "pydantic"},
    "cluster.spec": {"torch", "ray", "transformers", "obstore"},
    "cluster.store": {"torch", "ray", "transformers"},
    "cluster.registry": {"torch", "ray", "transformers"},
    "cluster.local_copies": {"torch", "ray", "transformers"},
    "cluster.cli": {"torch", "ray", "transformers", "deepspeed"},
    "training.spec": {"torch", "ray", "transformers", "deepspeed"},
    "training.step": {"ray", "deepspeed", "datasets", "obstore"},
    "training.loop": {"ray", "deepspeed", "datasets", "obstore"},
    "training.assembly": {"ray", "deepspeed", "datasets", "obstore"},
    "training.methods": {"ray", "deepspeed", "datasets", "obstore"},
    "serving.spec": {"torch", "ray", "transformers"},
    "serving.protocol": {"torch", "ray", "transformers"},
    "serving.client": {"torch", "ray", "transformers", "fastapi"},
    "serving.gateway.routes": {"ray", "deepspeed", "datasets", "opentelemetry.sdk"},
    "serving.offline": {"ray"},
    "serving.local": {"ray"},
    "serving.adapters": {"ray", "deepspeed", "datasets", "obstore", "fastapi"},
    "serving.engine": {"ray", "deepspeed", "datasets", "obstore", "fastapi"},
}


def imported_modules(path: Path) -> set[str]:
    """Every module that `path` imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_the_rooms_below_it(module: str) -> None:
    own = {m for m in imported_modules(MODULES[module]) if m.split(".")[0] in PACKAGES}
    room = max((r for r in ROOMS if within(module, {r})), key=len, default=None)
    assert room or module == "serving", f"{module} has no room: name what it may import"
    allowed = ROOMS[room] if room else set()
    assert {m for m in own if not within(m, allowed)} == set()


def test_training_and_serving_never_meet() -> None:
    for module, path in MODULES.items():
        other = {"training": "serving", "serving": "training"}.get(module.split(".")[0])
        if other:
            assert not {m for m in imported_modules(path) if within(m, {other})}, module


def test_the_core_of_the_engine_is_plain_python() -> None:
    for module in ("pages", "sequence", "fair_queue", "scheduler"):
        module = f"serving.engine.{module}"
        assert not {m for m in imported_modules(MODULES[module]) if within(m, {"torch"})}


@pytest.mark.parametrize("module", WITHOUT)
def test_importing_a_module_does_not_load_what_it_does_not_need(module: str) -> None:
    banned = sorted(WITHOUT[module])
    code = f"import sys, {module}; print(*sorted(set({banned}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
