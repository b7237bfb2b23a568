"""The units of one generation, compiled when a model first asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lib_pulid.errors import IdentityMismatchError, PulidError, SettingError
from lib_pulid.fields import AUTO
from lib_pulid.injection import Injection, compile_injection
from lib_pulid.units import PulidUnit, at_unit
from lib_pulid.webui.pictures import photo, region

if TYPE_CHECKING:
    from lib_pulid.hosts import LoadedModel
    from lib_pulid.identity import Identity
    from lib_pulid.webui.library import Library
    from lib_pulid.weights import Adapter


@dataclass
class UnitPlan:
    """What the hosts ask for the injections of a denoiser; see `lib_pulid.hosts.Plan`.

    Args:
        units: with their numbers, for messages. tell: is told what is being done, for the progress line.
    """

    units: Sequence[tuple[int, PulidUnit]]
    library: Library
    tell: Callable[[str], None] = lambda text: None
    _known: dict[Any, tuple[Injection, dict[str, str], bool]] = field(default_factory=dict)  # the bool: guided

    def injections(self, model: LoadedModel, *, hires: bool) -> list[Injection]:
        """Those that act in this pass. Compiled at the first call for a family, device and dtype.

        Raises:
            PulidError: its message begins with the unit and the field at fault.
        """
        wanted = [(number, unit) for number, unit in self.units if unit.in_pass(hires)]
        return [self._unit(number, unit, model)[0] for number, unit in wanted]

    def prepare(self, model: LoadedModel) -> dict[int, dict[str, str]]:
        """Compiles all units and returns, by unit, what to write into the picture's parameters beside the settings."""
        try:
            for number, unit in self.units:
                unit.check_family(model.family, number)
            return {number: self._unit(number, unit, model)[1] for number, unit in self.units}
        finally:
            self.tell("")
            self.library.release()

    def check_steps(self, model: LoadedModel, steps: int, *, hires: bool) -> None:
        """See `lib_pulid.hosts.Plan`. The second pass has few steps and a face already, unless it alone has one."""
        for number, unit in self.units:
            if not unit.in_pass(hires) or (hires and unit.in_pass(False)):
                continue
            injection = self._unit(number, unit, model)[0]
            if injection.weight and not injection.acts_within(steps):
                name = "start_step" if injection.start_step >= steps else "start"
                limits = f"from step {injection.start_step} on and " if injection.start_step else ""
                raise at_unit(number, name, SettingError(
                    f"the face would never act: of the {steps} steps, which count from 0, none lies "
                    f"{limits}between the shares {injection.start:g} and {injection.end:g}."
                ))  # fmt: skip

    def cfg_start_step(self, model: LoadedModel, *, hires: bool) -> int:
        """The largest of the units that act in this pass: it is one and the same for the whole picture."""
        if model.family != "flux":
            return 0
        return max(
            (unit.cfg_start_step for _, unit in self.units if unit.in_pass(hires) and unit.weight != 0), default=0
        )

    def _unit(self, number: int, unit: PulidUnit, model: LoadedModel) -> tuple[Injection, dict[str, str]]:
        key = (number, model.family, str(model.device), model.dtype)
        known = self._known.get(key)
        if known is None or model.guided > known[2]:
            known = self._known[key] = *self._compile(number, unit, model), model.guided
        return known[:2]

    def _compile(self, number: int, unit: PulidUnit, model: LoadedModel) -> tuple[Injection, dict[str, str]]:
        self.tell(f"PuLID: loading the model for unit {number}")
        unit = unit.on(model.family)
        identity, adapter = self._identity(number, unit, model.family)
        if not model.guided:  # half of the memory
            identity = replace(identity, uncond=None)
        with _at(number, "mask"):
            mask = region(unit.mask, "the region") if unit.mask else None
        with _at(number, "model"):
            injection = compile_injection(
                adapter,
                identity,
                weight=unit.weight or 0.0,
                projection=unit.projection,
                num_zero=unit.num_zero,
                start=unit.start,
                end=unit.end,
                start_step=unit.start_step if model.family == "flux" else 0,
                mask=mask,
                device=model.device,
                dtype=model.dtype,
            )
        facts = {"hash": identity.short_hash, "file": adapter.path.name, "weights": adapter.fingerprint[:10]}
        return injection, facts

    def _identity(self, number: int, unit: PulidUnit, family: str) -> tuple[Identity, Adapter]:
        if unit.identity:
            with _at(number, "identity"):
                identity = self.library.saved(unit.identity)
            with _at(number, "model"):
                encoder = identity.info.get("encoder", "") if unit.model == AUTO else ""
                adapter = self.library.adapter(unit.model, family, encoder)
            return identity, adapter
        if not unit.images:
            raise at_unit(number, "images", SettingError("add a photo or choose a saved identity, or switch it off."))
        with _at(number, "model"):
            adapter = self.library.adapter(unit.model, family)
        with _at(number, "images"):
            photos = [photo(image, f"photo {i}") for i, image in enumerate(unit.images, 1)]
            return self.library.encode(
                photos, adapter, unit.choice, unit.fusion, lambda text: self.tell(f"PuLID: unit {number}, {text}")
            ), adapter


class _at:
    """Errors inside are told with unit and field."""

    def __init__(self, number: int, field_name: str) -> None:
        self._place = number, field_name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PulidError):
            name = "identity" if isinstance(error, IdentityMismatchError) else self._place[1]
            raise at_unit(self._place[0], name, error) from error
