"""Adds the command line flags, before the WebUI starts."""

from __future__ import annotations

import argparse


def preload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pulid-models-dir",
        type=str,
        default=None,
        metavar="FOLDER",
        help="PuLID's models folder, with pulid, insightface/models/antelopev2 and facexlib in it "
        "(default: the WebUI's models folder)",
    )
