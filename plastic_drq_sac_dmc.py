# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "dm-control==1.0.50", "mujoco==3.17.0", "gymnasium==1.4.0",
#     "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
r"""PLASTIC on DrQ-SAC for the DeepMind Control suite from pixels, in one file.

Paper: "Improving Input and Label Plasticity for Sample Efficient Reinforcement Learning" (NeurIPS 2023),
section 4.2, appendices A.4 and B.3 (Algorithm 2, Table 6).

    python plastic_drq_sac_dmc.py --env-id quadruped-run                                             # PLASTIC
    python plastic_drq_sac_dmc.py --env-id quadruped-run --exp-name base --no-layer-norm --no-crelu --sam-rho 0 \
        --reset-interval 0                                                                           # base

Where it departs from the paper's text (README.md compares the paper, the authors' release and this file):
- Algorithm 2 bootstraps from an action drawn at s and squares the policy's loss: misprints, not followed.
- Critic, target network, actor and temperature are updated one after the other, as released; Algorithm 2 perturbs all
  first and computes the target again with the perturbed actor.
- A step's update comes before its transition, which is in the buffer one update later: a GPU updates meanwhile.
- LayerNorm in the encoder's convolutions, CReLU in the MLPs.                      --layer-norm-scope, --crelu-scope
"""

import copy
import difflib
import fcntl
import json
import logging
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes.util import find_library
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, NoReturn
from zipfile import ZipFile

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# What MuJoCo renders with has to be known before dm_control is imported.
os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or (
    "egl" if find_library("EGL") else "osmesa"
)
NO_RENDERER = (
    f"MuJoCo cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']}: install libegl1 and libegl-mesa0, or libosmesa6 "
    "(packages of Debian and Ubuntu), or set MUJOCO_GL to egl, osmesa or glfw"
)
try:
    with warnings.catch_warnings(action="ignore"):  # of GLFW, where it finds no display
        from dm_control import suite
        from dm_control.rl.control import PhysicsError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: pip install dm-control (for Python 3.11 or 3.12)")
except (
    ImportError,
    AttributeError,
    RuntimeError,
) as error:  # from PyOpenGL, where the library is missing
    sys.exit(f"error: {NO_RENDERER} ({error})")

logging.getLogger("absl").setLevel(
    logging.ERROR
)  # cheetah's model has an attribute that MuJoCo warns about
TASKS = {
    f"{domain}-{task}" for domain, task in suite.ALL_TASKS if domain != "lqr"
}  # whose episodes never end
MAX_SKIPPED_IN_A_ROW = 100  # updates with a non-finite gradient, after which a run gives up
CHECKPOINT_VERSION = 1  # to be raised when what a checkpoint holds changes


@dataclass
class Args:
    """PLASTIC on DrQ-SAC for the DeepMind Control suite from pixels. The defaults are PLASTIC."""

    # fmt: off
    # Run
    env_id: str = "quadruped-run"  # task of the suite, <domain>-<task>
    seed: int = 1  # seed of the networks, the exploration, the sampling and the environment
    exp_name: str = "plastic_drq_sac_dmc"  # name of this setting, part of the run's directory
    run_dir: Path = Path("runs")  # where run directories are made: <run-dir>/<env-id>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = CUDA where there is one
    cuda_graph: bool = True  # run the update and the choice of an action as CUDA graphs (without effect on the CPU)
    torch_threads: int = 0  # PyTorch's CPU threads (0 = its own choice, at most 8)
    resume: bool = False  # continue an unfinished run, start where there is none, leave a finished one as it is
    checkpoint_interval: Literal["auto"] | int = "auto"  # agent steps between checkpoints (auto = 5 minutes, 0 = off)
    overwrite: bool = False  # replace a run of the same name, finished or not

    # Environment (Table 6)
    total_timesteps: int = 2_000_000  # environment steps, before action repeat; all other steps are agent steps
    action_repeat: int = 0  # environment steps per agent step (0 = the task's: 4 or 2)
    frame_stack: int = 3  # frames per observation
    image_size: int = 64  # height and width of a frame
    grayscale: bool = True  # one channel per frame instead of three
    render_quality: Literal["full", "fast"] = "full"  # fast = no shadows, no multisampling

    # Training (Table 6)
    updates_per_step: int = 1  # gradient updates per agent step
    batch_size: int = 512  # transitions per update
    learning_starts: int = 1_000  # agent steps with random actions; the last one has the first update
    learning_rate: float = 3e-4  # of Adam, for all (released: 1e-4)
    gamma: float = 0.99  # discount factor
    target_ema: float = 0.995  # weight of the old target network in its moving average
    initial_temperature: float = 0.1  # weight of the entropy at the start and after a reset
    latent_dim: int = 50  # features of the encoder's output that an MLP sees
    hidden_dim: int = 256  # width of the MLPs' two hidden layers
    buffer_size: int = 1_000_000  # transitions in the replay buffer (at most the run's agent steps)
    aug_shift: int = 4  # largest random shift in pixels (0 = off)

    # Plasticity interventions
    layer_norm: bool = True  # LayerNorm over channels at each pixel
    layer_norm_scope: Literal["backbone", "all"] = "backbone"  # all = the MLPs' hidden layers too
    crelu: bool = True  # concatenated ReLU
    crelu_scope: Literal["head", "all"] = "head"  # head = the MLPs, all = the encoder's layers too
    sam_rho: Literal["auto"] | float = "auto"  # radius of SAM's perturbation (0 = off; auto = 0.1 or 0.01)
    sam_scope: Literal["all", "critic", "actor", "encoder"] = "all"  # what SAM perturbs; all = temperature too
    reset_interval: int = 100_000  # gradient updates between resets of all but the encoder (0 = off)

    # Evaluation, metrics, logging
    eval_episodes: int = 10  # episodes of an evaluation
    eval_interval: int = 0  # agent steps between evaluations (0 = only at the end)
    metrics_interval: int = 0  # agent steps between plasticity metrics (0 = off)
    log_interval: int = 1_000  # agent steps between logged losses
    capture_video: bool = False  # save the first episode of the last evaluation as a GIF
    save_model: bool = False  # save encoder and actor at the end
    evaluate: Path | None = None  # a saved model: play its task with its seed, train nothing
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "plastic"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases
    # fmt: on


# --- Environment ----------------------------------------------------------------------------------


class DMControl(gym.Env):
    """A task of the DeepMind Control suite from pixels, with Gymnasium's API.

    Observations are the newest frame alone, uint8 [channels, size, size]; stacks are left to the caller. Actions are in
    [-1, 1]; a step repeats one and sums the rewards. `terminated` is the task's own end (its discount is 0);
    `truncated`, the usual one, is that its time is over: the return goes on, only the episode does not.
    """

    def __init__(self, args: Args) -> None:
        self.args = args
        self.load(seed=None)
        spec = self.env.action_spec()
        self.low, self.high = (
            spec.minimum,
            spec.maximum,
        )  # of some, quadruped's among them, others than -1 and 1
        self.action_space = gym.spaces.Box(-1, 1, spec.shape, np.float32)
        channels = 1 if args.grayscale else 3
        self.observation_space = gym.spaces.Box(
            0, 255, (channels, args.image_size, args.image_size), np.uint8
        )

    def load(self, seed: int | None) -> None:
        """Make the task: the suite seeds it only then."""
        domain, task = self.args.env_id.split("-", 1)
        self.env = suite.load(domain, task, task_kwargs={"random": seed})
        screen, size = self.env.physics.model.vis.global_, self.args.image_size
        screen.offwidth, screen.offheight = max(screen.offwidth, size), max(screen.offheight, size)
        if self.args.render_quality == "fast":
            quality = self.env.physics.model.vis.quality
            quality.shadowsize = quality.offsamples = 0

    def render(self) -> np.ndarray:
        """The newest frame."""
        camera = 2 if self.args.env_id.startswith("quadruped-") else 0
        rgb = self.env.physics.render(self.args.image_size, self.args.image_size, camera)
        if not self.args.grayscale:
            return np.ascontiguousarray(
                rgb.transpose(2, 0, 1)
            )  # the renderer's rows run backwards in memory
        return (rgb @ (0.299, 0.587, 0.114) + 0.5).astype(np.uint8)[None]

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Begin an episode; with a seed, the first one of that seed."""
        if seed is not None:
            self.load(seed)
        self.env.reset()
        return self.render(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeat an action [A] until the episode ends or it has been taken --action-repeat times."""
        action = self.low + (np.clip(action, -1, 1).astype(np.float64) + 1) / 2 * (
            self.high - self.low
        )
        reward = 0.0
        for _ in range(self.args.action_repeat):
            time_step = self.env.step(action)
            reward += time_step.reward or 0.0
            if time_step.last():
                break
        terminated = time_step.last() and time_step.discount == 0
        return self.render(), reward, terminated, time_step.last() and not terminated, {}


# --- Networks -------------------------------------------------------------------------------------


class PixelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at each pixel: [B, C, H, W] -> [B, C, H, W] (section 4.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CReLU(nn.Module):
    """Concatenated ReLU: [B, C, ...] -> [B, 2C, ...]; no input loses its gradient (section 2.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], dim=1)


class SameConv(nn.Conv2d):
    """3x3 convolution with stride 2 and "SAME" padding: [B, C, H, W] -> [B, out, ceil(H / 2), ceil(W / 2)].

    For even sizes, one row and column of zeros after the image and none before; for odd ones, one on each side.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2)
        nn.init.orthogonal_(self.weight, math.sqrt(2))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


def make_encoder(args: Args) -> nn.Sequential:
    """Four convolutions: images [B, frames * channels, size, size] -> features [B, F]; 388,416 parameters plain."""
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
    """Length of the encoder's output."""
    return (
        256
        * (2 if args.crelu and args.crelu_scope == "all" else 1)
        * math.ceil(args.image_size / 16) ** 2
    )


def dense(in_features: int, out_features: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Linear layer with orthogonal weights and zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_latent(args: Args) -> nn.Sequential:
    """Features [B, F] -> latent [B, latent_dim]: linear (LeCun normal), LayerNorm, tanh."""
    linear = nn.Linear(num_features(args), args.latent_dim)
    std = (
        1 / math.sqrt(linear.in_features) / 0.87962566
    )  # what is left of 1 after a cut at two standard deviations
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.LayerNorm(args.latent_dim, eps=1e-6), nn.Tanh())


def make_hidden(in_features: int, args: Args) -> nn.Sequential:
    """Two hidden layers of an MLP: [B, in_features] -> [B, hidden_features(args)]."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers.append(dense(in_features, args.hidden_dim))
        if args.layer_norm and args.layer_norm_scope == "all":
            layers.append(nn.LayerNorm(args.hidden_dim, eps=1e-6))
        layers.append(CReLU() if args.crelu else nn.ReLU())
        # CReLU doubles what the layer gives out, so the next layer's fan-in doubles; the width stays.
        in_features = hidden_features(args)
    return nn.Sequential(*layers)


def hidden_features(args: Args) -> int:
    """Length of a hidden layer's output."""
    return args.hidden_dim * (2 if args.crelu else 1)


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
    """Encoder, `backbone`, and Q-functions, `head` (appendix A.4)."""

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.backbone = make_encoder(args)
        self.head = CriticHead(action_dim, args)

    def forward(self, images: Tensor, action: Tensor) -> Tensor:
        """Images in [0, 1] [B, C, H, W], actions [B, A] -> Q-values of both, [B, 2]."""
        return self.head(self.backbone(images), action)


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy on the critic's encoder: 286,882 parameters at 6 actions, without CReLU."""

    def __init__(self, action_dim: int, args: Args) -> None:
        super().__init__()
        self.latent = make_latent(args)
        self.hidden = make_hidden(args.latent_dim, args)
        self.mean = dense(hidden_features(args), action_dim)
        self.log_std = dense(hidden_features(args), action_dim, gain=1.0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] -> mean and log-std before the tanh, [B, A] each; the log-std lies between -10 and 2."""
        x = self.hidden(self.latent(features))
        return self.mean(x), -10 + 6 * (1 + torch.tanh(self.log_std(x)))

    def sample(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action tanh(mean + std * noise), noise ~ N(0, 1): [B, F], [B, A] -> actions [B, A], log-densities [B]."""
        mean, log_std = self(features)
        x = mean + log_std.exp() * noise
        log_gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (
            math.log(2) - x - F.softplus(-2 * x)
        )  # log(1 - tanh(x) ** 2), also where that rounds to 0
        return torch.tanh(x), (log_gaussian - log_slope).sum(1)


# --- Replay ---------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions."""

    obs: Tensor  # uint8 [B, frames * channels, H, W]
    action: Tensor  # float32 [B, A]
    reward: Tensor  # float32 [B]
    terminated: Tensor  # float32 [B], 1 where nothing comes after (a time limit does not count)
    next_obs: Tensor  # uint8 [B, frames * channels, H, W]


class ReplayBuffer:
    """Uniform replay of single frames; stacks are built when sampled.

    A slot holds a frame, its age (steps since the episode began), and the action taken on it with its reward. The slot
    at `cursor` holds the newest frame. `valid` marks transitions: frames acted on, whose stack is still there. An
    episode's last frame has a slot, too: a time limit does not end the return.
    """

    def __init__(self, capacity: int, episode_steps: int, obs_shape: tuple, action_dim: int, frame_stack: int,
                 device: torch.device) -> None:  # fmt: skip
        # Beyond `capacity` transitions: each episode's last frame, and older frames for the oldest transition's stack.
        self.slots = capacity + math.ceil(capacity / episode_steps) + frame_stack
        self.frame_stack = frame_stack
        self.frames = torch.zeros((self.slots, *obs_shape), dtype=torch.uint8, device=device)
        self.ages = torch.ones(self.slots, dtype=torch.int64, device=device)
        self.actions = torch.zeros((self.slots, action_dim), device=device)
        self.rewards = torch.zeros(self.slots, device=device)
        self.terminated = torch.zeros(self.slots, device=device)
        self.valid = torch.zeros(self.slots, dtype=torch.bool, device=device)
        self.history = torch.arange(frame_stack - 1, -1, -1, device=device)
        self.newest_slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.cursor = 0

    def start(self, frame: np.ndarray) -> None:
        """Begin an episode with its first frame, uint8 [channels, H, W]; one without a step yet gives up its slot."""
        if self.ages[self.cursor] == 0:  # a run that is continued where an episode ended
            self.cursor -= 1
        self.push(frame, 0)

    def add(
        self, action: np.ndarray, reward: float, terminated: bool, next_frame: np.ndarray
    ) -> None:
        """Store what the newest frame led to."""
        self.actions[self.cursor] = torch.from_numpy(action)
        self.rewards[self.cursor] = reward
        self.terminated[self.cursor] = float(terminated)
        self.valid[self.cursor] = True
        self.push(next_frame, self.ages[self.cursor] + 1)

    def push(self, frame: np.ndarray, age: int | Tensor) -> None:
        """Put a frame into the next slot."""
        self.cursor = (self.cursor + 1) % self.slots
        self.newest_slot.fill_(self.cursor)
        self.frames[self.cursor] = torch.from_numpy(frame)
        self.ages[self.cursor] = age
        # Not acted on yet; and the oldest transition goes, the first frame of whose stack has been overwritten.
        self.valid[self.cursor] = False
        self.valid[(self.cursor + self.frame_stack - 1) % self.slots] = False

    def stack(self, index: Tensor) -> Tensor:
        """Frames up to slots `index` [B], oldest first, the first one repeated: uint8 [B, frames * channels, H, W]."""
        back = torch.minimum(self.history, self.ages[index][:, None])
        return self.frames[(index[:, None] - back) % self.slots].flatten(1, 2)

    def newest(self) -> Tensor:
        """The observation to act on: uint8 [1, frames * channels, H, W]."""
        return self.stack(self.newest_slot)

    def sample(self, batch_size: int, generator: Generator) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        cumulative = self.valid.cumsum(0)
        uniform = torch.rand(
            batch_size, generator=generator, device=self.valid.device, dtype=torch.float64
        )
        index = torch.searchsorted(cumulative, (uniform * cumulative[-1]).long(), right=True)
        next_obs = self.stack((index + 1) % self.slots)
        return Batch(
            self.stack(index),
            self.actions[index],
            self.rewards[index],
            self.terminated[index],
            next_obs,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds of it; `newest_slot` has the cursor."""
        return {
            f"replay.{name}": value
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }


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


def to_images(obs: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float32 in [0, 1], channels last in memory, as convolutions like it."""
    return obs.to(torch.float32, memory_format=torch.channels_last).div_(255)


# --- Interventions --------------------------------------------------------------------------------


@contextmanager
def sam_perturbed(parameters: list[Tensor], backup: list[Tensor], rho: float) -> Iterator[None]:
    """SAM: within the block, w + rho * g / ||g||; after it w again, exactly (appendix B.1).

    g is what .grad holds, and the norm is over all `parameters` (Algorithms 1 and 2). A parameter
    without gradient stays. `backup` are tensors of the same shapes, which keep w.
    """
    with torch.no_grad():
        torch._foreach_copy_(backup, parameters)
        perturbed = [w for w in parameters if w.grad is not None]
        norm = nn.utils.get_total_norm([w.grad for w in perturbed])
        scale = rho / (norm + 1e-12)
        for w in perturbed:
            w.addcmul_(w.grad, scale)  # w + w.grad * scale
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, backup)


def set_gradient(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Put the loss's gradient into the parameters; other ones that the loss depends on stay out of it."""
    for w, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        w.grad = gradient


def sam_gradient(
    loss_function: Callable[[], tuple[Tensor, ...]], parameters: list[nn.Parameter], perturbed: list[nn.Parameter],
    backup: list[Tensor], rho: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Put a loss's gradient into `parameters`: where some are `perturbed`, that at w + rho * g / ||g|| (appendix B.1).

    The function gives the loss and whatever else is of interest; returns what it gave at w.
    """
    loss, *others = loss_function()
    set_gradient(loss, parameters)
    if perturbed:
        with sam_perturbed(perturbed, backup, rho):
            set_gradient(loss_function()[0], parameters)
    return loss.detach(), *(other.detach() for other in others)


@torch.no_grad()
def reset_optimizer(optimizer: torch.optim.Adam) -> None:
    """Set Adam's moments and step counts to zero, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


# --- Update ---------------------------------------------------------------------------------------


def td_error(q_values: Tensor, td_target: Tensor) -> Tensor:
    """Squared errors of both Q-functions, summed; the mean over the batch (Eq. 3): [B, 2], [B] -> scalar."""
    return (q_values - td_target[:, None]).square().sum(1).mean()


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """w- <- tau * w- + (1 - tau) * w, in place (Algorithms 1 and 2); others call 1 - tau tau."""
    for w_target, w in zip(target.parameters(), online.parameters(), strict=True):
        w_target.lerp_(w, 1 - tau)


class Agent:
    """DrQ-SAC with the paper's interventions: networks, optimizers, acting and Algorithm 2's update.

    Nothing but reset() waits for the device. `counts`, on the device: updates, skipped updates, skipped in a row,
    longest such row. An update is skipped as a whole if a gradient of critic, actor or temperature is not finite.
    """

    def __init__(self, action_dim: int, args: Args, generator: Generator) -> None:
        self.args, self.action_dim, self.generator = args, action_dim, generator
        device = generator.device
        self.online = Critic(action_dim, args).to(device, memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.actor = Actor(action_dim, args).to(device)
        self.log_alpha = nn.Parameter(
            torch.tensor(math.log(args.initial_temperature), device=device)
        )
        self.parameters = {
            "encoder": list(self.online.backbone.parameters()),
            "critic_head": list(self.online.head.parameters()),
            "actor": list(self.actor.parameters()),
            "temperature": [self.log_alpha],
        }
        self.optimizers = {
            name: self.make_optimizer(parameters) for name, parameters in self.parameters.items()
        }
        scopes = {"critic": ("encoder", "critic_head"), "all": tuple(self.parameters)}
        scope = scopes.get(args.sam_scope, (args.sam_scope,)) if args.sam_rho > 0 else ()
        self.perturbed = {name: w if name in scope else [] for name, w in self.parameters.items()}
        self.sam_backup = {
            name: [torch.empty_like(w) for w in perturbed]
            for name, perturbed in self.perturbed.items()
        }
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.changing = list(self.learned().values())
        self.before = [torch.empty_like(tensor) for tensor in self.changing]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        """Adam with its state in place, which it would else make in its first step, perhaps in a CUDA graph."""
        cuda = self.generator.device.type == "cuda"
        optimizer = torch.optim.Adam(
            parameters, lr=self.args.learning_rate, fused=True, capturable=cuda
        )
        for w in parameters:
            w.grad = torch.zeros_like(w)
        optimizer.step()
        reset_optimizer(optimizer)
        return optimizer

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Action drawn from the policy: uint8 [B, C, H, W] -> [B, A]."""
        noise = torch.randn(
            (len(obs), self.action_dim), generator=self.generator, device=obs.device
        )
        return self.actor.sample(self.online.backbone(to_images(obs)), noise)[0]

    @torch.no_grad()
    def act_mean(self, obs: Tensor) -> Tensor:
        """The policy's action without its noise, for evaluations: uint8 [B, C, H, W] -> [B, A]."""
        return torch.tanh(self.actor(self.online.backbone(to_images(obs)))[0])

    @torch.no_grad()
    def td_target(self, batch: Batch, next_images: Tensor, noise: Tensor) -> Tensor:
        """r + gamma * (min Q(s', a') - alpha * log pi(a' | s')), a' drawn from pi at s' (Algorithm 2, line 11): [B]."""
        next_action, log_prob = self.actor.sample(self.online.backbone(next_images), noise)
        next_value = (
            self.target(next_images, next_action).min(1).values - self.log_alpha.exp() * log_prob
        )
        return batch.reward + self.args.gamma * (1 - batch.terminated) * next_value

    def update(self, batch: Batch) -> Tensor:
        """One gradient update (Algorithm 2, lines 11 to 21). Returns losses, Q-value, entropy and temperature, [5]."""
        args, online = self.args, self.online
        torch._foreach_copy_(self.before, self.changing)
        images, next_images = (
            augment(obs, args.aug_shift, 0.0, self.generator) for obs in (batch.obs, batch.next_obs)
        )
        shape = (2, len(images), self.action_dim)
        next_noise, noise = torch.randn(shape, generator=self.generator, device=images.device)

        td_target = self.td_target(batch, next_images, next_noise)
        (critic_loss,) = self.descend(
            ("encoder", "critic_head"), lambda: (td_error(online(images, batch.action), td_target),)
        )
        soft_update(self.target, online, args.target_ema)

        with torch.no_grad():  # the actor's loss does not reach the encoder
            features = online.backbone(images)
        alpha = self.log_alpha.detach().exp()

        def actor_loss() -> tuple[
            Tensor, Tensor, Tensor
        ]:  # Eq. 4, to be minimised; Q-value, entropy
            action, log_prob = self.actor.sample(features, noise)
            value = online.head(features, action).min(1).values
            return (alpha * log_prob - value).mean(), value.mean(), -log_prob.mean()

        policy_loss, value, entropy = self.descend(("actor",), actor_loss)
        target_entropy = -self.action_dim
        self.descend(("temperature",), lambda: (self.log_alpha.exp() * (entropy - target_entropy),))

        # A gradient that is not finite reaches the moments of Adam, and so does one whose square is not.
        finite = nn.utils.get_total_norm(self.changing).isfinite()
        self.undo(~finite)
        self.count(skipped=~finite)
        return torch.stack([critic_loss, policy_loss, value, entropy, alpha])

    def descend(
        self, names: tuple[str, ...], loss_function: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """One step of the named parameters' optimizers, under SAM with one norm for all; returns what the loss gave."""
        parameters = [w for name in names for w in self.parameters[name]]
        perturbed = [w for name in names for w in self.perturbed[name]]
        backup = [w for name in names for w in self.sam_backup[name]]
        outputs = sam_gradient(loss_function, parameters, perturbed, backup, self.args.sam_rho)
        for name in names:
            self.optimizers[name].step()
        return outputs

    @torch.no_grad()
    def undo(self, skipped: Tensor) -> None:
        """Where skipped, put everything back to what it was before this update.

        Critic, target and actor have moved by then: whether the last gradient is finite shows only after it.
        """
        for tensor, before in zip(self.changing, self.before, strict=True):
            torch.where(skipped, before, tensor, out=tensor)

    def count(self, skipped: Tensor) -> None:
        """Count one update."""
        updates, skips, in_a_row, longest = self.counts
        in_a_row = (in_a_row + 1) * skipped
        self.counts.copy_(
            torch.stack([updates + 1, skips + skipped, in_a_row, torch.maximum(longest, in_a_row)])
        )

    def learned(self) -> dict[str, Tensor]:
        """Weights and optimizer states."""
        tensors = {"log_alpha": self.log_alpha.detach()}
        for name, network in (
            ("online", self.online),
            ("target", self.target),
            ("actor", self.actor),
        ):
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for i, state in enumerate(optimizer.state.values()):
                tensors |= {f"adam.{name}.{i}.{key}": value for key, value in state.items()}
        return tensors

    def tensors(self) -> dict[str, Tensor]:
        """All that update() changes in place, but for the generator."""
        return {"counts": self.counts, **self.learned()}

    @torch.no_grad()
    def reset(self) -> None:
        """Renew all but the encoder, its optimizer state and the target's encoder; in place (section 4.1)."""
        head, actor = CriticHead(self.action_dim, self.args), Actor(self.action_dim, self.args)
        for network, fresh in (
            (self.online.head, head),
            (self.target.head, head),
            (self.actor, actor),
        ):
            for w, phi in zip(network.parameters(), fresh.parameters(), strict=True):
                w.copy_(phi)
        self.log_alpha.fill_(math.log(self.args.initial_temperature))
        for name in ("critic_head", "actor", "temperature"):
            reset_optimizer(self.optimizers[name])


def capture(function: Callable, tensors: list[Tensor], generators: tuple = ()) -> Callable:
    """function() as a CUDA graph: the same kernels on the same memory, launched at once.

    The function must not wait for the device, and everything that changes must lie in tensors that
    stay where they are. What the returned function returns is overwritten when it is called again.
    Three warm-up runs let PyTorch choose kernels and fill its caches; `tensors` and `generators`,
    all that they change, are put back.
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
    torch._foreach_copy_(tensors, saved)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)

    def run_graph() -> object:
        graph.replay()
        return output

    return run_graph


# --- Evaluation and metrics -----------------------------------------------------------------------


def make_quiet_env(args: Args) -> DMControl:
    """The task, in an evaluation's process: its errors come up in the parent; without a parent, nobody wants them."""
    if multiprocessing.parent_process() is not None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return DMControl(args)


@contextmanager
def make_worker_envs(num_workers: int, args: Args) -> Iterator[gym.vector.AsyncVectorEnv]:
    """Tasks in processes of their own, which end with the block, however that ends."""
    others, envs = multiprocessing.active_children(), None
    try:
        blocked = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT}
        )  # they inherit it: Ctrl-C is for us
        envs = gym.vector.AsyncVectorEnv(
            [partial(make_quiet_env, args)] * num_workers, context="spawn"
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        yield envs
        envs.close()
    except (EOFError, ConnectionError):
        raise ChildProcessError(
            "a process of the evaluation died, of want of memory perhaps"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - set(others):
            process.kill()
        if envs is not None:
            envs.closed = True  # else it would wait for their answer


def evaluate(agent: Agent, args: Args, video: list[np.ndarray] | None = None) -> list[float]:
    """Play --eval-episodes with the policy's mean action, several side by side in processes of their own.

    Episode i is seeded with 10,000 * (seed + 1) + i, training with seed. `video`, where given, takes the first
    episode's frames, uint8 [channels, H, W]. Returns the episodes' returns.
    """
    seeds = [10_000 * (args.seed + 1) + i for i in range(args.eval_episodes)]
    rounds = math.ceil(args.eval_episodes / min(len(os.sched_getaffinity(0)), 10))
    num_workers = math.ceil(args.eval_episodes / rounds)
    returns: list[float] = []
    device = agent.generator.device
    with (
        make_worker_envs(num_workers, args) as envs,
        tqdm(
            total=len(seeds), desc="evaluation", unit="episode", disable=None, leave=False
        ) as progress,
    ):
        while len(returns) < len(seeds):
            some = seeds[len(returns) : len(returns) + num_workers]
            frames, _ = envs.reset(
                seed=(some * num_workers)[:num_workers]
            )  # in the last round some may be idle
            stacks = torch.from_numpy(frames).to(device).repeat(1, args.frame_stack, 1, 1)
            playing, totals = np.ones(num_workers, dtype=bool), np.zeros(num_workers)
            while playing.any():
                if video is not None and not returns and playing[0]:
                    video.append(frames[0].copy())
                actions = agent.act_mean(stacks).cpu().numpy()
                frames, rewards, terminated, truncated, _ = envs.step(actions)
                totals += rewards * playing
                playing &= ~(terminated | truncated)
                stacks = torch.cat(
                    [stacks[:, frames.shape[1] :], torch.from_numpy(frames).to(device)], dim=1
                )
            returns += totals[: len(some)].tolist()
            progress.update(len(some))
    if not np.isfinite(returns).all():
        raise FloatingPointError(
            f"an episode of {args.env_id} gave a reward that is not a finite number"
        )
    return returns


@torch.no_grad()
def active_units(network: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Share of activations above 0 (Fig. 4) when `forward` runs the network.

    By layer, and in all of the backbone and of the head. Of CReLU's outputs, one in each pair is
    above 0: a layer with it has 0.5 by construction.
    """
    active: dict[str, Tensor] = {}  # bool, by layer

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            active[name] = (output > 0).flatten()

        return hook

    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.ReLU | CReLU)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    forward()
    for hook in hooks:
        hook.remove()
    for part in ("backbone", "head"):
        active[part] = torch.cat([active[name] for name in layers if name.startswith(part)])
    return {name: int(units.sum()) / len(units) for name, units in active.items()}


def max_eigenvalue(loss: Tensor, parameters: list[Tensor], generator: Generator) -> float:
    """Largest eigenvalue of the Hessian of `loss` (section 4.1), -2 being below 1.

    By the Lanczos method (Golub & Van Loan, 2013, chapter 10), from Hessian-vector products and
    with three vectors of the parameters' size. It stops when the residual of the largest Ritz pair
    falls below a thousandth of its value, after 100 products at the latest; TF32 leaves three
    digits. nan for a loss that is not finite.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])

    def hessian_times(vector: Tensor) -> Tensor:
        products = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in products])

    vector = torch.randn(gradient.shape, generator=generator, device=gradient.device)
    vector, previous, beta = vector / vector.norm(), torch.zeros_like(vector), 0.0
    tridiagonal = np.zeros((101, 101))
    for k in range(100):
        product = hessian_times(vector) - beta * previous
        tridiagonal[k, k] = float(product @ vector)
        product -= tridiagonal[k, k] * vector
        beta = float(product.norm())
        if not math.isfinite(beta):
            return math.nan
        ritz_values, ritz_vectors = np.linalg.eigh(tridiagonal[: k + 1, : k + 1])
        if beta * abs(ritz_vectors[-1, -1]) <= 1e-3 * abs(ritz_values[-1]):
            break
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta
        previous, vector = vector, product / beta
    return float(ritz_values[-1])


def plasticity_metrics(agent: Agent, replay: ReplayBuffer, step: int) -> dict[str, float]:
    """Active units of encoder and critic on 512 transitions and sharpness of its loss on 32; no augmentation."""
    device = agent.generator.device  # generators of their own: metrics must change nothing
    batch = replay.sample(512, Generator(replay.valid.device).manual_seed(step))
    batch = Batch(*(entry.to(device) for entry in batch))
    units = active_units(agent.online, lambda: agent.online(to_images(batch.obs), batch.action))
    metrics = {f"active_units/{name}": share for name, share in units.items()}
    batch = Batch(*(entry[:32] for entry in batch))
    td_target = agent.td_target(batch, to_images(batch.next_obs), torch.zeros_like(batch.action))
    loss = td_error(agent.online(to_images(batch.obs), batch.action), td_target)
    generator = Generator(device).manual_seed(step)
    metrics["hessian_max_eigenvalue"] = max_eigenvalue(
        loss, list(agent.online.parameters()), generator
    )
    return metrics


# --- Checkpoint -----------------------------------------------------------------------------------

# Flags that may differ when a run is continued.
MAY_CHANGE = set(
    "run_dir device cuda_graph torch_threads resume checkpoint_interval overwrite evaluate eval_interval "
    "metrics_interval log_interval capture_video save_model track wandb_project_name wandb_entity".split()
)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr: code 2 for a flag that makes no sense, 1 for a machine or file that cannot."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def out_of_memory(error: Exception) -> bool:
    """Whether this is one of PyTorch's ways to say that memory ran out."""
    phrases = (
        "can't allocate memory",
        "could not allocate memory",
        "unable to mmap",
        "could not create a primitive",
    )
    said = any(phrase in str(error).lower() for phrase in phrases)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or said


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
        raise error.__context__ or error from None
    os.replace(temporary, path)


@dataclass
class Counters:
    """Where a run stands."""

    step: int = 0  # agent steps
    updates: int = 0
    resets: int = 0
    nonfinite_rewards: int = 0  # taken as 0
    seconds: float = 0.0
    measuring_seconds: float = (
        0.0  # of them in evaluations and metrics, which do not count as training
    )
    resumed_at: list[int] = field(default_factory=list)  # steps after which the run was continued
    wandb_id: str | None = None


class Stop:
    """SIGTERM and SIGINT: noted, so that a run can end between two steps, or obeyed at once where nothing is lost."""

    def __init__(self) -> None:
        self.signum, self.at_once, self.leaving, self.hint = 0, True, False, ""

    def request(self, signum: int, frame: object = None) -> None:
        """The signals' handler. The first one counts."""
        self.signum = self.signum or signum
        self.obey(self.at_once)

    def obey(self, at_once: bool) -> None:
        """From now on at once or not; if a signal has come and it is at once: end with code 143 or 130."""
        self.at_once = at_once
        if self.signum and at_once and not self.leaving:
            self.leaving = True
            fail(f"stopped by {signal.Signals(self.signum).name}{self.hint}", 128 + self.signum)


@contextmanager
def lock_directory(run_dir: Path) -> Iterator[None]:
    """Make the directory and keep other processes out (a dead one holds no lock); leave no empty directory behind."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{run_dir}: another process is at work there", 1)
        except OSError:
            print(
                f"warning: {run_dir}: no locks on this file system; start no second process there",
                file=sys.stderr,
            )
        try:
            yield
        finally:
            with suppress(OSError):  # somebody may have deleted the directory
                if [path.name for path in run_dir.iterdir()] == [".lock"]:
                    (run_dir / ".lock").unlink()
                    run_dir.rmdir()


def compare_flags(flags: dict, saved: dict, path: Path) -> None:
    """End with one line if the run that `path` belongs to had other flags, those of MAY_CHANGE aside."""
    if flags.keys() != saved.keys():
        fail(
            f"{path} is of another version of this script; use another --exp-name, or --overwrite",
            1,
        )
    others = []
    for name in sorted(flags.keys() - MAY_CHANGE):
        if flags[name] != saved[name]:
            flag, value = name.replace("_", "-"), saved[name]
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            others.append(
                f"--{'' if value else 'no-'}{flag}"
                if isinstance(value, bool)
                else f"--{flag} {value}"
            )
    if others:
        fail(
            f"{path} was made with {', '.join(others)}; use that, another --exp-name, or --overwrite",
            1,
        )


def save_checkpoint(
    path: Path,
    flags: dict,
    counters: Counters,
    generators: dict,
    agent: Agent,
    replay: ReplayBuffer,
):
    """Write all that a run needs to go on, but for the simulation. `generators` are Generators by name."""
    checkpoint = {
        "script": Path(__file__).name,
        "version": CHECKPOINT_VERSION,
        "args": flags,
        "counters": asdict(counters),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "tensors": {**agent.tensors(), **replay.tensors()},
        "events": {
            file.name: file.stat().st_size for file in path.parent.glob("events.out.tfevents.*")
        },
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def rewind_events(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut TensorBoard's files to the given sizes by name, and remove the others."""
    for file in [path for path in run_dir.glob("events.out.tfevents.*") if path.is_file()]:
        if file.name in sizes:
            os.truncate(file, min(sizes[file.name], file.stat().st_size))
        else:
            file.unlink()


def load_checkpoint(
    path: Path, flags: dict, generators: dict, agent: Agent, replay: ReplayBuffer
) -> Counters:
    """Put all back in place; TensorBoard's files are cut to what they were, so that no step is there twice.

    Ends with one line if the file is not a checkpoint of this script, version and shape, or of other flags. On another
    kind of device, whose generators have other states, theirs are seeded anew.
    """
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about foreign files, which get a line of their own below
            if ZipFile(path).testzip() is not None:  # torch.load checks no checksums
                raise ValueError
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if (checkpoint["script"], checkpoint["version"]) != (
            Path(__file__).name,
            CHECKPOINT_VERSION,
        ):
            raise ValueError
        compare_flags(flags, dict(checkpoint["args"]), path)
        own, tensors = {**agent.tensors(), **replay.tensors()}, checkpoint["tensors"]
        if {k: (t.shape, t.dtype) for k, t in own.items()} != {
            k: (t.shape, t.dtype) for k, t in tensors.items()
        }:
            raise ValueError
        if not all(
            tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()
        ):
            raise ValueError
        counters = Counters(**checkpoint["counters"])
        for name, default in asdict(Counters()).items():
            if name != "wandb_id" and type(getattr(counters, name)) is not type(default):
                raise ValueError
        steps = flags["total_timesteps"] // flags["action_repeat"]
        if not 0 < counters.step <= steps or len(counters.resumed_at) >= counters.step:
            raise ValueError
        if not tensors["replay.valid"].any() or tensors["counts"].min() < 0:
            raise ValueError
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        replay.cursor = int(replay.newest_slot) % replay.slots
        for name, generator in generators.items():
            state = checkpoint["generators"][name]
            if generator.get_state().shape == state.shape:  # of the same kind of device
                generator.set_state(state)
            else:
                generator.manual_seed(generator.initial_seed() + counters.step)
        events = dict(checkpoint["events"])
        if not all(type(size) is int and size >= 0 for size in events.values()):
            raise ValueError
    except OSError as error:
        fail(f"{path}: {error.strerror or error}", 1)
    except Exception as error:  # such a file can raise anything
        if out_of_memory(error):
            raise
        fail(
            f"{path}: not a checkpoint of this version of {Path(__file__).name}; move it away or pass --overwrite",
            1,
        )
    rewind_events(path.parent, events)
    return counters


# --- Run ------------------------------------------------------------------------------------------

# fmt: off
MANY = 10**9  # upper end of what has no other
RANGES = {  # of the flags, both ends included
    "seed": (0, 200_000), "total_timesteps": (1, MANY), "action_repeat": (0, 1000), "frame_stack": (1, 64),
    "image_size": (16, 1024), "updates_per_step": (1, MANY), "batch_size": (1, 65_536), "learning_starts": (2, MANY),
    "learning_rate": (1e-12, MANY), "gamma": (0, 1), "target_ema": (0, 1), "initial_temperature": (1e-12, MANY),
    "latent_dim": (1, 1_000_000), "hidden_dim": (1, 1_000_000), "buffer_size": (1, MANY), "aug_shift": (0, 15),
    "sam_rho": (0, MANY), "reset_interval": (0, MANY), "eval_episodes": (1, 10_000), "eval_interval": (0, MANY),
    "metrics_interval": (0, MANY), "log_interval": (1, MANY), "torch_threads": (0, 1024),
    "checkpoint_interval": (0, MANY),
}
# fmt: on


def resolve(args: Args) -> Args:
    """Fill in what is `auto` or the task's; end with one line at the first flag that makes no sense. Writes nothing."""
    if args.env_id not in TASKS:
        closest = difflib.get_close_matches(args.env_id, sorted(TASKS), n=3, cutoff=0)
        fail(f"--env-id {args.env_id!r}: no such task; the closest are {', '.join(closest)}", 2)
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value != "auto" and not low <= value <= high:  # nan is out of every range
            fail(f"--{name.replace('_', '-')} must be from {low:,} to {high:,}, not {value}", 2)
    if args.action_repeat == 0:
        args = replace(
            args, action_repeat=4 if args.env_id in ("cheetah-run", "reacher-easy") else 2
        )
    if args.sam_rho == "auto":
        args = replace(args, sam_rho=0.1 if args.env_id.startswith("quadruped-") else 0.01)
    num_steps = args.total_timesteps // args.action_repeat
    if not args.learning_starts < num_steps:
        fail(
            f"--learning-starts must be below the agent steps, {num_steps:,} (--total-timesteps / --action-repeat)",
            2,
        )
    if args.buffer_size > num_steps:
        args = replace(args, buffer_size=num_steps)
    if args.resume and args.overwrite:
        fail("--resume goes on with what is there and --overwrite begins anew: pass one of them", 2)
    if (
        args.exp_name in ("", "..")
        or Path(args.exp_name).name != args.exp_name
        or not args.exp_name.isprintable()
    ):
        fail(f"--exp-name {args.exp_name!r}: must be a plain file name", 2)
    if not str(args.run_dir).isprintable():
        fail(f"--run-dir {str(args.run_dir)!r}: must be printable", 2)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail(
            "--device cuda: PyTorch finds no CUDA device; use --device cpu or install a CUDA build",
            1,
        )
    if args.track and find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install wandb", 1)
    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    if args.torch_threads == 0:
        args = replace(args, torch_threads=min(torch.get_num_threads(), 8))
    return args


def git_commit() -> str | None:
    """Commit of the repository that this file lies in, if it does; "-dirty" where files changed."""
    command = "git describe --always --dirty --abbrev=40 --exclude '*'"  # the hash, never a tag
    here = Path(__file__).parent
    git = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True)
    return git.stdout.strip() or None


def memory_needed(action_dim: int, args: Args) -> tuple[int, int]:
    """Bytes of the replay buffer, and of the rest that a run holds on its device, about, PyTorch itself aside."""
    with torch.device("meta"):  # shapes without memory
        parameters = sum(
            w.numel()
            for w in (*Critic(action_dim, args).parameters(), *Actor(action_dim, args).parameters())
        )
    frame = (1 if args.grayscale else 3) * args.image_size**2
    replay = int(1.01 * args.buffer_size) * (frame + 4 * action_dim + 25)
    # Of each parameter: weight, target, gradient, two moments, SAM's backup, and the copies that undo() needs.
    # Of each transition: stacks as bytes and floats, and what autograd keeps and makes of each layer's outputs.
    doubled = 2 if args.crelu else 1
    outputs = args.image_size**2 * (32 / 4 + 64 / 16 + 128 / 64 + 256 / 256)
    outputs *= doubled if args.crelu_scope == "all" else 1
    heads = 3 * 2 * args.hidden_dim * doubled
    transition = 10 * args.frame_stack * frame + 4 * (5.5 * outputs + 3 * heads)
    transitions = max(args.batch_size, 512 if args.metrics_interval > 0 else 0)
    return replay, int(4 * 10 * parameters + transitions * transition)


def memory_available(device: torch.device) -> float:
    """Free bytes of the device; on the CPU, also within the container's limit. Infinite where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = math.inf
    with suppress(OSError, ValueError):
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(meminfo["MemAvailable"].split()[0])
    with suppress(OSError, ValueError):
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")
        )
        available = min(available, limit - used)
    return available


def place_replay(action_dim: int, args: Args) -> torch.device:
    """Where the replay buffer fits: the training device, else the host's memory; ends with one line if in neither."""
    device, host = torch.device(args.device), torch.device("cpu")
    replay, training = memory_needed(action_dim, args)
    if replay + training <= memory_available(device):
        return device
    if device != host and training <= memory_available(device) and replay <= memory_available(host):
        return host
    needed, free = (replay + training) / 2**30, memory_available(device) / 2**30
    sizes = f"about {needed:,.1f} GiB of memory, {replay / 2**30:,.1f} of it replay, and {args.device} has {free:,.1f} free"
    fail(f"needs {sizes}; lower --buffer-size, --image-size or --batch-size", 1)


def save_gif(frames: list[np.ndarray], env: DMControl, file: BinaryIO) -> None:
    """Frames, uint8 [1 or 3, H, W], at the task's own pace."""
    milliseconds = round(1000 * env.env.control_timestep() * env.args.action_repeat)
    first, *others = [Image.fromarray(frame.transpose(1, 2, 0).squeeze()) for frame in frames]
    first.save(
        file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0
    )


def make_env(args: Args) -> DMControl:
    """The task, once it has rendered a frame; ends with one line if it cannot."""
    env = DMControl(args)
    try:
        with warnings.catch_warnings(action="ignore"):  # of GLFW
            env.reset()
    except Exception as error:  # of MuJoCo, PyOpenGL, the driver
        sys.unraisablehook = lambda hook: (
            None
        )  # their half-made objects would complain on the way out
        warnings.simplefilter("ignore")
        fail(f"{NO_RENDERER} ({error})", 1)
    return env


def run(args: Args, stop: Stop) -> None:
    """Begin a run or continue it, alone in its directory; leave a finished one as it is."""
    run_dir = args.run_dir / f"{args.env_id}__{args.exp_name}__{args.seed}"
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    flags = json.loads(json.dumps(asdict(args), default=str))  # as result.json gives them back
    env = make_env(args)
    action_dim = env.action_space.shape[0]
    begins = args.overwrite or not result_path.exists()
    replay_device = place_replay(action_dim, args) if begins else torch.device("cpu")
    with lock_directory(run_dir):
        if result_path.exists() and not args.overwrite:
            if not args.resume:
                fail(
                    f"{run_dir} holds a finished run; change --exp-name or --seed, or pass --overwrite",
                    1,
                )
            try:
                saved = dict(json.loads(result_path.read_text())["args"])
            except Exception:  # such a file can raise anything
                fail(
                    f"{result_path}: not a result that this script wrote; move it away or pass --overwrite",
                    1,
                )
            compare_flags(flags, saved, result_path)
            print(f"{run_dir}: finished already")
            checkpoint_path.unlink(missing_ok=True)  # the run may have been killed before it could
            return
        resumed = checkpoint_path.exists() and not args.overwrite
        if resumed and not args.resume:
            fail(
                f"{run_dir} holds an unfinished run; pass --resume to continue it, or --overwrite to begin anew",
                1,
            )
        if (
            not resumed
            and not args.overwrite
            and any((run_dir / name).exists() for name in ("model.pth", "video.gif"))
        ):
            fail(
                f"{run_dir} holds a model or video without its result; move it away or pass --overwrite",
                1,
            )
        train(run_dir, args, flags, env, replay_device, resumed, stop)


def device_name(args: Args) -> str:
    """The GPU's name, or the number of the CPU's threads."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def train(
    run_dir: Path,
    args: Args,
    flags: dict,
    env: DMControl,
    replay_device: torch.device,
    resumed: bool,
    stop: Stop,
) -> None:
    """From seeding, or from the checkpoint, to result.json. `flags` are the args as JSON has them."""
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    device, action_dim = torch.device(args.device), env.action_space.shape[0]
    torch.manual_seed(
        args.seed
    )  # initialisers, at the start and at resets, and random actions before learning starts
    # Sampling has a generator of its own, and so have augmentation and noise.
    seeds = torch.randint(2**31, (2,)).tolist()
    generator, sampling = (
        Generator(device).manual_seed(seeds[0]),
        Generator(replay_device).manual_seed(seeds[1]),
    )
    generators = {"torch": torch.default_generator, "agent": generator, "sampling": sampling}
    num_steps = args.total_timesteps // args.action_repeat
    num_updates = (num_steps - args.learning_starts + 1) * args.updates_per_step
    agent = Agent(action_dim, args, generator)
    episode_steps = math.ceil(env.env._step_limit / args.action_repeat)
    replay = ReplayBuffer(
        args.buffer_size,
        episode_steps,
        env.observation_space.shape,
        action_dim,
        args.frame_stack,
        replay_device,
    )
    parameters = sum(w.numel() for group in agent.parameters.values() for w in group)

    counters = (
        load_checkpoint(checkpoint_path, flags, generators, agent, replay)
        if resumed
        else Counters()
    )
    if resumed:
        counters.resumed_at.append(counters.step)
        stop.hint = "; --resume continues the run"
    if args.track:
        import wandb

        names = {
            "project": args.wandb_project_name,
            "entity": args.wandb_entity,
            "name": run_dir.name,
        }
        try:
            tracked = wandb.init(
                **names, id=counters.wandb_id, resume="allow", config=flags, sync_tensorboard=True
            )
        except wandb.Error as error:  # no login, no network
            fail(f"--track: Weights & Biases says: {' '.join(str(error).split())}", 1)
        counters.wandb_id = tracked.id
    for name in (
        "result.json",
        "checkpoint.pth",
        "model.pth",
        "video.gif",
    ):  # of an overwritten run
        if not resumed:
            (run_dir / name).unlink(missing_ok=True)
        (run_dir / f"{name}.tmp").unlink(missing_ok=True)
    if not resumed:
        rewind_events(run_dir, {})
    writer = SummaryWriter(str(run_dir))
    if not resumed:
        writer.add_text(
            "args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{flag}|{flags[flag]}|" for flag in flags)
        )
    start = f"continued after step {counters.step:,}, " if resumed else ""
    size = f"{parameters:,} parameters, {num_steps:,} steps of {args.action_repeat}, {num_updates:,} updates"
    size += f", SAM {args.sam_rho:g}, on {device_name(args)}"
    memory = [n / 2**30 for n in memory_needed(action_dim, args)]
    print(
        f"{run_dir}: {start}{size}, about {sum(memory):.1f} GiB, {memory[0]:.1f} of it replay on {replay_device}"
    )

    def next_batch() -> Batch:
        batch = replay.sample(args.batch_size, sampling)
        if replay_device != device:
            batch = Batch(*(entry.pin_memory().to(device, non_blocking=True) for entry in batch))
        return batch

    def update() -> Tensor:
        return agent.update(next_batch())

    def act() -> Tensor:
        return agent.act(replay.newest().to(device))

    start_time = time.perf_counter() - counters.seconds
    checkpoint_time = time.perf_counter()
    # The simulation's state is not in a checkpoint: a continued run begins an episode, with another seed than before.
    frame, _ = env.reset(seed=args.seed + 1_000_003 * counters.step % 2**30)
    replay.start(frame)
    episode_return, episode_length = 0.0, 0
    to_capture = args.cuda_graph and device.type == "cuda"
    progress = tqdm(
        initial=counters.step, total=num_steps, desc=args.env_id, unit="step", disable=None
    )
    stop.obey(at_once=False)
    while True:
        if evaluation_due(counters.step, num_steps, args):
            measuring_start = time.perf_counter()
            video = [] if args.capture_video and counters.step == num_steps else None
            stop.obey(at_once=True)  # the checkpoint of this very step is written
            returns = evaluate(agent, args, video)
            stop.obey(at_once=False)
            mean_return = float(np.mean(returns))
            writer.add_scalar("eval/mean_return", mean_return, counters.step)
            counters.measuring_seconds += time.perf_counter() - measuring_start
        if counters.step == num_steps:
            break
        step = counters.step = counters.step + 1

        if step <= args.learning_starts:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        else:
            action = act()[0].cpu().numpy()  # waits for the device
        if step >= args.learning_starts:
            if to_capture:
                update, act = capture_all(agent, next_batch, replay)
                to_capture = False
            for _ in range(args.updates_per_step):
                statistics = update()
                counters.updates += 1
                if due(args.reset_interval, counters.updates) and step < num_steps:
                    agent.reset()
                    counters.resets += 1

        # Only now, so that the simulation runs while a GPU updates: this step's transition waits for the next update.
        frame, reward, terminated, truncated, _ = env.step(action)
        if not math.isfinite(reward):  # must not reach the replay buffer
            counters.nonfinite_rewards += 1
            reward = 0.0
        replay.add(action, reward, terminated, frame)
        episode_return += reward
        episode_length += 1
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            progress.set_postfix({"return": episode_return}, refresh=False)
            episode_return, episode_length = 0.0, 0
            frame, _ = env.reset()
            replay.start(frame)

        if step >= args.learning_starts:
            if step % args.log_interval == 0 or step == num_steps:
                _, skipped, _, longest_row = agent.counts.tolist()
                if longest_row >= MAX_SKIPPED_IN_A_ROW:
                    progress.close()
                    writer.close()
                    problem = f"{longest_row} updates in a row had a non-finite gradient"
                    fail(
                        f"stopped at step {step}: {problem}; lower --learning-rate or --sam-rho", 1
                    )
                names = ("td_loss", "actor_loss", "q_values", "entropy", "temperature")
                for name, value in zip(names, statistics.tolist(), strict=True):
                    writer.add_scalar(f"losses/{name}", value, step)
                writer.add_scalar("losses/skipped_updates", skipped, step)
                writer.add_scalar("charts/resets", counters.resets, step)
                writer.add_scalar("charts/nonfinite_rewards", counters.nonfinite_rewards, step)
                training_time = time.perf_counter() - start_time - counters.measuring_seconds
                writer.add_scalar(
                    "charts/SPS", step * args.action_repeat / training_time, step
                )  # as in result.json
            if due(args.metrics_interval, step):
                measuring_start = time.perf_counter()
                for name, value in plasticity_metrics(agent, replay, step).items():
                    writer.add_scalar(f"plasticity/{name}", value, step)
                counters.measuring_seconds += time.perf_counter() - measuring_start
        progress.update()

        if args.checkpoint_interval == "auto":
            checkpoint_due = time.perf_counter() - checkpoint_time >= 300
        else:
            checkpoint_due = due(args.checkpoint_interval, step)
        # Before an evaluation too: it can take minutes.
        if args.checkpoint_interval != 0 and (
            checkpoint_due or evaluation_due(step, num_steps, args) or stop.signum
        ):
            counters.seconds = time.perf_counter() - start_time
            writer.flush()
            try:
                save_checkpoint(checkpoint_path, flags, counters, generators, agent, replay)
                stop.hint = "; --resume continues the run"
            except OSError as error:  # the one before stays, if there is one
                print(f"warning: {checkpoint_path} not written: {error.strerror}", file=sys.stderr)
            checkpoint_time = time.perf_counter()
        if stop.signum:
            progress.close()
            writer.close()
            stop.obey(at_once=True)
    progress.close()
    writer.close()

    wall_clock = time.perf_counter() - start_time
    training_time = wall_clock - counters.measuring_seconds
    skipped = int(agent.counts[1])
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mujoco": version("mujoco"),
    }
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "env_id": args.env_id, "seed": args.seed,
        "args": flags, "env_steps": counters.step * args.action_repeat, "agent_steps": counters.step,
        "gradient_updates": counters.updates, "resets": counters.resets, "skipped_updates": skipped,
        "nonfinite_rewards": counters.nonfinite_rewards, "resumed_at": counters.resumed_at, "parameters": parameters,
        "episode_returns": returns, "mean_return": mean_return, "wall_clock_seconds": wall_clock,
        "env_steps_per_second": counters.step * args.action_repeat / training_time,
        "updates_per_second": counters.updates / training_time, "mujoco_gl": os.environ["MUJOCO_GL"],
        "device": device_name(args), "versions": versions, "git_commit": git_commit(),
    }
    # fmt: on
    try:
        if args.capture_video:
            write_atomically(run_dir / "video.gif", lambda file: save_gif(video, env, file))
        if args.save_model:
            networks = {
                "backbone": agent.online.backbone.state_dict(),
                "actor": agent.actor.state_dict(),
            }
            model = {"args": flags, "action_dim": action_dim, **networks}
            write_atomically(run_dir / "model.pth", lambda file: torch.save(model, file))
    except OSError:
        if (
            not checkpoint_path.exists()
        ):  # else --resume repeats the evaluation and writes all three
            write_atomically(
                result_path, lambda file: file.write(json.dumps(result, indent=2).encode())
            )
        raise
    write_atomically(result_path, lambda file: file.write(json.dumps(result, indent=2).encode()))
    checkpoint_path.unlink(missing_ok=True)
    if skipped > 0:
        print(
            f"{skipped:,} of {counters.updates:,} updates had a non-finite gradient and were skipped"
        )
    if counters.nonfinite_rewards > 0:
        print(f"{counters.nonfinite_rewards:,} rewards were not finite numbers and were taken as 0")
    print(summary(args.env_id, returns) + f"; {result_path}")


def capture_all(
    agent: Agent, next_batch: Callable[[], Batch], replay: ReplayBuffer
) -> tuple[Callable, Callable]:
    """update() and act() as CUDA graphs. Sampling stays outside of them: the replay may lie in the host's memory."""
    batch, obs = next_batch(), replay.newest().to(agent.generator.device)
    changing, generators = list(agent.tensors().values()), (agent.generator,)
    update_graph = capture(lambda: agent.update(batch), changing, generators)
    act_graph = capture(lambda: agent.act(obs), changing, generators)

    def update() -> Tensor:
        for entry, new in zip(batch, next_batch(), strict=True):
            entry.copy_(new)
        return update_graph()

    def act() -> Tensor:
        obs.copy_(replay.newest())
        return act_graph()

    return update, act


def due(interval: int, count: int) -> bool:
    """Whether `count` is a multiple of `interval`; never for interval 0."""
    return interval > 0 and count > 0 and count % interval == 0


def evaluation_due(step: int, num_steps: int, args: Args) -> bool:
    """At the end, and every --eval-interval agent steps."""
    return step == num_steps or due(args.eval_interval, step)


def evaluate_saved(args: Args) -> None:
    """Play the model at --evaluate: its task, networks and seed; --eval-episodes and --device are ours."""
    gif = Path(f"{args.evaluate}.gif")
    if args.capture_video and gif.exists() and not args.overwrite:
        fail(f"{gif} exists; pass --overwrite to replace it", 1)
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about foreign files, which get a line of their own below
            model = torch.load(args.evaluate, map_location="cpu", weights_only=True)
        ours = {name: getattr(args, name) for name in ("device", "eval_episodes", "torch_threads")}
        saved = resolve(replace(Args(**model["args"]), **ours, track=False))
        for name, default in asdict(Args()).items():
            if type(default) in (int, bool) and type(getattr(saved, name)) is not type(default):
                raise ValueError(name)
        agent = Agent(model["action_dim"], saved, Generator(saved.device))
        agent.online.backbone.load_state_dict(model["backbone"])
        agent.actor.load_state_dict(model["actor"])
        if not all(tensor.isfinite().all() for tensor in agent.learned().values()):
            raise ValueError("weights that are not finite")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        fail(f"--evaluate {str(args.evaluate)!r}: {error.strerror}", 1)
    except Exception as error:  # such a file can raise anything
        if out_of_memory(error):
            raise
        fail(
            f"--evaluate {str(args.evaluate)!r}: not a model that this script saved (--save-model)",
            1,
        )
    env, video = make_env(saved), [] if args.capture_video else None
    if env.action_space.shape != (agent.action_dim,):
        fail(
            f"--evaluate {str(args.evaluate)!r}: a model of {agent.action_dim} actions, not of {saved.env_id}",
            1,
        )
    print(summary(saved.env_id, evaluate(agent, saved, video)))
    if args.capture_video:
        write_atomically(gif, lambda file: save_gif(video, env, file))


def summary(env_id: str, returns: list[float]) -> str:
    """One line for people."""
    return f"{env_id}: mean return {np.mean(returns):.1f} over {len(returns)} episodes"


if __name__ == "__main__":
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # they may be closed
    stop = Stop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop.request)
    # A full disk kills TensorBoard's thread; the error comes up again, without a traceback, when we next write there.
    threading.excepthook = lambda hook: (
        None if issubclass(hook.exc_type, OSError) else threading.__excepthook__(hook)
    )
    gym.logger.min_level = 50  # what goes wrong in an evaluation's process is raised here
    args = resolve(tyro.cli(Args))
    torch.set_num_threads(args.torch_threads)
    if args.device == "cuda":
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32 in matrix products, as PyTorch has it in convolutions
    try:
        if args.evaluate is None:
            run(args, stop)
        else:
            evaluate_saved(args)
    except ChildProcessError as error:
        fail(f"{error}{stop.hint}", 1)
    except PhysicsError as error:
        fail(f"the simulation diverged ({error}){stop.hint}", 1)
    except FloatingPointError as error:
        fail(f"{error}", 1)
    except (MemoryError, RuntimeError, ValueError) as error:
        if not out_of_memory(error):
            raise
        fail("out of memory; lower --buffer-size, --image-size, --batch-size or --hidden-dim", 1)
    except OSError as error:  # no permission, no space, no such directory
        fail(f"cannot write {error.filename or args.run_dir}: {error.strerror or error}", 1)
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # on the way out, one more changes nothing
