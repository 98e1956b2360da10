"""Runs that start from adapters in a file: the same pictures as stock diffusers with that file, trained on or fused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser, make_trainable
from fastloop.errors import UserError
from fastloop.preflight import preflight
from fastloop.runs import open_model
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
MLP = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in"]


def trained(path: str, rank: int, alpha: float, text: bool = False, targets: list[str] | None = None):
    """A model with adapters of random weights."""
    lora = {"rank": rank, "alpha": alpha, "text_encoders": text, "target_modules": targets}
    denoiser = load_denoiser(ModelConfig(path=path, lora=lora), CPU)
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    torch.manual_seed(7)
    for parameter in denoiser.trainable().values():
        parameter.data = torch.randn_like(parameter) * 0.3
    return denoiser


def files(denoiser, folder: Path, alpha: float) -> dict[str, Path]:
    """Its adapters in formats that people hold: peft's with its settings, diffusers' older names, kohya's with alphas."""
    denoiser.export(folder / "peft")
    denoiser.export(folder / "k", format="kohya")
    plain = load_file(folder / "peft/pytorch_lora_weights.safetensors")
    sides = {"unet": ("lora.down", "lora.up"), "text": ("lora_linear_layer.down", "lora_linear_layer.up")}
    old = {}
    for key, value in plain.items():
        down, up = sides[key[:4]]
        old[key.replace("lora_A", down).replace("lora_B", up)] = value
    save_file(old, folder / "old.safetensors")
    kohya = load_file(folder / "k/pytorch_lora_weights.safetensors")
    half = {}
    for key, value in kohya.items():  # another alpha, as kohya's trainer writes it
        half[key] = torch.tensor(alpha) if key.endswith("alpha") else value
        if "lora_up" in key:
            half[key] = value * float(kohya[f"{key.split('.')[0]}.alpha"]) / alpha
    save_file(half, folder / "kohya.safetensors")
    torch.save(half, folder / "kohya.pt")
    return {
        "peft": folder / "peft",
        "old": folder / "old.safetensors",
        "kohya": folder / "kohya.safetensors",
        "pt": folder / "kohya.pt",
    }


def outputs(denoiser) -> torch.Tensor:
    """What the network gives for a text, through the text encoders."""
    sampling = SamplingConfig(guidance_scale=1)
    with torch.no_grad():
        cond, _ = denoiser.encode(["a red circle"], sampling)
        noise = torch.randn(1, *denoiser.latent_shape(None, None), generator=torch.Generator().manual_seed(0))
        return denoiser.predict(noise, torch.tensor([500]), cond, None)[0]


def stock(denoiser, file: Path) -> torch.Tensor:
    """The same of stock diffusers' pipeline with that file."""
    pipeline = denoiser.pipeline_class.from_pretrained(denoiser.path)
    pipeline.load_lora_weights(file if file.is_dir() else file.parent, **({} if file.is_dir() else {"weight_name": file.name}))
    other = load_denoiser(ModelConfig(path=denoiser.path), CPU)
    other.network = pipeline.unet
    other.text_encoders = {name: getattr(pipeline, name) for name in other.text_encoders}
    return outputs(other)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_adapters_of_every_format_are_those_that_stock_loads_trained_on_and_fused(request, tmp_path, model):
    path = request.getfixturevalue(model)
    source = trained(path, rank=4, alpha=2.0, text=True)
    expected, plain = outputs(source), outputs(load_denoiser(ModelConfig(path=path), CPU))
    assert (expected - plain).abs().max() > 0.01
    for name, file in files(source, tmp_path, alpha=3.0).items():
        if name != "pt":
            assert torch.allclose(stock(source, file), expected, atol=1e-5), name
        on = {"path": str(file), "rank": 6, "alpha": 12.0, "text_encoders": True}  # more rank: filled up with nothing
        continued = load_denoiser(ModelConfig(path=path, lora=on), CPU)
        continued.train_adapter(gradient_checkpointing=False, seed=1)
        assert torch.allclose(outputs(continued), expected, atol=1e-5), name
        with continued.reference():
            continued._embeddings.clear()
            assert torch.allclose(outputs(continued), plain, atol=1e-6)
        fused = load_denoiser(ModelConfig(path=path, lora={"path": str(file), "fuse": True}), CPU)
        fused.train_adapter(gradient_checkpointing=False, seed=1)
        assert torch.allclose(outputs(fused), expected, atol=1e-5), name
        assert [d.notes[-1].split(", ")[1] for d in (continued, fused)] == ["trained on", "fused into the weights"]
        with fused.reference():
            assert torch.allclose(outputs(fused), expected, atol=1e-5)


def test_metadata_that_says_another_alpha_is_taken_and_a_whole_export_has_what_was_fused(tiny_sd, tmp_path):
    source = trained(tiny_sd, rank=4, alpha=4.0, text=True, targets=MLP)
    expected = outputs(source)
    source.export(tmp_path / "peft")
    file = tmp_path / "peft/pytorch_lora_weights.safetensors"
    weights = load_file(file)
    told = {
        "unet.lora_alpha": 8,
        "unet.r": 4,
        "text_encoder.lora_alpha": 1,
        "unet.alpha_pattern": {"to_q": 2},
        "text_encoder.r": 4,
    }
    for key in list(weights):
        if "lora_B" in key:
            weights[key] = weights[key] * (4.0 if key.startswith("text") else 2.0 if ".to_q." in key else 0.5)
    save_file(weights, file, {"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    model = ModelConfig(path=tiny_sd, adapter="full", lora={"path": str(file), "fuse": True})
    fused = load_denoiser(model, CPU)
    assert torch.allclose(outputs(fused), expected, atol=1e-5)
    fused.train_adapter(gradient_checkpointing=False, seed=1)
    fused.export(tmp_path / "export")
    assert torch.allclose(outputs(load_denoiser(ModelConfig(path=str(tmp_path / "export")), CPU)), expected, atol=1e-5)


def test_adapters_that_do_not_fit_are_refused_before_the_model_loads_with_what_to_set(
    tiny_sd, tiny_sdxl, tmp_path, make_config
):
    trained(tiny_sd, rank=4, alpha=4.0, text=True, targets=MLP).export(tmp_path / "all")
    trained(tiny_sd, rank=4, alpha=4.0, text=False, targets=MLP).export(tmp_path / "unet")
    trained(tiny_sdxl, rank=4, alpha=4.0, text=False).export(tmp_path / "xl")
    save_file({"lora_unet_a.hada_w1_a": torch.zeros(1)}, tmp_path / "loha.safetensors")
    save_file({"lora_unet_a.dora_scale": torch.zeros(1)}, tmp_path / "dora.safetensors")
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    whole = load_file(tmp_path / "unet/pytorch_lora_weights.safetensors")
    first = next(key for key in whole if "lora_A" in key)
    save_file(whole | {first: whole[first][:2].contiguous()}, tmp_path / "ranks.safetensors")
    save_file({key: value for key, value in whole.items() if key != first}, tmp_path / "half.safetensors")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    sgm = {f"lora_unet_{name}.lora_{side}.weight": torch.zeros(4, 4) for side in ("down", "up")
           for name in ("input_blocks_4_1_proj_in", "mid_block_attentions_0_proj_in")}  # fmt: skip
    save_file(sgm, tmp_path / "mixed.safetensors")
    wide = {"target_modules": MLP}
    for lora, says in (
        ({"path": "gone"}, "model.lora.path: no file gone: give a .safetensors file of adapters"),
        ({"path": "loha.safetensors"}, "holds LoHa, and only plain LoRA is read"),
        ({"path": "dora.safetensors"}, "holds DoRA, and only plain LoRA is read"),
        ({"path": "none.safetensors"}, "model.lora.path: "),
        ({"path": "cut.safetensors"}, "model.lora.path: cannot read"),
        ({"path": "ranks.safetensors", **wide}, "or of another size: it is of another model"),
        ({"path": "half.safetensors", **wide}, "or half of a pair"),
        ({"path": "numbers.pt"}, "model.lora.path: "),
        ({"path": "mixed.safetensors"}, "model.lora.path: "),
        ({"path": "xl"}, "it is of another model"),
        ({"path": "xl", "fuse": True}, "it is of another model"),
        (
            {"path": "unet"},
            "on net.2, proj_in too: set it to [net.2,proj_in,to_k,to_out.0,to_q,to_v], or model.lora.fuse=true",
        ),
        ({"path": "unet", "rank": 2, **wide}, "model.lora.rank: FOLDER/unet has adapters of rank 4: set model.lora.rank=4"),
        ({"path": "all", **wide}, "on the text encoder, encoder.layers.0"),
        ({"path": "all", **wide}, "set model.lora.fuse=true, or model.lora.text_encoders=true"),
    ):
        with pytest.raises(UserError) as caught:
            preflight(make_config(model={"path": tiny_sd, "lora": lora | {"path": str(tmp_path / lora["path"])}}))
        assert says in str(caught.value).replace(str(tmp_path), "FOLDER").replace("FOLDER/gone", "gone"), str(caught.value)
        assert "\n" not in str(caught.value)
    skeleton = build_skeleton(ModelConfig(path=tiny_sd))
    make_trainable(skeleton, make_config(model={"path": tiny_sd, "lora": {"path": str(tmp_path / "unet"), **wide}}))
    for model, says in (
        ({"lora": {"fuse": True}}, "model.lora.fuse: there is nothing to fuse"),
        ({"lora": {"path": "a"}, "adapter": "full"}, "model.lora.path: model.adapter=full trains no adapters"),
    ):
        with pytest.raises(UserError, match=says):
            make_config(model={"path": tiny_sd, **model})


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_adapters_start_over_weights_in_few_bits(tmp_path, bits):
    """Shapes are those of the layer, not of its packed weight."""
    from tiny_pipelines import make_sd

    path = make_sd(tmp_path / "wide", block_out_channels=(64, 64))
    trained(path, rank=4, alpha=4.0, text=False).export(tmp_path / "lora")
    denoiser = load_denoiser(
        ModelConfig(path=path, base_precision=bits, lora={"path": str(tmp_path / "lora"), "rank": 4}), CPU
    )
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    found = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    ours = {name.replace(".default", ""): p for name, p in denoiser.trainable().items()}
    assert all(torch.equal(value, ours[key.removeprefix("unet.")]) for key, value in found.items())


def test_one_adapter_of_kohyas_flux_for_q_k_and_v_becomes_three(tiny_flux, tmp_path):
    denoiser = load_denoiser(ModelConfig(path=tiny_flux, lora={"path": str(tmp_path / "kohya.safetensors"), "rank": 2}), CPU)
    width, name = denoiser.network.inner_dim, "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.randn(3 * width, 2)
    one = {f"{name}.lora_down.weight": torch.randn(2, width), f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(one, tmp_path / "kohya.safetensors")
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    for letter, theirs in zip("qkv", up.split(width), strict=True):
        layer = denoiser.network.transformer_blocks[0].attn.get_submodule(f"to_{letter}")
        down = one[f"{name}.lora_down.weight"]
        ours = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        assert torch.allclose(ours, 0.5 * theirs @ down, atol=1e-5)


def test_a_run_goes_on_and_is_sampled_without_the_adapters_it_started_from_and_not_with_other_words(
    tiny_sd, tmp_path, make_config
):
    """Adapters that are trained on are in every checkpoint; what is read again each time must be what it was."""
    source = trained(tiny_sd, rank=4, alpha=4.0)
    source.export(tmp_path / "start")
    word, few = tmp_path / "word.safetensors", {"every": 9, "images_per_prompt": 1, "grid": 1, "prompts": {"limit": 1}}
    save_file({"<cat>": torch.ones(2, source.text_encoders["text_encoder"].config.hidden_size)}, word)
    lora = {"path": str(tmp_path / "start"), "rank": 4}
    model = {"path": tiny_sd, "lora": lora, "textual_inversion": {"<cat>": str(word)}}
    values = {"model": model, "eval": few, "sampling": {"steps": 2}, "output_dir": str(tmp_path / "run")}
    Trainer(make_config(**values, iterations=1), leave_out=("report", "export")).train()
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(UserError, match="model.lora.path: no file"):  # a new run wants them
        Trainer(make_config(**values | {"output_dir": str(tmp_path / "other")}, iterations=1))
    Trainer(make_config(**values, iterations=2), resume=True, leave_out=("report", "export")).train()
    _, load = open_model(str(tmp_path / "run"), [])
    assert {name for name in load().trainable()} == {name for name in source.trainable()}
    save_file({"<cat>": torch.zeros(2, source.text_encoders["text_encoder"].config.hidden_size)}, word)
    with pytest.raises(UserError, match="^--resume: model.textual_inversion.<cat>: what is there is not what the run"):
        Trainer(make_config(**values, iterations=3), resume=True)
