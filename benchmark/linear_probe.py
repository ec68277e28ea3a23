"""What a linear readout finds in an encoder's features, after and before its pretraining.

    python benchmark/linear_probe.py --env-id Pong --model runs/Pong__pretrain__1/model.pth

A random policy plays in 16 environments, whose frames the encoder was not trained on; the
console's memory (EnvPool's info["ram"]) tells where ball and paddles were. A ridge regression from
the features of a stack of frames to each of these is fitted on 10 environments, its penalty chosen
on 2 more, and R^2 is that on the last 4; without a ball in play, nothing counts.
For comparison: the encoder as its pretraining found it (the weights of its seed; its residual
blocks give nothing yet, so that it is linear); the same with blocks that give something (the last
BatchNorm of each with scale 1, all with the statistics of these frames); and as many raw values,
the stack in 28x28 pixels.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# Before PyTorch is imported, which then reads what this sets for OpenMP.
import plastic_pretrained_finetune as script

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

NUM_ENVS, TRAINING, VALIDATION = 16, range(10), range(10, 12)
RAM = {  # bytes of the console's memory: Atari Annotated RAM Interface (Anand et al., 2019)
    "Breakout": {"ball x": 99, "ball y": 101, "paddle x": 72},
    "Pong": {
        "ball x": 49,
        "ball y": 54,
        "paddle y": 51,
        "opponent's paddle y": 50,
        "opponent's score": 13,
    },
}


@dataclass
class Args:
    """Fit a linear readout of the game's state to an encoder's features."""

    model: Path  # weights in SimTPR's layout, as --mode pretrain saves them
    env_id: str = "Pong"  # game to play: Breakout or Pong
    model_seed: int = 1  # seed of the model's pretraining
    samples: int = 16_000  # stacks of frames, every fourth of those played
    seed: int = 10_000  # seed of the environments and the actions
    json: Path | None = None  # write the figures to this file too

    def __post_init__(self) -> None:
        """Check the flags. tyro prints a ValueError and ends with code 2."""
        if self.env_id not in RAM:
            raise ValueError(f"--env-id {self.env_id}: must be one of {', '.join(RAM)}")
        if self.samples < 10 * NUM_ENVS:
            raise ValueError(f"--samples must be at least {10 * NUM_ENVS}, not {self.samples}")
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"--json {self.json}: no such directory")


def play(env_id: str, samples: int, seed: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Random play: stacks uint8 [n, 4, 84, 84], state float [n, values], environments' numbers [n].

    Those without a ball in play (its vertical position is 0, or the game is over) are left out: n
    is below `samples`.
    """
    envs = script.make_envs(env_id, NUM_ENVS, seed)
    rng = np.random.default_rng(seed)
    frames, _ = envs.reset()
    stacks, rams, over = [], [], []
    stack = np.zeros((NUM_ENVS, script.FRAME_STACK, 84, 84), np.uint8)
    for step in range(4 * samples // NUM_ENVS):
        actions = rng.integers(envs.action_space.n, size=NUM_ENVS).astype(np.int32)
        frames, _, terminated, truncated, info = envs.step(actions)
        first = info["elapsed_step"] == 0  # after a game's end: the next one's first frame
        earlier = stack[:, 1:] * ~first[:, None, None, None]
        stack = np.concatenate([earlier, frames], axis=1)
        if step % 4 == 3:
            stacks.append(stack)
            rams.append(info["ram"])
            over.append(terminated | truncated)
    ram = np.concatenate(rams)  # uint8 [samples, 128]
    ball = (ram[:, RAM[env_id]["ball y"]] > 0) & ~np.concatenate(over)
    numbers = np.tile(np.arange(NUM_ENVS), len(stacks))
    state = ram[:, list(RAM[env_id].values())].astype(float)
    return torch.from_numpy(np.concatenate(stacks)[ball]), state[ball], numbers[ball]


@torch.no_grad()
def encode(encoder: torch.nn.Module, stacks: Tensor) -> np.ndarray:
    """Features, float64 [n, 3136]."""
    encoder = encoder.eval().to(memory_format=torch.channels_last)
    features = [encoder(script.to_images(part)) for part in stacks.split(500)]
    return torch.cat(features).double().numpy()


@torch.no_grad()
def random_blocks(encoder: torch.nn.Module, stacks: Tensor) -> torch.nn.Module:
    """The same untrained encoder, not linear: scales of 1, statistics of about 2,000 stacks."""
    # Not channels last: BatchNorm's sums would lose most digits there, on a CPU.
    encoder = copy.deepcopy(encoder).train().to(memory_format=torch.contiguous_format)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.ones_(module.weight)
    encoder(script.to_images(stacks[:: max(len(stacks) // 2000, 1)]).contiguous())
    return encoder


def r_squared(features: np.ndarray, state: np.ndarray, envs: np.ndarray) -> np.ndarray:
    """Share of the last environments' variance explained: [n, D], [n, values] -> [values].

    Ridge regression: with the features' covariance diagonalised once, each penalty costs one
    division. Each value has its own.
    """
    training, validation = np.isin(envs, TRAINING), np.isin(envs, VALIDATION)
    test = ~training & ~validation
    x = (features - features[training].mean(0)) / (features[training].std(0) + 1e-6)
    y = (state - state[training].mean(0)) / state[training].std(0)
    eigenvalues, basis = np.linalg.eigh(x[training].T @ x[training])
    projected = basis.T @ (x[training].T @ y[training])
    weights = [
        basis @ (projected / (eigenvalues.clip(0) + penalty)[:, None])
        for penalty in 10.0 ** np.arange(-1, 7)
    ]
    # [penalties][values]
    errors = [np.square(x[validation] @ w - y[validation]).mean(0) for w in weights]
    best = np.stack(weights)[np.argmin(errors, axis=0), :, np.arange(y.shape[1])].T
    return 1 - np.square(x[test] @ best - y[test]).mean(0) / y[test].var(0)


def main(args: Args) -> None:
    """Print a row per value of the game's state, and write the figures where --json says."""
    pretrained = script.load_pretrained(str(args.model))
    torch.manual_seed(args.model_seed)  # the encoder is the first thing that pretraining makes
    fresh = script.SimTPR().backbone
    stacks, state, envs = play(args.env_id, args.samples, args.seed)
    features = {
        "pretrained": encode(pretrained, stacks),
        "before pretraining": encode(fresh, stacks),
        "random blocks": encode(random_blocks(fresh, stacks), stacks),
        "pixels": F.avg_pool2d(stacks.float(), 3).flatten(1).double().numpy(),
    }
    columns = {kind: r_squared(x, state, envs) for kind, x in features.items()}
    figures = {
        name: {kind: column[i] for kind, column in columns.items()}
        for i, name in enumerate(RAM[args.env_id])
    }
    print(f"| R^2, {args.env_id} | " + " | ".join(features) + " |")
    print("|" + "---|" * (1 + len(features)))
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    if args.json is not None:
        content = dict(model=args.model.name, env_id=args.env_id, samples=len(state))
        text = json.dumps(content | {"r_squared": figures}, indent=2)
        script.write_atomically(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(tyro.cli(Args))
