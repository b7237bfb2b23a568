"""The rest of a WebUI around `fake_modules`: gradio, scripts, options, and a generation as the hosts run it.

    with webui("a1111", models_dir) as ui:
        script = ui.script()
        images = ui.generate(script, p, args)      # raises what would end the request

Exceptions of script hooks are swallowed, as in the hosts; those of sampling end the generation. Interrupt and skip end
a pass with what there is, at its next step; an interrupted generation begins no further batch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_modules import a1111, extra_networks, forge, installed
from tests.fake_modules.models import SMALL_SITES, small_unet
from tests.small_models import normal

ROOT = Path(__file__).parents[1]


class Widget:
    """Any gradio component or layout; remembers its arguments and what is wired to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kwargs = kwargs
        self.value = kwargs.get("value", args[0] if args else None)
        self.label, self.elem_id = kwargs.get("label"), kwargs.get("elem_id")
        self.events: dict[str, tuple[Any, list[Any], list[Any]]] = {}

    def __enter__(self) -> Widget:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def _on(self, event: str) -> Any:
        def wire(fn: Any, inputs: Any = (), outputs: Any = (), **_: Any) -> SimpleNamespace:
            self.events[event] = (fn, list(inputs), list(outputs))
            return SimpleNamespace(then=self._on(f"{event}.then"))

        return wire

    def __getattr__(self, name: str) -> Any:
        if name in ("click", "change", "input", "upload", "select", "edit"):
            return self._on(name)
        raise AttributeError(name)


def gradio(version: str) -> ModuleType:
    made = ModuleType("gradio")
    made.__version__ = version
    layout, widgets = "Tabs Tab Row Column Accordion", "TextArea File Gallery Number Button Checkbox Radio Image HTML"
    for name in f"{layout} {widgets} Dropdown Textbox Slider".split():
        setattr(made, name, type(name, (Widget,), {}))
    made.update = lambda **kwargs: {"__type__": "update", **kwargs}
    return made


class Script:
    def __init__(self) -> None:
        self.infotext_fields = self.paste_field_names = None

    def process_before_every_sampling(self, p: Any, *args: Any) -> None:
        """In Forge, and in A1111 from 1.9 on."""

    def postprocess_image_after_composite(self, p: Any, pp: Any, *args: Any) -> None:
        """As above."""


class State:
    """shared.state; told: all that was ever put into its progress line."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.textinfo = None
        self.interrupted = self.skipped = False

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value
        if name == "textinfo":
            self.told.append(value)


class OptionInfo(SimpleNamespace):
    def __init__(
        self, default: Any, label: str, component: Any = None, component_args: Any = None, restrict_api: bool = False
    ) -> None:
        super().__init__(default=default, label=label, component=component, component_args=component_args)
        self.restrict_api = restrict_api

    def info(self, text: str) -> OptionInfo:
        return self

    def needs_reload_ui(self) -> OptionInfo:
        return self


class AxisOption:
    def __init__(self, label: str, type: Any, apply: Any, **kwargs: Any) -> None:
        self.label, self.type, self.apply = label, type, apply
        self.choices, self.confirm = kwargs.get("choices"), kwargs.get("confirm")


class Interrupted(BaseException):
    """As the hosts': samplers raise it when the user wants no more, and `sample` catches it."""


class _Processing:
    """What both hosts' StableDiffusionProcessing have. before_sampling: the scripts' process_before_every_sampling."""

    is_api = True  # the tests send dicts

    def _begin(self, batches: int, steps: int) -> None:
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: list[str] = []
        self.batches, self.n_iter, self.steps = batches, batches, steps
        self.before_step: Any = lambda step: None
        self.before_sampling: Any = lambda p: None
        self.prompt: str | list[str] = ""  # a list: one per image
        self.hr_prompt: str | list[str] = ""
        self.negative_prompt, self.batch_size, self.iteration = "", 1, 0
        self.enable_hr = self.disable_extra_networks = False

    def setup_prompts(self) -> None:
        def each(prompt: str | list[str]) -> list[str]:
            return prompt if isinstance(prompt, list) else [prompt] * self.batch_size * self.batches

        self.all_prompts, self.all_negative_prompts = each(self.prompt), each(self.negative_prompt)
        self.all_hr_prompts = each(self.hr_prompt or self.prompt) if self.enable_hr else None

    def begin_batch(self, batch: int) -> None:
        networks = sys.modules["modules"].extra_networks
        self.iteration, images = batch, slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        self.prompts = self.all_prompts[images]
        self.rewrite_prompts(self)
        self.prompts, self.extra_network_data = networks.parse_prompts(self.prompts)
        if self.enable_hr:
            _, self.hr_extra_network_data = networks.parse_prompts(self.all_hr_prompts[images])
        if not self.disable_extra_networks:
            networks.activate(self, self.extra_network_data)
            if self.enable_hr:  # A1111 does both, where it needs the second pass's texts beforehand
                networks.activate(self, self.hr_extra_network_data)
                networks.activate(self, self.extra_network_data)

    @staticmethod
    def rewrite_prompts(p: Any) -> None:
        """Before_process_batch of another extension, where a test has one."""

    @property
    def text_width(self) -> int:
        reads = (layer.attn2.to_k.in_features for layer in self.denoiser.modules() if hasattr(layer, "attn2"))
        return next(reads, 6)  # FLUX's

    def comment(self, text: str) -> None:
        self.comments.append(text)

    def sample(self) -> Tensor:
        made: list[Tensor] = []

        def before_step(step: int) -> None:
            self.before_step(step)
            state = sys.modules["modules"].shared.state
            if state.interrupted or state.skipped:
                raise Interrupted

        text = [normal(seed, 1, 7, self.text_width).expand(self.batch_size, -1, -1) for seed in (1, 2)]
        try:
            with torch.no_grad():
                made += self._pass(*text, before_step)
                if self.enable_hr:
                    self.is_hr_pass = True
                    if not self.disable_extra_networks:
                        sys.modules["modules"].extra_networks.activate(self, self.hr_extra_network_data)
                    made += self._pass(*text, before_step)
        except Interrupted:
            return torch.zeros(1)
        finally:
            self.is_hr_pass = False
        return torch.stack(made)


class Generation(_Processing, a1111.P):
    """In A1111: a batch is a few UNet calls of `fake_modules.a1111.sample`."""

    def __init__(
        self, unet: torch.nn.Module | None = None, name: str = "some-sdxl", batches: int = 1, steps: int = 2
    ) -> None:
        super().__init__(unet or small_unet(), name)
        self._begin(batches, steps)

    def _pass(self, cond: Tensor, uncond: Tensor, before_step: Any) -> list[Tensor]:
        self.before_sampling(self)
        pictures = self.batch_size
        return a1111.sample(self, cond, uncond, steps=self.steps, pictures=pictures, before_step=before_step)


class ForgeGeneration(_Processing, forge.P):
    """In Forge, SDXL or FLUX."""

    def __init__(self, denoiser: torch.nn.Module, name: str = "some-model", batches: int = 1, steps: int = 2) -> None:
        super().__init__(denoiser, name)
        self._begin(batches, steps)

    def _pass(self, cond: Tensor, uncond: Tensor, before_step: Any) -> list[Tensor]:
        self.sampler = SimpleNamespace(model_wrap_cfg=None)

        def before_sampling(p: Any) -> None:
            self.before_sampling(p)
            getattr(p.sampler, "sample", lambda: None)()  # what a script may have put there

        how = {"before_sampling": before_sampling, "before_step": before_step}
        return forge.sample(self, [cond], [uncond], steps=self.steps, **how)


class WebUI:
    """What the tests hold in hand."""

    def __init__(self, modules: ModuleType) -> None:
        self.modules, self.swallowed = modules, []

    def door(self) -> ModuleType:
        """scripts/pulid.py, run again as by Reload UI, which lets go of all callbacks and scripts first."""
        self.modules.script_callbacks.clear_callbacks()
        self.modules.scripts.scripts_data[:] = [_xyz()]
        spec = importlib.util.spec_from_file_location("pulid.py", ROOT / "scripts" / "pulid.py")
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        self.modules.extra_networks.registry.clear()
        self.modules.ui_extra_networks.extra_pages.clear()
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        for callback in list(self.modules.script_callbacks.callback_map["callbacks_before_ui"]):
            callback.callback()
        return module

    def script(self) -> Any:
        return self.door().PulidScript()

    def hook(self, name: str, script: Any, p: Any, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(script, name)(p, *args, **kwargs)
        except Exception as error:
            self.swallowed.append(error)

    def generate(
        self,
        script: Any,
        p: Any,
        args: Sequence[Any],
        between: Any = lambda batch: None,
        decode: Any = lambda batch: [],
    ) -> list:
        """process_images. p: Generation or ForgeGeneration; it gets the result, `p.processed`.

        between: what other extensions do after a batch. decode: makes the images of a batch.
        """
        state = self.modules.shared.state
        if hasattr(script, "process_before_every_sampling"):
            p.before_sampling = lambda p: self.hook("process_before_every_sampling", script, p, *args)
        p.setup_prompts()
        self.hook("process", script, p, *args)
        pictures, processed = [], SimpleNamespace(images=[], infotexts=[], comments="", index_of_first_image=0)
        for batch in range(p.batches):
            state.skipped = False
            if state.interrupted:
                break
            p.begin_batch(batch)
            self.hook("process_batch", script, p, *args, batch_number=batch)
            pictures.append(p.sample())
            between(batch)
            self._finish(script, p, args, batch, decode(batch), processed)
        vars(processed).update(comments="".join(f"{text}\n" for text in p.comments), info="", seed=None)
        processed.all_seeds = list(range(len(processed.images)))
        self.hook("postprocess", script, p, processed, *args)
        p.processed = processed
        return pictures

    def _finish(self, script: Any, p: Any, args: Sequence[Any], batch: int, images: list, processed: Any) -> None:
        """What the hosts do with each image of a batch; an infotext is a dict here."""
        p.iteration, p.batch_size = batch, len(images) or p.batch_size
        for p.batch_index, image in enumerate(images):
            pp = SimpleNamespace(image=image)
            self.hook("postprocess_image", script, p, pp, *args)
            self.hook("postprocess_image_after_composite", script, p, pp, *args)
            processed.images.append(pp.image)
            processed.infotexts.append(self.infotext(p))

    def infotext(self, p: Any, use_main_prompt: bool = False) -> dict[str, Any]:
        """create_infotext: an entry that can be called says its value itself."""
        texts = {
            name: value(p=p, use_main_prompt=use_main_prompt) if callable(value) else value
            for name, value in p.extra_generation_params.items()
        }
        return {name: value for name, value in texts.items() if value is not None}


@contextmanager
def webui(host: str, models_dir: Path, gradio_version: str = "3.41.2") -> Iterator[WebUI]:
    """`small_unet` is its SDXL."""
    import lib_pulid.webui as package

    with installed(host) as modules, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib_pulid.hosts.families.SDXL_SITES", SMALL_SITES)
        before = _unloaded(package)
        sys.modules["gradio"] = gradio(gradio_version)
        try:
            _fill(modules, models_dir)
            yield WebUI(modules)
        finally:
            _unloaded(package)
            sys.modules.pop("gradio", None)
            sys.modules.update(before)
            vars(package).update({name.rpartition(".")[2]: module for name, module in before.items()})


def _unloaded(package: ModuleType) -> dict[str, ModuleType]:
    """Forgets a package's modules, so that they are imported anew; returns them."""
    names = [name for name in sys.modules if name.startswith(f"{package.__name__}.")]
    found = {name: sys.modules.pop(name) for name in names}
    for name in names:
        vars(package).pop(name.rpartition(".")[2], None)
    return found


def _fill(modules: ModuleType, models_dir: Path) -> None:
    def add(name: str, **contents: Any) -> None:
        module = ModuleType(f"modules.{name}")
        vars(module).update(contents)
        setattr(modules, name, module)
        sys.modules[f"modules.{name}"] = module

    # "never", so that one sees what is let go of
    opts = SimpleNamespace(
        data={"pulid_keep_encoders": "never"}, added={}, data_labels={"forge_inference_memory": None}
    )
    opts.add_option = opts.added.__setitem__
    flags = SimpleNamespace(api=True, nowebui=False, api_auth=None, pulid_models_dir=str(models_dir))
    opts.samples_format = "png"
    add("shared", opts=opts, cmd_opts=flags, state=State(), OptionInfo=OptionInfo)
    add("paths", models_path=str(models_dir))
    known: dict[str, Any] = {}  # CheckpointInfo by each of its names
    add("sd_models", model_data=SimpleNamespace(sd_model=None), checkpoint_aliases=known)
    modules.sd_models.get_closet_checkpoint_match = known.get
    add("extra_networks")
    extra_networks.fill(modules.extra_networks)
    add("ui_extra_networks_user_metadata", UserMetadataEditor=extra_networks.UserMetadataEditor)
    pages: list[Any] = []
    add("ui_extra_networks", ExtraNetworksPage=extra_networks.Page, quote_js=json.dumps, extra_pages=pages)
    modules.ui_extra_networks.register_page = pages.append
    add("scripts", Script=Script, AlwaysVisible=object(), scripts_data=[_xyz()])
    add("ui_components", InputAccordion=type("InputAccordion", (Widget,), {}), ToolButton=type("Tool", (Widget,), {}))


def _xyz() -> Any:
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    return SimpleNamespace(script_class=type("XYZ", (), {"__module__": "xyz_grid.py"}), module=module)
