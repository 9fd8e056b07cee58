"""A CLIP-like model with its tokenizer, its image transform, and towers that can be taken at a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import (
    TextTowerAtLayer,
    TowerAtLayer,
    UnsupportedTowerError,
    checkpointing_modules,
    evaluating,
)
from lightning_xai.models.contiguous_tokens import ContiguousTokens
from lightning_xai.models.image_encoder import ImageEncoder
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.models.towers import TextTower, checkpoint_blocks, image_tower_at_layer, text_tower_at_layer

if TYPE_CHECKING:
    from lightning_xai.models.hugging_face import HuggingFaceText

CHECKPOINT_KEY = "dual_encoder"
"""The key of the architecture in Lightning checkpoints of this project, and in the metadata of exported weights."""
# Takes the encoder as an argument, so that the copy of an encoder runs its own weights, compiled or not.
_Embed = Callable[["DualEncoder", Tensor], Tensor]


class DualEncoder(ImageEncoder):
    """A model of images and captions with all that is needed to use and to train it.

    This class is of open_clip's models; its subclass `HuggingFaceEncoder` is of those of transformers.

    Attributes:
        model: the library's model; its weights are the only parameters.
        tokenizer: captions -> token ids, characters -> tokens.
        image_transform: pixels and boxes -> what the image tower takes.
        architecture: name, model and preprocessing configuration; plain values, so that checkpoints can hold them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: CaptionTokenizer,
        architecture: Mapping[str, Any],
        image_transform: ImageTransform | None = None,
    ) -> None:
        super().__init__()
        # open_clip's model classes share their methods, but no base class that has them.
        self.model: Any = model
        self.tokenizer = tokenizer
        self.image_transform = image_transform or ImageTransform.from_open_clip(model)
        self.architecture = dict(architecture)
        self._text_tower = self._trimming_text_tower()
        self._towers: tuple[_Embed, _Embed] = (_embed_images, _embed_tokens)
        self._compiled = False
        self.check_towers()

    def _trimming_text_tower(self) -> TextTower | HuggingFaceText | None:
        """The text tower that runs no more tokens than a batch needs, where there is one."""
        try:
            return TextTower(self.model)
        except UnsupportedTowerError:
            # Such a model trains as usual; what needs its text tower at a layer raises the error.
            return None

    @property
    def name(self) -> str:
        """open_clip's name of the architecture, or that of the model config."""
        return str(self.architecture["name"])

    @property
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities, a scalar parameter."""
        return _whole(self.model.logit_scale)

    @property
    def logit_bias(self) -> Tensor | None:
        """What SigLIP's loss adds to every logit, a parameter of one element; None in a model without."""
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return None if bias is None else _whole(bias)

    @property
    def embedding_width(self) -> int:
        """K, the width of the shared space."""
        return int(self.architecture["model_cfg"]["embed_dim"])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """open_clip's preprocessing configuration: size, mean, std, interpolation, resize mode and fill colour."""
        return dict(self.architecture["preprocess_cfg"])

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, K], not normalised."""
        return self._own_embedding("image", images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; only as many tokens are run as are needed."""
        if len(tokens) == 0:
            return self.logit_scale.new_zeros(0, self.embedding_width)
        return _embed_tokens(self, self.trim_tokens(tokens))

    def trim_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens [B, T] of [B, L] that this batch's embeddings depend on, where that is known; else all.

        Finding them waits for the tokens' device, so that training trims them while they are on the CPU.
        """
        return tokens if self._text_tower is None else self._text_tower.trim(tokens)

    def forward(self, images: Tensor, tokens: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings of images [B, K] and texts [M, K], not normalised: what a training step runs.

        Args:
            images: [B, 3, H, W].
            tokens: [M, T], B captions and further texts (M >= B), all of which are run: what `trim_tokens` has left.
            chunk_size: images that are embedded at a time, with an equal share of the texts. Only their embeddings are
                kept, and each chunk is run again in the backward pass, with the same random numbers, so that the
                activations of one chunk are in memory at a time. For what depends on all of a batch's embeddings this
                is GradCache (Gao et al. 2021), and exact. None: all at once.
        """
        if chunk_size is None or len(images) <= chunk_size:
            return self._embed(images, tokens)
        images_by_chunk = torch.split(images, chunk_size)
        chunks = zip(images_by_chunk, torch.tensor_split(tokens, len(images_by_chunk)), strict=True)
        parts = [checkpoint(self._embed, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat([image for image, _ in parts]), torch.cat([text for _, text in parts])

    def _embed(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        embed_images, embed_tokens = self._towers
        # The recomputation of checkpointed blocks would run outside of the mode; torch.compile has its own layout.
        with nullcontext() if self._compiled or any(checkpointing_modules(self.model)) else ContiguousTokens():
            return embed_images(self, images), embed_tokens(self, tokens)

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for the backward pass, and run each block again there.

        Raises:
            UnsupportedTowerError: a tower cannot do so.
        """
        self._enable_checkpointing()
        image, tokens = self.black_image()[None].to(self.logit_scale), self.tokenizer.encode(["a probe"])
        try:
            with evaluating(self):  # draws no random numbers
                self(image, tokens.to(image.device))
        except TypeError as error:  # blocks that take other arguments than open_clip 3.3 then gives them
            raise UnsupportedTowerError(
                f"{self._maker} cannot run the blocks of {self.name} with gradient checkpointing ({error}): set "
                "gradient_checkpointing to false; chunk_size saves more memory than it does"
            ) from error

    def _enable_checkpointing(self) -> None:
        checkpoint_blocks(self.model)

    def clamp_logit_scale(self, most: float) -> None:
        """Keep the factor on similarities between 1 and `most`, in place."""
        with torch.no_grad():
            self.logit_scale.clamp_(0.0, math.log(most))

    def compile_towers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let `forward` run compiled towers; all other methods run the modules as they are, whose hooks work."""
        embed_images = torch.compile(_embed_images, backend=backend)
        embed_tokens = torch.compile(_embed_tokens, backend=backend)

        def embed_any_length(encoder: DualEncoder, tokens: Tensor) -> Tensor:
            # Else the first batch would be compiled for captions of its length alone.
            torch._dynamo.maybe_mark_dynamic(tokens, 1)
            return embed_tokens(encoder, tokens)

        self._towers, self._compiled = (embed_images, embed_any_length), True

    def blocks(self, *towers: str) -> list[nn.Module]:
        """The blocks of "image", of "text", or of both towers, image tower first; none of a tower without a list."""
        found: list[nn.Module] = []
        for tower, at_layer in (("image", self._image_at_layer), ("text", self._text_at_layer)):
            with suppress(UnsupportedTowerError):
                if not towers or tower in towers:
                    found += [block for layer in at_layer(-1).layers if (block := at_layer(layer).block) is not None]
        return found

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        return image_tower_at_layer(self.model, layer)

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        return text_tower_at_layer(self.model, layer)

    def _own_embedding(self, tower: str, inputs: Tensor) -> Tensor:
        # open_clip's own words, not `encode_text`, which is checked by them too. CoCa normalises by default.
        encode = self.model.encode_image if tower == "image" else self.model.encode_text
        embedding: Tensor = encode(inputs, normalize=False)
        return embedding

    @property
    def _maker(self) -> str:
        return f"open_clip {open_clip.__version__}"

    def check_towers(self) -> None:
        """Refuse towers that are others at a layer: attributions would explain another model.

        Other layers than the last are checked when they are first asked for.

        Raises:
            ValueError: `embed_from(features_before(x))` or the end of the path is not the encoder's own output, or that
                is not finite or not of the shared space's width.
        """
        self._checked.clear()
        for tower, at_layer in (("image", self.image_at_layer), ("text", self.text_at_layer)):
            # A tower without layers trains as usual; asking for a layer raises the error.
            with suppress(UnsupportedTowerError):
                at_layer()
                continue
            self._probe(tower)


def _whole(scalar: Tensor) -> Tensor:
    """The parameter as a plain tensor: a DTensor in a sharded encoder, of which every process has all."""
    if not hasattr(scalar, "to_local"):
        return scalar
    local: Tensor = scalar.to_local()
    if local.requires_grad:
        local.register_hook(_mean_over_processes)  # type: ignore[no-untyped-call]
    return local


def _mean_over_processes(gradient: Tensor) -> Tensor:
    """Of gradients that should be equal: where they differ in the last digit, the processes would drift apart."""
    mean = gradient / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def _embed_images(encoder: DualEncoder, images: Tensor) -> Tensor:
    return encoder.encode_image(images)


def _embed_tokens(encoder: DualEncoder, tokens: Tensor) -> Tensor:
    if encoder._text_tower is not None:
        return encoder._text_tower.encode(tokens)
    return encoder._own_embedding("text", tokens)
