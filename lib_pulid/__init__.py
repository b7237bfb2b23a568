"""PuLID (arXiv 2404.16022) for SDXL and FLUX: one photo in, pictures of that person out.

Nothing is imported here, so that `import lib_pulid` costs nothing inside a WebUI.
Where to look: docs/architecture.md.
"""

__version__ = "0.1.0"
