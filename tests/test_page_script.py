"""javascript/, run by Node.js on stand-ins for the page's elements; how it looks and feels is tried in real hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "javascript"
PAGE = """
const page = {};  // selector -> elements
const gradioApp = () => ({
    querySelectorAll: (selectors) => selectors.split(", ").flatMap((one) => page[one] ?? []),
    querySelector: (selector) => (page[selector] ?? [null])[0],
});
const onUiLoaded = () => {}, onAfterUiUpdate = () => {};
const document = {addEventListener: () => {}, activeElement: null};
const image = (src, width, height, shown = true) =>
    ({src, naturalWidth: width, naturalHeight: height, offsetParent: shown ? {} : null});
"""


@pytest.fixture
def run() -> Any:
    """Runs code after the scripts of the page, and returns its value."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")

    def run(code: str) -> Any:
        scripts = [(FOLDER / name).read_text(encoding="utf-8") for name in ("pulid.js", "regions.js", "blend.js")]
        text = "\n".join([PAGE, *scripts, f"console.log(JSON.stringify((() => {{ {code} }})()))"])
        ran = subprocess.run([node, "-"], input=text, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def test_dropped_files_of_an_unknown_type_are_given_to_the_server(run):
    """A browser knows no type of HEIC, or of a camera's raw file, where the system does not."""
    files = {"a.png": "image/png", "b.DNG": "", "c.mp4": "video/mp4", "d.txt": "text/plain"}
    dropped = json.dumps([{"name": name, "type": kind} for name, kind in files.items()])
    assert run(f"return Pulid.pictures({{files: {dropped}}}).map((file) => file.name);") == ["a.png", "b.DNG"]
    assert run("return Pulid.pictures(undefined);") == []


INPAINTED = """
page["#img2img_image img"] = [image("other", 400, 300, false)];
page["#img2maskimg img"] = [image("icon", 16, 16), image("input", 1536, 1024)];
page["#img2img_gallery img"] = page["#txt2img_gallery img"] = [image("result", 512, 512)];
for (const tab of ["txt2img", "img2img"]) {
    page[`#${tab}_width input[type=number]`] = page[`#${tab}_height input[type=number]`] = [{value: "512"}];
}
"""


@pytest.mark.parametrize(("tab", "gone", "found"), [
    ("img2img", False, ["input", [1024, 683]]), ("img2img", True, ["result", [512, 512]]),
    ("txt2img", False, ["result", [512, 512]]),
])  # fmt: skip
def test_boxes_and_masks_are_parts_of_the_image_in_the_open_tab(run, tab, gone, found):
    """In img2img's tabs for inpainting, too, and not of another tab's image; a blank mask has its shape."""
    change = 'page["#img2maskimg img"] = [];' if gone else ""
    code = f'return [new Regions("{tab}").background(), pulid.pictureSize("{tab}")];'
    assert run(f"{INPAINTED} {change} {code}") == found


def test_the_frame_has_the_shape_of_the_input(run):
    code = """
        const regions = new Regions("img2img"), style = {};
        const frame = {dataset: {pulid: "connected"}, style, contains: () => false, replaceChildren: () => {}};
        Object.defineProperty(regions, "frame", {value: frame});
        regions.boxes = () => [];
        regions.selected = () => 1;
        regions.draw();
        return [style.aspectRatio, style.backgroundImage];
    """
    assert run(f"{INPAINTED} {code}") == ["1024 / 683", 'url("input")']


@pytest.mark.parametrize(("kind", "now", "written"), [
    ("move", [0.5, 0.5, 0.03, 0.03], [0.5, 0.5, 0.03, 0.03]),  # smaller than one that is drawn: typed, or pasted
    ("draw", [0.5, 0.5, 0.03, 0.3], None),  # a click
    ("draw", [0.5, 0.5, 0.3, 0.3], [0.5, 0.5, 0.3, 0.3]),
    ("resize", None, None),
])  # fmt: skip
def test_what_a_drag_leaves(run, kind, now, written):
    code = f"""
        const regions = new Regions("txt2img");
        let written = null;
        Object.defineProperty(regions, "frame", {{value: {{querySelector: () => null, offsetParent: null}}}});
        regions.write = (n, box) => {{ written = box; }};
        regions.drag = {{n: 1, kind: "{kind}", now: {json.dumps(now)}}};
        regions.end({{}});
        return [written, regions.drag];
    """
    assert run(code) == [written, None]


def test_a_box_stays_in_the_image(run):
    moved = run("return [Regions.moved([0.5, 0.5, 0.3, 0.3], 1, -1), Regions.moved([0, 0, 1, 1], 0.5, 0.5)];")
    assert moved == [[0.7, 0, 0.3, 0.3], [0, 0, 1, 1]]
    assert run("return Regions.resized([0.9, 0.1, 0.1, 0.3], 1, -1);") == pytest.approx([0.9, 0.1, 0.1, 0.04])


def test_shares_add_up_and_equal_ones_are_not_sent(run):
    code = """
        const blend = new Blend("txt2img");
        blend.choose(["anna", "ben"]);
        const equal = blend.written();
        blend.set(0, 70);
        blend.choose(["anna", "ben", "cleo"]);
        return [equal, blend.people.map(([name]) => name), blend.written().split(", ").map(Number)];
    """
    equal, names, shares = run(code)
    assert equal == "" and names == ["anna", "ben", "cleo"]
    assert sum(shares) == pytest.approx(100, abs=0.01) and shares[0] / shares[1] == pytest.approx(7 / 3, rel=1e-3)
