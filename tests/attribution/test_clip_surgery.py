from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import random_pairs
from torch import Tensor
from torch.nn.functional import normalize
from written_out import Tower, attend, own_words, towers

from lightning_xai.attribution import CLIPSurgery
from lightning_xai.models import DualEncoder, UnsupportedTowerError

MakeEncoder = Callable[..., DualEncoder]
PROMPTS = ("a cat on a chair", "a red car")


def second_way(tower: Tower, start: int) -> Tensor:
    """Normalised embeddings [T, K] after architecture surgery."""
    tower.run()
    hidden = tower.inputs[start]
    for number in range(start, len(tower.blocks)):
        value = tower.projections(number, tower.inputs[number])[2]
        context = attend(value, value, value, tower.blocks[number].attn.num_heads, tower.mask).context
        hidden = hidden + tower.project(number, context)
    return torch.stack([normalize(tower.head(token), dim=0) for token in hidden]).detach()


def feature_surgery(image_PK: Tensor, class_K: Tensor, texts_NK: Tensor, temperature: float) -> Tensor:
    """The paper's: element-wise products of patches and prompts, weighted, less their mean over prompts; of the first.

    Returns:
        [P]
    """
    share = (temperature * class_K @ texts_NK.T).softmax(dim=0)
    products = image_PK[:, None] * texts_NK[None] * (share / share.mean())[None, :, None]
    return (products - products.mean(dim=1, keepdim=True)).sum(dim=2)[:, 0]


@pytest.mark.parametrize("start", [None, 0, (2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["prompts", "empty", "architecture"])
def test_agrees_with_both_surgeries_written_out(
    make_encoder: MakeEncoder, start: int | tuple[int, int] | None, kind: str
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = CLIPSurgery(
        encoder,
        start_layer=start,
        prompts=PROMPTS if kind == "prompts" else (),
        feature_surgery=kind != "architecture",
        temperature=3.0,
    ).attribute(images, tokens)
    starts = start if isinstance(start, tuple) else (1 if start is None else start,) * 2
    empty = torch.zeros_like(tokens[0])
    empty[:2] = torch.tensor([49406, 49407])
    for row in range(len(images)):
        image, text = towers(encoder, images[row], tokens[row])
        class_K, caption_K = (normalize(tower.embedding(), dim=0).detach() for tower in (image, text))
        image, text = towers(encoder, images[row], tokens[row])
        patches = second_way(image, starts[0])[1:]
        if kind == "prompts":
            prompts = normalize(encoder.encode_text(encoder.tokenizer.encode(PROMPTS)), dim=1).detach()
            expected = feature_surgery(patches, class_K, torch.cat([caption_K[None], prompts]), 3.0)
        elif kind == "empty":
            expected = patches @ (caption_K - normalize(encoder.encode_text(empty[None]), dim=1)[0].detach())
        else:
            expected = patches @ caption_K
        torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-12)
        expected = own_words(16, text, second_way(text, starts[1]) @ class_K)
        torch.testing.assert_close(result.text[row], expected, rtol=1e-8, atol=1e-12)


def test_towers_without_blocks_of_attention_and_bad_options_are_refused(make_encoder: MakeEncoder) -> None:
    with pytest.raises(UnsupportedTowerError, match=r"attends in its pool alone.*such as FeaturePairAttribution"):
        CLIPSurgery(make_encoder("resnet"))
    encoder = make_encoder("vit")
    with pytest.raises(ValueError, match="caption 0 of 1 is empty"):
        CLIPSurgery(encoder, prompts=[" "])
    with pytest.raises(ValueError, match="temperature has to be a finite number; got nan"):
        CLIPSurgery(encoder, temperature=float("nan"))
