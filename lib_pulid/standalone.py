"""Runs PuLID without a WebUI, for the command line, with real weights or the miniature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lib_pulid import disk, miniature
from lib_pulid.errors import IdentityMismatchError, MissingWeightsError, NoFaceError, UnsupportedModelError
from lib_pulid.face_models import ArcFaceRecogniser, InsightFaceDetector, load_face_models
from lib_pulid.faces import LARGEST, Detector, FaceChoice
from lib_pulid.files import catalog, control_nets
from lib_pulid.hosts.diffusers import apply, denoiser_of
from lib_pulid.hosts.diffusers_base import Base, load_base, paint
from lib_pulid.hosts.diffusers_control import identity_net, load_identity_net
from lib_pulid.identity import Identity
from lib_pulid.images import ImageSource
from lib_pulid.injection import Injection, check_fit, compile_injection
from lib_pulid.likeness import (
    INSIGHTFACE,
    MINIATURE,
    NO_FACE,
    Person,
    Recognizer,
    Scale,
    SeenFace,
    choose_judge,
    measure,
)
from lib_pulid.methods import IMAGE_ENCODERS, Method
from lib_pulid.photos import Encoders, IdentityCache, fingerprint_files, load_image_encoder, make_identity
from lib_pulid.sites import find_sites
from lib_pulid.stores.encoders import recognizers
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.watch import Watch
from lib_pulid.weights import Adapter, load_adapter

if TYPE_CHECKING:
    from PIL import Image


# Loads the models that read photos; and what identifies their weights.
Readers = tuple[Callable[[], Encoders], str]


@dataclass(frozen=True)
class Workshop:
    """A base model, its adapter, and the encoders of photos.

    Args:
        encoders_id: identifies the encoders' weights, for the cache.
        others: returns both for another method; None: the same encoders read for all.
        limits: a sentence on what to do if no face is found.
        recognizer: the hash of the adapter's own recognizer. judges: what likeness can be measured with, the best
            first. detector: loads what finds the faces of images. scale: what the judges' cosines mean.
        check_prompt: returns notes on what the base model does not understand in a prompt.
        models_dir: the models folder, for the method's ControlNet.
    """

    base: Base
    adapter: Adapter
    encoders: Callable[[], Encoders]
    encoders_id: str
    cache: IdentityCache
    limits: str = ""
    recognizer: str = ""
    judges: Sequence[Recognizer] = ()
    detector: Callable[[], Detector] | None = None
    scale: Scale = INSIGHTFACE
    check_prompt: Callable[[str], Sequence[str]] = lambda prompt: ()
    models_dir: Path = Path("models")
    others: Callable[[Method], Readers] | None = None

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return next(denoiser_of(self.base.pipeline).parameters()).device

    @property
    def label(self) -> str:
        """The adapter and the base model, for captions."""
        return f"{self.adapter.label} on {self.base.label}"

    def identity(self, photos: Sequence[ImageSource], choice: FaceChoice = LARGEST, **settings: Any) -> Identity:
        """See `photos.make_identity`. settings: fusion, on_face and judge."""
        try:
            return make_identity(
                photos,
                self.adapter,
                encoders=self.encoders,
                encoders_id=self.encoders_id,
                cache=self.cache,
                choice=choice,
                recognizer=self.recognizer,
                **settings,
            )
        except NoFaceError as error:
            raise NoFaceError(f"{error} {self.limits}".rstrip()) from error

    def paint(
        self, injections: Sequence[Injection], prompt: str, seed: int = 0, **settings: int | float | None
    ) -> tuple[Image.Image, int]:
        """Generates an image. Returns it, and the number of sites at which a residual was really added."""
        (image,), used = self.paint_batch([injections], [prompt], [seed], **settings)
        return image, used

    def paint_batch(
        self,
        people: Sequence[Sequence[Injection]],
        prompts: Sequence[str],
        seeds: Sequence[int],
        **settings: int | float | None,
    ) -> tuple[list[Image.Image], int]:
        """Generates images at once, each with injections, a prompt and a seed of its own. Returns as `paint`."""
        watch = Watch()
        sites = watch.over(find_sites(denoiser_of(self.base.pipeline)))
        own = [replace(one, images=frozenset({image})) for image, group in enumerate(people) for one in group]
        with apply(self.base.pipeline, own, sites):
            images = paint(self.base, prompts, seeds, **settings)  # type: ignore[arg-type]
        return images, len(watch.reached)

    def readers_of(self, method: Method) -> Readers:
        """Returns what reads photos for a method, loaded at the first call and kept, and what identifies its weights.

        Raises:
            MissingWeightsError, WrongWeightsError. UnsupportedModelError: there is nothing that could.
        """
        if self.others is not None:
            return self.others(method)
        if unknown := set(method.reads) - set(self.adapter.method.reads):
            raise UnsupportedModelError(f"Nothing here reads photos for {method.label} ({', '.join(sorted(unknown))}).")
        sees = any(role in IMAGE_ENCODERS for role in method.reads)
        return (self.encoders if sees else lambda: replace(self.encoders(), tower=None)), self.encoders_id

    def controlled(
        self, identity: Identity, injection: Injection, size: int, strength: float
    ) -> AbstractContextManager[None]:
        """Loads the ControlNet of the adapter's method, and lets it run beside an injection in what is painted inside
        the `with`.

        injection: gives range and mask. size: of the image, whose sides are equal.

        Raises:
            MissingWeightsError, WrongWeightsError. IdentityMismatchError: the identity does not say where the face is.
        """
        role = self.adapter.method.control
        if identity.pose is None:
            name = control_nets.file_of(role).purpose
            raise IdentityMismatchError(f"{name} needs to know where the face is. Give the photo with --face.")
        path = control_nets.require(role, self.models_dir / "pulid", self.models_dir, identity.cond.shape[-1])
        net, points = load_identity_net(path, self.base.pipeline), identity.pose.drawn((size, size))
        place: dict[str, Any] = {"start": injection.start, "end": injection.end, "mask": injection.mask}
        return identity_net(self.base.pipeline, net, identity, points, weight=strength, **place)

    def likeness(self, image: Image.Image, identity: Identity) -> str:
        """Measures how like a person the face in an image is, in words for the user."""
        judge = choose_judge(self.judges, [identity.embeddings])
        if judge is None or self.detector is None:
            return "unknown: the identity has no face embedding. Make it from the photo again."
        rgb = np.asarray(image.convert("RGB"))
        bgr, recogniser = np.ascontiguousarray(rgb[:, :, ::-1]), judge.load()
        faces = [SeenFace(face.box, recogniser.embed(bgr, face)) for face in self.detector().detect(bgr)]
        (value,) = measure(faces, [Person(identity.embeddings[judge.key])], rgb.shape[:2])
        by = f"by {judge.name}" + (", the adapter's own recognizer, which overestimates" if judge.is_own else "")
        return NO_FACE if value is None else f"{value:.2f} ({self.scale.verdict(value)}), {by}"


def open_workshop(model: str, models_dir: Path, pulid: Path | None = None, device: str = "cpu") -> Workshop:
    """Loads what `model` needs: a checkpoint, a diffusers folder, or a name of `miniature.MODELS`.

    Args:
        pulid: a PuLID file; None: the first of the right family in the models folder, or the miniature's.

    Raises:
        MissingWeightsError, WrongWeightsError.
    """
    cache = IdentityCache(models_dir / "pulid" / "cache")
    if model in miniature.MODELS:
        return _miniature(miniature.MODELS[model], pulid, cache, device)
    base = load_base(model, device)
    path = pulid or catalog.find_adapter(base.family, models_dir)
    if path is None:
        raise catalog.no_adapter(base.family, models_dir / "pulid", models_dir)
    adapter = _adapter(path, base)
    files = catalog.require_encoders(models_dir, adapter.method.reads)
    folder = ModelsFolder(lambda: Settings(models_dir))
    return Workshop(
        base=base,
        adapter=adapter,
        encoders=lambda: _encoders(files, device),
        encoders_id=catalog.fingerprint(files, folder.fingerprint),
        cache=cache,
        recognizer=folder.fingerprint(files["recogniser"]) if "recogniser" in files else "",
        judges=recognizers(files.get("recogniser"), folder, partial(ArcFaceRecogniser, device=device)),
        detector=(lambda: InsightFaceDetector(files["detector"], device)) if "detector" in files else None,
        models_dir=models_dir,
        others=_others(folder, device),
    )


def _others(folder: ModelsFolder, device: str) -> Callable[[Method], Readers]:
    """See `Workshop.readers_of`. Methods that read the same files share what is loaded."""
    loaded: dict[tuple[str, ...], Readers] = {}

    def others(method: Method) -> Readers:
        if method.reads not in loaded:
            files = catalog.require_encoders(folder.models_dir, method.reads)
            once = lru_cache(1)(lambda: _encoders(files, device))
            loaded[method.reads] = once, catalog.fingerprint(files, folder.fingerprint)
        return loaded[method.reads]

    return others


def _encoders(files: Mapping[str, Path], device: str) -> Encoders:
    """Loads the models that read photos, from their files by role."""
    faces = load_face_models(files, device) if "detector" in files else None
    return Encoders(faces, load_image_encoder(files, device))


def _miniature(family: str, pulid: Path | None, cache: IdentityCache, device: str) -> Workshop:
    base = _miniature_base(family, device)
    return Workshop(
        base=base,
        adapter=_adapter(pulid or miniature.adapter(family), base),
        encoders=miniature.encoders,
        encoders_id=fingerprint_files(miniature.encoder_files()),
        cache=cache,
        limits=miniature.LIMITS,
        recognizer=fingerprint_files(miniature.encoder_files()[1:2]),
        judges=[miniature.recognizer()],
        detector=lambda: miniature.face_models().detector,
        scale=MINIATURE,
        check_prompt=miniature.check_prompt,
    )


def _miniature_base(family: str, device: str) -> Base:
    settings: dict[str, Any] = {"size": miniature.SIZE, "steps": miniature.STEPS}
    settings["guidance"] = miniature.GUIDANCE[family]
    base = replace(load_base(miniature.checkpoint("sdxl"), device), name="miniature", **settings)
    if family == "sdxl":
        return base
    from lib_pulid.training.flux import load_pipeline, prompt_encoder

    pipeline, text = load_pipeline(miniature.checkpoint(family), base.pipeline), prompt_encoder(base.pipeline)
    return replace(base, pipeline=pipeline, family=family, text=text, guidance_argument="true_cfg_scale")


def _adapter(path: Path, base: Base) -> Adapter:
    """Loads a PuLID file and checks, before a photo is read, that it fits the base model."""
    adapter = load_adapter(path)
    nobody = Identity(torch.zeros(1, 1, adapter.encoder.output_dim))  # type: ignore[arg-type,call-overload]
    check_fit(find_sites(denoiser_of(base.pipeline)), compile_injection(adapter, nobody))
    return adapter


def real_model(family: str, models_dir: Path) -> str | None:
    """Returns a base model in the models folder's `sdxl` or `flux`: a single file or a diffusers folder."""
    for path in disk.listed(models_dir / family):
        if path.suffix == ".safetensors" or disk.is_file(path / "model_index.json"):
            return str(path)
    return None


def has_real_weights(family: str, models_dir: Path) -> bool:
    """Whether all files for a real image are there."""
    try:
        catalog.require_encoders(models_dir)
    except MissingWeightsError:
        return False
    return bool(real_model(family, models_dir) and catalog.find_adapter(family, models_dir))
