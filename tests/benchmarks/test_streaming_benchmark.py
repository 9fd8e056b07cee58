from __future__ import annotations

import re
from pathlib import Path

import pytest
import streaming
from image_files import jpeg


def test_streaming_and_skipping_are_measured_on_drawn_and_on_given_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "ROUNDS", 1)
    monkeypatch.setattr(streaming, "SHARDS", 3)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(jpeg())
    for photos, name in ((None, "drawn"), (tmp_path, tmp_path.name)):
        table = streaming.table(32, photos)
        assert f"kB ({name})" in table
        assert "| passed over, in an epoch of 96 samples |" in table
        rates = [float(rate.replace(",", "")) for rate in re.findall(r"\| ([\d,.]+) \|", table)]
        assert len(rates) == 6
        assert min(rates) > 0
    with pytest.raises(SystemExit, match=r"nothing: no \.jpg files there"):
        streaming.table(32, tmp_path / "nothing")
