"""Names and shapes of the tensors of an ldm/sgm UNet, and of a ControlNet beside it."""

from __future__ import annotations

from dataclasses import dataclass

CHANNELS = 32
RES_BLOCKS = 2  # of each resolution


class Layout:
    """Names and shapes of a checkpoint's tensors."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def raw(self, name: str, *shape: int) -> None:
        if name in self.shapes:
            raise ValueError(f"{name} is defined twice")
        self.shapes[name] = shape

    def linear(self, name: str, fan_in: int, fan_out: int, bias: bool = True) -> None:
        self.raw(f"{name}.weight", fan_out, fan_in)
        if bias:
            self.raw(f"{name}.bias", fan_out)

    def conv(self, name: str, fan_in: int, fan_out: int, kernel: int = 3) -> None:
        self.raw(f"{name}.weight", fan_out, fan_in, kernel, kernel)
        self.raw(f"{name}.bias", fan_out)

    def norm(self, *names: str, width: int) -> None:
        for name in names:
            self.raw(f"{name}.weight", width)
            self.raw(f"{name}.bias", width)


@dataclass(frozen=True)
class UNetSpec:
    """The sizes of an ldm/sgm UNet; ``depths`` are transformer blocks per resolution."""

    channels: int
    mult: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int
    vector: int = 0
    linear_projection: bool = True

    @property
    def embedding(self) -> int:
        return 4 * self.channels


SDXL = UNetSpec(CHANNELS, (1, 2, 4), (0, 2, 10), 10, context=2048, vector=2816)
REFINER = UNetSpec(CHANNELS, (1, 2, 4, 4), (0, 4, 4, 0), 4, context=1280, vector=2560)
SD15 = UNetSpec(CHANNELS, (1, 2, 4, 4), (1, 1, 1, 0), 1, context=768, linear_projection=False)


def add_res_block(out: Layout, name: str, fan_in: int, fan_out: int, embedding: int) -> None:
    out.norm(f"{name}.in_layers.0", width=fan_in)
    out.conv(f"{name}.in_layers.2", fan_in, fan_out)
    out.linear(f"{name}.emb_layers.1", embedding, fan_out)
    out.norm(f"{name}.out_layers.0", width=fan_out)
    out.conv(f"{name}.out_layers.3", fan_out, fan_out)
    if fan_in != fan_out:
        out.conv(f"{name}.skip_connection", fan_in, fan_out, kernel=1)


def add_attention(out: Layout, name: str, width: int, context: int) -> None:
    out.linear(f"{name}.to_q", width, width, bias=False)
    out.linear(f"{name}.to_k", context, width, bias=False)
    out.linear(f"{name}.to_v", context, width, bias=False)
    out.linear(f"{name}.to_out.0", width, width)


def add_transformer(out: Layout, name: str, width: int, depth: int, spec: UNetSpec) -> None:
    out.norm(f"{name}.norm", width=width)
    for projection in ("proj_in", "proj_out"):
        if spec.linear_projection:
            out.linear(f"{name}.{projection}", width, width)
        else:
            out.conv(f"{name}.{projection}", width, width, kernel=1)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        add_attention(out, f"{block}.attn1", width, width)
        add_attention(out, f"{block}.attn2", width, spec.context)
        out.norm(f"{block}.norm1", f"{block}.norm2", f"{block}.norm3", width=width)
        out.linear(f"{block}.ff.net.0.proj", width, 8 * width)
        out.linear(f"{block}.ff.net.2", 4 * width, width)


def add_unet_inputs(out: Layout, root: str, spec: UNetSpec) -> list[int]:
    """Add the down half and return the widths of its skip connections."""
    out.conv(f"{root}input_blocks.0.0", 4, spec.channels)
    widths = [spec.channels]
    for level, (mult, depth) in enumerate(zip(spec.mult, spec.depths)):
        for _ in range(RES_BLOCKS):
            block, width = f"{root}input_blocks.{len(widths)}", spec.channels * mult
            add_res_block(out, f"{block}.0", widths[-1], width, spec.embedding)
            if depth:
                add_transformer(out, f"{block}.1", width, depth, spec)
            widths.append(width)
        if level + 1 < len(spec.mult):
            out.conv(f"{root}input_blocks.{len(widths)}.0.op", widths[-1], widths[-1])
            widths.append(widths[-1])
    return widths


def add_unet_outputs(out: Layout, root: str, spec: UNetSpec, skips: list[int]) -> None:
    width, number = skips[-1], 0
    for level in reversed(range(len(spec.mult))):
        for index in range(RES_BLOCKS + 1):
            block, target = f"{root}output_blocks.{number}", spec.channels * spec.mult[level]
            add_res_block(out, f"{block}.0", width + skips.pop(), target, spec.embedding)
            width, following = target, 1
            if spec.depths[level]:
                add_transformer(out, f"{block}.1", width, spec.depths[level], spec)
                following = 2
            if level and index == RES_BLOCKS:
                out.conv(f"{block}.{following}.conv", width, width)
            number += 1


def add_unet_half(out: Layout, root: str, spec: UNetSpec) -> list[int]:
    """Add the embeddings, the down half and the middle, and return the widths of the skip connections."""
    out.linear(f"{root}time_embed.0", spec.channels, spec.embedding)
    out.linear(f"{root}time_embed.2", spec.embedding, spec.embedding)
    if spec.vector:
        out.linear(f"{root}label_emb.0.0", spec.vector, spec.embedding)
        out.linear(f"{root}label_emb.0.2", spec.embedding, spec.embedding)
    skips = add_unet_inputs(out, root, spec)
    add_res_block(out, f"{root}middle_block.0", skips[-1], skips[-1], spec.embedding)
    add_transformer(out, f"{root}middle_block.1", skips[-1], spec.middle_depth, spec)
    add_res_block(out, f"{root}middle_block.2", skips[-1], skips[-1], spec.embedding)
    return skips


def add_unet(out: Layout, root: str, spec: UNetSpec) -> None:
    skips = add_unet_half(out, root, spec)
    add_unet_outputs(out, root, spec, skips)
    out.norm(f"{root}out.0", width=spec.channels)
    out.conv(f"{root}out.2", spec.channels, 4)


HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)


def add_controlnet(out: Layout, root: str, spec: UNetSpec) -> None:
    """A ControlNet in ldm names: the UNet's down half and middle, a stem for the hint, an output after each block."""
    skips = add_unet_half(out, root, spec)
    widths = (3, *HINT_WIDTHS, spec.channels)
    for index, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        out.conv(f"{root}input_hint_block.{2 * index}", fan_in, fan_out)
    for index, width in enumerate(skips):
        out.conv(f"{root}zero_convs.{index}.0", width, width, kernel=1)
    out.conv(f"{root}middle_block_out.0", skips[-1], skips[-1], kernel=1)


def cross_attention_widths(layout: Layout) -> list[int]:
    """Width of each cross-attention, in the order in which adapters count: input, output, middle."""
    parts = (".input_blocks.", ".output_blocks.", ".middle_block.")
    names = [name for part in parts for name in layout.shapes if part in name and name.endswith("attn2.to_q.weight")]
    return [layout.shapes[name][0] for name in names]
