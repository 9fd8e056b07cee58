from lightning_xai.callbacks.embedding_writer import EmbeddingWriter
from lightning_xai.callbacks.grounding import GroundingCallback

__all__ = ["EmbeddingWriter", "GroundingCallback"]
