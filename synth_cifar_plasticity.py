# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1",
#     "filelock==4.3.1",
# ]
# ///
r"""Input and label plasticity on CIFAR-10, in one file: all seeds and settings in one process.

Paper: "Improving Input and Label Plasticity for Sample Efficient Reinforcement Learning"
(NeurIPS 2023), section 3, Figures 2 (left) and 3, appendix A.2.

PLASTIC, the base that it stands on, and a sweep of settings (30 seeds take hours; for a first look
add --num-seeds 2 --num-stages 10 --updates-per-stage 100, and to PLASTIC --reset-interval 3):

    python synth_cifar_plasticity.py --task label
    python synth_cifar_plasticity.py --task label --exp-name base --no-layer-norm --no-crelu \
        --sam-rho 0 --reset-interval 0
    python synth_cifar_plasticity.py --task label --exp-name sweep \
        --learning-rate 0.1 0.01 0.001 --weight-decay 0.01 0.001

Read seen_images and stage_labels first, which are the two tasks, then Replicas.update, which is
SGD with SAM, then train, the loop around it.
Network is backbone and head, with LayerNorm and CReLU. Replicas holds the networks of all seeds
and settings, a row each. The other intervention is Replicas.reset_heads. Off by default: Shrink &
Perturb (section 4.3), and other papers' ReDo, L2 Init, weight clipping and Hare & Tortoise.
Two clocks tick: gradient updates, which the loop calls steps, and stages of 500 updates each.
Resets count stages. A setting is a pair of learning rate and weight decay.

Where it departs from the paper's text or fills it in (README.md and benchmark/RELEASE.md have
tables):
- The paper sweeps learning rate, weight decay, SAM's rho and the reset interval, and does not say
  how it chose. Here each has one default. Of several learning rates and weight decays the best by
  final test accuracy is reported: being chosen by the test images, it is a little too high.
- Momentum is 0.9, and zeroed in the head at a reset; the paper does not say (--momentum).
- LayerNorm is over channels and pixels of each sample, as released; the paper does not say
  (--layer-norm-kind).
- CReLU is in the fully connected layers alone, as in the other scripts (--crelu-scope).
- Minibatches are cut from shuffled epochs: within a stage, how often two images are seen differs by
  one at most; the paper draws at random.
- Resets come before stages 10, 20, ...; the release's come after stages 0, 10, ...
"""

import ctypes
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Literal

# PyTorch's threads wait for each other by spinning: two runs that share the cores would take four
# times as long as one. GNU OpenMP reads this when PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# By channel, of pixels from 0 to 1. As in the release, STD is the mean of each image's own standard
# deviation; over all pixels it would be 0.247, 0.243, 0.262.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


# --- Args -----------------------------------------------------------------------------------------


@dataclass
class Args:
    """Input and label plasticity on CIFAR-10. The defaults are PLASTIC on the input task."""

    # Run
    task: Literal["input", "label"] = "input"  # more images with each stage, or other labels
    num_seeds: int = 30  # seeds, trained side by side
    first_seed: int = 1  # the seeds are first-seed, first-seed + 1, ...
    exp_name: str = "synth_cifar_plasticity"  # name of this method, part of the run's directory
    # where run directories are made: <run-dir>/<task>__<exp-name>__<first seed>-<last seed>
    run_dir: str = "runs"
    data_dir: str = "data"  # holds cifar-10-batches-py, or is it
    download: bool = True  # download CIFAR-10 (170 MB) where it is absent
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = CUDA where there is one
    cuda_graph: bool = True  # update as a CUDA graph (no effect on the CPU)
    torch_threads: int = 0  # PyTorch's CPU threads (0 = its own choice, at most 8)
    resume: bool = False  # continue an unfinished run, begin a new one, leave a finished one alone
    # updates between checkpoints (auto = 5 minutes, 0 = off)
    checkpoint_interval: Literal["auto"] | int = "auto"
    overwrite: bool = False  # replace a run of the same name, finished or not

    # Training (section 3, appendix A.2)
    num_stages: int = 100  # stages of the task
    updates_per_stage: int = 500  # gradient updates in each
    batch_size: int = 128  # images per update
    learning_rate: tuple[float, ...] = (0.01,)  # of SGD; every pair with --weight-decay is trained
    weight_decay: tuple[float, ...] = (0.001,)  # of SGD
    momentum: float = 0.9  # of SGD
    conv_strides: tuple[int, int, int] = (3, 3, 1)  # of the three convolutions (released: 3 1 1)
    # new labels at each stage: a random permutation of the classes, or y + stage modulo 10
    label_change: Literal["permute", "cyclic"] = "permute"

    # Plasticity interventions
    layer_norm: bool = True  # LayerNorm after each convolution
    layer_norm_scope: Literal["backbone", "all"] = "backbone"  # all = the head's hidden layers too
    # sample = over channels and pixels of a sample, pixel = over the channels at each pixel
    layer_norm_kind: Literal["sample", "pixel"] = "sample"
    crelu: bool = True  # concatenated ReLU
    crelu_scope: Literal["head", "all"] = "head"  # all = the backbone's layers too
    sam_rho: float = 0.1  # radius of the SAM perturbation (0 = off)
    reset_interval: int = 10  # stages between resets of the head (0 = off)
    shrink_perturb_alpha: float = 1.0  # Shrink & Perturb's weight of the old backbone (1 = off)

    # Interventions of other papers
    redo_interval: int = 0  # updates between recyclings of dormant units (0 = off; ReDo: 1000)
    redo_tau: float = 0.1  # a unit whose score is at most this is dormant
    l2_init: bool = False  # weight decay pulls towards the initial weights instead of 0
    weight_clip: float = 0.0  # largest weight, as a multiple of the initial bound (0 = off)
    tortoise_interval: int = 0  # stages between returns to the slow weights (0 = off)
    tortoise_ema: float = 0.999  # share of the slow weights that an update keeps

    # Metrics, logging
    metrics_interval: int = 0  # stages between plasticity metrics (0 = off)
    log_interval: int = 100  # updates between logged losses
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "plastic"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases

    def __post_init__(self) -> None:
        """Check the flags and resolve `auto`. tyro prints a ValueError and ends with code 2."""
        tiny, huge = 1e-12, 10**9
        for lowest, highest, names in (
            (0, 1, "momentum shrink_perturb_alpha tortoise_ema"),
            (0, 1024, "torch_threads"),
            (0, huge, "first_seed weight_decay sam_rho reset_interval"),
            (0, huge, "redo_interval redo_tau weight_clip tortoise_interval"),
            (0, huge, "checkpoint_interval metrics_interval"),
            (tiny, huge, "learning_rate"),
            (1, 3, "conv_strides"),  # three of 3 leave one pixel: 32 -> 10 -> 3 -> 1
            (1, 50_000, "num_stages"),  # of one training image at least
            (1, huge, "num_seeds updates_per_stage batch_size log_interval"),
        ):
            for name in names.split():
                flag, values = f"--{name.replace('_', '-')}", getattr(self, name)
                for value in values if isinstance(values, tuple) else (values,):
                    if value != "auto" and not lowest <= value <= highest:  # nan is in no range
                        limits = f"from {lowest:,} to {highest:,}"
                        raise ValueError(f"{flag} must be {limits}, not {value}")
        for flag, values in (
            ("--learning-rate", self.learning_rate),
            ("--weight-decay", self.weight_decay),
        ):
            # As log_means() writes them: 0.1 and 0.1000001 would have the same name.
            if not values or len({f"{value:g}" for value in values}) < len(values):
                raise ValueError(f"{flag} needs one value, or several different ones")
        if self.shrink_perturb_alpha < 1 and self.reset_interval == 0:
            raise ValueError("--shrink-perturb-alpha acts at resets: pass --reset-interval")
        if self.l2_init and not any(self.weight_decay):
            raise ValueError("--l2-init pulls with --weight-decay: pass one above 0")
        name = self.exp_name  # part of a directory's name, and printed
        if "/" in name or name in ("", ".", "..") or not name.isprintable():
            raise ValueError(f"--exp-name {self.exp_name!r}: must be a plain file name")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite begins anew: pass one of them")
        wandb = find_spec("wandb")  # a mere folder of this name has no origin
        if self.track and (wandb is None or wandb.origin is None):
            raise ValueError("--track needs Weights & Biases: pip install wandb")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.torch_threads == 0:
            self.torch_threads = min(torch.get_num_threads(), 8)


# --- Data and tasks -------------------------------------------------------------------------------


class PlainObject:
    """Stands in for every class and function that a pickle names: it only keeps its state."""

    def __init__(self, *arguments: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and plain containers: a crafted file runs no code."""

    def find_class(self, module: str, name: str) -> type:
        return PlainObject


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A file of cifar-10-batches-py: images, uint8 [N, 3, 32, 32], and labels 0 to 9, int64 [N]."""
    try:
        with open(path, "rb") as file:
            batch = PlainUnpickler(file, encoding="bytes").load()
        # How NumPy pickles an array: version, shape, type, order, bytes.
        *_, by_columns, data = batch[b"data"].state
        labels = np.array(batch[b"labels"], np.int64)
        data = bytearray(data)  # not bytes: PyTorch wants an array that it could write to
        images = np.frombuffer(data, np.uint8).reshape(len(labels), 3, 32, 32)
        if by_columns or labels.ndim != 1 or labels.min() < 0 or labels.max() > 9:
            raise ValueError
        return images, labels
    except OSError:
        raise
    except Exception as error:  # a foreign file can raise anything
        problem = f"not a file of cifar-10-batches-py ({type(error).__name__})"
        sys.exit(f"error: {path}: {problem}; delete {path.parent} to download CIFAR-10 anew")


def download(directory: Path) -> None:
    """CIFAR-10 from its home page, checked by SHA-256; `directory` appears when it is whole."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that need the images, the first one downloads them.
    # A kill leaves the temporary directory behind, so its name says what it is.
    prefix = "cifar-10-download-"
    with (
        FileLock(f"{directory}.lock"),
        TemporaryDirectory(prefix=prefix, dir=directory.parent) as temporary,
    ):
        if directory.exists():
            return
        archive = f"{temporary}/cifar-10-python.tar.gz"
        try:
            torch.hub.download_url_to_file(URL, archive, hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:  # no network; not the archive
            where = f"{directory}, or in a directory given by --data-dir"
            sys.exit(f"error: {URL}: {error}; without it, CIFAR-10's files must be in {where}")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        os.replace(f"{temporary}/cifar-10-batches-py", directory)


def load_cifar10(args: Args) -> tuple[np.ndarray, ...]:
    """Images and labels for training, uint8 [50000, 3, 32, 32], int64 [50000], and for the test."""
    directory = Path(args.data_dir)
    if not (directory / "data_batch_1").exists():  # not the directory itself: the one that holds it
        directory /= "cifar-10-batches-py"
    if not directory.exists():
        if not args.download:
            sys.exit(f"error: {directory} is not there; pass --download, or another --data-dir")
        download(directory)
    training = [read_batch(directory / f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*training, strict=True))
    return images, labels, *read_batch(directory / "test_batch")


# Each seed's streams of NumPy's random numbers: a draw follows from seed, stream and stage alone
# (ORDER: without the stage; RECYCLED: update instead of stage).
ORDER, BATCHES, LABELS, RESETS, EVALUATED, RECYCLED = range(6)


def seen_images(seed: int, stage: int, num_images: int, args: Args) -> np.ndarray:
    """Indices of the images that a stage trains on (section 3).

    On the input task these are the first chunks of the seed's order: of 50,000 images in 100
    stages, 500 in stage 0, 1,000 in stage 1. On the label task they are all images.
    """
    order = np.random.default_rng([seed, ORDER]).permutation(num_images)
    chunk = num_images // args.num_stages  # what equal chunks leave over is not used
    return order[: (stage + 1) * chunk] if args.task == "input" else order


def stage_batches(seed: int, stage: int, num_images: int, args: Args) -> np.ndarray:
    """A stage's minibatches, cut from a stream of shuffled epochs: indices [updates, batch].

    Of images 0, 1, 2 and batches of 2: epochs 2 0 1 and 1 2 0 give (2, 0), (1, 1), (2, 0).
    """
    rng = np.random.default_rng([seed, BATCHES, stage])
    seen = seen_images(seed, stage, num_images, args)
    needed = args.updates_per_stage * args.batch_size
    epochs = [rng.permutation(seen) for _ in range(math.ceil(needed / len(seen)))]
    return np.concatenate(epochs)[:needed].reshape(args.updates_per_stage, args.batch_size)


def stage_labels(seed: int, stage: int, args: Args) -> np.ndarray:
    """The label of each class in a stage, int64 [10] (section 3)."""
    if args.task == "input":
        return np.arange(10)
    if args.label_change == "cyclic":
        return (np.arange(10) + stage) % 10
    return np.random.default_rng([seed, LABELS, stage]).permutation(10)


# --- Networks -------------------------------------------------------------------------------------


class SampleLayerNorm(nn.Module):
    """LayerNorm over all channels and pixels of a sample: [B, C, H, W] -> [B, C, H, W].

    Scale and shift are by channel, as released (GroupNorm with one group).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[1:], eps=1e-6)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


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


class Network(nn.Module):
    """Three convolutions (32, 64, 64 channels), three fully connected layers (512, 128, 10).

    With strides 3, 3, 1, an image's 32x32 pixels become 10x10, 3x3, 1x1: 64 features for the head.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        norm = SampleLayerNorm if args.layer_norm_kind == "sample" else PixelLayerNorm
        backbone_crelu = args.crelu and args.crelu_scope == "all"
        layers: list[nn.Module] = []
        in_channels = 3
        for channels, stride in zip((32, 64, 64), args.conv_strides, strict=True):
            layers.append(nn.Conv2d(in_channels, channels, 3, stride))
            if args.layer_norm:
                layers.append(norm(channels))
            layers.append(CReLU() if backbone_crelu else nn.ReLU())
            # CReLU doubles what the layer gives out, so the next fan-in doubles; the width stays.
            in_channels = channels * (2 if backbone_crelu else 1)
        self.backbone = nn.Sequential(*layers, nn.Flatten())

        layers = []
        in_features = self.backbone(torch.zeros(1, 3, 32, 32)).shape[1]
        for features in (512, 128):
            layers.append(nn.Linear(in_features, features))
            if args.layer_norm and args.layer_norm_scope == "all":
                layers.append(nn.LayerNorm(features, eps=1e-6))
            layers.append(CReLU() if args.crelu else nn.ReLU())
            in_features = features * (2 if args.crelu else 1)
        self.head = nn.Sequential(*layers, nn.Linear(in_features, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Standardised images [B, 3, 32, 32] -> logits [B, 10]."""
        return self.head(self.backbone(images))


# --- Interventions --------------------------------------------------------------------------------


def sam_perturbed_weights(weights: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """SAM's w + rho * g / ||g||, each replica by its own norm (appendix B.1).

    Of G replicas with P parameters each: [G, P], [G, P] -> [G, P].
    """
    norm = gradient.norm(dim=1, keepdim=True)
    return weights + rho / (norm + 1e-12) * gradient


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


def initial_bounds(network: nn.Module) -> Tensor:
    """Bound of the uniform distribution that each parameter is drawn from, [P].

    PyTorch's 1 / sqrt(fan-in), of biases too; infinite for LayerNorm's, which are not drawn.
    """
    bounds = []
    for module in network.modules():
        drawn = isinstance(module, nn.Conv2d | nn.Linear)
        bound = module.weight[0].numel() ** -0.5 if drawn else math.inf
        bounds += [torch.full((w.numel(),), bound) for w in module.parameters(recurse=False)]
    return torch.cat(bounds)


# --- Update ---------------------------------------------------------------------------------------


class Replicas:
    """All replicas: every setting (a pair of learning rate and weight decay) times every seed.

    In shapes: R replicas, G of them in a group that is computed together, P parameters each, S
    seeds, B images. Replica r has setting r // S and the seed seeds[r % S]: of seeds 1, 2, 3,
    replica 4 has setting 1 and seed 2. `weights` and `momentum`, [R, P], have one row per replica;
    the head's are the last columns, from head_start on. What one replica does, no other one feels:
    one that diverges stays nan, and the others go on.

    On a GPU all replicas share each kernel. On a CPU, which one small network keeps busy, they take
    turns. update() has no .item(), and changes tensors in place: a CUDA graph can replay it.
    """

    def __init__(self, args: Args, data: tuple[np.ndarray, ...], device: torch.device) -> None:
        self.args, self.device = args, device
        self.images, self.labels, self.test_images, self.test_labels = (
            torch.from_numpy(array).to(device) for array in data
        )
        # standardise() takes pixels from 0 to 255.
        self.mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=device).view(3, 1, 1)

        self.seeds = [args.first_seed + i for i in range(args.num_seeds)]
        self.settings = [(lr, decay) for lr in args.learning_rate for decay in args.weight_decay]
        settings = torch.tensor(self.settings, device=device).repeat_interleave(args.num_seeds, 0)
        self.learning_rate, self.weight_decay = settings[:, :1], settings[:, 1:]  # [R, 1] each
        num_replicas = len(settings)
        self.seed_index = torch.arange(num_replicas, device=device) % args.num_seeds
        size = 1 if device.type == "cpu" else num_replicas  # replicas that are computed together
        self.groups = [slice(r, r + size) for r in range(0, num_replicas, size)]

        with torch.device("meta"):  # its structure alone: the parameters come from `weights`
            self.network = Network(args)
        self.shapes = {name: w.shape for name, w in self.network.named_parameters()}
        self.head_start = sum(w.numel() for w in self.network.backbone.parameters())
        self.vmapped_network = vmap(
            lambda parameters, images: functional_call(self.network, parameters, (images,))
        )
        self.weights = self.initial_weights(self.seeds)
        self.momentum = torch.zeros_like(self.weights)
        # w_0 follows from the seeds: no checkpoint needs to hold it.
        self.initial = self.weights.clone() if args.l2_init else None
        self.slow = self.weights.clone() if args.tortoise_interval > 0 else None
        if args.weight_clip > 0:
            self.clip_bounds = args.weight_clip * initial_bounds(self.network).to(device)
        # Updates made so far: [1], because indexing with a scalar tensor would wait for the device.
        self.updates = torch.zeros(1, dtype=torch.int64, device=device)

        # The stage's minibatches as indices of images, and the label of each class, by seed. All 0
        # until start_stage() draws them.
        shape = (args.updates_per_stage, args.num_seeds, args.batch_size)
        self.batches = torch.zeros(shape, dtype=torch.int64, device=device)
        self.class_labels = torch.zeros((args.num_seeds, 10), dtype=torch.int64, device=device)

    def initial_weights(self, seeds: list[int]) -> Tensor:
        """The weights that runs with seeds [S] begin with, the same for every setting: [R, P].

        PyTorch's own generator is seeded here at each call. Nothing else draws from it.
        """
        rows = []
        for seed in seeds:  # on the CPU, so that a GPU begins with the same
            torch.manual_seed(seed)
            rows.append(parameters_to_vector(Network(self.args).parameters()).detach())
        return torch.stack(rows).repeat(len(self.settings), 1).to(self.device)

    def start_stage(self, stage: int) -> None:
        """Draw the stage's minibatches and labels, before its first update."""
        args, num_images = self.args, len(self.images)
        batches = [stage_batches(seed, stage, num_images, args) for seed in self.seeds]
        self.batches.copy_(torch.from_numpy(np.stack(batches, axis=1)))
        class_labels = [stage_labels(seed, stage, args) for seed in self.seeds]
        self.class_labels.copy_(torch.from_numpy(np.stack(class_labels)))

    def fresh_weights(self, stream: int, count: int) -> Tensor:
        """Other weights, by [seed, stream, count] instead of the seed: [R, P].

        The count is the stage of a reset (RESETS), or the update of a recycling (RECYCLED).
        """
        seeds = [int(np.random.default_rng([s, stream, count]).integers(2**63)) for s in self.seeds]
        return self.initial_weights(seeds)

    def reset_heads(self, stage: int) -> None:
        """Fresh fully connected layers, and no momentum there; in place (section 3).

        With Shrink & Perturb (section 4.3), backbone w <- alpha * w + (1 - alpha) * phi, phi fresh.
        Slow weights, where there are some, are treated as the fast ones.
        """
        fresh, alpha = self.fresh_weights(RESETS, stage), self.args.shrink_perturb_alpha
        for weights in (self.weights, self.slow):
            if weights is not None:
                weights[:, self.head_start :] = fresh[:, self.head_start :]
                if alpha < 1:
                    weights[:, : self.head_start].lerp_(fresh[:, : self.head_start], 1 - alpha)
        self.momentum[:, self.head_start :] = 0

    @torch.no_grad()
    def recycle(self, step: int) -> None:
        """ReDo: a dormant unit's weights are fresh on its way in, 0 on its way out; in place.

        Its bias is 0, and so is the momentum of all of these; LayerNorm's scale and shift stay
        (Sokar et al., 2023, algorithm 1). Scores are those of the next minibatch. Slow weights
        follow by their average alone.
        """
        fresh = self.fresh_weights(RECYCLED, step)
        # Convolutions and fully connected layers, in order: LayerNorm's parameters are vectors.
        layers = [n.removesuffix(".weight") for n, shape in self.shapes.items() if len(shape) > 1]
        for r in range(len(fresh)):  # one replica after the other, as it is rare
            row = slice(r, r + 1)
            w, m, phi = (  # views: what is set in w and m below is set in the replica
                {name: part[0] for name, part in self.parameters(rows[row]).items()}
                for rows in (self.weights, self.momentum, fresh)
            )
            images, _ = self.next_batch(row)  # [1, B, 3, 32, 32]
            forward = partial(functional_call, self.network, w, (images[0],))
            scores = unit_scores(self.network, forward)
            # From the last layer back: between two dormant units the weight is 0.
            hidden = list(zip(scores.items(), layers[:-1], layers[1:], strict=True))
            for (activation, score), layer, following in reversed(hidden):
                dormant = score <= self.args.redo_tau  # [units]; False where a score is nan
                w[f"{layer}.weight"][dormant] = phi[f"{layer}.weight"][dormant]
                m[f"{layer}.weight"][dormant] = 0
                # The next layer takes in x+ of all units, then x-, each with its pixels: of 2 units
                # with 3 pixels [out, 12], seen as [out, 2 signs, 2 units, 3 pixels].
                copies = 2 if isinstance(self.network.get_submodule(activation), CReLU) else 1
                for p in (w, m):
                    p[f"{layer}.bias"][dormant] = 0
                    out = p[f"{following}.weight"]
                    out.view(len(out), copies, len(dormant), -1)[:, :, dormant] = 0

    def standardise(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, 32, 32] -> float32."""
        return (images - self.mean) / self.std

    def next_batch(self, group: slice) -> tuple[Tensor, Tensor]:
        """A minibatch for each replica: images, float32 [G, B, 3, 32, 32], and labels, [G, B]."""
        seed_index = self.seed_index[group]
        # With 500 updates a stage, after 501 the second minibatch of stage 1 is next.
        index = self.batches[self.updates % len(self.batches), seed_index]  # [G, B]
        labels = self.class_labels[seed_index].gather(1, self.labels[index])
        return self.standardise(self.images[index]), labels

    def parameters(self, weights: Tensor) -> dict[str, Tensor]:
        """Views of `weights` [G, P] as the network's parameters, [G, ...] each, by name."""
        parts = weights.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: part.view(-1, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def forward(self, weights: Tensor, images: Tensor) -> Tensor:
        """Each replica's logits, of its own images: [G, P], [G, B, 3, 32, 32] -> [G, B, 10]."""
        parameters = self.parameters(weights)
        if len(weights) > 1:
            return self.vmapped_network(parameters, images)
        # vmap would take a quarter more time on a CPU.
        alone = {name: w[0] for name, w in parameters.items()}
        return functional_call(self.network, alone, (images[0],))[None]

    def gradient(
        self, group: slice, weights: Tensor, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of each replica, [G], and the gradient, [G, P].

        With L2 Init, that of cross-entropy + weight_decay / 2 * ||w - w_0||^2, w_0 being the
        initial weights (Kumar et al., 2023, arXiv 2308.11958, whose lambda is half as large).
        """
        weights = weights.detach().requires_grad_()
        logits = self.forward(weights, images)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view(labels.shape).mean(1)
        # No loss depends on another replica's weights: the sum's gradient is each one's own.
        gradient = torch.autograd.grad(losses.sum(), weights)[0]
        if self.args.l2_init:
            gradient.addcmul_(self.weight_decay[group], weights.detach() - self.initial[group])
        return losses.detach(), gradient

    @torch.no_grad()
    def sgd(self, group: slice, gradient: Tensor) -> None:
        """SGD with momentum, in place.

        m <- momentum * m + g + weight_decay * w, then w <- w - learning_rate * m. With L2 Init the
        decay is in g already. Clipping keeps w within --weight-clip times the bound of the initial
        distribution (Elsayed et al., 2024, arXiv 2407.01704, algorithm 1). The slow weights follow:
        w_slow <- ema * w_slow + (1 - ema) * w (Lee et al., 2024, arXiv 2406.02596).
        """
        w, m = self.weights[group], self.momentum[group]
        torch.add(gradient, m, alpha=self.args.momentum, out=m)
        if not self.args.l2_init:
            m.addcmul_(self.weight_decay[group], w)
        w.addcmul_(self.learning_rate[group], m, value=-1)
        if self.args.weight_clip > 0:
            w.clamp_(-self.clip_bounds, self.clip_bounds)
        if self.slow is not None:
            self.slow[group].lerp_(w, 1 - self.args.tortoise_ema)

    def update(self) -> Tensor:
        """One gradient update of every replica. Returns the losses at w, [R]."""
        losses = []
        for group in self.groups:
            images, labels = self.next_batch(group)
            weights = self.weights[group]
            loss, gradient = self.gradient(group, weights, images, labels)
            if self.args.sam_rho > 0:  # the gradient at w + rho * g / ||g||, the step from w
                perturbed = sam_perturbed_weights(weights, gradient, self.args.sam_rho)
                _, gradient = self.gradient(group, perturbed, images, labels)
            self.sgd(group, gradient)
            losses.append(loss)
        self.updates.add_(1)
        return torch.cat(losses)

    def diverged(self) -> Tensor:
        """Replicas with weights that are infinite or nan: bool [R]."""
        return ~self.weights.isfinite().all(1)

    def tensors(self) -> dict[str, Tensor]:
        """What learning changes in place."""
        tensors = {"weights": self.weights, "momentum": self.momentum, "updates": self.updates}
        return tensors if self.slow is None else tensors | {"slow": self.slow}


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


def make_replicas(args: Args, data: tuple[np.ndarray, ...]) -> tuple[Replicas, Callable]:
    """The replicas, and update() on them: on a GPU as a CUDA graph."""
    replicas = Replicas(args, data, torch.device(args.device))
    update = replicas.update
    if args.cuda_graph and args.device == "cuda":
        update = capture(update, list(replicas.tensors().values()))
    return replicas, update


# --- Evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(replicas: Replicas, images: Tensor, labels: Tensor, index: Tensor) -> list[float]:
    """Each replica's accuracy, [R], on the images `index` [S, N] of its seed.

    With the labels of the stage, and by the slow weights where there are some; nan for a replica
    that has diverged.
    """
    shares = []
    weights = replicas.weights if replicas.slow is None else replicas.slow
    for group in replicas.groups:
        seed_index = replicas.seed_index[group]
        correct = 0
        for part in index[seed_index].split(replicas.args.batch_size, dim=1):
            logits = replicas.forward(weights[group], replicas.standardise(images[part]))
            true_labels = replicas.class_labels[seed_index].gather(1, labels[part])
            correct += (logits.argmax(2) == true_labels).sum(1)
        shares.append(correct.double() / index.shape[1])
    return torch.cat(shares).masked_fill(replicas.diverged(), math.nan).tolist()


def evaluate(replicas: Replicas, stage: int) -> dict[str, list[float]]:
    """Accuracy by replica on the stage's images (10,000 at most) and on the test images.

    The labels are those that start_stage() set last.
    """
    measured = []
    for seed in replicas.seeds:
        seen = seen_images(seed, stage, len(replicas.images), replicas.args)
        rng = np.random.default_rng([seed, EVALUATED, stage])
        measured.append(rng.permutation(seen)[:10_000])
    train_index = torch.from_numpy(np.stack(measured)).to(replicas.device)
    test_index = torch.arange(len(replicas.test_images), device=replicas.device)
    test_index = test_index.expand(len(replicas.seeds), -1)
    return {
        "train_accuracy": accuracy(replicas, replicas.images, replicas.labels, train_index),
        "test_accuracy": accuracy(replicas, replicas.test_images, replicas.test_labels, test_index),
    }


def bootstrap_interval(values: np.ndarray) -> list[float] | None:
    """95% interval of the mean over seeds, [N] -> [low, high], by the percentile bootstrap.

    None for one seed.
    """
    if len(values) < 2:
        return None
    samples = np.random.default_rng(0).choice(values, (10_000, len(values)))
    return np.percentile(samples.mean(1), [2.5, 97.5]).tolist()


def summarise(
    settings: list[tuple[float, float]],
    train_accuracy: list[list[float]],
    test_accuracy: list[list[float]],
    metrics: list[dict],
) -> list[dict]:
    """What result.json says of each setting: accuracies and metrics by seed, means, intervals.

    Both accuracies are [stages][replicas]: with 2 settings and 3 seeds, replicas 3, 4, 5 are the
    second setting's.
    """
    sweep = []
    num_seeds = len(test_accuracy[0]) // len(settings)
    for i, (learning_rate, weight_decay) in enumerate(settings):
        own = slice(i * num_seeds, (i + 1) * num_seeds)
        # [stages][replicas] -> [seeds, stages]
        train, test = np.array(train_accuracy)[:, own].T, np.array(test_accuracy)[:, own].T
        result: dict = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        for name, values in (("final_accuracy", test[:, -1]), ("mean_accuracy", test.mean(1))):
            result |= {name: values.tolist(), f"{name}_mean": float(values.mean())}
            result[f"{name}_interval"] = bootstrap_interval(values)
        result |= {"test_accuracy": test.tolist(), "train_accuracy": train.tolist()}
        result["metrics"] = [
            {name: x if name == "stage" else x[own] for name, x in one.items()} for one in metrics
        ]
        sweep.append(result)
    return sweep


def best_setting(sweep: list[dict]) -> dict:
    """The one with the best final test accuracy, as of summarise(); a diverged seed's nan loses."""
    return max(sweep, key=lambda setting: np.nan_to_num(setting["final_accuracy_mean"], nan=-1.0))


def summary(task: str, best: dict) -> str:
    """One line for people: final test accuracy, its interval if there is one, and the setting."""
    score = f"{best['final_accuracy_mean']:.3f}"
    if best["final_accuracy_interval"] is not None:
        low, high = best["final_accuracy_interval"]
        score += f" [{low:.3f}, {high:.3f}] over {len(best['final_accuracy'])} seeds"
    setting = f"learning rate {best['learning_rate']:g}, weight decay {best['weight_decay']:g}"
    return f"{task}: final test accuracy {score}, {setting}"


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


def plasticity_metrics(replicas: Replicas, stage: int) -> dict[str, list[float]]:
    """Metrics of each replica's fast weights, {name: [R]}; nan for one that has diverged.

    On the first images that start_stage() drew last: 512 for active and dormant units, 1,024 for
    the features, 32 for sharpness and the gradient's norm. `stage` only seeds max_eigenvalue().
    """
    metrics: dict[str, list[float]] = {}
    network = Network(replicas.args).to(replicas.device)
    parameters, diverged = list(network.parameters()), replicas.diverged().tolist()
    initial = replicas.initial_weights(replicas.seeds)  # drawn once more
    for r, s in enumerate(replicas.seed_index.tolist()):
        vector_to_parameters(replicas.weights[r], parameters)
        index = replicas.batches[:, s].flatten()[:1024]
        images = replicas.standardise(replicas.images[index])
        labels = replicas.class_labels[s, replicas.labels[index[:32]]]
        forward = partial(network, images[:512])
        units = active_units(network, forward)
        values = {f"active_units/{name}": share for name, share in units.items()}
        values |= dormant_ratios(unit_scores(network, forward))
        values |= feature_metrics(network.head[:-1](network.backbone(images)))
        values |= weight_metrics([replicas.weights[r]], [initial[r]])
        generator = Generator(replicas.device).manual_seed(stage)
        loss = F.cross_entropy(network(images[:32]), labels)
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        values["gradient_norm"] = float(nn.utils.get_total_norm(gradient))
        values["hessian_max_eigenvalue"] = max_eigenvalue(loss, parameters, generator)
        for name, value in values.items():
            metrics.setdefault(name, []).append(math.nan if diverged[r] else value)
    return metrics


# --- Checkpoint -----------------------------------------------------------------------------------

# Flags that may differ when a run is continued.
MAY_CHANGE = set(
    "run_dir data_dir download device cuda_graph torch_threads resume checkpoint_interval "
    "overwrite log_interval track wandb_project_name wandb_entity".split()
)


@dataclass
class Counters:
    """Where a run stands; result.json will have all of it, accuracies and metrics by setting."""

    gradient_updates: int = 0
    train_accuracy: list[list[float]] = field(default_factory=list)  # [stages so far][replicas]
    test_accuracy: list[list[float]] = field(default_factory=list)  # the same
    metrics: list[dict] = field(default_factory=list)  # of each measured stage, by replica
    training_seconds: float = 0.0  # of updates, and of drawing their minibatches
    wall_clock_seconds: float = 0.0  # of all, evaluations included
    resumed_at: list[int] = field(default_factory=list)  # updates after which it was continued
    data: int | None = None  # CRC-32 of images and labels
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


def save_checkpoint(path: Path, args: Args, counters: Counters, tensors: dict) -> None:
    """Write all that a run needs to go on: minibatches, labels and resets follow from the seeds."""
    checkpoint = {"args": asdict(args), "counters": asdict(counters), "tensors": tensors}
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path, args: Args, tensors: dict) -> Counters:
    """Put all back in place; returns the counters."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        refuse_other_flags(args, checkpoint["args"], path)
        for name, tensor in tensors.items():
            tensor.copy_(checkpoint["tensors"][name])
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
        names = ["result.json", "checkpoint.pth"]  # of this script
        for name in [*names, *(f"{name}.tmp" for name in names), "events.out.tfevents.*"]:
            for path in run_dir.glob(name):
                path.unlink()
    # purge_step hides from readers what a killed process logged after its last checkpoint.
    writer = SummaryWriter(str(run_dir), purge_step=counters.gradient_updates + 1)
    table = "\n".join(f"|{flag}|{value}|" for flag, value in asdict(args).items())
    writer.add_text("args", f"|flag|value|\n|-|-|\n{table}")
    return writer


def log_means(writer: SummaryWriter, tag: str, settings: list, values: list, step: int) -> None:
    """Values by replica, [R], as means over the seeds of each setting."""
    means = np.reshape(values, (len(settings), -1)).mean(1)
    for (learning_rate, weight_decay), mean in zip(settings, means, strict=True):
        writer.add_scalar(f"{tag}/lr_{learning_rate:g}_decay_{weight_decay:g}", mean, step)


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


def finish(args: Args, run_dir: Path, counters: Counters, replicas: Replicas) -> None:
    """Write result.json: where it is, a run is finished.

    Outside of its `sweep`, accuracies and metrics are the best setting's.
    """
    measured = (counters.train_accuracy, counters.test_accuracy, counters.metrics)
    sweep = summarise(replicas.settings, *measured)
    best = best_setting(sweep)
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "task": args.task,
        "first_seed": args.first_seed, "num_seeds": args.num_seeds, "args": asdict(args),
        # The accuracies and metrics of `best`, by seed, take the place of all replicas' ones.
        **asdict(counters), **best, "sweep": sweep,
        "updates_per_second": counters.gradient_updates / counters.training_seconds,
        "parameters": replicas.weights.shape[1], "device": device_name(args),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    # fmt: on
    # JSON has no nan, but json.dumps would write NaN: null takes its place.
    result = json.loads(json.dumps(result), parse_constant=lambda constant: None)
    content = json.dumps(result, indent=2).encode()
    write_atomically(run_dir / "result.json", lambda file: file.write(content))
    (run_dir / "checkpoint.pth").unlink(missing_ok=True)
    print(f"{summary(args.task, best)}; {run_dir / 'result.json'}")


def train(args: Args, run_dir: Path) -> None:
    """A run from its seeds, or from its checkpoint, to result.json."""
    checkpoint_path = run_dir / "checkpoint.pth"
    data = load_cifar10(args)
    replicas, update = make_replicas(args, data)
    counters = Counters()
    checksum = zlib.crc32(b"".join(array.tobytes() for array in data))
    if checkpoint_path.exists() and not args.overwrite:
        counters = load_checkpoint(checkpoint_path, args, replicas.tensors())
        counters.resumed_at.append(counters.gradient_updates)
        if counters.data != checksum:
            advice = "use the same --data-dir, or --overwrite"
            sys.exit(f"error: {checkpoint_path} was made with other images; {advice}")
    counters.data = checksum
    counters.git_commits.append(git_commit())

    writer = start_logging(args, run_dir, counters)
    num_replicas, num_parameters = replicas.weights.shape
    total = args.num_stages * args.updates_per_stage
    size = f"{num_replicas} replicas of {num_parameters:,} parameters"
    size += f", {total:,} updates, on {device_name(args)}"
    print(f"{run_dir}: {size}, from update {counters.gradient_updates}", file=sys.stderr)
    start_time = time.perf_counter() - counters.wall_clock_seconds
    checkpoint_time = time.perf_counter()
    stop_signals = catch_stop_signals()
    steps = range(counters.gradient_updates + 1, total + 1)
    # With disable=None there is no bar where there is no terminal.
    progress = tqdm(steps, args.task, total, initial=steps.start - 1, disable=None)
    for step in progress:
        counters.gradient_updates = step
        step_start = time.perf_counter()
        stage, position = divmod(step - 1, args.updates_per_stage)  # of 500: step 501 is (1, 0)
        stage_over = due(args.updates_per_stage, step)
        log_due = due(args.log_interval, step)

        # Begin a stage, or go on in the middle of one
        if position == 0 and due(args.reset_interval, stage):  # never before stage 0
            replicas.reset_heads(stage)
        if position == 0 and due(args.tortoise_interval, stage):
            replicas.weights.copy_(replicas.slow)  # the hare, fast, returns to the tortoise, slow
        if position == 0 or step == steps.start:  # a checkpoint holds no minibatches
            replicas.start_stage(stage)

        # Due after update 1,000, done before 1,001: an evaluation in between sees no fresh units.
        if due(args.redo_interval, step - 1):
            replicas.recycle(step - 1)

        # Learn
        losses = update()
        if log_due or stage_over:
            losses_by_replica = losses.tolist()  # waits for the GPU: this is training's time
        counters.training_seconds += time.perf_counter() - step_start

        # Log
        if log_due:
            log_means(writer, "losses", replicas.settings, losses_by_replica, step)
            speed = step / counters.training_seconds
            writer.add_scalar("charts/updates_per_second", speed, step)

        # Evaluate, at the end of a stage
        if stage_over:
            accuracies = evaluate(replicas, stage)
            counters.train_accuracy.append(accuracies["train_accuracy"])
            counters.test_accuracy.append(accuracies["test_accuracy"])
            for name, values in accuracies.items():
                log_means(writer, name, replicas.settings, values, step)
        if stage_over and due(args.metrics_interval, stage + 1):
            metrics = plasticity_metrics(replicas, stage)
            counters.metrics.append({"stage": stage, **metrics})
            for name, values in metrics.items():
                log_means(writer, f"plasticity/{name}", replicas.settings, values, step)

        # Checkpoint
        stopping = list(stop_signals)  # read once: a signal may come at any line
        auto = args.checkpoint_interval == "auto"
        waited = time.perf_counter() - checkpoint_time
        checkpoint_due = waited >= 300 if auto else due(args.checkpoint_interval, step)
        if args.checkpoint_interval != 0 and (checkpoint_due or stopping):
            writer.flush()
            counters.wall_clock_seconds = time.perf_counter() - start_time
            save_checkpoint(checkpoint_path, args, counters, replicas.tensors())
            checkpoint_time = time.perf_counter()
        if stopping:
            progress.close()
            advice = "; --resume continues" if args.checkpoint_interval != 0 else ""
            print(f"stopped{advice} after update {step}", file=sys.stderr)
            sys.exit(128 + stopping[0])

    on_stop_signals(signal.SIG_DFL)
    writer.close()
    counters.wall_clock_seconds = time.perf_counter() - start_time
    finish(args, run_dir, counters, replicas)


def run(args: Args) -> None:
    """Begin a run or continue it, alone in its directory; replace one only with --overwrite."""
    last_seed = args.first_seed + args.num_seeds - 1
    run_dir = Path(args.run_dir) / f"{args.task}__{args.exp_name}__{args.first_seed}-{last_seed}"
    result_path, checkpoint_path = run_dir / "result.json", run_dir / "checkpoint.pth"
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".lock", blocking=False):
            finished, unfinished = result_path.exists(), checkpoint_path.exists()
            if (finished or unfinished) and not (args.resume or args.overwrite):
                kind = "a finished" if finished else "an unfinished"
                advice = "pass --resume or --overwrite, or change --exp-name or --first-seed"
                sys.exit(f"error: {run_dir} holds {kind} run; {advice}")
            if finished and args.resume:
                saved = json.loads(result_path.read_text())["args"]
                # JSON has lists where flags of several values have tuples.
                saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
                refuse_other_flags(args, saved, result_path)
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
        run(args)
    except OSError as error:  # a full disk, a missing permission
        sys.exit(f"error: {error}")
