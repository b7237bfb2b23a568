"""Weight files of every layout, recognized by their content; other files are refused by their kind."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lib_pulid.encoders import IDEncoder, IDFormer
from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.files.state_dict import read_state_dict
from lib_pulid.methods import PULID_FLUX, PULID_V1, Method
from lib_pulid.stores.adapters import Adapters
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.vision import load_vision_tower
from lib_pulid.weights import CrossAttentionWeights, ImageStreamWeights, load_adapter
from tests.small_models import STREAM, flux_file, id_encoder, pulid_files, random_weights, tower_shapes

SITES = 12  # i goes to 23: as text, "11" comes before "3"
WIDTHS = tuple(8 + 4 * n for n in range(SITES))  # all different, so that a wrong order shows
STREAM_WIDTH, TOKEN = 24, 64


def _state(layout: str, seed: int = 1) -> dict[str, Tensor]:
    return dict(pulid_files(WIDTHS, STREAM_WIDTH, SITES, seed)[layout])


v1_state, v11_state, flux_state = (partial(_state, layout) for layout in ("v1", "v1.1", "flux"))


def converted_state(seed: int = 1) -> dict[str, Tensor]:
    """What ip-adapter_pulid_sdxl_fp16.safetensors made of v1."""
    state = {}
    for key, value in v1_state(seed).items():
        key = key.replace("id_adapter_attn_layers.", "ip_adapter.").replace("id_adapter.", "image_proj.")
        state[key.replace("id_to_k", "to_k_ip").replace("id_to_v", "to_v_ip")] = value.half()
    return state


def nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tables = ("image_proj", "ip_adapter")
    return {table: {key[11:]: value for key, value in flat.items() if key.startswith(table)} for table in tables}


def pickled(state: Mapping | list, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def as_safetensors(state: Mapping[str, Tensor]) -> bytes:
    return safetensors_bytes({key: value.contiguous() for key, value in state.items()})


def shuffled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same table, its keys in reversed alphabetical order."""
    return {key: state[key] for key in sorted(state, reverse=True)}


@pytest.fixture
def write(tmp_path):
    def _write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return _write


# ---------------------------------------------------------------- layouts

STATES = {"v1": v1_state, "v1.1": v11_state, "converted": converted_state, "flux": flux_state}
EXPECTED = {
    "v1": ("sdxl", "v1", IDEncoder, "PuLID v1 for SDXL"),
    "converted": ("sdxl", "v1", IDEncoder, "PuLID v1 for SDXL"),
    "v1.1": ("sdxl", "v1.1", IDFormer, "PuLID v1.1 for SDXL"),
    "flux": ("flux", "v0.9", IDFormer, "PuLID v0.9 for FLUX"),
}
# For each layout the names that another one goes by.
MISLEADING = {
    "v1": ("pulid_flux_v0.9.1.safetensors", "pulid_v1.1.bin"),
    "v1.1": ("pulid_v1.bin", "pulid_flux_v0.9.0.safetensors"),
    "converted": ("pulid_v1.1.safetensors", "pulid_flux.pt"),
    "flux": ("pulid_v1.bin", "ip-adapter_pulid_sdxl_fp16.safetensors"),
}


@pytest.mark.parametrize("container", [as_safetensors, pickled])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("layout", STATES)
def test_layouts_are_told_apart_by_content(write, layout, index, container):
    path = write(MISLEADING[layout][index], container(shuffled(STATES[layout]())))
    adapter = load_adapter(path)
    assert (adapter.family, adapter.method.version, type(adapter.encoder), adapter.label) == EXPECTED[layout]
    assert adapter.path == path
    assert len(adapter.sites) == SITES


@pytest.mark.parametrize("layout", STATES)
def test_sites_in_numeric_order(write, layout):
    state, is_flux = STATES[layout](), layout == "flux"
    names = STREAM if is_flux else {"to_k": "k", "to_v": "v"}
    for n, site in enumerate(load_adapter(write("x", pickled(shuffled(state)))).sites):
        assert isinstance(site, ImageStreamWeights if is_flux else CrossAttentionWeights)
        assert set(vars(site)) == set(names)
        assert is_flux or site.to_k.shape == (WIDTHS[n], TOKEN)
        for field, name in names.items():
            ours, stored = getattr(site, field), state if is_flux else v1_state()
            key = f"pulid_ca.{n}.{name}" if is_flux else LAYER.format(2 * n + 1, name)
            assert torch.equal(ours, stored[key].to(ours.dtype))


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "model.diffusion_model.", "a.converters.own.")


@pytest.mark.parametrize("container", [as_safetensors, pickled])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", STATES)
def test_names_behind_a_prefix(write, layout, prefix, container):
    """As DistributedDataParallel, torch.compile and converters write them."""
    plain, state = load_adapter(write("plain", as_safetensors(STATES[layout]()))), STATES[layout]()
    path = write("x.bin", container({prefix + key: value for key, value in state.items()}))
    assert load_adapter(path).fingerprint == plain.fingerprint
    assert listed_method(path) == plain.method


def listed_method(path: Path) -> Method | None:
    """What the list of adapters says of a file, by its header."""
    folder = ModelsFolder(lambda: Settings(path.parent))
    (path.parent / "pulid").mkdir(exist_ok=True)
    path.rename(path.parent / "pulid" / path.name)
    return next((file.method for file in Adapters(folder).listed() if file.name == path.name), None)


@pytest.mark.parametrize("tables", [
    nested(converted_state()), {"state_dict": nested(converted_state()), "step": 3},
    {"state_dict": {"module": converted_state()}}, {"model": {"state_dict": nested(converted_state())}},
    {"params_ema": converted_state()},
])  # fmt: skip
def test_tables_in_tables(write, tables):
    flat, path = load_adapter(write("flat", as_safetensors(converted_state()))), write("x.ckpt", pickled(tables))
    deep = load_adapter(path)
    assert (deep.method, deep.fingerprint) == (PULID_V1, flat.fingerprint)
    assert all(torch.equal(a.to_k, b.to_k) and torch.equal(a.to_v, b.to_v) for a, b in zip(flat.sites, deep.sites))
    assert listed_method(path) == PULID_V1


def test_wrappers_without_end(write):
    tables: dict = v1_state()
    for _ in range(60):
        tables = {"model": tables, "module": tables}
    with pytest.raises(WrongWeightsError, match="holds no weights"):
        load_adapter(write("x.ckpt", pickled(tables)))


@pytest.mark.parametrize("name", ["x.sft", "x.bin", "x.SAFETENSORS"])
def test_safetensors_under_other_names_are_listed(write, name):
    assert listed_method(write(name, as_safetensors(flux_state()))) == PULID_FLUX


@pytest.mark.parametrize("layout", STATES)
def test_a_file_that_is_written_to_after_loading(write, layout):
    """As by a download over it. The weights stay; those of a truncated file must not end the process either."""
    path = write("x.safetensors", as_safetensors(STATES[layout]()))
    adapter = load_adapter(path)
    weights = [*adapter.encoder.state_dict().values(), *(t for site in adapter.sites for t in vars(site).values())]
    before, size = [tensor.clone() for tensor in weights], path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(one, other) for one, other in zip(weights, before))


def test_a_file_replaced_by_one_of_the_same_size_and_time(write, tmp_path):
    """PuLID 0.9.0 and 0.9.1 are equally large, and copying may preserve the time."""
    (tmp_path / "pulid").mkdir()
    path, other = (write(f"pulid/{name}", as_safetensors(flux_state(seed=i))) for i, name in enumerate(("x.sft", ".y")))
    adapters = Adapters(ModelsFolder(lambda: Settings(tmp_path)))
    first = adapters.load("x", "flux").fingerprint
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert adapters.load("x", "flux").fingerprint != first


@pytest.mark.parametrize("layout", STATES)
def test_encoder_is_float32_sites_stay_as_stored(write, layout):
    adapter = load_adapter(write("x", as_safetensors({k: v.half() for k, v in STATES[layout]().items()})))
    assert {p.dtype for p in adapter.encoder.parameters()} == {torch.float32}
    assert not any(p.requires_grad or p.is_meta for p in adapter.encoder.parameters())
    assert not adapter.encoder.training
    assert {t.dtype for site in adapter.sites for t in vars(site).values()} == {torch.float16}
    prefix = {"converted": "image_proj.", "flux": "pulid_encoder."}.get(layout, "id_adapter.")
    state = STATES[layout]()
    for name, value in adapter.encoder.state_dict().items():
        assert torch.equal(value, state[prefix + name].half().float())


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_of_a_half_precision_conversion(write):
    full = load_adapter(write("a", pickled(v1_state())))
    half = load_adapter(write("b", as_safetensors({k: v.half() for k, v in v1_state().items()})))
    conversion = load_adapter(write("c", as_safetensors(converted_state())))
    assert full.fingerprint == half.fingerprint == conversion.fingerprint
    assert len(full.fingerprint) == 16
    int(full.fingerprint, 16)


def test_fingerprint_tells_weights_apart(write):
    state = v1_state()
    changed = {**state, "id_adapter.mapping_patch_4.6.bias": state["id_adapter.mapping_patch_4.6.bias"].clone()}
    changed["id_adapter.mapping_patch_4.6.bias"][-1] += 0.01
    swapped = dict(state)
    swapped["id_adapter.mapping_0.1.bias"] = state["id_adapter.mapping_1.1.bias"]
    swapped["id_adapter.mapping_1.1.bias"] = state["id_adapter.mapping_0.1.bias"]
    states = [state, changed, swapped, v1_state(seed=9), v11_state(), flux_state(seed=4)]
    prints = {load_adapter(write(f"{i}", as_safetensors(s))).fingerprint for i, s in enumerate(states)}
    assert len(prints) == len(states)


# ---------------------------------------------------------------- files that are something else


def tensors(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


KLEIN = "PuLID for FLUX.2 Klein, which does not work: .*random"
FOREIGN = {
    kind: (tensors(*keys.split()), words)
    for kind, keys, words in (
        ("kohya lora", "lora_unet_down_blocks_1.lora_down.weight lora_unet_down_blocks_1.alpha", "a LoRA"),
        ("peft lora", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
        ("XLabs lora", "double_blocks.0.processor.qkv_lora1.up.weight", "a LoRA"),
        ("LoKr", "lycoris_single_blocks_0_linear1.lokr_w1", "a LoRA"),
        ("OFT", "oft_unet_input_blocks_1.oft_blocks", "a LoRA"),
        ("half an ip-adapter", "image_proj.latents image_proj.proj_out.weight", "an IP-Adapter of an unknown kind"),
        ("its other half", "ip_adapter.1.to_k_ip.weight ip_adapter.1.to_v_ip.weight", "an IP-Adapter of an unknown"),
        ("XLabs ip-adapter", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an IP-Adapter"),
        ("XLabs projection", "ip_adapter_proj_model.proj.weight", "an IP-Adapter"),
        ("sdxl checkpoint", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight "
         "first_stage_model.decoder.conv_in.weight model.diffusion_model.input_blocks.0.0.weight",
         "a Stable Diffusion checkpoint"),
        ("diffusers unet", "conv_in.weight down_blocks.0.resnets.0.conv1.weight", "a Stable Diffusion"),
        ("flux transformer", "double_blocks.0.img_attn.qkv.weight img_in.weight", "a FLUX transformer"),
        ("flux checkpoint", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight vae.decoder.conv_in.weight",
         "a FLUX transformer"),
        ("diffusers flux", "transformer_blocks.0.attn.to_q.weight x_embedder.weight", "a FLUX transformer"),
        ("Klein v1", "pulid_ca_double.0.to_q.weight", KLEIN),
        ("Klein v2", "pulid_ca_single.3.norm1.weight", KLEIN),
        ("Klein's encoder", "id_former.latents", KLEIN),
        ("eva", "logit_scale visual.blocks.0.attn.q_bias text.ln_final.weight", "a vision transformer"),
        ("controlnet", "control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("vae", "decoder.conv_in.weight encoder.conv_in.weight", "a VAE"),
        ("retinaface", "module.body.conv1.weight module.fpn.output1.0.weight", "a RetinaFace detector"),
        ("bisenet", "cp.resnet.conv1.weight ffm.convblk.conv.weight", "a BiSeNet face parser"),
        ("flux half", "pulid_encoder.latents", "a PuLID file for FLUX, or a part of one"),
        ("sdxl half", "id_adapter_attn_layers.1.id_to_k.weight", "a PuLID file for SDXL, or a part of one"),
        ("unknown", "some.strange.name", r"unknown kind \(its first keys: some\.strange\.name\)"),
    )
}  # fmt: skip


@pytest.mark.parametrize("container", [as_safetensors, pickled])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_named(write, kind, container):
    state, words = FOREIGN[kind]
    path = write("pulid_v1.1.safetensors", container(state))
    with pytest.raises(WrongWeightsError, match=rf"^pulid_v1\.1\.safetensors is .*{words}.*(Needed: a PuLID file|\.$)"):
        load_adapter(path)
    assert listed_method(path) is None


NOT_TABLES = {
    "empty": (b"", "is empty"),
    "html": (b"\n  <!DOCTYPE html>\n<html><body>Access to this model is restricted</body></html>", "is a web page"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1142099520\n",
        "is a Git LFS pointer",
    ),
    "answer": (b"Entry not found", "is a server's answer"),
    "json": (b'{"error":"Repository not found"}', "is a server's answer"),
    "gguf": (b"GGUF" + bytes(20), "is a GGUF file"),
    "text": (b"no table", r"\(8 bytes\) cannot be read"),
    "zeros": (bytes(4096), "cannot be read"),
    "short": (b"PK", r"\(2 bytes\) cannot be read"),
    "no tensors": (as_safetensors({}), "holds no weights"),
    "numbers": (pickled({"epoch": 3}), "holds no weights"),
    "a list": (pickled([torch.zeros(2)]), r"holds no table of weights \(list\)"),
}


@pytest.mark.parametrize("name", ["pulid_v1.bin", "pulid_v1.1.safetensors"])
@pytest.mark.parametrize("kind", NOT_TABLES)
def test_files_that_hold_no_table(write, kind, name):
    content, words = NOT_TABLES[kind]
    with pytest.raises(WrongWeightsError, match=rf"^{name} .*{words}"):
        load_adapter(write(name, content))


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("container", [as_safetensors, pickled])
def test_truncated_files(write, container, keep):
    content = container(v11_state())
    with pytest.raises(WrongWeightsError, match=r"^cut\.safetensors \([\d,]+ bytes\) cannot be read: .*truncated"):
        load_adapter(write("cut.safetensors", content[: int(len(content) * keep)]))


@pytest.mark.parametrize("load", [load_adapter, load_vision_tower])
def test_a_missing_file(tmp_path, load):
    with pytest.raises(MissingWeightsError, match=r"gone\.bin was not found in "):
        load(tmp_path / "gone.bin")


# ---------------------------------------------------------------- PuLID files with something wrong


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


def narrow_heads() -> dict[str, Tensor]:
    """Of 100 instead of 128; such a file would load and fail later, in the midst of compiling."""
    shapes = {"to_q": (100, STREAM_WIDTH), "to_kv": (200, TOKEN), "to_out": (STREAM_WIDTH, 100)}
    return {f"pulid_ca.{n}.{name}.weight": torch.zeros(shape) for n in range(SITES) for name, shape in shapes.items()}


LAYER = "id_adapter_attn_layers.{}.id_to_{}.weight"
BROKEN = {
    "a layer": (without(v1_state(), LAYER.format(5, "k"), LAYER.format(5, "v")), "incomplete"),
    "keys of a layer": (without(v11_state(), LAYER.format(11, "k")), r"incomplete \(layer 11\)"),
    "values of the last": (without(v11_state(), LAYER.format(23, "v")), r"incomplete \(layer 23\)"),
    "self-attention": ({**v1_state(), LAYER.format(4, "k"): torch.zeros(8, TOKEN)}, "incomplete"),
    "foreign key": ({**v1_state(), "extra.weight": torch.zeros(1)}, r"also holds 'extra\.weight'"),
    "converted layer": (without(converted_state(), "ip_adapter.3.to_k_ip.weight"), "incomplete"),
    "token width": ({**v11_state(), LAYER.format(3, "k"): torch.zeros(WIDTHS[1], 32),
                     LAYER.format(3, "v"): torch.zeros(WIDTHS[1], 32)}, "layer 3 does not fit tokens of width 64"),
    "pair of two widths": ({**v11_state(), LAYER.format(3, "v"): torch.zeros(40, TOKEN)}, "layer 3 does not fit"),
    "encoder v1": (without(v1_state(), "id_adapter.mapping_3.0.bias"), r"encoder \(IDEncoder\).*mapping_3\.0\.bias"),
    "encoder v1.1": (without(v11_state(), "id_adapter.latents"), r"encoder \(IDFormer\) is incomplete"),
    "encoder layer": (without(v11_state(), "id_adapter.layers.9.1.3.weight"), r"layers\.9\.1\.3\.weight"),
    "encoder extra": ({**v11_state(), "id_adapter.new.weight": torch.zeros(1)}, r"other shapes: .*new\.weight"),
    "encoder shape": ({**v1_state(), "id_adapter.mapping_2.3.weight": torch.zeros(3, 5)}, r"size mismatch"),
    "flux encoder": (flux_file(random_weights(id_encoder().state_dict(), 1),
                               {"0.to_q.weight": torch.zeros(128, 24)}), "but another encoder"),
    "flux key": (without(flux_state(), "pulid_ca.7.norm2.bias"), r"missing or extra tensor: '7\.norm2\.bias'"),
    "flux module": (without(flux_state(), *(k for k in flux_state() if k.startswith("pulid_ca.2."))), r"tensor: '2\."),
    "flux extra": ({**flux_state(), "pulid_ca.3.to_x.weight": torch.zeros(1)}, r"tensor: '3\.to_x\.weight'"),
    "flux foreign": ({**flux_state(), "other": torch.zeros(1)}, "tensor: 'other'"),
    "flux shape": ({**flux_state(), "pulid_ca.4.to_kv.weight": torch.zeros(256, 32)},
                   r"pulid_ca\.4\.to_kv has shape \(256, 32\), expected \(256, 64\)"),
    "scaled fp8 of ComfyUI": ({**v1_state(), "scaled_fp8": torch.zeros(0)}, r"is a quantized copy of PuLID v1 .*16"),
    "scales of the encoder": ({**v11_state(), "id_adapter.mapping_0.0.scale_weight": torch.ones(1)},
                              r"is a quantized copy of PuLID v1\.1 .*scales beside the weights \(id_adapter\.mapping"),
    "scales of a layer": ({**flux_state(), "pulid_ca.3.to_q.weight_scale": torch.ones(1)}, "is a quantized copy of"),
    "bitsandbytes": ({**flux_state(), "pulid_ca.3.to_q.weight.absmax": torch.ones(1)}, "is a quantized copy of"),
    "flux heads": ({**flux_state(), **narrow_heads()}, ""),
    "to_q of one dimension": ({**flux_state(), "pulid_ca.0.to_q.weight": torch.zeros(128)}, ""),
    "body of one dimension": ({**v1_state(), "id_adapter.body.0.weight": torch.zeros(256)}, ""),
    "proj_out of one dimension": ({**v11_state(), "id_adapter.proj_out": torch.zeros(64)}, ""),
    "mapping of one dimension": ({**v11_state(), "id_adapter.mapping_0.0.weight": torch.zeros(128)}, ""),
    "tokens of no width": ({**v1_state(), "id_adapter.mapping_0.6.weight": torch.zeros(0, 128)}, ""),
    "without heads": ({**v11_state(), "id_adapter.layers.0.0.to_q.weight": torch.zeros(0, 64)}, ""),
    "flux norm": ({**flux_state(), "pulid_ca.4.norm1.bias": torch.zeros(24)}, r"pulid_ca\.4\.norm_id_bias has shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_incomplete_and_wrong_shapes(write, what):
    state, words = BROKEN[what]
    with pytest.raises(WrongWeightsError, match=rf"(?s)^broken\.bin.*{words}"):
        load_adapter(write("broken.bin", pickled(state)))


# ---------------------------------------------------------------- the vision tower's file


def test_pulid_is_no_vision_tower(write):
    for state, words in ((v11_state(), "PuLID file for SDXL"), (flux_state(), "PuLID file for FLUX")):
        with pytest.raises(WrongWeightsError, match=rf"^eva\.pt is .*{words}.* Needed: EVA02_CLIP_L_336_psz14_s6B\.pt"):
            load_vision_tower(write("eva.pt", as_safetensors(state)))


def tower_state(**changed: Tensor) -> dict[str, Tensor]:
    shapes = tower_shapes(64, 32, depth=2)
    state = {f"visual.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    return {**state, **{f"visual.{key}": value for key, value in changed.items()}}


@pytest.mark.parametrize(("state", "words"), [
    (tower_state(pos_embed=torch.zeros(1, 257, 64)), "is not the vision tower .*224 x 224"),
    (tower_state(**{"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}),
     "is not the vision tower .*384 x 384 pixels in patches of 16"),
    *((without(tower_state(), missing), "is not the vision tower")
      for missing in ("visual.pos_embed", "visual.blocks.0.mlp.w1.weight", "visual.blocks.1.attn.q_bias")),
    (without(tower_state(), "visual.head.weight"), "is a vision transformer .*Needed: EVA02"),
], ids=["224", "patches of 16", "no positions", "no mlp", "no bias", "no projection"])  # fmt: skip
def test_another_eva_or_an_incomplete_one_is_refused(write, state, words):
    with pytest.raises(WrongWeightsError, match=rf"^eva\.pt {words}"):
        load_vision_tower(write("eva.pt", pickled(state)))


def test_read_state_dict_makes_nesting_flat(write):
    inner = {"a": torch.ones(1), "note": "text"}
    content = pickled({"image_proj": inner, "state_dict": {"b": torch.ones(2)}, "c": torch.ones(3), "epoch": 4})
    assert {k: len(v) for k, v in read_state_dict(write("x", content)).items()} == {"image_proj.a": 1, "b": 2, "c": 3}
