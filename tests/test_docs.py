"""README.md, CONTRIBUTING.md and docs/ show what runs as it stands, but for weights that a test cannot have."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from lightning_xai import cli
from lightning_xai.attribution import METHODS
from lightning_xai.commands import COMMANDS
from lightning_xai.data.shapes import prepare_shapes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
PRETRAINED = 'load_dual_encoder("ViT-B-16", pretrained="openai")'


class Block(NamedTuple):
    """A fenced block of a page: the comment above it, the words after the fence, and its text."""

    comment: str
    language: str
    title: str
    code: str


def blocks(text: str) -> list[Block]:
    pattern = r'(?:<!-- (\S+) -->\n)?```(\w+)(?: title="([^"]+)")?\n(.*?)```'
    return [Block(*found) for found in re.findall(pattern, text, re.DOTALL)]


def runnable(page: Path) -> list[str]:
    return [block.code for block in blocks(page.read_text()) if block.comment == "run"]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_python_that_is_marked_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture_file: Callable[[str], Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for picture, size in (("dog.jpg", (40, 30)), ("1000092795.jpg", (500, 375))):
        Image.effect_noise(size, 64).convert("RGB").save(picture)
    names: dict[str, Any] = {}
    for code in runnable(page):  # the blocks of a page follow each other
        exec(code.replace(PRETRAINED, f'load_dual_encoder("{architecture_file("vit")}")'), names)
    if page.stem == "explain":
        assert names["result"].interactions.shape == (1, 16, 4, 4)
        assert names["encoder"].tokenizer.decode(names["tokens"][0][names["span"][0]]).strip() == "dog"


def test_all_python_compiles_and_all_yaml_parses() -> None:
    import yaml

    for page in PAGES:
        for block in blocks(page.read_text()):
            if block.language == "python":
                compile(block.code, str(page), "exec")
            if block.language == "yaml":
                yaml.safe_load(block.code)


def test_commands_are_what_the_parser_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def recording(name: str, command: Any) -> Any:
        """The command with the same options, which only says that it was called."""
        if isinstance(command, Mapping):
            return {key: recording(f"{name} {key}", entry) for key, entry in command.items()}
        if isinstance(command, type):
            monkeypatch.setattr(command, "__call__", lambda self: called.append(name))
            return command

        @functools.wraps(command)
        def record(*args: Any, **kwargs: Any) -> None:
            called.append(name)

        return record

    monkeypatch.setattr(cli, "COMMANDS", {name: recording(name, command) for name, command in COMMANDS.items()})
    pattern = rf"^python -m lightning_xai ((?:{'|'.join(COMMANDS)}) (?:[^\n\\]|\\\n)*)"
    shown = [block.code for block in blocks(TEXT) if block.language == "bash"]
    for command in re.findall(pattern, "\n".join(shown), re.MULTILINE):
        if "prepare folder" not in command:  # of the package that a how-to builds, see below
            cli.main(shlex.split(command.replace("\\\n", " ")))
    assert {name.split()[0] for name in called} == set(COMMANDS)
    assert {name.split()[1] for name in called if name.startswith("prepare")} == set(COMMANDS["prepare"]) - {"shapes"}


def test_files_that_the_pages_name_exist() -> None:
    named = set(
        re.findall(r"(?<![\w/.-])(?:configs|slurm|benchmarks|examples|tests|lightning_xai)/[\w/.=-]+\.\w+", TEXT)
    )
    assert {"configs/demo.yaml", "benchmarks/quadrature.py"} <= named
    assert [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()] == []


def test_links_of_readme_and_contributing_lead_to_files() -> None:
    for page in PAGES[:2]:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_finds_each_of_its_blocks_once() -> None:
    marked = [block.comment.removeprefix("ci:") for block in blocks(TEXT) if block.comment.startswith("ci:")]
    assert sorted(marked) == ["demo", "docs", "evaluate", "lint", "rest", "test"]


def test_the_table_of_methods_is_complete() -> None:
    page = (ROOT / "docs/concepts/methods.md").read_text()
    missing = [name for name in METHODS if f"`{name}`" not in page or f"`{METHODS[name].__name__}`" not in page]
    assert missing == []


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package that the how-tos build, installed as pip would: modules, and metadata with entries."""
    folder = tmp_path_factory.mktemp("site")
    metadata = folder / "my_package-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 0.1.0\n")
    entries = ""
    for block in blocks(TEXT):
        if block.title.endswith(".py"):
            (folder / block.title).parent.mkdir(exist_ok=True)
            (folder / block.title).write_text(block.code)
        elif block.title == "pyproject.toml":
            group, lines = re.findall(r'\[project\.entry-points\."(.*?)"\]\n(.*)', block.code, re.DOTALL)[0]
            entries += f"[{group}]\n" + lines.replace('"', "")
    (metadata / "entry_points.txt").write_text(entries)
    assert sorted(path.stem for path in (folder / "my_package").iterdir()) == [
        "gradient_times_input", "half_area", "read_folder",
    ]  # fmt: skip
    return folder


@pytest.fixture
def run(plugins: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a command in an environment that has the package; returns what it printed."""

    def call(*arguments: object) -> str:
        environment = os.environ | {"PYTHONPATH": f"{plugins}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "lightning_xai", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.mark.slow
def test_the_how_tos_method_explains(
    run: Callable[..., str], tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    Image.effect_noise((40, 30), 64).convert("RGB").save(tmp_path / "dog.jpg")
    model = architecture_file("vit")
    options = ("--method", "gradient_times_input", "--options.absolute", "true", "--model.name", model)
    run("explain", "--image", "dog.jpg", "--caption", "a dog on a red mat", *options, "--out", "explained")
    assert "gradient_times_input" in (tmp_path / "explained/explanation.json").read_text()


@pytest.mark.slow
def test_the_how_tos_metric_is_measured_and_reported(run: Callable[..., str], tmp_path: Path) -> None:
    prepare_shapes(tmp_path / "shapes", 1, 4)
    config = {
        "model": {
            "class_path": "lightning_xai.evaluation.AttributionEvaluation",
            "init_args": {
                "model": str(ROOT / "configs/models/shapes_vit.json"),
                "pretrained": None,
                "out": "result",
                "methods": {"gradient_times_input": {}},
                "metrics": ["half_area"],
                "metric_options": {"half_area": {"share": 0.25}},
            },
        },
        "data": {
            "class_path": "lightning_xai.data.ShardDataModule",
            "init_args": {"test": "shapes/val", "num_workers": 0},
        },
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    run("test", "--config", "config.yaml")
    assert ",half_area," in (tmp_path / "result/values.csv").read_text()
    run("report", "result", "--out", "page")
    assert "Concentration" in (tmp_path / "page/report.html").read_text()


@pytest.mark.slow
def test_the_how_tos_source_is_prepared(run: Callable[..., str], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b"):
        Image.effect_noise((40, 30), 64).convert("RGB").save(pictures / f"{name}.jpg")
    (pictures / "a.txt").write_text("a picture of noise\n")
    printed = run("prepare", "folder", "--images", "pictures", "--out", "data/pictures")
    manifest = (tmp_path / "data/pictures/manifest.json").read_text()
    assert re.search(r"samples +1\b", printed)
    assert "image_without_caption" in manifest
