from lightning_xai.callbacks.checkpoint_file import AtomicCheckpointIO
from lightning_xai.callbacks.data_faults import DataFaults
from lightning_xai.callbacks.embedding_writer import EmbeddingWriter
from lightning_xai.callbacks.grounding import GroundingCallback
from lightning_xai.callbacks.preflight import Preflight
from lightning_xai.callbacks.resume import Resume

__all__ = ["AtomicCheckpointIO", "DataFaults", "EmbeddingWriter", "GroundingCallback", "Preflight", "Resume"]
