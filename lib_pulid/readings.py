"""Reads off a photo what an identity encoder is given: a Face, and an image encoder's view, become FaceFeatures.

PuLID: official `get_id_embedding` in `pulid/pipeline.py`, `pipeline_v1_1.py`, `pipeline_flux.py` (commit 1aa2fc7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_pulid.methods import Method

if TYPE_CHECKING:
    import numpy as np

    from lib_pulid.clip_vision import ClipVision
    from lib_pulid.faces import Face
    from lib_pulid.vision import VisionTower

VISION_BATCH = 4  # faces; each needs about 50 MB while the tower runs


@dataclass(frozen=True, eq=False)
class FaceFeatures:
    """What was read off one photo: of each method's inputs those that it needs.

    Args:
        id_cond: [1, 1280], ArcFace (512, raw) and the vision tower's class token (768, L2-normalized); [1, n, 1280]
            for n photos of one person.
        vit_hidden: five tensors [1, 577, 1024] ([1, n * 577, 1024]).
        embedding: [1, 512], the face recognizer's raw output.
        image: [1, P], CLIP's image embedding, not normalized.
        patches, no_patches: [1, 257, W], the input of CLIP's last block; and that for pixels which are all 0 after
            their normalization.
    """

    id_cond: Tensor | None = None
    vit_hidden: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    image: Tensor | None = None
    patches: Tensor | None = None
    no_patches: Tensor | None = None

    @property
    def unit_embedding(self) -> Tensor:
        """[1, 512], the face embedding, L2-normalized (insightface's normed_embedding)."""
        assert self.embedding is not None
        return self.embedding / self.embedding.norm(dim=-1, keepdim=True)

    def inputs(self, method: Method) -> list[Any]:
        """Returns the arguments of the method's encoder."""
        return [getattr(self, name) for name in method.inputs]

    def nobody(self, method: Method) -> list[Any]:
        """Returns the arguments that stand for no photo at all: one photo's shapes, all zeros, but for CLIP's patches,
        which are those of an image of zeros."""
        return [_nobody(name, getattr(self, name), self) for name in method.inputs]

    def to(self, device: torch.device) -> FaceFeatures:
        return FaceFeatures(**{field.name: _each(getattr(self, field.name), device) for field in fields(self)})


def _each(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(tensor.to(device) for tensor in value)
    return None if value is None else value.to(device)


def _nobody(name: str, value: Any, features: FaceFeatures) -> Any:
    if name == "patches":
        return features.no_patches
    if name == "id_cond":
        return torch.zeros_like(value.flatten(0, -2)[:1])
    if name == "vit_hidden":
        photos = features.id_cond.flatten(0, -2).shape[0]  # type: ignore[union-attr]
        return [torch.zeros_like(hidden[:, : hidden.shape[1] // photos]) for hidden in value]
    return torch.zeros_like(value)


def together(photos: Sequence[FaceFeatures]) -> FaceFeatures:
    """Stacks n photos of one person for PuLID's encoder: id_cond [1, n, 1280], hidden states [1, n * 577, 1024]."""
    id_cond = torch.stack([photo.id_cond for photo in photos], dim=1)  # type: ignore[misc]
    return FaceFeatures(id_cond, tuple(torch.cat(scale, dim=1) for scale in zip(*(p.vit_hidden for p in photos))))


@torch.no_grad()
def read_features(
    photos: Sequence[np.ndarray], faces: Sequence[Face], method: Method, vision: VisionTower | ClipVision | None
) -> list[FaceFeatures]:
    """Reads what a method needs off photos of a person.

    Args:
        photos: uint8 RGB [H, W, 3]. faces: read off them; none if the method sees no faces.
        vision: the method's image encoder; None if it has none.
    """
    if "id_cond" in method.inputs:
        return face_features(faces, vision)  # type: ignore[arg-type]
    found = []
    for i, photo in enumerate(photos):
        values: dict[str, Any] = (
            {} if vision is None else _seen(_view(photo, faces[i] if faces else None, method), method, vision)
        )
        if faces and len(faces[i].embedding):
            values["embedding"] = torch.from_numpy(faces[i].embedding)[None]
        found.append(FaceFeatures(**values))
    return found


def _view(photo: np.ndarray, face: Face | None, method: Method) -> np.ndarray:
    """Returns what the image encoder sees of a photo, uint8 [H, W, 3]."""
    if method.view == "photo" or face is None:
        return photo
    if method.view == "face":
        return face.aligned  # the official code leaves the cropping to the user
    from insightface.utils.face_align import norm_crop

    # Blue first: the official example hands OpenCV's crop to CLIP as it is (README of h94/IP-Adapter-FaceID).
    return norm_crop(face.photo_bgr, face.detection.landmarks, image_size=224)


def _seen(image: np.ndarray, method: Method, vision: Any) -> dict[str, Tensor]:
    from lib_pulid.clip_vision import clip_input

    pixels = clip_input(image).to(next(vision.parameters()).device)
    if "image" in method.inputs:
        return {"image": vision(pixels, pooled=True)}
    patches = [vision(seen, pooled=False) for seen in (pixels, torch.zeros_like(pixels))]
    return {"patches": patches[0], "no_patches": patches[1]}


@torch.no_grad()
def face_features(faces: Sequence[Face], tower: VisionTower) -> list[FaceFeatures]:
    """Runs PuLID's vision tower on faces, VISION_BATCH at once, on the tower's device."""
    from lib_pulid.faces import vision_input

    device, found = next(tower.parameters()).device, []
    for first in range(0, len(faces), VISION_BATCH):
        some = faces[first : first + VISION_BATCH]
        class_tokens, hidden = tower(torch.cat([vision_input(_parsed(face)) for face in some]).to(device))
        for i, face in enumerate(some):
            arcface, class_token = torch.from_numpy(face.embedding).to(device)[None], class_tokens[i : i + 1]
            id_cond = torch.cat((arcface, class_token / class_token.norm(dim=1, keepdim=True)), dim=1)
            found.append(FaceFeatures(id_cond, tuple(scale[i : i + 1] for scale in hidden)))
    return found


def _parsed(face: Face) -> Tensor:
    assert face.features is not None, "PuLID needs a face parser"
    return face.features
