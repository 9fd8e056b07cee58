"""The main job on real COCO files, with a model of real size."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_xai import cli
from lightning_xai.results.table import read_csv, read_result


@pytest.mark.slow
def test_a_random_vit_b_32_is_fine_tuned_and_measured_on_coco(coco_mini: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        files = {"images": coco_mini / f"{split}2017"}
        files |= {kind: coco_mini / f"annotations/{kind}_{split}2017.json" for kind in ("captions", "instances")}
        options = [f"--{name}={path}" for name, path in files.items()]
        cli.main(["prepare", "coco", *options, f"--split={split}2017", f"--out={tmp_path / split}"])
    model = ["--model=ContrastiveFineTuning", "--model.model=ViT-B-32", "--model.pretrained=null"]
    data = ["--data=ShardDataModule", f"--data.train={tmp_path / 'train'}", f"--data.val={tmp_path / 'val'}"]
    data += ["--data.batch_size=8", "--data.num_workers=0"]
    trainer = ["--accelerator=cpu", "--max_epochs=1", "--limit_train_batches=2", "--limit_val_batches=2"]
    trainer += ["--enable_checkpointing=false", f"--default_root_dir={tmp_path / 'run'}"]
    trainer += ["--callbacks+=lightning_xai.training.GroundingCallback"]
    cli.main(["fit", *model, *data, *(option.replace("--", "--trainer.", 1) for option in trainer)])
    (folder,) = (tmp_path / "run").rglob("grounding")
    before, after = read_csv(folder / "summary.csv").to_dict("records")
    assert (before["epoch"], after["epoch"], after["step"]) == (0, 1, 2)
    _, table = read_result(folder / "epoch=001")
    every = table.measured("gamma")
    measured = every[every["method"] == "feature_pair"]  # at the last blocks, and all of them at the inputs as well
    assert len(every) == 2 * len(measured)
    assert len(measured) == after["targets"] > 10
    # 16 images of 7 x 7 patches of 32 pixels: boxes are in the cropped image and larger than one patch.
    assert table.targets["key"].nunique() <= 16
    for row in measured.to_dict("records"):
        assert 0 <= row["x0"] < row["x1"] <= 224
        assert 0 <= row["y0"] < row["y1"] <= 224
        assert (row["x1"] - row["x0"]) * (row["y1"] - row["y0"]) > 32 * 32
        assert 0 <= row["value"] <= 1
        assert row["phrase"].lower() in row["caption"].lower() or ", " in row["phrase"]
    assert after["gamma_mean"] != before["gamma_mean"]
    assert (folder / "progress.png").is_file()
