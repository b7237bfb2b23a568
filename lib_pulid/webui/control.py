"""Makes what a unit's ControlNet is given, and decides who may have one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from lib_pulid import hosts
from lib_pulid.control import Control
from lib_pulid.errors import IdentityMismatchError, MissingWeightsError, PulidError, SettingError, UnsupportedModelError
from lib_pulid.fields import Number, place, spoken
from lib_pulid.files import control_nets
from lib_pulid.units import PulidUnit

if TYPE_CHECKING:
    from lib_pulid.hosts import LoadedModel
    from lib_pulid.identity import Identity
    from lib_pulid.methods import Method
    from lib_pulid.webui.library import Library

FIELD = "identity_net"


def control_for(
    number: Number,
    unit: PulidUnit,
    method: Method,
    identity: Identity,
    model: LoadedModel,
    library: Library,
    warn: Callable[[str], None],
) -> tuple[Control | None, str]:
    """Makes what the ControlNet of a unit's method is given, None if it does not run; and in a few words, why not.

    A strength that nobody asked for by name is left out, with a note, if something is missing: the method acts without
    its ControlNet, too.

    Args:
        unit: as `PulidUnit.on` resolved it. warn: is called with the note.

    Raises:
        PulidError: the strength was given by name, and something is missing; or the file is another one.
    """
    if not unit.identity_net:
        return None, ""
    try:
        return _made(unit.identity_net, method, identity, model, library), ""
    except PulidError as error:
        is_of_host = isinstance(error, UnsupportedModelError)  # nothing that the user could bring
        is_missing = isinstance(error, (MissingWeightsError, IdentityMismatchError))
        if not is_of_host and (FIELD in unit.given or not is_missing):
            raise type(error)(place(number, FIELD) + str(error)) from error
        reason = error
    warn(
        f"PuLID {spoken(number)}: {reason} Only the other half of {method.name} acts, which keeps less of the face and "
        f"nothing of its pose. To hide this note, set {FIELD} to 0."
    )
    return None, str(reason).partition("\n")[0].rstrip(":.")


def _made(weight: float, method: Method, identity: Identity, model: LoadedModel, library: Library) -> Control:
    file = control_nets.file_of(method.control)
    if why_not := hosts.current().why_no_control_nets():
        raise UnsupportedModelError(f"{file.purpose} does not run in this WebUI; {why_not}")
    if identity.pose is None:
        raise IdentityMismatchError(
            f"{file.purpose} needs to know where the face is, which this saved identity does not tell. Make it again "
            "from the photo."
        )
    folder, width = library.folder, identity.cond.shape[-1]
    path = control_nets.require(method.control, folder.path, folder.models_dir, width, folder.fingerprint)
    return Control(path, identity.rows.to(model.device, model.dtype), identity.pose, weight)


def left_out(
    controlled: Mapping[Number, PulidUnit], share: Callable[[Number, Number], bool], warn: Callable[[str], None]
) -> set[Number]:
    """Returns the units whose ControlNet may not run: it acts on the whole image, so an image has one person's.

    Args:
        controlled: the units with a ControlNet. share: whether two units are in one image. warn: is called with a note.

    Raises:
        SettingError: more than one unit of an image asked for it by name.
    """
    clashing = [one for one in controlled if _others(one, controlled, share)]
    asked = [one for one in clashing if FIELD in controlled[one].given]
    for one in asked:
        if others := _others(one, asked, share):
            raise SettingError(
                f"{place(one, FIELD)}an image can follow the pose of one person only, and {spoken(others[0])} has a "
                "strength, too. Set it to 0 for all but one."
            )
    out = [one for one in clashing if one not in asked]
    if out:
        warn(
            "PuLID: an image can follow the pose of one person only, so the ControlNet was left out for "
            f"{' and '.join(map(spoken, out))}. Set {FIELD} to 0 for all but one."
        )
    return set(out)


def _others(one: Number, units: Iterable[Number], share: Callable[[Number, Number], bool]) -> list[Number]:
    return [other for other in units if other != one and share(one, other)]
