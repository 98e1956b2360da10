"""Where prompts come from, what scores the pictures, and what is evaluated."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fastloop.config.model import EvalSamplingConfig
from fastloop.config.strict import Positive, Seed, Strict


class PromptsConfig(Strict):
    """Where prompts come from."""

    source: str = Field(
        "shapes_train",
        description="`shapes_train`, `shapes_heldout`, `animals`, a .txt, .jsonl or .tsv file, a T2I-CompBench folder, "
        "or `hf:OWNER/NAME`",
    )
    split: str | None = Field(None, min_length=1, description="which part of a folder or of `hf:`; null: `train`")
    column: str = Field("prompt", min_length=1, description="column of .tsv and `hf:` that holds the prompts, in any case")
    categories: list[str] | None = Field(
        None, min_length=1, description="only prompts of these categories, where prompts have them; null: all"
    )
    limit: Positive | None = Field(
        None, description="at most so many prompts, from the start; null: all (of the shapes 400 a category)"
    )
    too_long: Literal["warn", "error", "chunk"] = Field(
        "warn",
        description="what is done about prompts with more tokens than the text encoders take, whose rest the model does not "
        "see and rewards do: a line at the start, a refusal, or all texts of the run in as many chunks as the longest one has",
    )


class EvalPromptsConfig(PromptsConfig):
    """As `prompts`, but the held-out ones."""

    split: str | None = Field(
        None, min_length=1, description="which part of a folder or of `hf:`; null: `val` of a folder, `train` of `hf:`"
    )
    source: str = Field(
        None,
        description="as `prompts.source`; null: `shapes_heldout` where that is `shapes_train`, else the same as there",
    )
    limit: Positive | None = Field(
        50, description="at most so many prompts, from the start; null: all (of the shapes 400 a category)"
    )


class RewardConfig(Strict):
    """One term of the weighted sum. ``params`` go to the reward itself."""

    name: str = Field(description="a built-in reward, or `MODULE:FUNCTION` of your own")
    weight: float = Field(1.0, description="factor in the sum; may be negative")
    params: dict[str, Any] = Field({}, description="keyword arguments of the reward; text such as `1e-4` becomes a number")
    label: str | None = Field(
        None,
        min_length=1,
        description="its name in metrics and messages; null: `name`; needed where one name is listed twice",
    )
    normalize: Literal["batch", "running"] | None = Field(
        None,
        description="in training, subtract the mean and divide by the standard deviation before the weight, "
        "of each rollout (batch) or of all rollouts so far (running); null: neither",
    )
    worker: Literal["thread", "process"] = Field(
        "thread", description="what calls it: a thread of its own, or a process of its own with its own copy of the model"
    )
    workers: Positive = Field(1, description="how many of them, each with a batch of its own")
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds for one batch, after which the run stops; null: no limit"
    )

    @field_validator("label")
    @classmethod
    def _no_other_metric(cls, label: str | None) -> str | None:
        if label in ("mean", "std", "group_std") or (label or "").startswith("category/"):
            raise ValueError(f"reward/{label} is a metric of its own: choose another label")
        return label

    @property
    def key(self) -> str:
        """What tells it from the other terms."""
        return self.label or self.name

    @field_validator("params")
    @classmethod
    def _numbers_with_exponents(cls, params: dict[str, Any]) -> dict[str, Any]:
        """YAML 1.1 reads 1e-4 as text, and nothing here knows which params are numbers."""
        number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
        return {k: float(v) if isinstance(v, str) and number.fullmatch(v) else v for k, v in params.items()}


class EvalConfig(Strict):
    """Held-out prompts on fixed seeds."""

    every: Positive = Field(
        10, description="iterations between evaluations; the first and the last state are always evaluated"
    )
    prompts: EvalPromptsConfig = Field(EvalPromptsConfig(), description="the prompts that are evaluated")
    rewards: list[RewardConfig] | None = Field(
        None, description="the weighted sum that is the score, without `normalize`; null: the training rewards"
    )
    images_per_prompt: Positive = Field(2, description="images of each prompt")
    sampling: EvalSamplingConfig = Field(EvalSamplingConfig(), description="how it samples where it is not as in `sampling`")
    seed: Seed = Field(0, description="of the evaluation's noise, which never coincides with training noise")
    grid: Positive = Field(12, description="prompts shown in the sample grids, from the start")

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_runs(cls, values: Any) -> Any:
        """Forgets `steps: null`, which says nothing: every earlier version wrote it into its runs' config.yaml."""
        if isinstance(values, dict) and values.get("steps", 0) is None:
            return {key: value for key, value in values.items() if key != "steps"}
        return values
