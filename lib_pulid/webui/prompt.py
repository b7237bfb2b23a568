"""Turns the `<pulid:...>` tags of a batch's prompts into units, beside those of the accordion.

The hosts read extra networks from a batch's first prompt only. A face is of one image, so here each image's own prompt
counts, and that of the second pass for the second pass: by default the hosts use the same prompt for both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from lib_pulid.errors import SettingError
from lib_pulid.fields import MOST_UNITS, Number, place
from lib_pulid.tags import find_tags, parse_tag
from lib_pulid.units import PulidUnit, at_unit, parse_args, unit_of
from lib_pulid.webui import infotext

if TYPE_CHECKING:
    from lib_pulid.webui.library import Library
    from lib_pulid.webui.plan import UnitPlan
    from lib_pulid.webui.presets import Presets

_UNFINISHED = re.compile(r"[{}|$]|__")  # what wildcard extensions will replace

Texts = tuple[tuple[str, ...], ...]  # by image, its tags


@dataclass(frozen=True)
class Tags:
    """The tags of a batch. first: of the prompts. second: of the prompts for hires fix; the same without it."""

    first: Texts = ()
    second: Texts = ()

    def __bool__(self) -> bool:
        return any(self.first) or any(self.second)

    @property
    def is_final(self) -> bool:
        """Whether nothing in them looks like a wildcard that another extension has yet to replace."""
        return not any(_UNFINISHED.search(text) for image in (*self.first, *self.second) for text in image)


@dataclass(frozen=True)
class Asked:
    """The units of a batch.

    Args:
        units: with what messages call them. images: of the batch, by unit; without an entry, all. places: of the units
            in prompts, by unit: the name of the parameters' entry.
    """

    units: Sequence[tuple[Number, PulidUnit]] = ()
    images: Mapping[Number, frozenset[int]] = field(default_factory=dict)
    places: Mapping[Number, str] = field(default_factory=dict)


def tags_of(p: Any, batch: int | None = None) -> Tags:
    """Returns the tags of one batch of `p`, the host's StableDiffusionProcessing.

    batch: its number, from 0. None: the current one, whose first prompts the host has read already. Where those have
    other tags than `all_prompts`, an extension has changed them just before, and they count for all images.

    Raises:
        SettingError: a tag is not complete.
    """
    if getattr(p, "disable_extra_networks", False):
        return Tags()
    first = _of_batch(p, "all_prompts", batch, "extra_network_data")
    if not getattr(p, "enable_hr", False) or getattr(p, "all_hr_prompts", None) is None:
        return Tags(first, first)
    return Tags(first, _of_batch(p, "all_hr_prompts", batch, "hr_extra_network_data"))


def _texts_of(network: Mapping[str, Sequence[Any]]) -> list[str]:
    """Returns our tags in what the host has read from a prompt: lists of ExtraNetworkParams by name."""
    return [
        ":".join(map(str, params.items)) for name, some in network.items() if name.lower() == "pulid" for params in some
    ]


def _of_batch(p: Any, prompts: str, batch: int | None, network: str) -> Texts:
    """prompts, network: names of attributes of `p`."""
    size, number = getattr(p, "batch_size", 1), getattr(p, "iteration", 0) if batch is None else batch
    some = list(getattr(p, prompts, None) or ())[number * size : (number + 1) * size]
    found = tuple(find_tags(prompt) for prompt in some)
    read = getattr(p, network, None) if batch is None else None
    if read is None or sorted(_texts_of(read)) == sorted(found[0] if found else ()):
        return found
    return (tuple(_texts_of(read)),) * max(1, len(found))


@dataclass(frozen=True)
class Request:
    """What a generation asks for besides its prompts.

    Args:
        owner: `id` of its StableDiffusionProcessing, which other extensions copy with all it has.
        args: of the script; None where it is not among the generation's. changes: see `units.parse_args`.
    """

    owner: int = 0
    args: Sequence[Any] | None = None
    changes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def is_of(self, p: Any) -> bool:
        return self.owner == id(p)

    def asked(self, tags: Tags, presets: Presets) -> Asked:
        """Returns the units of the script's arguments and of the tags.

        Raises:
            SettingError.
        """
        args = None if self.args is None else presets.expand_args(self.args)
        changes = {number: presets.expand(values, number) for number, values in self.changes.items()}
        units: list[tuple[Number, PulidUnit]] = list(parse_args(args or (), changes))
        images: dict[Number, frozenset[int]] = {}
        places: dict[Number, str] = {}
        for one in _distinct(tags):
            tag = parse_tag(one.text, one.number)
            base = _base(args, changes, tag.unit, one.number) if tag.unit else PulidUnit()
            preset = {"preset": tag.preset} if tag.preset else {}
            values = {"enabled": True, "identity": tag.name, **tag.values, **preset}
            unit = one.in_its_pass(base.changed(presets.expand(values, one.number), one.number))
            if not unit.enabled:
                continue
            units.append((one.number, unit))
            places[one.number] = one.place
            if len(one.images) < one.count:
                images[one.number] = one.images
        for image in range(len(tags.first)):
            count = sum(image in images.get(number, (image,)) for number, _ in units)
            if count > MOST_UNITS:
                raise SettingError(f"PuLID: {count} people are too many for one image; use {MOST_UNITS} at most.")
        return Asked(units, images, places)


def _base(
    args: Sequence[Any] | None, changes: Mapping[int, Mapping[str, Any]], wanted: int, number: Number
) -> PulidUnit:
    if args is None:
        raise SettingError(
            place(number, "unit") + "the accordion's units are not known here. In ADetailer, add pulid to its "
            "setting “Script names to apply to ADetailer”, or leave unit out of the tag."
        )
    return unit_of(args, wanted, changes.get(wanted, {}), number)


@dataclass(frozen=True)
class _Distinct:
    """A tag that is the same in some images. passes: "both", "first" or "second". count: of the batch's images."""

    text: str
    index: int
    passes: str
    images: frozenset[int]
    count: int

    @property
    def place(self) -> str:
        return f"hires tag {self.index}" if self.passes == "second" else f"tag {self.index}"

    @property
    def number(self) -> str:
        return self.place if len(self.images) == self.count else f"image {min(self.images) + 1}, {self.place}"

    def in_its_pass(self, unit: PulidUnit) -> PulidUnit:
        """Returns the tag's unit, used in the passes of the tag. Raises: SettingError: it is for another one."""
        if self.passes == "both":
            return unit
        if not unit.in_pass(self.passes == "second"):
            raise SettingError(
                place(self.number, "hires") + f"the tag says {unit.hires}, but the hires prompt is another one, with "
                "tags of its own. Put the tag into the prompt of the pass that it is for."
            )
        return replace(unit, hires=self.passes)


def _distinct(tags: Tags) -> list[_Distinct]:
    """Lists the tags once for all images that have them at the same place; a tag of both passes once for both."""
    images: dict[tuple[str, int, str], set[int]] = {}
    for image, texts in enumerate(zip_longest(tags.first, tags.second, fillvalue=())):
        first, second = (set(enumerate(some, 1)) for some in texts)
        for passes, some in (("both", first & second), ("first", first - second), ("second", second - first)):
            for index, text in some:
                images.setdefault((passes, index, text), set()).add(image)
    count = max(len(tags.first), len(tags.second))
    found = [_Distinct(text, index, passes, frozenset(some), count) for (passes, index, text), some in images.items()]
    return sorted(found, key=lambda one: (one.passes == "second", one.index, min(one.images)))


def check_rest(p: Any, request: Request, library: Library) -> None:
    """Checks the tags of all batches but the first, before any of them is made.

    Raises:
        PulidError.
    """
    seen = {tags_of(p, 0)}
    for batch in range(1, getattr(p, "n_iter", 1)):
        tags = tags_of(p, batch)
        if tags in seen or not tags.is_final:
            continue
        seen.add(tags)
        for number, unit in request.asked(tags, library.presets).units:
            if isinstance(number, str):
                with at_unit(number, "identity"):
                    library.identities.path(unit.identity)


def warn_of_negative(p: Any) -> None:
    """Says below the image that a tag in the negative prompt does nothing: the hosts read none there."""
    prompts = [getattr(p, name, None) or () for name in ("all_negative_prompts", "all_hr_negative_prompts")]
    if any("<pulid:" in text.lower() for some in prompts for text in some):
        p.comment("PuLID: a <pulid:...> tag in the negative prompt does nothing. Put it into the prompt.")


def parameters(asked: Asked | UnitPlan, written: Mapping[Number, str], count: int) -> dict[str, Any]:
    """Returns the entries of the image's parameters. written: what they say of each unit. count: of the images.

    Where the images differ, an entry is a list of their texts, which the hosts take apart.
    """
    entries: dict[str, Any] = {}
    for number, _ in asked.units:
        key = infotext.key(asked.places.get(number, number))
        if number in asked.images:
            entry = entries.setdefault(key, [None] * count)
            for image in asked.images[number]:
                entry[image] = written[number]
        else:
            entries[key] = written[number]
    return entries
