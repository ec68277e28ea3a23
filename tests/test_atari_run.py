"""The run around the algorithm: its files, and the promises about stopping, continuing and bad input."""

import json
import math
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
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plastic_drq_rainbow_atari as atari

SCRIPT = Path(atari.__file__)
SMALL = dict(buffer_size=300, learning_starts=20, batch_size=4, hidden_dim=4, n_atoms=5)


def make_args(run_dir, **flags):
    flags = dict(device="cpu", total_timesteps=60, eval_episodes=1, exp_name="x") | SMALL | flags
    return atari.Args(run_dir=str(run_dir), **flags)


def scalars(run_dir):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def read_result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def names(directory):
    """What lies there, event files by their kind."""
    return {path.name.split(".tfevents")[0] for path in directory.iterdir()}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- On a recording -------------------------------------------------------------------------------


class Recording:
    """A recorded stream of frames, rewards and ends in place of the emulator: it goes on where it was left.

    An episode ends every 30 steps, a life is lost at step 17 of each. `at` maps a step to what happens then.
    """

    class action_space:
        n = 3

    def __init__(self, length=400):
        rng = np.random.default_rng(0)
        self.frames = rng.integers(256, size=(length, 1, 1, 84, 84), dtype=np.uint8)
        self.rewards = rng.integers(-2, 3, size=(length, 1)).astype(np.float32)
        self.step_number, self.actions, self.at = 0, [], {}

    def lives(self):
        return {"lives": np.array([3 if self.step_number % 30 < 17 else 2])}

    def reset(self):
        return self.frames[self.step_number], self.lives()

    def step(self, actions):
        self.actions.append(int(actions[0]))
        self.step_number += 1
        self.at.get(self.step_number, lambda: None)()
        over = np.array([self.step_number % 30 == 0])
        frame = np.zeros((1, 1, 84, 84), np.uint8) if over[0] else self.frames[self.step_number]
        return frame, self.rewards[self.step_number], over, ~over & False, self.lives()


@pytest.fixture
def train(monkeypatch):
    """train(recording, args) -> the agent and the replay buffer as they are at the end."""
    kept, handlers = {}, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def keep(cls):
        class Kept(cls):
            def __init__(self, *args):
                super().__init__(*args)
                kept[cls.__name__] = self

        return Kept

    def train(recording, args):
        monkeypatch.setattr(atari, "make_envs", lambda *_: recording)
        atari.run(args)
        return kept["Agent"], kept["ReplayBuffer"]

    for cls in (atari.Agent, atari.ReplayBuffer):
        monkeypatch.setattr(atari, cls.__name__, keep(cls))
    value = lambda network, *_: [float(network.head.value.output.bias_mu.sum())]  # noqa: E731
    monkeypatch.setattr(atari, "evaluate", value)
    yield train
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def stop_at(step, signum=signal.SIGTERM):
    """A recording in the middle of whose step a signal comes."""
    recording = Recording()
    recording.at[step] = lambda: signal.raise_signal(signum)
    return recording


def stopped_run(tmp_path, train, **flags):
    """A run stopped at step 41; returns its directory."""
    with pytest.raises(SystemExit) as exit_info:
        train(stop_at(41), make_args(tmp_path, **flags))
    assert exit_info.value.code == 143
    return tmp_path / "Alien__x__1"


@pytest.mark.parametrize("steps", [(60,), (30, 90, 120)], ids=str)
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path, train, steps):
    """Stopped where an episode ends: there the emulator's state is not missed."""
    flags = dict(total_timesteps=150, reset_interval=70, shrink_perturb_alpha=0.5, log_interval=10)
    flags |= dict(save_model=True, metrics_interval=45, eval_interval=40)
    flags |= dict(buffer_size=90)  # so that it wraps around
    whole = Recording()
    agent, replay = train(whole, make_args(tmp_path / "whole", **flags))
    tensors = {**agent.tensors(), **replay.tensors()}
    generators = [torch.get_rng_state(), agent.generator.get_state()]

    broken = Recording()
    for step in steps:
        broken.at = {step: lambda: signal.raise_signal(signal.SIGTERM)}
        with pytest.raises(SystemExit):
            train(broken, make_args(tmp_path / "broken", resume=True, **flags))
        assert broken.step_number == step
        torch.manual_seed(999)  # nothing may come from this process
    agent, replay = train(broken, make_args(tmp_path / "broken", resume=True, **flags))

    assert broken.actions == whole.actions
    for name, tensor in {**agent.tensors(), **replay.tensors()}.items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(agent.generator.get_state(), generators[1])
    runs = [tmp_path / run / "Alien__x__1" for run in ("whole", "broken")]
    logged = [scalars(run) for run in runs]
    for one in logged:
        del one["charts/SPS"]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[1]["losses/td_loss"]] == list(range(20, 151, 10))
    assert [step for step, _ in logged[1]["eval/mean_return"]] == [40, 80, 120, 150]
    results = [read_result(run) for run in runs]
    assert [result.pop("resumed_at") for result in results] == [[], list(steps)]
    same = ("env_steps", "gradient_updates", "resets", "episode_returns")
    assert all(results[0][key] == results[1][key] for key in same)
    assert names(runs[1]) == {".lock", "events.out", "result.json", "model.pth"}


def test_a_life_that_was_cut_off_ends_and_its_windows_are_never_sampled(tmp_path, train):
    """Stopped at step 41, continued with an episode that loses a life in its 17th step; n = 10.

    A transition's slot is its step less 1 before the cut and its step after it: slot 41 has the frame that nobody
    acted on. Slots 32 to 40 saw no frame 10 steps on; nor did 59 and 60, yet.
    """
    stopped_run(tmp_path, train)
    recording = Recording()
    recording.step_number = 60
    _, replay = train(recording, make_args(tmp_path, resume=True))
    assert replay.cursor == 61
    # Slot 0 has made room: a run of 60 steps has a buffer of 60.
    assert replay.priorities.nonzero().flatten().tolist() == [*range(1, 32), *range(42, 59)]


def test_what_is_there_is_neither_taken_up_nor_lost_without_being_told(tmp_path, train):
    run_dir = stopped_run(tmp_path, train)
    (run_dir / "mine.txt").write_text("mine")
    before = contents(run_dir)
    with pytest.raises(
        SystemExit, match="holds an unfinished run; pass --resume or --overwrite, or"
    ):
        train(Recording(), make_args(tmp_path))
    assert contents(run_dir) == before
    train(Recording(), make_args(tmp_path, overwrite=True))
    assert (read_result(run_dir)["env_steps"], read_result(run_dir)["resumed_at"]) == (60, [])
    assert len(list(run_dir.glob("events*"))) == 1

    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds a finished run; pass --resume or --overwrite, or"):
        train(Recording(), make_args(tmp_path))
    assert contents(run_dir) == before
    train(Recording(), make_args(tmp_path, overwrite=True, sam_rho=0.2))
    assert read_result(run_dir)["args"]["sam_rho"] == 0.2
    assert names(run_dir) == {".lock", "events.out", "result.json", "mine.txt"}


def test_overwrite_removes_nothing_before_the_new_run_can_begin(tmp_path, train, monkeypatch):
    run_dir = stopped_run(tmp_path, train)
    before = contents(run_dir)
    monkeypatch.setattr(atari.Agent, "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(Recording(), make_args(tmp_path, overwrite=True))
    assert contents(run_dir) == before


def test_resume_begins_where_there_is_nothing_and_leaves_a_finished_run_alone(tmp_path, train):
    train(Recording(), make_args(tmp_path, resume=True))
    run_dir = tmp_path / "Alien__x__1"
    before = contents(run_dir)
    (run_dir / "checkpoint.pth").write_bytes(b"left by a kill after the result")
    recording = Recording()
    train(recording, make_args(tmp_path, resume=True, log_interval=7))
    assert recording.actions == []
    assert contents(run_dir) == before


OTHER_FLAGS = dict(sam_rho=0.2, layer_norm=False, total_timesteps=70, eval_episodes=2)
OTHER_FLAGS |= dict(shrink_perturb_alpha=0.5, crelu_scope="all")


@pytest.mark.parametrize("name", OTHER_FLAGS)
@pytest.mark.parametrize("finished", [False, True])
def test_other_flags_are_refused_by_name(tmp_path, train, name, finished):
    run_dir = tmp_path / "Alien__x__1"
    if finished:
        train(Recording(), make_args(tmp_path))
    else:
        stopped_run(tmp_path, train)
    before = contents(run_dir)
    was = f"was made with --{name.replace('_', '-')} {getattr(make_args(tmp_path), name)}; use that"
    with pytest.raises(SystemExit, match=was):
        train(Recording(), make_args(tmp_path, resume=True, **{name: OTHER_FLAGS[name]}))
    assert contents(run_dir) == before


def test_flags_that_change_nothing_of_the_run_may_change(tmp_path, train):
    run_dir = stopped_run(tmp_path, train)
    moved = tmp_path / "moved" / run_dir.name
    shutil.move(run_dir, moved)
    flags = dict(log_interval=5, eval_interval=55, checkpoint_interval=7, cuda_graph=False)
    train(Recording(), make_args(moved.parent, resume=True, save_model=True, **flags))
    assert read_result(moved)["gradient_updates"] == 2 * 41
    assert [step for step, _ in scalars(moved)["eval/mean_return"]] == [55, 60]


def test_on_another_device_a_run_goes_on_with_new_draws(tmp_path, train):
    path = stopped_run(tmp_path, train) / "checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"]["device"] = "cuda"  # whose generators' states have another length
    checkpoint["generators"]["sampling"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(checkpoint, path)
    train(Recording(), make_args(tmp_path, resume=True))
    assert read_result(path.parent)["gradient_updates"] == 2 * 41


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


FOREIGN = {
    "text": lambda path: path.write_text("not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file with code": lambda path: torch.save({"args": Evil(), "target": Evil()}, path),
    "another torch file": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_gets_one_line_runs_no_code_and_stays(tmp_path, train, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = stopped_run(tmp_path, train) / "checkpoint.pth"
    FOREIGN[kind](path)
    before = contents(path.parent)
    with pytest.raises(
        SystemExit, match=r"checkpoint.pth: not a checkpoint of this script \(\w+\)"
    ):
        train(Recording(), make_args(tmp_path, resume=True))
    with pytest.raises(SystemExit, match=r"checkpoint.pth: not a model that this script saved"):
        atari.evaluate_saved(atari.Args(evaluate=str(path)))
    assert contents(path.parent) == before
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "flags, steps",
    [
        (dict(checkpoint_interval=0), []),
        (dict(checkpoint_interval=25), [25, 50, 60]),
        (dict(checkpoint_interval="auto"), [15, 30, 45, 60]),  # 5 minutes at 20 seconds a step
    ],
)
def test_checkpoints_are_written_when_they_should_be(tmp_path, train, monkeypatch, flags, steps):
    saved, original, recording, clock = [], atari.save_checkpoint, Recording(), time.perf_counter
    monkeypatch.setattr(atari.time, "perf_counter", lambda: clock() + 20 * recording.step_number)
    spy = lambda *call: saved.append(call[2].env_steps) or original(*call)  # noqa: E731
    monkeypatch.setattr(atari, "save_checkpoint", spy)
    train(recording, make_args(tmp_path, **flags))
    assert saved == steps


def test_what_a_dead_process_logged_after_its_checkpoint_is_not_shown(tmp_path, train, monkeypatch):
    writers, original = [], atari.SummaryWriter
    keep = lambda *args, **flags: writers.append(original(*args, **flags)) or writers[-1]  # noqa: E731
    monkeypatch.setattr(atari, "SummaryWriter", keep)
    recording = Recording()
    recording.at[57] = lambda: (writers[0].close(), 1 / 0)
    flags = dict(checkpoint_interval=20, log_interval=1, metrics_interval=9, total_timesteps=80)
    with pytest.raises(ZeroDivisionError):
        train(recording, make_args(tmp_path, **flags))
    assert scalars(tmp_path / "Alien__x__1")["losses/td_loss"][-1][0] == 56
    recording = Recording()
    recording.step_number = 60
    train(recording, make_args(tmp_path, resume=True, **flags))
    logged = scalars(tmp_path / "Alien__x__1")
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(20, 81))
    assert [step for step, _ in logged["plasticity/active_units/head"]] == list(range(27, 81, 9))


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


@pytest.mark.parametrize("name", ["evaluate", "finish"])
def test_an_interrupted_end_is_repeated_and_only_that(tmp_path, train, monkeypatch, name):
    original = getattr(atari, name)
    monkeypatch.setattr(atari, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(Recording(), make_args(tmp_path))
    monkeypatch.setattr(atari, name, original)
    recording = Recording()
    train(recording, make_args(tmp_path, resume=True))
    assert recording.actions == []
    assert read_result(tmp_path / "Alien__x__1")["resumed_at"] == [60]
    logged = scalars(tmp_path / "Alien__x__1")
    assert [step for step, _ in logged["eval/mean_return"]] == [60]


def test_a_second_signal_ends_the_process_at_once(tmp_path, train):
    recording, handlers = stop_at(41, signal.SIGINT), []

    def look():
        handlers.append([signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)])

    recording.at |= {40: look, 41: lambda: (signal.raise_signal(signal.SIGINT), look())}
    with pytest.raises(SystemExit) as exit_info:
        train(recording, make_args(tmp_path))
    assert exit_info.value.code == 130
    assert recording.step_number == 41
    assert signal.SIG_DFL not in handlers[0]
    assert handlers[1] == [signal.SIG_DFL, signal.SIG_DFL]


def test_numbers_that_are_not_finite_end_the_run_before_its_next_checkpoint(
    tmp_path, train, monkeypatch
):
    recording, original = Recording(), atari.cross_entropy
    faulty = lambda *call: original(*call) * (math.nan if recording.step_number == 35 else 1)  # noqa: E731
    monkeypatch.setattr(atari, "cross_entropy", faulty)
    with pytest.raises(SystemExit, match="step 40: td_loss is not finite"):
        train(recording, make_args(tmp_path, checkpoint_interval=10))
    run_dir = tmp_path / "Alien__x__1"
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    assert checkpoint["counters"]["env_steps"] == 30
    assert all(tensor.isfinite().all() for tensor in checkpoint["tensors"].values())
    assert not (run_dir / "result.json").exists()
    with pytest.raises(SystemExit, match="step 36: td_loss is not finite"):
        recording.step_number = 0
        train(recording, make_args(tmp_path, overwrite=True, log_interval=12))


def test_a_continued_run_begins_with_other_no_ops_than_any_before(tmp_path, train, monkeypatch):
    stopped_run(tmp_path, train)
    seeds = []
    make_envs = lambda env_id, num_envs, seed: seeds.append(seed) or Recording()  # noqa: E731
    monkeypatch.setattr(atari, "make_envs", make_envs)
    atari.run(make_args(tmp_path, resume=True))
    assert seeds[-1] not in (1, *range(20_000, 30_000))  # of the first process, of the evaluation


def test_weights_and_biases_goes_on_under_the_same_id(tmp_path, train, monkeypatch):
    calls = []

    def init(**kwargs):
        calls.append(kwargs)
        return SimpleNamespace(id="id7")

    stopped_run(tmp_path / "untracked", train)
    stand_in = SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    stopped_run(tmp_path, train, track=True, wandb_project_name="p", wandb_entity="e")
    flags = dict(wandb_project_name="p", wandb_entity="e")
    train(Recording(), make_args(tmp_path, resume=True, track=True, **flags))
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("id7", "allow")]
    assert (calls[0]["project"], calls[0]["entity"], calls[0]["name"]) == ("p", "e", "Alien__x__1")
    assert calls[0]["sync_tensorboard"] is True
    assert calls[0]["config"]["sam_rho"] == 0.1


# --- Real games -----------------------------------------------------------------------------------

SHORT = "--device cpu --total-timesteps 45 --learning-starts 20 --buffer-size 200 --eval-episodes 2"
BASE = "--no-layer-norm --no-crelu --sam-rho 0"
METHODS = {"base": f"{BASE} --reset-interval 0", "dagger": "--no-crelu --sam-rho 0", "plastic": ""}
KEYS = """script exp_name env_id seed args env_steps gradient_updates resets training_seconds wall_clock_seconds
resumed_at git_commit wandb_id env_steps_per_second updates_per_second parameters episode_returns mean_return
human_normalized_score device versions""".split()


def script(tmp_path, flags):
    """Run the script from an empty directory; returns the finished process."""
    command = [sys.executable, str(SCRIPT), *flags.split()]
    env = os.environ | {"PYTHONWARNINGS": "error"}
    return subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_past_learning_starts_and_resets(tmp_path, method):
    resets = "" if method == "base" else "--reset-interval 30"
    flags = f"{SHORT} --replay-ratio 4 --exp-name {method} --log-interval 20 --metrics-interval 30"
    finished = script(tmp_path, f"{flags} {resets} {METHODS[method]}")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("\n") == 1  # no bar where there is no terminal, no warning
    run_dir = tmp_path / f"runs/Alien__{method}__1"
    result, logged = read_result(run_dir), scalars(run_dir)
    assert list(result) == KEYS
    assert (result["script"], result["env_steps"]) == ("plastic_drq_rainbow_atari.py", 45)
    assert result["gradient_updates"] == (45 - 20 + 1) * 4
    assert result["resets"] == (0 if method == "base" else 3)  # at updates 30, 60, 90 of 104
    assert result["args"]["shrink_perturb_alpha"] == (1.0 if method == "base" else 0.6)
    assert set(result["args"]) == set(atari.Args.__dataclass_fields__)
    mean_return = sum(result["episode_returns"]) / 2
    assert result["mean_return"] == mean_return
    assert result["human_normalized_score"] == pytest.approx((mean_return - 227.8) / 6899.9)
    assert f"Alien: mean return {mean_return:.1f} over 2 games" in finished.stdout
    assert math.isclose(result["updates_per_second"] / result["env_steps_per_second"], 104 / 45)
    losses = {f"losses/{name}" for name in ("td_loss", "q_values", "gradient_norm")}
    assert losses | {"charts/SPS", "charts/resets", "eval/human_normalized_score"} <= set(logged)
    assert [step for step, _ in logged["losses/td_loss"]] == [20, 40, 45]
    assert logged["eval/mean_return"] == [(45, pytest.approx(mean_return))]
    assert logged["plasticity/hessian_max_eigenvalue"][0][0] == 30
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    if method == "plastic":  # CReLU: of each pair, one is above 0
        assert logged["plasticity/active_units/head"] == [(30, pytest.approx(0.5, abs=1e-3))]


def test_equal_seeds_give_equal_runs_and_measuring_changes_nothing(tmp_path, train, monkeypatch):
    monkeypatch.undo()  # real games; `train` puts signal handlers back
    flags = dict(total_timesteps=45, reset_interval=20, save_model=True, eval_episodes=2)
    weights = []
    measured = dict(metrics_interval=10, eval_interval=30, log_interval=1)
    for i, others in enumerate([{}, {}, measured, dict(seed=2)]):
        args = make_args(tmp_path, **flags | others | dict(exp_name=str(i)))
        atari.run(args)
        path = tmp_path / f"Alien__{i}__{args.seed}" / "model.pth"
        weights.append(torch.load(path, weights_only=True)["target"])
    a, b, c, d = weights
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert not torch.equal(a["backbone.0.weight"], d["backbone.0.weight"])


def test_a_saved_model_plays_its_games_again(tmp_path):
    flags = f"{SHORT} {BASE} --env-id MsPacman --hidden-dim 8 --torch-threads 3"
    first = script(tmp_path, f"{flags} --save-model --capture-video")
    assert first.returncode == 0, first.stderr
    (run_dir,) = tmp_path.glob("runs/*")
    assert read_result(run_dir)["device"] == "cpu, 3 threads"
    with Image.open(run_dir / "video.gif") as video:
        assert (video.size, video.n_frames > 10) == ((84, 84), True)

    model, gif = run_dir / "model.pth", run_dir / "model.pth.gif"
    flags = f"--evaluate {model} --eval-episodes 2 --seed 9 --env-id Pong --capture-video"
    again = script(tmp_path, flags)
    assert again.returncode == 0, again.stderr
    assert first.stdout == f"{again.stdout.strip()}; {run_dir.relative_to(tmp_path)}/result.json\n"
    before = gif.read_bytes()
    refused = script(tmp_path, flags)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert gif.read_bytes() == before


def test_a_saved_model_takes_the_commands_episodes_epsilon_and_device(tmp_path, train, monkeypatch):
    played = []
    train(Recording(), make_args(tmp_path, seed=5, save_model=True, layer_norm_scope="all"))
    monkeypatch.setattr(atari, "evaluate", lambda *call: played.append(call) or [1.0])
    path = tmp_path / "Alien__x__5" / "model.pth"
    flags = dict(evaluate=str(path), seed=9, env_id="Pong", eval_episodes=7, eval_epsilon=0.25)
    atari.evaluate_saved(atari.Args(device="cpu", **flags))
    ((network, args, video),) = played
    assert (args.env_id, args.seed, args.eval_episodes, args.eval_epsilon) == ("Alien", 5, 7, 0.25)
    assert video is None
    for name, value in torch.load(path, weights_only=True)["target"].items():
        assert torch.equal(network.state_dict()[name], value)


# --- Bad input ------------------------------------------------------------------------------------

BAD_FLAGS = {  # and a word that the message must have
    "--env-id Alein": "Alien", "--env-id alien": "Alien", "--env-id ALE/Alien-v5": "Alien",
    "--env-id montezuma_revenge": "MontezumaRevenge", "--env-id ../x": "no such game", "--torch-threads 100000": "--torch-threads",
    "--seed -1": "--seed", "--seed 200001": "--seed", "--exp-name a/b": "--exp-name",
    "--exp-name ..": "--exp-name", "--exp-name .": "--exp-name", "--replay-ratio 0": "--replay-ratio",
    "--batch-size 0": "--batch-size", "--learning-starts 19": "--n-step",
    "--learning-starts 100000": "--total-timesteps", "--total-timesteps 0": "--total-timesteps",
    "--learning-rate 0": "--learning-rate", "--learning-rate nan": "--learning-rate",
    "--learning-rate inf": "--learning-rate", "--adam-eps -1": "--adam-eps",
    "--max-grad-norm 0": "--max-grad-norm", "--gamma 1.01": "--gamma", "--n-step 0": "--n-step",
    "--n-atoms 1": "--n-atoms", "--v-min 10": "--v-min", "--v-max inf": "--v-max",
    "--v-min nan": "--v-min", "--hidden-dim 0": "--hidden-dim", "--noisy-std -0.1": "--noisy-std",
    "--buffer-size 19": "--buffer-size", "--per-alpha -1": "--per-alpha",
    "--per-beta 1.1": "--per-beta", "--target-ema 1.1": "--target-ema",
    "--aug-shift -1": "--aug-shift", "--aug-intensity -1": "--aug-intensity",
    "--sam-rho -0.1": "--sam-rho", "--sam-rho inf": "--sam-rho", "--sam-rho nan": "--sam-rho",
    "--reset-interval -1": "--reset-interval", "--shrink-perturb-alpha 1.1": "--shrink-perturb-alpha",
    "--shrink-perturb-alpha 0.5 --reset-interval 0": "--reset-interval",
    "--eval-episodes 0": "--eval-episodes", "--eval-epsilon 2": "--eval-epsilon",
    "--eval-interval -1": "--eval-interval", "--metrics-interval -1": "--metrics-interval",
    "--log-interval 0": "--log-interval", "--torch-threads -1": "--torch-threads",
    "--checkpoint-interval -1": "--checkpoint-interval", "--resume --overwrite": "--overwrite",
    "--checkpoint-interval often": "--checkpoint-interval", "--no-such-flag 1": "no-such-flag",
    "--sam-scope foot": "--sam-scope", "--evaluate missing.pth": "missing.pth",
    "--exp-name a/": "--exp-name", "--exp-name bell\a": "--exp-name",
}  # fmt: skip
if find_spec("wandb") is None:
    BAD_FLAGS["--track"] = "pip install wandb"


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gets_one_message_and_code_2_and_nothing_is_written(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(atari.Args, args=flags.split())
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert BAD_FLAGS[flags] in error
    assert error.count("For full helptext") == 1  # tyro's box
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_where_there_is_none_is_a_bad_flag_too(tmp_path):
    finished = script(tmp_path, "--device cuda")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "PyTorch finds no CUDA device" in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("game", ["Alien", "Tetris", "Adventure", "UpNDown"])
def test_any_of_envpools_atari_games_is_allowed(game):
    assert atari.Args(env_id=game).env_id == game


def test_a_directory_that_cannot_be_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    finished = script(tmp_path, "--run-dir file/runs")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (1, "", 1)
    assert finished.stderr.startswith("error: ") and "file" in finished.stderr


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(atari.Args, args=["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in atari.Args.__dataclass_fields__)
    lines = SCRIPT.read_text().split("class Args:")[1].split("def __post_init__")[0].splitlines()
    flags = [i for i, line in enumerate(lines) if line[4:5].isalpha() and " = " in line]
    assert len(flags) == len(atari.Args.__dataclass_fields__)
    assert all("  # " in lines[i] or lines[i - 1].startswith("    # ") for i in flags)


# --- Processes ------------------------------------------------------------------------------------

FLAGS = "--device cpu --resume --exp-name x --learning-starts 20 --batch-size 4 --hidden-dim 4 --n-atoms 5".split()
FLAGS += "--buffer-size 300 --eval-episodes 1 --torch-threads 1 --log-interval 10".split()


def start(tmp_path, flags, shell=""):
    """The script as a process, after some words in a shell of its own."""
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path), *FLAGS, *flags.split()]
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def learning(run_dir):
    """Whether a run has logged something: its event file has grown."""
    return any(path.stat().st_size > 2000 for path in run_dir.glob("events*"))


def finish(tmp_path, steps, flags=""):
    """Let the run come to its end, and check that it is like an unbroken one, whatever happened on the way."""
    process = start(tmp_path, f"--total-timesteps {steps} {flags}")
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (0, 1), error
    run_dir = tmp_path / "Alien__x__1"
    result, logged = read_result(run_dir), scalars(run_dir)
    assert (result["env_steps"], result["gradient_updates"]) == (steps, 2 * (steps - 20 + 1))
    assert names(run_dir) == {".lock", "events.out", "result.json"}
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(20, steps + 1, 10))
    assert [step for step, _ in logged["eval/mean_return"]] == [steps]
    episodes = [step for step, _ in logged.get("charts/episodic_return", [])]
    assert episodes == sorted(set(episodes))
    return result


def kill_again_and_again(tmp_path, num_kills, steps, seconds, seed=0):
    """SIGKILL at random moments after the start, the first after a checkpoint; what is there must be whole."""
    rng, checkpoint = random.Random(seed), tmp_path / "Alien__x__1" / "checkpoint.pth"
    for _ in range(num_kills):
        process = start(tmp_path, f"--total-timesteps {steps} --checkpoint-interval 20")
        if not checkpoint.exists():  # on a busy machine, the start alone may take longer than that
            wait_for(checkpoint.exists, process)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(*seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before the kill: more steps"
        torch.load(checkpoint, weights_only=True)
    resumed_at = finish(tmp_path, steps, "--checkpoint-interval 20")["resumed_at"]
    assert resumed_at == sorted(resumed_at)
    assert all(step % 20 == 0 for step in resumed_at)
    return resumed_at


def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    assert len(kill_again_and_again(tmp_path, 3, 700, (3, 5))) > 0


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_an_unbroken_one(tmp_path):
    assert len(kill_again_and_again(tmp_path, 20, 6000, (0, 8), seed=1)) > 3


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_last_checkpoint_and_the_run_goes_on_from_there(tmp_path, signum, code):
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps 250")
    wait_for(lambda: learning(run_dir), process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    step = torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["env_steps"]
    assert (process.returncode, error.splitlines()[1:]) == (code, [f"stopped after step {step}"])
    assert 20 <= step < 250
    assert finish(tmp_path, 250)["resumed_at"] == [step]


def test_a_signal_leaves_a_checkpoint_also_where_nobody_reads_the_messages(tmp_path):
    """As with `2>&1 | tee log` and Ctrl-C, of which tee dies first."""
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps 100000")
    wait_for(lambda: learning(run_dir), process)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    assert checkpoint["counters"]["env_steps"] >= 20


def test_a_signal_during_the_last_evaluation_ends_it_at_once(tmp_path):
    checkpoint = tmp_path / "Alien__x__1" / "checkpoint.pth"
    process = start(tmp_path, "--total-timesteps 60 --eval-episodes 100")
    wait_for(checkpoint.exists, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert torch.load(checkpoint, weights_only=True)["counters"]["env_steps"] == 60


def test_two_processes_never_work_in_one_directory(tmp_path):
    """The second one is refused; a dead process holds no lock."""
    run_dir = tmp_path / "Alien__x__1"
    first = start(tmp_path, "--total-timesteps 100000")
    wait_for(lambda: learning(run_dir), first)
    before = sorted(path.name for path in run_dir.iterdir())
    second = start(tmp_path, "--total-timesteps 100000")
    output, error = second.communicate(timeout=60)
    assert (second.returncode, output) == (1, "")
    assert error == f"error: another process is at work in {run_dir}\n"
    assert sorted(path.name for path in run_dir.iterdir()) == before
    first.kill()
    first.communicate()
    assert finish(tmp_path, 60, "--overwrite --no-resume")["resumed_at"] == []


def test_a_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint_stays(tmp_path):
    """`ulimit -f`: a checkpoint has about 4 MB here, all other files far less than 2."""
    checkpoint = tmp_path / "Alien__x__1" / "checkpoint.pth"
    flags = "--total-timesteps 100000 --checkpoint-interval 50"
    process = start(tmp_path, flags)
    wait_for(checkpoint.exists, process)
    process.kill()
    process.communicate()
    before = checkpoint.read_bytes()
    process = start(tmp_path, flags, shell='ulimit -f 2000; trap "" XFSZ;')
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[1:] == ["error: [Errno 27] File too large"]
    assert checkpoint.read_bytes() == before


def test_a_closed_standard_output_ends_no_run(tmp_path):
    process = start(tmp_path, "--total-timesteps 30", shell="exec >&-;")
    assert (process.wait(timeout=120), names(tmp_path / "Alien__x__1") >= {"result.json"}) == (
        0,
        True,
    )


@pytest.mark.slow
def test_memory_stays_flat_for_half_an_hour(tmp_path):
    """PLASTIC at full size, with metrics, evaluations and checkpoints. Prints memory and speed by tenths."""
    run_dir, samples = tmp_path / "Alien__x__1", []
    flags = "--hidden-dim 512 --n-atoms 51 --batch-size 32 --buffer-size 100000 --eval-episodes 2"
    flags += " --checkpoint-interval 200 --metrics-interval 200 --eval-interval 400"
    process = start(tmp_path, flags)
    wait_for((run_dir / "checkpoint.pth").exists, process, 600)
    begin = time.monotonic()
    while time.monotonic() - begin < 60 * float(os.environ.get("SOAK_MINUTES", "30")):
        assert process.poll() is None, process.communicate()
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        samples.append(pages * os.sysconf("SC_PAGESIZE") / 2**20)
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    medians = [np.median(part) for part in np.array_split(samples, 10)]
    print("\nresident MiB by tenths:", ", ".join(f"{mib:.0f}" for mib in medians))
    print("steps:", scalars(run_dir)["losses/td_loss"][-1][0])
    assert max(medians[2:]) - medians[1] < 50, medians
