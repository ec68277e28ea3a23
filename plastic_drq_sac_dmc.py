# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "dm-control==1.0.50", "mujoco==3.17.0", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0", "filelock==4.3.1",
# ]
# ///
r"""PLASTIC on DrQ-SAC for the DeepMind Control suite from pixels, in one file.

Paper: "Improving Input and Label Plasticity for Sample Efficient Reinforcement Learning"
(NeurIPS 2023), section 4.2, appendices A.4 and B.3 (Algorithm 2, Table 6).

PLASTIC, PLASTIC† (LayerNorm and resets alone) and the base that they stand on:

    python plastic_drq_sac_dmc.py --env-id quadruped-run
    python plastic_drq_sac_dmc.py --env-id quadruped-run --exp-name ln_reset --no-crelu --sam-rho 0
    python plastic_drq_sac_dmc.py --env-id quadruped-run --exp-name base --no-crelu --sam-rho 0 \
        --no-layer-norm --reset-interval 0

Read Agent.update first, which is Algorithm 2 from line 11 on, then train, the loop around it.
Critic is encoder and Q-functions, with LayerNorm and CReLU; Actor is the policy on the critic's
encoder. ReplayBuffer makes transitions of frames. The other interventions are sam_perturbed and
Agent.reset. Three clocks tick: steps of the environment, steps of the agent (each repeats its
action 2 or 4 times) and gradient updates. Resets count updates: every 100,000, which at one update
per step are as many steps of the agent.

Where it departs from the paper's text (README.md and benchmark/RELEASE.md have tables):
- Algorithm 2 draws the target's action at s, and descends on the square of Eq. 4, which is to be
  climbed: misprints.
- Critic, target network, actor and temperature are updated one after the other, as released;
  Algorithm 2 first perturbs critic, actor and temperature, then computes the target again, with the
  perturbed actor.
- SAM has one norm for encoder and both Q-functions; Algorithm 2 has one per Q-function.
- SAM and Adam move log alpha; Algorithm 2 moves alpha (lines 15 and 19).
- A reset renews the latent layer, too, as released; Table 6 counts it to the backbone. PLASTIC†
  has no Shrink & Perturb here, which section 4.3 describes for Atari.
- LayerNorm is in the encoder alone, as the main text has it; appendix A.4 adds the fully connected
  layers (--layer-norm-scope).
- CReLU is in the MLPs alone, as for Atari; appendix A.4 replaces every ReLU (--crelu-scope).
- A step's update runs before its transition is stored, so that the CPU simulates while a GPU
  learns: the newest transition is one step late.
- An evaluation is 10 episodes (section 4.1); Table 6 says 100 (--eval-episodes).
"""

import copy
import ctypes
import difflib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, NoReturn

# PyTorch's threads wait for each other by spinning: two runs that share the cores would take four
# times as long as one. GNU OpenMP reads this when PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from PIL import Image
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# MuJoCo has to know what it renders with before dm_control is imported.
os.environ.setdefault("MUJOCO_GL", "egl" if find_library("EGL") else "osmesa")
# On a machine with several GPUs it takes the first one, unless it is told which.
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
if gpu.isdigit() and Path(f"/dev/nvidia{gpu}").exists():
    os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", gpu)


def no_renderer(error: Exception) -> NoReturn:
    """End with one line: what MuJoCo lacks, what to install. An importer gets a RuntimeError."""
    problem = f"MuJoCo cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']}"
    advice = "install libegl1 and libegl-mesa0, or libosmesa6 (packages of Debian and Ubuntu)"
    advice += ", or set MUJOCO_GL to egl, osmesa or glfw"
    if __name__ != "__main__":
        raise RuntimeError(f"{problem}: {advice}") from error
    sys.unraisablehook = lambda hook: None  # dm_control's half-made objects would complain, too
    sys.exit(f"error: {problem}: {advice} ({error})")


try:
    from dm_control import suite
except ModuleNotFoundError:  # dm_control is not installed: Python says so
    raise
except (ImportError, AttributeError, RuntimeError) as error:  # the renderer's library is not there
    no_renderer(error)

logging.getLogger("absl").setLevel(logging.ERROR)  # MuJoCo warns of cheetah's own model
# lqr has no time limit.
TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS if domain != "lqr"]


# --- Args -----------------------------------------------------------------------------------------


@dataclass
class Args:
    """PLASTIC on DrQ-SAC for the DeepMind Control suite from pixels. The defaults are PLASTIC."""

    # Run
    env_id: str = "quadruped-run"  # task of the suite, <domain>-<task>
    seed: int = 1  # seed of the networks, the exploration, the sampling and the environment
    exp_name: str = "plastic_drq_sac_dmc"  # name of this setting, part of the run's directory
    run_dir: str = "runs"  # where run directories are made: <run-dir>/<env-id>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = CUDA where there is one
    # where the replay buffer lies (auto = on the training device; cpu = in the host's memory)
    replay_device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graph: bool = True  # update and choice of an action as CUDA graphs (no effect on the CPU)
    torch_threads: int = 0  # PyTorch's CPU threads (0 = its own choice, at most 8)
    resume: bool = False  # continue an unfinished run, begin a new one, leave a finished one alone
    # agent steps between checkpoints (auto = 5 minutes, 0 = off)
    checkpoint_interval: Literal["auto"] | int = "auto"
    overwrite: bool = False  # replace a run of the same name, finished or not

    # Environment (Table 6, action repeat and rendering aside)
    total_timesteps: int = 2_000_000  # environment steps; all other steps here are agent steps
    # environment steps per agent step (0 = as Nikishin et al. have the paper's tasks: 4 for
    # cheetah-run and reacher-easy, else 2)
    action_repeat: int = 0
    frame_stack: int = 3  # frames per observation
    image_size: int = 64  # height and width of a frame
    grayscale: bool = True  # one channel per frame instead of three
    render_quality: Literal["full", "fast"] = "full"  # fast = no shadows, no multisampling

    # Training (Table 6, learning_starts and aug_shift aside)
    updates_per_step: int = 1  # gradient updates per agent step
    batch_size: int = 512  # transitions per update
    learning_starts: int = 1_000  # steps of random actions; the last one has the first update
    learning_rate: float = 3e-4  # of all four Adams (1e-4 in the authors' release)
    gamma: float = 0.99  # discount factor
    target_ema: float = 0.995  # tau: target <- tau * target + (1 - tau) * critic
    initial_temperature: float = 0.1  # weight of the entropy at the start and after a reset
    latent_dim: int = 50  # size of the latent: linear layer on the encoder, LayerNorm, tanh
    hidden_dim: int = 256  # width of the MLPs' two hidden layers
    buffer_size: int = 1_000_000  # transitions in the replay buffer, of 4 kB each at 64x64
    aug_shift: int = 4  # largest random shift in pixels (0 = off)

    # Plasticity interventions
    layer_norm: bool = True  # LayerNorm over channels at each pixel
    layer_norm_scope: Literal["backbone", "all"] = "backbone"  # all = the MLPs' hidden layers too
    crelu: bool = True  # concatenated ReLU
    crelu_scope: Literal["head", "all"] = "head"  # head = all MLPs, all = the encoder's layers too
    # radius of the SAM perturbation (0 = off; auto = 0.1 for quadruped, else 0.01)
    sam_rho: Literal["auto"] | float = "auto"
    # what SAM perturbs (critic = encoder and Q-functions, all = critic, actor and temperature)
    sam_scope: Literal["all", "critic", "actor", "encoder"] = "all"
    # gradient updates between resets of all but the encoder (0 = off)
    reset_interval: int = 100_000

    # Evaluation, metrics, logging
    eval_episodes: int = 10  # episodes of an evaluation (section 4.1; Table 6 says 100)
    eval_interval: int = 0  # agent steps between evaluations (0 = only at the end)
    metrics_interval: int = 0  # agent steps between plasticity metrics (0 = off)
    log_interval: int = 1_000  # agent steps between logged losses
    capture_video: bool = False  # save the first episode of the last evaluation as a GIF
    save_model: bool = False  # save encoder and actor at the end
    evaluate: str | None = None  # a saved model: play its task with its seed, train nothing
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "plastic"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases

    def __post_init__(self) -> None:
        """Check the flags and resolve `auto`. tyro prints a ValueError and ends with code 2."""
        if self.sam_rho == "auto":  # Table 6
            self.sam_rho = 0.1 if self.env_id.startswith("quadruped-") else 0.01
        if self.action_repeat == 0:
            self.action_repeat = 4 if self.env_id in ("cheetah-run", "reacher-easy") else 2
        tiny, huge = 1e-12, 10**9
        for lowest, highest, names in (
            (0, 1, "gamma target_ema"),
            (0, 15, "aug_shift"),
            (0, 1024, "torch_threads"),
            (0, 200_000, "seed"),  # evaluations have 10,000 times this; the suite's have 32 bits
            (0, huge, "sam_rho reset_interval checkpoint_interval eval_interval metrics_interval"),
            (tiny, huge, "learning_rate initial_temperature"),
            (1, huge, "action_repeat frame_stack updates_per_step batch_size latent_dim"),
            (1, huge, "hidden_dim buffer_size eval_episodes log_interval"),
            (2, huge, "learning_starts"),  # an update comes before its step's transition
            (16, 1024, "image_size"),
        ):
            for name in names.split():
                flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
                if value != "auto" and not lowest <= value <= highest:  # nan is in no range
                    raise ValueError(f"{flag} must be from {lowest:,} to {highest:,}, not {value}")
        if self.env_id not in TASKS:
            closest = difflib.get_close_matches(self.env_id, TASKS, n=1, cutoff=0)[0]
            raise ValueError(f"--env-id {self.env_id}: no such task, the closest is {closest}")
        name = self.exp_name  # part of a directory's name, and printed
        if "/" in name or name in ("", ".", "..") or not name.isprintable():
            raise ValueError(f"--exp-name {self.exp_name!r}: must be a plain file name")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite begins anew: pass one of them")
        if self.learning_starts >= self.agent_steps:
            raise ValueError(f"--learning-starts must be below the {self.agent_steps} agent steps")
        if self.evaluate is not None and not Path(self.evaluate).is_file():
            raise ValueError(f"--evaluate {self.evaluate}: not a file")
        wandb = find_spec("wandb")  # a mere folder of this name has no origin
        if self.track and (wandb is None or wandb.origin is None):
            raise ValueError("--track needs Weights & Biases: pip install wandb")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.replay_device == "auto":
            self.replay_device = self.device
        if self.replay_device == "cuda" and self.device == "cpu":
            raise ValueError("--replay-device cuda needs --device cuda")
        if self.torch_threads == 0:
            self.torch_threads = min(torch.get_num_threads(), 8)

    @property
    def agent_steps(self) -> int:
        """Steps of the agent in the whole run."""
        return self.total_timesteps // self.action_repeat


# --- Environment ----------------------------------------------------------------------------------


class DMControl:
    """A task of the DeepMind Control suite from pixels, with reset() and step() as in Gymnasium.

    Observations are the newest frame alone, uint8 [channels, size, size]; stacks are left to the
    caller. Actions are in [-1, 1]; a step repeats one and sums the rewards. `truncated` is the
    time limit, which ends the episode, but not the return. `terminated` is a task's own end (its
    discount is 0); of the suite's tasks, only lqr has one.
    """

    def __init__(self, args: Args) -> None:
        self.args = args
        self.load(seed=None)
        # Not -1 and 1 in every task: quadruped has other bounds.
        self.low, self.high = self.env.action_spec().minimum, self.env.action_spec().maximum
        self.action_dim = len(self.low)
        self.frame_shape = (1 if args.grayscale else 3, args.image_size, args.image_size)
        self.episode_steps = math.ceil(self.env._step_limit / args.action_repeat)  # at most

    def load(self, seed: int | None) -> None:
        """Make the task: only here the suite takes a seed."""
        domain, task = self.args.env_id.split("-", 1)
        self.env = suite.load(domain, task, task_kwargs={"random": seed})
        visual, size = self.env.physics.model.vis, self.args.image_size
        visual.global_.offwidth = max(visual.global_.offwidth, size)  # MuJoCo renders no larger
        visual.global_.offheight = max(visual.global_.offheight, size)
        if self.args.render_quality == "fast":
            visual.quality.shadowsize = visual.quality.offsamples = 0

    def frame(self) -> np.ndarray:
        """The newest frame, uint8 [channels, size, size]."""
        camera = 2 if self.args.env_id.startswith("quadruped-") else 0  # as in the release
        rgb = self.env.physics.render(self.args.image_size, self.args.image_size, camera)
        if self.args.grayscale:
            return (rgb @ (0.299, 0.587, 0.114) + 0.5).astype(np.uint8)[None]
        # The renderer's rows run backwards in memory, which PyTorch does not take.
        return np.ascontiguousarray(rgb.transpose(2, 0, 1))

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode; with a seed, the first one of that seed."""
        if seed is not None:
            self.load(seed)
        self.env.reset()
        return self.frame(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeat an action [A] --action-repeat times, or until the episode ends."""
        unit = (np.clip(action, -1, 1).astype(np.float64) + 1) / 2  # in [0, 1]
        action = self.low + unit * (self.high - self.low)
        reward = 0.0
        for _ in range(self.args.action_repeat):
            time_step = self.env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        terminated = time_step.last() and time_step.discount == 0
        return self.frame(), reward, terminated, time_step.last() and not terminated, {}


def make_env(args: Args) -> DMControl:
    """The task, once it has rendered a frame."""
    env = DMControl(args)
    try:
        env.frame()
    except Exception as error:  # of MuJoCo, PyOpenGL or the driver
        no_renderer(error)
    return env


# --- Networks -------------------------------------------------------------------------------------


class PixelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at each pixel: [B, C, H, W] -> [B, C, H, W].

    Section 4.1 puts it after each convolution; it does not say over which axes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CReLU(nn.Module):
    """Concatenated ReLU: [B, C, ...] -> [B, 2C, ...]; no input loses its gradient (section 2.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], dim=1)


class SameConv(nn.Conv2d):
    """3x3 convolution with stride 2 and "SAME" padding: [B, C, H, W] -> [B, out, H/2, W/2].

    The output's sizes are rounded up. For even sizes, one row and column of zeros after the image
    and none before; for odd ones, one on each side.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2)
        nn.init.orthogonal_(self.weight, math.sqrt(2))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


def make_encoder(args: Args) -> nn.Sequential:
    """Four convolutions: images [B, frames * channels, size, size] -> features [B, F].

    388,416 parameters without LayerNorm and CReLU.
    """
    crelu = args.crelu and args.crelu_scope == "all"
    layers: list[nn.Module] = []
    in_channels = args.frame_stack * (1 if args.grayscale else 3)
    for channels in (32, 64, 128, 256):
        layers.append(SameConv(in_channels, channels))
        if args.layer_norm:
            layers.append(PixelLayerNorm(channels))
        layers.append(CReLU() if crelu else nn.ReLU())
        in_channels = channels * (2 if crelu else 1)
    return nn.Sequential(*layers, nn.Flatten())


def num_features(args: Args) -> int:
    """F, the length of the encoder's output: after four strides of 2, 256 channels (or 512)."""
    channels = 512 if args.crelu and args.crelu_scope == "all" else 256
    return channels * math.ceil(args.image_size / 16) ** 2


def hidden_features(args: Args) -> int:
    """Length of a hidden layer's output: CReLU doubles what the layer gives out."""
    return args.hidden_dim * (2 if args.crelu else 1)


def dense(in_features: int, out_features: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Linear layer with orthogonal weights and zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_latent(args: Args) -> nn.Sequential:
    """Features [B, F] -> latent [B, latent_dim]: linear (LeCun normal), LayerNorm, tanh."""
    linear = nn.Linear(num_features(args), args.latent_dim)
    # A normal distribution cut at two standard deviations keeps 0.88 of its standard deviation.
    std = 1 / math.sqrt(linear.in_features) / 0.87962566
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    # This LayerNorm is DrQ's own: --no-layer-norm leaves it.
    return nn.Sequential(linear, nn.LayerNorm(args.latent_dim, eps=1e-6), nn.Tanh())


def make_hidden(in_features: int, args: Args) -> nn.Sequential:
    """Two hidden layers of an MLP: [B, in_features] -> [B, hidden_features(args)]."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers.append(dense(in_features, args.hidden_dim))
        if args.layer_norm and args.layer_norm_scope == "all":
            layers.append(nn.LayerNorm(args.hidden_dim, eps=1e-6))
        layers.append(CReLU() if args.crelu else nn.ReLU())
        in_features = hidden_features(args)
    return nn.Sequential(*layers)


class CriticHead(nn.Module):
    """A latent and two Q-functions on it: 366,232 parameters at 6 actions, without CReLU."""

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.latent = make_latent(args)
        q_functions = []
        for _ in range(2):
            hidden = make_hidden(args.latent_dim + action_dim, args)
            q_functions.append(nn.Sequential(hidden, dense(hidden_features(args), 1)))
        self.q_functions = nn.ModuleList(q_functions)

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """[B, F], [B, A] -> Q-values of both, [B, 2]."""
        x = torch.cat([self.latent(features), action], dim=1)
        return torch.cat([q_function(x) for q_function in self.q_functions], dim=1)


class Critic(nn.Module):
    """Encoder and Q-functions (appendix A.4); `backbone` and `head`, as in the other scripts."""

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.backbone = make_encoder(args)
        self.head = CriticHead(action_dim, args)

    def forward(self, images: Tensor, action: Tensor) -> Tensor:
        """Images in [0, 1] [B, C, H, W], actions [B, A] -> Q-values of both, [B, 2]."""
        return self.head(self.backbone(images), action)


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy on the critic's encoder (appendix A.4).

    286,882 parameters at 6 actions, without CReLU.
    """

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.latent = make_latent(args)
        self.hidden = make_hidden(args.latent_dim, args)
        self.mean = dense(hidden_features(args), action_dim)
        self.log_std = dense(hidden_features(args), action_dim, gain=1.0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] -> mean and log-std of the Gaussian before the tanh, [B, A] each."""
        x = self.hidden(self.latent(features))
        log_std = -10 + 6 * (1 + torch.tanh(self.log_std(x)))  # between -10 and 2
        return self.mean(x), log_std

    def sample(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action tanh(mean + std * noise), noise ~ N(0, 1), and its log-density.

        [B, F], [B, A] -> [B, A], [B].
        """
        mean, log_std = self(features)
        x = mean + log_std.exp() * noise
        log_gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(x) ** 2), exact also where 1 - tanh(x) ** 2 rounds to 0.
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))
        return torch.tanh(x), (log_gaussian - log_slope).sum(1)


# --- Replay ---------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions."""

    obs: Tensor  # uint8 [B, frames * channels, H, W]
    action: Tensor  # float32 [B, A]
    reward: Tensor  # float32 [B]
    terminated: Tensor  # float32 [B], 1 where no return follows (a time limit does not count)
    next_obs: Tensor  # uint8 [B, frames * channels, H, W]


class ReplayBuffer:
    """Uniform replay of single frames; stacks are built when sampled.

    A slot holds a frame, its age (steps since its episode began), and the action taken on it with
    its reward. The slot at `cursor` holds the newest frame. `valid` marks transitions: frames
    acted on, whose stack is still there. With an episode f of two steps, and stacks of three:

        slot      4   5   6   7    cursor = 7
        frame    f0  f1  f2  g0    f2 is what f1's action led to, g0 begins the next episode
        age       0   1   2   0
        action   a0  a1
        valid     1   1   0   0

    stack(5) is [f0, f0, f1]. A time limit does not end the return, so f2 has a slot, too.
    """

    def __init__(
        self,
        capacity: int,
        episode_steps: int,
        frame_shape: tuple,
        action_dim: int,
        frame_stack: int,
        device: torch.device,
    ) -> None:
        # Beyond the transitions: each episode's last frame, the newest frame, and frame_stack - 1
        # more for the oldest one's stack.
        self.num_slots = capacity + math.ceil(capacity / episode_steps) + frame_stack
        self.frame_stack = frame_stack
        self.frames = torch.zeros((self.num_slots, *frame_shape), dtype=torch.uint8, device=device)
        # Not zeros: start() would take the empty slot for an episode's first frame.
        self.ages = torch.ones(self.num_slots, dtype=torch.int64, device=device)
        self.actions = torch.zeros((self.num_slots, action_dim), device=device)
        self.rewards = torch.zeros(self.num_slots, device=device)
        self.terminated = torch.zeros(self.num_slots, device=device)
        self.valid = torch.zeros(self.num_slots, dtype=torch.bool, device=device)
        self.history = torch.arange(1 - frame_stack, 1, device=device)  # -2, -1, 0
        self.cursor = 0
        # The same as a tensor, to index with and for a checkpoint.
        self.cursor_tensor = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self, frame: np.ndarray) -> None:
        """Begin an episode with its first frame, uint8 [channels, H, W].

        It replaces a first frame that was not acted on: a run that was stopped between two episodes
        has one, and begins another episode when it is continued.
        """
        self.cursor = int(self.cursor_tensor)  # the tensors may come from a checkpoint
        if self.ages[self.cursor] == 0:
            self.cursor -= 1
        self.push(frame, 0)

    def add(
        self, action: np.ndarray, reward: float, terminated: bool, next_frame: np.ndarray
    ) -> None:
        """Store what followed the newest frame."""
        self.actions[self.cursor] = torch.from_numpy(action)
        self.rewards[self.cursor] = reward
        self.terminated[self.cursor] = float(terminated)
        self.valid[self.cursor] = True
        self.push(next_frame, self.ages[self.cursor] + 1)

    def push(self, frame: np.ndarray, age: int | Tensor) -> None:
        """Put a frame into the next slot."""
        self.cursor = (self.cursor + 1) % self.num_slots
        self.cursor_tensor.fill_(self.cursor)
        self.frames[self.cursor].copy_(torch.from_numpy(frame))
        self.ages[self.cursor] = age
        self.valid[self.cursor] = False  # not acted on yet
        # With stacks of three and the new frame in slot 10, those of the slots 11 and 12 would mix
        # it with old ones. 11 left the draw when a frame came into 9; now 12 leaves it.
        self.valid[(self.cursor + self.frame_stack - 1) % self.num_slots] = False

    def stack(self, index: Tensor) -> Tensor:
        """Frames up to slots `index` [B], oldest first: uint8 [B, frames * channels, H, W].

        An episode's first frame stands for those before it.
        """
        history = torch.maximum(self.history, -self.ages[index][:, None])  # at age 1: -1, -1, 0
        return self.frames[(index[:, None] + history) % self.num_slots].flatten(1, 2)

    def last_obs(self) -> Tensor:
        """The observation to act on: uint8 [1, frames * channels, H, W]."""
        return self.stack(self.cursor_tensor)

    def gather(self, index: Tensor) -> Batch:
        """The transitions that begin at slots `index` [B]."""
        return Batch(
            obs=self.stack(index),
            action=self.actions[index],
            reward=self.rewards[index],
            terminated=self.terminated[index],
            next_obs=self.stack((index + 1) % self.num_slots),
        )

    def sample(self, batch_size: int, generator: Generator) -> Batch:
        """Transitions drawn uniformly, with replacement; at least one must be valid."""
        # valid = 1, 0, 1 adds up to 1, 1, 2: a draw of 0 falls on slot 0, one of 1 on slot 2.
        cumulative, device = self.valid.cumsum(0), self.valid.device
        uniform = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
        draws = (uniform * cumulative[-1]).long()
        return self.gather(torch.searchsorted(cumulative, draws, right=True))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        items = vars(self).items()
        return {f"replay.{name}": value for name, value in items if torch.is_tensor(value)}


def to_images(obs: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float32 in [0, 1], channels last in memory, as convolutions like it."""
    return obs.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augment(obs: Tensor, shift: int, intensity: float, generator: Generator) -> Tensor:
    """DrQ's augmentation, one draw per stack: uint8 [B, C, H, W] -> images, float32 [B, C, H, W].

    A random shift of up to `shift` pixels, with edge padding, then a factor
    1 + intensity * clip(N(0, 1), -2, 2).
    """
    (batch, channels, height, width), device = obs.shape, obs.device
    if shift > 0:
        dy, dx = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator, device=device)
        # Clamping repeats the edge: shifted by -1, rows 0, 1, 2 show 0, 0, 1.
        rows = (torch.arange(height, device=device) + dy).clamp(0, height - 1)  # [B, H]
        columns = (torch.arange(width, device=device) + dx).clamp(0, width - 1)  # [B, W]
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
        obs = obs.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(obs)
    images = to_images(obs)
    if intensity > 0:
        noise = torch.randn((batch, 1, 1, 1), generator=generator, device=device)
        images *= 1 + intensity * noise.clamp(-2, 2)
    return images


# --- Interventions --------------------------------------------------------------------------------


@contextmanager
def sam_perturbed(parameters: list[Tensor], rho: float) -> Iterator[None]:
    """SAM: within the block, w + rho * g / ||g||; after it w again, exactly (appendix B.1).

    g is what .grad holds, and the norm is one over all `parameters`. A parameter without gradient
    stays. The block puts the gradient there into .grad, in place of g; the step comes after it.
    """
    with torch.no_grad():
        perturbed = [w for w in parameters if w.grad is not None]
        before = [w.clone() for w in perturbed]
        norm = nn.utils.get_total_norm([w.grad for w in perturbed])
        scale = rho / (norm + 1e-12)
        for w in perturbed:
            w.addcmul_(w.grad, scale)  # w + w.grad * scale
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(perturbed, before)


@torch.no_grad()
def reset_optimizer(optimizer: torch.optim.Adam) -> None:
    """Set Adam's moments and step counts to zero, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


# --- Update ---------------------------------------------------------------------------------------


def td_loss(q_values: Tensor, td_target: Tensor) -> Tensor:
    """Squared errors, summed over both Q-functions, averaged over the batch (Eq. 3).

    [B, 2], [B] -> [].
    """
    return (q_values - td_target[:, None]).square().sum(1).mean()


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """w- <- tau * w- + (1 - tau) * w, in place (Algorithms 1 and 2). Many have 1 - tau as tau."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)


def set_gradient(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Put the loss's gradient into .grad of these parameters, and of no other.

    That is there since make_optimizer(); zero_grad() would take it away. Copied, so that it lies in
    memory as the parameter does: from a gradient with other strides, fused Adam on the CPU would
    update the wrong weights.
    """
    for w, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        w.grad.copy_(gradient)


class Agent:
    """DrQ-SAC with the paper's interventions: networks, optimizers, acting, Algorithm 2.

    When to call reset() is the caller's matter. act() and update() have no .item(), and change
    tensors in place: a CUDA graph can replay them.
    """

    def __init__(self, action_dim: int, args: Args, generator: Generator) -> None:
        self.args, self.action_dim, self.generator = args, action_dim, generator
        device = generator.device
        self.critic = Critic(action_dim, args).to(device, memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor = Actor(action_dim, args).to(device)
        log_alpha = torch.tensor(math.log(args.initial_temperature), device=device)
        self.log_alpha = nn.Parameter(log_alpha)
        self.parameters = {
            "encoder": list(self.critic.backbone.parameters()),
            "critic_head": list(self.critic.head.parameters()),
            "actor": list(self.actor.parameters()),
            "temperature": [self.log_alpha],
        }
        self.optimizers = {name: self.make_optimizer(ws) for name, ws in self.parameters.items()}
        self.weights = [w for ws in self.parameters.values() for w in ws]
        scopes = {
            "all": ("encoder", "critic_head", "actor", "temperature"),
            "critic": ("encoder", "critic_head"),
            "actor": ("actor",),
            "encoder": ("encoder",),
        }
        self.sam_groups = scopes[args.sam_scope] if args.sam_rho > 0 else ()

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        """Adam whose state is there, so that checkpoints and CUDA graphs find it.

        Adam makes it in its first step: this takes one with a zero gradient.
        """
        optimizer = torch.optim.Adam(
            parameters, lr=self.args.learning_rate, fused=True, capturable=parameters[0].is_cuda
        )
        for w in parameters:
            w.grad = torch.zeros_like(w)
        optimizer.step()
        reset_optimizer(optimizer)
        return optimizer

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Action drawn from the policy: uint8 [B, C, H, W] -> [B, A]."""
        shape = (len(obs), self.action_dim)
        noise = torch.randn(shape, generator=self.generator, device=obs.device)
        return self.actor.sample(self.critic.backbone(to_images(obs)), noise)[0]

    @torch.no_grad()
    def act_mean(self, obs: Tensor) -> Tensor:
        """The policy's action without its noise, for evaluations: uint8 [B, C, H, W] -> [B, A]."""
        return torch.tanh(self.actor(self.critic.backbone(to_images(obs)))[0])

    @torch.no_grad()
    def td_target(self, batch: Batch, next_images: Tensor, noise: Tensor) -> Tensor:
        """r + gamma * (1 - d) * (min Q(s', a') - alpha * log pi(a' | s')): [B] (line 11).

        Q are the target network's. a' is drawn from pi at s', with `noise` [B, A].
        """
        next_action, log_prob = self.actor.sample(self.critic.backbone(next_images), noise)
        next_q_values = self.target(next_images, next_action).min(1).values
        next_value = next_q_values - self.log_alpha.exp() * log_prob
        return batch.reward + self.args.gamma * (1 - batch.terminated) * next_value

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient update: Algorithm 2 from line 11 on. Returns scalars to log."""
        args, generator, critic, actor = self.args, self.generator, self.critic, self.actor
        # DrQ's shift, which Algorithm 2 leaves out; the jitter of the intensity is Atari's. Shift
        # and noise are drawn once, for both of SAM's passes.
        images = augment(batch.obs, args.aug_shift, intensity=0.0, generator=generator)
        next_images = augment(batch.next_obs, args.aug_shift, intensity=0.0, generator=generator)
        shape = (2, len(images), self.action_dim)
        next_noise, noise = torch.randn(shape, generator=generator, device=images.device)

        # Line 11: the target.
        td_target = self.td_target(batch, next_images, next_noise)

        # Line 12: encoder and Q-functions.
        def critic_loss() -> tuple[Tensor, dict]:
            loss = td_loss(critic(images, batch.action), td_target)
            return loss, {"td_loss": loss}

        losses = self.descend(("encoder", "critic_head"), critic_loss)

        # Line 21: the target network. Here already, as what follows does not use it.
        soft_update(self.target, critic, args.target_ema)

        # Line 13: the actor. Its loss does not reach the encoder.
        with torch.no_grad():
            features = critic.backbone(images)
        alpha = self.log_alpha.detach().exp()

        def actor_loss() -> tuple[Tensor, dict]:
            action, log_prob = actor.sample(features, noise)
            q_values = critic.head(features, action).min(1).values
            loss = (alpha * log_prob - q_values).mean()  # Eq. 4 with its sign turned: a descent
            entropy = -log_prob.mean()
            return loss, {"actor_loss": loss, "q_values": q_values.mean(), "entropy": entropy}

        losses |= self.descend(("actor",), actor_loss)

        # Line 14: the temperature rises when the entropy is below its target H. The paper gives no
        # value; -A is usual, and Nikishin et al.'s.
        target_entropy = -self.action_dim

        def temperature_loss() -> tuple[Tensor, dict]:
            loss = self.log_alpha.exp() * (losses["entropy"] - target_entropy)
            return loss, {"temperature_loss": loss}

        losses |= self.descend(("temperature",), temperature_loss)
        with torch.no_grad():  # the losses are of before the steps; a nan that a step makes is here
            weight_norm = nn.utils.get_total_norm(self.weights)
        return losses | {"temperature": alpha, "weight_norm": weight_norm}

    def descend(self, names: tuple[str, ...], loss_function: Callable) -> dict[str, Tensor]:
        """One step of the named parameters on a loss: lines 15, 18 and 19 of Algorithm 2.

        loss_function() returns the loss, and scalars to log. Those at w are returned, not those at
        SAM's w + rho * g / ||g||.
        """
        parameters = [w for name in names for w in self.parameters[name]]
        perturbed = [w for name in names if name in self.sam_groups for w in self.parameters[name]]

        # The gradient at w.
        loss, scalars = loss_function()
        set_gradient(loss, parameters)

        # Line 15: climb to w + rho * g / ||g||. Line 18: the gradient there. Then back to w.
        if perturbed:
            with sam_perturbed(perturbed, self.args.sam_rho):
                loss, _ = loss_function()
                set_gradient(loss, parameters)

        # Line 19: the step from w.
        for name in names:
            self.optimizers[name].step()
        return {name: value.detach() for name, value in scalars.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """All but the encoder and its Adam is fresh: heads (section 4.1), the rest as released.

        In place: load_state_dict() copies. The target's Q-functions are the same fresh ones.
        """
        head, actor = CriticHead(self.action_dim, self.args), Actor(self.action_dim, self.args)
        self.critic.head.load_state_dict(head.state_dict())
        self.target.head.load_state_dict(head.state_dict())
        self.actor.load_state_dict(actor.state_dict())
        self.log_alpha.fill_(math.log(self.args.initial_temperature))
        for name in ("critic_head", "actor", "temperature"):
            reset_optimizer(self.optimizers[name])

    def tensors(self) -> dict[str, Tensor]:
        """What update() and reset() change in place, generators aside."""
        tensors = {"log_alpha": self.log_alpha.detach()}
        networks = {"critic": self.critic, "target": self.target, "actor": self.actor}
        for name, network in networks.items():
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for i, state in enumerate(optimizer.state.values()):
                tensors |= {f"adam.{name}.{i}.{key}": value for key, value in state.items()}
        return tensors


def capture(function: Callable, tensors: list[Tensor], generators: tuple = ()) -> Callable:
    """function() as a CUDA graph: the same kernels on the same memory, launched at once.

    The function must not wait for the device. What it reads and changes must be tensors that stay
    where they are and that the caller keeps, as a graph keeps none alive. Each call of the returned
    function overwrites what the call before it returned.
    Three warm-up runs let PyTorch choose kernels and fill its caches; `tensors` and `generators`,
    all that they change, are put back. Gradients are not: the function computes its own.
    """
    saved = [tensor.clone() for tensor in tensors]
    states = [generator.get_state() for generator in generators]
    stream = torch.cuda.Stream()  # PyTorch wants the warm-up on another stream than the default one
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        output = function()
    for tensor, value in zip(tensors, saved, strict=True):
        tensor.copy_(value)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)

    def run_graph() -> object:
        graph.replay()
        return output

    return run_graph


def make_generators(args: Args) -> dict[str, Generator]:
    """All sources of random numbers but the environment's, by name, seeded."""
    generators = {"torch": torch.manual_seed(args.seed)}  # fresh weights, random first actions
    for name, device in (("agent", args.device), ("sampling", args.replay_device)):
        seed = int(torch.randint(2**31, ()))
        generators[name] = Generator(device).manual_seed(seed)
    return generators


def make_agent(
    args: Args, env: DMControl, generators: dict[str, Generator]
) -> tuple[Agent, ReplayBuffer, Callable, Callable]:
    """The agent, its replay buffer, and update() and act() on it: on a GPU as CUDA graphs."""
    agent = Agent(env.action_dim, args, generators["agent"])
    capacity = min(args.buffer_size, args.agent_steps)  # a short run needs no more
    device, replay_device = agent.generator.device, generators["sampling"].device
    sizes = (capacity, env.episode_steps, env.frame_shape, env.action_dim, args.frame_stack)
    replay = ReplayBuffer(*sizes, replay_device)

    # Sampling stays outside of the graphs: the replay may lie in the host's memory. Updating and
    # acting read `batch` and `obs`, which stay where they are; here they are placeholders.
    slots = torch.zeros(args.batch_size, dtype=torch.int64, device=replay_device)
    batch = Batch(*(entry.to(device) for entry in replay.gather(slots)))
    obs = replay.last_obs().to(device)

    def update() -> dict[str, Tensor]:
        return agent.update(batch)

    def act() -> Tensor:
        return agent.act(obs)

    if args.cuda_graph and args.device == "cuda":
        update = capture(update, list(agent.tensors().values()), (agent.generator,))
        act = capture(act, [], (agent.generator,))

    def refill(entry: Tensor, new: Tensor) -> None:
        if device != replay_device:
            new = new.pin_memory()  # from there a copy to the GPU goes on while the CPU does
        entry.copy_(new, non_blocking=True)

    def sample_and_update() -> dict[str, Tensor]:
        sampled = replay.sample(args.batch_size, generators["sampling"])  # line 9: a minibatch
        for entry, new in zip(batch, sampled, strict=True):
            refill(entry, new)
        return update()

    def observe_and_act() -> Tensor:
        refill(obs, replay.last_obs())
        return act()

    return agent, replay, sample_and_update, observe_and_act


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(agent: Agent, args: Args, video: list[np.ndarray] | None = None) -> list[float]:
    """Play --eval-episodes episodes with the policy's mean action; gives each one's return.

    Episode i has the seed 10,000 * (seed + 1) + i, training the seed itself. `video`, where given,
    takes the first episode's frames, uint8 [channels, H, W].
    """
    env, returns = make_env(args), []
    device, channels = agent.generator.device, env.frame_shape[0]
    progress = tqdm(range(args.eval_episodes), "evaluation", disable=None, leave=False)
    for episode in progress:
        frame, _ = env.reset(seed=10_000 * (args.seed + 1) + episode)
        obs = torch.from_numpy(frame).to(device).repeat(args.frame_stack, 1, 1)[None]
        episode_return, episode_over = 0.0, False
        while not episode_over:
            if video is not None and episode == 0:
                video.append(frame)
            action = agent.act_mean(obs)[0].cpu().numpy()
            frame, reward, terminated, truncated, _ = env.step(action)
            obs = torch.cat([obs[:, channels:], torch.from_numpy(frame).to(device)[None]], dim=1)
            episode_return += reward
            episode_over = terminated or truncated
        returns.append(float(episode_return))
    return returns


def summary(env_id: str, returns: list[float]) -> str:
    """One line for people: mean return."""
    return f"{env_id}: mean return {np.mean(returns):.1f} over {len(returns)} episodes"


def save_gif(frames: list[np.ndarray], file: BinaryIO) -> None:
    """Frames, uint8 [1 or 3, H, W], 25 a second: the pace of most tasks at their action repeat."""
    first, *others = [Image.fromarray(frame.transpose(1, 2, 0).squeeze()) for frame in frames]
    first.save(file, format="GIF", save_all=True, append_images=others, duration=40, loop=0)


def evaluate_saved(args: Args) -> None:
    """Play the model at --evaluate: the file's task, flags and seed.

    This command's devices, threads and --eval-episodes; with --capture-video, a GIF beside the
    file.
    """
    gif = Path(f"{args.evaluate}.gif")
    if args.capture_video and gif.exists() and not args.overwrite:
        sys.exit(f"error: {gif} exists; pass --overwrite to replace it")
    # The file's run may have been tracked; this command need not be.
    ours = ("device", "replay_device", "eval_episodes", "track")
    try:
        model = torch.load(args.evaluate, map_location="cpu", weights_only=True)
        flags = {**model["args"], **{name: getattr(args, name) for name in ours}}
        saved = Args(**flags)
        agent = Agent(model["action_dim"], saved, Generator(args.device))
        agent.critic.backbone.load_state_dict(model["backbone"])
        agent.actor.load_state_dict(model["actor"])
    except OSError:
        raise
    except Exception as error:  # a foreign file can raise anything; weights_only runs no code
        kind = type(error).__name__
        sys.exit(f"error: {args.evaluate}: not a model that this script saved ({kind})")
    video = [] if args.capture_video else None
    returns = evaluate(agent, saved, video)
    if video is not None:
        write_atomically(gif, lambda file: save_gif(video, file))
    print(summary(saved.env_id, returns))


# --- Metrics --------------------------------------------------------------------------------------


@torch.no_grad()
def active_units(network: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Share of activations above 0 (Fig. 4) when `forward` runs the network.

    By layer, and in all of network.backbone and of network.head, each with an nn.ReLU or CReLU. Of
    CReLU's outputs, one in each pair is above 0: a layer with it has 0.5 by construction.
    """
    active: dict[nn.Module, Tensor] = {}  # bool

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        active[module] = (output > 0).flatten()

    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.ReLU | CReLU)}
    hooks = [module.register_forward_hook(keep) for module in layers.values()]
    forward()
    for hook in hooks:
        hook.remove()
    units = {name: active[module] for name, module in layers.items()}
    for part in ("backbone", "head"):
        units[part] = torch.cat([units[name] for name in layers if name.startswith(part)])
    return {name: int(above.sum()) / len(above) for name, above in units.items()}


@torch.no_grad()
def unit_scores(network: nn.Module, forward: Callable[[], object]) -> dict[str, Tensor]:
    """E|h_i| / mean_k E|h_k| of the units i of each ReLU or CReLU when `forward` runs the network.

    By layer, [units]. A unit is dormant at tau if its score is at most tau (Sokar et al., 2023,
    arXiv 2302.12902, definition 3.1). A convolution's unit is a feature map; with CReLU, a unit is
    the pair (x+, x-).
    """
    scores: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        score = output.abs().mean([0, *range(2, output.ndim)])  # over samples and pixels
        if isinstance(module, CReLU):
            score = score.view(2, -1).sum(0)
        scores[module] = score / score.mean().clamp(min=1e-9)  # in a layer of zeros all are 0

    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.ReLU | CReLU)}
    hooks = [module.register_forward_hook(keep) for module in layers.values()]
    forward()
    for hook in hooks:
        hook.remove()
    return {name: scores[module] for name, module in layers.items()}


def dormant_ratios(scores: dict[str, Tensor]) -> dict[str, float]:
    """Share of a network's units that are dormant at three thresholds, of unit_scores()."""
    units = torch.cat(list(scores.values()))
    thresholds = (0, 0.025, 0.1)
    return {f"dormant_ratio/{tau}": int((units <= tau).sum()) / len(units) for tau in thresholds}


@torch.no_grad()
def feature_metrics(features: Tensor) -> dict[str, float]:
    """Ranks of features [N, width] by their singular values s, and the mean of their norms.

    Effective rank: exp(-sum p ln p), p = s / sum s (Roy & Vetterli, 2007). srank: the fewest s that
    sum to 99% (Kumar et al., 2021, arXiv 2010.14498). Stable rank: ||A||_F^2 / s_1^2. The ranks
    are nan where all features are 0 or one is not finite.
    """
    metrics = dict.fromkeys(("effective_rank", "srank", "stable_rank"), math.nan)
    metrics["feature_norm"] = float(features.norm(dim=1).mean())
    if features.isfinite().all() and features.any():
        s = torch.linalg.svdvals(features).double()
        p = s / s.sum()
        metrics["effective_rank"] = float(torch.special.entr(p).sum().exp())
        metrics["srank"] = float((p.cumsum(0) < 0.99).sum() + 1)
        metrics["stable_rank"] = float((s / s[0]).square().sum())
    return metrics


@torch.no_grad()
def weight_metrics(weights: list[Tensor], initial: list[Tensor]) -> dict[str, float]:
    """Norm of the weights, and their distance from the initial ones, over all tensors."""
    moved = torch._foreach_sub(weights, initial)
    norms = {"weight_norm": weights, "weight_distance": moved}
    return {name: float(nn.utils.get_total_norm(tensors)) for name, tensors in norms.items()}


def max_eigenvalue(loss: Tensor, parameters: list[Tensor], generator: Generator) -> float:
    """Largest eigenvalue of the Hessian of `loss` (section 4.1), signed: of -2 and 1 it is 1.

    By the Lanczos method (Golub & Van Loan, 2013, chapter 10), from Hessian-vector products and
    with three vectors of the parameters' size. It stops when the residual of the largest Ritz pair
    falls below a thousandth of its value, after 100 products at the latest; TF32 leaves three
    digits. The loss and its gradient depend on all `parameters` (the gradient of a mean of Q-values
    not on their last bias). nan for a loss that is not finite.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])

    def hessian_times(vector: Tensor) -> Tensor:
        products = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in products])

    vector = torch.randn(gradient.shape, generator=generator, device=gradient.device)
    vector, previous, beta = vector / vector.norm(), torch.zeros_like(vector), 0.0
    tridiagonal = np.zeros((101, 101))
    # In the basis of the vectors so far the Hessian is tridiagonal. The eigenvalues of this small
    # matrix are the Ritz values; the largest one grows towards the Hessian's with each vector.
    for k in range(100):
        product = hessian_times(vector) - beta * previous
        tridiagonal[k, k] = float(product @ vector)
        product -= tridiagonal[k, k] * vector
        beta = float(product.norm())
        if not math.isfinite(beta):
            return math.nan
        ritz_values, ritz_vectors = np.linalg.eigh(tridiagonal[: k + 1, : k + 1])
        # The residual: the norm of Hessian y - ritz_value y, y being the largest one's Ritz vector.
        if beta * abs(ritz_vectors[-1, -1]) <= 1e-3 * abs(ritz_values[-1]):
            break
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta
        previous, vector = vector, product / beta
    return float(ritz_values[-1])


def plasticity_metrics(agent: Agent, replay: ReplayBuffer, step: int) -> dict[str, float]:
    """Metrics of the critic, on 1,024 transitions drawn uniformly (more if its features are wider).

    Features of all of them, active and dormant units on the first 512, sharpness and the gradient's
    norm on the first 32, with the mean as the target's next action. Without augmentation.
    Random numbers are the step's own: measuring must change nothing of what is learned.
    """
    critic, device = agent.critic, agent.generator.device
    batch_size = max(1024, hidden_features(agent.args))
    batch = replay.sample(batch_size, Generator(replay.valid.device).manual_seed(step))
    batch = Batch(*(entry.to(device) for entry in batch))
    # Features: what the first Q-function's last hidden layer gives out.
    hidden_layers = critic.head.q_functions[0][0]
    with torch.no_grad():
        latent = critic.head.latent(critic.backbone(to_images(batch.obs)))
        metrics = feature_metrics(hidden_layers(torch.cat([latent, batch.action], dim=1)))

    batch = Batch(*(entry[:512] for entry in batch))
    images = to_images(batch.obs)
    units = active_units(critic, lambda: critic(images, batch.action))
    metrics |= {f"active_units/{name}": share for name, share in units.items()}
    metrics |= dormant_ratios(unit_scores(critic, lambda: critic(images, batch.action)))

    batch = Batch(*(entry[:32] for entry in batch))
    td_target = agent.td_target(batch, to_images(batch.next_obs), torch.zeros_like(batch.action))
    loss = td_loss(critic(to_images(batch.obs), batch.action), td_target)
    generator, parameters = Generator(device).manual_seed(step), list(critic.parameters())
    metrics["hessian_max_eigenvalue"] = max_eigenvalue(loss, parameters, generator)
    gradient = torch.autograd.grad(loss, parameters)
    metrics["gradient_norm"] = float(nn.utils.get_total_norm(gradient))
    # Initial weights: drawn from the seed as at the start of the run.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        make_generators(agent.args)
        initial = Critic(agent.action_dim, agent.args).to(device)
    metrics |= weight_metrics(parameters, list(initial.parameters()))
    return metrics


# --- Checkpoint -----------------------------------------------------------------------------------

# Flags that may differ when a run is continued.
MAY_CHANGE = set(
    "run_dir device replay_device cuda_graph torch_threads resume checkpoint_interval overwrite "
    "evaluate eval_interval metrics_interval log_interval capture_video save_model track "
    "wandb_project_name wandb_entity".split()
)


@dataclass
class Counters:
    """Where a run stands; its result.json will have all of it."""

    env_steps: int = 0  # agent steps times --action-repeat
    agent_steps: int = 0
    gradient_updates: int = 0
    resets: int = 0
    training_seconds: float = 0.0  # of acting and learning
    wall_clock_seconds: float = 0.0  # of all, evaluations included
    resumed_at: list[int] = field(default_factory=list)  # agent steps after which it was continued
    git_commits: list[str | None] = field(default_factory=list)  # of each process
    wandb_id: str | None = None


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, and put it there once it is on disk: a kill leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # torch.save says "unexpected pos", and has "no space left on device" as context.
        raise (error.__context__ or error) from None
    os.replace(temporary, path)


def refuse_other_flags(args: Args, saved: dict, path: Path) -> None:
    """End with one line if the run that `path` belongs to had other flags."""
    others = [
        f"{name}={saved.get(name)}"
        for name, value in asdict(args).items()
        if name not in MAY_CHANGE and saved.get(name) != value
    ]
    if others:
        advice = "pass the same, another --exp-name, or --overwrite"
        sys.exit(f"error: {path} was made with {', '.join(others)}; {advice}")


def save_checkpoint(
    path: Path, args: Args, counters: Counters, generators: dict, tensors: dict
) -> None:
    """Write all that a run needs to go on but the simulation's state: it begins a new episode."""
    checkpoint = {"args": asdict(args), "counters": asdict(counters), "tensors": tensors}
    checkpoint["generators"] = {name: g.get_state() for name, g in generators.items()}
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path, args: Args, generators: dict, tensors: dict) -> Counters:
    """Put all back in place; returns the counters.

    Between a CPU and a GPU, the random streams of what has moved begin anew.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        refuse_other_flags(args, checkpoint["args"], path)
        for name, tensor in tensors.items():
            tensor.copy_(checkpoint["tensors"][name])
        # A GPU's generator has a state of another length than a CPU's.
        for name, state in checkpoint["generators"].items():
            if name in generators and len(state) == len(generators[name].get_state()):
                generators[name].set_state(state)
        return Counters(**checkpoint["counters"])
    except OSError:
        raise
    except Exception as error:  # a foreign file can raise anything; weights_only runs no code
        problem = f"not a checkpoint of this script ({type(error).__name__})"
        sys.exit(f"error: {path}: {problem}; move it away or pass --overwrite")


# --- Run ------------------------------------------------------------------------------------------


def due(interval: int, count: int) -> bool:
    """Whether `count` is a positive multiple of `interval`; never for interval 0."""
    return interval > 0 and count > 0 and count % interval == 0


def git_commit() -> str | None:
    """Commit of the repository that this file lies in, if it does; "-dirty" where files changed."""
    command = "git describe --always --dirty --abbrev=40 --exclude '*'"  # the hash, never a tag
    here = Path(__file__).parent
    git = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True)
    return git.stdout.strip() or None


def device_name(args: Args) -> str:
    """The GPU's name, or the number of the CPU's threads."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def start_logging(args: Args, run_dir: Path, counters: Counters) -> SummaryWriter:
    """TensorBoard and, with --track, Weights & Biases; an old run's files go with --overwrite."""
    if args.track:
        import wandb

        options = {"project": args.wandb_project_name, "entity": args.wandb_entity}
        options |= {"name": run_dir.name, "id": counters.wandb_id, "resume": "allow"}
        counters.wandb_id = wandb.init(**options, config=asdict(args), sync_tensorboard=True).id
    if args.overwrite:  # now that nothing more can keep the new run from beginning
        names = ["result.json", "checkpoint.pth", "model.pth", "video.gif"]  # of this script
        for name in [*names, *(f"{name}.tmp" for name in names), "events.out.tfevents.*"]:
            for path in run_dir.glob(name):
                path.unlink()
    # purge_step hides from readers what a killed process logged after its last checkpoint.
    writer = SummaryWriter(str(run_dir), purge_step=counters.agent_steps + 1)
    table = "\n".join(f"|{flag}|{value}|" for flag, value in asdict(args).items())
    writer.add_text("args", f"|flag|value|\n|-|-|\n{table}")
    return writer


def check_finite(losses: dict[str, Tensor], step: int) -> None:
    """End with one line if one of the newest scalars is not finite: a nan spreads and stays."""
    for name, value in losses.items():
        if not math.isfinite(value):
            sys.exit(f"error: step {step}: {name} is not finite; lower the learning rate")


def on_stop_signals(handler: Callable | signal.Handlers) -> None:
    """What SIGTERM and Ctrl-C do from now on."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler)


def catch_stop_signals() -> list[int]:
    """A list that takes the next SIGTERM or Ctrl-C, so that the step can end.

    The one after that ends the process at once.
    """
    caught: list[int] = []

    def stop(signum: int, frame: object) -> None:
        caught.append(signum)
        on_stop_signals(signal.SIG_DFL)

    on_stop_signals(stop)
    return caught


def finish(
    args: Args, run_dir: Path, counters: Counters, agent: Agent, returns: list, video: list | None
) -> None:
    """Write the run's files; result.json is the last one: where it is, a run is finished."""
    if video is not None:
        write_atomically(run_dir / "video.gif", lambda file: save_gif(video, file))
    if args.save_model:
        model = {"args": asdict(args), "action_dim": agent.action_dim}
        model["backbone"] = agent.critic.backbone.state_dict()
        model["actor"] = agent.actor.state_dict()
        write_atomically(run_dir / "model.pth", lambda file: torch.save(model, file))
    python = sys.version.split()[0]
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "env_id": args.env_id,
        "seed": args.seed, "args": asdict(args), **asdict(counters),
        "env_steps_per_second": counters.env_steps / counters.training_seconds,
        "updates_per_second": counters.gradient_updates / counters.training_seconds,
        "parameters": sum(w.numel() for w in agent.weights),
        "episode_returns": returns, "mean_return": float(np.mean(returns)),
        "mujoco_gl": os.environ["MUJOCO_GL"], "device": device_name(args),
        "versions": {"python": python, "torch": torch.__version__, "mujoco": version("mujoco")},
    }
    # fmt: on
    content = json.dumps(result, indent=2).encode()
    write_atomically(run_dir / "result.json", lambda file: file.write(content))
    (run_dir / "checkpoint.pth").unlink(missing_ok=True)


def train(args: Args, run_dir: Path) -> None:
    """A run from its seed, or from its checkpoint, to result.json."""
    checkpoint_path = run_dir / "checkpoint.pth"
    env = make_env(args)
    generators = make_generators(args)
    agent, replay, update, act = make_agent(args, env, generators)
    tensors = {**agent.tensors(), **replay.tensors()}
    counters = Counters()
    if checkpoint_path.exists() and not args.overwrite:
        counters = load_checkpoint(checkpoint_path, args, generators, tensors)
        counters.resumed_at.append(counters.agent_steps)
    counters.git_commits.append(git_commit())
    # The simulation's state is not in a checkpoint: a continued run begins a new episode, with a
    # seed above any --seed and any evaluation's, and below the suite's limit of 32 bits.
    offset = (2_100_000_000 + counters.agent_steps) if counters.agent_steps > 0 else 0
    frame, _ = env.reset(seed=args.seed + offset)
    replay.start(frame)
    episode_return, episode_length = 0.0, 0

    writer = start_logging(args, run_dir, counters)
    num_updates = (args.agent_steps - args.learning_starts + 1) * args.updates_per_step
    size = f"{sum(w.numel() for w in agent.weights):,} parameters"
    size += f", {num_updates:,} updates, on {device_name(args)}"
    size += f", replay of {replay.frames.nbytes / 2**30:.1f} GiB on {args.replay_device}"
    print(f"{run_dir}: {size}, from step {counters.agent_steps}", file=sys.stderr)
    start_time = time.perf_counter() - counters.wall_clock_seconds
    checkpoint_time = time.perf_counter()
    stop_signals = catch_stop_signals()
    losses: dict[str, Tensor] = {}
    steps = range(counters.agent_steps + 1, args.agent_steps + 1)
    # With disable=None there is no bar where there is no terminal.
    progress = tqdm(steps, args.env_id, args.agent_steps, initial=steps.start - 1, disable=None)
    for step in progress:
        counters.agent_steps, counters.env_steps = step, step * args.action_repeat
        step_start = time.perf_counter()
        last = step == args.agent_steps

        # Choose an action: line 4 of Algorithm 2. Not after update(): the action, and with it the
        # simulation, would wait until a GPU has learned.
        if step <= args.learning_starts:
            action = (2 * torch.rand(agent.action_dim) - 1).numpy()
        else:
            action = act()[0].cpu().numpy()  # waits for the device
        if not np.isfinite(action).all():  # MuJoCo cannot simulate a nan: this ends the run
            check_finite(losses | {"action": action.sum()}, step)

        # Learn: lines 8 to 21
        if step >= args.learning_starts:
            for _ in range(args.updates_per_step):
                losses = update()
                counters.gradient_updates += 1
                # Not on the last step: the evaluation would be of a fresh actor.
                if due(args.reset_interval, counters.gradient_updates) and not last:
                    agent.reset()
                    counters.resets += 1

        # Act: lines 5 to 7. On the CPU, while a GPU learns
        frame, reward, terminated, truncated, _ = env.step(action)
        replay.add(action, reward, terminated, frame)  # a time limit does not end the return
        episode_return += reward
        episode_length += 1
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            progress.set_postfix({"return": episode_return}, refresh=False)
            episode_return, episode_length = 0.0, 0
            frame, _ = env.reset()
            replay.start(frame)
        counters.training_seconds += time.perf_counter() - step_start

        # Log
        if step >= args.learning_starts and (due(args.log_interval, step) or last):
            check_finite(losses, step)
            for name, value in losses.items():
                writer.add_scalar(f"losses/{name}", value, step)
            writer.add_scalar("charts/resets", counters.resets, step)
            sps = counters.env_steps / counters.training_seconds
            writer.add_scalar("charts/SPS", sps, step)
        if step >= args.learning_starts and due(args.metrics_interval, step):
            check_finite(losses, step)
            for name, value in plasticity_metrics(agent, replay, step).items():
                writer.add_scalar(f"plasticity/{name}", value, step)
        if due(args.eval_interval, step) and not last:
            check_finite(losses, step)
            writer.add_scalar("eval/mean_return", np.mean(evaluate(agent, args)), step)

        # Checkpoint
        stopping = list(stop_signals)  # read once: a signal may come at any line
        auto = args.checkpoint_interval == "auto"
        waited = time.perf_counter() - checkpoint_time
        checkpoint_due = waited >= 300 if auto else due(args.checkpoint_interval, step)
        if args.checkpoint_interval != 0 and (checkpoint_due or last or stopping):
            check_finite(losses, step)
            writer.flush()
            counters.wall_clock_seconds = time.perf_counter() - start_time
            save_checkpoint(checkpoint_path, args, counters, generators, tensors)
            checkpoint_time = time.perf_counter()
        if stopping or (last and stop_signals):  # these came while the last checkpoint was written
            progress.close()
            advice = "; --resume continues" if args.checkpoint_interval != 0 else ""
            print(f"stopped{advice} after step {step}", file=sys.stderr)
            sys.exit(128 + stop_signals[0])

    # Stopped from here on, a run with checkpoints repeats its evaluation: the last step has one.
    on_stop_signals(signal.SIG_DFL)
    video = [] if args.capture_video else None
    returns = evaluate(agent, args, video)
    counters.wall_clock_seconds = time.perf_counter() - start_time
    finish(args, run_dir, counters, agent, returns, video)
    # Last: a run that is killed before it has a result evaluates again, and this is logged once.
    writer.add_scalar("eval/mean_return", np.mean(returns), args.agent_steps)
    writer.close()
    print(f"{summary(args.env_id, returns)}; {run_dir / 'result.json'}")


def run(args: Args) -> None:
    """Begin a run or continue it, alone in its directory; replace one only with --overwrite."""
    run_dir = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    result_path, checkpoint_path = run_dir / "result.json", run_dir / "checkpoint.pth"
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".lock", blocking=False):
            finished, unfinished = result_path.exists(), checkpoint_path.exists()
            if (finished or unfinished) and not (args.resume or args.overwrite):
                kind = "a finished" if finished else "an unfinished"
                advice = "pass --resume or --overwrite, or change --exp-name or --seed"
                sys.exit(f"error: {run_dir} holds {kind} run; {advice}")
            if finished and args.resume:
                refuse_other_flags(args, json.loads(result_path.read_text())["args"], result_path)
                checkpoint_path.unlink(missing_ok=True)  # left by a run killed after its result
                print(f"{run_dir}: finished already", file=sys.stderr)
            else:
                train(args, run_dir)
    except Timeout:
        sys.exit(f"error: another process is at work in {run_dir}")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free. Given back to the kernel, it returns page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # not so with musl
        if not mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD: no tensor below 2 GiB has its own pages
            mallopt(-3, 2**25)  # 32 MiB, the most that an older glibc takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap is not given back


if __name__ == "__main__":
    keep_freed_memory()
    args = tyro.cli(Args)
    on_stop_signals(signal.SIG_DFL)  # until the first step, Ctrl-C ends it without a traceback
    torch.set_num_threads(args.torch_threads)
    if args.device == "cuda":  # TF32 in matrix products, as PyTorch has it in convolutions
        torch.set_float32_matmul_precision("high")
    try:
        if args.evaluate is None:
            run(args)
        else:
            evaluate_saved(args)
    except OSError as error:  # a full disk, a missing permission
        sys.exit(f"error: {error}")
