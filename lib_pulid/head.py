"""Finds the head in an image, with hair and neck: what an identity may change."""

from __future__ import annotations

import numpy as np

from lib_pulid.faces import CROP_BORDER_BGR, CROP_LANDMARKS, CROP_SIZE, Parser
from lib_pulid.judge import similarity

NOT_HEAD = (0, 16)  # BiSeNet's background and cloth
# The parser's own crop cuts off long or high hair; a wider crop labels the rest.
ZOOMS = (0.75, 1.0)
MARGIN = 3 / 128  # of the image's long edge, around a head


def head_mask(image: np.ndarray, landmarks: np.ndarray, parser: Parser) -> np.ndarray:
    """Finds the head with hair, neck and a small margin: bool [H, W].

    Args:
        image: uint8 RGB [H, W, 3]. landmarks: of its face, [5, 2] in pixels.
    """
    import cv2

    height, width = image.shape[:2]
    head = np.zeros((height, width), np.uint8)
    crop, border = (CROP_SIZE, CROP_SIZE), CROP_BORDER_BGR[::-1]
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    for zoom in ZOOMS:
        matrix = similarity(landmarks, (CROP_LANDMARKS - CROP_SIZE / 2) * zoom + CROP_SIZE / 2)
        labels = parser.labels(cv2.warpAffine(image, matrix, crop, borderValue=border))
        shown = 1 + (~np.isin(labels, NOT_HEAD)).astype(np.uint8)  # 0 is outside the crop
        back = cv2.warpAffine(shown, matrix, (width, height), flags=flags)
        head[back > 0] = back[back > 0] - 1
    margin = 2 * round(MARGIN * max(height, width)) + 1
    return cv2.dilate(head, np.ones((margin, margin), np.uint8)) > 0
