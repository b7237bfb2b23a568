"""SDXL checkpoints in one file: opened by their shapes alone; the miniature's, written as SDXL's own code names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.files.checkpoint_header import checkpoint_family
from lib_pulid.hosts import diffusers_checkpoint as single_file
from lib_pulid.hosts.diffusers_base import load_base
from lib_pulid.training import checkpoint
from lib_pulid.training.autoencoder import build as build_autoencoder
from lib_pulid.training.base import Base
from lib_pulid.training.export import save_half
from tests.host.models.parts import add_clip, add_open_clip, add_vae
from tests.host.models.unet import Layout, UNetSpec, add_unet

PROMPT = "a smiling person in a red striped shirt, on the left, in front of green and white dots, pencil drawing"


@pytest.fixture(scope="module")
def made():
    """A base and an autoencoder of the miniature's sizes with random weights that 16 bits hold."""
    torch.manual_seed(0)
    base, vae = Base().eval().requires_grad_(False), build_autoencoder().eval().requires_grad_(False)
    for parameter in (*base.parameters(), *vae.parameters()):
        parameter.copy_(parameter.half())
    return base, vae


@pytest.fixture(scope="module")
def path(made, tmp_path_factory) -> Path:
    base, vae = made
    text = (base.text.first, base.text.second)
    file = tmp_path_factory.mktemp("made") / "sdxl.safetensors"
    save_half(file, checkpoint.sdxl_checkpoint(base.unet, text, vae, checkpoint.world_tokens()))
    return file


@pytest.fixture(scope="module")
def pipeline(path):
    return load_base(path).pipeline


@torch.no_grad()
def test_what_was_trained_is_what_diffusers_loads(made, pipeline):
    """Through 16 bits, SDXL's names and diffusers' own conversion: bit for bit."""
    base, vae = made
    context, pooled = base.text([PROMPT])
    theirs = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert torch.equal(theirs[0], context)
    assert torch.equal(theirs[2], pooled)
    noisy, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    assert torch.equal(
        pipeline.unet(noisy, t, context, added_cond_kwargs=added).sample, base.predict(noisy, t, context, pooled, sizes)
    )
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(pipeline.vae.encode(image).latent_dist.mean, vae.encode(image).latent_dist.mean)
    assert torch.equal(pipeline.vae.decode(noisy).sample, vae.decode(noisy).sample)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(pipeline.scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_words_that_were_never_trained_are_nothing(path):
    """Their rows in both tables are zero, so that what a text encoder makes of them is not noise."""
    tables = [t for name, t in load_file(path).items() if name.endswith("token_embedding.weight")]
    assert len(tables) == 2
    for table in tables:
        used = set(table.abs().sum(1).nonzero().flatten().tolist())
        assert used == checkpoint.world_tokens()
        assert len(used) < 200


def test_the_names_are_those_of_sdxl(path):
    """All tensors of SDXL's single file and no others, except for the mark of v prediction."""
    names = set(load_file(path))
    out = Layout()
    add_unet(out, "model.diffusion_model.", UNetSpec(64, (1, 1, 1), (0, 2, 10), 10, context=64, vector=1576))
    add_clip(out, "conditioner.embedders.0.transformer.text_model.", 24, layers=3)
    add_open_clip(out, "conditioner.embedders.1.model.", 40, layers=3)
    add_vae(out, "first_stage_model.", latent=4, quant=True)
    assert {name for name in names if "nin_shortcut" not in name} - {"v_pred"} == {
        name for name in out.shapes if "nin_shortcut" not in name
    }
    assert checkpoint_family(path) == "sdxl"


def full_size() -> dict[str, tuple[int, ...]]:
    """Shapes of the real sd_xl_base_1.0.safetensors."""
    out = Layout()
    add_unet(out, "model.diffusion_model.", UNetSpec(320, (1, 2, 4), (0, 2, 10), 10, context=2048, vector=2816))
    add_clip(out, "conditioner.embedders.0.transformer.text_model.", 768, layers=12)
    add_open_clip(out, "conditioner.embedders.1.model.", 1280, layers=32)
    for half, blocks in (("encoder", 2), ("decoder", 3)):
        for level, width in enumerate((128, 256, 512, 512)):
            way = "down" if half == "encoder" else "up"
            for block in range(blocks):
                out.conv(f"first_stage_model.{half}.{way}.{level}.block.{block}.conv1", width, width)
    out.conv("first_stage_model.decoder.conv_in", 4, 512)
    shapes = dict(out.shapes)
    for name in [name for name in shapes if "text_model" in name and "mlp.fc1.weight" in name]:
        shapes[name] = (3072, 768)
    return shapes


PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


def test_the_real_sdxl_has_its_own_configuration():
    """As in stabilityai/stable-diffusion-xl-base-1.0: the numbers of parameters, and what these do not show."""
    import diffusers
    import transformers

    made = single_file.configuration(full_size())
    with torch.device("meta"):
        parts = {
            "unet": diffusers.UNet2DConditionModel.from_config(made["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(made["vae"]),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**made["text_encoder"])),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**made["text_encoder_2"])
            ),
        }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == PARAMETERS
    own = {
        "unet": {"attention_head_dim": [5, 10, 20], "norm_num_groups": 32, "sample_size": 128},
        "vae": {"norm_num_groups": 32, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": {"num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "text_encoder_2": {"num_attention_heads": 20, "hidden_act": "gelu"},
        "scheduler": {"prediction_type": "epsilon"},
    }
    assert {part: {name: made[part][name] for name in values} for part, values in own.items()} == own


@pytest.mark.parametrize(("marks", "kind", "spacing"), [
    ((), "epsilon", "leading"), (("v_pred",), "v_prediction", "leading"),
    (("v_pred", "ztsnr"), "v_prediction", "trailing"),
])  # fmt: skip
def test_what_a_checkpoint_says_of_its_schedule(marks, kind, spacing):
    scheduler = single_file.configuration(full_size() | dict.fromkeys(marks, (0,)))["scheduler"]
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == (kind, spacing)
    assert scheduler["rescale_betas_zero_snr"] == ("ztsnr" in marks)


def test_a_checkpoint_for_inpainting_and_one_that_is_cut_off(tmp_path, path):
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WrongWeightsError, match=r"cut\.safetensors cannot be opened"):
        load_base(tmp_path / "cut.safetensors")
    state = load_file(path)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(64, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(WrongWeightsError, match=r"inpaint.safetensors is for inpainting \(9 channels\)"):
        load_base(tmp_path / "inpaint.safetensors")


@pytest.mark.parametrize(("prefix", "said"), [
    ("first_stage_model.", "it lacks the VAE."),
    ("conditioner.", "it lacks the text encoder CLIP-L, the text encoder OpenCLIP-bigG."),
    ("conditioner.embedders.0.", "it lacks the text encoder CLIP-L."),
    ("model.diffusion_model.label_emb.", "it lacks the size and text conditions of SDXL's base."),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole(tmp_path, path, prefix, said):
    state = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(prefix)}
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WrongWeightsError, match=f"part.safetensors is not a complete SDXL checkpoint; {said}"):
        load_base(tmp_path / "part.safetensors")


def test_a_pickled_checkpoint(tmp_path, path, pipeline):
    torch.save({"state_dict": load_file(path)}, tmp_path / "model.ckpt")
    mine = load_base(tmp_path / "model.ckpt").pipeline.unet.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_nothing_is_asked_of_the_network(path, no_network):
    load_base(path)


def test_the_tokenizer_is_clips(pipeline):
    from open_clip.tokenizer import SimpleTokenizer

    for text in (PROMPT, "Zürich, 3 o'clock: naïve café?", "日本 emoji 🙂", ""):
        ids = [49406, *SimpleTokenizer().encode(text), 49407]
        assert pipeline.tokenizer(text).input_ids == ids
        assert pipeline.tokenizer_2(text).input_ids == ids
    padded = [t("x", padding="max_length").input_ids[-1] for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
    assert padded == [49407, 0]


def test_without_open_clip(monkeypatch, tmp_path):
    """The vocabulary may lie where diffusers or transformers once put it; else it is said what is missing."""
    merges = single_file.merge_table()
    monkeypatch.setattr(single_file, "find_spec", lambda name: None)
    found = tmp_path / "merges.txt"
    found.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(found))
    assert single_file.merge_table() == merges
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(MissingWeightsError, match="pip install open-clip-torch"):
        single_file.merge_table()
