from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import layer_norm

from lightning_xai.models.token_pool import NormedPath


def test_a_path_through_zero_has_a_number_at_every_point() -> None:
    hidden = 100 * torch.randn(1, 500, 64, generator=torch.Generator().manual_seed(0))
    for share in (0.3, 0.7, 1.7):
        reference, at_zero = -share * hidden, share / (1 + share)
        path = NormedPath(hidden, reference, nn.LayerNorm(64))
        for alpha in (at_zero, 0.0, 1.0):
            alphas = torch.full((1, 1, 500), alpha)
            normed = (path.start + alpha * path.slope) * path.inverse_std(alphas)[:, 0, :, None]
            assert normed.isfinite().all()
            if alpha != at_zero:
                torch.testing.assert_close(normed, layer_norm(reference + alpha * (hidden - reference), (64,)))
