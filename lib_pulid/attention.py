"""The formulas: what an identity adds to a layer's activations.

Two of them, one per family, both from ToTheBeginning/PuLID at commit 1aa2fc7:

    SDXL   `pulid/attention_processor.py`, IDAttnProcessor2_0      -> cross_attention_residual
    FLUX   `pulid/encoders_transformer.py`, PerceiverAttentionCA,
           added in `flux/model.py`, Flux.forward                  -> add_image_stream

The identity does not change while sampling, so all that depends on it alone is computed once
(`prepare_cross_attention`, `fold_image_stream`).

Letters: B rows of the batch, L tokens of the picture, C or W their width, H heads, d width of a head,
N identity tokens, D their width, R identities of an injection (0 cond, 1 uncond).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.weights import IMAGE_STREAM_HEAD_DIM, CrossAttentionWeights, ImageStreamWeights, SiteWeights

PROJECTIONS = ("none", "ortho", "ortho_v2")
ID_TOKENS = 5  # the first tokens of an identity, made from ArcFace and the class token
CHUNK = 2048  # image tokens that are worked on at once


# ---------------------------------------------------------------- SDXL: beside the text cross-attention


@dataclass(frozen=True)
class CrossAttentionTensors:
    """One SDXL site, ready. Args: k, v: [R, N, C]; `v` carries the injection's weight."""

    k: Tensor
    v: Tensor

    @property
    def width(self) -> int:
        return self.v.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def to(self, dtype: torch.dtype) -> CrossAttentionTensors:
        return CrossAttentionTensors(self.k.to(dtype), self.v.to(dtype))


def prepare_cross_attention(weights: CrossAttentionWeights, tokens: Tensor, weight: float) -> CrossAttentionTensors:
    """Keys and values of the tokens [R, N, D] float32. The residual is linear in `v`, so that takes `weight`."""
    k = tokens @ weights.to_k.to(tokens).T
    v = tokens @ weights.to_v.to(tokens).T
    return CrossAttentionTensors(k, v * weight)


def cross_attention_residual(
    q: Tensor, h: Tensor, k: Tensor, v: Tensor, *, heads: int, projection: str = "ortho_v2", num_zero: int = 20
) -> Tensor:
    """What PuLID adds to the output of a text cross-attention, before its output projection.

    With r the attention of q on the identity, and p the part of r along h (per channel, over the sequence):

        r = softmax(q k^T / sqrt(d)) v        p = (sum_L h r / sum_L h h) h

        none      r
        ortho     r - p
        ortho_v2  r + (a - 1) p,  a [B, L, 1] = the share of softmax(q k^T) on the first 5 tokens, mean over heads

    The official code appends `num_zero` zero tokens to the identity. Keys and values have no bias, so each
    of them has score 0 and value 0: together they are one more term, num_zero, in the softmax denominator.
    (The missing 1 / sqrt(d) in `a` is the official code's.)

    Args:
        q, h: [B, L, C], the layer's query and the output of its text attention.
        k, v: [B, N, C], of the identity of each row.
        heads: number of heads H, C = H d.

    Returns:
        [B, L, C] in float32 (`none`: in the dtype of q); to be added to h.
    """
    q, k, v = (_split_heads(x, heads) for x in (q, k, v))  # [B, H, L or N, d]
    scores = q @ k.transpose(-1, -2)  # [B, H, L, N]
    attention = _softmax_with_zeros(scores * q.shape[-1] ** -0.5, num_zero)
    r = _merge_heads(attention.to(v.dtype) @ v)
    if projection == "none":
        return r
    r, h = r.float(), h.float()  # the official code goes on in float32 here
    # Where a channel of h is zero all along the sequence, so is the projection on it.
    h_h = (h * h).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    along_h = (h * r).sum(1, keepdim=True) / h_h  # [B, 1, C]; p = along_h * h
    if projection == "ortho":
        return torch.addcmul(r, h, along_h, value=-1)
    share = _softmax_with_zeros(scores, num_zero)[..., :ID_TOKENS].sum(-1).mean(1).unsqueeze(-1)  # [B, L, 1]
    return torch.addcmul(r, h * (share - 1), along_h)


def _softmax_with_zeros(scores: Tensor, num_zero: int) -> Tensor:
    """softmax over N scores and `num_zero` scores of 0, those then left out: [..., N] -> [..., N] float32."""
    if num_zero == 0:
        return scores.softmax(-1, dtype=torch.float32)
    together = F.pad(scores.float(), (0, 1), value=torch.tensor(float(num_zero)).log().item())
    return together.softmax(-1)[..., :-1]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, L, H d] -> [B, H, L, d]


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, H, L, d] -> [B, L, H d]


# ---------------------------------------------------------------- FLUX: on the image stream, after a block


@dataclass(frozen=True)
class ImageStreamTensors:
    """One FLUX site, folded.

    Args:
        score: [R, W, H N], from normalised image tokens to attention scores.
        score_bias: [R, H N], what the LayerNorm's shift adds to them.
        value: [R, H N, W], from attention to the residual; carries the injection's weight.
        heads: H.
    """

    score: Tensor
    score_bias: Tensor
    value: Tensor
    heads: int

    @property
    def width(self) -> int:
        return self.value.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.score.nbytes + self.score_bias.nbytes + self.value.nbytes

    def to(self, dtype: torch.dtype) -> ImageStreamTensors:
        # contiguous, for the matrix products of every step read them
        score, value = (t.to(dtype).contiguous() for t in (self.score, self.value))
        return ImageStreamTensors(score, self.score_bias.to(dtype), value, self.heads)


def fold_image_stream(weights: ImageStreamWeights, tokens: Tensor, weight: float) -> ImageStreamTensors:
    """PerceiverAttentionCA for an identity that stays: its five matrices become two and a bias.

    The official module computes, per head, with g and s the gain and shift of the image's LayerNorm and
    LN0 a LayerNorm without either:

        softmax((g LN0(img) + s) Wq^T k^T / sqrt(d)) v Wo^T = softmax(LN0(img) A + b) B
        A = diag(g) Wq^T k^T / sqrt(d)    b = s Wq^T k^T / sqrt(d)    B = v Wo^T

    Exact in real arithmetic, and cheaper as long as H N < H d (512 < 2048 in the official sizes).

    Args:
        tokens: [R, N, D] float32.
    """
    w = {name: tensor.to(tokens) for name, tensor in vars(weights).items()}
    inner = w["to_q"].shape[0]
    heads = inner // IMAGE_STREAM_HEAD_DIM
    x = F.layer_norm(tokens, tokens.shape[-1:], w["norm_id_weight"], w["norm_id_bias"])
    k, v = (_split_heads(part, heads) for part in (x @ w["to_kv"].T).chunk(2, dim=-1))  # [R, H, N, d]
    to_q = w["to_q"].unflatten(0, (heads, -1))  # [H, d, W]
    to_out = w["to_out"].T.unflatten(0, (heads, -1))  # [H, d, W]
    score = torch.einsum("rhnd,hdw->rwhn", k, to_q).flatten(2) * IMAGE_STREAM_HEAD_DIM**-0.5  # [R, W, H N]
    value = torch.einsum("rhnd,hdw->rhnw", v, to_out).flatten(1, 2) * weight  # [R, H N, W]
    return ImageStreamTensors(
        score=w["norm_image_weight"][:, None] * score, score_bias=w["norm_image_bias"] @ score, value=value, heads=heads
    )


def add_image_stream(
    total: Tensor, image: Tensor, site: ImageStreamTensors, rows: Sequence[int | None], mask: Tensor | None = None
) -> None:
    """total += weight x CA(identity, image), in place, by the folded form of `fold_image_stream`.

    Args:
        total, image: [B, L, W]; the residual is read off `image` and added to `total`.
        rows: for each row of the batch its identity in `site` (0 cond, 1 uncond), or None for no identity.
        mask: [L, 1], 0..1, share of the residual that each token gets.
    """
    for b, row in enumerate(rows):
        if row is None:
            continue
        for first in range(0, image.shape[1], CHUNK):  # bounds what the LayerNorm has to keep
            tokens = slice(first, first + CHUNK)
            normal = F.layer_norm(image[b, tokens], image.shape[-1:])
            scores = torch.addmm(site.score_bias[row], normal, site.score[row])  # [L, H N]
            attention = scores.unflatten(-1, (site.heads, -1)).softmax(-1, dtype=torch.float32).flatten(1)
            if mask is not None:
                attention = attention * mask[tokens]
            total[b, tokens].addmm_(attention.to(total.dtype), site.value[row])


# ---------------------------------------------------------------- either

SiteTensors = CrossAttentionTensors | ImageStreamTensors


def prepare_site(weights: SiteWeights, tokens: Tensor, weight: float) -> SiteTensors:
    """What a site needs of an identity while sampling. tokens: [R, N, D] float32."""
    if isinstance(weights, CrossAttentionWeights):
        return prepare_cross_attention(weights, tokens, weight)
    return fold_image_stream(weights, tokens, weight)
