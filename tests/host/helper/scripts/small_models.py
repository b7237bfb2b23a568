"""Test only: lets A1111, Forge and its first generation load the small checkpoints of tests/host/models.

A1111 is told the small open_clip architecture. Forge takes a model's sizes from constants and from the config folders
in its tree, the first Forge (ldm_patched) from constants and config files; here they are read from the checkpoint
itself. Full-size models are loaded as before.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from modules import script_callbacks

StateDict = Mapping[str, torch.Tensor]
Sizes = dict[str, Any]
MARK = "_pulid_test_helper"
SMALL_CHANNELS = 32
READS = "transformer_blocks.0.attn2.to_k.weight"
MINIATURE_TEXT, MINIATURE_GROUPS = 64, 8  # width of what the miniature's UNet reads, and groups of its norms


def replace_once(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap owner.name, also when Reload UI runs this file again."""
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return
    wrapped = wrap(original)
    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)


def count(state: StateDict, prefix: str) -> int:
    """How many different numbers follow the prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


# ----------------------------------------------------------------------------------------------------- miniature


def settle_norms(sd_model: Any) -> None:
    """The hosts have 32 groups in every norm; no shape in a checkpoint tells how many there are."""
    objects = getattr(sd_model, "forge_objects", None)
    unet = (sd_model if objects is None else objects.unet).model.diffusion_model
    vae = sd_model.first_stage_model if objects is None else objects.vae.first_stage_model
    reads = {module.attn2.to_k.weight.shape[-1] for module in unet.modules() if hasattr(module, "attn2")}
    if reads == {MINIATURE_TEXT}:
        for module in (*unet.modules(), *vae.modules()):
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = MINIATURE_GROUPS


# --------------------------------------------------------------------------------------------------------- A1111


def register_open_clip() -> None:
    import open_clip
    from modules import sd_models, shared

    folder = Path(shared.cmd_opts.ckpt_dir or sd_models.model_path)
    for path in sorted(folder.glob("tiny-*.json")):
        open_clip.add_model_config(path)


def narrow_controlnet() -> None:
    """The extension sd-webui-controlnet takes the width of an SDXL ControlNet, and of what it reads, from constants."""
    for name, module in list(sys.modules.items()):
        if name.endswith("controlnet_model_guess"):
            module.controlnet_sdxl_config["model_channels"] = SMALL_CHANNELS
            replace_once(module, "build_model_by_guess", partial(wrap_guess, module.controlnet_sdxl_config))


def wrap_guess(sizes: Sizes, original: Callable[..., Any]) -> Callable[..., Any]:
    """In diffusers' format, the small IdentityNet among them, the file tells what is read."""

    def build_model_by_guess(state: StateDict, unet: Any, path: str) -> Any:
        before, layer = sizes["context_dim"], state.get(f"down_blocks.1.attentions.0.{READS}")
        sizes["context_dim"] = before if layer is None else layer.shape[1]
        try:
            return original(state, unet, path)
        finally:
            sizes["context_dim"] = before

    return build_model_by_guess


# --------------------------------------------------------------------------------------------------------- Forge


def clip_sizes(state: StateDict) -> Sizes:
    root = "transformer.text_model."
    hidden = state[f"{root}final_layer_norm.weight"].shape[0]
    return {
        "hidden_size": hidden,
        "projection_dim": hidden,
        "intermediate_size": state[f"{root}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(state, f"{root}encoder.layers."),
        "num_attention_heads": max(1, hidden // 64),
    }


def t5_sizes(state: StateDict) -> Sizes:
    block = "transformer.encoder.block.0.layer."
    return {
        "d_model": state[f"{block}0.layer_norm.weight"].shape[0],
        "d_ff": state[f"{block}1.DenseReluDense.wi_0.weight"].shape[0],
        "num_heads": state[f"{block}0.SelfAttention.relative_attention_bias.weight"].shape[1],
        "num_layers": count(state, "transformer.encoder.block."),
    }


def vae_sizes(state: StateDict) -> Sizes:
    levels = range(count(state, "encoder.down."))
    if not levels:  # diffusers names: never one of ours
        return {}
    return {
        "block_out_channels": [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels],
        "layers_per_block": count(state, "encoder.down.0.block."),
    }


READERS: dict[str, Callable[[StateDict], Sizes]] = {
    "CLIPTextModel": clip_sizes,
    "CLIPTextModelWithProjection": clip_sizes,
    "T5EncoderModel": t5_sizes,
    "AutoencoderKL": vae_sizes,
}


def write_config(source: Path, target: Path, sizes: Sizes) -> None:
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | sizes), encoding="utf-8")


def wrap_component_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(guess: Any, component: str, library: str, kind: str, repo: str, state: StateDict | None) -> Any:
        if component == "tokenizer" and kind.startswith("T5Tokenizer") and not has_tokenizer(Path(repo, component)):
            repo, component = str(Path(repo).with_name("black-forest-labs") / "FLUX.1-dev"), "tokenizer_2"
        if kind not in READERS or not state:
            return original(guess, component, library, kind, repo, state)
        folder = tempfile.mkdtemp(prefix="tiny-models-")
        try:
            write_config(Path(repo, component), Path(folder, component), READERS[kind](state))
            return original(guess, component, library, kind, folder, state)
        finally:
            shutil.rmtree(folder)

    return load


def has_tokenizer(folder: Path) -> bool:
    """A copy of Forge Neo may lack Chroma's, which is the T5 one that FLUX.1 has, too."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model"))


def flux_sizes(state: StateDict, prefix: str) -> Sizes:
    def size(name: str, dimension: int) -> int:
        return int(state[f"{prefix}{name}"].shape[dimension])  # those of a GGUF file are numpy's

    hidden, head = size("img_in.weight", 0), size("double_blocks.0.img_attn.norm.key_norm.scale", 0)
    sizes = {
        "hidden_size": hidden,
        "num_heads": hidden // head,
        "context_in_dim": size("txt_in.weight", 1),
        "depth": count(state, f"{prefix}double_blocks."),
        "depth_single_blocks": count(state, f"{prefix}single_blocks."),
    }
    pooled = "vector_in.in_layer.weight"
    return sizes | {"vec_in_dim": size(pooled, 1)} if f"{prefix}{pooled}" in state else sizes


def size_chroma(state: StateDict, prefix: str) -> None:
    """Forge keeps the sizes of Chroma's own network beside what it guesses."""
    from backend import loader

    root = f"{prefix}distilled_guidance_layer."
    out = state[f"{root}out_proj.weight"]
    loader.GuessChroma.unet_extra_config = {
        "guidance_out_dim": out.shape[0],
        "guidance_hidden_dim": out.shape[1],
        "guidance_n_layers": count(state, f"{root}layers."),
    }


def wrap_unet_detection(original: Callable[..., Any]) -> Callable[..., Any]:
    def detect(state: StateDict, prefix: str) -> Sizes | None:
        config = original(state, prefix)
        is_flux = config is not None and config.get("image_model") == "flux"
        if is_flux and state[f"{prefix}img_in.weight"].shape[0] < config["hidden_size"]:
            config |= flux_sizes(state, prefix)
            if f"{prefix}distilled_guidance_layer.out_proj.weight" in state:
                size_chroma(state, prefix)
        if config is not None and "out_dim" in config and config.get("image_model") == "chroma":
            # Forge Neo reads FLUX's sizes from the file, but not those of Chroma's own network.
            root = f"{prefix}distilled_guidance_layer."
            out, hidden = state[f"{root}out_proj.weight"].shape
            config |= {"out_dim": out, "hidden_dim": hidden, "n_layers": count(state, f"{root}layers.")}
        return config

    return detect


def wrap_model_matching(original: Callable[..., Any]) -> Callable[..., Any]:
    """Models are told apart by model_channels too: let a small UNet pass for a 320 one."""

    def match(config: Sizes, *state: Any) -> Any:
        channels = config.get("model_channels", 320)
        if config.get("image_model") == "flux2" and config["hidden_size"] < 3072:  # Forge Neo: Klein 4B
            found = original(config | {"hidden_size": 3072}, *state)
            if found is not None:
                found.unet_config["hidden_size"] = config["hidden_size"]
            return found
        if channels >= 320:
            return original(config, *state)
        usual = {"model_channels": 384 if config.get("context_dim") == 1280 else 320}  # SDXL's refiner is wider
        if config.get("context_dim") == MINIATURE_TEXT:
            usual |= {"context_dim": 2048, "adm_in_channels": 2816}
        found = original(config | usual, *state)
        if found is not None:
            found.unet_config.update({name: config[name] for name in usual})
        return found

    return match


def wrap_controlnet_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """ControlNets in diffusers' format are told apart by the same sizes, and by the width of what they read."""

    def config(state: StateDict, *args: Any) -> Any:
        first = state["conv_in.weight"]
        if first.shape[0] >= 320:
            return original(state, *args)
        texts = {name: tensor for name, tensor in state.items() if name.endswith("attn2.to_k.weight")}
        usual = {name: tensor.new_empty(tensor.shape[0], 2048) for name, tensor in texts.items()}
        found = original({**state, **usual, "conv_in.weight": first.new_empty(320, *first.shape[1:])}, *args)
        if found is not None:
            sizes = {tensor.shape[1] for tensor in texts.values()}
            found.update({"model_channels": first.shape[0], "context_dim": sizes.pop()})
        return found

    return config


def wrap_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    """Files of text encoders and VAE are told by their sizes, too: let one with whole names in as it is."""

    def replace(state: StateDict, added: StateDict, guess: Any, *path: Any) -> StateDict:  # path: Forge Neo
        if any(name.startswith("text_encoders.") for name in added):
            return {**state, **added}
        return original(state, added, guess, *path)

    return replace


WRITTEN_OUT = {
    "img.shape[0], 24, img": "img.shape[0], self.num_heads, img",
    "[:, :, :3072]": "[:, :, :self.hidden_size]",
    "[:, :, 3072:]": "[:, :, self.hidden_size:]",
    "15360": "5 * self.hidden_size",
    "Approximator(64, 3072, 5120, 5)": "Approximator(64, hidden_size, hidden_size, 2)",
}


def read_flux_sizes_from_the_model() -> None:
    """ersatzForge's buffers for FLUX and Chroma have the sizes of the real ones written out."""
    from backend.nn import chroma, flux

    for module in (flux, chroma):
        source = Path(module.__file__).read_text(encoding="utf-8")
        if next(iter(WRITTEN_OUT)) in source:
            for old, new in WRITTEN_OUT.items():
                source = source.replace(old, new)
            exec(compile(source, module.__file__, "exec"), vars(module))


def patch_forge() -> None:
    from backend import loader
    from huggingface_guess import detection

    read_flux_sizes_from_the_model()
    replace_once(loader, "load_huggingface_component", wrap_component_loader)
    replace_once(loader, "replace_state_dict", wrap_modules)
    replace_once(detection, "detect_unet_config", wrap_unet_detection)
    replace_once(detection, "model_config_from_unet_config", wrap_model_matching)
    from modules_forge import supported_controlnet

    replace_once(supported_controlnet, "unet_config_from_diffusers_unet", wrap_controlnet_sizes)


# ---------------------------------------------------------------------------------------------- the first Forge

_CLIP_LAYER = re.compile(r".*(?:encoder\.layers|resblocks)\.(\d+)\.mlp\.(?:fc1|c_fc)\.weight")


def clip_sizes_by_width(state: StateDict) -> dict[int, Sizes]:
    """Of every CLIP text encoder in a checkpoint, whatever its names: SDXL's two differ in width."""
    found: dict[int, Sizes] = {}
    for name, tensor in state.items():
        if (layer := _CLIP_LAYER.fullmatch(name)) is not None:
            inner, width = tensor.shape
            depth = max(int(layer[1]) + 1, found.get(width, {}).get("num_hidden_layers", 0))
            found[width] = {"num_hidden_layers": depth, "intermediate_size": inner}
    return found


_last_seen: dict[int, Sizes] = {}


def wrap_model_detection(original: Callable[..., Any]) -> Callable[..., Any]:
    """Comes before the text encoders, wherever a checkpoint's are made."""

    def detect(state: StateDict, *args: Any, **kwargs: Any) -> Any:
        _last_seen.clear()
        _last_seen.update(clip_sizes_by_width(state))
        return original(state, *args, **kwargs)

    return detect


def wrap_clip_config(original: Any) -> Any:
    """The text encoders' config files say how large they are; the checkpoint has the last word."""

    class Config(original):  # type: ignore[misc]
        @classmethod
        def from_json_file(cls, path: str) -> Any:
            config = original.from_json_file(path)
            config.update(_last_seen.get(config.hidden_size, {}))
            return config

    return Config


def wrap_text_encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    """It insists on more layers than the small ones have; which one is read is decided elsewhere."""

    def init(self: Any, *args: Any, layer_idx: int | None = None, **kwargs: Any) -> None:
        if layer_idx is not None and any(sizes["num_hidden_layers"] <= -layer_idx for sizes in _last_seen.values()):
            layer_idx = -1
        original(self, *args, layer_idx=layer_idx, **kwargs)

    return init


def wrap_vae(original: Callable[..., Any]) -> Callable[..., Any]:
    def make(sd: StateDict, *args: Any, **kwargs: Any) -> Any:
        if "encoder.conv_in.weight" not in sd or sd["encoder.conv_in.weight"].shape[0] >= 128:
            return original(*args, sd=sd, **kwargs)
        sizes, channels = vae_sizes(sd), sd["encoder.conv_in.weight"].shape[0]
        latent = sd["post_quant_conv.weight"].shape[1]
        config = {"double_z": True, "z_channels": latent, "resolution": 256, "in_channels": 3, "out_ch": 3}
        config |= {"ch": channels, "ch_mult": [width // channels for width in sizes["block_out_channels"]]}
        config |= {"num_res_blocks": sizes["layers_per_block"], "attn_resolutions": [], "dropout": 0.0}
        return original(*args, sd=sd, config={"params": {"ddconfig": config, "embed_dim": latent}}, **kwargs)

    return make


def patch_first_forge() -> None:
    from ldm_patched.modules import model_detection, sd1_clip
    from modules_forge import forge_loader

    replace_once(forge_loader, "VAE", wrap_vae)
    replace_once(sd1_clip, "CLIPTextConfig", wrap_clip_config)
    replace_once(sd1_clip.SDClipModel, "__init__", wrap_text_encoder)
    replace_once(model_detection, "model_config_from_unet", wrap_model_detection)
    replace_once(model_detection, "model_config_from_unet_config", wrap_model_matching)


if importlib.util.find_spec("huggingface_guess") is not None:
    patch_forge()
elif importlib.util.find_spec("ldm_patched") is not None:
    patch_first_forge()
else:
    register_open_clip()
    script_callbacks.on_before_ui(narrow_controlnet)
script_callbacks.on_model_loaded(settle_norms)
