# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
r"""Input and label plasticity on CIFAR-10, in one file: all seeds and settings in one process, on a GPU in one kernel.

Paper: "Improving Input and Label Plasticity for Sample Efficient Reinforcement Learning" (NeurIPS 2023),
section 3, Figures 2 (left) and 3, appendix A.2.

    python synth_cifar_plasticity.py --task input                                            # PLASTIC
    python synth_cifar_plasticity.py --task label --exp-name base --no-layer-norm --no-crelu --sam-rho 0 \
        --reset-interval 0                                                                    # base
    python synth_cifar_plasticity.py --task label --learning-rate 0.1 0.01 0.001 --weight-decay 0.01 0.001   # a sweep

Where it departs from the paper's text or fills it in (README.md compares paper, release and this file):
- Learning rate and weight decay are swept there; one value of each by default here.  --learning-rate, --weight-decay
- LayerNorm over channels and pixels of each sample, as released; the paper does not say.           --layer-norm-kind
- CReLU in the fully connected layers alone, as in the other scripts; the next layer's fan-in doubles.  --crelu-scope
- Minibatches are cut from shuffled epochs, so that every image is seen equally often; the paper draws at random.
- Resets come before stages 10, 20, ...; the release's come after stages 0, 10, ...               --reset-interval
"""

import fcntl
import hashlib
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10's channels
CHECKPOINT_VERSION = 1  # to be raised when what a checkpoint holds changes


@dataclass
class Args:
    """Input and label plasticity on CIFAR-10. The defaults are PLASTIC on the input task."""

    # fmt: off
    # Run
    task: Literal["input", "label"] = "input"  # what changes from stage to stage: more images, or other labels
    num_seeds: int = 30  # seeds, trained side by side
    first_seed: int = 1  # the seeds are first-seed, first-seed + 1, ...
    exp_name: str = "synth_cifar_plasticity"  # name of this setting, part of the run's directory
    run_dir: Path = Path("runs")  # run directories are <run-dir>/<task>__<exp-name>__<first-seed>-<num-seeds>
    data_dir: Path = Path("data")  # holds cifar-10-batches-py
    download: bool = True  # download CIFAR-10 (170 MB) where it is absent
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = CUDA where there is one
    cuda_graph: bool = True  # run the update as a CUDA graph (without effect on the CPU)
    torch_threads: int = 0  # PyTorch's CPU threads (0 = its own choice, at most 8)
    resume: bool = False  # continue an unfinished run, start where there is none, leave a finished one as it is
    checkpoint_interval: Literal["auto"] | int = "auto"  # updates between checkpoints (auto = 5 minutes, 0 = off)
    overwrite: bool = False  # replace a run of the same name, finished or not

    # Training (section 3, appendix A.2)
    num_stages: int = 100  # stages of the task
    updates_per_stage: int = 500  # gradient updates in each
    batch_size: int = 128  # images per update
    learning_rate: tuple[float, ...] = (0.01,)  # of SGD; with several, every pair with --weight-decay is trained
    weight_decay: tuple[float, ...] = (0.001,)  # of SGD
    momentum: float = 0.9  # of SGD
    conv_strides: tuple[int, int, int] = (3, 3, 1)  # of the three convolutions (released: 3 1 1)
    label_change: Literal["permute", "cyclic"] = "permute"  # new labels at each stage: a permutation, or y + stage

    # Plasticity interventions
    layer_norm: bool = True  # LayerNorm after each convolution
    layer_norm_scope: Literal["backbone", "all"] = "backbone"  # all = the head's hidden layers too
    layer_norm_kind: Literal["sample", "pixel"] = "sample"  # over channels and pixels, or over the channels of a pixel
    crelu: bool = True  # concatenated ReLU
    crelu_scope: Literal["head", "all"] = "head"  # all = the backbone's layers too
    sam_rho: float = 0.1  # radius of the SAM perturbation (0 = off)
    reset_interval: int = 10  # stages between resets of the head (0 = off)

    # Metrics, logging
    metrics_interval: int = 0  # stages between plasticity metrics (0 = off)
    log_interval: int = 100  # updates between logged losses
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "plastic"  # project at Weights & Biases
    wandb_entity: str | None = None  # team at Weights & Biases
    # fmt: on


# --- Data and tasks -------------------------------------------------------------------------------


class PlainArray:
    """What a pickle gets instead of NumPy's array and dtype: it keeps the state that it is given, nothing more."""

    def __init__(self, *arguments: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class PlainUnpickler(pickle.Unpickler):
    """Admits plain containers, and arrays as PlainArray: a crafted file gets an error, none of its code runs."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy.core", "numpy._core")  # as NumPy 1 wrote it
        if (module, name) == (
            "_codecs",
            "encode",
        ):  # how Python 3 writes bytes in Python 2's protocols
            return lambda text, encoding: text.encode("latin1")
        if f"{module}.{name}" in (
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            "numpy.dtype",
        ):
            return PlainArray
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of cifar-10-batches-py: images, uint8 [N, 3, 32, 32], and labels, int64 [N] in 0..9."""
    try:
        with open(path, "rb") as file:
            batch = PlainUnpickler(file, encoding="bytes").load()
        labels, (_, shape, _, fortran_order, data) = list(batch[b"labels"]), batch[b"data"].state
        if not labels or not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("labels")
        if shape != (len(labels), 3072) or fortran_order or len(data) != 3072 * len(labels):
            raise ValueError("shape or type of the images")
        return np.frombuffer(bytearray(data), np.uint8).reshape(-1, 3, 32, 32), np.array(labels)
    except OSError as error:
        fail(
            f"{path}: {error.strerror}; see --data-dir, or delete {path.parent} to download CIFAR-10 anew",
            1,
        )
    except Exception as error:  # such a file can raise anything
        fail(
            f"{path}: not a file of cifar-10-batches-py ({error}); delete {path.parent} to download CIFAR-10 anew",
            1,
        )


def download(data_dir: Path) -> None:
    """CIFAR-10 from its home page, checked by SHA-256; its directory appears when it is whole."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
        archive, digest = Path(temporary) / "archive.tar.gz", hashlib.sha256()
        try:
            with urllib.request.urlopen(URL, timeout=60) as response, open(archive, "wb") as file:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm(
                    total=size, desc="CIFAR-10", unit="B", unit_scale=True, disable=None
                ) as progress:
                    while part := response.read(2**20):
                        digest.update(part)
                        file.write(part)
                        progress.update(len(part))
        except (OSError, HTTPException) as error:
            fail(
                f"{URL}: {error}; try again, or put cifar-10-batches-py into --data-dir yourself", 1
            )
        if digest.hexdigest() != SHA256:
            fail(
                f"{URL}: the checksum is wrong; try again, or put cifar-10-batches-py into --data-dir yourself",
                1,
            )
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        try:
            os.replace(Path(temporary) / "cifar-10-batches-py", data_dir / "cifar-10-batches-py")
        except OSError:  # another process may have been faster
            if not (data_dir / "cifar-10-batches-py").exists():
                raise


def load_cifar10(args: Args) -> tuple[np.ndarray, ...]:
    """Training images and labels, test images and labels."""
    directory = args.data_dir / "cifar-10-batches-py"
    if not directory.exists():
        if not args.download:
            fail(f"{directory} does not exist; pass --download, or another --data-dir", 1)
        download(args.data_dir)
    training = [read_batch(directory / f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*training, strict=True))
    return images, labels, *read_batch(directory / "test_batch")


ORDER, BATCHES, LABELS, RESETS, MEASURED = range(5)  # each seed's streams of random numbers


def seen_images(seed: int, stage: int, num_images: int, args: Args) -> np.ndarray:
    """Indices of the images that a stage trains on: the first chunks of the seed's order, or all (section 3)."""
    order = np.random.default_rng([seed, ORDER]).permutation(num_images)
    # What is left over by equal chunks is not used.
    return order[: (stage + 1) * (num_images // args.num_stages)] if args.task == "input" else order


def stage_batches(seed: int, stage: int, num_images: int, args: Args) -> np.ndarray:
    """A stage's minibatches: indices [updates, batch], cut from a stream of shuffled epochs."""
    rng, seen = (
        np.random.default_rng([seed, BATCHES, stage]),
        seen_images(seed, stage, num_images, args),
    )
    needed = args.updates_per_stage * args.batch_size
    epochs = [rng.permutation(seen) for _ in range(math.ceil(needed / len(seen)))]
    return np.concatenate(epochs)[:needed].reshape(args.updates_per_stage, args.batch_size)


def stage_labels(seed: int, stage: int, args: Args) -> np.ndarray:
    """The label of each class in a stage, [10] (section 3)."""
    if args.task == "input":
        return np.arange(10)
    if args.label_change == "cyclic":
        return (np.arange(10) + stage) % 10
    return np.random.default_rng([seed, LABELS, stage]).permutation(10)


# --- Networks -------------------------------------------------------------------------------------


class SampleLayerNorm(nn.Module):
    """LayerNorm over all channels and pixels of a sample, scale and shift by channel: [B, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[1:], eps=1e-6)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


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


class Network(nn.Module):
    """Three convolutions (32, 64, 64 channels) and three fully connected layers (512, 128, 10) (section 3)."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        norm = SampleLayerNorm if args.layer_norm_kind == "sample" else PixelLayerNorm
        crelu = args.crelu and args.crelu_scope == "all"
        layers: list[nn.Module] = []
        size, in_channels = 32, 3
        for channels, stride in zip((32, 64, 64), args.conv_strides, strict=True):
            layers.append(nn.Conv2d(in_channels, channels, 3, stride))
            if args.layer_norm:
                layers.append(norm(channels))
            layers.append(CReLU() if crelu else nn.ReLU())
            in_channels = channels * (2 if crelu else 1)
            size = (size - 3) // stride + 1
        self.backbone = nn.Sequential(*layers, nn.Flatten())
        layers, in_features = [], in_channels * size**2
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


# --- Update ---------------------------------------------------------------------------------------


class Replicas:
    """All replicas: every pair of learning rate and weight decay times every seed.

    Replica r is setting r // S, seed r % S, and a row of `weights` and `momentum` [R, P] holds all its parameters; what
    one replica does, no other one feels. On a GPU all replicas share each kernel; on a CPU, which small kernels keep
    busy, they take turns. `position` is the next update of the stage, `skipped` [R] counts each replica's updates that
    were left out for numbers that are not finite; all of it lies on the device and stays where it is.
    """

    def __init__(self, args: Args, data: tuple[np.ndarray, ...], device: torch.device) -> None:
        self.args, self.device = args, device
        self.images, self.labels, self.test_images, self.test_labels = (
            torch.from_numpy(x).to(device) for x in data
        )
        self.fingerprint = zlib.crc32(b"".join(x.tobytes() for x in data))  # which images these are
        self.mean, self.std = (
            255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD)
        )

        self.seeds = [args.first_seed + i for i in range(args.num_seeds)]
        self.settings = [(lr, decay) for lr in args.learning_rate for decay in args.weight_decay]
        settings = torch.tensor(self.settings, device=device).repeat_interleave(args.num_seeds, 0)
        self.learning_rate, self.weight_decay = settings[:, :1], settings[:, 1:]
        num_replicas = len(settings)
        self.seed_index = torch.arange(num_replicas, device=device) % args.num_seeds
        self.groups = (
            [slice(r, r + 1) for r in range(num_replicas)]
            if device.type == "cpu"
            else [slice(num_replicas)]
        )

        with torch.device("meta"):  # its shape; the parameters come from `weights`
            self.network = Network(args)
        self.shapes = {name: w.shape for name, w in self.network.named_parameters()}
        self.head_start = sum(
            w.numel() for w in self.network.backbone.parameters()
        )  # the head's columns are the last
        self.vmapped_network = vmap(
            lambda parameters, images: functional_call(self.network, parameters, (images,))
        )
        self.weights = self.initial_weights(self.seeds)
        self.momentum = torch.zeros_like(self.weights)
        self.skipped = torch.zeros(num_replicas, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.batches = torch.zeros(
            (args.updates_per_stage, args.num_seeds, args.batch_size), dtype=torch.int64
        )
        self.batches = self.batches.to(device)
        self.class_labels = torch.zeros((args.num_seeds, 10), dtype=torch.int64, device=device)

    def initial_weights(self, seeds: list[int]) -> Tensor:
        """Newly initialised weights, drawn from these seeds [S], the same for every setting: [R, P]."""
        rows = []
        for seed in seeds:
            torch.manual_seed(seed)
            rows.append(parameters_to_vector(Network(self.args).parameters()).detach())
        return torch.stack(rows).repeat(len(self.settings), 1).to(self.device)

    def start_stage(self, stage: int, position: int = 0) -> None:
        """Draw the stage's minibatches and labels, all a function of seed and stage; go on at update `position`."""
        args, num_images = self.args, len(self.images)
        batches = np.stack(
            [stage_batches(seed, stage, num_images, args) for seed in self.seeds], axis=1
        )
        self.batches.copy_(torch.from_numpy(batches))
        self.class_labels.copy_(
            torch.from_numpy(np.stack([stage_labels(seed, stage, args) for seed in self.seeds]))
        )
        self.position.fill_(position)

    @torch.no_grad()
    def reset_heads(self, stage: int) -> None:
        """Re-initialise the fully connected layers and clear their momentum; in place (section 3)."""
        seeds = [
            int(np.random.default_rng([seed, RESETS, stage]).integers(2**63)) for seed in self.seeds
        ]
        self.weights[:, self.head_start :] = self.initial_weights(seeds)[:, self.head_start :]
        self.momentum[:, self.head_start :] = 0

    def standardise(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, 32, 32] -> float32."""
        return (images - self.mean) / self.std

    def forward(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits of G replicas, each on images of its own: [G, P], [G, B, 3, 32, 32] -> [G, B, 10]."""
        parts = weights.split([shape.numel() for shape in self.shapes.values()], dim=1)
        parameters = {
            k: part.view(-1, *shape)
            for (k, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        if len(weights) == 1:  # vmap would take a quarter more time on a CPU
            return functional_call(
                self.network, {k: w[0] for k, w in parameters.items()}, (images[0],)
            )[None]
        return self.vmapped_network(parameters, images)

    def gradient(self, weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of each replica, [G], and its gradient, [G, P]."""
        weights = weights.detach().requires_grad_()
        logits = self.forward(weights, images)
        losses = (
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            .view(labels.shape)
            .mean(1)
        )
        return losses.detach(), torch.autograd.grad(losses.sum(), weights)[0]

    def next_batch(self, group: slice) -> tuple[Tensor, Tensor]:
        """The minibatch of each replica: standardised images [G, B, 3, 32, 32] and labels [G, B]."""
        seeds = self.seed_index[group]
        index = self.batches[self.position % len(self.batches), seeds]  # capture() runs ahead
        return self.standardise(self.images[index]), self.class_labels[seeds].gather(
            1, self.labels[index]
        )

    @torch.no_grad()
    def sgd(self, group: slice, gradient: Tensor) -> None:
        """SGD with momentum and weight decay, in place; a replica that would become infinite or nan stays as it is."""
        w, m = self.weights[group], self.momentum[group]
        new_m = gradient.add(m, alpha=self.args.momentum).addcmul_(
            self.weight_decay[group], w
        )  # mu m + g + lambda w
        new_w = torch.addcmul(w, self.learning_rate[group], new_m, value=-1)  # w - eta m
        finite = new_w.norm(dim=1, keepdim=True).isfinite()
        torch.where(finite, new_m, m, out=m)
        torch.where(finite, new_w, w, out=w)
        self.skipped[group] += ~finite[:, 0]

    def update(self) -> Tensor:
        """One gradient update of every replica. Returns the losses, [R]."""
        losses = []
        for group in self.groups:
            images, labels = self.next_batch(group)
            weights = self.weights[group]
            loss, gradient = self.gradient(weights, images, labels)
            if (
                self.args.sam_rho > 0
            ):  # SAM applies the gradient at w + rho g / |g|, each replica with its own norm
                distance = self.args.sam_rho / (gradient.norm(dim=1, keepdim=True) + 1e-12)
                _, gradient = self.gradient(weights + distance * gradient, images, labels)
            self.sgd(group, gradient)
            losses.append(loss)
        self.position += 1
        return torch.cat(losses)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor, index: Tensor) -> list[float]:
        """Share of images `index` [S, N] whose label in this stage is predicted, of each replica."""
        correct = torch.zeros(len(self.weights), dtype=torch.int64, device=self.device)
        for group in self.groups:
            seeds = self.seed_index[group]
            for part in index[seeds].split(self.args.batch_size, dim=1):
                predicted = self.forward(
                    self.weights[group], self.standardise(images[part])
                ).argmax(2)
                correct[group] += (
                    predicted == self.class_labels[seeds].gather(1, labels[part])
                ).sum(1)
        return (correct.double() / index.shape[1]).tolist()

    def evaluate(self, stage: int) -> tuple[list[float], list[float]]:
        """Accuracy of each replica on images that the stage trains on, 10,000 at most, and on the test images."""
        some = []
        for seed in self.seeds:
            seen = seen_images(seed, stage, len(self.images), self.args)
            some.append(np.random.default_rng([seed, MEASURED, stage]).permutation(seen)[:10_000])
        train = self.accuracy(
            self.images, self.labels, torch.from_numpy(np.stack(some)).to(self.device)
        )
        every = torch.arange(len(self.test_images), device=self.device).expand(len(self.seeds), -1)
        return train, self.accuracy(self.test_images, self.test_labels, every)

    def tensors(self) -> dict[str, Tensor]:
        """All that update() changes in place, but for the position in the stage."""
        return {"weights": self.weights, "momentum": self.momentum, "skipped": self.skipped}


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


# --- Metrics --------------------------------------------------------------------------------------


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


def plasticity_metrics(replicas: Replicas, stage: int) -> dict[str, list[float | None]]:
    """Active units on 512 images that the stage trains on, sharpness on 32 of them: {name: [R]}, None for nan."""
    metrics: dict[str, list[float | None]] = {}
    network = Network(replicas.args).to(replicas.device)
    for seed, weights in zip(replicas.seed_index.tolist(), replicas.weights, strict=True):
        vector_to_parameters(weights, network.parameters())
        index = replicas.batches[:, seed].flatten()[:512]
        images = replicas.standardise(replicas.images[index])
        labels = replicas.class_labels[seed, replicas.labels[index[:32]]]
        values = {
            f"active_units/{k}": v
            for k, v in active_units(network, partial(network, images)).items()
        }
        generator = Generator(replicas.device).manual_seed(stage)
        loss = F.cross_entropy(network(images[:32]), labels)
        values["hessian_max_eigenvalue"] = max_eigenvalue(
            loss, list(network.parameters()), generator
        )
        for name, value in values.items():
            metrics.setdefault(name, []).append(value if math.isfinite(value) else None)
    return metrics


# --- Checkpoint -----------------------------------------------------------------------------------

# Flags that may differ when a run is continued.
MAY_CHANGE = set(
    "run_dir data_dir download device cuda_graph torch_threads resume checkpoint_interval overwrite log_interval track "
    "wandb_project_name wandb_entity".split()
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
    """Where a run stands. `train_accuracy` and `test_accuracy`: [stages done][replicas]; `metrics`: of some stages."""

    updates: int = 0
    train_accuracy: list[list[float]] = field(default_factory=list)
    test_accuracy: list[list[float]] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    measuring_seconds: float = 0.0  # of them in evaluations and metrics
    resumed_at: list[int] = field(default_factory=list)  # updates after which the run was continued
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


def save_checkpoint(path: Path, flags: dict, counters: Counters, replicas: Replicas) -> None:
    """Write all that a run needs to go on; minibatches, labels and resets follow from seed and stage."""
    checkpoint = {
        "script": Path(__file__).name,
        "version": CHECKPOINT_VERSION,
        "args": flags,
        "counters": asdict(counters),
        "tensors": replicas.tensors(),
        "data": replicas.fingerprint,
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


def load_checkpoint(path: Path, flags: dict, replicas: Replicas) -> Counters:
    """Put all back in place; TensorBoard's files are cut to what they were, so that no step is there twice.

    Ends with one line if the file is not a checkpoint of this script, version and shape, or of other flags or images.
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
        if checkpoint["data"] != replicas.fingerprint:
            fail(f"{path} was made with other images; use the same --data-dir, or --overwrite", 1)
        own, tensors = replicas.tensors(), checkpoint["tensors"]
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
        if not 0 < counters.updates <= flags["num_stages"] * flags["updates_per_stage"]:
            raise ValueError
        if len(counters.resumed_at) >= counters.updates or not 0 <= counters.seconds < math.inf:
            raise ValueError
        shape = ((counters.updates - 1) // flags["updates_per_stage"], len(replicas.weights))
        for accuracies in (counters.train_accuracy, counters.test_accuracy):
            values = np.array(accuracies, dtype=float).reshape(shape)
            if len(accuracies) != shape[0] or not ((values >= 0) & (values <= 1)).all():
                raise ValueError
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
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
    "num_seeds": (1, 100_000), "first_seed": (0, MANY), "num_stages": (1, 50_000), "updates_per_stage": (1, MANY),
    "batch_size": (1, 65_536), "learning_rate": (1e-12, MANY), "weight_decay": (0, MANY), "momentum": (0, 1),
    "conv_strides": (1, 10), "sam_rho": (0, MANY), "reset_interval": (0, MANY), "metrics_interval": (0, MANY),
    "log_interval": (1, MANY), "torch_threads": (0, 1024), "checkpoint_interval": (0, MANY),
}
# fmt: on


def resolve(args: Args) -> Args:
    """Fill in what is `auto`; end with one line at the first flag that makes no sense. Writes nothing."""
    for name, (low, high) in RANGES.items():
        values = getattr(args, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value != "auto" and not low <= value <= high:  # nan is out of every range
                fail(f"--{name.replace('_', '-')} must be from {low:,} to {high:,}, not {value}", 2)
    for name, values in (
        ("--learning-rate", args.learning_rate),
        ("--weight-decay", args.weight_decay),
    ):
        if not values or len({f"{value:g}" for value in values}) < len(values):
            fail(f"{name} needs a value, or several different ones", 2)
    size = 32
    for stride in args.conv_strides:
        size = (size - 3) // stride + 1 if size >= 3 else 0
    if size < 1:
        fail(f"--conv-strides {' '.join(map(str, args.conv_strides))} leave no pixel", 2)
    if args.resume and args.overwrite:
        fail("--resume goes on with what is there and --overwrite begins anew: pass one of them", 2)
    if (
        args.exp_name in ("", "..")
        or Path(args.exp_name).name != args.exp_name
        or not args.exp_name.isprintable()
    ):
        fail(f"--exp-name {args.exp_name!r}: must be a plain file name", 2)
    for flag, path in (("--run-dir", args.run_dir), ("--data-dir", args.data_dir)):
        if not str(path).isprintable():
            fail(f"{flag} {str(path)!r}: must be printable", 2)
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


def memory_needed(args: Args) -> int:
    """Bytes that a run holds on its device at most, PyTorch itself and the images aside, about."""
    with torch.device("meta"):  # shapes without memory
        parameters = sum(w.numel() for w in Network(args).parameters())
    num_replicas = args.num_seeds * len(args.learning_rate) * len(args.weight_decay)
    together = num_replicas if args.device == "cuda" else 1  # see Replicas
    size = (32 - 3) // args.conv_strides[0] + 1
    # Of each replica: weights, momentum, a copy while they are drawn. Of those together: gradient, perturbed weights,
    # temporaries; of each image: itself, its patches, and thrice the first convolution's outputs, the largest.
    images = args.batch_size * (3 * 3 * 32**2 + 27 * size**2 + 3 * 2 * 32 * size**2)
    batches = 8 * args.num_seeds * args.updates_per_stage * args.batch_size
    return 4 * (num_replicas * 3 * parameters + together * (5 * parameters + images)) + 2 * batches


def due(interval: int, count: int) -> bool:
    """Whether `count` is a multiple of `interval`; never for interval 0."""
    return interval > 0 and count > 0 and count % interval == 0


def run(args: Args, stop: Stop) -> None:
    """Begin a run or continue it, alone in its directory; leave a finished one as it is."""
    run_dir = args.run_dir / f"{args.task}__{args.exp_name}__{args.first_seed}-{args.num_seeds}"
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    flags = json.loads(json.dumps(asdict(args), default=str))  # as result.json gives them back
    needed, available = (
        memory_needed(args) / 2**30,
        memory_available(torch.device(args.device)) / 2**30,
    )
    if needed > available and (args.overwrite or not result_path.exists()):
        sizes = f"about {needed:,.1f} GiB of memory, and {args.device} has {available:,.1f} free"
        fail(f"needs {sizes}; lower --num-seeds, --batch-size or the number of settings", 1)
    data = load_cifar10(args) if args.overwrite or not result_path.exists() else ()
    if data and len(data[0]) < args.num_stages:
        fail(f"--num-stages {args.num_stages}: there are only {len(data[0]):,} training images", 2)
    with lock_directory(run_dir):
        if result_path.exists() and not args.overwrite:
            if not args.resume:
                fail(
                    f"{run_dir} holds a finished run; change --exp-name or --first-seed, or pass --overwrite",
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
        train(run_dir, args, flags, data or load_cifar10(args), resumed, stop)


def device_name(args: Args) -> str:
    """The GPU's name, or the number of the CPU's threads."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def train(
    run_dir: Path, args: Args, flags: dict, data: tuple[np.ndarray, ...], resumed: bool, stop: Stop
) -> None:
    """From seeding, or from the checkpoint, to result.json. `flags` are the args as JSON has them."""
    checkpoint_path, result_path = run_dir / "checkpoint.pth", run_dir / "result.json"
    replicas = Replicas(args, data, torch.device(args.device))
    parameters = replicas.weights.shape[1]
    total_updates = args.num_stages * args.updates_per_stage
    names = [f"lr_{lr:g}_decay_{decay:g}" for lr, decay in replicas.settings]

    counters = load_checkpoint(checkpoint_path, flags, replicas) if resumed else Counters()
    if resumed:
        counters.resumed_at.append(counters.updates)
        stop.hint = "; --resume continues the run"
    if args.track:
        import wandb

        project = {
            "project": args.wandb_project_name,
            "entity": args.wandb_entity,
            "name": run_dir.name,
        }
        try:
            tracked = wandb.init(
                **project, id=counters.wandb_id, resume="allow", config=flags, sync_tensorboard=True
            )
        except wandb.Error as error:  # no login, no network
            fail(f"--track: Weights & Biases says: {' '.join(str(error).split())}", 1)
        counters.wandb_id = tracked.id
    for name in ("result.json", "checkpoint.pth"):  # of an overwritten run
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
    start = f"continued after update {counters.updates:,}, " if resumed else ""
    size = f"{len(replicas.settings) * args.num_seeds} replicas of {parameters:,} parameters, {total_updates:,} updates"
    print(
        f"{run_dir}: {start}{size}, on {device_name(args)}, about {memory_needed(args) / 2**30:.1f} GiB"
    )

    update = replicas.update
    if args.cuda_graph and args.device == "cuda":
        replicas.start_stage(0)
        update = capture(update, [*replicas.tensors().values(), replicas.position])
    start_time = time.perf_counter() - counters.seconds
    checkpoint_time = time.perf_counter()
    progress = tqdm(
        initial=counters.updates, total=total_updates, desc=args.task, unit="update", disable=None
    )
    stop.obey(at_once=False)
    for stage in range(len(counters.test_accuracy), args.num_stages):
        done = (
            counters.updates - stage * args.updates_per_stage
        )  # of this stage, where the run was stopped
        if done == 0 and due(args.reset_interval, stage):
            replicas.reset_heads(stage)
        replicas.start_stage(stage, done)
        for _ in range(done, args.updates_per_stage):
            losses = update()
            counters.updates += 1
            progress.update()

            if due(args.log_interval, counters.updates):
                for name, loss in zip(
                    names, losses.view(len(names), -1).mean(1).tolist(), strict=True
                ):
                    writer.add_scalar(f"losses/{name}", loss, counters.updates)
                training_time = time.perf_counter() - start_time - counters.measuring_seconds
                writer.add_scalar(
                    "charts/updates_per_second", counters.updates / training_time, counters.updates
                )
            if args.checkpoint_interval == "auto":
                checkpoint_due = time.perf_counter() - checkpoint_time >= 300
            else:
                checkpoint_due = due(args.checkpoint_interval, counters.updates)
            # Before an evaluation too: it can take minutes.
            stage_over = due(args.updates_per_stage, counters.updates)
            if args.checkpoint_interval != 0 and (checkpoint_due or stage_over or stop.signum):
                counters.seconds = time.perf_counter() - start_time
                writer.flush()
                try:
                    save_checkpoint(checkpoint_path, flags, counters, replicas)
                    stop.hint = "; --resume continues the run"
                except OSError as error:  # the one before stays, if there is one
                    print(
                        f"warning: {checkpoint_path} not written: {error.strerror}", file=sys.stderr
                    )
                checkpoint_time = time.perf_counter()
            if stop.signum:
                progress.close()
                writer.close()
                stop.obey(at_once=True)

        measuring_start = time.perf_counter()
        stop.obey(
            at_once=args.checkpoint_interval != 0
        )  # the checkpoint of this very update is written
        train_accuracy, test_accuracy = replicas.evaluate(stage)
        metrics = (
            plasticity_metrics(replicas, stage) if due(args.metrics_interval, stage + 1) else {}
        )
        stop.obey(at_once=False)
        counters.train_accuracy.append(train_accuracy)
        counters.test_accuracy.append(test_accuracy)
        if metrics:
            counters.metrics.append({"stage": stage} | metrics)
        measured = {"train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
        for tag, values in (
            measured | {f"plasticity/{tag}": values for tag, values in metrics.items()}
        ).items():
            for name, of_setting in zip(
                names, np.array(values, dtype=float).reshape(len(names), -1), strict=True
            ):
                writer.add_scalar(f"{tag}/{name}", of_setting.mean(), counters.updates)
        counters.measuring_seconds += time.perf_counter() - measuring_start
    progress.close()
    writer.close()

    wall_clock = time.perf_counter() - start_time
    training_time = wall_clock - counters.measuring_seconds
    sweep = summarise(replicas, counters)
    best = max(sweep, key=lambda setting: setting["final_accuracy_mean"])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    # fmt: off
    result = {
        "script": Path(__file__).name, "exp_name": args.exp_name, "task": args.task, "first_seed": args.first_seed,
        "num_seeds": args.num_seeds, "args": flags, **best, "sweep": sweep,
        "gradient_updates": counters.updates, "parameters": parameters, "resumed_at": counters.resumed_at,
        "wall_clock_seconds": wall_clock, "updates_per_second": counters.updates / training_time,
        "data": replicas.fingerprint, "device": device_name(args), "versions": versions, "git_commit": git_commit(),
    }
    # fmt: on
    write_atomically(
        result_path, lambda file: file.write(json.dumps(result, indent=2, allow_nan=False).encode())
    )
    checkpoint_path.unlink(missing_ok=True)
    accuracy = f"{best['final_accuracy_mean']:.3f}"
    if args.num_seeds > 1:
        low, high = best["final_accuracy_interval"]
        accuracy += f" [{low:.3f}, {high:.3f}] over {args.num_seeds} seeds"
    setting = f"learning rate {best['learning_rate']:g}, weight decay {best['weight_decay']:g}"
    print(f"{args.task}: final test accuracy {accuracy}, at {setting}; {result_path}")


def summarise(replicas: Replicas, counters: Counters) -> list[dict]:
    """For each setting: accuracies and metrics by seed and stage, final and mean accuracy, and their intervals."""
    sweep = []
    for i, (learning_rate, weight_decay) in enumerate(replicas.settings):
        own = slice(i * len(replicas.seeds), (i + 1) * len(replicas.seeds))
        train, test = (
            np.array(x)[:, own].T for x in (counters.train_accuracy, counters.test_accuracy)
        )
        setting = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        for name, values in (("final_accuracy", test[:, -1]), ("mean_accuracy", test.mean(1))):
            setting |= {name: values.tolist(), f"{name}_mean": float(values.mean())}
            setting[f"{name}_interval"] = bootstrap_interval(values)
        setting["skipped_updates"] = replicas.skipped[own].tolist()
        setting |= {"test_accuracy": test.tolist(), "train_accuracy": train.tolist()}
        setting["metrics"] = [
            {k: v if k == "stage" else v[own] for k, v in one.items()} for one in counters.metrics
        ]
        sweep.append(setting)
    return sweep


def bootstrap_interval(values: np.ndarray) -> list[float] | None:
    """95% interval of the mean over seeds, by the percentile bootstrap: [N] -> [low, high]; None for one seed."""
    if len(values) < 2:
        return None
    samples = np.random.default_rng(0).choice(values, (10_000, len(values)))
    return np.percentile(samples.mean(1), [2.5, 97.5]).tolist()


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
        run(args, stop)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail("out of memory; lower --num-seeds, --batch-size or the number of settings", 1)
    except OSError as error:  # no permission, no space, no such directory, no network
        fail(f"{error.filename or args.run_dir}: {error.strerror or error}", 1)
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # on the way out, one more changes nothing
