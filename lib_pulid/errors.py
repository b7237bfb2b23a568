"""What can go wrong, by name.

The core raises these, with a message written for the person who sees it; the
doors (the command line, the WebUI script) catch `PulidError` once and tell.
Anything else that escapes is a bug.
"""

from __future__ import annotations

import re


class PulidError(Exception):
    """Base of every error whose message is meant for the user."""


class ImageError(PulidError):
    """A photo or mask could not be read, or is not a usable image."""


class NoFaceError(PulidError):
    """No face was found in a photo, or not as many as the choice asked for."""


class MissingWeightsError(PulidError):
    """A file that is needed is not on this machine."""


class DownloadError(MissingWeightsError):
    """A file could not be downloaded, or is not the file that was promised."""


class WrongWeightsError(PulidError):
    """A file is not what was needed: foreign, truncated, of another family, or not readable."""


class UnsupportedModelError(PulidError):
    """The denoiser is not one that the adapter was made for."""


class IdentityMismatchError(PulidError):
    """A saved identity does not belong to the adapter it is used with, or its file is no identity."""


class SettingError(PulidError, ValueError):
    """A setting is out of range or unknown."""


class Interrupted(PulidError):
    """The user wanted no more of it."""


class StorageError(PulidError, OSError):
    """A file or folder cannot be written."""


class OutOfMemoryError(PulidError):
    """The memory of the computer or of its GPU did not suffice."""


# As PyTorch (CUDA, MPS, XPU, DirectML, CPU), ONNX Runtime, cuBLAS and cuDNN say it; few of them have a class for it.
_NO_MEMORY = re.compile(
    r"out of memory|not enough (GPU video )?memory|can't allocate memory|failed to allocate memory|ALLOC_FAILED", re.I
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that did not suffice is what an exception, or what led to it, tells."""
    while error is not None:
        if isinstance(error, (MemoryError, OutOfMemoryError)) or type(error).__name__ == "OutOfMemoryError":
            return True
        if not isinstance(error, PulidError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False
