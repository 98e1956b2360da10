"""What is trained: LoRA, all weights, or a policy over the initial noise; and the model before training, for the KL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig

from fastloop.config import ModelConfig, NoisePolicyConfig, SamplingConfig
from fastloop.denoisers.lora_files import check_adapters, continue_adapters, fuse_adapters, read_adapters
from fastloop.denoisers.parts import DTYPES, part_title
from fastloop.errors import UserError
from fastloop.noise_policy import NoisePolicy
from fastloop.optimizers import holding

ADAPTER = "default"


class Adapters:
    """The part of a `Denoiser` that says what is trained."""

    _reference: dict[str, torch.Tensor] | None = None
    noise_policy: NoisePolicy | None = None  # of what the initial noise is drawn; ``None``: N(0, I)

    @property
    def trains_text(self) -> bool:
        """Whether embeddings change with training, and updates reach the text encoders through them."""
        return self.config.adapter == "lora" and self.config.lora.text_encoders

    @property
    def trained_parts(self) -> dict[str, torch.nn.Module]:
        """Those of `parts` that have trained weights."""
        return {self.network_name: self.network, **(self.text_encoders if self.trains_text else {})}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by name; those of a text encoder begin with the name of their part."""
        if self.noise_policy is not None:
            return dict(self.noise_policy.named_parameters())
        named = [
            (name if part == self.network_name else f"{part}.{name}", p)
            for part, module in self.trained_parts.items()
            for name, p in module.named_parameters()
        ]
        return {name: p for name, p in named if p.requires_grad}

    def train_noise(self, config: NoisePolicyConfig, sampling: SamplingConfig, seed: int) -> None:
        """Leave the model as it is, and draw its initial noise of a policy, which is trained.

        Raises:
            UserError: a grid that is finer than the latents.
        """
        self.set_attention(self.config.attention)
        shape = self.latent_shape(sampling.height, sampling.width)
        if config.grid > min(shape[1:]):
            raise UserError(f"noise_policy.grid: {config.grid} is finer than the latents, {shape[1]} x {shape[2]}: lower it")
        torch.manual_seed(seed)
        self.noise_policy = NoisePolicy(self.feature_size, shape[0], config.hidden, config.grid).to(self.device)

    def initial_latents(self, noise: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return x_T of n prompts, float32 (n, C, H, W), for noise of N(0, I): itself, unless there is a policy over it."""
        return noise if self.noise_policy is None else self.noise_policy.sample(noise, self.features(prompts))

    def train_adapter(self, gradient_checkpointing: bool | list[str], seed: int, fresh: bool = True) -> None:
        """Make trainable what the configuration says, and set the attention backend; ``fresh`` as for `make_trainable`.

        Raises:
            UserError: LoRA targets, or blocks to checkpoint, that the network does not have; adapters to start from that do
                not fit.
        """
        if self.trains_text and self.text_targets is None:
            raise UserError("model.lora.text_encoders: those of this model are not trained: set it to false")
        self.set_attention(self.config.attention)
        if self.config.adapter == "lora":
            torch.manual_seed(seed)
            self._add_lora(self.network_name, self.config.lora.target_modules or self.lora_targets)
            for name in self.text_encoders if self.trains_text else ():
                self._add_lora(name, self.text_targets)
            if fresh and (path := self.config.lora.path) is not None and not self.config.lora.fuse:
                found = read_adapters(path, self.pipeline_class, self.network_name, self.network)
                check_adapters(path, found, self.parts)
                continue_adapters(path, found, self.trained_parts, ADAPTER)
        else:
            # as it starts and is saved; an engine rounds them to `model.dtype`, and without one autocast does
            self.network.float().requires_grad_(True)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if isinstance(gradient_checkpointing, list):
            self._checkpoint_only(gradient_checkpointing)

    @classmethod
    def fuse_into(cls, parts: dict[str, torch.nn.Module], config: ModelConfig, network: torch.nn.Module) -> None:
        """Add the adapters of ``model.lora.path`` to the weights of parts, where ``model.lora.fuse`` says so.

        Raises ``UserError`` where they do not fit, also of parts without weights.
        """
        if config.lora.fuse:
            found = read_adapters(config.lora.path, cls.pipeline_class, cls.network_name, network)
            if network.device.type == "meta":
                check_adapters(config.lora.path, found, parts)
            else:
                fuse_adapters(found, parts)

    def _add_lora(self, part: str, targets: list[str]) -> None:
        """Puts fresh float32 adapters on a part. Raises ``UserError`` where no module has one of the names."""
        model, lora, what = self.parts[part], self.config.lora, part_title(part)
        modules = [f".{name}" for name, _ in model.named_modules()]
        for target in targets:  # peft only wants one of them to be there
            if not any(module.endswith(f".{target}") for module in modules):
                raise UserError(
                    f"model.lora.target_modules: the {what} has no module {target!r}: name modules by their ending"
                )
        try:
            model.add_adapter(
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha or lora.rank,
                    target_modules=targets,
                    exclude_modules=self.idle_modules(part),
                    init_lora_weights="gaussian",
                ),
                adapter_name=ADAPTER,
            )
        except ValueError as error:
            raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _checkpoint_only(self, chosen: list[str]) -> None:
        """Leaves gradient checkpointing on in the blocks named, and in what is inside them."""
        blocks = {name: m for name, m in self.network.named_modules() if name and hasattr(m, "gradient_checkpointing")}
        if not blocks:
            raise UserError(
                "memory.gradient_checkpointing: this network checkpoints all of its blocks or none: set it to true"
            )
        for name in chosen:
            if not any(f"{block}.".startswith(f"{name}.") for block in blocks):
                outer = [block for block in blocks if block.count(".") <= 1]
                raise UserError(
                    f"memory.gradient_checkpointing: the UNet has no block {name!r}: its blocks are {', '.join(outer)}"
                )
        for block, module in blocks.items():
            module.gradient_checkpointing = any(f"{block}.".startswith(f"{name}.") for name in chosen)

    def keep_reference(self) -> None:
        """Freeze a copy of the weights for the KL; LoRA needs none, its adapter is switched off."""
        if self.config.adapter == "full":
            dtype = DTYPES[self.config.dtype]
            self._reference = {name: p.detach().to(dtype, copy=True) for name, p in self.network.named_parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Put the model before training in place: within it `predict` gives its outputs, and `encode` its embeddings."""
        if self.config.adapter == "lora":
            for part in self.trained_parts.values():
                part.disable_adapters()
            try:
                yield
            finally:
                for part in self.trained_parts.values():
                    part.enable_adapters()
            return
        parameters = dict(self.network.named_parameters())
        with holding(parameters, {name: self._reference[name].to(p.dtype) for name, p in parameters.items()}):
            yield
