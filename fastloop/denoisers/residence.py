"""Where the parts of a model rest: those that are not trained are on the device only while they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy host values to a device without waiting; a copy from pageable memory would hold the host up."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Residence:
    """The part of a `Denoiser` that says where its parts are."""

    _resting: tuple[torch.nn.Module, ...] = ()  # what is on the device only while it computes

    def offload_frozen(self) -> None:
        """Keep what is not trained of text encoders and VAE on the device only while it computes, from now on.

        It rests in the host's memory. Its weights never change, so they are copied one way only. Nothing to do on a CPU.
        """
        if self.device.type == "cpu":
            return
        self._resting = (*(() if self.trains_text else self.text_encoders.values()), self.vae)
        for module in self._resting:
            module.to("cpu")
            if self.device.type == "cuda":  # pinned, so that the host does not wait for the copy
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data = tensor.data.pin_memory()

    @contextmanager
    def _present(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Within it these parts are on the device."""
        inner = [m for module in modules if module in self._resting for m in module.modules()]
        resting = [(of, dict(of)) for m in inner for of in (m._parameters, m._buffers)]
        for of, tensors in resting:
            for name, tensor in tensors.items():
                if tensor is not None:
                    copy = tensor.detach().to(self.device, non_blocking=True)
                    of[name] = torch.nn.Parameter(copy, False) if isinstance(tensor, torch.nn.Parameter) else copy
        try:
            yield
        finally:
            for of, tensors in resting:
                of.update(tensors)
