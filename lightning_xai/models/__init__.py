from lightning_xai.loss import contrastive_loss, global_contrastive_loss
from lightning_xai.models.at_layer import UnsupportedTowerError
from lightning_xai.models.clap import ClapEncoder, load_clap
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.hugging_face import HuggingFaceEncoder
from lightning_xai.models.hugging_face_folder import save_hugging_face
from lightning_xai.models.imagebind import ImageBindImages, ImageBindSounds, load_imagebind
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.models.sentence_encoder import SentenceEncoder
from lightning_xai.models.sentence_encoder_folder import load_sentence_encoder
from lightning_xai.models.sound import read_sound
from lightning_xai.models.weights_file import save_open_clip

__all__ = [
    "ClapEncoder",
    "DualEncoder",
    "HuggingFaceEncoder",
    "ImageBindImages",
    "ImageBindSounds",
    "SentenceEncoder",
    "UnsupportedTowerError",
    "contrastive_loss",
    "global_contrastive_loss",
    "load_clap",
    "load_dual_encoder",
    "load_imagebind",
    "load_sentence_encoder",
    "read_sound",
    "save_hugging_face",
    "save_open_clip",
]
