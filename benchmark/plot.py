"""The figures of `python benchmark/report.py ... --plot DIRECTORY`, as PNG files.

curves.png: each run's evaluations. intervals.png: a table's aggregates. figure1.png to figure6.png:
the paper's figures, as far as there are runs for them.

report.py reads, checks and aggregates; here is only what is drawn. `runs` is its table, with the
columns of with_curves; `late` is {(task, exp-name): accuracy by seed} of the synthetic experiment;
`aggregate` gives, for a benchmark and an exp-name, {"iqm": (value, low, high), "hours": ..., ...}.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from rliable import plot_utils

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from synth_cifar_plasticity import bootstrap_interval

Aggregate = Callable[[str, str], dict]
# fmt: off
OKABE_ITO = [  # colours that everyone tells apart
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
]
SINGLE = {  # exp-names of Table 1, and how the paper calls them
    "base": "Base", "sam": "SAM", "ln": "LN", "crelu": "CReLU", "reset": "Reset",
    "plastic": "PLASTIC",
}
AGGREGATES = {  # by their key in the paper's tables
    "iqm": "IQM", "median": "median over tasks", "mean": "mean", "og": "optimality gap",
    "seed_median": "median over seeds",
}
METHODS = {  # panels of Figure 3, the last one not in the paper, and their bars by exp-name
    "single methods": {"ln": "LN", "sam": "SAM", "crelu": "CReLU", "reset": "Reset"},
    "combinations": {
        "ln_sam": "LN +\nSAM", "ln_crelu": "LN +\nCReLU", "ln_reset": "LN +\nReset",
        "sam_crelu": "SAM +\nCReLU", "sam_reset": "SAM +\nReset",
        "crelu_reset": "CReLU +\nReset", "plastic": "PLASTIC",
    },
    "later methods": {  # of fig3_beyond.sh
        "redo": "ReDo", "l2init": "L2 Init", "clip": "weight\nclipping",
        "tortoise": "Hare &\nTortoise", "reset_shrink": "Reset, S&P",
        "ln_sam_redo": "LN + SAM\n+ ReDo", "ln_sam_l2init": "LN + SAM\n+ L2 Init",
        "ln_sam_clip": "LN + SAM\n+ clipping", "ln_sam_tortoise": "LN + SAM\n+ H. & T.",
        "ln_sam_reset_shrink": "LN + SAM\n+ Reset, S&P",
    },
}
METRICS = {  # of Figure 4, by TensorBoard tag; the eigenvalue is the largest by sign, not by size
    "plasticity/hessian_max_eigenvalue": "largest eigenvalue of the Hessian",
    "plasticity/active_units/head": "active units, head",
    "plasticity/active_units/backbone": "active units, backbone",
}
PANELS = {  # of Figures 5 and 6: title, benchmark, exp-name by bar
    "figure5": [
        ("noise in SAM's passes", "atari", {"no SAM": "base", "independent": "sam",
            "reused": "sam_reused", "none in the first": "sam_noiseless"}),
        ("SAM on", "atari", {"nothing": "base", "backbone": "sam_backbone", "head": "sam_head",
            "all": "sam"}),
        ("SAM on, with resets", "atari", {"nothing": "reset", "backbone": "sam_reset_backbone",
            "head": "sam_reset_head", "all": "sam_reset"}),
        ("SAM on (DeepMind Control)", "dmc", {"nothing": "base", "actor": "sam_actor",
            "critic": "sam_critic", "all": "sam"}),
    ],
    "figure6": [
        ("rho", "atari", {"0": "base", "0.03": "sam_rho0.03", "0.1": "sam", "0.3": "sam_rho0.3"}),
        *[(f"batch size, {title}", "atari",
           {"16": f"{name}_batch16", "32": name, "64": f"{name}_batch64"})
          for name, title in (("base", "base"), ("sam", "SAM"), ("reset", "Reset"),
                              ("sam_reset", "SAM + Reset"))],
    ],
}
# fmt: on


def save(figure: plt.Figure, path: Path) -> None:
    """As PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def panels(count: int, width: float, height: float, rows: int = 1, **options) -> tuple:
    """A figure and its first `count` axes, of width by height inches each; the others are empty."""
    columns = -(-count // rows)
    options |= dict(figsize=(1 + width * columns, height * rows), layout="constrained")
    figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def legend(axis: plt.Axes, others: tuple[plt.Axes, ...] = ()) -> None:
    """On this axis: each label of this and the others once."""
    found = [
        pair for a in (axis, *others) for pair in zip(*a.get_legend_handles_labels(), strict=True)
    ]
    handles = {label: handle for handle, label in found}
    axis.legend(handles.values(), handles.keys())


def bar(axis: plt.Axes, x: float, width: float, cell: tuple, **options) -> None:
    """One bar with its interval, of a cell (value, low, high)."""
    value, low, high = cell
    error = None if low is None else [[value - low], [high - value]]
    axis.bar(x, value, width, yerr=error, **options)
    axis.grid(False, axis="x")


def curves(runs: pd.DataFrame, path: Path) -> None:
    """A panel per task: mean return of each evaluation, a line per run, a colour per exp-name."""
    tag = "eval/mean_return"
    runs = runs[[tag in curves for curves in runs.curves]]
    if runs.empty:
        return
    colours = {name: OKABE_ITO[i % 7] for i, name in enumerate(runs.exp_name.unique())}
    by_task = runs.groupby("task", sort=False)
    figure, axes = panels(len(by_task), 4, 3.4, rows=-(-len(by_task) // 4))
    for axis, (task, own) in zip(axes, by_task, strict=True):
        for run in own.itertuples():
            steps, returns = run.curves[tag].T
            options = dict(ms=3, color=colours[run.exp_name], label=run.exp_name)
            axis.plot(steps / 1000, returns, "o-", **options)
        for values, style, label in (
            (random_returns(own), "--", "random policy"),
            (own.constant.iloc[0], ":", "best constant action"),
        ):
            if values:
                axis.axhline(np.mean(values), color="gray", linestyle=style, label=label)
        axis.set(title=task, xlabel="thousand environment steps", ylabel="mean return")
        legend(axis)
    save(figure, path)


def random_returns(runs: pd.DataFrame) -> list[float]:
    """A random policy's returns on these runs' task: measured apart, or else their first ones."""
    return runs.random.iloc[0] or runs["first"].sum()


def intervals(title: str, rows: dict[str, dict], names: list[str], path: Path) -> None:
    """rliable's plot: a panel per aggregate, a row per method."""
    cells = {
        label: np.array([row[name] for name in names], float)  # [aggregates, 3], nan: no interval
        for label, row in rows.items()
        if "iqm" in row
    }
    if not cells:
        return
    values = {label: cell[:, 0] for label, cell in cells.items()}
    ends = {  # where there is no interval, the value
        label: np.where(np.isnan(cell), cell[:, :1], cell)[:, 1:].T for label, cell in cells.items()
    }
    colours = {label: OKABE_ITO[i % 7] for i, label in enumerate(cells)}
    titles, upwards = [AGGREGATES[name] for name in names], list(cells)[::-1]
    words = dict(xlabel=title, xlabel_y_coordinate=0.1 - 1.8 / len(cells))  # below the ticks
    figure, _ = plot_utils.plot_interval_estimates(values, ends, titles, upwards, colours, **words)
    save(figure, path)


def figure1(paper: pd.DataFrame, aggregate: Aggregate, path: Path) -> None:
    """IQM against GPU hours a run: Table 2's rows as the paper prints them, and ours."""
    named = paper.dropna(subset="exp_name")
    ours = [aggregate("atari", name) for name in named.exp_name]
    iqm = [row["iqm"][0] if "iqm" in row else None for row in ours]
    ours = named.assign(iqm=iqm, gpu_hours=[row.get("hours") for row in ours])
    ours = ours.dropna(subset=["iqm", "gpu_hours"])
    if ours.empty:
        return
    figure, (axis,) = panels(1, 5.5, 4.2)
    for colour, (method, rows) in zip(OKABE_ITO, named.groupby("method", sort=False), strict=False):
        own = ours[ours.method == method]
        if len(own):
            axis.plot(own.gpu_hours, own.iqm, "o-", color=colour, label=f"{method}, ours")
        for row in own.itertuples():
            place = dict(xytext=(4, 4), textcoords="offset points")
            axis.annotate(row.replay_ratio, (row.gpu_hours, row.iqm), **place)
        options = dict(mfc="white", color=colour, label=f"{method}, paper")
        axis.plot(rows.gpu_hours, rows.iqm, "o--", **options)
    for row in paper[paper.exp_name.isna()].dropna(subset=["iqm", "gpu_hours"]).itertuples():
        axis.plot(row.gpu_hours, row.iqm, "s", color="gray")
        label = row.label if row.method == "SR-SPR" else row.method
        place = dict(xytext=(5, -3), textcoords="offset points", color="dimgray")
        axis.annotate(label, (row.gpu_hours, row.iqm), **place)
    axis.set(xscale="log", xlabel="GPU hours a run", ylabel="IQM, human-normalized")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.12)
    axis.legend()
    save(figure, path)


def figure2(late: dict[tuple[str, str], pd.Series], aggregate: Aggregate, path: Path) -> None:
    """A point per method: accuracy on the input against the label task, IQM Atari against DMC."""
    names, accuracy, rl = list(SINGLE), {}, {}
    for name in names:
        if ("input", name) in late and ("label", name) in late:
            accuracy[name] = [np.mean(late[task, name].to_numpy()) for task in ("input", "label")]
        rows = [aggregate(benchmark, name) for benchmark in ("atari", "dmc")]
        if all("iqm" in row for row in rows):
            rl[name] = [row["iqm"][0] for row in rows]
    drawn = [
        (accuracy, "synthetic", "accuracy, input task", "accuracy, label task"),
        (rl, "reinforcement learning", "IQM, Atari-100k", "IQM, DeepMind Control"),
    ]
    drawn = [panel for panel in drawn if len(panel[0]) > 1]
    if not drawn:
        return
    figure, axes = panels(len(drawn), 4.6, 4)
    for axis, (points, title, xlabel, ylabel) in zip(axes, drawn, strict=True):
        for name, point in points.items():
            axis.plot(*point, "o", ms=9, color=OKABE_ITO[names.index(name)])
            axis.annotate(SINGLE[name], point, (7, 4), textcoords="offset points")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.margins(0.2)
    save(figure, path)


def gain(ours: pd.Series, base: pd.Series) -> np.ndarray:
    """Percentage points of accuracy above base's, of each seed that both have."""
    ours, base = ours.align(base, join="inner")
    return 100 * (ours - base).to_numpy()


def figure3(late: dict[tuple[str, str], pd.Series], title: str, path: Path) -> None:
    """Bars: gain over base with its interval, a dot for each seed."""
    gains = {
        (task, name): gain(seeds, late[task, "base"])
        for (task, name), seeds in late.items()
        if (task, "base") in late
    }
    if not gains:
        return
    there = {name for (_, name), points in gains.items() if len(points)}
    shown = {panel: [name for name in names if name in there] for panel, names in METHODS.items()}
    shown = {panel: names for panel, names in shown.items() if names}
    if not shown:
        print("figure3.png: no method has a seed in common with base on its task", file=sys.stderr)
        return
    widths = [len(names) for names in shown.values()]
    options = dict(width_ratios=widths, sharey=True)
    figure, axes = panels(len(shown), 0.75 + 1.1 * np.mean(widths), 3.6, **options)
    for axis, (panel, names) in zip(axes, shown.items(), strict=True):
        for task, shift, colour in (("input", -0.2, OKABE_ITO[0]), ("label", 0.2, OKABE_ITO[1])):
            for x, name in enumerate(names):
                points = gains.get((task, name), np.empty(0))
                if len(points):
                    cell = (points.mean(), *(bootstrap_interval(points) or (None, None)))
                    options = dict(color=colour, capsize=3, label=f"{task} task")
                    bar(axis, x + shift, 0.36, cell, **options)
                    options = dict(ms=3.5, mfc="white", mec="black")
                    axis.plot(np.full(len(points), x + shift), points, "o", **options)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), [METHODS[panel][name] for name in names])
        axis.set_title(panel)
    figure.suptitle(title)
    axes[0].set_ylabel("test accuracy above base\n(percentage points)")
    legend(axes[-1], axes[:-1])
    save(figure, path)


def figure4(runs: pd.DataFrame, path: Path) -> None:
    """Plasticity metrics over time, a line per method: mean and range of its runs."""
    names = runs.exp_name.str.removesuffix("_metrics")
    figure, axes = panels(len(METRICS), 4, 3.6)
    for axis, (tag, title) in zip(axes, METRICS.items(), strict=True):
        for colour, (name, label) in zip(OKABE_ITO, SINGLE.items(), strict=False):
            found = [curves[tag] for curves in runs.curves[names == name] if tag in curves]
            if found:
                points = pd.DataFrame(np.concatenate(found), columns=["step", "value"])
                values = points.groupby("step").value.apply(np.array)  # of all runs, by step
                low, mean, high = (values.map(function) for function in (np.min, np.mean, np.max))
                axis.plot(values.index / 1000, mean, "o-", ms=3, color=colour, label=label)
                options = dict(color=colour, alpha=0.15, linewidth=0)
                axis.fill_between(values.index / 1000, low, high, **options)
        axis.set(title=title, xlabel="thousand environment steps")
        axis.set(**{"yscale": "log"} if "eigenvalue" in tag else {"ylim": (0, None)})
    if any(axis.lines for axis in axes):
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        save(figure, path)
    plt.close(figure)


def figures5_and_6(name: str, aggregate: Aggregate, path: Path) -> None:
    """Bars of the IQM, in the panels that have two at least."""
    drawn = []
    for title, benchmark, exp_names in PANELS[name]:
        rows = {label: aggregate(benchmark, exp_name) for label, exp_name in exp_names.items()}
        cells = {label: row["iqm"] for label, row in rows.items() if "iqm" in row}
        ylabel = "IQM of returns" if benchmark == "dmc" else "IQM, human-normalized"
        if len(cells) > 1:
            drawn.append((title, ylabel, cells))
    if not drawn:
        return
    figure, axes = panels(len(drawn), 3.4, 3.4)
    for axis, (title, ylabel, cells) in zip(axes, drawn, strict=True):
        for x, (colour, cell) in enumerate(zip(OKABE_ITO, cells.values(), strict=False)):
            bar(axis, x, 0.7, cell, color=colour, capsize=4)
        axis.set_xticks(range(len(cells)), [label.replace(" ", "\n") for label in cells])
        axis.set(title=title, ylabel=ylabel)
    for axis in axes:  # one height for each kind of score, to compare at a glance
        tops = [other.get_ylim()[1] for other in axes if other.get_ylabel() == axis.get_ylabel()]
        axis.set_ylim(min(0, axis.get_ylim()[0]), max(tops))
    save(figure, path)


def draw(
    directory: Path,
    runs: pd.DataFrame,
    late: dict[tuple[str, str], pd.Series],
    title: str,
    aggregate: Aggregate,
    paper: pd.DataFrame,
    tables: list[tuple[str, str, list[str], list[dict]]],
) -> None:
    """All figures that these runs give; `paper` is its Table 2, `tables` are those printed."""
    figure3(late, title, directory / "figure3.png")
    if "curves" in runs:
        curves(runs, directory / "curves.png")
        figure4(runs, directory / "figure4.png")
    figure1(paper, aggregate, directory / "figure1.png")
    figure2(late, aggregate, directory / "figure2.png")
    for name in PANELS:
        figures5_and_6(name, aggregate, directory / f"{name}.png")
    for title, benchmark, names, shown in tables:
        rows = {row["label"]: aggregate(benchmark, row["exp_name"]) for row in shown}
        name = "intervals" if len(tables) == 1 else f"intervals_{benchmark}"
        intervals(title, rows, names, directory / f"{name}.png")
