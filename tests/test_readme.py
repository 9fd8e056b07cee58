"""The README's code runs as it stands, but for weights and files that a test cannot have."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_xai import cli
from lightning_xai.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_attribution_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture_file: Callable[[str], Path]
) -> None:
    (example,) = (block for block in blocks("python") if "FeaturePairAttribution(encoder)" in block)
    loading = 'load_dual_encoder("ViT-B-16", pretrained="openai")'
    assert loading in example
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace(loading, f'load_dual_encoder("{architecture_file("vit")}")'), names)
    result = names["result"]
    assert result.interactions.shape == (1, 16, 4, 4)
    assert names["encoder"].tokenizer.decode(names["tokens"][0][names["span"][0]]).strip() == "dog"


def test_the_example_of_own_shards_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = (block for block in blocks("python") if "write_shards" in block)
    Image.new("RGB", (500, 375)).save(tmp_path / "1000092795.jpg")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (tmp_path / "data/flickr30k/val/manifest.json").is_file()


def test_all_other_python_compiles() -> None:
    for number, block in enumerate(blocks("python")):
        compile(block, f"README block {number}", "exec")


def test_commands_are_what_the_parser_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def recording(command: Any) -> Any:
        if isinstance(command, Mapping):
            return {name: recording(function) for name, function in command.items()}
        if isinstance(command, type):
            monkeypatch.setattr(command, "__call__", lambda self: called.append(type(self).__name__))
            return command

        @functools.wraps(command)
        def record(*args: Any, **kwargs: Any) -> None:
            called.append(command.__name__)

        return record

    monkeypatch.setattr(cli, "COMMANDS", {name: recording(command) for name, command in COMMANDS.items()})
    names = "prepare|export|explain|sanity-check|roar|report"
    commands = re.findall(rf"python -m lightning_xai ((?:{names}) (?:[^\n\\]|\\\n)*)", "\n".join(blocks("bash")))
    for command in commands:
        cli.main(shlex.split(command.replace("\\\n", " ")))
    expected = ["prepare_coco", "prepare_coco", "export", "Explain", "Explain", "SanityCheck", "Explain"]
    expected += ["Roar", "Report", "Roar", "Roar", "Report"]
    sources = ("flickr30k", "hnc", "conceptual_captions", "ms_cxr", "roco", "rsicd")
    assert called == expected + [f"prepare_{source}" for source in sources]


def test_the_table_of_methods_is_complete() -> None:
    from lightning_xai.attribution import METHODS

    (table,) = re.findall(r"\| `--method` \|.*?\n\n", README, re.DOTALL)
    for name, method in METHODS.items():
        assert f"`{name}`" in table
        assert f"`{method.__name__}`" in table


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"(?:configs|slurm|docs|benchmarks)/[\w/.-]+\.\w+", README))
    assert "configs/demo.yaml" in named
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing
