"""The tables and figures that benchmark/report.py makes of results."""

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import plot
import pytest
import report
import tyro
from rliable import library, metrics
from scipy.stats import trim_mean
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent
ATARI, DMC = "plastic_drq_rainbow_atari.py", "plastic_drq_sac_dmc.py"


def write(directory, result):
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))


def write_synthetic(runs, task, method, accuracies, first_seed=1, **args):
    """A run's directory, of accuracies [seeds][stages]."""
    parts = {"plastic": "ln sam crelu reset".split()}.get(method, method.split("_"))
    flags = dict(layer_norm="ln" in parts, crelu="crelu" in parts, sam_rho=0.1 * ("sam" in parts))
    flags |= dict(reset_interval=10 * ("reset" in parts))
    result = dict(script="synth_cifar_plasticity.py", task=task, exp_name=method, data=1)
    result |= dict(first_seed=first_seed, learning_rate=0.01, weight_decay=0.001)
    result |= dict(args=dict.fromkeys(report.PROTOCOL, 1) | flags | args, test_accuracy=accuracies)
    numbers = np.array(accuracies, float)
    for name, value in (("final", numbers[:, -1].mean()), ("mean", numbers.mean())):
        result[f"{name}_accuracy_mean"] = None if np.isnan(value) else value
    write(runs / f"{task}__{method}__{first_seed}", result)


def write_run(runs, task, exp_name, seed, score, script=ATARI, steps=100_000, scalars=None, **args):
    """A run's directory; `scalars` {tag: [(step, value)]}."""
    result = dict(script=script, env_id=task, exp_name=exp_name, seed=seed, mean_return=score)
    result |= dict(episode_returns=[score - 1, score + 1], env_steps=steps, parameters=6_800_000)
    result |= dict(args={"learning_starts": 100, "replay_ratio": 2} | args)
    directory = runs / f"{task}__{exp_name}__{seed}"
    write(directory, result | {"wall_clock_seconds": 7200.0})
    if scalars:
        with SummaryWriter(str(directory)) as writer:
            for tag, points in scalars.items():
                for step, value in points:
                    writer.add_scalar(tag, value, step)


def table(*flags, code=0):
    """The tables that report.py shows, [table][row][column], and what it says on stderr."""
    tables, errors = [], io.StringIO()
    args = tyro.cli(report.Args, args=[*map(str, flags)])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(report, "show", lambda title, rows, digits: tables.append(rows))
        assert report.main(args) == code
    return tables, errors.getvalue()


def printed(capsys, **args):
    """The rows of what report.py prints as Markdown."""
    assert report.main(report.Args(**args)) == 0
    lines = capsys.readouterr().out.splitlines()
    return [a for a, b in zip(lines, ["", *lines], strict=False) if a[:2] == b[:1] + " " == "| "]


def refused(capsys, *flags):
    """The one line on stderr with which report.py ends."""
    with pytest.raises(SystemExit) as exit_info:
        report.main(tyro.cli(report.Args, args=[*map(str, flags)]))
    assert isinstance(exit_info.value.code, str) and exit_info.value.code.count("\n") == 0
    return exit_info.value.code


@pytest.fixture
def figures(monkeypatch):
    """The figures by file name, instead of their files."""
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.update({path.name: figure}))
    yield drawn
    plot.plt.close("all")


# --- The synthetic experiment ---


def test_accuracies_and_gains_by_hand(tmp_path, capsys, figures):
    write_synthetic(tmp_path, "input", "base", [[0.1, 0.2, 0.4], [0.1, 0.4, 0.6]])
    ln = [[0.1, 0.5, 0.6], [0.1, 0.6, 0.9], [0.9, 0.9, 0.9]]
    write_synthetic(tmp_path, "input", "ln", ln, first_seed=2)
    write_synthetic(tmp_path, "label", "base", [[0.1, 0.2, 0.4]])
    write_synthetic(tmp_path, "label", "plastic", [[0.1, 0.1, 0.1]])
    assert printed(capsys, runs=(tmp_path,), last=2, plot=tmp_path) == [
        "| base | input | 0.400 [0.300, 0.500] | 0.500 | 0.300 | 0.01, 0.001 | 2 |",
        "| base | label | 0.300 | 0.400 | 0.233 | 0.01, 0.001 | 1 |",
        "| LN | input | 0.733 [0.550, 0.900] | 0.800 | 0.611 | 0.01, 0.001 | 3 |",
        "| PLASTIC | label | 0.100 | 0.100 | 0.100 | 0.01, 0.001 | 1 |",
    ]
    single, combined = figures["figure3.png"].axes
    assert [axis.get_title() for axis in (single, combined)] == ["single methods", "combinations"]
    # Of LN's seeds, 2 alone is one of base's too.
    assert [bar.get_height() for bar in single.patches] == pytest.approx([100 * (0.55 - 0.5)])
    assert [bar.get_height() for bar in combined.patches] == pytest.approx([-20])


def test_a_diverged_replica_is_nan(tmp_path, capsys, figures):
    write_synthetic(tmp_path, "input", "base", [[0.1, 0.2], [0.1, 0.4]])
    write_synthetic(tmp_path, "input", "sam", [[0.1, 0.5], [0.1, None]])
    rows = printed(capsys, runs=(tmp_path,), last=2, plot=tmp_path)
    assert rows[1] == "| SAM | input | nan [nan, nan] | nan | nan | 0.01, 0.001 | 2 |"
    (axis,) = figures["figure3.png"].axes
    assert np.isnan(axis.patches[0].get_height())


def test_synthetic_runs_that_do_not_compare(tmp_path, capsys):
    write_synthetic(tmp_path / "a", "input", "base", [[0.1, 0.2]])
    write_synthetic(tmp_path / "a", "label", "mine", [[0.1, 0.2]])
    assert len(printed(capsys, runs=(tmp_path / "a",))) == 1
    report.main(report.Args(runs=(tmp_path / "a",)))
    assert "left out: " in (error := capsys.readouterr().err) and "mine" in error
    for name, flags in (
        ("num_stages: 1 in ", dict(num_stages=2)),
        ("not those of ln", dict(crelu=1)),
    ):
        runs = tmp_path / name
        write_synthetic(runs, "label", "ln", [[0.1, 0.2]], **flags)
        assert name in refused(capsys, tmp_path / "a", runs)
    write_synthetic(tmp_path / "c", "label", "redo", [[0.1, 0.2]], redo_interval=9, l2_init=True)
    assert "not those of redo" in refused(capsys, tmp_path / "c")
    write_synthetic(tmp_path / "d", "label", "ln_sam_redo", [[0.1, 0.2]], redo_interval=9)
    assert len(printed(capsys, runs=(tmp_path / "d",))) == 1
    write_synthetic(tmp_path / "b", "input", "base", [[0.1, 0.2]], first_seed=9)
    assert "the same run twice" in refused(capsys, tmp_path / "a", tmp_path / "b")


# --- What is read ---


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("change", [
    "{", "[]", "\xff", '{"a": 1}', {"script": "my_copy.py"}, {"script": "synth_cifar_plasticity.py"},
    {"args": []}, {"args": {"learning_starts": None}}, {"exp_name": ...}, {"seed": INF},
    {"mean_return": INF}, {"episode_returns": []}, {"episode_returns": [1.0, NAN]},
])  # fmt: skip
def test_what_is_no_whole_result_of_these_scripts_is_left_out(tmp_path, capsys, change):
    write_run(tmp_path, "Pong", "base", 1, 1.0)
    write_run(tmp_path / "x", "Pong", "base", 2, 1.0)
    (path,) = tmp_path.glob("x/*/result.json")
    if isinstance(change, dict):
        result = json.loads(path.read_text()) | change
        change = json.dumps({key: value for key, value in result.items() if value is not ...})
    path.write_bytes(change.encode("latin-1"))
    (rows,), error = table(tmp_path)
    assert [row["seeds"] for row in rows] == [1]
    assert error.startswith(f"left out: {path}") and error.count("\n") == 1
    assert "no results there" in refused(capsys, tmp_path / "x")
    assert "No such file" in refused(capsys, tmp_path, tmp_path / "nowhere")


def test_links_are_read_once(tmp_path):
    write_run(tmp_path / "elsewhere", "Pong", "base", 1, 1.0)
    runs = tmp_path / "runs"
    write_run(runs, "Pong", "base", 2, 2.0)
    (runs / "link").symlink_to(tmp_path / "elsewhere" / "Pong__base__1")
    (runs / "latest").symlink_to("Pong__base__2")
    (runs / "loop").symlink_to(runs)
    (rows,), error = table(runs, runs / "Pong__base__2")
    assert rows[0]["mean return"] == (1.5, 1.0, 2.0) and error == ""


def test_runs_that_cannot_be_put_together(tmp_path, capsys):
    write_run(tmp_path / "a", "Pong", "base", 1, 1.0)
    write_run(tmp_path / "b", "Pong", "base", 1, 2.0)
    assert "the same run twice" in refused(capsys, tmp_path)
    write_run(tmp_path / "a", "Alien", "base", 1, 1.0, replay_ratio=4)
    assert "differ in replay_ratio: 4 in " in refused(capsys, tmp_path / "a", "--table", "4")
    for seed, size in ((1, 100_000), (2, 1_000_000)):
        write_run(tmp_path / "e", "walker-run", "base", seed, 1.0, DMC, buffer_size=size)
    assert "differ in buffer_size: " in refused(capsys, tmp_path / "e", "--table", "10")
    write_run(tmp_path / "a", "Alien", "base", 2, 1.0)
    assert "base on Alien: runs of different settings, replay_ratio" in table(tmp_path / "a")[1]
    flags = dict(layer_norm=True, reset_interval=9, sam_rho=0)
    write_run(tmp_path / "c", "Pong", "ln_reset", 1, 1.0, crelu=True, **flags)
    assert "not those of ln_reset" in refused(capsys, tmp_path / "c", "--table", "2")
    write_run(tmp_path / "d", "Pong", "ln_reset", 1, 1.0, crelu=False, **flags)
    write_run(tmp_path / "d", "Pong", "ln_reset", 2, 1.0, crelu=False, device="cuda", **flags)
    (rows,), _ = table(tmp_path / "d", "--table", "2", "--allow-missing")
    assert rows[0]["runs"] == 2


@pytest.mark.parametrize("flags, words", [
    ([], "one of them"), (["x", "--scores", "y"], "one of them"), (["x", "--reps", "0"], "--reps"),
    (["x", "--last", "0"], "--last"), (["x", "--readme", "y"], "none beside it"),
])  # fmt: skip
def test_flags_that_make_no_sense(flags, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(report.Args, args=flags)
    assert exit_info.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


SCORES = "method,task,seed,score\n"


@pytest.mark.parametrize("content, words", [
    ("method,task,score\nbase,Pong,1\n", "the first line is"), (SCORES + "base,P,1,1\n", "line 2"),
    (SCORES + "base,Pong,1,nan\n", "line 2"), (SCORES + "base,Pong,1,x\n", "'x'"),
    (SCORES + "base,Pong,1\n", "float"), ("method;task;seed;score\n", "the first line is"),
    (SCORES + "base,Pong,1,1\nbase,Pong,1,2\n", "line 3"), (SCORES + "base,Pong,1.5,1\n", "1.5"),
    (None, "No such file"), ("", "No columns to parse"), (SCORES, "no results"),
    ("method,task,seed,score,score\nbase,Pong,1,1,2\n", "the first line is"),
    ("method, task,seed,score\nbase,Pong,1,1\n", "' task'"),
])  # fmt: skip
def test_scores_that_cannot_be_read(tmp_path, content, words, capsys):
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    assert words in refused(capsys, "--scores", path)


def test_scores_of_a_spreadsheet(tmp_path):
    """With a byte order mark; tasks with different seeds, and normalized scores, are said."""
    path = tmp_path / "scores.csv"
    lines = "base,Pong,1,2\nbase,Alien,8,300\nmine,Pong,1,0.9\nmine,Alien,1,-0.5\n"
    path.write_text(SCORES + lines, encoding="utf-8-sig")
    _, error = table("--scores", path, "--allow-missing")
    assert "base: tasks have different seeds" in error
    assert [line[:13] for line in error.splitlines() if "normalized?" in line] == ["mine: no scor"]


# --- Aggregates ---


def paper(name):
    with open(ROOT / "benchmark/paper" / name, newline="") as file:
        return list(csv.DictReader(file))


def normal(task, score):
    (row,) = [row for row in paper("atari_random_human.csv") if row["game"] == task]
    return (score - float(row["random"])) / (float(row["human"]) - float(row["random"]))


def test_table_1_against_aggregates_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    scores = {task: rng.uniform(0, 3000, 3) for task in report.RANDOM_HUMAN}
    returns = {task: rng.uniform(0, 900, 2) for task in report.CONTROL}
    for task, values in scores.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, task, "base", seed, value)
    for task, values in returns.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, task, "plastic", seed, value, DMC, 2_000_000)
    (atari, control), error = table(tmp_path, "--table", "1", "--reps", "200")
    assert error.count("\n") == 1 and "with --buffer-size 100000" in error
    ours = atari[0]
    rows = [[normal(task, value) for value in values] for task, values in scores.items()]
    matrix = np.array(rows).T  # [seeds, tasks]
    assert (ours["method"], ours["runs"]) == ("Base", 78)
    assert ours["IQM"][0] == pytest.approx(trim_mean(matrix, 0.25, axis=None))
    assert ours["median over tasks"][0] == pytest.approx(np.median(matrix.mean(0)))
    assert ours["mean"][0] == pytest.approx(matrix.mean())
    assert ours["IQM, paper"] == (0.258, 0.224, 0.292)
    assert ours["mean, paper"] == (0.476, 0.432, 0.52)
    np.random.seed(0)  # the intervals are rliable's own
    iqm = lambda scores: np.array([metrics.aggregate_iqm(scores)])  # noqa: E731
    _, ends = library.get_interval_estimates({"": matrix}, iqm, reps=200)
    assert ours["IQM"][1:] == pytest.approx(ends[""][:, 0].tolist())
    assert [row["runs"] for row in atari] == [78, 0, 0, 0, 0, 0]
    ours, matrix = control[5], np.array(list(returns.values())).T
    tasks, seeds = np.median(matrix.mean(0)), np.median(matrix.mean(1))
    assert ours["median over tasks, seeds resampled"][0] == pytest.approx(tasks)
    assert ours["median over seeds, seeds resampled"][0] == pytest.approx(seeds)
    assert ours["median over seeds, paper"] == (540, 476, 599)


def test_intervals_against_a_bootstrap_by_hand():
    """Of tasks that differ by much more than seeds do: seeds drawn within tasks, or the reverse."""
    rng = np.random.default_rng(0)
    seeds, tasks = 5, 11
    scores = rng.normal(np.linspace(100, 900, tasks), 30, (seeds, tasks))
    rows, columns = np.ogrid[:seeds, :tasks]
    by_seeds = scores[rng.integers(seeds, size=(4000, seeds, tasks)), columns]
    by_tasks = scores[rows, rng.integers(tasks, size=(4000, seeds, tasks))]
    whole_seeds = scores[rng.integers(seeds, size=(4000, seeds))]  # [4000, seeds, tasks] each
    iqm = lambda draws: trim_mean(draws.reshape(4000, -1), 0.25, axis=1)  # noqa: E731
    median_over = lambda draws, axis: np.median(draws.mean(3 - axis), axis=1)  # noqa: E731
    expected = {
        "iqm": iqm(by_seeds), "iqm_tasks": iqm(by_tasks),
        "mean": by_seeds.mean((1, 2)), "mean_tasks": by_tasks.mean((1, 2)),
        "og": 1000 - by_seeds.mean((1, 2)), "og_tasks": 1000 - by_tasks.mean((1, 2)),
        "median": median_over(by_seeds, 2), "seed_median": median_over(whole_seeds, 1),
        "seed_median_tasks": median_over(by_tasks, 1),
    }  # fmt: skip
    ours = report.all_aggregates(scores, "dmc", reps=4000)
    assert ours.keys() == expected.keys()
    for name, draws in expected.items():
        value, low, high = ours[name]
        ends = np.quantile(draws, [0.025, 0.975])
        assert [low, high] == pytest.approx(ends, abs=0.1 * (ends[1] - ends[0])), name
        assert low < value < high
    assert ours["iqm_tasks"][0] == ours["iqm"][0]


def test_the_median_over_seeds_draws_whole_seeds():
    """Four seeds at 0 and one at 1: the median of five draws is 1 with probability 0.058, so the
    interval ends at 1. (Seeds drawn within each of 26 tasks would give 0.115 to 0.269 around 0.)"""
    scores = np.zeros((5, 26))
    scores[4] = 1
    assert report.all_aggregates(scores, "atari", reps=2000)["seed_median"] == (0, 0, 1)


def test_the_papers_tables_by_task_give_its_aggregates(tmp_path):
    """Means and medians to 0.001, but for LN's in Table 7; Table 10's means are truncated."""
    aggregates = {(row["benchmark"], row["method"]): row for row in paper("table1_main.csv")}
    for row in paper("table2_scaling.csv"):
        aggregates["atari", f"{row['method']}:{row['replay_ratio']}"] = row
    checked = 0
    for name in ("table7_atari_drq.csv", "table9_atari_replay_ratio.csv", "table10_dmc.csv"):
        benchmark = "dmc" if "dmc" in name else "atari"
        rows = paper(name)
        path = tmp_path / name
        lines = [f"{m},{r['Game']},1,{r[m]}\n" for r in rows for m in r if m != "Game" and r[m]]
        path.write_text(SCORES + "".join(lines))
        (rows,), error = table("--scores", path, "--benchmark", benchmark)
        assert error == ""
        for row in rows:
            method = row["method"].replace("LayerNorm", "LN")
            expected = aggregates[benchmark, method]
            if benchmark == "dmc":
                assert int(row["mean, seeds resampled"][0]) == float(expected["mean"])
                assert row["IQM, tasks resampled"][1:] == (None, None)  # one seed has no interval
            elif method != "LN":
                assert row["mean"][0] == pytest.approx(float(expected["mean"]), abs=0.001)
                median = pytest.approx(float(expected["median"]), abs=0.001)
                assert row["median over tasks"][0] == median
                assert row["IQM"][1:] == (None, None)
            checked += 1
    assert checked == 6 + 6 + 6


def test_missing_tasks_are_refused_or_said(tmp_path):
    for seed in (1, 2):
        for task in ("Alien", "Pong"):
            write_run(tmp_path, task, "ln_reset", seed, 100.0 * seed, steps=20_000)
    write_run(tmp_path, "Pong", "ln_reset", 3, 7.0, steps=20_000)
    (rows,), error = table(tmp_path, "--table", "2", code=1)
    row = rows[0]
    assert (row["method"], row["runs"], row["IQM"]) == ("PLASTIC†:2", 5, None)
    assert "no runs of Amidar, " in error and "--allow-missing" in error
    assert "Pong" not in error.split("no runs of")[1]
    assert "runs of 20,000 steps, not of 100,000" in error
    (rows,), error = table(tmp_path, "--table", "2", "--allow-missing", "--runs-per-gpu", "4")
    row = rows[0]
    games, returns = ("Alien", "Pong"), (100, 200)  # the third seed of Pong is cut
    matrix = np.array([[normal(task, score) for task in games] for score in returns])
    assert row["mean"][0] == pytest.approx(matrix.mean())
    assert row["optimality gap"][0] == pytest.approx(np.mean(np.maximum(1 - matrix, 0)))
    assert "cut to the first 2 seeds of each task (of up to 3)" in error
    assert "aggregated over 2 of 26 tasks" in error
    assert (row["GPU hours"], row["GPU hours, paper"]) == (0.5, 0.5)
    assert row["million parameters"] == 6.8


def test_the_exit_code_of_a_refused_aggregate(tmp_path):
    write_run(tmp_path, "Pong", "base", 1, 3.0)
    command = [sys.executable, str(ROOT / "benchmark/report.py"), str(tmp_path), "--table", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("base: no runs of Alien, ")
    assert done.stdout.splitlines()[4] == "| Base | 1 |  | 0.258 [0.224, 0.292] |"


def test_tables_3_and_4_find_their_runs(tmp_path):
    pairs = "ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset"  # in the paper's order
    for i, name in enumerate(f"base ln sam crelu reset {pairs} plastic".split()):
        write_run(tmp_path, "Pong", name, 1, -20.7 + i)
    (rows,), _ = table(tmp_path, "--table", "4", "--allow-missing")
    assert [row["method"] for row in rows[:6]] == "Base,LN,SAM,CReLU,Reset,LN + SAM".split(",")
    ablation = [float(row["iqm"]) for row in paper("table4_ablation.csv")]
    assert [row["IQM, paper"][0] for row in rows] == ablation
    assert [row["IQM"][0] for row in rows] == pytest.approx(
        [normal("Pong", -20.7 + i) for i in range(12)]
    )
    for method in ("base", "reset", "sam_reset"):
        for ratio in (2, 4):
            name = f"pretrained_{method}_rr{ratio}"
            write_run(tmp_path, "Pong", name, 1, -20.7, "plastic_pretrained_finetune.py")
    (rows,), _ = table(tmp_path, "--table", "3", "--allow-missing")
    assert [(row["method"], row["runs"], row["IQM, paper"][0]) for row in rows] == [
        ("RR 2", 1, 0.366), ("RR 2, Reset†", 1, 0.709), ("RR 2, SAM, Reset†", 1, 0.776),
        ("RR 4", 1, 0.243), ("RR 4, Reset†", 1, 0.78), ("RR 4, SAM, Reset†", 1, 0.834),
    ]  # fmt: skip


# --- Tables of returns ---


def test_tables_by_task(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "Alien", "plastic_rr8", seed, 1000.0 * seed, replay_ratio=8)
    (rows,), error = table(tmp_path, "--table", "8")
    row = rows[0]
    assert (row["task"], row["PLASTIC:8"], row["PLASTIC:8, runs"]) == ("Alien", 1500, 2)
    assert (row["PLASTIC:8, paper"], row["EfficientZero, paper"]) == (1368.6, 808.5)
    assert (row["PLASTIC†:8"], row["PLASTIC†:8, runs"], len(rows)) == (None, 0, 26)
    assert "ln_reset_rr8: no runs of any task" in error
    assert "plastic_rr8: no runs of Amidar, " in error
    (rows,), _ = table(tmp_path, "--table", "9")
    assert (rows[0]["PLASTIC:8"], rows[0]["PLASTIC:2"]) == (1500, None)
    for number, task in (("7", "Alien"), ("10", "acrobot-swingup")):
        (rows,), _ = table(tmp_path, "--table", number)
        assert rows[0]["task"] == task and "LayerNorm, runs" in rows[0]


def test_markdown(capsys):
    first = {"a": "x|y", "b": (0.12345, 0.1, 0.2), "c": 1.25}
    rows = [first, {"a": "y", "b": (0.5, None, None), "c": None}]
    report.show("T", rows, 3)
    assert capsys.readouterr().out.splitlines() == [
        "T", "", "| a | b | c |", "|---|---|---|", "| x\\|y | 0.123 [0.100, 0.200] | 1.250 |",
        "| y | 0.500 |  |", "",
    ]  # fmt: skip


def curves(evaluations, episodes):
    return {"eval/mean_return": evaluations, "charts/episodic_return": episodes}


def test_returns_and_curves(tmp_path, capsys, figures):
    control = dict(script=DMC, steps=2000, action_repeat=2)
    scalars = curves([(500, 90), (1000, 300)], [(50, 20), (100, 40), (150, 77)])
    write_run(tmp_path, "walker-run", "base", 1, 300.0, scalars=scalars, **control)
    episodes = [(50, 30), (150, 99), (750, 98), (751, 50), (900, 60)]
    scalars = curves([(500, 95), (1000, 400)], episodes)
    write_run(tmp_path, "walker-run", "base", 2, 400.0, scalars=scalars, **control)
    scalars = curves([(1000, 800)], [(150, 99)])
    write_run(tmp_path, "reacher-easy", "plastic", 1, 800.0, scalars=scalars, **control)
    assert printed(capsys, runs=(tmp_path,), plot=tmp_path) == [
        "| reacher-easy | plastic | 2,000 |  |  |  | 800.0 | 1 | 879.7 | 2.0 |",
        "| walker-run | base | 2,000 | 30.0 (3 episodes) |  | 55.0 (2) | 350.0 [300.0, 400.0] | 2 "
        "| 632.9 | 2.0 |",
    ]
    assert set(figures) == {"curves.png"}
    reacher, walker = figures["curves.png"].axes[:2]
    assert [axis.get_title() for axis in (reacher, walker)] == ["reacher-easy", "walker-run"]
    lines = [line.get_xydata().tolist() for line in walker.get_lines()]
    assert lines[:2] == [[[1.0, 90.0], [2.0, 300.0]], [[1.0, 95.0], [2.0, 400.0]]]
    assert {y for _, y in lines[2]} == {30.0}
    legend = [text.get_text() for text in walker.get_legend().get_texts()]
    assert legend == ["base", "random policy"]


def test_policies_that_learn_nothing_are_measured_apart(tmp_path, capsys, figures):
    scalars = curves([(500, 90.0)], [(50, 20.0)])
    for task, seed in (("Krull", 1), ("Pong", 1), ("Pong", 2)):
        write_run(tmp_path, task, "base", seed, 5.0, scalars=scalars)
    for seed, random, constant in ((1, -20.0, -21.0), (2, -17.0, -20.0)):
        write_run(tmp_path / "apart", "Pong", "random", seed, random, eval_epsilon=1.0)
        write_run(tmp_path / "apart", "Pong", "constant", seed, constant, action=seed)
    assert "policies that learn nothing" in refused(capsys, tmp_path / "apart")
    write_run(tmp_path, "Pong", "random", 3, 1.0, eval_epsilon=0.001)  # a run named so that learns
    assert printed(capsys, runs=(tmp_path,), plot=tmp_path) == [
        "| Krull | base | 100,000 | 20.0 (1 episodes) |  |  | 5.0 | 1 | 3612.1 | 2.0 |",
        "| Pong | base | 100,000 | -18.5 (4 episodes) | -20.5 |  | 5.0 [5.0, 5.0] | 2 | -8.8 "
        "| 2.0 |",
        "| Pong | random | 100,000 | -18.5 (4 episodes) | -20.5 |  | 1.0 | 1 |  | 2.0 |",
    ]
    krull, pong = figures["curves.png"].axes[:2]
    heights = [set(line.get_ydata()) for line in (krull.get_lines()[-1], *pong.get_lines()[-2:])]
    assert heights == [{20.0}, {-18.5}, {-20.5}]


def test_rows_are_of_one_benchmark_and_length(tmp_path, capsys):
    scalars = {"plasticity/hessian_max_eigenvalue": [(1, 4.0)]}
    write_run(tmp_path / "a", "Pong", "base", 1, 1.0, scalars=scalars)
    write_run(tmp_path / "b", "Pong", "base", 1, 2.0, scalars=scalars, steps=5000)
    write_run(tmp_path / "c", "Pong", "base", 1, 3.0, "plastic_pretrained_finetune.py")
    assert printed(capsys, runs=(tmp_path,)) == [
        "| Pong | base | 100,000 |  |  |  | 1.0 | 1 | -8.8 | 2.0 |",
        "| Pong | base | 5,000 |  |  |  | 2.0 | 1 | -8.8 | 2.0 |",
        "| Pong | base | 100,000 |  |  |  | 3.0 | 1 |  | 2.0 |",
        "| Pong | base | 100,000 | 1 | 4 |  |  |",
        "| Pong | base | 5,000 | 1 | 4 |  |  |",
    ]


def test_plasticity_metrics_by_hand(tmp_path, capsys):
    scalars = {"plasticity/hessian_max_eigenvalue": [(1, 9.0), (2, 1.0), (3, 3.0)]}
    write_run(tmp_path, "Pong", "base_metrics", 1, 0.0, scalars=scalars)
    scalars = {"plasticity/hessian_max_eigenvalue": [(1, 9.0), (2, 2.0), (3, 4.5)]}
    scalars |= {"plasticity/active_units/head": [(1, 0.75), (2, 0.25)]}
    write_run(tmp_path, "Pong", "base_metrics", 2, 0.0, scalars=scalars)
    write_run(tmp_path, "Pong", "sam", 1, 0.0)  # has none
    rows = printed(capsys, runs=(tmp_path,))
    assert rows[-1] == "| Pong | base_metrics | 100,000 | 2 | 2.5 | 0.25 |  |"


# --- Figures of reinforcement learning ---


def test_figures_4_5_6_1_and_2_show_the_runs(tmp_path, figures):
    tag = "plasticity/hessian_max_eigenvalue"
    for seed, values in ((1, (1.0, 4.0)), (2, (3.0, 8.0))):
        points = list(zip((5000, 10000), values, strict=True))
        write_run(tmp_path, "Pong", "base_metrics", seed, 0.0, scalars={tag: points})
    span = 14.6 + 20.7  # from a random policy's return to a human's
    names = "base sam sam_reused sam_noiseless sam_rho0.3 base_batch64 plastic sam_head"
    for i, name in enumerate(names.split()):
        write_run(tmp_path, "Pong", name, 1, -20.7 + 0.1 * i * span)
        write_run(tmp_path, "walker-run", name, 1, 100.0 * i, DMC, 2_000_000)
    args = dict(runs=(tmp_path,), table="1", plot=tmp_path, allow_missing=True, reps=50)
    assert report.main(report.Args(**args)) == 0
    numbers = [f"figure{i}" for i in (1, 2, 4, 5, 6)]
    assert set(figures) == {f"{n}.png" for n in (*numbers, "intervals_atari", "intervals_dmc")}
    eigenvalue, active, _ = figures["figure4.png"].axes
    assert eigenvalue.get_lines()[0].get_xydata().tolist() == [[5.0, 2.0], [10.0, 6.0]]
    assert len(active.get_lines()) == 0

    def heights(name):
        return {a.get_title(): [bar.get_height() for bar in a.patches] for a in figures[name].axes}

    assert heights("figure5.png") == {
        "noise in SAM's passes": pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-6),
        "SAM on": pytest.approx([0, 0.7, 0.1], abs=1e-6),
        "SAM on (DeepMind Control)": [0, 100],
    }
    assert heights("figure6.png") == {
        "rho": pytest.approx([0, 0.1, 0.4], abs=1e-6),
        "batch size, base": pytest.approx([0, 0.5], abs=1e-6),
    }
    (axis,) = figures["figure2.png"].axes
    pairs = zip(axis.texts, axis.get_lines(), strict=True)
    points = {text.get_text(): line.get_xydata()[0] for text, line in pairs}
    assert points["SAM"] == pytest.approx([0.1, 100], abs=1e-6)
    lines = {line.get_label(): line for line in figures["figure1.png"].axes[0].get_lines()}
    assert lines["PLASTIC, ours"].get_xydata().tolist() == [pytest.approx([2.0, 0.6])]
    iqm = figures["intervals_atari.png"].axes[0]  # rliable's plot, the first method at the top
    assert [text.get_text() for text in iqm.get_yticklabels()] == ["PLASTIC", "SAM", "Base"]
    marks = [mark.get_segments()[0][0][0] for mark in iqm.collections]
    assert marks == pytest.approx([0.6, 0.1, 0], abs=1e-6)


# --- The reports of a Markdown file ---

BLOCK = "<!-- report.py {} -->\n{}\n<!-- end of report -->\n"


def test_reports_in_a_file_are_made_anew(tmp_path, capsys):
    for name, score in (("one", 1.25), ("two", 2.5)):
        write_run(tmp_path / name, "Pong", "base", 1, score)
    readme, one, two = (tmp_path / name for name in ("README.md", "one", "two"))
    readme.write_text("a\n" + BLOCK.format(one, "old") + "b\n" + BLOCK.format(two, "") + "c\n")
    for _ in range(2):  # the second time changes nothing
        assert report.main(report.Args(readme=readme)) == 0
        assert capsys.readouterr().out == ""
        tables = []
        for runs in (one, two):
            report.main(report.Args(runs=(runs,)))
            tables.append(BLOCK.format(runs, f"\n{capsys.readouterr().out.strip()}\n"))
        assert readme.read_text() == f"a\n{tables[0]}b\n{tables[1]}c\n"
    readme.write_text(
        BLOCK.format(f"{one} --table 1", "old") + BLOCK.format(f"{one} --table 7", "")
    )
    assert report.main(report.Args(readme=readme)) == 1  # the first is refused
    assert "old" not in readme.read_text()


@pytest.mark.parametrize("text", [
    "none", "<!-- report.py x -->", "<!-- end of report --> <!-- report.py x -->",
    "<!-- report.py RUNS --> <!-- end of report --> <!-- end of report -->",
    "<!-- report.py RUNS --> <!-- report.py RUNS --> <!-- end of report -->",
    "\xff",
    "<!-- report.py --readme README.md --> <!-- end of report -->",
    "<!-- report.py RUNS --> <!-- end of report --> <!-- report.py no --> <!-- end of report -->",
])  # fmt: skip
def test_a_file_whose_reports_cannot_be_made_stays(tmp_path, text, capsys):
    readme = tmp_path / "README.md"
    write_run(tmp_path / "runs", "Pong", "base", 1, 0.0)
    content = text.replace("RUNS", str(tmp_path / "runs")).encode("latin-1")
    readme.write_bytes(content)
    assert refused(capsys, "--readme", readme).startswith("error: ")
    assert readme.read_bytes() == content


def test_the_results_page_shows_what_its_results_give(tmp_path, monkeypatch, figures):
    """Its tables are those that the results in the repository give; its figures are there."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    copy = tmp_path / "RESULTS.md"
    copy.write_text(text)
    assert report.main(report.Args(readme=copy)) == 0
    assert copy.read_text() == text
    shown = re.findall(r"\]\((results/[^)]+\.png)\)", text)
    assert shown
    assert all((ROOT / "benchmark" / path).exists() for path in shown)
