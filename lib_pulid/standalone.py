"""Runs PuLID without a WebUI, for the command line, with real weights or the miniature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lib_pulid import disk, miniature
from lib_pulid.disk import fingerprint
from lib_pulid.errors import IdentityMismatchError, MissingWeightsError, NoFaceError, UnsupportedModelError
from lib_pulid.face_models import ArcFaceRecogniser, InsightFaceDetector
from lib_pulid.faces import LARGEST, Detector, FaceChoice
from lib_pulid.fields import AUTO
from lib_pulid.files import catalog, control_nets
from lib_pulid.hosts.diffusers import apply
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
from lib_pulid.methods import IMAGE_ENCODERS, Method, usual
from lib_pulid.photos import Encoders, IdentityCache, load_encoders, make_identity
from lib_pulid.sites import find_sites
from lib_pulid.stores.adapters import Adapters
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
        readers: returns what reads photos for a method.
        limits: a sentence on what to do if no face is found.
        recognizer: the hash of the adapter's own recognizer. judges: what likeness can be measured with, the best
            first. detector: loads what finds the faces of images. scale: what the judges' cosines mean.
        check_prompt: returns notes on what the base model does not understand in a prompt.
        models_dir: the models folder, for the method's ControlNet.
    """

    base: Base
    adapter: Adapter
    readers: Callable[[Method], Readers]
    cache: IdentityCache
    limits: str = ""
    recognizer: str = ""
    judges: Sequence[Recognizer] = ()
    detector: Callable[[], Detector] | None = None
    scale: Scale = INSIGHTFACE
    check_prompt: Callable[[str], Sequence[str]] = lambda prompt: ()
    models_dir: Path = Path("models")

    @property
    def label(self) -> str:
        """The adapter and the base model, for captions: "PuLID v1.1 for SDXL on SDXL (UNet2DConditionModel)"."""
        name = self.base.name or type(self.base.denoiser).__name__
        return f"{self.adapter.label} on {self.base.family.upper()} ({name})"

    def identity(self, photos: Sequence[ImageSource], choice: FaceChoice = LARGEST, **settings: Any) -> Identity:
        """See `photos.make_identity`. settings: fusion, on_face, judge and warn."""
        encoders, encoders_id = self.readers(self.adapter.method)
        try:
            return make_identity(
                photos,
                self.adapter,
                encoders=encoders,
                encoders_id=encoders_id,
                cache=self.cache,
                choice=choice,
                recognizer=self.recognizer,
                **settings,
            )
        except NoFaceError as error:
            raise NoFaceError(f"{error} {self.limits}".rstrip()) from error

    def compiled(self, identity: Identity, **settings: Any) -> Injection:
        """Compiles an identity for the denoiser. settings: of `compile_injection`."""
        like = next(self.base.denoiser.parameters())
        return compile_injection(self.adapter, identity, device=like.device, dtype=like.dtype, **settings)

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
        sites = watch.over(find_sites(self.base.denoiser))
        own = [replace(one, images=frozenset({image})) for image, group in enumerate(people) for one in group]
        with apply(self.base.pipeline, own, sites):
            images = paint(self.base, prompts, seeds, **settings)  # type: ignore[arg-type]
        return images, len(watch.reached)

    def encoders(self) -> Encoders:
        """Loads the models that read photos for the adapter."""
        return self.readers(self.adapter.method)[0]()

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
        folder = ModelsFolder(lambda: Settings(self.models_dir)).path
        path = control_nets.require(role, folder, self.models_dir, identity.cond.shape[-1])
        net, points = load_identity_net(path, self.base.pipeline), identity.pose.drawn((size, size))
        place: dict[str, Any] = {"start": injection.start, "end": injection.end, "mask": injection.mask}
        return identity_net(self.base.pipeline, net, identity, points, weight=strength, **place)

    def likeness(self, image: Image.Image, identity: Identity) -> str:
        """Measures how like a person the face in an image is, in words for the user."""
        if not self.adapter.method.reads_faces:
            return f"unknown: {self.adapter.label} reads no face."
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
    folder = ModelsFolder(lambda: Settings(models_dir))
    cache = IdentityCache(folder.path / "cache")
    if model in miniature.MODELS:
        return _miniature(miniature.MODELS[model], pulid, cache, device)
    base = load_base(model, device)
    adapter = _fitting(load_adapter(pulid) if pulid else Adapters(folder).load(AUTO, base.family), base)
    files = catalog.require_encoders(models_dir, adapter.method.reads)
    readers = partial(_readers, folder, device)
    readers(adapter.method)  # before a photo is asked for: a file may be damaged
    return Workshop(
        base=base,
        adapter=adapter,
        readers=readers,
        cache=cache,
        recognizer=folder.fingerprint(files["recogniser"]) if "recogniser" in files else "",
        judges=recognizers(files.get("recogniser"), folder, partial(ArcFaceRecogniser, device=device)),
        detector=(lambda: InsightFaceDetector(files["detector"], device)) if "detector" in files else None,
        models_dir=models_dir,
    )


def _readers(folder: ModelsFolder, device: str, method: Method) -> Readers:
    """Returns what reads photos for a method, of the files in a models folder.

    Raises:
        MissingWeightsError, WrongWeightsError.
    """
    files = catalog.require_encoders(folder.models_dir, method.reads)
    return partial(load_encoders, files, device), catalog.fingerprint(files, folder.fingerprint)


def fixed_readers(load: Callable[[], Encoders], encoders_id: str, method: Method) -> Readers:
    """Returns what reads photos for a method, where there are PuLID's encoders only.

    Raises:
        UnsupportedModelError: they cannot read for it.
    """
    if unknown := set(method.reads) - set(usual(method.family).reads):
        raise UnsupportedModelError(f"Nothing here reads photos for {method.label} ({', '.join(sorted(unknown))}).")
    sees = any(role in IMAGE_ENCODERS for role in method.reads)
    return (load if sees else lambda: replace(load(), tower=None)), encoders_id


def keeping(workshop: Workshop) -> Workshop:
    """Returns the workshop with encoders that are loaded once and kept, for many people. Methods that read the same
    files share them."""
    kept: dict[tuple[str, ...], Readers] = {}

    def readers(method: Method) -> Readers:
        if method.reads not in kept:
            load, encoders_id = workshop.readers(method)
            kept[method.reads] = lru_cache(1)(load), encoders_id
        return kept[method.reads]

    return replace(workshop, readers=readers)


def _miniature(family: str, pulid: Path | None, cache: IdentityCache, device: str) -> Workshop:
    base, prints = _miniature_base(family, device), [*map(fingerprint, miniature.encoder_files())]
    return Workshop(
        base=base,
        adapter=_fitting(load_adapter(pulid or miniature.adapter(family)), base),
        readers=partial(fixed_readers, miniature.encoders, "-".join(prints)),
        cache=cache,
        limits=miniature.LIMITS,
        recognizer=prints[1],
        judges=[miniature.recognizer()],
        detector=lambda: miniature.face_models().detector,
        scale=MINIATURE,
        check_prompt=miniature.check_prompt,
    )


def _miniature_base(family: str, device: str) -> Base:
    settings: dict[str, Any] = {"size": miniature.SIZE, "steps": miniature.STEPS[family]}
    settings["guidance"] = miniature.GUIDANCE[family]
    base = replace(load_base(miniature.checkpoint("sdxl"), device), name="miniature", **settings)
    if family == "sdxl":
        return base
    from lib_pulid.training.flux import load_pipeline, prompt_encoder

    pipeline, text = load_pipeline(miniature.checkpoint(family), base.pipeline), prompt_encoder(base.pipeline)
    return replace(base, pipeline=pipeline, family=family, text=text, guidance_argument="true_cfg_scale")


def _fitting(adapter: Adapter, base: Base) -> Adapter:
    """Checks, before a photo is read, that an adapter fits the base model."""
    nobody = Identity(torch.zeros(1, 1, adapter.encoder.output_dim))  # type: ignore[arg-type,call-overload]
    check_fit(find_sites(base.denoiser), compile_injection(adapter, nobody))
    return adapter


def real_model(family: str, models_dir: Path) -> str | None:
    """Returns a base model in the models folder's `sdxl` or `flux`, a single file or a diffusers folder. None: it is
    not there, or another file that a real image needs."""
    try:
        catalog.require_encoders(models_dir)
    except MissingWeightsError:
        return None
    if catalog.find_adapter(family, models_dir) is None:
        return None
    for path in disk.listed(models_dir / family):
        if path.suffix == ".safetensors" or disk.is_file(path / "model_index.json"):
            return str(path)
    return None
