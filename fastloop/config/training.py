"""What an update does: its loss, its optimizer, and the bounds past which it is not trusted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastloop.config.strict import Fraction, Positive, Strict


class LastStepsConfig(Strict):
    """The last denoising steps are several times as sensitive as the others (docs/method.md)."""

    drop: Annotated[int, Field(ge=0)] = Field(
        0, description="last steps that are sampled and not trained; less than `sampling.steps`"
    )
    weight: Fraction = Field(1.0, description="factor on the loss of the last `count` trained steps")
    count: Positive = Field(2, description="trained steps that `weight` applies to")


class ForwardConfig(Strict):
    """The noise levels at which `forward_process` trains a rollout's final latents; other objectives do not look at it."""

    levels: Positive = Field(5, description="noise levels of each image, one in each of so many equal parts of the window")
    window: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        (250, 980), description="first and last timestep of the model's own schedule that a level may have"
    )


class DlpoConfig(Strict):
    """DLPO's reward, alpha r - beta d: d is how badly the trained model denoises the picture, at a random level."""

    alpha: Annotated[float, Field(gt=0)] = Field(
        1.0, description="alpha, factor of the weighted sum of rewards; alpha and beta follow the rewards' scale"
    )
    beta: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="beta, factor of the mean squared error of the predicted noise, which is about 0.01 to 1; 0: no penalty",
    )
    gradient: bool = Field(
        False, description="whether the error's own gradient is trained on too, as in DLPO's code; costs a forward"
    )
    data: str | None = Field(
        None,
        min_length=1,
        description="with `gradient`: pictures of your own to denoise in place of those drawn, as in DLPO's code: a .jsonl "
        "file with `prompt` and `image`, a path beside it; null: those drawn",
    )

    @property
    def denoises_drawn(self) -> bool:
        """Whether each picture of a rollout is denoised for its penalty, which takes a forward."""
        return self.beta > 0 and self.data is None


class ReplayConfig(Strict):
    """Transitions that are trained on again: their ratio is to the policy that drew them (DPOK)."""

    rollouts: Positive = Field(
        1,
        description="rollouts that an update draws from: the newest, and those before it, with the log-probs of their time; "
        "each takes the memory of another rollout",
    )


class ValueConfig(Strict):
    """The network whose prediction of the reward is the baseline of `advantage: value` (DPOK); others do not look at it."""

    width: Positive = Field(256, description="units of each of its three layers")
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="learning rate of its own AdamW")
    updates: Positive = Field(1, description="its optimizer steps per rollout, before those of the policy")
    batch: Positive = Field(1280, description="transitions of each of its steps, at most; drawn without replacement")


class NoisePolicyConfig(Strict):
    """The small network of `algorithm: noise_ppo`: from features of a prompt to the mean and spread of the initial noise."""

    hidden: Positive = Field(64, description="width of its hidden layer")
    grid: Positive = Field(
        1,
        description="G: mean and spread have G x G values in each channel of the latents, linear in between; at most their "
        "height and width",
    )


class KlConfig(Strict):
    """KL to the model before training, per trained step: the adapter off, or a frozen copy."""

    weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="factor in the loss of the KL to the model before training; 0: off"
    )
    form: Literal["gaussian", "epsilon"] = Field(
        "gaussian",
        description="the KL of the step's two Gaussians, or DPOK's squared distance of the two predicted noises, which is "
        "2 sigma^2 em^2 / b^2 times as much",
    )
    of_advantages: bool = Field(
        False,
        description="whether `weight` counts in the mean size of a rollout's advantages, and so follows the reward's unit",
    )
    every: Positive = Field(
        1,
        description="iterations from one whose updates have the KL to the next, with so many times the weight, which saves "
        "forwards (lazy regularisation, as StyleGAN2's)",
    )


class EmaConfig(Strict):
    """Exponential moving average of the trained weights; evaluated and exported in their place."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of the moving average that stays at each optimizer step, less at the first ones: "
        "at step n at most (1 + n) / (10 + n); null: no average",
    )


class OptimizerConfig(Strict):
    """Who steps, and how far."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "cpu_adamw"] = Field(
        "adamw",
        description="torch's AdamW, one of bitsandbytes with its state in 8 bits, "
        "or DeepSpeed's AdamW, which steps in the CPU's memory",
    )
    lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="learning rate")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: falls from `lr` towards 0 over `iterations`, a step each iteration"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="the betas of AdamW or Lion"
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon; Lion has none")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="decoupled weight decay")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="L2 norm over all trained weights to which larger gradients are scaled down"
    )

    def lr_at(self, iteration: int, iterations: int) -> float:
        """Return the learning rate of an iteration, counted from 0, of a run of ``iterations``."""
        return self.lr * (1 - iteration / iterations) if self.schedule == "linear" else self.lr


class SafetyConfig(Strict):
    """Bounds past which a run stops or warns."""

    max_ratio_dev: Annotated[float, Field(ge=0)] = Field(
        1e-5, description="the run stops if the replay before the first update has abs(ratio - 1) above this"
    )
    min_group_std: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="alarm when `reward/group_std` is below this; in units of the reward"
    )
    max_clipfrac: Fraction = Field(0.9, description="alarm when `policy/clipfrac` is above this")
    min_image_entropy: Annotated[float, Field(ge=0)] = Field(
        0.5, description="alarm when `image/entropy` is below this, in bits; a flat picture has 0"
    )
    max_image_saturation: Fraction = Field(
        0.9, description="alarm when `image/saturation`, the share of pixel values at 0 or 255, is above this"
    )
    max_denoising_growth: Annotated[float, Field(gt=1)] | None = Field(
        1.5,
        description="`forward_process`: alarm when the denoising error of a run's own pictures, over 20 iterations, is so "
        "many times that of its first 20; null: off",
    )
    held_out_errors: Annotated[float, Field(gt=0)] | None = Field(
        2.0,
        description="alarm when a held-out reward falls by so many standard errors while the training reward rises; null: off",
    )
