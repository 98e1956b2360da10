"""What leaves the device, and that nothing in the inner loops waits for it.

The meta device stands in for a GPU: it has no values, so whatever would read one fails, and copies from and to it are seen.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from known_traces import remember_traces
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastloop.batches import Batches, micro_batches, shuffled
from fastloop.denoisers import build_skeleton, load_denoiser, ready_denoiser
from fastloop.errors import UserError
from fastloop.memory.choosing import choose, free_bytes, probed_factor
from fastloop.preflight import preflight
from fastloop.ranks import Ranks
from fastloop.recipes import load_config
from fastloop.rollout import Texts, Trajectories, rollout, sampler_table
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer
from fastloop.update import PolicyUpdate

CPU, META = torch.device("cpu"), torch.device("meta")


# --- what leaves the device -------------------------------------------------------------------------------------------


@pytest.fixture
def guest(make_config):
    """A denoiser with real weights that computes on the meta device."""
    denoiser = load_denoiser(make_config().model, CPU)
    denoiser.network.to(META)
    denoiser.device = META
    denoiser.offload_frozen()
    return denoiser


def devices_during(module, compute) -> set[str]:
    """Where a module's weights are while something computes."""
    seen = set()
    watched = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_pre_hook(lambda m, _: seen.update(p.device.type for p in m.parameters())) for m in watched]
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def values(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_text_encoders_are_on_the_device_only_while_they_encode(guest, make_config):
    encoder, sampling = guest.text_encoders["text_encoder"], make_config().sampling
    before = values(encoder)
    assert devices_during(encoder, lambda: guest.encode(["a cat", "a dog"], sampling)) == {"meta"}
    after = values(encoder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(t.device == CPU for t in (*encoder.parameters(), *encoder.buffers()))
    cond, _ = guest.encode(["a dog", "a cat"], sampling)  # known: nothing is moved
    assert cond.device == META
    assert devices_during(encoder, lambda: guest.encode(["a dog"], sampling)) == set()


def test_the_vae_is_on_the_device_only_while_it_decodes(guest, monkeypatch):
    pictures = []
    monkeypatch.setattr(type(guest), "_decode", lambda self, z: pictures.append(self.vae.decode(z)[0]) or np.zeros((1,)))
    before = values(guest.vae)
    assert devices_during(guest.vae.decoder, lambda: guest.decode(torch.empty(3, 4, 8, 8, device=META), 2)) == {"meta"}
    assert [len(picture) for picture in pictures] == [2, 1]
    assert all(torch.equal(before[name], value) for name, value in values(guest.vae).items())


def test_on_a_cpu_nothing_is_moved(make_config):
    denoiser = load_denoiser(make_config().model, CPU)
    before = {id(p.data.untyped_storage()) for p in denoiser.vae.parameters()}
    denoiser.offload_frozen()
    assert denoiser.encode(["a cat"], make_config().sampling)[0].device == CPU
    assert {id(p.data.untyped_storage()) for p in denoiser.vae.parameters()} == before


def test_new_prompts_of_a_rollout_come_to_the_text_encoders_at_once(make_config):
    """So that they travel once for a rollout, not once for a batch."""
    config = make_config()
    denoiser, visits = load_denoiser(config.model, CPU), []
    present = denoiser._present
    denoiser._present = lambda *modules: visits.append(modules) or present(*modules)
    sampled = sample(denoiser, config, ["a cat", "a cat", "a dog", "a bee"], batch=1)
    encoders = tuple(denoiser.text_encoders.values())
    assert [modules for modules in visits if modules != (denoiser.vae,)] == [encoders]
    assert len(sampled.images) == 4


def sample(denoiser, config, prompts, batch=2, **more) -> Trajectories:
    table = more.pop("table", None) or sampler_table(config.model, config.sampling)
    settings = {"sampling": config.sampling, "seed": 0, "batch": batch, "vae_batch": 4, "backend": "reference"}
    return rollout(denoiser, table, prompts, torch.arange(len(prompts)), **settings | more)


# --- nothing waits for the device -------------------------------------------------------------------------------------


class Crossings(TorchDispatchMode):
    """Notes operators that move values between host and device, or need one on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor) and t.dim()]
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        if len({t.device.type for t in tensors}) > 1 or func.overloadpacket.__name__ in waits:
            self.found.append(str(func))
        return output


@pytest.fixture
def on_meta(make_config):
    config = make_config()
    denoiser = build_skeleton(config.model)
    denoiser.train_adapter(False, seed=0)
    embedding = denoiser.blank_embedding()
    denoiser.embed = lambda text: embedding
    return config, denoiser


def test_the_denoising_loop_does_not_wait_for_the_device(on_meta):
    config, denoiser = on_meta
    crossings, at_steps = Crossings(), []
    denoiser.decode = lambda x, batch: np.zeros((len(x), 1))
    table = sampler_table(config.model, config.sampling)
    with crossings:
        on_step = lambda n: at_steps.append(len(crossings.found))  # noqa: E731
        sampled = sample(denoiser, config, ["a cat"] * 5, table=table, on_step=on_step)
    assert len(at_steps) == 3 * config.sampling.steps and sampled.latents.device == META
    assert at_steps[-1] == at_steps[0], crossings.found  # between the first step and the last nothing crosses
    assert set(crossings.found) <= {"aten._to_copy.default", "aten.copy_.default"}  # before it: the table, the ids


def test_with_trajectories_on_the_host_only_latents_cross_in_the_denoising_loop(on_meta):
    config, denoiser = on_meta
    crossings, at_steps = Crossings(), []
    denoiser.decode = lambda x, batch: np.zeros((len(x), 1))
    latents = torch.zeros(config.sampling.steps + 1, 4, *denoiser.latent_shape(None, None))
    with pytest.MonkeyPatch.context() as patch:  # of the meta device nothing can be copied to the host
        patch.setattr(torch.Tensor, "copy_", lambda self, other, non_blocking: at_steps.append((self.device, non_blocking)))
        sampled = sample(denoiser, config, ["a cat"] * 4, trajectories_on="host")
    assert sampled.latents.device == CPU and sampled.latents.shape == latents.shape
    assert at_steps == [(CPU, True)] * 2 * (config.sampling.steps + 1)
    assert not crossings.found


@pytest.mark.parametrize(
    "place, changes", [(META, {"objective": "kl_mask"}), (CPU, {"kl": {"weight": 0.1}})], ids=["device", "host"]
)
def test_an_updates_micro_batches_do_not_wait_for_the_device(make_config, place, changes):
    config = make_config(**changes)
    trainer = Trainer(config)
    denoiser = build_skeleton(config.model)
    denoiser.train_adapter(True, seed=0)
    denoiser.device = META
    trainer.engine.scaler = torch.amp.GradScaler("cpu", enabled=False)
    update = PolicyUpdate(config, denoiser, trainer.engine, trainer.table, trainer.steps_trained, trainer.ranks)
    n, steps = config.images_per_rollout, config.sampling.steps
    trajectories = Trajectories(
        latents=torch.zeros(steps + 1, n, 4, 8, 8, device=place),
        log_probs=torch.zeros(steps, n, device=META),
        prompts=["a cat"] * n,
        ids=torch.arange(n, device=META),
        images=np.zeros(n),
    )
    denoiser._embeddings = {(text, 0): denoiser.blank_embedding() for text in ("a cat", None)}
    text = Texts(denoiser, trajectories.prompts, config.sampling)
    order = shuffled(np.random.default_rng(0), update.rows, 1.0)
    batches = micro_batches(order, update.rows, trainer.ranks, n, trainer.batches.update)
    transitions = trajectories.transitions(trainer.steps_trained)
    crossings = Crossings()
    with crossings:
        seen = update.add_gradients(batches, len(order), transitions, torch.zeros(len(order), device=META), text)
    assert seen.device == META and len(seen) == len(batches) == 6
    assert all(p.grad is not None and p.grad.device == META for p in denoiser.trainable().values())
    # of each micro-batch the pairs go up, and with trajectories on the host their two latents: pinned, by `upload`
    assert crossings.found == ["aten._to_copy.default"] * len(batches) * (1 if place == META else 3)


def test_a_run_with_trajectories_on_the_host_is_the_same_run(make_config, tmp_path):
    """Here the host is the device; that latents are stored and fetched elsewhere is shown above."""
    found = []
    for place in ("device", "host"):
        config = make_config(memory={"trajectories": place}, output_dir=str(tmp_path / place), iterations=1)
        trainer = Trainer(config)
        trainer.train()
        found.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- batches that fit -------------------------------------------------------------------------------------------------

AUTO = {"rollout_batch": "auto", "update_batch": "auto", "vae_batch": "auto"}
NAMES = tuple(AUTO)


@pytest.fixture
def free(monkeypatch):
    """A function that sets the free memory."""
    remember_traces(monkeypatch)

    def put(size: float) -> None:
        monkeypatch.setattr("fastloop.preflight.free_bytes", lambda device, neighbours: int(size))

    return put


def batches(config) -> list[int]:
    return [getattr(config.memory, name) for name in NAMES]


def test_automatic_batches_are_the_largest_that_fit_and_stay_those_of_the_run(make_config, free):
    """6 trajectories, and 12 pairs in an update, in batches of nearly one size."""
    free(2**40)
    assert batches(preflight(make_config(memory=AUTO)).config) == [6, 12, 6]
    free(2.9e6)
    config = make_config(memory=AUTO, iterations=1)
    trainer = Trainer(config)
    rollout, update, pictures = batches(trainer.config)
    assert rollout == pictures == 6 and update in (4, 6)
    trainer.train()
    run = json.loads((trainer.folder / "run.json").read_text())["batches"]
    assert [run[name] for name in NAMES] == batches(trainer.config) and run["planned"] <= 0.9 * run["free"]
    assert run["probed_factor"] == pytest.approx(1.0, abs=0.02)
    written = load_config(trainer.folder / "config.yaml")
    assert batches(written) == batches(trainer.config)
    assert read_rows(trainer.folder / "metrics.jsonl")[0]["policy/replay_max_dev"] <= 1e-6
    free(2**40)
    assert batches(preflight(config, resume=True).config) == batches(trainer.config)


def test_automatic_batches_are_the_smallest_of_the_ranks(make_config, free):
    free(2**40)
    config = make_config(memory=AUTO)
    checked = preflight(config)
    ranks = Ranks()
    ranks.highest = lambda value: max(value, -2)  # another rank has room for two
    batches = Batches(config, checked.steps_trained)
    found = choose(batches, checked.traced, 3, ranks, on_gpu=False, free=2**40)
    assert [getattr(found, name) for name in NAMES] == [2, 2, 2]


def test_automatic_batches_in_half_precision_are_the_same_in_rollout_and_update(make_config, free):
    """There what a model computes depends on the batch, and the ratio must be 1."""
    free(2**40)
    rollout, update, _ = batches(preflight(make_config(memory=AUTO, model={"dtype": "bf16"})).config)
    assert rollout == update == 6


def test_a_model_that_needs_more_than_was_traced_gets_smaller_batches(make_config, free, monkeypatch):
    free(4e6)
    before = batches(preflight(make_config(memory=AUTO)).config)
    monkeypatch.setattr("fastloop.preflight.probed_factor", lambda *_: 2.0)
    trainer = Trainer(make_config(memory=AUTO))
    assert batches(trainer.config)[1] < before[1]
    assert batches(load_config(trainer.folder / "config.yaml")) == batches(trainer.config)


def test_no_room_for_one_is_refused_before_the_model_loads(make_config, free):
    free(3e5)
    with pytest.raises(UserError, match="^memory.rollout_batch: auto finds no room for even one: it needs about"):
        preflight(make_config(memory=AUTO))


@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bf16"}, {"adapter": "full", "dtype": "bf16"}], ids=lambda m: "-".join(m.values())
)
def test_the_probe_needs_what_was_traced_and_changes_nothing(make_config, free, model):
    free(2**40)
    config = make_config(memory=AUTO, model=model)
    checked = preflight(config)
    denoiser = ready_denoiser(config, CPU, trained=True)
    random, dtypes = torch.get_rng_state(), [p.dtype for p in denoiser.network.parameters()]
    assert probed_factor(denoiser, checked.config, checked.traced) < 1.02
    assert [p.dtype for p in denoiser.network.parameters()] == dtypes
    assert all(p.grad is None for p in denoiser.trainable().values())
    assert torch.equal(random, torch.get_rng_state())


def test_free_memory_of_a_cpu_is_some_of_what_there_is():
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes(CPU, 4) <= whole / 4
