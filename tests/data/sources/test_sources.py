"""The registry of data sets, and what another package has to do to add one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_files import jpeg
from source_files import prepare

from lightning_xai.cli import main
from lightning_xai.data.sources import SOURCES

PLUGIN = """
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lightning_xai.data import Sample


def read(*, folder: Path, split: str, most: int = 10, excluded: Counter[str]) -> Iterator[Sample]:
    \'\'\'Two photos of mine.

    Args:
        folder: where they lie.
        split: one of two.
        most: so many at most.
        excluded: reason -> count.
    \'\'\'
    for path in sorted(folder.glob("*.jpg"))[:most]:
        yield Sample(path.stem, path.read_bytes(), (40, 30), ("a photo",))
    excluded["photo_lost"] += 1


no_function = 3


def no_count(*, folder: Path) -> Iterator[Sample]: ...


def no_types(*, folder, excluded: Counter[str]) -> Iterator[Sample]: ...


def no_such_type(*, folder: Nowhere, excluded: Counter[str]) -> Iterator[Sample]: ...


def no_names(*folders: Path, excluded: Counter[str]) -> Iterator[Sample]: ...


def taken_option(*, out: Path, excluded: Counter[str]) -> Iterator[Sample]: ...


def no_samples(*, excluded: Counter[str]) -> Iterator[str]:
    yield "a photo"


def nothing(*, excluded: Counter[str]) -> None: ...
""".replace("\\'", "'")

RULES = {
    "no-function": "a source is a function",
    "no-count": "a source has a parameter `excluded: Counter[str]`",
    "no-types": "options of a source have types, from which the command line is made; 'folder' has none",
    "no-such-type": "the types of a source's options have to exist at run time",
    "no-names": "options of a source are given by name; 'folders' cannot be",
    "taken-option": "`prepare` has an option 'out' for every source",
    "no-samples": "a source yields lightning_xai.data.Samples; got a str",
    "nothing": "a source yields lightning_xai.data.Samples; it returned None",
    "not-there": "my_photos:not_there cannot be imported",
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that adds a good source, `my-photos`, and those of `RULES`."""
    site = tmp_path / "site"
    about = site / "my_photos-1.2.dist-info"
    about.mkdir(parents=True)
    (site / "my_photos.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-photos\nVersion: 1.2\n")
    entries = "".join(f"{name} = my_photos:{name.replace('-', '_')}\n" for name in RULES)
    (about / "entry_points.txt").write_text(f"[lightning_xai.sources]\nmy-photos = my_photos:read\n{entries}")
    monkeypatch.syspath_prepend(str(site))
    SOURCES.__dict__.pop("_plugins", None)
    monkeypatch.setattr(SOURCES, "_loaded", {})
    yield
    SOURCES.__dict__.pop("_plugins", None)
    sys.modules.pop("my_photos", None)


def test_another_package_adds_a_data_set(plugin: None, tmp_path: Path) -> None:
    assert list(SOURCES)[-len(RULES) - 1 :] == ["my-photos", *RULES]
    for number in range(3):
        (tmp_path / f"photo{number}.jpg").write_bytes(jpeg())
    manifest, samples = prepare("my-photos", tmp_path / "out", folder=tmp_path, split="all", most=2)
    assert (manifest.name, manifest.excluded) == ("my-photos/all", {"photo_lost": 1})
    assert [sample.key for sample in samples] == ["photo0", "photo1"]


@pytest.mark.parametrize("name", RULES)
def test_a_source_that_breaks_the_contract_is_named_with_package_entry_and_rule(
    plugin: None, name: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prepare", name, f"--out={tmp_path / 'out'}"])
    message = f"plug-in my-photos 1.2, entry {name!r} of lightning_xai.sources: {RULES[name]}"
    assert str(caught.value).startswith(f"lightning_xai prepare: {message}")


def test_a_data_set_needs_a_new_name(plugin: None, tmp_path: Path) -> None:
    points = tmp_path / "site" / "my_photos-1.2.dist-info" / "entry_points.txt"
    points.write_text("[lightning_xai.sources]\ncoco = my_photos:read\n")
    with pytest.raises(SystemExit, match=r"entry 'coco' of lightning_xai\.sources: the data set 'coco' is taken by"):
        main(["prepare", "--help"])


def test_the_help_of_all_data_sets_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for line in ("coco COCO 2014 or 2017: five captions an image, ", "rsicd RSICD: aerial images with five captions"):
        assert line in text
    program = (
        "import sys, lightning_xai.commands.prepare as p; dict(p.SOURCES); "
        "print(sorted({'torch', 'webdataset', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
