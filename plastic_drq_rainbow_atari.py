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

PLASTIC, PLASTIC† (LayerNorm and resets alone) and the base that they stand on:

    python plastic_drq_rainbow_atari.py --env-id Alien
    python plastic_drq_rainbow_atari.py --env-id Alien --exp-name ln_reset --no-crelu --sam-rho 0
    python plastic_drq_rainbow_atari.py --env-id Alien --exp-name base --no-crelu --sam-rho 0 \
        --no-layer-norm --reset-interval 0

Read Agent.update first, which is Algorithm 1 from line 8 on, then train, the loop around it.
QNetwork is backbone and head, with LayerNorm and CReLU. ReplayBuffer makes transitions of frames.
The other interventions are sam_perturbed, reset_head and shrink_and_perturb.
Two clocks tick: steps of the environment (4 frames each) and gradient updates. Resets count
updates: 40,000 of them are 20,000 steps at replay ratio 2.

Where it departs from the paper's text (README.md and benchmark/RELEASE.md have tables):
- Adam's epsilon is 1.5e-4: the paper's 0.000015 is a digit slip (--adam-eps).
- LayerNorm is in the backbone alone, as the main text has it; appendix A.3 adds the fully
  connected layers (--layer-norm-scope).
- CReLU is in the head alone: the one reading with the paper's 7.2M parameters (--crelu-scope).
- Shrink & Perturb begins at replay ratio 4, for every method with resets: section 4.3 has it in
  PLASTIC†, finds that it hurts at 2, and gives no alpha (--shrink-perturb-alpha: 0.6).
- Algorithm 1 shows an epsilon-greedy DQN for brevity; here the noisy target network acts, as
  Table 5 says.
"""

import copy
import ctypes
import difflib
import json
import math
import os
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

# PyTorch's threads wait for each other by spinning: two runs that share the cores would take four
# times as long as one. GNU OpenMP reads this when PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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
GAMES = ["".join(word.capitalize() for word in game.split("_")) for game in atari_game_list]


# --- Args -----------------------------------------------------------------------------------------


@dataclass
class Args:
    """PLASTIC on DrQ-Rainbow for Atari-100k. The defaults are PLASTIC at replay ratio 2."""

    # Run
    env_id: str = "Alien"  # Atari game, as EnvPool names it: MsPacman
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

    # Training (Table 5; v_min and v_max: its lineage)
    total_timesteps: int = 100_000  # steps; one is 4 frames
    replay_ratio: int = 2  # gradient updates per step
    batch_size: int = 32  # transitions per update
    learning_starts: int = 2_000  # steps of random actions; the last one has the first update
    learning_rate: float = 1e-4  # of Adam (1.414e-4 in the authors' release)
    adam_eps: float = 1.5e-4  # epsilon of Adam (Table 5's 0.000015 is a digit slip)
    max_grad_norm: float = 10.0  # largest norm of the gradient that is applied
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
    target_ema: float = 0.99  # tau: target <- tau * target + (1 - tau) * online network
    aug_shift: int = 4  # largest random shift in pixels (0 = off)
    aug_intensity: float = 0.05  # scale of the intensity jitter (0 = off)

    # Plasticity interventions
    layer_norm: bool = True  # LayerNorm over channels at each pixel
    layer_norm_scope: Literal["backbone", "all"] = "backbone"  # all = the head's hidden layers too
    crelu: bool = True  # concatenated ReLU
    crelu_scope: Literal["head", "all"] = "head"  # all = the backbone's layers too
    sam_rho: float = 0.1  # radius of the SAM perturbation (0 = off)
    sam_scope: Literal["all", "backbone", "head"] = "all"  # parameters that SAM perturbs
    # noise in SAM's two passes (appendix B.4): independent = a draw for each (Algorithm 1),
    # reused = one draw for both, none = no noise in the first pass
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
        if self.shrink_perturb_alpha == "auto":  # section 4.3: at 2 it hurts, above it helps
            helps = self.replay_ratio >= 4 and self.reset_interval > 0
            self.shrink_perturb_alpha = 0.6 if helps else 1.0
        tiny, huge = 1e-12, 10**9
        for lowest, highest, names in (
            (0, 1, "gamma per_beta target_ema eval_epsilon shrink_perturb_alpha"),
            (0, 1024, "torch_threads"),
            (0, 200_000, "seed"),  # evaluations have 10,000 times this; EnvPool's have 31 bits
            (0, huge, "noisy_std per_alpha aug_shift aug_intensity sam_rho reset_interval"),
            (0, huge, "checkpoint_interval eval_interval metrics_interval"),
            (tiny, huge, "learning_rate adam_eps max_grad_norm"),
            (1, huge, "replay_ratio batch_size n_step hidden_dim eval_episodes log_interval"),
            (2, huge, "n_atoms"),
        ):
            for name in names.split():
                flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
                if value != "auto" and not lowest <= value <= highest:  # nan is in no range
                    raise ValueError(f"{flag} must be from {lowest:,} to {highest:,}, not {value}")
        if self.env_id not in GAMES:
            games = {game.lower(): game for game in GAMES}
            (closest,) = difflib.get_close_matches(self.env_id.lower(), games, n=1, cutoff=0)
            message = f"no such game, the closest is {games[closest]}"
            raise ValueError(f"--env-id {self.env_id}: {message}")
        name = self.exp_name  # part of a directory's name, and printed
        if "/" in name or name in ("", ".", "..") or not name.isprintable():
            raise ValueError(f"--exp-name {self.exp_name!r}: must be a plain file name")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite begins anew: pass one of them")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be below --total-timesteps")
        if min(self.learning_starts, self.buffer_size) < 2 * self.n_step:
            raise ValueError("--learning-starts and --buffer-size: at least twice --n-step")
        if not -math.inf < self.v_min < self.v_max < math.inf:
            raise ValueError("--v-min must be below --v-max, and both finite")
        if self.shrink_perturb_alpha < 1 and self.reset_interval == 0:
            raise ValueError("--shrink-perturb-alpha acts at resets: give a --reset-interval")
        if self.evaluate is not None and not Path(self.evaluate).is_file():
            raise ValueError(f"--evaluate {self.evaluate}: not a file")
        wandb = find_spec("wandb")  # a mere folder of this name has no origin
        if self.track and (wandb is None or wandb.origin is None):
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

    EnvPool takes its seed here and nowhere else: reset(seed=...) does nothing. Observations are
    the newest frames alone, uint8 [num_envs, 1, 84, 84]. Lives and stacks of frames are left to
    the caller: EnvPool's own episodic_life would play no-ops after every lost life.
    """
    # 27,000 steps are 108,000 frames, half an hour of play.
    # fmt: off
    return envpool.make_gymnasium(
        f"{env_id}-v5", num_envs=num_envs, seed=seed, stack_num=1, frame_skip=4, noop_max=30,
        max_episode_steps=27_000, repeat_action_probability=0.0, full_action_space=False,
        use_inter_area_resize=False, use_fire_reset=False, episodic_life=False, reward_clip=False,
    )
    # fmt: on


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


class NoisyLinear(nn.Module):
    """Linear layer with factorised Gaussian noise on its weights (Eq. 2; Fortunato et al., 2018).

    The noise is one draw for the whole batch and stays until sample_noise(); it begins as 0. In
    eval mode there is none: the layer is that of the mean weights.
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
        # By outputs, as usual in PyTorch; Fortunato et al. divide by inputs here, too.
        nn.init.constant_(self.bias_sigma, self.noisy_std / math.sqrt(out_features))

    def sample_noise(self, generator: Generator) -> None:
        """Draw new noise, in place: sign(e) * sqrt(|e|) with e ~ N(0, 1)."""
        sizes = [len(self.noise_in), len(self.noise_out)]
        e = torch.randn(sum(sizes), generator=generator, device=self.noise_in.device)
        noise_in, noise_out = (e.sign() * e.abs().sqrt()).split(sizes)
        self.noise_in.copy_(noise_in)
        self.noise_out.copy_(noise_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        if not self.training:
            return F.linear(x, self.weight_mu, self.bias_mu)
        # addcmul(a, b, c) is a + b * c. A second matrix product takes longer on a CPU.
        noise = torch.outer(self.noise_out, self.noise_in)
        weight = torch.addcmul(self.weight_mu, self.weight_sigma, noise)
        bias = torch.addcmul(self.bias_mu, self.bias_sigma, self.noise_out)
        return F.linear(x, weight, bias)


class NoisyStream(nn.Module):
    """One stream of the dueling head: noisy hidden layer, LayerNorm or not, activation, output."""

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
        """[B, in_features] -> [B, out_features]."""
        return self.output(self.activation(self.norm(self.hidden(x))))


class DuelingHead(nn.Module):
    """Dueling head with the logits v + a - mean(a) (Wang et al., 2016; Bellemare et al., 2017)."""

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
        features = self.backbone(torch.zeros(1, FRAME_STACK, 84, 84)).shape[1]
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
        """Images [B, 4, 84, 84] -> log-probabilities [B, num_actions, n_atoms].

        Images are from 0 to 1, with the intensities of augment() to 1.1.
        """
        features = self.backbone(images)
        # The gradients of both streams add up here, so they are scaled by 1/sqrt(2) (Wang et al.,
        # 2016): lerp(x, x) is x, but only its second end passes a gradient on.
        return self.head(torch.lerp(features.detach(), features, 2**-0.5))


# --- Replay ---------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions; the discount is gamma ** n, or 0 where a done comes within the n steps."""

    index: Tensor  # int64 [B], slots in the buffer
    obs: Tensor  # uint8 [B, 4, 84, 84]
    action: Tensor  # int64 [B]
    n_step_return: Tensor  # float32 [B]
    discount: Tensor  # float32 [B]
    next_obs: Tensor  # uint8 [B, 4, 84, 84]; of no use, maybe of another life, at discount 0


class ReplayBuffer:
    """Prioritised replay of single frames; stacks and n-step returns are built when sampled.

    A slot holds a frame, the action taken on it, the reward (clipped by the caller), and whether
    that ended the return (done: a lost life, game over, the time limit). The slot at `cursor` holds
    the newest frame, not acted on yet. With n_step = 3 and a life that ends at slot 8:

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
        self.num_slots, self.n_step = capacity + FRAME_STACK, n_step
        self.frames = torch.zeros((self.num_slots, 84, 84), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(self.num_slots, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(self.num_slots, device=device)
        # Slots not written count as done: no stack reaches back past the first frame.
        self.dones = torch.ones(self.num_slots, dtype=torch.bool, device=device)
        self.priorities = torch.zeros(self.num_slots, device=device)
        self.max_priority = torch.ones((), device=device)
        self.gammas = gamma ** torch.arange(n_step + 1, device=device)
        self.window = torch.arange(n_step, device=device)
        self.history = torch.arange(1 - FRAME_STACK, 1, device=device)  # -3, -2, -1, 0
        self.cursor = 0
        # The same as a tensor, for a CUDA graph and for a checkpoint.
        self.cursor_tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self.pending = 0  # newest transitions of this life whose n-step window is not complete

    def start(self, frame: np.ndarray) -> None:
        """Begin with an episode's first frame, uint8 [84, 84]: at the start of every process.

        In a continued run, whose tensors come from a checkpoint, the life that was cut off ends
        here. This end and the n - 1 transitions before it lack what followed them: they stay at
        priority 0, and are never sampled.
        """
        self.cursor, self.pending = int(self.cursor_tensor), 0
        if not self.dones[self.cursor - 1]:  # in an empty buffer all slots are done
            self.add(0, 0.0, True, frame)
            self.priorities[self.cursor - 1] = 0.0
        self.frames[self.cursor].copy_(torch.from_numpy(frame))

    def add(self, action: int, reward: float, done: bool, next_frame: np.ndarray) -> None:
        """Store what followed the newest frame. After game over, next_frame is the next game's."""
        slot, self.cursor = self.cursor, (self.cursor + 1) % self.num_slots
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
        self.priorities[slots % self.num_slots] = self.max_priority
        self.pending -= num_complete
        # With the new frame in slot 10, stacks of the slots 11, 12 and 13 would mix it with old
        # ones. 11 and 12 left the draw when frames came into 8 and 9; now 13 leaves it.
        self.priorities[(self.cursor + FRAME_STACK - 1) % self.num_slots] = 0.0

    def stack(self, index: Tensor) -> Tensor:
        """The frames up to slots `index` [B], oldest first: uint8 [B, 4, 84, 84].

        Frames from before the current life are zeros.
        """
        slots = (index[:, None] + self.history) % self.num_slots
        # A frame is seen if no done lies between it and the newest one. For dones 0, 1, 0 of the
        # older three, not_done is 1, 0, 1; the product of each with all to its right is 0, 0, 1.
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
        window = (index[:, None] + self.window) % self.num_slots  # [B, n]; of 10 slots: 8, 9, 0
        not_done = (~self.dones[window]).float().cumprod(1)  # dones 0, 1, 0: 1, 0, 0
        # The reward of the first done counts, too: 1, 1, 0.
        in_life = torch.cat([torch.ones_like(not_done[:, :1]), not_done[:, :-1]], dim=1)
        n_step_return = (self.rewards[window] * in_life * self.gammas[:-1]).sum(1)
        return Batch(
            index=index,
            obs=self.stack(index),
            action=self.actions[index],
            n_step_return=n_step_return,
            discount=self.gammas[-1] * not_done[:, -1],
            next_obs=self.stack((index + self.n_step) % self.num_slots),
        )

    def sample(self, batch_size: int, beta: Tensor, generator: Generator) -> tuple[Batch, Tensor]:
        """A batch drawn by priority, one transition from each of batch_size strata; its weights.

        The importance weights, float32 [B], are (1 / (N p)) ** beta over the largest of them, so
        that N and the sum of all priorities cancel (Schaul et al., 2016, section 3.4 and B.2.1).
        """
        device = self.priorities.device
        # Priorities 1, 0, 3 add up to 1, 1, 4: a draw of 0.9 falls on slot 0, one of 1.0 on slot 2.
        cumulative = self.priorities.cumsum(0, dtype=torch.float64)
        # Not in float32: there (31 + 0.99999994) / 32 is 1, past the last slot with a priority.
        uniform = torch.rand(batch_size, generator=generator, device=device).double()
        strata = (torch.arange(batch_size, device=device) + uniform) / batch_size
        index = torch.searchsorted(cumulative, strata * cumulative[-1], right=True)
        # Past the last slot only where priorities are nan, until check_finite() says so, or all 0,
        # as when capture() warms up on an empty buffer.
        index = index.clamp(max=self.num_slots - 1)
        priorities = self.priorities[index]
        return self.gather(index), (priorities.min() / priorities) ** beta

    def sample_uniform(self, batch_size: int, generator: Generator) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        valid = (self.priorities > 0).float()
        index = torch.multinomial(valid, batch_size, replacement=True, generator=generator)
        return self.gather(index)

    def update_priorities(self, index: Tensor, priorities: Tensor) -> None:
        """Set the priorities [B] of slots `index` [B]; new transitions get the largest so far.

        That is 1 at first. They are already raised to alpha, and above 0. A slot can be there
        twice, augmented differently: either priority may stay.
        """
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


@torch.no_grad()
def reset_head(online: nn.Module, target: nn.Module, optimizer: torch.optim.Adam) -> None:
    """A fresh head (section 4.1), the same in both networks, and a fresh Adam; in place.

    Layers are drawn by their reset_parameters(). Of target network and Adam the paper says nothing.
    Adam forgets the backbone's moments, too.
    """
    for module in online.head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for w_target, w in zip(target.head.parameters(), online.head.parameters(), strict=True):
        w_target.copy_(w)
    reset_optimizer(optimizer)


@torch.no_grad()
def shrink_and_perturb(online: nn.Module, target: nn.Module, alpha: float) -> None:
    """Backbone w <- alpha * w + (1 - alpha) * phi, in place (section 4.3).

    phi is fresh, drawn by the layers' reset_parameters(), and the same for both networks.
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

    Probabilities [B, N], returns [B] (not [B, 1]), discounts [B] and the support [N], equally
    spaced, -> [B, N]. An atom's mass is split between its two neighbours by nearness: of 0.4
    landing on 1.3, atom 1 gets 0.7 * 0.4, atom 2 0.3 * 0.4.
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
    """Eq. 1's TD error for distributions: [B, num_actions, N], [B], [B, N] -> [B]."""
    return -(td_target * gather_action(log_probs, action)).sum(1)


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """w- <- tau * w- + (1 - tau) * w, in place (Algorithms 1 and 2). Many have 1 - tau as tau."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)


class Agent:
    """DrQ-Rainbow with the paper's interventions: networks, optimizer, acting, Algorithm 1.

    `num_updates` is that of the whole run, over which PER's beta rises to 1; when to call reset()
    is the caller's matter. act() and update() have no .item(), and change tensors in place: a CUDA
    graph can replay them.
    """

    def __init__(
        self, num_actions: int, num_updates: int, args: Args, generator: Generator
    ) -> None:
        self.args, self.generator = args, generator
        self.num_actions, self.num_updates = num_actions, num_updates
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
        self.sam_parameters = list(scope.parameters())
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # made so far

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Greedy actions of the target network (Table 5), with the noise of the last update.

        uint8 [B, 4, 84, 84] -> int64 [B].
        """
        return self.target.q_values(self.target(to_images(obs))).argmax(1)

    @torch.no_grad()
    def td_target(self, batch: Batch, next_images: Tensor) -> Tensor:
        """Distribution of the n-step return, Eq. 1 with double Q for its max: [B, n_atoms]."""
        action = self.online.q_values(self.online(next_images)).argmax(1)
        next_probs = gather_action(self.target(next_images), action).exp()
        return project(next_probs, batch.n_step_return, batch.discount, self.target.support)

    def update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """One gradient update: Algorithm 1 from line 8 on. Returns scalars to log."""
        args, generator, online, target = self.args, self.generator, self.online, self.target

        # Line 8: a minibatch by priority, augmented. beta rises from per_beta to 1.
        beta = args.per_beta + (1 - args.per_beta) * self.updates / (self.num_updates - 1)
        batch, weights = replay.sample(args.batch_size, beta, generator)
        images = augment(batch.obs, args.aug_shift, args.aug_intensity, generator)
        next_images = augment(batch.next_obs, args.aug_shift, args.aug_intensity, generator)

        # Lines 11, then 9: double Q-learning reads the online network, too, so noise comes first.
        # The target's noise is Rainbow's, not in Algorithm 1; act() plays with it.
        online.sample_noise(generator)
        target.sample_noise(generator)
        td_target = self.td_target(batch, next_images)

        # Line 12: the gradient at w. With --sam-noise none, this pass alone has no noise.
        if args.sam_rho > 0 and args.sam_noise == "none":
            online.head.eval()
        self.optimizer.zero_grad()
        log_probs = online(images)
        td_errors = cross_entropy(log_probs, batch.action, td_target)  # [B]
        loss = (weights * td_errors).mean()
        loss.backward()
        online.head.train()

        # Lines 13 to 16: climb to w + rho * g / ||g||, take the gradient there, come back to w.
        if args.sam_rho > 0:
            with sam_perturbed(self.sam_parameters, args.sam_rho):
                if args.sam_noise == "independent":
                    online.sample_noise(generator)
                self.optimizer.zero_grad()
                sam_td_errors = cross_entropy(online(images), batch.action, td_target)
                (weights * sam_td_errors).mean().backward()

        # Line 17: the step from w.
        gradient_norm = nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        self.optimizer.step()

        # Line 18: the target network.
        soft_update(target, online, args.target_ema)

        # Priorities are of the first pass. The floor: 0 would take a transition out of the draw.
        priorities = (td_errors.detach() ** args.per_alpha).clamp(min=1e-8)
        replay.update_priorities(batch.index, priorities)
        self.updates.add_(1)
        q_values = online.q_values(log_probs.detach()).mean()
        return {"td_loss": loss.detach(), "q_values": q_values, "gradient_norm": gradient_norm}

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
    generators = {"torch": torch.manual_seed(args.seed)}  # weights drawn on the CPU, first actions
    for name in ("sampling", "metrics"):  # two: measuring must change nothing of what is learned
        seed = int(torch.randint(2**31, ()))
        generators[name] = Generator(args.device).manual_seed(seed)
    if args.device == "cuda":  # weights drawn on the GPU, at resets
        device = torch.cuda.current_device()  # starts CUDA: before, default_generators is empty
        generators["cuda"] = torch.cuda.default_generators[device]
    return generators


def make_agent(args: Args, generator: Generator) -> tuple[Agent, ReplayBuffer, Callable, Callable]:
    """The agent, its replay buffer, and update() and act() on it: on a GPU as CUDA graphs."""
    num_actions = int(make_envs(args.env_id, 1, args.seed).action_space.n)
    num_updates = (args.total_timesteps - args.learning_starts + 1) * args.replay_ratio
    agent = Agent(num_actions, num_updates, args, generator)
    capacity = min(args.buffer_size, args.total_timesteps)  # a short run needs no more
    replay = ReplayBuffer(capacity, args.n_step, args.gamma, generator.device)

    def update() -> dict[str, Tensor]:
        return agent.update(replay)

    def act() -> Tensor:
        return agent.act(replay.last_obs())

    if args.cuda_graph and args.device == "cuda":
        changed = [*agent.tensors().values(), replay.priorities, replay.max_priority]
        update = capture(update, changed, (generator,))
        act = capture(act, [])  # it changes nothing
    return agent, replay, update, act


# --- Evaluation -----------------------------------------------------------------------------------

# Returns of a random policy and of a human player (paper, Table 7, where the rows of PrivateEye,
# Qbert, RoadRunner and Seaquest are mixed up; with these, its mean scores come out).
# fmt: off
RANDOM_HUMAN = {
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
def evaluate(network: QNetwork, args: Args, video: list[np.ndarray] | None = None) -> list[float]:
    """Play --eval-episodes full games side by side; returns their returns, not clipped.

    Each environment plays one game: the first games to end, of many, would be the short ones. The
    network plays without noise, with --eval-epsilon random actions. It is a run's target network,
    which acts in training, too (the paper does not say which one plays). Environment i has the seed
    10,000 * (seed + 1) + i, training the seed itself.
    `video`, where given, takes the first game's frames, uint8 [84, 84].
    """
    network.head.eval()  # no noise
    first_seed = 10_000 * (args.seed + 1)
    envs = make_envs(args.env_id, args.eval_episodes, first_seed)
    rng = np.random.default_rng(first_seed)
    frames, info = envs.reset()
    stacks = np.zeros((args.eval_episodes, FRAME_STACK, 84, 84), np.uint8)
    stacks[:, -1] = frames[:, 0]
    lives, returns = info["lives"].copy(), np.zeros(args.eval_episodes)
    playing = np.arange(args.eval_episodes, dtype=np.int32)  # without the games that are over
    progress = tqdm(total=len(playing), desc="evaluation", unit="game", disable=None, leave=False)
    while len(playing) > 0:
        if video is not None and 0 in playing:
            video.append(stacks[0, -1].copy())
        obs = torch.from_numpy(stacks[playing]).to(network.support.device)
        actions = network.q_values(network(to_images(obs))).argmax(1).int().cpu().numpy()
        explore = rng.random(len(playing)) < args.eval_epsilon
        actions[explore] = rng.integers(envs.action_space.n, size=explore.sum())
        frames, rewards, terminated, truncated, info = envs.step(actions, playing)
        playing = info["env_id"]  # in the order of the answers
        returns[playing] += rewards
        # A loss that leaves 0 lives begins no new life, as in training.
        lost_life = (info["lives"] > 0) & (info["lives"] < lives[playing])
        lives[playing] = info["lives"]
        stacks[playing, :-1] = stacks[playing, 1:]
        stacks[playing[lost_life], :-1] = 0  # a new life begins with an empty stack, as in training
        stacks[playing, -1] = frames[:, 0]
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


def evaluate_saved(args: Args) -> None:
    """Play the model at --evaluate: the file's game, flags and seed.

    This command's device, threads, --eval-episodes and --eval-epsilon; with --capture-video, a GIF
    beside the file.
    """
    gif = Path(f"{args.evaluate}.gif")
    if args.capture_video and gif.exists() and not args.overwrite:
        sys.exit(f"error: {gif} exists; pass --overwrite to replace it")
    # The file's run may have been tracked; this command need not be.
    ours = ("device", "eval_episodes", "eval_epsilon", "track")
    try:
        model = torch.load(args.evaluate, map_location="cpu", weights_only=True)
        flags = {**model["args"], **{name: getattr(args, name) for name in ours}}
        saved = Args(**flags)
        network = QNetwork(model["num_actions"], saved)
        network.load_state_dict(model["target"])
    except OSError:
        raise
    except Exception as error:  # a foreign file can raise anything; weights_only runs no code
        kind = type(error).__name__
        sys.exit(f"error: {args.evaluate}: not a model that this script saved ({kind})")
    video = [] if args.capture_video else None
    returns = evaluate(network.to(args.device, memory_format=torch.channels_last), saved, video)
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


def plasticity_metrics(agent: Agent, replay: ReplayBuffer, generator: Generator) -> dict:
    """Active and dormant units on 512 transitions, sharpness on 32, drawn uniformly.

    Features are those of 1,024 transitions, or of as many as they are wide. Without noise,
    augmentation and importance weights.
    """
    online, target = agent.online, agent.target
    online.head.eval()
    target.head.eval()
    batch = replay.sample_uniform(512, generator)
    images = to_images(batch.obs)
    units = active_units(online, lambda: online(images))
    metrics = {f"active_units/{name}": share for name, share in units.items()}
    metrics |= dormant_ratios(unit_scores(online, lambda: online(images)))

    batch = Batch(*(entry[:32] for entry in batch))
    td_target = agent.td_target(batch, to_images(batch.next_obs))
    # Not online(images): its scaled backward pass gives a matrix that is no Hessian.
    log_probs = online.head(online.backbone(to_images(batch.obs)))
    loss = cross_entropy(log_probs, batch.action, td_target).mean()
    # Without noise, the loss does not depend on the sigmas.
    means = [w for name, w in online.named_parameters() if "sigma" not in name]
    metrics["hessian_max_eigenvalue"] = max_eigenvalue(loss, means, generator)

    # Features: what the advantage stream's hidden layer gives out.
    stream = online.head.advantage
    obs = replay.sample_uniform(max(1024, stream.output.weight_mu.shape[1]), generator).obs
    with torch.no_grad():
        hidden = stream.hidden(online.backbone(to_images(obs)))
        metrics |= feature_metrics(stream.activation(stream.norm(hidden)))
    # Initial weights: drawn from the seed as at the start of the run.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        make_generators(agent.args)
        initial = QNetwork(agent.num_actions, agent.args).to(obs.device)
    metrics |= weight_metrics(agent.parameters, list(initial.parameters()))
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
    """Where a run stands; its result.json will have all of it."""

    env_steps: int = 0
    gradient_updates: int = 0
    resets: int = 0
    training_seconds: float = 0.0  # of acting and learning
    wall_clock_seconds: float = 0.0  # of all, evaluations included
    resumed_at: list[int] = field(default_factory=list)  # steps after which it was continued
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
    """Write all that a run needs to go on but the emulator's state: it will begin a new episode."""
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


def start_logging(args: Args, run_dir: Path, counters: Counters, step: int) -> SummaryWriter:
    """TensorBoard after `step`, with --track W&B, too; an old run's files go with --overwrite."""
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
    writer = SummaryWriter(str(run_dir), purge_step=step + 1)
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
        model = {"args": asdict(args), "num_actions": agent.num_actions}
        model["target"] = agent.target.state_dict()
        write_atomically(run_dir / "model.pth", lambda file: torch.save(model, file))
    mean_return, python = float(np.mean(returns)), sys.version.split()[0]
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "env_id": args.env_id,
        "seed": args.seed, "args": asdict(args), **asdict(counters),
        "env_steps_per_second": counters.env_steps / counters.training_seconds,
        "updates_per_second": counters.gradient_updates / counters.training_seconds,
        "parameters": sum(w.numel() for w in agent.parameters),
        "episode_returns": returns, "mean_return": mean_return,
        "human_normalized_score": human_normalized_score(args.env_id, mean_return),
        "device": device_name(args),
        "versions": {"python": python, "torch": torch.__version__, "envpool": envpool.__version__},
    }
    # fmt: on
    content = json.dumps(result, indent=2).encode()
    write_atomically(run_dir / "result.json", lambda file: file.write(content))
    (run_dir / "checkpoint.pth").unlink(missing_ok=True)


def train(args: Args, run_dir: Path) -> None:
    """A run from its seed, or from its checkpoint, to result.json."""
    checkpoint_path = run_dir / "checkpoint.pth"
    generators = make_generators(args)
    agent, replay, update, act = make_agent(args, generators["sampling"])
    tensors = {**agent.tensors(), **replay.tensors()}
    counters = Counters()
    if checkpoint_path.exists() and not args.overwrite:
        counters = load_checkpoint(checkpoint_path, args, generators, tensors)
        counters.resumed_at.append(counters.env_steps)
    counters.git_commits.append(git_commit())
    # The emulator's state is not in a checkpoint: a continued run begins a new episode, with a seed
    # above any --seed and any evaluation's, and below EnvPool's limit of 31 bits.
    offset = (2_100_000_000 + counters.env_steps % 40_000_000) if counters.env_steps > 0 else 0
    envs = make_envs(args.env_id, 1, args.seed + offset)
    frames, info = envs.reset()
    replay.start(frames[0, 0])
    lives, episode_return, episode_length = info["lives"][0], 0.0, 0

    writer = start_logging(args, run_dir, counters, counters.env_steps)
    size = f"{sum(w.numel() for w in agent.parameters):,} parameters"
    size += f", {agent.num_updates:,} updates, on {device_name(args)}"
    print(f"{run_dir}: {size}, from step {counters.env_steps}", file=sys.stderr)
    start_time = time.perf_counter() - counters.wall_clock_seconds
    checkpoint_time = time.perf_counter()
    stop_signals = catch_stop_signals()
    losses: dict[str, Tensor] = {}
    steps = range(counters.env_steps + 1, args.total_timesteps + 1)
    # With disable=None there is no bar where there is no terminal.
    progress = tqdm(steps, args.env_id, args.total_timesteps, initial=steps.start - 1, disable=None)
    for step in progress:
        counters.env_steps = step
        step_start = time.perf_counter()
        last = step == args.total_timesteps

        # Act: lines 4 to 6 of Algorithm 1
        if step <= args.learning_starts:
            action = int(torch.randint(agent.num_actions, ()))
        else:
            action = int(act())  # waits for the device
        frames, rewards, terminated, truncated, info = envs.step(np.array([action], np.int32))
        # With 0 lives a game may go on (BankHeist's last life is number 0): the loss that leaves 0
        # ends no return, as in the authors' release.
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

        # Learn: line 7
        if step >= args.learning_starts:
            for _ in range(args.replay_ratio):
                losses = update()
                counters.gradient_updates += 1
                # Not on the last step: the evaluation would be of a fresh head.
                if due(args.reset_interval, counters.gradient_updates) and not last:
                    check_finite(losses, step)  # before a fresh head hides a nan
                    agent.reset()
                    counters.resets += 1
        counters.training_seconds += time.perf_counter() - step_start

        # Log
        if step >= args.learning_starts and (due(args.log_interval, step) or last):
            check_finite(losses, step)
            for name, value in losses.items():
                writer.add_scalar(f"losses/{name}", value, step)
            writer.add_scalar("charts/resets", counters.resets, step)
            writer.add_scalar("charts/SPS", step / counters.training_seconds, step)
        if step >= args.learning_starts and due(args.metrics_interval, step):
            check_finite(losses, step)
            for name, value in plasticity_metrics(agent, replay, generators["metrics"]).items():
                writer.add_scalar(f"plasticity/{name}", value, step)
        if due(args.eval_interval, step) and not last:
            check_finite(losses, step)
            writer.add_scalar("eval/mean_return", np.mean(evaluate(agent.target, args)), step)

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
    returns = evaluate(agent.target, args, video)
    counters.wall_clock_seconds = time.perf_counter() - start_time
    finish(args, run_dir, counters, agent, returns, video)
    # Last: a run that is killed before it has a result evaluates again, and this is logged once.
    writer.add_scalar("eval/mean_return", np.mean(returns), args.total_timesteps)
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
