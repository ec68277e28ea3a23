"""Tables and figures from result.json files, the paper's figures beside ours.

    python benchmark/report.py runs --table 1
    python benchmark/report.py --scores scores.csv --benchmark atari
    python benchmark/report.py runs --plot figures

Tables 1, 2, 3, 4 are aggregates over tasks (IQM, median, mean, optimality gap, by rliable), with 95% stratified
bootstrap intervals over seeds; 7, 8, 9, 10 are mean returns by task. Atari is in human-normalized scores, DeepMind
Control in returns (its optimality gap below 1,000). No interval below two seeds; where tasks have different numbers of
seeds, the first ones of each count, as many as all have. An aggregate over fewer tasks than the benchmark has is
refused (exit code 1) unless --allow-missing. --scores takes a file of method, task, seed, score (raw returns) instead
of runs.

Without --table: what there is. The synthetic experiment's accuracies, a row per method (the mean over the last stages,
of the setting that result.json names the best), and the returns of all other runs by task.

--plot draws what the runs give: curves.png (each run's evaluations), intervals.png (the table's aggregates), and
figure1.png to figure6.png as far as there are runs for them.

--readme FILE redraws all that a Markdown file shows: between each `<!-- report.py FLAGS -->` and the next
`<!-- end of report -->`, it puts what these flags print.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import matplotlib
import numpy as np
import tyro
from rliable import library, metrics

sys.path.insert(0, str(Path(__file__).parent.parent))
from plastic_drq_rainbow_atari import RANDOM_HUMAN, human_normalized_score
from synth_cifar_plasticity import bootstrap_interval, write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TASKS = {
    "input": "#0072b2",
    "label": "#d55e00",
}  # with colours of the Okabe-Ito palette, told apart by everyone
METHODS = {  # panels of Figure 3, and the names of their bars by exp-name
    "single methods": {"ln": "LN", "sam": "SAM", "crelu": "CReLU", "reset": "Reset"},
    "combinations": {
        "ln_sam": "LN +\nSAM", "ln_crelu": "LN +\nCReLU", "ln_reset": "LN +\nReset", "sam_crelu": "SAM +\nCReLU",
        "sam_reset": "SAM +\nReset", "crelu_reset": "CReLU +\nReset", "plastic": "PLASTIC",
    },
}  # fmt: skip
# What has to be the same in runs that are compared.
PROTOCOL = "num_stages updates_per_stage batch_size momentum conv_strides label_change".split()
NAMES = {"base": "base"} | {
    key: name.replace("\n", " ") for panel in METHODS.values() for key, name in panel.items()
}


PAPER = Path(__file__).parent / "paper"
SCRIPTS = {  # of reinforcement learning, and what their results belong to
    "plastic_drq_rainbow_atari.py": "atari",
    "plastic_drq_sac_dmc.py": "dmc",
    "plastic_pretrained_finetune.py": "pretrained",
}
CONTROL = [
    "acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "finger-turn_easy", "finger-turn_hard", "hopper-hop",
    "quadruped-run", "quadruped-walk", "reacher-easy", "reacher-hard", "walker-run",
]  # fmt: skip
ALL_TASKS = {"atari": list(RANDOM_HUMAN), "pretrained": list(RANDOM_HUMAN), "dmc": CONTROL}
SINGLE = {
    "base": "Base",
    "sam": "SAM",
    "ln": "LN",
    "crelu": "CReLU",
    "reset": "Reset",
    "plastic": "PLASTIC",
}
# Of each aggregate: key in the paper's tables, name.
AGGREGATES = {
    "iqm": "IQM",
    "median": "median over tasks",
    "mean": "mean",
    "og": "optimality gap",
    "seed_median": "median over seeds",
}
PER_TASK = {  # tables of mean returns: file, benchmark, exp-name by column
    "7": ("table7_atari_drq.csv", "atari", {"LayerNorm" if n == "LN" else n: e for e, n in SINGLE.items()}),
    "8": ("table8_atari_sota.csv", "atari", {"PLASTIC†:8": "ln_reset_rr8", "PLASTIC:8": "plastic_rr8"}),
    "9": ("table9_atari_replay_ratio.csv", "atari", {
        f"{name}:{ratio}": exp_name + ("" if ratio == 2 else f"_rr{ratio}")
        for ratio in (2, 4, 8) for name, exp_name in (("PLASTIC†", "ln_reset"), ("PLASTIC", "plastic"))
    }),
    "10": ("table10_dmc.csv", "dmc", {"LayerNorm" if n == "LN" else n: e for e, n in SINGLE.items()}),
}  # fmt: skip
# Flags that may differ between runs of a setting.
APART = set(
    "env_id seed exp_name run_dir device cuda_graph torch_threads resume checkpoint_interval overwrite evaluate "
    "eval_interval metrics_interval log_interval capture_video save_model track wandb_project_name wandb_entity "
    "pretrained_path".split()
)
OKABE_ITO = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
]  # told apart by everyone

Cell = (
    float | int | str | None | tuple[float, float | None, float | None]
)  # of a tuple: value and its interval


@dataclass
class Args:
    """Tables and figures from result.json files."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional
    ] = ()  # directories with the runs' directories
    table: Literal["1", "2", "3", "4", "7", "8", "9", "10"] | None = None  # of the paper
    scores: Path | None = None  # a CSV file of method, task, seed, score instead of runs
    benchmark: Literal["atari", "dmc"] = "atari"  # what the scores are of
    format: Literal["markdown", "csv", "json"] = "markdown"  # of the tables (json: a line for each)
    plot: Path | None = None  # draw figures in this directory
    last: int = 5  # stages at the end over which the synthetic experiment's accuracy is averaged
    reps: int = 2_000  # bootstrap samples
    seed: int = 0  # of the bootstrap
    runs_per_gpu: int = 1  # runs that shared a GPU: their hours are divided by it (appendix A.1)
    allow_missing: bool = False  # aggregate over the tasks that are there
    readme: Path | None = None  # instead of all this: a Markdown file, whose reports are made anew


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr: code 2 for a flag that makes no sense, 1 for what is there."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def read_results(directories: Iterable[Path]) -> dict[tuple[str, str], dict]:
    """{(task, exp_name): result} of the synthetic experiment's runs in the directories, their accuracies as arrays."""
    results = {}
    for path in [
        path for directory in directories for path in sorted(directory.glob("**/result.json"))
    ]:
        try:
            result = json.loads(path.read_text())
            if result["script"] != "synth_cifar_plasticity.py":
                continue
            # null, of a replica that diverged, becomes nan.
            accuracies = np.array(result["test_accuracy"], dtype=float)
            if accuracies.ndim != 2 or np.isinf(accuracies).any() or accuracies.size == 0:
                raise ValueError("test_accuracy")
            numbers = ("learning_rate", "weight_decay", "final_accuracy_mean", "mean_accuracy_mean")
            result |= {"test_accuracy": accuracies, "first_seed": int(result["first_seed"])}
            result |= {name: np.array(result[name], dtype=float).item() for name in numbers}
            key = (str(result["task"]), str(result["exp_name"]))
            result["num_seeds"] = len(accuracies)
            result["protocol"] = {name: result["args"][name] for name in PROTOCOL} | {
                "images": result["data"]
            }
            flags = result["args"]
            on = {"ln": flags["layer_norm"], "crelu": flags["crelu"], "sam": flags["sam_rho"] > 0}
            on |= {"reset": flags["reset_interval"] > 0}
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            fail(f"{path}: not a result of synth_cifar_plasticity.py ({error!r})", 1)
        if key in results:
            fail(f"{path}: another run of {' '.join(key)}; keep one of them there", 1)
        if key[0] not in TASKS or key[1] not in NAMES:
            print(
                f"left out: {path}, whose exp-name is none of {', '.join(NAMES)}", file=sys.stderr
            )
            continue
        parts = on.keys() if key[1] == "plastic" else key[1].split("_")
        if any((part in parts) != is_on for part, is_on in on.items()):
            fail(f"{path}: its flags are not those of {key[1]}", 1)
        results[key] = result
    for name in (*PROTOCOL, "images"):
        values = sorted({json.dumps(result["protocol"][name]) for result in results.values()})
        if len(values) > 1:
            fail(
                f"synthetic runs cannot be compared, they differ in {name}: {', '.join(values)}", 1
            )
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
    print(
        f"| method | task | test accuracy, last {last} stages | final | mean | learning rate, weight decay | seeds |"
    )
    print("|---|---|---|---|---|---|---|")
    for method, name in NAMES.items():
        for task in TASKS:
            if (result := results.get((task, method))) is not None:
                late = with_interval(np.array(list(late_accuracy(result, last).values())))
                setting = f"{result['learning_rate']:g}, {result['weight_decay']:g}"
                final, mean, seeds = (
                    result[k] for k in ("final_accuracy_mean", "mean_accuracy_mean", "num_seeds")
                )
                print(
                    f"| {name} | {task} | {late} | {final:.3f} | {mean:.3f} | {setting} | {seeds} |"
                )


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
                axis.bar(
                    x + shift, points.mean(), 0.36, color=colour, yerr=error, capsize=3, label=task
                )
                axis.plot(
                    np.full(len(points), x + shift), points, "o", ms=3.5, mfc="white", mec="black"
                )
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
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0, -1].legend(handles.values(), [f"{task} task" for task in handles])
    save(figure, path)


# --- Reinforcement learning -------------------------------------------------------------------------------------------


def read_runs(directories: Iterable[Path]) -> list[dict]:
    """Results of the three scripts, each with benchmark, task, exp_name, seed, score (mean return), steps and hours."""
    runs: dict[tuple, dict] = {}
    for path in [
        path for directory in directories for path in sorted(directory.glob("**/result.json"))
    ]:
        try:
            result = json.loads(path.read_text())
            if result["script"] not in SCRIPTS or result["args"].get("mode") == "pretrain":
                continue
            run = {name: str(result[name]) for name in ("script", "exp_name")} | {
                "args": dict(result["args"])
            }
            run |= {
                "benchmark": SCRIPTS[result["script"]],
                "task": str(result["env_id"]),
                "seed": int(result["seed"]),
            }
            run |= {
                "score": float(result["mean_return"]),
                "steps": int(result["env_steps"]),
                "path": path.parent,
            }
            run["hours"] = float(result["wall_clock_seconds"]) / 3600
            run["returns"] = [float(value) for value in result["episode_returns"]]
            run["parameters"] = int(result["parameters"])
            run["action_repeat"] = int(run["args"].get("action_repeat", 1))
            run["first_steps"] = int(run["args"].get("learning_starts", 0)) * run["action_repeat"]
            if (
                not np.isfinite([run["score"], run["hours"], *run["returns"]]).all()
                or not run["returns"]
            ):
                raise ValueError("mean_return, episode_returns or wall_clock_seconds")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            fail(f"{path}: not a result of these scripts ({error!r})", 1)
        key = tuple(run[name] for name in ("benchmark", "exp_name", "task", "seed", "steps"))
        if key in runs:
            fail(
                f"{path.parent} and {runs[key]['path']} are the same run twice; keep one of them there",
                1,
            )
        runs[key] = run
    return list(runs.values())


def read_scores(path: Path, benchmark: str) -> list[dict]:
    """The same of a CSV file with the columns method, task, seed, score; without steps and hours."""
    runs: dict[tuple, dict] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
            reader = csv.DictReader(file, strict=True)
            for column in ("method", "task", "seed", "score"):
                if column not in (reader.fieldnames or []):
                    raise ValueError(f"no column {column}")
            for row in reader:
                number = reader.line_num
                try:
                    run = {
                        "benchmark": benchmark,
                        "exp_name": row["method"],
                        "task": row["task"],
                        "steps": None,
                    }
                    run |= {
                        "seed": int(row["seed"]),
                        "score": float(row["score"]),
                        "hours": None,
                        "parameters": None,
                    }
                except (ValueError, TypeError):
                    raise ValueError(f"line {number}: {row}") from None
                key = (run["exp_name"], run["task"], run["seed"])
                if (
                    run["task"] not in ALL_TASKS[benchmark]
                    or not abs(run["score"]) < 1e100
                    or key in runs
                ):
                    raise ValueError(f"line {number}: {row}")
                runs[key] = run | {"path": path}
    except OSError as error:
        fail(f"--scores {path}: {error.strerror}", 1)
    except (ValueError, csv.Error) as error:
        what = f"needs columns method, task, seed, score, tasks of {benchmark}, finite scores, no line twice"
        fail(f"--scores {path}: {what} ({error})", 1)
    return list(runs.values())


def setting(run: dict) -> dict:
    """What has to be the same in runs that are put together: all flags but those that say which run it is, and how."""
    by_task = (
        {"action_repeat", "sam_rho", "buffer_size"} if run["benchmark"] == "dmc" else set()
    )  # resolved by task
    return {
        name: value for name, value in run.get("args", {}).items() if name not in APART | by_task
    }


def check_name(run: dict) -> None:
    """End with one line if a run named after interventions has others on."""
    args, first = run.get("args", {}), run["exp_name"].split("_")[0]
    if (
        first not in SINGLE
        or run["benchmark"] == "pretrained"
        or not {"layer_norm", "crelu"} <= args.keys()
    ):
        return
    parts = "ln sam crelu reset".split() if first == "plastic" else run["exp_name"].split("_")
    on = {
        "ln": args["layer_norm"],
        "crelu": args["crelu"],
        "reset": args.get("reset_interval", 0) > 0,
    }
    on["sam"] = args.get("sam_rho", 0) > 0
    if any((name in parts) != bool(is_on) for name, is_on in on.items()):
        fail(f"{run['path']}: its flags are not those of {run['exp_name']}", 1)


def choose(runs: list[dict], benchmark: str, exp_name: str) -> list[dict]:
    """The runs of one setting; ends with one line if they are of more than one, or not what their name says."""
    chosen = [run for run in runs if (run["benchmark"], run["exp_name"]) == (benchmark, exp_name)]
    for run in chosen:
        check_name(run)
        settings = [{"steps": other["steps"]} | setting(other) for other in (chosen[0], run)]
        for name in dict.fromkeys([*settings[0], *settings[1]]):
            one, other = (json.dumps(values.get(name)) for values in settings)
            if one != other:
                problem = (
                    f"they differ in {name}: {one} in {chosen[0]['path']}, {other} in {run['path']}"
                )
                fail(f"runs of {exp_name} cannot be put together, {problem}", 1)
    return chosen


def score_matrix(runs: list[dict], tasks: list[str], note: Callable[[str], None]) -> np.ndarray:
    """Scores [seeds, tasks] of the given tasks, the first seeds of each, as many as all have."""
    by_task = {
        task: sorted((run["seed"], run["score"]) for run in runs if run["task"] == task)
        for task in tasks
    }
    counts = {task: len(scores) for task, scores in by_task.items()}
    fewest = min(counts.values())
    if max(counts.values()) > fewest:
        note(f"cut to the first {fewest} seeds of each task (of up to {max(counts.values())})")
    if len({tuple(seed for seed, _ in scores[:fewest]) for scores in by_task.values()}) > 1:
        note("tasks have different seeds")
    return np.array([[score for _, score in by_task[task][:fewest]] for task in tasks]).T


def normalized(matrix: np.ndarray, tasks: list[str], benchmark: str) -> np.ndarray:
    """Human-normalized scores of Atari; DeepMind Control's returns as they are."""
    if benchmark == "dmc":
        return matrix
    columns = zip(matrix.T, tasks, strict=True)
    return np.array(
        [[human_normalized_score(task, score) for score in column] for column, task in columns]
    ).T


def aggregates(matrix: np.ndarray, benchmark: str, args: Args) -> dict[str, Cell]:
    """All of AGGREGATES for scores [seeds, tasks], with intervals where there are two seeds at least.

    rliable's median is that over tasks of the mean over seeds; the paper's for DeepMind Control is the median over
    seeds of the mean over tasks.
    """
    gamma = 1000.0 if benchmark == "dmc" else 1.0

    def all_of_them(scores: np.ndarray) -> np.ndarray:
        return np.array([
            metrics.aggregate_iqm(scores), metrics.aggregate_median(scores), metrics.aggregate_mean(scores),
            metrics.aggregate_optimality_gap(scores, gamma), np.median(scores.mean(1)),
        ])  # fmt: skip

    values = all_of_them(matrix)
    low = high = [None] * len(values)
    if len(matrix) > 1:
        np.random.seed(args.seed)  # rliable draws its bootstrap from NumPy's global generator
        _, intervals = library.get_interval_estimates({"": matrix}, all_of_them, reps=args.reps)
        low, high = intervals[""]
    return {
        name: (float(v), lo, hi)
        for name, v, lo, hi in zip(AGGREGATES, values, low, high, strict=True)
    }


def paper(name: str) -> list[dict[str, str]]:
    """Rows of a table in benchmark/paper/."""
    with open(PAPER / name, newline="") as file:
        return list(csv.DictReader(file))


def paper_cells(row: dict[str, str]) -> dict[str, Cell]:
    """The aggregates that a row of the paper prints."""
    cells: dict[str, Cell] = {}
    for name in AGGREGATES:
        if row.get(name):
            low, high = (
                float(row[f"{name}_{end}"]) if f"{name}_{end}" in row else None
                for end in ("low", "high")
            )
            cells[name] = (float(row[name]), low, high)
    return cells


def aggregate_tables(
    table: str,
) -> list[tuple[str, str, list[str], list[tuple[str, str, dict[str, Cell]]]]]:
    """(title, benchmark, aggregates, [(label, exp_name, the paper's cells)]) of Tables 1 to 4."""
    if table == "1":
        tables = []
        for benchmark, title in (("atari", "Atari-100k"), ("dmc", "DeepMind Control")):
            rows = {
                row["method"]: row
                for row in paper("table1_main.csv")
                if row["benchmark"] == benchmark
            }
            shown = [
                (label, exp_name, paper_cells(rows[label])) for exp_name, label in SINGLE.items()
            ]
            names = (
                ["iqm", "median", "mean"]
                if benchmark == "atari"
                else ["iqm", "seed_median", "median", "mean"]
            )
            if benchmark == "dmc":  # the paper's median is the one over seeds
                shown = [
                    (label, name, cells | {"seed_median": cells.pop("median")})
                    for label, name, cells in shown
                ]
            tables.append((f"Table 1, {title}", benchmark, names, shown))
        return tables
    if table == "2":
        rows = [row for row in paper("table2_scaling.csv") if row["method"].startswith("PLASTIC")]
        shown = []
        for row in rows:
            name = {"PLASTIC†": "ln_reset", "PLASTIC": "plastic"}[row["method"]]
            name += "" if row["replay_ratio"] == "2" else f"_rr{row['replay_ratio']}"
            cells = paper_cells(row) | {
                "hours": float(row["gpu_hours"]),
                "parameters": float(row["params_m"]),
            }
            shown.append((f"{row['method']}:{row['replay_ratio']}", name, cells))
        return [("Table 2", "atari", ["iqm", "median", "mean", "og"], shown)]
    if table == "3":
        shown = []
        for row in paper("table3_pretrained.csv"):
            on = [name for name in ("sam", "reset_dagger") if row[name] == "1"]
            name = "_".join(on).replace("_dagger", "") or "base"
            label = f"RR {row['replay_ratio']}" + "".join(
                f", {'SAM' if n == 'sam' else 'Reset†'}" for n in on
            )
            shown.append((label, f"pretrained_{name}_rr{row['replay_ratio']}", paper_cells(row)))
        return [("Table 3", "pretrained", ["iqm"], shown)]
    shown = []
    for row in paper("table4_ablation.csv"):
        on = [name for name in ("ln", "sam", "crelu", "reset") if row[name] == "1"]
        exp_name = {0: "base", 4: "plastic"}.get(len(on), "_".join(on))
        shown.append(
            (" + ".join(SINGLE[name] for name in on) or "Base", exp_name, paper_cells(row))
        )
    return [("Table 4", "atari", ["iqm"], shown)]


def row_of(
    runs: list[dict], benchmark: str, exp_name: str, notes: list[str], args: Args
) -> dict[str, Cell]:
    """All aggregates of one setting, and the number of its runs; without aggregates where tasks are missing.

    `notes` takes a line on whatever is missing, cut or shorter than in the paper.
    """
    chosen, tasks = choose(runs, benchmark, exp_name), ALL_TASKS[benchmark]
    there = [task for task in tasks if any(run["task"] == task for run in chosen)]
    row: dict[str, Cell] = {"runs": len(chosen)}
    if not there:
        return row
    hours = [run["hours"] for run in chosen if run["hours"] is not None]
    if hours:
        row["hours"] = float(np.mean(hours)) / args.runs_per_gpu
        row["parameters"] = float(np.mean([run["parameters"] for run in chosen])) / 1e6
        expected = 2_000_000 if benchmark == "dmc" else 100_000
        if chosen[0]["steps"] != expected:
            notes.append(f"{exp_name}: runs of {chosen[0]['steps']:,} steps, not of {expected:,}")
    if missing := [task for task in tasks if task not in there]:
        what = "no aggregate (--allow-missing makes one of the others)"
        if args.allow_missing:
            what = f"aggregated over {len(there)} of {len(tasks)} tasks"
        notes.append(f"{exp_name}: no runs of {', '.join(missing)}; {what}")
        if not args.allow_missing:
            return row | {"refused": 1}
    matrix = score_matrix(chosen, there, lambda text: notes.append(f"{exp_name}: {text}"))
    return row | aggregates(normalized(matrix, there, benchmark), benchmark, args)


def print_rows(title: str, rows: list[dict[str, Cell]], digits: int, form: str) -> None:
    """A table: Markdown, CSV (its title first; an interval in two more columns) or a line of JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def text(cell: Cell) -> str:
        if isinstance(cell, tuple):
            value, low, high = cell
            return f"{value:.{digits}f}" + (
                "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
            )
        return (
            "" if cell is None else f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)
        )

    if form == "json":
        print(json.dumps({"title": title, "rows": rows}, ensure_ascii=False))
    elif form == "csv":
        print(f"# {title}")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        ranged = {
            c
            for c in columns
            if any(isinstance(row.get(c), tuple) and row[c][1] is not None for row in rows)
        }
        writer.writerow(
            [
                name
                for c in columns
                for name in ([c, f"{c} low", f"{c} high"] if c in ranged else [c])
            ]
        )
        for row in rows:
            cells = [(row.get(c), c) for c in columns]
            parts = [
                (list(x) if isinstance(x, tuple) else [x, None, None])[: 3 if c in ranged else 1]
                for x, c in cells
            ]
            writer.writerow([text(x) for part in parts for x in part])
    else:
        print(f"{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in rows:
            print("| " + " | ".join(text(row.get(c)).replace("|", "\\|") for c in columns) + " |")
        print()


def print_table_of_aggregates(runs: list[dict], args: Args) -> bool:
    """Tables 1 to 4, ours beside the paper's; whether an aggregate was refused."""
    refused = False
    for title, benchmark, names, shown in aggregate_tables(args.table):
        rows, notes = [], []
        for label, exp_name, printed in shown:
            ours = row_of(runs, benchmark, exp_name, notes, args)
            refused |= "refused" in ours
            row: dict[str, Cell] = {"method": label, "runs": ours["runs"]}
            for name in names:
                row |= {
                    AGGREGATES[name]: ours.get(name),
                    f"{AGGREGATES[name]}, paper": printed.get(name),
                }
            if "hours" in printed:
                row |= {"GPU hours": ours.get("hours"), "GPU hours, paper": printed["hours"]}
                row |= {
                    "million parameters": ours.get("parameters"),
                    "parameters, paper": printed["parameters"],
                }
            rows.append(row)
        if not any(row["runs"] for row in rows):
            notes.append(f"{title}: no runs of {', '.join(name for _, name, _ in shown)}")
        print_rows(title, rows, 1 if benchmark == "dmc" else 3, args.format)
        print("\n".join(notes), file=sys.stderr, end="\n" if notes else "")
    return refused


def print_table_by_task(runs: list[dict], args: Args) -> None:
    """Tables 7 to 10: mean returns over seeds, ours beside the paper's, and the other columns that the paper prints."""
    name, benchmark, exp_names = PER_TASK[args.table]
    rows = []
    chosen = {column: choose(runs, benchmark, exp_name) for column, exp_name in exp_names.items()}
    expected = 2_000_000 if benchmark == "dmc" else 100_000
    for column, own in chosen.items():
        missing = [
            task for task in ALL_TASKS[benchmark] if task not in {run["task"] for run in own}
        ]
        if missing:
            print(
                f"{exp_names[column]}: no runs of {', '.join(missing) if own else 'any task'}",
                file=sys.stderr,
            )
        if own and own[0]["steps"] not in (None, expected):
            print(
                f"{exp_names[column]}: runs of {own[0]['steps']:,} steps, not of {expected:,}",
                file=sys.stderr,
            )
    for printed in paper(name):
        row: dict[str, Cell] = {"task": printed["Game"]}
        for column in [column for column in printed if column != "Game"]:
            if column in chosen:
                scores = [run["score"] for run in chosen[column] if run["task"] == printed["Game"]]
                row |= {
                    column: float(np.mean(scores)) if scores else None,
                    f"{column}, runs": len(scores),
                }
            row[f"{column}, paper"] = float(printed[column]) if printed[column] else None
        rows.append(row)
    print_rows(f"Table {args.table}", rows, 1, args.format)


def print_scores(runs: list[dict], args: Args) -> bool:
    """All aggregates of each method; whether one was refused."""
    rows, notes = [], []
    for method in dict.fromkeys(run["exp_name"] for run in runs):
        ours = row_of(runs, args.benchmark, method, notes, args)
        rows.append(
            {"method": method, "runs": ours["runs"]}
            | {AGGREGATES[n]: ours.get(n) for n in AGGREGATES}
        )
    print_rows("human-normalized scores" if args.benchmark == "atari" else "returns", rows,
               1 if args.benchmark == "dmc" else 3, args.format)  # fmt: skip
    print("\n".join(notes), file=sys.stderr, end="\n" if notes else "")
    return any(row["IQM"] is None for row in rows)


def read_curves(run: dict) -> dict[str, list[tuple[int, float]]]:
    """A run's scalars over environment steps, from its TensorBoard events: evaluation, training, plasticity metrics."""
    events = EventAccumulator(str(run["path"]), size_guidance={"scalars": 0})
    events.Reload()
    repeat = run["action_repeat"]
    return {
        tag: sorted((e.step * repeat, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


# Policies that learn nothing: name of their runs, and how their flags tell.
REFERENCES: dict[str, Callable[[dict], bool]] = {
    "random": lambda args: args.get("eval_epsilon") == 1,
    "constant": lambda args: "action" in args,  # of benchmark/constant_actions.py
}


def add_curves(runs: list[dict]) -> list[dict]:
    """The runs, each with its curves and the returns of policies that learn nothing.

    "random" and "constant": returns of the REFERENCES on the same task, whose own runs are left out; "first" and
    "late": of the run's own episodes before learning starts, and of those that end in the last quarter of its steps.
    """
    references = [
        run for run in runs if (told := REFERENCES.get(run["exp_name"])) and told(run["args"])
    ]
    returns: dict[tuple, list[float]] = {}
    for run in references:
        returns.setdefault((run["exp_name"], run["benchmark"], run["task"]), []).extend(
            run["returns"]
        )
    runs = [run for run in runs if run not in references]
    if references and not runs:
        fail("no runs there but of policies that learn nothing", 1)
    for run in runs:
        run["curves"] = read_curves(run)
        episodes = run["curves"].get("charts/episodic_return", [])
        run["first"] = [value for step, value in episodes if step <= run["first_steps"]]
        run["late"] = [value for step, value in episodes if step > 0.75 * run["steps"]]
        run |= {name: returns.get((name, run["benchmark"], run["task"]), []) for name in REFERENCES}
    return runs


def random_returns(runs: list[dict]) -> list[float]:
    """A random policy's returns on the task of these runs: measured apart, or else their first episodes."""
    return runs[0]["random"] or [value for run in runs for value in run["first"]]


def paper_returns() -> dict[tuple[str, str, str], float]:
    """{(benchmark, exp_name, task): mean return} of the paper's tables by task, at full length."""
    return {
        (benchmark, exp_name, row["Game"]): float(row[column])
        for name, benchmark, exp_names in PER_TASK.values()
        for row in paper(name)
        for column, exp_name in exp_names.items()
        if row[column]
    }


def print_returns(runs: list[dict], args: Args) -> None:
    """A row per task, name and length."""
    printed = paper_returns()
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault(
            (run["benchmark"], run["task"], run["exp_name"], run["steps"]), []
        ).append(run)
    rows = []
    for (benchmark, task, exp_name, steps), group in groups.items():
        scores = np.array([run["score"] for run in group])
        random = random_returns(group)
        low, high = bootstrap_interval(scores) if len(scores) > 1 else (None, None)
        row = {"task": task, "run": exp_name, "steps": f"{steps:,}"}
        row["random policy"] = f"{np.mean(random):.1f} ({len(random)} episodes)" if random else ""
        row["best constant action"] = (
            float(np.mean(group[0]["constant"])) if group[0]["constant"] else ""
        )
        late = [value for run in group for value in run["late"]]
        row["last training episodes"] = f"{np.mean(late):.1f} ({len(late)})" if late else ""
        row |= {"mean return": (float(scores.mean()), low, high), "seeds": len(group)}
        row["paper, full length"] = printed.get((benchmark, exp_name, task))
        row["hours a run"] = f"{np.mean([run['hours'] for run in group]):.1f}"
        rows.append(row)
    print_rows("Returns", rows, 1, args.format)


METRICS = {  # of Figure 4, by tag
    "plasticity/hessian_max_eigenvalue": "largest eigenvalue of the Hessian",
    "plasticity/active_units/head": "active units, head",
    "plasticity/active_units/backbone": "active units, backbone",
}


def print_metrics(runs: list[dict], args: Args) -> None:
    """A row per task and name: Figure 4's metrics, each the median over the second half of every run's measurements."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        if any(run["curves"].get(tag) for tag in METRICS):
            groups.setdefault(
                (run["benchmark"], run["task"], run["exp_name"], run["steps"]), []
            ).append(run)
    rows = []
    for (_, task, exp_name, steps), group in groups.items():
        row: dict[str, Cell] = {
            "task": task,
            "run": exp_name,
            "steps": f"{steps:,}",
            "seeds": len(group),
        }
        for tag, title in METRICS.items():
            late = [curve[len(curve) // 2 :] for run in group if (curve := run["curves"].get(tag))]
            row[title] = (
                f"{np.median([value for curve in late for _, value in curve]):.3g}" if late else ""
            )
        rows.append(row)
    if rows:
        print_rows("Plasticity, the median of each run's second half", rows, 3, args.format)


# --- Figures of reinforcement learning --------------------------------------------------------------------------------


def plot_curves(runs: list[dict], path: Path) -> None:
    """A panel per task: mean return of each evaluation over environment steps, a line per run, a colour per name."""
    runs = [run for run in runs if run["curves"].get("eval/mean_return")]
    tasks, names = (list(dict.fromkeys(run[key] for run in runs)) for key in ("task", "exp_name"))
    if not tasks:
        return
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 + 4 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )  # fmt: skip
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks, strict=False):
        for run in (run for run in runs if run["task"] == task):
            colour = OKABE_ITO[names.index(run["exp_name"]) % len(OKABE_ITO)]
            steps, returns = zip(*run["curves"]["eval/mean_return"], strict=True)
            axis.plot(
                np.array(steps) / 1000, returns, "o-", ms=3, color=colour, label=run["exp_name"]
            )
        random = random_returns([run for run in runs if run["task"] == task])
        if random:
            axis.axhline(np.mean(random), color="gray", linestyle="--", label="random policy")
        if constant := next((run["constant"] for run in runs if run["task"] == task), []):
            axis.axhline(
                np.mean(constant), color="gray", linestyle=":", label="best constant action"
            )
        axis.set(title=task, xlabel="thousand environment steps", ylabel="mean return")
        axis.grid(alpha=0.3)
        handles = {
            label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        axis.legend(handles.values(), handles.keys())
    save(figure, path)


def bars(axis: plt.Axes, cells: dict[str, Cell], title: str, ylabel: str) -> None:
    """A bar with its interval for each label, in one colour each."""
    for x, (label, cell) in enumerate(cells.items()):
        value, low, high = cell
        error = None if low is None else [[value - low], [high - value]]
        axis.bar(
            x, value, 0.7, color=OKABE_ITO[x % len(OKABE_ITO)], yerr=error, capsize=4, label=label
        )
    axis.set_xticks(range(len(cells)), [label.replace(" ", "\n") for label in cells])
    axis.set(title=title, ylabel=ylabel)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


# Panels of Figures 5 and 6: title, benchmark, exp-name by label.
PANELS = {
    "figure5": [
        ("noise in SAM's passes", "atari", {"no SAM": "base", "independent": "sam", "reused": "sam_reused",
            "none in the first": "sam_noiseless"}),
        ("SAM on", "atari", {"nothing": "base", "backbone": "sam_backbone", "head": "sam_head", "all": "sam"}),
        ("SAM on, with resets", "atari", {"nothing": "reset", "backbone": "sam_reset_backbone",
            "head": "sam_reset_head", "all": "sam_reset"}),
        ("SAM on (DeepMind Control)", "dmc", {"nothing": "base", "actor": "sam_actor", "critic": "sam_critic",
            "all": "sam"}),
    ],
    "figure6": [
        ("rho", "atari", {"0": "base", "0.03": "sam_rho0.03", "0.1": "sam", "0.3": "sam_rho0.3"}),
        *[(f"batch size, {title}", "atari", {"16": f"{name}_batch16", "32": name, "64": f"{name}_batch64"})
          for name, title in (("base", "base"), ("sam", "SAM"), ("reset", "Reset"), ("sam_reset", "SAM + Reset"))],
    ],
}  # fmt: skip


def plot_panels(runs: list[dict], figure_name: str, path: Path, args: Args) -> None:
    """Figure 5 or 6: bars of the IQM; nothing where no panel has two bars."""
    panels, notes = [], []
    for title, benchmark, exp_names in PANELS[figure_name]:
        rows = {
            label: row_of(runs, benchmark, name, notes, args) for label, name in exp_names.items()
        }
        cells = {label: row["iqm"] for label, row in rows.items() if "iqm" in row}
        if len(cells) > 1:
            panels.append(
                (title, cells, "IQM of returns" if benchmark == "dmc" else "IQM, human-normalized")
            )
    if panels:
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(1 + 3.4 * len(panels), 3.4),
            squeeze=False,
            layout="constrained",
        )
        for axis, (title, cells, ylabel) in zip(axes[0], panels, strict=True):
            bars(axis, cells, title, ylabel)
        for axis in axes[0]:  # comparable at a glance
            alike = [
                other.get_ylim()[1] for other in axes[0] if other.get_ylabel() == axis.get_ylabel()
            ]
            axis.set_ylim(min(0, axis.get_ylim()[0]), max(alike))
        save(figure, path)


def plot_figure4(runs: list[dict], path: Path) -> None:
    """Largest eigenvalue and active units over time, a line per method: mean over runs, with the range of the runs."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    drawn = False
    for axis, (tag, title) in zip(axes, METRICS.items(), strict=True):
        for colour, (exp_name, label) in zip(OKABE_ITO, SINGLE.items(), strict=False):
            names = (exp_name, f"{exp_name}_metrics")
            curves = [run["curves"].get(tag) for run in runs if run["exp_name"] in names]
            values: dict[int, list[float]] = {}
            for step, value in [point for curve in curves if curve for point in curve]:
                values.setdefault(step, []).append(value)
            if values:
                drawn = True
                steps = np.array(sorted(values))
                lowest, mean, highest = (
                    [function(values[step]) for step in steps] for function in (min, np.mean, max)
                )
                axis.plot(steps / 1000, mean, "o-", ms=3, color=colour, label=label)
                axis.fill_between(
                    steps / 1000, lowest, highest, color=colour, alpha=0.15, linewidth=0
                )
        axis.set(title=title, xlabel="thousand environment steps")
        if "eigenvalue" in tag:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    if not drawn:
        plt.close(figure)
        return
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save(figure, path)


def plot_figure1(runs: list[dict], path: Path, args: Args) -> None:
    """IQM against GPU hours a run: ours as lines over the replay ratio, the paper's table as points."""
    notes = []
    (_, benchmark, _, shown), *_ = aggregate_tables("2")
    ours = {label: row_of(runs, benchmark, name, notes, args) for label, name, _ in shown}
    ours = {label: row for label, row in ours.items() if "iqm" in row and "hours" in row}
    if not ours:
        return
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for colour, method in zip(OKABE_ITO, ("PLASTIC†", "PLASTIC"), strict=False):
        points = {label: row for label, row in ours.items() if label.split(":")[0] == method}
        if points:
            x, y = zip(*[(row["hours"], row["iqm"][0]) for row in points.values()], strict=True)
            axis.plot(x, y, "o-", color=colour, label=f"{method}, ours")
            for label, row in points.items():
                axis.annotate(
                    label.split(":")[1],
                    (row["hours"], row["iqm"][0]),
                    (4, 4),
                    textcoords="offset points",
                )
        rows = [row for row in paper("table2_scaling.csv") if row["method"] == method]
        x, y = zip(*[(float(row["gpu_hours"]), float(row["iqm"])) for row in rows], strict=True)
        axis.plot(x, y, "o--", mfc="white", color=colour, label=f"{method}, paper")
    for row in paper("table2_scaling.csv"):
        if not row["method"].startswith("PLASTIC") and row["iqm"] and row["gpu_hours"]:
            x, y = float(row["gpu_hours"]), float(row["iqm"])
            axis.plot(x, y, "s", color="gray")
            label = row["method"] + (f":{row['replay_ratio']}" if row["method"] == "SR-SPR" else "")
            axis.annotate(label, (x, y), (5, -3), textcoords="offset points", color="dimgray")
    axis.set(xscale="log", xlabel="GPU hours a run", ylabel="IQM, human-normalized")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def plot_figure2(
    runs: list[dict], synthetic: dict[tuple[str, str], dict], path: Path, args: Args
) -> None:
    """A point per method: accuracy on the input against the label task (left), IQM on Atari against Control (right)."""
    panels, notes = [], []
    late = {
        key: np.mean(list(late_accuracy(result, args.last).values()))
        for key, result in synthetic.items()
    }
    points = {
        m: (late["input", m], late["label", m])
        for m in SINGLE
        if all((t, m) in late for t in ("input", "label"))
    }
    if len(points) > 1:
        panels.append(("synthetic", "accuracy, input task", "accuracy, label task", points))
    rows = {m: [row_of(runs, b, m, notes, args) for b in ("atari", "dmc")] for m in SINGLE}
    points = {
        m: tuple(row["iqm"][0] for row in pair)
        for m, pair in rows.items()
        if all("iqm" in row for row in pair)
    }
    if len(points) > 1:
        panels.append(
            ("reinforcement learning", "IQM, Atari-100k", "IQM, DeepMind Control", points)
        )
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (title, xlabel, ylabel, points) in zip(axes[0], panels, strict=True):
        for colour, (method, label) in zip(OKABE_ITO, SINGLE.items(), strict=False):
            if method in points:
                axis.plot(*points[method], "o", ms=9, color=colour)
                axis.annotate(label, points[method], (7, 4), textcoords="offset points")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    save(figure, path)


def plot_intervals(runs: list[dict], path: Path, args: Args) -> None:
    """The table's aggregates as points with intervals, a panel per aggregate, a row per method."""
    tables = aggregate_tables(args.table) if args.table in ("1", "2", "3", "4") else []
    if args.scores is not None and not tables:
        methods = dict.fromkeys(run["exp_name"] for run in runs)
        tables = [
            (
                "",
                args.benchmark,
                ["iqm", "median", "mean", "og"],
                [(name, name, {}) for name in methods],
            )
        ]
    notes = []
    for title, benchmark, names, shown in tables:
        rows = {label: row_of(runs, benchmark, name, notes, args) for label, name, _ in shown}
        rows = {label: row for label, row in rows.items() if "iqm" in row}
        if not rows:
            continue
        figure, axes = plt.subplots(
            1, len(names), figsize=(1.5 + 2.8 * len(names), 1.2 + 0.35 * len(rows)), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, name in zip(axes[0], names, strict=True):
            axis.use_sticky_edges = False  # which would cut the bars' margin
            for y, row in enumerate(rows.values()):
                value, low, high = row[name]
                colour = OKABE_ITO[y % len(OKABE_ITO)]
                if low is not None:
                    axis.barh(y, high - low, 0.6, left=low, color=colour, alpha=0.6)
                axis.plot([value, value], [y - 0.3, y + 0.3], color="black")
            axis.set_yticks(range(len(rows)), rows.keys())
            axis.set_title(AGGREGATES[name])
            axis.grid(axis="x", alpha=0.3)
        axes[0, 0].invert_yaxis()
        figure.suptitle(title)
        save(figure, path if len(tables) == 1 else path.with_stem(f"{path.stem}_{benchmark}"))


def save(figure: plt.Figure, path: Path) -> None:
    """As PNG, in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    except OSError as error:
        fail(f"--plot {path}: {error.strerror}", 1)
    plt.close(figure)


def redraw(readme: Path) -> int:
    """Make the reports in a Markdown file anew, where it names their flags; 1 if an aggregate was refused."""
    start, end = "<!-- report.py ", "<!-- end of report -->"
    block = re.compile(f"{start}([^\\n]+?) -->.*?{end}", re.DOTALL)
    codes, what = [], f"--readme {readme}"

    def report(match: re.Match) -> str:
        flags, output = match[1], io.StringIO()
        try:
            args = shlex.split(flags)
        except ValueError as error:
            fail(f"{what}: {flags}: {error}", 1)
        if {"--help", "-h", "--readme"} & set(args):
            fail(f"{what}: {flags}: makes no report", 1)
        with contextlib.redirect_stdout(output):
            codes.append(main(tyro.cli(Args, args=args)))
        tables = output.getvalue().strip().replace("\n", newline)
        return f"{start}{flags} -->{newline * 2}{tables}{newline * 2}{end}"

    try:
        path = readme.resolve()  # of a link, the file
        before = path.read_bytes()
        text = before.decode()
        newline = "\r\n" if "\r\n" in text else "\n"
        if not text.count(start) == text.count(end) == len(block.findall(text)) > 0:
            fail(f"{what}: needs {start}FLAGS --> and {end}, one after the other", 1)
        text = block.sub(report, text)
        if path.read_bytes() != before:
            fail(f"{what}: changed in the meantime; run it again", 1)
        write_atomically(path, lambda file: file.write(text.encode()))
    except (OSError, UnicodeError) as error:
        fail(f"{what}: {error}", 1)
    return max(codes)


def main(args: Args) -> int:
    """Print the tables, draw the figures; 1 if an aggregate was refused."""
    for name in ("last", "reps", "runs_per_gpu"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}", 2)
    if args.readme is not None:
        if args != Args(readme=args.readme):
            fail("--readme: the flags of the reports are in the file; none beside it", 2)
        return redraw(args.readme)
    if not 0 <= args.seed < 2**32:
        fail(f"--seed must be from 0 to {2**32 - 1:,}, not {args.seed}", 2)
    args.runs = tuple(dict.fromkeys(args.runs))
    if bool(args.runs) == (args.scores is not None):
        fail("directories with runs, or --scores FILE: one of them", 2)
    for directory in args.runs:
        if not directory.is_dir():
            fail(f"{directory}: no such directory", 1)
    runs = (
        read_scores(args.scores, args.benchmark)
        if args.scores is not None
        else read_runs(args.runs)
    )
    synthetic = read_results(args.runs) if args.runs and args.table is None else {}
    if not runs and not synthetic:
        fail(f"{args.scores or ' '.join(map(str, args.runs))}: no results there", 1)
    refused = False
    if args.table in PER_TASK:
        print_table_by_task(runs, args)
    elif args.table is not None:
        refused = print_table_of_aggregates(runs, args)
    elif args.scores is not None:
        refused = print_scores(runs, args)
    if args.runs and (args.table is None or args.plot is not None):
        runs = add_curves(runs)
    if args.table is None and synthetic:
        args.last = min(
            args.last, *(result["test_accuracy"].shape[1] for result in synthetic.values())
        )
        print_table(synthetic, args.last)
    if args.table is None and args.scores is None and runs:
        print_returns(runs, args)
        print_metrics(runs, args)
    if args.plot is not None:
        if any(method == "base" for _, method in synthetic):
            plot_figure3(synthetic, args.last, args.plot / "figure3.png")
        if args.runs:
            plot_curves(runs, args.plot / "curves.png")
            plot_figure4(runs, args.plot / "figure4.png")
        plot_figure1(runs, args.plot / "figure1.png", args)
        plot_figure2(runs, synthetic, args.plot / "figure2.png", args)
        for name in PANELS:
            plot_panels(runs, name, args.plot / f"{name}.png", args)
        plot_intervals(runs, args.plot / "intervals.png", args)
    return int(refused)


if __name__ == "__main__":
    try:
        code = main(tyro.cli(Args))
        sys.stdout.flush()
    except OSError as error:  # a closed pipe, a full disk
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        fail(f"cannot write: {error.strerror}", 1)
    sys.exit(code)
