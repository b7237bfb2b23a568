"""Compiles the units of one generation when a model first needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_pulid.boxes import read_box, within
from lib_pulid.disk import stamp
from lib_pulid.errors import SettingError
from lib_pulid.fields import NOT_DRAWN, Number, place, spoken
from lib_pulid.identity import check_fusion, with_uncond
from lib_pulid.injection import Injection
from lib_pulid.methods import usual
from lib_pulid.sites import is_chroma
from lib_pulid.stores.encoders import NOBODY, Listener
from lib_pulid.units import PulidUnit, at_unit
from lib_pulid.webui.control import control_for, left_out
from lib_pulid.webui.dropped import load_photo
from lib_pulid.webui.pictures import region

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lib_pulid.hosts import LoadedModel
    from lib_pulid.identity import Identity
    from lib_pulid.likeness import Recognizer
    from lib_pulid.webui.library import Library
    from lib_pulid.weights import Adapter


@dataclass(frozen=True, eq=False)
class Drawn:
    """A photo that was drawn. name: of its file. photo: uint8 RGB [H, W, 3]."""

    name: str
    photo: np.ndarray


@dataclass
class UnitPlan:
    """Gives the hosts the injections for a denoiser; see `lib_pulid.hosts.Plan`.

    Args:
        units: with their numbers, for messages.
        listener: gets the progress, for the progress line, and notes to show below the image.
        judge: the recognizer that the images' likeness will be measured with, or None.
        people, masks: the compiled units' identities and masks, by unit. drawn: the photos that were drawn,
            for `batch`.
        images: by unit, the images of the batch that get it; without an entry, all. places: of the units in
            prompts, the name of the parameters' entry.
    """

    units: Sequence[tuple[Number, PulidUnit]]
    library: Library
    listener: Listener = NOBODY
    images: Mapping[Number, frozenset[int]] = field(default_factory=dict)
    places: Mapping[Number, str] = field(default_factory=dict)
    judge: Recognizer | None = None
    people: dict[Number, Identity] = field(default_factory=dict)
    drawn: dict[Number, Drawn] = field(default_factory=dict)
    batch: int | None = None
    masks: dict[Number, Tensor] = field(default_factory=dict)
    _is_experiment: bool = False
    _without_net: set[Number] = field(default_factory=set)  # units whose ControlNet is left out
    _known: dict[Any, tuple[Injection, dict[str, str], bool]] = field(default_factory=dict)  # the bool: guided

    def injections(self, model: LoadedModel, *, hires: bool) -> list[Injection]:
        """Returns the injections of this pass, compiled at the first call for a family, device and dtype.

        Raises:
            PulidError: the message begins with unit and field.
        """
        self._experiment(model)
        wanted = [(number, unit) for number, unit in self.units if unit.in_pass(hires)]
        found = []
        for number, (injection, _) in self._compiled(wanted, model).items():
            if number in self.images:
                injection = replace(injection, images=self.images[number])
            found.append(replace(injection, control=None) if number in self._without_net else injection)
        return found

    def has_face(self, *, hires: bool) -> bool:
        """See `lib_pulid.hosts.Plan`."""
        return any(unit.in_pass(hires) and not unit.is_off for _, unit in self.units)

    def of_image(self, index: int) -> tuple[Number, ...]:
        """Returns the units of one image of the batch."""
        return tuple(number for number, _ in self.units if index in self.images.get(number, (index,)))

    def draw(self, draw: Callable[[Number, int, str], Path]) -> bool:
        """Draws the photos of the units that want one. draw: see `Draws.draw`; is given number, rank and how.

        Returns:
            Whether there are any.

        Raises:
            PulidError: there is no photo, or it cannot be read.
        """
        wanted = [(number, unit) for number, unit in self.units if unit.draw != NOT_DRAWN]
        for rank, (number, unit) in enumerate(wanted):
            with at_unit(number, "draw"):
                path = draw(number, rank, unit.draw)
                self.drawn[number] = Drawn(path.name, load_photo(path))
            for key in [key for key in self._known if key[0] == number]:
                del self._known[key]  # of the batch before
        return bool(wanted)

    def prepare(self, model: LoadedModel) -> dict[Number, dict[str, str]]:
        """Compiles all units. Returns, by unit, what the infotext says besides the settings."""
        for number, unit in self.units:
            unit.check_family(model.family, number)
        experiment, compiled = self._experiment(model), self._compiled(self.units, model)
        units = dict(self.units)
        nets = {number: units[number] for number, (injection, _) in compiled.items() if injection.control is not None}
        self._without_net = left_out(nets, self._share, self.listener.warn)
        self._warn_of_mixing()
        return {
            number: facts | experiment | ({"identity_net": "0"} if number in self._without_net else {})
            for number, (_, facts) in compiled.items()
        }

    def _warn_of_mixing(self) -> None:
        """Warns of two people in one place of an image, who become one face: often a photo was left in the panel."""
        everywhere = [(number, unit) for number, unit in self.units if not unit.is_off and number not in self.masks]
        for (one, first), (other, second) in itertools.combinations(everywhere, 2):
            meet = first.start < second.end and second.start < first.end and self._share(one, other)
            if meet and self.people[one].short_hash != self.people[other].short_hash:
                self.listener.warn(
                    f"PuLID: {spoken(one)} and {spoken(other)} have no region, so their faces mix into one. Give each "
                    "a box or a mask, or disable one."
                )

    def _share(self, one: Number, other: Number) -> bool:
        """Whether two units are in one image in one pass."""
        units, images = dict(self.units), [self.images.get(number) for number in (one, other)]
        passes = any(units[one].in_pass(hires) and units[other].in_pass(hires) for hires in (False, True))
        return passes and (None in images or bool(images[0] & images[1]))  # type: ignore[operator]

    def _experiment(self, model: LoadedModel) -> dict[str, str]:
        """Returns the infotext entry of a model that PuLID was not trained for; warns once."""
        if not is_chroma(model.denoiser):
            return {}
        if not self._is_experiment:
            self._is_experiment = True
            self.listener.warn("PuLID was not trained for Chroma. This is an experiment with the PuLID file for FLUX.")
        return {"experiment": "Chroma"}

    def check_steps(self, model: LoadedModel, steps: int, *, hires: bool) -> None:
        """See `lib_pulid.hosts.Plan`. Skips a second pass that follows a first one with the face."""
        for number, unit in self.units:
            if not unit.in_pass(hires) or (hires and unit.in_pass(False)):
                continue
            unit.check_steps(model.family, steps, number)

    def cfg_start_step(self, model: LoadedModel, *, hires: bool) -> int:
        """Returns the largest value of the units in this pass: there is one for the whole image."""
        if model.family != "flux":
            return 0
        return max(
            (unit.cfg_start_step for _, unit in self.units if unit.in_pass(hires) and unit.weight != 0), default=0
        )

    def _compiled(
        self, units: Sequence[tuple[Number, PulidUnit]], model: LoadedModel
    ) -> dict[Number, tuple[Injection, dict[str, str]]]:
        keys = {number: (number, model.family, str(model.device), model.dtype) for number, _ in units}
        missing = [(number, unit) for number, unit in units if not self._is_known(keys[number], model)]
        try:
            for number, unit in missing:
                self._known[keys[number]] = *self._compile(number, unit, model), model.guided
        finally:
            if missing:
                self.listener.tell("")
                self.library.encoders.release()
        return {number: self._known[key][:2] for number, key in keys.items()}

    def _is_known(self, key: Any, model: LoadedModel) -> bool:
        known = self._known.get(key)
        return known is not None and known[2] >= model.guided

    def _compile(self, number: Number, unit: PulidUnit, model: LoadedModel) -> tuple[Injection, dict[str, str]]:
        self.listener.tell(f"PuLID: loading the model for {spoken(number)}")
        identity, adapter = self._identity(number, unit, model.family)
        unit = unit.on(model.family, adapter.method)
        self.people[number] = identity
        # Without negative rows it takes half the memory.
        identity = with_uncond(identity, adapter) if model.guided else replace(identity, uncond=None)
        mask = _mask(unit, number)
        if mask is not None:
            self.masks[number] = mask
        with at_unit(number, "model"):
            settings = {**unit.settings(adapter.method), "mask": mask, "dtype": model.dtype}
            injection = self.library.compiled.get(adapter, stamp(adapter.path), identity, model.device, **settings)
        control, why_not = control_for(number, unit, adapter.method, identity, model, self.library, self.listener.warn)
        facts = {"hash": identity.short_hash, "file": adapter.path.name, "weights": adapter.fingerprint[:10]}
        if control is not None:
            injection = replace(injection, control=control)
            facts["net"] = control.path.name
        elif adapter.method.control:
            facts |= {"identity_net": "0"} | ({"left out": why_not} if why_not else {})
        if adapter.method.name != usual(model.family).name:
            facts["method"] = adapter.method.label
        if number in self.drawn:
            facts["photo"] = self.drawn[number].name
        return injection, facts

    def _identity(self, number: Number, unit: PulidUnit, family: str) -> tuple[Identity, Adapter]:
        if unit.identity:
            with at_unit(number, "identity"):
                identity = self.library.identities.load_for(self.judge, unit.identity)
            with at_unit(number, "model"):
                encoder, made_for = (identity.info.get(key, "") for key in ("encoder", "adapter"))
                adapter = self.library.adapters.load(unit.model, family, encoder, made_for)
            unit.check_method(adapter.method, number)
            return identity, adapter
        drawn = self.drawn.get(number)
        if not unit.images and drawn is None:
            raise SettingError(place(number, "images") + "add a photo, choose a saved identity, or disable this unit.")
        with at_unit(number, "model"):
            adapter = self.library.adapters.load(unit.model, family)
        unit.check_method(adapter.method, number)
        with at_unit(number, "fusion"):
            check_fusion(unit.fusion, adapter, len(unit.images))
        with at_unit(number, "draw", drawn.name) if drawn else at_unit(number, "images"):
            given = [self.library.photos.read(image, f"photo {i}") for i, image in enumerate(unit.images, 1)]
            photos = [drawn.photo] if drawn else given
            listener = Listener(
                lambda text: self.listener.tell(f"PuLID: {spoken(number)}, {text}"),
                lambda text: self.listener.warn(f"PuLID {spoken(number)}: {text}"),
                self.listener.stop,
            )
            encode = self.library.encoders.encode
            return encode(photos, adapter, unit.choice, unit.fusion, self.judge, listener), adapter


def _mask(unit: PulidUnit, number: Number) -> Tensor | None:
    """Returns where the unit's face may appear, [H, W] float32; None: everywhere."""
    with at_unit(number, "mask"):
        mask = region(unit.mask, "the mask") if unit.mask else None
    if not unit.box:
        return mask
    try:
        return within(mask, read_box(unit.box))
    except ValueError as error:
        raise SettingError(place(number, "box") + str(error)) from error
