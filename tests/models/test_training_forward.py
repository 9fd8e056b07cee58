"""`DualEncoder.forward`, which training runs: in chunks, with blocks run again, compiled; the numbers are the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, encoder_from
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from lightning_xai.models import DualEncoder, UnsupportedTowerError, contrastive_loss

MakeEncoder = Callable[..., DualEncoder]
PAIRS = 7
WORDS = ["a", "dog", "on", "one", "very", "long", "and", "winding", "road", "to", "red", "mats"]


def batch_of(encoder: DualEncoder, pairs: int = PAIRS, words: int = len(WORDS)) -> tuple[Tensor, Tensor]:
    """Images, and captions of 2 to `words` words."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(pairs, *encoder.image_shape, generator=generator).to(encoder.logit_scale.dtype)
    return images, encoder.tokenizer.encode([" ".join(WORDS[: min(words, 2 + row)]) for row in range(pairs)])


def step(
    encoder: DualEncoder,
    images: Tensor,
    tokens: Tensor,
    chunk_size: int | None = None,
    embed: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """Loss and gradients of a batch whose third row is invalid; dropout as of one and the same seed."""
    encoder.zero_grad()
    torch.manual_seed(5)
    image, text = (embed or encoder)(images, tokens, chunk_size)
    valid = torch.arange(len(images)) != 2
    image, text = (normalize(features, dim=1) for features in (image, text))
    loss, _ = contrastive_loss(image, text, encoder.logit_scale.exp(), valid)
    torch.autograd.backward(loss)
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, _ in encoder.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        error = float((actual[name] - value).abs().max() / value.abs().max().clamp(min=1))
        assert error < tolerance, f"{name} is off by {error}"


def timm_tower_and_class_token(folder: Path) -> DualEncoder:
    config = copy.deepcopy(ARCHITECTURES["vit"]) | {"embed_dim": 96, "custom_text": True}
    config["vision_cfg"] = {
        "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160
    }  # fmt: skip
    config["text_cfg"]["embed_cls"] = True
    return encoder_from(config, folder)


@pytest.fixture
def with_dropout(tmp_path: Path) -> DualEncoder:
    """A tower that draws which patches it sees."""
    config = copy.deepcopy(ARCHITECTURES["vit"])
    config["vision_cfg"]["patch_dropout"] = 0.5
    return encoder_from(config, tmp_path).train()


# --- in chunks ---


@pytest.mark.parametrize("name", ["vit", "vit_average_pool", "vit_custom_block"])
def test_chunks_of_any_size_give_loss_and_gradients_of_the_whole_batch(make_encoder: MakeEncoder, name: str) -> None:
    cases: list[int] = [1, 3, 7, 100]
    for chunk_size in cases:
        encoder = make_encoder(name, torch.float64).train()
        images, tokens = batch_of(encoder)
        plain = step(encoder, images, tokens)
        assert_same(step(encoder, images, tokens, chunk_size), plain)
        assert_same(step(encoder, images, encoder.trim_tokens(tokens), chunk_size), plain)


def test_chunks_give_the_gradients_in_float32_within_its_rounding(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit").train()
    images, tokens = batch_of(encoder)
    assert_same(step(encoder, images, tokens, 2), step(encoder, images, tokens), 1e-5)


def test_captions_are_trimmed_to_the_batchs_longest_and_no_shorter(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64).train()
    images, tokens = batch_of(encoder)
    trimmed = encoder.trim_tokens(tokens)
    assert trimmed.shape == (PAIRS, 2 + PAIRS + 1)  # the longest caption's words, start and end
    assert_same(step(encoder, images, trimmed), step(encoder, images, tokens))
    last = make_encoder("vit_average_pool")  # reads the last token, wherever the caption ends
    assert last.trim_tokens(tokens) is not None
    assert last.trim_tokens(tokens).shape == tokens.shape


def test_a_chunk_that_is_run_again_draws_what_it_drew_before(with_dropout: DualEncoder) -> None:
    encoder = with_dropout
    images, tokens = batch_of(encoder)

    def without_running_again(images: Tensor, tokens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
        chunks = zip(torch.split(images, chunk_size), torch.split(tokens, chunk_size), strict=True)
        parts = [encoder(*chunk) for chunk in chunks]
        return torch.cat([image for image, _ in parts]), torch.cat([text for _, text in parts])

    kept = step(encoder, images, tokens, 3, without_running_again)
    assert_same(step(encoder, images, tokens, 3), kept)
    # What is drawn matters: another seed is another loss.
    torch.manual_seed(6)
    assert not torch.equal(encoder(images, tokens)[0], encoder(images, tokens)[0])


def peak_memory(encoder: DualEncoder, pairs: int, chunk_size: int | None, folder: Path) -> int:
    """Most bytes that a forward and backward pass holds at a time beyond the weights and the batch."""
    images, tokens = batch_of(encoder, pairs)
    encoder.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        image, text = encoder(images, tokens, chunk_size)
        torch.autograd.backward(contrastive_loss(image, text, encoder.logit_scale.exp())[0])
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((each for each in events if each["name"] == "[memory]"), key=lambda each: float(each["ts"])):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak


def test_activations_of_one_chunk_are_in_memory_at_a_time(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    encoder = make_encoder("vit").train()
    # Its gradient is far larger than the activations of so small a model.
    encoder.model.token_embedding.requires_grad_(False)
    plain = [peak_memory(encoder, pairs, None, tmp_path) for pairs in (16, 64)]
    chunked = [peak_memory(encoder, pairs, 8, tmp_path) for pairs in (16, 64)]
    for_48_pairs = plain[1] - plain[0]
    assert for_48_pairs > 5_000_000, "activations have to be what is measured"
    # Of pairs in other chunks only the embeddings are kept.
    assert chunked[1] - chunked[0] < 0.03 * for_48_pairs, (plain, chunked)


# --- blocks run again ---


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale_quick_gelu", "timm"])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less(
    make_encoder: MakeEncoder, tmp_path: Path, name: str
) -> None:
    encoder = timm_tower_and_class_token(tmp_path) if name == "timm" else make_encoder(name)
    encoder = encoder.double().train()
    images, tokens = batch_of(encoder)
    tokens = encoder.trim_tokens(tokens)
    plain, kept = step(encoder, images, tokens), kept_by(encoder, images, tokens)
    encoder.checkpoint_blocks()
    assert_same(step(encoder, images, tokens), plain)
    assert_same(step(encoder, images, tokens, 3), plain)
    assert kept_by(encoder, images, tokens) < 0.5 * kept


def kept_by(encoder: DualEncoder, images: Tensor, tokens: Tensor) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = encoder(images, tokens)
    del kept
    return sum(sizes.values())


def test_gradient_checkpointing_draws_the_same_patches_again(with_dropout: DualEncoder) -> None:
    images, tokens = batch_of(with_dropout)
    plain = step(with_dropout, images, tokens)
    with_dropout.checkpoint_blocks()
    assert_same(step(with_dropout, images, tokens), plain)


def test_a_tower_without_gradient_checkpointing_is_refused(make_encoder: MakeEncoder) -> None:
    with pytest.raises(UnsupportedTowerError, match="the image tower, a ModifiedResNet, has no gradient checkpointing"):
        make_encoder("resnet").checkpoint_blocks()


def test_blocks_that_open_clip_itself_fails_to_checkpoint_are_refused_at_once(make_encoder: MakeEncoder) -> None:
    with pytest.raises(UnsupportedTowerError, match="cannot run the blocks of vit_custom_block with gradient check"):
        make_encoder("vit_custom_block").checkpoint_blocks()


# --- compiled ---


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_towers_give_the_same_numbers_at_any_length_of_captions_and_are_compiled_few_times(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("vit_layer_scale_quick_gelu").train()
    keys = list(encoder.state_dict())
    lengths = [
        (images, encoder.trim_tokens(tokens)) for images, tokens in (batch_of(encoder, 8, n) for n in range(2, 9))
    ]
    assert len({tokens.shape for _, tokens in lengths}) == 7
    plain = [step(encoder, *batch) for batch in lengths]
    counter = CompileCounterWithBackend("aot_eager")
    encoder.compile_towers(counter)
    for batch, expected in zip(lengths, plain, strict=True):
        assert_same(step(encoder, *batch), expected, 1e-5)
        assert counter.frame_count == 2  # one for each tower
    assert_same(step(encoder, *lengths[-1], 4), plain[-1], 1e-5)
    assert list(encoder.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_hooks_see_a_compiled_encoder_evaluated_and_a_copy_runs_its_own_weights(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit_layer_scale_quick_gelu").train()
    images, tokens = batch_of(encoder)
    encoder.compile_towers("aot_eager")
    compiled, _ = encoder(images, tokens)
    seen: list[Tensor] = []
    handle = encoder.blocks()[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(encoder.encode_image(images), compiled, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    handle.remove()
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.model.visual.proj.mul_(2)
    torch.testing.assert_close(other(images, tokens)[0], 2 * compiled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(images, tokens)[0], compiled)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_towers_whose_blocks_run_again_in_chunks_give_the_same_numbers(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit_layer_scale_quick_gelu").train()
    images, tokens = batch_of(encoder, 8)
    plain = step(encoder, images, tokens)
    encoder.checkpoint_blocks()
    encoder.compile_towers("aot_eager")
    assert_same(step(encoder, images, tokens), plain, 1e-5)
    assert_same(step(encoder, images, tokens, 4), plain, 1e-5)
