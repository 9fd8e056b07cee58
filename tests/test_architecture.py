"""Holds the house in order: who may import whom, and that no function or room grows without an owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_xai"
LAYERS = (
    "data",
    "models",
    "attribution",
    "metrics",
    "tasks",
    "callbacks",
    "commands",
    "cli",
)  # each imports only leftwards
MAY_REPORT = ("tasks", "callbacks", "commands", "cli")
HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "open_clip", "webdataset"}
NO_OWNER = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
LONGEST_BODY = 50

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
SOURCES = MODULES + sorted((ROOT / "benchmarks").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sbatch")), ROOT / ".ci" / "run"]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Every imported name in full, also inside functions: `from a import b` yields `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def broken_imports(module: str, source: str) -> list[str]:
    """What `module` imports against the rules."""
    room = room_of(module)
    if room in ("", "__main__"):
        return []  # the public names and the entry point stand above all rooms
    return [name for name in imports(source) if not may_import(room, name)]


def may_import(room: str, name: str) -> bool:
    first = name.split(".")[0]
    if name.startswith("."):
        return False  # a relative import hides its direction
    if first != PACKAGE:
        return not (room == "report" and first in HEAVY)
    target = room_of(name)
    if target == room or target.startswith("__"):
        return True  # __version__ is no room
    if target == "report":
        return room in MAY_REPORT
    return room in LAYERS and target in LAYERS and LAYERS.index(target) < LAYERS.index(room)


def long_functions(source: str) -> list[str]:
    long = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > LONGEST_BODY:
                long.append(f"{node.name}: {lines} lines")
    return long


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_module_imports_only_leftwards(path: Path) -> None:
    assert broken_imports(name_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("lightning_xai.data.batch", "from lightning_xai.models import loss", ["lightning_xai.models.loss"]),
        ("lightning_xai.data.batch", "def f():\n    import lightning_xai.cli", ["lightning_xai.cli"]),
        ("lightning_xai.data.batch", "from lightning_xai import metrics", ["lightning_xai.metrics"]),
        ("lightning_xai.data.batch", "from . import sample", ["..sample"]),
        ("lightning_xai.data.batch", "from lightning_xai import DualEncoder", ["lightning_xai.DualEncoder"]),
        ("lightning_xai.report.plots", "import torch.nn", ["torch.nn"]),
        ("lightning_xai.report.plots", "from lightning.pytorch import Trainer", ["lightning.pytorch.Trainer"]),
        ("lightning_xai.report.plots", "from lightning_xai.data import sample", ["lightning_xai.data.sample"]),
        ("lightning_xai.metrics.rho", "from lightning_xai.report import plots", ["lightning_xai.report.plots"]),
        ("lightning_xai.demo", "from lightning_xai.data import sample", ["lightning_xai.data.sample"]),
        ("lightning_xai.training.g", "from lightning_xai.report import plots\nimport torch", []),
        ("lightning_xai.cli", "from lightning_xai import __version__\nfrom lightning_xai.tasks import x", []),
        ("lightning_xai.report.plots", "import numpy\nfrom lightning_xai.report import tables", []),
        ("lightning_xai", "from lightning_xai.cli import main", []),
    ],
)
def test_the_rules_tell_right_from_wrong(module: str, source: str, broken: list[str]) -> None:
    assert broken_imports(module, source) == broken


def test_every_room_has_an_owner() -> None:
    rooms = {room_of(name_of(path)) for path in MODULES} - {"", "__main__"}
    assert rooms <= {*LAYERS, "report"}, "name the new room's place in LAYERS"
    assert {"data", "report"} <= rooms, "no modules were found, so nothing was checked"
    nobody = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts} & NO_OWNER
    assert not nobody, "say in its name what a module is for"


def test_reports_are_read_without_torch_and_without_pyplot() -> None:
    code = (
        "import sys, lightning_xai.report.plots, lightning_xai.report.tables\n"
        f"print(*sorted(({HEAVY!r} | {{'matplotlib.pyplot'}}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", "imported by lightning_xai/__init__.py, or by something that report imports"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_each_package_states_its_public_names(path: Path) -> None:
    assigned = {
        target.id
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    assert "__all__" in assigned


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert long_functions(path.read_text(encoding="utf-8")) == []


def test_the_length_of_a_function_leaves_its_docstring_out() -> None:
    docstring = '    """' + "word\n" * 80 + '    """\n'
    assert long_functions("def f():\n" + docstring + "    x = 1\n" * LONGEST_BODY) == []
    assert long_functions("def f():\n" + docstring) == []
    assert long_functions("class C:\n  async def f():\n" + "    x = 1\n" * 51) == ["f: 51 lines"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_shell_script_parses_and_stops_at_the_first_error(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in path.read_text(encoding="utf-8").splitlines()
