"""A run's folder belongs to one run: who may begin in it, who may go on, and what is refused without touching it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from fastloop.checkpoints import save_checkpoint
from fastloop.errors import UserError
from fastloop.prompts import Prompt, prompt_facts
from fastloop.recipes import dump_config, load_config
from fastloop.rundir import claim_run_dir, read_run_config, release_run_dir, write_run

CATS, DOGS = [Prompt("a cat"), Prompt("a black cat", {"category": "color"})], [Prompt("a dog"), Prompt("a cat")]
FACTS = prompt_facts(CATS, DOGS)


def claim(config, resume: bool, facts=FACTS, files=None):
    return claim_run_dir(config, resume, facts, files or {})


@pytest.fixture
def begin(make_config):
    """A function of overrides that begins a run, as a trainer does, with whole checkpoints after the given iterations."""

    def begin(*iterations: int, **overrides) -> Path:
        folder, _, _ = claim(make_config(**overrides), resume=False)
        write_run(folder, status="running")
        for iteration in iterations:
            save_checkpoint(folder / "checkpoints", iteration, {}, None, {"iteration": iteration}, keep=9)
        (folder / "metrics.jsonl").write_text("".join(f'{{"iteration": {i}}}\n' for i in iterations if i))
        return folder

    return begin


def contents(folder: Path) -> dict[str, bytes]:
    """Without the lock, which is of the process and not of the run."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(config, resume: bool, facts=FACTS, files=None) -> str:
    with pytest.raises(UserError) as caught:
        claim(config, resume, facts, files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a new run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_fresh_folder_is_made_with_its_configuration(make_config, tmp_path, resume):
    config = make_config(output_dir=str(tmp_path / "some" / "where" / "run"))
    assert claim(config, resume) == (tmp_path / "some" / "where" / "run", None, False)
    assert contents(tmp_path / "some") == {
        "where/run/config.yaml": dump_config(config).encode(),
        "where/run/prompts.json": json.dumps(FACTS, indent=1).encode(),
    }
    assert read_run_config(tmp_path / "some" / "where" / "run") == config


def test_a_folder_with_other_files_is_taken_and_they_stay(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    claim(make_config(), resume=False)
    assert sorted(contents(tmp_path / "run")) == ["config.yaml", "notes.txt", "prompts.json"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_home_folder_is_expanded(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert claim(make_config(output_dir="~/my_run"), resume=False)[0] == tmp_path / "my_run"
    assert (tmp_path / "my_run" / "config.yaml").exists()


def test_two_runs_in_two_folders_do_not_know_of_each_other(begin, make_config, tmp_path):
    one = begin(0, 1, output_dir=str(tmp_path / "one"))
    before = contents(one)
    two = begin(0, output_dir=str(tmp_path / "two"), seed=5)
    assert contents(one) == before
    assert (read_run_config(one).seed, read_run_config(two).seed) == (0, 5)
    folder, checkpoint, _ = claim(make_config(output_dir=str(two), seed=5), resume=True)
    assert (folder, checkpoint) == (two, two / "checkpoints" / "iteration-000000")
    assert contents(one) == before


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(begin, make_config):
    folder = begin(0, 1)
    before = contents(folder)
    for config in (make_config(), make_config(seed=1)):
        assert refusal(config, resume=False) == (
            f"output_dir: {folder} already holds a run: add --resume, or choose another output_dir="
        )
    assert contents(folder) == before


def test_a_start_that_was_refused_before_it_began_does_not_hold_the_folder(make_config):
    claim(make_config(), resume=False)  # no run.json: the model could not be loaded, say
    folder, checkpoint, resumed = claim(make_config(seed=3), resume=False)
    assert (checkpoint, resumed) == (None, False)
    assert read_run_config(folder).seed == 3


def test_a_configuration_that_the_user_wrote_is_not_overwritten(make_config, tmp_path):
    config = make_config()
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_text(f"# mine\n{dump_config(config)}")
    assert "already holds a run" in refusal(config, resume=False)
    assert path.read_text().startswith("# mine\n")


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_folder_that_cannot_be_made_is_refused(make_config, tmp_path, below):
    (tmp_path / "file").write_text("a file")
    folder = tmp_path / "file" / below
    message = refusal(make_config(output_dir=str(folder)), resume=False)
    assert message.startswith(f"output_dir: cannot write to {folder}: ")
    assert message.endswith("; choose another output_dir=")
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(make_config, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    assert refusal(make_config(), resume=False).startswith(f"output_dir: cannot write to {tmp_path / 'run'}: Permission")
    assert contents(tmp_path / "run") == {}


# --- going on ---------------------------------------------------------------------------------------------------------


def test_resuming_goes_on_from_the_newest_checkpoint(begin, make_config):
    folder = begin(0, 2, 10)
    before = contents(folder)
    config = make_config(iterations=10)
    assert claim(config, resume=True) == (folder, folder / "checkpoints" / "iteration-000010", True)
    assert contents(folder) == before | {"config.yaml": dump_config(config).encode()}


def test_a_run_whose_config_has_a_former_default_written_out_can_be_resumed(begin, make_config):
    folder = begin(0)
    text = dump_config(make_config(model={"lora": {"rank": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}}))
    (folder / "config.yaml").write_text(text)
    assert claim(make_config(), resume=True)[0] == folder
    (folder / "config.yaml").write_text(text.replace("to_v", "to_out.0"))
    assert "model.lora.target_modules is ['to_q', 'to_k', 'to_out.0'" in refusal(make_config(), resume=True)


def test_resuming_before_the_first_checkpoint_starts_over(begin, make_config):
    folder = begin()
    assert claim(make_config(), resume=True) == (folder, None, True)


def test_resuming_removes_what_a_killed_run_left_half_written(begin, make_config):
    folder = begin(0)
    leftover = folder / "checkpoints" / ".writing-1-99"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    claim(make_config(), resume=True)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["iteration-000000"]


CHANGES = [
    ({"optimizer": {"lr": 0.5}}, "optimizer.lr is 0.01", "0.5"),
    ({"seed": 7}, "seed is 0", "7"),
    ({"model": {"lora": {"rank": 3}}}, "model.lora.rank is 2", "3"),
    ({"memory": {"rollout_batch": 5}}, "memory.rollout_batch is 4", "5"),
    ({"eval": {"seed": 1}}, "eval.seed is 0", "1"),
    ({"eval": {"prompts": {"source": "animals", "limit": 4}}}, "eval.prompts.limit is 3", "4"),
    ({"prompts": {"limit": 5}}, "prompts.limit is None", "5"),
    ({"advantage_clamp": 2.0}, "advantage_clamp is None", "2.0"),
    ({"kernels": "reference"}, "kernels is 'auto'", "'reference'"),
]


@pytest.mark.parametrize("change, before, now", CHANGES, ids=lambda value: str(value))
def test_resuming_with_a_changed_key_is_refused_with_its_name_and_both_values(begin, make_config, change, before, now):
    folder = begin(0)
    kept = contents(folder)
    assert refusal(make_config(**change), resume=True) == (
        f"--resume: {before} in {folder / 'config.yaml'} and {now} now: "
        "set it back, or start a new run with another output_dir="
    )
    assert contents(folder) == kept


@pytest.mark.parametrize(
    "change",
    [
        {"iterations": 99},
        {"checkpoint": {"every": 7, "keep": 1}},
        {"tracking": {"tensorboard": True, "wandb": "project"}},
        {"safety": {"max_clipfrac": 0.1, "max_ratio_dev": 0.5}},
        {"engine": {"device": "cpu"}},
    ],
    ids=str,
)
def test_resuming_may_change_how_long_a_run_takes_where_it_runs_and_how_it_is_watched(begin, make_config, change):
    folder = begin(0)
    config = make_config(**change)
    assert claim(config, resume=True)[1:] == (folder / "checkpoints" / "iteration-000000", True)
    assert load_config(folder / "config.yaml") == config


def test_a_run_may_go_on_in_a_folder_that_was_moved(begin, make_config, tmp_path):
    begin(0, 1).rename(tmp_path / "moved")
    config = make_config(output_dir=str(tmp_path / "moved"))
    checkpoint = tmp_path / "moved" / "checkpoints" / "iteration-000001"
    assert claim(config, resume=True) == (tmp_path / "moved", checkpoint, True)
    assert read_run_config(tmp_path / "moved").output_dir == str(tmp_path / "moved")


def test_fewer_iterations_than_are_finished_are_refused(begin, make_config):
    folder = begin(0, 4, iterations=8)
    before = contents(folder)
    assert refusal(make_config(iterations=3), resume=True) == (
        f"iterations: 3, but the run in {folder} has finished 4: set at least 4"
    )
    assert contents(folder) == before
    assert claim(make_config(iterations=4), resume=True)[2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
def test_damaged_records_are_refused_with_their_line(begin, make_config, name):
    folder = begin(0, 1)
    (folder / name).write_text('{"iteration": 1}\n{"iteration": 2, "rew\n{"iteration": 3}\n')
    before = contents(folder)
    message = refusal(make_config(), resume=True)
    assert message.startswith(f"--resume: {folder / name}:2: not a JSON row (")
    assert message.endswith("): mend or remove that line")
    assert contents(folder) == before


def test_a_torn_last_row_does_not_keep_a_run_from_going_on(begin, make_config):
    folder = begin(0, 1)
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2, "rew')
    assert claim(make_config(), resume=True)[2]


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_configuration_is_refused_with_its_place(begin, make_config, resume):
    folder = begin(0)
    (folder / "config.yaml").write_text("rewards: [\n")
    assert refusal(make_config(), resume).startswith(f"{folder / 'config.yaml'}, line 2, column 1, is not valid YAML")


# --- one process at a time --------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere():
    """A function that runs another one in a process of its own: gives its number and what it said; it stays until killed."""
    children = []

    def elsewhere(function, ready: int | None = None) -> tuple[int, int]:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(ours)
                if ready is not None:
                    os.read(ready, 1)  # until all may go
                said = function()
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(theirs, said.encode())
            os.close(theirs)
            time.sleep(60)
            os._exit(0)
        os.close(theirs)
        children.append(child)
        return child, ours

    yield elsewhere
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def said(pipe: int) -> str:
    with os.fdopen(pipe) as file:
        return file.read()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_by_name_of_its_process_until_that_ends(make_config, tmp_path, elsewhere, resume):
    config = make_config()

    def begin() -> str:
        folder, *_ = claim(config, resume=False)
        write_run(folder, status="running")
        return "began"

    child, pipe = elsewhere(begin)
    assert said(pipe) == "began"
    before = contents(tmp_path / "run")
    message = refusal(config, resume)
    assert message.startswith(
        f"output_dir: {tmp_path / 'run'} is in use by process {child} on {socket.gethostname()} since 20"
    )
    assert message.endswith(": wait until it ends, stop it, or choose another output_dir=")
    assert contents(tmp_path / "run") == before
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert claim(config, resume=True) == (tmp_path / "run", None, True)  # the kernel has freed it


def test_of_starts_at_the_same_instant_one_is_accepted(make_config, elsewhere):
    config = make_config()
    ready, go = os.pipe()
    pipes = [elsewhere(lambda: str(claim(config, resume=False)[0]), ready)[1] for _ in range(6)]
    os.write(go, bytes(6))
    answers = [said(pipe) for pipe in pipes]
    assert len([answer for answer in answers if answer == config.output_dir]) == 1
    assert len([answer for answer in answers if " is in use by " in answer]) == 5
    for end in (ready, go):
        os.close(end)


def test_a_run_that_has_ended_lets_others_have_its_folder(begin, make_config, elsewhere):
    release_run_dir(begin(0))
    _, pipe = elsewhere(lambda: str(claim(make_config(), resume=True)[2]))
    assert said(pipe) == "True"


def test_a_file_system_without_locks_is_told_of(make_config, monkeypatch, capsys, tmp_path):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert claim(make_config(), resume=False) == (tmp_path / "run", None, False)
    assert capsys.readouterr().err == (
        f"fastloop: warning: output_dir: the file system of {tmp_path / 'run'} has no locks (No locks available), so a second "
        "run in this folder would not be noticed\n"
    )


# --- the prompts of a run ---------------------------------------------------------------------------------------------


CHANGED = {
    "one more": ([*CATS, Prompt("a hen")], DOGS, "prompts: the prompts of animals", " (then 2, now 3)"),
    "another order": (CATS[::-1], DOGS, "prompts: the prompts of animals", ""),
    "other metadata": ([CATS[0], Prompt("a black cat")], DOGS, "prompts: the prompts of animals", ""),
    "another evaluation": (CATS, CATS, "eval.prompts: the prompts of animals", ""),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_run_does_not_go_on_with_other_prompts(begin, make_config, case):
    prompts, eval_prompts, key, numbers = CHANGED[case]
    folder = begin(0)
    before = contents(folder)
    assert refusal(make_config(iterations=9), True, prompt_facts(prompts, eval_prompts)) == (
        f"--resume: {key} are not those that the run in {folder} began with{numbers}: "
        "put them back, or start a new run with another output_dir="
    )
    assert contents(folder) == before
    assert claim(make_config(iterations=9), resume=True)[2]


def test_a_run_of_an_earlier_version_goes_on_and_keeps_its_prompts_from_then_on(begin, make_config):
    folder = begin(0)
    (folder / "prompts.json").unlink()
    assert claim(make_config(), resume=True)[2]
    assert "are not those" in refusal(make_config(), True, prompt_facts(DOGS, DOGS))


def test_damaged_records_of_the_prompts_are_refused(begin, make_config):
    folder = begin(0)
    for text in ("", "[]", '{"prompts": 3}'):
        (folder / "prompts.json").write_text(text)
        assert refusal(make_config(), resume=True) == (
            f"--resume: {folder / 'prompts.json'} is damaged: remove it to go on with the prompts as they are now"
        )


def test_a_run_does_not_go_on_with_other_files_than_it_began_with(make_config):
    key, files = "model.vae.path", {"model.vae.path": "1" * 64, "dlpo.data": "2" * 64}
    folder, _, _ = claim(make_config(), resume=False, files=files)
    write_run(folder, status="running")
    assert claim(make_config(), resume=True, files=files)[2]
    before = contents(folder)
    assert refusal(make_config(), True, files=files | {key: "3" * 64}) == (
        f"--resume: {key}: what is there is not what the run in {folder} began with: put it back, or start a new run with "
        "another output_dir="
    )
    assert contents(folder) == before
    (folder / "files.json").write_text("[1]")
    assert refusal(make_config(), True, files=files).startswith(f"--resume: {folder / 'files.json'} is damaged: remove it")
    (folder / "files.json").unlink()  # as in runs of an earlier version
    assert claim(make_config(), resume=True, files=files)[2] and json.loads((folder / "files.json").read_text()) == files


def test_where_the_longest_prompt_has_grown_the_prompts_are_named_and_not_the_number_of_chunks(make_config):
    folder, _, _ = claim(make_config(model={"prompt_chunks": 2}), resume=False)
    write_run(folder, status="running")
    longer = make_config(model={"prompt_chunks": 3})
    assert refusal(longer, True, prompt_facts([*CATS, Prompt("a long story")], DOGS)).startswith(
        "--resume: prompts: the prompts"
    )
    assert refusal(longer, True).startswith("--resume: model.prompt_chunks is 2 in ")


def test_evaluation_prompts_that_are_trained_on_are_counted():
    facts = prompt_facts(CATS, [*DOGS, Prompt("a dog", {"n": 1})])["eval.prompts"]
    assert (facts["count"], facts["distinct"], facts["trained_too"]) == (3, 2, 1)
    assert prompt_facts(CATS, DOGS[:1])["eval.prompts"]["trained_too"] == 0


def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_is_changed(begin, make_config):
    folder = begin(0, 1)
    before = contents(folder)
    newest = folder / "checkpoints" / "iteration-000001"
    message = refusal(make_config(ema={"decay": 0.5}), resume=True)
    assert message.startswith("--resume: ema.decay is None")  # the configuration first
    (newest / "state.pt").rename(newest / "elsewhere.pt")
    assert refusal(make_config(), resume=True).startswith(f"cannot read the checkpoint {newest}: ")
    (newest / "elsewhere.pt").rename(newest / "state.pt")
    assert contents(folder) == before


# --- config.yaml and run.json -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_run_left_without_its_configuration_is_not_built_on(begin, make_config, resume):
    folder = begin(1)
    (folder / "config.yaml").unlink()
    assert refusal(make_config(), resume).startswith(
        f"output_dir: {folder} holds metrics.jsonl of a run, but not its config: "
    )
    assert not (folder / "config.yaml").exists()


def test_a_torn_run_json_does_not_stop_a_run(begin):
    folder = begin()
    (folder / "run.json").write_text('{"status": "runn')
    write_run(folder, status="finished")
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_folder_without_a_configuration_holds_no_run(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path} holds no run: it has no config.yaml$"):
        read_run_config(tmp_path)


def test_run_json_keeps_the_start_and_says_how_the_run_ended(tmp_path):
    write_run(tmp_path, status="running", machine={"cpus": 2})
    first = json.loads((tmp_path / "run.json").read_text())
    assert first["status"] == "running" and first["finished"] is None and first["message"] is None
    assert first["machine"] == {"cpus": 2} and "torch" in first["versions"] and first["command"]
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace(first["started"], "2026-01-02T10:00:00+00:00"))

    write_run(tmp_path, status="failed", message="the loss is not finite")
    last = json.loads(path.read_text())
    assert last["started"] == "2026-01-02T10:00:00+00:00"
    assert (last["status"], last["message"]) == ("failed", "the loss is not finite")
    assert datetime.fromisoformat(last["finished"]) > datetime.fromisoformat(last["started"])
    assert {key: last[key] for key in ("machine", "versions", "command")} == {
        key: first[key] for key in ("machine", "versions", "command")
    }

    write_run(tmp_path, status="running", machine={"cpus": 4})
    again = json.loads(path.read_text())
    assert (again["status"], again["message"], again["finished"]) == ("running", None, None)
    assert again["machine"] == {"cpus": 4} and again["started"] == last["started"]


def test_the_command_in_run_json_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/bin/fastloop", "train", "my recipe.yaml", "sampling.negative_prompt=a 'b'"])
    write_run(tmp_path, status="running", machine={})
    command = json.loads((tmp_path / "run.json").read_text())["command"]
    assert shlex.split(command) == ["fastloop", "train", "my recipe.yaml", "sampling.negative_prompt=a 'b'"]


def test_the_configuration_in_the_folder_is_plain_yaml(begin):
    values = yaml.safe_load((begin() / "config.yaml").read_text())
    assert values["optimizer"]["lr"] == 0.01 and values["model"]["lora"]["rank"] == 2
