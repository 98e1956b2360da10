"""Models as people hold them: early files, pipelines of other tasks, and parts that a family does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from known_traces import trace_nothing
from safetensors.torch import load_file
from tiny_pipelines import SETTINGS

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.errors import UserError
from fastloop.plan import plan
from fastloop.preflight import preflight
from fastloop.rollout import rollout, sampler_table
from fastloop.transitions import transition_table


def edited(source: str, folder: Path, file: str, remove: tuple[str, ...] = (), **values) -> Path:
    """A copy of a pipeline's folder, or that folder again, with other values in one of its JSON files."""
    if not folder.exists():
        shutil.copytree(source, folder)
    found = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in found.items() if key not in remove}))
    return folder


def test_early_files_are_taken_as_stocks_pipeline_takes_them(tiny_sd, tmp_path, make_config, monkeypatch):
    """`sample_size` of less than 64 before diffusers 0.9, no `steps_offset`, and a DDIM that does not say it does not clip."""
    folder = edited(tiny_sd, tmp_path / "early", "unet/config.json", _diffusers_version="0.6.0", sample_size=32)
    edited(tiny_sd, folder, "scheduler/scheduler_config.json", remove=("steps_offset", "clip_sample"))
    config, sampling = ModelConfig(path=str(folder)), SamplingConfig(steps=4, guidance_scale=1)
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.scheduler.set_timesteps(4)
    skeleton, loaded = build_skeleton(config), load_denoiser(config, torch.device("cpu"))
    for denoiser in (skeleton, loaded):
        assert denoiser.latent_shape(None, None)[1:] == (stock.unet.config.sample_size,) * 2 == (64, 64)
        assert denoiser.notes == (
            "early files: sample_size 64 for 32, steps_offset 1 for 0, clip_sample false for true, "
            "as stock's pipeline takes them",
        )
    assert sampler_table(config, sampling).timesteps.equal(stock.scheduler.timesteps)
    trace_nothing(monkeypatch)
    assert f"note         {loaded.notes[0]}" in plan(make_config(model={"path": str(folder)}))
    edited(tiny_sd, folder, "unet/config.json", _diffusers_version="0.9.0")  # from then on files say what they mean
    assert build_skeleton(config).latent_shape(None, None)[1:] == (32, 32)
    assert build_skeleton(ModelConfig(path=tiny_sd)).notes == ()


@pytest.mark.parametrize("model, task", [("tiny_sd", "Img2Img"), ("tiny_sdxl", "Inpaint"), ("tiny_sd3", "Img2Img")])
def test_a_pipeline_of_another_task_is_opened_as_its_text_to_image_base(request, tmp_path, model, task):
    path = request.getfixturevalue(model)
    base = json.loads((Path(path) / "model_index.json").read_text())["_class_name"]
    name = base.replace("Pipeline", f"{task}Pipeline")
    denoiser = build_skeleton(ModelConfig(path=str(edited(path, tmp_path / "copy", "model_index.json", _class_name=name))))
    assert denoiser.pipeline_class.__name__ == base
    assert denoiser.notes == (f"a {name}, opened as the {base} of its parts",)


@pytest.mark.parametrize(
    "file, values, says",
    [
        (
            "unet/config.json",
            {"time_cond_proj_dim": 8},
            "the UNet of FOLDER has time_cond_proj_dim=8, which this trainer knows",
        ),
        ("unet/config.json", {"class_embed_type": "timestep"}, "the UNet of FOLDER has class_embed_type=timestep, which this"),
        ("unet/config.json", {"num_class_embeds": 3}, "the UNet of FOLDER has num_class_embeds=3, which this trainer knows"),
        ("unet/config.json", {"addition_embed_type": "text"}, "the UNet of FOLDER has addition_embed_type=text, which this"),
        ("unet/config.json", {"out_channels": 8}, "takes 4 channels and gives 8: it is made for inpainting or predicts a"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4: it is made for inpainting or predicts a"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "BertModel"]},
            "the text_encoder of FOLDER is a BertModel, and only a CLIPTextModel can be trained here",
        ),
        (
            "model_index.json",
            {"vae": ["diffusers", "AsymmetricAutoencoderKL"]},
            "the vae of FOLDER is a AsymmetricAutoencoderKL, and only a AutoencoderKL can be trained here",
        ),
    ],
    ids=str,
)
def test_what_a_family_does_not_know_is_refused_in_one_line(tiny_sd, tmp_path, file, values, says):
    folder = edited(tiny_sd, tmp_path / "copy", file, **values)
    with pytest.raises(UserError) as caught:
        build_skeleton(ModelConfig(path=str(folder)))
    assert says.replace("FOLDER", str(folder)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [0, 0.5, 1])
def test_guidance_up_to_1_is_none_as_in_diffusers(make_config, given):
    config = make_config(sampling={"guidance_scale": given}, eval={"sampling": {"guidance_scale": given}})
    assert config.sampling.guidance_scale == 1 == config.eval_sampling.guidance_scale
    assert config.sampling.branches == 1 == config.eval_sampling.branches


def test_a_full_export_has_the_bases_small_files_as_they_are_and_names_a_tokenizer_that_stock_loads(tiny_sd, tmp_path):
    """Old versions of transformers read other files of a tokenizer than this one writes."""
    folder = edited(tiny_sd, tmp_path / "base", "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    edited(tiny_sd, folder, "scheduler/scheduler_config.json", a_key_of_its_own=1)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    denoiser = load_denoiser(ModelConfig(path=str(folder), adapter="full"), torch.device("cpu"))
    denoiser.export(tmp_path / "export", "fp16")
    for part in ("tokenizer", "scheduler"):
        files = {file.name: file.read_bytes() for file in (folder / part).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (tmp_path / "export" / part).iterdir()}
    (tmp_path / "export" / "tokenizer" / "vocab.json").unlink()  # which is no vocabulary
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float16)
    assert pipeline.tokenizer("a red circle").input_ids == denoiser.tokenizers["tokenizer"]("a red circle").input_ids
    assert pipeline.safety_checker is None and pipeline.unet.dtype == pipeline.vae.dtype == torch.float16
    names = load_file(tmp_path / "export/text_encoder/model.safetensors")  # before transformers 5.6 others are not found
    assert all(name.startswith("text_model.") for name in names)
    own = denoiser.text_encoders["text_encoder"].half().state_dict()
    assert all(torch.equal(value, own[name]) for name, value in pipeline.text_encoder.state_dict().items())


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": {"adapter": "full", "lora": {}}}, "export.format: kohya is a format of adapters: set model.adapter=lora"),
        ({"model": {"path": "assets:shapes_flow"}}, "export.format: kohya has no names for a StableDiffusion3Pipeline"),
    ],
    ids=str,
)
def test_kohyas_format_is_for_adapters_of_models_that_it_has_names_for(make_config, changes, says):
    with pytest.raises(UserError) as caught:
        preflight(make_config(export={"format": "kohya"}, **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_the_scheduler_can_be_set_and_are_exported_and_others_are_refused(tiny_sd, tmp_path):
    given = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    config, sampling = ModelConfig(path=tiny_sd, adapter="full", scheduler=given), SamplingConfig(steps=4, guidance_scale=1)
    table, plain = sampler_table(config, sampling), sampler_table(ModelConfig(path=tiny_sd), sampling)
    assert table.schedule.prediction == "v_prediction" and not table.timesteps.equal(plain.timesteps)
    load_denoiser(config, torch.device("cpu")).export(tmp_path / "export")
    exported = sampler_table(ModelConfig(path=str(tmp_path / "export")), sampling)
    assert exported.schedule.prediction == "v_prediction" and exported.timesteps.equal(table.timesteps)
    for key, says in (("prediction_typ", "; did you mean prediction_type?"), ("_class_name", ""), ("shift", "")):
        with pytest.raises(UserError, match=f"^model.scheduler.{key}: a DDIMScheduler has no such key"):
            sampler_table(ModelConfig(path=tiny_sd, scheduler={key: 1}), sampling)
        assert says in str(
            pytest.raises(UserError, sampler_table, ModelConfig(path=tiny_sd, scheduler={key: 1}), sampling).value
        )


def test_prompts_whose_end_no_text_encoder_sees_are_named_or_refused(make_config, tiny_sd, tiny_sdxl, tmp_path, monkeypatch):
    trace_nothing(monkeypatch)
    tokenizer = load_denoiser(ModelConfig(path=tiny_sd), torch.device("cpu")).tokenizers["tokenizer"]
    most = tokenizer.model_max_length - 2  # words between the first and the last token
    whole, cut = " ".join(["red"] * most), " ".join(["red"] * (most + 1))
    assert len(tokenizer(whole).input_ids) == tokenizer.model_max_length
    (tmp_path / "prompts.txt").write_text(f"{whole}\n{cut}\na red circle\n")
    for path in (tiny_sd, tiny_sdxl):
        config = {"model": {"path": path}, "prompts": {"source": str(tmp_path / "prompts.txt")}}
        (line,) = preflight(make_config(**config)).cut
        assert line.startswith("prompts: 1 of 3 have more tokens than the text encoders take, so that the model does not see")
        assert line.endswith(f"{cut[:120]!r}") and f"warning      {line}" in plan(make_config(**config))
        with pytest.raises(
            UserError, match=r"^prompts.too_long: 1 of 3 have more tokens .*: shorten them, or set it to warn or chunk$"
        ):
            preflight(make_config(**{**config, "prompts": {**config["prompts"], "too_long": "error"}}))
    assert preflight(make_config()).cut == []


def test_each_part_is_read_from_the_files_that_it_has_and_a_line_says_so(tiny_sd, tmp_path, make_config):
    """The variant for some parts only, as many repositories have it, and one part without safetensors."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "mixed"))
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.fp16.safetensors")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    config = make_config(model={"path": str(folder), "variant": "fp16"})
    assert preflight(config).skeleton.notes == (
        "the vae has no files of the variant fp16: those without one are read",
        "the vae has no safetensors: its .bin is read, of which nothing but tensors is unpickled",
    )
    loaded, wanted = (
        load_denoiser(config.model, torch.device("cpu")),
        load_denoiser(ModelConfig(path=tiny_sd), torch.device("cpu")),
    )
    for part, module in loaded.parts.items():
        assert all(value.equal(wanted.parts[part].state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(UserError, match=r"^model.variant: the \w+ of .* alone: set model.variant=fp16$"):
        preflight(make_config(model={"path": str(folder)}))


@pytest.mark.parametrize("steps, factor", [(1, 501.1), (2, 55.3), (4, 23.7), (8, 13.6), (20, 7.6), (50, 4.5)])
def test_few_steps_of_turbo_move_the_ratio_by_so_much(steps, factor):
    """|b| / sigma as docs/models.md has it, and what it is at 4 steps without the last."""
    turbo = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", **SETTINGS}
    table = transition_table(turbo, steps, 1.0, None, None, None)
    ratios = table.b.abs() / table.sigma
    assert round(ratios.max().item(), 1) == factor and ratios.argmax() == steps - 1
    assert steps != 4 or round(ratios[:-1].max().item(), 1) == 3.4


def test_evaluations_rescale_guidance_as_stock_does_and_training_refuses_it(make_config, tiny_sd):
    config = make_config(eval={"sampling": {"guidance_rescale": 0.7, "eta": 0, "guidance_scale": 4.0}})
    sampling, prompts = config.eval_sampling, ["a red circle", "a cat"]
    denoiser, table = load_denoiser(config.model, torch.device("cpu")), sampler_table(config.model, config.eval_sampling)
    settings = {"seed": 3, "batch": 2, "vae_batch": 2, "backend": "reference"}
    ours = rollout(denoiser, table, prompts, torch.arange(2), sampling=sampling, **settings)
    plain = sampling.model_copy(update={"guidance_rescale": None})
    assert (
        rollout(denoiser, table, prompts, torch.arange(2), sampling=plain, **settings).latents - ours.latents
    ).abs().max() > 1e-2
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    drawn = pipeline(
        prompts, latents=ours.latents[0], num_inference_steps=4, guidance_scale=4.0, guidance_rescale=0.7, output_type="latent"
    ).images
    torch.testing.assert_close(ours.latents[-1], drawn, rtol=1e-3, atol=1e-4)
    with pytest.raises(
        UserError, match=r"sampling.guidance_rescale: a step is then not affine .* set eval.sampling.guidance_resc"
    ):
        make_config(sampling={"guidance_rescale": 0.7})
    flow = {"model": {"path": "assets:shapes_flow"}, "sampling": {"eta": 0.7}}
    with pytest.raises(
        UserError, match=r"^eval.sampling.guidance_rescale: .* is a flow, whose pipeline has none: leave it out$"
    ):
        preflight(make_config(**flow, eval={"sampling": {"guidance_rescale": 0.7}}))
