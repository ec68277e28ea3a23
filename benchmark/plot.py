"""The figures of `python benchmark/report.py ... --plot DIRECTORY`, as PNG files.

curves.png: each run's evaluations. stages.png: CIFAR-10's accuracies after each stage.
intervals.png: a table's aggregates. figure1.png to figure6.png: the paper's figures, as far as
there are runs for them (figure5_dmc.png: DeepMind Control's part).

report.py reads, checks and aggregates; here is only what is drawn. `runs` is its table, with the
columns of with_curves, `synthetic` that of the synthetic experiment; `late` is its accuracy at the
end, {(task, exp-name): by seed}; `aggregate` gives, for a benchmark and an exp-name,
{"iqm": (value, low, high), "hours": ..., ...}.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from rliable import plot_utils

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from synth_cifar_plasticity import bootstrap_interval

plt.rcParams.update({"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3})
# Okabe and Ito's colours, which everyone tells apart: "C0", "C1", ... from here on
OKABE_ITO = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=OKABE_ITO)
Aggregate = Callable[[str, str], dict]
# fmt: off
AGGREGATES = {  # by their key in the paper's tables
    "iqm": "IQM", "median": "median over tasks", "mean": "mean", "og": "optimality gap",
    "seed_median": "median over seeds",
}
FULL_LENGTH = {"atari": 100_000, "dmc": 2_000_000}  # environment steps of the paper's runs
METRICS = {  # of Figure 4, by TensorBoard tag; the eigenvalue is the largest by sign, not by size
    "plasticity/hessian_max_eigenvalue": "largest eigenvalue of the Hessian",
    "plasticity/active_units/head": "share of active units, head",
    "plasticity/active_units/backbone": "share of active units, backbone",
}
PARTS = {  # of exp-names, and how the paper calls them
    "base": "base", "ln": "LN", "sam": "SAM", "crelu": "CReLU", "reset": "Reset",
    "plastic": "PLASTIC", "redo": "ReDo", "l2init": "L2 Init", "clip": "weight clipping",
    "shrink": "S&P", "tortoise": "Hare & Tortoise",
}
# Exp-names by panel. Figure 3's last panel is not in the paper, but of fig3_beyond.sh.
FIGURE_2 = "base sam ln crelu reset plastic".split()
TASKS = {"input": "new images", "label": "new labels"}
FIGURE_3 = {
    "single methods": "ln sam crelu reset",
    "combinations": "ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset plastic",
    "other methods": "redo l2init clip tortoise reset_shrink ln_sam_redo ln_sam_l2init "
                     "ln_sam_clip ln_sam_tortoise ln_sam_reset_shrink ln_sam_reset",
}
FIGURES_5_AND_6 = {
    "figure5": ("atari", {
        "noise in SAM's passes": "base sam sam_reused sam_noiseless",
        "SAM on": "base sam_backbone sam_head sam",
        "SAM on, with resets": "reset sam_reset_backbone sam_reset_head sam_reset",
    }),
    "figure5_dmc": ("dmc", {"SAM on": "base sam_actor sam_critic sam"}),
    "figure6": ("atari", {
        "rho": "base sam_rho0.03 sam sam_rho0.3",
        "batch size": "base_batch16 base base_batch64",
        "batch size, SAM": "sam_batch16 sam sam_batch64",
        "batch size, Reset": "reset_batch16 reset reset_batch64",
        "batch size, SAM + Reset": "sam_reset_batch16 sam_reset sam_reset_batch64",
    }),
}
# fmt: on


def method(exp_name: str) -> str:
    """As the paper calls it: "ln_sam" is "LN + SAM". A name of another kind stays as it is."""
    if exp_name == "ln_reset":
        return "PLASTIC† (LN + Reset)"
    parts = exp_name.split("_")
    return " + ".join(PARTS[part] for part in parts) if set(parts) <= PARTS.keys() else exp_name


def save(figure: plt.Figure, path: Path) -> None:
    """As PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def panels(count: int) -> tuple[plt.Figure, np.ndarray]:
    """A figure and its axes, four in a row."""
    columns, rows = min(count, 4), math.ceil(count / 4)
    size = (4.2 * columns + 1.5, 3.5 * rows)  # with room for a legend beside them
    options = dict(figsize=size, squeeze=False, layout="constrained")
    figure, axes = plt.subplots(rows, columns, **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def line(
    axis: plt.Axes,
    curves: list[np.ndarray],
    colour: str,
    label: str,
    ms: float = 3,
    lw: float = 1.5,
    tasks: Iterable[str] = (),
) -> None:
    """The mean of the runs' curves [points, 2], dots of size ms, a line of lw.

    With the runs' `tasks`, each task counts once, with its mean. Thin lines are the runs, from six
    runs on a band from the lowest to the highest.
    """
    points = pd.DataFrame(np.concatenate(curves), columns=["step", "value"])
    points["task"] = np.repeat(list(tasks) or [""] * len(curves), [len(c) for c in curves])
    means = points.groupby(["task", "step"]).value.mean().groupby("step").mean()
    axis.plot(means.index / 1000, means, "o-", color=colour, label=label, ms=ms, lw=lw)
    if len(curves) > 5:
        ends = points.groupby("step").value.agg(["min", "max"])
        options = dict(color=colour, alpha=0.15, linewidth=0)
        axis.fill_between(ends.index / 1000, ends["min"], ends["max"], **options)
    elif len(curves) > 1:
        for curve in curves:
            axis.plot(*(curve / (1000, 1)).T, color=colour, alpha=0.6, lw=0.7)
    axis.set_xlabel("thousand environment steps")


def legend(figure: plt.Figure) -> None:
    """Beside the panels, each label once."""
    once = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        once |= dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside right center")


def random_returns(runs: pd.DataFrame) -> list[float]:
    """A random policy's returns on these runs' task: measured apart, or else their first ones."""
    return runs.random.iloc[0] or runs["first"].sum()


def training_means(episodes: np.ndarray, length: int, parts: int = 10) -> np.ndarray:
    """Mean return of the training episodes that end in each of `parts` equal parts of a run.

    `episodes` is [episodes, 2], steps and returns; the result is [parts, 2], a part's middle and
    its mean, without the parts in which no episode ends.
    """
    middles = (np.ceil(episodes[:, 0] * parts / length) - 0.5) * length / parts
    return pd.Series(episodes[:, 1]).groupby(middles).mean().reset_index().to_numpy()


def reset_steps(args: dict, length: int) -> np.ndarray:
    """Environment steps [resets] in which a run of this length was reset: never in its last."""
    per_step = args.get("replay_ratio") or args.get("updates_per_step", 1)
    repeat, every = args.get("action_repeat", 1), args.get("reset_interval", 0)
    updates = (length // repeat - args["learning_starts"]) * per_step  # without the last step's
    counts = np.arange(every, updates + 1, every) if every else np.empty(0)
    return repeat * (args["learning_starts"] - 1 + np.ceil(counts / per_step))


def learning_curves(runs: pd.DataFrame, path: Path) -> None:
    """A panel per task: mean return of each evaluation, a line per run, a colour per exp-name.

    A run that was evaluated once is a dot there, and a line without dots for its training episodes.
    Where runs have the paper's length, a diamond is the mean that the paper prints. Dotted
    vertical lines are resets, a gray band is the range of public seeds of the base.
    """
    runs = runs[["eval/mean_return" in curves for curves in runs.curves]]
    if runs.empty:
        return
    runs = runs.assign(exp_name=runs.exp_name.str.removesuffix("_metrics"))
    names = list(runs.exp_name.unique())
    by_task = runs.groupby(["benchmark", "task"], sort=False)
    figure, axes = panels(len(by_task))
    for axis, ((_, task), own) in zip(axes, by_task, strict=True):
        for run in own.itertuples():
            colour = f"C{names.index(run.exp_name)}"
            evaluations = run.curves["eval/mean_return"]
            episodes = run.curves.get("charts/episodic_return", [])
            lone = len(evaluations) == 1
            if lone and len(episodes):
                means = training_means(episodes, run.steps)
                axis.plot(*(means / (1000, 1)).T, color=colour)
            line(axis, [evaluations], colour, method(run.exp_name), ms=7 if lone else 3)
            if run.steps == FULL_LENGTH.get(run.benchmark) and not np.isnan(run.paper):
                label = f"{method(run.exp_name)}, the paper"
                options = dict(mfc="none", ms=8, color=colour, label=label)
                axis.plot(run.steps / 1000, run.paper, "D", **options)
            for step in reset_steps(run.args, run.steps):
                label = f"{method(run.exp_name)}, resets"
                axis.axvline(step / 1000, color=colour, linestyle=":", linewidth=1, label=label)
        steps, mean, low, high = own.public.iloc[0].T
        if len(steps):
            label = "base, ten public seeds"
            axis.plot(steps / 1000, mean, "o-", color="gray", ms=3, label=label)
            axis.fill_between(steps / 1000, low, high, color="gray", alpha=0.2, linewidth=0)
        for returns, style, label in (
            (random_returns(own), "--", "random policy"),
            (own.constant.iloc[0], ":", "best constant action"),
        ):
            if returns:
                axis.axhline(np.mean(returns), color="gray", linestyle=style, label=label)
        lone = all(len(curves["eval/mean_return"]) == 1 for curves in own.curves)
        key = "\n(lines: training; dots: evaluation)" if lone else ""
        axis.set(title=task, ylabel=f"mean return{key}")
    legend(figure)
    save(figure, path)


def figure4(runs: pd.DataFrame, path: Path) -> None:
    """Metrics over time, a line per exp-name and length; dotted lines where runs were reset.

    A line is the mean over tasks of the means over their seeds.
    """
    measured = runs.curves.map(lambda curves: bool(METRICS.keys() & curves.keys())).astype(bool)
    runs = runs[measured & (runs.benchmark == "atari")]  # as in the paper
    if runs.empty:
        return
    names = runs.exp_name.str.removesuffix("_metrics")
    lengths = runs.groupby(names).steps.nunique()
    resets = {step for run in runs.itertuples() for step in reset_steps(run.args, run.steps)}
    figure, axes = panels(len(METRICS))
    for axis, (tag, title) in zip(axes, METRICS.items(), strict=True):
        for i, ((name, steps), own) in enumerate(runs.groupby([names, "steps"])):
            label = method(name) + (f", {steps:,} steps" if lengths[name] > 1 else "")
            own = own[[tag in curves for curves in own.curves]]
            if len(own):  # each line is thinner than those before it, which it may cover
                found = [curves[tag] for curves in own.curves]
                line(axis, found, f"C{i}", label, lw=1 + 2 / (1 + i), tasks=own.task)
        for step in sorted(resets):
            axis.axvline(step / 1000, color="gray", linestyle=":", label="resets")
        axis.set(title=title)
        if "eigenvalue" in tag:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    legend(figure)
    save(figure, path)


def bars(rows: list[dict], ylabel: str, path: Path, title: str = "") -> None:
    """A bar for each row, with its interval (its "cell") and a dot for each seed (its "dots").

    Rows of one "panel" stand in one, those of one "name" side by side, a colour for each "task".
    """
    if not rows:
        return
    table = pd.DataFrame(rows)
    by_panel, tasks = table.groupby("panel", sort=False), list(table.task.unique())
    # A title needs the room of two bars.
    counts, width = by_panel.name.nunique().clip(2), 0.8 / len(tasks)
    options = dict(figsize=(1.5 + 0.9 * counts.sum(), 3.6), layout="constrained", squeeze=False)
    options |= dict(width_ratios=counts, sharey=True)
    figure, axes = plt.subplots(1, len(counts), **options)
    for axis, (panel, own) in zip(axes.flat, by_panel, strict=True):
        names = list(own.name.unique())
        for row in own.to_dict("records"):
            i, (value, low, high) = tasks.index(row["task"]), row["cell"]
            x = names.index(row["name"]) + width * (i - (len(tasks) - 1) / 2)
            axis.bar(x, value, 0.9 * width, color=f"C{i}")
            axis.vlines(x, low, high, color="black")
            axis.plot([x] * len(row["dots"]), row["dots"], "o", ms=3.5, mfc="white", mec="black")
        middle, half = (len(names) - 1) / 2, counts[panel] / 2
        axis.set_xlim(middle - half, middle + half)  # bars are of one width in all panels
        axis.axhline(0, color="black", linewidth=0.8)
        labels = [fill(name.replace(" (", "\n("), 9, replace_whitespace=False) for name in names]
        axis.set_xticks(range(len(names)), labels, fontsize="small")
        axis.grid(False, axis="x")
        axis.set_title(panel)
    axes[0, 0].set_ylabel(ylabel)
    figure.suptitle(title)
    if any(tasks):
        colours = [Patch(color=f"C{i}") for i in range(len(tasks))]
        figure.legend(colours, tasks, loc="outside right center")
    save(figure, path)


def mean_with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean over seeds and its 95% bootstrap interval (nan of one seed)."""
    return (float(np.mean(values)), *(bootstrap_interval(values) or (np.nan, np.nan)))


def stages(synthetic: pd.DataFrame, path: Path) -> None:
    """Test accuracy after each stage, the mean over seeds: Figure 2's methods, a panel per task."""
    shown = synthetic[synthetic.exp_name.isin(FIGURE_2)]
    if shown.empty or shown.accuracies.iloc[0].shape[1] == 1:
        return
    by_task = shown.set_index("exp_name").groupby("task").accuracies
    figure, axes = panels(len(by_task))
    for axis, (task, accuracies) in zip(axes, by_task, strict=True):
        for i, name in enumerate(FIGURE_2):
            if name in accuracies:
                mean = accuracies[name].mean(skipna=False)
                axis.plot(1 + mean.index, mean, color=f"C{i}", label=method(name))
        axis.set(title=TASKS[task], xlabel="stage", ylabel="test accuracy")
    legend(figure)
    save(figure, path)


def figure3(late: dict[tuple[str, str], pd.Series], title: str, path: Path) -> None:
    """Percentage points of accuracy above base's, over the seeds that both have."""
    rows = []
    for panel, names in FIGURE_3.items():
        for task, name in [(t, name) for name in names.split() for t in ("input", "label")]:
            if (task, name) in late and (task, "base") in late:
                ours, base = late[task, name].align(late[task, "base"], join="inner")
                gains = 100 * (ours - base).to_numpy()
                row = dict(panel=panel, name=method(name), task=TASKS[task], dots=gains)
                if len(gains):
                    rows.append(row | {"cell": mean_with_interval(gains)})
    bars(rows, "test accuracy above base\n(percentage points)", path, title)


def figures5_and_6(figure: str, aggregate: Aggregate, path: Path) -> None:
    """The IQM, in the panels that have two bars at least."""
    rows, (benchmark, shown) = [], FIGURES_5_AND_6[figure]
    for panel, names in shown.items():
        found = {name: aggregate(benchmark, name) for name in names.split()}
        found = {name.replace("_", " "): row["iqm"] for name, row in found.items() if "iqm" in row}
        if len(found) > 1:
            rows += [dict(panel=panel, name=n, task="", cell=c, dots=[]) for n, c in found.items()]
    bars(rows, "IQM of returns" if benchmark == "dmc" else "IQM, human-normalized", path)


def points(axis: plt.Axes, rows: Iterable[tuple[str, float, float]], colour: str) -> None:
    """A point for each name, x, y."""
    for name, *point in rows:
        axis.plot(*point, "o", color=colour)
        axis.annotate(name, point, (6, -3), textcoords="offset points", color=colour)
    axis.margins(0.25)


def figure1(table2: pd.DataFrame, aggregate: Aggregate, path: Path) -> None:
    """IQM against hours a run: Table 2's rows as the paper prints them (on a GPU), and ours."""
    named = table2.dropna(subset="exp_name")
    found = {row.method: aggregate("atari", row.exp_name) for row in named.itertuples()}
    found = {name: row for name, row in found.items() if "iqm" in row and row["hours"] > 0}
    if found:
        figure, (axis,) = panels(1)
        figure.set_size_inches(7, 5)
        points(axis, zip(table2.method, table2.gpu_hours, table2.iqm, strict=True), "gray")
        points(axis, [(name, row["hours"], row["iqm"][0]) for name, row in found.items()], "C0")
        title = "gray: as the paper prints them, on a GPU"
        axis.set(title=title, xscale="log", xlabel="hours a run", ylabel="IQM")
        save(figure, path)


def figure2(late: dict[tuple[str, str], pd.Series], aggregate: Aggregate, path: Path) -> None:
    """A point per method: accuracy on the input against the label task, IQM Atari against DMC."""
    accuracy, rl = [], []
    for name in FIGURE_2:
        if ("input", name) in late and ("label", name) in late:
            means = (late[task, name].to_numpy().mean() for task in ("input", "label"))
            accuracy.append((method(name), *means))
        rows = [aggregate(benchmark, name) for benchmark in ("atari", "dmc")]
        if all("iqm" in row for row in rows):
            rl.append((method(name), *(row["iqm"][0] for row in rows)))
    drawn = [
        (accuracy, dict(xlabel="accuracy, input task", ylabel="accuracy, label task")),
        (rl, dict(xlabel="IQM, Atari-100k", ylabel="IQM, DeepMind Control")),
    ]
    drawn = [panel for panel in drawn if len(panel[0]) > 1]
    if drawn:
        figure, axes = panels(len(drawn))
        for axis, (rows, words) in zip(axes, drawn, strict=True):
            points(axis, rows, "C0")
            axis.set(**words)
        save(figure, path)


def intervals(title: str, rows: dict[str, dict], names: list[str], path: Path) -> None:
    """rliable's plot: a panel per aggregate, a row per method."""
    rows = {name: row for name, row in rows.items() if "iqm" in row}
    cells = {name: np.array([row[n] for n in names]) for name, row in rows.items()}
    if not cells:
        return
    values = {name: cell[:, 0] for name, cell in cells.items()}  # [aggregates, 3]
    ends = {  # where there is no interval, the value
        name: np.where(np.isnan(cell), cell[:, :1], cell)[:, 1:].T for name, cell in cells.items()
    }
    titles, upwards = [AGGREGATES[name] for name in names], list(cells)[::-1]
    words = dict(xlabel=title, xlabel_y_coordinate=0.1 - 1.8 / len(cells))  # below the ticks
    with plt.rc_context({"axes.grid": False}):  # rliable draws its own
        figure, _ = plot_utils.plot_interval_estimates(values, ends, titles, upwards, **words)
    save(figure, path)


def draw(directory, runs, synthetic, late, title, aggregate, table2, tables) -> None:
    """All figures that these runs give; `table2` is the paper's, `tables` are those printed."""
    if len(runs):
        learning_curves(runs, directory / "curves.png")
        figure4(runs, directory / "figure4.png")
    if len(synthetic):
        stages(synthetic, directory / "stages.png")
    figure1(table2, aggregate, directory / "figure1.png")
    figure2(late, aggregate, directory / "figure2.png")
    figure3(late, title, directory / "figure3.png")
    for figure in FIGURES_5_AND_6:
        figures5_and_6(figure, aggregate, directory / f"{figure}.png")
    for title, benchmark, names, rows in tables:
        ours = {row["method"]: aggregate(benchmark, row["exp_name"]) for row in rows}
        name = "intervals" if len(tables) == 1 else f"intervals_{benchmark}"
        intervals(title, ours, names, directory / f"{name}.png")
