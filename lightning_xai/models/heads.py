"""The heads of image towers of open_clip, timm and transformers that are pools of tokens, known weight by weight.

A head is served only where each of its parts is exactly of the class that is written here, without foreign hooks; any
other head is run as it is.
"""

from __future__ import annotations

from typing import Any

from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import AttentionalPooler, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from lightning_xai.models.at_layer import foreign_hooks
from lightning_xai.models.derivatives import LAYER_NORMS, is_norm, is_plain
from lightning_xai.models.pooled_block import is_plain_attention
from lightning_xai.models.token_pool import LatentPool, MeanPool, MeanQueryPool, PoolWeights, TokenPool

_SIGLIP_POOLS = (
    ("transformers.models.siglip.modeling_siglip", "SiglipMultiheadAttentionPoolingHead"),
    ("transformers.models.siglip2.modeling_siglip2", "Siglip2MultiheadAttentionPoolingHead"),
)


def timm_pool(visual: TimmModel) -> TokenPool | None:
    """The pool in which a tower of timm ends; None where it ends in another way, or in one that is not known."""
    trunk: Any = visual.trunk
    if type(trunk) not in (TimmVisionTransformer, Eva):
        return None
    pool, norm = getattr(trunk, "attn_pool", None), trunk.norm
    after = (trunk.fc_norm, trunk.head_drop, trunk.head, visual.head)
    if not _is_norm(norm) or _hooked(norm, *after):
        return None
    # Eva's attention pool is given all tokens, its average none of the prefix.
    includes_prefix = getattr(trunk, "pool_include_prefix", pool is not None)
    prefix = 0 if includes_prefix else int(trunk.num_prefix_tokens)

    def project(pooled: Tensor) -> Tensor:
        for part in after:
            pooled = part(pooled)
        return pooled

    if pool is None:
        return MeanPool(_norm(norm), prefix, project) if trunk.global_pool == "avg" else None
    if not _is_latent(pool):
        return None

    def weights() -> PoolWeights:
        query_he = pool.q_norm(pool.q(pool.latent).reshape(pool.num_heads, pool.head_dim)) * pool.scale
        key_heD, value_heD = pool.kv.weight.reshape(2, *query_he.shape, -1)
        bias = pool.kv.bias
        return PoolWeights(query_he, key_heD, value_heD, None if bias is None else bias.reshape(2, *query_he.shape)[1])

    def finish(context: Tensor) -> Tensor:
        read = pool.proj_drop(pool.proj(context))
        return project(read if pool.mlp is None else read + pool.mlp(pool.norm(read)))

    return LatentPool(_norm(norm), prefix, weights, finish)


def open_clip_pool(visual: VisionTransformer) -> TokenPool | None:
    """The pool in which a tower of open_clip ends; None where it reads CLS, or ends in a way that is not known."""
    pool: Any = visual.attn_pool
    norm = visual.ln_post
    if type(visual) is not VisionTransformer or not is_plain(norm, *LAYER_NORMS) or _hooked(norm):
        return None

    def project(pooled: Tensor) -> Tensor:
        return pooled if visual.proj is None else pooled @ visual.proj

    def finish(context: Tensor) -> Tensor:
        return project(norm(pool.attn.out_proj(context)))

    if pool is None:
        if visual.pool_type != "avg":
            return None
        if visual.final_ln_after_pool:
            return MeanPool(None, 1, lambda pooled: project(norm(pooled)))
        return MeanPool(norm, 1, project)
    # Of several queries the first alone is read.
    if getattr(visual, "attn_pool_contrastive", None) is not None or visual.pool_type != "tok":
        return None
    if (
        type(pool) is not AttentionalPooler
        or not is_plain_attention(pool.attn)
        or not _is_norm(pool.ln_k)
        or _hooked(pool)
    ):
        return None
    return LatentPool(_norm(pool.ln_k), 0, lambda: PoolWeights.of(pool.attn, pool.ln_q(pool.query[0])), finish)


def resnet_pool(visual: ModifiedResNet) -> TokenPool | None:
    """The pool of CLIP's ResNet; None where it is another one, or has been changed."""
    pool: Any = visual.attnpool
    names = ("q_proj", "k_proj", "v_proj", "c_proj")
    if type(pool) is not AttentionPool2d or _hooked(pool):
        return None
    return MeanQueryPool(pool) if all(is_plain(getattr(pool, name), nn.Linear) for name in names) else None


def siglip_pool(vision: Any) -> TokenPool | None:
    """The pool in which the image tower of a SigLIP of transformers ends; None of any other tower."""
    norm: Any = getattr(vision, "post_layernorm", None)
    pool: Any = getattr(vision, "head", None)
    # By name, since transformers need not be installed.
    kind = type(pool).__module__, type(pool).__name__
    if kind not in _SIGLIP_POOLS or type(norm) is not nn.LayerNorm or _hooked(norm, pool):
        return None
    if not _is_norm(norm) or not is_plain_attention(pool.attention):
        return None

    def finish(context: Tensor) -> Tensor:
        read = pool.attention.out_proj(context)
        embedding: Tensor = read + pool.mlp(pool.layernorm(read))
        return embedding

    return LatentPool(norm, 0, lambda: PoolWeights.of(pool.attention, pool.probe[0, 0]), finish)


def _is_latent(pool: Any) -> bool:
    return (
        is_plain(pool, AttentionPoolLatent)
        and pool.latent_len == 1
        and pool.pool in ("token", "avg")
        and pool.pos_embed is None
        and type(pool.k_norm) is nn.Identity
        and is_plain(pool.kv, nn.Linear)
        and not _hooked(pool)
    )


def _is_norm(norm: Any) -> bool:
    """Return whether this is a layer norm with scale and shift, or nothing."""
    return type(norm) is nn.Identity or is_norm(norm)


def _norm(norm: nn.Module) -> nn.LayerNorm | None:
    return norm if isinstance(norm, nn.LayerNorm) else None


def _hooked(*modules: nn.Module) -> bool:
    return any(foreign_hooks(part) for module in modules for part in module.modules())
