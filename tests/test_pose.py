"""A method's ControlNet (InstantID's IdentityNet) in Forge, A1111 and on the page: residuals, rows, ranges, files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_pulid import hosts, methods
from lib_pulid.control import Control, control_of, weighted
from lib_pulid.errors import (
    IdentityMismatchError,
    MissingWeightsError,
    SettingError,
    UnsupportedModelError,
    WrongWeightsError,
)
from lib_pulid.files import catalog, control_nets
from lib_pulid.hosts import a1111_control, forge_control
from lib_pulid.hosts.control_base import Loader, check_whole
from lib_pulid.hosts.frame import Frame
from lib_pulid.identity import Identity
from lib_pulid.identity_net import Pose, draw_points
from lib_pulid.injection import DenoiseStep
from lib_pulid.photos import fingerprint_files
from lib_pulid.sites import find_sites
from tests.fake_modules import a1111, installed
from tests.fake_modules.forge import ControlNetPatcher, P, sample
from tests.fake_modules.models import SMALL_BLOCKS, SMALL_SITES, WIDTH, SkipUNet, UNet, count_hooks, same, text
from tests.fake_modules.plan import RandomPlan
from tests.light_webui import unit
from tests.small_models import methods as small

INSTANTID, NET = "ip-adapter_instant_id_sdxl.bin", "control_instant_id_sdxl.safetensors"
LANDMARKS = np.array([[400, 420], [620, 410], [510, 560], [430, 700], [600, 690]], np.float32)
POSE = Pose(LANDMARKS, (1024, 1024))
TEXT_WIDTH = 2048
CATALOG = catalog.CATALOG


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------- the drawing


def test_an_image_of_the_official_size_is_the_official_drawing():
    sheet = (1280, 1280)
    assert np.array_equal(POSE.drawn(sheet), draw_points(LANDMARKS * 1.25, sheet))


SHEETS = [((1000, 1500), (832, 1280)), ((640, 640), (1280, 1280)), ((1200, 400), (1280, 384))]


@pytest.mark.parametrize(("photo", "sheet"), SHEETS)
def test_the_size_at_which_the_official_code_draws(photo, sheet):
    points = LANDMARKS * (np.array(photo) / 1024)
    assert np.array_equal(Pose(points, photo).drawn(sheet), draw_points(points * sheet / photo, sheet))


def test_a_part_of_the_image_shows_its_part_of_the_face():
    """A crop as of an inpainted region, and a margin, which is black."""
    whole, size = POSE.drawn((1024, 1024)).astype(int), (512, 512)
    part = POSE.drawn(size, Frame(0.25, 0.25, 0.75, 0.75)).astype(int)
    assert np.abs(part - whole[256:768, 256:768]).mean() < 1
    wider = POSE.drawn((1024, 1024), Frame(-0.5, -0.5, 1.5, 1.5)).astype(int)
    assert not wider[:256].any() and not wider[:, :256].any()
    assert np.abs(wider[256:768, 256:768] - POSE.drawn(size)).mean() < 1


def test_a_wide_image_is_covered_by_a_square_photo():
    wide = POSE.drawn((1024, 512))
    assert np.abs(wide.astype(int) - POSE.drawn((1024, 1024))[256:768].astype(int)).mean() < 1


# ---------------------------------------------------------------- in Forge


class Listening(UNet):
    """Keeps what it is given of ControlNets: copies, since it uses them up."""

    def __init__(self) -> None:
        super().__init__(TEXT_WIDTH, SMALL_BLOCKS)
        self.given: list[dict[str, list[Tensor]] | None] = []

    def forward(self, *args: Any, control: Any = None, **more: Any) -> Tensor:
        self.given.append(control and {part: [one.clone() for one in found] for part, found in control.items()})
        return super().forward(*args, control=control, **more)


class Controlled(RandomPlan):
    """Gives each injection a ControlNet."""

    control: Control | None = None
    images: frozenset[int] | None = None

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
    draw = torch.Generator().manual_seed(4)
    cond, uncond = (torch.randn(1, 16, TEXT_WIDTH, generator=draw) for _ in range(2))
    return Identity(cond, uncond, pose=POSE)


@pytest.fixture
def forge(small_sdxl) -> Iterator[Any]:
    with installed("forge"), torch.no_grad():
        yield hosts.current()
        hosts.current().stop()


def plan_of(file: Path, identity: Identity, weight: float = 0.0, **settings: Any) -> Controlled:
    """weight: of the adapter half."""
    plan = Controlled(weight=weight, **settings)
    plan.control = control_of(identity, POSE, file, 0.8, "cpu", torch.float32)
    return plan


def run(forge: Any, p: P, plan: RandomPlan | None, pictures: int = 1, **how: Any) -> list[Tensor]:
    if plan is not None:
        forge.start(p, plan)
    try:
        return sample(p, [text(pictures=pictures)], [text(seed=2, pictures=pictures)], **how,
                      before_sampling=forge.before_sampling)  # fmt: skip
    finally:
        forge.stop()


def of_diffusers(
    net: Any, x: Tensor, t: Tensor, tokens: Tensor, weight: float, part: tuple[float, ...] = (0, 0, 1, 1)
) -> list[Tensor]:
    """What diffusers' ControlNet adds to the UNet, with the pooled text and sizes at zero."""
    size = [side * 8 for side in x.shape[-2:]]
    image = torch.from_numpy(POSE.drawn((size[1], size[0]), part)).permute(2, 0, 1)[None].float() / 255
    zeros = SimpleNamespace(text=torch.zeros(len(x), 1280), sizes=torch.zeros(len(x), 1536))
    projection, net.add_time_proj = net.add_time_proj, torch.nn.Identity()
    try:
        added = {"text_embeds": zeros.text, "time_ids": zeros.sizes}
        down, mid = net(
            x, t, tokens, image.expand(len(x), -1, -1, -1), weight, added_cond_kwargs=added, return_dict=False
        )
    finally:
        net.add_time_proj = projection
    return [*down, mid]


def test_residuals_are_those_of_diffusers(forge, net, file, identity):
    """Rows are [negative, positive]; each reads its own face tokens, not the text."""
    p = P(Listening())
    run(forge, p, plan_of(file, identity), steps=1)
    (given,) = p.sd_model.forge_objects.unet.model.diffusion_model.given
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    wanted = of_diffusers(net, x, torch.full((2,), 14.6), torch.cat((identity.uncond, identity.cond)), 0.8)
    found = [*given["output"], *given["middle"]]
    assert len(found) == len(wanted) == 10
    for one, other in zip(found, wanted):
        assert relative(one, other) < 1e-5
    swapped = of_diffusers(net, x, torch.full((2,), 14.6), torch.cat((identity.cond, identity.uncond)), 0.8)
    assert relative(found[-1], swapped[-1]) > 1e-2


def test_each_pass_gets_the_points_at_its_size(forge, net, file, identity):
    """The first pass and that of hires fix."""
    p = P(Listening())
    forge.start(p, plan_of(file, identity))
    try:
        for hires, side in ((False, 8), (True, 16)):
            p.is_hr_pass = hires
            how = {"steps": 1, "hw": (side, side), "before_sampling": forge.before_sampling}
            sample(p, [text()], [text(seed=2)], **how)
    finally:
        forge.stop()
    tokens = torch.cat((identity.uncond, identity.cond))
    for side, given in zip((8, 16), p.sd_model.forge_objects.unet.model.diffusion_model.given):
        x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
        wanted = of_diffusers(net, x, torch.full((2,), 14.6), tokens, 0.8)
        assert relative(given["middle"][0], wanted[-1]) < 1e-5


def test_an_inpainted_region_gets_its_part_of_the_face(forge, net, file, identity):
    """As with "only masked", and ADetailer."""
    from PIL import Image

    p = P(Listening())
    vars(p).update(init_images=[Image.new("RGB", (256, 256))], inpaint_full_res=True, image_mask=object())
    vars(p).update(paste_to=(64, 64, 128, 128), width=64, height=64)
    run(forge, p, plan_of(file, identity), steps=1)
    (given,) = p.sd_model.forge_objects.unet.model.diffusion_model.given
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    what = (net, x, torch.full((2,), 14.6), torch.cat((identity.uncond, identity.cond)), 0.8)
    assert relative(given["middle"][0], of_diffusers(*what, part=(0.25, 0.25, 0.75, 0.75))[-1]) < 1e-5
    assert relative(given["middle"][0], of_diffusers(*what)[-1]) > 1e-3


def fresh() -> P:
    return P(UNet(TEXT_WIDTH, SMALL_BLOCKS))


def test_it_changes_the_image_and_off_is_bit_identical(forge, file, identity):
    """Alone, with an adapter's weight of 0, and beside the adapter."""
    p = fresh()
    plain, adapter = run(forge, p, None), run(forge, p, RandomPlan())
    alone, both = (run(forge, p, plan_of(file, identity, weight=weight)) for weight in (0.0, 1.0))
    assert len({tuple(images[-1].flatten().tolist()) for images in (plain, adapter, alone, both)}) == 4
    assert same(plain, run(forge, p, None))
    assert same(adapter, run(forge, p, RandomPlan()))
    assert count_hooks(p.sd_model.forge_objects.unet.model) == 0


def test_the_file_is_loaded_once_and_its_memory_is_announced(forge, file, identity):
    forge.loader = Loader(forge_control.build)
    built, p = ControlNetPatcher.built, fresh()
    for _ in range(2):
        run(forge, p, plan_of(file, identity))
        assert len(p.sd_model.forge_objects.unet.extra_model_patchers) == 1
    assert ControlNetPatcher.built - built == 1


def test_a_forge_that_reads_less_of_the_file(forge, file, identity, monkeypatch):
    """Its loader is not strict."""
    load = ControlNetPatcher.try_build_from_state_dict

    def forgetful(state: dict[str, Tensor], path: str) -> Any:
        made = load(state, path)
        next(made.model_patcher.control_model.parameters()).data.normal_()
        return made

    forge.loader = Loader(forge_control.build)
    monkeypatch.setattr(ControlNetPatcher, "try_build_from_state_dict", forgetful)
    with pytest.raises(UnsupportedModelError, match="This WebUI left out 1 of the [0-9]+ tensors of control_instant"):
        run(forge, P(Listening()), plan_of(file, identity))


def test_it_runs_in_its_range_of_steps(forge, file, identity):
    p = P(Listening())
    run(forge, p, plan_of(file, identity, start=0.25, end=0.75), steps=4)
    given = p.sd_model.forge_objects.unet.model.diffusion_model.given
    assert [one is not None for one in given] == [False, True, True, False]


def test_rows_of_other_images_get_nothing(forge, file, identity):
    """Of two images, one has the person in its prompt."""
    p, plan = P(Listening()), plan_of(file, identity)
    plan.images = frozenset({1})
    run(forge, p, plan, pictures=2, steps=1)
    (given,) = p.sd_model.forge_objects.unet.model.diffusion_model.given
    for residual in (*given["output"], *given["middle"]):
        assert [bool(row.any()) for row in residual] == [False, True, False, True]


def test_a_mask_keeps_the_residuals_in_its_region():
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    (found,) = weighted([torch.ones(2, 3, 4, 4)], [0, 1], mask)
    assert not found[..., :2].any() and (found[..., 2:] == 1).all()
    residual = torch.ones(2, 3, 4, 4)
    assert weighted([residual], [0, 1], None)[0] is residual


def test_beside_the_hosts_own_control_nets(forge, file, identity):
    """Their residuals are added to ours, in every block."""

    def ran(ours: bool, theirs: bool) -> list[Tensor]:
        def wrapper(apply_model: Any, args: dict) -> Tensor:
            control = {"input": [], "middle": [torch.ones(2, 128, 2, 2)], "output": []}
            control["output"] = [torch.full((2, *shape), 2.0) for shape in SHAPES]
            args["c"] = {**args["c"], "control": control} if theirs else args["c"]
            return apply_model(args["input"], args["timestep"], **args["c"])

        p = P(Listening())
        p.sd_model.forge_objects.unet.set_model_unet_function_wrapper(wrapper)
        run(forge, p, plan_of(file, identity) if ours else None, steps=1)
        (given,) = p.sd_model.forge_objects.unet.model.diffusion_model.given
        return [*given["output"], *given["middle"]]

    for ours, theirs, both in zip(ran(True, False), ran(False, True), ran(True, True)):
        assert torch.allclose(both, ours + theirs, atol=1e-5)


SHAPES = [(32, 8, 8)] * 3 + [(32, 4, 4)] + [(64, 4, 4)] * 2 + [(64, 2, 2)] + [(128, 2, 2)] * 2


def test_tiles_are_refused(forge, file, identity):
    """Another wrapper calls the denoiser with a part of the image."""

    def tiles(apply_model: Any, args: dict) -> Tensor:
        part = args["input"][..., :4]
        return apply_model(part, args["timestep"], **args["c"]).repeat(1, 1, 1, 2)

    p = fresh()
    p.sd_model.forge_objects.unet.set_model_unet_function_wrapper(tiles)
    with pytest.raises(SettingError, match="Field identity_net: the points of a face do not work with tiled denoising"):
        run(forge, p, plan_of(file, identity))


def test_a_net_for_a_model_of_another_size(forge, file, identity):
    p = fresh()
    p.sd_model.forge_objects.unet.model.diffusion_model.model_channels = 320
    with pytest.raises(UnsupportedModelError, match="its width is 32, the checkpoint's is 320"):
        run(forge, p, plan_of(file, identity))


# ---------------------------------------------------------------- in A1111, with sd-webui-controlnet


@pytest.fixture
def extension() -> Iterator[Any]:
    with a1111.controlnet() as made:
        yield made


@pytest.fixture
def webui(small_sdxl, extension) -> Iterator[Any]:
    """A1111."""
    with installed("a1111"), torch.no_grad():
        hosts.current().loader = Loader(hosts.current().loader._build)
        yield hosts.current()
        hosts.current().stop()


def ran(
    webui: Any, plan: RandomPlan | None, unet: Any = None, pictures: int = 1, texts: Any = None, **how: Any
) -> list[Tensor]:
    """The UNet's outputs of each step; rows are [positive..., negative...]. texts: of both kinds of rows."""
    p = a1111.P(unet or SkipUNet())
    p.prompts = [""] * pictures
    if plan is not None:
        webui.start(p, plan)
    try:
        texts = texts or (text(pictures=pictures), text(seed=2, pictures=pictures))
        return a1111.sample(p, *texts, pictures=pictures, **how)
    finally:
        webui.stop()


def with_residuals(residuals: list[Tensor], pictures: int = 1, side: int = 8) -> Tensor:
    """The output of the UNet with a ControlNet's residuals added in its own forward, of the first step."""
    x = torch.randn(2 * pictures, 4, side, side, generator=torch.Generator().manual_seed(0))
    context = torch.cat((text(pictures=pictures), text(seed=2, pictures=pictures)))
    return SkipUNet()(x, None, context, added=residuals)


def residuals_of(net: Any, identity: Identity, weight: float, pictures: int = 1, side: int = 8, **more: Any) -> Any:
    x = torch.randn(2 * pictures, 4, side, side, generator=torch.Generator().manual_seed(0))
    tokens = [identity.cond.expand(pictures, -1, -1), identity.uncond.expand(pictures, -1, -1)]
    return of_diffusers(net, x, torch.full((2 * pictures,), 14.6), torch.cat(tokens), weight, **more)


EXACT = 2e-6  # of the whole effect; exchanged tokens of the small network are 3e-3 of it, other points 4e-4


def off_by(found: Tensor, wanted: Tensor, plain: Tensor) -> float:
    """The error of an effect, relative to the effect."""
    return relative(found - plain, wanted - plain)


@pytest.mark.parametrize("weight", [0.8, 1.5])
@pytest.mark.parametrize("together", [True, False])
def test_a1111_adds_the_residuals_of_diffusers(webui, net, file, identity, weight, together):
    """In the skip connections and the middle block. Each row reads its own face tokens, in one call or in two."""
    plan = plan_of(file, identity)
    plan.control = replace(plan.control, weight=weight)
    (plain,), (found,) = (ran(webui, one, steps=1, together=together) for one in (None, plan))
    assert off_by(found, with_residuals(residuals_of(net, identity, weight)), plain) < EXACT
    swapped = replace(identity, cond=identity.uncond, uncond=identity.cond)
    assert off_by(found, with_residuals(residuals_of(net, swapped, weight)), plain) > 1e-3
    assert off_by(found, with_residuals(residuals_of(net, identity, weight + 0.1)), plain) > 1e-2


def test_a1111_a_skipped_negative_prompt(webui, net, file, identity):
    """NGMS leaves the negative rows out in odd steps."""
    found, plain = (ran(webui, one, skip_uncond=True) for one in (plan_of(file, identity), None))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))[:1]
    residuals = of_diffusers(net, x, torch.full((1,), 7.3), identity.cond, 0.8)
    assert off_by(found[1], SkipUNet()(x, None, text(), added=residuals), plain[1]) < EXACT


def test_a1111_uneven_prompts(webui, net, file, identity):
    """The rows come in two calls, the longer prompt's first; the ControlNet reads no prompt."""
    long, short = text(154), text(77, seed=2)
    (plain,), (found,) = (ran(webui, one, texts=(long, short), steps=1) for one in (None, plan_of(file, identity)))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    residuals = residuals_of(net, identity, 0.8)
    for row, context in enumerate((long, short)):
        wanted = SkipUNet()(x[row : row + 1], None, context, added=[one[row : row + 1] for one in residuals])
        assert off_by(found[row : row + 1], wanted, plain[row : row + 1]) < EXACT


def test_a1111_each_pass_gets_the_points_at_its_size(webui, net, file, identity):
    p, found = a1111.P(SkipUNet()), []
    webui.start(p, plan_of(file, identity))
    try:
        for p.is_hr_pass, side in ((False, 8), (True, 16)):
            found += a1111.sample(p, text(), text(seed=2), steps=1, hw=(side, side))
    finally:
        webui.stop()
    for one, side in zip(found, (8, 16)):
        (plain,) = ran(webui, None, steps=1, hw=(side, side))
        assert off_by(one, with_residuals(residuals_of(net, identity, 0.8, side=side), side=side), plain) < EXACT


def test_a1111_an_inpainted_region_gets_its_part_of_the_face(webui, net, file, identity):
    from PIL import Image

    p = a1111.P(SkipUNet())
    vars(p).update(init_images=[Image.new("RGB", (256, 256))], inpaint_full_res=True, image_mask=object())
    vars(p).update(paste_to=(64, 64, 128, 128), width=64, height=64)
    webui.start(p, plan_of(file, identity))
    (found,), (plain,) = a1111.sample(p, text(), text(seed=2), steps=1), ran(webui, None, steps=1)
    part = residuals_of(net, identity, 0.8, part=(0.25, 0.25, 0.75, 0.75))
    assert off_by(found, with_residuals(part), plain) < EXACT
    assert off_by(found, with_residuals(residuals_of(net, identity, 0.8)), plain) > 1e-4


def test_a1111_range_of_steps(webui, file, identity):
    plain = ran(webui, None, steps=4)
    found = ran(webui, plan_of(file, identity, start=0.25, end=0.75), steps=4)
    assert [torch.equal(one, other) for one, other in zip(plain, found)] == [True, False, False, True]


def test_a1111_rows_of_other_images_get_nothing(webui, file, identity):
    plan = plan_of(file, identity)
    plan.images = frozenset({1})
    (plain,), (found,) = (ran(webui, one, pictures=2, steps=1) for one in (None, plan))
    assert [torch.equal(one, other) for one, other in zip(plain, found)] == [True, False, True, False]


def test_a1111_a_mask(webui, net, file, identity):
    """The residuals act in the region alone."""
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    (plain,), (found,) = ran(webui, None, steps=1), ran(webui, plan_of(file, identity, mask=mask), steps=1)
    wanted = [residual.clone() for residual in residuals_of(net, identity, 0.8)]
    for residual in wanted:
        residual[..., : residual.shape[-1] // 2] = 0
    assert off_by(found, with_residuals(wanted), plain) < EXACT
    assert off_by(found, with_residuals(residuals_of(net, identity, 0.8)), plain) > 1e-2


def test_a1111_off_is_bit_identical_and_nothing_is_left(webui, extension, file, identity):
    unet = SkipUNet()
    plain, adapter = ran(webui, None, unet), ran(webui, RandomPlan(), unet)
    both = ran(webui, plan_of(file, identity, weight=1.0), unet)
    assert not same(plain, adapter) and not same(adapter, both)
    assert same(plain, ran(webui, None, unet)) and same(adapter, ran(webui, RandomPlan(), unet))
    assert count_hooks(unet) == 0
    ran(webui, plan_of(file, identity), unet)
    assert extension.built == 1  # once, and kept


def test_a1111_beside_the_extensions_own_units(webui, net, file, identity):
    """It puts a forward of its own in the place of the UNet's, which adds the residuals of its units."""
    theirs = [0.1 * residual for residual in residuals_of(net, identity, 1.0)]
    unet, forward = SkipUNet(), SkipUNet.forward
    unet.forward = lambda *args, **kwargs: forward(unet, *args, **kwargs, added=theirs)
    (plain,), (found,) = ran(webui, None, unet, steps=1), ran(webui, plan_of(file, identity), unet, steps=1)
    assert torch.equal(plain, with_residuals(theirs))
    summed = [one + other for one, other in zip(theirs, residuals_of(net, identity, 0.8))]
    assert off_by(found, with_residuals(summed), plain) < EXACT


def test_a1111_the_refiner_finishes_what_began_with_the_pose(webui, file, identity):
    """With an adapter's weight of 0, too; before the pose's start, it is refused."""
    refiner = UNet(1280, (1, 0, 1))

    def made(plan: RandomPlan) -> list[Tensor]:
        p = a1111.P(SkipUNet())

        def before_step(step: int) -> None:
            if step == 2:
                p.load(refiner)

        with webui.sampling(p, plan):
            return a1111.sample(p, text(), text(seed=2), steps=3, before_step=before_step)

    refiner.forward = lambda x, *args: x
    assert len(made(plan_of(file, identity))) == 3
    with pytest.raises(SettingError, match="refiner takes over before PuLID starts"):
        made(plan_of(file, identity, start=0.7))
    assert count_hooks(refiner) == 0


def test_a1111_tiles_are_refused(webui, file, identity):
    p = a1111.P(SkipUNet())
    webui.start(p, plan_of(file, identity))

    webui.running[-1].before_step(params(p))
    with pytest.raises(SettingError, match="Field identity_net: the points of a face do not work with tiled denoising"):
        p.sd_model.model.diffusion_model(torch.randn(1, 4, 8, 4), torch.full((1,), 14.6), text())


def params(p: Any) -> Any:
    """CFGDenoiserParams of a first step."""
    x, texts = torch.randn(2, 4, 8, 8), {"text_cond": text(), "text_uncond": text(seed=2)}
    return SimpleNamespace(x=x, sigma=torch.full((1,), 14.6), denoiser=a1111.Denoiser(p, 1), **texts)


def test_a1111_the_net_is_where_the_unet_is_until_the_end(file, identity):
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
    (injection,) = plan_of(file, identity).injections(loaded(SkipUNet()), hires=False)
    nets.prepare(SkipUNet(), torch.float32, [injection])
    x, step = torch.zeros(2, 4, 8, 8, device="meta"), DenoiseStep(0.0, [True, False])
    call = (x, torch.zeros(2, device="meta"))
    with pytest.raises(Called) as called, nets.around(call, {}, step, [injection]):
        pass
    assert called.value.args == (dict.fromkeys(("x", "hint", "timesteps", "context"), "meta"),)
    assert Net.moves == ["meta"]
    nets.end()
    assert Net.moves == ["meta", "cpu"]


def loaded(unet: Any) -> hosts.LoadedModel:
    return hosts.LoadedModel(find_sites(unet), unet, torch.device("cpu"), torch.float32, "")


def test_a1111_a_net_for_a_model_of_another_size(webui, file, identity):
    unet = SkipUNet()
    unet.model_channels = 320
    with pytest.raises(UnsupportedModelError, match="its width is 32, the checkpoint's is 320"):
        ran(webui, plan_of(file, identity), unet)


def test_a1111_something_runs_instead_of_the_unet(webui, file, identity):
    """As TensorRT does. With the adapter's weight at 0, nothing but the residuals would be missing."""
    unet = SkipUNet()
    unet.forward = lambda x, *args: x
    p = a1111.P(unet)
    with (
        pytest.raises(UnsupportedModelError, match="the pose was never added"),
        webui.sampling(p, plan_of(file, identity)),
    ):
        a1111.sample(p, text(), text(seed=2))
    assert count_hooks(unet) == 0


def test_a1111_a_version_that_reads_less_of_the_file(webui, extension, file, identity):
    """It loads the tensors that it knows, and leaves the others as they were made."""
    load = extension.build_model_by_guess

    def forgetful(state: dict[str, Tensor], unet: Any, path: str) -> Any:
        made = load(state, unet, path)
        made.model.control_model.net.conv_in.weight.data.normal_()
        return made

    extension.build_model_by_guess = forgetful
    words = "sd-webui-controlnet v1.1.455 left out 1 of the [0-9]+ tensors of control_instant_id_sdxl.safetensors"
    with pytest.raises(UnsupportedModelError, match=words):
        ran(webui, plan_of(file, identity))


def test_a_file_that_lacks_a_part():
    made = {name: torch.randn(3, 4) for name in "abc"}
    renamed = {f"renamed.{name}": one.half().reshape(-1) for name, one in made.items()}
    check_whole(made, renamed, Path("net"), "It")
    with pytest.raises(WrongWeightsError, match="net lacks 1 of 3 tensors. Download it again"):
        check_whole({name: made[name] for name in "ab"}, made, Path("net"), "It")
    with pytest.raises(UnsupportedModelError, match="It left out 1 of the 4 tensors of net"):
        check_whole({**made, "d": torch.ones(1)}, made, Path("net"), "It")


@pytest.mark.parametrize(("made", "words"), [
    (lambda *_: SimpleNamespace(), r"made no ControlNet of .*, but SimpleNamespace"),
    (lambda *_: {}["control_model"], r"cannot load .* \('control_model'\). Update it"),
    (lambda state, path: None, r"cannot load .* positional argument"),
])  # fmt: skip
def test_a1111_another_version_is_refused_by_name(webui, extension, file, identity, made, words):
    extension.build_model_by_guess = made
    with pytest.raises(UnsupportedModelError, match=f"The extension sd-webui-controlnet v1.1.455 {words}"):
        ran(webui, plan_of(file, identity))


def test_a1111_an_older_version_gives_the_network_alone(webui, extension, file, identity):
    wanted, load = ran(webui, plan_of(file, identity)), extension.build_model_by_guess
    webui.loader = Loader(webui.loader._build)
    extension.build_model_by_guess = lambda *args: load(*args).model
    assert same(wanted, ran(webui, plan_of(file, identity)))


def test_why_there_are_no_control_nets_in_a1111(small_sdxl):
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
    if host.kind == "forge":
        yield host
        return
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
    """Two units: the adapter of one, the ControlNet of the other."""
    face, pose = unit("ben"), person(weight=0, identity_net=0.8)
    images = [equipped.generate(units, "sdxl") for units in ([], [face], [pose], [face, pose])]
    assert len({tuple(one[-1].flatten().tolist()) for one in images}) == 4


def test_a_weight_of_0_is_off_unless_the_net_is_asked_for(equipped, net_file):
    plain = equipped.generate([], "sdxl")
    assert same(plain, equipped.generate([person(weight=0)], "sdxl"))
    assert not same(plain, equipped.generate([person(weight=0, identity_net=0.8)], "sdxl"))


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
    save_file({"control_model.input_blocks.0.0.weight": torch.zeros(2)}, net_file)
    with pytest.raises(WrongWeightsError, match=f"field identity_net: {NET} is a ControlNet, or not for SDXL"):
        equipped.generate([person()], "sdxl")
    net_file.write_bytes(b"nothing")
    with pytest.raises(WrongWeightsError, match="damaged, or no safetensors file"):
        equipped.generate([person()], "sdxl")
    state = small.identity_net(text_width=32).state_dict()
    save_file(state, net_file)
    with pytest.raises(WrongWeightsError, match="reads tokens of width 32"):
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


def test_the_strength_belongs_to_a_method_with_a_control_net(host, net_file):
    with pytest.raises(SettingError, match=r"field identity_net: PuLID v1 for SDXL has no such setting"):
        host.generate([unit("anna", identity_net=0.5)], "sdxl")


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

    def fingerprints(paths: list[Path]) -> str:
        reads.extend(path for path in paths if path == net_file)
        return fingerprint_files(paths)

    def is_known(size: int, sha256: str) -> None:
        known = replace(official, size=size, sha256=sha256)
        monkeypatch.setattr(catalog, "CATALOG", tuple(known if one == official else one for one in CATALOG))

    monkeypatch.setattr("lib_pulid.photos.fingerprint_files", fingerprints)
    is_known(len(state) + 1, "0" * 8)
    equipped.generate([person(identity_net=0.8)], "sdxl")
    assert reads == []
    is_known(len(state), right[:8])
    for _ in range(2):
        equipped.generate([person(identity_net=0.8)], "sdxl")
    assert reads == [net_file]
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


def test_each_role_is_in_the_catalog():
    roles = {file.role for file in catalog.CATALOG}
    assert {method.control for method in methods.METHODS if method.control} <= roles


# ---------------------------------------------------------------- the command line


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Any:
    """The small SDXL of diffusers with InstantID's adapter half."""
    from lib_pulid import standalone
    from lib_pulid.hosts.diffusers import denoiser_of
    from lib_pulid.photos import Encoders, IdentityCache
    from lib_pulid.weights import load_adapter
    from tests.light_webui import face_models
    from tests.small_models.bases import TEXT_WIDTH, small_parts

    base, _, _ = small_parts("sdxl")
    widths = [site.width for site in find_sites(denoiser_of(base.pipeline)).sites]
    made = small.method_files(widths, token_width=TEXT_WIDTH, only=["instantid"])
    adapter = load_adapter(small.write(tmp_path / INSTANTID, made["instantid"]))
    encoders = Encoders(face_models(), None)
    made = standalone.Workshop(base, adapter, lambda: encoders, "", IdentityCache(), models_dir=tmp_path / "models")
    monkeypatch.setattr(standalone, "open_workshop", lambda *args: made)
    return made


@pytest.fixture
def generate(shop, tmp_path, capsys) -> Any:
    """Runs `generate`; returns status, what was said, and the image."""
    from PIL import Image

    from lib_pulid import cli

    Image.new("RGB", (64, 64), (200, 80, 60)).save(tmp_path / "photo.png")
    out = tmp_path / "image.png"

    def generate(*rest: str) -> tuple[int, str, np.ndarray | None]:
        out.unlink(missing_ok=True)
        given = ("--prompt", "x", "--model", "m", "--face", tmp_path / "photo.png", "--size", 64, "--steps", 2)
        where = ("--models-dir", shop.models_dir, "-o", out)
        status = cli.main(["generate", "--adapter", str(shop.adapter.path), *map(str, (*given, *where)), *rest])
        said = capsys.readouterr()
        return status, said.out + said.err, np.asarray(Image.open(out)) if out.exists() else None

    return generate


def test_generate_with_the_control_net(shop, generate):
    from lib_pulid.hosts.diffusers import denoiser_of
    from tests.reference import method_cases

    status, said, adapter = generate()
    assert status == 0 and "note: InstantID's ControlNet (IdentityNet) is missing" in said
    status, said, _ = generate("--identity-net", "0.8")
    assert status == 1 and "IdentityNet) is missing" in said
    folder = shop.models_dir / "pulid"
    folder.mkdir(parents=True)
    save_file(method_cases.identity_net(denoiser_of(shop.base.pipeline)).state_dict(), folder / NET)
    status, said, both = generate("--identity-net", "1.5")
    assert status == 0 and "; ControlNet 1.5" in said and "note" not in said
    assert not np.array_equal(both, adapter)
    status, said, off = generate("--identity-net", "0")
    assert status == 0 and np.array_equal(off, adapter)
    assert "; ControlNet 0.8" in generate()[1]
    status, said, _ = generate("--identity-net", "3")
    assert status == 1 and "--identity-net: 3.0 is out of range; use 0 to 2" in said
