"""Test only: repaints the middle of each picture in a generation of its own, as detailers do.

It hands on those scripts, with their arguments, whose file stems it is given; ADetailer's setting `ad_script_names` is
such a list.
"""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import gradio as gr
from modules import scripts, shared
from modules.processing import StableDiffusionProcessingImg2Img, process_images
from PIL import Image


class Detailer(scripts.Script):
    def title(self) -> str:
        return "Test detailer"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return [gr.Textbox(value="", visible=False, label="Scripts of the test detailer")]

    def postprocess_image(self, p: Any, pp: Any, names: str = "", *rest: Any) -> None:
        if not names or getattr(p, "is_detail", False):
            return
        detail = self._detail(p, pp.image, {name.strip() for name in names.split(",")})
        done = process_images(detail)
        pp.image = done.images[0]

    def _detail(self, p: Any, image: Image.Image, names: set[str]) -> Any:
        mask = Image.new("L", image.size, 0)
        width, height = image.size
        mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
        detail = StableDiffusionProcessingImg2Img(
            sd_model=shared.sd_model,
            init_images=[image],
            mask=mask,
            mask_blur=0,
            inpainting_fill=1,
            inpaint_full_res=True,
            denoising_strength=0.6,
            prompt=p.prompt,
            negative_prompt=p.negative_prompt,
            seed=7,
            steps=p.steps,
            cfg_scale=p.cfg_scale,
            width=p.width,
            height=p.height,
            sampler_name=p.sampler_name,
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        detail.is_detail = True
        runner = copy(p.scripts)
        runner.alwayson_scripts = [one for one in runner.alwayson_scripts if Path(one.filename).stem in names]
        detail.scripts, detail.script_args = runner, deepcopy(p.script_args)
        return detail
