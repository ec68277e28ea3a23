# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "envpool==1.2.5", "gymnasium==1.4.0",
#     "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
r"""SAM and Reset† on a frozen, pretrained encoder (SimTPR), fine-tuned on Atari-100k; and its pretraining; in one file.

Paper: "Improving Input and Label Plasticity for Sample Efficient Reinforcement Learning" (NeurIPS 2023), section 4.4,
Table 3. The encoder and its pretraining are those of SimTPR (Lee et al., 2023), the head and the rest those of
plastic_drq_rainbow_atari.py.

    python plastic_pretrained_finetune.py --mode pretrain --env-id Pong                 # on video recorded here
    python plastic_pretrained_finetune.py --env-id Pong --pretrained-path runs/Pong__pretrain__1/model.pth     # base
    python plastic_pretrained_finetune.py --env-id Pong --pretrained-path runs/Pong__pretrain__1/model.pth \
        --exp-name sam_reset --sam-rho 0.1 --reset-interval 40000                       # SAM and Reset†

Where it departs from the paper (README.md has the whole table):
- The paper takes SimTPR's published encoder; here it is one that --mode pretrain made, on random play where no video is
  given, or a published one.                                                           --pretrained-path
- Reset† pulls the frozen encoder towards fresh weights, as the paper's text has it, and nothing trains it back; pulled
  towards its pretrained weights, a frozen one stays as it is.                         --shrink-perturb-anchor
"""

import copy
import difflib
import fcntl
import gzip
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, Literal, NamedTuple, NoReturn
from zipfile import ZipFile, is_zipfile

import envpool
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from envpool.atari.registration import atari_game_list
from PIL import Image
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FRAME_STACK = 4
GAMES = {"".join(word.capitalize() for word in game.split("_")) for game in atari_game_list}
MAX_SKIPPED_IN_A_ROW = 100  # updates with a non-finite gradient, after which a run gives up
CHECKPOINT_VERSION = 1  # to be raised when what a checkpoint holds changes
RECORDED = ("observation_1_0.gz", "terminal_1_0.gz")  # videos of our own
BLOCK_FRAMES = 20_000  # of a video in memory at a time: 141 MB


@dataclass
class Args:
    """SAM and Reset† on a frozen SimTPR encoder for Atari-100k, and SimTPR's pretraining."""

    # fmt: off
    # Run
    mode: Literal["finetune", "pretrain"] = "finetune"  # what to do
    env_id: str = "Alien"  # Atari game, by EnvPool's name without the version
    seed: int = 1  # seed of the networks, the exploration, the sampling and the environment
    exp_name: Literal["auto"] | str = "auto"  # name of this setting, part of the run's directory (auto = the mode)
    run_dir: Path = Path("runs")  # where run directories are made: <run-dir>/<env-id>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = CUDA where there is one
    cuda_graph: bool = True  # run the update and the choice of an action as CUDA graphs (without effect on the CPU)
    torch_threads: int = 0  # PyTorch's CPU threads (0 = its own choice, at most 8)
    resume: bool = False  # continue an unfinished run, start where there is none, leave a finished one as it is
    checkpoint_interval: Literal["auto"] | int = "auto"  # interactions (or blocks) between (auto = 5 minutes, 0 = off)
    overwrite: bool = False  # replace a run of the same name, finished or not

    # Encoder
    pretrained_path: Path | None = None  # weights in SimTPR's published layout
    from_scratch: bool = False  # an encoder without pretrained weights
    freeze_backbone: bool = True  # train the head alone

    # Pretraining
    video_dir: Path | None = None  # the DQN Replay dataset's files of the game (none = record --collect-steps)
    collect_steps: int = 100_000  # frames to record
    collect_policy: Literal["random", "checkpoint"] = "random"  # who plays; checkpoint = --collect-model
    collect_model: Path | None = None  # a model that plastic_drq_rainbow_atari.py saved
    pretrain_epochs: int = 10  # passes over the videos
    pretrain_batch_size: int = 64  # sequences per update
    pretrain_length: int = 11  # stacks of frames per sequence
    pretrain_learning_rate: float = 3e-4  # of AdamW
    barlow_weight: float = 0.01  # weight of the Barlow Twins loss

    # Fine-tuning (Table 5, but for the learning rate)
    total_timesteps: int = 100_000  # interactions; one is 4 frames
    replay_ratio: int = 2  # gradient updates per interaction
    batch_size: int = 32  # transitions per update
    learning_starts: int = 2_000  # interactions with random actions, before the first update
    learning_rate: float = 3e-5  # of Adam
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
    layer_norm: bool = False  # LayerNorm in the head's hidden layers
    layer_norm_scope: Literal["all"] = "all"  # as in plastic_drq_rainbow_atari.py; the encoder has BatchNorm
    crelu: bool = False  # concatenated ReLU in the head
    sam_rho: float = 0.0  # radius of the SAM perturbation (0 = off)
    # noise in SAM's second pass: fresh, or reused from the first; none = a first pass without noise
    sam_noise: Literal["independent", "reused", "none"] = "independent"
    reset_interval: int = 0  # gradient updates between resets of the head (0 = off)
    shrink_perturb_alpha: float = 0.6  # share of the encoder's weights kept at a reset (1 = off)
    shrink_perturb_anchor: Literal["init", "pretrained"] = "init"  # what takes the rest: fresh or the first weights

    # Evaluation, metrics, logging
    eval_episodes: int = 100  # full games of an evaluation
    eval_epsilon: float = 0.001  # share of random actions in an evaluation
    eval_interval: int = 0  # interactions between evaluations (0 = only at the end)
    metrics_interval: int = 0  # interactions between plasticity metrics (0 = off)
    log_interval: int = 500  # interactions between logged losses
    capture_video: bool = False  # save the first game of the last evaluation as a GIF
    save_model: bool = False  # save the target network at the end
    evaluate: Path | None = None  # a saved model: play its game with its seed, train nothing
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "plastic"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases
    # fmt: on


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


# --- Networks -------------------------------------------------------------------------------------


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
        # mu + sigma * outer(noise_out, noise_in), where addcmul(a, b, c) is a + b * c. A second
        # matrix product for the noise would take longer on the CPU.
        noisy_sigma = self.weight_sigma * self.noise_in
        weight = torch.addcmul(self.weight_mu, noisy_sigma, self.noise_out[:, None])
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


class ResidualConv(nn.Conv2d):
    """Convolution of a residual block, with weights so small that the blocks' sum stays small (Zhang et al., 2019).

    They are normal with standard deviation scale * sqrt(2 / (outputs * kernel area)).
    """

    scale = 12**-0.25  # SimTPR's

    def reset_parameters(self) -> None:
        """Fresh parameters, in place."""
        super().reset_parameters()  # the bias, as PyTorch has it
        nn.init.normal_(
            self.weight,
            std=self.scale * math.sqrt(2 / (len(self.weight) * self.weight[0, 0].numel())),
        )


class DownConv(ResidualConv):
    """The strided convolution beside a residual block."""

    scale = 1.0


class ZeroBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose scale starts at 0, so that its block starts as the identity."""

    def reset_parameters(self) -> None:
        """Fresh parameters, in place."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class InvertedResidual(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution; beside them the identity or, where strided, a convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * in_channels
        self.down = (
            DownConv(in_channels, out_channels, stride, stride) if stride > 1 else nn.Identity()
        )
        self.layers = nn.Sequential(
            ResidualConv(in_channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(),
            ResidualConv(hidden, hidden, 3, stride, padding=1, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU(),
            ResidualConv(hidden, out_channels, 1), ZeroBatchNorm(out_channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.layers(x)


class Backbone(nn.Module):
    """SimTPR's encoder, 30 convolutions, with the published keys: images [B, 4, 84, 84] -> features [B, 3136]."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        in_channels = FRAME_STACK
        for channels, stride in ((32, 3), (64, 2), (64, 2)):
            blocks.append(InvertedResidual(in_channels, channels, stride))
            blocks += [InvertedResidual(channels, channels, 1) for _ in range(2)]
            in_channels = channels
        self.layers = nn.Sequential(*blocks, nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class QNetwork(nn.Module):
    """Rainbow's head (appendix A.3) on an encoder whose BatchNorm, if it has any, keeps its statistics."""

    def __init__(self, backbone: nn.Module, num_actions: int, args: Args) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.head = DuelingHead(3136, num_actions, args)
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms))

    def q_values(self, log_probs: Tensor) -> Tensor:
        """Means of the return distributions: [..., n_atoms] -> [...]."""
        return (log_probs.exp() * self.support).sum(
            -1
        )  # not a matrix product: TF32 would round the support

    def sample_noise(self, generator: Generator) -> None:
        """Draw new noise in every noisy layer."""
        for module in self.modules():
            if isinstance(module, NoisyLinear):
                module.sample_noise(generator)

    def forward(self, images: Tensor) -> Tensor:
        """In [0, 1] [B, 4, 84, 84] -> log-probabilities of the returns, [B, num_actions, n_atoms].

        Features [B, 3136] of images do as well. Both streams feed the backbone, so its gradient is
        scaled by 1/sqrt(2) (Wang et al., 2016): lerp(x, x) is x, but only its second end passes a
        gradient on.
        """
        features = self.backbone(images) if images.dim() == 4 else images
        return self.head(torch.lerp(features.detach(), features, 2**-0.5))


# --- Pretraining ----------------------------------------------------------------------------------


class SimTPR(nn.Module):
    """Encoder, projector, causal transformer and predictor: from a video's past, the next frame's projection."""

    def __init__(self, width: int = 512, layers: int = 2, heads: int = 8) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.projector = nn.Sequential(nn.Linear(3136, width), nn.ReLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.predictor = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Stacks in [0, 1] [N, T, 4, 84, 84] -> projections [N, T, D], and predictions of the T - 1 later ones."""
        num, length = images.shape[:2]
        projections = self.projector(self.backbone(images.flatten(0, 1))).unflatten(
            0, (num, length)
        )
        past = projections[:, :-1] + positions(length - 1, projections.shape[-1], images.device)
        mask = nn.Transformer.generate_square_subsequent_mask(length - 1, device=images.device)
        context = self.transformer(past, mask=mask, is_causal=True)
        return projections, self.predictor(context.flatten(0, 1)).unflatten(0, (num, length - 1))


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions (Vaswani et al., 2017, section 3.5): [length, width]."""
    frequencies = 10_000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def prediction_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """2 - 2 cos(prediction, projection), the mean; the projections take no gradient: [N, T - 1, D], [N, T, D]."""
    return (2 - 2 * F.cosine_similarity(predictions, projections[:, 1:].detach(), dim=-1)).mean()


def barlow_loss(one: Tensor, other: Tensor, off_diagonal_weight: float = 0.005) -> Tensor:
    """Barlow Twins (Zbontar et al., 2021) between two views' projections, normalised: [N, T, D] twice -> scalar."""

    def standardise(z: Tensor) -> Tensor:
        z = F.normalize(z.flatten(0, 1), dim=1)
        return (z - z.mean(0)) / (z.std(0, correction=0) + 1e-6)

    correlation = standardise(one).T @ standardise(other) / one[..., 0].numel()
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + off_diagonal_weight * off_diagonal


def pretraining_loss(network: SimTPR, frames: Tensor, args: Args, generator: Generator) -> Tensor:
    """SimTPR's loss of videos, uint8 [N, T + 3, 84, 84]: two views, each predicting the other's next projection."""
    views = []
    for _ in range(2):
        images = augment(
            frames, args.aug_shift, args.aug_intensity, generator
        )  # one draw per video
        views.append(network(images.unfold(1, FRAME_STACK, 1).permute(0, 1, 4, 2, 3)))
    (one, from_one), (other, from_other) = views
    prediction = (prediction_loss(from_one, other) + prediction_loss(from_other, one)) / 2
    return prediction + args.barlow_weight * barlow_loss(one, other)


def pretrain_update(
    network: SimTPR, optimizer: torch.optim.AdamW, frames: Tensor, args: Args, generator: Generator
) -> Tensor:
    """One gradient update on videos, uint8 [N, T + 3, 84, 84]; returns the loss."""
    loss = pretraining_loss(network, frames, args, generator)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 0.5)
    optimizer.step()
    return loss.detach()


# --- Videos ---------------------------------------------------------------------------------------


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Whatever is wrong with this file of a video ends the script with one line."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about headers of Python 2
            yield
    except EOFError:
        fail(f"{path}: ends too early", 1)
    except Exception as error:  # such a file can raise anything
        problem = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"{error or repr(error)}"
        )
        fail(f"{path}: {problem[:300]}", 1)


def open_array(path: Path, frame_shape: tuple[int, ...]) -> tuple[BinaryIO, int]:
    """A gzip file of bytes [n, *frame_shape] that numpy.save wrote: the stream past its header, and n."""
    with errors_of(path):
        if not path.is_file():
            raise ValueError("no file" if path.exists() else "No such file or directory")
        file = gzip.open(path, "rb")  # noqa: SIM115
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not in version 1.0 of numpy's format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran_order:
            raise ValueError("in Fortran's order")
        types = (np.uint8,) if frame_shape else (np.uint8, np.bool_)
        if shape[1:] != frame_shape or min(shape, default=-1) < 0 or dtype not in types:
            raise ValueError(
                f"holds {dtype} {list(shape)}, not uint8 {['n', *frame_shape]}".replace("'", "")
            )
    return file, shape[0]


def video_files(directory: Path) -> list[tuple[Path, Path]]:
    """(observations, terminals) of each checkpoint: observation_<run>_<n>.gz, or $store$_observation_ckpt.<n>.gz."""
    pattern = r"observation_\d+_\d+\.gz|\$store\$_observation_ckpt\.\d+\.gz"
    observations = sorted(path for path in directory.iterdir() if re.fullmatch(pattern, path.name))
    return [
        (path, path.with_name(path.name.replace("observation", "terminal")))
        for path in observations
    ]


def count_frames(files: list[tuple[Path, Path]]) -> int:
    """Number of frames in all files, by their headers; ends with one line where a file is not what it should be."""
    total = 0
    for observations, terminals in files:
        (file, num), (other_file, other_num) = (
            open_array(observations, (84, 84)),
            open_array(terminals, ()),
        )
        with file, other_file:
            if num != other_num:
                fail(f"{terminals}: holds {other_num} values, and its other half {num} frames", 1)
        total += num
    return total


def read_bytes(file: BinaryIO, path: Path, count: int) -> np.ndarray:
    """The next `count` bytes, uint8 [count]."""
    with errors_of(path):
        content = file.read(count)
        if len(content) < count:
            raise EOFError
    return np.frombuffer(content, np.uint8)


def read_file(paths: tuple[Path, Path], block: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of frames uint8 [n, 84, 84] and terminals bool [n], n <= block, of one file; a block's last is terminal.

    Ends with one line that names the file where one is damaged or ends too early.
    """
    (frames, num), (terminals, _) = open_array(paths[0], (84, 84)), open_array(paths[1], ())
    with frames, terminals:
        for start in range(0, num, block):
            count = min(block, num - start)
            pixels = read_bytes(frames, paths[0], count * 84 * 84).reshape(count, 84, 84)
            ends = read_bytes(terminals, paths[1], count) != 0
            ends[-1] = True  # what comes next in memory is another file's
            yield pixels, ends
        for path, file in zip(paths, (frames, terminals), strict=True):
            with errors_of(path):
                if file.read(1):  # at its end, gzip checks the checksum
                    raise ValueError("goes on after what its header says")


def read_videos(
    files: list[tuple[Path, Path]], block: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of at most `block` frames, uint8 [n, 84, 84], and terminals, bool [n]; each takes some of every file.

    So no file's frames are the last ones that the network and its BatchNorm see.
    """
    for pieces in zip_longest(*(read_file(paths, max(block // len(files), 1)) for paths in files)):
        frames, ends = zip(*filter(None, pieces), strict=True)
        yield np.concatenate(frames), np.concatenate(ends)


def draw_videos(
    frames: np.ndarray, terminals: np.ndarray, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Starts of as many videos of `length` frames as the frames make, at random, none across an episode's end."""
    ends = np.concatenate([[0], np.cumsum(terminals)])
    starts = np.arange(max(len(frames) - length + 1, 0))
    inside = starts[
        ends[starts + length - 1] == ends[starts]
    ]  # the last frame may be an episode's last
    return rng.permutation(inside)[: len(frames) // length] if len(inside) else inside


class PixelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at each pixel: [B, C, H, W] -> [B, C, H, W] (section 4.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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


def load_player(path: Path, env_id: str) -> QNetwork:
    """The network of a model that plastic_drq_rainbow_atari.py saved."""
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about foreign files, which get a line of their own below
            if ZipFile(path).testzip() is not None:  # torch.load checks no checksums
                raise ValueError
            model = torch.load(path, map_location="cpu", weights_only=True)
        args = SimpleNamespace(**model["args"])
        player = QNetwork(make_backbone(args), int(make_envs(env_id, 1, 0).action_space.n), args)
        player.load_state_dict(model["target"])
        if args.env_id != env_id or not all(
            w.isfinite().all() for w in player.state_dict().values()
        ):
            raise ValueError
    except OSError as error:
        fail(f"--collect-model {str(path)!r}: {error.strerror or error}", 1)
    except Exception as error:  # such a file can raise anything
        if out_of_memory(error):
            raise
        what = "not a model of this game by plastic_drq_rainbow_atari.py, with CReLU in the head at most"
        fail(f"--collect-model {str(path)!r}: {what}", 1)
    player.head.eval()  # no noise
    return player.requires_grad_(False)


def record(directory: Path, player: QNetwork | None, args: Args) -> None:
    """Play --collect-steps frames and write them as the DQN Replay dataset has them.

    Random play, or that of a given network with 1% random actions, which has its lives and stacks as in an evaluation.
    """
    envs, rng = make_envs(args.env_id, 1, args.seed), np.random.default_rng(args.seed)
    num_actions = int(envs.action_space.n)
    shapes = ((args.collect_steps, 84, 84), (args.collect_steps,))
    temporaries = [directory / f"{name}.tmp" for name in RECORDED]
    try:
        with (
            gzip.open(temporaries[0], "wb", compresslevel=1) as pixels,
            gzip.open(temporaries[1], "wb") as terminals,
        ):
            for file, shape in zip((pixels, terminals), shapes, strict=True):
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
            frames, info = envs.reset()
            stack, lives = np.zeros((1, FRAME_STACK, 84, 84), np.uint8), info["lives"][0]
            for _ in tqdm(range(args.collect_steps), desc="recording", unit="frame", disable=None):
                stack = np.concatenate([stack[:, 1:], frames], axis=1)
                action = int(rng.integers(num_actions))
                if player is not None and rng.random() >= 0.01:
                    action = int(
                        player.q_values(player(to_images(torch.from_numpy(stack)))).argmax()
                    )
                pixels.write(frames.tobytes())
                frames, _, terminated, truncated, info = envs.step(
                    np.array([action], dtype=np.int32)
                )
                over = bool(terminated[0] or truncated[0])
                terminals.write(bytes([over]))
                if over:
                    frames, info = envs.reset()
                if over or 0 < info["lives"][0] < lives:
                    stack[:] = 0
                lives = info["lives"][0]
        for path, name in zip(temporaries, RECORDED, strict=True):
            os.replace(path, directory / name)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory / RECORDED[0])) from None
    finally:
        for path in temporaries:
            path.unlink(missing_ok=True)


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
        # The same, for a CUDA graph and for a checkpoint.
        self.cursor_tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self.pending = 0  # newest transitions of this life whose n-step window is not complete

    def start(self, frame: np.ndarray) -> None:
        """Begin with an episode's first frame, uint8 [84, 84]: at the start of every process.

        In a continued run, whose tensors come from a checkpoint, the life that was cut off ends
        here. Nothing completes the windows of its newest transitions: they are never sampled.
        """
        self.cursor, self.pending = int(self.cursor_tensor), 0
        if not self.dones[self.cursor - 1]:  # an empty buffer is all done
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
        # The new frame has cut the stacks of the next three slots: the third one now goes, too.
        self.priorities[(self.cursor + FRAME_STACK - 1) % self.slots] = 0.0

    def stack(self, index: Tensor) -> Tensor:
        """The frames up to slots `index` [B], oldest first: uint8 [B, 4, 84, 84].

        Frames from before the current life are zeros.
        """
        slots = (index[:, None] + self.history) % self.slots
        # Only what came after the last done is seen: dones 0, 1, 0 of the older three give 0, 0, 1,
        # a product from right to left.
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
            next_obs=self.stack((index + self.n_step) % self.slots),
        )

    def sample(self, batch_size: int, beta: Tensor, generator: Generator) -> tuple[Batch, Tensor]:
        """A batch drawn by priority, one transition from each of batch_size strata; its weights.

        The importance weights, float32 [B], are (1 / (N p)) ** beta over the largest of them, so
        that N and the sum of all priorities cancel (Schaul et al., 2016, appendix B.2.1).
        """
        device = self.priorities.device
        # Priorities 1, 0, 3 add up to 1, 1, 4: a draw of 0.9 falls on slot 0, one of 1.0 on slot 2.
        cumulative = self.priorities.cumsum(0, dtype=torch.float64)
        # In float64 a float32 draw stays below 1, and so below the last slot with a priority.
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
        """Set the priorities [B] of slots `index` [B]; new transitions get the largest ever set.

        Of a slot that is there twice, with two augmentations, either priority may stay.
        """
        self.priorities[index] = priorities
        torch.maximum(self.max_priority, priorities.max(), out=self.max_priority)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        items = vars(self).items()
        return {f"replay.{name}": value for name, value in items if torch.is_tensor(value)}


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
def shrink_towards(anchor: list[Tensor], networks: tuple[nn.Module, ...], alpha: float) -> None:
    """Encoder w <- alpha * w + (1 - alpha) * phi, phi the anchor, in all networks alike; in place (section 4.3)."""
    for network in networks:
        for w, phi in zip(network.backbone.parameters(), anchor, strict=True):
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
    """Eq. 1's TD error for distributions: [B, num_actions, N], [B], [B, N] -> [B]."""
    return -(td_target * gather_action(log_probs, action)).sum(1)


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """w- <- tau * w- + (1 - tau) * w, in place (Algorithms 1 and 2); others call 1 - tau tau."""
    for w_target, w in zip(target.parameters(), online.parameters(), strict=True):
        w_target.lerp_(w, 1 - tau)


class Agent:
    """DrQ-Rainbow on a given encoder: networks, optimizer, acting and Algorithm 1's update, Reset†.

    A frozen encoder has no gradient and no optimizer state; it gives its features once per update, for all passes.

    `num_updates` is that of the whole run, over which PER's beta rises to 1. Nothing here waits for the device.
    `counts`, on the device: updates, skipped updates, skipped in a row, longest such row.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_actions: int,
        num_updates: int,
        args: Args,
        generator: Generator,
    ) -> None:
        self.args, self.num_updates, self.generator = args, num_updates, generator
        device = generator.device
        self.online = QNetwork(backbone, num_actions, args).to(
            device, memory_format=torch.channels_last
        )
        self.online.backbone.requires_grad_(not args.freeze_backbone)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.pretrained = [w.detach().clone() for w in self.online.backbone.parameters()]
        self.parameters = [w for w in self.online.parameters() if w.requires_grad]
        capturable = device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=args.learning_rate,
            eps=args.adam_eps,
            fused=True,
            capturable=capturable,
        )
        # The hook of PyTorch's GradScaler: where this is 1, fused Adam leaves weights, moments and step alone, and
        # no host sync is needed to know it.
        self.optimizer.found_inf = torch.zeros((), device=device)
        # Adam makes its state in its first step: take one with a zero gradient here, outside of any CUDA graph.
        for w in self.parameters:
            w.grad = torch.zeros_like(w)
        self.optimizer.step()
        reset_optimizer(self.optimizer)
        self.sam_backup = [torch.empty_like(w) for w in self.parameters] if args.sam_rho > 0 else []
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

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

    def update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """One gradient update: Algorithm 1 from line 8 on. Returns scalars to log."""
        args, generator, online, target = self.args, self.generator, self.online, self.target
        beta = args.per_beta + (1 - args.per_beta) * self.counts[0] / max(self.num_updates - 1, 1)
        batch, weights = replay.sample(args.batch_size, beta, generator)
        images = augment(batch.obs, args.aug_shift, args.aug_intensity, generator)
        next_images = augment(batch.next_obs, args.aug_shift, args.aug_intensity, generator)
        if args.freeze_backbone:  # the features take the images' place
            with torch.no_grad():
                images, next_images = online.backbone(torch.cat([images, next_images])).chunk(2)
        online.sample_noise(generator)
        target.sample_noise(generator)
        td_target = self.td_target(batch, next_images)

        if args.sam_rho > 0 and args.sam_noise == "none":
            online.head.eval()  # no noise in this pass
        self.optimizer.zero_grad()
        log_probs = online(images)
        losses = cross_entropy(log_probs, batch.action, td_target)  # [B]
        loss = (weights * losses).mean()
        loss.backward()
        online.head.train()
        if args.sam_rho > 0:  # the gradient to apply is that at w + rho * g / ||g||
            with sam_perturbed(self.parameters, self.sam_backup, args.sam_rho):
                if args.sam_noise == "independent":
                    online.sample_noise(generator)
                self.optimizer.zero_grad()
                sam_losses = cross_entropy(online(images), batch.action, td_target)
                (weights * sam_losses).mean().backward()

        grad_norm = nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm)
        applied = grad_norm.isfinite()
        self.optimizer.found_inf.copy_(~applied)
        self.optimizer.step()
        soft_update(target, online, 1 - (1 - args.target_ema) * applied)
        # Priorities come from the first pass. The floor: 0 would mark a perfectly fitted transition as unsampleable.
        priorities = (losses.detach() ** args.per_alpha).clamp(min=1e-8)
        replay.update_priorities(
            batch.index, torch.where(applied, priorities, replay.priorities[batch.index])
        )
        self.count(skipped=~applied)
        q_values = online.q_values(log_probs.detach()).mean()
        return {"td_loss": loss.detach(), "q_values": q_values, "gradient_norm": grad_norm}

    def count(self, skipped: Tensor) -> None:
        """Count one update."""
        updates, skips, in_a_row, longest = self.counts
        in_a_row = (in_a_row + 1) * skipped
        self.counts.copy_(
            torch.stack([updates + 1, skips + skipped, in_a_row, torch.maximum(longest, in_a_row)])
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that update() and reset() change in place, but for generator and priorities; and the reset's anchor."""
        tensors = {"counts": self.counts}
        for name, network in (("online", self.online), ("target", self.target)):
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        tensors |= {f"pretrained.{i}": w for i, w in enumerate(self.pretrained)}
        for i, state in enumerate(self.optimizer.state.values()):
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        return tensors

    def reset(self) -> None:
        """Reset†: a new head, and the encoder pulled towards its anchor."""
        reset_head(self.online, self.target, self.optimizer)
        if self.args.shrink_perturb_alpha < 1:
            anchor = self.pretrained
            if self.args.shrink_perturb_anchor == "init":
                anchor = [w.detach().to(self.generator.device) for w in Backbone().parameters()]
            shrink_towards(anchor, (self.online, self.target), self.args.shrink_perturb_alpha)


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


@torch.no_grad()
def evaluate(network: QNetwork, args: Args, video: list[np.ndarray] | None = None) -> list[float]:
    """Play --eval-episodes full games side by side; returns their returns, not clipped.

    Each environment plays one game: of many environments, the first games to end are the short
    ones. The network (in the paper, the target network) plays without noise, with --eval-epsilon
    random actions. Environment i has the seed 10,000 * (seed + 1) + i, training the seed itself.
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
        # Some games are played on for a while with no life left: that is no new life.
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


def plasticity_metrics(
    agent: Agent, replay: ReplayBuffer, generator: Generator
) -> dict[str, float]:
    """Active units on 512 transitions and sharpness on 32, drawn uniformly; no noise, no augmentation, unit weights."""
    batch = replay.sample_uniform(512, generator)
    networks = (agent.online, agent.target)
    for network in networks:
        network.head.eval()  # no noise
    units = active_units(agent.online, lambda: agent.online(to_images(batch.obs)))
    metrics = {f"active_units/{name}": share for name, share in units.items()}
    batch = Batch(*(entry[:32] for entry in batch))
    td_target = agent.td_target(batch, to_images(batch.next_obs))
    # Past the network's forward(): its scaled gradient is not the loss's, and its Jacobian not symmetric.
    log_probs = agent.online.head(agent.online.backbone(to_images(batch.obs)))
    means = [
        w for name, w in agent.online.named_parameters() if "sigma" not in name and w.requires_grad
    ]  # the sigmas are idle
    metrics["hessian_max_eigenvalue"] = max_eigenvalue(
        cross_entropy(log_probs, batch.action, td_target).mean(), means, generator
    )
    for network in networks:
        network.head.train()
    return metrics


# --- Checkpoint -----------------------------------------------------------------------------------

# Flags that may differ when a run is continued; --total-timesteps may grow.
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

    step: int = 0  # interactions, or blocks of video
    updates: int = 0
    resets: int = 0
    nonfinite_rewards: int = 0  # taken as 0
    frames: int = 0  # of the videos, in pretraining
    loss: float = 0.0  # of pretraining, over the last block
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
    path: Path, flags: dict, counters: Counters, generators: dict, tensors: dict[str, Tensor]
) -> None:
    """Write all that a run needs to go on, but for the emulator. `generators` are Generators by name."""
    checkpoint = {
        "script": Path(__file__).name,
        "version": CHECKPOINT_VERSION,
        "args": flags,
        "counters": asdict(counters),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "tensors": tensors,
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


def load_checkpoint(path: Path, flags: dict, generators: dict, own: dict[str, Tensor]) -> Counters:
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
        saved = dict(checkpoint["args"])
        if flags["total_timesteps"] > saved["total_timesteps"]:
            saved["total_timesteps"] = flags["total_timesteps"]
        compare_flags(flags, saved, path)
        tensors = checkpoint["tensors"]
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
        last = flags["total_timesteps"] if flags["mode"] == "finetune" else MANY
        if not 0 < counters.step <= last or len(counters.resumed_at) > counters.step:
            raise ValueError
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name, generator in generators.items():
            if name == "torch" or saved["device"] == flags["device"]:
                generator.set_state(checkpoint["generators"][name])
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


def load_pretrained(path: Path) -> dict[str, Tensor]:
    """State of a Backbone from a file in SimTPR's published layout; ends with one line that names all that is wrong."""
    where = f"--pretrained-path {str(path)!r}"
    ours = Backbone().eval()
    shapes = {name: tuple(w.shape) for name, w in ours.state_dict().items()}
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about foreign files, which get a line of their own below
            if (
                is_zipfile(path) and ZipFile(path).testzip() is not None
            ):  # torch.load checks no checksums
                raise ValueError
            model = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        state = {
            name.removeprefix("backbone."): w
            for name, w in model.items()
            if name.startswith("backbone.")
        }
        wrong = [f"missing {name}" for name in shapes if name not in state]
        wrong += [f"extra {name!r:.80}" for name in state if name not in shapes]
        for name, w in state.items():
            if name in shapes and tuple(w.shape) != shapes[name]:
                wrong.append(f"{name} is {tuple(w.shape)}, not {shapes[name]}")
            elif not w.is_floating_point() and not name.endswith("num_batches_tracked"):
                wrong.append(f"{name} is {w.dtype}".replace("torch.", ""))
        if not wrong:
            ours.load_state_dict(state)
            values = [*ours.state_dict().values(), ours(torch.ones(1, FRAME_STACK, 84, 84))]
            wrong = (
                []
                if all(w.isfinite().all() for w in values)
                else ["weights or features are not finite"]
            )
    except OSError as error:
        fail(f"{where}: {error.strerror or error}", 1)
    except Exception:  # such a file can raise anything
        fail(f"{where}: not a file of weights with a model_state_dict", 1)
    if wrong:
        fail(f"{where}: not SimTPR's encoder: {'; '.join(wrong[:200])}", 1)
    return ours.state_dict()


# --- Run ------------------------------------------------------------------------------------------

# fmt: off
RANDOM_HUMAN = {  # returns of a random policy and of a human player (paper, Table 7)
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5), "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8), "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
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


# fmt: off
MANY = 10**9  # upper end of what has no other
RANGES = {  # of the flags, both ends included
    "seed": (0, 200_000), "total_timesteps": (1, MANY), "replay_ratio": (1, MANY), "batch_size": (1, 65_536),
    "learning_starts": (1, MANY), "learning_rate": (1e-12, MANY), "adam_eps": (1e-12, MANY),
    "max_grad_norm": (1e-12, MANY), "gamma": (0, 1), "n_step": (1, MANY), "n_atoms": (2, 100_000),
    "v_min": (-MANY, MANY), "v_max": (-MANY, MANY), "hidden_dim": (1, 1_000_000), "noisy_std": (0, MANY),
    "buffer_size": (1, MANY), "per_alpha": (0, 2), "per_beta": (0, 1), "target_ema": (0, 1), "aug_shift": (0, 83),
    "aug_intensity": (0, MANY), "sam_rho": (0, MANY), "reset_interval": (0, MANY), "shrink_perturb_alpha": (0, 1),
    "eval_episodes": (1, 10_000), "eval_epsilon": (0, 1), "eval_interval": (0, MANY), "metrics_interval": (0, MANY),
    "collect_steps": (1, MANY), "pretrain_epochs": (1, MANY), "pretrain_batch_size": (2, 65_536),
    "pretrain_length": (2, 10_000), "pretrain_learning_rate": (1e-12, MANY), "barlow_weight": (0, MANY),
    "log_interval": (1, MANY), "torch_threads": (0, 1024), "checkpoint_interval": (0, MANY),
}
# fmt: on


def resolve(args: Args) -> Args:
    """Fill in what is `auto`; end with one line at the first flag that makes no sense. Writes nothing."""
    if args.env_id not in GAMES:
        closest = max(
            RANDOM_HUMAN,
            key=lambda g: difflib.SequenceMatcher(None, g.lower(), args.env_id.lower()).ratio(),
        )
        fail(
            f"--env-id {args.env_id!r}: no such Atari game; the closest of the paper's 26 is {closest}",
            2,
        )
    if args.exp_name == "auto":
        args = replace(args, exp_name=args.mode)
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value != "auto" and not low <= value <= high:  # nan is out of every range
            fail(f"--{name.replace('_', '-')} must be from {low:,} to {high:,}, not {value}", 2)
    if not args.n_step <= args.learning_starts < args.total_timesteps:
        fail("--learning-starts must be at least --n-step and below --total-timesteps", 2)
    if args.buffer_size <= args.n_step:
        fail("--buffer-size must be above --n-step", 2)
    if args.v_min >= args.v_max:
        fail("--v-min must be below --v-max", 2)
    if (
        args.mode == "finetune"
        and args.evaluate is None
        and (args.pretrained_path is None) != args.from_scratch
    ):
        ways = "download SimTPR's published weights, or make some with --mode pretrain; or pass --from-scratch"
        fail(f"--pretrained-path FILE or --from-scratch, one of them: {ways}", 2)
    if (args.collect_policy == "checkpoint") != (args.collect_model is not None):
        fail("--collect-policy checkpoint and --collect-model FILE go together", 2)
    if args.video_dir is not None and args.collect_model is not None:
        fail("--video-dir and --collect-model: videos are read or recorded, pass one of them", 2)
    others = (
        ("pretrained_path", "from_scratch")
        if args.mode == "pretrain"
        else ("video_dir", "collect_model")
    )
    for name in others:
        if getattr(args, name) and args.evaluate is None:
            flag, mode = (
                name.replace("_", "-"),
                "finetune" if args.mode == "pretrain" else "pretrain",
            )
            fail(f"--{flag} is of --mode {mode}", 2)
    if args.video_dir is not None:
        try:
            found = video_files(args.video_dir)
        except OSError as error:
            fail(f"--video-dir {str(args.video_dir)!r}: {error.strerror or error}", 1)
        if not found:
            names = "observation_<run>_<n>.gz or $store$_observation_ckpt.<n>.gz"
            fail(f"--video-dir {str(args.video_dir)!r}: no {names} there", 1)
    if args.resume and args.overwrite:
        fail("--resume goes on with what is there and --overwrite begins anew: pass one of them", 2)
    if (
        args.exp_name in ("", "..")
        or Path(args.exp_name).name != args.exp_name
        or not args.exp_name.isprintable()
    ):
        fail(f"--exp-name {args.exp_name!r}: must be a plain file name", 2)
    for name in ("run_dir", "pretrained_path", "video_dir", "collect_model"):
        if not str(getattr(args, name)).isprintable():
            fail(f"--{name.replace('_', '-')} {str(getattr(args, name))!r}: must be printable", 2)
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


def memory_needed(num_actions: int, args: Args) -> int:
    """Bytes that a run holds on its device at most, PyTorch itself aside: frames and weights, and about the rest."""
    with torch.device("meta"):  # shapes without memory
        network = SimTPR() if args.mode == "pretrain" else QNetwork(Backbone(), num_actions, args)
    parameters, frame = sum(w.numel() for w in network.parameters()), 84 * 84
    outputs = 646_016  # of the encoder's convolutions, of one stack
    if (
        args.mode == "pretrain"
    ):  # weights, gradient, moments; of two views what autograd keeps, and what passes by
        stacks = 2 * args.pretrain_batch_size * args.pretrain_length
        blocks = (
            3 * BLOCK_FRAMES * frame
        )  # this one, the next one while it is read, and gzip's copy of it
        return (
            4 * 4 * parameters + blocks + 4 * stacks * (5 * outputs // 2 + 2 * FRAME_STACK * frame)
        )
    num_copies = (
        9 if args.sam_rho > 0 else 8
    )  # weights, gradient, moments, target, SAM's backup, composed
    replay = (args.buffer_size + FRAME_STACK) * (frame + 8 + 4 + 1 + 4)
    # Of each transition: three float stacks, 2.5 times the encoder's outputs, the head's, and the projection's.
    head = 8 * args.hidden_dim + 4 * (num_actions + args.n_atoms) * args.n_atoms
    transitions = 4 * args.batch_size * (3 * FRAME_STACK * frame + 5 * outputs // 2 + head)
    return replay + 4 * num_copies * parameters + transitions + 2**20 * args.eval_episodes


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


def save_gif(frames: list[np.ndarray], file: BinaryIO) -> None:
    """Frames, uint8 [84, 84], in about the game's own pace (4 frames in 1/15 s)."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(file, format="GIF", save_all=True, append_images=others, duration=70, loop=0)


def run(args: Args, stop: Stop) -> None:
    """Begin a run or continue it, alone in its directory; leave a finished one as it is."""
    run_dir = args.run_dir / f"{args.env_id}__{args.exp_name}__{args.seed}"
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    flags = json.loads(json.dumps(asdict(args), default=str))  # as result.json gives them back
    num_actions = int(make_envs(args.env_id, 1, args.seed).action_space.n)
    needed, available = (
        memory_needed(num_actions, args) / 2**30,
        memory_available(torch.device(args.device)) / 2**30,
    )
    if needed > available and (args.overwrite or not result_path.exists()):
        sizes = f"about {needed:,.1f} GiB of memory, and {args.device} has {available:,.1f} free"
        larger = "--buffer-size, --batch-size, --hidden-dim, --n-atoms or --eval-episodes"
        fail(
            f"needs {sizes}; lower {'--pretrain-batch-size' if args.mode == 'pretrain' else larger}",
            1,
        )
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
            if args.mode == "pretrain" and not (run_dir / "model.pth").exists():
                fail(
                    f"{run_dir} holds a finished run without its model.pth; pass --overwrite to make it anew",
                    1,
                )
            print(f"{run_dir}: finished already")
            checkpoint_path.unlink(missing_ok=True)  # the run may have been killed before it could
            return
        resumed = checkpoint_path.exists() and not args.overwrite
        if resumed and not args.resume:
            fail(
                f"{run_dir} holds an unfinished run; pass --resume to continue it, or --overwrite to begin anew",
                1,
            )
        results = ("model.pth", "video.gif")
        if args.mode == "pretrain" and args.video_dir is None and not args.resume:
            results += RECORDED
        if (
            not resumed
            and not args.overwrite
            and any((run_dir / name).exists() for name in results)
        ):
            fail(
                f"{run_dir} holds a model or video without its result; move it away or pass --overwrite",
                1,
            )
        for name in ("pretrained_path", "collect_model"):
            path = getattr(args, name)
            if args.overwrite and path is not None and path.resolve().parent == run_dir.resolve():
                fail(
                    f"--{name.replace('_', '-')} {path} lies in the directory that --overwrite empties; move it away",
                    1,
                )
        if args.mode == "pretrain":
            pretrain(run_dir, args, flags, resumed, stop)
        else:
            pretrained = (
                load_pretrained(args.pretrained_path)
                if args.pretrained_path and not resumed
                else None
            )
            train(run_dir, args, flags, num_actions, pretrained, resumed, stop)


def device_name(args: Args) -> str:
    """The GPU's name, or the number of the CPU's threads."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def pretrain(run_dir: Path, args: Args, flags: dict, resumed: bool, stop: Stop) -> None:
    """SimTPR's pretraining on videos, from seeding or the checkpoint to model.pth and result.json."""
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    device, num_frames = torch.device(args.device), args.pretrain_length + FRAME_STACK - 1
    torch.manual_seed(args.seed)
    generator = Generator(device).manual_seed(args.seed)
    network = SimTPR().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1.5e-4, weight_decay=1e-5, fused=True
    )
    for w in (
        network.parameters()
    ):  # Adam makes its state in its first step: take one that changes nothing
        w.grad = torch.zeros_like(w)
    optimizer.step()
    reset_optimizer(optimizer)
    optimizer.param_groups[0]["lr"] = args.pretrain_learning_rate
    tensors = network.state_dict()
    for i, state in enumerate(optimizer.state.values()):
        tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
    generators = {"augmentation": generator}
    counters = (
        load_checkpoint(checkpoint_path, flags, generators, tensors) if resumed else Counters()
    )
    if resumed:
        counters.resumed_at.append(counters.step)
        stop.hint = "; --resume continues the run"

    recorded = args.resume and all((run_dir / name).exists() for name in RECORDED)
    if args.video_dir is None and not recorded:
        player = (
            None if args.collect_model is None else load_player(args.collect_model, args.env_id)
        )
        record(run_dir, player, args)
    directory = args.video_dir or run_dir
    files = video_files(directory)
    frames_there = count_frames(files)
    expected = counters.frames or (frames_there if args.video_dir else args.collect_steps)
    if frames_there != expected:
        fail(
            f"{directory}: holds videos of {frames_there:,} frames, not {expected:,}; pass --overwrite",
            1,
        )
    counters.frames = frames_there
    too_few = f"{directory}: too few frames for --pretrain-batch-size {args.pretrain_batch_size} videos of {num_frames}"
    if frames_there < args.pretrain_batch_size * num_frames:
        fail(too_few, 1)
    if not resumed:  # all that is needed is there: what is left of an overwritten run can go
        for name in ("result.json", "checkpoint.pth", "model.pth"):
            (run_dir / name).unlink(missing_ok=True)
        rewind_events(run_dir, {})
    for name in ("result.json", "checkpoint.pth", "model.pth"):
        (run_dir / f"{name}.tmp").unlink(missing_ok=True)

    writer = SummaryWriter(str(run_dir))
    size = sum(w.numel() for w in network.backbone.parameters())
    videos, memory = (
        f"{frames_there:,} frames in {directory}",
        f"about {memory_needed(0, args) / 2**30:.1f} GiB",
    )
    print(f"{run_dir}: encoder of {size:,} parameters, {videos}, on {device_name(args)}, {memory}")
    start_time = checkpoint_time = time.perf_counter()
    start_time -= counters.seconds

    def checkpoint() -> None:
        counters.seconds = time.perf_counter() - start_time
        writer.flush()
        stop.obey(at_once=False)
        try:
            save_checkpoint(checkpoint_path, flags, counters, generators, tensors)
            stop.hint = "; --resume continues the run"
        except OSError as error:  # the one before stays, if there is one
            print(f"warning: {checkpoint_path} not written: {error.strerror}", file=sys.stderr)
        stop.obey(at_once=True)

    blocks = (
        block for _ in range(args.pretrain_epochs) for block in read_videos(files, BLOCK_FRAMES)
    )
    progress = tqdm(
        total=args.pretrain_epochs * frames_there, desc="pretraining", unit="frame", disable=None
    )
    for number, (frames, terminals) in enumerate(blocks):
        if number < counters.step:  # done before a checkpoint
            progress.update(len(frames))
            continue
        starts = draw_videos(
            frames, terminals, num_frames, np.random.default_rng([args.seed, number])
        )
        losses: list[Tensor] = []
        for first in range(0, len(starts) - args.pretrain_batch_size + 1, args.pretrain_batch_size):
            index = starts[first : first + args.pretrain_batch_size, None] + np.arange(num_frames)
            videos = torch.from_numpy(frames[index]).to(device)
            losses.append(pretrain_update(network, optimizer, videos, args, generator))
            progress.update(index.size)
        progress.update(
            len(frames) - len(losses) * args.pretrain_batch_size * num_frames
        )  # what made no batch
        counters.step += 1
        counters.updates += len(losses)
        if losses:
            counters.loss = float(torch.stack(losses).mean())
            if not math.isfinite(counters.loss):
                fail(
                    f"stopped at block {number}: the loss is not finite; lower --pretrain-learning-rate",
                    1,
                )
            writer.add_scalar("losses/pretraining", counters.loss, counters.updates)
        if args.checkpoint_interval == "auto":
            checkpoint_due = time.perf_counter() - checkpoint_time >= 300
        else:
            checkpoint_due = due(args.checkpoint_interval, counters.step)
        if checkpoint_due:
            checkpoint()
            checkpoint_time = time.perf_counter()
    progress.close()
    if counters.updates == 0:
        fail(f"{too_few}, none of them across an episode's end", 1)
    encoder = Backbone()
    encoder.load_state_dict(network.backbone.state_dict())
    values = [*encoder.state_dict().values(), encoder.eval()(torch.ones(1, FRAME_STACK, 84, 84))]
    if not all(w.isfinite().all() for w in values):
        fail(
            "stopped at the end: weights or features are not finite; lower --pretrain-learning-rate",
            1,
        )
    if args.checkpoint_interval != 0:
        checkpoint()  # so that nothing is lost if the files below find no space
    writer.close()
    stop.obey(at_once=False)
    state = {f"backbone.{name}": w for name, w in encoder.state_dict().items()}
    write_atomically(
        run_dir / "model.pth", lambda file: torch.save({"model_state_dict": state}, file)
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "envpool": envpool.__version__,
    }
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "env_id": args.env_id, "seed": args.seed,
        "args": flags, "frames": counters.frames, "blocks": counters.step, "gradient_updates": counters.updates,
        "final_loss": counters.loss, "resumed_at": counters.resumed_at,
        "wall_clock_seconds": time.perf_counter() - start_time, "device": device_name(args), "versions": versions,
        "git_commit": git_commit(),
    }
    # fmt: on
    write_atomically(result_path, lambda file: file.write(json.dumps(result, indent=2).encode()))
    checkpoint_path.unlink(missing_ok=True)
    print(
        f"{args.env_id}: loss {counters.loss:.3f} after {counters.updates:,} updates; {run_dir / 'model.pth'}"
    )


def train(
    run_dir: Path,
    args: Args,
    flags: dict,
    num_actions: int,
    pretrained: dict | None,
    resumed: bool,
    stop: Stop,
) -> None:
    """From seeding, or from the checkpoint, to result.json. `flags` are the args as JSON has them."""
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    device = torch.device(args.device)
    torch.manual_seed(
        args.seed
    )  # initialisers, at the start and at resets, and random actions before learning starts
    # Sampling, augmentation and noise have a generator of their own; so have the metrics, which must change nothing.
    generator, metrics_generator = (
        Generator(device).manual_seed(n) for n in torch.randint(2**31, (2,)).tolist()
    )
    generators = {
        "torch": torch.default_generator,
        "sampling": generator,
        "metrics": metrics_generator,
    }
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    num_updates = (args.total_timesteps - args.learning_starts + 1) * args.replay_ratio
    backbone = Backbone()
    if pretrained is not None:
        backbone.load_state_dict(pretrained)
    agent = Agent(backbone, num_actions, num_updates, args, generator)
    replay = ReplayBuffer(args.buffer_size, args.n_step, args.gamma, device)
    update, act = lambda: agent.update(replay), lambda: agent.act(replay.last_obs())
    parameters = sum(w.numel() for w in agent.parameters)

    tensors = {**agent.tensors(), **replay.tensors()}
    counters = (
        load_checkpoint(checkpoint_path, flags, generators, tensors) if resumed else Counters()
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
    size = f"{parameters:,} parameters, {num_updates:,} updates"
    print(
        f"{run_dir}: {start}{size}, on {device_name(args)}, about {memory_needed(num_actions, args) / 2**30:.1f} GiB"
    )

    start_time = time.perf_counter() - counters.seconds
    checkpoint_time = time.perf_counter()
    # The emulator's state is not in a checkpoint: a continued run begins an episode, with other no-ops than the first.
    env_seed = args.seed + 1_000_003 * counters.step % 2**30
    envs = make_envs(args.env_id, 1, env_seed)
    frames, info = envs.reset()
    replay.start(frames[0, 0])
    lives, episode_return, episode_length = info["lives"][0], 0.0, 0
    to_capture = args.cuda_graph and device.type == "cuda"
    progress = tqdm(
        initial=counters.step,
        total=args.total_timesteps,
        desc=args.env_id,
        unit="step",
        disable=None,
    )
    stop.obey(at_once=False)
    while True:
        if evaluation_due(counters.step, args):
            measuring_start = time.perf_counter()
            video = [] if args.capture_video and counters.step == args.total_timesteps else None
            stop.obey(at_once=True)  # the checkpoint of this very step is written
            returns = evaluate(agent.target, args, video)
            stop.obey(at_once=False)
            mean_return = float(np.mean(returns))
            score = human_normalized_score(args.env_id, mean_return)
            writer.add_scalar("eval/mean_return", mean_return, counters.step)
            if score is not None:
                writer.add_scalar("eval/human_normalized_score", score, counters.step)
            counters.measuring_seconds += time.perf_counter() - measuring_start
        if counters.step == args.total_timesteps:
            break
        step = counters.step = counters.step + 1

        if step <= args.learning_starts:
            action = int(torch.randint(num_actions, ()))
        else:
            action = int(act())  # waits for the device
        frames, rewards, terminated, truncated, info = envs.step(np.array([action], dtype=np.int32))
        reward = float(rewards[0])
        if not math.isfinite(reward):  # must not reach the replay buffer
            counters.nonfinite_rewards += 1
            reward = 0.0
        lost_life = 0 < info["lives"][0] < lives  # some games are played on with none left
        episode_over = terminated[0] or truncated[0]
        episode_return += reward
        episode_length += 1
        if episode_over:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            progress.set_postfix({"return": episode_return}, refresh=False)
            episode_return, episode_length = 0.0, 0
            frames, info = (
                envs.reset()
            )  # else EnvPool's next step would ignore its action and reset
        replay.add(action, float(np.sign(reward)), bool(lost_life or episode_over), frames[0, 0])
        lives = info["lives"][0]

        if step >= args.learning_starts:
            if to_capture:
                changing = [*agent.tensors().values(), replay.priorities, replay.max_priority]
                update, act = (
                    capture(function, changing, (generator,)) for function in (update, act)
                )
                to_capture = False
            for _ in range(args.replay_ratio):
                losses = update()
                counters.updates += 1
                if due(args.reset_interval, counters.updates) and step < args.total_timesteps:
                    agent.reset()
                    counters.resets += 1
            if step % args.log_interval == 0 or step == args.total_timesteps:
                _, skipped, _, longest_row = agent.counts.tolist()
                if longest_row >= MAX_SKIPPED_IN_A_ROW:
                    progress.close()
                    writer.close()
                    problem = f"{longest_row} updates in a row had a non-finite gradient"
                    fail(
                        f"stopped at step {step}: {problem}; lower --learning-rate or --sam-rho", 1
                    )
                for name, value in losses.items():
                    writer.add_scalar(f"losses/{name}", value, step)
                writer.add_scalar("losses/skipped_updates", skipped, step)
                writer.add_scalar("charts/resets", counters.resets, step)
                writer.add_scalar("charts/nonfinite_rewards", counters.nonfinite_rewards, step)
                training_time = time.perf_counter() - start_time - counters.measuring_seconds
                writer.add_scalar("charts/SPS", step / training_time, step)
            if due(args.metrics_interval, step):
                measuring_start = time.perf_counter()
                for name, value in plasticity_metrics(agent, replay, metrics_generator).items():
                    writer.add_scalar(f"plasticity/{name}", value, step)
                counters.measuring_seconds += time.perf_counter() - measuring_start
        progress.update()

        if args.checkpoint_interval == "auto":
            checkpoint_due = time.perf_counter() - checkpoint_time >= 300
        else:
            checkpoint_due = due(args.checkpoint_interval, step)
        # Before an evaluation too: it can take minutes.
        if args.checkpoint_interval != 0 and (
            checkpoint_due or evaluation_due(step, args) or stop.signum
        ):
            counters.seconds = time.perf_counter() - start_time
            writer.flush()
            try:
                save_checkpoint(checkpoint_path, flags, counters, generators, tensors)
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
        "envpool": envpool.__version__,
    }
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "env_id": args.env_id, "seed": args.seed,
        "args": flags, "env_steps": counters.step, "gradient_updates": counters.updates, "resets": counters.resets,
        "skipped_updates": skipped, "nonfinite_rewards": counters.nonfinite_rewards, "resumed_at": counters.resumed_at,
        "parameters": parameters, "episode_returns": returns, "mean_return": mean_return,
        "human_normalized_score": score, "wall_clock_seconds": wall_clock,
        "env_steps_per_second": counters.step / training_time, "updates_per_second": counters.updates / training_time,
        "device": device_name(args), "versions": versions, "git_commit": git_commit(),
    }
    # fmt: on
    try:
        if args.capture_video:
            write_atomically(run_dir / "video.gif", lambda file: save_gif(video, file))
        if args.save_model:
            model = {"args": flags, "num_actions": num_actions, "target": agent.target.state_dict()}
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


def due(interval: int, count: int) -> bool:
    """Whether `count` is a multiple of `interval`; never for interval 0."""
    return interval > 0 and count > 0 and count % interval == 0


def evaluation_due(step: int, args: Args) -> bool:
    """At the end, and every --eval-interval interactions."""
    return step == args.total_timesteps or due(args.eval_interval, step)


def evaluate_saved(args: Args) -> None:
    """Play the model at --evaluate: its game, network and seed; --eval-episodes, --eval-epsilon, --device are ours."""
    gif = Path(f"{args.evaluate}.gif")
    if args.capture_video and gif.exists() and not args.overwrite:
        fail(f"{gif} exists; pass --overwrite to replace it", 1)
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about foreign files, which get a line of their own below
            model = torch.load(args.evaluate, map_location="cpu", weights_only=True)
        ours = {
            name: getattr(args, name)
            for name in ("device", "eval_episodes", "eval_epsilon", "torch_threads")
        }
        ours |= {"evaluate": args.evaluate, "video_dir": None}
        saved = resolve(replace(Args(**model["args"]), **ours, track=False))
        for name, default in asdict(Args()).items():
            if type(default) in (int, bool) and type(getattr(saved, name)) is not type(default):
                raise ValueError(name)
        network = QNetwork(Backbone(), model["num_actions"], saved)
        network.load_state_dict(model["target"])
        if not all(tensor.isfinite().all() for tensor in model["target"].values()):
            raise ValueError("weights that are not finite")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        fail(f"--evaluate {str(args.evaluate)!r}: {error.strerror}", 1)
    except Exception as error:  # such a file can raise anything
        if out_of_memory(error):
            raise
        fail(
            f"--evaluate {str(args.evaluate)!r}: not a fine-tuned model that this script saved (--save-model)",
            1,
        )
    video = [] if args.capture_video else None
    returns = evaluate(network.to(args.device, memory_format=torch.channels_last), saved, video)
    print(summary(saved.env_id, returns))
    if args.capture_video:
        write_atomically(gif, lambda file: save_gif(video, file))


def summary(env_id: str, returns: list[float]) -> str:
    """One line for people: mean return and, for the paper's games, human-normalized score."""
    mean_return = float(np.mean(returns))
    line = f"{env_id}: mean return {mean_return:.1f} over {len(returns)} games"
    score = human_normalized_score(env_id, mean_return)
    return line if score is None else f"{line}, human-normalized score {score:.3f}"


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
    except FloatingPointError as error:
        fail(f"{error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail(
            "out of memory; lower --buffer-size, --batch-size, --pretrain-batch-size, --hidden-dim or --n-atoms",
            1,
        )
    except OSError as error:  # no permission, no space, no such directory
        fail(f"cannot write {error.filename or args.run_dir}: {error.strerror or error}", 1)
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # on the way out, one more changes nothing
