"""What the rewards with a model share: where weights come from, dtype and device, pictures to pixels, batches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ModelReward:
    """A reward with a model: ``load`` makes it ready, ``score`` gives float32 (n,) for at most ``batch`` pictures.

    Args:
        device: auto (the GPU of this process, else the CPU), cpu, cuda or cuda:N; need not be the trainer's.
        dtype: fp32, bf16 or fp16, of the model; heads, cosines and probabilities are float32.
        batch: pictures per call of the model.

    Raises:
        ValueError: a value that cannot be, a folder that does not exist, or a device that is not there.
    """

    def __init__(self, device: str = "auto", dtype: str = "fp32", batch: int = 16) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a whole number from 1, not {batch!r}")
        self.device, self.dtype, self.batch = pick_device(device), DTYPES[dtype], batch
        self._stream: Any = None
        self._ready = False

    def load(self) -> None:
        """Load weights and processors; whatever fails here is raised."""
        raise NotImplementedError

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        """Score at most ``batch`` pictures, uint8 (n, height, width, 3): float (n,)."""
        raise NotImplementedError

    def start(self) -> None:
        """Load the model, once."""
        if not self._ready:
            self.load()
            if self.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.device)  # beside the sampler's work on the same GPU
            self._ready = True

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        """Score pictures, uint8 (n, height, width, 3), ``batch`` at a time: float64 (n,)."""
        self.start()
        parts = []
        with torch.cuda.stream(self._stream):  # nothing at all where there is no stream
            for i in range(0, len(images), self.batch):
                some = slice(i, i + self.batch)
                parts.append(self.score(images[some], prompts[some], metadata[some]).float().cpu())
        return torch.cat(parts).double().numpy()

    def pretrained(self, cls: type, path: str) -> Any:
        """Load a transformers model in evaluation mode on the reward's device. Raises as `from_files`."""
        return from_files(cls, path, dtype=self.dtype).to(self.device).eval().requires_grad_(False)


def from_files(cls: type, path: str, **settings) -> Any:
    """Return what a class of transformers makes of a folder or hub id, by code of transformers alone.

    Asked nothing, transformers would ask on the terminal whether to run code that stands beside the weights.

    Raises:
        ValueError: it cannot be had without that code.
    """
    try:
        return cls.from_pretrained(path, trust_remote_code=False, **settings)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} comes with code of its own, which is not run: choose a model that transformers itself knows, or load "
            "this one in a reward of your own, MODULE:FUNCTION"
        ) from None


def pick_device(name: str) -> torch.device:
    """Return the device of a name. Raises ``ValueError`` for one that is not there."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def folder_or_id(path: str) -> str:
    """Return a local folder, or a hub id OWNER/NAME. Raises ``ValueError`` for what is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise ValueError(f"{path} is a file: give a folder as save_pretrained writes it, or a hub id OWNER/NAME")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise ValueError(f"no folder {path}: give a local folder or a hub id OWNER/NAME")
    return path


def file_or_id(path: str) -> str:
    """Return a local file, or one on the hub as OWNER/NAME/FILE. Raises ``ValueError`` for what is neither."""
    file = Path(path).expanduser()
    if file.is_file():
        return str(file)
    if path.startswith(("/", ".", "~")) or path.count("/") < 2:
        raise ValueError(f"no file {path}: give a local file, or OWNER/NAME/FILE on the hub")
    return path


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors, .pt or .pth file, local or OWNER/NAME/FILE, by name; nothing else is unpickled.

    A file that holds them under ``state_dict`` or ``model`` is read there. Raises ``ValueError`` where there are none.
    """
    if not Path(path).is_file():
        from huggingface_hub import hf_hub_download

        owner, name, file = path.split("/", 2)
        path = hf_hub_download(f"{owner}/{name}", file)
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises many kinds
        raise ValueError(f"cannot read tensors from {path}: {str(error).splitlines()[0]}") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return found


@dataclass(frozen=True)
class Pixels:
    """Pictures to normalised pixels, as the published preprocessing of a model: bicubic in 8 bits, scale, normalise.

    ``fit`` is how a picture meets the square of ``size``: its shorter side, then the middle (crop); both sides, whatever the
    shape (squash); or its longer side, in the middle of black (pad).
    """

    size: int
    fit: Literal["crop", "squash", "pad"]
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def of(cls, path: str) -> Pixels:
        """Prepare pictures as a processor of transformers does, from its folder or hub id.

        Raises ``ValueError`` for another kind.
        """
        from transformers import AutoImageProcessor

        processor = from_files(AutoImageProcessor, path)
        size, bicubic = dict(processor.size), int(processor.resample) == Image.Resampling.BICUBIC
        if (
            bicubic
            and getattr(processor, "do_center_crop", False)
            and dict(processor.crop_size).get("height") == size.get("shortest_edge")
        ):
            return cls(size["shortest_edge"], "crop", tuple(processor.image_mean), tuple(processor.image_std))
        if bicubic and not getattr(processor, "do_center_crop", False) and size.get("height") == size.get("width", -1):
            return cls(size["height"], "squash", tuple(processor.image_mean), tuple(processor.image_std))
        raise ValueError(f"the image processor of {path} resizes in a way that is not known here: {size}")

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """Turn uint8 (n, height, width, 3) into float32 (n, 3, size, size)."""
        squares = np.stack([self._square(Image.fromarray(image)) for image in images])
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((torch.from_numpy(squares).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def _square(self, image: Image.Image) -> np.ndarray:
        side = self.size
        if self.fit == "squash":
            return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        width, height = image.size
        if self.fit == "crop":
            width, height = (int(side * length / min(image.size)) for length in image.size)
            left, top = (width - side) // 2, (height - side) // 2
            return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))[top : top + side, left : left + side]
        width, height = (round(side * length / max(image.size)) for length in image.size)
        left, top = (side - width) // 2, (side - height) // 2
        square = np.zeros((side, side, 3), np.uint8)
        square[top : top + height, left : left + width] = image.resize((width, height), Image.Resampling.BICUBIC)
        return square


class Predictor(nn.Module):
    """The linear layers on an embedding, width-1024-128-64-16-1, of LAION's aesthetic predictor and of ImageReward.

    There is no activation between them, and the dropouts between do nothing here: they only give the published names
    ``layers.0``, ``2``, ``4``, ``6`` and ``7``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score embeddings, float32 (n, width): (n,)."""
        return self.layers(embeddings)[:, 0]


def load_exactly(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> nn.Module:
    """Fill a module, also one on the meta device. Raises ``ValueError`` for a name or shape that does not fit."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if wanted != found:
        odd = next(name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name))
        shapes = [list(shape[odd]) if odd in shape else "absent" for shape in (found, wanted)]
        raise ValueError(f"{where} does not fit its model: {odd} is {shapes[0]}, expected {shapes[1]}")
    module.load_state_dict(tensors, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:  # position numbers are in no checkpoint
                setattr(part, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval().requires_grad_(False)
