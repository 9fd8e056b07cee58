"""Kinds of broken input, each with what the user reads: one line each, so that the list can be read as a whole.

`pytest tests/test_broken_input.py -rP` prints the messages.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from captioned_shards import make_shards
from damaged_shards import damage_image, drop_json, duplicate_key, rewrite, shard_path, truncate
from result_folders import rewrite as rewrite_results
from result_folders import write_evaluation

from lightning_xai.cli import main

Break = Callable[[Path], Any]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change plain values of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def record(change: Callable[[Any], Any]) -> Break:
    """Change the .json member of the third record of the first shard; the manifest knows the new file."""

    def broken(folder: Path) -> None:
        def members(found: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
            return [(name, change(data) if name == "k2.json" else data) for name, data in found]

        rewrite(folder, 0, members)

    return broken


def field(**fields: Any) -> Break:
    return record(lambda data: json.dumps(json.loads(data) | fields).encode())


def manifest(change: Callable[[Any], Any]) -> Break:
    return lambda folder: edit(folder / "manifest.json", change)


def first(change: Callable[[Any], Any]) -> Break:
    return manifest(lambda content: change(content["shards"][0]))


def region(**fields: Any) -> Break:
    return field(regions=[{"label": "dog", "box": [2, 2, 6, 6], "crowd": False, "spans": {"0": [[2, 5]]}} | fields])


def cut(folder: Path) -> None:
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:5000])


def as_folder(folder: Path) -> None:
    shard_path(folder, 1).unlink()
    shard_path(folder, 1).mkdir()


def compress(folder: Path) -> None:
    shard_path(folder, 1).write_bytes(b"\x1f\x8b" + shard_path(folder, 1).read_bytes()[2:])


SHARDS: dict[str, tuple[Break, str]] = {
    "the image of a record has flipped bits": (lambda f: damage_image(f, 0, 3), r"k3.*the image does not decode"),
    "a record has lost its text": (lambda f: drop_json(f, 0, 5), r"k5: the \.json member is missing; rebuild"),
    "a record has lost its image": (
        lambda f: rewrite(f, 0, lambda found: [each for each in found if each[0] != "k2.jpg"]),
        r"k2: expected one image member .*, found 0; rebuild",
    ),
    "a record has two images": (
        lambda f: rewrite(f, 0, lambda found: [*found[:1], ("k0.png", found[0][1]), *found[1:]]),
        r"k0: expected one image member .*, found 2; rebuild",
    ),
    "a key comes twice in a shard": (lambda f: duplicate_key(f, 0, 2, 7), r"k2: its key comes twice in the shard"),
    "a key comes twice in a set": (
        lambda f: rewrite(f, 1, lambda found: [(name.replace("k10.", "k3."), data) for name, data in found]),
        r"record 0 has the key of record 3 of shard-000000\.tar",
    ),
    "a shard was not copied to its end": (cut, r"shard-000001\.tar has 5,000 bytes, not"),
    "a shard has zeros from the middle on": (lambda f: truncate(f, 1, 6), r"4 of 10 records are lost"),
    "a shard is compressed": (compress, r"it is not an uncompressed tar file"),
    "a shard is missing": (lambda f: shard_path(f, 1).unlink(), r"shard-000001\.tar is missing"),
    "a shard is a folder": (as_folder, r"shard-000001\.tar is missing"),
    "the text of a record is no JSON": (
        record(lambda data: data[:-9]),
        r"k2: broken JSON \(.*prepare the shards again",
    ),
    "the text of a record is of another version": (field(version=7), r"k2: schema version 7, expected 1; prepare"),
    "a record has no captions": (field(captions=[]), r"k2: at least one caption is needed .* got \(\); prepare"),
    "a caption is empty": (field(captions=["a", " "]), r"k2: at least one caption is needed and none may be empty"),
    "a caption is a number": (field(captions=[3]), r"Expected `str`, got `int` - at `\$\.captions\[0\]`.*prepare"),
    "a caption holds half a character": (field(captions=["\ud800"]), r"is no text \(surrogates not allowed\); prepare"),
    "the size of an image is zero": (field(width=0), r"k2: width and height have to be positive; got \(0, 12\)"),
    "the size is that of another image": (field(width=13), r"the image has \(12, 12\) pixels, .* for \(13, 12\)"),
    "a box has no area": (region(box=[2, 2, 0, 6]), r"k2: the box of 'dog' has no area: .*; prepare"),
    "a box lies outside the image": (region(box=[20, 2, 6, 6]), r"the box of 'dog' lies outside the image \(12, 12\)"),
    "a box has three numbers": (region(box=[2, 2, 6]), r"Expected `array` of length 4, got 3"),
    "words of a region leave their caption": (region(spans={"0": [[2, 500]]}), r"span \(2, 500\) of 'dog' leaves"),
    "a region names a caption that is not there": (region(spans={"9": [[0, 1]]}), r"'dog' has spans in caption 9 of 3"),
    "a hard negative belongs to no region": (
        field(negatives=[{"text": "a cat", "span": [2, 5], "caption": 0, "true_span": [2, 5], "region": 7}]),
        r"the hard negative 'a cat' belongs to caption 0 of 3 and region 7 of 2",
    ),
    "the manifest is missing": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: not found; check the path"),
    "the manifest is no JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        r"manifest\.json: broken JSON .*; restore the file or",
    ),
    "the manifest is of another version": (
        manifest(lambda content: content.update(version=9)),
        r"schema version 9, expected 1; restore",
    ),
    "the manifest lacks a field": (
        manifest(lambda content: content.pop("captions")),
        r"missing required field `captions`.*; restore",
    ),
    "the manifest lists no shard": (
        manifest(lambda content: content.update(shards=[])),
        r"no shard is listed; restore the file",
    ),
    "the manifest lists a shard twice": (
        manifest(lambda content: content["shards"].append(content["shards"][0])),
        r"a shard is listed twice; restore",
    ),
    "the name of a shard leaves the folder": (
        first(lambda entry: entry.update(name="../shard-000000.tar")),
        r"'\.\./shard-000000\.tar' is not allowed",
    ),
    "the name of a shard is an option": (
        first(lambda entry: entry.update(name="-rf.tar")),
        r"'-rf\.tar' is not allowed",
    ),
    "a checksum is wrong": (
        first(lambda entry: entry.update(sha256="0" * 64)),
        r"has the SHA-256 .* not 0000000000000000",
    ),
    "a shard holds more records than stated": (
        first(lambda entry: entry.update(samples=7)),
        r"holds 10 records, the manifest says 7",
    ),
    "the number of captions is wrong": (
        manifest(lambda content: content.update(captions=1)),
        r"manifest\.json says captions: 1, the shards hold 60",
    ),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("broken") / "set", 20)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that ends with an error has said."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code not in (0, None)
    said = capsys.readouterr()
    text = " ".join(f"{said.out} {ended.value.code}".split())
    print(text)  # noqa: T201 - -rP shows it
    return text


@pytest.mark.parametrize("kind", SHARDS)
def test_broken_shards_are_named(kind: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shards, tmp_path / "set")
    break_it, message = SHARDS[kind]
    break_it(tmp_path / "set")
    assert re.search(message, told(capsys, "verify", str(tmp_path / "set"), "--workers=0"))


def of_values(change: Callable[[Any], Any]) -> Break:
    return lambda folder: rewrite_results(folder, lambda values, targets: (change(values), targets))


def of_record(change: Callable[[Any], Any]) -> Break:
    return lambda folder: edit(folder / "result.json", change)


RESULTS: dict[str, tuple[Break, str]] = {
    "there are no results": (lambda f: shutil.rmtree(f), r"run is not a folder; give those of finished runs"),
    "the record is no JSON": (
        lambda f: (f / "result.json").write_text("{"),
        r"result\.json: field missing or of the wrong type .*; run it again",
    ),
    "the record is of another version": (
        of_record(lambda content: content.update(version=1)),
        r"version 1 of the result format, this release reads 2",
    ),
    "a label of a method leaves the folder": (
        of_record(lambda content: content["methods"].update({"../x": content["methods"]["random"]})),
        r"a label has 1 to 120 letters, .* got '\.\./x'.*run it again",
    ),
    "a metric has no scores": (
        of_record(lambda content: content["metrics"]["grounding"].update(scores=[])),
        r"the metric 'grounding' is .*run",
    ),
    "the table lacks its last rows": (
        lambda f: (f / "values.csv").write_text("\n".join((f / "values.csv").read_text().split("\n")[:9])),
        r"values\.csv: \d rows, expected \d+; run it again",
    ),
    "the table lacks a column": (of_values(lambda frame: frame.drop(columns="seed")), r"the columns seed are missing"),
    "a row is there twice": (
        of_values(lambda frame: frame.loc[[0, *frame.index]].reset_index(drop=True)),
        r"is there twice; run it again",
    ),
    "a value is out of bounds": (
        of_values(lambda frame: frame.assign(value=7.0)),
        r"expected a number in \[0\.0, 1\.0\], got 7\.0; run",
    ),
    "a target is not described": (
        lambda f: rewrite_results(f, lambda values, targets: (values, targets[1:])),
        r"targets\.csv lacks '.*run it again",
    ),
    "an example's image leaves the folder": (
        lambda f: edit(f / "random" / "examples.json", lambda c: c["examples"][0].update(image="../a.png")),
        r"the image '\.\./a\.png' lies outside of the result folder.*run it again",
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_broken_results_are_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(tmp_path / "run", {"feature_pair": 0.3, "random": 0.1}, images=12)
    break_it, message = RESULTS[kind]
    break_it(tmp_path / "run")
    assert re.search(message, told(capsys, "report", str(tmp_path / "run"), f"--out={tmp_path / 'out'}"))
