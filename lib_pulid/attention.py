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

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.weights import IMAGE_STREAM_HEAD_DIM, CrossAttentionWeights, ImageStreamWeights, SiteWeights

PROJECTIONS = ("none", "ortho", "ortho_v2")
ID_TOKENS = 5  # the first tokens of an identity, made from ArcFace and the class token
MARK = 8  # columns that mark them; fused attention wants a multiple of 8
FUSED_ON = ("cuda",)  # where fused attention is faster than writing the scores out; on a CPU it is slower
CHUNK = 4096  # image tokens that are worked on at once


Tensors = TypeVar("Tensors")


@dataclass(frozen=True)
class SiteIdentity(Generic[Tensors]):
    """An identity at a site, in one call of the denoiser.

    Args:
        site: what was prepared of it. rows: for each row of the batch its identity in `site` (0 cond, 1 uncond), or
            None for no identity.
        mask: [L, 1] float32, 0..1, share of the residual that each token gets. None: all of it.
        projection, num_zero: SDXL only, see `injection.compile_injection`.
    """

    site: Tensors
    rows: Sequence[int | None]
    mask: Tensor | None = None
    projection: str = "ortho_v2"
    num_zero: int = 20


# ---------------------------------------------------------------- SDXL: beside the text cross-attention


@dataclass(frozen=True)
class CrossAttentionTensors:
    """One SDXL site, ready.

    Args:
        tokens: [R, N, 2 C + MARK], of each identity token its key, its value, and its mark, 1 for the first ID_TOKENS
            and else 0. In one tensor, so that one copy lays out the rows.
    """

    tokens: Tensor

    @classmethod
    def joined(cls, k: Tensor, v: Tensor) -> CrossAttentionTensors:
        """Of keys and values [R, N, C]."""
        is_first = torch.arange(k.shape[1], device=k.device) < ID_TOKENS
        return cls(torch.cat((k, v, is_first.to(k)[:, None].expand(*k.shape[:2], MARK)), dim=-1))

    @property
    def width(self) -> int:
        return (self.tokens.shape[-1] - MARK) // 2

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def to(self, where: torch.dtype | torch.device) -> CrossAttentionTensors:
        return CrossAttentionTensors(self.tokens.to(where))

    def weighted(self, weight: float) -> CrossAttentionTensors:
        """The residual is linear in the values, so they take the weight."""
        k, v, mark = self.tokens.split((self.width, self.width, MARK), dim=-1)
        return CrossAttentionTensors(torch.cat((k, v * weight, mark), dim=-1))

    def of_rows(self, rows: Sequence[int | None], num_zero: int) -> Sequence[Tensor]:
        """Keys and values [B, N + num_zero, C] and marks [B, N + num_zero, MARK] of a batch, zero tokens last.

        A row without an identity has zero tokens only. No index goes to a GPU, which would have to be waited for.
        """
        zeros = self.tokens.new_zeros(self.tokens.shape[1] + num_zero, self.tokens.shape[2])
        parts = [(zeros,) if row is None else (self.tokens[row], zeros[:num_zero]) for row in rows]
        laid_out = torch.cat([part for row in parts for part in row]).unflatten(0, (len(rows), -1))
        return laid_out.split((self.width, self.width, MARK), dim=-1)


def prepare_cross_attention(weights: CrossAttentionWeights, tokens: Tensor) -> CrossAttentionTensors:
    """Keys and values of the tokens [R, N, D] float32."""
    return CrossAttentionTensors.joined(tokens @ weights.to_k.to(tokens).T, tokens @ weights.to_v.to(tokens).T)


def add_cross_attention(
    q: Tensor, h: Tensor, identities: Sequence[SiteIdentity[CrossAttentionTensors]], heads: int
) -> Tensor:
    """Adds what PuLID adds to the output of a text cross-attention, before its output projection.

    With r the attention of q on the identity, and p the part of r along h (per channel, over the sequence):

        r = softmax(q k^T / sqrt(d)) v        p = (sum_L h r / sum_L h h) h

        none      h + r
        ortho     h + r - p
        ortho_v2  h + r + (a - 1) p,  a [B, L, 1] = the share of softmax(q k^T) on the first 5 tokens, mean over heads

    (The missing 1 / sqrt(d) in `a` is the official code's.) The official code appends `num_zero` zero tokens to the
    identity; keys and values have no bias, so each of them has score 0 and value 0.

    Several identities read the same h, and what they add is summed: the result is h times a gain, plus r. The gain is
    computed in float32 and the result rounded once, as in the official code.

    Args:
        q, h: [B, L, C], the layer's query and the output of its text attention.
        heads: number of heads H, C = H d.

    Returns:
        [B, L, C] in the dtype of h.
    """
    one = torch.ones((), dtype=torch.float32, device=h.device)
    added: Tensor | None = None
    h_h: Tensor | None = None
    gain = one
    for identity in identities:
        is_v2 = identity.projection == "ortho_v2"
        r, share = _attend(q, identity, heads, is_v2)
        mask = one if identity.mask is None else identity.mask
        if identity.projection != "none":
            # Where a channel of h is zero all along the sequence, so is the projection on it.
            h_h = _square_sum(h).clamp_min(torch.finfo(torch.float32).tiny) if h_h is None else h_h
            along_h = _product_sum(h, r, heads) / h_h  # p = along_h * h
            gain = torch.addcmul(gain, mask * (share - one), along_h)
        r = r if identity.mask is None else r * mask.to(r.dtype)
        added = r if added is None else added + r
    if added is None:
        return h
    if torch.is_grad_enabled():
        return torch.addcmul(added, h, gain).to(h.dtype)
    return torch.addcmul(added, h, gain, out=torch.empty_like(h))


def _attend(
    q: Tensor, identity: SiteIdentity[CrossAttentionTensors], heads: int, with_share: bool
) -> tuple[Tensor, Tensor | float]:
    """r [B, L, C], and a [B, L, 1] float32, or 0 where it is not wanted; see `add_cross_attention`."""
    fused = _is_fused(q)
    dtype = q.dtype if fused else torch.float32
    k, v, mark = identity.site.of_rows(identity.rows, identity.num_zero if fused else 0)
    q, k, v = (_split_heads(x.to(q.device, dtype), heads) for x in (q, k, v))  # [B, H, L or N, d]
    if fused:
        r = _merge_heads(F.scaled_dot_product_attention(q, k, v))
        if not with_share:
            return r, 0.0
        marks = mark.to(q)[:, None].expand(-1, heads, -1, -1)
        share = F.scaled_dot_product_attention(q, k, marks, scale=1.0)[..., 0]  # [B, H, L]
    else:
        scores = q @ k.transpose(-1, -2)  # [B, H, L, N]
        attention, rest = _softmax_with_zeros(scores * q.shape[-1] ** -0.5, identity.num_zero)
        r = _merge_heads((attention * rest) @ v)
        if not with_share:
            return r, 0.0
        attention, rest = _softmax_with_zeros(scores, identity.num_zero)
        share = attention[..., :ID_TOKENS].sum(-1) * rest.squeeze(-1)
    return r, share.mean(1, dtype=torch.float32).unsqueeze(-1)


def _is_fused(x: Tensor) -> bool:
    return x.device.type in FUSED_ON


def _softmax_with_zeros(scores: Tensor, num_zero: int) -> tuple[Tensor, Tensor]:
    """softmax over N scores and `num_zero` scores of 0, those then left out, as two factors.

    The zeros are one more term in the denominator, which is exp(peak) / (largest of the softmax without them).

    Returns:
        The softmax without zeros [..., N], and what they leave of it [..., 1].
    """
    attention, peak = scores.softmax(-1), scores.amax(-1, keepdim=True)
    if num_zero == 0:
        return attention, torch.ones_like(peak)  # exp below overflows at a peak of -89, and 0 times infinity is NaN
    return attention, 1 / (1 + num_zero * torch.exp(-peak) * attention.amax(-1, keepdim=True))


def _square_sum(h: Tensor) -> Tensor:
    """Sum over the sequence: [B, L, C] -> [B, 1, C] float32."""
    if _is_fused(h):
        return torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=torch.float32).square()
    return h.float().square().sum(1, keepdim=True)  # four times faster on a CPU


def _product_sum(h: Tensor, r: Tensor, heads: int) -> Tensor:
    """Sum of h r over the sequence: [B, L, C] twice -> [B, 1, C] float32.

    On a GPU these are the diagonals of small matrix products, since those write nothing as large as h. They are made
    of every fourth token, for their 16 bits; the four are then added in float32. As means they do not overflow.
    """
    if not _is_fused(h):
        return (h * r).sum(1, keepdim=True)
    batch, length, _ = h.shape
    parts = math.gcd(length, 4)
    share = parts / length
    h, r = (_split_heads(x.reshape(batch, length // parts, -1), parts * heads) for x in (h, r))  # [B, parts H, L, d]
    products = h.new_empty(batch, parts * heads, h.shape[-1], h.shape[-1])
    for b in range(batch):  # heads and rows cannot be one dimension without a copy
        products[b].baddbmm_(h[b].transpose(1, 2), r[b], beta=0, alpha=share)
    diagonals = products.diagonal(dim1=-2, dim2=-1).unflatten(1, (parts, heads))  # [B, parts, H, d]
    return diagonals.sum(1, dtype=torch.float32).flatten(1).unsqueeze(1) / share


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
        value: [R, H N, W], from attention to the residual.
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

    def to(self, where: torch.dtype | torch.device) -> ImageStreamTensors:
        # contiguous, for the matrix products of every step read them
        score, value = (t.to(where).contiguous() for t in (self.score, self.value))
        return ImageStreamTensors(score, self.score_bias.to(where), value, self.heads)

    def at(self, row: int, like: Tensor) -> ImageStreamTensors:
        """Returns one identity, without the dimension R, where and as `like` is."""
        score, score_bias, value = (t[row].to(like) for t in (self.score, self.score_bias, self.value))
        return ImageStreamTensors(score, score_bias, value, self.heads)

    def weighted(self, weight: float) -> ImageStreamTensors:
        return replace(self, value=self.value * weight)


def fold_image_stream(weights: ImageStreamWeights, tokens: Tensor) -> ImageStreamTensors:
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
    value = torch.einsum("rhnd,hdw->rhnw", v, to_out).flatten(1, 2)  # [R, H N, W]
    return ImageStreamTensors(
        score=w["norm_image_weight"][:, None] * score, score_bias=w["norm_image_bias"] @ score, value=value, heads=heads
    )


def add_image_stream(total: Tensor, image: Tensor, identities: Sequence[SiteIdentity[ImageStreamTensors]]) -> None:
    """Adds weight x CA(identity, image) to `total`, in place, by the folded form of `fold_image_stream`.

    Args:
        total, image: [B, L, W]; the residual is read off `image`, which may be the same tensor. Computed in its dtype.
    """
    for b in range(len(image)):
        present = [(one.site.at(row, image), one.mask) for one in identities if (row := one.rows[b]) is not None]
        for first in range(0, image.shape[1] if present else 0, CHUNK):  # bounds what the LayerNorm has to keep
            tokens = slice(first, first + CHUNK)
            normal = F.layer_norm(image[b, tokens], image.shape[-1:])
            for site, mask in present:
                scores = torch.addmm(site.score_bias, normal, site.score)  # [L, H N]
                attention = scores.unflatten(-1, (site.heads, -1)).softmax(-1).flatten(1)
                if mask is not None:
                    attention = attention * mask[tokens].to(attention.dtype)
                total[b, tokens].addmm_(attention.to(total.dtype), site.value)


# ---------------------------------------------------------------- either

SiteTensors = CrossAttentionTensors | ImageStreamTensors


def prepare_site(weights: SiteWeights, tokens: Tensor) -> SiteTensors:
    """What a site needs of an identity while sampling, at a weight of 1. tokens: [R, N, D] float32."""
    if isinstance(weights, CrossAttentionWeights):
        return prepare_cross_attention(weights, tokens)
    return fold_image_stream(weights, tokens)
