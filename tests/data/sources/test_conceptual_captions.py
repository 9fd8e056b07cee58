from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_files import HTML, jpeg
from source_files import SourceTests, World, read_all

from lightning_xai.data.sources.conceptual_captions import read_conceptual_captions


class CaptionsWorld(World):
    source = "conceptual-captions"
    advice = "Fetch the images first"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.images / "sub").mkdir()
        (self.images / "1.jpg").write_bytes(jpeg((40, 30)))
        (self.images / "sub" / "2.jpg").write_bytes(jpeg((30, 40)))
        self.content = b'a very typical "bus" station\t1.jpg\n'

    def refer_to(self, name: str) -> None:
        self.content += f"a bus\t{name}\n".encode()

    def entries(self) -> int:
        return self.content.count(b"\n")

    def options(self) -> dict[str, Any]:
        captions = self.folder / "Train_GCC-training.tsv"
        captions.write_bytes(self.content)
        return {"captions": captions, "images": self.images, "split": "train"}


@pytest.fixture
def world(tmp_path: Path) -> CaptionsWorld:
    return CaptionsWorld(tmp_path)


class TestSource(SourceTests):
    pass


def test_rows_with_fetched_images_become_samples_in_order(world: CaptionsWorld) -> None:
    world.content = b"\xef\xbb\xbf" + world.content  # a byte order mark is no part of the first caption
    world.content += b" people walk \tsub/2.jpg\r\n" + "ein Café".encode() + b"\t./1.jpg"
    (first, second), excluded = world.read()
    assert (first.key, first.captions, first.size) == ("1", ('a very typical "bus" station',), (40, 30))
    assert (first.image, first.regions) == ((world.images / "1.jpg").read_bytes(), ())
    assert first.source == "conceptual-captions/train/1.jpg"
    assert (second.captions, second.size) == (("people walk",), (30, 40))
    assert second.source == "conceptual-captions/train/sub/2.jpg"
    assert excluded == {"image_twice": 1}


def test_bad_rows_are_counted_and_the_rest_survives(world: CaptionsWorld) -> None:
    (world.images / "404.jpg").write_bytes(HTML)
    (world.images / "cut.jpg").write_bytes(jpeg()[:300])
    rows = {
        b"a bus\thttp://example.org/1.jpg": "image_not_fetched",
        b"a bus\tHTTPS://example.org/1.jpg": "image_not_fetched",
        b"a bus\tpipe://cat /etc/passwd": "image_not_fetched",
        b"a bus\tpipe:cat /etc/passwd": "image_name_unsafe",
        b"a bus\tmissing.jpg": "image_missing",
        b"a bus\tsub": "image_missing",
        b"a bus\t": "image_missing",
        b"a bus\t" + b"x" * 5000 + b".jpg": "image_unreadable",
        b"a bus\t404.jpg": "image_does_not_decode",
        b"a bus\tcut.jpg": "image_does_not_decode",
        b"no tab": "row_malformed",
        b"": "row_malformed",
        b"a bus\twith a tab\t1.jpg": "row_malformed",
        b"a caf\xe9\tsub/2.jpg": "row_not_utf8",
        b"\t1.jpg": "image_without_caption",
        b" \xc2\xa0\t1.jpg": "image_without_caption",
    }
    world.content = b"\n".join(rows) + b"\n" + world.content
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["1"]
    assert excluded == Counter(rows.values()) | {"caption_empty": 2}


def test_a_file_in_another_encoding_is_an_error_with_its_counts(world: CaptionsWorld) -> None:
    world.content = world.content.decode().encode("utf-16")
    with pytest.raises(ValueError, match="row_not_utf8"):
        world.read()


@pytest.mark.parametrize("given", [(), ("captions",), ("images",), ("captions", "shards"), ("images", "shards")])
def test_the_two_ways_are_not_mixed(world: CaptionsWorld, given: tuple[str, ...]) -> None:
    paths = {**world.options(), "shards": world.folder}
    with pytest.raises(ValueError, match=r"captions .* with images .* or shards"):
        read_all(read_conceptual_captions, split="train", **{name: paths[name] for name in given})
