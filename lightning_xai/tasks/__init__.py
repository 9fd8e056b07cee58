from lightning_xai.tasks.contrastive import ContrastiveFineTuning

__all__ = ["ContrastiveFineTuning"]
