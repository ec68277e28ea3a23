"""Tables and figures from result.json files, the paper's numbers beside ours.

    python benchmark/report.py runs --table 1
    python benchmark/report.py --scores scores.csv --benchmark atari
    python benchmark/report.py runs --plot figures

Tables 1, 2, 3, 4 are aggregates over tasks with 95% bootstrap intervals, by rliable (`aggregates`
has which); 7, 8, 9, 10 are mean returns by task. Atari is in human-normalized scores, DeepMind
Control in returns. An aggregate takes as many seeds of each task as all tasks have. Over
runs of different settings, or fewer tasks than the benchmark has (unless --allow-missing), it is
refused: a table lacks it, with exit code 1; a figure leaves it out. Without --table: accuracies of
the synthetic experiment, returns of all other runs by task.

--readme FILE makes the reports of a Markdown file anew: between each `<!-- report.py FLAGS -->`
and the next `<!-- end of report -->`, it puts what these flags print.

Read first: read_runs (the table that all else works on), aggregate, report.
"""

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))
import plot
from plot import AGGREGATES, FIGURE_3, METRICS

from plastic_drq_rainbow_atari import RANDOM_HUMAN, human_normalized_score


def paper(name: str) -> pd.DataFrame:
    """A table of the paper, or beside it; Tables 1 to 4 have the exp-names of our runs."""
    return pd.read_csv(Path(__file__).parent / "paper" / f"{name}.csv")


# fmt: off
SCRIPTS = {  # script: the benchmark of its results
    "plastic_drq_rainbow_atari.py": "atari",
    "plastic_drq_sac_dmc.py": "dmc",
    "plastic_pretrained_finetune.py": "pretrained",
    "synth_cifar_plasticity.py": "synthetic",
}
CONTROL = paper("table10_dmc").Game.tolist()  # tasks of DeepMind Control
ALL_TASKS = {"atari": list(RANDOM_HUMAN), "pretrained": list(RANDOM_HUMAN), "dmc": CONTROL}
AGGREGATE_TABLES = [  # number, title, benchmark, aggregates, file
    ("1", "Table 1, Atari-100k", "atari", "iqm median mean".split(), "table1_main"),
    ("1", "Table 1, DeepMind Control", "dmc", "iqm seed_median median mean".split(), "table1_main"),
    ("2", "Table 2", "atari", "iqm median mean og".split(), "table2_scaling"),
    ("3", "Table 3", "pretrained", ["iqm"], "table3_pretrained"),
    ("4", "Table 4", "atari", ["iqm"], "table4_ablation"),
]
PER_TASK = {  # tables of mean returns
    "7": ("table7_atari_drq", "atari"), "8": ("table8_atari_sota", "atari"),
    "9": ("table9_atari_replay_ratio", "atari"), "10": ("table10_dmc", "dmc"),
}
# Exp-names by columns of Tables 7 to 10
NAMED = pd.concat([paper("table1_main"), paper("table2_scaling")]).dropna(subset="exp_name")
EXP_NAMES = {"LayerNorm": "ln"} | dict(zip(NAMED.method, NAMED.exp_name, strict=True))
# Exp-names of the synthetic experiment, and what has to be the same in all its runs
SYNTHETIC = ["base", *" ".join(FIGURE_3.values()).split()]
PROTOCOL = (
    "images num_stages updates_per_stage batch_size momentum conv_strides label_change".split()
)
# Flags that may differ between runs of a setting, and those that DeepMind Control sets by task
APART = set(
    "env_id seed exp_name run_dir device cuda_graph torch_threads resume checkpoint_interval "
    "overwrite evaluate eval_interval metrics_interval log_interval capture_video save_model "
    "track wandb_project_name wandb_entity pretrained_path replay_device".split()
)
BY_TASK = {"action_repeat", "sam_rho"}
# Flags of the synthetic experiment that may differ within a method's search
SEARCHED = set("learning_rate weight_decay num_seeds first_seed data_dir download".split())
GROUP = ["benchmark", "task", "exp_name", "steps"]  # what the runs of a row of returns share
FLAGS = {  # part of an exp-name: the flag that is on in exactly the runs whose name has it
    "ln": "layer_norm", "sam": "sam_rho", "crelu": "crelu", "reset": "reset_interval",
    "redo": "redo_interval", "l2init": "l2_init", "clip": "weight_clip",
    "tortoise": "tortoise_interval",
}
# fmt: on


@dataclass
class Args:
    """Tables and figures from result.json files."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # directories with the runs' directories
    table: Literal["1", "2", "3", "4", "7", "8", "9", "10"] | None = None  # of the paper
    scores: Path | None = None  # a CSV file of method, task, seed, score instead of runs
    benchmark: Literal["atari", "dmc"] = "atari"  # what the scores are of
    plot: Path | None = None  # draw figures in this directory
    csv: Path | None = None  # instead of tables: the runs' scores, to a file that --scores reads
    last: int = 5  # stages at the end over which the synthetic experiment's accuracy is averaged
    reps: int = 2_000  # bootstrap samples of aggregates
    runs_per_gpu: int = 1  # runs that shared a GPU: aggregates divide hours by it (appendix A.1)
    allow_missing: bool = False  # aggregate over the tasks that are there
    readme: Path | None = None  # instead of all this: a Markdown file, whose reports are made anew

    def __post_init__(self) -> None:
        if min(self.last, self.reps, self.runs_per_gpu) < 1:
            raise ValueError("--last, --reps, --runs-per-gpu must be at least 1")
        if bool(self.runs) + (self.scores is not None) + (self.readme is not None) != 1:
            raise ValueError("directories with runs, --scores FILE or --readme FILE: one of them")
        if self.csv is not None and (self.table is not None or self.plot is not None):
            raise ValueError("--csv makes neither a --table nor a --plot: pass it without them")


def say(note: str) -> None:
    """Print a note on stderr: stdout is for the tables."""
    print(note, file=sys.stderr)


# --- Runs ---


def read_run(result: dict) -> list[dict]:
    """Rows of the table of runs, from result.json: one, or one per setting of a sweep."""
    args, benchmark = result["args"], SCRIPTS[result["script"]]
    row = {"benchmark": benchmark, "exp_name": result["exp_name"], "setting": ""}
    if benchmark == "synthetic":
        row |= {"task": result["task"], "seed": result["first_seed"], "steps": 0}
        row |= {"args": args | {"images": result["data"]}}
        rows = []
        for tried in result["sweep"]:
            setting = f"{tried['learning_rate']:g}, {tried['weight_decay']:g}"
            # Of a diverged replica they are null, so nan.
            accuracies = pd.DataFrame(np.array(tried["test_accuracy"], float))
            accuracies.index += result["first_seed"]
            rows.append(row | {"setting": setting, "accuracies": accuracies})
        return rows
    row |= {"task": result["env_id"], "seed": result["seed"], "steps": result["env_steps"]}
    row |= {"args": args, "score": result["mean_return"], "returns": result["episode_returns"]}
    if not np.isfinite([row["score"], *row["returns"]]).all():
        raise ValueError("mean_return or episode_returns")
    row |= {"commit": result.get("git_commits", [result.get("git_commit")])[-1]}
    row |= {"hours": result["wall_clock_seconds"] / 3600}
    return [row | {"parameters": result["parameters"] / 1e6}]


def read_runs(directories: Iterable[Path]) -> pd.DataFrame:
    """The table of runs, of all result.json below the directories but those of pretraining.

    path: the run's directory. benchmark: "atari", "dmc", "pretrained", "synthetic". args: flags.
    steps: environment steps, action repeats counted. hours: wall-clock time.
    score: mean return of the final evaluation; returns: of its episodes.
    Synthetic, a row per setting (learning rate and weight decay): task is "input" or "label", seed
    the first one, steps 0; accuracies is a table of its own (a row per seed, a column per stage).
    """
    paths, rows = [], []
    for directory in directories:
        if not directory.is_dir():
            sys.exit(f"error: {directory}: no such directory")
        paths += sorted(directory.rglob("result.json"))
    for path in dict.fromkeys(paths):
        try:
            result = json.loads(path.read_bytes())
            if result["args"].get("mode") != "pretrain":
                rows += [{"path": path.parent} | row for row in read_run(result)]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            say(f"left out: {path}, not a whole result of these scripts ({error!r})")
    if not rows:
        sys.exit(f"error: {' '.join(map(str, directories))}: no results there")
    runs = pd.DataFrame(rows)
    for _, same in runs.groupby(["benchmark", "task", "exp_name", "setting", "seed", "steps"]):
        if len(same) > 1:
            paths = " and ".join(map(str, same.path))
            sys.exit(f"error: {paths} have the same name, task, setting and seed: pass one")
    return runs


def merge_seeds(synthetic: pd.DataFrame) -> pd.DataFrame:
    """A row per method, task and setting: its seeds may have run apart, by --first-seed.

    All settings of a method must have the same seeds. A run from before a flag was there differs
    in it.
    """
    merged = []
    for _, same in synthetic.groupby(["task", "exp_name"]):
        check(same, {flag for args in same.args for flag in args} - APART - SEARCHED)
        rows = []
        for _, parts in same.groupby("setting"):
            accuracies = pd.concat(list(parts.accuracies)).sort_index()
            rows.append(parts.iloc[0].to_dict() | {"accuracies": accuracies})
        seeds = [row["accuracies"].index for row in rows]
        paths = " and ".join(map(str, same.path.unique()))
        if any(own.has_duplicates for own in seeds):
            sys.exit(f"error: {paths} share a setting and a seed; pass one")
        if not all(own.equals(seeds[0]) for own in seeds):
            sys.exit(f"error: {paths}: a setting lacks seeds that another has")
        merged += rows
    return pd.DataFrame(merged)


def best_settings(synthetic: pd.DataFrame) -> pd.DataFrame:
    """Of each method's settings on a task, its search, the one with the best final test accuracy.

    As the script chooses within a run: of learning rates and weight decays.
    """
    synthetic = merge_seeds(synthetic)
    final = synthetic.accuracies.map(lambda table: table.iloc[:, -1].mean(skipna=False))
    ranked = synthetic.assign(final=final).sort_values("final", na_position="first", kind="stable")
    return ranked.drop_duplicates(["task", "exp_name"], keep="last")


def read_scores(path: Path, benchmark: str) -> pd.DataFrame:
    """The same table from a CSV file with the columns method, task, seed, score.

    The file may hold both benchmarks; the rows of the other one are left out.
    """
    columns = ["method", "task", "seed", "score"]
    try:
        file = pd.read_csv(path, dtype={"method": str}, keep_default_na=False)
        runs = file[columns].astype({"score": float})
    except (ValueError, KeyError) as error:  # pandas' own among them
        sys.exit(f"error: --scores {path}: needs columns {', '.join(columns)} ({error})")
    right = runs.task.isin(ALL_TASKS["atari"] + ALL_TASKS["dmc"]) & np.isfinite(runs.score)
    right &= ~runs.duplicated(columns[:3])
    if not right.all():
        needs = "needs a task of Atari-100k or DeepMind Control and a finite score, each once"
        sys.exit(f"error: --scores {path}: line {right.idxmin() + 2}: {needs}")
    runs = runs[runs.task.isin(ALL_TASKS[benchmark])]
    if runs.empty:
        sys.exit(f"error: --scores {path}: no scores of {benchmark} (--benchmark)")
    runs = runs.rename(columns={"method": "exp_name"}).assign(benchmark=benchmark, path=path)
    runs = runs.assign(args=[{}] * len(runs), hours=np.nan)
    steps = pd.to_numeric(file["steps"], errors="coerce") if "steps" in file else np.nan
    return runs.assign(parameters=np.nan, steps=steps, commit="")


def check(runs: pd.DataFrame, names: Iterable[str] = ()) -> None:
    """End with one line where these runs' settings differ, or are not what their names say.

    Settings are the length and all flags but those APART; `names`: these alone. Those that
    DeepMind Control sets by task are compared within each task.
    """
    settings = pd.DataFrame([{"steps": run.steps} | run.args for run in runs.itertuples()])
    flags = settings.columns
    flags = flags.intersection(names) if names else flags.difference(list(APART))
    for name in flags:
        by_task = (runs.benchmark == "dmc") & (name in BY_TASK)
        values = settings[name].astype(str).set_axis(runs.path)
        for _, same in values.groupby(runs.task.where(by_task, "").to_numpy()):
            others = same[same != same.iloc[0]]
            if len(others):
                one, other = (f"{column.iloc[0]} in {column.index[0]}" for column in (same, others))
                sys.exit(f"error: runs cannot be put together, {name} differs: {one}, {other}")
    for run in runs.itertuples():
        parts = run.exp_name.replace("plastic", "ln_sam_crelu_reset").split("_")
        # A script's own name, the default, says nothing of interventions.
        if parts[0] not in {"base", *FLAGS} or "drq" in parts or "layer_norm" not in run.args:
            continue
        on = {part: bool(run.args.get(flag)) for part, flag in FLAGS.items()}
        if run.benchmark == "synthetic":  # agents' names do not say it
            on["shrink"] = run.args.get("shrink_perturb_alpha", 1) < 1
        if any((part in parts) != is_on for part, is_on in on.items()):
            sys.exit(f"error: {run.path}: its flags are not those of {run.exp_name}")


def choose(runs: pd.DataFrame, benchmark: str, exp_name: str) -> pd.DataFrame:
    """The runs of one setting; says where they are fewer or shorter than the paper's."""
    tasks = ALL_TASKS[benchmark]
    runs = runs[(runs.benchmark == benchmark) & (runs.exp_name == exp_name)]
    runs = runs[runs.task.isin(tasks)]
    if len(runs):
        expected = plot.FULL_LENGTH.get(benchmark, 100_000)
        for steps in runs.steps.dropna().unique():
            if steps != expected:
                say(f"{exp_name}: runs of {steps:,} steps, not of {expected:,}")
        if missing := [task for task in tasks if task not in set(runs.task)]:
            there = f"{len(tasks) - len(missing)} of {len(tasks)} tasks"
            say(f"{exp_name}: runs of {there}, none of {', '.join(missing)}")
    return runs


# --- Aggregates ---


def score_matrix(runs: pd.DataFrame) -> np.ndarray:
    """Scores [seeds, tasks] of the first seeds, as many as all tasks have."""
    counts = runs.task.value_counts()
    fewest, most = counts.min(), counts.max()
    if fewest < most:
        say(f"{runs.exp_name.iloc[0]}: the first {fewest} seeds of each task (of up to {most})")
    runs = runs.sort_values("seed").groupby("task").head(fewest)
    by_task = runs.groupby("task")
    if by_task.seed.apply(frozenset).nunique() > 1:
        say(f"{runs.exp_name.iloc[0]}: tasks have different seeds")
    tasks = [task for task in ALL_TASKS[runs.benchmark.iloc[0]] if task in counts]
    return np.array([by_task.score.get_group(task) for task in tasks]).T


def aggregates(scores: np.ndarray, benchmark: str, reps: int) -> dict[str, tuple]:
    """All of AGGREGATES for scores [seeds, tasks], each with its 95% interval.

    With one seed, or where tasks are drawn and there is one, its ends are nan.

    rliable's median is that over tasks of the mean over seeds, and its bootstrap draws seeds anew
    within each task. The paper has done the same on DeepMind Control with tasks and seeds swapped:
    its median is that over seeds of the mean over tasks, its bootstrap draws tasks within each
    seed. Here these intervals are "iqm_tasks" and so on. The other one of the median over seeds
    draws whole seeds: seeds drawn task by task would average their differences out.
    """
    several_seeds = len(scores) > 1

    def cell(function: Callable, scores: np.ndarray) -> tuple[float, float, float]:
        def values(scores: np.ndarray) -> np.ndarray:
            return np.array([function(scores)])

        if not several_seeds or len(scores) == 1:
            return (function(scores), np.nan, np.nan)
        np.random.seed(0)  # rliable draws its bootstrap from NumPy's global generator
        _, intervals = library.get_interval_estimates({"": scores}, values, reps=reps)
        return (function(scores), *intervals[""][:, 0])

    gap = partial(metrics.aggregate_optimality_gap, gamma=1000.0 if benchmark == "dmc" else 1.0)
    functions = {"iqm": metrics.aggregate_iqm, "mean": metrics.aggregate_mean, "og": gap}
    row = {name: cell(function, scores) for name, function in functions.items()}
    row["median"] = cell(metrics.aggregate_median, scores)
    row["seed_median"] = cell(np.median, scores.mean(1, keepdims=True))
    if benchmark == "dmc":
        row |= {f"{name}_tasks": cell(function, scores.T) for name, function in functions.items()}
        row["seed_median_tasks"] = cell(metrics.aggregate_median, scores.T)
    return row


def aggregate(runs: pd.DataFrame, benchmark: str, exp_name: str, args: Args) -> dict:
    """All aggregates of one setting, its number of "runs", "hours" and million "parameters".

    Where tasks are missing or settings differ, there are none, and "refused" is True.
    """
    runs = choose(runs, benchmark, exp_name)
    row = {"runs": len(runs), "refused": False}
    if runs.empty:
        return row
    row |= {"hours": runs.hours.mean() / args.runs_per_gpu, "parameters": runs.parameters.mean()}
    if runs.task.nunique() < len(ALL_TASKS[benchmark]) and not args.allow_missing:
        say(f"{exp_name}: no aggregate (--allow-missing makes one of these tasks)")
        return row | {"refused": True}
    try:
        check(runs)
    except SystemExit as error:
        say(f"{exp_name}: no aggregate: {error}")
        return row | {"refused": True}
    if benchmark != "dmc":
        pairs = zip(runs.task, runs.score, strict=True)
        runs = runs.assign(score=[human_normalized_score(*pair) for pair in pairs])
    return row | aggregates(score_matrix(runs), benchmark, args.reps)


# --- Tables ---


def show(title: str, rows: list[dict] | pd.DataFrame, digits: int) -> None:
    """A table in Markdown: of values, or of tuples of a value and its interval."""

    def text(cell: object) -> str:
        if isinstance(cell, tuple):
            value, low, high = (f"{number:.{digits}f}" for number in cell)
            return value if low == "nan" else f"{value} [{low}, {high}]"
        if pd.isna(cell):
            return ""
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")

    table = pd.DataFrame(rows)
    if title:
        print(f"{title}\n")
    print("| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns))
    for row in table.itertuples(index=False):
        print("| " + " | ".join(map(text, row)) + " |")
    print()


def show_aggregates(
    title: str, benchmark: str, names: list[str], shown: list[dict], of: Callable[[str, str], dict]
) -> bool:
    """A table of aggregates, beside the paper's where it has them; whether one was refused."""
    rows, refused = [], False
    for printed in shown:
        ours = of(benchmark, printed["exp_name"])
        refused |= ours["refused"]
        row = {"method": printed["method"], "runs": ours["runs"]}
        for name in names:
            column = AGGREGATES[name]
            row[f"{column}, seeds resampled" if benchmark == "dmc" else column] = ours.get(name)
            if benchmark == "dmc" and name != "median":
                row[f"{column}, tasks resampled"] = ours.get(f"{name}_tasks")
            if pd.notna(printed.get(name)):
                ends = (printed.get(f"{name}_{end}", np.nan) for end in ("low", "high"))
                row[f"{column}, paper"] = (printed[name], *ends)
        if "gpu_hours" in printed:
            row |= {"hours a run": ours.get("hours"), "GPU hours, paper": printed["gpu_hours"]}
            row["million parameters"] = ours.get("parameters")
            row["parameters, paper"] = printed["params_m"]
        rows.append(row)
    if not any(row["runs"] for row in rows):
        say(f"{title}: no runs of {', '.join(printed['exp_name'] for printed in shown)}")
    show(title, rows, 1 if benchmark == "dmc" else 3)
    return refused


def show_by_task(runs: pd.DataFrame, number: str) -> None:
    """Tables 7 to 10: mean returns over seeds, beside the paper's and what else it prints."""
    file, benchmark = PER_TASK[number]
    printed = paper(file).set_index("Game")
    table = pd.DataFrame({"task": printed.index}, index=printed.index)
    for column in printed:
        if column in EXP_NAMES:
            chosen = choose(runs, benchmark, EXP_NAMES[column])
            check(chosen)
            by_task = chosen.groupby("task").score
            table[column] = by_task.mean()
            table[f"{column}, runs"] = by_task.size().reindex(table.index, fill_value=0)
        table[f"{column}, paper"] = printed[column]
    show(f"Table {number}", table, 1)


def show_synthetic(runs: pd.DataFrame, late: dict, last: int) -> None:
    """A row per method and task."""
    rows = []
    order = {name: i for i, name in enumerate(SYNTHETIC)}
    runs = runs.assign(order=runs.exp_name.map(order)).sort_values(["order", "task"])
    for run in runs.itertuples():
        seeds, accuracies = late[run.task, run.exp_name], run.accuracies.to_numpy()
        row = {"method": plot.method(run.exp_name), "task": run.task}
        row[f"test accuracy, last {last} stages"] = plot.mean_with_interval(seeds.to_numpy())
        row["final"] = f"{accuracies[:, -1].mean():.3f}"
        row["mean"] = f"{accuracies.mean():.3f}"
        rows.append(row | {"learning rate, weight decay": run.setting, "seeds": len(seeds)})
    show("", rows, 3)


def fixed_policy(args: dict) -> str:
    """By a run's flags: "random" or "constant", the policies that learn nothing, or ""."""
    if args.get("eval_epsilon") == 1:
        return "random"
    return "constant" if "action" in args else ""  # of benchmark/constant_actions.py


def with_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, each with its curves and the returns of policies that learn nothing.

    curves: {TensorBoard tag: [points, 2]}, environment steps and values. first, late: returns of
    its own episodes before learning starts, and of those that end in the last quarter of its steps.
    random, constant: returns of such policies on the same task, whose own runs are left out; on a
    game those of the Atari script count for fine-tuning, too, which evaluates in the same way.
    paper: the mean return that the paper prints, at its full length. public: on three tasks of
    DeepMind Control with 64x64 images, [points, 4], early evaluations of the ten seeds that the
    paper took as its base (Nikishin et al., 2022): steps, mean, lowest, highest.
    """
    printed = {
        (benchmark, EXP_NAMES[column], task): value
        for file, benchmark in PER_TASK.values()
        for column, values in paper(file).set_index("Game").items()
        for task, value in values.items()
        if column in EXP_NAMES
    }
    seeds = paper("dmc_base_public").set_index("task")
    policy = runs.args.map(fixed_policy)
    fixed = runs.groupby(["task", policy]).returns.sum()  # lists, one after the other
    rows = runs[policy == ""].to_dict("records")
    for run in rows:
        events = EventAccumulator(str(run["path"]), size_guidance={"scalars": 0})
        events.Reload()
        repeat = run["args"].get("action_repeat", 1)
        run["curves"] = {
            tag: np.array(sorted((e.step * repeat, e.value) for e in events.Scalars(tag)))
            for tag in events.Tags()["scalars"]
        }
        steps, returns = run["curves"].get("charts/episodic_return", np.empty((0, 2))).T
        first_steps = run["args"].get("learning_starts", 0) * repeat
        run["first"] = returns[steps <= first_steps].tolist()
        run["late"] = returns[steps > 0.75 * run["steps"]].tolist()
        name = run["exp_name"].removesuffix("_metrics")  # which measure, and change nothing else
        run["paper"] = printed.get((run["benchmark"], name, run["task"]), np.nan)
        same = (seeds.index == run["task"]) & (run["args"].get("image_size") == 64)
        run["public"] = seeds[same].to_numpy()
        for name in ("random", "constant"):
            run[name] = fixed.get((run["task"], name), [])
    if not rows:
        sys.exit("error: no runs there but of policies that learn nothing")
    return pd.DataFrame(rows)


def comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs without those of one task, name and length whose settings differ."""
    kept = []
    for (_, task, name, _), own in runs.groupby(GROUP, sort=False):
        try:
            check(own)
            kept.append(own)
        except SystemExit as error:
            say(f"{name} on {task} left out: {error}")
    return pd.concat(kept).sort_index() if kept else runs[:0]


def show_returns(runs: pd.DataFrame) -> None:
    """Two tables, a row per task, name and length: returns, and Figure 4's metrics where measured.

    The metrics are medians over the second half of each run's measurements.
    """
    if runs.empty:
        sys.exit("error: no runs that can be put together")
    rows, measured = [], []
    for (_, task, name, steps), own in runs.groupby(GROUP, sort=False):
        random, constant, late = plot.random_returns(own), own.constant.iloc[0], own.late.sum()
        which = {"task": task, "run": name, "steps": f"{steps:,}"}
        row = dict(which)
        row["random policy"] = f"{np.mean(random):.1f} ({len(random)} episodes)" if random else ""
        row["best constant action"] = np.mean(constant) if constant else None
        row["last training episodes"] = f"{np.mean(late):.1f} ({len(late)})" if late else ""
        row["mean return"] = plot.mean_with_interval(own.score.to_numpy())
        row |= {"seeds": len(own), "paper, full length": own.paper.iloc[0]}
        rows.append(row | {"hours a run": plot.mean_with_interval(own.hours.to_numpy())})

        measurements = [curves for curves in own.curves if METRICS.keys() & curves.keys()]
        row = which | {"seeds": len(measurements)}
        for tag, title in METRICS.items():
            found = [curves[tag] for curves in measurements if tag in curves]
            values = [value for curve in found for value in curve[len(curve) // 2 :, 1]]
            row[title] = f"{np.median(values):.3g}" if values else ""
        if measurements:
            measured.append(row)
    show("Returns", rows, 1)
    if measured:
        show("Plasticity, medians over the second half of the measurements", measured, 3)


# --- Report ---


def aggregate_tables(args: Args, runs: pd.DataFrame) -> list[tuple[str, str, list[str], list]]:
    """Those to print: title, benchmark, aggregates, and rows with a method and an exp_name."""
    if args.scores is not None and args.table is None:
        title = "human-normalized scores" if args.benchmark == "atari" else "returns"
        rows = [{"method": name, "exp_name": name} for name in runs.exp_name.unique()]
        return [(title, args.benchmark, list(AGGREGATES), rows)]
    tables = []
    for number, title, benchmark, names, file in AGGREGATE_TABLES:
        if number == args.table:
            printed = paper(file).dropna(subset="exp_name")
            rows = printed[printed.benchmark == benchmark].to_dict("records")
            tables.append((title, benchmark, names, rows))
    return tables


def write_scores(runs: pd.DataFrame, path: Path) -> None:
    """A row per run, without those of policies that learn nothing."""
    runs = runs[runs.args.map(fixed_policy) == ""]
    if runs.empty or "pretrained" in set(runs.benchmark):
        sys.exit("error: --csv: needs runs of agents, none of fine-tuning (Atari's tasks, too)")
    if runs.duplicated(["exp_name", "task", "seed"]).any():
        sys.exit("error: --csv: some runs differ in their length alone; pass those of one length")
    columns = ["method", "task", "seed", "score", "steps", "commit"]
    runs.rename(columns={"exp_name": "method"})[columns].to_csv(path, index=False)
    print(f"{len(runs)} scores: {path}")


def report(args: Args) -> int:
    """Print the tables, draw the figures; 1 if an aggregate of a table was refused."""
    runs = read_scores(args.scores, args.benchmark) if args.scores else read_runs(args.runs)
    synthetic, runs = runs[runs.benchmark == "synthetic"], runs[runs.benchmark != "synthetic"]
    if runs.empty and (args.table is not None or args.scores is not None):
        sys.exit("error: no runs there for this table")
    if args.csv is not None:
        write_scores(runs, args.csv)
        return 0

    @cache
    def of(benchmark: str, exp_name: str) -> dict:
        return aggregate(runs, benchmark, exp_name, args)

    tables = aggregate_tables(args, runs)
    refused = [show_aggregates(*table, of) for table in tables]
    if args.table in PER_TASK:
        show_by_task(runs, args.table)
    if args.table is not None:
        columns = paper(PER_TASK[args.table][0]) if args.table in PER_TASK else []
        names = {row["exp_name"] for *_, rows in tables for row in rows}
        names |= {EXP_NAMES.get(column) for column in columns}
        others = set(runs.exp_name[runs.args.map(fixed_policy) == ""]) - names
        if others:
            say(f"exp-names that are not in this table: {', '.join(sorted(others))}")
    late, title, learning = {}, "", runs[:0]
    more_than_a_table = args.table is None or args.plot is not None
    if len(synthetic) and more_than_a_table:
        check(synthetic, PROTOCOL)
        synthetic = best_settings(synthetic)
        last = min(args.last, synthetic.accuracies.iloc[0].shape[1])
        for run in synthetic.itertuples():
            accuracies = run.accuracies.iloc[:, -last:]
            late[run.task, run.exp_name] = accuracies.mean(axis="columns", skipna=False)
        for (task, name), own in late.items():
            base = late.get((task, "base"), own[:0])
            common = len(own.index.intersection(base.index))
            if args.plot is not None and common < len(own):
                say(f"{name}, {task}: Figure 3 has {common} of {len(own)} seeds, those of base")
        flags = synthetic.args.iloc[0]
        title = f"{flags['num_stages']} stages of {flags['updates_per_stage']} updates"
        title += f", the last {last} averaged"
        if args.table is None:
            show_synthetic(synthetic, late, last)
    if args.runs and len(runs) and more_than_a_table:
        learning = comparable(with_curves(runs))
        if args.table is None:
            show_returns(learning)
    if args.plot is not None:
        table2 = paper("table2_scaling")
        plot.draw(args.plot, learning, synthetic, late, title, of, table2, tables)
    return int(any(refused))


def redraw(page: Path) -> int:
    """Make the reports in a Markdown file anew, where it names their flags; 1 if one is refused."""
    start, end = "<!-- report.py ", "<!-- end of report -->"
    block = re.compile(f"{start}([^\\n]+?) -->.*?{end}", re.DOTALL)
    codes, text = [], page.read_text()

    def made_anew(match: re.Match) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            codes.append(report(tyro.cli(Args, args=shlex.split(match[1]))))
        return f"{start}{match[1]} -->\n\n{output.getvalue().strip()}\n\n{end}"

    if not text.count(start) == text.count(end) == len(block.findall(text)) > 0:
        sys.exit(f"error: {page}: needs {start}FLAGS --> and {end}, one after the other")
    page.write_text(block.sub(made_anew, text))
    return max(codes)


def main(args: Args) -> int:
    """The exit code; a file that cannot be read or written ends it with one line."""
    try:
        return report(args) if args.readme is None else redraw(args.readme)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
