from lightning_xai.training.caption_choice import CaptionChoiceCallback
from lightning_xai.training.checkpoint_file import AtomicCheckpointIO
from lightning_xai.training.contrastive import ContrastiveFineTuning
from lightning_xai.training.data_faults import DataFaults
from lightning_xai.training.grounding import GroundingCallback
from lightning_xai.training.lora import Lora
from lightning_xai.training.measured_model import MeasuredModel
from lightning_xai.training.nonfinite import FiniteSteps
from lightning_xai.training.prediction_writer import PredictionWriter
from lightning_xai.training.preflight import Preflight
from lightning_xai.training.progress_log import ProgressLog
from lightning_xai.training.resume import Resume
from lightning_xai.training.zero_shot import ZeroShotCallback

__all__ = [
    "AtomicCheckpointIO",
    "CaptionChoiceCallback",
    "ContrastiveFineTuning",
    "DataFaults",
    "FiniteSteps",
    "GroundingCallback",
    "Lora",
    "MeasuredModel",
    "PredictionWriter",
    "Preflight",
    "ProgressLog",
    "Resume",
    "ZeroShotCallback",
]
