"""Tables and figures from result.json files, the paper's numbers beside ours.

    python benchmark/report.py runs --table 1
    python benchmark/report.py --scores scores.csv --benchmark atari
    python benchmark/report.py runs --plot figures

Tables 1, 2, 3, 4 are aggregates over tasks (IQM, median, mean, optimality gap, by rliable), with
95% bootstrap intervals (all_aggregates has which, none below two seeds); 7, 8, 9, 10 are mean
returns by task. Atari is in human-normalized scores, DeepMind Control in returns (its optimality
gap below 1,000). Where tasks have different numbers of seeds, the first ones of each count, as many
as all have. An aggregate over fewer tasks than the benchmark has is refused (exit code 1) unless
--allow-missing.

Without --table: what there is. Accuracies of the synthetic experiment, a row per method (of the
setting that result.json names the best), and the returns of all other runs by task. --scores takes
a file of method, task, seed, score (raw returns) instead of runs. --plot draws (benchmark/plot.py).

--readme FILE redraws all reports that a Markdown file shows: between each
`<!-- report.py FLAGS -->` and the next `<!-- end of report -->`, it puts what these flags print.

Read first: read_runs (the table that all else works on), aggregate, report.
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))
import plot
from plot import AGGREGATES, METHODS, METRICS, SINGLE

from plastic_drq_rainbow_atari import RANDOM_HUMAN, human_normalized_score
from synth_cifar_plasticity import bootstrap_interval, write_atomically

# fmt: off
PAPER = Path(__file__).parent / "paper"
SCRIPTS = {  # and the benchmark that their results belong to
    "plastic_drq_rainbow_atari.py": "atari",
    "plastic_drq_sac_dmc.py": "dmc",
    "plastic_pretrained_finetune.py": "pretrained",
    "synth_cifar_plasticity.py": "synthetic",
}
CONTROL = pd.read_csv(PAPER / "table10_dmc.csv").Game.tolist()  # tasks of DeepMind Control
ALL_TASKS = {"atari": list(RANDOM_HUMAN), "pretrained": list(RANDOM_HUMAN), "dmc": CONTROL}
# Of Tables 1 to 4: the paper's file; title, benchmark, aggregates.
AGGREGATE_TABLES: dict[str, tuple[str, list[tuple[str, str, list[str]]]]] = {
    "1": ("table1_main.csv", [
        ("Table 1, Atari-100k", "atari", ["iqm", "median", "mean"]),
        ("Table 1, DeepMind Control", "dmc", ["iqm", "seed_median", "median", "mean"]),
    ]),
    "2": ("table2_scaling.csv", [("Table 2", "atari", ["iqm", "median", "mean", "og"])]),
    "3": ("table3_pretrained.csv", [("Table 3", "pretrained", ["iqm"])]),
    "4": ("table4_ablation.csv", [("Table 4", "atari", ["iqm"])]),
}
PAPERS_DMC = (
    "the paper's intervals resample tasks within each seed; "
    "its Base and Reset are runs of Nikishin et al. (2022), with --buffer-size 100000"
)
# Interventions: columns of Tables 3 and 4, and how the paper calls them.
PARTS = {"ln": "LN", "sam": "SAM", "crelu": "CReLU", "reset": "Reset", "reset_dagger": "Reset†"}
SINGLE_COLUMNS = {"LayerNorm" if label == "LN" else label: n for n, label in SINGLE.items()}
PER_TASK = {  # tables of mean returns: file, benchmark, exp-name by column
    "7": ("table7_atari_drq.csv", "atari", SINGLE_COLUMNS),
    "8": ("table8_atari_sota.csv", "atari", {
        "PLASTIC†:8": "ln_reset_rr8", "PLASTIC:8": "plastic_rr8",
    }),
    "9": ("table9_atari_replay_ratio.csv", "atari", {
        "PLASTIC†:2": "ln_reset", "PLASTIC:2": "plastic", "PLASTIC†:4": "ln_reset_rr4",
        "PLASTIC:4": "plastic_rr4", "PLASTIC†:8": "ln_reset_rr8", "PLASTIC:8": "plastic_rr8",
    }),
    "10": ("table10_dmc.csv", "dmc", SINGLE_COLUMNS),
}
# Methods of the synthetic experiment, and what has to be the same in all its runs.
SYNTHETIC = {"base": "base"} | {
    name: label.replace("\n", " ") for panel in METHODS.values() for name, label in panel.items()
}
RANK = {name: i for i, name in enumerate([*SYNTHETIC, "input", "label"])}
PROTOCOL = "num_stages updates_per_stage batch_size momentum conv_strides label_change".split()
# Flags that may differ between runs of a setting.
APART = set(
    "env_id seed exp_name run_dir device cuda_graph torch_threads resume checkpoint_interval "
    "overwrite evaluate eval_interval metrics_interval log_interval capture_video save_model "
    "track wandb_project_name wandb_entity pretrained_path".split()
)
RESOLVED_BY_TASK = {"action_repeat", "sam_rho"}  # of DeepMind Control
WRONG_CONTENT = (  # what reading a file of others raises
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
)
COLUMNS = (
    "path benchmark task exp_name seed steps score hours parameters returns first_steps args "
    "accuracies learning_rate weight_decay mean_accuracy".split()
)
# fmt: on

# What a table shows: a value with its interval (None where there is none), or something plain.
Cell = float | int | str | None | tuple[float, float | None, float | None]


@dataclass
class Args:
    """Tables and figures from result.json files."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # directories with the runs' directories
    table: Literal["1", "2", "3", "4", "7", "8", "9", "10"] | None = None  # of the paper
    scores: Path | None = None  # a CSV file of method, task, seed, score instead of runs
    benchmark: Literal["atari", "dmc"] = "atari"  # what the scores are of
    plot: Path | None = None  # draw figures in this directory
    last: int = 5  # stages at the end over which the synthetic experiment's accuracy is averaged
    reps: int = 2_000  # bootstrap samples
    runs_per_gpu: int = 1  # runs that shared a GPU: their hours are divided by it (appendix A.1)
    allow_missing: bool = False  # aggregate over the tasks that are there
    readme: Path | None = None  # instead of all this: a Markdown file, whose reports are made anew

    def __post_init__(self) -> None:
        for name in ("last", "reps", "runs_per_gpu"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        others = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.readme is not None:
            if others != ["readme"]:
                raise ValueError("--readme: the reports' flags are in the file; none beside it")
        elif bool(self.runs) == (self.scores is not None):
            raise ValueError("directories with runs, or --scores FILE: one of them")


# --- Runs ---


def result_files(directories: Iterable[Path]) -> Iterator[Path]:
    """The result.json files below the directories, links followed, each directory once."""

    def refuse(error: OSError) -> NoReturn:
        sys.exit(f"error: {error.filename}: {error.strerror}")

    seen = set()
    for directory in directories:
        for folder, below, files in os.walk(directory, onerror=refuse, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(real)
            below.sort()
            if "result.json" in files:
                yield Path(folder) / "result.json"


def training_run(result: dict) -> dict:
    """A row of the table, from a reinforcement learning script's result."""
    args, returns = dict(result["args"]), [float(value) for value in result["episode_returns"]]
    score, hours = float(result["mean_return"]), float(result["wall_clock_seconds"]) / 3600
    if not returns or not np.isfinite([score, hours, *returns]).all():
        raise ValueError("mean_return, episode_returns or wall_clock_seconds")
    row = {"task": str(result["env_id"]), "seed": int(result["seed"])}
    row |= {"steps": int(result["env_steps"]), "parameters": int(result["parameters"])}
    first_steps = int(args.get("learning_starts", 0)) * int(args.get("action_repeat", 1))
    return row | dict(score=score, hours=hours, returns=returns, first_steps=first_steps, args=args)


def synthetic_run(result: dict) -> dict:
    """The same, from the synthetic experiment's; a diverged replica's null becomes nan."""
    accuracies = np.array(result["test_accuracy"], float)
    if accuracies.ndim != 2 or accuracies.size == 0 or np.isinf(accuracies).any():
        raise ValueError("test_accuracy")
    numbers = {"score": "final_accuracy_mean", "mean_accuracy": "mean_accuracy_mean"}
    numbers |= {name: name for name in ("learning_rate", "weight_decay")}
    row = {name: np.array(result[key], float).item() for name, key in numbers.items()}
    row |= {"task": str(result["task"]), "seed": 0, "steps": 0}
    row |= {"args": dict(result["args"]) | {"images": result["data"]}}
    seeds = int(result["first_seed"]) + np.arange(len(accuracies))
    return row | {"accuracies": pd.DataFrame(accuracies, index=seeds)}


def read_runs(directories: Iterable[Path]) -> pd.DataFrame:
    """The table of runs, a row per result.json (of pretraining: none).

    path: the run's directory. benchmark: "atari", "dmc", "pretrained", "synthetic". args: flags.
    steps: environment steps, action repeats counted; first_steps: those before learning starts.
    score: mean return of the final evaluation; returns: of its episodes. hours: wall-clock time.
    Synthetic: task is "input" or "label", seed and steps are 0; accuracies is a table of its own (a
    row per seed, a column per stage), score and mean_accuracy are the means at the end and overall.
    """
    rows = []
    for path in result_files(directories):
        try:
            result = json.loads(path.read_bytes())
            benchmark = SCRIPTS[result["script"]]
            if result["args"].get("mode") == "pretrain":
                continue
            row = {"path": path.parent, "benchmark": benchmark, "exp_name": str(result["exp_name"])}
            row |= synthetic_run(result) if benchmark == "synthetic" else training_run(result)
        except WRONG_CONTENT as error:
            say(f"left out: {path}, not a whole result of these scripts ({error!r})")
            continue
        rows.append(row)
    runs = pd.DataFrame(rows, columns=COLUMNS)
    for _, paths in runs.groupby(["benchmark", "task", "exp_name", "seed", "steps"]).path:
        if len(paths) > 1:
            both = f"{paths.iloc[0]} and {paths.iloc[1]}"
            sys.exit(f"error: {both} are the same run twice; keep one of them there")
    return runs


def read_scores(path: Path, benchmark: str) -> pd.DataFrame:
    """The same table from a CSV file with the columns method, task, seed, score."""
    names = ["method", "task", "seed", "score"]
    try:  # as text, the header too: pandas would rename a column that is there twice
        lines = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
        header = lines.iloc[0].tolist()
        if any(header.count(name) != 1 for name in names):
            raise ValueError(f"the first line is {header}")
        lines = lines[1:].set_axis(header, axis="columns")[names]
        runs = lines.astype({"seed": int, "score": float})
        wrong = ~runs.task.isin(ALL_TASKS[benchmark]) | ~(runs.score.abs() < 1e100)
        wrong |= runs.duplicated(["method", "task", "seed"])
        if wrong.any():
            raise ValueError(f"line {wrong.idxmax() + 1}: {','.join(lines[wrong].iloc[0])}")
    except ValueError as error:  # pandas' own among them
        needs = f"columns method, task, seed, score, each once, tasks of {benchmark}, finite scores"
        sys.exit(f"error: --scores {path}: needs {needs}, no line twice ({str(error).strip()})")
    for method, scores in runs.groupby("method").score:
        if scores.abs().max() < 10:
            say(f"{method}: no score of 10 or more; are they normalized? Raw returns are expected")
    runs = runs.rename(columns={"method": "exp_name"}).assign(benchmark=benchmark, path=path)
    return runs.reindex(columns=COLUMNS).assign(args=[{} for _ in runs.index])


def settings_differ(runs: pd.DataFrame, apart: set[str] = APART) -> str:
    """The first setting that is not the same in all these runs; "" where all are.

    Settings are the length and all flags but those `apart`.
    """
    if (runs.benchmark == "dmc").any():
        apart = apart | RESOLVED_BY_TASK
    settings = [{"steps": run.steps} | run.args for run in runs.itertuples()]
    table = pd.DataFrame(settings, index=runs.path, dtype=object)
    table = table.drop(columns=apart, errors="ignore").map(json.dumps)
    for name, values in table.items():
        others = values[values != values.iloc[0]]
        if len(others):
            one, other = (f"{column.iloc[0]} in {column.index[0]}" for column in (values, others))
            return f"{name}: {one}, {other}"
    return ""


def check(runs: pd.DataFrame, apart: set[str] = APART) -> None:
    """End with one line if their settings differ, or are not the interventions in their names."""
    if problem := settings_differ(runs, apart):
        sys.exit(f"error: runs cannot be put together, they differ in {problem}")
    for run in runs.itertuples():
        parts, args = run.exp_name.replace("plastic", "ln_sam_crelu_reset").split("_"), run.args
        on = {"ln": args.get("layer_norm"), "crelu": args.get("crelu")}
        on |= {"sam": args.get("sam_rho", 0) > 0, "reset": args.get("reset_interval", 0) > 0}
        on |= {"redo": args.get("redo_interval", 0) > 0, "l2init": args.get("l2_init")}
        on |= {"clip": args.get("weight_clip", 0) > 0}
        on |= {"tortoise": args.get("tortoise_interval", 0) > 0}
        if parts[0] not in {"base", *on} or "layer_norm" not in args:
            continue
        if any((name in parts) != bool(is_on) for name, is_on in on.items()):
            sys.exit(f"error: {run.path}: its flags are not those of {run.exp_name}")


def choose(runs: pd.DataFrame, benchmark: str, exp_name: str) -> pd.DataFrame:
    """The runs of one setting."""
    chosen = runs[(runs.benchmark == benchmark) & (runs.exp_name == exp_name)]
    check(chosen)
    return chosen


def synthetic_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Those of the synthetic experiment, which have to compare with each other."""
    runs = runs[runs.benchmark == "synthetic"]
    known = runs.exp_name.isin(SYNTHETIC) & runs.task.isin(["input", "label"])
    for path in runs.path[~known]:
        say(f"left out: {path}, whose exp-name is none of {', '.join(SYNTHETIC)}")
    runs = runs[known]
    names = {name for args in runs.args for name in args}
    check(runs, names - {*PROTOCOL, "images"})
    return runs


# --- Aggregates ---


def score_matrix(runs: pd.DataFrame, tasks: list[str]) -> tuple[np.ndarray, list[str]]:
    """Scores [seeds, tasks] of the first seeds, as many as all tasks have; what to say of it."""
    counts, notes = runs.task.value_counts(), []
    fewest, most = counts.min(), counts.max()
    first = runs.sort_values("seed").groupby("task").head(fewest)
    if fewest < most:
        notes.append(f"cut to the first {fewest} seeds of each task (of up to {most})")
    if (first.seed.value_counts() < len(tasks)).any():
        notes.append("tasks have different seeds")
    return np.array([first.score[first.task == task] for task in tasks]).T, notes


def all_aggregates(scores: np.ndarray, benchmark: str, reps: int) -> dict[str, Cell]:
    """All of AGGREGATES for scores [seeds, tasks], with 95% intervals where there are two seeds.

    rliable's median is that over tasks of the mean over seeds, and its bootstrap draws seeds anew
    within each task. The paper has done the same on DeepMind Control with tasks and seeds swapped:
    its median is that over seeds of the mean over tasks, its bootstrap draws tasks within each
    seed. Here these intervals are "iqm_tasks" and so on. The other one of the median over seeds
    draws whole seeds: seeds drawn task by task would average their differences out.
    """

    def cells(scores: np.ndarray, *functions: Callable) -> list[Cell]:
        def values(scores: np.ndarray) -> np.ndarray:
            return np.array([function(scores) for function in functions])

        low = high = [None] * len(functions)
        if several_seeds:
            np.random.seed(0)  # rliable draws its bootstrap from NumPy's global generator
            _, intervals = library.get_interval_estimates({"": scores}, values, reps=reps)
            low, high = intervals[""]
        return list(zip(values(scores).tolist(), low, high, strict=True))

    several_seeds = len(scores) > 1
    gap = partial(metrics.aggregate_optimality_gap, gamma=1000.0 if benchmark == "dmc" else 1.0)
    four = (metrics.aggregate_iqm, metrics.aggregate_median, metrics.aggregate_mean, gap)
    row = dict(zip(("iqm", "median", "mean", "og"), cells(scores, *four), strict=True))
    row["seed_median"] = cells(scores.mean(1, keepdims=True), np.median)[0]
    if benchmark == "dmc":
        names = ("iqm_tasks", "seed_median_tasks", "mean_tasks", "og_tasks")
        row |= zip(names, cells(scores.T, *four), strict=True)
    return row


def length_note(runs: pd.DataFrame, benchmark: str) -> list[str]:
    """What to say of runs that are not as long as the paper's."""
    steps, expected = runs.steps.iloc[0], 2_000_000 if benchmark == "dmc" else 100_000
    if pd.isna(steps) or steps == expected:
        return []
    return [f"runs of {steps:,} steps, not of {expected:,}"]


def aggregate(runs: pd.DataFrame, benchmark: str, exp_name: str, args: Args) -> dict:
    """All aggregates of one setting, its "runs", "hours" and "parameters" (millions).

    "notes" say whatever is missing, cut or shorter than in the paper. Where tasks are missing,
    there are no aggregates, and "refused" is True.
    """
    runs = choose(runs, benchmark, exp_name)
    row: dict = {"runs": len(runs), "notes": [], "refused": False}
    there = [task for task in ALL_TASKS[benchmark] if task in set(runs.task)]
    missing = [task for task in ALL_TASKS[benchmark] if task not in there]
    if not there:
        return row
    notes = length_note(runs, benchmark)
    if runs.hours.notna().all():
        row["hours"] = float(runs.hours.mean()) / args.runs_per_gpu
        row["parameters"] = float(runs.parameters.mean()) / 1e6
    if missing:
        what = "no aggregate (--allow-missing makes one of the others)"
        if args.allow_missing:
            what = f"aggregated over {len(there)} of {len(ALL_TASKS[benchmark])} tasks"
        notes.append(f"no runs of {', '.join(missing)}; {what}")
    row["refused"] = bool(missing) and not args.allow_missing
    if not row["refused"]:
        runs = runs[runs.task.isin(there)]
        if benchmark != "dmc":
            pairs = zip(runs.task, runs.score, strict=True)
            runs = runs.assign(score=[human_normalized_score(*pair) for pair in pairs])
        scores, more = score_matrix(runs, there)
        notes += more
        row |= all_aggregates(scores, benchmark, args.reps)
    return row | {"notes": [f"{exp_name}: {note}" for note in notes]}


def mean_with_interval(values: np.ndarray) -> Cell:
    """The mean over seeds and its 95% bootstrap interval (none below two)."""
    return (float(np.mean(values)), *(bootstrap_interval(values) or (None, None)))


# --- The paper's tables ---


def paper(name: str) -> list[dict]:
    """Rows of a table in benchmark/paper/, None where the paper prints nothing."""
    table = pd.read_csv(PAPER / name, dtype={"replay_ratio": str}, float_precision="round_trip")
    return table.astype(object).where(table.notna(), None).to_dict("records")


def paper_rows(number: str) -> list[dict]:
    """Rows of Tables 1 to 4, each with a label and our exp_name (None: not a method of ours)."""
    rows = paper(AGGREGATE_TABLES[number][0])
    for row in rows:
        parts = [part for part in PARTS if row.get(part)]
        if number == "1":
            label = row["method"]
            name = {label: name for name, label in SINGLE.items()}[label]
            if row["benchmark"] == "dmc":  # the paper's median is the one over seeds
                row |= {f"seed_{key}": row.pop(key) for key in list(row) if "median" in key}
        elif number == "2":
            label = f"{row['method']}:{row['replay_ratio']}"
            name = PER_TASK["9"][2].get(label)
        elif number == "3":
            label = ", ".join([f"RR {row['replay_ratio']}", *(PARTS[part] for part in parts)])
            name = "_".join(parts).replace("_dagger", "") or "base"
            name = f"pretrained_{name}_rr{row['replay_ratio']}"
        else:
            label = " + ".join(PARTS[part] for part in parts) or "Base"
            name = "plastic" if len(parts) == 4 else "_".join(parts) or "base"
        row |= {"label": label, "exp_name": name}
    return rows


# --- What is printed ---


def say(*notes: str) -> None:
    """On stderr, a line each."""
    for note in notes:
        print(note, file=sys.stderr)


def show(title: str, rows: list[dict[str, Cell]], digits: int) -> None:
    """A table in Markdown."""

    def text(cell: Cell) -> str:
        if isinstance(cell, tuple):
            value, low, high = map(text, cell)
            return f"{value} [{low}, {high}]" if low else value
        if cell is None:
            return ""
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")

    if title:
        print(f"{title}\n")
    names = dict.fromkeys(name for row in rows for name in row)
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(text(row.get(name)) for name in names) + " |")
    print()


def show_aggregates(tables: list, of: Callable[[str, str], dict], args: Args) -> bool:
    """Tables of aggregates, beside the paper's where it has them; whether one was refused."""
    refused = False
    for title, benchmark, names, shown in tables:
        rows, notes = [], []
        for printed in shown:
            ours = of(benchmark, printed["exp_name"])
            row: dict[str, Cell] = {"method": printed["label"], "runs": ours["runs"]}
            for name in names:
                column = AGGREGATES[name]
                if benchmark == "dmc":  # two kinds of intervals, but for the median over tasks
                    row[f"{column}, seeds resampled"] = ours.get(name)
                    if name != "median":
                        row[f"{column}, tasks resampled"] = ours.get(f"{name}_tasks")
                else:
                    row[column] = ours.get(name)
                if printed.get(name) is not None:
                    ends = (printed.get(f"{name}_low"), printed.get(f"{name}_high"))
                    row[f"{column}, paper"] = (printed[name], *ends)
            if args.table == "2":
                row |= {"GPU hours": ours.get("hours"), "GPU hours, paper": printed["gpu_hours"]}
                row["million parameters"] = ours.get("parameters")
                row["parameters, paper"] = printed["params_m"]
            rows.append(row)
            notes += ours["notes"]
            refused |= ours["refused"]
        if not any(row["runs"] for row in rows):
            notes.append(f"{title}: no runs of {', '.join(row['exp_name'] for row in shown)}")
        elif args.table == "1" and benchmark == "dmc":
            notes.append(f"{title}: {PAPERS_DMC}")
        show(title, rows, 1 if benchmark == "dmc" else 3)
        say(*notes)
    return refused


def show_by_task(runs: pd.DataFrame, number: str) -> None:
    """Tables 7 to 10: mean returns over seeds, beside the paper's and what else it prints."""
    file, benchmark, exp_names = PER_TASK[number]
    chosen = {column: choose(runs, benchmark, name) for column, name in exp_names.items()}
    for column, own in chosen.items():
        missing = [task for task in ALL_TASKS[benchmark] if task not in set(own.task)]
        notes = [f"no runs of {', '.join(missing) if len(own) else 'any task'}"] if missing else []
        notes += length_note(own, benchmark) if len(own) else []
        say(*(f"{exp_names[column]}: {note}" for note in notes))
    rows = []
    for printed in paper(file):
        row: dict[str, Cell] = {"task": printed.pop("Game")}
        for column, value in printed.items():
            if column in chosen:
                scores = chosen[column].score[chosen[column].task == row["task"]]
                row[column] = float(scores.mean()) if len(scores) else None
                row[f"{column}, runs"] = len(scores)
            row[f"{column}, paper"] = value if value is None else float(value)
        rows.append(row)
    show(f"Table {number}", rows, 1)


def show_synthetic(runs: pd.DataFrame, late: dict, last: int) -> None:
    """A row per method and task."""
    rows = []
    for run in runs.sort_values(["exp_name", "task"], key=lambda c: c.map(RANK)).itertuples():
        row = {"method": SYNTHETIC[run.exp_name], "task": run.task}
        seeds = late[run.task, run.exp_name].to_numpy()
        row[f"test accuracy, last {last} stages"] = mean_with_interval(seeds)
        row |= {"final": run.score, "mean": run.mean_accuracy}
        row["learning rate, weight decay"] = f"{run.learning_rate:g}, {run.weight_decay:g}"
        rows.append(row | {"seeds": len(seeds)})
    show("", rows, 3)


def late_accuracy(accuracies: pd.DataFrame, last: int) -> pd.Series:
    """Mean test accuracy over the last stages, by seed; nan of a replica that diverged."""
    return accuracies.iloc[:, -last:].mean(axis="columns", skipna=False)


def fixed_policy(args: dict) -> str:
    """By a run's flags: "random" or "constant", the policies that learn nothing, or ""."""
    if args.get("eval_epsilon") == 1:
        return "random"
    return "constant" if "action" in args else ""  # of benchmark/constant_actions.py


def with_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, each with its curves and the returns of policies that learn nothing.

    curves: {TensorBoard tag: [points, 2]}, environment steps and values. first, late: returns of
    its own episodes before learning starts, and of those that end in the last quarter of its steps.
    random, constant: returns of such policies on the same task, whose own runs are left out.
    """
    policies = runs.args.map(fixed_policy)
    references, runs = runs[policies != ""], runs[policies == ""]
    if runs.empty:
        sys.exit("error: no runs there but of policies that learn nothing")
    rows = runs.to_dict("records")
    for run in rows:
        events = EventAccumulator(str(run["path"]), size_guidance={"scalars": 0})
        events.Reload()
        repeat = run["args"].get("action_repeat", 1)
        run["curves"] = {
            tag: np.array(sorted((e.step * repeat, e.value) for e in events.Scalars(tag)))
            for tag in events.Tags()["scalars"]
        }
        steps, returns = run["curves"].get("charts/episodic_return", np.empty((0, 2))).T
        run["first"] = returns[steps <= run["first_steps"]].tolist()
        run["late"] = returns[steps > 0.75 * run["steps"]].tolist()
        same = references[references.benchmark == run["benchmark"]]
        same = same[same.task == run["task"]]
        for policy in ("random", "constant"):
            run[policy] = same.returns[policies[same.index] == policy].sum() or []
    return pd.DataFrame(rows)


def show_returns(runs: pd.DataFrame) -> None:
    """Two tables, a row per task, name and length: returns, and Figure 4's metrics where measured.

    The metrics are medians over the second half of each run's measurements.
    """
    printed = {
        (benchmark, name, row["Game"]): row[column]
        for file, benchmark, exp_names in PER_TASK.values()
        for row in paper(file)
        for column, name in exp_names.items()
    }
    rows, measured = [], []
    by = ["benchmark", "task", "exp_name", "steps"]
    for (benchmark, task, name, steps), own in runs.groupby(by, sort=False):
        if problem := settings_differ(own):
            say(f"{name} on {task}: runs of different settings, {problem}")
        random, constant, late = plot.random_returns(own), own.constant.iloc[0], own.late.sum()
        which = {"task": task, "run": name, "steps": f"{steps:,}"}
        row: dict[str, Cell] = dict(which)
        row["random policy"] = f"{np.mean(random):.1f} ({len(random)} episodes)" if random else ""
        row["best constant action"] = float(np.mean(constant)) if constant else ""
        row["last training episodes"] = f"{np.mean(late):.1f} ({len(late)})" if late else ""
        row |= {"mean return": mean_with_interval(own.score.to_numpy()), "seeds": len(own)}
        row["paper, full length"] = printed.get((benchmark, name, task))
        rows.append(row | {"hours a run": f"{own.hours.mean():.1f}"})

        own = [curves for curves in own.curves if METRICS.keys() & curves.keys()]
        row = which | {"seeds": len(own)}
        for tag, title in METRICS.items():
            found = [curves[tag] for curves in own if tag in curves]
            late = [value for curve in found for value in curve[len(curve) // 2 :, 1]]
            row[title] = f"{np.median(late):.3g}" if late else ""
        if own:
            measured.append(row)
    show("Returns", rows, 1)
    if measured:
        show("Plasticity, the median of each run's second half", measured, 3)


# --- Report ---


def aggregate_tables(args: Args, runs: pd.DataFrame) -> list[tuple[str, str, list[str], list]]:
    """Those to print: title, benchmark, aggregates, and rows with a label and an exp_name."""
    if args.scores is not None and args.table is None:
        title = "human-normalized scores" if args.benchmark == "atari" else "returns"
        rows = [{"label": name, "exp_name": name} for name in runs.exp_name.unique()]
        return [(title, args.benchmark, list(AGGREGATES), rows)]
    if args.table not in AGGREGATE_TABLES:
        return []
    rows = [row for row in paper_rows(args.table) if row["exp_name"]]
    return [
        (*table, [row for row in rows if row.get("benchmark", table[1]) == table[1]])
        for table in AGGREGATE_TABLES[args.table][1]
    ]


def report(args: Args) -> int:
    """Print the tables, draw the figures; 1 if an aggregate was refused."""
    runs = read_scores(args.scores, args.benchmark) if args.scores else read_runs(args.runs)
    synthetic = synthetic_runs(runs) if args.table is None else runs[:0]
    runs = runs[runs.benchmark != "synthetic"]
    if runs.empty and synthetic.empty:
        sys.exit(f"error: {args.scores or ' '.join(map(str, args.runs))}: no results there")

    @cache
    def of(benchmark: str, exp_name: str) -> dict:
        return aggregate(runs, benchmark, exp_name, args)

    if args.table in PER_TASK:
        show_by_task(runs, args.table)
    tables = aggregate_tables(args, runs)
    refused = show_aggregates(tables, of, args)
    if args.runs and len(runs) and (args.table is None or args.plot is not None):
        runs = with_curves(runs)
    late, title = {}, ""
    if len(synthetic):
        last = min(args.last, *(accuracies.shape[1] for accuracies in synthetic.accuracies))
        for run in synthetic.itertuples():
            late[run.task, run.exp_name] = late_accuracy(run.accuracies, last)
        show_synthetic(synthetic, late, last)
        flags = synthetic.args.iloc[0]
        title = f"{flags['num_stages']} stages of {flags['updates_per_stage']} updates"
        title += f", the last {last} averaged"
    if args.table is None and "curves" in runs:
        show_returns(runs)
    if args.plot is not None:
        plot.draw(args.plot, runs, late, title, of, pd.DataFrame(paper_rows("2")), tables)
    return int(refused)


def redraw(readme: Path) -> int:
    """Make the reports in a Markdown file anew, where it names their flags; 1 if one is refused."""
    start, end = "<!-- report.py ", "<!-- end of report -->"
    block = re.compile(f"{start}([^\\n]+?) -->.*?{end}", re.DOTALL)
    codes = []

    def made_anew(match: re.Match) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            codes.append(report(tyro.cli(Args, args=shlex.split(match[1]))))
        return f"{start}{match[1]} -->\n\n{output.getvalue().strip()}\n\n{end}"

    try:
        text = readme.read_bytes().decode()
        found = block.findall(text)
        if not text.count(start) == text.count(end) == len(found) > 0:
            raise ValueError(f"needs {start}FLAGS --> and {end}, one after the other")
    except ValueError as error:
        sys.exit(f"error: --readme {readme}: {error}")
    text = block.sub(made_anew, text)
    write_atomically(readme.resolve(), lambda file: file.write(text.encode()))
    return max(codes)


def main(args: Args) -> int:
    """The exit code; a file that cannot be read or written ends it with one line."""
    try:
        code = report(args) if args.readme is None else redraw(args.readme)
        sys.stdout.flush()
    except OSError as error:
        sys.exit(f"error: {error}")
    return code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
