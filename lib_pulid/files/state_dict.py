"""Reads a weight file into a state dict, without trusting the file.

safetensors hold numbers only. A pickle is a program: it is read with torch's `weights_only`, which knows a few harmless
instructions, after what that does not cover has been refused. Every message names the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.files.checkpoint_header import LARGEST_HEADER, flat, read_safetensors_header

HARMLESS = 2**29  # bytes
_NO_WEIGHTS = (  # by what a file begins with
    (rb"\Z", "empty"),
    (rb"version https://git-lfs", "a Git LFS pointer"),
    (rb"GGUF", "a GGUF file, which no PuLID file or encoder is"),
    (rb"\s*<", "a web page, not a weight file"),
)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file or a torch pickle, whichever its first bytes say it is.

    Returns:
        name -> tensor on the CPU; nesting ({"image_proj": {...}}, {"state_dict": {...}}) is made flat, see `flat`.

    Raises:
        MissingWeightsError, WrongWeightsError.
    """
    path = Path(path)
    if not disk.is_file(path):
        raise MissingWeightsError(f"{path.name} was not found in {path.parent}.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WrongWeightsError(disk.why_unreadable(path, error)) from error
    try:
        is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < LARGEST_HEADER
        loaded = read_safetensors(path)[0] if is_safetensors else _load_pickle(path, start)
    except WrongWeightsError:
        raise
    except Exception as error:  # whatever the two readers raise, the user's file is at fault
        size = disk.size_of(path)
        raise WrongWeightsError(
            f"{path.name} ({size:,} bytes) cannot be read: it is damaged, truncated (an interrupted download?) "
            f"or refused for safety. Download it again. ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return _checked(loaded, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata of a safetensors file, also of one whose metadata has more than text in it, which the
    library refuses though the tensors are right. Raises what the library raises.

    The tensors are copies. Those of the library are the file's own bytes: if another program wrote to it later, the
    weights would change, and truncating it would end this process.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception:
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return _with_text_metadata(path)
        raise


def _with_text_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load

    with path.open("rb") as file:
        header = read_safetensors_header(file)
        values = header["__metadata__"].items()
        metadata = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in values}
        if metadata == header["__metadata__"]:
            raise ValueError("something else is wrong")
        mended = json.dumps({**header, "__metadata__": metadata}).encode()
        return load(len(mended).to_bytes(8, "little") + mended + file.read()), metadata


def _load_pickle(path: Path, start: bytes) -> Mapping[str, object]:
    for pattern, what in _NO_WEIGHTS:
        if re.match(pattern, start, re.DOTALL):
            raise WrongWeightsError(f"{path.name} is {what}. Download the original file.")
    if re.match(rb"\s*[{E][\0-\x7f]*$", start) and path.stat().st_size < 10_000:
        raise WrongWeightsError(f"{path.name} is a server's answer ({start.decode().strip()!r}), not a weight file. "
                                "Download the original file.")  # fmt: skip
    _check_archive(path, start)
    # Not `torch.load`, which A1111 replaces by a guard of its own that refuses files written by torch 2.1 and later.
    return torch.serialization.load(str(path), map_location="cpu", weights_only=True)


def _check_archive(path: Path, start: bytes) -> None:
    """Refuses what `weights_only` does not cover in older torch versions: TorchScript, which brings code of its own,
    the tar files of 2017, which are unpacked to disk, and compressed archives, which `torch.save` does not write."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise WrongWeightsError(f"{path.name} is a TorchScript program, not a table of weights.")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise WrongWeightsError(f"{path.name} is refused for safety: unpacked it would be larger than the file.")
    elif start.strip(b"\0") and tarfile.is_tarfile(path):  # zeros count as the end of an empty one
        raise WrongWeightsError(f"{path.name} is a tar archive, not a weight file. Unpack it.")


def _checked(loaded: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise WrongWeightsError(f"{path.name} holds no table of weights ({type(loaded).__name__}).")
    state = {key: tensor.detach() for key, tensor in flat(loaded, Tensor).items()}
    if not state:
        raise WrongWeightsError(f"{path.name} holds no weights.")
    # A pickle may describe a tensor that repeats one number a billion times, or no numbers at all.
    plain = all(t.layout == torch.strided and t.device.type == "cpu" and not t.is_quantized for t in state.values())
    # Twice, for weights that two names share; and what fits into any memory does no harm.
    most = max(2 * path.stat().st_size, HARMLESS)
    if not plain or sum(t.numel() * t.element_size() for t in state.values()) > most:
        raise WrongWeightsError(f"{path.name} is refused for safety: its tensors claim more data than it contains.")
    return state


def check_numbers(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises WrongWeightsError where a weight is not a finite number: the image would be black, or worse."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise WrongWeightsError(f"{path.name}: {name} holds {tensor.dtype} values; a float file is needed.")
        # The sum is finite if all of them are; twice as fast as isfinite, and there for float8, too.
        if not math.isfinite(tensor.sum(dtype=torch.float32)):
            raise WrongWeightsError(f"{path.name} is corrupt: {name} contains NaN or infinity. Download it again.")


def describe(state: Mapping[str, object]) -> str:
    """Says what a state dict most likely is by its names, for error messages."""
    for pattern, words in _KNOWN_FILES:
        if any(re.search(pattern, key) for key in state):
            return words
    return f"of an unknown kind (its first keys: {', '.join(sorted(state)[:3])})"


_KNOWN_FILES: tuple[tuple[str, str], ...] = (
    (
        r"^(pulid_ca_(double|single)|id_former)\.",
        "PuLID for FLUX.2 Klein, which does not work: its own loader finds other names than the file has, leaves the "
        "cross-attention at random numbers, and its users see no effect. Use FLUX.1 with pulid_flux_v0.9.1",
    ),
    (r"^pulid_(encoder|ca)\.", "a PuLID file for FLUX, or a part of one"),
    (r"^id_adapter", "a PuLID file for SDXL, or a part of one"),
    (r"^visual\.blocks\.|^blocks\.\d+\.attn\.", "a vision transformer (EVA-CLIP), not PuLID itself"),
    (
        r"^id_encoder\.",
        "PhotoMaker, which changes the prompt's embedding and adds nothing to the cross-attention, so it does not work "
        "here. Use its own extension",
    ),
    (r"\.processor\.ip_adapter_", "an IP-Adapter for FLUX (XLabs), whose layers are not PuLID's"),
    (r"^(image_proj|ip_adapter)(_proj)?(_model)?\.", "an IP-Adapter of an unknown kind, or a part of one"),
    (r"lora_|\.lora[_.]|_lora\d*\.|\.alpha$|lokr_|hada_|oft_(blocks|diag)|dora_scale|lycoris_", "a LoRA"),
    (r"^control_model\.|input_hint_block|controlnet_", "a ControlNet"),
    (r"^(model\.diffusion_model\.)?double_blocks\.|^(single_)?transformer_blocks\.", "a FLUX transformer"),
    (r"^model\.diffusion_model\.|^down_blocks\.|^input_blocks\.", "a Stable Diffusion checkpoint"),
    (r"^(first_stage_model\.|encoder\.down|decoder\.)", "a VAE"),
    (r"^(module\.)?(body\.conv1|fpn\.|ssh1|BboxHead)", "a RetinaFace detector"),
    (r"^(cp\.resnet|ffm\.)", "a BiSeNet face parser"),
    (r"^vision_model\.", "a CLIP vision model"),
    (r"^(text_model\.|encoder\.block\.\d+\.layer\.|emb_params$|string_to_param)", "a text encoder or an embedding"),
)
