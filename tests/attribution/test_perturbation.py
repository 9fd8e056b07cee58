from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_xai.attribution.perturbation import forward_only
from lightning_xai.models import DualEncoder
from lightning_xai.models.at_layer import differentiable


def switches() -> tuple[bool, ...]:
    attention: Any = torch.backends.cuda  # its functions have no types
    return (
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
    )


def test_what_derivatives_need_is_off_inside_and_on_again_behind_also_after_an_exception(
    make_encoder: Callable[..., DualEncoder],
) -> None:
    outside = switches()
    with differentiable(make_encoder("vit")):
        before = switches()
        assert before == (True, False, False, False, True)
        with forward_only():
            assert switches() == (False, True, True, True, True)
        assert switches() == before
        with pytest.raises(RuntimeError, match="on purpose"), forward_only():
            raise RuntimeError("broken on purpose")
        assert switches() == before
    assert switches() == outside
