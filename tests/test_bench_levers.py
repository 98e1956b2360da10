"""The levers that are tried in bench/: what claims the mean gradient of LOOP has it, in a case where it is known; all run."""

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
from fastloop.recipes import dump_config, load_config
from fastloop.rollout import rollout
from fastloop.tracking import read_rows
from fastloop.transitions import TransitionTable
from fastloop.transitions.ddim import NoiseSchedule
from fastloop.update import PolicyUpdate


@pytest.fixture
def bench(bench_module, monkeypatch, own_tables):
    """The study's module."""
    monkeypatch.syspath_prepend(str(bench_module("worker").__file__).rsplit("/", 1)[0])
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


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(make_config, tmp_path):
    """A file of a run of seconds: 3 prompts, 4 images of each an iteration, 4 steps."""
    path, source = tmp_path / "base.yaml", {"source": "animals", "limit": 3}
    path.write_text(dump_config(make_config(prompts=source, eval={"prompts": source}, images_per_prompt=4)))
    return path


@pytest.mark.parametrize(
    "items, message",
    [
        (["lever=stepz:1"], "lever=stepz:1: unknown: one of steps, weights"),
        (["lever=steps:a:2"], "lever=steps:a:2: not its arguments"),
        (["lever=tree:1x1"], "lever=tree:1x1: not its arguments"),
        (["lever=steps:5:7"], "lever=steps:5:7: none of the steps that can be trained is left"),
        (["lever=tree:1x3"], "lever=tree:1x3: trees of 3 leaves: set images_per_prompt to a multiple of it"),
        (["lever=ratio:trajectory", "prompts_per_step=5", "updates_per_rollout=3"], "20 are not shared by 3"),
        (["lever=control", "lever=james_stein"], "lever=james_stein lever=control: two of them set advantage"),
        (["lever=by_spread:0"], "lever=by_spread:0: not its arguments"),
        (["lever=by_spread", "lever=redraw:1"], "lever=by_spread: does not go with lever=redraw:1"),
        (["lever=tree:1x4", "lever=redraw:1"], "lever=tree:1x4: does not go with lever=redraw:1"),
    ],
)
def test_a_lever_that_is_none_or_does_not_fit_is_refused_in_one_line(bench, base, tmp_path, capsys, items, message):
    small = ["--base", str(base), "--out", str(tmp_path / "out"), "--set", "sampling.steps=4", "--tasks", "mix"]
    assert bench.main([*small, "--recipe", "A", *items, "--recipes", "A"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_lever_is_part_of_a_runs_key_the_last_one_counts_and_other_trainers_have_none(bench, base, tmp_path, capsys):
    given = [["A", "LOOP", "lever=steps:0:2"], ["B", "A", "lever=steps:1"], ["C", "LOOP", "lever=steps:1"]]
    study = bench.Study(bench.parse(["--base", str(base)]), bench.with_recipes(given), tmp_path / "rows.jsonl")
    keys = {name: study.key(bench.Run(name, "mix", 0, None, 1e5)) for name in ("LOOP", "A", "B", "C")}
    assert len(set(keys.values())) == 3 and keys["B"] == keys["C"]
    assert bench.main(["--recipe", bench.REFERENCE, "algorithm=ppo", "lever=steps:1"]) == 2
    assert "levers are fastloop's" in capsys.readouterr().err


LAUNCHED = {
    "steps:0:2 weights:equal james_stein ratio:total": {"sampled": 48, "trained": 40, "images": 12},
    "steps:1:3 ratio:trajectory_total best_and_worst": {"sampled": 48, "trained": 18, "images": 12},  # of 36 half
    "by_spread:0.5 steps:1:3": {"sampled": 48, "trained": 40, "images": 12},  # 4 calls of 5 an update
    "control redraw:1 steps:2": {"sampled": 48, "trained": 12, "images": 24},  # no group is redrawn
    "tree:1x2:2x2 weights:noise": {"sampled": 3 + 3 + 6 + 12, "trained": 2 * 15, "images": 12},
}


@pytest.mark.parametrize("specs", LAUNCHED)
def test_a_run_with_levers_takes_what_was_planned_and_learns(bench, bench_module, base, tmp_path, specs):
    run, levers = bench_module("time_to_score_run"), sys.modules["levers"]
    chosen = levers.parse_levers(specs.split())
    small = ["sampling.guidance_scale=1", "iterations=3", "eval.every=3", f"output_dir={tmp_path / 'run'}", "clip_range=0.2"]
    config = load_config(base, [*small, *levers.settings_of(chosen)])
    job = {"trainer": "fastloop", "config": config.model_dump(mode="json"), "evaluations": {"plain": {}}}
    (tmp_path / "job.json").write_text(json.dumps({**job, "levers": specs.split()}))
    assert run.main(tmp_path) == 0
    counts, metrics = read_rows(tmp_path / "counts.jsonl"), read_rows(tmp_path / "run" / "metrics.jsonl")
    planned = levers.planned(chosen, config)
    assert all(row["policy/grad_norm"] > 0 for row in metrics) and metrics[0]["policy/replay_max_dev"] < 1e-5
    for row, metric in list(zip(counts, metrics, strict=True))[1:]:  # the first has a replay as well
        assert {"sampled": row["sampled"], "images": row["pictures"]} == {key: planned[key] for key in ("sampled", "images")}
        assert 0 <= planned["trained"] - row["trained"] <= metric["policy/pairs_skipped"]  # equal rewards teach nothing
    assert planned == LAUNCHED[specs]
    before, after = read_rows(tmp_path / "scores.jsonl")
    assert before["scores"] != after["scores"] and after["pictures"] == 3 * planned["images"] and after["images"] == 36


def test_a_run_with_levers_that_was_interrupted_ends_as_one_that_was_not(bench, bench_module, base, tmp_path):
    run, specs = bench_module("time_to_score_run"), ["control", "steps:0:1", "redraw:1:100"]
    levers = sys.modules["levers"]
    brought = levers.settings_of(levers.parse_levers(specs))
    config = load_config(base, ["eval.every=3", "checkpoint.every=1", "sampling.guidance_scale=1", *brought])

    def ends(name: str, *lengths: int) -> list[dict]:
        folder = tmp_path / name
        folder.mkdir()
        for length in lengths:
            values = {**config.model_dump(mode="json"), "iterations": length, "output_dir": str(folder / "run")}
            job = {"trainer": "fastloop", "config": values, "evaluations": {"plain": {}}, "levers": specs}
            (folder / "job.json").write_text(json.dumps(job))
            assert run.main(folder) == 0
        return [{**row, "cpu": 0} for row in read_rows(folder / "scores.jsonl") if row["iteration"] in (0, 3)]

    whole = ends("whole", 3)
    assert ends("parts", 2, 3) == whole
    assert whole[1]["pictures"] == 3 * 12 * (1 + 1 + 2) and whole[1]["sampled"] == 3 * 2 * 48  # all groups are drawn again


def test_a_study_runs_a_recipe_with_a_lever_and_counts_what_it_costs(bench, base, tmp_path, capsys):
    command = ["--base", str(base), "--set", "prompts_per_step=2", "--tasks", "mix", "--seeds", "0", "--rates", "0.01"]
    command += ["--evaluations", "1", "--budget", "150", "--out", str(tmp_path), "--jobs", "2"]
    command += [
        "--recipe",
        "A",
        "LOOP",
        "budget=600",
        "prompts_per_step=3",
        "lever=control:0.5",
        "lever=steps:1:2",
        "--recipes",
        "A",
    ]
    assert bench.main(command) == 0
    assert "| A | 0.01 | 1 |" in capsys.readouterr().out
    rows = [row for row in read_rows(tmp_path / "time_to_score_cpu.jsonl") if row["recipe"] == "A"]
    factors = sys.modules["forward_equivalents"].Factors(**rows[0]["factors"])
    assert rows[-1]["items"].endswith("prompts_per_step=3 lever=control:0.5 lever=steps:1:2")
    assert rows[-1]["pictures"] == 3 * rows[-1]["images"] > 0
    for row in rows:
        expected = row["sampled"] + factors.trained * row["trained"] + (factors.decoded + factors.scored) * row["pictures"]
        assert row["equivalents"] == pytest.approx(expected, abs=0.5)
    assert rows[-1]["equivalents"] == pytest.approx(600, rel=0.5)
