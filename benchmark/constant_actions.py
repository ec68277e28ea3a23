"""What a game pays for holding one action: what a policy has to beat to have learned to see.

    python benchmark/constant_actions.py --env-id Krull
    python benchmark/constant_actions.py --env-id Krull --seed 2 --eval-episodes 10
    python benchmark/constant_actions.py --env-id Krull --seed 2 --actions 3

Every action of the game, or those given, plays the evaluation that ends a training run with the
same --seed, --eval-episodes and --eval-epsilon, the same games from the same starts. The best
action's returns, beside all others, go to result.json in runs/<game>__constant__<seed>, where
benchmark/report.py finds them. (Bellemare et al., 2013, compare with the same baseline, "Const".)
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# Before PyTorch is imported, which then reads what this sets for OpenMP.
import plastic_drq_rainbow_atari as script

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor


@dataclass
class Args:
    """Evaluate each action of a game as a policy."""

    env_id: str = "Alien"  # an Atari game
    seed: int = 1  # of the training runs to compare with
    actions: tuple[int, ...] = ()  # those to hold (none = all)
    eval_episodes: int = 100  # games of each action
    eval_epsilon: float = 0.001  # share of random actions
    run_dir: Path = Path("runs")  # where results go
    overwrite: bool = False  # replace a result that is there

    def __post_init__(self) -> None:
        """As the training script checks its flags. tyro prints a ValueError, exit code 2."""
        names = ("env_id", "seed", "eval_episodes", "eval_epsilon")
        self.settings = script.Args(device="cpu", **{name: getattr(self, name) for name in names})


class ConstantAction:
    """Stands in for evaluate()'s network: one action has the highest value everywhere."""

    support = torch.zeros(1)  # tells evaluate() the device
    head = torch.nn.Identity()  # of which evaluate() switches the noise

    def __init__(self, action: int, num_actions: int) -> None:
        self.values = F.one_hot(torch.tensor(action), num_actions)

    def __call__(self, images: Tensor) -> Tensor:
        return self.values.expand(len(images), -1)  # [n, num_actions]

    def q_values(self, log_probs: Tensor) -> Tensor:
        return log_probs


def main(args: Args) -> None:
    """Print a line per action, and write the result."""
    path = args.run_dir / f"{args.env_id}__constant__{args.seed}" / "result.json"
    if path.exists() and not args.overwrite:
        sys.exit(f"error: {path} exists; pass --overwrite to replace it")
    num_actions = script.make_envs(args.env_id, 1, 0).action_space.n
    actions = args.actions or tuple(range(num_actions))
    if not set(actions) <= set(range(num_actions)):
        sys.exit(f"error: --actions: {args.env_id} has the actions 0 to {num_actions - 1}")
    path.parent.mkdir(parents=True, exist_ok=True)
    start_time, returns = time.perf_counter(), []
    for action in actions:
        policy = ConstantAction(action, num_actions)
        returns.append(script.evaluate(policy, args.settings))
        print(f"action {action}: {script.summary(args.env_id, returns[-1])}", flush=True)
    means = [float(np.mean(values)) for values in returns]
    best = int(np.argmax(means))
    flags = dict(eval_episodes=args.eval_episodes, eval_epsilon=args.eval_epsilon)
    result = {
        "script": "plastic_drq_rainbow_atari.py",
        "exp_name": "constant",
        "env_id": args.env_id,
        "seed": args.seed,
        "args": flags | {"action": actions[best]},
        "env_steps": 0,
        "parameters": 0,
        "episode_returns": returns[best],
        "mean_return": means[best],
        "actions": actions,
        "episode_returns_by_action": returns,
        "wall_clock_seconds": time.perf_counter() - start_time,
        "git_commit": script.git_commit(),
    }
    content = json.dumps(result, indent=2).encode()
    script.write_atomically(path, lambda file: file.write(content))
    print(f"best: action {actions[best]}, {script.summary(args.env_id, returns[best])}; {path}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except OSError as error:  # a full disk, a missing permission
        sys.exit(f"error: {error}")
