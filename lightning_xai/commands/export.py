"""`export`: turn a checkpoint into weights that open_clip loads, or into a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_xai.models import DualEncoder
    from lightning_xai.models.peft_folder import PeftAdapter


def export(checkpoint: Path, out: Path, ckpt_path: str | None = None, adapter: Path | None = None) -> None:
    """Turn a checkpoint of this project into weights for `open_clip.create_model(name, pretrained=out)`.

    Where `fit` began with a folder of transformers (hf:FOLDER), into such a folder, for `from_pretrained(out)`.

    Args:
        checkpoint: a .ckpt file that `fit` has written, or the folder of a training run.
        out: a .safetensors or .pt file to write, next to which the model's configuration goes as .json; or a new folder
            (no suffix), as repositories of open_clip models have it. For a model of transformers a new folder.
        ckpt_path: of a run, which model: best by the metric that it monitors (the default where it has one), last,
            or a file.
        adapter: of a model that was trained with lora, a new folder for the adapters, which peft loads. The weights in
            `out` are then those below the adapters; without, adapters are merged into them.
    """
    from lightning_xai.models import load_dual_encoder

    if checkpoint.is_dir() or checkpoint.name == "config.yaml":
        from lightning_xai.training.run_folder import RunFolder

        model = RunFolder(checkpoint if checkpoint.is_dir() else checkpoint.parent).model(ckpt_path)
        print(f"Model: {model}")  # noqa: T201 - which model the weights are of
        checkpoint = Path(model.path)
    elif ckpt_path is not None:
        raise ValueError(f"--ckpt_path chooses a model of a run, whose folder comes first; got {checkpoint}")
    if checkpoint.suffix != ".ckpt":
        raise ValueError(f"export takes a .ckpt file that fit has written, or a run's folder; got {checkpoint}")
    encoder = load_dual_encoder(str(checkpoint))
    if adapter is None:
        _save_model(encoder, out)
        return
    if adapter.exists() and (adapter.is_file() or any(adapter.iterdir())):
        raise ValueError(f"--adapter {adapter} is there already: give a new folder")
    found = _take_adapters(encoder, checkpoint)
    _save_model(encoder, out)
    found.save(adapter)
    print(  # noqa: T201
        f"Saved {adapter}. To add the adapters:\nfrom peft import PeftModel\n"
        f"model = PeftModel.from_pretrained(model, {str(adapter)!r})"
    )
    if "peft_version" in found.config:
        print(f"Their attention is written for peft {found.config['peft_version']}; releases differ.")  # noqa: T201


def _take_adapters(encoder: DualEncoder, checkpoint: Path) -> PeftAdapter:
    """The adapters of a checkpoint, for peft; the encoder's weights become those below them."""
    from lightning_xai.models.low_rank import without_adapters
    from lightning_xai.models.peft_folder import PeftAdapter
    from lightning_xai.models.weights_file import read_weights

    base, adapters = without_adapters(read_weights(checkpoint, merge=False).state)
    found = PeftAdapter.of(encoder.model, adapters)
    for name in adapters:
        encoder.model.get_parameter(name).data.copy_(base[name])
    return found


def _save_model(encoder: DualEncoder, out: Path) -> None:
    """Write the model, and print how to load it."""
    from lightning_xai.models import HuggingFaceEncoder, save_hugging_face, save_open_clip

    if isinstance(encoder, HuggingFaceEncoder):
        save_hugging_face(encoder, out)
        kind = type(encoder.model).__name__
        print(  # noqa: T201
            f"Saved {out}. To load it:\nfrom transformers import AutoProcessor, {kind}\n"
            f"model = {kind}.from_pretrained({str(out)!r})\nprocessor = AutoProcessor.from_pretrained({str(out)!r})"
        )
        return
    save_open_clip(encoder, out)
    saved = f"{out} and {out.with_suffix('.json')}" if out.suffix else str(out)
    print(f"Saved {saved}. To load the model:\n{loading_code(encoder, out)}")  # noqa: T201


def loading_code(encoder: DualEncoder, weights: Path) -> str:
    """Python code that builds the very same function: model, `preprocess` of images and `tokenizer` of captions.

    open_clip's own config of the name may differ from the encoder's, or not exist, and its images may be others.
    """
    import open_clip
    from open_clip.timm_model import TimmModel

    from lightning_xai.models.image_transform import open_clip_preprocessing

    if not weights.suffix:
        folder = f"local-dir:{weights}"
        return (
            f"import open_clip\nmodel, _, preprocess = open_clip.create_model_and_transforms({folder!r})\n"
            f"tokenizer = open_clip.get_tokenizer({folder!r})"
        )
    name, config = encoder.architecture["name"], dict(encoder.architecture["model_cfg"])
    quick_gelu = config.pop("quick_gelu", False)
    known = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    lines, more = ["import open_clip"], ""
    same = known is not None and {**known, "quick_gelu": False} == {**config, "quick_gelu": False}
    # open_clip can force this activation, not take it away.
    if known is not None and same and (quick_gelu or not known.get("quick_gelu", False)):
        more = ", force_quick_gelu=True" if quick_gelu and not known.get("quick_gelu", False) else ""
    else:
        name = weights.stem
        lines.append(f"open_clip.add_model_config({str(weights.with_suffix('.json'))!r})")
    visual = encoder.model.visual
    # open_clip builds timm's towers for timm's default size, and gives them another only after it has loaded weights.
    sized = isinstance(visual, TimmModel) and hasattr(visual.trunk, "set_input_size")
    if not sized:
        more = f", pretrained={str(weights)!r}{more}"
    cfg = open_clip_preprocessing(encoder.preprocessing)
    pixels = {key: tuple(x) if isinstance(x, list) else x for key, x in cfg.items()}
    lines.append(f"model = open_clip.create_model({name!r}{more}, force_preprocess_cfg={pixels!r})")
    if sized:
        lines.append(f"model.visual.set_input_size({encoder.image_transform.size!r})")
        lines.append(f"open_clip.load_checkpoint(model, {str(weights)!r})")
    lines.append("preprocess_cfg = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)")
    lines.append("preprocess = open_clip.transform.image_transform_v2(preprocess_cfg, is_train=False)")
    lines.append(f"tokenizer = open_clip.get_tokenizer({name!r})")
    return "\n".join(lines)
