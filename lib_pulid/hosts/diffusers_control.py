"""Runs InstantID's ControlNet, IdentityNet, in the `diffusers` library, beside the adapter:

    net = load_identity_net("models/pulid/control_instant_id_sdxl.safetensors", pipeline)
    with apply(pipeline, [injection]), identity_net(pipeline, net, identity, draw_points(landmarks, (1024, 1024))):
        image = pipeline("portrait of a sailor").images[0]

In the place of the text, IdentityNet reads the face's tokens: those of the identity in the prompt's rows, and the
uncond ones in the negative prompt's. What it returns is added to the UNet's own residuals, scaled. Official:
`pipeline_stable_diffusion_xl_instantid.py`, `__call__` (instantX-research/InstantID, 2145b67f).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_pulid.control import LATENT_PIXEL, MOST_WEIGHT, weighted
from lib_pulid.errors import SettingError, UnsupportedModelError, WrongWeightsError
from lib_pulid.files.control_nets import MARK
from lib_pulid.files.state_dict import check_numbers, describe, read_state_dict
from lib_pulid.hosts.diffusers import UNetCalls, denoiser_of
from lib_pulid.identity import Identity
from lib_pulid.injection import acts
from lib_pulid.watch import uncompiled


def load_identity_net(path: str | Path, pipeline: Any) -> nn.Module:
    """Loads a ControlNet in diffusers' format strictly, in eval mode, on the device and in the dtype of the UNet.

    Args:
        path: InstantID's `ControlNetModel/diffusion_pytorch_model.safetensors`, under any name.
        pipeline: an SDXL pipeline, whose UNet gives the sizes.

    Raises:
        MissingWeightsError, WrongWeightsError: the message says what the file is.
    """
    from diffusers import ControlNetModel

    path, unet = Path(path), denoiser_of(pipeline)
    state = read_state_dict(path)
    if MARK not in state:
        raise WrongWeightsError(
            f"{path.name} is {describe(state)}. Needed: InstantID's ControlNet (control_instant_id_sdxl.safetensors, "
            "in diffusers' format)."
        )
    check_numbers(state, path)
    with torch.random.fork_rng(devices=()):  # it draws initial weights; keep the host's random state
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    try:
        net.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        raise WrongWeightsError(f"{path.name} is a ControlNet for another model: {str(error)[:300]}") from error
    like = next(unet.parameters())
    return net.eval().requires_grad_(False).to(device=like.device, dtype=like.dtype)


@contextmanager
def identity_net(
    pipeline: Any,
    net: nn.Module,
    identity: Identity,
    picture: np.ndarray,
    *,
    weight: float = 0.8,
    start: float = 0.0,
    end: float = 1.0,
    mask: Tensor | None = None,
) -> Iterator[None]:
    """Adds IdentityNet's residuals in every call of the pipeline's UNet inside the `with`.

    Args:
        net: see `load_identity_net`. identity: made with InstantID's adapter file.
        picture: uint8 RGB [height, width, 3], of the size that is generated; see `control.draw_points`.
        weight: the official controlnet_conditioning_scale, 0-2; 0 changes nothing at all.
        start, end: fractions of the steps between which it acts.
        mask: [H, W], 0..1, the part of the image in which it acts; None: everywhere. Official: `control_mask`.

    Raises:
        SettingError: a value is out of range, or the picture has another size than the image (from the pipeline).
        UnsupportedModelError: the pipeline's rows are not known.
    """
    _check(identity, net, picture, weight, start, end)
    if weight == 0:
        yield
        return
    unet, read_step = denoiser_of(pipeline), UNetCalls(pipeline)
    like = next(net.parameters())
    tokens = identity.rows.to(like)
    shown = torch.from_numpy(picture.copy()).to(like).div(255).permute(2, 0, 1)[None]  # [1, 3, H, W]

    def enter(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not read_step.follows(module):
            return None
        step = read_step(args, kwargs)
        if not acts(int(step.progress * step.steps + 1e-6), step.steps, start, end, 0):  # type: ignore[operator, arg-type]
            return None
        sample: Tensor = args[0] if args else kwargs["sample"]
        _check_size(shown, sample)
        rows = [0 if cond else 1 for cond in step.is_cond]  # type: ignore[union-attr]
        down, mid = net(
            sample,
            args[1] if len(args) > 1 else kwargs["timestep"],
            encoder_hidden_states=tokens[rows],
            controlnet_cond=shown.expand(len(sample), -1, -1, -1),
            conditioning_scale=weight,
            added_cond_kwargs=kwargs["added_cond_kwargs"],
            return_dict=False,
        )
        *down, mid = weighted([*down, mid], rows, mask)
        return args, {**kwargs, **_summed(kwargs, down, mid)}

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.callback(unet.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def _summed(kwargs: Mapping[str, Any], down: list[Tensor], mid: Tensor) -> dict[str, Any]:
    """Adds to the residuals of the pipeline's own ControlNets, if it has any."""
    theirs, middle = kwargs.get("down_block_additional_residuals"), kwargs.get("mid_block_additional_residual")
    if theirs is not None:
        down = [one + other for one, other in zip(down, theirs)]
    return {
        "down_block_additional_residuals": tuple(down),
        "mid_block_additional_residual": mid if middle is None else mid + middle,
    }


def _check(identity: Identity, net: Any, picture: np.ndarray, weight: float, start: float, end: float) -> None:
    if not 0 <= weight <= MOST_WEIGHT:  # False for NaN
        raise SettingError(f"weight is {weight}; it has to be in 0..{MOST_WEIGHT:g}")
    if not 0 <= start < end <= 1:
        raise SettingError(f"start and end are {start} and {end}; both have to be in 0..1, and start below end")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise SettingError(f"the picture of the points is {picture.dtype} {list(picture.shape)}, not uint8 [H, W, 3]")
    if identity.uncond is None:
        raise SettingError("IdentityNet needs an identity with uncond tokens. Make it again from the photo.")
    width = getattr(net.config, "cross_attention_dim", None)
    if width is not None and width != identity.cond.shape[-1]:
        raise UnsupportedModelError(
            f"The identity's tokens have width {identity.cond.shape[-1]}, but the ControlNet reads {width}. Make the "
            "identity with InstantID's adapter file."
        )


def _check_size(shown: Tensor, sample: Tensor) -> None:
    height, width = (side * LATENT_PIXEL for side in sample.shape[-2:])
    if tuple(shown.shape[-2:]) != (height, width):
        raise SettingError(
            f"The picture of the points is {shown.shape[-1]} x {shown.shape[-2]} pixels, but the image is {width} x "
            f"{height}. Draw the points at that size."
        )
