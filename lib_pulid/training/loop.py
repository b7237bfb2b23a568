"""Runs a training that can be interrupted: its arguments, the loop, its checkpoints, its log."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid import disk
from lib_pulid.training.muon import optimizers


def arguments(
    doc: str, *, steps: int, batch: int, rate: float | None = None, people: int = 3000
) -> argparse.ArgumentParser:
    """Returns a parser of the arguments that all trainings have, with these defaults. doc: of the script."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".training"))
    parser.add_argument("--people", type=int, default=people, help="of the drawn data set")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    if rate is not None:
        parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--minutes", type=float, help="stop after so long, with a checkpoint to resume from")
    return parser


def report(folder: Path, figures: Mapping[str, Any]) -> None:
    """Prints the figures of a trained network, and keeps them in the folder of its run."""
    text = json.dumps(figures, indent=1)
    print(text)
    disk.write(folder / "figures.json", text.encode(), replace=True)


@dataclass
class Run:
    """One training run in a folder: `state.pt` to resume from, `log.jsonl` to look at.

    Args:
        module: what is trained; its parameters that require gradients.
        steps: how many steps the whole run has; the learning rate ends at a twentieth of `rate`, along a cosine.
        minutes: stop after so long, with a checkpoint; None: go on to the end.
        decay: of the moving average of the weights, which is what `finish` returns.
    """

    folder: Path
    module: nn.Module
    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.995
    clip: float = 1.0
    minutes: float | None = None
    save_every: float = 120.0  # seconds
    step: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.optimizers = optimizers(self.module, self.rate)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        if self._path.is_file():
            self._resume()

    @property
    def _path(self) -> Path:
        return self.folder / "state.pt"

    def _resume(self) -> None:
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["weights"][name])
            self.average[name].copy_(state["average"][name])
        if len(state.get("optimizers", ())) == len(self.optimizers):
            for optimizer, kept in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(kept)
        self.step = state["step"]

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        part = self._path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._path)

    def train(self, loss_of: Callable[[int], tuple[Tensor, Mapping[str, float]]]) -> None:
        """Runs to the end, or until the minutes are over. loss_of: step -> loss and figures for the log."""
        from tqdm import tqdm

        if self.step >= self.steps:
            print(f"{self.folder} has its {self.step} steps. To train anew, move it away.", file=sys.stderr)
        began = saved = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.folder.name, mininterval=10)
        while self.step < self.steps:
            figures = self._one(loss_of)
            bar.update()
            bar.set_postfix(figures, refresh=False)
            now = time.monotonic()
            if now - saved > self.save_every:
                self._log(figures)
                self.save()
                saved = now
            if self.minutes is not None and now - began > 60 * self.minutes:
                break
        self.save()
        bar.close()

    def _one(self, loss_of: Callable[[int], tuple[Tensor, Mapping[str, float]]]) -> dict[str, float]:
        ahead = min(1.0, (self.step + 1) / self.warmup)
        cosine = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * ahead * cosine
        loss, figures = loss_of(self.step)
        for parameter in self.parameters.values():
            parameter.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        if torch.isfinite(norm):  # a batch that overflows is left out
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        return {"loss": loss.item(), **figures}

    def _log(self, figures: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": self.step, **{name: round(value, 5) for name, value in figures.items()}}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> nn.Module:
        """Returns the module with the averaged weights, in eval mode."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.average[name])
        return self.module.eval()
