"""Tables and figures from result.json files.

    python benchmark/report.py benchmark/results/synth --plot benchmark/results/synth

prints the synthetic experiment's accuracies as Markdown, a row per method, and draws figure3.png: what each method
adds to base, on both tasks. The accuracy is the mean over the last stages (--last), of the setting that result.json
names the best. Intervals are 95% bootstrap intervals over seeds; a gain is taken seed by seed.
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
    plot: Path | None = None  # draw figure3.png in this directory
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
    results = read_results(args.runs)
    last = min(args.last, *(result["test_accuracy"].shape[1] for result in results.values()))
    print_table(results, last)
    if args.plot is not None:
        plot_figure3(results, last, args.plot / "figure3.png")
