"""Command line flags, read before the WebUI starts."""

from __future__ import annotations

import argparse


def preload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pulid-models-dir",
        type=str,
        default=None,
        metavar="FOLDER",
        help="models folder of PuLID, with pulid, insightface/models/antelopev2 and facexlib in it "
        "(default: the WebUI's models folder)",
    )
