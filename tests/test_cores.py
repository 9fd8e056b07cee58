"""Cores that a process may use, by its affinity and by the quota of its container."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_xai import cores


@pytest.mark.parametrize(
    ("quota", "affinity", "usable"),
    [
        ("150000 100000", 8, 2),
        ("50000 100000", 8, 1),
        ("max 100000", 8, 8),
        ("800000 100000", 2, 2),
        ("", 3, 3),
        (None, 3, 3),
    ],
)
def test_a_container_has_the_cores_of_its_quota_and_no_more_than_its_affinity(
    quota: str | None, affinity: int, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    assert cores.usable_cores() == usable
