"""A configuration is read strictly: what is wrong with it is one line that names the key and the remedy."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from fastloop.advantages import ADVANTAGES
from fastloop.algorithms import ALGORITHMS, Algorithm, settable
from fastloop.batches import kept_steps, trained_steps
from fastloop.cli import main
from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.objectives import OBJECTIVES
from fastloop.prompts import load_prompts
from fastloop.recipes import _model_of, apply_overrides, dump_config, load_config, parse_config
from fastloop.rollout import sampler_table

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
REWARDS = "rewards: [{name: shapes}]\n"


@pytest.fixture
def load(tmp_path):
    """A function of YAML text and overrides that gives the configuration."""

    def load(text: str = REWARDS, *overrides: str) -> Config:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_config(path, list(overrides))

    return load


def steps_of(config: Config):
    """Indices of the steps that a configuration trains with the bundled model's scheduler."""
    return trained_steps(sampler_table(config.model, config.sampling), config)


def problem(load, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    return str(caught.value)


# --- what is documented ------------------------------------------------------------------------------------------------


def test_every_key_is_described_and_docs_config_md_has_the_tables_of_the_models():
    def undescribed(model: type[BaseModel], prefix: str = ""):
        for name, field in model.model_fields.items():
            if not field.description:
                yield prefix + name
            if below := _model_of(field.annotation):
                yield from undescribed(below, f"{prefix}{name}.")

    assert list(undescribed(Config)) == [], "give these keys a description"
    script = Path(__file__).parent.parent / "docs" / "config_tables.py"
    spec = importlib.util.spec_from_file_location("config_tables", script)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text()
    assert page == tables.rewritten(page), "the configuration has changed: python docs/config_tables.py"
    assert page.count(tables.HEADER) == len(tables.PREFIXES), "a table in docs/config.md is of no section any more"


@pytest.mark.parametrize("key, registry", [("advantage", ADVANTAGES), ("objective", OBJECTIVES)])
def test_the_description_of_a_key_that_takes_a_name_has_every_name(key, registry):
    assert [name for name in registry if f"`{name}`" not in Config.model_fields[key].description] == []


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_in_configs_loads_and_reads_back_the_same(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_there_are_recipes():
    assert (Path(__file__).parent.parent / "configs" / "shapes_demo.yaml") in RECIPES


def test_a_dumped_configuration_reads_back_the_same(load):
    config = load(
        """
        algorithm: ppo
        model: {path: ./folder, adapter: full, lora: {rank: 3, alpha: 1.5, target_modules: [to_q]}, dtype: bf16}
        prompts: {source: list.jsonl, limit: 7}
        rewards: [{name: shapes, weight: 0.1}, {name: 'a:b', params: {text: x, number: 1.0e-7, flag: true, list: [1]}}]
        eval: {rewards: [{name: jpeg_compressibility, weight: -2}], sampling: {steps: 5}}
        optimizer: {lr: 1.2345678901234567e-5, betas: [0.5, 0.75]}
        ema: {decay: 0.99}
        output_dir: "runs/é: #x"
        """
    )
    again = parse_config(yaml.safe_load(dump_config(config)), "dump")
    assert again == config
    assert again.optimizer.lr == 1.2345678901234567e-5 and again.rewards[1].params["flag"] is True


def test_evaluations_sample_as_training_but_for_what_they_say_themselves(load):
    sampling = "sampling: {steps: 8, eta: 0.5, guidance_scale: 1, negative_prompt: dull, height: 64}"
    config = load(f"{REWARDS}{sampling}\neval: {{sampling: {{steps: 20, eta: 0, guidance_scale: 3, negative_prompt: ''}}}}")
    changed = {"steps": 20, "eta": 0.0, "guidance_scale": 3.0, "negative_prompt": ""}
    assert config.eval_sampling.model_dump() == {**config.sampling.model_dump(), **changed}
    assert load(f"{REWARDS}{sampling}").eval_sampling == config.sampling
    window = "sampling: {steps: 8, noise_steps: [1, 3]}"
    assert load(f"{REWARDS}{window}").eval_sampling.noise_steps == (1, 3)
    assert load(f"{REWARDS}{window}\neval: {{sampling: {{steps: 20, eta: 0}}}}").eval_sampling.noise_steps is None
    # every earlier version wrote `steps: null` into the config.yaml of its runs
    assert load(f"{REWARDS}eval: {{steps: null}}") == load()


def test_a_dumped_configuration_names_every_key_but_what_the_algorithm_brings(load):
    brought = [field.name for field in dataclasses.fields(Algorithm)]

    def names(model: type[BaseModel], values: dict, left_out) -> None:
        assert list(values) == [name for name in model.model_fields if name not in left_out]
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names(field.annotation, values[name], settable().get(name, ()) if model is Config else ())

    names(Config, yaml.safe_load(dump_config(load())), brought)
    names(Config, yaml.safe_load(dump_config(load("algorithm: loop_fast\n" + REWARDS))), brought)
    kept = yaml.safe_load(dump_config(load(f"algorithm: loop_fast\noptimizer: {{schedule: constant}}\n{REWARDS}")))
    assert kept["optimizer"]["schedule"] == "constant" and "max_grad_norm" not in kept["optimizer"] and kept["ema"] == {}
    own = load(f"algorithm: loop\nupdates_per_rollout: 3\nadvantage_clamp: 2\n{REWARDS}")
    assert [name for name in yaml.safe_load(dump_config(own)) if name in brought] == ["updates_per_rollout", "advantage_clamp"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_runs_configuration_with_another_algorithm_is_that_algorithms(load, tmp_path, name):
    (tmp_path / "config.yaml").write_text(dump_config(load(f"algorithm: loop\n{REWARDS}")))
    assert load_config(tmp_path / "config.yaml", [f"algorithm={name}"]) == load(f"algorithm: {name}\n{REWARDS}")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_fills_what_the_file_leaves_open(load, name):
    config, algorithm = load(f"algorithm: {name}\n{REWARDS}"), ALGORITHMS[name]
    assert (config.advantage, config.objective) == (algorithm.advantage, algorithm.objective)
    assert config.updates_per_rollout == algorithm.updates_per_rollout
    assert config.advantage_clamp == algorithm.advantage_clamp
    for section, keys in settable().items():
        for key in keys:
            found, default = (getattr(getattr(of, section), key) for of in (config, load(REWARDS)))
            assert found == algorithm.settings.get(section, {}).get(key, default)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_names_an_advantage_and_an_objective_that_exist(name):
    assert ALGORITHMS[name].advantage in ADVANTAGES and ALGORITHMS[name].objective in OBJECTIVES


def test_what_the_file_says_stands_before_what_the_algorithm_says(load):
    config = load(f"{REWARDS}algorithm: ppo\nadvantage: group_norm\nobjective: clip_only\nupdates_per_rollout: 4")
    assert (config.advantage, config.objective, config.updates_per_rollout) == ("group_norm", "clip_only", 4)
    assert config.advantage_clamp == ALGORITHMS["ppo"].advantage_clamp
    config = load(f"{REWARDS}algorithm: loop_fast\nema: {{decay: null}}\noptimizer: {{max_grad_norm: 0.5, lr: 0.1}}")
    assert (config.ema.decay, config.optimizer.max_grad_norm, config.optimizer.lr) == (None, 0.5, 0.1)
    assert config.optimizer.schedule == ALGORITHMS["loop_fast"].settings["optimizer"]["schedule"] != load().optimizer.schedule
    with pytest.raises(UserError, match="ema: expected keys below it"):
        load(f"{REWARDS}algorithm: loop_fast\nema: 0.9")


def test_the_default_algorithm_makes_several_updates_per_rollout(load):
    assert load().algorithm == "loop" and load().updates_per_rollout >= 2


def test_loop_and_ppo_differ_in_one_value_of_the_file(load):
    assert load(f"{REWARDS}algorithm: ppo") == load(f"{REWARDS}algorithm: loop", "algorithm=ppo")


def test_numbers_of_a_rollout_are_derived(load):
    text = "prompts_per_step: 3\nimages_per_prompt: 5\nsampling: {steps: 10}\nlast_steps: {drop: 2}"
    config = load(f"{REWARDS}{text}")
    steps = steps_of(config)
    assert config.images_per_rollout == 15 and steps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [kept_steps(len(steps), fraction) for fraction in (1.0, 0.5, 0.3, 0.01)] == [8, 4, 2, 1]


def test_a_step_without_noise_is_not_trained(load, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')  # stock corrects SD's
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler", "steps_offset": 0}')
    model = f"model: {{path: {tmp_path}}}\nsampling: {{steps: 4}}\n"
    assert steps_of(load(f"{REWARDS}{model}")).tolist() == [0, 1, 2]  # the last step starts at timestep 0
    assert steps_of(load(f"{REWARDS}{model}", "last_steps.drop=2")).tolist() == [0]
    with pytest.raises(UserError, match="sampling.steps: none of 4 steps can be trained: raise it or lower last_steps.drop"):
        steps_of(load(f"{REWARDS}{model}", "last_steps.drop=3"))


@pytest.mark.parametrize(
    "text, source, limit",
    [
        ("", "shapes_heldout", 50),
        ("prompts: {source: shapes_train, limit: 8}", "shapes_heldout", 50),
        ("prompts: {limit: 8}", "shapes_heldout", 50),
        ("prompts: {source: shapes_heldout}", "shapes_heldout", 50),
        ("prompts: {source: animals}", "animals", 50),
        ("prompts: {source: list.txt}", "list.txt", 50),
        ("prompts: {source: animals}\neval: {every: 3}", "animals", 50),
        ("prompts: {source: animals}\neval: {prompts: {limit: 20}}", "animals", 20),
        ("eval: {prompts: {limit: 20}}", "shapes_heldout", 20),
        ("eval: {prompts: {limit: null}}", "shapes_heldout", None),
        ("eval: {prompts: {source: null}}", "shapes_heldout", 50),
        ("eval: {prompts: {source: shapes_train}}", "shapes_train", 50),
        ("eval: {prompts: {source: other.txt}}\nprompts: {source: animals}", "other.txt", 50),
    ],
)
def test_the_held_out_prompts_follow_the_training_prompts_unless_they_are_given(load, text, source, limit):
    prompts = load(f"{REWARDS}{text}").eval.prompts
    assert (prompts.source, prompts.limit) == (source, limit)


def test_an_override_of_the_limit_alone_keeps_the_held_out_prompts(load):
    default, fewer = load(), load(REWARDS, "eval.prompts.limit=20")
    assert (fewer.eval.prompts.source, fewer.eval.prompts.limit) == ("shapes_heldout", 20)
    assert load_prompts(fewer.eval.prompts) == load_prompts(default.eval.prompts)[:20]
    assert default.prompts.limit is None  # only the held-out prompts have a limit by default


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_clamp_of_null_is_no_clamp_and_an_absent_one_is_the_algorithms(load, name):
    text = f"{REWARDS}algorithm: {name}\n"
    for config, clamp in (
        (load(text), ALGORITHMS[name].advantage_clamp),
        (load(f"{text}advantage_clamp: null"), None),
        (load(text, "advantage_clamp=null"), None),
        (load(f"{text}advantage_clamp: 2.5"), 2.5),
    ):
        assert config.advantage_clamp == clamp
        assert parse_config(yaml.safe_load(dump_config(config)), "dump").advantage_clamp == clamp


def test_ppo_and_grpo_clamp_advantages_by_default(load):
    assert [load(f"{REWARDS}algorithm: {name}").advantage_clamp for name in ("ppo", "grpo", "loop")] == [5.0, 5.0, None]


def test_a_configuration_cannot_be_changed_once_read(load):
    with pytest.raises(ValidationError, match="frozen"):
        load().iterations = 3


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("iterations=5", ["iterations"], 5),
        ("sampling.steps=20", ["sampling", "steps"], 20),
        ("model.lora.rank=3", ["model", "lora", "rank"], 3),
        ("eval.prompts.limit=3", ["eval", "prompts", "limit"], 3),
        ("clip_range=1e-4", ["clip_range"], 1e-4),
        ("optimizer.lr=1E-3", ["optimizer", "lr"], 1e-3),
        ("optimizer.betas=[0.5, 0.6]", ["optimizer", "betas"], (0.5, 0.6)),
        ("rewards.0.weight=2", ["rewards", 0, "weight"], 2.0),
        ("rewards.0.params.threshold=1e-3", ["rewards", 0, "params", "threshold"], 1e-3),
        ("rewards.0.params.word=infinity", ["rewards", 0, "params", "word"], "infinity"),
        ("rewards=[{name: a}, {name: b}]", ["rewards", 1, "name"], "b"),
        ("model={lora: {rank: 7}}", ["model", "lora", "rank"], 7),
        ("model.path=a=b", ["model", "path"], "a=b"),
        ("model.revision=1234e56", ["model", "revision"], "1234e56"),
        ("sampling.negative_prompt=inf", ["sampling", "negative_prompt"], "inf"),
        ("memory.gradient_checkpointing=true", ["memory", "gradient_checkpointing"], True),
        ("prompts.limit=null", ["prompts", "limit"], None),
    ],
)
def test_an_override_sets_one_key(load, override, path, value):
    found = load(f"{REWARDS}model: {{path: x}}\nprompts: {{limit: 9}}", override)
    for part in path:
        found = found[part] if isinstance(found, list | dict) else getattr(found, part)
    assert found == value and type(found) is type(value)


def test_the_last_of_two_overrides_wins_and_the_rest_of_the_section_stays(load):
    config = load(f"{REWARDS}sampling: {{steps: 5, eta: 0.5}}", "sampling.steps=6", "sampling.steps=7")
    assert (config.sampling.steps, config.sampling.eta) == (7, 0.5)


def test_overrides_do_not_change_what_they_are_given():
    values = {"rewards": [{"name": "shapes"}]}
    assert apply_overrides(values, ["rewards.0.name=jpeg", "seed=3"]) == {"rewards": [{"name": "jpeg"}], "seed": 3}
    assert values == {"rewards": [{"name": "shapes"}]}


@pytest.mark.parametrize("text", ["1e-3", "-2.5E+7", "3e5", "1.e2"])
def test_numbers_with_exponents_among_a_rewards_params_are_numbers(load, text):
    params = load(f"rewards: [{{name: a, params: {{x: {text}, y: {text}x}}}}]").rewards[0].params
    assert params == {"x": float(text), "y": f"{text}x"}


# --- what is refused --------------------------------------------------------------------------------------------------

UNKNOWN_KEYS = [
    ("iteratons: 3", "iteratons: unknown key; did you mean 'iterations'?"),
    ("sampling: {stpes: 3}", "sampling.stpes: unknown key; did you mean 'steps'?"),
    ("model: {adaptor: lora}", "model.adaptor: unknown key; did you mean 'adapter'?"),
    ("model: {lora: {rnk: 3}}", "model.lora.rnk: unknown key; did you mean 'rank'?"),
    ("prompts: {sorce: animals}", "prompts.sorce: unknown key; did you mean 'source'?"),
    ("eval: {prompts: {sorce: animals}}", "eval.prompts.sorce: unknown key; did you mean 'source'?"),
    ("eval: {rewards: [{name: a, wieght: 1}]}", "eval.rewards.0.wieght: unknown key; did you mean 'weight'?"),
    ("optimizer: {learning_rates: 1}", "optimizer.learning_rates: unknown key; the keys here are name, lr, schedule, betas"),
    ("memory: {rolout_batch: 1}", "memory.rolout_batch: unknown key; did you mean 'rollout_batch'?"),
    ("last_steps: {dropp: 1}", "last_steps.dropp: unknown key; did you mean 'drop'?"),
    ("safety: {max_clip_frac: 1}", "safety.max_clip_frac: unknown key; did you mean 'max_clipfrac'?"),
    ("lr: 1", "lr: unknown key; did you mean 'value.lr' or 'optimizer.lr'?"),
    ("rank: 1", "rank: unknown key; did you mean 'model.lora.rank'?"),
    ("steps: 1", "steps: unknown key; did you mean 'last_steps' or 'eval.sampling.steps' or 'sampling.steps'?"),
    ("eval: {steps: 5}", "eval.steps: unknown key; did you mean 'eval.sampling.steps' or 'sampling.steps'?"),
    (
        "eval: {negative_prompt: x}",
        "eval.negative_prompt: unknown key; did you mean 'eval.sampling.negative_prompt' or 'sampling.negative_prompt'?",
    ),
    ("qqq: 1", "qqq: unknown key; the keys here are algorithm, advantage"),
    ("? 'two\nlines'\n: 1", "two"),
    ("1: 2", "1: keys should be strings"),
]

WRONG_VALUES = [
    ("iterations: 0", "iterations: input should be greater than or equal to 1, got 0"),
    ("iterations: 2.5", "iterations: input should be a valid integer"),
    ("iterations: many", "iterations: input should be a valid integer"),
    ("iterations: yes", "iterations: cannot be true; YAML also reads yes"),
    ("iterations:", "iterations: input should be a valid integer, got None"),
    ("seed: -1", "seed: input should be greater than or equal to 0, got -1"),
    ("seed: 4294967296", "seed: input should be less than 4294967296"),
    ("clip_range: 0", "clip_range: input should be greater than 0, got 0"),
    ("clip_range: .nan", "clip_range: input should be a finite number, got nan"),
    ("optimizer: {lr: .inf}", "optimizer.lr: input should be a finite number, got inf"),
    ("optimizer: {lr: 1e-4x}", "optimizer.lr: input should be a valid number"),
    ("optimizer: {betas: [0.9]}", "optimizer.betas.1: missing"),
    ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1: input should be less than 1"),
    (
        "optimizer: {name: sgd}",
        "optimizer.name: input should be 'adamw', 'adamw8bit', 'paged_adamw8bit', 'lion8bit' or 'cpu_adamw', got 'sgd'",
    ),
    (
        "algorithm: lop",
        "algorithm: input should be 'loop', 'rloo', 'ppo', 'reinforce', 'grpo', 'dpok', 'dlpo', 'loop_forward', 'loop_fast' o",
    ),
    ("algorithm: [loop]", "algorithm: input should be 'loop'"),
    ("algorithm: {name: loop}", "algorithm: input should be 'loop'"),
    ("algorithm: null", "algorithm: input should be 'loop'"),
    ("advantage: best", "advantage: unknown name 'best': one of leave_one_out"),
    ("objective: best", "objective: unknown name 'best': one of score_function"),
    ("model: assets:shapes", "model: expected keys below it (path, random_init"),
    ("model:", "model: expected keys below it (path, random_init"),
    ("model: {dtype: float32}", "model.dtype: input should be 'fp32', 'bf16' or 'fp16'"),
    ("model: {path: ''}", "model.path: string should have at least 1 character"),
    ("model: {revision: 1234567}", "model.revision: expected text, got 1234567; put it in quotes"),
    ("model: {lora: {target_modules: to_q}}", "model.lora.target_modules: expected a list in [ ], got 'to_q'"),
    ("model: {lora: {target_modules: []}}", "model.lora.target_modules: list should have at least 1 item"),
    ("model: {lora: {alpha: 0}}", "model.lora.alpha: input should be greater than 0"),
    ("prompts: {source: no}", "prompts.source: cannot be false; YAML also reads yes, no, on and off so"),
    ("prompts: {categories: []}", "prompts.categories: list should have at least 1 item"),
    ("prompts: {limit: 0}", "prompts.limit: input should be greater than or equal to 1"),
    ("sampling: {eta: -0.1}", "sampling.eta: input should be greater than or equal to 0"),
    ("sampling: {eta: 1.1}", "sampling.eta: input should be less than or equal to 1"),
    ("sampling: {steps: 9, noise_steps: [3, 9]}", "sampling.noise_steps: [3, 9] is no range of the steps 0 to 8: count"),
    ("sampling: {noise_steps: [3, 2]}", "sampling.noise_steps: [3, 2] is no range"),
    (
        "sampling: {steps: 9, noise_steps: [1, 2]}\neval: {sampling: {steps: 20}}",
        "eval.sampling.eta: sampling.noise_steps counts training's 9 steps, and evaluations have 20: set it to 0",
    ),
    ("sampling: {guidance_scale: -1}", "sampling.guidance_scale: input should be greater than or equal to 0"),
    ("timestep_fraction: 1.5", "timestep_fraction: input should be less than or equal to 1"),
    ("ema: {decay: 1}", "ema.decay: input should be less than 1"),
    ("kl: {weight: -1}", "kl.weight: input should be greater than or equal to 0"),
    ("output_dir: ''", "output_dir: string should have at least 1 character"),
    ("output_dir: 2024-01-01", "output_dir: expected text, got datetime.date(2024, 1, 1); put it in quotes"),
    ("kernels: cuda", "kernels: input should be 'auto'"),
    ("engine: {name: deepspeeed}", "engine.name: input should be 'torch'"),
]

WRONG_REWARDS = [
    ("iterations: 3", "rewards: missing; add it"),
    ("rewards: []", "rewards: list should have at least 1 item"),
    ("rewards: shapes", "rewards: expected a list in [ ], got 'shapes'"),
    ("rewards: {name: shapes}", "rewards: expected a list in [ ]"),
    (
        "rewards: [shapes]",
        "rewards.0: expected keys below it (name, weight, params, label, normalize, worker, workers, timeout), got 'shapes'",
    ),
    ("rewards: [{nam: shapes}]", "rewards.0.nam: unknown key; did you mean 'name'? (and 1 more)"),
    ("rewards: [{name: a}, {name: b, wieght: 1}]", "rewards.1.wieght: unknown key; did you mean 'weight'?"),
    ("rewards: [{weight: 1}]", "rewards.0.name: missing; add it"),
    ("rewards: [{name: a, weight: .nan}]", "rewards.0.weight: input should be a finite number"),
    ("rewards: [{name: a, params: 3}]", "rewards.0.params: input should be a valid dictionary"),
]

CROSS_FIELD = [
    ("images_per_prompt: 1", "images_per_prompt: leave_one_out compares the images of one prompt: set at least 2"),
    ("algorithm: grpo\nimages_per_prompt: 1", "images_per_prompt: group_norm compares"),
    (
        "updates_per_rollout: 3\npasses_per_rollout: 2",
        "updates_per_rollout: 3 optimizer steps cannot be shared equally",
    ),
    ("sampling: {steps: 5}\nlast_steps: {drop: 5}", "last_steps.drop: 5 leaves none of sampling.steps=5 to train"),
    (
        "sampling: {steps: 5}\nprompts_per_step: 1\nimages_per_prompt: 2\nupdates_per_rollout: 11",
        "updates_per_rollout: 11 updates, but a rollout has only 10 (trajectory, timestep) pairs: use fewer",
    ),
    (
        "sampling: {steps: 5}\nprompts_per_step: 1\nimages_per_prompt: 2\ntimestep_fraction: 0.4\nupdates_per_rollout: 5",
        "updates_per_rollout: 5 updates, but a rollout has only 4 (trajectory, timestep) pairs: use fewer",
    ),
    (
        "algorithm: rloo\npasses_per_rollout: 2\nupdates_per_rollout: 2",
        "passes_per_rollout: score_function has no importance ratio",
    ),
]

# one for each line of the tables in docs/multi_gpu.md
ENGINES = [
    *(
        (
            f"engine: {{name: torch, {key}: {value}}}",
            f"engine.{key}: only DeepSpeed has it: set engine.name=deepspeed, or leave",
        )
        for key, value in (
            ("zero_stage", 0),
            ("zero_stage", 2),
            ("offload_optimizer", "true"),
            ("offload_parameters", "true"),
            ("rollout_parameters", "gathered"),
            ("deepspeed_config", "ds.json"),
        )
    ),
    (
        "optimizer: {name: cpu_adamw}",
        "optimizer.name: cpu_adamw is for engine.name=deepspeed engine.offload_optimizer=true: set it to adamw",
    ),
    *(
        (
            f"engine: {{name: deepspeed, zero_stage: {stage}}}\noptimizer: {{name: cpu_adamw}}",
            "optimizer.name: cpu_adamw steps in the CPU's memory: set engine.offload_optimizer=true, or adamw",
        )
        for stage in range(4)
    ),
    (
        "engine: {name: deepspeed, zero_stage: 0, offload_optimizer: true}\noptimizer: {name: cpu_adamw}",
        "engine.offload_optimizer: engine.zero_stage=0 keeps the optimizer on the device: set it to 1, 2 or 3",
    ),
    *(
        (
            f"engine: {{name: deepspeed, zero_stage: {stage}, offload_optimizer: true}}\noptimizer: {{name: {optimizer}}}",
            f"optimizer.name: {optimizer} does not step in the CPU's memory, as engine.offload_optimizer=true wants: "
            "set it to cpu_adamw",
        )
        for stage in (1, 2, 3)
        for optimizer in ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit")
    ),
    *(
        (
            f"engine: {{name: deepspeed, zero_stage: {stage}, offload_parameters: true}}",
            f"engine.offload_parameters: engine.zero_stage={stage} keeps the weights on every device: set zero_stage=3",
        )
        for stage in (0, 1, 2)
    ),
    (
        "engine: {name: deepspeed, zero_stage: 3, offload_parameters: true}",
        "engine.offload_parameters: the optimizer goes first: set engine.offload_optimizer=true and cpu_adamw",
    ),
    *(
        (
            f"engine: {{name: deepspeed, zero_stage: {stage}, rollout_parameters: {choice}}}",
            f"engine.rollout_parameters: with engine.zero_stage={stage} the weights are always whole: leave it out",
        )
        for stage in (0, 1, 2)
        for choice in ("gathered", "layerwise")
    ),
    (
        "engine: {name: deepspeed, zero_stage: 3}\nkl: {weight: 0.1}\nmodel: {adapter: full}",
        "kl.weight: a full fine-tune's frozen copy is not shared out: set engine.zero_stage=2, or model.adapter=lora",
    ),
    (
        "engine: {name: deepspeed, zero_stage: 3, rollout_parameters: layerwise}\nema: {decay: 0.9}",
        "ema.decay: the average is put in for evaluation as a whole: set engine.rollout_parameters=gathered",
    ),
    ("engine: {name: deepspeed, zero_stage: 4}", "engine.zero_stage: input should be 0, 1, 2 or 3"),
    ("engine: {name: deepspeed, zero_stage: 3, rollout_parameters: whole}", "engine.rollout_parameters: input should be"),
    (
        "engine: {name: deepspeed, device: cpu}\nmodel: {dtype: fp16}",
        "model.dtype: DeepSpeed has no fp16 on a CPU: set bf16 or fp32",
    ),
    (
        "engine: {name: deepspeed, device: cpu}\noptimizer: {name: paged_adamw8bit}",
        "optimizer.name: paged_adamw8bit pages its state between GPU and CPU, and this runs on cpu: set it to adamw8bit",
    ),
    ("engine: {name: deepspeed, device: cpu, deepspeed_config: none.json}", "engine.deepspeed_config: cannot read none.json"),
]

WRONG_FILES = [
    ("", "expected keys such as 'algorithm: loop', found nothing"),
    ("# only a comment\n", "expected keys such as 'algorithm: loop', found nothing"),
    ("- rewards", "expected keys such as 'algorithm: loop', found a list"),
    ("loop", "expected keys such as 'algorithm: loop', found a str"),
    ("rewards: [", "line 1, column 11, is not valid YAML: expected the node content"),
    ("a: 1\nb: c: d", "line 2, column 5, is not valid YAML: mapping values are not allowed here"),
    ("a: \x07", "is not valid YAML: unacceptable character #x0007"),
    ("date: 2024-13-01", "is not valid YAML: month must be in 1..12"),
    ("model: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
    ("? [a, b]\n: 1", "line 1, column 3, is not valid YAML: found unhashable key"),
    (f"{REWARDS}seed: 1\nseed: 2", "recipe.yaml, line 3, column 1, is not valid YAML: the key 'seed' is given twice"),
    (f"{REWARDS}seed: 1\nseed: 1", "recipe.yaml, line 3, column 1, is not valid YAML: the key 'seed' is given twice"),
    (f"{REWARDS}model:\n  path: a\n  path: b", "line 4, column 3, is not valid YAML: the key 'path' is given twice"),
    (f"{REWARDS}model: {{lora: {{rank: 1, rank: 2}}}}", "line 2, column 25, is not valid YAML: the key 'rank' is given"),
    ("rewards: [{name: a, weight: 1, weight: 2}]", "line 1, column 32, is not valid YAML: the key 'weight' is given"),
]

BAD_OVERRIDES = [
    ("iterations", "override 'iterations': write it as key=value, for example sampling.steps=20"),
    ("=3", "override '=3': write it as key=value"),
    ("iterations=", "iterations: input should be a valid integer, got None"),
    ("output_dir=[", "override output_dir: '[' is not a YAML value; quote it"),
    ("output_dir=2024-13-01", "override output_dir: '2024-13-01' is not a YAML value; quote it"),
    ("output_dir=3", "output_dir: expected text, got 3; put it in quotes"),
    ("sampling.stps=3", "sampling.stps: unknown key; did you mean 'steps'?"),
    ("sampling..steps=3", "sampling.: unknown key; the keys here are steps"),
    ("rewards.1.weight=2", "override rewards.1.weight: '1' is not one of the items 0 to 0"),
    ("rewards.1={name: a}", "override rewards.1: '1' is not one of the items 0 to 0"),
    ("rewards.-1.weight=2", "override rewards.-1.weight: '-1' is not one of the items 0 to 0"),
    ("rewards.first.weight=2", "override rewards.first.weight: 'first' is not one of the items 0 to 0"),
    ("rewards.².weight=2", "override rewards.².weight: '²' is not one of the items 0 to 0"),
    ("rewards.0.name.x=3", "override rewards.0.name.x: 'name' is a single value, it has no keys below it"),
    ("eval.rewards.0.name=shapes", "eval.rewards: expected a list in [ ]"),
]

BAD_TEXTS = [
    *((REWARDS + text, "", says) for text, says in [*UNKNOWN_KEYS, *WRONG_VALUES, *CROSS_FIELD, *ENGINES]),
    *((text, "", says) for text, says in [*WRONG_REWARDS, *WRONG_FILES]),
    *((REWARDS, override, says) for override, says in BAD_OVERRIDES),
]


@pytest.mark.parametrize("text, override, says", BAD_TEXTS, ids=lambda text: repr(text)[-40:])
def test_every_bad_config_is_one_line_with_exit_code_2_and_nothing_is_made(
    tmp_path, monkeypatch, capsys, text, override, says
):
    def no_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastloop.denoisers.load_denoiser", no_model)
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["train", "recipe.yaml", *([override] if override else [])]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastloop: ") and err.count("\n") == 1 and err.endswith("\n")
    assert says in err
    assert out == ""
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("name", sorted(name for name, make in ADVANTAGES.items() if make().needs_groups))
def test_one_image_per_prompt_is_refused_where_images_of_a_prompt_are_compared(load, name):
    assert problem(load, REWARDS, f"advantage={name}", "images_per_prompt=1").endswith(
        f"images_per_prompt: {name} compares the images of one prompt: set at least 2, "
        "or choose algorithm=ppo or algorithm=reinforce"
    )


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_the_algorithms_that_the_refusal_proposes_take_one_image_per_prompt(load, name):
    assert load(REWARDS, f"algorithm={name}", "images_per_prompt=1").images_per_prompt == 1


def test_the_limits_of_the_cross_field_rules_are_allowed(load):
    small = f"{REWARDS}sampling: {{steps: 5}}\nprompts_per_step: 1\nimages_per_prompt: 2"
    assert len(steps_of(load(small, "updates_per_rollout=10"))) == 5
    assert len(steps_of(load(small, "updates_per_rollout=20", "passes_per_rollout=2"))) == 5
    assert len(steps_of(load(small, "updates_per_rollout=4", "timestep_fraction=0.4"))) == 5
    assert steps_of(load(small, "last_steps.drop=4")).tolist() == [0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["updates_per_rollout=11"],
        ["updates_per_rollout=22", "passes_per_rollout=2"],
        ["updates_per_rollout=3", "last_steps.drop=4"],
        ["updates_per_rollout=5", "timestep_fraction=0.4"],
    ],
)
def test_more_updates_than_pairs_are_refused(load, overrides):
    config = load(f"{REWARDS}sampling: {{steps: 5}}\nprompts_per_step: 1\nimages_per_prompt: 2", *overrides)
    updates = config.updates_per_rollout
    with pytest.raises(UserError, match=rf"^updates_per_rollout: {updates} updates, but a rollout has only \d+ \(traj"):
        steps_of(config)


def test_a_merged_key_may_be_given_anew(load):
    text = "rewards:\n  - &first {name: shapes, weight: 2}\n  - {<<: *first, name: jpeg_compressibility}\n"
    assert [(r.name, r.weight) for r in load(text).rewards] == [("shapes", 2.0), ("jpeg_compressibility", 2.0)]
    nested = "x: &base {weight: 1}\ny: [{z: &derived {<<: *base, weight: 2}}]\nrewards: [{<<: *derived, name: shapes}]"
    assert "x: unknown key" in problem(load, nested)  # and no key is given twice


def test_the_first_line_says_how_many_more_problems_there_are(load):
    assert problem(load, "rewards: [{name: a}]\nseed: -1\niterations: 0\nclip_range: 0").endswith("got 0 (and 2 more)")


def test_a_misspelt_key_is_told_before_the_key_that_it_leaves_missing(load):
    assert "reward: unknown key; did you mean 'rewards'? (and 1 more)" in problem(load, "reward: [{name: shapes}]")


def test_a_missing_file_is_told_with_its_nearest_neighbour(tmp_path):
    (tmp_path / "shapes_loop.yaml").write_text(REWARDS)
    with pytest.raises(UserError, match=r"no config file .*/shapes_lop.yaml: did you mean .*/shapes_loop.yaml\?"):
        load_config(tmp_path / "shapes_lop.yaml")
    with pytest.raises(UserError, match="no config file .*: the recipes are in configs/"):
        load_config(tmp_path / "elsewhere" / "shapes_loop.yaml")


def test_a_folder_is_not_a_config_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the config file .*: Is a directory; give a YAML file"):
        load_config(tmp_path)


def test_a_file_that_is_not_text_is_told(tmp_path):
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="cannot read the config file .*picture.yaml: 'utf-8' codec can't decode"):
        load_config(tmp_path / "picture.yaml")
