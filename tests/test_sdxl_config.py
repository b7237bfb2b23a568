"""What diffusers is told of SDXL checkpoints in one file, so that it needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_pulid import sdxl_config
from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.hosts import diffusers_base

NOWHERE = Path("nowhere")
PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


def build(part: str, folder: Path) -> torch.nn.Module:
    import diffusers
    import transformers

    if part.startswith("text_encoder"):
        kind = getattr(transformers, sdxl_config.CONFIGS["model_index.json"][part][1])
        return kind(transformers.CLIPTextConfig.from_pretrained(folder / part))
    kind = getattr(diffusers, sdxl_config.CONFIGS["model_index.json"][part][1])
    return kind.from_config(dict(sdxl_config.CONFIGS[f"{part}/config.json"]))


def test_the_parts_are_as_large_as_in_every_sdxl_checkpoint(tmp_path):
    sdxl_config.write(tmp_path, NOWHERE)
    with torch.device("meta"):
        sizes = {part: sum(p.numel() for p in build(part, tmp_path).parameters()) for part in PARAMETERS}
    assert sizes == PARAMETERS


def test_the_vocabulary_made_of_open_clips(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from transformers import CLIPTokenizer

    assert sdxl_config.write(tmp_path, NOWHERE)
    ours = [CLIPTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "tokenizer_2")]
    for text in ("a photo of a Cat, 2 dogs", "naïve café, 50% off...", "x" * 40, ""):
        theirs = open_clip.tokenizer.SimpleTokenizer()(text)[0].tolist()
        first, second = (one(text, padding="max_length", max_length=77).input_ids for one in ours)
        assert second == theirs  # padded with zeros, as open_clip does
        assert first[: first.index(49407) + 1] == theirs[: theirs.index(49407) + 1]
        assert set(first[first.index(49407) :]) == {49407}


def test_a_tokenizer_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sdxl_config, "find_spec", lambda name: None)
    (tmp_path / "out").mkdir()
    assert not sdxl_config.write(tmp_path / "out", tmp_path / "hub")
    for repository, inside in (("models--openai--clip-vit-large-patch14", ""), ("models--x--some-xl", "tokenizer")):
        folder = tmp_path / "hub" / repository / "snapshots" / "0" / inside
        folder.mkdir(parents=True)
        (folder / "vocab.json").write_text('{"a": 0}')
        (folder / "merges.txt").write_text("#version: 0.2\n")
        target = tmp_path / repository
        target.mkdir()
        assert sdxl_config.write(target, tmp_path / "hub")
        assert json.loads((target / "tokenizer_2" / "vocab.json").read_text()) == {"a": 0}
        (folder / "vocab.json").unlink()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    names = {
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048),
        "input_blocks.0.0.weight": (8, 4, 3, 3),
    }
    path = tmp_path / "juggernaut.safetensors"
    save_file({f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in names.items()}, path)
    return path


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What diffusers is asked; it is offline."""
    import diffusers

    asked: list[dict] = []

    def from_single_file(path: str, **how: object) -> None:
        files = (
            {str(p.relative_to(how["config"])) for p in Path(how["config"]).rglob("*.*")} if "config" in how else set()
        )
        asked.append({**how, "files": files})
        raise OSError("offline")

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_single_file", from_single_file)
    return asked


def test_an_sdxl_checkpoint_needs_no_network(checkpoint, asked, monkeypatch):
    monkeypatch.setattr(sdxl_config, "_write_vocabulary", lambda folder, cache: True)
    with pytest.raises(WrongWeightsError, match="juggernaut.safetensors could not be opened"):
        diffusers_base.load_base(str(checkpoint))
    assert asked[0]["local_files_only"] is True
    assert asked[0]["files"] >= {*sdxl_config.CONFIGS, "tokenizer/tokenizer_config.json"}


def test_without_the_vocabulary_the_message_names_it(checkpoint, asked, monkeypatch):
    monkeypatch.setattr(sdxl_config, "_write_vocabulary", lambda folder, cache: False)
    with pytest.raises(
        MissingWeightsError, match=r"juggernaut.*CLIP's vocabulary \(bpe_simple.*pip install open_clip_t"
    ):
        diffusers_base.load_base(str(checkpoint))
    assert "config" not in asked[0]
