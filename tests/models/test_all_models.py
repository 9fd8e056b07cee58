"""Every model of open_clip, made small: built, taken at every layer, explained by every method, and trained.

The page of supported models says what works; it is printed by the tool that is used here.
"""

from __future__ import annotations

import pytest
import supported_models
from supported_models import BEGIN, END, HEADER, PAGE

pytest.importorskip("transformers", reason="some of open_clip's text towers are of transformers")


def rows() -> list[tuple[str, list[str]]]:
    """The lines of the page's table, and the models that each is about."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert lines[:2] == [*HEADER]
    return [(line, [name.strip("`") for name in line.split(" | ")[2].split(", ")]) for line in lines[2:]]


ROWS = rows()


@pytest.mark.slow
def test_the_page_lists_every_model_once() -> None:
    listed = sorted(name for _, members in ROWS for name in members)
    installed = supported_models.names()
    missing = set(installed) - set(listed)
    assert not missing, f"run tools/supported_models.py --write, which will add {missing}"
    assert len(set(listed)) == len(listed)
    # An older open_clip knows fewer.
    assert len(set(listed) - set(installed)) < len(listed) // 2


@pytest.mark.slow
def test_every_model_is_built_for_its_own_images_and_the_page_groups_them_in_families() -> None:
    installed = supported_models.names()
    expected = [[name for name in members if name in installed] for _, members in ROWS]
    assert list(supported_models.families().values()) == [members for members in expected if members]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "members"), ROWS, ids=[members[0] for _, members in ROWS])
def test_a_family_works_as_the_page_says(line: str, members: list[str]) -> None:
    installed = [name for name in members if name in supported_models.names()]
    if not installed:
        pytest.skip("this open_clip is older")
    found = supported_models.survey(installed[0])
    assert supported_models.row(members, found) == line
    assert [reason for reason in supported_models.reasons([found]) if reason not in PAGE.read_text()] == []
