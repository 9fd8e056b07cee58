"""Integrals of a tower's Jacobian along the straight path from a reference to an input (paper, Eqs. 6-9).

Shape suffixes: B batch, S directions or cotangents, N points, T tokens, K embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.overrides import TorchFunctionMode

from lightning_xai.models.at_layer import EmbeddingPath, PathWithDerivatives
from lightning_xai.models.contiguous_tokens import ContiguousTokens

_TOKENS_AT_A_TIME = 8192
"""Bound on directions or cotangents that are taken together, in tokens of all inputs and points: each direction keeps
its own numbers for every token. At a width of 768 a block's hidden layer then takes 100 MB."""

Rule = Literal["right", "left", "midpoint", "trapezoid", "gauss_legendre"]


def quadrature(rule: Rule, steps: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights of sum 1 that integrate over the path.

    `"right"` is the paper's Riemann sum, alpha_n = n / N (Eq. 9), listed from the input backwards. The others converge
    faster in N.

    Returns:
        points [N] and weights [N], float64.

    Raises:
        ValueError: fewer than one step (two for the trapezoid), or an unknown rule.

    Example:
        >>> quadrature("right", 4)[0].tolist()
        [1.0, 0.75, 0.5, 0.25]
        >>> points, weights = quadrature("gauss_legendre", 2)
        >>> round(float((weights * points**3).sum()), 12)  # exact for cubics
        0.25
    """
    least = 2 if rule == "trapezoid" else 1
    if steps < least:
        raise ValueError(f"the {rule} rule needs at least {least} integration step(s); got steps={steps}")
    uniform = torch.full((steps,), 1 / steps, dtype=torch.float64)
    count = torch.arange(steps, dtype=torch.float64)
    if rule == "right":
        return (steps - count) / steps, uniform
    if rule == "left":
        return count / steps, uniform
    if rule == "midpoint":
        return (count + 0.5) / steps, uniform
    if rule == "trapezoid":
        weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return count / (steps - 1), weights
    if rule == "gauss_legendre":
        nodes, node_weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(node_weights / 2)
    raise ValueError(f"unknown quadrature rule {rule!r}; known: right, left, midpoint, trapezoid, gauss_legendre")


def _at_a_time(batch: int, points: int, tokens: int) -> int:
    """How many directions or cotangents fit into memory together, at least one."""
    return max(1, _TOKENS_AT_A_TIME // (batch * points * tokens))


def _points(points_N: Tensor, batch: int, tokens: int, like: Tensor) -> Tensor:
    # Cloned: forward-mode derivatives refuse memory that several elements share.
    return points_N.to(like)[None, :, None].expand(batch, -1, tokens).clone()


class _PlainLayerNorm(TorchFunctionMode):
    """Inside, layer norms are computed by elementary operations.

    The derivative of their own kernel along a direction cannot be differentiated again: it takes mean and deviation for
    constants, without an error (PyTorch 2.14, github.com/pytorch/pytorch/issues/196700).
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_layer_norm if function is layer_norm else function)(*args, **(kwargs or {}))


class _ConstantWeights(ContiguousTokens):
    """Inside, derivatives along a direction cost a second pass through linear layers, and not a third."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer."""
        result: Tensor = _Linear.apply(x, weight, bias)
        return result


class _Linear(torch.autograd.Function):
    """`linear` whose derivative along a direction leaves the weights out, which do not move.

    PyTorch's own also multiplies the input by a matrix of zeros.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x.contiguous(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(inputs[1])
        # Else zeros of the weights' size would be written for their derivatives.
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *ignored: Any) -> Tensor:
        return linear(x.contiguous(), *ctx.saved_tensors)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def integrated_jvp(
    path: EmbeddingPath,
    points_N: Tensor,
    weights_N: Tensor,
    directions_BST: Tensor,
    *,
    create_graph: bool = False,
) -> Tensor:
    """Change of the embedding along the path by the given tokens' own change: a Jacobian-vector product each.

    With `x(alpha) = r + alpha * (x - r)` this is `sum_T v_T (x - r)_T . J_T`, J the integrated Jacobian of Eq. 9.

    Args:
        path: alpha [B, N, T] -> embeddings [B, N, K].
        points_N: points of the path.
        weights_N: their weights.
        directions_BST: weights v of the tokens, S directions for each of B inputs.
        create_graph: whether the result can be differentiated by the weights of the tower.

    Returns:
        [B, S, K]
    """
    if isinstance(path, PathWithDerivatives):
        derivatives_BSNK = _with_derivatives(path, points_N, directions_BST)[1]
        return torch.einsum("n,bsnk->bsk", weights_N.to(directions_BST), derivatives_BSNK)
    with _PlainLayerNorm() if create_graph else _ConstantWeights():
        return _integrated_jvp(path, points_N, weights_N, directions_BST)


@torch.no_grad()
def jvp_with_embedding(
    path: PathWithDerivatives, points_N: Tensor, weights_N: Tensor, directions_BST: Tensor
) -> tuple[Tensor, Tensor]:
    """`integrated_jvp` of a path that knows its derivatives, and the embedding of the input [B, K], in one pass."""
    count, end = len(points_N), int(points_N.argmax())
    if points_N[end] != 1:  # The input, where the path ends, is a point of few rules: it is read, and has no weight.
        points_N, end = torch.cat([points_N, points_N.new_ones(1)]), count
    embeddings_BNK, derivatives_BSNK = _with_derivatives(path, points_N, directions_BST)
    change_BSK = torch.einsum("n,bsnk->bsk", weights_N.to(directions_BST), derivatives_BSNK[:, :, :count])
    return change_BSK, embeddings_BNK[:, end]


def _with_derivatives(path: PathWithDerivatives, points_N: Tensor, directions_BST: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, tokens = directions_BST.shape
    alpha_BNT = points_N.to(directions_BST)[None, :, None].expand(batch, -1, tokens)
    # A direction has attention weights of each token, and the hidden layer of one token.
    chunks = torch.split(directions_BST, _at_a_time(batch, len(points_N), 1 + tokens // 16), dim=1)
    parts = [path.with_derivatives(alpha_BNT, chunk) for chunk in chunks]
    return parts[0][:, 0], torch.cat([part[:, 1:] for part in parts], dim=1)


def _integrated_jvp(path: EmbeddingPath, points_N: Tensor, weights_N: Tensor, directions_BST: Tensor) -> Tensor:
    batch, _, tokens = directions_BST.shape
    alpha_BNT = _points(points_N, batch, tokens, directions_BST)
    weights = weights_N.to(directions_BST)

    def along(direction_BT: Tensor) -> Tensor:
        tangent = direction_BT[:, None].expand_as(alpha_BNT).clone()
        derivative_BNK = torch.func.jvp(path, (alpha_BNT,), (tangent,))[1]
        return torch.einsum("n,bnk->bk", weights, derivative_BNK)

    if directions_BST.shape[1] == 1:
        return along(directions_BST[:, 0]).unsqueeze(1)
    # Directions of a chunk share the pass along the path.
    # Some towers draw random numbers (for dropping layers) that evaluation does not use; vmap has to know.
    chunk = _at_a_time(*alpha_BNT.shape)
    every = torch.func.vmap(along, in_dims=1, out_dims=1, randomness="same", chunk_size=chunk)
    directional_BSK: Tensor = every(directions_BST)
    return directional_BSK


def integrated_vjp(
    path: EmbeddingPath,
    points_N: Tensor,
    weights_N: Tensor,
    cotangents_BSK: Tensor,
    tokens: int,
    *,
    create_graph: bool = False,
) -> Tensor:
    """The integrated Jacobian's other side: what each token's change along the path adds to the products with `u`.

    This is `(x - r)_T . J_T^T u`, a vector-Jacobian product each. All share the forward pass, and go back through it as
    many together as memory allows, so that weights are read once for all of them.

    Args:
        path: alpha [B, N, T] -> embeddings [B, N, K].
        points_N: points of the path.
        weights_N: their weights.
        cotangents_BSK: embeddings u, S for each of B inputs.
        tokens: T.
        create_graph: whether the result can be differentiated, by the weights of the tower as by the cotangents.

    Returns:
        [B, S, T]
    """
    alpha_BNT = _points(points_N, len(cotangents_BSK), tokens, cotangents_BSK).detach().requires_grad_()
    with ContiguousTokens():
        integral_BK = torch.einsum("n,bnk->bk", weights_N.to(cotangents_BSK), path(alpha_BNT))

    def back(cotangents_SBK: Tensor, *, last: bool) -> Tensor:
        # A single one goes without vmap, under which fewer operations can be differentiated again.
        single = len(cotangents_SBK) == 1
        (gradient,) = torch.autograd.grad(
            integral_BK,
            alpha_BNT,
            cotangents_SBK[0] if single else cotangents_SBK,
            retain_graph=create_graph or not last,
            create_graph=create_graph,
            is_grads_batched=not single,
        )
        return gradient.sum(dim=-2).unsqueeze(0) if single else gradient.sum(dim=-2)

    chunks = torch.split(cotangents_BSK.transpose(0, 1), _at_a_time(*alpha_BNT.shape))
    rows_SBT = torch.cat([back(chunk, last=chunk is chunks[-1]) for chunk in chunks])
    return rows_SBT.transpose(0, 1)


@torch.no_grad()
def embeddings_at(path: EmbeddingPath, alphas: Sequence[float], batch: int, tokens: int, like: Tensor) -> Tensor:
    """The embeddings at A points of the path in one pass, [B, A, K]: 1 is the input, 0 the reference."""
    alpha_A = torch.tensor(alphas, dtype=like.dtype, device=like.device)
    with ContiguousTokens():
        return path(alpha_A[None, :, None].expand(batch, -1, tokens))
