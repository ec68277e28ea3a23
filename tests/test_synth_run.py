"""The synthetic script's run: its files, and the promises about stopping and bad input."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_synth import BASE, Evil, make_args, write_images

import synth_cifar_plasticity as synth

SCRIPT = Path(synth.__file__)


@pytest.fixture
def data_dir(tmp_path):
    write_images(tmp_path / "data")
    return tmp_path / "data"


def scalars(run_dir):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def run_dir_of(args):
    name = f"{args.task}__{args.exp_name}__{args.first_seed}-{args.num_seeds}"
    return Path(args.run_dir) / name


def read_result(args):
    """Strictly JSON, which has no NaN."""
    not_json = lambda constant: pytest.fail(f"{constant} is not JSON")  # noqa: E731
    return json.loads((run_dir_of(args) / "result.json").read_text(), parse_constant=not_json)


def names(directory):
    """What lies there, event files by their kind."""
    return {path.name.split(".tfevents")[0] for path in directory.iterdir()}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def train(monkeypatch):
    """train(args, {n: what happens in update n}) -> the replicas at the end of the run."""
    kept, handlers = {}, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    class KeptReplicas(synth.Replicas):
        def __init__(self, *args):
            super().__init__(*args)
            kept["replicas"], kept["updates"] = self, []

        def update(self):
            kept["updates"].append(int(self.updates) + 1)
            kept["at"].get(kept["updates"][-1], lambda: None)()
            return super().update()

    def train(args, at=None):
        kept["at"] = at or {}
        synth.run(args)
        return kept["replicas"]

    train.kept = kept
    monkeypatch.setattr(synth, "Replicas", KeptReplicas)
    yield train
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def stop(signum=signal.SIGTERM):
    signal.raise_signal(signum)


# --- Results --------------------------------------------------------------------------------------

KEYS = """script exp_name task first_seed num_seeds args gradient_updates train_accuracy
test_accuracy metrics training_seconds wall_clock_seconds resumed_at data git_commit wandb_id
learning_rate weight_decay final_accuracy final_accuracy_mean final_accuracy_interval mean_accuracy
mean_accuracy_mean mean_accuracy_interval sweep updates_per_second parameters device
versions""".split()


def test_a_run_learns_and_its_result_is_complete(data_dir, train):
    flags = dict(learning_rate=(0.02, 1e-6), updates_per_stage=40, metrics_interval=2)
    args = make_args(data_dir, num_seeds=3, reset_interval=0, **flags)
    train(args)
    result = read_result(args)
    assert list(result) == KEYS
    assert list(result["args"]) == list(synth.Args.__dataclass_fields__)
    assert (result["gradient_updates"], result["num_seeds"], result["task"]) == (160, 3, "input")
    assert [setting["learning_rate"] for setting in result["sweep"]] == [0.02, 1e-6]
    assert result["learning_rate"] == 0.02  # the better one
    assert np.shape(result["test_accuracy"]) == np.shape(result["train_accuracy"]) == (3, 4)
    assert {**result, **result["sweep"][0]} == result
    assert result["final_accuracy"] == [seed[-1] for seed in result["test_accuracy"]]
    np.testing.assert_allclose(result["mean_accuracy"], np.mean(result["test_accuracy"], axis=1))
    assert result["final_accuracy_mean"] == pytest.approx(np.mean(result["final_accuracy"]))
    assert result["final_accuracy_mean"] > 0.8 > 0.3 > result["sweep"][1]["final_accuracy_mean"]
    low, high = result["final_accuracy_interval"]
    assert low <= result["final_accuracy_mean"] <= high
    assert [one["stage"] for one in result["metrics"]] == [1, 3]
    measured = {"hessian_max_eigenvalue", "active_units/backbone", "active_units/head"}
    for one in [one for setting in result["sweep"] for one in setting["metrics"]]:
        assert all(len(one[name]) == 3 for name in measured)
    assert result["metrics"] != result["sweep"][1]["metrics"]
    assert 0 < result["training_seconds"] < result["wall_clock_seconds"]
    assert result["updates_per_second"] == pytest.approx(160 / result["training_seconds"])

    logged = scalars(run_dir_of(args))
    name = "lr_0.02_decay_0.001"
    steps, means = zip(*logged[f"test_accuracy/{name}"], strict=True)
    assert steps == (40, 80, 120, 160)
    assert means == pytest.approx(np.mean(result["test_accuracy"], axis=0))
    assert [step for step, _ in logged[f"losses/{name}"]] == list(range(4, 161, 4))
    assert [step for step, _ in logged[f"plasticity/active_units/head/{name}"]] == [80, 160]
    assert names(run_dir_of(args)) == {".lock", "events.out", "result.json"}


@pytest.mark.parametrize("task", ["input", "label"])
def test_seeds_in_one_process_give_what_processes_of_their_own_give(data_dir, train, task):
    flags = dict(task=task, num_stages=3)
    rates, seeds = (0.05, 0.01), (7, 8, 9)
    together = make_args(data_dir, num_seeds=3, first_seed=7, learning_rate=rates, **flags)
    train(together)
    for i, seed in enumerate(seeds):
        for j, rate in enumerate(rates):
            flags |= dict(num_seeds=1, first_seed=seed, learning_rate=(rate,))
            alone = make_args(data_dir, exp_name=f"alone_{j}", **flags)
            train(alone)
            for key in ("test_accuracy", "train_accuracy"):
                one, of_many = read_result(alone)[key][0], read_result(together)["sweep"][j][key][i]
                np.testing.assert_allclose(one, of_many, atol=0.03)  # an image on the edge or two


def test_a_diverged_replica_is_null_in_the_result_and_never_the_best(data_dir, train, capsys):
    """Learning rate 1e9 diverges; the run is stopped with nan in its checkpoint, and continued."""
    flags = BASE | dict(sam_rho=0.1, metrics_interval=2, resume=True)
    args = make_args(data_dir, learning_rate=(1e9, 0.01), **flags)
    with pytest.raises(SystemExit):
        train(args, {14: stop})
    train(args)
    result = read_result(args)
    assert result["resumed_at"] == [14]
    diverged, finite = result["sweep"]
    assert diverged["test_accuracy"] == diverged["train_accuracy"] == [[None] * 4] * 2
    assert diverged["final_accuracy_mean"] is None
    assert diverged["final_accuracy_interval"] == [None, None]
    assert diverged["metrics"][0]["active_units/head"] == [None, None]
    assert result["learning_rate"] == 0.01
    alone = make_args(data_dir, exp_name="alone", learning_rate=(0.01,), **flags)
    train(alone)
    assert read_result(alone)["sweep"] == [finite]
    train(make_args(data_dir, exp_name="all", learning_rate=(1e9,), **flags))
    assert "input: final test accuracy nan [nan, nan] over 2 seeds" in capsys.readouterr().out


# --- Stopping and continuing ----------------------------------------------------------------------


def stopped_run(data_dir, train, **flags):
    """A run stopped in the middle of its second stage; returns its directory."""
    args = make_args(data_dir, **flags)
    with pytest.raises(SystemExit) as exit_info:
        train(args, {9: stop})
    assert exit_info.value.code == 143
    return run_dir_of(args)


@pytest.mark.parametrize("task", ["input", "label"])
@pytest.mark.parametrize("stops", [(1,), (6, 12), (7, 13, 22), (24,)], ids=str)
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(data_dir, train, task, stops):
    """Stopped in the middle of stages and between them (6 updates), before resets, at the end."""
    flags = dict(task=task, resume=True, learning_rate=(0.05, 0.01), metrics_interval=3)
    whole = make_args(data_dir, exp_name="whole", **flags)
    tensors = {name: tensor.clone() for name, tensor in train(whole).tensors().items()}
    broken = make_args(data_dir, exp_name="broken", **flags)
    for update in stops:
        with pytest.raises(SystemExit) as exit_info:
            train(broken, {update: stop})
        assert exit_info.value.code == 143
        torch.manual_seed(999)  # nothing may come from this process
    for name, tensor in train(broken).tensors().items():
        assert torch.equal(tensor, tensors[name]), name
    results = [read_result(args) for args in (whole, broken)]
    assert results[1]["resumed_at"] == list(stops)
    assert all(results[0][key] == results[1][key] for key in ("sweep", "gradient_updates", "data"))
    logged = [scalars(run_dir_of(args)) for args in (whole, broken)]
    for one in logged:
        del one["charts/updates_per_second"]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[1]["losses/lr_0.05_decay_0.001"]] == list(range(4, 25, 4))


def test_what_is_there_is_neither_taken_up_nor_lost_without_being_told(data_dir, train):
    run_dir = stopped_run(data_dir, train)
    (run_dir / "mine.txt").write_text("mine")
    for kind in ("an unfinished", "a finished"):
        before = contents(run_dir)
        words = f"holds {kind} run; pass --resume or --overwrite, or change --exp-name"
        with pytest.raises(SystemExit, match=words):
            train(make_args(data_dir))
        assert contents(run_dir) == before
        args = make_args(data_dir, overwrite=True, sam_rho=0.2)
        train(args)
        assert read_result(args)["args"]["sam_rho"] == 0.2
        assert read_result(args)["resumed_at"] == []
        assert len(list(run_dir.glob("events*"))) == 1
        assert names(run_dir) == {".lock", "events.out", "result.json", "mine.txt"}


def test_overwrite_removes_nothing_before_the_new_run_can_begin(data_dir, train):
    run_dir = stopped_run(data_dir, train)
    before = contents(run_dir)
    with pytest.raises(SystemExit, match="pass --download"):
        train(make_args(data_dir.parent / "absent", overwrite=True, download=False))
    assert contents(run_dir) == before


def test_resume_begins_where_there_is_nothing_and_leaves_a_finished_run_alone(data_dir, train):
    args = make_args(data_dir, resume=True)
    train(args)
    before = contents(run_dir_of(args))
    (run_dir_of(args) / "checkpoint.pth").write_bytes(b"left by a kill after the result")
    train.kept["updates"].clear()
    shutil.rmtree(data_dir)
    train(make_args(data_dir, resume=True, log_interval=7, download=False))
    assert train.kept["updates"] == []
    assert contents(run_dir_of(args)) == before


OTHER_FLAGS = dict(sam_rho=0.2, layer_norm=False, num_stages=5, conv_strides=(3, 1, 1))
OTHER_FLAGS |= dict(learning_rate=(0.01, 0.1), metrics_interval=1)


@pytest.mark.parametrize("name", OTHER_FLAGS)
@pytest.mark.parametrize("finished", [False, True])
def test_other_flags_are_refused_by_name(data_dir, train, name, finished):
    if finished:
        train(make_args(data_dir))
    else:
        stopped_run(data_dir, train)
    run_dir, value = run_dir_of(make_args(data_dir)), getattr(make_args(data_dir), name)
    before = contents(run_dir)
    with pytest.raises(SystemExit) as exit_info:
        train(make_args(data_dir, resume=True, **{name: OTHER_FLAGS[name]}))
    assert f"was made with --{name.replace('_', '-')} {value}; use that" in exit_info.value.code
    assert contents(run_dir) == before


def test_flags_that_change_nothing_of_the_run_may_change(data_dir, train):
    run_dir = stopped_run(data_dir, train)
    for directory in (run_dir.parent, data_dir):
        shutil.move(directory, directory.with_name(f"moved_{directory.name}"))
    moved = data_dir.parent / "moved_data"
    flags = dict(run_dir=str(data_dir.parent / "moved_runs"), checkpoint_interval=7)
    args = make_args(moved, resume=True, log_interval=5, cuda_graph=False, **flags)
    train(args)
    assert train.kept["updates"] == list(range(10, 25))
    assert read_result(args)["gradient_updates"] == 24


def test_other_images_are_refused(data_dir, train):
    run_dir = stopped_run(data_dir, train)
    before = contents(run_dir)
    write_images(data_dir, seed=1)
    with pytest.raises(SystemExit, match="was made with other images"):
        train(make_args(data_dir, resume=True))
    assert contents(run_dir) == before


FOREIGN = {
    "text": lambda path: path.write_text("not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file with code": lambda path: torch.save({"args": Evil()}, path),
    "another torch file": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_gets_one_line_runs_no_code_and_stays(data_dir, train, kind, monkeypatch):
    monkeypatch.chdir(data_dir)
    path = stopped_run(data_dir, train) / "checkpoint.pth"
    FOREIGN[kind](path)
    before = contents(path.parent)
    words = r"checkpoint.pth: not a checkpoint of this script \(\w+\)"
    with pytest.raises(SystemExit, match=words):
        train(make_args(data_dir, resume=True))
    assert contents(path.parent) == before
    assert not (data_dir / "evil").exists()


@pytest.mark.parametrize(
    "flags, steps",
    [
        (dict(checkpoint_interval=0), []),
        (dict(checkpoint_interval=10), [10, 20]),
        (dict(checkpoint_interval="auto"), [5, 10, 15, 20]),  # 5 minutes at a minute an update
    ],
)
def test_checkpoints_are_written_when_they_should_be(data_dir, train, monkeypatch, flags, steps):
    saved, original, clock = [], synth.save_checkpoint, time.perf_counter
    minutes = lambda: len(train.kept.get("updates", []))  # noqa: E731
    monkeypatch.setattr(synth.time, "perf_counter", lambda: clock() + 60.0 * minutes())
    spy = lambda *call: saved.append(call[2].gradient_updates) or original(*call)  # noqa: E731
    monkeypatch.setattr(synth, "save_checkpoint", spy)
    train(make_args(data_dir, **flags))
    assert saved == steps


def test_what_a_dead_process_logged_after_its_checkpoint_is_not_shown(data_dir, train, monkeypatch):
    """It dies in update 21, after the evaluation at 18; its last checkpoint is of update 16."""
    writers, original = [], synth.SummaryWriter

    def keep(*args, **flags):
        writers.append(original(*args, **flags))
        return writers[-1]

    monkeypatch.setattr(synth, "SummaryWriter", keep)
    flags = dict(checkpoint_interval=16, log_interval=1, metrics_interval=1)
    with pytest.raises(ZeroDivisionError):
        train(make_args(data_dir, **flags), {21: lambda: (writers[0].close(), 1 / 0)})
    name, args = "lr_0.01_decay_0.001", make_args(data_dir, resume=True, **flags)
    assert scalars(run_dir_of(args))[f"losses/{name}"][-1][0] == 20
    train(args)
    logged = scalars(run_dir_of(args))
    assert [step for step, _ in logged[f"losses/{name}"]] == list(range(1, 25))
    for tag in ("test_accuracy", "train_accuracy", "plasticity/active_units/head"):
        assert [step for step, _ in logged[f"{tag}/{name}"]] == [6, 12, 18, 24]
    assert np.shape(read_result(args)["test_accuracy"]) == (2, 4)


def test_a_signal_during_an_evaluation_lets_it_end_and_loses_nothing(data_dir, train, monkeypatch):
    original, stages = synth.evaluate, []

    def evaluate(replicas, stage):
        stages.append(stage)
        if stages == [0, 1]:
            stop()
        return original(replicas, stage)

    monkeypatch.setattr(synth, "evaluate", evaluate)
    args = make_args(data_dir, resume=True)
    with pytest.raises(SystemExit) as exit_info:
        train(args)
    assert exit_info.value.code == 143
    train(args)
    assert stages == [0, 1, 2, 3]
    assert read_result(args)["resumed_at"] == [12]


def test_a_second_signal_ends_the_process_at_once(data_dir, train):
    handlers = []

    def look():
        handlers.append([signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)])

    with pytest.raises(SystemExit) as exit_info:
        train(make_args(data_dir), {8: look, 9: lambda: (stop(signal.SIGINT), look())})
    assert exit_info.value.code == 130
    assert train.kept["updates"] == list(range(1, 10))
    assert signal.SIG_DFL not in handlers[0]
    assert handlers[1] == [signal.SIG_DFL, signal.SIG_DFL]


def test_weights_and_biases_goes_on_under_the_same_id(data_dir, train, monkeypatch):
    calls = []

    def init(**kwargs):
        calls.append(kwargs)
        return SimpleNamespace(id="id7")

    stand_in = SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    flags = dict(track=True, wandb_project_name="p", wandb_entity="e")
    stopped_run(data_dir, train, **flags)
    train(make_args(data_dir, resume=True, **flags))
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("id7", "allow")]
    assert (calls[0]["project"], calls[0]["entity"]) == ("p", "e")
    assert calls[0]["name"] == "input__x__1-2"
    assert calls[0]["sync_tensorboard"] is True
    assert calls[0]["config"]["sam_rho"] == 0.1


# --- Bad input ------------------------------------------------------------------------------------

BAD_FLAGS = {  # and a word that the message must have
    "--task both": "--task", "--num-seeds 0": "--num-seeds", "--first-seed -1": "--first-seed",
    "--num-stages 0": "--num-stages", "--num-stages 50001": "--num-stages",
    "--updates-per-stage 0": "--updates-per-stage", "--batch-size 0": "--batch-size",
    "--learning-rate 0.1 0.1": "--learning-rate", "--weight-decay 0 0.1 0": "--weight-decay",
    "--learning-rate 0": "--learning-rate", "--learning-rate 0.1 nan": "--learning-rate",
    "--learning-rate": "--learning-rate", "--weight-decay -1": "--weight-decay",
    "--momentum 1.1": "--momentum", "--conv-strides 3 3": "--conv-strides",
    "--conv-strides 3 3 0": "--conv-strides", "--conv-strides 10 10 1": "--conv-strides",
    "--sam-rho -1": "--sam-rho", "--sam-rho inf": "--sam-rho", "--sam-rho nan": "--sam-rho",
    "--reset-interval -1": "--reset-interval", "--log-interval 0": "--log-interval",
    "--metrics-interval -1": "--metrics-interval", "--torch-threads -1": "--torch-threads",
    "--checkpoint-interval soon": "--checkpoint-interval", "--exp-name a/b": "--exp-name",
    "--checkpoint-interval -5": "--checkpoint-interval", "--exp-name ..": "--exp-name",
    "--resume --overwrite": "--resume", "--layer-norm-kind batch": "--layer-norm-kind",
    "--no-such-flag 1": "no-such-flag",
}  # fmt: skip
if find_spec("wandb") is None:
    BAD_FLAGS["--track"] = "pip install wandb"
if not torch.cuda.is_available():
    BAD_FLAGS["--device cuda"] = "PyTorch finds no CUDA device"


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gets_one_message_and_code_2_and_nothing_is_written(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(synth.Args, args=flags.split())
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert BAD_FLAGS[flags] in error
    assert error.count("For full helptext") == 1  # tyro's box
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(synth.Args, args=["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in synth.Args.__dataclass_fields__)
    lines = SCRIPT.read_text().split("class Args:")[1].split("def __post_init__")[0].splitlines()
    flags = [i for i, line in enumerate(lines) if line[4:5].isalpha() and " = " in line]
    assert len(flags) == len(synth.Args.__dataclass_fields__)
    assert all("  # " in lines[i] or lines[i - 1].startswith("    # ") for i in flags)


# --- Processes ------------------------------------------------------------------------------------

FLAGS = "--device cpu --resume --exp-name x --num-seeds 2 --num-stages 4 --updates-per-stage 50"
FLAGS += " --batch-size 4 --torch-threads 1 --log-interval 10"


def start(data_dir, flags, shell=""):
    """The script as a process, after some words in a shell of its own."""
    command = [sys.executable, str(SCRIPT), "--data-dir", str(data_dir), *FLAGS.split()]
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command, *flags.split()]
    env = os.environ | {"PYTHONWARNINGS": "error"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=data_dir.parent, env=env, **pipes)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def run_dir(data_dir):
    return data_dir.parent / "runs" / "input__x__1-2"


def learning(run_dir):
    """Whether a run has logged something: its event file has grown."""
    return any(path.stat().st_size > 2000 for path in run_dir.glob("events*"))


def finish(data_dir, run_dir, flags=""):
    """Let the run come to its end, and check that it is like an unbroken one."""
    process = start(data_dir, flags)
    output, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (0, 1), error
    assert "2 replicas of 223,690 parameters, 200 updates, on cpu, 1 threads" in error
    assert output.startswith("input: final test accuracy ") and output.count("\n") == 1
    assert names(run_dir) == {".lock", "events.out", "result.json"}
    logged, name = scalars(run_dir), "lr_0.01_decay_0.001"
    assert [step for step, _ in logged[f"losses/{name}"]] == list(range(10, 201, 10))
    assert [step for step, _ in logged[f"test_accuracy/{name}"]] == [50, 100, 150, 200]
    return json.loads((run_dir / "result.json").read_text())


def killed_after_a_checkpoint(data_dir, checkpoint, seconds):
    """A process killed by SIGKILL soon after it has written a checkpoint, which must be whole."""
    written = lambda: checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0  # noqa: E731
    before = written()
    process = start(data_dir, "--checkpoint-interval 5")
    wait_for(lambda: written() > before, process)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "finished before the kill: more updates"
    torch.load(checkpoint, weights_only=True)


def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(data_dir, run_dir):
    rng = random.Random(0)
    for _ in range(4):
        killed_after_a_checkpoint(data_dir, run_dir / "checkpoint.pth", rng.uniform(0, 0.1))
    result = finish(data_dir, run_dir)
    assert len(result["resumed_at"]) > 0
    whole = finish(data_dir, run_dir, "--no-resume --overwrite")
    assert result["sweep"] == whole["sweep"]


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_last_checkpoint_and_the_run_goes_on(data_dir, run_dir, signum, code):
    process = start(data_dir, "")
    wait_for(lambda: learning(run_dir), process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    updates = checkpoint["counters"]["gradient_updates"]
    assert process.returncode == code
    assert error.splitlines()[1:] == [f"stopped after update {updates}"]
    assert 0 < updates < 200
    assert finish(data_dir, run_dir)["resumed_at"] == [updates]


def test_two_processes_never_work_in_one_directory(data_dir, run_dir):
    """The second one is refused; a dead process holds no lock."""
    first = start(data_dir, "--num-stages 200")
    wait_for(lambda: learning(run_dir), first)
    before = sorted(path.name for path in run_dir.iterdir())
    second = start(data_dir, "--num-stages 200")
    output, error = second.communicate(timeout=60)
    assert (second.returncode, output) == (1, "")
    assert error == f"error: another process is at work in {run_dir.relative_to(data_dir.parent)}\n"
    assert sorted(path.name for path in run_dir.iterdir()) == before
    first.kill()
    first.communicate()
    assert finish(data_dir, run_dir, "--overwrite --no-resume")["resumed_at"] == []


def test_a_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint_stays(data_dir, run_dir):
    """`ulimit -f`: a checkpoint has 3.6 MB here, all other files far less than 2."""
    checkpoint = run_dir / "checkpoint.pth"
    flags = "--num-stages 200 --checkpoint-interval 20"
    process = start(data_dir, flags)
    wait_for(checkpoint.exists, process)
    process.kill()
    process.communicate()
    before = checkpoint.read_bytes()
    process = start(data_dir, flags, shell='ulimit -f 2000; trap "" XFSZ;')
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[1:] == ["error: [Errno 27] File too large"]
    assert checkpoint.read_bytes() == before


def test_a_closed_standard_output_ends_no_run(data_dir, run_dir):
    process = start(data_dir, "--num-stages 1", shell="exec >&-;")
    assert process.wait(timeout=120) == 0
    assert "result.json" in names(run_dir)


@pytest.mark.parametrize("flags", ["--run-dir file/runs", "--data-dir file/data"])
def test_a_directory_that_cannot_be_gets_one_line(data_dir, flags):
    (data_dir.parent / "file").write_text("not a directory")
    process = start(data_dir, flags)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and "file" in error
