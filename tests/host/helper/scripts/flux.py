"""Test only, Forge: a look at FLUX's blocks, the dtype of its computation, FLUX.2 Klein, torch.compile."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from modules import script_callbacks, shared


class Watch:
    """Compares what each block returns with what the next one is given; what differs, somebody has added."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.last: tuple[str, torch.Tensor, torch.Tensor] | None = None

    def start(self, denoiser: Any) -> None:
        self.stop()
        self.calls = []
        self._hook(denoiser.register_forward_pre_hook(self._begin))
        for kind, read in (("double", self._double), ("single", self._single)):
            for index, block in enumerate(getattr(denoiser, f"{kind}_blocks")):
                self._hook(block.register_forward_pre_hook(self._given(read), with_kwargs=True))
                self._hook(block.register_forward_hook(self._returned(kind, index)))

    def stop(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        self.last = None

    def _hook(self, handle: Any) -> None:
        self.handles.append(handle)

    def _begin(self, module: Any, args: tuple) -> None:
        self.last = None
        self.calls.append({"rows": len(args[0]), "double": [], "single": [], "text": 0, "missed": 0})

    def _returned(self, kind: str, index: int) -> Callable:
        def note(module: Any, args: tuple, output: Any) -> None:
            image, text = output if kind == "double" else self._parts(output)
            self.length = text.shape[1]
            self.last = (f"{kind}.{index}", image.clone(), text.clone())

        return note

    def _given(self, read: Callable) -> Callable:
        def compare(module: Any, args: tuple, kwargs: dict) -> None:
            if self.last is None:
                return
            (kind, index), image, text = self.last[0].split("."), *self.last[1:]
            image_now, text_now = read(args, kwargs)
            if not torch.equal(image, image_now):
                self.calls[-1][kind].append(int(index))
                self.calls[-1]["missed"] += int((image == image_now).all(-1).sum())
            self.calls[-1]["text"] += not torch.equal(text, text_now)

        return compare

    def _double(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return kwargs["img"], kwargs["txt"]

    def _single(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return self._parts(args[-1])  # ersatzForge gives a buffer of its own first

    def _parts(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return both[:, self.length :], both[:, : self.length]


watch = Watch()
computation: dict[str, torch.dtype] = {}


def start_watch() -> dict[str, bool]:
    watch.start(shared.sd_model.forge_objects.unet.model.diffusion_model)
    return {"ok": True}


def stop_watch() -> list[dict[str, Any]]:
    watch.stop()
    return watch.calls


def set_computation(body: dict[str, str]) -> dict[str, bool]:
    """dtype: "bfloat16", which a CPU would not choose by itself, or "" for the host's own choice."""
    from backend import memory_management
    from modules.sd_models import model_data

    if not hasattr(memory_management, "pulid_test_computation"):
        # Forge Neo's name for it is ComfyUI's.
        name = "get_computation_dtype" if hasattr(memory_management, "get_computation_dtype") else "inference_cast"
        usual = getattr(memory_management, name)
        memory_management.pulid_test_computation = computation
        setattr(memory_management, name, lambda *a, **k: computation.get("dtype") or usual(*a, **k))
    computation.clear()
    if body["dtype"]:
        computation["dtype"] = getattr(torch, body["dtype"])
    model_data.forge_hash = ""  # it is loaded again
    return {"ok": True}


def storage() -> dict[str, str]:
    model = shared.sd_model.forge_objects.unet.model
    return {"storage": str(model.storage_dtype), "computation": str(model.computation_dtype)}


def klein() -> dict[str, str]:
    """What is said of Forge Neo's transformer with the parts of FLUX.2 Klein 4B, and no more width than needs be."""
    from backend.nn.flux import IntegratedFluxTransformer2DModel

    from lib_pulid.errors import UnsupportedModelError
    from lib_pulid.hosts.families import sites_of

    sizes = {"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 8, "hidden_size": 128}
    sizes |= {"num_heads": 1, "mlp_ratio": 3.0, "depth": 5, "depth_single_blocks": 20, "axes_dim": [32] * 4}
    sizes |= {"theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": False, "txt_ids_dims": [3]}
    sizes |= {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False}
    try:
        return {"said": f"taken for {sites_of(IntegratedFluxTransformer2DModel(**sizes), 'klein').family}"}
    except UnsupportedModelError as error:
        return {"said": str(error)}


def set_compiler(body: dict[str, str]) -> dict[str, bool]:
    """backend: what torch.compile uses from now on whatever it is asked for, or "" for what it is asked for."""
    usual = getattr(torch.compile, "pulid_test_usual", torch.compile)
    torch.compile = usual
    if body["backend"]:

        def compile(model: Any, **asked: Any) -> Any:
            kept = {name: asked[name] for name in ("dynamic", "fullgraph") if name in asked}
            return usual(model, backend=body["backend"], **kept)

        compile.pulid_test_usual = usual
        torch.compile = compile
    return {"ok": True}


def add_routes(demo: Any, app: Any) -> None:
    app.add_api_route("/host-test/watch", start_watch, methods=["POST"])
    app.add_api_route("/host-test/watch", stop_watch, methods=["GET"])
    app.add_api_route("/host-test/computation", set_computation, methods=["POST"])
    app.add_api_route("/host-test/klein", klein, methods=["GET"])
    app.add_api_route("/host-test/compile", set_compiler, methods=["POST"])
    app.add_api_route("/host-test/storage", storage, methods=["GET"])


if importlib.util.find_spec("modules_forge") is not None:
    script_callbacks.on_app_started(add_routes)
