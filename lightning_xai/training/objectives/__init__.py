"""Training objectives: terms of the loss of `ContrastiveFineTuning`, one file each."""

from lightning_xai.training.objectives.base import Objective, Step, Term, zero_with_graph
from lightning_xai.training.objectives.grounding import Grounding
from lightning_xai.training.objectives.sigmoid import Sigmoid, sigmoid_loss
from lightning_xai.training.objectives.softmax import Softmax

__all__ = ["Grounding", "Objective", "Sigmoid", "Softmax", "Step", "Term", "sigmoid_loss", "zero_with_graph"]
