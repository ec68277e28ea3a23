"""Tables and figures from result.json files.

    python benchmark/report.py benchmark/results/synth --plot benchmark/results/synth

prints the synthetic experiment's accuracies as Markdown, a row per method, and draws figure3.png: what each method
adds to base, on both tasks. The accuracy is the mean over the last stages (--last), of the setting that result.json
names the best. Intervals are 95% bootstrap intervals over seeds; a gain is taken seed by seed.

    python benchmark/report.py benchmark/results/dmc --plot benchmark/results/dmc

prints the returns of DeepMind Control's runs, beside those of the random policy (the runs' own training episodes before
learning starts), and draws curves.png: the evaluations of each run, from its TensorBoard events.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from synth_cifar_plasticity import bootstrap_interval, fail, write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TASKS = {"input": "#0072b2", "label": "#d55e00"}  # with colours of the Okabe-Ito palette, told apart by everyone
METHODS = {  # panels of Figure 3, and the names of their bars by exp-name
    "single methods": {"ln": "LN", "sam": "SAM", "crelu": "CReLU", "reset": "Reset"},
    "combinations": {
        "ln_sam": "LN +\nSAM", "ln_crelu": "LN +\nCReLU", "ln_reset": "LN +\nReset", "sam_crelu": "SAM +\nCReLU",
        "sam_reset": "SAM +\nReset", "crelu_reset": "CReLU +\nReset", "plastic": "PLASTIC",
    },
}  # fmt: skip
# What has to be the same in runs that are compared.
PROTOCOL = "num_stages updates_per_stage batch_size momentum conv_strides label_change".split()
NAMES = {"base": "base"} | {key: name.replace("\n", " ") for panel in METHODS.values() for key, name in panel.items()}


@dataclass
class Args:
    """Tables and figures from result.json files."""

    runs: Annotated[Path, tyro.conf.Positional]  # directory with the runs' directories
    plot: Path | None = None  # draw figure3.png or curves.png in this directory
    last: int = 5  # stages at the end over which the accuracy is averaged


def read_results(runs: Path) -> dict[tuple[str, str], dict]:
    """{(task, exp_name): result} of the synthetic experiment's runs in a directory, their accuracies as arrays."""
    results = {}
    for path in sorted(runs.glob("*/result.json")):
        try:
            result = json.loads(path.read_text())
            if result["script"] != "synth_cifar_plasticity.py":
                continue
            accuracies = np.array(result["test_accuracy"], dtype=float)
            if accuracies.ndim != 2 or not np.isfinite(accuracies).all() or accuracies.size == 0:
                raise ValueError("test_accuracy")
            numbers = ("learning_rate", "weight_decay", "final_accuracy_mean", "mean_accuracy_mean")
            result |= {"test_accuracy": accuracies, "first_seed": int(result["first_seed"])}
            result |= {name: float(result[name]) for name in numbers}
            key = (str(result["task"]), str(result["exp_name"]))
            result["num_seeds"] = len(accuracies)
            result["protocol"] = {name: result["args"][name] for name in PROTOCOL} | {"images": result["data"]}
            flags = result["args"]
            on = {"ln": flags["layer_norm"], "crelu": flags["crelu"], "sam": flags["sam_rho"] > 0}
            on |= {"reset": flags["reset_interval"] > 0}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            fail(f"{path}: not a result of synth_cifar_plasticity.py ({error!r})", 1)
        if key in results:
            fail(f"{runs}: two runs of {' '.join(key)}; keep one of them there", 1)
        if key[0] not in TASKS or key[1] not in NAMES:
            print(f"left out: {path}, whose exp-name is none of {', '.join(NAMES)}", file=sys.stderr)
            continue
        parts = on.keys() if key[1] == "plastic" else key[1].split("_")
        if any((part in parts) != is_on for part, is_on in on.items()):
            fail(f"{path}: its flags are not those of {key[1]}", 1)
        results[key] = result
    if not results:
        fail(f"{runs}: no result of the synthetic experiment in its directories", 1)
    for name in (*PROTOCOL, "images"):
        values = sorted({json.dumps(result["protocol"][name]) for result in results.values()})
        if len(values) > 1:
            fail(f"{runs}: runs cannot be compared, they differ in {name}: {', '.join(values)}", 1)
    return results


def late_accuracy(result: dict, last: int) -> dict[int, float]:
    """{seed: mean test accuracy over the last stages}."""
    accuracies = result["test_accuracy"][:, -last:].mean(1)
    return {result["first_seed"] + i: float(accuracy) for i, accuracy in enumerate(accuracies)}


def gain(result: dict, base: dict, last: int) -> np.ndarray:
    """Accuracy above base's, of each seed that both have."""
    ours, theirs = late_accuracy(result, last), late_accuracy(base, last)
    return np.array([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])


def with_interval(values: np.ndarray, digits: int = 3) -> str:
    """The mean and its 95% interval (none below two values)."""
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f}"
    low, high = bootstrap_interval(values)
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_table(results: dict[tuple[str, str], dict], last: int) -> None:
    """Markdown, a row per method."""
    print(f"| method | task | test accuracy, last {last} stages | final | mean | learning rate, weight decay | seeds |")
    print("|---|---|---|---|---|---|---|")
    for method, name in NAMES.items():
        for task in TASKS:
            if (result := results.get((task, method))) is not None:
                late = with_interval(np.array(list(late_accuracy(result, last).values())))
                setting = f"{result['learning_rate']:g}, {result['weight_decay']:g}"
                final, mean, seeds = (result[k] for k in ("final_accuracy_mean", "mean_accuracy_mean", "num_seeds"))
                print(f"| {name} | {task} | {late} | {final:.3f} | {mean:.3f} | {setting} | {seeds} |")


def plot_figure3(results: dict[tuple[str, str], dict], last: int, path: Path) -> None:
    """Bars: gain over base in percentage points, with intervals; a dot for each seed."""
    gains = {
        (task, method): 100 * gain(result, results[task, "base"], last)
        for (task, method), result in results.items()
        if method != "base" and (task, "base") in results
    }
    gains = {key: points for key, points in gains.items() if len(points) > 0}
    if not gains:
        fail("--plot: no method has a run of base on the same task, with a seed in common", 1)
    panels = {
        title: [method for method in methods if any((task, method) in gains for task in TASKS)]
        for title, methods in METHODS.items()
    }
    panels = {title: methods for title, methods in panels.items() if methods}
    widths = [len(methods) for methods in panels.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.5 + 1.1 * sum(widths), 3.6), width_ratios=widths, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, methods) in zip(axes[0], panels.items(), strict=True):
        for shift, (task, colour) in zip((-0.2, 0.2), TASKS.items(), strict=True):
            for x, method in enumerate(methods):
                if (task, method) not in gains:
                    continue
                points = gains[task, method]
                low, high = bootstrap_interval(points) or (points.mean(), points.mean())
                error = [[points.mean() - low], [high - points.mean()]] if len(points) > 1 else None
                axis.bar(x + shift, points.mean(), 0.36, color=colour, yerr=error, capsize=3, label=task)
                axis.plot(np.full(len(points), x + shift), points, "o", ms=3.5, mfc="white", mec="black")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(methods)), [METHODS[title][method] for method in methods])
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    protocol = next(iter(results.values()))["protocol"]
    figure.suptitle(
        f"{protocol['num_stages']} stages of {protocol['updates_per_stage']} updates, the last {last} averaged"
    )
    axes[0, 0].set_ylabel("test accuracy above base\n(percentage points)")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}  # noqa: B905
    axes[0, -1].legend(handles.values(), [f"{task} task" for task in handles])
    save(figure, path)


def read_control_runs(runs: Path) -> list[dict]:
    """Results of DeepMind Control's runs, with the curves of evaluation and training from their TensorBoard events."""
    results = []
    for path in sorted(runs.glob("*/result.json")):
        try:
            result = json.loads(path.read_text())
            if result["script"] != "plastic_drq_sac_dmc.py":
                continue
            events = EventAccumulator(str(path.parent), size_guidance={"scalars": 0})
            events.Reload()
            curves = {}
            for name, tag in (("evaluation", "eval/mean_return"), ("training", "charts/episodic_return")):
                scalars = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
                curves[name] = sorted((event.step * result["args"]["action_repeat"], event.value) for event in scalars)
            start = result["args"]["learning_starts"] * result["args"]["action_repeat"]
            result |= curves | {"random": [value for step, value in curves["training"] if step <= start]}
            result |= {"mean_return": float(result["mean_return"]), "env_steps": int(result["env_steps"])}
            result |= {name: str(result[name]) for name in ("env_id", "exp_name")}
            result["hours"] = float(result["wall_clock_seconds"]) / 3600
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            fail(f"{path}: not a result of plastic_drq_sac_dmc.py ({error!r})", 1)
        results.append(result)
    return results


def grouped(results: list[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """Runs of the same task, name and length."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for result in results:
        groups.setdefault((result["env_id"], result["exp_name"], result["env_steps"]), []).append(result)
    return groups


def print_returns(results: list[dict]) -> None:
    """Markdown, a row per task, name and length."""
    print("| task | run | environment steps | random policy | mean return | seeds | hours a run |")
    print("|---|---|---|---|---|---|---|")
    for (env_id, exp_name, env_steps), runs in grouped(results).items():
        returns = with_interval(np.array([run["mean_return"] for run in runs]), digits=0)
        random = [value for run in runs for value in run["random"]]
        random_return = f"{np.mean(random):.0f} ({len(random)} episodes)" if random else ""
        hours = np.mean([run["hours"] for run in runs])
        print(f"| {env_id} | {exp_name} | {env_steps:,} | {random_return} | {returns} | {len(runs)} | {hours:.1f} |")


def plot_curves(results: list[dict], path: Path) -> None:
    """A panel per task: mean return of each evaluation over environment steps, a line per run, a colour per name."""
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]  # Okabe and Ito's
    tasks, names = (list(dict.fromkeys(result[key] for result in results)) for key in ("env_id", "exp_name"))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(1.5 + 4 * len(tasks), 3.4), squeeze=False, layout="constrained"
    )  # fmt: skip
    for axis, task in zip(axes[0], tasks, strict=True):
        for result in (result for result in results if result["env_id"] == task):
            colour = colours[names.index(result["exp_name"]) % len(colours)]
            steps, returns = zip(*result["evaluation"], strict=True)
            axis.plot(np.array(steps) / 1000, returns, "o-", ms=3, color=colour, label=result["exp_name"])
        random = [value for result in results if result["env_id"] == task for value in result["random"]]
        if random:
            axis.axhline(np.mean(random), color="gray", linestyle="--", label="random policy")
        axis.set(title=task, xlabel="thousand environment steps", ylabel="mean return", ylim=(0, None))
        axis.grid(alpha=0.3)
        handles = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axis.legend(handles.values(), handles.keys())
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """As PNG, in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    except OSError as error:
        fail(f"--plot {path}: {error.strerror}", 1)
    plt.close(figure)


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.last < 1:
        fail(f"--last must be at least 1, not {args.last}", 2)
    if control_runs := read_control_runs(args.runs):
        print_returns(control_runs)
        if args.plot is not None:
            plot_curves(control_runs, args.plot / "curves.png")
    else:
        results = read_results(args.runs)
        last = min(args.last, *(result["test_accuracy"].shape[1] for result in results.values()))
        print_table(results, last)
        if args.plot is not None:
            plot_figure3(results, last, args.plot / "figure3.png")
