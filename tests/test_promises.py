"""What every script promises of a run: stopping, continuing, its files, bad input (one test each).

A run is small and on made-up data (runs.py), in this process but where the promise is about one.
"""

import inspect
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
import tyro
from filelock import FileLock
from PIL import Image
from runs import CASES, contents, flags_of, ft, names, read_result, scalars, start, stop, wait_for

PLAYING = ("atari", "dmc", "finetune")
SCRIPTS = ("atari", "dmc", "synth", "finetune")


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def run_dir(case, tmp_path):
    return tmp_path / case.dir


def only(*names):
    """For promises of these kinds of run alone."""
    return pytest.mark.parametrize("case", names, indirect=True)


def mostly_slow(first, *others):
    """For tests that take long: one kind of run by default."""
    return only(first, *(pytest.param(name, marks=pytest.mark.slow) for name in others))


def stopped(play, case, step=None, **flags):
    """A run stopped by SIGTERM in this step, in its middle if not told otherwise."""
    with pytest.raises(SystemExit) as exit_info:
        play(case, {step or case.steps * 2 // 3: stop}, **flags)
    assert exit_info.value.code == 143


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pth", weights_only=True)


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


# --- Continuing -----------------------------------------------------------------------------------

DIFFERENT = "training_seconds wall_clock_seconds env_steps_per_second updates_per_second charts/SPS"
DIFFERENT += " charts/updates_per_second args resumed_at git_commits"


def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(case, play, tmp_path):
    """Stopped where an episode ends, as the environment's state is not kept; at the end, too."""
    left = []
    for stops in (case.stops[-1:], case.stops):
        flags = dict(resume=True, run_dir=str(tmp_path / str(len(stops))), **case.busy)
        run_dir = tmp_path / str(len(stops)) / case.dir
        for before, step in zip((0, *stops[:-1]), stops, strict=True):
            stopped(play, case, step - before, **flags)
            torch.manual_seed(999)  # nothing may come from this process
        checkpoint = load(run_dir)
        assert play(case, **flags) == 0
        result, logged = read_result(run_dir), scalars(run_dir)
        assert (result[case.counter], result["resumed_at"]) == (case.steps, list(stops))
        assert result["git_commits"] == [case.script.git_commit()] * (len(stops) + 1)
        assert case.tag in logged
        state = checkpoint["tensors"] | checkpoint.get("generators", {})
        state = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
        left.append(result | logged | state)
    whole, broken = left
    assert whole.keys() == broken.keys()
    different = {name for name in whole if whole[name] != broken[name]}
    assert different - set(DIFFERENT.split()) == set()


def test_a_continued_run_counts_the_seconds_of_all_its_processes(case, play, run_dir):
    stopped(play, case)
    checkpoint = load(run_dir)
    checkpoint["counters"]["wall_clock_seconds"] += 1000
    torch.save(checkpoint, run_dir / "checkpoint.pth")
    play(case, resume=True)
    assert read_result(run_dir)["wall_clock_seconds"] > 1000


def test_a_run_stays_until_told_and_the_new_one_can_begin(case, play, run_dir, monkeypatch):
    name, value = next(iter(case.other.items()))
    stopped(play, case)
    (run_dir / "mine.txt").write_text("mine")
    left_by_a_kill = ["checkpoint.pth.tmp"]
    if case is not CASES["synth"]:  # which writes no video
        left_by_a_kill.append("video.gif.tmp")
    for name_left in left_by_a_kill:
        (run_dir / name_left).write_text("half")
    for kind in ("an unfinished", "a finished"):
        before = contents(run_dir)
        with pytest.raises(SystemExit, match=f"holds {kind} run; pass --resume or --overwrite"):
            play(case)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(case.script, case.make, lambda *_: 1 / 0)
            play(case, overwrite=True)
        assert contents(run_dir) == before
        assert play(case, overwrite=True, **{name: value}) == case.steps
        result = read_result(run_dir)
        assert (result["args"][name], result["resumed_at"]) == (value, [])
        assert len(list(run_dir.glob("events*"))) == 1
    kept = {".lock", "events.out", "result.json", "mine.txt"}
    assert names(run_dir) - {"model.pth"} == kept


def test_no_flag_of_training_may_change(case):
    sections = re.split(r"\n    # (?=[A-Z])", inspect.getsource(case.script.Args))
    training = [s for s in sections[1:] if not s.startswith(("Run", "Evaluation", "Metrics"))]
    flags = re.findall(r"^    (\w+): ", "\n".join(training), re.MULTILINE)
    assert "learning_rate" in flags and "layer_norm" in flags
    assert case.script.MAY_CHANGE.isdisjoint(flags)


def test_resume_begins_goes_on_refuses_other_flags_by_name_and_leaves_a_finished_run_alone(
    case, play, run_dir, data
):
    stopped(play, case, resume=True)
    args = case.script.Args(**flags_of(case, data))
    for steps_left in (case.steps // 3, 0):
        before = contents(run_dir)
        for name, value in case.other.items():
            was = f"was made with {name}={getattr(args, name)}; pass the same"
            with pytest.raises(SystemExit) as exit_info:
                play(case, resume=True, **{name: value})
            assert was in exit_info.value.code
        assert contents(run_dir) == before
        if steps_left == 0:
            (run_dir / "checkpoint.pth").write_bytes(b"left by a kill after the result")
        assert play(case, resume=True, torch_threads=2) == steps_left
    assert contents(run_dir) == before


def test_a_run_goes_on_in_another_place_with_other_intervals(case, play, run_dir, tmp_path):
    stopped(play, case)
    shutil.move(run_dir, tmp_path / "moved" / case.dir)
    flags = dict(log_interval=5, checkpoint_interval=7, cuda_graph=False, torch_threads=2)
    if "eval_episodes" in case.flags:
        flags |= dict(eval_interval=25, save_model=True)
    steps = play(case, resume=True, run_dir=str(tmp_path / "moved"), **flags)
    assert steps == case.steps // 3
    if "eval_interval" in flags:
        logged = scalars(tmp_path / "moved" / case.dir)["eval/mean_return"]
        assert [step for step, _ in logged] == [25, 30]


@only(*PLAYING, "pretrain")
def test_on_another_device_a_run_goes_on_with_new_draws_there(case, play, run_dir, data):
    stopped(play, case)
    args, path = case.script.Args(**flags_of(case, data)), run_dir / "checkpoint.pth"
    for flag in ("device", "replay_device") if case is CASES["dmc"] else ("device",):
        checkpoint = load(run_dir)
        checkpoint["args"][flag] = "cuda"  # whose generators' states have another length
        saved = checkpoint["generators"]
        stayed = {"torch"} & saved.keys()  # PyTorch's own on the CPU
        for name in saved.keys() - stayed:
            saved[name] = torch.zeros(16, dtype=torch.uint8)
        torch.save(checkpoint, path)
        generators = {name: torch.Generator() for name in saved}
        case.script.load_checkpoint(path, args, generators, {})
        states = {name: generator.get_state() for name, generator in generators.items()}
        assert {name for name in saved if torch.equal(states[name], saved[name])} == stayed
        stopped(play, case, 3, resume=True)
    play(case, resume=True)
    assert read_result(run_dir)[case.counter] == case.steps


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


FOREIGN = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "with code": lambda path: torch.save({"args": Evil(), "target": Evil()}, path),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Evil(), 2)),
    "of another kind": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


def test_a_foreign_file_gets_one_line_runs_no_code_and_stays(case, play, run_dir, monkeypatch):
    stopped(play, case)
    monkeypatch.chdir(run_dir)
    path = run_dir / "checkpoint.pth"
    loaders = {"a checkpoint of this script": lambda: play(case, resume=True)}
    if case is CASES["pretrain"]:
        loaders["an encoder in SimTPR's layout"] = lambda: ft.load_pretrained(str(path))
    elif case is not CASES["synth"]:
        args = case.script.Args(evaluate=str(path))
        loaders["a model that this script saved"] = lambda: case.script.evaluate_saved(args)
    for write in FOREIGN.values():
        write(path)
        before = contents(run_dir)
        for what, load_it in loaders.items():
            with pytest.raises(SystemExit, match=rf"checkpoint.pth: not {what}[^\n]* \(\w+[^\n]*$"):
                load_it()
        assert contents(run_dir) == before  # of which contents() fails at a new directory


def test_what_cannot_be_read_is_not_called_foreign(case, play, run_dir):
    (run_dir / "checkpoint.pth").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        play(case, resume=True)


@only(*PLAYING)
def test_a_model_that_cannot_be_read_is_not_called_foreign(case, tmp_path):
    path = tmp_path / "model.pth"
    path.touch()
    args = case.script.Args(evaluate=str(path), device="cpu")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        case.script.evaluate_saved(args)


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_it_is_on_disk(tmp_path, monkeypatch):
    """Not on a disk that is full, or, here, where no file may have more than 100 kB."""
    path, order = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: order.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("replace") or replace(*names))
    ft.write_atomically(path, lambda file: order.append("write") or file.write(b"new"))
    assert (path.read_bytes(), order) == (b"new", ["write", "fsync", "replace"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):  # torch.save says something else
            ft.write_atomically(path, lambda file: torch.save(torch.ones(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"new"


def test_all_files_are_written_in_one_step_and_the_result_last(case, play, run_dir, monkeypatch):
    written, original = [], case.script.write_atomically

    def spy(path, write):
        assert not (path.parent / "result.json").exists()
        written.append(path.name)
        original(path, write)

    monkeypatch.setattr(case.script, "write_atomically", spy)
    flags = {}
    if "eval_episodes" in case.flags:
        flags = dict(save_model=True, capture_video=True)
        monkeypatch.setattr(case.script, "save_gif", lambda frames, file: None)
    play(case, checkpoint_interval=5, **flags)
    assert written[0] == "checkpoint.pth" and written[-1] == "result.json"
    assert names(run_dir) == {*written, ".lock", "events.out"} - {"checkpoint.pth"}


def test_checkpoints_are_written_when_they_should_be(case, play, monkeypatch):
    """Every so many steps; or every 5 minutes, here of 60 seconds a step; at the end of training
    where an evaluation follows."""
    saved, steps, original, clock = [], [], case.script.save_checkpoint, time.perf_counter
    count = lambda: steps.append(0)  # noqa: E731
    monkeypatch.setattr(case.script.time, "perf_counter", lambda: clock() + 60 * len(steps))
    spy = lambda *call: saved.append(len(steps)) or original(*call)  # noqa: E731
    monkeypatch.setattr(case.script, "save_checkpoint", spy)
    last = {case.steps} if "eval_episodes" in case.flags else set()
    for interval, due in ((0, None), (7, 7), ("auto", 5)):
        saved.clear(), steps.clear()
        every_step = dict.fromkeys(range(1, case.steps + 1), count)
        play(case, every_step, checkpoint_interval=interval, exp_name=f"{interval}")
        assert saved == (sorted({*range(due, case.steps + 1, due)} | last) if due else [])


def test_what_a_dead_process_logged_too_much_is_not_shown(case, play, run_dir, monkeypatch):
    writers, make = [], case.script.SummaryWriter
    keep = lambda *args, **flags: writers.append(make(*args, **flags)) or writers[-1]  # noqa: E731
    monkeypatch.setattr(case.script, "SummaryWriter", keep)
    checkpoint, death = case.steps // 3, case.steps // 2 + 1
    flags = dict(checkpoint_interval=checkpoint, log_interval=1)
    with pytest.raises(ZeroDivisionError):
        play(case, {death: lambda: (writers[0].close(), 1 / 0)}, **flags)
    steps = [step for step, _ in scalars(run_dir)[case.tag]]
    assert steps[-1] == death - 1
    assert play(case, resume=True, **flags) == case.steps - checkpoint
    logged = scalars(run_dir)
    assert [step for step, _ in logged[case.tag]] == list(range(steps[0], case.steps + 1))
    for series in logged.values():
        assert [step for step, _ in series] == sorted({step for step, _ in series})


@pytest.mark.parametrize("what", ["evaluate", "finish"])
@only(*PLAYING)
def test_an_interrupted_end_is_repeated_and_only_that(case, what, play, run_dir, monkeypatch):
    """A signal ends it at once: the last step has a checkpoint."""

    def interrupted(*_):
        assert handlers() == [signal.SIG_DFL] * 2
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(case.script, what, getattr(case.script, what))  # which comes back
        play(case, {case.steps: lambda: setattr(case.script, what, interrupted)})
    assert play(case, resume=True) == 0
    assert read_result(run_dir)["resumed_at"] == [case.steps]
    assert [step for step, _ in scalars(run_dir)["eval/mean_return"]] == [case.steps]


def test_two_processes_never_work_in_one_directory(case, play, run_dir):
    run_dir.mkdir()
    refused = pytest.raises(SystemExit, match=f"another process is at work in {run_dir}")
    with FileLock(run_dir / ".lock"), refused:
        play(case, overwrite=True)
    assert names(run_dir) == {".lock"}
    assert play(case) == case.steps


# --- Signals, numbers that are not finite, Weights & Biases ---------------------------------------


def test_a_second_signal_ends_the_process_at_once(case, play, capfd):
    seen = []
    look = lambda: seen.append(handlers())  # noqa: E731
    with pytest.raises(SystemExit) as exit_info:
        play(case, {4: look, 5: lambda: (stop(signal.SIGINT), look())})
    assert exit_info.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1].split()[-1] == "5"  # stopped after step 5
    assert signal.SIG_DFL not in seen[0] and seen[1] == [signal.SIG_DFL] * 2


def test_a_stopped_run_says_how_it_goes_on_if_it_can(case, play, run_dir, capfd):
    for interval, can in ((0, False), ("auto", True)):
        stopped(play, case, 5, checkpoint_interval=interval, overwrite=True)
        last_line = capfd.readouterr().err.splitlines()[-1]
        assert ("--resume" in last_line) == (run_dir / "checkpoint.pth").exists() == can
    stopped(play, case, 2, checkpoint_interval=0, resume=True)  # goes on after 5, not after 7
    assert "--resume" not in capfd.readouterr().err.splitlines()[-1]


@only(*PLAYING)
def test_a_signal_during_the_last_checkpoint_comes_before_the_evaluation(
    case, play, run_dir, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        save = case.script.save_checkpoint
        patch.setattr(case.script, "save_checkpoint", lambda *call: (save(*call), stop()))
        play(case)
    assert not (run_dir / "result.json").exists()
    assert play(case, resume=True) == 0
    assert read_result(run_dir)["resumed_at"] == [case.steps]


@only(*PLAYING, "pretrain")
def test_a_number_that_is_not_finite_ends_the_run(case, play, run_dir, monkeypatch):
    """Before whatever is logged next, and before a checkpoint. Synthetic replicas go on."""
    broken, original = [], getattr(case.script, case.loss)
    log, checkpoint = case.steps // 2 + 1, case.steps // 4
    faulty = lambda *call: original(*call) * (math.nan if broken else 1)  # noqa: E731
    monkeypatch.setattr(case.script, case.loss, faulty)
    logged = ["log_interval"]
    if case is not CASES["pretrain"]:
        logged += ["eval_interval", "metrics_interval"]
    for due, flags in (
        *((log, {"log_interval": 1000, "checkpoint_interval": 0, name: log}) for name in logged),
        (3 * checkpoint, dict(log_interval=1000, checkpoint_interval=checkpoint)),
    ):
        broken.clear()
        message = rf"step {due}: \w+ is not finite; lower the learning rate"
        with pytest.raises(SystemExit, match=message):
            play(case, {due - 1: lambda: broken.append(0)}, **flags)
    saved = load(run_dir)
    assert saved["counters"][case.counter] == 2 * checkpoint
    assert all(tensor.isfinite().all() for tensor in saved["tensors"].values())
    assert not (run_dir / "result.json").exists()


@only("dmc")
def test_weights_that_are_not_finite_are_neither_evaluated_nor_played(case, play, monkeypatch):
    """MuJoCo cannot simulate their actions."""
    broken, original = [], case.script.td_loss
    faulty = lambda *call: original(*call) * (math.nan if broken else 1)  # noqa: E731
    monkeypatch.setattr(case.script, "td_loss", faulty)
    for step, flags in ((16, dict(eval_interval=16)), (17, {})):
        broken.clear()
        flags |= dict(log_interval=1000, checkpoint_interval=0)
        with pytest.raises(SystemExit, match=rf"step {step}: \w+ is not finite"):
            play(case, {15: lambda: broken.append(0)}, **flags)


def test_weights_and_biases_goes_on_under_the_same_id(case, play, monkeypatch):
    calls, spec = [], ModuleSpec("wandb", None)
    init = lambda **call: calls.append(call) or SimpleNamespace(id="id7")  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=spec))
    flags = dict(track=True, wandb_project_name="p", wandb_entity="e")
    with pytest.raises(ValueError, match="pip install wandb"):
        play(case, **flags)  # a mere folder, as its runs leave one, has no origin
    spec.origin = "here"
    stopped(play, case, **flags)
    play(case, resume=True, **flags)
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("id7", "allow")]
    assert (calls[0]["project"], calls[0]["entity"], calls[0]["name"]) == ("p", "e", case.dir)
    assert calls[0]["sync_tensorboard"] is True and "sam_rho" in calls[0]["config"]


# --- Flags ----------------------------------------------------------------------------------------

# Bad ones, and a word that the message must have, where it is not the first flag itself.
BAD_FLAGS = {
    "all": """
        --exp-name a/b | --exp-name .. | --exp-name bell\a | --resume --overwrite | --batch-size 0
        --torch-threads 100000 | --learning-rate inf | --learning-rate 0 | --sam-rho -0.1
        --track => pip install wandb
        --device cuda => PyTorch finds no CUDA device
    """,
    "atari": """
        --env-id Alein => Alien | --env-id montezuma_revenge => MontezumaRevenge
        --env-id ../x => no such game | --seed 200001 | --gamma 1.01 | --n-atoms 1
        --learning-starts 19 => --n-step | --buffer-size 19 => --n-step
        --learning-starts 100000 => --total-timesteps | --v-min 10 | --v-max inf
        --shrink-perturb-alpha 0.5 --reset-interval 0 | --evaluate missing.pth => missing.pth
    """,
    "dmc": """
        --env-id walker-fly => walker- | --env-id lqr-lqr_2_1 => no such task | --seed 200001
        --total-timesteps 2000 => --learning-starts | --learning-starts 1 | --image-size 8
        --aug-shift 16 | --evaluate no.pth => no.pth
        --device cpu --replay-device cuda => --replay-device
    """,
    "synth": """
        --learning-rate 0.1 0.1 | --weight-decay 0 0.1 0 | --learning-rate | --num-stages 50001
        --conv-strides 3 3 0 | --conv-strides 4 4 4 | --l2-init --weight-decay 0
        --shrink-perturb-alpha 0.5 --reset-interval 0
    """,
    "finetune": """
        --env-id Alein => Alien | --seed 200001
        --video-dir . => --mode pretrain
        --pretrained-path x => one of them | --no-from-scratch => --from-scratch
        --no-from-scratch --pretrained-path missing.pth => missing.pth | --v-min 10
        --learning-starts 19 => --n-step | --total-timesteps 2000 | --evaluate no.pth => no.pth
    """,
    "pretrain": """
        --from-scratch => --mode finetune | --pretrained-path x => --mode finetune
        --video-dir missing => missing: not a directory
        --collect-steps 13 | --pretrain-length 2 | --pretrain-batch-size 0 | --pretrain-epochs 0
    """,
}
MODES = {"finetune": ["--from-scratch"], "pretrain": ["--mode", "pretrain"]}


def bad_flags():
    """(name of a case, flags, a word) of all of the above."""
    for name, text in BAD_FLAGS.items():
        for item in text.strip().replace("\n", "|").split("|"):
            flags, _, word = item.strip().partition(" => ")
            for script in SCRIPTS if name == "all" else (name,):
                yield script, flags, word or flags.split()[0].removeprefix("--no-")


@pytest.mark.parametrize("name, flags, word", list(bad_flags()))
def test_a_bad_flag_gets_one_message_and_code_2_and_nothing_is_written(
    name, flags, word, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # absent
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(CASES[name].script.Args, args=[*MODES.get(name, []), *flags.split(" ")])
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert word in error
    assert error.count("For full helptext") == 1  # tyro's box
    assert list(tmp_path.iterdir()) == []


@only(*SCRIPTS)
def test_no_number_may_be_negative_or_nan(case):
    script, mode = case.script, dict(from_scratch=True) if case is CASES["finetune"] else {}
    for flag, default in vars(script.Args(**mode)).items():
        if isinstance(default, int | float | tuple) and not isinstance(default, bool):
            bad = {int: -1, float: math.nan, tuple: (-1, -1, -1)}[type(default)]
            with pytest.raises(ValueError):
                script.Args(**mode | {flag: bad})
                pytest.fail(f"{flag} may be {bad}")


def test_a_directory_that_cannot_be_is_one_line_and_code_1(case, tmp_path, data, monkeypatch):
    """As the script's own last lines have it."""
    (tmp_path / "file").touch()
    flags = flags_of(case, data, run_dir=str(tmp_path / "file" / "runs"))
    monkeypatch.setattr(sys, "argv", [case.script.__file__, *runs.words(flags)])
    with pytest.raises(SystemExit, match=r"^error: \[Errno \d+\] .*file[^\n]*$"):
        runpy.run_path(case.script.__file__, run_name="__main__")


# --- What is played, stored and reported ----------------------------------------------------------


@pytest.fixture
def kept_agent(case, monkeypatch):
    """What make_agent() has made: agent, replay and functions."""
    made, make_agent = [], case.script.make_agent

    def keep(*call):
        made.extend(make_agent(*call))
        return made

    monkeypatch.setattr(case.script, "make_agent", keep)
    return made


@only(*PLAYING)
def test_after_random_actions_the_agent_acts_and_what_happens_is_stored(case, play, monkeypatch):
    """Eight steps are random. Atari's rewards are clipped, and a lost life (the sixth step of ten)
    ends the return; Control's rewards (here sums of actions) are stored as they come."""
    stored, add = [], case.script.ReplayBuffer.add

    def spy(replay, action, reward, done, frame):
        stored.append((np.array(action), reward, bool(done)))
        add(replay, action, reward, done, frame)

    chosen = torch.full((1, 2), 0.25) if case is CASES["dmc"] else torch.tensor([2])
    monkeypatch.setattr(case.script.ReplayBuffer, "add", spy)
    acts = []
    monkeypatch.setattr(case.script.Agent, "act", lambda *_: acts.append(0) or chosen)
    play(case)
    assert len(acts) == 22
    actions, rewards, dones = zip(*stored, strict=True)
    of_the_agent = [(action == chosen[0].numpy()).all() for action in actions]
    assert all(of_the_agent[8:]) and not all(of_the_agent[:8])
    if case is CASES["dmc"]:
        assert rewards == pytest.approx([action.sum() for action in actions])
        assert not any(dones)
    else:
        times = 3 * [*range(1, 11)]
        assert list(rewards) == [np.sign(runs.Recording.rewards[time, 0]) for time in times]
        assert list(dones) == [time in (6, 10) for time in times]


@pytest.mark.parametrize("interval", [10, 23])
@only(*PLAYING)
def test_resets_count_updates_and_none_is_on_the_last_step(
    case, interval, play, run_dir, monkeypatch
):
    """By a loop of its own: steps 8 to 30 have three updates each, 69 in all."""
    happened, agent_class = [], case.script.Agent
    update, reset = agent_class.update, agent_class.reset
    monkeypatch.setattr(agent_class, "update", lambda *a: happened.append("u") or update(*a))
    monkeypatch.setattr(agent_class, "reset", lambda *a: happened.append("r") or reset(*a))
    ratio = "updates_per_step" if case is CASES["dmc"] else "replay_ratio"
    play(case, reset_interval=interval, **{ratio: 3})
    expected, updates = [], 0
    for step in range(8, 31):
        for _ in range(3):
            expected.append("u")
            updates += 1
            if updates % interval == 0 and step < 30:
                expected.append("r")
    assert happened == expected
    result, resets = read_result(run_dir), expected.count("r")
    assert (result["gradient_updates"], result["resets"]) == (updates, resets)
    assert scalars(run_dir)["charts/resets"][-1] == (30, resets)


@only("atari", "finetune")
def test_every_evaluation_is_of_the_target_network(case, play, kept_agent, monkeypatch):
    played, replace = [], runs.replace

    def watched(patch, *rest):
        replace(patch, *rest)
        patch.setattr(case.script, "evaluate", lambda network, *_: played.append(network) or [1.0])

    monkeypatch.setattr(runs, "replace", watched)
    play(case, eval_interval=10)
    agent, *_ = kept_agent
    assert len(played) == 3 and all(network is agent.target for network in played)


@only(*PLAYING)
def test_no_replay_is_larger_than_its_flag(case, play, kept_agent):
    """But for what an n-step window, or the stacks of two episodes of ten steps, need."""
    play(case, buffer_size=12)
    _, replay, *_ = kept_agent
    assert replay.num_slots == 12 + (2 + 3 if case is CASES["dmc"] else 4)


@only(*PLAYING)
def test_the_score_is_the_mean_of_all_games(case, play, run_dir, monkeypatch, capsys):
    """On Alien a random policy has 227.8, a human 7,127.7."""
    replace = runs.replace

    def with_three_games(patch, *rest):
        replace(patch, *rest)
        patch.setattr(case.script, "evaluate", lambda *_: [1.0, 2.0, 6.0])

    monkeypatch.setattr(runs, "replace", with_three_games)
    play(case)
    result, logged = read_result(run_dir), scalars(run_dir)
    assert "mean return 3.0 over 3 " in capsys.readouterr().out
    assert result["mean_return"] == 3
    assert [value for _, value in logged["eval/mean_return"]] == [3]
    if case is not CASES["dmc"]:
        score = pytest.approx((3 - 227.8) / (7127.7 - 227.8))
        assert result["human_normalized_score"] == score


@only(*PLAYING)
def test_each_seed_has_random_numbers_of_its_own(case, play, monkeypatch):
    """And each generator; the environment has the run's seed."""
    draws, flags = set(), dict(from_scratch=True) if case is CASES["finetune"] else {}
    for seed in (1, 2):
        args = case.script.Args(seed=seed, device="cpu", **flags)
        generators = case.script.make_generators(args).values()
        draws |= {torch.rand((), generator=generator).item() for generator in generators}
    assert len(draws) == 2 * len(generators)
    env = runs.Scripted if case is CASES["dmc"] else runs.Recording
    monkeypatch.setattr(env, "seeds", [])
    play(case, seed=5)
    assert env.seeds[0] == 5


@only("atari", "finetune")
def test_replay_schedule_and_optimizer_have_the_flags(case, play, run_dir, kept_agent):
    """n = 3; importance weights end with the last update."""
    play(case, gamma=0.5, adam_eps=0.25, learning_rate=0.125, replay_ratio=3)
    agent, replay, *_ = kept_agent
    assert replay.gammas.tolist() == [1, 0.5, 0.25, 0.125]
    assert agent.num_updates == read_result(run_dir)["gradient_updates"] == 23 * 3
    assert (agent.optimizer.defaults["eps"], agent.optimizer.defaults["lr"]) == (0.25, 0.125)


@only(*PLAYING)
def test_the_target_begins_as_what_it_follows(case, play, monkeypatch):
    made, agent_class = [], case.script.Agent

    class Kept(agent_class):
        def __init__(self, *rest):
            super().__init__(*rest)
            online = self.critic if case is CASES["dmc"] else self.online
            made.append(zip(online.parameters(), self.target.parameters(), strict=True))
            assert all(torch.equal(w, w_target) for w, w_target in made[0])

    monkeypatch.setattr(case.script, "Agent", Kept)
    play(case)
    assert made


# --- Real games and tasks -------------------------------------------------------------------------


def test_a_process_of_its_own_makes_a_short_run(case, tmp_path, run_dir, data, capsys):
    """No warnings, no bar where there is no terminal; the saved model plays its games again."""
    flags = flags_of(case, data, run_dir=".") | case.busy | case.real
    plays = "eval_episodes" in flags
    if plays:
        flags |= dict(capture_video=True, eval_interval=0)
    if case is CASES["pretrain"]:
        del flags["video_dir"]
        flags["collect_steps"] = 17
    process = start(case, flags, tmp_path)
    output, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n"), output.count("\n")) == (0, 1, 1), error
    script, result, logged = case.script, read_result(run_dir), scalars(run_dir)
    assert f"; {case.dir}/" in output
    assert (Path(script.__file__).name, "x") == (result["script"], result["exp_name"])
    assert set(result["args"]) == set(script.Args.__dataclass_fields__)
    assert {"torch", "python"} <= set(result["versions"]) and result["device"].startswith("cpu, ")
    assert result[case.counter] == case.steps and result["resumed_at"] == []
    assert case.tag in logged
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    if not plays:
        return
    assert [result["mean_return"]] == result["episode_returns"]
    assert result["resets"] >= 2
    rates = result["updates_per_second"] / result["env_steps_per_second"]
    assert rates == pytest.approx(result["gradient_updates"] / result["env_steps"])
    assert logged["eval/mean_return"] == [(case.steps, pytest.approx(result["mean_return"]))]
    if flags["metrics_interval"] > 0:
        assert {"plasticity/hessian_max_eigenvalue", "plasticity/active_units/head"} <= set(logged)
    with Image.open(run_dir / "video.gif") as video:
        assert video.n_frames > 1

    again = dict(evaluate=str(run_dir / "model.pth"), device="cpu", seed=9, eval_episodes=1)
    args = script.Args(**again, capture_video=True)
    capsys.readouterr()
    script.evaluate_saved(args)
    assert output == f"{capsys.readouterr().out.strip()}; {case.dir}/result.json\n"
    assert (run_dir / "model.pth.gif").read_bytes() == (run_dir / "video.gif").read_bytes()
    with pytest.raises(SystemExit, match="exists; pass --overwrite"):
        script.evaluate_saved(args)


@only(*PLAYING)
def test_a_saved_model_plays_with_its_own_flags_but_for_the_commands(
    case, play, run_dir, kept_agent, monkeypatch
):
    """It is the target network, or Control's critic and actor, to the last digit."""
    play(case, save_model=True)
    played, args = [], dict(evaluate=str(run_dir / "model.pth"), seed=9, eval_episodes=7)
    monkeypatch.setattr(case.script, "evaluate", lambda *call: played.append(call) or [1.0])
    if case is not CASES["dmc"]:
        args |= dict(env_id="Pong", eval_epsilon=0.25)
    case.script.evaluate_saved(case.script.Args(**args))
    ((network, args, video),) = played
    agent, pairs = kept_agent[0], []
    if case is CASES["dmc"]:
        pairs += [(network.actor, agent.actor)]
        pairs += [(network.critic.backbone, agent.critic.backbone)]
    else:
        pairs += [(network, agent.target)]
    for saved, kept in pairs:
        torch.testing.assert_close(saved.state_dict(), kept.state_dict(), rtol=0, atol=0)
    assert (args.env_id, args.seed, args.eval_episodes, video) == (case.dir[:-6], 1, 7, None)
    assert case is CASES["dmc"] or args.eval_epsilon == 0.25


@mostly_slow(*PLAYING)
def test_equal_seeds_give_equal_runs_and_measuring_changes_nothing(case, tmp_path, data):
    models, measured = [], dict(metrics_interval=20, eval_interval=15, log_interval=1)
    for others in ({}, measured, dict(seed=2)):
        directory = tmp_path / str(len(models))
        flags = flags_of(case, data, run_dir=str(directory), save_model=True, reset_interval=15)
        case.script.run(case.script.Args(**flags | case.real | others))
        (path,) = directory.glob("*/model.pth")
        model = torch.load(path, weights_only=True)
        models.append(model["actor"] if case is CASES["dmc"] else model["target"])
    equal = [all(torch.equal(model[key], w) for key, w in models[0].items()) for model in models]
    assert equal == [True, True, False]


def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def begin(case, flags, checkpoint):
    """A process that has written a new checkpoint."""
    before = written(checkpoint)
    process = start(case, flags, checkpoint.parents[1])
    wait_for(lambda: written(checkpoint) > before, process)
    return process


@mostly_slow("synth", "atari", "dmc", "finetune", "pretrain")
def test_processes_ended_again_and_again_make_an_unbroken_run(case, tmp_path, run_dir, data):
    """SIGKILL, at random moments, loses what is newer than the checkpoint. SIGTERM and Ctrl-C lose
    nothing, also where nobody reads the messages: in `2>&1 | tee log`, tee dies of Ctrl-C first.
    A closed standard output ends no run."""
    resumed_at, rng = [], random.Random(0)
    flags = flags_of(case, data, resume=True, checkpoint_interval=5, run_dir=".")
    flags |= case.real | case.longer
    for signum in [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]:
        process = begin(case, flags, run_dir / "checkpoint.pth")
        if signum == signal.SIGINT:
            process.stderr.close()
        time.sleep(rng.uniform(0, 0.1))
        before = written(run_dir / "checkpoint.pth")
        process.send_signal(signum)
        code = process.wait(60)
        resumed_at.append(load(run_dir)["counters"][case.counter])
        if signum == signal.SIGKILL:
            assert code == -signum, "finished before the kill: more steps"
            assert resumed_at[-1] % 5 == 0
        else:
            assert code not in (0, -signum) and written(run_dir / "checkpoint.pth") > before
        if signum == signal.SIGTERM:
            assert process.stderr.read().splitlines()[-1].split()[-1] == str(resumed_at[-1])
    process = start(case, flags, tmp_path, "exec >&-;")
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (0, 1), error
    result, logged = read_result(run_dir), scalars(run_dir)
    assert result["resumed_at"] == resumed_at == sorted(set(resumed_at))
    for series in logged.values():
        assert [step for step, _ in series] == sorted({step for step, _ in series})
    assert names(run_dir) - {"model.pth"} == {".lock", "events.out", "result.json"}
    if "eval_episodes" not in flags:  # all data are in files
        start(case, flags | dict(run_dir="whole"), tmp_path).communicate(timeout=300)
        assert scalars(tmp_path / "whole" / case.dir)[case.tag] == logged[case.tag]
