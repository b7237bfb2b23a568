"""Generates an image of a person through the WebUI's API. Needs Python 3.10 and nothing else.

    python docs/examples/api.py photo.jpg "portrait of a sailor, oil painting" -o sailor.png

Start the WebUI with --api.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def request_body(photos: list[bytes], prompt: str, **settings: Any) -> dict[str, Any]:
    """Builds the body of /sdapi/v1/txt2img. settings: of one person, see docs/usage.md."""
    person = {"images": [base64.b64encode(photo).decode() for photo in photos], **settings}
    return {
        "prompt": prompt,
        "negative_prompt": "blurry, low quality",
        "steps": 25,
        "cfg_scale": 7,  # FLUX: 1
        "width": 1024,
        "height": 1024,
        "seed": 42,
        "alwayson_scripts": {"PuLID": {"args": [person]}},  # one dict per person
    }


def generate(url: str, body: dict[str, Any]) -> bytes:
    """Posts the request. Returns the image as PNG. Exits with the WebUI's message if it answers with an error."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/sdapi/v1/txt2img", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return base64.b64decode(json.load(answer)["images"][0])
    except urllib.error.HTTPError as error:  # a wrong field, no face in the photo, a missing file ...
        sys.exit(f"{error.code}: {json.load(error).get('detail')}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates an image of a person through the WebUI's API.")
    parser.add_argument("photo", type=Path, nargs="+", help="one or several photos of one person, the best one first")
    parser.add_argument("prompt")
    parser.add_argument("--weight", type=float, help="likeness strength (default: 0.8 on SDXL, 1 on FLUX)")
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("-o", "--out", type=Path, default=Path("person.png"))
    arguments = parser.parse_args()
    body = request_body([path.read_bytes() for path in arguments.photo], arguments.prompt, weight=arguments.weight)
    arguments.out.write_bytes(generate(arguments.url, body))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
