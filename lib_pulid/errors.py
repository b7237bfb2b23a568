"""What can go wrong, by name.

The core raises these, with a message written for the person who sees it; the
doors (the command line, the WebUI script) catch `PulidError` once and tell.
Anything else that escapes is a bug.
"""


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
