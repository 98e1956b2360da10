"""What only a GPU can show of memory and speed: the allocator's peak against the plan, loops without a synchronisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch finds none here", allow_module_level=True)


from fastloop.batches import micro_batches, shuffled
from fastloop.plan import planned_memory
from fastloop.rollout import Texts, rollout
from fastloop.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_sync():
    """Makes PyTorch raise where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else before)
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("place", ["device", "host"])
def test_neither_the_denoising_loop_nor_the_micro_batches_wait_for_the_gpu(make_config, no_sync, place):
    config = make_config(memory={"trajectories": place}, model={"dtype": "bf16"}, clip_range=1.0)
    trainer = Trainer(config)
    n = config.images_per_rollout
    decode = trainer.denoiser.decode

    def decoded(*args):
        no_sync(False)  # pictures are fetched: the one wait of a batch
        return decode(*args)

    def sample(on_step):
        return rollout(
            trainer.denoiser,
            trainer.table,
            ["a cat"] * n,
            torch.arange(n),
            sampling=config.sampling,
            seed=0,
            batch=4,
            vae_batch=4,
            backend=config.kernels,
            trajectories_on=place,
            on_step=on_step,
        )

    trainer.denoiser.decode = decoded
    sample(lambda _: None)  # compiles kernels and fills the cache of pinned memory
    trajectories = sample(lambda _: no_sync(True))  # from the first step of a batch to its last
    no_sync(False)
    text = Texts(trainer.denoiser, trajectories.prompts, config.sampling)
    rows = trainer.update.rows
    order = shuffled(np.random.default_rng(0), rows, 1.0)
    batches = micro_batches(order, rows, trainer.ranks, n, trainer.batches.update)
    transitions = trajectories.transitions(trainer.steps_trained)
    advantages = torch.zeros(len(transitions), device=trainer.device)
    trainer.update.add_gradients(batches, len(order), transitions, advantages, text)
    no_sync(True)
    seen = trainer.update.add_gradients(batches, len(order), transitions, advantages, text)
    no_sync(False)
    assert seen.isfinite().all()


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_peak_is_within_15_percent_of_the_allocators(make_config, monkeypatch, adapter, checkpointing):
    config = make_config(
        model={"path": "assets:shapes", "adapter": adapter, "dtype": "bf16"},
        prompts={"limit": 3},
        memory={"gradient_checkpointing": checkpointing, "rollout_batch": 16, "update_batch": 16, "vae_batch": 4},
        prompts_per_step=4,
        images_per_prompt=4,
        clip_range=1.0,
        safety={"max_ratio_dev": 1.0},
    )
    trainer = Trainer(config, leave_out=("checkpoints", "evaluation", "export", "report"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert planned_memory(config).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_text_encoders_and_vae_rest_in_pinned_memory(make_config):
    trainer = Trainer(make_config())
    trainer.train()
    for module in (*trainer.denoiser.text_encoders.values(), trainer.denoiser.vae):
        assert all(p.device.type == "cpu" and p.is_pinned() for p in module.parameters())
