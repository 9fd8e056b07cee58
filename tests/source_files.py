"""Reading and preparing small data sets in tests of what reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fuzzing import broken_file, fuzz, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st
from image_files import UNSAFE_NAMES, jpeg

from lightning_xai.cli import main
from lightning_xai.data import Manifest, Sample
from lightning_xai.data.sample import encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import write_shards
from lightning_xai.data.sources import SOURCES

BROKEN_JSON = (
    (b'{"images": [\n  {"id": 4,,', "line 2 column 12"),
    (b"", "line 1 column 1"),
    (b"\xff\xfe\x00", "can't decode byte"),
    (b"[" * 200_000, "recursion"),
    (b"[1, 2]", "Expected `object`, got `array`"),
)


def read_all(read: Callable[..., Iterator[Sample]], **options: Any) -> tuple[list[Sample], dict[str, int]]:
    """All samples of a source, and how many of what could not be used."""
    excluded: Counter[str] = Counter()
    samples = list(read(**options, excluded=excluded))
    for sample in samples:
        encode_sample(sample)  # every sample keeps the contract
    return samples, dict(+excluded)


def prepare(name: str, out: Path, **options: Any) -> tuple[Manifest, list[Sample]]:
    """The manifest and the samples of a data set that the command line has prepared."""
    given = {name: value for name, value in options.items() if value is not None}
    main(["prepare", name, f"--out={out}", *(f"--{option}={value}" for option, value in given.items())])
    manifest = Manifest.load(out)
    records = read_samples(out, manifest, range(len(manifest.shards)), 0, manifest.samples)
    return manifest, [sample for _, sample in records if isinstance(sample, Sample)]


class World:
    """A data set in its publishers' form, in a folder; tests change it before it is read.

    Args:
        folder: where all of it lies.
        images: folder of the images, below.
    """

    source: ClassVar[str]
    """As `prepare` calls it."""
    advice: ClassVar[str]
    """Words of the error where no image could be used."""

    def __init__(self, folder: Path, images: str = "images") -> None:
        self.folder = folder
        self.images = folder / images
        self.images.mkdir(parents=True)

    def options(self) -> dict[str, Any]:
        """Write the files, and return the options that read them."""
        raise NotImplementedError

    def entries(self) -> int:
        """The number of images, rows or records that go in."""
        raise NotImplementedError

    def refer_to(self, name: str) -> None:
        """Add an image, with a caption, whose file has this name, without the file."""
        raise NotImplementedError

    def json(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(content))
        return path

    def read(self, **changes: Any) -> tuple[list[Sample], dict[str, int]]:
        return read_all(SOURCES[self.source], **self.options() | changes)

    def prepare(self, **changes: Any) -> tuple[Manifest, list[Sample]]:
        return prepare(self.source, self.folder / "out", **self.options() | changes)


# What begins the reasons of whole entries; others are those of captions, regions and so on.
ENTRY_REASONS = ("broken record", "image_", "row_", "sentences_", "size_")


class SourceTests:
    """Tests of what every source does, for the `world` of a module."""

    def test_a_missing_path_is_named_with_its_option(self, world: World) -> None:
        paths = [name for name, value in world.options().items() if isinstance(value, Path)]
        for name in paths:
            with pytest.raises(FileNotFoundError, match=rf"^{name}: .*nowhere.* give "):
                world.read(**{name: world.folder / "nowhere.json"})

    def test_a_broken_json_file_is_named_with_its_option_and_the_place(self, world: World) -> None:
        broken = world.folder / "broken.json"
        for name, value in world.options().items():
            for content, message in BROKEN_JSON if str(value).endswith(".json") else ():
                broken.write_bytes(content)
                with pytest.raises(ValueError, match=rf"^{name}: .*broken\.json: .*{message}.* download it again"):
                    world.read(**{name: broken})

    def test_names_that_leave_the_images_folder_are_never_opened(self, world: World) -> None:
        samples, excluded = world.read()
        secret = world.images.parent / "secret.jpg"
        secret.write_bytes(jpeg())
        for name in UNSAFE_NAMES:
            world.refer_to(name.format(absolute=secret))
        assert world.read() == (samples, {**excluded, "image_name_unsafe": len(UNSAFE_NAMES)})

    def test_every_entry_comes_out_or_is_counted_under_one_reason(self, world: World) -> None:
        for name, data in (
            ("missing.jpg", None),
            ("broken.jpg", b"GIF89a"),
            ("twin.jpg", jpeg()),
            ("twin.jpg", jpeg()),
            ("cut.v2.jpg", jpeg()[:99]),
            ("../leaves.jpg", None),
        ):
            world.refer_to(name)
            if data is not None:
                (world.images / name).write_bytes(data)
        samples, excluded = world.read()
        counted = sum(count for reason, count in excluded.items() if reason.startswith(ENTRY_REASONS))
        assert world.entries() >= 6
        assert len(samples) + counted == world.entries()
        manifest, stored = world.prepare()
        assert (stored, manifest.samples, manifest.excluded) == (samples, len(samples), excluded)

    def test_no_image_at_all_is_an_error_that_says_why(self, world: World) -> None:
        for path in world.images.rglob("*.jpg"):
            path.unlink()
        with pytest.raises(ValueError, match=rf"image_missing': \d.*{world.advice}"):
            world.read()

    def test_broken_files_are_counted_or_refused(self, world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
        world.refer_to("missing.jpg")
        options = world.options()
        files = {path: path.read_bytes() for path in sorted(world.folder.rglob("*")) if path.is_file()}
        out = tmp_path_factory.mktemp("out")

        def prepared() -> Counter[str]:
            excluded: Counter[str] = Counter()
            samples = SOURCES[world.source](**options, excluded=excluded)
            manifest = write_shards(samples, out, name="broken", excluded=excluded, progress=False, overwrite=True)
            assert manifest.excluded == dict(+excluded)
            return excluded

        @fuzz(20)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from(list(files)))
            path.write_bytes(data.draw(broken_file(files[path], path.suffix)))
            try:
                result_or_refusal(prepared, FileNotFoundError)
            finally:
                path.write_bytes(files[path])

        check()

    def test_shards_are_written_and_read_back(self, world: World) -> None:
        world.refer_to("missing.jpg")
        samples, excluded = world.read()
        manifest, stored = world.prepare()
        split = world.options().get("split")
        assert (manifest.name, stored) == (f"{world.source}/{split}" if split else world.source, samples)
        assert manifest.excluded == excluded
        assert excluded
