"""`export`: turn a checkpoint into weights that open_clip loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_xai.models import DualEncoder


def export(checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint of this project into weights for `open_clip.create_model(name, pretrained=out)`.

    Args:
        checkpoint: a .ckpt file that `fit` has written.
        out: a .safetensors or .pt file to write; the model's configuration goes to the same folder, as .json.
    """
    from lightning_xai.models import load_dual_encoder, save_open_clip

    if checkpoint.suffix != ".ckpt":
        raise ValueError(f"export takes a .ckpt file that fit has written; got {checkpoint}")
    encoder = load_dual_encoder(str(checkpoint))
    save_open_clip(encoder, out)
    print(f"Saved {out} and {out.with_suffix('.json')}. To load them:\n{_loading_code(encoder, out)}")  # noqa: T201


def _loading_code(encoder: DualEncoder, weights: Path) -> str:
    """Python code that builds the very same function: open_clip's own config of that name may differ, or not exist."""
    import open_clip

    name, config = encoder.architecture["name"], dict(encoder.architecture["model_cfg"])
    quick_gelu = config.pop("quick_gelu", False)
    known = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    lines, more = ["import open_clip"], ""
    if known is not None and {**known, "quick_gelu": False} == {**config, "quick_gelu": False}:
        more = ", force_quick_gelu=True" if quick_gelu and not known.get("quick_gelu", False) else ""
    else:
        name = weights.stem
        lines.append(f"open_clip.add_model_config({str(weights.with_suffix('.json'))!r})")
    lines.append(f"model = open_clip.create_model({name!r}, pretrained={str(weights)!r}{more})")
    return "\n".join(lines)
