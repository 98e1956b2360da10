"""The levers that are tried in bench/: what claims the mean gradient of LOOP has it, in a case where it is known."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastloop.advantages import ADVANTAGES, OfReward, leave_one_out
from fastloop.kernels import reference
from fastloop.prompts import Prompt, PromptStream
from fastloop.ranks import ALONE
from fastloop.rollout import rollout
from fastloop.transitions import TransitionTable
from fastloop.transitions.ddim import NoiseSchedule
from fastloop.update import PolicyUpdate


@pytest.fixture
def bench(bench_module, own_tables):
    """The study's module."""
    return bench_module("time_to_score")


@pytest.fixture
def levers(bench):
    return sys.modules["levers"]


# --- a chain of Gaussian steps whose gradient is known ----------------------------------------------------------------

STEPS, SIZE = 3, 2  # of the chain; elements of its state
AIMS = torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64)  # of the prompts: the reward is -mean |x_0 - aim|^2
TABLE = TransitionTable(
    torch.tensor([30, 20, 10]),
    torch.tensor([1.2, 1.1, 0.9], dtype=torch.float64),
    torch.tensor([-0.8, -0.6, -0.7], dtype=torch.float64),
    torch.tensor([0.7, 0.5, 0.4], dtype=torch.float64),
    torch.ones(3, dtype=torch.float64),
    NoiseSchedule(torch.linspace(0.99, 0.2, 40, dtype=torch.float64), "epsilon"),
)
GAINS, SHIFTS = [0.3, -0.2, 0.4], [0.5, 0.3, -0.4]


class Chain:
    """A denoiser whose output at step t is gain_t x + shift_t, and its engine: the gradient is kept where a step would be."""

    device, trains_text, scales_loss = torch.device("cpu"), False, False

    def __init__(self) -> None:
        self.parameters = torch.tensor([GAINS, SHIFTS], requires_grad=True)

    def latent_shape(self, height, width):
        return (1, 1, SIZE)

    def encode(self, prompts, sampling):
        return torch.zeros(len(prompts), 1), None

    def initial_latents(self, noise, prompts):
        return noise

    def predict(self, latents, timesteps, cond, uncond, full=0):
        step = (timesteps[:, None] == TABLE.timesteps).float()
        gain, shift = (step @ of for of in self.parameters)
        return gain.view(-1, 1, 1, 1) * latents + shift.view(-1, 1, 1, 1), None

    def decode(self, latents, batch):
        return latents.numpy()

    def set_lr(self, lr):
        self.parameters.grad = None

    def backward(self, loss, last):
        loss.backward()

    def step(self):
        return 1.0


class Aimed:
    """Rewards of a chain's final states, in place of `Rewards`."""

    def __init__(self) -> None:
        self.scores = []

    def submit(self, images, prompts):
        aims = AIMS[[int(prompt.text) for prompt in prompts]]
        self.scores.append(-(torch.from_numpy(images).double().flatten(1) - aims[:, None]).square().mean(1).numpy())

    def collect(self):
        scores, self.scores = np.concatenate(self.scores), []
        return {"reward": scores}


def exact_gradient() -> torch.Tensor:
    """Of the expected reward of the mean prompt, float64 (2, T): gains, shifts."""
    parameters = torch.tensor([GAINS, SHIFTS], dtype=torch.float64, requires_grad=True)
    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    for t in range(STEPS):
        factor = TABLE.a[t] + TABLE.b[t] * parameters[0, t]
        mean, variance = factor * mean + TABLE.b[t] * parameters[1, t], factor**2 * variance + TABLE.sigma[t] ** 2
    (-(variance + (mean - AIMS).square()).mean()).backward()
    return parameters.grad


@pytest.fixture
def errors(bench, levers, make_config, monkeypatch):
    """A function of levers: by how many standard errors the mean of their gradient differs from the exact one, (2, T).

    Steps that are not trained are NaN. ``groups`` of K images a rollout, of which there are ``times``. ``scale``: what the
    exact gradient is multiplied by. ``gradients``: they are returned themselves, and the share of groups with spread.
    """

    def of(
        *specs: str, k: int = 4, groups: int = 300, times: int = 40, mutate=lambda trainer: None, scale=1.0, gradients=False
    ):
        chosen = levers.parse_levers(list(specs))
        brought = dict(setting.split("=") for setting in levers.settings_of(chosen))
        own = {"memory": {"rollout_batch": 10**6, "update_batch": 10**6}, "clip_range": 0.2, "kernels": "reference"}
        config = make_config(
            **{"prompts_per_step": groups, "images_per_prompt": k, "updates_per_rollout": 1}
            | {"sampling": {"guidance_scale": 1.0, "steps": STEPS}} | own | brought
        )  # fmt: skip
        chain, rewards, ids = Chain(), Aimed(), torch.arange(groups * k)
        steps = torch.arange(STEPS)
        for lever in chosen:
            lever.check(config)
            steps = lever.steps(TABLE, steps, config)
        trainer = SimpleNamespace(
            config=config, rewards=rewards, denoiser=chain, table=TABLE, steps_trained=steps, device=chain.device, iteration=0
        )
        trainer.config = config.model_copy(update={"rewards": [SimpleNamespace(key="reward", weight=1.0)]})
        trainer.observer = sys.modules["fastloop.observer"].UNOBSERVED
        trainer.update = PolicyUpdate(config, chain, chain, TABLE, steps, ALONE)
        trainer.advantage = ADVANTAGES[config.advantage]()
        trainer.prompts = PromptStream([Prompt(str(i)) for i in range(len(AIMS))], 0)

        def sample(prompts, ids):
            options = {"batch": 10**6, "vae_batch": 10**6, "backend": "reference", "seed": trainer.config.seed}
            texts = [prompt.text for prompt in prompts]
            found = rollout(chain, TABLE, texts, ids, sampling=config.sampling, **options)
            rewards.submit(found.images, prompts)
            return found

        trainer.rollout, found, spread = sample, [], 0.0
        for module, name, value in (patch for lever in chosen for patch in lever.patches()):
            monkeypatch.setattr(module, name, value)
        levers.attach(chosen, trainer)
        mutate(trainer)
        for i in range(times):
            drawn = trainer.prompts.draw(i * groups, groups)
            trajectories = trainer.rollout([prompt for prompt in drawn for _ in range(k)], ids + i * len(ids))
            terms = {label: torch.from_numpy(values).view(groups, k) for label, values in rewards.collect().items()}
            spread += (terms["reward"].std(1) > 0).double().mean().item() / times
            advantages = trainer.advantage([prompt.text for prompt in drawn], terms, {"reward": 1.0}).float().flatten()
            trainer.update(trajectories, advantages, i)
            found.append(-chain.parameters.grad.double() * len(steps) * SIZE)  # of the mean row and the mean element
        found, exact = torch.stack(found), exact_gradient() * scale
        if gradients:
            return found, spread
        distance = (found.mean(0) - exact) / (found.std(0) / times**0.5)
        rest = [t for t in range(STEPS) if t not in steps]
        assert (found[:, :, rest] == 0).all()
        distance[:, rest] = torch.nan
        return distance.numpy()

    return of


def worst(errors: np.ndarray) -> float:
    return float(np.nanmax(np.abs(errors)))


UNBIASED = [(), ("steps:1:2",), ("control",), ("control:0.7",), ("james_stein",), ("tree:1x2:2x2",), ("tree:1x2",)]
UNBIASED += [("tree:0x4",), ("ratio:trajectory",), ("ratio:total",), ("ratio:trajectory_total", "control", "steps:1")]
UNBIASED += [("tree:2x2", "steps:1:2", "ratio:total"), ("by_spread",), ("by_spread:0.1", "ratio:trajectory")]


@pytest.mark.parametrize("specs", UNBIASED, ids=" ".join)
def test_the_mean_gradient_is_the_exact_one(errors, specs):
    assert worst(errors(*specs)) < 3.5


def test_weights_multiply_the_gradient_of_each_step(errors, levers):
    factors = levers.step_factors("equal", TABLE, torch.arange(STEPS))
    assert factors.mean() == pytest.approx(1) and (factors * TABLE.b / TABLE.sigma).std() == pytest.approx(0, abs=1e-12)
    assert worst(errors("weights:equal", scale=factors)) < 3 and worst(errors("weights:equal")) > 10


def test_a_wrong_weight_baseline_or_prediction_is_seen(errors, levers, monkeypatch):
    def all_edges_alike(trainer):
        trainer.update._columns["weight"].fill_(1.0)

    def over_all_leaves(trainer):  # those that the branch itself leads to are among a prompt's others
        rows, stride = trainer.advantage.rows, trainer.advantage.tree.stride

        def advantages(rewards, rows):
            own = leave_one_out(rewards).flatten()
            return torch.stack([own[i : i + stride(t)].mean() for i, t in zip(rows.trajectory, rows.step, strict=True)])

        trainer.advantage = OfReward(lambda rewards: advantages(rewards, rows))

    assert worst(errors("tree:1x2:2x2", mutate=all_edges_alike)) > 10
    assert worst(errors("tree:1x2", mutate=over_all_leaves)) > 10
    before_the_step = levers.predicted_x0
    monkeypatch.setattr(levers, "predicted_x0", lambda made, table, t, seed: before_the_step(made, table, min(t + 1, 2), seed))
    assert worst(errors("control:0.7")) > 10  # it knows the noise of the step


def test_the_prediction_of_x0_is_what_the_model_gave(levers, make_config):
    chain, config = Chain(), make_config(kernels="reference", sampling={"guidance_scale": 1.0})
    options = {"batch": 8, "vae_batch": 8, "backend": "reference", "seed": 5, "sampling": config.sampling}
    made = rollout(chain, TABLE, ["0"] * 8, torch.arange(8), **options)
    for step in range(STEPS):
        x, alpha = made.latents[step], TABLE.schedule.alphas[TABLE.timesteps[step]]
        eps = GAINS[step] * x + SHIFTS[step]
        expected = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        torch.testing.assert_close(levers.predicted_x0(made, TABLE, step, 5), expected.float(), rtol=1e-4, atol=1e-4)


# --- baselines --------------------------------------------------------------------------------------------------------


def test_james_stein_leaves_the_sample_out_of_its_weights_too(levers):
    aims, g = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    x = torch.randn(400_000, 3, 2, generator=g, dtype=torch.float64)  # of N(mu, 1), mu = 0, is also the score of mu
    rewards = -(x - aims[:, None]).square()
    exact = 2 * aims.mean()

    def error(advantages: torch.Tensor) -> tuple[float, float]:
        """In standard errors, and the variance."""
        gradients = (advantages * x).mean((1, 2))
        return ((gradients.mean() - exact) / (gradients.std() / len(x) ** 0.5)).abs().item(), gradients.var().item()

    def with_itself(rewards):
        mean, own = rewards.mean(1, keepdim=True), leave_one_out(rewards)
        noise = rewards.var(1).mean()
        weight = noise / (noise + (mean.var(0) - noise / 2).clamp(min=0))
        return own + weight * (rewards - own - (mean.sum(0) - mean) / 2)

    plain, found = error(torch.vmap(leave_one_out)(rewards)), error(torch.vmap(levers.james_stein)(rewards))
    assert plain[0] < 3 and found[0] < 3 and found[1] < 0.9 * plain[1]
    assert error(torch.vmap(with_itself)(rewards))[0] > 10
    slow = levers.james_stein(rewards[0])
    for p in range(3):
        for i in range(2):
            rest, others = rewards[0, p, 1 - i], [rewards[0, q] for q in range(3) if q != p]
            within = sum(group.var() for group in others) / 2  # of this prompt one sample is left, without a variance
            means = torch.stack([rest, *(group.mean() for group in others)])
            between = (means.var() - within * (1 + 1 / 2 + 1 / 2) / 3).clamp(min=0)
            weight = within / (within + between)
            baseline = (1 - weight) * rest + weight * torch.cat(others).mean()
            assert slow[p, i] == pytest.approx((rewards[0, p, i] - baseline).item())


def test_what_has_no_spread_teaches_nothing_and_best_and_worst_leave_the_others_out(levers):
    assert (levers.james_stein(torch.full((3, 4), 0.1 + 1e6, dtype=torch.float64)) == 0).all()
    rewards = torch.tensor([[1.0, 4.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    assert torch.equal(levers.james_stein(rewards[:1]), leave_one_out(rewards[:1]))
    assert levers.best_and_worst(rewards).tolist() == [[leave_one_out(rewards)[0, 0], 8 / 3, 0, 0], [0, 0, 0, 0]]


def test_the_factor_of_a_control_variate_is_of_earlier_rollouts_and_survives_a_resume(levers):
    first, second = (torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    control = levers.ControlVariate()
    for rewards, factor in ((first, 0.0), (second, 2.0)):
        control.predicted = torch.stack([rewards / 2, torch.zeros_like(rewards)], -1).flatten(0, 1)
        found = control(["p"] * 5, {"r": rewards}, {"r": 1.0})
        own = leave_one_out(rewards)
        torch.testing.assert_close(found, torch.stack([own - factor * own / 2, own], -1), atol=1e-12, rtol=0)
    again = levers.ControlVariate()
    again.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert again.factors(2).tolist() == control.factors(2).tolist() == [pytest.approx(2.0), 0.0]


# --- redrawing --------------------------------------------------------------------------------------------------------


def test_other_prompts_for_groups_without_spread_only_scale_the_gradient(errors, monkeypatch):
    score = Aimed.submit

    def hits(self, images, prompts):
        score(self, images, prompts)
        self.scores[-1] = (self.scores[-1] > -1.0).astype(float)

    monkeypatch.setattr(Aimed, "submit", hits)
    plain, spread = errors("steps:0:2", gradients=True)
    other, spread_other = errors("redraw:2", gradients=True)
    same, spread_same = errors("redraw_same:2", gradients=True)
    missing = 1 - spread
    assert spread_other == pytest.approx(1 - missing**3, abs=0.01) and spread < spread_same < 1

    def apart(found, factor):
        error = ((found.var(0) + factor**2 * plain.var(0)) / len(plain)).sqrt()
        return ((found.mean(0) - factor * plain.mean(0)) / error).abs().max()

    assert apart(other, spread_other / spread) < 3 and apart(same, spread_same / spread) > 4


def test_prompts_by_spread_are_drawn_as_it_says_and_corrected(errors, levers):
    def not_corrected(trainer):
        draw = trainer.prompts.draw

        def even(start, count):
            found = draw(start, count)
            trainer.advantage.factors = torch.ones(count).double()
            return found

        trainer.prompts.draw = even

    assert worst(errors("by_spread:0.1", mutate=not_corrected)) > 6
    prompts = [
        Prompt(f"{name} {i}", {"category": name}) for name, n in (("flat", 30), ("far", 60), ("new", 10)) for i in range(n)
    ]
    advantage = levers.BySpread()
    draw = advantage.draws(PromptStream(prompts, 3), 0.2)
    assert set(advantage.probabilities(prompts, 0.2)) == {1 / 100}  # nothing is known
    first = draw(0, 2)
    assert draw(0, 2) == first != draw(2, 2)
    rewards = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    advantage.factors = torch.full((2,), 2.0, dtype=torch.float64)
    found = advantage(["flat 3", "far 1"], {"r": rewards}, {"r": 1.0})
    assert torch.equal(found, 2 * leave_one_out(rewards)) and advantage.variance == {"far": 2.0, "flat": 0.0}
    advantage(["far 2", "far 1"], {"r": rewards}, {"r": 1.0})  # half of that now
    again = levers.BySpread()
    again.load_state_dict(json.loads(json.dumps(advantage.state_dict())))
    assert again.variance == {"far": pytest.approx(0.9 * 2.0 + 0.1 * 1.0), "flat": 0.0}
    again.draws(PromptStream(prompts, 3), 0.2)
    far, new = 1.9**0.5, 1.9**0.5 / 2
    expected = {"flat": 0.002, "far": 0.002 + 0.8 * far / (60 * far + 10 * new)}
    q = again.probabilities(prompts, 0.2)
    assert q[[0, 30]].tolist() == pytest.approx(list(expected.values())) and q.sum() == pytest.approx(1)
    draw(4, 500)
    assert sorted(set(advantage.factors.tolist())) == pytest.approx(sorted(1 / (100 * q[[0, 30, 90]])))


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_a_ratio_of_a_trajectory_or_of_the_whole_log_prob_clips_as_its_formula_says(levers, make_config):
    g = torch.Generator().manual_seed(0)
    x, after = torch.randn(2, 5, 1, 1, SIZE, generator=g).unbind()
    trajectory, of_step = (
        torch.tensor([7, 7, 9, 9, 4]),
        {"a": torch.ones(5), "b": torch.full((5,), -0.5), "sigma": torch.ones(5)},
    )
    change = torch.tensor([0.3, 0.1, -0.2, -0.4, 0.05], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0], dtype=torch.float64)
    log_prob = -((after - x * 0.5).double().square().flatten(1).mean(1) + np.log(2 * np.pi)) / 2
    for name, scale, shared in (("total", SIZE, False), ("trajectory", 1, True), ("trajectory_total", SIZE, True)):
        leaf = x.clone().requires_grad_()
        batch = reference.MicroBatch(
            x, after, **of_step, log_prob_old=(log_prob - change).float(), advantage=advantage.float(), trajectory=trajectory
        )
        objective, config = sys.modules["lever_ratio"].RATIOS[name], make_config(clip_range=0.15)
        terms, _ = objective.terms(reference, lambda x_t, t: (leaf, None), batch, config)  # noqa: B023
        parameters = log_prob.clone().requires_grad_()
        moved = parameters - (log_prob - change)
        if shared:
            moved = torch.stack([moved[:2].mean(), moved[:2].mean(), moved[2:4].mean(), moved[2:4].mean(), moved[4]])
        ratio = (scale * moved).exp()
        expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.85, 1.15)) / scale
        torch.testing.assert_close(terms.loss, expected.float(), rtol=1e-5, atol=1e-6)
        (wanted,) = torch.autograd.grad(
            expected.sum(), parameters
        )  # by log-prob; its own by the latents are (x' - mean) / -2 D
        found = torch.autograd.grad(terms.loss.sum(), leaf)[0].flatten(1)
        own = -0.5 * (after - x * 0.5).flatten(1) / SIZE
        torch.testing.assert_close(found, wanted.float()[:, None] * own, rtol=1e-4, atol=1e-6)
        outside = [(ratio > 1.15).sum().item(), (ratio < 0.85).sum().item()]
        assert terms.statistics[:2].tolist() == outside and sum(outside) > 0
        assert terms.statistics[4].item() == pytest.approx((ratio - 1).abs().max().item(), rel=1e-5)


def test_whole_trajectories_stand_together_in_an_order_of_their_own(levers):
    rows = sys.modules["fastloop.batches"].Rows.of(5, torch.tensor([0, 2, 3]))
    order = sys.modules["lever_ratio"].whole_trajectories(np.random.default_rng(0), rows, 1.0)
    assert sorted(order) == list(range(15)) and (rows.trajectory[order][::3] == rows.trajectory[order].reshape(5, 3).T).all()
    assert list(rows.trajectory[order][::3]) != sorted(rows.trajectory[order][::3])
    assert len(sys.modules["lever_ratio"].whole_trajectories(np.random.default_rng(0), rows, 0.34)) == 5
