"""The script that makes the bundled flow model: cut and resumed it gives the same weights, which stock diffusers reads."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from run_files import equal
from safetensors.torch import load_file

from fastloop.config import ModelConfig
from fastloop.denoisers import build_skeleton
from fastloop.shapes import pretrain_flow, pretraining
from fastloop.shapes.pretrain_flow import SAMPLING, build_pipeline, encode, main


@pytest.fixture
def pretrain(monkeypatch, tmp_path):
    """A function that calls the script with tiny settings, which saves a checkpoint after every step; ``score`` is a stub."""
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0)

    def run(name: str, *more: str, score=lambda *args, **call: {"mean": 0.25}):
        monkeypatch.setattr(pretrain_flow, "score", score)
        small = ["--steps", "4", "--batch", "4", "--pictures", "16", "--evaluate-every", "2"]
        monkeypatch.setattr(sys, "argv", ["pretrain_flow", "--out", str(tmp_path / name), *small, *more])
        main()
        return tmp_path / name

    return run


def files(folder) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def test_cut_and_resumed_it_gives_the_same_weights_which_stock_diffusers_reads(pretrain, tmp_path, capsys) -> None:
    def cut(*args, **call):
        raise KeyboardInterrupt

    whole = pretrain("whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain("cut", score=cut)
    with pytest.raises(SystemExit):
        pretrain("cut")
    assert f"{tmp_path / 'cut.checkpoint'} is of a training that is not done: give --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--resume: .*'batch': 4.*: give these settings"):
        pretrain("cut", "--resume", "--batch", "8")
    resumed = pretrain("cut", "--resume")
    wanted = files(whole)
    assert all(equal(weights, wanted[name]) for name, weights in files(resumed).items())
    assert not list(tmp_path.glob("*.checkpoint*"))

    assert {weight.dtype for weights in wanted.values() for weight in weights.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in whole.rglob("*.safetensors")) < 6e6
    assert not any("_name_or_path" in path.read_text() for path in whole.rglob("*.json"))  # a path of the machine
    header, *log = [json.loads(line) for line in (whole / "training_log.jsonl").read_text().splitlines()]
    assert header["settings"] == {"pictures": 16, "caption_noise": 0.25, "evaluate_every": 2, "steps": 4, "batch": 4}
    assert [(row["stage"], row.get("step"), row["guidance"]) for row in log] == [
        (stage, step, guidance) for stage, step in (("score", 2), ("score", 4), ("final", None)) for guidance in (1.0, 3.0)
    ]
    pipeline = StableDiffusion3Pipeline.from_pretrained(whole, text_encoder_3=None, tokenizer_3=None)
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    image = pipeline("a red circle", **SAMPLING | {"num_inference_steps": 2}).images[0]
    assert image.size == (64, 64)
    untrained = build_pipeline().transformer.state_dict()
    assert (pipeline.transformer.state_dict()["proj_out.weight"] != untrained["proj_out.weight"]).any()
    assert build_skeleton(ModelConfig(path=str(whole))).latent_shape(None, None) == (8, 8, 8)


@pytest.mark.parametrize("zeros", [1, 5])
def test_it_is_told_of_a_text_what_the_pipeline_tells_it(zeros) -> None:
    pipeline = build_pipeline()
    prompts = ["a green striped triangle and a yellow dotted ring", ""]
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
    )
    ours = encode(pipeline, ids, zeros)
    assert ours[0].equal(text) and ours[1].equal(pooled) and text.shape == (2, 12 + zeros, 96)
    assert pipeline.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == prompts[0]
