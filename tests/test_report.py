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
import pytest
import report
import tyro
from scipy.stats import trim_mean
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent


def write_result(runs, task, method, accuracies, first_seed=1):
    parts = {"plastic": "ln sam crelu reset".split()}.get(method, method.split("_"))
    result = {
        "script": "synth_cifar_plasticity.py", "task": task, "exp_name": method, "first_seed": first_seed,
        "num_seeds": len(accuracies), "learning_rate": 0.01, "weight_decay": 0.001, "test_accuracy": accuracies,
        "args": dict.fromkeys(report.PROTOCOL, 1) | dict(layer_norm="ln" in parts, crelu="crelu" in parts,
            sam_rho=0.1 * ("sam" in parts), reset_interval=10 * ("reset" in parts)), "data": 1,
        "final_accuracy_mean": float(np.mean(accuracies, axis=0)[-1]),
        "mean_accuracy_mean": float(np.mean(accuracies)),
    }  # fmt: skip
    directory = runs / f"{task}__{method}__{first_seed}-{len(accuracies)}"
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))


def test_gains_by_hand_and_a_figure(tmp_path, capsys):
    write_result(tmp_path, "input", "base", [[0.1, 0.2, 0.4], [0.1, 0.4, 0.6]])
    write_result(
        tmp_path, "input", "ln", [[0.1, 0.5, 0.6], [0.1, 0.6, 0.9], [0.9, 0.9, 0.9]], first_seed=2
    )
    write_result(tmp_path, "label", "plastic", [[0.1, 0.5, 0.6]])
    results = report.read_results([tmp_path])
    assert report.late_accuracy(results["input", "base"], 2) == pytest.approx({1: 0.3, 2: 0.5})
    # Seed 2 alone is in both.
    assert report.gain(results["input", "ln"], results["input", "base"], 2) == pytest.approx(
        [0.55 - 0.5]
    )
    report.print_table(results, 2)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    assert rows[2] == "| base | input | 0.400 [0.300, 0.500] | 0.500 | 0.300 | 0.01, 0.001 | 2 |"
    assert rows[4] == "| PLASTIC | label | 0.550 | 0.600 | 0.400 | 0.01, 0.001 | 1 |"
    report.plot_figure3(results, 2, tmp_path / "plots" / "figure3.png")
    assert (tmp_path / "plots" / "figure3.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_replica_is_nan_in_the_table(tmp_path, capsys):
    write_result(tmp_path, "input", "base", [[0.1, 0.2], [0.1, 0.4]])
    write_result(tmp_path, "input", "sam", [[0.1, 0.5], [0.1, float("nan")]])
    path = tmp_path / "input__sam__1-2" / "result.json"
    path.write_text(path.read_text().replace("NaN", "null"))  # as the script writes it
    results = report.read_results([tmp_path])
    report.print_table(results, 1)
    row = "| SAM | input | nan [nan, nan] | nan | nan | 0.01, 0.001 | 2 |"
    assert capsys.readouterr().out.splitlines()[3] == row
    report.plot_figure3(results, 1, tmp_path / "figure3.png")
    assert report.gain(results["input", "sam"], results["input", "base"], 1).tolist()[0] > 0


def test_bars_stand_for_the_gains(tmp_path, monkeypatch):
    write_result(tmp_path, "label", "base", [[0.2], [0.3]])
    write_result(tmp_path, "label", "sam", [[0.5], [0.5]])
    write_result(tmp_path, "label", "plastic", [[0.1], [0.2]])
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    report.plot_figure3(report.read_results([tmp_path]), 5, tmp_path / "figure3.png")
    heights = [[bar.get_height() for bar in axis.patches] for axis in figures[0].axes]
    np.testing.assert_allclose(heights, [[25], [-10]])
    assert [axis.get_title() for axis in figures[0].axes] == ["single methods", "combinations"]


def test_what_cannot_be_compared_or_drawn_gets_one_line(tmp_path, capsys):
    write_result(tmp_path, "input", "base", [[0.1, 0.2]])
    write_result(tmp_path, "label", "ln", [[0.1, 0.2]])
    write_result(tmp_path, "label", "mine", [[0.1, 0.2]])
    results = report.read_results([tmp_path])
    assert "mine" in capsys.readouterr().err  # said, not dropped in silence
    assert set(results) == {("input", "base"), ("label", "ln")}
    with pytest.raises(SystemExit):
        report.plot_figure3(results, 2, tmp_path / "figure3.png")
    write_result(tmp_path, "input", "ln", [[0.1, 0.2]])
    with pytest.raises(SystemExit):
        report.plot_figure3(
            report.read_results([tmp_path]),
            2,
            tmp_path / "label__ln__1-1" / "result.json" / "x.png",
        )
    path = tmp_path / "label__ln__1-1" / "result.json"
    path.write_text(path.read_text().replace('"num_stages": 1', '"num_stages": 2'))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        report.read_results([tmp_path])
    error = capsys.readouterr().err
    assert "num_stages: 1, 2" in error
    path.write_text(
        path.read_text()
        .replace('"num_stages": 2', '"num_stages": 1')
        .replace('"crelu": false', '"crelu": true')
    )
    with pytest.raises(SystemExit):
        report.read_results([tmp_path])
    assert "not those of ln" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"script": "synth_cifar_plasticity.py"}',
        '{"script": "plastic_drq_sac_dmc.py", "args": {}}',
    ],
)
@pytest.mark.parametrize("read", [report.read_results, report.read_runs])
def test_what_is_no_result_gets_one_line(tmp_path, capsys, content, read):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "result.json").write_text(content)
    if "script" in content and (read is report.read_runs) == ("synth" in content):
        assert not read([tmp_path])  # another script's
        return
    with pytest.raises(SystemExit) as exit_info:
        read([tmp_path])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- Reinforcement learning: tables -----------------------------------------------------------------------------------

ATARI, DMC = "plastic_drq_rainbow_atari.py", "plastic_drq_sac_dmc.py"


def write_run(runs, task, exp_name, seed, score, script=ATARI, steps=100_000, scalars=None, **args):
    """A run's directory; `scalars` {tag: [(step, value)]}."""
    directory = runs / f"{task}__{exp_name}__{seed}"
    directory.mkdir(parents=True)
    if scalars:
        with SummaryWriter(str(directory)) as writer:
            for tag, points in scalars.items():
                for step, value in points:
                    writer.add_scalar(tag, value, step)
    args = {"learning_starts": 100, "replay_ratio": 2} | args
    result = {"script": script, "env_id": task, "exp_name": exp_name, "seed": seed, "args": args, "mean_return": score,
              "episode_returns": [score - 1, score + 1], "env_steps": steps,
              "wall_clock_seconds": 7200.0, "parameters": 6_800_000}  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))


def table(*flags, code=0):
    """What report.py prints as JSON documents, and on stderr."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        assert (
            report.main(tyro.cli(report.Args, args=[*map(str, flags), "--format", "json"])) == code
        )
    documents = [json.loads(line) for line in output.getvalue().splitlines()]
    return documents, errors.getvalue()


def normal(task, score):
    with open(ROOT / "benchmark/paper/atari_random_human.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["game"] == task]
    return (score - float(row["random"])) / (float(row["human"]) - float(row["random"]))


def test_table_1_against_aggregates_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    scores = {task: rng.uniform(0, 3000, 3) for task in report.RANDOM_HUMAN}
    for task, values in scores.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, task, "base", seed, value)
    returns = {task: rng.uniform(0, 900, 2) for task in report.CONTROL}
    for task, values in returns.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, task, "plastic", seed, value, DMC, 2_000_000)
    (atari, control), error = table(tmp_path, "--table", "1", "--reps", "200")
    assert error.splitlines() == []
    ours = atari["rows"][0]
    matrix = np.array(
        [[normal(task, value) for value in values] for task, values in scores.items()]
    )  # [tasks, seeds]
    assert (ours["method"], ours["runs"]) == ("Base", 78)
    assert ours["IQM"][0] == pytest.approx(trim_mean(matrix, 0.25, axis=None))
    assert ours["median over tasks"][0] == pytest.approx(np.median(matrix.mean(1)))
    assert ours["mean"][0] == pytest.approx(matrix.mean())
    assert ours["IQM, paper"] == [0.258, 0.224, 0.292] and ours["mean, paper"] == [
        0.476,
        0.432,
        0.52,
    ]
    for name in ("IQM", "median over tasks", "mean"):
        value, low, high = ours[name]
        assert low < value < high
    # The same bootstrap by hand: seeds drawn anew within each task.
    draws = rng.integers(3, size=(2000, 26, 3))
    means = [matrix[np.arange(26)[:, None], draw].mean() for draw in draws]
    assert ours["mean"][1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=0.1)
    assert [row["runs"] for row in atari["rows"]] == [78, 0, 0, 0, 0, 0]
    ours = control["rows"][5]
    matrix = np.array(list(returns.values()))
    assert ours["median over tasks"][0] == pytest.approx(np.median(matrix.mean(1)))
    assert ours["median over seeds"][0] == pytest.approx(np.median(matrix.mean(0)))
    assert ours["median over seeds, paper"][0] == 540 and ours["median over tasks, paper"] is None
    assert table(tmp_path, "--table", "1", "--reps", "200")[0][0] == atari  # seeded


def columns(name, benchmark):
    """{column: {task: mean return}} of one of the paper's tables by task."""
    with open(ROOT / "benchmark/paper" / name, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        c: {row["Game"]: float(row[c]) for row in rows if row[c]} for c in rows[0] if c != "Game"
    }


def test_the_papers_tables_by_task_give_its_aggregates(tmp_path):
    """Means and medians to 0.001, but for LN's in Table 7; Table 10's means are printed truncated (spec, section 6)."""
    path = tmp_path / "scores.csv"
    printed = {}
    for row in report.paper("table1_main.csv"):
        printed["7" if row["benchmark"] == "atari" else "10", row["method"]] = row
    for row in report.paper("table2_scaling.csv"):
        printed["9", f"{row['method']}:{row['replay_ratio']}"] = row
    checked = 0
    for number, name in (
        ("7", "table7_atari_drq.csv"),
        ("9", "table9_atari_replay_ratio.csv"),
        ("10", "table10_dmc.csv"),
    ):
        benchmark = "dmc" if number == "10" else "atari"
        scores = columns(name, benchmark)
        lines = ["method,task,seed,score"]
        lines += [
            f"{method},{task},1,{score}"
            for method, tasks in scores.items()
            for task, score in tasks.items()
        ]
        path.write_text("\n".join(lines) + "\n")
        ((document,), error) = table("--scores", path, "--benchmark", benchmark)
        assert error == ""
        for row in document["rows"]:
            expected = printed[number, {"LayerNorm": "LN"}.get(row["method"], row["method"])]
            if number == "10":
                assert int(row["mean"][0]) == float(expected["mean"])
            elif row["method"] != "LayerNorm":
                assert row["mean"][0] == pytest.approx(float(expected["mean"]), abs=0.001)
                assert row["median over tasks"][0] == pytest.approx(
                    float(expected["median"]), abs=0.001
                )
            assert row["IQM"][1:] == [None, None]  # one seed has no interval
            checked += 1
    assert checked == 6 + 6 + 6


def test_missing_tasks_are_refused_or_said(tmp_path):
    for seed in (1, 2):
        for task in ("Alien", "Pong"):
            write_run(tmp_path, task, "ln_reset", seed, 100.0 * seed, steps=20_000)
    write_run(tmp_path, "Pong", "ln_reset", 3, 7.0, steps=20_000)
    (document,), error = table(tmp_path, "--table", "2", code=1)
    row = document["rows"][0]
    assert (row["method"], row["runs"], row["IQM"]) == ("PLASTIC†:2", 5, None)
    assert (
        "no runs of Amidar, " in error
        and "--allow-missing" in error
        and "Pong" not in error.split("no runs of")[1]
    )
    assert "runs of 20,000 steps, not of 100,000" in error
    (document,), error = table(tmp_path, "--table", "2", "--allow-missing", "--runs-per-gpu", "4")
    row = document["rows"][0]
    matrix = [
        [normal("Alien", 100), normal("Pong", 100)],
        [normal("Alien", 200), normal("Pong", 200)],
    ]
    assert row["mean"][0] == pytest.approx(np.mean(matrix))  # the third seed of Pong is cut
    assert row["optimality gap"][0] == pytest.approx(np.mean(np.maximum(1 - np.array(matrix), 0)))
    assert (
        "cut to the first 2 seeds of each task" in error
        and "aggregated over 2 of 26 tasks" in error
    )
    assert (row["GPU hours"], row["GPU hours, paper"], row["million parameters"]) == (0.5, 0.5, 6.8)


def test_the_exit_code_of_a_refused_aggregate(tmp_path):
    write_run(tmp_path, "Pong", "base", 1, 3.0)
    command = [sys.executable, str(ROOT / "benchmark/report.py"), str(tmp_path), "--table", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("base: no runs of Alien, ")
    assert done.stdout.splitlines()[4] == "| Base | 1 |  | 0.258 [0.224, 0.292] |"


def test_tables_3_and_4_find_their_runs(tmp_path):
    with open(ROOT / "benchmark/paper/table4_ablation.csv", newline="") as file:
        printed = list(csv.DictReader(file))
    names = "base ln sam crelu reset ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset plastic".split()
    for i, name in enumerate(names):
        write_run(tmp_path, "Pong", name, 1, -20.7 + i)
    (document,), _ = table(tmp_path, "--table", "4", "--allow-missing")
    assert [row["method"] for row in document["rows"]][:6] == [
        "Base",
        "LN",
        "SAM",
        "CReLU",
        "Reset",
        "LN + SAM",
    ]
    assert [row["IQM, paper"][0] for row in document["rows"]] == [
        float(row["iqm"]) for row in printed
    ]
    scores = [normal("Pong", -20.7 + names.index(name)) for name in names]
    assert [row["runs"] for row in document["rows"]] == [1] * 12
    assert [row["IQM"][0] for row in document["rows"]] == pytest.approx(
        scores
    )  # the paper's order is that of the names
    for method in ("base", "reset", "sam_reset"):
        for ratio in (2, 4):
            script = "plastic_pretrained_finetune.py"
            write_run(
                tmp_path,
                "Pong",
                f"pretrained_{method}_rr{ratio}",
                1,
                -20.7,
                script,
                mode="finetune",
            )
    (document,), _ = table(tmp_path, "--table", "3", "--allow-missing")
    assert [(row["method"], row["runs"], row["IQM, paper"][0]) for row in document["rows"]] == [
        ("RR 2", 1, 0.366), ("RR 2, Reset†", 1, 0.709), ("RR 2, SAM, Reset†", 1, 0.776),
        ("RR 4", 1, 0.243), ("RR 4, Reset†", 1, 0.78), ("RR 4, SAM, Reset†", 1, 0.834),
    ]  # fmt: skip


def test_tables_by_task(tmp_path):
    write_run(tmp_path, "Alien", "plastic_rr8", 1, 1000.0, replay_ratio=8)
    write_run(tmp_path, "Alien", "plastic_rr8", 2, 2000.0, replay_ratio=8)
    (document,), error = table(tmp_path, "--table", "8")
    row = document["rows"][0]
    assert (row["task"], row["PLASTIC:8"], row["PLASTIC:8, runs"], row["PLASTIC:8, paper"]) == (
        "Alien",
        1500,
        2,
        1368.6,
    )
    assert (
        "ln_reset_rr8: no runs of any task" in error and "plastic_rr8: no runs of Amidar, " in error
    )
    assert (row["EfficientZero, paper"], row["PLASTIC†:8"], row["PLASTIC†:8, runs"]) == (
        808.5,
        None,
        0,
    )
    assert len(document["rows"]) == 26
    (document,), _ = table(tmp_path, "--table", "9")
    assert (document["rows"][0]["PLASTIC:8"], document["rows"][0]["PLASTIC:2"]) == (1500, None)
    for number, task in (("7", "Alien"), ("10", "acrobot-swingup")):
        (document,), _ = table(tmp_path, "--table", number)
        assert document["rows"][0]["task"] == task and "LayerNorm, runs" in document["rows"][0]


def test_the_three_formats(tmp_path, capsys):
    rows = [
        {"a": "x", "b": (0.12345, 0.1, 0.2), "c": 1.25},
        {"a": "y", "b": (0.5, None, None), "c": None},
    ]
    report.print_rows("T", rows, 3, "markdown")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | b | c |", "|---|---|---|", "| x | 0.123 [0.100, 0.200] | 1.250 |", "| y | 0.500 |  |", ""
    ]  # fmt: skip
    report.print_rows("T", rows, 3, "csv")
    assert list(csv.reader(capsys.readouterr().out.splitlines())) == [
        ["# T"], ["a", "b", "b low", "b high", "c"], ["x", "0.123", "0.100", "0.200", "1.250"],
        ["y", "0.500", "", "", ""],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content, words",
    [
        ("method,task,score\nbase,Pong,1\n", "no column seed"), ("method,task,seed,score\nbase,Pongg,1,1\n", "line 2"),
        ("method,task,seed,score\nbase,Pong,1,nan\n", "line 2"), ("method,task,seed,score\nbase,Pong,1,x\n", "'x'"),
        ("method,task,seed,score\nbase,Pong,1\n", "line 2"), ("method;task;seed;score\n", "no column method"),
        ("method,task,seed,score\nbase,Pong,1,1\nbase,Pong,1,2\n", "line 3"),
        (None, "No such file"), ("", "no column"), ("method,task,seed,score\n", "no results"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_read(tmp_path, content, words, capsys):
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        report.main(report.Args(scores=path))
    error = capsys.readouterr().err
    assert exit_info.value.code == 1 and error.count("\n") == 1 and words in error


def test_scores_of_a_spreadsheet(tmp_path):
    """With a byte order mark; and tasks with different seeds are said."""
    path = tmp_path / "scores.csv"
    path.write_text("method,task,seed,score\nbase,Pong,1,2\nbase,Alien,8,3\n", encoding="utf-8-sig")
    _, error = table("--scores", path, "--allow-missing")
    assert "base: tasks have different seeds" in error


@pytest.mark.parametrize(
    "field", ["env_steps", "seed", "parameters", "mean_return", "wall_clock_seconds"]
)
def test_numbers_that_are_none(tmp_path, field, capsys):
    write_run(tmp_path, "Pong", "base", 1, 1.0)
    (path,) = tmp_path.glob("*/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: float("inf")}))
    with pytest.raises(SystemExit):
        report.read_runs([tmp_path])
    assert "not a result of these scripts" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    {"episode_returns": []}, {"episode_returns": [1.0, float("nan")]}, {"args": {"learning_starts": None}},
    {"args": {"action_repeat": "x"}},
])  # fmt: skip
def test_results_that_are_not_whole(tmp_path, change, capsys):
    write_run(tmp_path, "Pong", "base", 1, 1.0)
    (path,) = tmp_path.glob("*/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit):
        report.main(report.Args(runs=(tmp_path,)))
    assert "not a result of these scripts" in capsys.readouterr().err


def test_runs_that_cannot_be_put_together(tmp_path, capsys):
    write_run(tmp_path / "a", "Pong", "base", 1, 1.0)
    write_run(tmp_path / "b", "Pong", "base", 1, 2.0)
    with pytest.raises(SystemExit):
        report.read_runs([tmp_path])
    assert "the same run twice" in capsys.readouterr().err
    write_run(tmp_path / "a", "Alien", "base", 1, 1.0, replay_ratio=4)
    with pytest.raises(SystemExit):
        report.choose(report.read_runs([tmp_path / "a"]), "atari", "base")
    assert "differ in replay_ratio: 4 in " in capsys.readouterr().err
    write_run(
        tmp_path / "c",
        "Pong",
        "ln_reset",
        1,
        1.0,
        layer_norm=True,
        crelu=True,
        reset_interval=9,
        sam_rho=0,
    )
    with pytest.raises(SystemExit):
        report.choose(report.read_runs([tmp_path / "c"]), "atari", "ln_reset")
    assert "not those of ln_reset" in capsys.readouterr().err
    write_run(
        tmp_path / "d",
        "Pong",
        "ln_reset",
        1,
        1.0,
        layer_norm=True,
        crelu=False,
        reset_interval=9,
        sam_rho=0,
    )
    write_run(tmp_path / "d", "Pong", "ln_reset", 2, 1.0, layer_norm=True, crelu=False, reset_interval=9, sam_rho=0,
              device="cuda", torch_threads=3)  # fmt: skip
    assert len(report.choose(report.read_runs([tmp_path / "d"]), "atari", "ln_reset")) == 2
    for args, words in ((report.Args(), "one of them"), (report.Args(runs=(tmp_path / "no",)), "no such directory"),
                        (report.Args(runs=(tmp_path,), reps=0), "--reps"),
                        (report.Args(runs=(tmp_path,), seed=-1), "--seed")):  # fmt: skip
        with pytest.raises(SystemExit):
            report.main(args)
        assert words in capsys.readouterr().err


# --- Reinforcement learning: figures ----------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures by file name, instead of their files."""
    drawn = {}
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.update({path.name: figure}))
    yield drawn
    report.plt.close("all")


def test_returns_and_curves(tmp_path, capsys, figures):
    def curves(evaluations, episodes):
        return {"eval/mean_return": evaluations, "charts/episodic_return": episodes}

    control = dict(script=DMC, steps=2000, action_repeat=2)
    scalars = curves([(500, 90.0), (1000, 300.0)], [(50, 20.0), (100, 40.0), (150, 77.0)])
    write_run(tmp_path, "walker-run", "base", 1, 300.0, scalars=scalars, **control)
    scalars = curves(
        [(500, 95.0), (1000, 400.0)],
        [(50, 30.0), (150, 99.0), (750, 98.0), (751, 50.0), (900, 60.0)],
    )
    write_run(tmp_path, "walker-run", "base", 2, 400.0, scalars=scalars, **control)
    write_run(
        tmp_path,
        "reacher-easy",
        "plastic",
        1,
        800.0,
        scalars=curves([(1000, 800.0)], [(150, 99.0)]),
        **control,
    )
    assert report.main(report.Args(runs=(tmp_path,), plot=tmp_path)) == 0
    rows = capsys.readouterr().out.splitlines()[4:-1]
    assert rows == [
        "| reacher-easy | plastic | 2,000 |  |  |  | 800.0 | 1 | 879.7 | 2.0 |",
        "| walker-run | base | 2,000 | 30.0 (3 episodes) |  | 55.0 (2) | 350.0 [300.0, 400.0] | 2 | 632.9 | 2.0 |",
    ]
    assert set(figures) == {"curves.png"}
    reacher, walker = figures["curves.png"].axes[:2]
    assert [axis.get_title() for axis in (reacher, walker)] == ["reacher-easy", "walker-run"]
    lines = [line.get_xydata().tolist() for line in walker.get_lines()]
    assert lines[:2] == [[[1.0, 90.0], [2.0, 300.0]], [[1.0, 95.0], [2.0, 400.0]]]
    assert {y for _, y in lines[2]} == {30.0}
    assert [text.get_text() for text in walker.get_legend().get_texts()] == [
        "base",
        "random policy",
    ]
    assert len(reacher.get_lines()) == 1


def test_figures_4_5_6_1_and_2_show_the_runs(tmp_path, figures):
    def metric(values):
        return {
            "plasticity/hessian_max_eigenvalue": [(5000 * (i + 1), v) for i, v in enumerate(values)]
        }

    write_run(tmp_path, "Pong", "base_metrics", 1, 0.0, scalars=metric([1.0, 4.0]))
    write_run(tmp_path, "Pong", "base_metrics", 2, 0.0, scalars=metric([3.0, 8.0]))
    span = 14.6 + 20.7
    for i, name in enumerate(
        "base sam sam_reused sam_noiseless sam_rho0.3 base_batch64 plastic sam_head".split()
    ):
        write_run(tmp_path, "Pong", name, 1, -20.7 + 0.1 * i * span)
        write_run(tmp_path, "walker-run", name, 1, 100.0 * i, DMC, 2_000_000)
    assert (
        report.main(
            report.Args(runs=(tmp_path,), table="1", plot=tmp_path, allow_missing=True, reps=50)
        )
        == 0
    )
    assert set(figures) == {
        "figure1.png", "figure2.png", "figure4.png", "figure5.png", "figure6.png", "intervals_atari.png",
        "intervals_dmc.png",
    }  # fmt: skip
    eigenvalue = figures["figure4.png"].axes[0]
    assert eigenvalue.get_lines()[0].get_xydata().tolist() == [[5.0, 2.0], [10.0, 6.0]]
    assert len(figures["figure4.png"].axes[1].get_lines()) == 0

    def heights(figure):
        return {
            axis.get_title(): [bar.get_height() for bar in axis.patches]
            for axis in figures[figure].axes
        }

    expected = {
        "noise in SAM's passes": [0, 0.1, 0.2, 0.3],
        "SAM on": [0, 0.7, 0.1],
        "SAM on (DeepMind Control)": [0, 100],
    }
    for title, values in expected.items():
        assert heights("figure5.png")[title] == pytest.approx(values, abs=1e-6)
    assert heights("figure6.png") == {
        "rho": pytest.approx([0, 0.1, 0.4], abs=1e-6), "batch size, base": pytest.approx([0, 0.5], abs=1e-6)
    }  # fmt: skip
    (right,) = figures["figure2.png"].axes
    points = {
        text.get_text(): line.get_xydata()[0]
        for text, line in zip(right.texts, right.get_lines(), strict=True)
    }
    assert points["SAM"] == pytest.approx([0.1, 100], abs=1e-6)
    ours = [
        line
        for line in figures["figure1.png"].axes[0].get_lines()
        if line.get_label() == "PLASTIC, ours"
    ]
    assert ours[0].get_xydata().tolist() == [pytest.approx([2.0, 0.6])]


def test_policies_that_learn_nothing_measured_apart(tmp_path, capsys, figures):
    scalars = {"eval/mean_return": [(500, 90.0)], "charts/episodic_return": [(50, 20.0)]}
    for seed in (1, 2):
        write_run(tmp_path, "Pong", "base", seed, 5.0, scalars=scalars)
    write_run(tmp_path, "Krull", "base", 1, 5.0, scalars=scalars)
    write_run(tmp_path, "Pong", "random", 1, -20.0, scalars=scalars, eval_epsilon=1.0)
    write_run(tmp_path, "Pong", "random", 2, -17.0, scalars=scalars, eval_epsilon=1.0)
    write_run(tmp_path, "Pong", "constant", 1, -21.0, action=3)
    write_run(tmp_path, "Pong", "constant", 2, -20.0, action=0)
    assert report.main(report.Args(runs=(tmp_path,), plot=tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[4:-1] == [
        "| Krull | base | 100,000 | 20.0 (1 episodes) |  |  | 5.0 | 1 | 3612.1 | 2.0 |",
        "| Pong | base | 100,000 | -18.5 (4 episodes) | -20.5 |  | 5.0 [5.0, 5.0] | 2 | -8.8 | 2.0 |",
    ]
    krull, pong = figures["curves.png"].axes[:2]
    assert set(krull.get_lines()[-1].get_ydata()) == {20.0}
    assert set(pong.get_lines()[-2].get_ydata()) == {-18.5}
    assert [text.get_text() for text in pong.get_legend().get_texts()] == [
        "base",
        "random policy",
        "best constant action",
    ]
    assert set(pong.get_lines()[-1].get_ydata()) == {-20.5}


@pytest.mark.parametrize("name", ["random", "constant"])
def test_a_run_named_so_that_learns_is_a_run(tmp_path, capsys, name):
    write_run(tmp_path, "Pong", name, 1, -20.0, eval_epsilon=0.001)
    assert report.main(report.Args(runs=(tmp_path,))) == 0
    assert capsys.readouterr().out.splitlines()[4:-1] == [
        f"| Pong | {name} | 100,000 |  |  |  | -20.0 | 1 |  | 2.0 |"
    ]


def test_policies_that_learn_nothing_alone_are_no_report(tmp_path, capsys):
    write_run(tmp_path, "Pong", "random", 1, -20.0, eval_epsilon=1.0)
    with pytest.raises(SystemExit) as exit_info:
        report.main(report.Args(runs=(tmp_path,)))
    assert exit_info.value.code == 1
    assert "no runs there but of policies that learn nothing" in capsys.readouterr().err


def test_rows_are_of_one_benchmark_and_length(tmp_path, capsys):
    scalars = {"plasticity/hessian_max_eigenvalue": [(1, 4.0)]}
    for name, score, settings in (
        ("a", 1.0, {}), ("b", 2.0, {"steps": 5000}), ("c", 3.0, {"script": "plastic_pretrained_finetune.py"}),
    ):  # fmt: skip
        write_run(tmp_path / name, "Pong", "base", 1, score, scalars=scalars, **settings)
    assert report.main(report.Args(runs=(tmp_path,))) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Pong")]
    assert rows == [
        "| Pong | base | 100,000 |  |  |  | 1.0 | 1 | -8.8 | 2.0 |",
        "| Pong | base | 5,000 |  |  |  | 2.0 | 1 | -8.8 | 2.0 |",
        "| Pong | base | 100,000 |  |  |  | 3.0 | 1 |  | 2.0 |",
        "| Pong | base | 100,000 | 1 | 4 |  |  |",
        "| Pong | base | 5,000 | 1 | 4 |  |  |",
        "| Pong | base | 100,000 | 1 | 4 |  |  |",
    ]


def test_a_bar_in_a_name_does_not_end_its_cell(tmp_path, capsys):
    write_run(tmp_path, "Pong", "a|b", 1, 1.0)
    assert report.main(report.Args(runs=(tmp_path,))) == 0
    assert "| Pong | a\\|b | 100,000 |" in capsys.readouterr().out


def test_plasticity_metrics_by_hand(tmp_path, capsys):
    scalars = {"plasticity/hessian_max_eigenvalue": [(1, 9.0), (2, 1.0), (3, 3.0)]}
    write_run(tmp_path, "Pong", "base_metrics", 1, 0.0, scalars=scalars)
    scalars = {"plasticity/hessian_max_eigenvalue": [(1, 9.0), (2, 2.0), (3, 4.5)]}
    scalars |= {"plasticity/active_units/head": [(1, 0.75), (2, 0.25)]}
    write_run(tmp_path, "Pong", "base_metrics", 2, 0.0, scalars=scalars)
    write_run(tmp_path, "Pong", "sam", 1, 0.0)  # has none
    assert report.main(report.Args(runs=(tmp_path,))) == 0
    assert (
        capsys.readouterr().out.splitlines()[-2]
        == "| Pong | base_metrics | 100,000 | 2 | 2.5 | 0.25 |  |"
    )


# --- The reports of a Markdown file -----------------------------------------------------------------------------------


def test_reports_in_a_file_are_made_anew(tmp_path, capsys):
    for name, score in (("one", 1.25), ("two", 2.5)):
        write_run(tmp_path / name, "Pong", "base", 1, score)
    block = "<!-- report.py {} -->\n{}\n<!-- end of report -->\n"
    readme = tmp_path / "README.md"
    flags = [f"{tmp_path / 'one'} --format csv", f"{tmp_path / 'two'} --format csv"]
    readme.write_text(
        "a\n" + block.format(flags[0], "old") + "b\n" + block.format(flags[1], "") + "c\n"
    )
    for _ in range(2):  # the second time changes nothing
        assert report.main(report.Args(readme=readme)) == 0
        tables = [
            "\n# Returns\ntask,run,steps,random policy,best constant action,last training episodes,mean return,seeds,"
            '"paper, full length",hours a run\n'
            f'Pong,base,"100,000",,,,{score},1,-8.8,2.0\n'
            for score in (1.2, 2.5)
        ]
        expected = (
            "a\n"
            + block.format(flags[0], tables[0])
            + "b\n"
            + block.format(flags[1], tables[1])
            + "c\n"
        )
        assert readme.read_text() == expected
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", [
    "none", "<!-- report.py x -->", "<!-- end of report -->", "<!-- end of report --> <!-- report.py x -->",
    "<!-- report.py a --> <!-- report.py b --> <!-- end of report --> <!-- end of report -->",
    "<!-- report.py RUNS --> <!-- end of report --> <!-- end of report -->",
    "<!-- report.py RUNS --> <!-- report.py RUNS --> <!-- end of report -->",
    "<!-- report.py RUNS--> <!-- end of report -->", "<!-- report.py it's --> <!-- end of report -->",
    "<!-- report.py --help --> <!-- end of report -->", "<!-- report.py --readme README.md --> <!-- end of report -->",
    "<!-- report.py nowhere --> <!-- end of report -->", "\xff",
])  # fmt: skip
def test_a_file_whose_reports_cannot_be_made_stays(tmp_path, text, capsys):
    readme = tmp_path / "README.md"
    write_run(tmp_path / "runs", "Pong", "base", 1, 0.0)
    text = text.replace("RUNS", str(tmp_path / "runs"))
    readme.write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as exit_info:
        report.main(report.Args(readme=readme))
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert readme.read_bytes() == text.encode("latin-1")


def test_a_link_and_line_ends_of_a_file_stay(tmp_path):
    write_run(tmp_path / "runs", "Pong", "base", 1, 0.0)
    file, link = tmp_path / "file.md", tmp_path / "link.md"
    file.write_bytes(
        f"\ufeffa\r\n<!-- report.py {tmp_path / 'runs'} -->\r\n<!-- end of report -->\r\n".encode()
    )
    link.symlink_to(file)
    assert report.main(report.Args(readme=link)) == 0
    assert link.is_symlink()
    content = file.read_bytes()
    assert content.startswith("\ufeffa\r\n".encode())
    assert content.count(b"\n") == content.count(b"\r\n") > 5


def test_a_file_that_changes_meanwhile_keeps_the_change(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "runs", "Pong", "base", 1, 0.0)
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- report.py {tmp_path / 'runs'} --><!-- end of report -->")
    monkeypatch.setattr(report, "print_returns", lambda *_: readme.write_text("somebody's work"))
    with pytest.raises(SystemExit) as exit_info:
        report.main(report.Args(readme=readme))
    assert exit_info.value.code == 1
    assert "changed in the meantime" in capsys.readouterr().err
    assert readme.read_text() == "somebody's work"


def test_a_refused_aggregate_in_a_file(tmp_path, capsys):
    write_run(tmp_path / "runs", "Pong", "base", 1, 0.0)
    readme = tmp_path / "README.md"
    block = "<!-- report.py {} -->\nold\n<!-- end of report -->\n"
    readme.write_text(
        block.format(f"{tmp_path / 'runs'} --table 1")
        + block.format(f"{tmp_path / 'runs'} --table 7")
    )
    assert report.main(report.Args(readme=readme)) == 1
    assert "old" not in readme.read_text()
    with pytest.raises(SystemExit) as exit_info:
        report.main(report.Args(readme=readme, table="1"))
    assert exit_info.value.code == 2
    assert "none beside it" in capsys.readouterr().err


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
