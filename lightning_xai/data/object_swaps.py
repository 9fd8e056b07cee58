"""Hard negatives made from a data set's own boxes: one object of a caption becomes one that the image does not show.

After the feature-pair paper, section 4.4, which replaced objects of COCO's captions by hand. Here the class name of a
region takes the place of the words that name another, single region: the caption is then wrong about this object alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lightning_xai.data.phrase_finder import find_phrases
from lightning_xai.data.sample import HardNegative, Sample, Span, stable_hash

__all__ = ["object_swaps", "swapped"]

_ARTICLE = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)


def object_swaps(
    sample: Sample, captions: Sequence[str], label_names: Sequence[str], draw: tuple[int, ...] = ()
) -> list[HardNegative]:
    """One wrong caption for each caption and object that it names once.

    Only objects are swapped that are the single one of their class in the image, and only for a class that the
    image has no region of; never the entities of a data set whose classes are coarser than its phrases. Which one
    is drawn from the sample's key, the caption, the class and `draw`: the same on every machine.

    Args:
        sample: the image's captions and regions.
        captions: its first captions, those that take part.
        label_names: the classes to draw from.
        draw: numbers, such as an epoch, that choose other classes.
    """
    instances = Counter(region.label for region in sample.regions)
    absent = sorted(set(label_names) - instances.keys())
    if not absent:
        return []
    swaps = []
    for number, region in enumerate(sample.regions):
        if instances[region.label] > 1 or region.crowd or region.entity or region.box is None:
            continue
        for caption, spans in sorted(region.spans.items()):
            if caption < len(captions) and len(spans) == 1:
                other = absent[stable_hash("swap", *draw, sample.key, caption, region.label) % len(absent)]
                text, span = swapped(captions[caption], spans[0], region.label, other)
                swaps.append(HardNegative(text, span, caption, spans[0], number))
    return swaps


def swapped(caption: str, span: Span, label: str, other: str) -> tuple[str, Span]:
    """A caption that names `other` where `span` names `label`.

    Where the words of the span hold the class name, only that is replaced, so that "a red ring" becomes "a red star".
    An indefinite article before what changed is made to fit.

    Returns:
        The caption, and where the new words stand in it.

    >>> text, (start, end) = swapped("there is a dog on the mat", (11, 14), "dog", "elephant")
    >>> text, text[start:end]
    ('there is an elephant on the mat', 'elephant')
    >>> swapped("an orange ring and a star", (3, 14), "ring", "heart")
    ('an orange heart and a star', (3, 15))
    """
    start, end = span
    before, words, after = caption[:start], caption[start:end], caption[end:]
    first, last = next(iter(find_phrases(words, [label], exact=False)), (0, len(words)))
    new = words[:first] + other + words[last:]
    article = _ARTICLE.search(before)
    if article and new[: len(other)] == other:
        fitting = "an" if other[0].lower() in "aeiou" else "a"
        if article[1][0].isupper():
            fitting = fitting.capitalize()
        before = before[: article.start()] + fitting + article[2]
    return before + new + after, (len(before), len(before) + len(new))
