"""A WebUI whose images take milliseconds: the whole chain from photo to image, with next to nothing in its models.

    light = Light("forge", folder, monkeypatch)
    with light.running() as host:            # one start of the program
        host.generate([{"images": [PHOTOS["anna"]]}], "sdxl")

What is small: the denoisers, PuLID files and models that read photos. What is not: everything between them.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_pulid import hosts
from lib_pulid.faces import CROP_LANDMARKS, LARGEST, Detection, FaceModels
from lib_pulid.files import catalog
from lib_pulid.identity import Identity
from tests import small_models
from tests.fake_modules.models import SMALL_SITES, Flux, UNet, count_hooks, small_unet
from tests.fake_webui import ForgeGeneration, Generation, webui
from tests.small_models.images import as_text

FILES = ("pulid_v1.safetensors", "pulid_v1_other.safetensors", "pulid_flux_v0.9.1.safetensors")
STEPS = 3
SLOT = "model_function_wrapper"


def _photo(colour: tuple[int, int, int]) -> str:
    return as_text(np.full((48, 48, 3), colour, np.uint8))


PHOTOS = {"anna": _photo((200, 80, 60)), "ben": _photo((60, 120, 200)), "cleo": _photo((90, 200, 90))}
PHOTOS["nobody"] = _photo((0, 0, 0))


def unit(name: str, **settings: Any) -> dict[str, Any]:
    """A person, as the API takes it."""
    return {"images": [PHOTOS[name]], **settings}


class Detector:
    """Sees one face in every image that is not black."""

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        if not image_bgr.any():
            return []
        scale = np.float32(image_bgr.shape[0] / 512)
        return [Detection(np.array([4, 4, 44, 44], np.float32), (CROP_LANDMARKS * scale).astype(np.float32), 0.9)]


class Recogniser:
    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        colour = image_bgr.reshape(-1, 3).mean(0) / 255
        return np.cos(np.arange(512)[:, None] * colour).sum(1).astype(np.float32)

    def embed_crop(self, aligned_bgr: np.ndarray) -> np.ndarray:
        raise AssertionError("every face is detected")


class Parser:
    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:
        return np.ones(aligned_rgb.shape[:2], np.int64)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        mean = images.mean((1, 2, 3))[:, None] * self.weight
        hidden = torch.linspace(-1, 1, 3 * small_models.TOWER_WIDTH).view(1, 3, -1)
        return torch.linspace(0, 3, 768) + mean, [torch.sin(hidden * (i + 1) + mean[:, None]) for i in range(5)]


def face_models() -> FaceModels:
    return FaceModels(Detector(), Recogniser(), Detector(), Parser())


def write_models(folder: Path) -> None:
    """A models folder: two PuLID files for SDXL, one for FLUX, and empty files in the place of the encoders."""
    (folder / "pulid").mkdir(parents=True)
    for seed, name in enumerate(FILES[:2], 1):
        pairs = {f"{n}.id_to_{x}.weight": (8, small_models.TOKEN_WIDTH) for n in range(SMALL_SITES) for x in "kv"}
        weights = small_models.random_weights(pairs, seed, gain=3.0)
        encoder = small_models.random_weights(small_models.id_encoder(hidden=64).state_dict(), 10 * seed)
        save_file(small_models.sdxl_file(encoder, weights), folder / "pulid" / name)
    modules = nn.ModuleList(small_models.image_stream(8, small_models.TOKEN_WIDTH) for _ in range(20))
    weights = small_models.random_weights(modules.state_dict(), 3)
    encoder = small_models.random_weights(small_models.id_former(hidden=64, depth=5, num_queries=8).state_dict(), 4)
    save_file(small_models.flux_file(encoder, weights), folder / "pulid" / FILES[2])
    for file in catalog.in_group("encoders"):
        (folder / file.folder).mkdir(parents=True, exist_ok=True)
        (folder / file.folder / file.name).write_text(file.name)


_ENCODED: dict[tuple[Path, str], Identity] = {}


@dataclass
class Host:
    """One start of the program. unets: the checkpoints in its memory."""

    kind: str
    ui: Any
    folder: Path
    script: Any

    @cached_property
    def unets(self) -> dict[str, nn.Module]:
        made = {"sdxl": small_unet(), "sdxl-b": small_unet(seed=5), "sd15": UNet(768, (1, 0, 1))}
        return made | ({"flux": Flux()} if self.kind == "forge" else {})

    @property
    def state(self) -> Any:
        return self.ui.modules.shared.state

    @property
    def library(self) -> Any:
        return self.script.library

    def processing(self, checkpoint: str = "sdxl", **how: Any) -> Any:
        made = {"a1111": Generation, "forge": ForgeGeneration}[self.kind]
        return made(self.unets[checkpoint], checkpoint, **{"steps": STEPS} | how)

    def generate(self, args: Sequence[Any], checkpoint: str = "sdxl", p: Any = None, **how: Any) -> list[Tensor]:
        """The images of one request; raises what ends it."""
        self.state.interrupted = self.state.skipped = False  # as the hosts do when a job begins
        return self.ui.generate(self.script, p or self.processing(checkpoint, **how), args)

    def encode(self, name: str, file: str = "auto") -> Identity:
        """A person's identity for an SDXL file."""
        from lib_pulid.webui.pictures import decode

        adapter = self.library.adapters.load(file, "sdxl")
        return self.library.encoders.encode([decode(PHOTOS[name], "photo")], adapter, LARGEST, "official")

    def actions(self) -> Any:
        """What the page's widgets call; the checkpoint is an SDXL."""
        from lib_pulid.webui.actions import Actions

        return Actions(self.library, lambda name: "sdxl")

    def save(self, **people: str) -> None:
        """Saves identities: the name of each, and whose it is. Each photo is read once for all tests."""
        for name, person in people.items():
            if (self.folder, person) not in _ENCODED:
                _ENCODED[self.folder, person] = self.encode(person)
            self.library.identities.save(name, _ENCODED[self.folder, person])
        self.library.encoders.release()

    def start_anew(self) -> None:
        """As if the program had been started again: a library that knows nothing, and nothing written."""
        self.script = self.ui.script()
        self.ui.swallowed.clear()
        gc.collect()  # models lie in circles, and there are hundreds of starts
        for path in (*self.written(), *self.library.presets.folder().glob("*.json")):
            path.unlink()

    def forget_photos(self) -> None:
        """They will be read again."""
        self.library.identities._cache = None
        for path in (self.library.folder.path / "cache").glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """Of all that is in the checkpoints: modules, what hangs on them, and weights."""
        digest = hashlib.sha256()
        for unet in self.unets.values():
            for name, module in unet.named_modules():
                digest.update(repr((name, type(module).__name__, sorted(vars(module)))).encode())
            for name, tensor in unet.state_dict().items():
                digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def left_behind(self, p: Any = None) -> list[str]:
        """In words; empty when nothing is, once interrupted work has ended. p: what was generated."""
        self.library.encoders.settle()
        found = {f"hooks on {name}": count_hooks(unet) for name, unet in self.unets.items()}
        callbacks = self.ui.modules.script_callbacks.callback_map
        found |= {event: len(callbacks[event]) - 1 for event in ("callbacks_cfg_denoiser", "callbacks_cfg_denoised")}
        found["runs"] = len(hosts.current().running)
        found["models that read photos"] = bool(self.library.encoders._models)
        found["a line of progress"] = self.state.textinfo
        found["a patch"] = (
            p is not None and self.kind == "forge" and SLOT in p.sd_model.forge_objects.unet.model_options
        )
        found["something in the place of sample"] = p is not None and type(vars(p).get("sample")).__name__ == "Sampling"
        found["a file of another kind"] = [path.name for path in self.written() if path.suffix != ".safetensors"]
        return [f"{what}: {count}" for what, count in found.items() if count]

    def written(self) -> list[Path]:
        folders = (self.library.identities.folder, self.library.folder.path / "cache")
        return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


class Light:
    """See the module. models: as `write_models` leaves it."""

    def __init__(self, kind: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.models = kind, models
        monkeypatch.setattr("lib_pulid.face_models.load_face_models", lambda files, device: face_models())
        monkeypatch.setattr("lib_pulid.vision.load_vision_tower", lambda path: Tower())
        monkeypatch.setattr("lib_pulid.face_models.InsightFaceDetector", lambda path, device: Detector())
        monkeypatch.setattr("lib_pulid.face_models.ArcFaceRecogniser", lambda path, device: Recogniser())

    @contextmanager
    def running(self) -> Iterator[Host]:
        with webui(self.kind, self.models) as ui:
            host = Host(self.kind, ui, self.models, ui.script())
            gc.freeze()  # so that a collection looks at the program only
            host.start_anew()
            try:
                yield host
            finally:
                gc.unfreeze()
                while hosts.current().running:
                    hosts.current().running.pop().end()
