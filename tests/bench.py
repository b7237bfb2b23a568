"""`make bench`: speed and memory of the injection in the real sizes, against the official formulas written out.

The official side does at each step what the official modules do (commit 1aa2fc7): keys and values of identity and
zero tokens, attention, the projection in float32; for FLUX the five matrices of PerceiverAttentionCA. Our side runs
with its hooks, through `inject`. Times are the least of several runs, interleaved; nothing here is a test.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep, Injection, compile_injection, inject
from lib_pulid.sites import Sites, cross_attention_site, find_sites
from lib_pulid.weights import Adapter, CrossAttentionWeights, ImageStreamWeights

D, N = 2048, 32


def least(runs: int, *functions: Callable[[], object]) -> list[float]:
    """Seconds of each function: the least of `runs`, taken in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(runs + 1):  # the first run warms up
        for function, taken in zip(functions, times):
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            taken.append(time.perf_counter() - start)
    return [min(taken[1:]) for taken in times]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def adapter(family: str, sites: tuple) -> Adapter:
    encoder = nn.Identity()
    encoder.output_dim = D  # type: ignore[assignment]
    return Adapter(family, "bench", encoder, sites, Path("bench"))


# ---------------------------------------------------------------- SDXL


class Layer(nn.Module):
    """A cross-attention layer cut down to the two linear maps that are hooked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.to_q = nn.Identity()
        self.to_q.out_features = width  # type: ignore[assignment]
        self.to_out = nn.ModuleList([nn.Identity()])

    def forward(self, q: Tensor, h: Tensor) -> Tensor:
        self.to_q(q)
        return self.to_out[0](h)


def official_cross_attention(q: Tensor, h: Tensor, identity: Tensor, w: CrossAttentionWeights, num_zero: int) -> Tensor:
    heads = q.shape[-1] // 64
    tokens = torch.cat((identity, torch.zeros_like(identity[:, :1]).expand(-1, num_zero, -1)), dim=1)
    query, key, value = (
        x.unflatten(-1, (heads, 64)).transpose(1, 2) for x in (q, F.linear(tokens, w.to_k), F.linear(tokens, w.to_v))
    )
    r = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).float()
    text = h.float()
    share = (query @ key.transpose(-2, -1)).softmax(-1).mean(1)[:, :, :5].sum(-1, keepdim=True)
    p = (text * r).sum(-2, keepdim=True) / (text * text).sum(-2, keepdim=True) * text
    return (text + (r + (share - 1) * p)).to(h.dtype)


def bench_sdxl(device: str, dtype: torch.dtype, runs: int) -> None:
    for tokens, width in ((4096, 640), (1024, 1280)):
        w = CrossAttentionWeights(*(torch.randn(width, D).div(D**0.5).to(device, dtype) for _ in range(2)))
        identity = Identity(torch.randn(1, N, D), torch.randn(1, N, D))
        injection = compile_injection(adapter("sdxl", (w,)), identity, device=device, dtype=dtype)
        layer = Layer(width)
        sites = Sites("sdxl", (cross_attention_site("layer", layer),))
        q, h = (torch.randn(2, tokens, width, device=device, dtype=dtype) for _ in range(2))
        rows = torch.cat((identity.uncond, identity.cond)).to(device, dtype)  # type: ignore[list-item]
        step = DenoiseStep(0.0, [False, True])

        def ours(layer=layer, sites=sites, injection=injection, q=q, h=h, step=step) -> Tensor:
            with inject(sites, [injection], step):
                return layer(q, h)

        def official(q=q, h=h, rows=rows, w=w) -> Tensor:
            return official_cross_attention(q, h, rows, w, 20)

        report(f"SDXL layer, {tokens} x {width}, 2 rows", least(runs, official, ours), ours() - h, official() - h)


# ---------------------------------------------------------------- FLUX


class Block(nn.Module):
    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return image, text


class Transformer(nn.Module):
    """BFL's layout with one double block that does nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_size = width
        self.double_blocks = nn.ModuleList([Block()])
        self.single_blocks = nn.ModuleList()


def official_image_stream(image: Tensor, identity: Tensor, w: ImageStreamWeights, heads: int = 16) -> Tensor:
    x = F.layer_norm(identity, identity.shape[-1:], w.norm_id_weight, w.norm_id_bias)
    latents = F.layer_norm(image, image.shape[-1:], w.norm_image_weight, w.norm_image_bias)
    q, (k, v) = F.linear(latents, w.to_q), F.linear(x, w.to_kv).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.25
    attention = ((q * scale) @ (k * scale).transpose(-2, -1)).float().softmax(-1).to(q.dtype)
    out = (attention @ v).permute(0, 2, 1, 3).flatten(2)
    return image + 1.0 * F.linear(out, w.to_out)


def bench_flux(device: str, dtype: torch.dtype, runs: int) -> Injection:
    width, inner = 3072, 2048
    shapes = {"norm_id_weight": (D,), "norm_id_bias": (D,), "norm_image_weight": (width,), "norm_image_bias": (width,)}
    shapes |= {"to_q": (inner, width), "to_kv": (2 * inner, D), "to_out": (width, inner)}
    w = ImageStreamWeights(**{name: torch.randn(s).div(s[-1] ** 0.5).to(device, dtype) for name, s in shapes.items()})
    identity = Identity(torch.randn(1, N, D))
    injection = compile_injection(adapter("flux", (w,)), identity, device=device, dtype=dtype)
    transformer, step = Transformer(width), DenoiseStep(0.0, True)
    text = torch.randn(1, 512, width, device=device, dtype=dtype)
    for tokens in (4096, 1024):
        image = torch.randn(1, tokens, width, device=device, dtype=dtype)

        def ours(image=image) -> Tensor:
            with inject(transformer, [injection], step):
                return transformer.double_blocks[0](image, text)[0]

        def official(image=image) -> Tensor:
            return official_image_stream(image, identity.cond.to(device, dtype), w)

        report(f"FLUX site, {tokens} x {width}", least(runs, official, ours), ours() - image, official() - image)
    return injection


def bench_find_sites() -> None:
    from diffusers import UNet2DConditionModel

    from tests.reference import cases

    unet = UNet2DConditionModel(**cases.UNET)
    (seconds,) = least(5, lambda: find_sites(unet))
    print(f"{'finding the 70 sites of a UNet':36} {1e3 * seconds:8.2f} ms a step")


def report(name: str, seconds: list[float], ours: Tensor, official: Tensor) -> None:
    before, now = (1e3 * s for s in seconds)
    error = ((ours - official).float().norm() / official.float().norm()).item()
    print(f"{name:36} official {before:8.2f} ms   ours {now:8.2f} ms   {before / now:5.2f} x   error {error:.0e}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes torch's default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {arguments.dtype}")
    torch.manual_seed(0)
    bench_sdxl(arguments.device, dtype, arguments.runs)
    injection = bench_flux(arguments.device, dtype, arguments.runs)
    bench_find_sites()
    kept = 20 * injection.nbytes
    print(f"kept for sampling, per set of rows: FLUX {kept / 1e6:.1f} MB in {arguments.dtype} (20 sites)", end=", ")
    sdxl = 2 * N * (10 * 640 + 60 * 1280) * dtype.itemsize
    print(f"SDXL v1.1 {sdxl / 1e6:.1f} MB (70 sites)")


if __name__ == "__main__":
    main()
