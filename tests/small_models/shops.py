"""The miniature, opened for many images: quiet, and its encoders loaded once."""

from __future__ import annotations

from pathlib import Path

from lib_pulid.standalone import Workshop, keeping, open_workshop


def miniature_shop(model: str, models_dir: Path) -> Workshop:
    """model: a name in `miniature.MODELS`."""
    made = keeping(open_workshop(model, models_dir))
    made.base.pipeline.set_progress_bar_config(disable=True)
    return made
