"""The Triton operators, under the names of their twins in ``reference``."""

from .policy import policy_loss
from .transition import initial_noise, sample_transition

__all__ = ["initial_noise", "policy_loss", "sample_transition"]
