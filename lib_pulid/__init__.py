"""PuLID (arXiv 2404.16022) for SDXL and FLUX: images of a person from a single photo.

Imports nothing, so that `import lib_pulid` costs nothing inside a WebUI. See docs/architecture.md.
"""

__version__ = "0.1.0"
