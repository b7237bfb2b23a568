"""Names and shapes of the other tensors: VAE, text encoders, FLUX transformer."""

from __future__ import annotations

from tests.host.models.unet import Layout

CLIP_VOCAB = 49408
CLIP_POSITIONS = 77
T5_VOCAB = 32128
VAE_CHANNELS = 32
VAE_MULT = (1, 2, 4, 4)
TIME_ROWS = 256


def add_vae_block(out: Layout, name: str, fan_in: int, fan_out: int) -> None:
    out.norm(f"{name}.norm1", width=fan_in)
    out.conv(f"{name}.conv1", fan_in, fan_out)
    out.norm(f"{name}.norm2", width=fan_out)
    out.conv(f"{name}.conv2", fan_out, fan_out)
    if fan_in != fan_out:
        out.conv(f"{name}.nin_shortcut", fan_in, fan_out, kernel=1)


def add_vae_middle(out: Layout, name: str, width: int) -> None:
    add_vae_block(out, f"{name}.block_1", width, width)
    out.norm(f"{name}.attn_1.norm", width=width)
    for part in ("q", "k", "v", "proj_out"):
        out.conv(f"{name}.attn_1.{part}", width, width, kernel=1)
    add_vae_block(out, f"{name}.block_2", width, width)


def add_vae_encoder(out: Layout, root: str, latent: int) -> None:
    out.conv(f"{root}conv_in", 3, VAE_CHANNELS)
    width = VAE_CHANNELS
    for level, mult in enumerate(VAE_MULT):
        add_vae_block(out, f"{root}down.{level}.block.0", width, VAE_CHANNELS * mult)
        width = VAE_CHANNELS * mult
        if level + 1 < len(VAE_MULT):
            out.conv(f"{root}down.{level}.downsample.conv", width, width)
    add_vae_middle(out, f"{root}mid", width)
    out.norm(f"{root}norm_out", width=width)
    out.conv(f"{root}conv_out", width, 2 * latent)


def add_vae_decoder(out: Layout, root: str, latent: int) -> None:
    width = VAE_CHANNELS * VAE_MULT[-1]
    out.conv(f"{root}conv_in", latent, width)
    add_vae_middle(out, f"{root}mid", width)
    for level in reversed(range(len(VAE_MULT))):
        target = VAE_CHANNELS * VAE_MULT[level]
        for index in range(2):
            add_vae_block(out, f"{root}up.{level}.block.{index}", width, target)
            width = target
        if level:
            out.conv(f"{root}up.{level}.upsample.conv", width, width)
    out.norm(f"{root}norm_out", width=width)
    out.conv(f"{root}conv_out", width, 3)


def add_vae(out: Layout, root: str, latent: int, quant: bool) -> None:
    add_vae_encoder(out, f"{root}encoder.", latent)
    add_vae_decoder(out, f"{root}decoder.", latent)
    if quant:
        out.conv(f"{root}quant_conv", 2 * latent, 2 * latent, kernel=1)
        out.conv(f"{root}post_quant_conv", latent, latent, kernel=1)


def add_clip(out: Layout, root: str, width: int, layers: int = 2) -> None:
    """A CLIP text model as transformers names it; its MLP is as narrow as the model."""
    out.raw(f"{root}embeddings.token_embedding.weight", CLIP_VOCAB, width)
    out.raw(f"{root}embeddings.position_embedding.weight", CLIP_POSITIONS, width)
    for index in range(layers):
        layer = f"{root}encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out.linear(f"{layer}.self_attn.{part}", width, width)
        out.norm(f"{layer}.layer_norm1", f"{layer}.layer_norm2", width=width)
        out.linear(f"{layer}.mlp.fc1", width, width)
        out.linear(f"{layer}.mlp.fc2", width, width)
    out.norm(f"{root}final_layer_norm", width=width)


def add_open_clip(out: Layout, root: str, width: int = 1280, layers: int = 2) -> None:
    """A CLIP text model as open_clip names it."""
    out.raw(f"{root}token_embedding.weight", CLIP_VOCAB, width)
    out.raw(f"{root}positional_embedding", CLIP_POSITIONS, width)
    for index in range(layers):
        layer = f"{root}transformer.resblocks.{index}"
        out.raw(f"{layer}.attn.in_proj_weight", 3 * width, width)
        out.raw(f"{layer}.attn.in_proj_bias", 3 * width)
        out.linear(f"{layer}.attn.out_proj", width, width)
        out.norm(f"{layer}.ln_1", f"{layer}.ln_2", width=width)
        out.linear(f"{layer}.mlp.c_fc", width, 4 * width)
        out.linear(f"{layer}.mlp.c_proj", 4 * width, width)
    out.norm(f"{root}ln_final", width=width)
    out.raw(f"{root}text_projection", width, width)
    out.raw(f"{root}logit_scale")


def add_t5(out: Layout, root: str, width: int, layers: int = 2, head: int = 64) -> None:
    out.raw(f"{root}shared.weight", T5_VOCAB, width)
    out.raw(f"{root}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 32, width // head)
    for index in range(layers):
        layer = f"{root}encoder.block.{index}.layer"
        for part in ("q", "k", "v", "o"):
            out.linear(f"{layer}.0.SelfAttention.{part}", width, width, bias=False)
        out.raw(f"{layer}.0.layer_norm.weight", width)
        out.linear(f"{layer}.1.DenseReluDense.wi_0", width, 2 * width, bias=False)
        out.linear(f"{layer}.1.DenseReluDense.wi_1", width, 2 * width, bias=False)
        out.linear(f"{layer}.1.DenseReluDense.wo", 2 * width, width, bias=False)
        out.raw(f"{layer}.1.layer_norm.weight", width)
    out.raw(f"{root}encoder.final_layer_norm.weight", width)


def add_embedder(out: Layout, name: str, fan_in: int, hidden: int) -> None:
    out.linear(f"{name}.in_layer", fan_in, hidden)
    out.linear(f"{name}.out_layer", hidden, hidden)


def add_head_norms(out: Layout, name: str, head: int) -> None:
    out.raw(f"{name}.query_norm.scale", head)
    out.raw(f"{name}.key_norm.scale", head)


def add_double_block(out: Layout, name: str, hidden: int, head: int) -> None:
    for stream in ("img", "txt"):
        out.linear(f"{name}.{stream}_mod.lin", hidden, 6 * hidden)
        out.linear(f"{name}.{stream}_attn.qkv", hidden, 3 * hidden)
        add_head_norms(out, f"{name}.{stream}_attn.norm", head)
        out.linear(f"{name}.{stream}_attn.proj", hidden, hidden)
        out.linear(f"{name}.{stream}_mlp.0", hidden, 4 * hidden)
        out.linear(f"{name}.{stream}_mlp.2", 4 * hidden, hidden)


def add_single_block(out: Layout, name: str, hidden: int, head: int) -> None:
    out.linear(f"{name}.modulation.lin", hidden, 3 * hidden)
    out.linear(f"{name}.linear1", hidden, 7 * hidden)
    add_head_norms(out, f"{name}.norm", head)
    out.linear(f"{name}.linear2", 5 * hidden, hidden)


def add_flux(out: Layout, root: str, hidden: int, text: int, head: int = 128) -> None:
    out.linear(f"{root}img_in", 64, hidden)
    out.linear(f"{root}txt_in", text, hidden)
    add_embedder(out, f"{root}time_in", TIME_ROWS, hidden)
    add_embedder(out, f"{root}vector_in", text, hidden)
    add_embedder(out, f"{root}guidance_in", TIME_ROWS, hidden)
    for index in range(19):
        add_double_block(out, f"{root}double_blocks.{index}", hidden, head)
    for index in range(38):
        add_single_block(out, f"{root}single_blocks.{index}", hidden, head)
    out.linear(f"{root}final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    out.linear(f"{root}final_layer.linear", hidden, 64)
