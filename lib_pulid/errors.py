"""Defines the errors.

The core raises them with a message for the user; the entry points (the command line, the WebUI script) catch
`PulidError` once and show it. Any other exception that escapes is a bug.
"""

from __future__ import annotations

import re


class PulidError(Exception):
    """Base class of all errors whose message is meant for the user."""


class ImageError(PulidError):
    """A photo or mask cannot be read, or is not a usable image."""


class NoFaceError(PulidError):
    """No face was found in a photo, or fewer than the requested number."""


class MissingWeightsError(PulidError):
    """A required file is not on this machine."""


class DownloadError(MissingWeightsError):
    """A file could not be downloaded, or its content is not the expected one."""


class WrongWeightsError(PulidError):
    """A file is not the required one: foreign, truncated, of another family, or unreadable."""


class UnsupportedModelError(PulidError):
    """The adapter was not made for this denoiser."""


class IdentityMismatchError(PulidError):
    """A saved identity does not belong to the adapter, or its file is not an identity."""


class SettingError(PulidError, ValueError):
    """A setting is out of range or unknown."""


class Interrupted(PulidError):
    """The user interrupted the work."""


class StorageError(PulidError, OSError):
    """A file or folder cannot be written."""


class OutOfMemoryError(PulidError):
    """The computer or its GPU ran out of memory."""


# Messages of PyTorch (CUDA, MPS, XPU, DirectML, CPU), ONNX Runtime, cuBLAS and cuDNN; few have a class for it.
_NO_MEMORY = re.compile(
    r"out of memory|not enough (GPU video )?memory|can't allocate memory|failed to allocate memory|ALLOC_FAILED", re.I
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one of its causes, says that memory ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, OutOfMemoryError)) or type(error).__name__ == "OutOfMemoryError":
            return True
        if not isinstance(error, PulidError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False
