"""Stopping and continuing: what a checkpoint holds, what kills a run and what does not, who may write where."""

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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plastic_drq_rainbow_atari as atari

SCRIPT = Path(__file__).parent.parent / "plastic_drq_rainbow_atari.py"
SMALL = dict(
    buffer_size=300, learning_starts=20, batch_size=4, hidden_dim=4, n_atoms=5, eval_episodes=1
)
NAME = "plastic_drq_rainbow_atari"


def make_args(run_dir, **flags):
    flags = dict(device="cpu", run_dir=run_dir, total_timesteps=60, exp_name="x") | SMALL | flags
    return atari.resolve(atari.Args(**flags))


def scalars(run_dir):
    """{tag: [(step, value), ...]} over all event files, nothing purged; sorted, as files of one second are not."""
    events = EventAccumulator(str(run_dir), purge_orphaned_data=False)
    events.Reload()
    return {
        tag: sorted((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


class Recording:
    """A recorded stream of frames, rewards and ends in place of the emulator: it goes on where it was left.

    An episode ends every 30 steps, a life is lost at step 17 of each. `at` maps a step to what to do then.
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
def recorded(monkeypatch):
    """Runs on a recording: a function train(recording, args, stop) -> (agent, replay) as they are at the end."""
    kept = {}

    class KeptAgent(atari.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            kept["agent"] = self

    class KeptReplay(atari.ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            kept["replay"] = self

    monkeypatch.setattr(atari, "Agent", KeptAgent)
    monkeypatch.setattr(atari, "ReplayBuffer", KeptReplay)
    monkeypatch.setattr(
        atari, "evaluate", lambda network, *_: [float(network.head.value.output.bias_mu.sum())]
    )

    def train(recording, args, stop=None):
        monkeypatch.setattr(atari, "make_envs", lambda *_: recording)
        atari.run(args, stop or atari.Stop())
        return kept["agent"], kept["replay"]

    return train


def stop_at(recording, step, signum=signal.SIGTERM):
    """A Stop that receives the signal in the middle of an interaction."""
    stop = atari.Stop()
    recording.at[step] = lambda: stop.request(signum)
    return stop


# --- Exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(60,), (30, 90, 120)], ids=str)
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path, recorded, steps):
    """Stopped where an episode ends: there the emulator's state is not missed."""
    flags = dict(
        total_timesteps=150,
        reset_interval=70,
        shrink_perturb_alpha=0.5,
        log_interval=10,
        save_model=True,
    )
    flags |= dict(metrics_interval=45, eval_interval=40, buffer_size=90)  # the buffer wraps around
    whole = Recording()
    agent, replay = recorded(whole, make_args(tmp_path / "whole", **flags))
    tensors = {**agent.tensors(), **replay.tensors()}
    generators = [torch.get_rng_state(), agent.generator.get_state()]

    broken = Recording()
    for step in steps:
        with pytest.raises(SystemExit) as exit_info:
            recorded(
                broken, make_args(tmp_path / "broken", resume=True, **flags), stop_at(broken, step)
            )
        assert exit_info.value.code == 143
        assert broken.step_number == step
        torch.manual_seed(999)  # nothing may come from this process
    agent, replay = recorded(broken, make_args(tmp_path / "broken", resume=True, **flags))

    assert broken.actions == whole.actions
    for name, tensor in {**agent.tensors(), **replay.tensors()}.items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(agent.generator.get_state(), generators[1])
    runs = [next((tmp_path / run).glob("*")) for run in ("whole", "broken")]
    logged = [scalars(run) for run in runs]
    for one in logged:
        del one["charts/SPS"]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[1]["losses/td_loss"]] == list(range(20, 151, 10))
    assert [step for step, _ in logged[1]["eval/mean_return"]] == [40, 80, 120, 150]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert results[0].pop("resumed_at") == []
    assert results[1].pop("resumed_at") == list(steps)
    same = ("env_steps", "gradient_updates", "resets", "episode_returns", "skipped_updates")
    assert all(results[0][key] == results[1][key] for key in same)
    assert results[1]["wall_clock_seconds"] > 0
    assert {path.name.split(".")[0] for path in runs[1].iterdir()} == {
        "",
        "events",
        "result",
        "model",
    }


def test_a_checkpoint_holds_flags_counters_and_loads_without_running_code(tmp_path, recorded):
    recording = Recording()
    with pytest.raises(SystemExit):
        recorded(recording, make_args(tmp_path), stop_at(recording, 41))
    checkpoint = torch.load(tmp_path / "Alien__x__1" / "checkpoint.pth", weights_only=True)
    assert checkpoint["script"] == f"{NAME}.py"
    assert checkpoint["args"]["hidden_dim"] == 4
    counters = checkpoint["counters"]
    assert (counters["step"], counters["updates"], counters["resets"]) == (41, 2 * (41 - 20 + 1), 0)
    assert set(checkpoint["generators"]) == {"torch", "sampling", "metrics"}
    assert torch.equal(
        checkpoint["tensors"]["replay.frames"][7], torch.from_numpy(recording.frames[7, 0, 0])
    )
    assert checkpoint["tensors"]["counts"][0] == 44


def test_a_life_that_was_cut_off_ends_and_its_windows_are_never_sampled(tmp_path, recorded):
    """Stopped at step 41, continued at the start of an episode that loses a life in its 17th step; n = 10.

    A transition's slot is its step less 1 before the cut and its step after it: slot 41 holds the frame that nobody
    acted on. Slots 32 to 40 saw no frame 10 steps on; nor did 59 and 60, yet.
    """
    recording = Recording()
    with pytest.raises(SystemExit):
        recorded(recording, make_args(tmp_path), stop_at(recording, 41))
    recording.step_number = 60
    _, replay = recorded(recording, make_args(tmp_path, resume=True))
    assert replay.cursor == 61
    assert replay.priorities.nonzero().flatten().tolist() == [*range(32), *range(42, 59)]


def test_a_cut_replay_buffer_against_a_list_of_lives():
    """Random lives, some of them cut: what can be sampled, its return, discount and frames, by a slow reference."""
    rng = np.random.default_rng(3)
    n, gamma, capacity = 3, 0.5, 1000
    replay = atari.ReplayBuffer(capacity, n, gamma, torch.device("cpu"))
    value, expected = 0, {}

    def frame():
        nonlocal value
        value += 1
        return np.full((84, 84), value % 251, np.uint8)

    newest = frame()
    replay.start(newest)
    slot = 0
    for life in range(40):
        length, cut = int(rng.integers(1, 9)), life % 3 == 1
        frames, rewards = [newest], []
        for t in range(length):
            reward, end = float(rng.integers(-1, 2)), t == length - 1 and not cut
            newest = frame()
            frames.append(newest)
            rewards.append(reward)
            replay.add(0, reward, end, newest)
        for t in range(length):
            if cut and t + n > length:
                continue  # the frame after n steps was never seen
            steps = rewards[t : t + n]
            discount = gamma**n if t + n <= length - (not cut) else 0.0
            stack = [frames[i][0, 0] if i >= 0 else 0 for i in range(t - 3, t + 1)]
            expected[slot + t] = (sum(gamma**k * r for k, r in enumerate(steps)), discount, stack)
        slot += length
        if cut:
            newest = frame()
            replay.start(newest)
            slot += 1
    assert replay.priorities.nonzero().flatten().tolist() == sorted(expected)
    batch = replay.gather(torch.tensor(sorted(expected)))
    for i, index in enumerate(sorted(expected)):
        n_step_return, discount, stack = expected[index]
        assert (batch.n_step_return[i].item(), batch.discount[i].item()) == (
            n_step_return,
            discount,
        )
        assert batch.obs[i, :, 0, 0].tolist() == stack


# --- Which runs go on -------------------------------------------------------------------------------------------------


def listing(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stopped_run(tmp_path, recorded, **flags):
    """A run stopped at step 41; returns its directory."""
    recording = Recording()
    with pytest.raises(SystemExit):
        recorded(recording, make_args(tmp_path, **flags), stop_at(recording, 41))
    return tmp_path / "Alien__x__1"


def refused(call, capsys):
    """The one line that it ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        call()
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_an_unfinished_run_is_neither_taken_up_nor_lost_without_being_told(
    tmp_path, recorded, capsys
):
    run_dir = stopped_run(tmp_path, recorded)
    before = listing(run_dir)
    error = refused(lambda: recorded(Recording(), make_args(tmp_path)), capsys)
    assert "--resume" in error and "--overwrite" in error
    assert listing(run_dir) == before
    recorded(Recording(), make_args(tmp_path, overwrite=True))
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["env_steps"], result["resumed_at"]) == (60, [])
    assert len(list(run_dir.glob("events*"))) == 1
    assert not (run_dir / "checkpoint.pth").exists()


def test_resume_starts_where_there_is_nothing_and_leaves_a_finished_run_alone(
    tmp_path, recorded, capsys
):
    recorded(Recording(), make_args(tmp_path, resume=True))
    run_dir = tmp_path / "Alien__x__1"
    before = listing(run_dir)
    (run_dir / "checkpoint.pth").write_bytes(b"left by a kill after the result")
    capsys.readouterr()
    recorded(Recording(), make_args(tmp_path, resume=True))
    output = capsys.readouterr()
    assert (output.out, output.err) == (f"{run_dir}: finished already\n", "")
    assert listing(run_dir) == before
    error = refused(
        lambda: recorded(Recording(), make_args(tmp_path, resume=True, sam_rho=0.2)), capsys
    )
    assert "--sam-rho 0.1" in error
    for text in ("", "{", "null", "[" * 100_000, '{"args": 3}'):
        (run_dir / "result.json").write_text(text)
        assert "not a result" in refused(
            lambda: recorded(Recording(), make_args(tmp_path, resume=True)), capsys
        )
    (run_dir / "result.json").write_text('{"args": [[1, 2]]}')
    assert "another version" in refused(
        lambda: recorded(Recording(), make_args(tmp_path, resume=True)), capsys
    )


OTHER_FLAGS = {
    "sam_rho": 0.2, "replay_ratio": 1, "layer_norm": False, "hidden_dim": 8, "n_step": 5, "buffer_size": 200,
    "total_timesteps": 59, "eval_episodes": 2, "learning_rate": 2e-4, "reset_interval": 1000, "crelu_scope": "all",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FLAGS)
def test_other_flags_are_refused_by_name(tmp_path, recorded, capsys, name):
    run_dir = stopped_run(tmp_path, recorded)
    before = listing(run_dir)
    flags = {"resume": True, name: OTHER_FLAGS[name]}
    error = refused(lambda: recorded(Recording(), make_args(tmp_path, **flags)), capsys)
    flag, saved = name.replace("_", "-"), getattr(make_args(tmp_path), name)
    assert f"with --{flag} {saved};" in error or (saved is True and f"with --{flag};" in error)
    assert listing(run_dir) == before


def test_flags_that_change_nothing_of_the_run_may_change_and_it_may_grow(tmp_path, recorded):
    run_dir = stopped_run(tmp_path, recorded)
    moved = tmp_path / "moved" / run_dir.name
    moved.parent.mkdir()
    shutil.move(run_dir, moved)
    (moved / "video.gif.tmp").write_bytes(b"half of one, from a kill while it was written")
    flags = dict(
        total_timesteps=70,
        log_interval=5,
        eval_interval=65,
        checkpoint_interval=7,
        cuda_graph=False,
    )
    recorded(Recording(), make_args(tmp_path / "moved", resume=True, save_model=True, **flags))
    result = json.loads((moved / "result.json").read_text())
    assert (result["env_steps"], result["gradient_updates"]) == (70, 2 * 51)
    assert not list(moved.glob("*.tmp"))
    assert [step for step, _ in scalars(moved)["eval/mean_return"]] == [65, 70]


def test_a_checkpoint_of_another_kind_of_device_continues_with_new_draws(tmp_path, recorded):
    run_dir = stopped_run(tmp_path, recorded)
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    checkpoint["args"]["device"] = "cuda"  # whose generators' states have another length
    for name in ("sampling", "metrics"):
        checkpoint["generators"][name] = torch.zeros(16, dtype=torch.uint8)
    checkpoint["counters"]["seconds"] = 1000.0
    torch.save(checkpoint, run_dir / "checkpoint.pth")
    agent, _ = recorded(Recording(), make_args(tmp_path, resume=True))
    result = json.loads((run_dir / "result.json").read_text())
    assert result["gradient_updates"] == 2 * 41
    assert 1000 < result["wall_clock_seconds"] < 1100
    torch.manual_seed(1)
    first_seed = int(torch.randint(2**31, (2,))[0])
    assert agent.generator.initial_seed() == first_seed + 41


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def change(**entries):
    """A change of the checkpoint's entries."""

    def edit(path):
        torch.save(torch.load(path, weights_only=True) | entries, path)

    return edit


def change_tensor(name, tensor):
    def edit(path):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["tensors"][name] = tensor
        torch.save(checkpoint, path)

    return edit


def without(key):
    def edit(path):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint[key]
        torch.save(checkpoint, path)

    return edit


def flip_bytes(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(
        255 - byte for byte in data[len(data) // 2 :][:100]
    )
    path.write_bytes(data)


BAD_CHECKPOINTS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file with code": lambda path: torch.save({"script": Evil()}, path),
    "another script": change(script="plastic_drq_sac_dmc.py"),
    "another version": change(version=atari.CHECKPOINT_VERSION + 1),
    "a list": lambda path: torch.save([1, 2], path),
    "no flags": without("args"),
    "other flags": change(args={"total_timesteps": 60, "rho": 1}),
    "no tensors": without("tensors"),
    "no generators": without("generators"),
    "no events": without("events"),
    "other counters": change(counters={"steps": 3}),
    "a step that is a word": change(counters={"step": "5"}),
    "a step past the end": change(counters={"step": 10**6}),
    "a negative step": change(counters={"step": -50}),
    "continued at nothing": change(counters={"step": 41, "resumed_at": None}),
    "seconds that are a word": change(counters={"step": 41, "seconds": "x"}),
    "a step that is a fraction": change(counters={"step": 40.5}),
    "events that are a number": change(events=3),
    "events of a word's size": change(events={"events.out.tfevents.1": "x"}),
    "events of a negative size": change(events={"events.out.tfevents.1": -1}),
    "weights that are not finite": change_tensor(
        "online.head.value.output.bias_mu", torch.full((5,), math.nan)
    ),
    "flipped bytes": flip_bytes,
    "another shape": change_tensor("replay.frames", torch.zeros((5, 84, 84), dtype=torch.uint8)),
    "another type": change_tensor("counts", torch.zeros(4)),
    "one tensor too many": change_tensor("replay.extra", torch.zeros(4)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_gets_one_line_and_stays(
    tmp_path, recorded, capsys, kind, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_dir = stopped_run(tmp_path, recorded)
    BAD_CHECKPOINTS[kind](run_dir / "checkpoint.pth")
    before = {path.name: path.stat().st_size for path in run_dir.iterdir()}
    error = refused(lambda: recorded(Recording(), make_args(tmp_path, resume=True)), capsys)
    if kind == "a directory":
        assert error == f"error: {run_dir / 'checkpoint.pth'}: Is a directory\n"
    elif kind == "other flags":
        assert "another version of this script" in error
    else:
        assert "checkpoint.pth: not a checkpoint" in error
        assert "--overwrite" in error
    assert {path.name: path.stat().st_size for path in run_dir.iterdir()} == before
    assert not (tmp_path / "evil").exists()


# --- When checkpoints are written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, steps",
    [
        (dict(checkpoint_interval=0), []),
        (dict(checkpoint_interval=25), [25, 50, 60]),
        (dict(checkpoint_interval="auto"), [60]),  # before the evaluation
        (dict(checkpoint_interval="auto", eval_interval=40), [40, 60]),
    ],
)
def test_checkpoints_are_written_when_they_should_be(tmp_path, recorded, monkeypatch, flags, steps):
    saved, original = [], atari.save_checkpoint
    monkeypatch.setattr(
        atari, "save_checkpoint", lambda *call: saved.append(call[2].step) or original(*call)
    )
    recorded(Recording(), make_args(tmp_path, **flags))
    assert saved == steps


def test_a_continued_run_begins_with_other_no_ops_than_the_first_process_and_the_evaluation(
    tmp_path, recorded, monkeypatch
):
    run_dir = stopped_run(tmp_path, recorded)
    seeds, recording = [], Recording()
    monkeypatch.setattr(
        atari, "make_envs", lambda env_id, num_envs, seed: seeds.append(seed) or recording
    )
    atari.run(make_args(tmp_path, resume=True), atari.Stop())
    assert (run_dir / "result.json").exists()
    *_, seed = seeds  # the ones before only ask for the number of actions
    assert seed not in (1, *range(20_000, 30_000))


def test_a_run_cut_off_so_early_that_it_has_nothing_to_learn_from_skips_its_updates(
    tmp_path, recorded
):
    """Stopped at step 8, learning from 14: no window of 10 steps is complete until a life is lost in step 17."""
    recording = Recording()
    with pytest.raises(SystemExit):
        recorded(recording, make_args(tmp_path, learning_starts=14), stop_at(recording, 8))
    agent, replay = recorded(recording, make_args(tmp_path, learning_starts=14, resume=True))
    assert agent.counts.tolist() == [94, 6, 0, 6]
    assert replay.priorities.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in agent.tensors().values())


def test_auto_writes_every_five_minutes_by_the_clock(tmp_path, recorded, monkeypatch):
    """On a clock that goes on 20 seconds with each step."""
    saved, recording, clock = [], Recording(), time.perf_counter
    monkeypatch.setattr(atari.time, "perf_counter", lambda: clock() + 20 * recording.step_number)
    monkeypatch.setattr(atari, "save_checkpoint", lambda *call: saved.append(call[2].step))
    recorded(recording, make_args(tmp_path))
    assert saved == [15, 30, 45, 60]


def test_a_stop_without_checkpoints_leaves_none(tmp_path, recorded):
    run_dir = stopped_run(tmp_path, recorded, checkpoint_interval=0)
    assert not (run_dir / "checkpoint.pth").exists()


def test_a_checkpoint_that_finds_no_space_leaves_the_one_before_and_the_run_goes_on(
    tmp_path, recorded, capsys, monkeypatch
):
    run_dir = stopped_run(tmp_path, recorded)
    before = (run_dir / "checkpoint.pth").read_bytes()
    fsync, seen = os.fsync, []

    def full(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith("checkpoint"):
            seen.append((run_dir / "checkpoint.pth").read_bytes() == before)
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    recorded(Recording(), make_args(tmp_path, resume=True, checkpoint_interval=10))
    assert seen == [True, True]  # at steps 50 and 60
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert f"warning: {run_dir / 'checkpoint.pth'} not written: No space left on device" in error
    assert not list(run_dir.glob("*.tmp"))
    assert (run_dir / "result.json").exists()


def test_a_continued_run_goes_on_under_the_same_id_at_weights_and_biases(
    tmp_path, recorded, monkeypatch
):
    calls = []

    def init(**kwargs):
        calls.append((kwargs["id"], kwargs["resume"]))
        return SimpleNamespace(id="id7")

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError, __spec__=True)
    )
    stopped_run(tmp_path, recorded, track=True)
    recorded(Recording(), make_args(tmp_path, resume=True, track=True))
    assert calls == [(None, "allow"), ("id7", "allow")]


def test_of_two_signals_the_first_one_counts():
    stop = atari.Stop()
    stop.obey(at_once=False)
    stop.request(signal.SIGTERM)
    stop.request(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_info:
        stop.obey(at_once=True)
    assert exit_info.value.code == 143
    stop.request(signal.SIGINT)  # on the way out: nothing


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_needed_counts_frames_and_weights_exactly():
    def needed(**flags):
        return atari.memory_needed(6, atari.resolve(atari.Args(device="cpu", **flags)))

    assert needed(buffer_size=50_000) - needed(buffer_size=40_000) == 10_000 * (84 * 84 + 17)
    args = atari.resolve(atari.Args(device="cpu", buffer_size=40_000))
    replay = atari.ReplayBuffer(1000, 10, 0.99, torch.device("cpu"))
    per_slot = (
        sum(tensor.numel() * tensor.element_size() for tensor in replay.tensors().values())
        / replay.slots
    )
    assert per_slot == pytest.approx(84 * 84 + 17, rel=1e-3)
    parameters = sum(w.numel() for w in atari.QNetwork(6, args).parameters())
    assert needed(buffer_size=40_000) - needed(buffer_size=40_000, sam_rho=0.0) == 4 * parameters


@pytest.mark.parametrize("flags", [{}, dict(crelu=False, sam_rho=0.0, batch_size=512)], ids=str)
def test_the_memory_needed_is_about_what_a_run_takes(tmp_path, flags):
    """Peak resident memory of a process that builds all, updates and evaluates, less PyTorch's own."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import numpy as np, torch
import plastic_drq_rainbow_atari as atari
args = atari.resolve(atari.Args(device="cpu", buffer_size=50_000, **{flags!r}))
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
torch.randn(64, 64) @ torch.randn(64, 64)
before = resident()
agent = atari.Agent(18, 10, args, torch.Generator().manual_seed(0))
replay = atari.ReplayBuffer(args.buffer_size, args.n_step, args.gamma, torch.device("cpu"))
replay.frames.fill_(1)
for step in range(100):
    replay.add(0, 0.0, step % 50 == 49, np.zeros((84, 84), np.uint8))
agent.update(replay), agent.update(replay)
envs = atari.make_envs("Alien", args.eval_episodes, 1)
envs.reset()
agent.act(torch.zeros((args.eval_episodes, 4, 84, 84), dtype=torch.uint8))
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss is inherited
print((peak - before) / atari.memory_needed(18, args))
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert 0.7 < float(finished.stdout) < 1.2


def test_a_run_that_does_not_fit_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atari, "memory_available", lambda device: 2**29)
    error = refused(
        lambda: atari.run(make_args(tmp_path, buffer_size=100_000), atari.Stop()), capsys
    )
    assert "needs about 0.7 GiB of memory, and cpu has 0.5 free" in error
    assert list(tmp_path.iterdir()) == []


def test_the_memory_available_is_that_of_the_machine_or_of_the_container(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4096 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
    }

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert atari.memory_available(torch.device("cpu")) == 2**22
    files |= {
        "/sys/fs/cgroup/memory.max": "2097152\n",
        "/sys/fs/cgroup/memory.current": "1048576\n",
    }
    assert atari.memory_available(torch.device("cpu")) == 2**20
    files.clear()
    assert atari.memory_available(torch.device("cpu")) == math.inf


def test_a_model_that_cannot_be_written_can_be_written_by_the_next_try(
    tmp_path, recorded, monkeypatch
):
    """The evaluation is repeated, no more. Without checkpoints there is no next try: the result is there at once."""
    write, full = atari.write_atomically, [True]

    def no_space(path, content):
        if path.name == "model.pth" and full[0]:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(atari, "write_atomically", no_space)
    flags = dict(resume=True, save_model=True)
    with pytest.raises(OSError):
        recorded(Recording(), make_args(tmp_path / "a", **flags))
    (run_dir,) = (tmp_path / "a").iterdir()
    assert not (run_dir / "result.json").exists()
    with pytest.raises(OSError):
        recorded(Recording(), make_args(tmp_path / "b", checkpoint_interval=0, **flags))
    assert (tmp_path / "b" / run_dir.name / "result.json").exists()
    full[0] = False
    recording = Recording()
    recorded(recording, make_args(tmp_path / "a", **flags))
    assert recording.actions == []
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {
        "",
        "events",
        "result",
        "model",
    }


def test_a_file_of_yours_in_the_runs_directory_stays(tmp_path, recorded):
    run_dir = tmp_path / "Alien__x__1"
    run_dir.mkdir()
    for name in ("mine.pth", "mine.tmp", "notes.txt"):
        (run_dir / name).write_text("mine")
    recorded(Recording(), make_args(tmp_path))
    recorded(Recording(), make_args(tmp_path, overwrite=True))
    assert {"mine.pth", "mine.tmp", "notes.txt", "result.json"} <= {
        path.name for path in run_dir.iterdir()
    }


def test_what_a_stop_says_is_true(tmp_path, recorded, capsys):
    for flags, hint in (
        (dict(checkpoint_interval=0), ""),
        (dict(exp_name="y"), "; --resume continues the run"),
    ):
        recording = Recording()
        with pytest.raises(SystemExit):
            recorded(recording, make_args(tmp_path, **flags), stop_at(recording, 41))
        assert capsys.readouterr().err == f"error: stopped by SIGTERM{hint}\n"


# --- Faults in the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_finite_number_is_counted_and_taken_as_0(
    tmp_path, recorded, capsys, value
):
    recording = Recording()
    recording.rewards[[25, 33]] = value
    agent, replay = recorded(recording, make_args(tmp_path, total_timesteps=100))
    assert replay.rewards.isfinite().all()
    assert replay.rewards[24] == replay.rewards[32] == 0
    assert replay.priorities.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in agent.tensors().values())
    result = json.loads((tmp_path / "Alien__x__1" / "result.json").read_text())
    assert (result["nonfinite_rewards"], result["skipped_updates"]) == (2, 0)
    logged = scalars(tmp_path / "Alien__x__1")
    assert logged["charts/nonfinite_rewards"] == [(100, 2)]
    assert all(math.isfinite(value) for _, value in logged["charts/episodic_return"])
    assert "2 rewards were not finite" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_an_observation_that_is_no_number_cannot_enter_the_bytes_of_the_replay_buffer(
    tmp_path, recorded
):
    recording = Recording()
    recording.frames = recording.frames.astype(np.float32)
    recording.frames[25:28] = math.nan
    recording.frames[40:45] = math.inf
    agent, replay = recorded(recording, make_args(tmp_path, total_timesteps=100))
    assert replay.frames.dtype == torch.uint8
    assert agent.counts[1] == 0
    assert all(tensor.isfinite().all() for tensor in agent.tensors().values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["first pass", "second pass"])
def test_a_gradient_that_is_no_finite_number_poisons_neither_weights_nor_priorities(
    tmp_path, recorded, monkeypatch, value, where
):
    """Injected at the weights themselves, in SAM's first or second pass of some updates."""
    backward, calls = torch.Tensor.backward, []

    def faulty(loss):
        calls.append(len(calls))
        backward(loss)
        if len(calls) % 20 == (
            5 if where == "first pass" else 6
        ):  # the first passes have odd numbers
            kept_agent[-1].parameters[3].grad.view(-1)[2] = value

    kept_agent, original = [], atari.Agent.__init__
    monkeypatch.setattr(
        atari.Agent,
        "__init__",
        lambda self, *args: original(self, *args) or kept_agent.append(self),
    )
    monkeypatch.setattr(torch.Tensor, "backward", faulty)
    agent, replay = recorded(Recording(), make_args(tmp_path))
    assert len(calls) == 164
    assert agent.counts[1] == 8  # in the 5th, 25th, ..., 145th call, or the ones after these
    assert replay.priorities.isfinite().all() and replay.max_priority.isfinite()
    assert all(tensor.isfinite().all() for tensor in agent.tensors().values())
    logged = scalars(tmp_path / "Alien__x__1")
    assert logged["losses/skipped_updates"][-1] == (60, float(agent.counts[1]))


def test_an_evaluation_with_a_reward_that_is_no_number_ends_with_a_reason(monkeypatch):
    class Broken:
        action_space = Recording.action_space

        def reset(self):
            return np.zeros((2, 1, 84, 84), np.uint8), {"lives": np.array([1, 1])}

        def step(self, actions, env_ids):
            over = np.array([True, True])
            info = {"lives": np.array([0, 0]), "env_id": np.arange(2)}
            return np.zeros((2, 1, 84, 84), np.uint8), np.array([1.0, math.nan]), over, ~over, info

    monkeypatch.setattr(atari, "make_envs", lambda *_: Broken())
    args = atari.resolve(atari.Args(device="cpu", **SMALL | dict(eval_episodes=2)))
    with pytest.raises(FloatingPointError, match="Alien"):
        atari.evaluate(atari.QNetwork(3, args), "Alien", args)


# --- Processes --------------------------------------------------------------------------------------------------------

FLAGS = "--device cpu --resume --exp-name x --learning-starts 20 --batch-size 4 --hidden-dim 4 --n-atoms 5".split()
FLAGS += "--buffer-size 300 --eval-episodes 1 --torch-threads 1 --log-interval 10".split()


def start(tmp_path, *flags, limit=None):
    """The script as a process; `limit`: KiB that a file of its may have."""
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path), *FLAGS, *flags]
    if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "bash", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def check_like_unbroken(run_dir, steps, num_updates):
    """Counters, files and logged steps of a finished run, whatever happened on the way."""
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["env_steps"], result["gradient_updates"]) == (steps, num_updates)
    assert result["skipped_updates"] == 0
    assert len(result["episode_returns"]) == 1
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"", "events", "result"}
    logged = scalars(run_dir)
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(20, steps + 1, 10))
    assert [step for step, _ in logged["eval/mean_return"]] == [steps]
    episodes = [step for step, _ in logged.get("charts/episodic_return", [])]
    assert episodes == sorted(set(episodes))
    return result


def kill_again_and_again(tmp_path, num_kills, steps, seconds, seed=0):
    """SIGKILL at random moments after the start, the first after a checkpoint; what is there must be whole."""
    rng = random.Random(seed)
    flags = ["--total-timesteps", str(steps), "--checkpoint-interval", "20"]
    run_dir = tmp_path / "Alien__x__1"
    for _ in range(num_kills):
        process, first = start(tmp_path, *flags), not (run_dir / "checkpoint.pth").exists()
        if first:  # on a busy machine, the start alone may take longer than that
            wait_for((run_dir / "checkpoint.pth").exists, process)
        time.sleep(rng.uniform(0, 0.5) if first else rng.uniform(*seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before the kill: give it more steps"
        assert not (run_dir / "result.json").exists()
        if (run_dir / "checkpoint.pth").exists():
            torch.load(run_dir / "checkpoint.pth", weights_only=True)
    process = start(tmp_path, *flags)
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    result = check_like_unbroken(run_dir, steps, 2 * (steps - 20 + 1))
    assert result["resumed_at"] == sorted(result["resumed_at"])
    assert all(step % 20 == 0 for step in result["resumed_at"])
    return result


def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    assert len(kill_again_and_again(tmp_path, 3, 700, (3, 5))["resumed_at"]) > 0


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_an_unbroken_one(tmp_path):
    assert len(kill_again_and_again(tmp_path, 20, 6000, (0, 8), seed=1)["resumed_at"]) > 3


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_last_checkpoint_and_the_run_goes_on_from_there(tmp_path, signum, code):
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps", "250")
    wait_for(lambda: any(path.stat().st_size > 2000 for path in run_dir.glob("events*")), process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.count("\n") == 1
    assert signum.name in error and "--resume" in error
    step = torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["step"]
    assert 20 <= step < 250
    process = start(tmp_path, "--total-timesteps", "250")
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert check_like_unbroken(run_dir, 250, 2 * 231)["resumed_at"] == [step]


def test_impatient_signals_and_closed_streams(tmp_path):
    """Ten signals in a row, of both kinds: one of them counts. And nobody need read what the script says."""
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps", "60", "--eval-episodes", "100")
    wait_for((run_dir / "checkpoint.pth").exists, process)
    for signum in (signal.SIGTERM, signal.SIGINT) * 5:
        process.send_signal(signum)
        time.sleep(0.01)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert error.count("\n") == 1, error
    command = [
        sys.executable,
        str(SCRIPT),
        "--run-dir",
        str(tmp_path),
        *FLAGS,
        "--total-timesteps",
        "30",
    ]
    closed = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *command, "--exp-name", "closed"]
    assert subprocess.run(closed, timeout=120).returncode == 0
    assert (tmp_path / "Alien__closed__1" / "result.json").exists()


def test_a_signal_during_the_evaluation_ends_it_and_only_the_evaluation_is_repeated(tmp_path):
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps", "60", "--eval-episodes", "100")
    wait_for((run_dir / "checkpoint.pth").exists, process)
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.count("\n")) == (143, 1)
    assert time.monotonic() - begin < 20
    assert torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["step"] == 60


def test_a_directory_that_is_deleted_during_the_run(tmp_path):
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps", "100000", "--checkpoint-interval", "0")
    wait_for(lambda: any(path.stat().st_size > 2000 for path in run_dir.glob("events*")), process)
    shutil.rmtree(run_dir)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "error: stopped by SIGTERM\n")


def test_two_processes_in_one_directory(tmp_path):
    """The second one is refused; a dead process holds no lock."""
    run_dir = tmp_path / "Alien__x__1"
    first = start(tmp_path, "--total-timesteps", "100000")
    wait_for(lambda: any(path.stat().st_size > 2000 for path in run_dir.glob("events*")), first)
    before = sorted(path.name for path in run_dir.iterdir())
    second = start(tmp_path, "--total-timesteps", "100000")
    output, error = second.communicate(timeout=60)
    assert (second.returncode, output, error.count("\n")) == (1, "", 1)
    assert "another process" in error
    assert sorted(path.name for path in run_dir.iterdir()) == before
    first.kill()
    first.communicate()
    third = start(tmp_path, "--total-timesteps", "60", "--overwrite", "--no-resume")
    output, error = third.communicate(timeout=120)
    assert (third.returncode, error) == (0, "")
    check_like_unbroken(run_dir, 60, 2 * 41)


def test_a_disk_that_is_full_during_a_checkpoint_costs_only_that_checkpoint(tmp_path):
    """`ulimit -f`: a checkpoint has about 4 MB here, all other files far less."""
    run_dir = tmp_path / "Alien__x__1"
    process = start(tmp_path, "--total-timesteps", "100000", "--checkpoint-interval", "100")
    wait_for((run_dir / "checkpoint.pth").exists, process)
    process.kill()
    process.communicate()
    before = (run_dir / "checkpoint.pth").read_bytes()
    process = start(
        tmp_path, "--total-timesteps", "100000", "--checkpoint-interval", "50", limit=2000
    )
    assert "warning: " in (line := process.stderr.readline())
    assert "checkpoint.pth not written: File too large" in line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (run_dir / "checkpoint.pth").read_bytes() == before
    assert not list(run_dir.glob("*.tmp"))


def test_tensorboard_without_space_ends_the_run_with_one_line_and_the_checkpoint_stays(tmp_path):
    run_dir = tmp_path / "Alien__x__1"
    process = start(
        tmp_path,
        "--total-timesteps",
        "3000",
        "--checkpoint-interval",
        "20",
        "--log-interval",
        "1",
        limit=6,
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = error.splitlines()
    assert lines[-1].startswith("error: cannot write")
    assert all(line.startswith("warning: ") for line in lines[:-1])
    assert not (run_dir / "result.json").exists()


def soak(tmp_path, minutes, *flags):
    """Run for that long with checkpoints, metrics and evaluations; returns (time, resident MiB) samples and steps."""
    run_dir, samples = tmp_path / "Alien__x__1", []
    process = start(
        tmp_path,
        *"--total-timesteps 100000 --metrics-interval 200 --eval-interval 400".split(),
        *flags,
    )
    wait_for((run_dir / "checkpoint.pth").exists, process, 600)
    begin = time.monotonic()
    while time.monotonic() - begin < 60 * minutes:
        assert process.poll() is None, process.communicate()
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        samples.append((time.monotonic() - begin, pages * os.sysconf("SC_PAGESIZE") / 2**20))
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    events = EventAccumulator(str(run_dir))
    events.Reload()
    logged = events.Scalars("losses/td_loss")
    assert all(math.isfinite(event.value) for event in logged)
    return samples, [(event.wall_time, event.step) for event in logged]


def test_memory_stays_flat_for_a_while(tmp_path):
    samples, _ = soak(tmp_path, 0.4, "--checkpoint-interval", "100")
    early, late = (np.median([mib for _, mib in part]) for part in (samples[60:80], samples[-20:]))
    assert abs(late - early) < 25, (early, late)


@pytest.mark.slow
def test_memory_stays_flat_for_half_an_hour(tmp_path):
    """At full size, PLASTIC. Prints memory and speed by tenths; speed is not asserted."""
    flags = "--hidden-dim 512 --n-atoms 51 --batch-size 32 --buffer-size 100000 --eval-episodes 2".split()
    samples, logged = soak(
        tmp_path,
        float(os.environ.get("SOAK_MINUTES", "30")),
        *flags,
        "--checkpoint-interval",
        "200",
    )
    medians = [
        np.median([mib for _, mib in part]) for part in np.array_split(np.array(samples), 10)
    ]
    seconds = np.diff([wall_time for wall_time, _ in logged])  # of 10 steps each
    speeds = [10 / np.median(part) for part in np.array_split(seconds, 10)]
    print(f"\n{logged[-1][1]} steps")
    print("resident MiB by tenths:", ", ".join(f"{mib:.0f}" for mib in medians))
    print("steps per second by tenths:", ", ".join(f"{speed:.2f}" for speed in speeds))
    assert max(medians[2:]) - medians[1] < 50, medians
