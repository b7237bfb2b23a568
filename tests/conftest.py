"""Settings of all tests, and the fixtures that several files share.

Models are so small that more threads only get in each other's way; weight files that lie in other programs' folders of
this machine are none of the tests'.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ.update(HF_HUB_CACHE=os.devnull, TORCH_HOME=os.devnull)

# The same examples on every machine and in every run; a slow machine is no failure.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def no_network(monkeypatch) -> None:
    def connect(*args: Any, **_: Any) -> None:
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture(scope="session")
def light_models(tmp_path_factory) -> Path:
    from tests.light_webui import write_models

    folder = tmp_path_factory.mktemp("light") / "models"
    write_models(folder)
    return folder


@pytest.fixture(scope="module", params=("a1111", "forge"))
def program(request, light_models) -> Iterator[Any]:
    from tests.light_webui import Light

    with pytest.MonkeyPatch.context() as patch, Light(request.param, light_models, patch).running() as running:
        yield running


@pytest.fixture
def host(program) -> Any:
    """As after a fresh start: nothing is loaded, nothing is remembered."""
    program.start_anew()
    return program


@pytest.fixture
def actions(host) -> Any:
    """What the page's widgets call; the checkpoint is an SDXL."""
    return host.actions()


@pytest.fixture
def small_sdxl(monkeypatch) -> None:
    """The hosts take `small_unet` for an SDXL."""
    from tests.fake_modules.models import SMALL_SITES

    monkeypatch.setattr("lib_pulid.hosts.families.SDXL_SITES", SMALL_SITES)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A models folder with small files for everything."""
    pytest.importorskip("insightface")
    pytest.importorskip("facexlib")
    from tests import small_models
    from tests.face_standins import write_face_files
    from tests.fake_modules.models import SMALL_SITES, WIDTH

    folder = tmp_path_factory.mktemp("models")
    files = small_models.write_files(folder / "pulid", [WIDTH] * SMALL_SITES, 64)
    files.tower.rename(folder / "pulid" / "EVA02_CLIP_L_336_psz14_s6B.pt")
    faces = write_face_files(folder / "insightface")
    (folder / "facexlib").mkdir()
    for path in (faces["landmarker"], faces["parser"]):
        path.rename(folder / "facexlib" / path.name)
    return folder


@pytest.fixture
def ui(weights, monkeypatch) -> Iterator[Any]:
    from lib_pulid import hosts
    from tests.face_standins import remembering_models
    from tests.fake_webui import webui

    monkeypatch.setattr("lib_pulid.face_models.load_face_models", remembering_models)
    with webui("a1111", weights) as made:
        yield made
        hosts.current().stop()
    for path in (weights / "pulid" / "identities").glob("*"):
        path.unlink()


@pytest.fixture
def script(ui) -> Any:
    return ui.script()


@pytest.fixture
def library(script) -> Any:
    return script.library


@pytest.fixture
def client(library) -> Any:
    """Makes a client of the HTTP routes."""
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    from lib_pulid.webui import routes

    def make(api_auth: str | None = None, error: Exception | None = None):
        app = fastapi.FastAPI()

        @app.get("/fails")
        def fails():
            raise error

        routes.add_error_handler(app)
        routes.add_routes(app, library, api_auth)
        return testclient.TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture(scope="session")
def one() -> str:
    """A photo of one person, as base64."""
    from tests.face_standins import packed, photo

    return packed(photo((320, 200)))


@pytest.fixture(scope="session")
def two() -> str:
    from tests.face_standins import packed, photo

    return packed(photo((200, 200), (480, 100)))


@pytest.fixture(scope="session")
def nobody() -> str:
    from tests.face_standins import blank, packed

    return packed(blank(640, 480))


@pytest.fixture(scope="session")
def unet() -> torch.nn.Module:
    from tests import layouts

    return layouts.unet()


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, unet) -> Any:
    """PuLID v1 for `unet`."""
    from tests import layouts

    return layouts.unet_adapter(tmp_path_factory.mktemp("sdxl") / "v1.safetensors", unet)


@pytest.fixture(scope="session")
def flux() -> torch.nn.Module:
    from tests import layouts

    return layouts.diffusers_flux()


@pytest.fixture(scope="session")
def flux_adapter(tmp_path_factory) -> Any:
    from tests import layouts

    return layouts.flux_adapter(tmp_path_factory.mktemp("flux") / "flux.safetensors")
