"""The Triton operators, under the names of their twins in ``reference``."""

from .geglu import geglu
from .group_norm import group_norm, group_norm_silu
from .policy import policy_loss
from .transition import initial_noise, sample_transition

FUSED = True  # `policy_loss` knows only the objectives that are written into its kernel

__all__ = ["geglu", "group_norm", "group_norm_silu", "initial_noise", "policy_loss", "sample_transition"]
