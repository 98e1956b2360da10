"""DLPO: rewards less a denoising penalty, its own gradient, a user's pictures; formulas in float64, resume and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from known_traces import trace_nothing
from PIL import Image
from recorded import same, weights

from fastloop.advantages import leave_one_out
from fastloop.errors import UserError
from fastloop.plan import plan
from fastloop.preflight import preflight
from fastloop.rollout import Texts, gather_scores
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

DLPO = {"algorithm": "dlpo", "dlpo": {"beta": 3.0}}


def rolled_out(trainer: Trainer):
    """A rollout of two prompts with three images each, their scores and their penalties."""
    prompts = trainer.prompts.draw(0, 2)
    trajectories = trainer.rollout([prompt for prompt in prompts for _ in range(3)], torch.arange(6))
    scores = gather_scores(trainer.rewards, trainer.ranks, 6)
    return [prompt.text for prompt in prompts], trajectories, scores, trainer.denoising_errors(trajectories, 6)


def by_hand(trainer: Trainer, latents: torch.Tensor, prompt: str, level: int, noise: torch.Tensor) -> torch.Tensor:
    """The mean squared error of the predicted noise in float64, of an epsilon model."""
    unet, (encoder,) = trainer.denoiser.network.double(), trainer.denoiser.text_encoders.values()
    alpha = trainer.table.schedule.alphas[level]
    noisy = alpha.sqrt() * latents.double() + (1 - alpha).sqrt() * noise.double()
    text = encoder.double()(trainer.denoiser.tokens("tokenizer", prompt))[0]
    return (unet(noisy[None], torch.tensor([level]), text).sample[0] - noise.double()).square().mean()


@pytest.fixture
def make(make_config):
    def make(resume: bool = False, **changes) -> Trainer:
        return Trainer(make_config(**{**DLPO, "prompts_per_step": 2, "images_per_prompt": 3, **changes}), resume)

    return make


def test_the_advantage_is_that_of_alpha_r_less_beta_times_the_denoising_error(make):
    trainer = make(dlpo={"alpha": 2.0, "beta": 3.0})
    texts, trajectories, scores, errors = rolled_out(trainer)
    assert errors.shape == (6,) and (errors > 0).all()
    rewards = torch.from_numpy(2.0 * scores.total - 3.0 * errors).view(2, 3)
    expected = leave_one_out(rewards).flatten().float()
    assert trainer.advantages(texts, scores, errors).equal(expected)
    assert not expected.equal(2 * leave_one_out(torch.from_numpy(scores.total).view(2, 3)).flatten().float())
    process, number, zero = trainer.update.penalty.process, trajectories.ids, torch.zeros(6, dtype=torch.int64)
    levels, noise = process.timesteps(number, zero), process.rows(trajectories.latents[-1], number, zero)["x_prev"]
    assert levels[:3].unique().numel() == levels[3:].unique().numel() == 1 and noise[0].equal(noise[2])
    with torch.no_grad():
        found = [
            by_hand(trainer, trajectories.latents[-1][i], texts[i // 3], int(levels[i]), noise[i]).item() for i in range(6)
        ]
    np.testing.assert_allclose(errors, found, rtol=1e-5)


def test_its_own_gradient_is_beta_times_that_of_the_error_in_float64(make):
    trainer = make(dlpo={"beta": 3.0, "gradient": True}, model={"adapter": "full"}, memory={"rollout_batch": 6})
    texts, trajectories, *_ = rolled_out(trainer)
    transitions = trajectories.transitions(trainer.steps_trained)
    rows = torch.tensor([1, 9])  # of the trajectories 0 and 2
    text = Texts(trainer.denoiser, trajectories.prompts, trainer.config.sampling)
    _, loss, logged = trainer.update.loss(transitions, torch.zeros(24), rows, text)  # the advantage is 0
    loss.sum().backward()
    ours = {name: p.grad.double() for name, p in trainer.parameters.items()}
    process, number, zero = trainer.update.penalty.process, trajectories.ids[[0, 2]], torch.zeros(2, dtype=torch.int64)
    made, levels = process.rows(trajectories.latents[-1][[0, 2]], number, zero), process.timesteps(number, zero)
    trainer.denoiser.network.zero_grad()
    for i, trajectory in enumerate((0, 2)):
        error = by_hand(trainer, trajectories.latents[-1][trajectory], texts[0], int(levels[i]), made["x_prev"][i])
        assert logged["denoising_loss"][i].item() == pytest.approx(error.item(), rel=1e-5)
        (3.0 * error).backward()
    for name, p in trainer.denoiser.trainable().items():
        assert (ours[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-9, name


@pytest.mark.parametrize("more", [{}, {"gradient": True}], ids=str)
def test_it_trains_from_a_ratio_of_1_logs_its_penalty_and_resumes_exactly(make, tmp_path, more):
    values = {"dlpo": {"beta": 3.0, **more}, "memory": {"rollout_batch": 6, "update_batch": 6}}
    whole = make(output_dir=str(tmp_path / "whole"), **values)
    whole.train()
    row = read_rows(whole.folder / "metrics.jsonl")[0]
    assert row["policy/replay_max_dev"] == 0 < row["policy/denoising_loss"]
    make(output_dir=str(tmp_path / "cut"), iterations=1, **values).train()
    resumed = make(resume=True, output_dir=str(tmp_path / "cut"), **values)
    resumed.train()
    assert same(weights(resumed), weights(whole))
    plain = make(output_dir=str(tmp_path / "plain"), **{**values, "dlpo": {"beta": 0.0}})
    plain.train()
    assert not same(weights(plain), weights(whole))


def test_pictures_of_the_users_are_denoised_where_they_are_given(make, tmp_path):
    """Encoded as the VAE does, each prompt with its own; the reward has no penalty, and rows of advantage 0 are trained."""
    rng, lines = np.random.default_rng(0), []
    for i, prompt in enumerate(["cat", "cat", "dog"]):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{i}.png"}))
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    values = {"dlpo": {"beta": 3.0, "gradient": True, "data": str(file)}, "prompts": {"source": str(tmp_path / "prompts.txt")}}
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    trainer = make(**values)
    penalty, denoiser = trainer.update.penalty, trainer.denoiser
    assert {prompt: len(of) for prompt, of in penalty.latents.items()} == {"cat": 2, "dog": 1}
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "2.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    own = denoiser.vae.encode(pixels).latent_dist.mode() * denoiser.vae.config.scaling_factor
    torch.testing.assert_close(penalty.latents["dog"][0], own[0].detach())
    chosen = penalty.pictures(["cat", "cat", "dog"], [4, 5, 5])
    assert chosen[0].equal(penalty.latents["cat"][0]) and chosen[1].equal(penalty.latents["cat"][1])
    made = penalty.rows(chosen, torch.tensor([4, 5, 6]))
    assert not made.x_prev[0].equal(made.x_prev[1])
    trainer.train()
    row = read_rows(trainer.folder / "metrics.jsonl")[0]
    assert row["policy/denoising_loss"] > 0 == row["policy/pairs_skipped"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dlpo": {"beta": 0, "gradient": True}}, "dlpo.gradient: dlpo.beta=0 is no penalty: set beta, or leave it out"),
        (
            {"dlpo": {"data": "x.jsonl"}},
            "dlpo.data: how your pictures are denoised says nothing of those drawn: set dlpo.grad",
        ),
        (
            {"objective": "forward_process"},
            "dlpo.beta: objective=forward_process trains on denoising errors itself: set it to 0",
        ),
        (
            {"dlpo": {"gradient": True}, "engine": {"name": "deepspeed", "zero_stage": 3}},
            "dlpo.gradient: engine.zero_stage=3 gathers weights for one forward and its backward: set zero_stage=2",
        ),
        ({"dlpo": {"gradient": True, "data": "none.jsonl"}}, "dlpo.data: cannot read none.jsonl: No such file"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_line(make_config, changes, says):
    with pytest.raises(UserError, match=".*") as caught:
        preflight(make_config(**{**DLPO, **changes}))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_plan_counts_the_forwards_of_the_errors(make_config, monkeypatch):
    trace_nothing(monkeypatch)

    def work(**changes) -> tuple[str, str]:
        lines = plan(make_config(**{"algorithm": "dlpo", **changes}))
        (forwards,) = (line.split(": ")[1] for line in lines if line.startswith("work"))
        return forwards, "\n".join(lines)

    forwards, text = work()
    assert forwards == "9 forwards in the rollout, 8 forwards and backwards in the updates"
    assert "and, as the recipe leaves them to it, dlpo.alpha=5, dlpo.beta=1" in text
    assert work(dlpo={"gradient": True})[0] == "9 forwards in the rollout, 12 forwards and backwards in the updates"
    assert work(dlpo={"beta": 0})[0] == "8 forwards in the rollout, 8 forwards and backwards in the updates"
