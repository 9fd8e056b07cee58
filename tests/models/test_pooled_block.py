from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai.models import derivatives
from lightning_xai.models.at_layer import EmbeddingPath, PathWithDerivatives
from lightning_xai.models.pooled_block import PooledBlock

BATCH, POINTS, TOKENS, WIDTH = 2, 3, 7, 16
KINDS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
    "quick": {"act_layer": QuickGELU},
    "scaled": {"ls_init_value": 0.5},
}


def pooled(kind: str = "gelu", *, causal: bool = False, projection: str = "weight") -> PooledBlock:
    torch.manual_seed(0)
    block, norm = ResidualAttentionBlock(WIDTH, 4, **KINDS[kind]).double(), nn.LayerNorm(WIDTH).double()
    for parameter in [*block.parameters(), *norm.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    weight = torch.randn(WIDTH, 5, dtype=torch.float64)
    last = {"weight": weight, "layer": nn.Linear(WIDTH, 5).double(), "none": None}[projection]
    found = PooledBlock.of(block, norm, lambda: last, causal=causal)
    assert found is not None
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a reference, and the positions that are read."""
    torch.manual_seed(1)
    hidden = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    return hidden, torch.randn(1, TOKENS, WIDTH, dtype=torch.float64), torch.tensor([4, 6])


def whole_block(pooled: PooledBlock, alpha: Tensor) -> Tensor:
    """The embeddings by the block itself, run on all tokens of every point."""
    hidden, reference, pool = inputs()
    points = (reference[:, None] + alpha[..., None] * (hidden - reference)[:, None]).flatten(0, 1)
    mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1) if pooled.causal else None
    output = pooled.block(points, attn_mask=mask).unflatten(0, alpha.shape[:2])
    read: Tensor = pooled.norm(output[torch.arange(BATCH), :, pool])
    projection: Any = pooled.projection()
    if projection is not None:
        read = projection(read) if isinstance(projection, nn.Linear) else read @ projection
    return read


def random_path(pooled: PooledBlock, directions: int) -> tuple[EmbeddingPath, Tensor, Tensor]:
    torch.manual_seed(2)
    alpha = torch.rand(BATCH, POINTS, TOKENS, dtype=torch.float64)
    return pooled.path(*inputs(), directions), alpha, torch.randn(BATCH, 5, TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("directions", [1, 1000], ids=["folded", "projected"])
@pytest.mark.parametrize(
    ("kind", "causal", "projection"),
    [(kind, False, "weight") for kind in KINDS] + [("gelu", True, "layer"), ("quick", True, "none")],
)
def test_the_path_and_its_derivatives_are_those_of_the_block_itself(
    kind: str, causal: bool, projection: str, directions: int
) -> None:
    block = pooled(kind, causal=causal, projection=projection)
    path, alpha, along = random_path(block, directions)
    assert isinstance(path, PathWithDerivatives)
    both = path.with_derivatives(alpha, along)
    torch.testing.assert_close(path(alpha), whole_block(block, alpha))
    torch.testing.assert_close(both[:, 0], path(alpha))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for number in range(along.shape[1]):
            tangent = along[:, number, None].expand_as(alpha).clone()
            expected = torch.func.jvp(lambda at: whole_block(block, at), (alpha,), (tangent,))[1]
            torch.testing.assert_close(both[:, 1 + number], expected)


@pytest.mark.parametrize("directions", [1, 1000], ids=["folded", "projected"])
def test_attention_without_biases_is_read_as_the_block_reads_it(directions: int) -> None:
    block = pooled(causal=True)
    block.block.attn.in_proj_bias = block.block.attn.out_proj.bias = None
    hidden, reference, pool = inputs()
    end = torch.ones(BATCH, 1, TOKENS, dtype=torch.float64)
    expected = whole_block(block, end)
    torch.testing.assert_close(block.read(hidden, pool), expected[:, 0])
    torch.testing.assert_close(block.path(hidden, reference, pool, directions)(end), expected)


@pytest.mark.parametrize("directions", [1, 1000], ids=["folded", "projected"])
def test_the_gradient_of_the_weights_is_the_same_after_a_point_was_read_without_one(directions: int) -> None:
    block = pooled()

    def gradient(*, read_before: bool) -> Tensor:
        path, alpha, _ = random_path(block, directions)
        if read_before:
            with torch.no_grad():
                path(alpha)
        found: Tensor = torch.autograd.grad(path(alpha).sum(), block.block.attn.in_proj_weight)[0]
        return found

    torch.testing.assert_close(gradient(read_before=True), gradient(read_before=False))


@pytest.mark.parametrize("directions", [1, 1000], ids=["folded", "projected"])
def test_values_and_derivatives_can_be_differentiated_again(directions: int) -> None:
    path, alpha, along = random_path(pooled("tanh", causal=True), directions)
    assert isinstance(path, PathWithDerivatives)
    leaf = alpha[:, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda at: path.with_derivatives(at, along[:, :2]), (leaf,))


def test_a_layer_norms_derivative_holds_for_numbers_whose_squares_overflow() -> None:
    torch.manual_seed(0)
    norm, value = nn.LayerNorm(WIDTH).double(), 1000 * torch.randn(2, 1, 3, WIDTH).double()
    both = torch.cat([value, torch.randn(2, 4, 3, WIDTH).double()], dim=1)
    both = both.half().double()
    half = derivatives.norm(both.half(), nn.LayerNorm(WIDTH).half())
    torch.testing.assert_close(half.double(), derivatives.norm(both, norm), rtol=1e-2, atol=1e-5)


def test_for_few_queries_no_key_and_no_value_is_made() -> None:
    block = pooled()

    def flops(directions: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            path = block.path(
                torch.randn(1, 400, WIDTH).double(), torch.randn(1, 400, WIDTH).double(), pool, directions
            )
            path(torch.rand(1, 1, 400).double())
        return int(counter.get_total_flops())

    pool = torch.tensor([0])
    keys_and_values = 4 * 2 * 400 * WIDTH**2
    assert flops(1) < 0.6 * keys_and_values < keys_and_values < flops(1000)


@pytest.mark.parametrize("part", ["activation", "norm", "hook", "projection", "scale"])
def test_what_is_not_known_exactly_is_left_to_the_block(part: str) -> None:
    block: Any = ResidualAttentionBlock(WIDTH, 4)
    norm, last = nn.LayerNorm(WIDTH), torch.randn(WIDTH, 5)
    assert PooledBlock.of(block, norm, lambda: last, causal=False)
    if part == "activation":
        block.mlp.gelu = nn.SiLU()
    if part == "norm":
        norm = nn.Identity()  # type: ignore[assignment]
    if part == "hook":
        norm.register_forward_hook(lambda module, given, output: 2 * output)
    if part == "scale":
        block.ls_2 = nn.Tanh()
    projection = nn.Sequential(nn.Linear(WIDTH, 5)) if part == "projection" else last
    assert PooledBlock.of(block, norm, lambda: projection, causal=False) is None
