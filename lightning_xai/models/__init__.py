from lightning_xai.loss import contrastive_loss, global_contrastive_loss
from lightning_xai.models.at_layer import UnsupportedTowerError
from lightning_xai.models.clap import ClapEncoder, load_clap, read_sound
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.models.weights_file import save_open_clip

__all__ = [
    "ClapEncoder",
    "DualEncoder",
    "UnsupportedTowerError",
    "contrastive_loss",
    "global_contrastive_loss",
    "load_clap",
    "load_dual_encoder",
    "read_sound",
    "save_open_clip",
]
