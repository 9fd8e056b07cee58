"""Weights are told apart by their values, names, types and shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from lightning_xai.models.fingerprint import weights_fingerprint


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def change_one_weight(model: nn.Sequential) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    return model


def change_a_buffer(model: nn.Sequential) -> nn.Module:
    next(model.buffers())[0] = 1e-3
    return model


def test_a_copy_has_the_same_fingerprint_whatever_its_mode() -> None:
    model = make_model()
    assert weights_fingerprint(copy.deepcopy(model).eval()) == weights_fingerprint(model.train())


def test_another_value_type_or_name_gives_another_fingerprint() -> None:
    cases: list[Callable[[nn.Sequential], nn.Module]] = [
        change_one_weight,
        change_a_buffer,
        lambda model: model.to(torch.bfloat16),
        lambda model: nn.Sequential(*model, nn.Identity(), nn.Linear(1, 1)),
        lambda model: nn.ModuleDict({"a": model[0], "1": model[1]}),
    ]
    for change in cases:
        assert weights_fingerprint(change(make_model())) != weights_fingerprint(make_model())
