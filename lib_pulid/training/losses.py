"""Computes PuLID's training losses (arXiv 2404.16022) for every denoiser that `sites.find_sites` supports.

    diffusion_loss      L_diff: the identity beside the prompt, on the photo's own noise        section 3.2
    alignment_losses    L_align: the same prompt and noise with and without the identity;       section 3.3
                        what the cross-attentions ask for (Q) must stay the same
    id_loss             L_id: a few-step sampler from pure noise, with gradients; the face      section 3.4
                        in the finished image against the photo's

The whole objective is L_diff + L_align + L_id. They serve at full size as well: nothing here knows a width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.training.schedule import Schedule


def diffusion_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Computes the mean squared error of the denoiser's prediction (noise, v or velocity), both [B, C, h, w]."""
    return (predicted.float() - target.float()).pow(2).mean()


# ---------------------------------------------------------------- alignment


@dataclass
class Attended:
    """What the text cross-attentions of one denoiser call worked with, site by site.

    Args:
        queries: [B, L, C] each. keys: [B, T, C] each, of the text.
    """

    heads: list[int] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


@contextmanager
def listen(denoiser: nn.Module) -> Iterator[Attended]:
    """Keeps the image's queries and the text's keys of diffusers' UNet or FLUX transformer, for the calls inside."""
    seen = Attended()
    with ExitStack() as hooks:
        for module in denoiser.modules():
            for attention, q, k in _text_attentions(module):
                seen.heads.append(attention.heads)
                for layer, kept in ((q, seen.queries), (k, seen.keys)):
                    handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
                    hooks.callback(handle.remove)
        yield seen


def _text_attentions(block: nn.Module) -> Iterator[tuple[Any, nn.Module, nn.Module]]:
    """Yields the text attention of a UNet's block or FLUX's double block, and its layers for q and the text's k."""
    cross, joint = getattr(block, "attn2", None), getattr(block, "attn", None)
    if hasattr(cross, "to_q"):
        yield cross, cross.to_q, cross.to_k  # type: ignore[union-attr]
    if getattr(joint, "add_k_proj", None) is not None:
        yield joint, joint.to_q, joint.add_k_proj  # type: ignore[union-attr]


def alignment_losses(with_identity: Attended, without: Attended) -> tuple[Tensor, Tensor]:
    """Computes L_align-sem and L_align-layout, means over the sites; only `with_identity` gets gradients.

        L_sem    = || softmax(K Q_id^T / sqrt(d)) Q_id - softmax(K Q^T / sqrt(d)) Q ||^2
        L_layout = || Q_id - Q ||^2

    Each site's loss is divided by the mean square of what it is compared with, so that all sites count alike, whatever
    the size of their activations.
    """
    semantic, layout = [], []
    for heads, q_id, q, k in zip(with_identity.heads, with_identity.queries, without.queries, without.keys):
        q, k = q.detach(), k.detach()
        layout.append(_relative(q_id, q))
        semantic.append(_relative(_response(k, q_id, heads), _response(k, q, heads)))
    return torch.stack(semantic).mean(), torch.stack(layout).mean()


def _response(k: Tensor, q: Tensor, heads: int) -> Tensor:
    """Computes the image's response to each text token: softmax(K Q^T / sqrt(d)) Q, [B, H, T, d]."""
    k, q = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, q))
    return F.scaled_dot_product_attention(k, q, q)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).float().pow(2).mean() / b.float().pow(2).mean().clamp_min(1e-8)


# ---------------------------------------------------------------- identity


def sample_few_steps(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: Schedule,
    steps: int = 4,
    gradient_steps: int = 4,
) -> Tensor:
    """Samples with DDIM (arXiv 2010.02502; Euler on a flow) from pure noise, the last `gradient_steps` with gradients.

    Args:
        predict: (noisy latents [B, C, h, w], steps t [B]) -> v.

    Returns:
        Clean latents [B, C, h, w].
    """
    last = len(schedule) - 1
    times = [round(last * (steps - i) / steps) for i in range(steps)]
    x = noise
    for i, time in enumerate(times):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - gradient_steps):
            t = torch.full((len(x),), time, device=x.device)
            clean, seen = schedule.split(x, predict(x, t), t)
            x = clean if i == steps - 1 else schedule.noisy(clean, seen, torch.full_like(t, times[i + 1]))
    return x


def id_loss(embedding: Tensor, wanted: Tensor) -> Tensor:
    """Computes 1 - cosine of face embeddings [B, 512], mean over the rows."""
    return 1 - F.cosine_similarity(embedding.float(), wanted.float(), dim=-1).mean()


def traits_loss(logits: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Computes the Kullback-Leibler divergence of named traits, [B, values] each, mean over rows and traits.

    Not the paper's. 0 where classifiers of faces (hair style, skin, ...) say the same of both.
    """
    pairs = [(a.float().log_softmax(-1), b.float().log_softmax(-1)) for a, b in zip(logits, wanted, strict=True)]
    return torch.stack([F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in pairs]).mean()


def align_faces(images: Tensor, landmarks: Tensor, template: Tensor, size: int) -> Tensor:
    """Crops faces by their landmarks, with gradients: insightface's norm_crop as a differentiable warp.

    Args:
        images: [B, 3, H, W]. landmarks: [B, 5, 2] in pixels. template: [5, 2], where they go in the crop, in pixels.

    Returns:
        [B, 3, size, size].
    """
    matrix = similarity(template.expand_as(landmarks), landmarks)  # crop -> image, [B, 2, 3]
    axis = torch.arange(size, dtype=images.dtype, device=images.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack((x, y, torch.ones_like(x)), -1) @ matrix.transpose(1, 2)[:, None]  # [B, size, size, 2]
    height, width = images.shape[2:]
    span = torch.tensor([width - 1, height - 1], dtype=images.dtype, device=images.device)
    return F.grid_sample(images, 2 * grid / span - 1, align_corners=True)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Fits rotation, scale and shift from source to target, [B, N, 2] each, by least squares: [B, 2, 3]."""
    a, b = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    s, t = source - a, target - b
    power = s.pow(2).sum((1, 2))
    cos = (s * t).sum((1, 2)) / power
    sin = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(1) / power
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), 1)  # [B, 2, 2]
    shift = b[:, 0] - (turn @ a[:, 0, :, None])[..., 0]
    return torch.cat((turn, shift[..., None]), -1)
