"""PuLID's training losses and the injection that carries their gradients, on a small UNet with random weights."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lib_pulid import miniature
from lib_pulid.faces import CROP_SIZE, Detection
from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep, compile_injection, inject
from lib_pulid.miniature import unpack
from lib_pulid.sites import find_sites
from lib_pulid.training import adapter as adapters
from lib_pulid.training import autoencoder, base, checkpoint, flux, losses, readers, sampled_faces, schedule, world
from lib_pulid.training.crops import ARCFACE_POINTS
from lib_pulid.training.dataset import SCENES_EACH, Drawn, made_once
from lib_pulid.training.injection import FluxAdapter, RowIdentities, SDXLAdapter, id_former, inject_rows
from lib_pulid.training.loop import Run
from lib_pulid.training.photos import Photos, photos_of
from lib_pulid.weights import Adapter, load_adapter
from tests import layouts
from tests.reference import cases


@pytest.fixture(scope="module")
def adapter(unet) -> SDXLAdapter:
    return SDXLAdapter(id_former(seed=3), [site.width for site in find_sites(unet).sites])


def face(seed: int) -> tuple[Tensor, list[Tensor]]:
    """id_cond [1, 1280] and five hidden states [1, 17, 64]."""
    return cases.normal(seed, 1, 1280), [cases.normal(seed + i, 1, 17, 64) for i in range(1, 6)]


def tokens_of(adapter: SDXLAdapter | FluxAdapter, *seeds: int) -> Tensor:
    return torch.cat([adapter.encoder(*face(seed)) for seed in seeds])


def in_sampling_as_in_training(
    trained: SDXLAdapter | FluxAdapter, denoiser: nn.Module, run: Callable[[], Tensor], path: Path, bound: float
) -> Adapter:
    """A trained adapter, saved and loaded, does in sampling what it did in training. Gives the loaded one."""
    save_file({key: value.detach().contiguous() for key, value in trained.state().items()}, path)
    loaded = load_adapter(path)
    with torch.no_grad():
        person, other = tokens_of(trained, 21), tokens_of(trained, 31)
        injection = compile_injection(loaded, Identity(person, other), weight=0.8)
        with inject(denoiser, [injection], DenoiseStep(0.0, [True, False])):
            wanted = run()
        with inject_rows(denoiser, trained.weights(), [RowIdentities(torch.cat((person, other)), weight=0.8)]):
            made = run()
        effect = (wanted - run()).norm()
    assert effect > 0.01
    assert (made - wanted).norm() / effect < bound
    return loaded


class TestInjection:
    def test_equals_the_products_own(self, unet, adapter, tmp_path):
        in_sampling_as_in_training(adapter, unet, lambda: layouts.run_unet(unet), tmp_path / "pulid.safetensors", 1e-5)

    def test_each_row_has_its_own_identity(self, unet, adapter):
        """Swapping two people changes the rows of both, and a row does not depend on the other."""
        with torch.no_grad():
            a, b = tokens_of(adapter, 21), tokens_of(adapter, 31)
            outs = []
            for pair in ((a, b), (b, a), (a, a)):
                with inject_rows(unet, adapter.weights(), [RowIdentities(torch.cat(pair))]):
                    outs.append(layouts.run_unet(unet))
        assert not torch.allclose(outs[0][0], outs[1][0])
        assert torch.allclose(outs[0][0], outs[2][0], atol=1e-5)

    def test_masked_people_add_up(self, unet, adapter):
        """Two people in two halves, the same person twice, are that person everywhere."""
        half = torch.zeros(16, 16)
        half[:, :8] = 1
        with torch.no_grad():
            both = tokens_of(adapter, 21, 31)
            with inject_rows(unet, adapter.weights(), [RowIdentities(both)]):
                whole = layouts.run_unet(unet)
            with inject_rows(unet, adapter.weights(), [RowIdentities(both, half), RowIdentities(both, 1 - half)]):
                halves = layouts.run_unet(unet)
            with inject_rows(unet, adapter.weights(), [RowIdentities(both, half)]):
                one = layouts.run_unet(unet)
        assert torch.allclose(whole, halves, atol=1e-4)
        assert not torch.allclose(whole, one, atol=1e-2)

    def test_gradients_reach_encoder_and_pairs_alone(self, unet, adapter):
        with inject_rows(unet, adapter.weights(), [RowIdentities(tokens_of(adapter, 21, 31))]):
            layouts.run_unet(unet).pow(2).mean().backward()
        assert all(layer.weight.grad.abs().sum() > 0 for layer in (*adapter.id_to_k, *adapter.id_to_v))
        assert adapter.encoder.proj_out.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in unet.parameters())
        adapter.zero_grad(set_to_none=True)


class TestAlignment:
    def test_zero_without_an_identity_and_grows_with_weight(self, unet, adapter):
        found = []
        with torch.no_grad():
            tokens = tokens_of(adapter, 21, 31)
            with losses.listen(unet) as plain:
                layouts.run_unet(unet)
            for weight in (0.0, 0.1, 0.5):
                rows = [RowIdentities(tokens, weight=weight)]
                with losses.listen(unet) as seen, inject_rows(unet, adapter.weights(), rows):
                    layouts.run_unet(unet)
                found.append([loss.item() for loss in losses.alignment_losses(seen, plain)])
        (semantic0, layout0), (semantic1, layout1), (semantic2, layout2) = found
        assert semantic0 < 1e-10 and layout0 < 1e-10
        assert 0 < semantic1 < semantic2 and 0 < layout1 < layout2

    def test_formula_at_one_site(self):
        """Against the paper's formula written out, for two heads."""
        q_id, q, k = cases.normal(1, 2, 9, 8), cases.normal(2, 2, 9, 8), cases.normal(3, 2, 5, 8)
        seen, plain = losses.Attended([2], [q_id], [k]), losses.Attended([2], [q], [k])
        semantic, layout = losses.alignment_losses(seen, plain)

        def response(q: Tensor) -> Tensor:
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                attention = (k[..., part] @ q[..., part].transpose(1, 2) / 4**0.5).softmax(-1)
                heads.append(attention @ q[..., part])
            return torch.cat(heads, -1)

        wanted = (response(q_id) - response(q)).pow(2).mean() / response(q).pow(2).mean()
        assert semantic.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert layout.item() == pytest.approx(((q_id - q).pow(2).mean() / q.pow(2).mean()).item(), rel=1e-5)

    def test_hears_all_70_sites_and_leaves_no_hook(self, unet):
        with losses.listen(unet) as seen:
            layouts.run_unet(unet)
        assert len(seen.heads) == len(seen.queries) == len(seen.keys) == 70
        assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("family", ["sdxl", "flux"])
class TestSchedule:
    def test_a_perfect_denoiser_gives_the_clean_latents(self, family):
        noises = getattr(schedule, family)()
        clean, noise = cases.normal(1, 2, 4, 4, 4), cases.normal(2, 2, 4, 4, 4)
        start = noises.noisy(clean, noise, torch.tensor([999, 999]))

        def oracle(x: Tensor, t: Tensor) -> Tensor:
            assert torch.allclose(x, noises.noisy(clean, noise, t), atol=1e-4)
            return noises.target(clean, noise, t)

        made = losses.sample_few_steps(oracle, start, noises)
        assert torch.allclose(made, clean, atol=1e-3)

    def test_levels(self, family):
        """The last step is nearly all noise, the first hardly any; v is the derivative along the way."""
        noises = getattr(schedule, family)()
        clean, noise = cases.normal(1, 1, 4, 4, 4), cases.normal(2, 1, 4, 4, 4)
        first, last = (noises.noisy(clean, noise, torch.tensor([t])) for t in (0, 999))
        assert (first - clean).norm() < 0.05 * clean.norm()
        assert (last - noise).norm() < 0.08 * noise.norm()
        assert torch.allclose(
            noises.alphas if family == "flux" else noises.alphas**2,
            1 - (noises.sigmas if family == "flux" else noises.sigmas**2),
            atol=1e-6,
        )

    @pytest.mark.parametrize("gradient_steps", [1, 2, 4])
    def test_gradients_run_through_the_last_steps(self, family, gradient_steps):
        calls: list[bool] = []
        scale = torch.ones((), requires_grad=True)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return x * scale

        noise = cases.normal(2, 1, 4, 4, 4)
        losses.sample_few_steps(predict, noise, getattr(schedule, family)(), 4, gradient_steps).sum().backward()
        assert calls == [False] * (4 - gradient_steps) + [True] * gradient_steps
        assert scale.grad is not None and scale.grad != 0


class TestFlux:
    @pytest.fixture(scope="class")
    def base(self) -> flux.FluxBase:
        torch.manual_seed(0)
        base = flux.FluxBase(nn.Identity())
        for parameter in base.parameters():  # blocks begin as ones that add nothing
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        return base.eval().requires_grad_(False)

    @staticmethod
    def predict(base: flux.FluxBase) -> Tensor:
        t = torch.tensor([500, 900])
        return base.predict(cases.normal(1, 2, 4, 8, 8), t, cases.normal(2, 2, 5, 64), cases.normal(3, 2, 40))

    def test_tokens_are_diffusers(self):
        latents = cases.normal(1, 2, 4, 8, 6)
        import diffusers

        assert torch.equal(flux.pack(latents), diffusers.FluxPipeline._pack_latents(latents, 2, 4, 8, 6))
        assert torch.equal(flux.unpack(flux.pack(latents), 4, 3), latents)

    def test_equals_the_products_own(self, base, tmp_path):
        adapter = FluxAdapter(id_former(seed=3), [site.width for site in find_sites(base.denoiser).sites])
        for site in adapter.sites:
            nn.init.normal_(site["to_out"].weight, std=0.1)
        path = tmp_path / "pulid.safetensors"
        loaded = in_sampling_as_in_training(adapter, base.denoiser, lambda: self.predict(base), path, 1e-4)
        assert (loaded.family, len(loaded.sites)) == ("flux", 20)

    def test_alignment_hears_the_double_blocks(self, base):
        with losses.listen(base.denoiser) as seen:
            self.predict(base)
        assert len(seen.heads) == 19
        assert (seen.queries[0].shape, seen.keys[0].shape) == ((2, 16, 48), (2, 5, 48))


class TestFaces:
    def test_crop_is_insightfaces(self):
        from insightface.utils.face_align import arcface_dst, norm_crop

        y, x = np.mgrid[:128, :128].astype(np.float32)
        image = np.stack([127 + 60 * np.sin(x / 9), 127 + 60 * np.cos(y / 11), x + y], -1).clip(0, 255).astype(np.uint8)
        marks = np.array([[50, 52], [78, 47], [66, 66], [56, 84], [80, 80]], np.float32)
        wanted = norm_crop(image, marks).astype(np.float32)
        tensor = torch.from_numpy(image).float().permute(2, 0, 1)[None]
        made = losses.align_faces(tensor, torch.from_numpy(marks)[None], torch.from_numpy(np.array(arcface_dst)), 112)
        inside = np.abs(made[0].permute(1, 2, 0).numpy() - wanted)[5:-5, 5:-5]
        assert inside.mean() < 1

    def test_id_loss(self):
        a = cases.normal(1, 3, 512)
        assert losses.id_loss(a, 3 * a).item() == pytest.approx(0, abs=1e-6)
        assert losses.id_loss(a, -a).item() == pytest.approx(2, abs=1e-6)

    def test_traits_loss(self):
        """KL divergence in nats: 0 for the same odds, and (.9 against .5) .9 ln 1.8 + .1 ln .2; a mean over traits."""
        wanted, even = torch.tensor([[0.9, 0.1]]).log(), torch.zeros(1, 2)
        assert losses.traits_loss([wanted + 3], [wanted]).item() == pytest.approx(0, abs=1e-6)
        assert losses.traits_loss([even, wanted], [wanted, wanted]).item() == pytest.approx(0.36806 / 2, abs=1e-5)


def wanted(embeddings: Tensor, heads: Any = None, landmarks: Any = ARCFACE_POINTS) -> sampled_faces.Wanted:
    """People with embeddings [B, R, 512]; without heads, bool [B, 128, 128], unless they are given."""
    rows = len(embeddings)
    heads = np.zeros((rows, 128, 128), bool) if heads is None else heads
    return sampled_faces.Wanted(embeddings, heads, np.broadcast_to(landmarks, (rows, 5, 2)))


class TestFromWhatIsShipped:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("training")
        unpack.write(folder)
        readers.save("wide_recogniser", readers.build("wide_recogniser").eval(), folder / "miniature")  # untrained
        return folder

    def test_the_recognizer_is_the_one_of_the_onnx_file(self, folder):
        from lib_pulid.face_models import onnx_session

        faces = cases.normal(1, 2, 3, 112, 112).clamp(-1, 1)
        (wanted,) = onnx_session(folder / "miniature" / "recogniser.onnx", "").run(None, {"input": faces.numpy()})
        made = readers.load_recogniser(folder / "miniature", "recogniser").embed(faces)
        assert np.abs(made.numpy() - wanted).max() < 0.005 < np.abs(wanted).max()

    @pytest.mark.parametrize("family", ["sdxl", "flux"])
    def test_a_base_learns_to_draw_people_described_in_words(self, folder, family):
        """The ID loss reaches its weights; one whose text is exchanged draws other people than those asked for."""
        model = base.load(family, folder, folder / f"{base.FILES[family]}.safetensors")
        people = sampled_faces.PeopleInWords(Drawn(folder, 4), sampled_faces.load(folder))
        first = next(model.denoiser.parameters()).requires_grad_()
        loss = people.losses(model, 4, step=1)["id"]
        loss.backward()
        assert first.grad is not None and first.grad.abs().sum() > 0
        text, model.text = model.text, None
        model.__dict__["text"] = lambda prompts: text(prompts[1:] + prompts[:1])
        assert people.losses(model, 4, step=1)["id"].item() > loss.item()

    @pytest.fixture(scope="class")
    def blind(self, folder):
        """Reads sampled images with the faces that it is given; their heads are the inner quarter of the crop."""
        faces, labels = sampled_faces.load(folder), np.zeros((CROP_SIZE, CROP_SIZE), int)
        labels[128:384, 128:384] = 1

        def finding(*found: Any) -> sampled_faces.SampledFaces:
            detector = SimpleNamespace(detect=lambda image: list(found))
            return replace(faces, detector=detector, parser=SimpleNamespace(labels=lambda crop: labels))

        return finding

    @pytest.fixture(scope="class")
    def head(self, blind):
        """A face in the middle of the image."""
        image = np.ascontiguousarray(miniature.portrait(0, size=128)[:, :, ::-1])
        (found,) = miniature.face_models().detector.detect(image)
        return found

    @staticmethod
    def sampled(
        faces: sampled_faces.SampledFaces, added: Tensor, expected: Sequence = (), asked: Any = None
    ) -> tuple[float, float]:
        """The losses "id" and "scene", where the other denoiser's predictions differ by `added`."""
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        asked = asked or wanted(torch.ones(2, 2, 512))
        made = faces.losses(
            lambda x, t: 0.1 * x, noise, base.Base.schedule, asked, lambda x, t: 0.1 * x + added, expected
        )
        return made["id"].item(), made["scene"].item()

    @pytest.mark.parametrize(("row", "column", "counts"), [(0, 0, 1), (12, 0, 1), (8, 8, 0)])
    def test_the_scene_is_compared_outside_the_head(self, blind, head, row, column, counts):
        """The other denoiser differs in one latent; without a face, all of the image is the scene."""
        added = torch.zeros(16, 16)
        assert self.sampled(blind(head), added)[1] == 0
        added[row, column] = 0.5
        everywhere = self.sampled(blind(), added)[1]
        assert self.sampled(blind(head), added)[1] == pytest.approx(counts * everywhere, rel=1e-4)
        assert everywhere > 0

    def test_the_head_without_the_identity_is_no_scene(self, blind, head):
        """In both images without, the face is 40 pixels higher and further left than with the identity."""
        added, there = torch.zeros(16, 16), replace(head, landmarks=head.landmarks - 40)
        added[2, 2] = 0.5
        places = iter([head, head, there, there])
        moving = replace(blind(), detector=SimpleNamespace(detect=lambda image: [next(places)]))
        assert self.sampled(moving, added)[1] == 0 < self.sampled(blind(head), added)[1]

    def test_a_head_may_grow_to_that_of_the_person_wanted(self, blind, head):
        """In the other image the face is a quarter higher, and there is hair in the corner below."""
        added, hair = torch.zeros(16, 16), np.zeros((2, 128, 128), bool)
        added[13, 1], hair[:, 72:88, :24] = 0.5, True
        higher = wanted(torch.ones(2, 2, 512), hair, head.landmarks - (0, 32))
        assert self.sampled(blind(head), added)[1] > 0
        assert self.sampled(blind(head), added, asked=higher)[1] == 0

    def test_the_scene_is_compared_as_clean_latents(self, blind, monkeypatch):
        """In one step from noise alone: they differ by sigma times what the predictions do."""
        monkeypatch.setattr(sampled_faces, "STEPS", 1)
        sigma = base.Base.schedule.sigmas[-1].item()
        found = self.sampled(blind(), torch.full((16, 16), 0.5))[1]
        assert found == pytest.approx((0.5 * sigma) ** 2, rel=1e-4)

    def test_traits_are_those_that_the_wide_recognizer_names(self, blind, head):
        """The loss is 0 where the wanted embedding is the image's own, and grows with what that recognizer says."""
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        faces = blind(head)
        images = faces.vae.decode(
            losses.sample_few_steps(lambda x, t: 0.1 * x, noise, base.Base.schedule) / autoencoder.SCALE
        )
        own = faces.embed(images.sample.clamp(-1, 1), torch.from_numpy(head.landmarks).float().expand(2, 5, 2))
        narrow, wide = (own + 9 * cases.normal(2, 1, 2, 512) * torch.tensor(on)[:, None] for on in ([1, 0], [0, 1]))
        same, by_narrow, by_wide = (
            faces.losses(lambda x, t: 0.1 * x, noise, base.Base.schedule, wanted(seen))["traits"].item()
            for seen in (own, narrow, wide)
        )
        assert same == by_narrow == pytest.approx(0, abs=1e-6)
        assert by_wide > 0.01

    @pytest.fixture(scope="class")
    def narrow(self, head):
        """That face as one of two people, half as large, in the middle of their half of the image."""
        return replace(head, landmarks=head.landmarks / 2 + (0, 32), box=head.box / 2 + (0, 32, 0, 32))

    def test_of_two_people_each_is_compared_with_their_half(self, blind, narrow):
        """One image; the losses are 0 where the wanted embeddings are those of its left and right half, in turn."""
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        faces, points = blind(narrow), torch.from_numpy(narrow.landmarks).float()
        clean = losses.sample_few_steps(lambda x, t: 0.1 * x, noise, base.Base.schedule)
        image = faces.vae.decode(clean / autoencoder.SCALE).sample.clamp(-1, 1)
        own = faces.embed(torch.cat([image[..., :64], image[..., 64:]]), points.expand(2, 5, 2))
        same, swapped = (
            faces.losses(lambda x, t: 0.1 * x, noise, base.Base.schedule, wanted(asked)) for asked in (own, own.flip(0))
        )
        for name, least in (("id", 1e-3), ("traits", 1e-6)):
            assert same[name].item() == pytest.approx(0, abs=least / 10), name
            assert swapped[name].item() > least, name

    @pytest.mark.parametrize(("row", "column", "counts"), [(8, 3, 0), (8, 11, 0), (8, 0, 1), (8, 7, 1), (8, 8, 1)])
    def test_the_scene_of_two_people_is_what_lies_outside_both_heads(self, blind, narrow, row, column, counts):
        added = torch.zeros(16, 16)
        added[row, column] = 0.5
        four = wanted(torch.ones(4, 2, 512))
        everywhere = self.sampled(blind(), added, asked=four)[1]
        assert self.sampled(blind(narrow), added, asked=four)[1] == pytest.approx(counts * everywhere, rel=1e-4)
        assert everywhere > 0

    def test_where_a_face_is_expected_in_its_share_of_the_image(self):
        """Alone, if the prompt says where; of two people, at the same place of either half."""
        person, place = miniature.person(0), world.Placement(x=0.25, scale=0.4)
        alone, two = world.Scene((place,)), world.Scene((place, replace(place, x=0.75)))
        assert sampled_faces.expected_face(person, alone, {"size"}) is None
        there = sampled_faces.expected_face(person, alone, {"size", "position"})
        assert np.array_equal(there.landmarks, world.landmarks(person, place))
        for number in (0, 1):
            share = sampled_faces.expected_face(person, two, (), number)
            assert np.allclose(share.landmarks, there.landmarks, atol=1e-4)
            assert np.allclose(share.box, there.box, atol=1e-4)

    def test_a_face_that_is_not_found_is_looked_for_where_it_should_be(self, blind, head):
        everywhere = torch.full((16, 16), 0.5)
        assert self.sampled(blind(), everywhere)[0] == 0
        one, both = (self.sampled(blind(), everywhere, expected) for expected in ([None, head], [head, head]))
        assert one[0] > 0
        assert both == self.sampled(blind(head), everywhere, [None, None]) != one

    def test_photos_are_up_to_so_many_of_each_person(self, folder):
        """Four people, each alone in three or four images; read once, then from the disk."""
        data = Drawn(folder, 4)
        alone = [i for i in range(len(data)) if len(data.numbers(i)) == 1]
        wanted = [i for person in range(4) for i in [i for i in alone if i // SCENES_EACH == person][:2]]
        encoders = miniature.encoders()
        found = photos_of(folder, data, encoders.faces, encoders.tower, 4, 2)
        again = photos_of(folder, data, None, None, 4, 2)
        for photos in (found, again):
            assert photos.image.tolist() == wanted
            assert photos.person.tolist() == [i // SCENES_EACH for i in wanted]
            assert photos.hidden.shape == (len(wanted), 5, 577, 64)
        assert torch.equal(found.id_cond, again.id_cond) and np.array_equal(found.hidden, again.hidden)
        rng = np.random.default_rng(0)
        for person in range(4):
            rows = {found.row_of(person, rng) for _ in range(20)}
            assert rows == set(np.flatnonzero(found.person == person).tolist())

    def test_an_adapter_begins_with_the_encoder_and_the_sites_of_its_family(self, folder):
        model = base.load("sdxl", folder, folder / "base.safetensors")
        for family, has_sites in (("sdxl", True), ("flux", False)):
            fresh, given = adapters.fresh_adapter(model, 64, seed=0), load_adapter(miniature.adapter(family))
            before = fresh.weights()[5].to_k.clone()
            assert adapters.begin_from(fresh, miniature.adapter(family)) == has_sites
            assert torch.equal(fresh.encoder.proj_out, given.encoder.proj_out)
            assert torch.equal(fresh.weights()[5].to_k, given.sites[5].to_k if has_sites else before)


class Twenty(SimpleNamespace):
    """Photos of the people 10 to 29, whose tokens are the people's numbers."""

    person = 10 + np.arange(20)

    def __len__(self) -> int:
        return len(self.person)

    def tokens(self, rows: np.ndarray, encoder: None, rng: np.random.Generator) -> np.ndarray:
        return self.person[rows]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, {4: 1, 5: 1, 6: 1, 7: 1, 8: 1}),  # from the first third on
        ({"pairs_every": 3}, {4: 1, 5: 2, 6: 1, 7: 1, 8: 2}),
        ({"pairs_every": 8}, {4: 1, 5: 1, 6: 1, 7: 2, 8: 1}),
        ({"pairs_every": 1, "lightning_every": 2}, {4: 2, 6: 2, 8: 2}),
    ],
)
def test_how_often_images_are_sampled_and_of_two_people(tmp_path, monkeypatch, settings, counts):
    asked, adapter = {}, torch.nn.Linear(2, 2)

    def lightning(step: int, batch: int, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        asked[step] = count
        return {"id": adapter.weight.sum()}

    stub = SimpleNamespace(adapter=adapter, lightning=lightning, diffusion=lambda *args: adapter.weight.sum())
    monkeypatch.setattr(adapters, "load_trainer", lambda *args: stub)
    asking = {
        "folder": tmp_path,
        "family": "sdxl",
        "people": 3,
        "photos": 3,
        "photos_each": 1,
        "losses": "diffusion,id",
    }
    asking |= {"seed": 0, "device": "cpu", "begin": None, "steps": 9, "batch": 2, "rate": 1e-3, "minutes": None}
    asking |= {"lightning_batch": 2, "lightning_every": 1, "pairs_every": 0}
    adapters.train(Namespace(**asking | settings))
    assert asked == counts


@pytest.mark.parametrize("count", [1, 2])
def test_people_of_an_image_are_in_one_order_throughout(count):
    """Prompts, tokens, masks, the people compared with and the places of faces, all in the same order."""
    seen: dict[str, Any] = {}

    def read(predict: Any, noise: Any, schedule: Any, wanted: Any, scene: Any, expected: Any) -> dict[str, Tensor]:
        seen.update(rows=predict.args[1], prompts=predict.args[0], wanted=wanted, expected=expected)
        return {}

    stub = SimpleNamespace(
        photos=Twenty(),
        data=Drawn(Path(), 30),
        base=SimpleNamespace(text=lambda prompts: prompts, schedule=None),
        adapter=SimpleNamespace(encoder=None),
        reader=SimpleNamespace(read_people=lambda faces, who, rng: who, losses=read),
        losses=("id",),
        device="cpu",
        _faces=None,
        _noise=lambda batch, seed: None,
        _predict=lambda *args: None,
    )
    adapters.Trainer.lightning(stub, 2, 3, np.random.default_rng(0), count)  # type: ignore[arg-type]
    assert [prompt.startswith("two people") for prompt in seen["prompts"]] == [count == 2] * 3
    assert np.array_equal(np.concatenate([row.tokens for row in seen["rows"]]), seen["wanted"])
    assert len(seen["wanted"]) == len(seen["expected"]) == 3 * count
    if count == 1:
        assert seen["rows"][0].mask is None
        return
    left, right = (row.mask for row in seen["rows"])
    assert left[:, :8].min() == right[:, 8:].min() == 1
    assert left[:, 8:].max() == right[:, :8].max() == 0
    assert all(0 < face.landmarks[:, 0].mean() < 64 for face in seen["expected"])


@pytest.mark.parametrize("pair", [False, True])
def test_a_batch_is_full_however_few_people_there_are(pair):
    people = np.arange(5)
    photos = Photos(torch.zeros(5, 1280), np.zeros((5, 5, 577, 64), np.float16), people, SCENES_EACH * people)
    nothing: Any = None
    trainer = adapters.Trainer(nothing, nothing, photos, Drawn(Path(), len(people)), nothing, nothing, ())
    chosen, rows = trainer._draw(24, pair, np.random.default_rng(0))
    assert len(chosen) == 24 and [len(row) for row in rows] == [24] * (1 + pair)
    assert not set(chosen) & set(photos.image)
    few, _ = trainer._draw(2, pair, np.random.default_rng(0))
    assert len(set(few)) == 2  # where there are enough, none twice


@pytest.mark.parametrize(("family", "step"), [("sdxl", 2), ("flux", 0)])  # with two people in an image, and one
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_on_a_gpu_mixes_no_devices(tmp_path, monkeypatch, family, step):
    """All losses of an adapter, on tensors without content, which say so; none was computed on a real GPU. In step 0
    for one person in each image, in step 2 for two."""
    people = np.arange(4)
    photos = Photos(torch.zeros(4, 1280), np.zeros((4, 5, 577, 64), np.float16), people, SCENES_EACH * people)
    face = Detection(np.array([40.0, 40, 80, 90], np.float32), np.array(ARCFACE_POINTS, np.float32), 1.0)
    monkeypatch.setattr(sampled_faces.SampledFaces, "_find", lambda self, images, expected: [face] * len(images))
    monkeypatch.setattr(
        sampled_faces.SampledFaces, "_heads", lambda self, images, faces: np.ones(images[:, 0].shape, bool)
    )
    monkeypatch.setattr(adapters, "faces_of", lambda data: None)
    sample = losses.sample_few_steps
    monkeypatch.setattr(losses, "sample_few_steps", lambda *args, **steps: sample(*args[:3], 1, 1))
    data = Drawn(tmp_path, len(people))
    latents = np.zeros((len(data), 4, 16, 16), np.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = (base.Base() if family == "sdxl" else flux.FluxBase(base.TextEncoders())).requires_grad_(False)
            recognisers = [readers.Reader(readers.KINDS[name]).eval() for name in readers.RECOGNISERS]
            reader = sampled_faces.SampledFaces(autoencoder.build(), recognisers, None, None)
            adapter = adapters.fresh_adapter(model, 64, seed=0)
            asked = wanted(torch.zeros(2 if step == 0 else 4, 2, 512))
        monkeypatch.setattr(sampled_faces.SampledFaces, "read_people", lambda self, faces, who, rng: asked)
        trainer = adapters.Trainer(model, adapter, photos, data, latents, reader, adapters.LOSSES)
        rng = np.random.default_rng(0)
        with torch.backends.cudnn.flags(enabled=False):  # its grid sampler needs content
            found = {
                "diffusion": trainer.diffusion(step, 2, rng),
                **trainer.lightning(step, 2, rng, adapters.people_at(step, 3)),
            }
            loss = adapters.total(found, family)
    assert found.keys() == {"diffusion", "id", "traits", "scene", "semantic", "layout"}
    assert loss.device.type == "cuda" and loss.requires_grad


def test_a_run_goes_on_where_it_broke_off(tmp_path):
    """Ten steps at once, and four, a break, and six: the same weights."""

    def run(folder: str, stop: int | None) -> nn.Module:
        torch.manual_seed(0)
        work = Run(tmp_path / folder, nn.Linear(4, 4), 10, rate=1e-2, warmup=2)

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            if step == stop:
                work.save()
                raise KeyboardInterrupt
            return work.module(cases.normal(step, 8, 4)).pow(2).mean(), {}

        try:
            work.train(loss_of)
        except KeyboardInterrupt:
            return run(folder, None)
        return copy.deepcopy(work.finish())

    whole, broken = run("whole", None), run("broken", 4)
    assert torch.equal(whole.weight, broken.weight)


def test_a_run_that_has_ended_says_so(tmp_path, capsys):
    """Otherwise the same folder for another training would look like one that was run."""
    for said in ("", f"{tmp_path} has its 2 steps. To train anew, move it away.\n"):
        run = Run(tmp_path, nn.Linear(1, 1), 2, rate=1e-3)
        run.train(lambda step, run=run: (run.module(torch.ones(1, 1)).sum(), {}))
        assert "".join(line for line in capsys.readouterr().err.splitlines(True) if "anew" in line) == said


def test_a_file_that_was_broken_off_is_made_again(tmp_path):
    """It is named as wanted once it is whole."""

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "faces.npz", fails)
    path = made_once(tmp_path / "faces.npz", lambda part: part.write_bytes(b"whole"))
    assert (path.name, path.read_bytes()) == ("faces.npz", b"whole")
    assert made_once(path, fails) == path
    assert list(tmp_path.iterdir()) == [path]


def test_rounded_numbers_are_near_and_short():
    """To 7 bits after the point: off by 2^-8 at the most, and every eighth float16 number only."""
    numbers = torch.cat((cases.normal(1, 4000), torch.tensor([0.0, 1.0, -1.0, 1.9995, 60000.0, 6e-5, 1e-7]))).half()
    short = checkpoint.rounded(numbers)
    assert not (short.view(torch.int16) & 7).any()
    assert ((short.float() - numbers.float()).abs() <= numbers.float().abs() * 2**-8 + 2**-22).all()
    assert torch.equal(checkpoint.rounded(short), short)


def test_the_mean_of_several_trainings():
    low, high = {"a": torch.tensor([1.0, 3.0]).half()}, {"a": torch.tensor([2.0, 7.0])}
    assert torch.equal(checkpoint.mean_weights([low, high])["a"], torch.tensor([1.5, 5.0]))
    assert torch.equal(checkpoint.mean_weights([low])["a"], low["a"].float())
    with pytest.raises(ValueError, match="different layouts"):
        checkpoint.mean_weights([low, {"b": high["a"]}])
