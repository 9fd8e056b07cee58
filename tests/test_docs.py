"""README.md, CONTRIBUTING.md and docs/ show what runs as it stands, but for weights that a test cannot have."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import PAGES, ROOT, TEXT, blocks
from PIL import Image

from lightning_xai import cli
from lightning_xai.attribution import METHODS
from lightning_xai.commands import COMMANDS

PRETRAINED = re.compile(r'(load_dual_encoder|lx\.load)\("ViT-B-16", pretrained="openai"\)')


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
        exec(PRETRAINED.sub(rf'\1("{architecture_file("vit")}")', code), names)
    if page.stem == "fine-tune":
        assert 0 < names["share"] < 0.2
    if page.stem == "explain":
        assert names["result"].interactions.shape == (1, 16, 4, 4)
        assert names["encoder"].tokenizer.decode(names["tokens"][0][names["span"][0]]).strip() == "dog"
        largest = zip(names["texts"], (names["row"], names["column"]), strict=True)
        assert [names["sentences"].tokenizer.decode(text[at : at + 1]) for text, at in largest] == ["dog", "puppy"]


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
        if "prepare folder" not in command:  # of the package that a how-to builds: test_plugins.py
            cli.main(shlex.split(command.replace("\\\n", " ")))
    assert {name.split()[0] for name in called} == set(COMMANDS)
    assert {name.split()[1] for name in called if name.startswith("prepare")} == set(COMMANDS["prepare"])


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
    assert sorted(marked) == ["demo", "docs", "evaluate", "lint", "rest", "test", "wheel"]


def test_the_table_of_methods_is_complete() -> None:
    page = (ROOT / "docs/concepts/methods.md").read_text()
    missing = [name for name in METHODS if f"`{name}`" not in page or f"`{METHODS[name].__name__}`" not in page]
    assert missing == []
