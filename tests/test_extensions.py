"""What others add from outside: an objective, an advantage, a model family. Each is one file and one line in a table."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel, StableDiffusionPipeline
from step_cases import case, gradients, update

from fastloop.advantages import ADVANTAGES, Advantage, weighted_sum
from fastloop.denoisers import FAMILIES
from fastloop.errors import UserError
from fastloop.kernels import fused, reference
from fastloop.objectives import OBJECTIVES, Objective
from fastloop.plan import planned_memory
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer


def squared_hinge(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """A loss that no kernel has."""
    return (1 - advantage * (log_prob - log_prob_old)).clamp(min=0).square()


@pytest.fixture
def hinge(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", Objective("hinge", squared_hinge))


@pytest.mark.usefixtures("hinge")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_objective_without_a_kernel_is_computed_from_the_fused_log_prob(make_config, dtype):
    arguments = update(case(dtype=dtype, sigma=0.3))
    wanted, exact = gradients(reference, arguments, "hinge")
    leaves = [arguments[name].detach().requires_grad_() for name in ("cond", "uncond")]
    columns = {name: arguments[name] for name in ("x_t", "x_prev", "a", "b", "sigma", "log_prob_old", "advantage")}
    columns |= {"trajectory": arguments["trajectory"], "step": arguments["step"]}
    config = make_config(clip_range=arguments["clip_range"], sampling={"guidance_scale": arguments["guidance"]})
    batch = reference.MicroBatch(**columns)
    terms, outputs = OBJECTIVES["hinge"].terms(fused, lambda x, t: tuple(leaves), batch, config)
    assert outputs == tuple(leaves) and torch.equal(terms.log_prob, wanted.log_prob)
    torch.testing.assert_close(terms.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.statistics, wanted.statistics, rtol=1e-4, atol=1e-6)
    weights = torch.arange(1.0, len(terms.loss) + 1)
    for got, want in zip(torch.autograd.grad((terms.loss * weights).sum(), leaves), exact, strict=True):
        scale = want.abs().max().item()
        assert scale > 0 and (got - want).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-2) * scale


@pytest.mark.usefixtures("hinge")
def test_a_run_with_an_objective_of_ones_own_starts_at_ratio_1_and_learns(make_config):
    config = make_config(objective="hinge", iterations=1)
    trainer = Trainer(config, leave_out=("evaluation", "report"))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    (row,) = read_rows(trainer.train() / "metrics.jsonl")
    assert row["policy/replay_max_dev"] == 0 and row["policy/grad_norm"] > 0
    assert any(not p.equal(before[name]) for name, p in trainer.parameters.items())


def test_an_objective_of_the_kl_without_a_kernel_says_that_it_needs_the_reference(make_config):
    objective = Objective("bounded", lambda log_prob, old, advantage, clip, kl: kl - advantage * log_prob, uses_kl=True)
    with pytest.raises(ValueError, match="^objective: bounded needs the KL, .*: set kernels=reference$"):
        objective.terms(fused, lambda x, t: (x, None), reference.MicroBatch(*[torch.zeros(1)] * 7), make_config())


def hardest_first(log_prob, log_prob_old, advantage, clip_range, kl=None):
    """A loss of the noise's squared error, of which -log p is a constant away, that counts large ones more."""
    return advantage * log_prob.square()


def test_an_objective_may_take_the_final_latents_at_noise_levels_and_keeps_no_others(make_config, monkeypatch):
    objective = Objective("hardest_first", hardest_first, uses_ratio=False, stored_steps=False)
    monkeypatch.setitem(OBJECTIVES, "hardest_first", objective)
    kept, config = [], make_config(objective="hardest_first", updates_per_rollout=1, iterations=1)
    trainer = Trainer(config, leave_out=("evaluation", "report"))
    rollout = trainer.rollout
    trainer.rollout = lambda *args: kept.append(rollout(*args)) or kept[-1]
    (row,) = read_rows(trainer.train() / "metrics.jsonl")
    trajectories = kept[0]
    assert trajectories.latents.shape == (1, 6, 4, 8, 8)
    assert (trainer.denoiser.decode(trajectories.latents[0], 4) == trajectories.images).all()
    transitions = trajectories.transitions(trainer.steps_trained)
    assert len(transitions) == 6 * config.forward.levels and transitions.state.equal(transitions.next_state)
    assert transitions.state.tolist() == transitions.trajectory.tolist() == [i for i in range(6) for _ in range(5)]
    assert row["policy/grad_norm"] > 0 and "policy/replay_max_dev" not in row and "policy/ratio_max_dev" not in row
    with pytest.raises(UserError, match="passes_per_rollout: hardest_first"):
        make_config(objective="hardest_first", passes_per_rollout=2)


class LastStepCounts(Advantage):
    """The reward above its mean, twice as much for the last trained step as for the others; it counts its rollouts."""

    def __init__(self) -> None:
        self.rollouts = 0

    def __call__(self, prompts, terms, weights):
        self.rollouts += 1
        above = weighted_sum(terms, weights)
        above = above - above.mean()
        return torch.stack([above, above, above, 2 * above], -1)

    def state_dict(self):
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state):
        self.rollouts = state["rollouts"]


def test_an_advantage_may_give_each_step_its_own_and_remember(make_config, monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "last_step_counts", LastStepCounts)
    config = make_config(advantage="last_step_counts", iterations=1)
    left_out = ("evaluation", "report")
    trainer, seen = Trainer(config, leave_out=left_out), []
    loss = trainer.update.loss

    def recorded(transitions, advantages, rows, text):
        columns = transitions.trajectory[rows], transitions.step[rows], advantages[rows]
        seen.extend(zip(*(column.tolist() for column in columns), strict=True))
        return loss(transitions, advantages, rows, text)

    trainer.train()
    trainer = Trainer(make_config(advantage="last_step_counts", iterations=2), resume=True, leave_out=left_out)
    assert trainer.advantage.rollouts == 1
    loss = trainer.update.loss
    trainer.update.loss = recorded
    trainer.train()
    assert trainer.advantage.rollouts == 2
    of = {(trajectory, step): advantage for trajectory, step, advantage in seen}
    assert len(of) == 24 and all(of[i, 3] == 2 * of[i, 0] == 2 * of[i, 1] for i in range(6))
    assert any(of.values())


# --- a family ---------------------------------------------------------------------------------------------------------

FAMILY = '''
"""A model family of one's own: Sana's transformer behind one CLIP."""

import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from transformers import CLIPTextModel

from fastloop.denoisers.base import Denoiser


class SmallPipeline(DiffusionPipeline):
    def __init__(self, tokenizer, text_encoder, transformer, vae, scheduler):
        super().__init__()
        parts = {"text_encoder": text_encoder, "transformer": transformer, "vae": vae}
        self.register_modules(tokenizer=tokenizer, scheduler=scheduler, **parts)


class Small(Denoiser):
    network_class, network_name = SanaTransformer2DModel, "transformer"
    pipeline_class = SmallPipeline
    text_classes = {"text_encoder": CLIPTextModel}
    absent = {}

    @classmethod
    def check_fit(cls, path, text_configs, network):
        assert text_configs["text_encoder"].hidden_size == network.caption_channels

    @property
    def latent_channels(self):
        return self.network.config.in_channels

    @property
    def own_latent_size(self):
        return self.network.config.sample_size

    @property
    def size_unit(self):
        return self.network.config.patch_size

    def embed(self, ids):
        return (self.text_encoders["text_encoder"](ids[0])[0][0],)

    def blank_embedding(self):
        config = self.text_encoders["text_encoder"].config
        return (torch.empty(config.max_position_embeddings, config.hidden_size, device=self.device),)

    def condition(self, embeddings, sampling):
        return torch.stack([hidden for (hidden,) in embeddings])

    def call(self, forward, latents, timesteps, cond, uncond):
        text = cond if uncond is None else torch.cat([uncond, cond])
        return forward(latents, encoder_hidden_states=text, timestep=timesteps, return_dict=False)[0]
'''


@pytest.fixture
def small_family(tmp_path, monkeypatch, tiny_sd) -> str:
    """The file of a family and its line in the table, and a model of it with random weights."""
    (tmp_path / "small_family.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(FAMILIES, "SmallPipeline", ("small_family", "Small"))
    from small_family import SmallPipeline

    torch.manual_seed(0)
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
    )
    parts = {"tokenizer": stock.tokenizer, "text_encoder": stock.text_encoder, "vae": stock.vae, "scheduler": stock.scheduler}
    SmallPipeline(transformer=transformer, **parts).save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_model_family_is_one_file_and_one_line(make_config, small_family, adapter):
    config = make_config(
        model={"path": small_family, "adapter": adapter}, kl={"weight": 0.01}, ema={"decay": 0.5}, optimizer={"lr": 1e-3}
    )
    left_out = ("export", "report") if adapter == "lora" else ("report",)  # this pipeline has no LoRA files
    trainer = Trainer(config, leave_out=left_out)
    assert type(trainer.denoiser.network) is SanaTransformer2DModel and "update" in planned_memory(config).phases
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    rows = read_rows(trainer.train() / "metrics.jsonl")
    assert rows[0]["policy/replay_max_dev"] == 0 and all(row["policy/grad_norm"] > 0 for row in rows)
    moved = [not p.equal(before[name]) for name, p in trainer.parameters.items()]
    assert all(moved) if adapter == "full" else sum(moved) >= len(moved) / 2  # of a LoRA one half is 0 at first
    again = Trainer(config, resume=True, leave_out=left_out)
    assert again.iteration == 2 and all(p.equal(again.parameters[name]) for name, p in trainer.parameters.items())
    if adapter == "full":
        exported = trainer.denoiser.pipeline_class.from_pretrained(trainer.folder / "export").transformer.state_dict()
        assert all(exported[name].equal(value) for name, value in trainer.ema.average.items())
