"""Photos that were dropped on the page: decoded once, kept on the server, and known to the page by their hashes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_pulid.errors import ImageError
from lib_pulid.fields import FIELDS
from lib_pulid.units import default_args
from lib_pulid.webui import routes
from tests.fake_modules.models import same
from tests.light_webui import PHOTOS, Host

PEOPLE = ("anna", "ben", "cleo")


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.png" for name in PEOPLE}
    for name, path in paths.items():
        path.write_bytes(base64.b64decode(PHOTOS[name]))
    return paths


def drop(actions: Any, box: str, *paths: Path) -> str:
    """Drops files as the page does, which then shows all photos. Returns what the hidden field holds."""
    _, box, _, note = actions.add_photos([SimpleNamespace(name=str(path)) for path in paths], box)
    assert note == "" and actions.show_photos(box).count("src='data:image/jpeg") == len(json.loads(box))
    return box


def generate(host: Host, box: str, is_api: bool = True) -> list:
    p, args = host.processing(), [True, *default_args(1)[1:]]
    p.is_api = is_api
    args[1 + [field.name for field in FIELDS].index("images")] = box
    return host.generate(args, p=p)


@pytest.fixture
def decoded(monkeypatch) -> list[Any]:
    """What Pillow opens from now on."""
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args, **how: opened.append(file) or real(file, *args, **how))
    return opened


def test_each_photo_is_decoded_once(host, actions, files, decoded):
    """By the drop, and not by the thumbnails, the next drop, the preview, or generating, whether it is read or not."""
    box = drop(actions, "", *list(files.values())[:2])
    box = drop(actions, box, files["cleo"])
    assert len(decoded) == 3 and len(box) < 3 * 100
    first, again = generate(host, box), generate(host, box)
    actions.preview(box, "None", "largest", 0)
    assert "Saved" in actions.save("All", box, "auto", "largest", 0, "official")[2]
    host.forget_photos()
    assert same(generate(host, box), first) and same(again, first)
    box = drop(actions, box, files["anna"])
    assert len(decoded) == 4 and json.loads(box)[0] == json.loads(box)[3]
    assert same(first, host.generate([{"images": [PHOTOS[name] for name in PEOPLE]}]))
    assert len(decoded) == 4 + 3  # base64 is decoded by each request


def test_the_least_recently_used_goes():
    from lib_pulid.webui.dropped import DroppedPhotos

    kept = DroppedPhotos(most=3 * (64 * 64 * 3 + 1000))
    keys = [kept.add(np.full((64, 64, 3), shade, np.uint8)) for shade in range(3)]
    kept.thumbnail(keys[0], "photo 1")
    keys.append(kept.add(np.full((64, 64, 3), 3, np.uint8)))
    assert [kept.read(keys[i], "")[0, 0, 0] for i in (0, 2, 3)] == [0, 2, 3]
    with pytest.raises(ImageError, match="^photo 2 is not on the server any more.*add it again"):
        kept.read(keys[1], "photo 2")


def test_a_photo_that_is_gone_is_named(host, actions, files):
    """After Reload UI or a restart the page that stayed open still has the hashes: a message, and no stranger."""
    lost = drop(actions, "", files["anna"])
    host.start_anew()
    actions._library = host.library
    box = drop(actions, "", files["ben"])
    both = json.dumps([*json.loads(box), *json.loads(lost)])
    with pytest.raises(ImageError, match="^Person 1, Photos: photo 2 is not on the server .*add it again"):
        generate(host, both, is_api=False)
    strip = actions.show_photos(both)
    assert strip.count("<img") == strip.count("<button") == 2 and strip.count("src=") == 1 and "add it again" in strip
    assert "add it again" in actions.preview(both, "None", "largest", 0)[1]
    assert "add it again" in actions.save("Lost", both, "auto", "largest", 0, "official")[2]
    assert actions.remove_photo(both, 1) == box
    assert same(generate(host, drop(actions, "", files["anna"])), generate(host, lost))  # the same photo, dropped again


def test_base64_in_the_field_still_works(host, actions, files):
    """A script fills it in, or a page that was opened before an update."""
    box = drop(actions, json.dumps([PHOTOS["anna"]]), files["ben"])
    assert json.loads(box)[0] == PHOTOS["anna"]
    assert same(generate(host, box), host.generate([{"images": [PHOTOS["anna"], PHOTOS["ben"]]}]))
    assert same(generate(host, PHOTOS["anna"]), host.generate([{"images": [PHOTOS["anna"]]}]))


def test_a_hash_shows_nothing_to_the_api(host, actions, files):
    """Nobody gets at the photo of another user by it."""
    (key,) = json.loads(drop(actions, "", files["anna"]))
    with pytest.raises(ImageError, match="not base64 text"):
        routes.detect({"images": [key]}, host.library)
    for other in (key[:-1], key.upper(), key[:7], "sha256:" + "0" * 64):
        with pytest.raises(ImageError):
            host.generate([{"images": [other]}])
