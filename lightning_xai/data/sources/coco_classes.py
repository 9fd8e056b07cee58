"""The words that people write in captions for the 80 classes of COCO.

The policy, in the order in which it decides:

- **Precision before recall.** A mention that is missed costs one measurement; a wrong one spoils the average. A mention
  counts only where the image has a box of the class, so a word may be listed when it nearly always means such a box
  ("remote", "bat", "mitt"), and not merely because it sometimes does.
- **Words that name several classes are not listed**: board (surf, skate or snow), computer, bag, glass, light, bare
  plant, animal, fruit, vehicle, stool; so are words for groups (crowd, team, couple), pronouns, and roles that animals
  and things have as well (mother, adult, male, passenger, model).
- **COCO's own labelling is followed** where it is broader than the word: pandas are bears, stoves are ovens, mugs are
  cups, burgers are sandwiches, monitors are tvs, urinals are toilets, all tables but coffee, end, pool and work tables
  are dining tables, a teddy bear is no bear.
- **A colour, a game or a verb is no object.** "orange" counts in the plural and in "orange slice" only; "baseball",
  "football" and the like only where something is done to the thing ("hits a baseball"); "skis", "snowboards" and
  "ties" not after a person, where they are verbs; "a bat" but not "at bat".
- **The head of a compound decides.** "tennis player" is a person, "carrot cake" a cake, "bus driver" a person, "stop
  light" a traffic light. Compounds whose head is no COCO class ("dog house", "train station", "apple pie", "pizza box",
  "clock tower") and things that only look like one ("stuffed sheep", "horse statue", "baby elephant" for the person)
  stand under `BLOCKED` and name nothing.
- A mention has the words that make the name ("dining room table", "tennis racquet"), not its adjectives.

Words in parentheses have to be there but do not belong to the mention (see `phrase_finder.MentionFinder`).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

__all__ = ["read_classes"]

_BLOCKED = "BLOCKED"


@cache
def read_classes() -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Phrases by class, and the phrases that name no class, from `coco_classes.txt`: what `MentionFinder` takes."""
    phrases: dict[str, tuple[str, ...]] = {}
    text = files(__package__).joinpath("coco_classes.txt").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for section in lines.split("\n[")[1:]:
        name, _, listed = section.partition("]\n")
        # A phrase may be broken by the end of a line.
        phrases[name] = tuple(" ".join(phrase.split()) for phrase in listed.split(","))
    blocked = phrases.pop(_BLOCKED)
    return phrases, blocked
