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
from synth_cifar_plasticity import bootstrap_interval, fail

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
NAMES = {"base": "base"} | {key: name.replace("\n", " ") for panel in METHODS.values() for key, name in panel.items()}


@dataclass
class Args:
    """Tables and figures from result.json files."""

    runs: Annotated[Path, tyro.conf.Positional]  # directory with the runs' directories
    plot: Path | None = None  # draw figure3.png in this directory
    last: int = 5  # stages at the end over which the accuracy is averaged


def read_results(runs: Path) -> dict[tuple[str, str], dict]:
    """{(task, exp_name): result} of the synthetic experiment's runs in a directory."""
    results = {}
    for path in sorted(runs.glob("*/result.json")):
        try:
            result = json.loads(path.read_text())
            if result["script"] != "synth_cifar_plasticity.py":
                continue
            key = (result["task"], result["exp_name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{path}: not a result of these scripts ({error!r})", 1)
        if key in results:
            fail(f"{runs}: two runs of {' '.join(key)}; keep one of them there", 1)
        results[key] = result
    if not results:
        fail(f"{runs}: no result of the synthetic experiment in its directories", 1)
    return results


def late_accuracy(result: dict, last: int) -> dict[int, float]:
    """{seed: mean test accuracy over the last stages}."""
    accuracies = np.array(result["test_accuracy"])[:, -last:].mean(1)
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
                final, mean = result["final_accuracy_mean"], result["mean_accuracy_mean"]
                print(f"| {name} | {task} | {late} | {final:.3f} | {mean:.3f} | {setting} | {result['num_seeds']} |")


def plot_figure3(results: dict[tuple[str, str], dict], last: int, path: Path) -> None:
    """Bars: gain over base in percentage points, with intervals; a dot for each seed."""
    panels = {
        title: [method for method in methods if any((task, method) in results for task in TASKS)]
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
                if (task, method) not in results or (task, "base") not in results:
                    continue
                points = 100 * gain(results[task, method], results[task, "base"], last)
                low, high = bootstrap_interval(points)
                error = [[points.mean() - low], [high - points.mean()]]
                axis.bar(x + shift, points.mean(), 0.36, color=colour, yerr=error, capsize=3, label=task)
                axis.plot(np.full(len(points), x + shift), points, "o", ms=3.5, mfc="white", mec="black")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(methods)), [METHODS[title][method] for method in methods])
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0, 0].set_ylabel("test accuracy above base\n(percentage points)")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}  # noqa: B905
    axes[0, -1].legend(handles.values(), [f"{task} task" for task in handles])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.last < 1:
        fail(f"--last must be at least 1, not {args.last}", 2)
    results = read_results(args.runs)
    print_table(results, args.last)
    if args.plot is not None:
        plot_figure3(results, args.last, args.plot / "figure3.png")
