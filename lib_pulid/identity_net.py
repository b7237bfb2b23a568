"""InstantID's second half, as far as it needs no host: the five points that its ControlNet (IdentityNet) is shown.

Official: `draw_kps` in `pipeline_stable_diffusion_xl_instantid.py`, and `resize_img` in `infer.py`
(instantX-research/InstantID, 2145b67f).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lib_pulid.errors import SettingError

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
