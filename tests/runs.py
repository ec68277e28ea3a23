"""Small runs of all scripts on made-up data; conftest.py's fixture `play` makes them."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import MagicMock

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import plastic_drq_rainbow_atari as atari
import plastic_pretrained_finetune as ft
import synth_cifar_plasticity as synth

try:
    import plastic_drq_sac_dmc as dmc
except RuntimeError:  # nothing here renders: files without DeepMind Control are tested still
    dmc = None

# --- What a run is made of ------------------------------------------------------------------------

ATARI = dict(total_timesteps=30, learning_starts=8, n_step=3, buffer_size=300, batch_size=4)
ATARI |= dict(hidden_dim=4, n_atoms=5, eval_episodes=1, log_interval=10)
# All that a checkpoint must know of: resets, measurements, a buffer that is full.
BUSY = dict(metrics_interval=16, eval_interval=15, buffer_size=16, save_model=True)

# Each kind of run has
# - steps that it makes, and stops: steps after which an episode ends;
# - flags, and more of them for a run in which more happens (busy), with a real task (real), for a
#   process that can be stopped in time (longer), and some that make another run of it (other);
# - its counter of steps, the functions that make its networks and compute its loss, and a tag.
CASES = {
    "atari": SimpleNamespace(
        script=atari, data={}, dir="Alien__x__1", flags=ATARI, steps=30, stops=(10, 20, 30),
        busy=BUSY | dict(reset_interval=15, shrink_perturb_alpha=0.5),
        real={},
        longer=dict(total_timesteps=200),
        other=dict(sam_rho=0.2, layer_norm=False, total_timesteps=36, crelu_scope="all"),
        counter="env_steps", make="make_agent", loss="cross_entropy", tag="losses/td_loss",
    ),
    "dmc": SimpleNamespace(
        script=dmc, data={}, dir="cartpole-swingup_sparse__x__1", steps=30, stops=(10, 20, 30),
        flags=dict(env_id="cartpole-swingup_sparse", total_timesteps=60, learning_starts=8,
                   action_repeat=2, image_size=16, batch_size=4, hidden_dim=8, latent_dim=4,
                   render_quality="fast", eval_episodes=1, log_interval=10),
        busy=BUSY | dict(reset_interval=7),
        real=dict(total_timesteps=240, action_repeat=8),  # episodes of 125 steps
        longer=dict(total_timesteps=1600),
        other=dict(sam_rho=0.3, crelu=False, total_timesteps=72),
        counter="agent_steps", make="make_agent", loss="td_loss", tag="losses/td_loss",
    ),
    "synth": SimpleNamespace(
        script=synth, data=dict(data_dir="."), dir="input__x__1-2", steps=24,
        stops=(1, 7, 12, 24),  # in stages, of 6 updates, and between them
        flags=dict(num_seeds=2, num_stages=4, updates_per_stage=6, batch_size=8, reset_interval=2,
                   log_interval=1),
        busy=dict(learning_rate=(0.05, 0.01), metrics_interval=3),
        real={},
        longer=dict(updates_per_stage=50),
        other=dict(sam_rho=0.2, layer_norm=False, num_stages=5, conv_strides=(3, 1, 1)),
        counter="gradient_updates", make="make_replicas", tag="losses/lr_0.01_decay_0.001",
    ),
    "finetune": SimpleNamespace(
        script=ft, data=dict(pretrained_path="encoder.pth"), dir="Alien__x__1", flags=ATARI,
        steps=30, stops=(10, 20, 30),
        busy=BUSY | dict(reset_interval=15, shrink_perturb_anchor="pretrained", sam_rho=0.1,
                         metrics_interval=0),
        real={},
        longer=dict(total_timesteps=200),
        other=dict(sam_rho=0.2, layer_norm=True, total_timesteps=36, freeze_backbone=False),
        counter="env_steps", make="make_agent", loss="cross_entropy", tag="losses/td_loss",
    ),
    "pretrain": SimpleNamespace(
        script=ft, data=dict(video_dir="."), dir="Alien__x__1", steps=12, stops=(1, 5, 6, 12),
        flags=dict(mode="pretrain", pretrain_epochs=2.0, pretrain_batch_size=2, pretrain_length=3,
                   log_interval=1),  # 12 sequences make 6 batches
        busy={},
        real={},
        longer=dict(pretrain_epochs=20.0),
        other=dict(barlow_weight=0.2, pretrain_epochs=3.0),
        counter="gradient_updates", make="make_simtpr", loss="pretraining_loss",
        tag="losses/loss",
    ),
}  # fmt: skip


def flags_of(case, data, **flags):
    """A small run's flags; `data` is the directory of conftest.py's fixture."""
    files = {name: str(data / file) for name, file in case.data.items()}
    return dict(device="cpu", exp_name="x", torch_threads=1) | files | case.flags | flags


class Recording:
    """A recorded game in place of EnvPool: episodes of 10 steps, of which each 6th loses a life.

    A run that goes on where an episode ended sees what an unbroken one sees.
    """

    action_space = SimpleNamespace(n=3)
    frames = np.random.default_rng(0).integers(256, size=(11, 1, 1, 84, 84), dtype=np.uint8)
    rewards = np.random.default_rng(0).integers(-2, 3, size=(11, 1)).astype(np.float32)

    seeds: ClassVar[list] = []  # of all of them

    def __init__(self, happen, seed):
        self.happen = happen
        self.seeds.append(seed)

    def lives(self):
        return {"lives": np.array([3 if self.time < 6 else 2])}

    def reset(self):
        self.time = 0
        return self.frames[0], self.lives()

    def step(self, actions):
        self.time += 1
        self.happen()
        over = np.array([self.time == 10])
        return self.frames[self.time], self.rewards[self.time], over, ~over & False, self.lives()


class Scripted:
    """The same in place of a task of DeepMind Control; rewards follow from the actions."""

    episode_steps, action_dim, frame_shape = 10, 2, (1, 16, 16)

    seeds: ClassVar[list] = []  # of all episodes

    def __init__(self, happen):
        self.happen = happen

    def frame(self):
        rng = np.random.default_rng(self.time)
        return rng.integers(256, size=self.frame_shape, dtype=np.uint8)

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.time = 0
        return self.frame(), {}

    def step(self, action):
        self.time += 1
        self.happen()
        return self.frame(), float(action.sum()), False, self.time == 10, {}


def stop(signum=signal.SIGTERM):
    signal.raise_signal(signum)


def replace(monkeypatch, case, happen):
    """Put made-up data in place of environments; happen() is called in each step of the run."""
    script = case.script
    if script is synth:
        update = synth.Replicas.update
        monkeypatch.setattr(synth.Replicas, "update", lambda self: (happen(), update(self))[1])
    elif case is CASES["pretrain"]:
        update = ft.pretrain_update
        monkeypatch.setattr(ft, "pretrain_update", lambda *args: (happen(), update(*args))[1])
    elif script is dmc:
        monkeypatch.setattr(dmc, "make_env", lambda args: Scripted(happen))
        monkeypatch.setattr(dmc, "evaluate", lambda agent, *_: [agent.log_alpha.item()])
    else:
        monkeypatch.setattr(script, "make_envs", lambda env_id, n, seed: Recording(happen, seed))
        value = lambda network, *_: [float(network.head.value.output.bias_mu.sum())]  # noqa: E731
        monkeypatch.setattr(script, "evaluate", value)


# --- What a run leaves ----------------------------------------------------------------------------


def scalars(run_dir):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def read_result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def names(directory):
    """Of all files, event files by their kind."""
    return {path.name.split(".tfevents")[0] for path in directory.iterdir()}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- Processes ------------------------------------------------------------------------------------


def words(flags):
    """Flags as a shell has them."""
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            values = value if isinstance(value, tuple) else (value,)
            yield from (f"--{flag}", *map(str, values))


def start(case, flags, directory, shell=""):
    """The script as a process in `directory`, after some words in a shell of its own."""
    command = [sys.executable, case.script.__file__, *words(flags)]
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
    env = os.environ | {"PYTHONWARNINGS": "error"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=directory, env=env, **pipes)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


# --- CUDA graphs without CUDA ---------------------------------------------------------------------


class NoHostSync(TorchDispatchMode):
    """Fails on the operations that would make the host wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        assert not name.startswith(self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def stand_in_cuda(monkeypatch):
    """capture() warms up and runs for real; what it captures is nothing."""
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
