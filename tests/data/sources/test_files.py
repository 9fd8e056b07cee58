from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from image_files import jpeg

from lightning_xai.data.excluded import ExcludedError
from lightning_xai.data.sample import Sample
from lightning_xai.data.sources.files import key_from, read_image_file, usable_samples


def test_the_first_name_that_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(jpeg((5, 5)))
    file = read_image_file(tmp_path, ["a.jpg", "../below/a.jpg", "below", "below/a.jpg", "b.jpg"])
    assert (file.name, file.size, file.data) == ("below/a.jpg", (40, 30), jpeg())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "image_missing"),
        (["a.jpg", "below"], "image_missing"),
        (["../a.jpg", "b.jpg"], "image_name_unsafe"),
        (["a" * 5000], "image_(unreadable|missing)"),  # as the version of Python has it
        (["\ud800.jpg"], "image_missing"),
        (["broken.jpg"], "image_does_not_decode"),
    ],
)
def test_why_there_is_no_image(tmp_path: Path, names: list[str], reason: str) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "broken.jpg").write_bytes(jpeg()[:40])
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


def test_an_error_of_another_kind_is_not_taken_for_a_bad_entry() -> None:
    def slip(key: str) -> Sample:
        raise KeyError(key)

    with pytest.raises(KeyError):
        list(usable_samples(["a"], slip, Counter(), what="image", advice="Check"))
    with pytest.raises(ValueError, match=r"^no image could be used; excluded: nothing\. Check$"):
        list(usable_samples([], slip, Counter(), what="image", advice="Check"))
