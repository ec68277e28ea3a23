"""How long an update takes, what each part of it takes, and what a full run would take.

    python benchmark/speed.py --device cpu

An update is timed as the script runs it (CUDA: as a graph). Its parts are timed inside real, eager updates (CUDA: with
device events, so their shares are those of eager updates); what no part covers is "other". Medians after a warm-up;
nothing else should run on the machine. The floor is what the update's arithmetic and memory traffic would take at the
speeds that this machine reaches in a plain matrix product and a plain copy, measured in the same run. Machines drift,
so all methods of a script are held ready (about 1 GB each) and measured in turn; the figures are medians over rounds.

For comparison, base with one choice made the other way: "two products" (the noisy layers' noise as a matrix product of
its own, the weights never composed), "contiguous" (images and convolutions in PyTorch's default layout), "loop Adam"
(parameter by parameter); and base and PLASTIC "plain": contiguous and loop Adam together, as one would first write it.
On CUDA these run eagerly: compare them by eager_update_ms.

DrQ-SAC is measured on quadruped-run; its ms per interaction are those of one agent step: two of the simulation, and one
frame, rendered as the suite does or fast. (quick: batches of 16.)

On the pretrained encoder, base is also measured with the encoder run in each of the update's passes instead of once
("each pass"), in PyTorch's default layout ("contiguous"), and with the encoder trained too ("not frozen"). Its weights
are random here.

The synthetic experiment trains its seeds side by side: its figures are for 1, 3, 10 and 30 seeds (quick: 1 and 3) and
for a plain loop, one network with torch.optim.SGD. Its images are random here.

A script adds itself with a function like atari() and an entry in SCRIPTS.
"""

import json
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import plastic_drq_rainbow_atari as atari_script
import plastic_drq_sac_dmc as dmc_script
import plastic_pretrained_finetune as finetune_script
import synth_cifar_plasticity as synth_script


@dataclass
class Args:
    """Time the scripts' updates by part."""

    device: Literal["cpu", "cuda"] = "cpu"  # where to run
    script: Literal[
        "all",
        "plastic_drq_rainbow_atari.py",
        "plastic_drq_sac_dmc.py",
        "plastic_pretrained_finetune.py",
        "synth_cifar_plasticity.py",
    ] = "all"  # what to run
    quick: bool = False  # few updates: does it work, not how fast is it
    rounds: int = 5  # in each of them, all methods take a turn of 20 updates
    json: Path | None = None  # write the figures to this file too

    def __post_init__(self) -> None:
        """Check the flags. tyro prints a ValueError and ends with code 2."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device")
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"--json {self.json}: no such directory")
        if self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, not {self.rounds}")


@dataclass
class Subject:
    """One method of one script, ready to run."""

    update: Callable[[], object]  # one gradient update, as the script runs it
    eager_update: Callable[[], object]  # the same without a graph, for its parts
    parameters: int
    updates: int  # of a full run
    parts: dict[
        str, tuple[object, str]
    ]  # label -> (owner, name) of the function whose calls it covers
    blocks: dict[str, tuple[object, str]] = field(default_factory=dict)  # of context managers
    patches: list = field(default_factory=list)  # in force while it is measured
    act: Callable[[], int] | None = None  # the choice of one action, host sync included
    env_step: Callable[[], object] | None = None  # one interaction, stored
    render: Callable[[], object] | None = (
        None  # one frame, where that is not the emulator's own work
    )
    env_steps: int = 0  # of a full run
    seeds: int = 1  # trained side by side


def fill(replay, envs, num_steps: int) -> Callable[[], None]:
    """Play num_steps random interactions into the replay buffer; return what plays one more."""
    rng, num_actions = np.random.default_rng(0), int(envs.action_space.n)
    frames, _ = envs.reset()
    replay.start(frames[0, 0])

    def env_step():
        frames, rewards, terminated, truncated, _ = envs.step(
            rng.integers(num_actions, size=1).astype(np.int32)
        )
        if over := bool(terminated[0] or truncated[0]):
            frames, _ = envs.reset()
        replay.add(0, float(np.sign(rewards[0])), over, frames[0, 0])

    for _ in range(num_steps):
        env_step()
    return env_step


def atari(device: str, quick: bool) -> dict[str, Callable[[], Subject]]:
    """plastic_drq_rainbow_atari.py: base, PLASTIC† and PLASTIC at replay ratio 2, each also plain."""
    script = atari_script
    base = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
    methods = {"base": base, "PLASTIC†": dict(crelu=False, sam_rho=0.0), "PLASTIC": {}}

    def two_products(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        noise = linear(x * layer.noise_in, layer.weight_sigma, layer.bias_sigma)
        return linear(x, layer.weight_mu, layer.bias_mu) + noise * layer.noise_out

    def vary(agent: script.Agent, variant: str | None) -> list:
        """Change the agent where that is enough; return the patches that the rest needs."""
        if variant == "two products":
            return [mock.patch.object(script.NoisyLinear, "forward", two_products)]
        patches = []
        if variant in ("contiguous", "plain"):
            for w in (*agent.online.backbone.parameters(), *agent.target.backbone.parameters()):
                w.data = w.data.contiguous()
            agent.optimizer.state.clear()  # made anew in the weights' layout, in the first step
            patches = [mock.patch.object(script, "to_images", lambda obs: obs.float().div_(255))]
        if variant in ("loop Adam", "plain"):
            args = agent.args
            agent.optimizer = torch.optim.Adam(
                agent.parameters, lr=args.learning_rate, eps=args.adam_eps, foreach=False
            )
        return patches

    def prepare(flags: dict, variant: str | None) -> Subject:
        args = script.Args(device=device, **flags)
        generator = torch.Generator(device).manual_seed(0)
        envs = script.make_envs(args.env_id, 1, 0)
        num_updates = (args.total_timesteps - args.learning_starts + 1) * args.replay_ratio
        agent = script.Agent(int(envs.action_space.n), num_updates, args, generator)
        replay = script.ReplayBuffer(
            args.buffer_size, args.n_step, args.gamma, torch.device(device)
        )
        env_step = fill(replay, envs, 200 if quick else 20_000)
        patches = vary(agent, variant)
        eager_update, act = lambda: agent.update(replay), lambda: agent.act(replay.last_obs())
        update, graph_act = eager_update, act
        if device == "cuda" and variant is None:
            changing = [*agent.tensors().values(), replay.priorities, replay.max_priority]
            update, graph_act = (
                script.capture(function, changing, (generator,)) for function in (eager_update, act)
            )
        return Subject(
            update=update,
            eager_update=eager_update,
            act=lambda: int(graph_act()),
            env_step=env_step,
            parameters=sum(w.numel() for w in agent.parameters),
            env_steps=args.total_timesteps,
            updates=num_updates,
            parts={
                "sample": (script.ReplayBuffer, "sample"),
                "augment": (script, "augment"),
                "noise": (script.QNetwork, "sample_noise"),
                "td_target": (script.Agent, "td_target"),
                "forward": (script.QNetwork, "forward"),
                "backward": (torch.Tensor, "backward"),
                "clip": (torch.nn.utils, "clip_grad_norm_"),
                "optimizer": (torch.optim.Adam, "step"),
                "ema": (script, "soft_update"),
                "priorities": (script.ReplayBuffer, "update_priorities"),
            },
            blocks={"sam": (script, "sam_perturbed")},
            patches=patches,
        )

    variants = {
        "base": (None, "two products", "contiguous", "loop Adam", "plain"),
        "PLASTIC†": (None,),
        "PLASTIC": (None, "plain"),
    }
    return {
        name if variant is None else f"{name}, {variant}": lambda flags=flags, variant=variant: (
            prepare(flags, variant)
        )
        for name, flags in methods.items()
        for variant in variants[name]
    }


def dmc(device: str, quick: bool) -> dict[str, Callable[[], Subject]]:
    """plastic_drq_sac_dmc.py: base and PLASTIC on quadruped-run, rendered as the suite does and fast."""
    script = dmc_script
    base = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
    methods = {"base": base, "PLASTIC": {}, "PLASTIC, fast rendering": dict(render_quality="fast")}

    def prepare(flags: dict) -> Subject:
        size = dict(batch_size=16) if quick else {}
        args = script.Args(device=device, buffer_size=2_000, **size, **flags)
        env, rng = script.make_env(args), np.random.default_rng(0)
        agent, replay, update, act = script.make_agent(args, env, script.make_generators(args))
        generator = torch.Generator(device).manual_seed(0)
        replay.start(env.reset()[0])

        def env_step():
            action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
            frame, reward, terminated, truncated, _ = env.step(action)
            replay.add(action, reward, terminated, frame)
            if terminated or truncated:
                replay.start(env.reset()[0])

        for _ in range(50 if quick else 600):
            env_step()

        return Subject(
            update=update,
            eager_update=lambda: agent.update(replay.sample(args.batch_size, generator)),
            act=lambda: act().cpu(),
            env_step=env_step,
            render=env.frame,
            parameters=sum(w.numel() for w in agent.weights),
            env_steps=args.agent_steps,
            updates=(args.agent_steps - args.learning_starts + 1) * args.updates_per_step,
            parts={
                "sample": (script.ReplayBuffer, "sample"),
                "augment": (script, "augment"),
                "td_target": (script.Agent, "td_target"),
                "critic forward": (script.Critic, "forward"),
                "actor forward": (script.Actor, "sample"),
                "backward": (script, "set_gradient"),
                "optimizers": (torch.optim.Adam, "step"),
                "ema": (script, "soft_update"),
            },
            blocks={"sam": (script, "sam_perturbed")},
        )

    return {name: lambda flags=flags: prepare(flags) for name, flags in methods.items()}


def finetune(device: str, quick: bool) -> dict[str, Callable[[], Subject]]:
    """plastic_pretrained_finetune.py: base, and SAM with Reset†; base also with choices made the other way."""
    script = finetune_script

    def prepare(flags: dict, variant: str | None) -> Subject:
        args = script.Args(device=device, from_scratch=True, **flags)
        generator = torch.Generator(device).manual_seed(0)
        envs = script.make_envs(args.env_id, 1, 0)
        num_updates = (args.total_timesteps - args.learning_starts + 1) * args.replay_ratio
        torch.manual_seed(0)
        agent = script.Agent(
            script.Backbone(), int(envs.action_space.n), num_updates, args, generator
        )
        replay = script.ReplayBuffer(
            args.buffer_size, args.n_step, args.gamma, torch.device(device)
        )
        env_step = fill(replay, envs, 200 if quick else 20_000)
        patches = []
        if variant == "each pass":
            agent.args = replace(
                args, freeze_backbone=False
            )  # the encoder's weights take no gradient all the same
        if variant == "contiguous":
            for w in (*agent.online.backbone.parameters(), *agent.target.backbone.parameters()):
                w.data = w.data.contiguous()
            patches = [mock.patch.object(script, "to_images", lambda obs: obs.float().div_(255))]
        eager_update, act = lambda: agent.update(replay), lambda: agent.act(replay.last_obs())
        update, graph_act = eager_update, act
        if device == "cuda" and variant is None:
            changing = [*agent.tensors().values(), replay.priorities, replay.max_priority]
            update, graph_act = (
                script.capture(function, changing, (generator,)) for function in (eager_update, act)
            )
        return Subject(
            update=update,
            eager_update=eager_update,
            act=lambda: int(graph_act()),
            env_step=env_step,
            parameters=sum(w.numel() for w in agent.parameters),
            env_steps=args.total_timesteps,
            updates=num_updates,
            parts={
                "sample": (script.ReplayBuffer, "sample"),
                "augment": (script, "augment"),
                "encoder": (script.Backbone, "forward"),
                "head": (script.DuelingHead, "forward"),
                "noise": (script.QNetwork, "sample_noise"),
                "backward": (torch.Tensor, "backward"),
                "clip": (torch.nn.utils, "clip_grad_norm_"),
                "optimizer": (torch.optim.Adam, "step"),
                "ema": (script, "soft_update"),
                "priorities": (script.ReplayBuffer, "update_priorities"),
            },
            patches=patches,
        )

    cases = {"base": ({}, None), "SAM, Reset†": (dict(sam_rho=0.1, reset_interval=40_000), None)}
    cases |= {"base, each pass": ({}, "each pass"), "base, contiguous": ({}, "contiguous")}
    cases |= {"base, not frozen": (dict(freeze_backbone=False), None)}
    return {name: lambda case=case: prepare(*case) for name, case in cases.items()}


def synth(device: str, quick: bool) -> dict[str, Callable[[], Subject]]:
    """synth_cifar_plasticity.py: base and SAM for several numbers of seeds, and one seed in a plain loop."""
    script = synth_script
    rng = np.random.default_rng(0)
    images, labels = (
        rng.integers(256, size=(5000, 3, 32, 32), dtype=np.uint8),
        rng.integers(10, size=5000),
    )
    data = (images, labels, images[:100], labels[:100])
    base = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
    methods = {"base": base, "SAM": base | dict(sam_rho=0.1)}

    def plain_update(replicas: script.Replicas) -> Callable[[], object]:
        """As one would write it for one seed."""
        torch.manual_seed(1)
        args, network = replicas.args, script.Network(replicas.args).to(device)
        parameters = list(network.parameters())
        sgd = torch.optim.SGD(
            parameters,
            lr=args.learning_rate[0],
            momentum=args.momentum,
            weight_decay=args.weight_decay[0],
        )
        cross_entropy = torch.nn.functional.cross_entropy

        def update() -> None:
            images, labels = (x[0] for x in replicas.next_batch(slice(1)))
            replicas.updates.add_(1)
            sgd.zero_grad()
            cross_entropy(network(images), labels).backward()
            if args.sam_rho > 0:
                gradients = [w.grad for w in parameters]
                steps = torch._foreach_mul(
                    gradients, args.sam_rho / torch.nn.utils.get_total_norm(gradients)
                )
                with torch.no_grad():
                    torch._foreach_add_(parameters, steps)
                sgd.zero_grad()
                cross_entropy(network(images), labels).backward()
                with torch.no_grad():
                    torch._foreach_sub_(parameters, steps)
            sgd.step()

        return update

    def prepare(flags: dict, seeds: int, plain: bool) -> Subject:
        args = script.Args(device=device, num_seeds=seeds, **flags)
        replicas = script.Replicas(args, data, torch.device(device))
        replicas.start_stage(0)
        eager_update = plain_update(replicas) if plain else replicas.update
        update = eager_update
        if device == "cuda" and not plain:
            update = script.capture(eager_update, list(replicas.tensors().values()))
        parts = {
            "batch": (script.Replicas, "next_batch"),
            "forward": (script.Replicas, "forward"),
            "backward": (torch.autograd, "grad"),
            "sgd": (script.Replicas, "sgd"),
        }
        return Subject(
            update=update,
            eager_update=eager_update,
            parameters=replicas.weights.numel(),
            updates=args.num_stages * args.updates_per_stage,
            parts=parts,
            seeds=seeds,
        )

    cases = {"plain loop": (1, True)} | {
        f"{n} seeds": (n, False) for n in ((1, 3) if quick else (1, 3, 10, 30))
    }
    return {
        f"{method}, {case}": lambda flags=flags, seeds=seeds, plain=plain: prepare(
            flags, seeds, plain
        )
        for method, flags in methods.items()
        for case, (seeds, plain) in cases.items()
    }


SCRIPTS = {
    "plastic_drq_rainbow_atari.py": atari,
    "plastic_drq_sac_dmc.py": dmc,
    "plastic_pretrained_finetune.py": finetune,
    "synth_cifar_plasticity.py": synth,
}


class Clock:
    """Milliseconds by label. Of nested labels the outer one counts. CUDA events on CUDA, the host's clock else."""

    def __init__(self, device: str) -> None:
        self.device, self.open, self.marks = device, None, []

    def now(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, label: str) -> None:
        if self.open is None:
            self.open = (label, self.now())

    def stop(self, label: str) -> None:
        if self.open is not None and self.open[0] == label:
            self.marks.append((*self.open, self.now()))
            self.open = None

    def collect(self) -> dict[str, float]:
        """Sum by label since the last call."""
        totals: dict[str, float] = {}
        if self.device == "cuda":
            torch.cuda.synchronize()
        for label, start, end in self.marks:
            elapsed = 1e3 * (end - start) if self.device == "cpu" else start.elapsed_time(end)
            totals[label] = totals.get(label, 0.0) + elapsed
        self.marks = []
        return totals


@contextmanager
def instrumented(subject: Subject, clock: Clock):
    """Let the clock see every call of the subject's parts, and its blocks."""

    def wrap(function: Callable, label: str) -> Callable:
        def wrapped(*args, **kwargs):
            clock.start(label)
            try:
                return function(*args, **kwargs)
            finally:
                clock.stop(label)

        return wrapped

    def wrap_block(function: Callable, label: str) -> Callable:
        @contextmanager
        def wrapped(*args):
            clock.start(label)
            with function(*args):
                yield
            clock.stop(label)

        return wrapped

    patches = [
        mock.patch.object(*target, kind(getattr(*target), label))
        for kind, parts in ((wrap, subject.parts), (wrap_block, subject.blocks))
        for label, target in parts.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def median_ms(function: Callable[[], object], repeats: int, device: str) -> float:
    """Median wall-clock of one call, the device's work included."""
    times = []
    for i in range(repeats + repeats // 5 + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i > repeats // 5:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def floor_ms(subject: Subject, device: str) -> float:
    """Arithmetic at the speed of a matrix product plus ten passes over the parameters at the speed of a copy.

    Ten: weights read forward and backward, gradient written and read, two moments, weights and target read and written.
    """
    size, calls = (
        (1024, 1) if device == "cpu" else (4096, 20)
    )  # many calls a measurement, where launching takes time
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    flops_per_ms = (
        calls * 2 * size**3 / median_ms(lambda: [a @ b for _ in range(calls)], 20, device)
    )
    source = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
    copy = torch.zeros_like(source)
    copies_per_ms = calls / median_ms(
        lambda: [copy.copy_(source) for _ in range(calls)], 20, device
    )
    bytes_per_ms = 2 * source.numel() * copies_per_ms
    with FlopCounterMode(display=False) as counter:
        subject.eager_update()
    return counter.get_total_flops() / flops_per_ms + 10 * 4 * subject.parameters / bytes_per_ms


def measure(subject: Subject, device: str, repeats: int) -> dict[str, float | dict[str, float]]:
    """Milliseconds and memory of one subject, in one round."""
    update_ms = median_ms(subject.update, repeats, device)
    clock, samples, eager = Clock(device), [], []
    with instrumented(subject, clock):
        for i in range(repeats + 3):
            clock_total = Clock(device)
            clock_total.start("update")
            subject.eager_update()
            clock_total.stop("update")
            parts = clock.collect()
            total = clock_total.collect()["update"]
            parts["other"] = total - sum(parts.values())
            if i >= 3:
                samples.append(parts)
                eager.append(total)
    parts = {
        label: statistics.median(sample.get(label, 0.0) for sample in samples)
        for label in samples[0]
    }
    result = {
        "update_ms": update_ms,
        "eager_update_ms": statistics.median(eager),
        "floor_ms": floor_ms(subject, device),
        "parts_ms": parts,
    }
    if subject.env_step is not None:
        result["act_ms"] = median_ms(subject.act, repeats, device)
        result["env_step_ms"] = median_ms(subject.env_step, 10 * repeats, device)
    if subject.render is not None:
        result["render_ms"] = median_ms(subject.render, 5 * repeats, device)
    return result


def memory_gib(device: str) -> float:
    """Peak of the device's memory since it was last reset; on the CPU, what the process holds now."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def prepared(prepare: Callable[[], Subject], device: str) -> tuple[Subject, float]:
    """The subject after its first update, and the memory that it took."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_gib(device)
    subject = prepare()
    with patched(subject):
        subject.update()
    return subject, memory_gib(device) - before


@contextmanager
def patched(subject: Subject):
    """The subject's patches in force."""
    with ExitStack() as stack:
        for patch in subject.patches:
            stack.enter_context(patch)
        yield


def combine(rounds: list[dict], subject: Subject) -> dict[str, float | dict[str, float]]:
    """All figures of one subject: medians over the rounds, and what follows from them."""
    result = {
        key: statistics.median(one[key] for one in rounds) for key in rounds[0] if key != "parts_ms"
    }
    parts = {
        label: statistics.median(one["parts_ms"][label] for one in rounds)
        for label in rounds[0]["parts_ms"]
    }
    training_ms = subject.updates * result["update_ms"]
    result["updates_per_second"] = 1e3 / result["update_ms"]
    result["update_ms_per_seed"] = result["update_ms"] / subject.seeds
    if subject.env_step is not None:
        training_ms += subject.env_steps * (result["act_ms"] + result["env_step_ms"])
        result["env_steps_per_second"] = 1e3 / result["env_step_ms"]
    result["full_run_hours_without_evaluation"] = training_ms / 3.6e6
    return {**result, "parts_ms": dict(sorted(parts.items(), key=lambda item: -item[1]))}


def main(args: Args) -> None:
    """Print a table per script, and write the figures where --json says."""
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # as the scripts do
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as the scripts do
    models = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if sys.platform == "linux"
        else []
    )
    threads = f"{torch.get_num_threads()} threads of {models[0] if models else platform.machine()}"
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else threads
    figures = {
        "hardware": hardware,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": args.quick,
    }
    num_rounds, repeats = (1, 5) if args.quick else (args.rounds, 20)
    for script, methods in SCRIPTS.items():
        if args.script not in ("all", script):
            continue
        subjects, memory = {}, {}
        for name, prepare in methods(args.device, args.quick).items():
            subjects[name], memory[name] = prepared(prepare, args.device)
        rounds: dict[str, list] = {name: [] for name in subjects}
        for _ in range(num_rounds):
            for name, subject in subjects.items():
                with patched(subject):
                    rounds[name].append(measure(subject, args.device, repeats))
        figures[script] = {
            name: {"memory_gib": memory[name], **combine(rounds[name], subject)}
            for name, subject in subjects.items()
        }
        for name, result in figures[script].items():
            shares = {
                label: f"{ms:.2f} ({ms / result['eager_update_ms']:.0%})"
                for label, ms in result["parts_ms"].items()
            }
            print(f"{script} {name} on {hardware}")
            print("  " + ", ".join(f"{k} {v:.2f}" for k, v in result.items() if k != "parts_ms"))
            print(
                "  ms by part: " + ", ".join(f"{label} {share}" for label, share in shares.items()),
                flush=True,
            )
    if args.json is not None:
        atari_script.write_atomically(
            args.json, lambda file: file.write(json.dumps(figures, indent=2).encode())
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
