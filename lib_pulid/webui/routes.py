"""Adds the HTTP routes below /pulid: models, download, identities, blend, presets, detect, schema. Errors are JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePosixPath
from secrets import compare_digest
from typing import Any
from urllib.parse import quote

from fastapi import Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBasic

from lib_pulid.blend import check_share
from lib_pulid.errors import (
    IdentityMismatchError,
    MissingWeightsError,
    OutOfMemoryError,
    PulidError,
    SettingError,
    WrongWeightsError,
)
from lib_pulid.fields import FIELD, FIELDS, PRESETS, WEIGHTS, check, schema, spelled
from lib_pulid.files import catalog
from lib_pulid.files.pulidembd import SUFFIX as PULIDEMBD
from lib_pulid.methods import METHODS
from lib_pulid.units import PulidUnit, at_unit
from lib_pulid.webui import pictures
from lib_pulid.webui.fetching import Downloads
from lib_pulid.webui.library import Library

LARGEST_BODY = 100 << 20  # bytes; the largest photo of a phone takes about 50 MB as base64
DOWNLOAD_FIELDS = ("names", "accept_license", "accept_licence")  # the last is the old spelling
DETECT_FIELDS = ("images", "face_order", "face_index")


def add_routes(app: Any, library: Library, api_auth: str | None) -> None:
    """Adds the routes. app: FastAPI. api_auth: "user:password,..." as given to --api-auth."""
    guard = [Depends(_authenticator(api_auth))] if api_auth else []

    def add(path: str, endpoint: Any, method: str, **more: Any) -> None:
        app.add_api_route(f"/pulid/{path}", endpoint, methods=[method], dependencies=guard, tags=["PuLID"], **more)

    def post(path: str, answer: Any) -> None:
        async def endpoint(request: Request) -> dict:
            return await run_in_threadpool(answer, await _body(request))

        body = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
        add(path, endpoint, "POST", openapi_extra={"requestBody": body})

    add("models", lambda: models(library), "GET")
    add("download", lambda: progress(library.downloads), "GET")
    add("identities", lambda: identities(library), "GET")
    add("identities/{name:path}", lambda name: _file(*identity_file(name, library)), "GET")
    add("presets", lambda: presets(library), "GET")
    add("schema", describe, "GET")
    post("detect", lambda body: detect(body, library))
    post("download", lambda body: download(body, library.downloads))
    post("blend", lambda body: blend(body, library))


def add_error_handler(app: Any) -> None:
    """Answers a PulidError with its message, in the same form on all hosts.

    Without it, Forge only answers "Internal Server Error".
    """

    def answer(request: Any, error: Exception) -> Any:
        ours = isinstance(error, (MissingWeightsError, WrongWeightsError, OutOfMemoryError))
        message = str(error).encode(errors="backslashreplace").decode()  # a name in the request may not be valid text
        content = {"error": type(error).__name__, "detail": message, "body": "", "errors": message}
        return JSONResponse(status_code=500 if ours else 422, content=content)

    app.add_exception_handler(PulidError, answer)
    if getattr(app, "middleware_stack", None) is not None:  # already built by an early request: rebuild it
        app.middleware_stack = app.build_middleware_stack()


async def _body(request: Request) -> dict[str, Any]:
    """Reads the posted JSON object. FastAPI itself would read gigabytes, and before checking the login."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise HTTPException(413, f"PuLID: the body is too large (more than {LARGEST_BODY >> 20} MB).")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise SettingError("PuLID: the body is not a JSON object; see docs/api.md for what this route takes.")
    return body


# ---------------------------------------------------------------- the routes' answers


def models(library: Library) -> dict[str, Any]:
    """Lists the values of a unit's field model, and all files of the catalog with their state: there, missing or
    differs (in size)."""
    files = [
        {"name": file.name, "family": file.family or None, "method": file.method.name if file.method else None}
        for file in library.adapters.listed()
    ]
    models_dir = library.folder.models_dir
    known = [
        {
            "name": file.name,
            "for": file.group,
            "purpose": file.purpose,
            "state": found.state,
            "size": file.size or None,
            "license": file.licence,
            "licence": file.licence,  # the old spelling
            "restricted": file.restricted,
            "folder": str(found.path.parent if found.path else models_dir / file.folder),
            "url": file.url,
        }
        for file in catalog.CATALOG
        for found in [catalog.status(file, models_dir)]
    ]
    return {"folder": str(library.folder.path), "models": files, "files": known}


def download(body: Mapping[str, Any], downloads: Downloads) -> dict[str, Any]:
    """Starts to download files of the catalog. body: names, and accept_license (true for restricted ones).

    Raises:
        SettingError: a name is not in the catalog, or a license is not accepted.
    """
    names, answers = body.get("names"), [body.get(field) for field in DOWNLOAD_FIELDS[1:]]
    accepted = next((answer for answer in answers if answer is not None), False)
    if not isinstance(names, list) or not names or not isinstance(accepted, bool) or set(body) - set(DOWNLOAD_FIELDS):
        raise SettingError("PuLID: download takes names (a list of file names) and accept_license (true or false).")
    files = []
    for name in names:
        file = catalog.named(name) if isinstance(name, str) else None
        if file is None:
            raise SettingError(f"PuLID, field names: {spelled(name)} is not in the catalog; see /pulid/models.")
        if file.restricted and not accepted:
            raise SettingError(
                f"PuLID, field accept_license: {file.name} has a restricted license ({file.licence}). "
                "Set accept_license to true to accept it."
            )
        files.append(file)
    downloads.start(files)
    return progress(downloads)


def progress(downloads: Downloads) -> dict[str, Any]:
    return asdict(downloads.state)


def identities(library: Library) -> dict[str, Any]:
    saved = [{"name": one.name, "hash": one.short_hash, "made_for": one.adapter} for one in library.identities.listed()]
    return {"folder": str(library.identities.folder), "identities": saved}


def blend(body: Mapping[str, Any], library: Library) -> dict[str, Any]:
    """Blends saved identities and saves the result. body: people (name or short hash -> share) and name.

    Raises:
        SettingError, IdentityMismatchError: see `Identities.blend`.
    """
    people, name = body.get("people"), body.get("name")
    if not isinstance(people, dict) or not isinstance(name, str) or set(body) - {"people", "name"}:
        raise SettingError(
            'PuLID: blend takes people (as in {"anna": 0.7, "ben": 0.3}) and name (of the new identity).'
        )
    for one, share in people.items():
        check(FIELD["identity"], one, 0)
        check_share(share, one)
    made = library.identities.blend(list(people.items()), name)
    return {"name": made.name, "hash": made.short_hash, "made_for": made.adapter}


def presets(library: Library) -> dict[str, Any]:
    """Lists the user's presets: their settings, or why a file is not usable."""
    saved: list[dict[str, Any]] = []
    for name in library.presets.names():
        try:
            saved.append({"name": name, "settings": library.presets.load(name)})
        except SettingError as error:
            saved.append({"name": name, "problem": str(error)})
    return {"folder": str(library.presets.folder()), "presets": saved}


def identity_file(name: str, library: Library) -> tuple[str, bytes]:
    """Returns name and content of a saved identity's file; `NAME.pulidembd` is made from NAME if it does not exist.

    Raises:
        PulidError: there is no such identity, or it is for SDXL, which `.pulidembd` does not support.
    """
    path = library.identities.find(name)
    if path is None and name.lower().endswith(PULIDEMBD):
        from lib_pulid.identity import Identity

        identity = Identity.load(library.identities.named(name[: -len(PULIDEMBD)]).path)
        return PurePosixPath(name).name, identity.as_pulidembd()
    if path is None or not path.is_relative_to(library.identities.folder):
        raise IdentityMismatchError(f"{name} is not in {library.identities.folder}.")
    return path.name, path.read_bytes()


def _file(name: str, content: bytes) -> Response:
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    return Response(content, media_type="application/octet-stream", headers=headers)


def describe() -> dict[str, Any]:
    """Returns the unit's JSON schema, the weight and presets of each family, each method's weight and own settings, and
    the positional order."""
    presets = {family: {name: dict(values) for name, values in some.items()} for family, some in PRESETS.items()}
    order = [field.name for field in FIELDS]
    kinds = {
        method.label: {"family": method.family, "weight": method.weight, "settings": list(method.settings)}
        for method in METHODS
    }
    return {**schema(), "weights": dict(WEIGHTS), "presets": presets, "methods": kinds, "order": order}


def detect(body: Mapping[str, Any], library: Library) -> dict[str, Any]:
    """Finds the faces of photos. body: a unit's images, face_order, face_index. Boxes are in pixels of the photo.

    Raises:
        PulidError: a field is wrong, or a photo cannot be read or has no such face.
    """
    for name in body:
        if name not in DETECT_FIELDS:
            raise SettingError(f"PuLID, field {spelled(name)}: detect takes {', '.join(DETECT_FIELDS)} only.")
    checked = {name: check(FIELD[name], value, 0) for name, value in body.items() if value is not None}
    unit = PulidUnit(**checked)
    if not unit.images:
        raise SettingError("PuLID, field images: no photo; send at least one, as base64.")
    try:
        with at_unit(0, "images"):
            return {"photos": [_photo(text, f"photo {i}", unit, library) for i, text in enumerate(unit.images, 1)]}
    finally:
        library.encoders.release()


def _photo(text: str, name: str, unit: PulidUnit, library: Library) -> dict[str, Any]:
    photo = pictures.decode(text, name)
    notes: list[str] = []
    face = library.encoders.read_face(photo, unit.choice, name, notes.append)
    scale = max(1.0, max(photo.shape[:2]) / 1024)  # faces are measured in the reduced photo
    boxes = [[round(float(x) * scale, 1) for x in found.box] for found in face.detections]
    return {
        "faces": [{"box": box, "score": float(found.score)} for box, found in zip(boxes, face.detections)],
        "chosen": next(i for i, found in enumerate(face.detections) if found is face.detection),
        "warnings": [*pictures.warnings(face), *notes],
        "aligned": pictures.encode(face.aligned),
        "parsed": pictures.encode(pictures.parsed(face)),
    }


def _authenticator(api_auth: str) -> Any:
    """Returns the same check as the host's own API."""
    pairs = (pair.split(":") for pair in api_auth.split(","))
    known = dict(pair for pair in pairs if len(pair) == 2)

    def authenticate(credentials: Any = Depends(HTTPBasic())) -> None:  # noqa: B008
        expected = known.get(credentials.username)
        if expected is None or not compare_digest(credentials.password.encode(), expected.encode()):
            raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})

    return authenticate
