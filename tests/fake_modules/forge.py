"""Forge's side of a generation: `forge_objects`, the patcher, and the way from a sampler to the denoiser."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.small_models import normal


class KModel(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = denoiser
        self.computation_dtype = torch.float32

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: dict, **more: Any) -> Tensor:
        return self.diffusion_model(x, t, context=c_crossattn, transformer_options=transformer_options, **more)


class UnetPatcher:
    def __init__(self, model: KModel) -> None:
        self.model, self.load_device = model, torch.device("cpu")
        self.model_options: dict = {"transformer_options": {}}
        self.preserved = 0
        self.extra_model_patchers: list[Any] = []

    def clone(self) -> UnetPatcher:
        made = UnetPatcher(self.model)
        made.model_options = copy.deepcopy(self.model_options)
        made.extra_model_patchers = [*self.extra_model_patchers]
        return made

    def add_conditioning_modifier(self, modifier: Any) -> None:
        self.model_options.setdefault("conditioning_modifiers", []).append(modifier)

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def add_extra_preserved_memory_during_sampling(self, count: int) -> None:
        self.preserved += count

    def add_extra_model_patcher_during_sampling(self, patcher: Any) -> None:
        self.extra_model_patchers.append(patcher)


class ControlModel(nn.Module):
    """Forge's network of an SDXL ControlNet: here that of diffusers, with Forge's arguments and results."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        from tests.small_models.methods import empty_identity_net

        super().__init__()
        width, text = state["conv_in.weight"].shape[0], state[_TEXT].shape[1]
        self.net, self.model_channels, self.dtype = empty_identity_net(width, text), width, torch.float32
        self.net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        self.net.requires_grad_(False)
        self.net.add_time_proj = nn.Identity()  # Forge's y has the sizes as sinusoids

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None) -> list[Tensor]:
        y = x.new_zeros(len(x), 2816) if y is None else y
        added = {"text_embeds": y[:, :1280], "time_ids": y[:, 1280:]}
        down, mid = self.net(x, timesteps, context, hint, added_cond_kwargs=added, return_dict=False)
        return [*down, mid]


_TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


class ControlNet:
    """Forge's object of a ControlNet, as far as an extension uses it."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.control_model, self.control_model_wrapped = ControlModel(state), object()
        self.manual_cast_dtype, self.strength = None, 1.0

    def control_merge(self, from_input: None, found: list[Tensor], previous: Any, dtype: torch.dtype) -> dict:
        """The last is the middle block's. Forge multiplies in place."""
        *output, middle = [residual.mul_(self.strength).to(dtype) for residual in found]
        made = {"input": [], "middle": [middle], "output": output}
        for part, others in (previous or {}).items():
            made[part] = [one + other for one, other in zip(made[part], others)] or list(others)
        return made


class ControlNetPatcher:
    """modules_forge.supported_controlnet. built: how many files were loaded."""

    built = 0

    @classmethod
    def try_build_from_state_dict(cls, state: dict[str, Tensor], path: str) -> Any:
        cls.built += 1
        return SimpleNamespace(model_patcher=ControlNet(dict(state)))


class P:
    """StableDiffusionProcessing."""

    def __init__(self, denoiser: nn.Module, name: str = "some-model") -> None:
        self.load(denoiser, name)
        self.is_hr_pass, self.cfg_scale, self.hr_cfg, self.uc, self.hr_uc = False, 7.0, 7.0, None, None
        self.sampler = SimpleNamespace(model_wrap_cfg=None)

    def load(self, denoiser: nn.Module, name: str = "another") -> None:
        self._unpatched = UnetPatcher(KModel(denoiser))
        info = SimpleNamespace(name_for_extra=name)
        self.sd_model = SimpleNamespace(forge_objects=SimpleNamespace(unet=self._unpatched), sd_checkpoint_info=info)

    @property
    def denoiser(self) -> nn.Module:
        return self._unpatched.model.diffusion_model

    def forget_patches(self) -> None:
        self.sd_model.forge_objects = SimpleNamespace(unet=self._unpatched)


def sample(
    p: P,
    conds: list[Tensor],
    unconds: list[Tensor],
    *,
    steps: int = 2,
    calls_per_step: int = 1,
    before_sampling: Any = None,
    before_step: Any = None,
    hw: tuple[int, int] = (8, 8),
) -> list[Tensor]:
    """One pass: the denoiser's outputs of each step, in the order of the calls.

    Args:
        conds, unconds: each [pictures, L, W]; those of equal length go in one call, in reverse order.
        before_sampling: the scripts' process_before_every_sampling.
    """
    from modules import script_callbacks

    denoiser = SimpleNamespace(
        p=p, step=0, steps=steps, total_steps=steps * calls_per_step, sampler=SimpleNamespace(funcname="sample_euler"),
        model_wrap=SimpleNamespace(sigmas=torch.tensor([0.03, 14.6])),
    )  # fmt: skip
    p.sampler.model_wrap_cfg = denoiser
    p.forget_patches()
    if before_sampling is not None:
        before_sampling(p)
    outputs = []
    for step in range(steps * calls_per_step):
        if before_step is not None:
            before_step(step)
        pictures = len(conds[0])
        x = normal(step, pictures, 4, *hw)
        sigma = torch.full((pictures,), 14.6 / (step + 1))
        texts = {"text_cond": conds[0], "text_uncond": unconds[0] if unconds else None}
        script_callbacks.cfg_denoiser_callback(SimpleNamespace(x=x, sigma=sigma, denoiser=denoiser, **texts))
        unet = p.sd_model.forge_objects.unet
        scale = p.hr_cfg if p.is_hr_pass else p.cfg_scale
        for modifier in unet.model_options.get("conditioning_modifiers", []):
            scale = modifier(unet.model, x, sigma, unconds, conds, scale, unet.model_options, 1)[5]
        to_run = [(c, 0) for c in conds] + [(c, 1) for c in unconds if scale != 1]
        while to_run:
            like = [entry for entry in to_run if entry[0].shape == to_run[0][0].shape][::-1]
            to_run = [entry for entry in to_run if entry[0].shape != like[0][0].shape]
            outputs.append(_call(unet, x, sigma, like))
        denoiser.step += 1
    return outputs


def _call(unet: UnetPatcher, x: Tensor, sigma: Tensor, chunks: list[tuple[Tensor, int]]) -> Tensor:
    options = {"cond_or_uncond": [kind for _, kind in chunks], "sigmas": sigma}
    c = {"c_crossattn": torch.cat([context for context, _ in chunks]), "transformer_options": options}
    args = {"input": torch.cat([x] * len(chunks)), "timestep": torch.cat([sigma] * len(chunks)), "c": c}
    args["cond_or_uncond"] = options["cond_or_uncond"]
    wrapper = unet.model_options.get("model_function_wrapper")
    if wrapper is not None:
        return wrapper(unet.model.apply_model, args)
    return unet.model.apply_model(args["input"], args["timestep"], **c)
