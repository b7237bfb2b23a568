"""A1111 and Forge behind one interface, for what holds in both: a batch as the script drives it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lib_pulid import hosts
from tests.fake_modules import a1111, forge
from tests.fake_modules.models import count_hooks, text
from tests.fake_modules.plan import RandomPlan


def texts(pictures: int = 1) -> tuple[Tensor, Tensor]:
    """Prompt and negative prompt."""
    return text(pictures=pictures), text(seed=2, pictures=pictures)


class Kind:
    """A host. P: its StableDiffusionProcessing, of a denoiser and a name."""

    name: str
    P: Any

    def sample(self, p: Any, **how: Any) -> list[Tensor]:
        """The denoiser's outputs of each step."""
        raise NotImplementedError

    def run(self, p: Any, plan: RandomPlan | None = None, **how: Any) -> list[Tensor]:
        if plan is not None:
            hosts.current().start(p, plan)
        try:
            return self.sample(p, **how)
        finally:
            hosts.current().stop()

    def left(self, p: Any) -> int:
        """Hooks, and runs, that are still there."""
        return count_hooks(p.denoiser) + len(hosts.current().running)


class A1111(Kind):
    name, P = "a1111", a1111.P

    def sample(self, p: Any, prompts: Any = None, pictures: int = 1, **how: Any) -> list[Tensor]:
        p.prompts = [""] * pictures
        return a1111.sample(p, *(prompts or texts(pictures)), pictures=pictures, **how)


class Forge(Kind):
    name, P = "forge", forge.P

    def sample(self, p: Any, conds: Any = None, unconds: Any = None, pictures: int = 1, **how: Any) -> list[Tensor]:
        cond, uncond = texts(pictures)
        conds, unconds = conds or [cond], [uncond] if unconds is None else unconds
        return forge.sample(p, conds, unconds, before_sampling=hosts.current().before_sampling, **how)
