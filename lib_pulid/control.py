"""Defines Control: what a method's ControlNet is given of one face, and how its residuals are weighted.

The ControlNet (InstantID's IdentityNet) reads the face's tokens instead of the text, and the face's five points as
its image. Official: `__call__` and `draw_kps` in `pipeline_stable_diffusion_xl_instantid.py`, and `resize_img` in
`infer.py` (instantX-research/InstantID, 2145b67f).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.errors import SettingError

MOST_WEIGHT = 2.0
LATENT_CHANNELS = 4  # of SDXL; the input of inpainting and editing UNets has more after them
LATENT_PIXEL = 8  # pixels of the image
# Eye on the image's left, eye on its right, nose, corners of the mouth on the left and right; RGB.
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2
HALF_WIDTH, RADIUS = 4, 10  # pixels, of a limb and of a point, whatever the image's size
LIMB_BRIGHTNESS = 0.6
# The official code resizes a photo before it draws: first to this short side, then to this long side, and both sides
# are rounded down to a multiple.
SHORT_SIDE, LONG_SIDE, MULTIPLE = 1024, 1280, 64
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Pose:
    """Where a face is in its photo, and how it is turned.

    landmarks: [5, 2] float32, x y in pixels, as in `faces.Detection`. photo: width and height in pixels.
    """

    landmarks: np.ndarray
    photo: tuple[int, int]

    def drawn(self, size: tuple[int, int], part: tuple[float, float, float, float] = WHOLE) -> np.ndarray:
        """Draws the points for an image that the photo covers, centered.

        They are drawn on the photo at the official size, and then resized. With an image of that size, the result
        equals the official one.

        Args:
            size: width and height of what is returned.
            part: left, top, right and bottom of the part of the image that is wanted, as fractions of its width and
                height; beyond 0..1 there is black.

        Returns:
            uint8 RGB [height, width, 3].
        """
        from PIL import Image, ImageOps

        sheet = _official_size(self.photo)
        scale = np.divide(sheet, self.photo)
        points = Image.fromarray(draw_points(np.asarray(self.landmarks, dtype=np.float64) * scale, sheet))
        x0, y0, x1, y1 = _covered(sheet, size, part)
        margin = math.ceil(max(0.0, -x0, -y0, x1 - sheet[0], y1 - sheet[1]))
        box = x0 + margin, y0 + margin, x1 + margin, y1 + margin
        return np.array(ImageOps.expand(points, margin).resize(size, Image.Resampling.LANCZOS, box=box))


def _official_size(photo: tuple[int, int]) -> tuple[int, int]:
    """Returns the width and height to which the official code resizes a photo."""
    sides = [round(SHORT_SIDE / min(photo) * side) for side in photo]
    width, height = (max(1, round(LONG_SIDE / max(sides) * side) // MULTIPLE) * MULTIPLE for side in sides)
    return width, height


def _covered(
    sheet: tuple[int, int], size: tuple[int, int], part: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Returns the box of a sheet that is a part, of this size, of an image that the sheet covers, centered."""
    left, top, right, bottom = part
    whole = size[0] / (right - left), size[1] / (bottom - top)
    scale = min(sheet[0] / whole[0], sheet[1] / whole[1])
    x0, y0 = ((sheet[axis] - whole[axis] * scale) / 2 for axis in (0, 1))
    width, height = whole[0] * scale, whole[1] * scale
    return x0 + left * width, y0 + top * height, x0 + right * width, y0 + bottom * height


def draw_points(landmarks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draws a face's five landmarks as IdentityNet was trained to see them.

    Args:
        landmarks: [5, 2], x y in pixels of the image, in the order of `faces.Detection`.
        size: width and height of the image.

    Returns:
        uint8 RGB [height, width, 3]: a limb from each point to the nose in the point's dimmed color, then the points.

    Raises:
        SettingError: these are not five finite points.
    """
    import cv2

    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise SettingError(f"landmarks have shape {list(points.shape)}; five points x y are needed")
    image = np.zeros((size[1], size[0], 3))
    nose_x, nose_y = points[NOSE]
    for i, (x, y) in enumerate(points):
        if i == NOSE:
            continue
        center = int((x + nose_x) / 2), int((y + nose_y) / 2)
        half_length = int(math.hypot(x - nose_x, y - nose_y) / 2)
        angle = int(math.degrees(math.atan2(y - nose_y, x - nose_x)))
        limb = np.array(cv2.ellipse2Poly(center, (half_length, HALF_WIDTH), angle, 0, 360, 1))
        cv2.fillConvexPoly(image, limb, COLORS[i])
    image = (image * LIMB_BRIGHTNESS).astype(np.uint8)
    for (x, y), color in zip(points, COLORS):
        cv2.circle(image, (int(x), int(y)), RADIUS, color, -1)
    return image


# ---------------------------------------------------------------- what the ControlNet is given


@dataclass(frozen=True, eq=False)
class Control:
    """One face for a ControlNet.

    Args:
        path: of the ControlNet's file.
        tokens: [R, N, D], see `Identity.rows`, on the device and in the dtype of the ControlNet's computation.
        pose: gives the image that the ControlNet sees.
        weight: the official controlnet_conditioning_scale, above 0.
        part: of the image, that is denoised; see `Pose.drawn`.
    """

    path: Path
    tokens: Tensor
    pose: Pose
    weight: float
    part: tuple[float, float, float, float] = WHOLE

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def image(self, height: int, width: int) -> Tensor:
        """Draws the face's points, [1, 3, height, width] float32 RGB, 0..1."""
        drawn = self.pose.drawn((width, height), self.part)
        return torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 255

    def context(self, rows: Sequence[int | None]) -> Tensor:
        """Returns the tokens of each row, [B, N, D]. rows: see `injection.identity_rows`."""
        return self.tokens[[row or 0 for row in rows]]


def weighted(residuals: Sequence[Tensor], rows: Sequence[int | None], mask: Tensor | None) -> list[Tensor]:
    """Leaves a ControlNet's residuals [B, C, h, w] only in the rows and the region of a face.

    Args:
        rows: see `injection.identity_rows`. mask: [H, W], 0..1; None: everywhere.
    """
    if mask is None and None not in rows:
        return list(residuals)
    found = []
    for residual in residuals:
        own = torch.tensor([row is not None for row in rows]).to(residual)[:, None, None, None]
        area = 1 if mask is None else F.interpolate(mask[None, None].to(residual), residual.shape[-2:], mode="area")
        found.append(residual * (own * area))
    return found
