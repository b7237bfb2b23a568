"""InstantID's second half, as far as it needs no host: the five points that its ControlNet (IdentityNet) is shown.

Official: `draw_kps` in `pipeline_stable_diffusion_xl_instantid.py` (instantX-research/InstantID, 2145b67f).
"""

from __future__ import annotations

import math

import numpy as np

from lib_pulid.errors import SettingError

# Eye on the image's left, eye on its right, nose, corners of the mouth on the left and right; RGB.
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2
HALF_WIDTH, RADIUS = 4, 10  # pixels, of a limb and of a point, whatever the image's size
LIMB_BRIGHTNESS = 0.6


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


def place_points(landmarks: np.ndarray, photo: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Moves a photo's landmarks [5, 2] into an image that the photo covers, centered. photo, size: width and height.

    With a photo of the image's own size, as in the official code, they stay where they are.
    """
    scale = max(size[0] / photo[0], size[1] / photo[1])
    offset = [(size[axis] - photo[axis] * scale) / 2 for axis in (0, 1)]
    return np.asarray(landmarks, dtype=np.float64) * scale + offset
