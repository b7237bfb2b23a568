"""What strangers must not be able to do, and what of a person must not be written anywhere."""

from __future__ import annotations

import ast
import base64
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lib_pulid.errors import PulidError, SettingError
from lib_pulid.units import default_args
from lib_pulid.webui import xyz
from tests.face_standins import photo
from tests.fake_webui import Generation
from tests.test_imports import ROOT, printed, sources

# ---------------------------------------------------------------- code that is not there


def calls(path: Path) -> set[str]:
    """Dotted names of all that a file calls, "torch.load" or ".load" where the object is not a plain name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            parts.append(function.id if isinstance(function, ast.Name) else "")
            found.add(".".join(reversed(parts)))
    return found


def test_only_one_place_reads_pickles_and_it_reads_weights_only():
    readers = {"torch.load", "torch.serialization.load", "torch.jit.load", "pickle.load", "pickle.loads", "joblib.load",
               "pickle.Unpickler", "np.load", "numpy.load", "eval", "exec", "os.system", "yaml.load", "marshal.loads",
               "load_state_dict_from_url", "torch.hub.load", "shelve.open", "dill.load"}  # fmt: skip
    files = sources(ROOT)
    found = {(name, call) for name, path in files.items() for call in calls(path) & readers}
    # Training reads what it has written itself, and no pickles either.
    training = {(name, call) for name, call in found if name.startswith("lib_pulid.training.")}
    assert found - training == {("lib_pulid.files.state_dict", "torch.serialization.load")}
    for name, _ in training:
        for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("allow_pickle", "False") == "False", name
                assert "torch" not in ast.unparse(node.func) or options.get("weights_only") == "True", name
    tree = ast.parse(files["lib_pulid.files.state_dict"].read_text(encoding="utf-8"))
    (call,) = (
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.serialization.load"
    )
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["weights_only"] == "True"


def test_nothing_of_facexlib_loads_or_downloads_by_itself():
    """Its own loaders fetch files and unpickle them; only its networks are used."""
    taken = set()
    for path in sources(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("facexlib"):
                taken |= {f"{node.module}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names if alias.name.startswith("facexlib")}
    assert taken == {"facexlib.detection.retinaface.RetinaFace", "facexlib.parsing.bisenet.BiSeNet"}


# ---------------------------------------------------------------- files and addresses


ADDRESSES = ["http://127.0.0.1:9/x.png", "https://example.com/anna.safetensors", "ftp://host/passwd", "s3://bucket/x",
             "file:///etc/passwd", "/etc/passwd", "/etc/shadow1", "../../secret", "secret/a/b/c", "//host/share",
             "\\\\host\\share", "C:\\passwd.png", "hf://owner/name", "~root", "~/passwd.png", "passwd.png",
             "data:text/plain,/etc/passwd", "blob:http://x/1"]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("field", ["images", "mask", "identity", "model"])
def test_no_address_is_fetched_and_no_file_outside_is_opened(ui, script, one, no_network, field, address, monkeypatch):
    opened: list[str] = []
    real = open

    def noted(file, *args, **kwargs):
        opened.append(os.fspath(file) if not isinstance(file, int) else "")
        return real(file, *args, **kwargs)

    unit = {} if field in ("images", "identity") else {"images": [one]}
    unit[field] = [address] if field == "images" else address
    for name in ("builtins.open", "io.open", "pathlib.Path.open"):
        monkeypatch.setattr(name, noted)
    told = ".*Paths and URLs are never opened" if field in ("images", "mask") else ""
    with pytest.raises(PulidError, match=f"PuLID unit 1, field {field}: {told}"):
        ui.generate(script, Generation(), [unit])
    assert not [name for name in opened if "passwd" in name or "secret" in name or "share" in name]


def test_making_an_identity_needs_no_network(ui, script, one, no_network):
    assert len(ui.generate(script, Generation(), [{"images": [one]}])) == 1


def test_the_api_cannot_read_files_by_the_grids_photo_file(ui, library, tmp_path):
    """An axis that takes a path is for whoever sits at the page; an API caller can run a grid, too. Nor may a page that
    is kept from folders."""
    xyz.add_axes(1, library, ("sdxl",))
    options = ui.modules.scripts.scripts_data[0].module.axis_options
    axis = next(option for option in options if option.label == "[PuLID 1] Photo file")
    path, api, page = tmp_path / "photo.png", SimpleNamespace(is_api=True), SimpleNamespace(is_api=False)
    Image.fromarray(photo((330, 210))).save(path)
    for file in (path, tmp_path / "gone.png"):  # nor learn whether there is one
        with pytest.raises(SettingError, match="unit 1, field images: the axis Photo file .* works only in the page"):
            axis.confirm(api, [str(file)])
        with pytest.raises(PulidError, match="works only in the page"):
            axis.apply(api, str(file), [])
    axis.confirm(page, [str(path)])
    axis.apply(page, str(path), [])
    ui.modules.shared.cmd_opts.hide_ui_dir_config = True
    with pytest.raises(SettingError, match="works only in the page"):
        axis.confirm(page, [str(tmp_path)])


# ---------------------------------------------------------------- routes


def basic(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def test_every_route_asks_for_the_login(client):
    guarded = client("bob:hidden,anna:secret")
    paths = [(route.path, method) for route in guarded.app.routes if route.path.startswith("/pulid/")
             for method in route.methods]  # fmt: skip
    assert len(paths) >= 4
    for path, method in paths:
        for headers in (
            {},
            basic("anna:"),
            basic("anna:wrong"),
            basic("anna:hidden"),
            basic(":secret"),
            {"Authorization": "Bearer x"},
        ):
            assert guarded.request(method, path, headers=headers).status_code == 401
        assert guarded.request(method, path, headers=basic("bob:hidden"), content=b"{}").status_code != 401
        answer = guarded.request(method, path, headers=basic("anna:secret"), content=b"{}")
        asks_for_something = method == "POST" or "{" in path  # which is not given, or not there
        assert answer.status_code == (422 if asks_for_something else 200)


@pytest.mark.parametrize("flag", ["anna", "a:b:c", ",", " "])
def test_a_flag_that_names_no_login_lets_nobody_in(client, flag):
    guarded = client(flag)
    for login in ("anna:", "anna:anna", ":", "a:b", "a:b:c", "a:"):
        assert guarded.get("/pulid/models", headers=basic(login)).status_code == 401


def test_without_the_api_there_are_no_routes(ui):
    ui.modules.shared.cmd_opts.api = False
    door = ui.door()
    added: list[str] = []
    app = SimpleNamespace(
        add_exception_handler=lambda *_: None, add_api_route=lambda path, *_, **__: added.append(path)
    )
    pytest.importorskip("fastapi")
    door.on_app_started(None, app)
    assert added == []
    ui.modules.shared.cmd_opts.api = True
    door.on_app_started(None, app)
    assert "/pulid/detect" in added


BODIES = {
    "empty": b"", "text": b"images", "a list": b"[]", "null": b"null", "a number": b"5", "not UTF-8": b'{"a": "\xff"}',
    "deep": b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "cut off": b'{"images": ["',
    "digits": b'{"face_index": ' + b"9" * 10_000 + b"}", "NaN": b'{"face_index": NaN}',
    "unknown": b'{"\\ud800": 1}', "a photo of paths": b'{"images": ["/etc/passwd"]}',
}  # fmt: skip


@pytest.mark.parametrize("what", BODIES)
def test_any_body_is_answered_with_a_message(client, what):
    answer = client().post("/pulid/detect", content=BODIES[what], headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("PuLID")
    assert answer.json()["error"] in ("SettingError", "ImageError")
    assert len(answer.content) < 2000


def test_a_body_without_end_is_not_read_to_its_end(client, monkeypatch):
    from lib_pulid.webui import routes

    sent = 0

    def endless():
        nonlocal sent
        while sent < 50_000_000:
            sent += 100_000
            yield b"x" * 100_000

    monkeypatch.setattr(routes, "LARGEST_BODY", 1_000_000)
    answer = client().post("/pulid/detect", content=endless())
    assert answer.status_code == 413
    assert "too large" in answer.json()["detail"]
    assert client("anna:secret").post("/pulid/detect", content=b"x" * 2_000_000).status_code == 401  # login first


def test_an_answer_to_an_error_holds_no_photo(client, one):
    for body in ({"images": [one], "x": one}, {"images": [one, 5]}, {"images": [one[:-2000]]}, {"images": [[one]]},
                 {"images": one, "face_order": one}, {one: 1}):  # fmt: skip
        answer = client().post("/pulid/detect", json=body)
        assert answer.status_code == 422
        assert len(answer.text) < 1000
        assert one[100:150] not in answer.text


# ---------------------------------------------------------------- what is written down


def test_neither_parameters_nor_messages_nor_output_hold_a_photo(ui, script, one, capfd):
    body = one.partition(",")[2]
    pieces = {body[at : at + 40] for at in range(0, len(body) - 40, 40)}
    p = Generation()
    ui.hook("process", script, p, {"images": [one], "mask": one})
    written = json.dumps(p.extra_generation_params)
    assert "photos: 1" in written and "region: " in written
    for args in ([{"images": [one], "wieght": one}], [{"images": one + "%"}], [{"images": [one], "mask": "%" + one}],
                 [{"images": [one], "model": one}], [{"identity": one}], [one], [{"images": [one]}, one]):  # fmt: skip
        q = Generation()
        with pytest.raises(PulidError) as caught:
            ui.generate(script, q, args)
        written += str(caught.value) + "".join(q.comments)
    written += "".join(str(text) for text in ui.modules.shared.state.told) + "".join(capfd.readouterr())
    assert not [piece for piece in pieces if piece in written]


def test_hosts_that_log_what_a_request_was_called_with_log_no_photo(ui, script, one):
    """A1111 prints the arguments of a request that failed; what comes from our hidden fields shows its length."""
    widgets = script.ui(False)
    hidden = [widget for widget in widgets if widget.elem_id.endswith(("_images", "_mask"))]
    assert len(hidden) == 6
    args = default_args(3)
    args[0] = True
    for widget in hidden:
        value = widget.preprocess(json.dumps([one]) if widget.elem_id.endswith("_images") else one)
        args[widgets.index(widget)] = value
    assert len(f"Arguments: {tuple(args)}") < 3000
    assert one[100:140] not in f"{tuple(args)}{args!r}"
    assert hidden[0].preprocess(None) is None
    assert repr(hidden[0].preprocess("")) == "''"
    plain = [str(value) if isinstance(value, str) else value for value in args]
    assert json.dumps(args) == json.dumps(plain)
    unmasked = [value if i != widgets.index(hidden[1]) else "" for i, value in enumerate(args)]
    assert len(ui.generate(script, Generation(), unmasked)) == 1


def test_a_saved_identity_holds_what_its_file_says_and_no_photo(ui, script, one, library):
    """Tokens, a thumbnail of the aligned face, its embedding by the adapter's own recognizer, and what made them."""
    from safetensors import safe_open

    p = Generation()
    ui.hook("process", script, p, {"images": [one]})
    (path,) = [library.identities.find(text[6:16]) for text in p.extra_generation_params.values()]
    with safe_open(str(path), "pt") as file:
        own = f"embedding.{library.encoders.judges()[-1].key}"
        assert set(file.keys()) == {"cond", "uncond", "thumbnail", own}  # noqa: SIM118
        assert max(file.get_tensor("thumbnail").shape) <= 128
        assert set(file.metadata()) == {"format", "version", "adapter", "encoder", "photos", "fusion", "made_by"}


def test_importing_the_package_opens_no_connection():
    code = (
        "import socket\n"
        "def no(*a, **k): raise SystemExit('connects')\n"
        "socket.socket.connect = no; socket.getaddrinfo = no\n"
        "import lib_pulid.cli, lib_pulid.photos, lib_pulid.vision, lib_pulid.face_models, lib_pulid.weights"
    )
    assert printed(code) == []
