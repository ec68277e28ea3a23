"""How long the scripts' updates take, by part, how long a full run would take, and its memory.

    python benchmark/speed.py --device cpu

Figures of each method, printed and in --json; those that end in _ms are medians in milliseconds:

- update_ms: one gradient update as the script runs it (CUDA: as a graph)
- act_ms: the choice of one action, until the host has it
- env_step_ms: one step of the environment, stored (DMC: an agent step); render_ms: its frame alone
- eager_update_ms, parts_ms: an update without a graph, and its parts (CUDA: it waits for the device
  around each part). Of parts within parts the outer one counts; what no part covers is "other"
- full_run_hours_without_evaluation: all updates and steps of a run, one after the other
- memory_gib: what a method takes until it has made an update (CUDA: at its peak; CPU: by how much
  the process grew, so that the first method pays for PyTorch)

Machines drift, so all methods of a script are held ready (about 1 GB each) and take turns. Nothing
else should run. Other than in a run, actions are random, DMC's replay buffer is small, the
pretrained encoder's weights and the synthetic experiment's images are random.
"""

import json
import pkgutil
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
# Before PyTorch is imported, which then reads what this sets for OpenMP.
import plastic_drq_rainbow_atari
import plastic_pretrained_finetune
import synth_cifar_plasticity

# isort: split
import numpy as np
import torch
import tyro

WARM_UP = 5  # calls before those that count

# --- Scripts ---


@dataclass
class Subject:
    """One method of one script, ready to run."""

    eager_update: Callable[[], object]  # an update without a graph, for its parts
    calls: dict[str, Callable[[], object]]  # what else is timed, by the name of its figure
    updates: int  # of a full run
    env_steps: int = 0  # of a full run
    seeds: int = 1  # trained side by side


def rainbow(script: ModuleType, device: str, **flags) -> Subject:
    """DrQ-Rainbow on Alien after 2,000 random interactions."""
    args = script.Args(device=device, **flags)
    agent, replay, update, act = script.make_agent(args, script.make_generators(args)["sampling"])
    envs, rng = script.make_envs(args.env_id, 1, args.seed), np.random.default_rng(0)
    replay.start(envs.reset()[0][0, 0])

    def env_step() -> None:
        action = rng.integers(agent.num_actions, size=1).astype(np.int32)
        frames, rewards, terminated, truncated, _ = envs.step(action)
        done = bool(terminated[0] or truncated[0])  # EnvPool's next step resets
        replay.add(int(action[0]), float(np.sign(rewards[0])), done, frames[0, 0])

    for _ in range(2_000):
        env_step()
    calls = {"update_ms": update, "act_ms": lambda: int(act()), "env_step_ms": env_step}
    return Subject(lambda: agent.update(replay), calls, agent.num_updates, args.total_timesteps)


def dmc(device: str, **flags) -> Subject:
    """DrQ-SAC on quadruped-run after 200 random interactions."""
    import plastic_drq_sac_dmc  # needs a renderer, which the others do without

    args = plastic_drq_sac_dmc.Args(device=device, buffer_size=2_000, **flags)
    env, generators = plastic_drq_sac_dmc.make_env(args), plastic_drq_sac_dmc.make_generators(args)
    agent, replay, update, act = plastic_drq_sac_dmc.make_agent(args, env, generators)
    rng = np.random.default_rng(0)
    replay.start(env.reset()[0])

    def env_step() -> None:
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        frame, reward, terminated, truncated, _ = env.step(action)
        replay.add(action, reward, terminated, frame)
        if terminated or truncated:
            replay.start(env.reset()[0])

    def eager_update() -> None:
        agent.update(replay.sample(args.batch_size, generators["sampling"]))

    for _ in range(200):
        env_step()
    calls = {"update_ms": update, "act_ms": lambda: act().cpu()}
    calls |= {"env_step_ms": env_step, "render_ms": env.frame}
    updates = (args.agent_steps - args.learning_starts + 1) * args.updates_per_step
    return Subject(eager_update, calls, updates, args.agent_steps)


def synth(device: str, **flags) -> Subject:
    """The synthetic experiment's first stage, on random images."""
    args, rng = synth_cifar_plasticity.Args(device=device, **flags), np.random.default_rng(0)
    images = rng.integers(256, size=(5000, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(10, size=5000)
    data = (images, labels, images[:100], labels[:100])
    replicas, update = synth_cifar_plasticity.make_replicas(args, data)
    replicas.start_stage(0)
    updates = args.num_stages * args.updates_per_stage
    return Subject(replicas.update, {"update_ms": update}, updates, seeds=args.num_seeds)


# What prepares a method, the methods' flags, and the update's parts: functions by the names that
# they have in the script.
# fmt: off
BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
RAINBOW_PARTS = (
    "ReplayBuffer.sample augment QNetwork.sample_noise torch.Tensor.backward "
    "torch.nn.utils.clip_grad_norm_ torch.optim.Adam.step soft_update "
    "ReplayBuffer.update_priorities "
)
SCRIPTS = {
    "plastic_drq_rainbow_atari": (
        partial(rainbow, plastic_drq_rainbow_atari),
        {"base": BASE, "PLASTIC†": dict(crelu=False, sam_rho=0.0), "PLASTIC": {}},
        RAINBOW_PARTS + "Agent.td_target QNetwork.forward sam_perturbed",
    ),
    "plastic_drq_sac_dmc": (
        dmc,
        {"base": BASE, "PLASTIC": {}, "PLASTIC, fast rendering": dict(render_quality="fast")},
        "ReplayBuffer.sample augment Agent.td_target Critic.forward Actor.sample set_gradient "
        "sam_perturbed torch.optim.Adam.step soft_update",
    ),
    "plastic_pretrained_finetune": (
        partial(rainbow, plastic_pretrained_finetune, from_scratch=True),
        {
            "base": {}, "SAM, Reset†": dict(sam_rho=0.1, reset_interval=40_000),
            "base, not frozen": dict(freeze_backbone=False),
        },
        RAINBOW_PARTS + "Backbone.forward DuelingHead.forward",
    ),
    "synth_cifar_plasticity": (
        synth,
        {
            f"{method}, {seeds} seeds": BASE | dict(sam_rho=rho, num_seeds=seeds)
            for method, rho in (("base", 0.0), ("SAM", 0.1)) for seeds in (1, 3, 10, 30)
        },
        "Replicas.next_batch Replicas.forward torch.autograd.grad Replicas.sgd",
    ),
}
# fmt: on


@dataclass
class Args:
    """Time the scripts' updates by part."""

    device: Literal["cpu", "cuda"] = "cpu"  # where to run
    script: Literal[("all", *(f"{name}.py" for name in SCRIPTS))] = "all"  # what to run
    quick: bool = False  # few updates of small batches: does it work, not how fast is it
    rounds: int = 5  # in each of them, all methods take a turn of 20 updates
    json: Path | None = None  # write the figures to this file too

    def __post_init__(self) -> None:
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"--json {self.json}: no such directory")
        if self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, not {self.rounds}")


# --- Measuring ---


def now(device: str) -> float:
    """Milliseconds, once the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def time_ms(function: Callable[[], object], device: str) -> float:
    """Wall-clock of one call, the device's work included."""
    start = now(device)
    function()
    return now(device) - start


def medians(samples: list) -> dict | float:
    """The median; of dictionaries, that of each key."""
    if isinstance(samples[0], dict):
        return {key: medians([sample[key] for sample in samples]) for key in samples[0]}
    return statistics.median(samples)


@contextmanager
def clocked(script: str, functions: list[str], device: str) -> Iterator[Counter]:
    """Milliseconds in the script's functions. Of calls within calls the outer one counts."""
    ms, running = Counter(), []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        if running:
            yield
            return
        running.append(name)
        start = now(device)
        yield
        ms[name] += now(device) - start
        running.clear()

    def wrap(name: str, function: Callable) -> Callable:
        @contextmanager
        def block(*args) -> Iterator[None]:
            with span(name), function(*args):
                yield

        # sam_perturbed stands in a `with` statement, whose block counts.
        return block if name == "sam_perturbed" else span(name)(function)

    with ExitStack() as patches:
        for name in functions:
            place = f"{script}.{name}"
            patches.enter_context(mock.patch(place, wrap(name, pkgutil.resolve_name(place))))
        yield ms


def take_turn(subject: Subject, script: str, repeats: int, device: str) -> dict:
    """Medians in ms: of each call, of an eager update and of its parts."""
    turn, samples = {}, []
    for name, call in subject.calls.items():
        ms = [time_ms(call, device) for _ in range(WARM_UP + repeats)]
        turn[name] = medians(ms[WARM_UP:])
    with clocked(script, SCRIPTS[script][2].split(), device) as parts:
        for _ in range(WARM_UP + repeats):
            parts.clear()
            total = time_ms(subject.eager_update, device)
            parts["other"] = total - parts.total()
            samples.append({"eager_update_ms": total, "parts_ms": dict(parts)})
    return turn | medians(samples[WARM_UP:])


def memory_gib(device: str) -> float:
    """Peak of the device's memory since it was last reset; CPU: what the process holds now."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def summarise(subject: Subject, turns: list[dict]) -> dict:
    """Medians of a method's turns, and what follows from them."""
    figures = medians(turns)
    figures["update_ms_per_seed"] = figures["update_ms"] / subject.seeds
    run_ms = subject.updates * figures["update_ms"]
    if subject.env_steps > 0:
        run_ms += subject.env_steps * (figures["act_ms"] + figures["env_step_ms"])
    figures["full_run_hours_without_evaluation"] = run_ms / 3.6e6
    return figures


def measure(script: str, args: Args) -> dict[str, dict]:
    """All figures of one script, by method."""
    prepare, methods, _ = SCRIPTS[script]
    subjects, figures = {}, {}
    for name, flags in methods.items():
        if args.quick:
            flags = flags | {"batch_size": 16}
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = memory_gib(args.device)
        subjects[name] = prepare(device=args.device, **flags)
        subjects[name].calls["update_ms"]()
        figures[name] = {"memory_gib": memory_gib(args.device) - before}

    rounds, repeats = (1, 5) if args.quick else (args.rounds, 20)
    turns = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            turns[name].append(take_turn(subject, script, repeats, args.device))
    return {name: figures[name] | summarise(subjects[name], turns[name]) for name in subjects}


def main(args: Args) -> None:
    """Print the figures, and write them where --json says."""
    plastic_drq_rainbow_atari.keep_freed_memory()  # this and the next, as the scripts do
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
        hardware = torch.cuda.get_device_name()
    else:
        (model, *_) = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) or ["CPU"]
        hardware = f"{torch.get_num_threads()} threads of {model}"
    figures: dict = {"hardware": hardware, "torch": torch.__version__, "quick": args.quick}
    scripts = list(SCRIPTS) if args.script == "all" else [args.script.removesuffix(".py")]
    for script in scripts:  # before all measuring: without a renderer, DeepMind Control's fails
        import_module(script)
    for script in scripts:
        figures[f"{script}.py"] = measure(script, args)
        for name, method in figures[f"{script}.py"].items():
            print(f"{script} {name} on {hardware}")
            for figure, value in (method | method["parts_ms"]).items():
                if figure != "parts_ms":
                    print(f"{value:10.2f} {figure}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
