"""DMC's run: its files, and the promises about stopping, continuing and bad input."""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plastic_drq_sac_dmc as dmc

SCRIPT = Path(dmc.__file__)
NAME = "cartpole-swingup_sparse__x__1"
SMALL = dict(image_size=16, batch_size=4, hidden_dim=8, latent_dim=4, learning_starts=25)


def make_args(run_dir, **flags):
    """80 agent steps, 56 updates."""
    flags = dict(env_id="cartpole-swingup_sparse", device="cpu", exp_name="x") | SMALL | flags
    return dmc.Args(run_dir=str(run_dir), **(dict(total_timesteps=160) | flags))


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


# --- On scripted episodes -------------------------------------------------------------------------


class Scripted:
    """Episodes of 10 steps; frames and rewards follow from the step and the action alone.

    So a run that is continued where an episode ended sees what an unbroken one sees. `at` maps a
    step of this process to what happens then.
    """

    episode_steps, action_dim, frame_shape = 10, 2, (1, 16, 16)

    def __init__(self, at=None):
        self.at, self.actions, self.seeds = at or {}, [], []

    def frame(self):
        rng = np.random.default_rng(self.step_number)
        return rng.integers(256, size=(1, 16, 16), dtype=np.uint8)

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.step_number = 0
        return self.frame(), {}

    def step(self, action):
        self.actions.append(action)
        self.step_number += 1
        self.at.get(len(self.actions), lambda: None)()
        return self.frame(), float(action.sum()), False, self.step_number == 10, {}


@pytest.fixture
def train(monkeypatch):
    """train(env, args) -> the agent and the replay buffer as they are at the end."""
    kept, handlers = {}, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def keep(cls):
        class Kept(cls):
            def __init__(self, *args):
                super().__init__(*args)
                kept[cls.__name__] = self

        return Kept

    def train(env, args):
        monkeypatch.setattr(dmc, "make_env", lambda args: env)
        dmc.run(args)
        return kept["Agent"], kept["ReplayBuffer"]

    for cls in (dmc.Agent, dmc.ReplayBuffer):
        monkeypatch.setattr(dmc, cls.__name__, keep(cls))
    monkeypatch.setattr(dmc, "evaluate", lambda agent, *_: [agent.log_alpha.item()])
    yield train
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def stop_at(step):
    """Episodes in one of whose steps SIGTERM comes."""
    return Scripted({step: lambda: signal.raise_signal(signal.SIGTERM)})


def stopped_run(tmp_path, train, **flags):
    """A run stopped at step 41; returns its directory."""
    with pytest.raises(SystemExit) as exit_info:
        train(stop_at(41), make_args(tmp_path, **flags))
    assert exit_info.value.code == 143
    return tmp_path / NAME


@pytest.mark.parametrize("stops", [(30,), (20, 50, 70), (80,)], ids=str)
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path, train, stops):
    """Stopped where an episode ends: before learning starts, around resets, at the end."""
    flags = dict(reset_interval=20, eval_interval=40, metrics_interval=35, log_interval=10)
    flags |= dict(buffer_size=40, save_model=True)  # so that the buffer wraps around
    whole = Scripted()
    agent, replay = train(whole, make_args(tmp_path / "whole", **flags))
    tensors = {**agent.tensors(), **replay.tensors()}
    generators = [torch.get_rng_state(), agent.generator.get_state()]

    actions, done = [], 0
    for step in stops:
        with pytest.raises(SystemExit):
            train(env := stop_at(step - done), make_args(tmp_path / "broken", resume=True, **flags))
        actions, done = actions + env.actions, step
        torch.manual_seed(999)  # nothing may come from this process
    env = Scripted()
    agent, replay = train(env, make_args(tmp_path / "broken", resume=True, **flags))

    assert np.array_equal(actions + env.actions, whole.actions)
    for name, tensor in {**agent.tensors(), **replay.tensors()}.items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(agent.generator.get_state(), generators[1])
    runs = [tmp_path / run / NAME for run in ("whole", "broken")]
    logged = [scalars(run) for run in runs]
    for one in logged:
        del one["charts/SPS"]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[1]["losses/td_loss"]] == list(range(30, 81, 10))
    assert [step for step, _ in logged[1]["eval/mean_return"]] == [40, 80]
    results = [read_result(run) for run in runs]
    assert [result.pop("resumed_at") for result in results] == [[], list(stops)]
    same = ("env_steps", "agent_steps", "gradient_updates", "resets", "episode_returns")
    assert all(results[0][key] == results[1][key] for key in same)
    assert results[1]["resets"] == 2
    assert names(runs[1]) == {".lock", "events.out", "result.json", "model.pth"}


def test_no_reset_on_the_last_step(tmp_path, train):
    for interval, resets in ((56, 0), (55, 1), (28, 1)):
        args = make_args(tmp_path, reset_interval=interval, exp_name=str(interval))
        _, replay = train(Scripted(), args)
        result = read_result(tmp_path / f"cartpole-swingup_sparse__{interval}__1")
        assert (result["gradient_updates"], result["resets"]) == (56, resets)
        assert replay.slots == 80 + 8 + 3  # of 80 steps in 8 episodes, not of a million


def test_an_update_comes_before_its_steps_transition(tmp_path, train, monkeypatch):
    """The first one at step learning_starts, on the transitions of the steps before."""
    seen, original = [], dmc.ReplayBuffer.sample

    def sample(self, batch_size, generator):
        seen.append(int(self.valid.sum()))
        return original(self, batch_size, generator)

    monkeypatch.setattr(dmc.ReplayBuffer, "sample", sample)
    train(Scripted(), make_args(tmp_path, total_timesteps=60, updates_per_step=2))
    assert seen == [n for step in range(25, 31) for n in (step - 1, step - 1)]


@pytest.mark.parametrize("ended_by_the_task", [False, True])
def test_only_the_tasks_own_end_ends_the_return(tmp_path, train, monkeypatch, ended_by_the_task):
    """Episodes of 10 steps: a time limit is stored as no end at all."""
    env, step, stored, add = Scripted(), Scripted.step, [], dmc.ReplayBuffer.add

    def spy(self, action, reward, terminated, frame):
        stored.append(bool(terminated))
        add(self, action, reward, terminated, frame)

    def swapped(action):
        frame, reward, terminated, truncated, info = step(env, action)
        return frame, reward, truncated, terminated, info

    monkeypatch.setattr(dmc.ReplayBuffer, "add", spy)
    if ended_by_the_task:
        env.step = swapped
    train(env, make_args(tmp_path))
    assert stored == [ended_by_the_task and n % 10 == 0 for n in range(1, 81)]
    assert [step for step, _ in scalars(tmp_path / NAME)["charts/episodic_length"]] == [
        *range(10, 81, 10)
    ]


def test_the_first_actions_are_uniform(tmp_path, train):
    train(env := Scripted(), make_args(tmp_path, total_timesteps=1204, learning_starts=600))
    first = np.array(env.actions[:600])
    assert first.shape == (600, 2) and np.abs(first).max() <= 1
    counts, _ = np.histogram(first, bins=4, range=(-1, 1))
    assert np.abs(counts - 300).max() < 5 * 300**0.5


def test_what_is_there_is_neither_taken_up_nor_lost_without_being_told(tmp_path, train):
    run_dir = stopped_run(tmp_path, train)
    (run_dir / "mine.txt").write_text("mine")
    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds an unfinished run; pass --resume or --overwrite"):
        train(Scripted(), make_args(tmp_path))
    assert contents(run_dir) == before
    train(Scripted(), make_args(tmp_path, overwrite=True))
    assert (read_result(run_dir)["agent_steps"], read_result(run_dir)["resumed_at"]) == (80, [])

    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds a finished run; pass --resume or --overwrite"):
        train(Scripted(), make_args(tmp_path))
    train(env := Scripted(), make_args(tmp_path, resume=True, log_interval=7))
    assert (contents(run_dir), env.actions) == (before, [])
    train(Scripted(), make_args(tmp_path, overwrite=True, sam_rho=0.2))
    assert read_result(run_dir)["args"]["sam_rho"] == 0.2
    assert names(run_dir) == {".lock", "events.out", "result.json", "mine.txt"}


@pytest.mark.parametrize("name", ["sam_rho", "crelu", "total_timesteps", "action_repeat"])
@pytest.mark.parametrize("finished", [False, True])
def test_other_flags_are_refused_by_name(tmp_path, train, name, finished):
    other = dict(sam_rho=0.3, crelu=False, total_timesteps=180, action_repeat=1)[name]
    if finished:
        train(Scripted(), make_args(tmp_path))
    else:
        stopped_run(tmp_path, train)
    before = contents(tmp_path / NAME)
    was = f"was made with --{name.replace('_', '-')} {getattr(make_args(tmp_path), name)}; use that"
    with pytest.raises(SystemExit, match=was):
        train(Scripted(), make_args(tmp_path, resume=True, **{name: other}))
    assert contents(tmp_path / NAME) == before


def test_flags_that_change_nothing_of_the_run_may_change(tmp_path, train):
    run_dir = stopped_run(tmp_path, train)
    flags = dict(log_interval=5, eval_interval=55, checkpoint_interval=7, cuda_graph=False)
    train(Scripted(), make_args(tmp_path, resume=True, save_model=True, **flags))
    assert read_result(run_dir)["gradient_updates"] == 56
    assert [step for step, _ in scalars(run_dir)["eval/mean_return"]] == [55, 80]


@pytest.mark.parametrize("flag", ["device", "replay_device"])
def test_on_another_device_a_run_goes_on_with_new_draws(tmp_path, train, flag):
    path = stopped_run(tmp_path, train) / "checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"][flag] = "cuda"  # whose generators' states have another length
    checkpoint["generators"]["sampling"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(checkpoint, path)
    train(Scripted(), make_args(tmp_path, resume=True))
    assert read_result(path.parent)["gradient_updates"] == 56


def test_a_continued_run_begins_an_episode_of_its_own(tmp_path, train):
    stopped_run(tmp_path, train)
    train(env := Scripted(), make_args(tmp_path, resume=True))
    assert env.seeds[0] not in (1, *range(20_000, 30_000))  # of the first process, of evaluations
    assert env.seeds[1:] == [None] * 3  # the suite's own stream goes on


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


FOREIGN = {
    "text": lambda path: path.write_text("not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file with code": lambda path: torch.save({"args": Evil(), "actor": Evil()}, path),
    "another torch file": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_gets_one_line_runs_no_code_and_stays(tmp_path, train, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = stopped_run(tmp_path, train) / "checkpoint.pth"
    FOREIGN[kind](path)
    before = contents(path.parent)
    with pytest.raises(SystemExit, match=r"checkpoint.pth: not a checkpoint of this script \(\w+"):
        train(Scripted(), make_args(tmp_path, resume=True))
    with pytest.raises(SystemExit, match=r"checkpoint.pth: not a model that this script saved"):
        dmc.evaluate_saved(dmc.Args(evaluate=str(path)))
    assert contents(path.parent) == before
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "flags, steps",
    [
        (dict(checkpoint_interval=0), []),
        (dict(checkpoint_interval=25), [25, 50, 75, 80]),
        (dict(checkpoint_interval="auto"), [15, 30, 45, 60, 75, 80]),  # 5 minutes at 20 s a step
    ],
)
def test_checkpoints_are_written_when_they_should_be(tmp_path, train, monkeypatch, flags, steps):
    saved, original, env, clock = [], dmc.save_checkpoint, Scripted(), time.perf_counter
    monkeypatch.setattr(dmc.time, "perf_counter", lambda: clock() + 20 * len(env.actions))
    spy = lambda *call: saved.append(call[2].agent_steps) or original(*call)  # noqa: E731
    monkeypatch.setattr(dmc, "save_checkpoint", spy)
    train(env, make_args(tmp_path, **flags))
    assert saved == steps


def test_what_a_dead_process_logged_after_its_checkpoint_is_not_shown(tmp_path, train, monkeypatch):
    writers, original = [], dmc.SummaryWriter
    keep = lambda *args, **flags: writers.append(original(*args, **flags)) or writers[-1]  # noqa: E731
    monkeypatch.setattr(dmc, "SummaryWriter", keep)
    env = Scripted({57: lambda: (writers[0].close(), 1 / 0)})
    flags = dict(checkpoint_interval=20, log_interval=1)
    with pytest.raises(ZeroDivisionError):
        train(env, make_args(tmp_path, **flags))
    assert scalars(tmp_path / NAME)["losses/td_loss"][-1][0] == 56
    train(Scripted(), make_args(tmp_path, resume=True, **flags))
    logged = scalars(tmp_path / NAME)
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(25, 81))


@pytest.mark.parametrize("name", ["evaluate", "finish"])
def test_an_interrupted_end_is_repeated_and_only_that(tmp_path, train, monkeypatch, name):
    original = getattr(dmc, name)
    monkeypatch.setattr(dmc, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(Scripted(), make_args(tmp_path))
    monkeypatch.setattr(dmc, name, original)
    train(env := Scripted(), make_args(tmp_path, resume=True))
    assert env.actions == []
    assert read_result(tmp_path / NAME)["resumed_at"] == [80]
    assert [step for step, _ in scalars(tmp_path / NAME)["eval/mean_return"]] == [80]


def test_weights_that_are_not_finite_end_the_run_before_its_next_checkpoint(
    tmp_path, train, monkeypatch
):
    original, env = dmc.td_loss, Scripted()
    faulty = lambda *call: original(*call) * (math.nan if len(env.actions) == 39 else 1)  # noqa: E731
    monkeypatch.setattr(dmc, "td_loss", faulty)
    # At once, where a checkpoint is due; else the next action tells.
    for step, flags in ((40, dict(checkpoint_interval=10)), (41, dict(checkpoint_interval=25))):
        env.actions = []
        with pytest.raises(SystemExit, match=f"step {step}: td_loss is not finite"):
            train(env, make_args(tmp_path, overwrite=True, **flags))
        checkpoint = torch.load(tmp_path / NAME / "checkpoint.pth", weights_only=True)
        assert checkpoint["counters"]["agent_steps"] == (30 if step == 40 else 25)
        assert all(tensor.isfinite().all() for tensor in checkpoint["tensors"].values())
    assert not (tmp_path / NAME / "result.json").exists()


@pytest.mark.parametrize(
    "env_id, updates, resets", [("hopper-hop", 999_001, 9), ("reacher-easy", 499_001, 4)]
)
def test_updates_and_resets_of_a_full_run(env_id, updates, resets):
    args = dmc.Args(env_id=env_id, device="cpu")
    due = [n for n in range(1, 1 + updates) if dmc.due(args.reset_interval, n)]
    assert args.agent_steps - args.learning_starts + 1 == updates
    assert len(due) == resets and due[-1] < updates


def test_values_that_are_auto_or_the_tasks():
    quadruped, cheetah = dmc.Args(env_id="quadruped-walk"), dmc.Args(env_id="cheetah-run")
    assert (quadruped.sam_rho, quadruped.action_repeat) == (0.1, 2)
    assert (cheetah.sam_rho, cheetah.action_repeat) == (0.01, 4)
    own = dmc.Args(env_id="quadruped-run", sam_rho=0.0, action_repeat=8, device="cpu")
    assert (own.sam_rho, own.action_repeat, own.replay_device) == (0.0, 8, "cpu")


# --- Real tasks -----------------------------------------------------------------------------------

# Episodes of 125 agent steps.
SHORT = (
    "--env-id cartpole-swingup_sparse --action-repeat 8 --device cpu --exp-name x --image-size 16 "
    "--learning-starts 20 --batch-size 4 --hidden-dim 8 --latent-dim 4 --render-quality fast "
    "--torch-threads 1 --log-interval 10 --eval-episodes 1"
).split()
METHODS = {
    "base": "--no-layer-norm --no-crelu --sam-rho 0 --reset-interval 0",
    "plastic": "--reset-interval 50 --metrics-interval 60",
}
KEYS = """script exp_name env_id seed args env_steps agent_steps gradient_updates resets
training_seconds wall_clock_seconds resumed_at git_commit wandb_id env_steps_per_second
updates_per_second parameters episode_returns mean_return mujoco_gl device versions""".split()


def start(tmp_path, flags, shell="", **env):
    """The script as a process, after some words in a shell of its own."""
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path), *SHORT, *flags.split()]
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | env, **pipes)


def run(tmp_path, flags, **env):
    process = start(tmp_path, flags, **env)
    output, error = process.communicate(timeout=300)
    return process.returncode, output, error


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_past_resets_and_its_saved_model(tmp_path, method):
    flags = f"{METHODS[method]} --total-timesteps 1200 --eval-episodes 2 --eval-interval 80"
    code, output, error = run(tmp_path, f"{flags} --save-model --capture-video")
    assert (code, error.count("\n")) == (0, 1), error  # no bar where there is no terminal
    run_dir = tmp_path / NAME
    result, logged = read_result(run_dir), scalars(run_dir)
    assert list(result) == KEYS
    assert (result["env_steps"], result["agent_steps"]) == (1200, 150)
    assert (result["gradient_updates"], result["resets"]) == (131, 0 if method == "base" else 2)
    assert set(result["args"]) == set(dmc.Args.__dataclass_fields__)
    assert result["mean_return"] == sum(result["episode_returns"]) / 2
    assert all(0 <= value <= 1000 for value in result["episode_returns"])
    assert math.isclose(result["updates_per_second"] / result["env_steps_per_second"], 131 / 1200)
    assert output.endswith(f"over 2 episodes; {run_dir}/result.json\n")
    losses = "td_loss actor_loss q_values entropy alpha_loss temperature weight_norm".split()
    assert {f"losses/{name}" for name in losses} | {"charts/SPS", "charts/resets"} <= set(logged)
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(20, 151, 10))
    assert [step for step, _ in logged["eval/mean_return"]] == [80, 150]
    assert logged["charts/episodic_length"] == [(125, 125)]
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    if method == "plastic":
        assert [step for step, _ in logged["plasticity/hessian_max_eigenvalue"]] == [60, 120]
        shares = {tag: series[0][1] for tag, series in logged.items() if "active_units" in tag}
        layers = {tag.removeprefix("plasticity/active_units/") for tag in shares}
        assert {"backbone", "head", "backbone.2", "head.q_functions.1.0.3"} <= layers
        assert 0 < shares["plasticity/active_units/backbone"] < 1
        assert shares["plasticity/active_units/head"] == pytest.approx(0.5, abs=0.01)  # CReLU
    with Image.open(run_dir / "video.gif") as video:
        assert video.size == (16, 16) and 1 < video.n_frames <= 125  # equal frames are one
        assert video.info["duration"] % 40 == 0

    flags = f"--evaluate {run_dir}/model.pth --device cpu --eval-episodes 2 --capture-video"
    command = [sys.executable, str(SCRIPT), *flags.split(), "--seed", "9"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stderr) == (0, "")
    assert output == f"{again.stdout.strip()}; {run_dir}/result.json\n"
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert (run_dir / "model.pth.gif").read_bytes() == (run_dir / "video.gif").read_bytes()


def test_equal_seeds_give_equal_runs_and_measuring_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dmc, "on_stop_signals", lambda handler: None)  # pytest's stay
    flags = dict(reset_interval=15, save_model=True, eval_episodes=1, render_quality="fast")
    flags |= dict(action_repeat=8, total_timesteps=400)
    measured = dict(metrics_interval=10, eval_interval=30, log_interval=1)
    weights = []
    for i, others in enumerate([{}, {}, measured, dict(seed=2)]):
        dmc.run(args := make_args(tmp_path, **flags | others | dict(exp_name=str(i))))
        path = tmp_path / f"cartpole-swingup_sparse__{i}__{args.seed}" / "model.pth"
        weights.append(torch.load(path, weights_only=True)["actor"])
    a, b, c, d = weights
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert not torch.equal(a["mean.weight"], d["mean.weight"])


def test_cheetahs_model_gives_no_warnings(tmp_path):
    flags = "--env-id cheetah-run --total-timesteps 240"
    code, _, error = run(tmp_path, flags)
    assert (code, error.count("\n")) == (0, 1), error


@pytest.mark.parametrize("renderer", ["osmesa", "glfw", "disable", "nonsense"])
def test_a_renderer_that_does_not_work(tmp_path, renderer):
    if renderer == "osmesa" and find_library("OSMesa"):
        pytest.skip("libOSMesa is installed")
    env = dict(MUJOCO_GL=renderer, DISPLAY="", PYTHONWARNINGS="ignore")
    code, output, error = run(tmp_path, "--total-timesteps 480", **env)
    assert (code, output) == (1, "")
    assert error.startswith(f"error: MuJoCo cannot render with MUJOCO_GL={renderer}: install")
    assert "Traceback" not in error


def test_images_larger_than_the_suites_screen():
    frame, _ = dmc.make_env(make_args("", image_size=500)).reset()
    assert frame.shape == (1, 500, 500) and frame[0, 490:].any() and frame[0, :, 490:].any()


# --- Bad input ------------------------------------------------------------------------------------

BAD_FLAGS = {  # and a word that the message must have
    "--env-id walker-fly": "walker-", "--env-id Alien": "closest", "--env-id cartpole": "cartpole-",
    "--env-id lqr-lqr_2_1": "no such task", "--seed -1": "--seed", "--seed 200001": "--seed",
    "--total-timesteps 0": "--learning-starts", "--total-timesteps 2000": "--learning-starts",
    "--action-repeat -1": "--action-repeat", "--frame-stack 0": "--frame-stack",
    "--image-size 8": "--image-size", "--updates-per-step 0": "--updates-per-step",
    "--batch-size 0": "--batch-size", "--learning-starts 1": "--learning-starts",
    "--learning-rate nan": "--learning-rate", "--learning-rate inf": "--learning-rate",
    "--gamma 1.1": "--gamma", "--target-ema -0.1": "--target-ema", "--aug-shift 16": "--aug-shift",
    "--initial-temperature 0": "--initial-temperature", "--buffer-size 0": "--buffer-size",
    "--latent-dim 0": "--latent-dim", "--hidden-dim 0": "--hidden-dim",
    "--sam-rho -0.1": "--sam-rho", "--sam-rho inf": "--sam-rho", "--sam-rho nan": "--sam-rho",
    "--sam-scope head": "--sam-scope", "--render-quality low": "--render-quality",
    "--reset-interval -1": "--reset-interval", "--eval-episodes 0": "--eval-episodes",
    "--eval-interval -1": "--eval-interval", "--metrics-interval -1": "--metrics-interval",
    "--log-interval 0": "--log-interval", "--torch-threads -1": "--torch-threads",
    "--exp-name ..": "--exp-name", "--exp-name a/b": "--exp-name", "--no-such-flag": "no-such-flag",
    "--resume --overwrite": "--overwrite", "--checkpoint-interval soon": "--checkpoint-interval",
    "--checkpoint-interval -1": "--checkpoint-interval", "--evaluate no.pth": "no.pth",
    "--device cpu --replay-device cuda": "--replay-device",
}  # fmt: skip
if find_spec("wandb") is None:
    BAD_FLAGS["--track"] = "pip install wandb"


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gets_one_message_and_code_2_and_nothing_is_written(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(dmc.Args, args=flags.split())
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert BAD_FLAGS[flags] in error
    assert error.count("For full helptext") == 1  # tyro's box
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(dmc.Args, args=["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in dmc.Args.__dataclass_fields__)
    lines = SCRIPT.read_text().split("class Args:")[1].split("def __post_init__")[0].splitlines()
    flags = [i for i, line in enumerate(lines) if line[4:5].isalpha() and " = " in line]
    assert len(flags) == len(dmc.Args.__dataclass_fields__)
    assert all("  # " in lines[i] or lines[i - 1].startswith("    # ") for i in flags)


# --- Processes ------------------------------------------------------------------------------------


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def learning(run_dir):
    """Whether a run has logged something: its event file has grown."""
    return any(path.stat().st_size > 2000 for path in run_dir.glob("events*"))


def finish(tmp_path, steps, flags):
    """Let the run come to its end, and check that it is like an unbroken one."""
    code, _, error = run(tmp_path, f"--total-timesteps {8 * steps} {flags}")
    assert (code, error.count("\n")) == (0, 1), error
    result, logged = read_result(tmp_path / NAME), scalars(tmp_path / NAME)
    assert (result["agent_steps"], result["gradient_updates"]) == (steps, steps - 20 + 1)
    assert names(tmp_path / NAME) == {".lock", "events.out", "result.json"}
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(20, steps + 1, 10))
    assert [step for step, _ in logged["eval/mean_return"]] == [steps]
    episodes = [step for step, _ in logged.get("charts/episodic_return", [])]
    assert episodes == sorted(set(episodes))
    return result


def kill_again_and_again(tmp_path, num_kills, steps, seconds, seed=0):
    """SIGKILL at random moments after the start, the first after a checkpoint."""
    rng, checkpoint = random.Random(seed), tmp_path / NAME / "checkpoint.pth"
    flags = "--resume --checkpoint-interval 20"
    for _ in range(num_kills):
        process = start(tmp_path, f"{flags} --total-timesteps {8 * steps}")
        if not checkpoint.exists():  # on a busy machine, the start alone may take longer than that
            wait_for(checkpoint.exists, process)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(*seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before the kill: more steps"
        torch.load(checkpoint, weights_only=True)
    resumed_at = finish(tmp_path, steps, flags)["resumed_at"]
    assert resumed_at == sorted(resumed_at)
    assert all(step % 20 == 0 for step in resumed_at)
    return resumed_at


def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    assert len(kill_again_and_again(tmp_path, 3, 1200, (4, 6))) > 0


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_an_unbroken_one(tmp_path):
    assert len(kill_again_and_again(tmp_path, 20, 20_000, (0, 8), seed=1)) > 3


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_last_checkpoint_and_the_run_goes_on_from_there(tmp_path, signum, code):
    process = start(tmp_path, "--total-timesteps 6400")
    wait_for(lambda: learning(tmp_path / NAME), process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    checkpoint = torch.load(tmp_path / NAME / "checkpoint.pth", weights_only=True)
    step = checkpoint["counters"]["agent_steps"]
    assert (process.returncode, error.splitlines()[1:]) == (code, [f"stopped after step {step}"])
    assert 20 <= step < 800
    assert finish(tmp_path, 800, "--resume")["resumed_at"] == [step]


def test_a_signal_leaves_a_checkpoint_also_where_nobody_reads_the_messages(tmp_path):
    """As with `2>&1 | tee log` and Ctrl-C, of which tee dies first."""
    process = start(tmp_path, "--total-timesteps 1000000")
    wait_for(lambda: learning(tmp_path / NAME), process)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    checkpoint = torch.load(tmp_path / NAME / "checkpoint.pth", weights_only=True)
    assert checkpoint["counters"]["agent_steps"] >= 20


def test_a_signal_during_the_last_evaluation_ends_it_at_once(tmp_path):
    checkpoint = tmp_path / NAME / "checkpoint.pth"
    process = start(tmp_path, "--total-timesteps 480 --eval-episodes 1000")
    wait_for(checkpoint.exists, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert torch.load(checkpoint, weights_only=True)["counters"]["agent_steps"] == 60


def test_two_processes_never_work_in_one_directory(tmp_path):
    """The second one is refused; a dead process holds no lock."""
    first = start(tmp_path, "--total-timesteps 1000000")
    wait_for(lambda: learning(tmp_path / NAME), first)
    code, output, error = run(tmp_path, "--total-timesteps 1000000")
    assert (code, output) == (1, "")
    assert error == f"error: another process is at work in {tmp_path / NAME}\n"
    first.kill()
    first.communicate()
    assert finish(tmp_path, 60, "--overwrite")["resumed_at"] == []


def test_a_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint_stays(tmp_path):
    """`ulimit -f`: a checkpoint has about 20 MB here, all other files far less."""
    checkpoint = tmp_path / NAME / "checkpoint.pth"
    process = start(tmp_path, "--total-timesteps 80000 --checkpoint-interval 100")
    wait_for(checkpoint.exists, process)
    process.kill()
    process.communicate()
    before = checkpoint.read_bytes()
    flags = "--total-timesteps 80000 --resume --checkpoint-interval 50"
    process = start(tmp_path, flags, shell='ulimit -f 2000; trap "" XFSZ;')
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[1:] == ["error: [Errno 27] File too large"]
    assert checkpoint.read_bytes() == before
