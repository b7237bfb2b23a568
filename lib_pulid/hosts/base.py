"""What A1111 and Forge share: our generations under way, and what each of them hooks into the denoiser.

The hosts generate one image at a time, with one process-wide model. Other generations may run between the batches of
one (a detailer that repaints faces), and even while it is sampled; each is a Run of its own, inner ones last.

    WebUI.callbacks   registered once, when the script is loaded; pass each sampling step on to the runs
    Run.open          before a step: which model, which rows
    Run.enter, leave  hooks on the denoiser: `inject` around each of its calls
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from lib_pulid.hosts import Host, Plan
from lib_pulid.hosts.control_base import Loader
from lib_pulid.hosts.injector import Injector
from lib_pulid.injection import DenoiseStep

# Samplers whose calls per step are wrong in the hosts' `total_steps`.
_CALLS_PER_STEP = {"sample_heunpp2": 3}
_RHO = 7.0


class Progress:
    """Computes the fraction of a pass that is done, from the host's CFGDenoiser: its `step` counts calls, from 0.

    `total_steps` is the number of expected calls: twice the steps for second-order samplers. (The host's
    `state.sampling_step` is set after a step's first call, and so lags behind.)
    """

    def __init__(self) -> None:
        self._first_sigma = 0.0

    def __call__(self, denoiser: Any, sigma: Tensor) -> float:
        """Returns the fraction at this call. sigma: [B]."""
        if not denoiser.step:
            self._first_sigma = float(sigma.max())
        sampler = str(getattr(denoiser.sampler, "funcname", ""))
        if sampler == "sample_dpm_adaptive":
            return self._of_noise(float(sigma.max()), denoiser.model_wrap)
        total = (denoiser.total_steps or 1) * _CALLS_PER_STEP.get(sampler, 1)
        return min(denoiser.step / total, 1.0)

    def _of_noise(self, sigma: float, model_wrap: Any) -> float:
        """Returns where Karras' schedule has this much noise, for a sampler with any number of calls."""
        first, now, last = (s ** (1 / _RHO) for s in (self._first_sigma, sigma, float(model_wrap.sigmas[0])))
        return min(max((first - now) / (first - last), 0.0), 1.0) if first > last else 0.0


class Run:
    """What one generation has in the host.

    Attributes:
        p: its StableDiffusionProcessing; None once it has ended.
        is_sampling: while it is True, `WebUI.stop` skips this run.
    """

    def __init__(self, host: WebUI, p: Any, plan: Plan) -> None:
        self.p: Any = p
        self.is_sampling = False
        self._host = host
        self._injector = Injector(plan)
        self._nets = host.nets.ControlNets(host.loader)
        self._progress = Progress()
        self._hooks = ExitStack()  # on the denoiser
        self._hooked: nn.Module | None = None
        self._call = ExitStack()  # of the current denoiser call
        self._step: DenoiseStep | None = None
        self._error: Exception | None = None  # that the host would swallow

    def begin(self) -> None:
        """Called when the sampling begins."""

    def patch(self, p: Any) -> None:
        """Called before each pass that is sampled."""

    def before_step(self, params: Any) -> None:
        """Called before the denoiser calls of any generation's step. params: the host's CFGDenoiserParams."""
        self.close()
        if self.p is None or params.denoiser.p is not self.p:
            return
        try:
            self.open(params)
        except Exception as error:  # here it would be printed and forgotten
            self._error = error

    def open(self, params: Any) -> None:
        """Prepares for the denoiser calls of this step."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the denoiser calls of a step, and before those of the next."""

    def read(self, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[DenoiseStep, tuple[int, int]] | None:
        """Returns the step of a denoiser call, with height and width of the pass's latent; None: it is not ours.

        Args:
            x: latents [B, C, h, w]. kwargs: of the call.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Called after sampling. Raises what the host swallowed, since a step may have run without the face."""
        if self._error is not None:
            raise self._error
        self._injector.check_end()

    def end(self) -> None:
        self.unhook()
        self._injector.end()
        self._nets.end()
        self.p = self._error = None

    # ------------------------------------------------------------ hooks on the denoiser

    def hook(self, denoiser: nn.Module) -> None:
        self._hooks.callback(self._call.close)
        self._hooks.callback(denoiser.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
        self._hooks.callback(denoiser.register_forward_hook(self.leave, always_call=True).remove)
        self._hooked = denoiser

    def unhook(self) -> None:
        self._hooked = None
        self._hooks.close()

    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Returns None, or the arguments with which the call goes on."""
        self._call.close()  # in case the last call ended with a BaseException
        self._step = None
        call = self.read(args[0] if args else kwargs["x"], kwargs)
        if call is None:
            return None
        self._step, whole = call
        self._call.enter_context(self._injector.around(self._step, whole))
        controlled = self._injector.controlled
        return self._nets.add(args, kwargs, self._step, controlled, self._call) if controlled else None

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._call.close()
        step, self._step = self._step, None
        if step is not None and output is not None:  # None: the call raised
            self._injector.check_call(step)


class WebUI(Host):
    """Keeps the runs; see `hosts.Host`."""

    run_class: type[Run]
    nets: ModuleType  # with its ControlNets

    def __init__(self) -> None:
        self.running: list[Run] = []
        self.loader = Loader(self.nets.build)

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {"cfg_denoiser": self._before_step, "cfg_denoised": self._after_step, "script_unloaded": self.stop}

    def _before_step(self, params: Any) -> None:
        for run in self.running:
            run.before_step(params)

    def _after_step(self, params: Any) -> None:
        for run in self.running:
            run.close()

    def start(self, p: Any, plan: Plan) -> Run:
        """Adds a run for `p`: its denoiser calls inject from the next step on."""
        self.stop()
        run = self.run_class(self, p, plan)
        self.running.append(run)
        return run

    def before_sampling(self, p: Any, plan: Plan | None = None) -> None:
        if plan is not None and not any(run.p is p for run in self.running):
            self.start(p, plan)
        for run in self.running:
            run.patch(p)

    @contextmanager
    def sampling(self, p: Any, plan: Plan) -> Iterator[None]:
        run = self.start(p, plan)
        try:
            run.begin()
            run.is_sampling = True
            yield
            run.check()
        finally:
            run.is_sampling = False
            self.stop()

    def stop(self) -> None:
        while self.running and not self.running[-1].is_sampling:
            self.running.pop().end()


def add_callback(event: str, callback: Callable, filename: str = __file__) -> None:
    """Registers a script callback, for "cfg_denoiser" or another event.

    Does the same as the host's `on_<event>`, but passes the file name. The host would search the call stack for it,
    which takes 0.04 s in A1111 and 0.15 s in Forge each time, more than the rest of this extension's start.
    """
    from modules import script_callbacks

    listed, add = script_callbacks.callback_map[f"callbacks_{event}"], script_callbacks.add_callback
    if "filename" in inspect.signature(add).parameters:  # A1111 from 1.9 on, Forge
        add(listed, callback, filename=filename, category=event)
    else:
        listed.append(script_callbacks.ScriptCallback(filename, callback))
