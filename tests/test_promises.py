"""What every script promises of a run: stopping, continuing, its files, bad input (one test each).

A run is small and on made-up data (runs.py), in this process but where the promise is about one.
"""

import math
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from filelock import FileLock
from PIL import Image
from runs import (
    CASES,
    atari,
    contents,
    dmc,
    flags_of,
    ft,
    names,
    read_result,
    scalars,
    start,
    stop,
    synth,
    wait_for,
    words,
)

SLOW = pytest.mark.slow  # where a test takes long, for all kinds of run but one
PLAYING = {name: case for name, case in CASES.items() if name in ("atari", "dmc", "finetune")}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def stopped(play, case, step=None, **flags):
    """A run stopped by SIGTERM in this step, in its middle if not told otherwise."""
    with pytest.raises(SystemExit) as exit_info:
        play(case, {step or case.steps * 2 // 3: stop}, **flags)
    assert exit_info.value.code == 143


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pth", weights_only=True)


# --- Continuing -----------------------------------------------------------------------------------

CLOCKS = {"training_seconds", "wall_clock_seconds", "resumed_at", "args", "exp_name"}
CLOCKS |= {"env_steps_per_second", "updates_per_second", "git_commits"}


def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(case, play, tmp_path):
    """Stopped where an episode ends, as the environment's state is not kept; at the end, too."""
    checkpoints, logged, results = [], [], []
    for stops in (case.stops[-1:], case.stops):
        flags = dict(resume=True, run_dir=str(tmp_path / str(len(stops))), **case.busy)
        run_dir = tmp_path / str(len(stops)) / case.dir
        for before, step in zip((0, *stops[:-1]), stops, strict=True):
            stopped(play, case, step - before, **flags)
            torch.manual_seed(999)  # nothing may come from this process
        checkpoints.append(load(run_dir))
        assert play(case, **flags) == 0
        logged.append(scalars(run_dir))
        results.append(read_result(run_dir))
        assert results[-1]["resumed_at"] == list(stops)
        assert results[-1]["git_commits"] == [case.script.git_commit()] * (len(stops) + 1)
    for part in ("tensors", "generators"):
        whole, broken = (checkpoint.get(part, {}) for checkpoint in checkpoints)
        assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []
    for one in results + [checkpoint["counters"] for checkpoint in checkpoints]:
        assert one[case.counter] == case.steps
        for name in CLOCKS & set(one):
            del one[name]
    assert results[0] == results[1]
    assert checkpoints[0]["counters"] == checkpoints[1]["counters"]
    for one in logged:
        one.pop("charts/SPS", one.pop("charts/updates_per_second", None))
    assert logged[0] == logged[1] and len(logged[0]) > 0


def test_what_is_there_is_neither_taken_up_nor_lost_without_being_told(case, play, tmp_path):
    run_dir = tmp_path / case.dir
    stopped(play, case)
    (run_dir / "mine.txt").write_text("mine")
    for kind in ("an unfinished", "a finished"):
        before = contents(run_dir)
        with pytest.raises(SystemExit, match=f"holds {kind} run; pass --resume or --overwrite"):
            play(case)
        assert contents(run_dir) == before
        name, value = next(iter(case.other.items()))
        assert play(case, overwrite=True, **{name: value}) == case.steps
        result = read_result(run_dir)
        assert (result["args"][name], result["resumed_at"]) == (value, [])
        assert len(list(run_dir.glob("events*"))) == 1
        kept = {".lock", "events.out", "result.json", "mine.txt"}
        assert names(run_dir) - {"model.pth"} == kept


def test_overwrite_removes_nothing_before_the_new_run_can_begin(case, play, tmp_path, monkeypatch):
    stopped(play, case)
    before = contents(tmp_path / case.dir)
    monkeypatch.setattr(case.script, case.make, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play(case, overwrite=True)
    assert contents(tmp_path / case.dir) == before


def test_resume_begins_where_there_is_nothing_and_leaves_a_finished_run_alone(case, play, tmp_path):
    assert play(case, resume=True) == case.steps
    before = contents(tmp_path / case.dir)
    (tmp_path / case.dir / "checkpoint.pth").write_bytes(b"left by a kill after the result")
    assert play(case, resume=True, torch_threads=2) == 0
    assert contents(tmp_path / case.dir) == before


def test_other_flags_are_refused_by_name(case, play, tmp_path, data):
    stopped(play, case)
    args = case.script.Args(**flags_of(case, data))
    for _ in ("unfinished", "finished"):
        before = contents(tmp_path / case.dir)
        for name, value in case.other.items():
            with pytest.raises(SystemExit) as exit_info:
                play(case, resume=True, **{name: value})
            was = f"was made with --{name.replace('_', '-')} {getattr(args, name)}; use that"
            assert was in exit_info.value.code
        assert contents(tmp_path / case.dir) == before
        play(case, resume=True)


def test_flags_that_change_nothing_of_the_run_may_change(case, play, tmp_path):
    stopped(play, case)
    shutil.move(tmp_path / case.dir, tmp_path / "moved" / case.dir)
    flags = dict(log_interval=5, checkpoint_interval=7, cuda_graph=False, torch_threads=2)
    if case in PLAYING.values():
        flags |= dict(eval_interval=25, save_model=True)
    steps = play(case, resume=True, run_dir=str(tmp_path / "moved"), **flags)
    assert steps == case.steps - case.steps * 2 // 3
    if "eval_interval" in flags:
        logged = scalars(tmp_path / "moved" / case.dir)["eval/mean_return"]
        assert [step for step, _ in logged] == [25, 30]


@pytest.mark.parametrize("name", [*PLAYING, "pretrain"])
def test_on_another_device_a_run_goes_on_with_new_draws(name, play, tmp_path):
    case = CASES[name]
    stopped(play, case)
    for flag in ("device", "replay_device") if name == "dmc" else ("device",):
        checkpoint = load(tmp_path / case.dir)
        checkpoint["args"][flag] = "cuda"  # whose generators' states have another length
        for generator in checkpoint["generators"]:
            checkpoint["generators"][generator] = torch.zeros(16, dtype=torch.uint8)
        torch.save(checkpoint, tmp_path / case.dir / "checkpoint.pth")
        stopped(play, case, 3, resume=True)
    play(case, resume=True)
    assert read_result(tmp_path / case.dir)[case.counter] == case.steps


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


FOREIGN = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file with code": lambda path: torch.save({"args": Evil(), "target": Evil()}, path),
    "another torch file": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


def test_a_foreign_file_gets_one_line_runs_no_code_and_stays(case, play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped(play, case)
    path = tmp_path / case.dir / "checkpoint.pth"
    loaders = {"checkpoint of this script": lambda: play(case, resume=True)}
    if case in PLAYING.values():
        args = case.script.Args(evaluate=str(path))
        loaders["model that this script saved"] = lambda: case.script.evaluate_saved(args)
    if case is CASES["pretrain"]:
        loaders["n encoder in SimTPR's layout"] = lambda: ft.load_pretrained(str(path))
        loaders["model that plastic_drq"] = lambda: ft.load_player(str(path), "Alien")
    for write in FOREIGN.values():
        write(path)
        before = contents(path.parent)
        for what, load_it in loaders.items():
            with pytest.raises(SystemExit, match=rf"checkpoint.pth: not a ?{what}.* \(\w+") as e:
                load_it()
            assert "\n" not in e.value.code
        assert contents(path.parent) == before
    assert not (tmp_path / "evil").exists()


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_it_is_on_disk(tmp_path, monkeypatch):
    path, order = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: order.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("replace") or replace(*names))
    atari.write_atomically(path, lambda file: order.append("write") or file.write(b"new"))
    assert (path.read_bytes(), order) == (b"new", ["write", "fsync", "replace"])
    with pytest.raises(ZeroDivisionError):
        atari.write_atomically(path, lambda file: (file.write(b"half"), 1 / 0))
    assert path.read_bytes() == b"new"


def test_all_files_are_written_in_one_step_and_the_result_last(case, play, tmp_path, monkeypatch):
    written, original = [], case.script.write_atomically

    def spy(path, write):
        assert not (path.parent / "result.json").exists()
        written.append(path.name)
        original(path, write)

    monkeypatch.setattr(case.script, "write_atomically", spy)
    flags = dict(save_model=True, capture_video=True) if case in PLAYING.values() else {}
    if flags:
        monkeypatch.setattr(case.script, "save_gif", lambda frames, file: None)
    play(case, checkpoint_interval=5, **flags)
    assert written[0] == "checkpoint.pth" and written[-1] == "result.json"
    assert names(tmp_path / case.dir) == {*written, ".lock", "events.out"} - {"checkpoint.pth"}


def test_checkpoints_are_written_when_they_should_be(case, play, monkeypatch):
    """Every so many steps; or every 5 minutes, here of 60 seconds a step; at the end of training
    where an evaluation follows."""
    saved, steps, original, clock = [], [], case.script.save_checkpoint, time.perf_counter
    count = lambda: steps.append(0)  # noqa: E731
    monkeypatch.setattr(case.script.time, "perf_counter", lambda: clock() + 60 * len(steps))
    spy = lambda *call: saved.append(len(steps)) or original(*call)  # noqa: E731
    monkeypatch.setattr(case.script, "save_checkpoint", spy)
    every_step = dict.fromkeys(range(1, case.steps + 1), count)
    last = [case.steps] if case in PLAYING.values() else []
    for interval, due in ((0, None), (7, 7), ("auto", 5)):
        saved.clear(), steps.clear()
        play(case, every_step, checkpoint_interval=interval, exp_name=f"{interval}")
        wanted = [] if due is None else sorted({*range(due, case.steps + 1, due), *last})
        assert saved == wanted


def test_what_a_dead_process_logged_after_its_checkpoint_is_not_shown(
    case, play, tmp_path, monkeypatch
):
    writers, original = [], case.script.SummaryWriter

    def keep(*args, **flags):
        writers.append(original(*args, **flags))
        return writers[-1]

    monkeypatch.setattr(case.script, "SummaryWriter", keep)
    checkpoint, death = case.steps // 3, case.steps // 2 + 1
    flags = dict(checkpoint_interval=checkpoint, log_interval=1)
    with pytest.raises(ZeroDivisionError):
        play(case, {death: lambda: (writers[0].close(), 1 / 0)}, **flags)
    steps = [step for step, _ in scalars(tmp_path / case.dir)[case.tag]]
    assert steps[-1] == death - 1
    assert play(case, resume=True, **flags) == case.steps - checkpoint
    logged = scalars(tmp_path / case.dir)
    assert [step for step, _ in logged[case.tag]] == list(range(steps[0], case.steps + 1))
    for series in logged.values():
        assert [step for step, _ in series] == sorted({step for step, _ in series})


@pytest.mark.parametrize("what", ["evaluate", "finish"])
@pytest.mark.parametrize("name", PLAYING)
def test_an_interrupted_end_is_repeated_and_only_that(name, what, play, tmp_path, monkeypatch):
    case = CASES[name]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fail = lambda: patch.setattr(case.script, what, lambda *_: 1 / 0)  # noqa: E731
        play(case, {case.steps: fail})
    assert play(case, resume=True) == 0
    assert read_result(tmp_path / case.dir)["resumed_at"] == [case.steps]
    logged = scalars(tmp_path / case.dir)["eval/mean_return"]
    assert [step for step, _ in logged] == [case.steps]


def test_two_processes_never_work_in_one_directory(case, play, tmp_path):
    run_dir = tmp_path / case.dir
    run_dir.mkdir()
    with (
        FileLock(run_dir / ".lock"),
        pytest.raises(SystemExit, match=f"another process is at work in {run_dir}"),
    ):
        play(case, overwrite=True)
    assert names(run_dir) == {".lock"}
    assert play(case) == case.steps


def test_a_full_disk_leaves_the_old_checkpoint(case, play, tmp_path):
    """No file may have more than 200 kB, of which a checkpoint has more."""
    stopped(play, case)
    before = contents(tmp_path / case.dir)["checkpoint.pth"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            play(case, resume=True, checkpoint_interval=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / case.dir)["checkpoint.pth"] == before
    play(case, resume=True)


# --- Signals, numbers that are not finite, Weights & Biases ---------------------------------------


def test_a_second_signal_ends_the_process_at_once(case, play, capfd):
    handlers = []

    def look():
        handlers.append({signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)})

    with pytest.raises(SystemExit) as exit_info:
        play(case, {4: look, 5: lambda: (stop(signal.SIGINT), look())})
    assert exit_info.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1].split()[-1] == "5"  # stopped after step 5
    assert len(handlers[0]) == 1 and signal.SIG_DFL not in handlers[0]
    assert handlers[1] == {signal.SIG_DFL}


@pytest.mark.parametrize("name", [*PLAYING, "pretrain"])
def test_numbers_that_are_not_finite_end_the_run_before_its_next_checkpoint(
    name, play, tmp_path, monkeypatch
):
    """In the synthetic experiment the others go on: test_synth_run.py."""
    case, broken = CASES[name], []
    bad, interval = case.steps // 2 + 1, case.steps // 4
    original = getattr(case.script, case.loss)
    faulty = lambda *call: original(*call) * (math.nan if broken else 1)  # noqa: E731
    monkeypatch.setattr(case.script, case.loss, faulty)
    events = {bad: lambda: broken.append(0), bad + 1: broken.clear}
    message = r"(step|update) \d+: \w+ is not finite; lower --"
    with pytest.raises(SystemExit, match=message):  # before it logs
        play(case, events, checkpoint_interval=0, log_interval=2)
    broken.clear()
    with pytest.raises(SystemExit, match=message):
        play(case, events, checkpoint_interval=interval, log_interval=1000)
    checkpoint = load(tmp_path / case.dir)
    assert checkpoint["counters"][case.counter] == 2 * interval
    assert all(tensor.isfinite().all() for tensor in checkpoint["tensors"].values())
    assert not (tmp_path / case.dir / "result.json").exists()


@pytest.mark.parametrize("name", ["atari", "dmc", "synth", "finetune"])
def test_weights_and_biases_goes_on_under_the_same_id(name, play, monkeypatch):
    calls, case = [], CASES[name]
    init = lambda **call: calls.append(call) or SimpleNamespace(id="id7")  # noqa: E731
    stand_in = SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None, origin="here"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    flags = dict(track=True, wandb_project_name="p", wandb_entity="e")
    stopped(play, case, **flags)
    play(case, resume=True, **flags)
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("id7", "allow")]
    assert (calls[0]["project"], calls[0]["entity"], calls[0]["name"]) == ("p", "e", case.dir)
    assert calls[0]["sync_tensorboard"] is True and "sam_rho" in calls[0]["config"]


# --- Flags ----------------------------------------------------------------------------------------

# Bad ones, and a word that the message must have, where it is not the first flag itself.
BAD_FLAGS = {
    "all": """
        --exp-name a/b | --exp-name .. | --exp-name a/ | --exp-name bell\a | --no-such-flag 1
        --resume --overwrite | --torch-threads -1 | --torch-threads 100000 | --log-interval 0
        --metrics-interval -1 | --checkpoint-interval soon | --checkpoint-interval -1
        --batch-size 0 | --learning-rate nan | --learning-rate inf | --learning-rate 0
        --sam-rho -0.1 | --sam-rho inf | --sam-rho nan | --reset-interval -1
    """,
    "atari": """
        --env-id Alein => Alien | --env-id alien => Alien | --env-id ALE/Alien-v5 => Alien
        --env-id montezuma_revenge => MontezumaRevenge | --env-id ../x => no such game
        --seed -1 | --seed 200001 | --replay-ratio 0 | --learning-starts 19 => --n-step
        --learning-starts 100000 => --total-timesteps | --total-timesteps 0 | --adam-eps -1
        --max-grad-norm 0 | --gamma 1.01 | --n-step 0 | --n-atoms 1 | --v-min 10 | --v-max inf
        --v-min nan | --hidden-dim 0 | --noisy-std -0.1 | --buffer-size 19 | --per-alpha -1
        --per-beta 1.1 | --target-ema 1.1 | --aug-shift -1 | --aug-intensity -1
        --shrink-perturb-alpha 1.1 | --shrink-perturb-alpha 0.5 --reset-interval 0
        --eval-episodes 0 | --eval-epsilon 2 | --eval-interval -1 | --sam-scope foot
        --evaluate missing.pth => missing.pth
    """,
    "dmc": """
        --env-id walker-fly => walker- | --env-id Alien => closest | --env-id cartpole => cartpole-
        --env-id lqr-lqr_2_1 => no such task | --seed -1 | --seed 200001
        --total-timesteps 0 => --learning-starts | --total-timesteps 2000 => --learning-starts
        --action-repeat -1 | --frame-stack 0 | --image-size 8 | --updates-per-step 0
        --learning-starts 1 | --gamma 1.1 | --target-ema -0.1 | --aug-shift 16
        --initial-temperature 0 | --buffer-size 0 | --latent-dim 0 | --hidden-dim 0
        --sam-scope head | --render-quality low | --eval-episodes 0 | --eval-interval -1
        --evaluate no.pth => no.pth | --device cpu --replay-device cuda => --replay-device
    """,
    "synth": """
        --l2-init --weight-decay 0 | --task both | --num-seeds 0 | --first-seed -1 | --num-stages 0 | --num-stages 50001
        --updates-per-stage 0 | --learning-rate 0.1 0.1 | --weight-decay 0 0.1 0
        --learning-rate 0.1 nan | --learning-rate | --weight-decay -1 | --momentum 1.1
        --conv-strides 3 3 | --conv-strides 3 3 0 | --conv-strides 10 10 1
        --layer-norm-kind batch
    """,
    "finetune": """
        --collect-policy checkpoint => are of --mode pretrain | --pretrained-path x => one of them
        --video-dir . => --mode pretrain | --collect-model x => --mode pretrain | --mode train
        --shrink-perturb-alpha 1.5 | --shrink-perturb-anchor x | --seed -1 | --v-min 10
        --learning-starts 19 => --n-step | --total-timesteps 2000 | --layer-norm-scope backbone
        --no-from-scratch => --from-scratch | --evaluate missing.pth => missing.pth
        --no-from-scratch --pretrained-path missing.pth => missing.pth
    """,
    "pretrain": """
        --track => --track is of --mode finetune | --from-scratch => --mode finetune
        --pretrained-path x => --mode finetune | --collect-policy checkpoint => --collect-model
        --collect-model x => --collect-policy | --video-dir missing => missing: not a directory
        --collect-policy checkpoint --collect-model x => x: not a file
        --video-dir . --collect-policy checkpoint --collect-model x => --video-dir
        --collect-steps 60 | --pretrain-length 1 | --pretrain-batch-size 1 | --pretrain-epochs 0
        --pretrain-learning-rate nan | --barlow-weight -1 | --env-id Alein => Alien
    """,
}
if find_spec("wandb") is None:
    BAD_FLAGS["all"] += "--track => pip install wandb\n"
if not torch.cuda.is_available():
    BAD_FLAGS["all"] += "--device cuda => PyTorch finds no CUDA device\n"
MODES = {"finetune": "--from-scratch", "pretrain": "--mode pretrain"}


def bad_flags():
    """(name of a case, flags, a word) of all of the above."""
    for names_, text in BAD_FLAGS.items():
        for item in text.replace("\n", "|").split("|"):
            flags, _, word = item.strip().partition(" => ")
            for name in ("atari", "dmc", "synth", "finetune") if names_ == "all" else (names_,):
                if flags:
                    yield name, flags, word or flags.split()[0].removeprefix("--no-")


@pytest.mark.parametrize("name, flags, word", list(bad_flags()))
def test_a_bad_flag_gets_one_message_and_code_2_and_nothing_is_written(
    name, flags, word, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(CASES[name].script.Args, args=[*MODES.get(name, "").split(), *flags.split(" ")])
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert word in error
    assert error.count("For full helptext") == 1  # tyro's box
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("wandb") is not None, reason="has Weights & Biases")
@pytest.mark.parametrize("name", ["atari", "dmc", "synth", "finetune"])
def test_a_folder_named_wandb_is_not_the_package(name, play, tmp_path, monkeypatch):
    """Its runs leave one where they are started."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="pip install wandb"):
        play(CASES[name], track=True)


@pytest.mark.parametrize("script", [atari, dmc, synth, ft], ids=lambda script: script.__name__)
def test_every_flag_has_a_help_text(script, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=["--help"])
    text, fields = capsys.readouterr().out, script.Args.__dataclass_fields__
    assert all(f"--{name.replace('_', '-')}" in text for name in fields)
    source = Path(script.__file__).read_text().split("class Args:")[1]
    lines = source.split("def __post_init__")[0].splitlines()
    flags = [i for i, line in enumerate(lines) if line[4:5].isalpha() and " = " in line]
    assert len(flags) == len(fields)
    assert all("  # " in lines[i] or lines[i - 1].startswith("    # ") for i in flags)


def test_a_directory_that_cannot_be_is_one_line_and_code_1(case, tmp_path, data, monkeypatch):
    """As the script's own last lines have it."""
    (tmp_path / "file").touch()
    flags = flags_of(case, data, run_dir=str(tmp_path / "file" / "runs"))
    monkeypatch.setattr(sys, "argv", [case.script.__file__, *words(flags)])
    with pytest.raises(SystemExit, match=r"^error: \[Errno \d+\] .*file[^\n]*$"):
        runpy.run_path(case.script.__file__, run_name="__main__")


# --- Real games and tasks -------------------------------------------------------------------------


def test_a_process_of_its_own_makes_a_short_run(case, tmp_path, data, capsys):
    """No warnings, no bar where there is no terminal; the saved model plays its games again."""
    flags = flags_of(case, data, run_dir="runs") | case.busy | case.real
    if case is CASES["pretrain"]:
        del flags["video_dir"]
        flags["collect_steps"] = 17
    if case in PLAYING.values():
        flags |= dict(capture_video=True, eval_interval=0)
    process = start(case, flags, tmp_path)
    output, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n"), output.count("\n")) == (0, 1, 1), error
    run_dir, script = tmp_path / "runs" / case.dir, case.script
    result, logged = read_result(run_dir), scalars(run_dir)
    assert f"; runs/{case.dir}/" in output
    assert (Path(script.__file__).name, "x") == (result["script"], result["exp_name"])
    assert set(result["args"]) == set(script.Args.__dataclass_fields__)
    assert {"torch", "python"} <= set(result["versions"]) and result["device"].startswith("cpu, ")
    assert result[case.counter] == case.steps and result["resumed_at"] == []
    assert len(logged) > 0
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    if case not in PLAYING.values():
        return
    assert [result["mean_return"]] == result["episode_returns"]
    assert result["resets"] >= 2
    rates = result["updates_per_second"] / result["env_steps_per_second"]
    assert rates == pytest.approx(result["gradient_updates"] / result["env_steps"])
    assert logged["eval/mean_return"] == [(case.steps, pytest.approx(result["mean_return"]))]
    if "metrics_interval" in case.busy and case.busy["metrics_interval"] > 0:
        assert {"plasticity/hessian_max_eigenvalue", "plasticity/active_units/head"} <= set(logged)
    with Image.open(run_dir / "video.gif") as video:
        assert video.n_frames > 1

    again = dict(evaluate=str(run_dir / "model.pth"), device="cpu", seed=9, eval_episodes=1)
    capsys.readouterr()
    script.evaluate_saved(script.Args(**again, capture_video=True))
    assert output == f"{capsys.readouterr().out.strip()}; runs/{case.dir}/result.json\n"
    assert (run_dir / "model.pth.gif").read_bytes() == (run_dir / "video.gif").read_bytes()
    with pytest.raises(SystemExit, match="exists; pass --overwrite"):
        script.evaluate_saved(script.Args(**again, capture_video=True))


@pytest.mark.parametrize("name", PLAYING)
def test_a_saved_model_plays_with_its_own_flags_but_for_the_commands(
    name, play, tmp_path, monkeypatch
):
    case, played = CASES[name], []
    play(case, seed=5, save_model=True)
    monkeypatch.setattr(case.script, "evaluate", lambda *call: played.append(call) or [1.0])
    flags = dict(seed=9, env_id="Pong", eval_epsilon=0.25) if name != "dmc" else dict(seed=9)
    path = str(tmp_path / case.dir.replace("__1", "__5") / "model.pth")
    case.script.evaluate_saved(case.script.Args(evaluate=path, eval_episodes=7, **flags))
    ((_, args, video),) = played
    assert (args.env_id, args.seed, args.eval_episodes, video) == (case.dir[:-6], 5, 7, None)
    assert name == "dmc" or args.eval_epsilon == 0.25


@pytest.mark.parametrize(
    "name", ["atari", *(pytest.param(name, marks=SLOW) for name in ("dmc", "finetune"))]
)
def test_equal_seeds_give_equal_runs_and_measuring_changes_nothing(name, tmp_path, data):
    case, models = CASES[name], []
    measured = dict(metrics_interval=20, eval_interval=15, log_interval=1)
    for others in ({}, measured, dict(seed=2)) if name == "atari" else ({}, measured):
        run_dir = tmp_path / str(len(models))
        flags = flags_of(case, data, run_dir=str(run_dir), save_model=True, reset_interval=15)
        case.script.run(case.script.Args(**flags | case.real | others))
        (path,) = run_dir.glob("*/model.pth")
        model = torch.load(path, weights_only=True)
        models.append(model["actor"] if name == "dmc" else model["target"])
    equal = [all(torch.equal(model[key], w) for key, w in models[0].items()) for model in models]
    assert equal == [True, True, False][: len(models)]


# --- Processes that are killed --------------------------------------------------------------------


def written(checkpoint):
    """When the checkpoint was written."""
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def begin(case, flags, run_dir, shell=""):
    """A process that has written a new checkpoint."""
    checkpoint = run_dir / "checkpoint.pth"
    before = written(checkpoint)
    process = start(case, flags, run_dir.parent, shell)
    wait_for(lambda: written(checkpoint) > before, process)
    return process


@pytest.mark.parametrize(
    "name", ["synth", *(pytest.param(name, marks=SLOW) for name in CASES if name != "synth")]
)
def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(name, tmp_path, data):
    """SIGKILL at random moments after a checkpoint; and a closed standard output ends no run."""
    case, rng = CASES[name], random.Random(0)
    flags = (
        flags_of(case, data, resume=True, checkpoint_interval=5, run_dir=".")
        | case.real
        | case.longer
    )
    kills = 3 if name == "synth" else 10
    for _ in range(kills):
        process = begin(case, flags, tmp_path / case.dir)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before the kill: more steps"
        load(tmp_path / case.dir)  # whole
    process = start(case, flags, tmp_path, "exec >&-;")
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (0, 1), error
    result, logged = read_result(tmp_path / case.dir), scalars(tmp_path / case.dir)
    assert len(result["resumed_at"]) == kills and result["resumed_at"] == sorted(
        result["resumed_at"]
    )
    assert all(step % 5 == 0 for step in result["resumed_at"])
    for series in logged.values():
        assert [step for step, _ in series] == sorted({step for step, _ in series})
    assert {".lock", "events.out", "result.json"} == names(tmp_path / case.dir) - {"model.pth"}
    if name in ("synth", "pretrain"):  # whose data are all in the files
        process = start(case, flags | dict(run_dir="whole"), tmp_path)
        process.communicate(timeout=300)
        whole = read_result(tmp_path / "whole" / case.dir)
        key = "sweep" if name == "synth" else "final_loss"
        assert (whole[key], whole["gradient_updates"]) == (result[key], result["gradient_updates"])
        assert scalars(tmp_path / "whole" / case.dir)[case.tag] == logged[case.tag]


@pytest.mark.parametrize(
    "name", ["atari", *(pytest.param(name, marks=SLOW) for name in CASES if name != "atari")]
)
def test_a_signal_leaves_a_checkpoint(name, tmp_path, data):
    """Also where nobody reads the messages, as with `2>&1 | tee log` and Ctrl-C, of which tee dies
    first. One during the last evaluation, which follows the last checkpoint, ends it at once."""
    case, run_dir = CASES[name], tmp_path / CASES[name].dir
    flags = (
        flags_of(case, data, resume=True, checkpoint_interval=5, run_dir=".")
        | case.real
        | case.longer
    )
    if name in PLAYING:
        flags["eval_episodes"] = 300
    process = begin(case, flags, run_dir)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    counters = load(run_dir)["counters"]
    first = counters[case.counter]
    assert error.splitlines()[1].split() == ["stopped", "after", error.split()[-2], str(first)]
    assert process.returncode == 143

    process = begin(case, flags, run_dir)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) not in (0, -signal.SIGINT)
    counters = load(run_dir)["counters"]
    assert counters["resumed_at"] == [first] and counters[case.counter] > first

    if name in PLAYING:
        process = begin(case, flags | dict(checkpoint_interval=10**6), run_dir)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGTERM
        assert load(run_dir)["counters"][case.counter] == 200
