"""Blends several saved identities into one person, with a share for each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lib_pulid import __version__
from lib_pulid.errors import IdentityMismatchError, SettingError
from lib_pulid.identity import FUSIONS, Identity
from lib_pulid.likeness import mean_embedding

MOST = 10  # people in one blend
_V1 = re.compile(r"^PuLID v1 for ")  # an adapter's label; the only version with "id_mix"


def blend(people: Sequence[tuple[str, Identity, float]]) -> Identity:
    """Blends identities, in the way of their PuLID version.

    v1: the official "ID mix" (`app.py`, 1aa2fc7) keeps all tokens of all people. Equal shares are exactly that. For
    others, the people's blocks of tokens stay, and a block of someone whose share is smaller becomes a mean with those
    whose share is larger, so that everybody has their share of all tokens.
    v1.1 and FLUX have no ID mix: their tokens are answers to the same learned queries, and the mean by share is taken.

    Args:
        people: name, identity and share of each; shares are relative, 7 and 3 are 0.7 and 0.3.

    Returns:
        Its info says "blend": "anna 0.7, ben 0.3". The thumbnail is the mean of the aligned faces, if all have one of
        the same size; the embeddings are the means of those that all have.

    Raises:
        SettingError: a share is wrong, or the people are too few, too many or twice there.
        IdentityMismatchError: they were made by different PuLID files, or have different numbers of tokens.
    """
    shares = _checked(people)
    identities = [identity for _, identity, _ in people]
    is_v1 = bool(_V1.match(identities[0].info.get("adapter", "")))
    slots = _slots(shares) if is_v1 else [shares]
    same_size = len({identity.cond.shape for identity in identities}) == 1
    if not same_size and not (is_v1 and len(set(shares)) == 1):
        sizes = ", ".join(f"{name} {identity.cond.shape[1]}" for name, identity, _ in people)
        raise IdentityMismatchError(
            f"These people have different numbers of tokens ({sizes}), as they were made from different numbers of "
            "photos. Use the same number for each, or equal shares (PuLID v1)."
        )
    conds, unconds = [one.cond for one in identities], [one.uncond for one in identities if one.uncond is not None]
    cond, uncond = _mixed(conds, slots), _mixed(unconds, slots) if len(unconds) == len(conds) else None
    keys = set.intersection(*(set(identity.embeddings) for identity in identities))
    embeddings = {key: mean_embedding([one.embeddings[key] for one in identities], shares) for key in keys}
    info = {name: identities[0].info[name] for name in ("adapter", "encoder")}
    info |= {
        "fusion": FUSIONS[1] if is_v1 else FUSIONS[2],
        "photos": str(len(people)),
        "made_by": f"sd-webui-pulid {__version__}",
    }
    info["blend"] = ", ".join(f"{name} {share:.3g}" for (name, _, _), share in zip(people, shares))
    return Identity(cond, uncond, info, _face(identities, shares), embeddings)


def _face(identities: Sequence[Identity], shares: Sequence[float]) -> np.ndarray | None:
    faces = [one.thumbnail for one in identities if one.thumbnail is not None]
    if len(faces) < len(identities) or len({face.shape for face in faces}) > 1:
        return None
    return np.average(faces, axis=0, weights=shares).round().astype(np.uint8)


def read_share(text: str) -> tuple[str, float]:
    """Reads "anna:0.7"; without a share it is 1. Raises: SettingError: the share is not a number above 0."""
    name, colon, share = text.rpartition(":")
    if not colon:
        return _named(text), 1.0
    try:
        return _named(name), check_share(float(share), name.strip())
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(
            f"{text.strip()}: {share.strip()} is not a number. Write NAME:SHARE, as in anna:0.7."
        ) from None


def check_share(share: object, name: str) -> float:
    """Returns a share as a number. Raises: SettingError: it is not a finite number above 0."""
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not 0 < share <= 1e6 or not math.isfinite(share):  # type: ignore[operator,arg-type]
        raise SettingError(f"The share of {name} has to be a number above 0, as in 0.7; leave out who has none.")
    return float(share)  # type: ignore[arg-type]


def _named(name: str) -> str:
    if not name.strip():
        raise SettingError("A share needs a name: write NAME:SHARE, as in anna:0.7.")
    return name.strip()


def _checked(people: Sequence[tuple[str, Identity, float]]) -> list[float]:
    """Returns the shares, whose sum is 1."""
    if not 2 <= len(people) <= MOST:
        raise SettingError(f"{len(people)} people cannot be blended; name 2 to {MOST} saved identities.")
    for i, (name, identity, share) in enumerate(people):
        check_share(share, name)
        if any(other.short_hash == identity.short_hash for _, other, _ in people[:i]):
            raise SettingError(f"{name} is the same person as another one. Name each only once.")
        _check_origin(people[0][0], people[0][1], name, identity)
    total = sum(share for _, _, share in people)
    return [share / total for _, _, share in people]


def _check_origin(first: str, one: Identity, name: str, other: Identity) -> None:
    made = [identity.info.get("adapter", "") for identity in (one, other)]
    for who, identity in ((first, one), (name, other)):
        if not identity.info.get("encoder"):
            raise IdentityMismatchError(
                f"{who} does not say which PuLID file made it (another program's file), so it cannot be blended. Save "
                "the person again from the photo."
            )
    if made[0] != made[1]:
        raise IdentityMismatchError(
            f"{first} was made with {made[0]}, but {name} with {made[1]}: their tokens mean different things. Save one "
            "of them again from the photo with the other's PuLID file."
        )
    # Either half identifies an encoder, the first by its values and the second in any precision: Adapter.fingerprint.
    ours, theirs = one.info["encoder"], other.info["encoder"]
    if ours[:8] != theirs[:8] and ours[8:] != theirs[8:]:
        raise IdentityMismatchError(
            f"{first} and {name} were made with different files of {made[0]}: their tokens mean different things. Save "
            "one of them again from the photo with the other's PuLID file."
        )


def _slots(shares: Sequence[float]) -> list[list[float]]:
    """Distributes shares over as many equal slots: slot i has as much of person i as fits, the rest is of those who
    have more than a slot. Each slot's weights have the sum 1."""
    size = 1 / len(shares)
    spare = [max(0.0, share - size) for share in shares]
    total = sum(spare)
    slots = []
    for i, share in enumerate(shares):
        missing = max(0.0, size - share)
        weights = [missing / size * (more / total if total else 0.0) for more in spare]
        weights[i] += min(share, size) / size
        slots.append(weights)
    return slots


def _mixed(tokens: Sequence[Tensor], slots: Sequence[Sequence[float]]) -> Tensor:
    """Concatenates, slot by slot, the mean of everybody's tokens [1, N, D] by the slot's weights."""
    return torch.cat([_mean(tokens, weights) for weights in slots], dim=1)


def _mean(tokens: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    used = [(one, weight) for one, weight in zip(tokens, weights) if weight > 1e-9]
    return used[0][0] if len(used) == 1 else sum((weight * one for one, weight in used[1:]), used[0][1] * used[0][0])
