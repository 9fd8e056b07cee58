"""Names that configs written for version 0.1 use; new ones are in `lightning_xai.training`."""

from lightning_xai.training import AtomicCheckpointIO, DataFaults, GroundingCallback, Preflight, Resume

__all__ = ["AtomicCheckpointIO", "DataFaults", "GroundingCallback", "Preflight", "Resume"]
