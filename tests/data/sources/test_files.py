from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lightning_xai.data.excluded import ExcludedError
from lightning_xai.data.sample import Sample
from lightning_xai.data.sources.files import kept_captions, key_from, read_image_file, usable_samples


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_first_name_that_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png((5, 5)))
    file = read_image_file(tmp_path, ["a.png", "../below/a.png", "below", "below/a.png", "b.png"])
    assert (file.name, file.size, file.data) == ("below/a.png", (4, 3), png())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "image_missing"),
        (["a.png", "below"], "image_missing"),
        (["../a.png", "b.png"], "image_name_unsafe"),
        (["a" * 5000], "image_(unreadable|missing)"),  # as the version of Python has it
        (["\ud800.png"], "image_missing"),
        (["broken.png"], "image_does_not_decode"),
    ],
)
def test_why_there_is_no_image(tmp_path: Path, names: list[str], reason: str) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "broken.png").write_bytes(png()[:40])
    with pytest.raises(ExcludedError, match=f"^{reason}$"):
        read_image_file(tmp_path / "below" / "..", names)


def test_keys_from_names_are_keys_and_stay_distinct() -> None:
    names = ["airport_1", "airport/1", "airport.1", "a" * 200, "a" * 201, "a" * 202, "", "\ud800", "日本"]
    keys = [key_from(name) for name in names]
    assert len(set(keys)) == len(names)
    assert keys[0] == "airport_1"
    assert keys[3] == "a" * 200
    for key in keys:
        assert key
        assert len(key) <= 200
        assert set(key) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def test_captions_lose_white_space_and_those_without_text_are_counted() -> None:
    excluded: Counter[str] = Counter()
    assert kept_captions([" a dog\n", "", None, 3, "\t", "a cat"], excluded) == ("a dog", "a cat")
    assert excluded == {"caption_empty": 4}
    with pytest.raises(ExcludedError, match="image_without_caption"):
        kept_captions(["", " "], excluded)
    assert excluded == {"caption_empty": 6}


def build(key: str) -> Sample:
    if key == "bad":
        raise ExcludedError("image_missing")
    return Sample(key, b"", (1, 1), ("a dog",))


def test_what_cannot_be_used_is_counted_and_the_rest_comes_in_order() -> None:
    excluded: Counter[str] = Counter()
    entries = ["b", "bad", "a", "b", "bad"]
    samples = usable_samples(entries, build, excluded, what="image", advice="Check")
    assert [sample.key for sample in samples] == ["b", "a"]
    assert excluded == {"image_missing": 2, "image_twice": 1}


def test_nothing_at_all_is_an_error_that_says_what_and_why() -> None:
    excluded = Counter({"caption_empty": 0})
    with pytest.raises(ValueError, match=r"^no image of x could be used; excluded: \{'image_missing': 1\}. Check it$"):
        list(usable_samples(["bad"], build, excluded, what="image of x", advice="Check it"))
    with pytest.raises(ValueError, match="excluded: nothing"):
        list(usable_samples([], build, Counter(), what="image", advice="Check"))


def test_an_error_of_another_kind_is_not_taken_for_a_bad_entry() -> None:
    def slip(key: str) -> Sample:
        raise KeyError(key)

    with pytest.raises(KeyError):
        list(usable_samples(["a"], slip, Counter(), what="image", advice="Check"))
