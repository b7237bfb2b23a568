"""A WebUI's HTTP API: pictures in, pictures out."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.small_models.images import as_text

TIMEOUT = 900.0
BODY = {"prompt": "a photo of a cat", "negative_prompt": "blurry", "width": 192, "height": 128, "steps": 4, "seed": 1}
BODY |= {"sampler_name": "Euler", "cfg_scale": 7.0}


@dataclass(frozen=True)
class Answer:
    """status: HTTP. text: the body. Only answers with a status below 400 have images."""

    status: int
    text: str

    @property
    def body(self) -> Any:
        return json.loads(self.text)

    @property
    def has_picture(self) -> bool:
        try:
            return bool(isinstance(self.body, dict) and self.body.get("images"))
        except ValueError:
            return False


@dataclass(frozen=True)
class Pictures:
    """images: uint8 RGB [H, W, 3]. parameters: the text in each, as the host writes it."""

    images: list[np.ndarray]
    parameters: list[str]

    @property
    def image(self) -> np.ndarray:
        return self.images[0]


class Api:
    def __init__(self, url: str, checkpoint: str = "tiny-sdxl.safetensors") -> None:
        self.url, self.checkpoint = url, checkpoint

    def get(self, path: str) -> Any:
        return self._checked("GET", path, None).body

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._checked("POST", path, body or {}).body

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Whatever the answer is."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return Answer(answer.status, answer.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode(errors="replace"))

    def _checked(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        answer = self.send(method, path, body)
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path} answered {answer.status}: {answer.text[:1500]}")
        return answer

    def txt2img(self, *units: Mapping[str, Any], **changes: Any) -> Pictures:
        """With these PuLID units, each a dict; without any, PuLID is not mentioned at all."""
        return pictures(self._checked("POST", "/sdapi/v1/txt2img", self._request(units, changes)))

    def img2img(self, *units: Mapping[str, Any], **changes: Any) -> Pictures:
        return pictures(self._checked("POST", "/sdapi/v1/img2img", self._request(units, changes)))

    def try_txt2img(self, *units: Mapping[str, Any], **changes: Any) -> Answer:
        return self.send("POST", "/sdapi/v1/txt2img", self._request(units, changes))

    def try_img2img(self, *units: Mapping[str, Any], **changes: Any) -> Answer:
        return self.send("POST", "/sdapi/v1/img2img", self._request(units, changes))

    def _request(self, units: tuple[Mapping[str, Any], ...], changes: Mapping[str, Any]) -> dict[str, Any]:
        changes = dict(changes)
        beside = changes.pop("alwayson_scripts", {})
        settings = {"sd_model_checkpoint": self.checkpoint} | changes.pop("override_settings", {})
        scripts = ({"PuLID": {"args": list(units)}} if units else {}) | beside
        return BODY | {"override_settings": settings, "alwayson_scripts": scripts} | changes

    def options(self, **changes: Any) -> None:
        self.post("/sdapi/v1/options", changes)

    @cached_property
    def upscaler(self) -> str:
        """For hires passes: of the latents, or in hosts that have none for latents (Forge Neo) of the image."""
        latent = [mode["name"] for mode in self.get("/sdapi/v1/latent-upscale-modes")]
        return "Latent" if "Latent" in latent else self.image_upscaler

    @cached_property
    def image_upscaler(self) -> str:
        """One that needs no model; Forge Neo calls it "None" and resizes all the same."""
        return "Lanczos" if "Lanczos" in [one["name"] for one in self.get("/sdapi/v1/upscalers")] else "None"

    def state(self) -> dict[str, Any]:
        return self.get("/host-test/state")


def pictures(answer: Answer) -> Pictures:
    body = answer.body
    images = [decoded(image) for image in body["images"]]
    return Pictures(images, json.loads(body["info"])["infotexts"])


def decoded(text: str) -> np.ndarray:
    data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encoded(image: np.ndarray | Path) -> str:
    """base64 of a PNG."""
    return base64.b64encode(image.read_bytes()).decode() if isinstance(image, Path) else as_text(image)
