"""A detector file for ADetailer, written by the host's own Python, which has ultralytics: `python detector.py TARGET`.

It looks at nothing and finds boxes of one size all over the picture, with one confidence; ADetailer is asked for one.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "boxes.pt"
BINS = 16  # of a side's distribution, in strides
SIDE = 3  # strides from the middle to each side; the picture's larger side has 20
FOUND, NOT_FOUND = 5.0, -20.0  # logits


def write(target: Path) -> None:
    import torch
    from ultralytics import YOLO

    yolo = YOLO("yolov8n.yaml", task="detect")
    head = yolo.model.model[-1]
    with torch.no_grad():
        for level, (sides, kinds) in enumerate(zip(head.cv2, head.cv3)):
            for last in (sides[-1], kinds[-1]):
                last.weight.zero_()
                last.bias.zero_()
            sides[-1].bias.view(4, BINS)[:, SIDE] = -NOT_FOUND
            kinds[-1].bias.fill_(NOT_FOUND)
            if level == len(head.cv3) - 1:
                kinds[-1].bias[0] = FOUND
    target.parent.mkdir(parents=True, exist_ok=True)
    yolo.save(target)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
