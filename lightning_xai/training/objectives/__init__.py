"""Training objectives: terms of the loss of `ContrastiveFineTuning`, one file each."""

from lightning_xai.training.objectives.base import Objective, Step, Term, zero_with_graph
from lightning_xai.training.objectives.grounding import Grounding
from lightning_xai.training.objectives.hard_negative_text import HardNegativeText, NegativeTexts, hard_negative_loss
from lightning_xai.training.objectives.phrase_patch import PhrasePatch, phrase_patch_loss
from lightning_xai.training.objectives.phrase_region import PhraseRegion, phrase_region_loss
from lightning_xai.training.objectives.sigmoid import Sigmoid, sigmoid_loss
from lightning_xai.training.objectives.softmax import Softmax

__all__ = [
    "Grounding",
    "HardNegativeText",
    "NegativeTexts",
    "Objective",
    "PhrasePatch",
    "PhraseRegion",
    "Sigmoid",
    "Softmax",
    "Step",
    "Term",
    "hard_negative_loss",
    "phrase_patch_loss",
    "phrase_region_loss",
    "sigmoid_loss",
    "zero_with_graph",
]
