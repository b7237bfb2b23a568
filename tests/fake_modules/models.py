"""Denoisers of the hosts' layouts with the real number of sites and next to no width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_models import normal

WIDTH, HEADS = 8, 2
SDXL_BLOCKS = (24, 10, 36)  # input, middle, output: 70 in all
SD1_BLOCKS = (6, 1, 9)


class CrossAttention(nn.Module):
    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.heads, self.dim_head = HEADS, WIDTH // HEADS
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(text_width, WIDTH, bias=False)
        self.to_v = nn.Linear(text_width, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.attn2 = CrossAttention(text_width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + 0.3 * self.attn2(x, context)


class UNet(nn.Module):
    """The sgm layout. Args: text_width: 2048 SDXL, 1280 its refiner, 1024 SD 2, 768 SD 1."""

    def __init__(self, text_width: int = 2048, blocks: tuple[int, int, int] = SDXL_BLOCKS, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        parts = [nn.ModuleList(Block(text_width) for _ in range(count)) for count in blocks]
        self.input_blocks, self.middle_block, self.output_blocks = parts
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        h = self.first(x.flatten(2).transpose(1, 2))
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for block in part:
                h = block(h, context)
        return self.last(h).transpose(1, 2).unflatten(2, x.shape[2:])


SMALL_BLOCKS = (2, 1, 2)
SMALL_SITES = sum(SMALL_BLOCKS)  # in the place of hosts.families.SDXL_SITES


def small_unet(text_width: int = 2048, seed: int = 0) -> UNet:
    """With fewer sites, for all that is not about their number."""
    return UNet(text_width, SMALL_BLOCKS, seed)


class _Step(nn.Module):
    """One of SkipUNet's blocks. reads: width of the text that its cross-attention reads; 0: it has none."""

    def __init__(self, taken: int, given: int, stride: int = 1, grow: int = 1, reads: int = 0) -> None:
        super().__init__()
        self.conv, self.grow = nn.Conv2d(taken, given, 3, stride, 1), grow
        self.block = Block(reads) if reads else None

    def forward(self, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = F.interpolate(F.silu(self.conv(h)), scale_factor=self.grow)
        if self.block is None:
            return h
        tokens = self.block(h[:, :WIDTH].flatten(2).transpose(1, 2), context)
        return torch.cat((tokens.transpose(1, 2).unflatten(2, h.shape[2:]), h[:, WIDTH:]), dim=1)


class SkipUNet(nn.Module):
    """SDXL's blocks and skip connections, as narrow as the small ControlNet's, with SMALL_SITES cross-attentions."""

    WIDTHS = (32, 32, 32, 32, 64, 64, 64, 128, 128)  # of the input blocks

    def __init__(self, text_width: int = 2048) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model_channels, widths = self.WIDTHS[0], self.WIDTHS
        last = len(widths) - 1
        self.input_blocks = nn.ModuleList(
            _Step(taken, given, 2 if i in (3, 6) else 1, reads=text_width * (i in (0, last)))
            for i, (taken, given) in enumerate(zip((4, *widths), widths))
        )
        self.middle_block = _Step(widths[-1], widths[-1], reads=text_width)
        self.output_blocks = nn.ModuleList(
            _Step((widths[-1], *[32] * last)[i] + width, 32, grow=2 if i in (2, 5) else 1,
                  reads=text_width * (i in (0, last)))
            for i, width in enumerate(reversed(widths))
        )  # fmt: skip
        self.out = nn.Conv2d(32, 4, 3, 1, 1)
        self.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        added: Sequence[Tensor] = (),
        control: Mapping[str, Sequence[Tensor]] | None = None,
        **_: Any,
    ) -> Tensor:
        """added: residuals of ControlNets, that of the middle block last. control: the same, as Forge hands them."""
        h, skips = x, []
        if control is not None:
            added = [*control["output"], *control["middle"]]
        for block in self.input_blocks:
            skips.append(h := block(h, None, context))
        h = self.middle_block(h, None, context)
        if added:
            h = h + added[-1]
            skips = [skip + residual for skip, residual in zip(skips, added)]
        for block in self.output_blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), None, context)
        return self.out(h)


class _Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_mod = nn.Identity()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Any) -> tuple[Tensor, Tensor]:
        img = self.img_mod(img)
        return img + 0.1 * txt.mean(1, keepdim=True).tanh(), txt


class _Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Identity()

    def forward(self, x: Tensor, vec: Tensor, pe: Any) -> Tensor:
        x = self.linear1(x)
        return x + 0.1 * x.mean(1, keepdim=True).tanh()


class Flux(nn.Module):
    """Forge's IntegratedFluxTransformer2DModel, as far as an extension sees it."""

    def __init__(self, double: int = 19, single: int = 38) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.hidden_size = WIDTH
        self.double_blocks = nn.ModuleList(_Double() for _ in range(double))
        self.single_blocks = nn.ModuleList(_Single() for _ in range(single))
        self.img_in, self.txt_in, self.last = nn.Linear(16, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 16)
        self.requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **_: Any) -> Tensor:
        batch, channels, height, width = x.shape
        packs = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        packs = packs.reshape(batch, height * width // 4, channels * 4)
        img, txt = self.img_in(packs), self.txt_in(context)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=None, pe=None)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec=None, pe=None)
        out = self.last(x[:, txt.shape[1] :]).view(batch, height // 2, width // 2, channels, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


class PackedLinear(nn.Module):
    """A layer as bitsandbytes' 4 bit ones: no sizes of its own, and a weight of one column, two values in a byte."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._compute = [linear]  # in a list, no part of this module
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=linear.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self._compute[0](x)


def pack_layers(module: nn.Module) -> None:
    """Puts PackedLinear in the place of every Linear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_layers(child)


def text(length: int = 77, seed: int = 1, pictures: int = 1, width: int = 2048) -> Tensor:
    """A prompt's embedding, [pictures, length, width]."""
    return normal(seed, pictures, length, width)


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
