"""Traces that the tests of the plan share: tracing the same thing again gives the same, and takes seconds."""

from __future__ import annotations

import numpy as np

from fastloop.memory.traces import Phase, Traced

NOT_TRACED = {"output_dir", "prompts", "eval", "memory", "safety", "iterations", "updates_per_rollout", "optimizer", "ema"}
KNOWN: dict[tuple, np.ndarray] = {}


def what_is_traced(traced: Traced) -> tuple:
    """The modules as they are, what checkpoints its gradients, and the settings of a loss."""
    modules = [
        (part, name, type(m).__name__, getattr(m, "gradient_checkpointing", None), len(m._forward_pre_hooks))
        for part, module in traced.denoiser.parts.items()
        for name, m in module.named_modules()
    ]
    parameters = [
        (part, name, p.shape, p.dtype, p.requires_grad)
        for part, module in traced.denoiser.parts.items()
        for name, p in module.named_parameters()
    ]
    settings = traced.config.model_dump_json(exclude=NOT_TRACED)
    own = traced.config.eval_sampling.model_dump_json()
    return settings, own, traced.ops.__name__, traced._accumulates, *modules, *parameters


def remember_traces(monkeypatch) -> None:
    """From now on a phase of the same model, configuration and batch is traced once in a process."""
    trace = Phase.trace

    def remembered(phase: Phase, *batches: int) -> Phase:
        for batch in batches[: 2 - len(phase._histories)]:
            key = (what_is_traced(phase._compute.__self__), phase._compute.__name__, batch)
            if key not in KNOWN:
                trace(phase, batch)
                KNOWN[key] = phase._histories[batch]
            phase._histories[batch] = KNOWN[key]
        return phase

    monkeypatch.setattr(Phase, "trace", remembered)


def trace_nothing(monkeypatch) -> None:
    """From now on every phase has a thousand bytes a row, for tests of what is counted and not traced."""

    def made_up(phase: Phase, *batches: int) -> Phase:
        phase._histories |= {batch: np.array([0.0, 1000.0 * batch]) for batch in batches[: 2 - len(phase._histories)]}
        return phase

    monkeypatch.setattr(Phase, "trace", made_up)
