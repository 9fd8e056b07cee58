"""Finished trials of `objectives`, made up but of plausible numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from result_folders import write_evaluation

from lightning_xai.results.objectives import ObjectiveTrial, TrainedModel

RECALL, CHOICE = "val/text_to_image_recall_at_5", "val/caption_choice"
BASE = {"feature_pair": 0.3, "m2ib": 0.5}
GAMMA = {"feature_pair": 0.9, "m2ib": 0.4}  # better where it was trained, worse by another method


def write_trials(
    out: Path,
    skills: Mapping[str, Mapping[str, float]],
    seeds: Sequence[int] = (0,),
    trained_on: Mapping[str, tuple[str, ...]] | None = None,
) -> list[TrainedModel]:
    """Write trials, one for each variant and seed; every seed has a little more skill than the one before."""
    done = []
    for variant, own in skills.items():
        for seed in seeds:
            trial = ObjectiveTrial(variant, seed)
            skilled = {method: skill + 0.001 * seed for method, skill in own.items()}
            write_evaluation(trial.judged(out), skilled, images=24)
            found = TrainedModel(
                trial=trial,
                recipe={"objectives": [variant], "model": {"model": "tiny"}},
                logged={RECALL: 0.2 - 0.1 * (variant != "base") + 0.001 * seed, CHOICE: 0.5},
                trained_on=(trained_on or {}).get(variant, ()),
            )
            found.save(out)
            done.append(found)
    return done
