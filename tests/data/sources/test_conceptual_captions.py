from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, UNSAFE_NAMES, jpeg

from lightning_xai.cli import main
from lightning_xai.data.sample import Sample, encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest
from lightning_xai.data.sources.conceptual_captions import prepare_conceptual_captions, read_conceptual_captions


class World:
    """Images that were fetched, and the TSV file that lists them; tests add rows before it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        (self.images / "sub").mkdir(parents=True)
        (self.images / "1.jpg").write_bytes(jpeg((40, 30)))
        (self.images / "sub" / "2.jpg").write_bytes(jpeg((30, 40)))
        self.captions = folder / "Train_GCC-training.tsv"
        self.content = b'a very typical "bus" station\t1.jpg\n'

    def read(self) -> tuple[list[Sample], dict[str, int]]:
        self.captions.write_bytes(self.content)
        left_out: Counter[str] = Counter()
        samples = list(read_conceptual_captions(self.captions, self.images, "train", left_out))
        for sample in samples:
            encode_sample(sample)  # every sample keeps the contract
        return samples, dict(+left_out)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_rows_with_fetched_images_become_samples_in_order(world: World) -> None:
    world.content += b" people walk \tsub/2.jpg\r\n" + "ein Café".encode() + b"\t./1.jpg"
    (first, second), left_out = world.read()
    assert (first.key, first.captions, first.size) == ("1", ('a very typical "bus" station',), (40, 30))
    assert (first.image, first.regions) == ((world.images / "1.jpg").read_bytes(), ())
    assert first.source == "conceptual-captions/train/1.jpg"
    assert (second.captions, second.size) == (("people walk",), (30, 40))
    assert second.source == "conceptual-captions/train/sub/2.jpg"
    assert left_out == {"image_twice": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_caption(world: World) -> None:
    world.content = b"\xef\xbb\xbf" + world.content
    (sample,), _ = world.read()
    assert sample.captions[0].startswith("a very")


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        (b"a bus\thttp://example.org/1.jpg", {"image_not_fetched": 1}),
        (b"a bus\tHTTPS://example.org/1.jpg", {"image_not_fetched": 1}),
        (b"a bus\tpipe://cat /etc/passwd", {"image_not_fetched": 1}),
        (b"a bus\tpipe:cat /etc/passwd", {"image_name_unsafe": 1}),
        (b"a bus\tmissing.jpg", {"image_missing": 1}),
        (b"a bus\tsub", {"image_missing": 1}),
        (b"a bus\t", {"image_missing": 1}),
        (b"a bus\t" + b"x" * 5000 + b".jpg", {"image_unreadable": 1}),
        (b"no tab", {"row_malformed": 1}),
        (b"", {"row_malformed": 1}),
        (b"a bus\twith a tab\t1.jpg", {"row_malformed": 1}),
        (b"a caf\xe9\tsub/2.jpg", {"row_not_utf8": 1}),
        (b"\t1.jpg", {"caption_empty": 1, "image_without_caption": 1}),
        (b" \xc2\xa0\t1.jpg", {"caption_empty": 1, "image_without_caption": 1}),
    ],
)
def test_bad_rows_are_counted_and_the_rest_survives(world: World, row: bytes, reasons: dict[str, int]) -> None:
    world.content = row + b"\n" + world.content
    samples, left_out = world.read()
    assert [sample.key for sample in samples] == ["1"]
    assert left_out == reasons


@pytest.mark.parametrize("data", [HTML, b"", jpeg()[:300]])
def test_files_that_do_not_decode_are_counted(world: World, data: bytes) -> None:
    (world.images / "sub" / "2.jpg").write_bytes(data)
    world.content += b"a bus\tsub/2.jpg\n"
    samples, left_out = world.read()
    assert len(samples) == 1
    assert left_out == {"image_does_not_decode": 1}


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_path_that_leaves_the_images_folder_is_never_opened(world: World, name: str) -> None:
    secret = world.folder / "secret.jpg"
    secret.write_bytes(jpeg())
    world.content += f"a bus\t{name.format(absolute=secret)}\n".encode()
    samples, left_out = world.read()
    assert len(samples) == 1
    assert left_out == {"image_name_unsafe": 1}


def test_a_file_of_addresses_alone_says_what_to_do(world: World) -> None:
    world.content = b"a bus\thttp://example.org/1.jpg\n" * 3
    with pytest.raises(ValueError, match=r"'image_not_fetched': 3.*Fetch the images first"):
        world.read()


def test_a_file_in_another_encoding_is_an_error_with_its_counts(world: World) -> None:
    world.content = world.content.decode().encode("utf-16")
    with pytest.raises(ValueError, match="row_not_utf8"):
        world.read()


@pytest.mark.parametrize("name", ["captions", "images"])
def test_a_missing_path_is_named_with_its_argument(world: World, name: str) -> None:
    world.read()
    paths: dict[str, Any] = {"captions": world.captions, "images": world.images} | {name: world.folder / "nowhere"}
    with pytest.raises(FileNotFoundError, match=rf"^{name}: .*nowhere"):
        read_conceptual_captions(**paths, split="train")


def test_shards_are_written_and_read_back(world: World) -> None:
    world.content += b"people\tsub/2.jpg\na bus\thttp://example.org/1.jpg\n"
    samples, _ = world.read()
    out = world.folder / "out"
    options = {"captions": world.captions, "images": world.images, "split": "train", "out": out, "samples-per-shard": 1}
    main(["prepare", "conceptual-captions", *(f"--{option}={value}" for option, value in options.items())])
    manifest = Manifest.load(out)
    assert manifest.name == "conceptual-captions/train"
    assert (manifest.samples, manifest.captions, manifest.labels) == (2, 2, ())
    assert manifest.left_out == {"image_not_fetched": 1}
    assert [sample for _, sample in read_samples(out, manifest, [0, 1], 0, 2)] == samples


@pytest.mark.parametrize("given", [(), ("captions",), ("images",), ("captions", "shards"), ("images", "shards")])
def test_the_two_ways_are_not_mixed(world: World, given: tuple[str, ...]) -> None:
    paths: dict[str, Any] = {"captions": world.captions, "images": world.images, "shards": world.folder}
    with pytest.raises(ValueError, match=r"captions .* with images .* or shards"):
        prepare_conceptual_captions(world.folder / "out", "train", **{name: paths[name] for name in given})
