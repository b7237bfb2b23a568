"""Saved identities in the prompt, as `<pulid:NAME:WEIGHT>`: the prompt is enough, without a unit for the script."""

from __future__ import annotations

import shutil
from typing import Any

from tests.host.page import opened
from tests.host.rows_adetailer import Detailer, usual_names
from tests.host.rows_basics import ANNA
from tests.host.rows_grid import SMALL, cells, script_info
from tests.host.rows_works_with import hires
from tests.host.table import Rows, close, differ, equal, expect, nothing_left
from tests.host.webui import Running

rows = Rows()
CAT = "a photo of a cat"
A, B = "<pulid:marked A:0.6>", "<pulid:marked B:0.6>"
UNITS = [{"identity": f"marked {name}", "weight": 0.6} for name in "AB"]


@rows.row("Prompt: a tag gives the picture of the unit with this identity and weight, to the bit")
def tag(host: Running) -> str:
    tagged = host.api.txt2img(prompt=CAT + A).image
    equal(tagged, host.api.txt2img(UNITS[0]).image, "tag and unit")
    strong = host.api.txt2img(prompt=CAT + "<PuLID:Marked a:weight=2:end=0.5:num_zero=4:projection=ortho>").image
    unit = {**ANNA, "weight": 2, "end": 0.5, "num_zero": 4, "projection": "ortho"}
    equal(strong, host.api.txt2img(unit).image, "settings of the tag and of the unit")
    return f"{differ(tagged, host.api.txt2img().image, 'with and without'):.1f} of 255"


@rows.row("Prompt: weight 0, a unit off, no tag, and the next run: bit-identical to the baseline")
def nothing(host: Running) -> None:
    plain = host.api.txt2img().image
    before = host.api.state()
    host.api.txt2img(prompt=CAT + A)
    nothing_left(host, before)
    equal(plain, host.api.txt2img().image, "the next run")
    equal(plain, host.api.txt2img(prompt=CAT + "<pulid:marked A:0>").image, "weight 0")
    equal(plain, host.api.txt2img(prompt=CAT + "<pulid:marked A:enabled=no>").image, "enabled=no")


@rows.row("Prompt: the parameters keep the tag, with the identity's hash beside it; none without a tag")
def parameters(host: Running) -> str:
    listed = {one["name"]: one["hash"] for one in host.api.get("/pulid/identities")["identities"]}
    text = host.api.txt2img(prompt=f"{CAT} {A}").parameters[0]
    for wanted in (A, "PuLID tag 1:", listed["marked A"], "weight: 0.6"):
        expect(wanted in text, f"{wanted!r} is not in: {text}")
    expect("PuLID 1:" not in text, f"an entry of a unit: {text}")
    expect("PuLID" not in host.api.txt2img().parameters[0], "an entry without a tag")
    return text.partition("PuLID tag 1: ")[2]


@rows.row("Prompt: hires fix: both passes; a hires prompt has tags of its own")
def hires_fix(host: Running) -> None:
    asked = hires(host)
    strong = {**ANNA, "weight": 2.0}
    mark = "<pulid:marked A:2>"
    both = host.api.txt2img(**asked, prompt=CAT + mark).image
    equal(both, host.api.txt2img(strong, **asked, prompt=CAT).image, "both passes")
    for name, prompts in {
        "first": {"prompt": CAT + mark, "hr_prompt": CAT},
        "second": {"prompt": CAT, "hr_prompt": CAT + mark},
    }.items():
        unit = {**strong, "hires": name}
        made = host.api.txt2img(**asked, **prompts).image
        equal(made, host.api.txt2img(unit, **asked, prompt=CAT, hr_prompt=CAT).image, f"the {name} pass")


@rows.row("Prompt: X/Y/Z plot, prompt S/R over the name and the weight")
def search_and_replace(host: Running) -> None:
    made = cells(host, 2, [("Prompt S/R", "marked A, marked B")], prompt=CAT + A)
    for picture, unit in zip(made, UNITS):
        equal(picture, host.api.txt2img(unit, **SMALL).image, unit["identity"])
    made = cells(host, 2, [("Prompt S/R", ":0.6, :1.2")], prompt=CAT + A)
    equal(made[1], host.api.txt2img({**ANNA, "weight": 1.2}, **SMALL).image, "weight 1.2")
    made = cells(host, 2, [("Prompt S/R", f"{A}, nobody")], prompt=f"{CAT}, {A}")
    equal(made[1], host.api.txt2img(prompt=f"{CAT}, nobody", **SMALL).image, "a cell without a tag")


def script_args(host: Running, name: str, **given: Any) -> dict[str, Any]:
    """given: by label, with _ for blanks; the rest as it stands in the page."""
    found = script_info(host, name)
    wanted = {label.replace("_", " ").lower(): value for label, value in given.items()}
    args = [wanted.pop(str(one["label"]).lower(), one.get("value")) for one in found["args"]]
    expect(not wanted, f"{name} has no {list(wanted)}, but {[one['label'] for one in found['args']]}")
    return {"script_name": name, "script_args": args}


@rows.row("Prompt: a prompt matrix in one batch: each picture gets the face of its own prompt")
def matrix(host: Running) -> str:
    made = host.api.txt2img(prompt=f"{CAT}|{A}|{B}", batch_size=4, **script_args(host, "prompt matrix"))
    texts = made.parameters[-4:]
    expected = [[], [0], [1], [0, 1]]
    seen = []
    for picture, text, which in zip(made.images[-4:], texts, expected):
        for i, unit in enumerate(UNITS):
            expect((f"identity: {unit['identity']}" in text) == (i in which), f"picture {which}: {text}")
        rest = CAT + ", " * len(which)
        seen.append(close(picture, host.api.txt2img(*(UNITS[i] for i in which), prompt=rest).image, f"units {which}"))
    differ(made.images[-4], made.images[-3], "without and with")
    return f"up to {max(seen):.3f} from the pictures made alone"


@rows.row("Prompt: prompts from a text box, one with, one without, one with another face")
def from_file(host: Running) -> None:
    lines = "\n".join((CAT + A, CAT, CAT + B))
    asked = script_args(host, "prompts from file or textbox", List_of_prompt_inputs=lines)
    made = host.api.txt2img(prompt="", **asked).images[-3:]  # a prompt would be added to each line
    for picture, units in zip(made, ((UNITS[0],), (), (UNITS[1],))):
        equal(picture, host.api.txt2img(*units).image, str(units))


@rows.row("Faces: the tab has a card for each saved identity, also of one saved later; a click writes its tag")
def card(host: Running) -> str:
    shown = host.api.get("/sd_extra_networks/get-single-card?page=faces&tabname=txt2img&name=marked%20A")["html"]
    for wanted in ("&lt;pulid:marked A:0.8&gt;", "marked A"):
        expect(wanted in shown, f"{wanted!r} is not in the card: {shown}")
    with opened(host) as page:
        late = host.identities / "friends" / "late.safetensors"
        late.parent.mkdir(exist_ok=True)
        shutil.copyfile(host.identities / "marked A.safetensors", late)
        page.find("#txt2img_extra_tabs > .tab-nav button").filter(has_text="Faces").first.click()
        page.find('#txt2img_faces_cards .card[data-name="friends/late"]').first.wait_for(state="visible")
        late.unlink()
        cards = page.find("#txt2img_faces_cards .card")
        cards.first.wait_for(state="visible")
        names = cards.locator(".name").all_inner_texts()
        for name in ("marked A", "marked B"):
            expect(name in names, f"the cards are {names}")
        page.find('#txt2img_faces_cards .card[data-name="marked B"]').first.click()
        page.until(
            "gradioApp().querySelector('#txt2img_prompt textarea').value.includes('<pulid:marked B:0.8>')", "a tag"
        )
        return ", ".join(names)


@rows.row("Prompt: ADetailer's own prompt has a tag, and its script names do not hold “pulid”")
def adetailer(host: Running) -> str:
    detailed = Detailer(host, usual_names(host))
    detailed(ad_prompt=CAT)  # ultralytics sets torch's number of threads at its first use
    plain, tagged, again = (detailed(ad_prompt=prompt).image for prompt in (CAT, CAT + A, CAT))
    equal(plain, again, "afterwards, without a tag")
    return f"{differ(plain, tagged, 'with and without a tag', 0.03):.2f} of 255"
