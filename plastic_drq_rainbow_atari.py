# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "envpool==1.2.5", "gymnasium==1.4.0", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0", "filelock==4.3.1",
# ]
# ///
r"""PLASTIC on DrQ-Rainbow for Atari-100k, in one file.

Paper: "Improving Input and Label Plasticity for Sample Efficient Reinforcement Learning"
(NeurIPS 2023), sections 4.2 and 4.3, appendices A.3 and B.2 (Algorithm 1, Table 5).

PLASTIC, PLASTIC† and the base that they stand on:

    python plastic_drq_rainbow_atari.py --env-id Alien
    python plastic_drq_rainbow_atari.py --env-id Alien --exp-name dagger --no-crelu --sam-rho 0
    python plastic_drq_rainbow_atari.py --env-id Alien --exp-name base --no-crelu --sam-rho 0 \
        --no-layer-norm --reset-interval 0

Read Agent.update first, which is Algorithm 1 from line 8 on, then train, the loop around it.
QNetwork is backbone and head, with LayerNorm and CReLU. ReplayBuffer makes transitions of frames.
The other interventions are sam_perturbed, reset_head and shrink_and_perturb.
Two clocks tick: steps of the environment (4 frames each) and gradient updates. Resets count
updates: 40,000 of them are 20,000 steps at replay ratio 2.

Where it departs from the paper's text (README.md has the paper, the release and this file):
- Adam's epsilon is 1.5e-4: the paper's 0.000015 is a digit slip (--adam-eps).
- LayerNorm is in the backbone alone, as the main text has it; appendix A.3 adds the fully
  connected layers (--layer-norm-scope).
- CReLU is in the head alone: the one reading with the paper's 7.2M parameters (--crelu-scope).
- Shrink & Perturb is off below replay ratio 4, where section 4.3 finds that it hurts
  (--shrink-perturb-alpha).
- Algorithm 1 shows an epsilon-greedy DQN for brevity; here the noisy target network acts, as
  Table 5 says.
"""

import copy
import difflib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import envpool
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from envpool.atari.registration import atari_game_list
from filelock import FileLock, Timeout
from PIL import Image
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FRAME_STACK = 4
GAMES = sorted("".join(word.capitalize() for word in game.split("_")) for game in atari_game_list)


# --- Args -----------------------------------------------------------------------------------------


@dataclass
class Args:
    """PLASTIC on DrQ-Rainbow for Atari-100k. The defaults are PLASTIC at replay ratio 2."""

    # Run
    env_id: str = "Alien"  # Atari game, by EnvPool's name without the version
    seed: int = 1  # seed of the networks, the exploration, the sampling and the environment
    exp_name: str = "plastic_drq_rainbow_atari"  # name of this setting, part of the run's directory
    run_dir: str = "runs"  # where run directories are made: <run-dir>/<env-id>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = CUDA where there is one
    cuda_graph: bool = True  # update and choice of an action as CUDA graphs (no effect on the CPU)
    torch_threads: int = 0  # PyTorch's CPU threads (0 = its own choice, at most 8)
    resume: bool = False  # continue an unfinished run, begin a new one, leave a finished one alone
    # steps between checkpoints (auto = 5 minutes, 0 = off)
    checkpoint_interval: Literal["auto"] | int = "auto"
    overwrite: bool = False  # replace a run of the same name, finished or not

    # Training (Table 5)
    total_timesteps: int = 100_000  # steps; one is 4 frames
    replay_ratio: int = 2  # gradient updates per step
    batch_size: int = 32  # transitions per update
    learning_starts: int = 2_000  # steps with random actions; the last one has the first update
    learning_rate: float = 1e-4  # of Adam (released: 1.414e-4)
    adam_eps: float = 1.5e-4  # epsilon of Adam
    max_grad_norm: float = 10.0  # global norm at which the applied gradient is clipped
    gamma: float = 0.99  # discount factor
    n_step: int = 10  # length of the multi-step return
    n_atoms: int = 51  # atoms of the return distribution (C51)
    v_min: float = -10.0  # lowest atom
    v_max: float = 10.0  # highest atom
    hidden_dim: int = 512  # width of each stream's hidden layer
    noisy_std: float = 0.5  # initial scale sigma_0 of the noisy layers
    buffer_size: int = 100_000  # transitions in the replay buffer
    per_alpha: float = 0.5  # priority = cross-entropy ** alpha (0 = all alike)
    per_beta: float = 0.4  # first exponent of the importance weights; it ends at 1
    target_ema: float = 0.99  # weight of the old target network in its moving average
    aug_shift: int = 4  # largest random shift in pixels (0 = off)
    aug_intensity: float = 0.05  # scale of the intensity jitter (0 = off)

    # Plasticity interventions
    layer_norm: bool = True  # LayerNorm over channels at each pixel
    layer_norm_scope: Literal["backbone", "all"] = "backbone"  # all = the head's hidden layers too
    crelu: bool = True  # concatenated ReLU
    crelu_scope: Literal["head", "all"] = "head"  # all = the backbone's layers too
    sam_rho: float = 0.1  # radius of the SAM perturbation (0 = off)
    sam_scope: Literal["all", "backbone", "head"] = "all"  # parameters that SAM perturbs
    # noise in SAM's two passes: independent = xi and xi' (Algorithm 1), reused = xi twice,
    # none = no noise and xi
    sam_noise: Literal["independent", "reused", "none"] = "independent"
    reset_interval: int = 40_000  # gradient updates between resets of the head (0 = off)
    # share of the backbone's weights kept at a reset (1 = off; auto = off below replay ratio 4,
    # else 0.6)
    shrink_perturb_alpha: Literal["auto"] | float = "auto"

    # Evaluation, metrics, logging
    eval_episodes: int = 100  # full games of an evaluation
    eval_epsilon: float = 0.001  # share of random actions in an evaluation
    eval_interval: int = 0  # steps between evaluations (0 = only at the end)
    metrics_interval: int = 0  # steps between plasticity metrics (0 = off)
    log_interval: int = 500  # steps between logged losses
    capture_video: bool = False  # save the first game of the last evaluation as a GIF
    save_model: bool = False  # save the target network at the end
    evaluate: str | None = None  # a saved model: play its game with its seed, train nothing
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "plastic"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases

    def __post_init__(self) -> None:
        """Check the flags and resolve `auto`. tyro prints a ValueError and ends with code 2."""
        if self.shrink_perturb_alpha == "auto":  # section 4.3: hurts at 2, pays at 4 and 8
            pays = self.replay_ratio >= 4 and self.reset_interval > 0
            self.shrink_perturb_alpha = 0.6 if pays else 1.0
        at_least_1 = "replay_ratio batch_size n_step hidden_dim eval_episodes log_interval"
        at_least_0 = "noisy_std per_alpha aug_shift aug_intensity sam_rho reset_interval"
        at_least_0 += " eval_interval metrics_interval torch_threads"
        above_0 = "learning_rate adam_eps max_grad_norm"
        shares = "gamma per_beta target_ema eval_epsilon shrink_perturb_alpha"
        for names, rule, holds in (
            (at_least_1, "at least 1", lambda x: x >= 1),
            (at_least_0, "0 or more", lambda x: 0 <= x < math.inf),
            (above_0, "above 0", lambda x: 0 < x < math.inf),
            (shares, "from 0 to 1", lambda x: 0 <= x <= 1),
            ("n_atoms", "at least 2", lambda x: x >= 2),
            ("seed", "from 0 to 200,000", lambda x: 0 <= x <= 200_000),  # EnvPool's have 31 bits
        ):
            for name in names.split():
                flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
                if not holds(value):  # nan never does
                    raise ValueError(f"{flag} must be {rule}, not {value}")
        if self.env_id not in GAMES:
            closest = difflib.get_close_matches(self.env_id, GAMES, n=1, cutoff=0)[0]
            raise ValueError(f"--env-id {self.env_id}: no such game, the closest is {closest}")
        if Path(self.exp_name).name != self.exp_name or self.exp_name in ("", ".."):
            raise ValueError(f"--exp-name {self.exp_name!r}: must be a plain file name")
        if self.checkpoint_interval != "auto" and self.checkpoint_interval < 0:
            raise ValueError("--checkpoint-interval must be auto, or 0 or more")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite begins anew: pass one of them")
        if not 2 * self.n_step <= self.learning_starts < self.total_timesteps:
            raise ValueError("--learning-starts: from twice --n-step to below --total-timesteps")
        if self.buffer_size < 2 * self.n_step:
            raise ValueError("--buffer-size must be at least twice --n-step")
        if not -math.inf < self.v_min < self.v_max < math.inf:
            raise ValueError("--v-min must be below --v-max, and both finite")
        if self.shrink_perturb_alpha < 1 and self.reset_interval == 0:
            raise ValueError("--shrink-perturb-alpha acts at resets: give a --reset-interval")
        if self.evaluate is not None and not Path(self.evaluate).is_file():
            raise ValueError(f"--evaluate {self.evaluate}: no such file")
        if self.track and find_spec("wandb") is None:
            raise ValueError("--track needs Weights & Biases: pip install wandb")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.torch_threads == 0:
            self.torch_threads = min(torch.get_num_threads(), 8)


# --- Environment ----------------------------------------------------------------------------------


def make_envs(env_id: str, num_envs: int, seed: int):
    """Atari as the paper plays it: an EnvPool with Gymnasium's API; env i has the seed seed + i.

    It takes its seed here and nowhere else: reset(seed=...) does nothing. Observations are the
    newest frames alone, uint8 [num_envs, 1, 84, 84]. Lives and stacks of frames are left to the
    caller: EnvPool's own episodic_life would play no-ops after every lost life.
    """
    # fmt: off
    return envpool.make_gymnasium(
        f"{env_id}-v5", num_envs=num_envs, seed=seed, stack_num=1, frame_skip=4, noop_max=30,
        max_episode_steps=27_000, repeat_action_probability=0.0, full_action_space=False,
        use_inter_area_resize=False, use_fire_reset=False, episodic_life=False, reward_clip=False,
    )
    # fmt: on


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


class NoisyLinear(nn.Module):
    """Linear layer with factorised Gaussian noise on its weights (Eq. 2; Fortunato et al., 2018).

    The noise is one draw for the whole batch and stays until sample_noise(). In eval mode there is
    none: the layer is that of the mean weights.
    """

    def __init__(self, in_features: int, out_features: int, noisy_std: float) -> None:
        super().__init__()
        self.noisy_std = noisy_std
        self.weight_mu = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_sigma = nn.Parameter(torch.empty(out_features, in_features))
        self.bias_mu = nn.Parameter(torch.empty(out_features))
        self.bias_sigma = nn.Parameter(torch.empty(out_features))
        self.register_buffer("noise_in", torch.zeros(in_features))
        self.register_buffer("noise_out", torch.zeros(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh parameters, in place."""
        out_features, in_features = self.weight_mu.shape
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight_mu, -bound, bound)
        nn.init.uniform_(self.bias_mu, -bound, bound)
        nn.init.constant_(self.weight_sigma, self.noisy_std / math.sqrt(in_features))
        nn.init.constant_(self.bias_sigma, self.noisy_std / math.sqrt(out_features))

    def sample_noise(self, generator: Generator) -> None:
        """Draw new noise, in place: sign(e) * sqrt(|e|) with e ~ N(0, 1)."""
        for noise in (self.noise_in, self.noise_out):
            noise.normal_(generator=generator)
            noise.copy_(noise.sign() * noise.abs().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        if not self.training:
            return F.linear(x, self.weight_mu, self.bias_mu)
        # mu + sigma * outer(noise_out, noise_in), composed: a second matrix product for the noise
        # would take longer on the CPU.
        noisy_sigma = self.weight_sigma * self.noise_in
        weight = torch.addcmul(self.weight_mu, noisy_sigma, self.noise_out[:, None])
        bias = torch.addcmul(self.bias_mu, self.bias_sigma, self.noise_out)
        return F.linear(x, weight, bias)


class NoisyStream(nn.Module):
    """One stream of the dueling head: noisy hidden layer, activation, noisy output."""

    def __init__(self, in_features: int, out_features: int, args: Args) -> None:
        super().__init__()
        self.hidden = NoisyLinear(in_features, args.hidden_dim, args.noisy_std)
        norm = args.layer_norm and args.layer_norm_scope == "all"
        self.norm = nn.LayerNorm(args.hidden_dim, eps=1e-6) if norm else nn.Identity()
        self.activation = CReLU() if args.crelu else nn.ReLU()
        # CReLU doubles what the layer gives out, so the next fan-in doubles; the width stays.
        fan_in = args.hidden_dim * (2 if args.crelu else 1)
        self.output = NoisyLinear(fan_in, out_features, args.noisy_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.norm(self.hidden(x))))


class DuelingHead(nn.Module):
    """Dueling head on atoms: q = v + a - mean(a) (Wang et al., 2016; Bellemare et al., 2017)."""

    def __init__(self, in_features: int, num_actions: int, args: Args) -> None:
        super().__init__()
        self.n_atoms = args.n_atoms
        self.value = NoisyStream(in_features, args.n_atoms, args)
        self.advantage = NoisyStream(in_features, num_actions * args.n_atoms, args)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> log-probabilities of the returns, [B, num_actions, n_atoms]."""
        value = self.value(features).unflatten(1, (1, self.n_atoms))
        advantage = self.advantage(features).unflatten(1, (-1, self.n_atoms))
        return (value + advantage - advantage.mean(1, keepdim=True)).log_softmax(-1)


def make_backbone(args: Args) -> nn.Sequential:
    """Images [B, 4, 84, 84] -> features [B, 3136], or [B, 6272] with CReLU in scope `all`."""
    crelu = args.crelu and args.crelu_scope == "all"
    layers: list[nn.Module] = []
    in_channels = FRAME_STACK
    for channels, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
        layers.append(nn.Conv2d(in_channels, channels, kernel, stride))
        if args.layer_norm:
            layers.append(PixelLayerNorm(channels))
        layers.append(CReLU() if crelu else nn.ReLU())
        in_channels = channels * (2 if crelu else 1)
    return nn.Sequential(*layers, nn.Flatten())


class QNetwork(nn.Module):
    """Rainbow's network (appendix A.3): at 6 actions 6.87M parameters, 7.23M with head CReLU."""

    def __init__(self, num_actions: int, args: Args) -> None:
        super().__init__()
        self.backbone = make_backbone(args)
        features = 3136 * (2 if args.crelu and args.crelu_scope == "all" else 1)
        self.head = DuelingHead(features, num_actions, args)
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms))

    def q_values(self, log_probs: Tensor) -> Tensor:
        """Means of the return distributions: [..., n_atoms] -> [...]."""
        return (log_probs.exp() * self.support).sum(-1)  # a matrix product in TF32 would round

    def sample_noise(self, generator: Generator) -> None:
        """Draw new noise in every noisy layer."""
        for module in self.modules():
            if isinstance(module, NoisyLinear):
                module.sample_noise(generator)

    def forward(self, images: Tensor) -> Tensor:
        """In [0, 1] [B, 4, 84, 84] -> log-probabilities of the returns, [B, num_actions, n_atoms].

        Both streams feed the backbone, so its gradient is scaled by 1/sqrt(2) (Wang et al., 2016):
        lerp(x, x) is x, but only its second end passes a gradient on.
        """
        features = self.backbone(images)
        return self.head(torch.lerp(features.detach(), features, 2**-0.5))


# --- Replay ---------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions; the discount is gamma ** n, or 0 where a life or episode ended before."""

    index: Tensor  # int64 [B], slots in the buffer
    obs: Tensor  # uint8 [B, 4, 84, 84]
    action: Tensor  # int64 [B]
    n_step_return: Tensor  # float32 [B]
    discount: Tensor  # float32 [B]
    next_obs: Tensor  # uint8 [B, 4, 84, 84]


class ReplayBuffer:
    """Prioritised replay of single frames; stacks and n-step returns are built when sampled.

    A slot holds a frame, the action taken on it, the clipped reward, and whether that ended the
    return (done: a lost life, game over, the time limit). The slot at `cursor` holds the newest
    frame, not acted on yet. With n_step = 3 and a life that ends at slot 8:

        slot      7   8   9  10    cursor = 10
        frame    f7  f8  g0  g1    g0 begins the next life
        reward   r7  r8  r9
        done      0   1   0

    Transition 7 has the return r7 + gamma * r8 and the discount 0. stack(10) is [0, 0, g0, g1].
    Priority 0 marks what cannot be sampled: slots not written, overwritten, or, as 9 here, with
    an n-step window that is not complete.
    """

    def __init__(self, capacity: int, n_step: int, gamma: float, device: torch.device) -> None:
        # Beyond the transitions: the newest frame, and three more for the oldest one's stack.
        self.slots, self.n_step = capacity + FRAME_STACK, n_step
        self.frames = torch.zeros((self.slots, 84, 84), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(self.slots, device=device)
        # Slots not written count as done: no stack reaches back past the first frame.
        self.dones = torch.ones(self.slots, dtype=torch.bool, device=device)
        self.priorities = torch.zeros(self.slots, device=device)
        self.max_priority = torch.ones((), device=device)
        self.gammas = gamma ** torch.arange(n_step + 1, device=device)
        self.window = torch.arange(n_step, device=device)
        self.history = torch.arange(1 - FRAME_STACK, 1, device=device)  # -3, -2, -1, 0
        self.cursor = 0
        self.cursor_tensor = torch.zeros(1, dtype=torch.int64, device=device)  # for a CUDA graph
        self.pending = 0  # newest transitions of this life whose n-step window is not complete

    def start(self, frame: np.ndarray) -> None:
        """Begin with an episode's first frame, uint8 [84, 84]: at the start of every process.

        In a continued run, whose tensors come from a checkpoint, the life that was cut off ends
        here. Nothing completes the windows of its newest transitions: they are never sampled.
        """
        self.cursor, self.pending = int(self.cursor_tensor), 0
        if not self.dones[self.cursor - 1]:
            self.add(0, 0.0, True, frame)
            self.priorities[self.cursor - 1] = 0.0
        self.frames[self.cursor].copy_(torch.from_numpy(frame))

    def add(self, action: int, reward: float, done: bool, next_frame: np.ndarray) -> None:
        """Store what followed the newest frame. After game over, next_frame is the next game's."""
        slot, self.cursor = self.cursor, (self.cursor + 1) % self.slots
        self.cursor_tensor.fill_(self.cursor)
        self.actions[slot] = action
        self.rewards[slot] = reward
        self.dones[slot] = done
        self.frames[self.cursor].copy_(torch.from_numpy(next_frame))
        # A done completes all windows before it; else the one n steps back now has its next_obs.
        self.pending += 1
        num_complete = self.pending if done else int(self.pending == self.n_step)
        first = slot - self.pending + 1
        slots = torch.arange(first, first + num_complete, device=self.priorities.device)
        self.priorities[slots % self.slots] = self.max_priority
        self.pending -= num_complete
        # The oldest transition goes: the new frame has overwritten the first of its stack.
        self.priorities[(self.cursor + FRAME_STACK - 1) % self.slots] = 0.0

    def stack(self, index: Tensor) -> Tensor:
        """The frames up to slots `index` [B], oldest first: uint8 [B, 4, 84, 84].

        Frames from before the current life are zeros.
        """
        slots = (index[:, None] + self.history) % self.slots
        # A frame is seen if nothing was done from it on: a product from the right to the left.
        not_done = ~self.dones[slots[:, :-1]]
        seen = not_done.flip(1).cumprod(1, dtype=torch.uint8).flip(1)
        frames = self.frames[slots]
        frames[:, :-1] *= seen[:, :, None, None]
        return frames

    def last_obs(self) -> Tensor:
        """The observation to act on: uint8 [1, 4, 84, 84]."""
        return self.stack(self.cursor_tensor)

    def gather(self, index: Tensor) -> Batch:
        """The transitions that begin at slots `index` [B]."""
        window = (index[:, None] + self.window) % self.slots  # [B, n]; of 10 slots: 8, 9, 0
        not_done = (~self.dones[window]).float().cumprod(1)  # 1 until the first done, which has 0
        # The first done's own reward still counts: shift by one.
        counts = torch.cat([torch.ones_like(not_done[:, :1]), not_done[:, :-1]], dim=1)
        n_step_return = (self.rewards[window] * counts * self.gammas[:-1]).sum(1)
        return Batch(
            index=index,
            obs=self.stack(index),
            action=self.actions[index],
            n_step_return=n_step_return,
            discount=self.gammas[-1] * not_done[:, -1],
            next_obs=self.stack((index + self.n_step) % self.slots),
        )

    def sample(self, batch_size: int, beta: Tensor, generator: Generator) -> tuple[Batch, Tensor]:
        """batch_size transitions in proportion to their priorities, one from each stratum.

        (Schaul et al., 2016, appendix B.2.1.) Also their importance weights (1 / (N p)) ** beta
        over the batch's largest, float32 [B]: N and the sum of the priorities cancel there.
        """
        device = self.priorities.device
        # Priorities 1, 0, 3 add up to 1, 1, 4: a draw of 0.9 falls on slot 0, one of 1.0 on slot 2.
        cumulative = self.priorities.cumsum(0, dtype=torch.float64)
        # float32 draws stay below 1 in float64, so that the last one falls on a priority above 0.
        uniform = torch.rand(batch_size, generator=generator, device=device).double()
        strata = (torch.arange(batch_size, device=device) + uniform) / batch_size
        index = torch.searchsorted(cumulative, strata * cumulative[-1], right=True)
        # Priorities that are nan would lead beyond the buffer, before check_finite() can say so.
        index = index.clamp(max=self.slots - 1)
        priorities = self.priorities[index]
        return self.gather(index), (priorities.min() / priorities) ** beta

    def sample_uniform(self, batch_size: int, generator: Generator) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        valid = (self.priorities > 0).float()
        index = torch.multinomial(valid, batch_size, replacement=True, generator=generator)
        return self.gather(index)

    def update_priorities(self, index: Tensor, priorities: Tensor) -> None:
        """Set the priorities [B] of slots `index` [B]; new transitions get the largest ever set."""
        self.priorities[index] = priorities
        torch.maximum(self.max_priority, priorities.max(), out=self.max_priority)

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
    batch, channels, height, width = obs.shape
    if shift > 0:
        offsets = (2, batch, 1)
        dy, dx = torch.randint(-shift, shift + 1, offsets, generator=generator, device=obs.device)
        # Clamping repeats the edge: shifted by -1, rows 0, 1, 2 show 0, 0, 1.
        rows = (torch.arange(height, device=obs.device) + dy).clamp(0, height - 1)
        columns = (torch.arange(width, device=obs.device) + dx).clamp(0, width - 1)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
        obs = obs.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(obs)
    images = to_images(obs)
    if intensity > 0:
        noise = torch.randn((batch, 1, 1, 1), generator=generator, device=obs.device)
        images *= 1 + intensity * noise.clamp(-2, 2)
    return images


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
            w.addcmul_(w.grad, scale)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, backup)


@torch.no_grad()
def reset_optimizer(optimizer: torch.optim.Adam) -> None:
    """Set Adam's moments and step counts to zero, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


@torch.no_grad()
def reset_head(online: nn.Module, target: nn.Module, optimizer: torch.optim.Adam) -> None:
    """A fresh head, the same in both networks, and a fresh Adam; in place (section 4.1)."""
    for module in online.head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for w_target, w in zip(target.head.parameters(), online.head.parameters(), strict=True):
        w_target.copy_(w)
    reset_optimizer(optimizer)


@torch.no_grad()
def shrink_and_perturb(online: nn.Module, target: nn.Module, alpha: float) -> None:
    """Backbone w <- alpha * w + (1 - alpha) * phi, in place (section 4.3).

    phi is fresh, and the same for both networks.
    """
    fresh = copy.deepcopy(online.backbone)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for network in (online, target):
        for w, phi in zip(network.backbone.parameters(), fresh.parameters(), strict=True):
            w.lerp_(phi, 1 - alpha)


# --- Update ---------------------------------------------------------------------------------------


def project(next_probs: Tensor, n_step_return: Tensor, discount: Tensor, support: Tensor) -> Tensor:
    """C51's projection of R + discount * z onto the support (Bellemare et al., 2017, Eq. 7).

    [B, N], [B], [B] and the support [N], equally spaced, -> [B, N]. An atom's mass is split between
    its two neighbours by nearness: of 0.4 landing on 1.3, atom 1 gets 0.7 * 0.4, atom 2 0.3 * 0.4.
    """
    delta = support[1] - support[0]
    atoms = n_step_return[:, None] + discount[:, None] * support
    atoms = atoms.clamp(support[0], support[-1])
    distance = (atoms[:, None, :] - support[:, None]).abs() / delta  # [B, N to, N from]
    share = (1 - distance).clamp(min=0)
    return (share * next_probs[:, None, :]).sum(2)  # a matrix product in TF32 would round


def gather_action(log_probs: Tensor, action: Tensor) -> Tensor:
    """Distributions of the given actions: [B, num_actions, N], [B] -> [B, N]."""
    return log_probs.take_along_dim(action[:, None, None], dim=1).squeeze(1)


def cross_entropy(log_probs: Tensor, action: Tensor, td_target: Tensor) -> Tensor:
    """The TD error of Eq. 1, for distributions: [B, num_actions, N], [B], [B, N] -> [B]."""
    return -(td_target * gather_action(log_probs, action)).sum(1)


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """w- <- tau * w- + (1 - tau) * w, in place (Algorithms 1 and 2; elsewhere tau is 1 - tau)."""
    for w_target, w in zip(target.parameters(), online.parameters(), strict=True):
        w_target.lerp_(w, 1 - tau)


class Agent:
    """DrQ-Rainbow with the paper's interventions: networks, optimizer, acting, Algorithm 1.

    `num_updates` is that of the whole run, over which PER's beta rises to 1. act() and update()
    have no .item() and change tensors in place: a CUDA graph can replay them.
    """

    def __init__(
        self, num_actions: int, num_updates: int, args: Args, generator: Generator
    ) -> None:
        self.args, self.num_updates, self.generator = args, num_updates, generator
        device = generator.device
        self.online = QNetwork(num_actions, args).to(device, memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.parameters = list(self.online.parameters())
        options = dict(lr=args.learning_rate, eps=args.adam_eps, capturable=device.type == "cuda")
        self.optimizer = torch.optim.Adam(self.parameters, fused=True, **options)
        # Adam makes its state in its first step: take one with a zero gradient here, so that
        # checkpoints and CUDA graphs find the state in place.
        for w in self.parameters:
            w.grad = torch.zeros_like(w)
        self.optimizer.step()
        reset_optimizer(self.optimizer)
        scope = self.online if args.sam_scope == "all" else getattr(self.online, args.sam_scope)
        self.sam_parameters = list(scope.parameters()) if args.sam_rho > 0 else []
        self.sam_backup = [torch.empty_like(w) for w in self.sam_parameters]
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Greedy actions of the target network (Table 5), with the noise of the last update.

        uint8 [B, 4, 84, 84] -> int64 [B].
        """
        return self.target.q_values(self.target(to_images(obs))).argmax(1)

    @torch.no_grad()
    def td_target(self, batch: Batch, next_images: Tensor) -> Tensor:
        """Distribution of the n-step return, bootstrapped by double Q (Eq. 1): [B, n_atoms]."""
        action = self.online.q_values(self.online(next_images)).argmax(1)
        next_probs = gather_action(self.target(next_images), action).exp()
        return project(next_probs, batch.n_step_return, batch.discount, self.target.support)

    def update(self, replay: ReplayBuffer) -> Tensor:
        """One gradient update: Algorithm 1 from line 8 on.

        Returns the loss, the mean Q-value and the gradient's norm before clipping, [3].
        """
        args, generator, online, target = self.args, self.generator, self.online, self.target

        # Line 8: a minibatch by priority, augmented.
        beta = args.per_beta + (1 - args.per_beta) * self.updates / max(self.num_updates - 1, 1)
        batch, weights = replay.sample(args.batch_size, beta, generator)
        images = augment(batch.obs, args.aug_shift, args.aug_intensity, generator)
        next_images = augment(batch.next_obs, args.aug_shift, args.aug_intensity, generator)

        # Line 11 before line 9: double Q-learning reads the online network, too.
        online.sample_noise(generator)
        target.sample_noise(generator)
        td_target = self.td_target(batch, next_images)

        # Line 12: the gradient at w.
        if args.sam_rho > 0 and args.sam_noise == "none":
            online.head.eval()  # no noise in this pass
        self.optimizer.zero_grad()
        log_probs = online(images)
        losses = cross_entropy(log_probs, batch.action, td_target)  # [B]
        loss = (weights * losses).mean()
        loss.backward()
        online.head.train()

        # Lines 13 to 16: climb to w + rho * g / ||g||, take the gradient there, come back to w.
        if args.sam_rho > 0:
            with sam_perturbed(self.sam_parameters, self.sam_backup, args.sam_rho):
                if args.sam_noise == "independent":
                    online.sample_noise(generator)
                self.optimizer.zero_grad()
                sam_losses = cross_entropy(online(images), batch.action, td_target)
                (weights * sam_losses).mean().backward()

        # Line 17: the step from w.
        gradient_norm = nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.optimizer.step()

        # Line 18: the target network.
        soft_update(target, online, args.target_ema)

        # Priorities are of the first pass. The floor: 0 would take a transition out of the draw.
        priorities = (losses.detach() ** args.per_alpha).clamp(min=1e-8)
        replay.update_priorities(batch.index, priorities)
        self.updates.add_(1)
        q_value = online.q_values(log_probs.detach()).mean()
        return torch.stack([loss.detach(), q_value, gradient_norm])

    def reset(self) -> None:
        """Reset the head, and shrink and perturb the backbone where that is on."""
        reset_head(self.online, self.target, self.optimizer)
        if self.args.shrink_perturb_alpha < 1:
            shrink_and_perturb(self.online, self.target, self.args.shrink_perturb_alpha)

    def tensors(self) -> dict[str, Tensor]:
        """What update() and reset() change in place, generators and replay priorities aside."""
        tensors = {"updates": self.updates}
        for name, network in (("online", self.online), ("target", self.target)):
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        for i, state in enumerate(self.optimizer.state.values()):
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        return tensors


def capture(
    function: Callable[[], Tensor], tensors: list[Tensor], generators: tuple[Generator, ...] = ()
) -> Callable[[], Tensor]:
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

    def run_graph() -> Tensor:
        graph.replay()
        return output

    return run_graph


# --- Evaluation -----------------------------------------------------------------------------------

# fmt: off
RANDOM_HUMAN = {  # returns of a random policy and of a human player (paper, Table 7)
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3), "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5),
    "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5), "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0), "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3), "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0), "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7), "UpNDown": (533.4, 11693.2),
}
# fmt: on


def human_normalized_score(env_id: str, mean_return: float) -> float | None:
    """(score - random) / (human - random) (section 4.1); None for a game outside the 26."""
    if env_id not in RANDOM_HUMAN:
        return None
    random, human = RANDOM_HUMAN[env_id]
    return (mean_return - random) / (human - random)


@torch.no_grad()
def evaluate(
    network: QNetwork, env_id: str, args: Args, video: list[np.ndarray] | None = None
) -> list[float]:
    """Play --eval-episodes full games side by side; returns their returns, not clipped.

    Each environment plays one game: of many environments, the first games to end are the short
    ones. The network (in the paper, the target network) plays without noise, with --eval-epsilon
    random actions. Environment i has the seed 10,000 * (seed + 1) + i, training the seed itself.
    `video`, where given, takes the first game's frames, uint8 [84, 84].
    """
    network.head.eval()  # no noise
    device, num_episodes = network.support.device, args.eval_episodes
    first_seed = 10_000 * (args.seed + 1)
    envs = make_envs(env_id, num_episodes, first_seed)
    rng = np.random.default_rng(first_seed)
    frames, info = envs.reset()
    stacks = torch.zeros((num_episodes, FRAME_STACK, 84, 84), dtype=torch.uint8, device=device)
    stacks[:, -1] = torch.from_numpy(frames[:, 0]).to(device)
    lives, returns = info["lives"].copy(), np.zeros(num_episodes)
    playing = np.arange(num_episodes, dtype=np.int32)  # a step after game over would reset a game
    progress = tqdm(total=num_episodes, desc="evaluation", unit="game", disable=None, leave=False)
    while len(playing) > 0:
        if video is not None and 0 in playing:
            video.append(stacks[0, -1].clone().cpu().numpy())
        log_probs = network(to_images(stacks[torch.from_numpy(playing).to(device)]))
        actions = network.q_values(log_probs).argmax(1).int().cpu().numpy()
        explore = rng.random(len(playing)) < args.eval_epsilon
        actions[explore] = rng.integers(envs.action_space.n, size=explore.sum())
        frames, rewards, terminated, truncated, info = envs.step(actions, playing)
        playing = info["env_id"]  # in the order of the answers
        returns[playing] += rewards
        lost_life = (info["lives"] > 0) & (info["lives"] < lives[playing])
        lives[playing] = info["lives"]
        # A new life begins with an empty stack, as in training.
        index = torch.from_numpy(playing).to(device)
        same_life = torch.from_numpy(~lost_life).to(device)[:, None, None, None]
        history = stacks[index, 1:] * same_life
        stacks[index] = torch.cat([history, torch.from_numpy(frames).to(device)], dim=1)
        episode_over = terminated | truncated
        progress.update(int(episode_over.sum()))
        playing = playing[~episode_over]
    progress.close()
    network.head.train()
    return returns.tolist()


def summary(env_id: str, returns: list[float]) -> str:
    """One line for people: mean return and, for the paper's games, human-normalized score."""
    mean_return = float(np.mean(returns))
    line = f"{env_id}: mean return {mean_return:.1f} over {len(returns)} games"
    score = human_normalized_score(env_id, mean_return)
    return line if score is None else f"{line}, human-normalized score {score:.3f}"


def save_gif(frames: list[np.ndarray], file: BinaryIO) -> None:
    """Frames, uint8 [84, 84], in about the game's own pace (4 frames in 1/15 s)."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(file, format="GIF", save_all=True, append_images=others, duration=70, loop=0)


# --- Metrics --------------------------------------------------------------------------------------


@torch.no_grad()
def active_units(network: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Share of activations above 0 (Fig. 4) when `forward` runs the network.

    By layer, and in all of the backbone and of the head. Of CReLU's outputs, one in each pair is
    above 0: a layer with it has 0.5 by construction.
    """
    active: dict[str, Tensor] = {}  # bool, by layer

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: active.update({name: (output > 0).flatten()})

    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.ReLU | CReLU)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    forward()
    for hook in hooks:
        hook.remove()
    for part in ("backbone", "head"):
        active[part] = torch.cat([active[name] for name in layers if name.startswith(part)])
    return {name: int(units.sum()) / len(units) for name, units in active.items()}


def max_eigenvalue(loss: Tensor, parameters: list[Tensor], generator: Generator) -> float:
    """Largest (algebraic) eigenvalue of the Hessian of `loss` (section 4.1), by Lanczos.

    Needs Hessian-vector products only, and three vectors of the parameters' size. Stops when the
    residual of the largest Ritz pair falls below a thousandth of its value, after 100 products at
    the latest; TF32 leaves three digits. nan for a loss that is not finite.
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


def plasticity_metrics(agent: Agent, replay: ReplayBuffer, generator: Generator) -> dict:
    """Active units on 512 transitions and sharpness on 32, drawn uniformly.

    Without noise, augmentation and importance weights.
    """
    online, target = agent.online, agent.target
    online.head.eval()
    target.head.eval()
    batch = replay.sample_uniform(512, generator)
    units = active_units(online, lambda: online(to_images(batch.obs)))
    metrics = {f"active_units/{name}": share for name, share in units.items()}

    batch = Batch(*(entry[:32] for entry in batch))
    td_target = agent.td_target(batch, to_images(batch.next_obs))
    # Not online(images): its scaled backward pass gives a matrix that is no Hessian.
    log_probs = online.head(online.backbone(to_images(batch.obs)))
    loss = cross_entropy(log_probs, batch.action, td_target).mean()
    means = [w for name, w in online.named_parameters() if "sigma" not in name]  # sigma is idle
    metrics["hessian_max_eigenvalue"] = max_eigenvalue(loss, means, generator)
    online.head.train()
    target.head.train()
    return metrics


# --- Checkpoint -----------------------------------------------------------------------------------

# Flags that may differ when a run is continued.
MAY_CHANGE = set(
    "run_dir device cuda_graph torch_threads resume checkpoint_interval overwrite evaluate "
    "eval_interval metrics_interval log_interval capture_video save_model track "
    "wandb_project_name wandb_entity".split()
)


@dataclass
class Counters:
    """Where a run stands."""

    step: int = 0
    updates: int = 0
    resets: int = 0
    seconds: float = 0.0  # of all, evaluations included
    training_seconds: float = 0.0  # of acting and learning
    resumed_at: list[int] = field(default_factory=list)  # steps after which it was continued
    git_commit: str | None = None  # of this process's code
    wandb_id: str | None = None


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, and put it there once it is on disk: a kill leaves the old file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save puts one on top of "no space left on device"
        raise error.__context__ or error from None
    os.replace(temporary, path)


def check_flags(args: Args, saved: dict, path: Path) -> None:
    """End with one line if the run that `path` belongs to had other flags."""
    others = [
        f"--{name.replace('_', '-')} {saved.get(name)}"
        for name, value in asdict(args).items()
        if name not in MAY_CHANGE and saved.get(name) != value
    ]
    if others:
        advice = "use that, another --exp-name, or --overwrite"
        sys.exit(f"error: {path} was made with {', '.join(others)}; {advice}")


def save_checkpoint(path: Path, args: Args, counters: Counters, generators: dict, tensors: dict):
    """Write all that a run needs to go on but the emulator's state: it will begin a new episode."""
    checkpoint = {
        "args": asdict(args),
        "counters": asdict(counters),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "tensors": tensors,
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path, args: Args, generators: dict, tensors: dict) -> Counters:
    """Put all back in place; returns the counters.

    On another device than before, random streams begin anew: its generators have other states.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        check_flags(args, checkpoint["args"], path)
        for name, tensor in tensors.items():
            tensor.copy_(checkpoint["tensors"][name])
        if checkpoint["args"]["device"] == args.device:
            for name, generator in generators.items():
                generator.set_state(checkpoint["generators"][name])
        return Counters(**checkpoint["counters"])
    except Exception as error:  # a foreign file can raise anything; weights_only runs no code
        problem = f"not a checkpoint of this script ({type(error).__name__})"
        sys.exit(f"error: {path}: {problem}; move it away or pass --overwrite")


# --- Run ------------------------------------------------------------------------------------------


def due(interval: int, count: int) -> bool:
    """Whether `count` is a multiple of `interval`; never for interval 0."""
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


def make_generators(args: Args) -> dict[str, Generator]:
    """All sources of random numbers but the environment's, by name, seeded."""
    torch.manual_seed(args.seed)  # initialisers, at the start and at resets; random first actions
    seeds = torch.randint(2**31, (2,)).tolist()
    # Metrics have their own: measuring must change nothing of what is learned.
    sampling, metrics = (Generator(args.device).manual_seed(seed) for seed in seeds)
    generators = {"torch": torch.default_generator, "sampling": sampling, "metrics": metrics}
    if args.device == "cuda":  # initialisers at resets
        generators["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    return generators


def start_logging(args: Args, run_dir: Path, counters: Counters) -> SummaryWriter:
    """TensorBoard and, with --track, Weights & Biases; what --overwrite replaces is removed."""
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity}
        names |= {"name": run_dir.name, "id": counters.wandb_id, "resume": "allow"}
        counters.wandb_id = wandb.init(**names, config=asdict(args), sync_tensorboard=True).id
    if args.overwrite:
        old = run_dir.glob("events.out.tfevents.*")
        names = ("result.json", "checkpoint.pth", "model.pth", "video.gif")
        for path in [*old, *(run_dir / name for name in names)]:
            path.unlink(missing_ok=True)
    # purge_step hides from readers what a killed process logged after its last checkpoint.
    writer = SummaryWriter(str(run_dir), purge_step=counters.step + 1)
    table = "\n".join(f"|{flag}|{value}|" for flag, value in asdict(args).items())
    writer.add_text("args", f"|flag|value|\n|-|-|\n{table}")
    return writer


def log_evaluation(writer: SummaryWriter, env_id: str, returns: list[float], step: int) -> None:
    """Mean return and, for the paper's games, human-normalized score."""
    mean_return = float(np.mean(returns))
    writer.add_scalar("eval/mean_return", mean_return, step)
    score = human_normalized_score(env_id, mean_return)
    if score is not None:
        writer.add_scalar("eval/human_normalized_score", score, step)


def check_finite(losses: Tensor, step: int) -> None:
    """End with one line if the newest losses are not finite: a nan, once there, never leaves."""
    if not losses.isfinite().all():
        advice = "lower --learning-rate or --sam-rho"
        sys.exit(f"error: step {step}: loss or gradient is not finite; {advice}")


def on_stop_signals(handler: Callable | signal.Handlers) -> None:
    """What SIGTERM and Ctrl-C do from now on."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler)


def catch_stop_signals() -> list[int]:
    """A list that the next one joins, so that the step can end; one more ends the process."""
    caught: list[int] = []

    def stop(signum: int, frame: object) -> None:
        caught.append(signum)
        on_stop_signals(signal.SIG_DFL)

    on_stop_signals(stop)
    return caught


def write_result(run_dir: Path, args: Args, counters: Counters, agent: Agent, returns: list):
    """result.json, the last of a run's files: a directory with it holds a finished run."""
    mean_return, versions = float(np.mean(returns)), {"python": platform.python_version()}
    versions |= {"torch": torch.__version__, "envpool": envpool.__version__}
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "env_id": args.env_id,
        "seed": args.seed, "args": asdict(args), "env_steps": counters.step,
        "gradient_updates": counters.updates, "resets": counters.resets,
        "resumed_at": counters.resumed_at, "parameters": sum(w.numel() for w in agent.parameters),
        "episode_returns": returns, "mean_return": mean_return,
        "human_normalized_score": human_normalized_score(args.env_id, mean_return),
        "wall_clock_seconds": counters.seconds,
        "env_steps_per_second": counters.step / counters.training_seconds,
        "updates_per_second": counters.updates / counters.training_seconds,
        "device": device_name(args), "versions": versions,
        "git_commit": counters.git_commit,
    }
    # fmt: on
    content = json.dumps(result, indent=2).encode()
    write_atomically(run_dir / "result.json", lambda file: file.write(content))


def train(args: Args, run_dir: Path) -> None:
    """A run from its seed, or from its checkpoint, to result.json."""
    checkpoint_path, generators = run_dir / "checkpoint.pth", make_generators(args)
    num_actions = int(make_envs(args.env_id, 1, args.seed).action_space.n)
    num_updates = (args.total_timesteps - args.learning_starts + 1) * args.replay_ratio
    agent = Agent(num_actions, num_updates, args, generators["sampling"])
    replay = ReplayBuffer(args.buffer_size, args.n_step, args.gamma, torch.device(args.device))
    update, act = lambda: agent.update(replay), lambda: agent.act(replay.last_obs())
    if args.cuda_graph and args.device == "cuda":
        changed = [*agent.tensors().values(), replay.priorities, replay.max_priority]
        update, act = (capture(function, changed, (agent.generator,)) for function in (update, act))

    counters, tensors = Counters(), {**agent.tensors(), **replay.tensors()}
    if checkpoint_path.exists() and not args.overwrite:
        counters = load_checkpoint(checkpoint_path, args, generators, tensors)
        counters.resumed_at.append(counters.step)
    counters.git_commit = git_commit()
    # The emulator's state is not in a checkpoint: a continued run begins a new episode, with other
    # no-ops than the first one's and the evaluation's.
    envs = make_envs(args.env_id, 1, args.seed + (1_000_003 * counters.step) % 2**30)
    frames, info = envs.reset()
    replay.start(frames[0, 0])
    lives, episode_return, episode_length = info["lives"][0], 0.0, 0

    writer = start_logging(args, run_dir, counters)
    size = f"{sum(w.numel() for w in agent.parameters):,} parameters, {num_updates:,} updates"
    print(f"{run_dir}: {size}, on {device_name(args)}, from step {counters.step}", file=sys.stderr)
    start_time, checkpoint_time = time.perf_counter() - counters.seconds, time.perf_counter()
    losses, stop_signals = torch.zeros(3), catch_stop_signals()
    steps = range(counters.step + 1, args.total_timesteps + 1)
    # With disable=None there is no bar where there is no terminal.
    progress = tqdm(steps, args.env_id, args.total_timesteps, initial=counters.step, disable=None)
    for step in progress:
        counters.step, step_start = step, time.perf_counter()
        last = step == args.total_timesteps

        # Act
        if step <= args.learning_starts:
            action = int(torch.randint(num_actions, ()))
        else:
            action = int(act())  # waits for the device
        frames, rewards, terminated, truncated, info = envs.step(np.array([action], np.int32))
        # Some games are played on for a while with no life left: that is not yet game over.
        lost_life = 0 < info["lives"][0] < lives
        episode_over = terminated[0] or truncated[0]
        episode_return += float(rewards[0])  # not clipped
        episode_length += 1
        if episode_over:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            progress.set_postfix({"return": episode_return}, refresh=False)
            episode_return, episode_length = 0.0, 0
            frames, info = envs.reset()  # EnvPool's next step would ignore its action and reset
        lives = info["lives"][0]
        reward = float(np.sign(rewards[0]))
        done = bool(lost_life or episode_over)  # a time limit, too: nothing is bootstrapped there
        replay.add(action, reward, done, frames[0, 0])

        # Learn
        if step >= args.learning_starts:
            for _ in range(args.replay_ratio):
                losses = update()
                counters.updates += 1
                if due(args.reset_interval, counters.updates) and not last:
                    agent.reset()
                    counters.resets += 1
        counters.training_seconds += time.perf_counter() - step_start

        # Log
        if step >= args.learning_starts and (due(args.log_interval, step) or last):
            check_finite(losses, step)
            names = ("td_loss", "q_values", "gradient_norm")
            for name, value in zip(names, losses.tolist(), strict=True):
                writer.add_scalar(f"losses/{name}", value, step)
            writer.add_scalar("charts/resets", counters.resets, step)
            writer.add_scalar("charts/SPS", step / counters.training_seconds, step)
        if step >= args.learning_starts and due(args.metrics_interval, step):
            for name, value in plasticity_metrics(agent, replay, generators["metrics"]).items():
                writer.add_scalar(f"plasticity/{name}", value, step)
        if due(args.eval_interval, step) and not last:
            log_evaluation(writer, args.env_id, evaluate(agent.target, args.env_id, args), step)

        # Checkpoint
        if args.checkpoint_interval == "auto":
            checkpoint_due = time.perf_counter() - checkpoint_time >= 300
        else:
            checkpoint_due = due(args.checkpoint_interval, step)
        if args.checkpoint_interval != 0 and (checkpoint_due or last or stop_signals):
            check_finite(losses, step)
            writer.flush()
            counters.seconds = time.perf_counter() - start_time
            save_checkpoint(checkpoint_path, args, counters, generators, tensors)
            checkpoint_time = time.perf_counter()
        if stop_signals:
            progress.close()
            print(f"stopped after step {step}", file=sys.stderr)
            sys.exit(128 + stop_signals[0])

    # Stopped from here on, a run repeats its evaluation: the last step has a checkpoint.
    on_stop_signals(signal.SIG_DFL)
    video = [] if args.capture_video else None
    returns = evaluate(agent.target, args.env_id, args, video)
    log_evaluation(writer, args.env_id, returns, args.total_timesteps)
    writer.close()
    counters.seconds = time.perf_counter() - start_time
    if video is not None:
        write_atomically(run_dir / "video.gif", lambda file: save_gif(video, file))
    if args.save_model:
        target = agent.target.state_dict()
        model = {"args": asdict(args), "num_actions": num_actions, "target": target}
        write_atomically(run_dir / "model.pth", lambda file: torch.save(model, file))
    write_result(run_dir, args, counters, agent, returns)
    checkpoint_path.unlink(missing_ok=True)
    print(f"{summary(args.env_id, returns)}; {run_dir / 'result.json'}")


def run(args: Args) -> None:
    """Begin a run or continue it, alone in its directory; what is there stays unless told."""
    run_dir = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    result_path, checkpoint_path = run_dir / "result.json", run_dir / "checkpoint.pth"
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".lock", blocking=False):
            if result_path.exists() and args.resume:
                check_flags(args, json.loads(result_path.read_text())["args"], result_path)
                checkpoint_path.unlink(missing_ok=True)  # of a run killed before it could
                print(f"{run_dir}: finished already", file=sys.stderr)
            elif result_path.exists() and not args.overwrite:
                advice = "change --exp-name or --seed, or pass --overwrite"
                sys.exit(f"error: {run_dir} holds a finished run; {advice}")
            elif checkpoint_path.exists() and not (args.resume or args.overwrite):
                advice = "pass --resume to continue it, or --overwrite to begin anew"
                sys.exit(f"error: {run_dir} holds an unfinished run; {advice}")
            else:
                train(args, run_dir)
    except Timeout:
        sys.exit(f"error: another process is at work in {run_dir}")


def evaluate_saved(args: Args) -> None:
    """Play the model at --evaluate: the file's game, flags and seed.

    This command's device, threads, --eval-episodes and --eval-epsilon; with --capture-video, a GIF
    beside the file.
    """
    gif = Path(f"{args.evaluate}.gif")
    if args.capture_video and gif.exists() and not args.overwrite:
        sys.exit(f"error: {gif} exists; pass --overwrite to replace it")
    try:
        model = torch.load(args.evaluate, map_location="cpu", weights_only=True)
        ours = ("device", "torch_threads", "eval_episodes", "eval_epsilon", "track")
        saved = Args(**model["args"] | {name: getattr(args, name) for name in ours})
        network = QNetwork(model["num_actions"], saved)
        network.load_state_dict(model["target"])
    except Exception as error:  # a foreign file can raise anything; weights_only runs no code
        problem = f"not a model that this script saved ({type(error).__name__})"
        sys.exit(f"error: --evaluate {args.evaluate}: {problem}")
    video = [] if args.capture_video else None
    network = network.to(args.device, memory_format=torch.channels_last)
    returns = evaluate(network, saved.env_id, saved, video)
    if video is not None:
        write_atomically(gif, lambda file: save_gif(video, file))
    print(summary(saved.env_id, returns))


if __name__ == "__main__":
    args = tyro.cli(Args)
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
