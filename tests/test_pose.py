"""A method's ControlNet (InstantID's IdentityNet) in Forge, A1111 and on the page: residuals, rows, ranges, files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lib_pulid import hosts
from lib_pulid.control import Control, Pose, draw_points
from lib_pulid.disk import fingerprint
from lib_pulid.errors import (
    IdentityMismatchError,
    MissingWeightsError,
    SettingError,
    UnsupportedModelError,
    WrongWeightsError,
)
from lib_pulid.files import catalog, control_nets
from lib_pulid.hosts import a1111_control
from lib_pulid.hosts.control_base import Loader, check_whole
from lib_pulid.hosts.frame import Frame
from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep
from lib_pulid.sites import find_sites
from tests.fake_modules import a1111, installed, kinds
from tests.fake_modules.forge import ControlNetPatcher
from tests.fake_modules.kinds import texts
from tests.fake_modules.models import SMALL_SITES, WIDTH, SkipUNet, UNet, count_hooks, same, text
from tests.fake_modules.plan import RandomPlan
from tests.light_webui import unit
from tests.reference.cases import relative
from tests.small_models import methods as small
from tests.small_models import normal

INSTANTID, NET = "ip-adapter_instant_id_sdxl.bin", "control_instant_id_sdxl.safetensors"
LANDMARKS = np.array([[400, 420], [620, 410], [510, 560], [430, 700], [600, 690]], np.float32)
POSE = Pose(LANDMARKS, (1024, 1024))
TEXT_WIDTH = 2048
CATALOG = catalog.CATALOG


# ---------------------------------------------------------------- the drawing


SQUARE = (1280, 1280)
SHEETS = [((1024, 1024), SQUARE), ((1000, 1500), (832, 1280)), ((640, 640), SQUARE), ((1200, 400), (1280, 384))]


@pytest.mark.parametrize(("photo", "sheet"), SHEETS)
def test_the_size_at_which_the_official_code_draws(photo, sheet):
    points = LANDMARKS * (np.array(photo) / 1024)
    assert np.array_equal(Pose(points, photo).drawn(sheet), draw_points(points * sheet / photo, sheet))


def test_a_part_of_the_image_shows_its_part_of_the_face():
    """A crop as of an inpainted region, a margin, which is black, and a wide image, which a square photo covers."""
    whole, size = POSE.drawn((1024, 1024)).astype(int), (512, 512)
    part = POSE.drawn(size, Frame(0.25, 0.25, 0.75, 0.75)).astype(int)
    assert np.abs(part - whole[256:768, 256:768]).mean() < 1
    wider = POSE.drawn((1024, 1024), Frame(-0.5, -0.5, 1.5, 1.5)).astype(int)
    assert not wider[:256].any() and not wider[:, :256].any()
    assert np.abs(wider[256:768, 256:768] - POSE.drawn(size)).mean() < 1
    assert np.abs(POSE.drawn((1024, 512)) - whole[256:768]).mean() < 1


# ---------------------------------------------------------------- in both hosts


class Controlled(RandomPlan):
    """Gives each injection a ControlNet."""

    control: Control | None = None
    images: frozenset[int] | None = None

    def has_face(self, *, hires: bool) -> bool:
        return self.control is not None or super().has_face(hires=hires)

    def injections(self, model: hosts.LoadedModel, *, hires: bool) -> list[Any]:
        return [
            replace(one, control=self.control, images=self.images) for one in super().injections(model, hires=hires)
        ]


@pytest.fixture(scope="module")
def net() -> Any:
    return small.identity_net(text_width=TEXT_WIDTH)


@pytest.fixture(scope="module")
def file(net, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nets") / NET
    save_file(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity(normal(4, 1, 16, TEXT_WIDTH), normal(5, 1, 16, TEXT_WIDTH), pose=POSE)


@pytest.fixture
def extension() -> Iterator[Any]:
    with a1111.controlnet() as made:
        yield made


class A1111(kinds.A1111):
    """With sd-webui-controlnet. Rows are [positive..., negative...]; each image has latents of its own."""

    loader = "sd-webui-controlnet v1.1.455"

    def rows(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return torch.cat((cond, uncond))

    def latents(self, pictures: int, side: int) -> Tensor:
        return latents(2 * pictures, side)

    def reads_less(self, monkeypatch: Any, spoil: Any) -> None:
        module = sys.modules["scripts.controlnet_model_guess"]
        load = module.build_model_by_guess
        monkeypatch.setattr(module, "build_model_by_guess", lambda *args: spoil(load(*args), "model"))


class Forge(kinds.Forge):
    """Rows are [negative..., positive...], of the same latents."""

    loader = "This WebUI"

    def rows(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return torch.cat((uncond, cond))

    def latents(self, pictures: int, side: int) -> Tensor:
        return latents(pictures, side).repeat(2, 1, 1, 1)

    def reads_less(self, monkeypatch: Any, spoil: Any) -> None:
        load = ControlNetPatcher.try_build_from_state_dict
        made = lambda *args: spoil(load(*args), "model_patcher")  # noqa: E731
        monkeypatch.setattr(ControlNetPatcher, "try_build_from_state_dict", made)


def latents(rows: int, side: int, seed: int = 0) -> Tensor:
    return normal(seed, rows, 4, side, side)


@contextmanager
def inside(kind: type) -> Iterator[Any]:
    with installed(kind.name), torch.no_grad():
        hosts.current().loader = Loader(hosts.current().loader._build)
        yield kind()
        hosts.current().stop()


@pytest.fixture(params=[A1111, Forge])
def kind(request, small_sdxl, extension) -> Iterator[Any]:
    with inside(request.param) as made:
        yield made


@pytest.fixture
def on_a1111(small_sdxl, extension) -> Iterator[Any]:
    with inside(A1111) as made:
        yield made


def plan_of(file: Path, identity: Identity, weight: float = 0.0, **settings: Any) -> Controlled:
    """weight: of the adapter half."""
    plan = Controlled(weight=weight, **settings)
    plan.control = Control(file, identity.rows, POSE, 0.8)
    return plan


def ran(kind: Any, plan: RandomPlan | None, unet: Any = None, p: Any = None, **how: Any) -> list[Tensor]:
    return kind.run(p or kind.P(unet or SkipUNet()), plan, **how)


def of_diffusers(
    net: Any, x: Tensor, sigma: float, tokens: Tensor, weight: float, part: tuple[float, ...] = (0, 0, 1, 1)
) -> list[Tensor]:
    """What diffusers' ControlNet adds to the UNet, with the pooled text and sizes at zero."""
    size = [side * 8 for side in x.shape[-2:]]
    image = torch.from_numpy(POSE.drawn((size[1], size[0]), part)).permute(2, 0, 1)[None].float() / 255
    added = {"text_embeds": torch.zeros(len(x), 1280), "time_ids": torch.zeros(len(x), 1536)}
    projection, net.add_time_proj = net.add_time_proj, torch.nn.Identity()
    try:
        down, mid = net(
            x, torch.full((len(x),), sigma), tokens, image.expand(len(x), -1, -1, -1), weight, added_cond_kwargs=added,
            return_dict=False,
        )  # fmt: skip
    finally:
        net.add_time_proj = projection
    return [*down, mid]


def residuals_of(
    kind: Any, net: Any, identity: Identity, weight: float = 0.8, pictures: int = 1, side: int = 8, **more: Any
) -> list[Tensor]:
    """Of the first step."""
    tokens = kind.rows(*(one.expand(pictures, -1, -1) for one in (identity.cond, identity.uncond)))
    return of_diffusers(net, kind.latents(pictures, side), 14.6, tokens, weight, **more)


def with_residuals(kind: Any, residuals: list[Tensor], side: int = 8) -> Tensor:
    """The output of the UNet with a ControlNet's residuals added in its own forward, of the first step."""
    return SkipUNet()(kind.latents(1, side), None, kind.rows(*texts()), added=residuals)


EXACT = 2e-6  # of the whole effect; exchanged tokens of the small network are 3e-3 of it, other points 4e-4


def off_by(found: Tensor, wanted: Tensor, plain: Tensor) -> float:
    """The error of an effect, relative to the effect."""
    return relative(found - plain, wanted - plain)


@pytest.mark.parametrize(("weight", "together"), [(0.8, True), (1.5, False)])
def test_residuals_are_those_of_diffusers(kind, net, file, identity, weight, together):
    """In the skip connections and the middle block. Each row reads its own face tokens, in one call or in two."""
    plan = plan_of(file, identity)
    plan.control = replace(plan.control, weight=weight)
    how = {"together": together} if isinstance(kind, A1111) else {}
    (plain,), (found,) = (ran(kind, one, steps=1, **how) for one in (None, plan))
    assert off_by(found, with_residuals(kind, residuals_of(kind, net, identity, weight)), plain) < EXACT
    swapped = replace(identity, cond=identity.uncond, uncond=identity.cond)
    assert off_by(found, with_residuals(kind, residuals_of(kind, net, swapped, weight)), plain) > 1e-3
    assert off_by(found, with_residuals(kind, residuals_of(kind, net, identity, weight + 0.1)), plain) > 1e-2


def test_each_pass_gets_the_points_at_its_size(kind, net, file, identity):
    """The first pass and that of hires fix."""
    p, found = kind.P(SkipUNet()), []
    hosts.current().start(p, plan_of(file, identity))
    for p.is_hr_pass, side in ((False, 8), (True, 16)):
        found += kind.sample(p, steps=1, hw=(side, side))
    hosts.current().stop()
    for one, side in zip(found, (8, 16)):
        (plain,) = ran(kind, None, steps=1, hw=(side, side))
        wanted = with_residuals(kind, residuals_of(kind, net, identity, side=side), side)
        assert off_by(one, wanted, plain) < EXACT


def test_an_inpainted_region_gets_its_part_of_the_face(kind, net, file, identity):
    """As with "only masked", and ADetailer."""
    from PIL import Image

    p = kind.P(SkipUNet())
    vars(p).update(init_images=[Image.new("RGB", (256, 256))], inpaint_full_res=True, image_mask=object())
    vars(p).update(paste_to=(64, 64, 128, 128), width=64, height=64)
    (found,), (plain,) = ran(kind, plan_of(file, identity), p=p, steps=1), ran(kind, None, steps=1)
    part = residuals_of(kind, net, identity, part=(0.25, 0.25, 0.75, 0.75))
    assert off_by(found, with_residuals(kind, part), plain) < EXACT
    assert off_by(found, with_residuals(kind, residuals_of(kind, net, identity)), plain) > 1e-4


def test_the_file_is_loaded_once(kind, extension, file, identity):
    """Forge's memory manager is given its size, too."""
    built = ControlNetPatcher.built
    for _ in range(2):
        p = kind.P(SkipUNet())
        ran(kind, plan_of(file, identity), p=p)
        if isinstance(kind, Forge):
            assert len(p.sd_model.forge_objects.unet.extra_model_patchers) == 1
    assert extension.built + ControlNetPatcher.built - built == 1


def test_a_version_that_reads_less_of_the_file(kind, file, identity, monkeypatch):
    """It loads the tensors that it knows, and leaves the others as they were made."""

    def spoil(made: Any, part: str) -> Any:
        getattr(made, part).control_model.net.conv_in.weight.data.normal_()
        return made

    kind.reads_less(monkeypatch, spoil)
    with pytest.raises(UnsupportedModelError, match=f"{kind.loader} left out 1 of the [0-9]+ tensors of {NET}"):
        ran(kind, plan_of(file, identity))


def test_range_of_steps_and_rows(kind, file, identity):
    """Steps outside of it get nothing; nor do rows of the image of two that has no person in its prompt."""
    plain, found = (ran(kind, one, steps=4) for one in (None, plan_of(file, identity, start=0.25, end=0.75)))
    assert [torch.equal(one, other) for one, other in zip(plain, found)] == [True, False, False, True]
    plan = plan_of(file, identity)
    plan.images = frozenset({1})
    (plain,), (found,) = (ran(kind, one, pictures=2, steps=1) for one in (None, plan))
    assert [torch.equal(one, other) for one, other in zip(plain, found)] == [True, False, True, False]


def test_a_mask(kind, net, file, identity):
    """The residuals act in the region alone."""
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    (plain,), (found,) = ran(kind, None, steps=1), ran(kind, plan_of(file, identity, mask=mask), steps=1)
    wanted = [residual.clone() for residual in residuals_of(kind, net, identity)]
    for residual in wanted:
        residual[..., : residual.shape[-1] // 2] = 0
    assert off_by(found, with_residuals(kind, wanted), plain) < EXACT
    assert off_by(found, with_residuals(kind, residuals_of(kind, net, identity)), plain) > 1e-2


def test_what_is_refused(kind, file, identity):
    """A model of another size than the net's, and a denoiser that is called with a part of the image."""
    larger, tiled = SkipUNet(), SkipUNet()
    larger.model_channels = 320
    with pytest.raises(UnsupportedModelError, match="its width is 32, the checkpoint's is 320"):
        ran(kind, plan_of(file, identity), larger)
    tiled.register_forward_pre_hook(lambda module, args: (args[0][..., :4], *args[1:]))
    with pytest.raises(SettingError, match="Field identity_net: the points of a face do not work with tiled denoising"):
        ran(kind, plan_of(file, identity), tiled)


def test_beside_the_hosts_own_control_nets(kind, net, file, identity):
    """Their residuals are added to ours: Forge hands them to the UNet, A1111's extension has a forward of its own."""
    theirs = [0.1 * residual for residual in residuals_of(kind, net, identity, 1.0)]

    def wrapper(apply_model: Any, args: dict) -> Tensor:
        control = {"input": [], "middle": [theirs[-1]], "output": theirs[:-1]}
        return apply_model(args["input"], args["timestep"], **args["c"], control=control)

    def made(plan: RandomPlan | None) -> Tensor:
        unet, forward = SkipUNet(), SkipUNet.forward
        p = kind.P(unet)
        if isinstance(kind, Forge):
            p.sd_model.forge_objects.unet.set_model_unet_function_wrapper(wrapper)
        else:
            unet.forward = lambda *args, **kwargs: forward(unet, *args, **kwargs, added=theirs)
        return ran(kind, plan, p=p, steps=1)[0]

    plain, found = made(None), made(plan_of(file, identity))
    assert torch.equal(plain, with_residuals(kind, theirs))
    summed = [one + other for one, other in zip(theirs, residuals_of(kind, net, identity))]
    assert off_by(found, with_residuals(kind, summed), plain) < EXACT


# ---------------------------------------------------------------- what only A1111 does


def test_a_skipped_negative_prompt(on_a1111, net, file, identity):
    """NGMS leaves the negative rows out in odd steps."""
    found, plain = (ran(on_a1111, one, skip_uncond=True) for one in (plan_of(file, identity), None))
    x = latents(2, 8, seed=1)[:1]
    residuals = of_diffusers(net, x, 7.3, identity.cond, 0.8)
    assert off_by(found[1], SkipUNet()(x, None, text(), added=residuals), plain[1]) < EXACT


def test_uneven_prompts(on_a1111, net, file, identity):
    """The rows come in two calls, the longer prompt's first; the ControlNet reads no prompt."""
    both = text(154), text(77, seed=2)
    (plain,), (found,) = (ran(on_a1111, one, prompts=both, steps=1) for one in (None, plan_of(file, identity)))
    residuals = residuals_of(on_a1111, net, identity)
    for row, context in enumerate(both):
        own = [one[row : row + 1] for one in residuals]
        wanted = SkipUNet()(latents(2, 8)[row : row + 1], None, context, added=own)
        assert off_by(found[row : row + 1], wanted, plain[row : row + 1]) < EXACT


def test_the_refiner_finishes_what_began_with_the_pose(on_a1111, file, identity):
    """With an adapter's weight of 0, too; before the pose's start, it is refused."""
    refiner = UNet(1280, (1, 0, 1))

    def made(plan: RandomPlan) -> list[Tensor]:
        p = a1111.P(SkipUNet())

        def before_step(step: int) -> None:
            if step == 2:
                p.load(refiner)

        with hosts.current().sampling(p, plan):
            return a1111.sample(p, *texts(), steps=3, before_step=before_step)

    refiner.forward = lambda x, *args: x
    assert len(made(plan_of(file, identity))) == 3
    with pytest.raises(SettingError, match="refiner takes over before PuLID starts"):
        made(plan_of(file, identity, start=0.7))
    assert count_hooks(refiner) == 0


def test_the_net_is_where_the_unet_is_until_the_end(file, identity):
    """The UNet's device is one without memory here, so the net ends with what it was given."""

    class Called(Exception):
        pass

    class Net(torch.nn.Linear):
        control_model, moves = None, []

        def to(self, device: Any) -> Any:
            self.moves.append(str(device))
            return self

        def forward(self, **given: Any) -> Any:
            raise Called({name: one.device.type for name, one in given.items() if one is not None})

    nets = a1111_control.ControlNets(Loader(lambda path: Net(1, 1)))
    unet = SkipUNet()
    model = hosts.LoadedModel(find_sites(unet), unet, torch.device("cpu"), torch.float32, "")
    (injection,) = plan_of(file, identity).injections(model, hires=False)
    nets.prepare(unet, torch.float32, [injection])
    x, step = torch.zeros(2, 4, 8, 8, device="meta"), DenoiseStep(0.0, [True, False])
    call = (x, torch.zeros(2, device="meta"))
    with pytest.raises(Called) as called, ExitStack() as hooks:
        nets.add(call, {}, step, [injection], hooks)
    assert called.value.args == (dict.fromkeys(("x", "hint", "timesteps", "context"), "meta"),)
    assert Net.moves == ["meta"]
    nets.end()
    assert Net.moves == ["meta", "cpu"]


def test_something_runs_instead_of_the_unet(on_a1111, file, identity):
    """As TensorRT does. With the adapter's weight at 0, nothing but the residuals would be missing."""
    unet = SkipUNet()
    unet.forward = lambda x, *args: x
    p = a1111.P(unet)
    with (
        pytest.raises(UnsupportedModelError, match="the pose was never added"),
        hosts.current().sampling(p, plan_of(file, identity)),
    ):
        on_a1111.sample(p)
    assert count_hooks(unet) == 0


def test_a_file_that_lacks_a_part():
    made = {name: torch.randn(3, 4) for name in "abc"}
    renamed = {f"renamed.{name}": one.half().reshape(-1) for name, one in made.items()}
    check_whole(made, renamed, Path("net"), "It")
    with pytest.raises(WrongWeightsError, match="net lacks 1 of 3 tensors. Download it again"):
        check_whole({name: made[name] for name in "ab"}, made, Path("net"), "It")


@pytest.mark.parametrize(("made", "words"), [
    (lambda *_: SimpleNamespace(), r"made no ControlNet of .*, but SimpleNamespace"),
    (lambda *_: {}["control_model"], r"cannot load .* \('control_model'\). Update it"),
    (lambda state, path: None, r"cannot load .* positional argument"),
])  # fmt: skip
def test_another_version_is_refused_by_name(on_a1111, extension, file, identity, made, words):
    extension.build_model_by_guess = made
    with pytest.raises(UnsupportedModelError, match=f"The extension {on_a1111.loader} {words}"):
        ran(on_a1111, plan_of(file, identity))


def test_an_older_version_gives_the_network_alone(on_a1111, extension, file, identity):
    wanted, load = ran(on_a1111, plan_of(file, identity)), extension.build_model_by_guess
    hosts.current().loader = Loader(hosts.current().loader._build)
    extension.build_model_by_guess = lambda *args: load(*args).model
    assert same(wanted, ran(on_a1111, plan_of(file, identity)))


def test_why_there_are_no_control_nets(small_sdxl):
    with installed("a1111"):
        assert "needs the extension sd-webui-controlnet for it, which is not" in hosts.current().why_no_control_nets()
        with a1111.controlnet() as made:
            assert hosts.current().why_no_control_nets() == ""
            del made.build_model_by_guess
            told = "sd-webui-controlnet v1.1.455 has no build_model_by_guess. Update it"
            assert told in hosts.current().why_no_control_nets()
    with installed("forge"):
        assert hosts.current().why_no_control_nets() == ""


# ---------------------------------------------------------------- from a photo to an image


@pytest.fixture(scope="module")
def adapter_file(light_models) -> Iterator[Path]:
    made = small.method_files([WIDTH] * SMALL_SITES, text_width=TEXT_WIDTH, gain=3.0, only=["instantid"])
    path = small.write(light_models / "pulid" / INSTANTID, made["instantid"])
    yield path
    path.unlink()


@pytest.fixture
def net_file(light_models, adapter_file) -> Iterator[Path]:
    path = light_models / "pulid" / NET
    save_file(small.identity_net().state_dict(), path)
    yield path
    path.unlink()


def person(name: str = "anna", **settings: Any) -> dict[str, Any]:
    return unit(name, model=INSTANTID, **settings)


def notes_of(p: Any) -> str:
    return "\n".join(p.comments)


def made_of(host: Any, *units: Any) -> tuple[list[Tensor], Any]:
    p = host.processing("sdxl")
    return host.generate(list(units), p=p), p


@pytest.fixture
def equipped(host) -> Iterator[Any]:
    """The host with ControlNets: Forge, and A1111 with sd-webui-controlnet."""
    before, host.unets["sdxl"] = host.unets["sdxl"], SkipUNet()
    with a1111.controlnet():
        hosts.current().loader = Loader(hosts.current().loader._build)
        yield host
    host.unets["sdxl"] = before


def test_a_photo_sets_the_pose(equipped, net_file):
    plain, both = equipped.generate([], "sdxl"), equipped.generate([person(identity_net=0.8)], "sdxl")
    adapter = equipped.generate([person(identity_net=0)], "sdxl")
    assert not same(plain, adapter) and not same(both, adapter)
    assert same(adapter, equipped.generate([person(identity_net=0)], "sdxl"))
    assert same(plain, equipped.generate([], "sdxl"))
    assert equipped.left_behind() == []
    _, p = made_of(equipped, person())
    assert f"net: {NET}" in p.extra_generation_params["PuLID 1"] and notes_of(p) == ""


def test_a1111_without_the_extension_says_what_is_missing(host, net_file):
    """The adapter half acts, whether the strength was given or not."""
    if host.kind == "forge":
        pytest.skip("it has ControlNets of its own")
    adapter = host.generate([person(identity_net=0)], "sdxl")
    for asked in (person(), person(identity_net=0.8)):
        images, p = made_of(host, asked)
        assert same(images, adapter)
        assert "does not run in this WebUI; A1111 needs the extension sd-webui-controlnet for it" in notes_of(p)
        assert "Install, enable or update it, and restart the WebUI." in notes_of(p)
        parameters = p.extra_generation_params["PuLID 1"]
        assert "left out: InstantID's ControlNet (IdentityNet) does not run in this WebUI" in parameters
        assert "identity_net: 0," in parameters
    plain = host.generate([], "sdxl")
    assert same(plain, host.generate([person(weight=0, identity_net=0.8)], "sdxl"))


def test_pulids_face_in_instantids_pose(equipped, net_file):
    """Two units: the adapter of one, the ControlNet of the other. A weight of 0 is off unless the net is asked for."""
    face, pose = unit("ben"), person(weight=0, identity_net=0.8)
    images = [equipped.generate(units, "sdxl") for units in ([], [face], [pose], [face, pose])]
    assert len({tuple(one[-1].flatten().tolist()) for one in images}) == 4
    assert same(images[0], equipped.generate([person(weight=0)], "sdxl"))


def test_without_the_file(equipped, adapter_file):
    """Asked for by name it is an error; by default, the adapter acts, and a note says what is missing."""
    with pytest.raises(MissingWeightsError, match=f"unit 1, field identity_net: .*is missing:\n  {NET}"):
        equipped.generate([person(identity_net=0.5)], "sdxl")
    images, p = made_of(equipped, person())
    assert same(images, equipped.generate([person(identity_net=0)], "sdxl"))
    assert NET in notes_of(p) and "set identity_net to 0" in notes_of(p)
    assert "identity_net: 0," in p.extra_generation_params["PuLID 1"]
    assert notes_of(made_of(equipped, person(identity_net=0))[1]) == ""


def test_another_file_under_its_name(equipped, net_file):
    for content, words in (
        (save({"control_model.input_blocks.0.0.weight": torch.zeros(2)}), "is a ControlNet, or not for SDXL"),
        (b"nothing", ".*damaged, or no safetensors file"),
        (save(small.identity_net(text_width=32).state_dict()), ".*reads tokens of width 32"),
    ):
        net_file.write_bytes(content)
        with pytest.raises(WrongWeightsError, match=f"field identity_net: {NET} {words}"):
            equipped.generate([person()], "sdxl")


def test_one_person_sets_the_pose(equipped, net_file):
    with pytest.raises(SettingError, match="follow the pose of one person only, and unit 2 has a strength, too"):
        equipped.generate([person(identity_net=0.8), person("ben", identity_net=0.5)], "sdxl")
    images, p = made_of(equipped, person(), person("ben"))
    assert "left out for unit 1 and unit 2" in notes_of(p)
    assert same(images, equipped.generate([person(identity_net=0), person("ben", identity_net=0)], "sdxl"))
    chosen = equipped.generate([person(), person("ben", identity_net=0.8)], "sdxl")
    assert same(chosen, equipped.generate([person(identity_net=0), person("ben", identity_net=0.8)], "sdxl"))


def test_a_saved_identity_keeps_its_pose(equipped, net_file):
    saved = equipped.encode("anna", INSTANTID)
    equipped.library.identities.save("Anna", saved)
    equipped.library.identities.save("Old", replace(saved, pose=None))
    images = equipped.generate([{"identity": "Anna"}], "sdxl")
    assert same(images, equipped.generate([person()], "sdxl"))
    with pytest.raises(IdentityMismatchError, match="which this saved identity does not tell"):
        equipped.generate([{"identity": "Old", "identity_net": 0.8}], "sdxl")
    assert same(equipped.generate([{"identity": "Old"}], "sdxl"), equipped.generate([person(identity_net=0)], "sdxl"))


def test_a_cached_identity_of_an_older_version_gets_its_pose(equipped, net_file):
    equipped.forget_photos()
    made = equipped.encode("anna", INSTANTID)
    (path,) = (equipped.library.folder.path / "cache").glob("*.safetensors")
    replace(made, pose=None).save(path, replace=True)
    equipped.library.identities._cache = None
    again = equipped.encode("anna", INSTANTID)
    assert again.short_hash == made.short_hash
    assert np.array_equal(again.pose.landmarks, made.pose.landmarks) and again.pose.photo == made.pose.photo


# ---------------------------------------------------------------- its file


def test_where_the_file_is_found(tmp_path):
    """By its name in the folders of the catalog; in the PuLID folder by its tensors."""
    folder, controls = tmp_path / "pulid", tmp_path / "ControlNet"
    folder.mkdir()
    controls.mkdir()

    def found() -> Path | None:
        return control_nets.find("identity_net", folder, tmp_path)

    state = small.identity_net().state_dict()
    save_file(state, controls / "canny.safetensors")
    assert found() is None  # any ControlNet: only the catalog's size would tell it
    for path in (folder / "mine.safetensors", controls / "ControlNetModel" / "diffusion_pytorch_model.safetensors",
                 controls / NET, folder / NET):  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        save_file(state, path)
        assert found() == path
        if path.name == "mine.safetensors":
            path.unlink()


def test_a_file_of_the_official_size_has_the_official_bytes(equipped, net_file, monkeypatch):
    """Its checksum is computed once. Files of other sizes pass: people convert them."""
    official, state = control_nets.file_of("identity_net"), net_file.read_bytes()
    assert (official.size, official.sha256) == (2_502_139_136, "c8127be9")
    right = hashlib.sha256(state).hexdigest()
    reads: list[Path] = []

    def is_known(size: int, sha256: str) -> None:
        known = replace(official, size=size, sha256=sha256)
        monkeypatch.setattr(catalog, "CATALOG", tuple(known if one == official else one for one in CATALOG))

    of_bytes = "lib_pulid.stores.folder.fingerprint"
    monkeypatch.setattr(of_bytes, lambda path: reads.append(path) or fingerprint(path))
    is_known(len(state) + 1, "0" * 8)
    equipped.generate([person(identity_net=0.8)], "sdxl")
    assert net_file not in reads
    is_known(len(state), right[:8])
    for _ in range(2):
        equipped.generate([person(identity_net=0.8)], "sdxl")
    assert reads.count(net_file) == 1
    is_known(len(state), "0" * 8)
    words = f"unit 1, field identity_net: .*{NET} is damaged: its checksum is {right[:8]}..., not 00000000"
    with pytest.raises(WrongWeightsError, match=words):
        equipped.generate([person()], "sdxl")


def test_the_panel_lists_what_the_chosen_methods_need(host, adapter_file):
    from lib_pulid.webui.missing import Missing

    panel = Missing("txt2img", host.library, lambda: "sdxl")
    buffalo = {"w600k_r50.onnx", "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"}
    assert {file.name for file in panel.files()} == set()
    if host.kind == "a1111":  # it could not run
        assert panel.files([INSTANTID]) == ()
        with a1111.controlnet():
            assert [file.name for file in panel.files([INSTANTID])] == [NET]
        return
    assert [file.name for file in panel.files([INSTANTID])] == [NET]
    assert panel.files([INSTANTID])[0].restricted
    save_file(small.identity_net().state_dict(), host.folder / "pulid" / "under-another-name.safetensors")
    try:
        assert panel.files([INSTANTID]) == ()
    finally:
        (host.folder / "pulid" / "under-another-name.safetensors").unlink()
    assert not buffalo & {file.name for file in panel.files(["auto", INSTANTID])}


def test_the_panel_reads_the_enabled_units():
    from lib_pulid.webui.missing import _models

    units = ("None", True, "one.bin"), ("None", False, "two.bin"), ("None", True, "auto")
    assert _models([value for one in units for value in one]) == ("one.bin", "auto")
    assert _models(["None", False, "two.bin"]) == ("two.bin",)
    assert _models([]) == ("auto",)


def test_doctor_says_what_a_method_lacks(host, adapter_file):
    from lib_pulid.doctor import _of_methods

    (line,) = _of_methods(host.folder)
    assert line.startswith(f"for InstantID for SDXL: python -m lib_pulid models download {NET}")
