"""Records on disk: what a killed run leaves behind is taken up, and nothing else is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lightning_xai.evaluation.method_run import CacheError, ResultCache

SETTINGS = {
    "weights": "aa",
    "steps": 10,
    "nested": {"steps": 10},
    "beta": 0.1,
    "tables": ("grounding",),
    "folder": Path("data"),
}
RECORD = {"tables": {"grounding": [{"gamma": 0.1 + 0.2, "hit": True, "caption": "an „ä“ \U0001f600"}]}}


def lines_of(folder: Path) -> dict[Path, list[str]]:
    return {path: path.read_text(encoding="ascii").splitlines() for path in sorted(folder.glob("*.jsonl"))}


def filled(folder: Path, *indices: int) -> ResultCache:
    store = ResultCache(folder, SETTINGS)
    for index in indices:
        store.put({index: {"number": index}})
    return store


def test_what_was_put_is_there_in_the_next_run(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "rows"
    first = ResultCache(folder, SETTINGS)
    assert (len(first), 3 in first) == (0, False)
    first.put({3: RECORD, 7: {"gamma": math.nan, "pair": (1, 2)}})
    first.close()

    second = ResultCache(folder, SETTINGS)
    assert (len(second), 3 in second, 7 in second, 4 in second) == (2, True, True, False)
    assert second[3] == RECORD
    assert second.damaged == 0
    with pytest.raises(KeyError):
        second[4]
    # The run that made a record sees it as the next one does.
    assert math.isnan(first[7].pop("gamma"))
    assert math.isnan(second[7].pop("gamma"))
    assert first[7] == second[7] == {"pair": [1, 2]}


def test_a_record_is_on_disk_without_a_close(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    assert len(store) == 2
    assert [len(lines) for lines in lines_of(tmp_path).values()] == [2]
    assert len(ResultCache(tmp_path, SETTINGS)) == 2


def test_a_record_does_not_change_with_the_values_it_was_made_of(tmp_path: Path) -> None:
    store, record = ResultCache(tmp_path, SETTINGS), {"rows": [1]}
    store.put({0: record})
    record["rows"].append(2)
    assert store[0] == {"rows": [1]}


def test_a_run_that_only_reads_leaves_no_file(tmp_path: Path) -> None:
    filled(tmp_path, 1).close()
    reader = ResultCache(tmp_path, SETTINGS)
    reader.close()
    reader.close()
    assert len(lines_of(tmp_path)) == 1


def test_after_a_close_more_can_be_put(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    store.close()
    store.put({2: {"number": 2}})
    store.close()
    assert {index: ResultCache(tmp_path, SETTINGS)[index] for index in (1, 2)} == {1: {"number": 1}, 2: {"number": 2}}


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_is_as_if_never_written_and_the_next_run_writes_elsewhere(
    tmp_path: Path, cut: int
) -> None:
    filled(tmp_path, 1, 2).close()
    (path,) = lines_of(tmp_path)
    path.write_bytes(path.read_bytes()[: -1 - cut])

    resumed = ResultCache(tmp_path, SETTINGS)
    assert (1 in resumed, 2 in resumed, resumed.damaged) == (True, False, 1)
    resumed.put({2: {"number": "again"}})
    resumed.close()
    last = ResultCache(tmp_path, SETTINGS)
    assert (last[1], last[2], last.damaged) == ({"number": 1}, {"number": "again"}, 1)


def test_a_line_without_its_line_feed_is_whole(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2).close()
    (path,) = lines_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    resumed = ResultCache(tmp_path, SETTINGS)
    assert (len(resumed), resumed.damaged) == (2, 0)


def test_two_writers_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    first, second = filled(tmp_path), filled(tmp_path)
    for index in range(0, 20, 2):
        first.put({index: {"number": index}})
        second.put({index + 1: {"number": index + 1}})
    first.close()
    second.close()
    assert len(lines_of(tmp_path)) == 2
    assert (len(first), len(second)) == (10, 10)
    both = ResultCache(tmp_path, SETTINGS)
    assert [both[index] for index in range(20)] == [{"number": index} for index in range(20)]
    assert (len(both), both.damaged) == (20, 0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "no JSON",
        "null",
        '{"index": 9}',
        '{"record": {}}',
        '{"index": true, "record": {}}',
        '{"index": 9, "record": []}',
        '{"index": ' + "9" * 5000 + ', "record": {}}',
        "[" * 100_000,
        "\u00e4\ufffd",
    ],
    ids=lambda line: line[:30] or "empty",
)
def test_lines_that_are_no_records_are_counted_and_the_others_are_kept(tmp_path: Path, line: str) -> None:
    filled(tmp_path, 1, 2).close()
    (path,) = lines_of(tmp_path)
    first, second = path.read_text(encoding="ascii").splitlines()
    path.write_text("\n".join([first, line, second]) + "\n", encoding="utf-8")
    store = ResultCache(tmp_path, SETTINGS)
    assert (len(store), store.damaged) == (2, 1)
    assert [store[1], store[2]] == [{"number": 1}, {"number": 2}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "bb", "beta": 0.2}, "weights was 'aa' and is 'bb'; beta was 0.1 and is 0.2"),
        ({"nested": {"steps": 20}}, "nested.steps was 10 and is 20"),
        ({"new": 1}, "new was None and is 1"),
        ({"tables": ("grounding", "confidence")}, r"tables was \['grounding'\] and is \['grounding', 'confidence'\]"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    filled(tmp_path, 1).close()
    with pytest.raises(CacheError, match=message) as caught:
        ResultCache(tmp_path, SETTINGS | change)
    assert str(tmp_path) in str(caught.value)
    assert "delete this one" in str(caught.value)
    assert len(ResultCache(tmp_path, SETTINGS)) == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_settings_that_json_does_not_know_are_equal_to_themselves_alone(tmp_path: Path, value: float) -> None:
    settings = SETTINGS | {"limit": value}
    ResultCache(tmp_path, settings)
    ResultCache(tmp_path, settings)
    with pytest.raises(CacheError, match="limit was"):
        ResultCache(tmp_path, SETTINGS | {"limit": None})


@pytest.mark.parametrize("text", ["{", "[1, 2]", "[" * 100_000, "\ud800"], ids=range(4))
def test_settings_that_are_broken_are_refused_rather_than_replaced(tmp_path: Path, text: str) -> None:
    filled(tmp_path, 1).close()
    (tmp_path / "settings.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CacheError, match=str(tmp_path)):
        ResultCache(tmp_path, SETTINGS)


def test_records_of_which_nothing_says_how_they_were_made_are_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1).close()
    (tmp_path / "settings.json").unlink()
    with pytest.raises(CacheError, match=r"settings\.json.*delete"):
        ResultCache(tmp_path, SETTINGS)
    assert not (tmp_path / "settings.json").exists()


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ResultCache(tmp_path / "file" / "rows", SETTINGS)
    with pytest.raises(OSError, match="file"):
        ResultCache(tmp_path / "file", SETTINGS)


def test_values_that_are_not_plain_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    with pytest.raises(TypeError):
        store.put({2: {"path": Path()}})
    assert 2 not in store
    store.close()
    assert ResultCache(tmp_path, SETTINGS).damaged == 0
