"""ControlNet and IP-Adapter in the same picture. Forge brings both; A1111 needs the extension sd-webui-controlnet."""

from __future__ import annotations

import base64
from typing import Any

import torch

from tests.host.api import encoded
from tests.host.models.checkpoints import CLIP_IMAGE_WIDTH
from tests.host.models.pulid import as_of_old
from tests.host.rows_img2img import scene
from tests.host.rows_works_with import MILD
from tests.host.table import Rows, Skipped, differ, equal
from tests.host.webui import Running

rows = Rows()


def controls(host: Running) -> dict[str, str]:
    """ControlNet's models by the name of their file."""
    answer = host.api.send("GET", "/controlnet/model_list?update=true")
    if answer.status >= 400:
        raise Skipped("no ControlNet in this WebUI: give its folder with --extension")
    return {name.split(" [")[0]: name for name in answer.body["model_list"]}


def beside(host: Running, ours: dict[str, Any], model: str, module: str, **more: Any) -> str:
    """ours: a unit of PuLID. more: of the ControlNet's."""
    unit: dict[str, Any] = {"enabled": True, "module": module, "model": controls(host)[model], "weight": 0.7}
    unit |= {"image": encoded(scene()), "pixel_perfect": False, "processor_res": 512, **more}
    script = {"ControlNet": {"args": [unit]}}
    plain, face = host.api.txt2img().image, host.api.txt2img(ours).image
    control, both = host.api.txt2img(alwayson_scripts=script).image, host.api.txt2img(ours, alwayson_scripts=script)
    seen = [
        f"alone {differ(plain, control, f'{model} alone', 0.3):.1f}",
        f"face {differ(control, both.image, f'{model} with and without the face', 0.3):.1f}",
        f"control {differ(face, both.image, f'the face with and without {model}', 0.3):.1f}",
    ]
    equal(face, host.api.txt2img(ours).image, "afterwards, the face alone")
    equal(plain, host.api.txt2img().image, "afterwards, neither")
    return ", ".join(seen)


@rows.row("ControlNet beside it")
def controlnet(host: Running, ours: dict[str, Any] = MILD) -> str:
    return beside(host, ours, "tiny-controlnet", "none" if host.kind == "a1111" else "None")


@rows.row("IP-Adapter beside it")
def ip_adapter(host: Running) -> str:
    if host.kind == "a1111":
        return beside(host, MILD, "tiny-ip-adapter", "ip-adapter_clip_h", ipadapter_input=[embedding(host)])
    return beside(host, MILD, "tiny-ip-adapter", "test embedding")


def embedding(host: Running) -> str:
    """What an image encoder would give, as the extension's API takes it."""
    path = host.data / "embedding.pt"
    given = torch.randn(1, CLIP_IMAGE_WIDTH, generator=torch.Generator().manual_seed(5))
    torch.save({"image_embeds": given}, path)
    as_of_old(path)
    return base64.b64encode(path.read_bytes()).decode()
