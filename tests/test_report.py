"""The tables and figures that benchmark/report.py makes of results."""

import contextlib
import csv
import io
import json
import re
import runpy
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pandas as pd
import plot
import pytest
import report
import tyro
from scipy.stats import trim_mean
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
ATARI, DMC = "plastic_drq_rainbow_atari.py", "plastic_drq_sac_dmc.py"


def write(directory, result):
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))


def write_synthetic(
    runs, task, method, accuracies, first_seed=1, decay=0.001, data=1, others=(), **args
):
    """A run's directory, of accuracies [seeds][stages]; `others`: pairs of such and their decay."""
    parts = {"plastic": "ln sam crelu reset".split()}.get(method, method.split("_"))
    flags = dict(layer_norm="ln" in parts, crelu="crelu" in parts, sam_rho=0.1 * ("sam" in parts))
    flags |= dict(reset_interval=10 * ("reset" in parts), num_stages=3, updates_per_stage=1)
    flags |= dict(batch_size=1, momentum=1, conv_strides=[3, 1], label_change="permute")
    flags |= dict(shrink_perturb_alpha=0.6 if "shrink" in parts else 1)
    result = dict(script="synth_cifar_plasticity.py", task=task, exp_name=method, data=data)
    result |= dict(first_seed=first_seed, args=flags | args)
    result["sweep"] = [
        dict(learning_rate=0.01, weight_decay=decay, test_accuracy=accuracies)
        for accuracies, decay in [(accuracies, decay), *others]
    ]
    write(runs / f"{task}__{method}__{first_seed}", result)


def write_run(runs, task, exp_name, seed, score, script=ATARI, steps=100_000, scalars=None, **args):
    """A run's directory; `scalars` {tag: [(step, value)]}. It took an hour more than its seed."""
    result = dict(script=script, env_id=task, exp_name=exp_name, seed=seed, mean_return=score)
    result |= dict(episode_returns=[score - 1, score + 1], env_steps=steps, parameters=6_800_000)
    result |= dict(args={"learning_starts": 100, "replay_ratio": 2} | args, git_commits=["a", "b"])
    directory = runs / f"{task}__{exp_name}__{seed}"
    write(directory, result | {"wall_clock_seconds": 3600.0 * (seed + 1)})
    if scalars:
        with SummaryWriter(str(directory)) as writer:
            for tag, points in scalars.items():
                for step, value in points:
                    writer.add_scalar(tag, value, step)


def table(*flags, code=0):
    """The tables that report.py shows, [table][row][column], and what it says on stderr."""
    tables, errors = [], io.StringIO()
    args = tyro.cli(report.Args, args=[*map(str, flags)])

    def show(title, rows, digits):
        tables.append(pd.DataFrame(rows).to_dict("records"))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(report, "show", show)
        assert report.main(args) == code
    return tables, errors.getvalue()


def printed(capsys, **args):
    """The rows of what report.py prints as Markdown."""
    assert report.main(report.Args(**args)) == 0
    lines = capsys.readouterr().out.splitlines()
    return [a for a, b in zip(lines, ["", *lines], strict=False) if a[:2] == b[:1] + " " == "| "]


def refused(*flags):
    """The one line on stderr with which report.py ends."""
    with pytest.raises(SystemExit) as exit_info:
        report.main(tyro.cli(report.Args, args=[*map(str, flags)]))
    assert exit_info.value.code.startswith("error: ") and exit_info.value.code.count("\n") == 0
    return exit_info.value.code


@pytest.fixture
def figures(monkeypatch):
    """The figures by file name, instead of their files."""
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.update({path.name: figure}))
    yield drawn
    plot.plt.close("all")


def heights(figure):
    """Of bars, by panel."""
    return {axis.get_title(): [bar.get_height() for bar in axis.patches] for axis in figure.axes}


# --- The synthetic experiment ---


def test_accuracies_and_gains_by_hand(tmp_path, capsys, figures):
    write_synthetic(tmp_path, "input", "base", [[0.1, 0.2, 0.4], [0.1, 0.4, 0.6]])
    ln = [[0.1, 0.5, 0.6], [0.1, 0.6, 0.9], [0.9, 0.9, 0.9]]
    write_synthetic(tmp_path, "input", "ln", ln, first_seed=2)
    write_synthetic(tmp_path, "label", "base", [[0.1, 0.2, 0.4]])
    write_synthetic(tmp_path, "label", "plastic", [[0.1, 0.1, 0.1]])
    write_synthetic(tmp_path, "label", "sam", [[0.1, 0.1, None]])  # a replica that diverged
    assert printed(capsys, runs=(tmp_path,), last=2, plot=tmp_path) == [
        "| base | input | 0.400 [0.300, 0.500] | 0.500 | 0.300 | 0.01, 0.001 | 2 |",
        "| base | label | 0.300 | 0.400 | 0.233 | 0.01, 0.001 | 1 |",
        "| LN | input | 0.733 [0.550, 0.900] | 0.800 | 0.611 | 0.01, 0.001 | 3 |",
        "| SAM | label | nan | nan | nan | 0.01, 0.001 | 1 |",
        "| PLASTIC | label | 0.100 | 0.100 | 0.100 | 0.01, 0.001 | 1 |",
    ]
    # Of LN's seeds, 2 alone is one of base's too.
    assert heights(figures["figure3.png"]) == {
        "single methods": pytest.approx([100 * (0.55 - 0.5), np.nan], nan_ok=True),
        "combinations": pytest.approx([-20]),
    }
    images, labels = figures["stages.png"].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in images.lines}
    assert drawn == {  # the mean over all of a method's seeds
        "base": [[1, pytest.approx(0.1)], [2, pytest.approx(0.3)], [3, pytest.approx(0.5)]],
        "LN": [[1, pytest.approx(1.1 / 3)], [2, pytest.approx(2 / 3)], [3, pytest.approx(0.8)]],
    }
    assert [line.get_label() for line in labels.lines] == ["base", "SAM", "PLASTIC"]
    assert (images.get_title(), labels.get_title()) == ("new images", "new labels")
    write_run(tmp_path, "Pong", "base", 1, 9)
    del figures["figure3.png"]
    error = table(tmp_path, "--plot", tmp_path)[1]
    assert error.startswith("ln, input: Figure 3 has 1 of 3 seeds, those of base\n")
    assert error.count("Figure 3") == 1
    del figures["figure3.png"]
    table(tmp_path, "--table", "7", "--plot", tmp_path)  # a table shows less, the figures are all
    assert "figure3.png" in figures


def test_of_a_search_in_several_runs_the_best_setting_is_shown(tmp_path, capsys, figures):
    """By the final accuracy, as within one run; the mean of the last stages is another matter."""
    write_synthetic(tmp_path, "label", "base", [[0.1, 0.2]])
    for decay, accuracies in (
        (0.1, [0.9, None]), (0.01, [0.4, 0.4]), (0.001, [0.1, 0.5]), (0.0001, [0.3, 0.3])
    ):  # fmt: skip
        write_synthetic(tmp_path / str(decay), "label", "ln", [accuracies], decay=decay)
    assert printed(capsys, runs=(tmp_path,), last=2, plot=tmp_path) == [
        "| base | label | 0.150 | 0.200 | 0.150 | 0.01, 0.001 | 1 |",
        "| LN | label | 0.300 | 0.500 | 0.300 | 0.01, 0.001 | 1 |",
    ]
    assert heights(figures["figure3.png"])["single methods"] == pytest.approx([100 * (0.3 - 0.15)])
    for i, accuracies in enumerate(([[0.1, 0.9], [0.1, None]], [[0.1, 0.2], [0.1, 0.2]])):
        write_synthetic(tmp_path / "sam" / str(i), "label", "sam", accuracies, decay=i)
    (rows,), _ = table(tmp_path / "sam")  # a setting that diverged for one seed loses
    assert rows[0]["learning rate, weight decay"] == "0.01, 1"
    write_synthetic(tmp_path / "one", "label", "sam", [[0.1, 0.9], [0.1, None]])
    assert table(tmp_path / "one")[0][0][0]["final"] == "nan"
    write_synthetic(tmp_path / "chunks", "label", "ln", [[0.1, 0.9]], decay=1, num_chunks=2)
    assert "num_chunks differs: nan in " in refused(tmp_path)


def test_a_methods_seeds_may_have_run_apart(tmp_path):
    """The best setting is that of all seeds together: here not the best of most runs."""
    for name, first_seed, at_1, at_2 in (  # a search over two decays in each run
        ("a", 4, [[0.1, 0.6], [0.2, 0.7]], [[0.3, 0.5], [0.1, 0.3]]),
        ("b", 1, [[0.0, 0.2], [0.3, 0.3], [0.0, 0.1]], [[0.1, 0.5], [0.2, 0.4], [0.3, 0.9]]),
    ):
        others = [(at_2, 2)]
        write_synthetic(tmp_path / name, "label", "sam", at_1, first_seed, decay=1, others=others)
    write_synthetic(tmp_path / "c", "label", "sam", [[0.1, 0.2]] * 5, decay=3)  # all seeds at once
    write_synthetic(tmp_path, "label", "base", [[0.1, 0.2]])
    (rows,), _ = table(tmp_path, "--last", "1")
    assert rows[1]["learning rate, weight decay"] == "0.01, 2"
    assert (rows[1]["final"], rows[1]["mean"], rows[1]["seeds"]) == ("0.520", "0.360", 5)
    write_synthetic(tmp_path / "d", "label", "sam", [[0.1, 0.9]], first_seed=6, decay=1)
    assert "a setting lacks seeds" in refused(tmp_path)  # six at decay 1, five at 2 and 3
    write_synthetic(tmp_path / "e", "label", "base", [[0.1, 0.9], [0.1, 0.9]], first_seed=0)
    assert "share a setting and a seed" in refused(tmp_path / "label__base__1", tmp_path / "e")


def test_synthetic_runs_that_do_not_compare(tmp_path):
    write_synthetic(tmp_path / "a", "input", "base", [[0.1, 0.2]])
    for i, (message, method, flags) in enumerate((
        ("num_stages differs: 3 in ", "ln", dict(num_stages=2)),
        ("updates_per_stage differs: 1 in ", "ln", dict(updates_per_stage=2)),
        ("batch_size differs: 1 in ", "ln", dict(batch_size=2)),
        ("momentum differs: 1.0 in ", "ln", dict(momentum=0.5)),
        ("conv_strides differs: [3, 1] in ", "ln", dict(conv_strides=[3, 3])),
        ("label_change differs: permute in ", "ln", dict(label_change="cyclic")),
        ("images differs: 1 in ", "ln", dict(data=2)),
        ("not those of reset_shrink", "reset_shrink", dict(shrink_perturb_alpha=1)),
        ("not those of reset", "reset", dict(shrink_perturb_alpha=0.6)),
        ("not those of ln", "ln", dict(crelu=1)),
        ("not those of plastic", "plastic", dict(crelu=0)),
        ("not those of redo", "redo", dict(redo_interval=9, l2_init=True)),
        ("have the same name", "base", {}),
    )):  # fmt: skip
        write_synthetic(tmp_path / str(i), "input", method, [[0.1, 0.2]], **flags)
        assert message in refused(tmp_path / "a", tmp_path / str(i))
    write_synthetic(tmp_path / "a", "label", "ln_sam_redo", [[0.1, 0.2]], redo_interval=9)
    assert len(table(tmp_path / "a")[0][0]) == 2


# --- What is read ---


@pytest.mark.parametrize("change", ["{", "\xff", {"script": "my_copy.py"}, {"exp_name": ...},
                                    {"mean_return": None}, {"args": []}])  # fmt: skip
def test_what_is_no_whole_result_of_these_scripts_is_left_out(tmp_path, change):
    write_run(tmp_path, "Pong", "base", 1, 1.0)
    write_run(tmp_path / "x", "Pong", "base", 2, 1.0)
    (path,) = tmp_path.glob("x/*/result.json")
    if isinstance(change, dict):
        result = json.loads(path.read_text()) | change
        change = json.dumps({key: value for key, value in result.items() if value is not ...})
    path.write_bytes(change.encode("latin-1"))
    (rows,), error = table(tmp_path, tmp_path / "Pong__base__1")  # one run, named twice
    assert [row["seeds"] for row in rows] == [1]
    assert error.startswith(f"left out: {path}") and error.count("\n") == 1
    assert "no results there" in refused(tmp_path / "x")
    assert "no such directory" in refused(tmp_path, tmp_path / "nowhere")


def test_runs_that_cannot_be_put_together(tmp_path):
    write_run(tmp_path / "a", "Pong", "base", 1, 1.0)
    write_run(tmp_path / "b", "Pong", "base", 1, 2.0)
    assert "have the same name, task, setting and seed" in refused(tmp_path)
    write_run(tmp_path / "a", "Pong", "base", 2, 1.0, replay_ratio=4)
    assert "replay_ratio differs: 2 in " in refused(tmp_path / "a", "--table", "7")
    write_run(tmp_path / "a", "Pong", "sam", 1, -20.7)  # an aggregate is refused alone
    (rows,), error = table(tmp_path / "a", "--table", "4", "--allow-missing", code=1)
    scores = {row["method"]: row.get("IQM") for row in rows if row["runs"]}
    assert scores == {"Base": None, "SAM": (0.0, ANY, ANY)} and "replay_ratio differs" in error
    write_run(tmp_path / "a", "Alien", "base", 1, 1.0)  # the plain report has the others
    (rows,), error = table(tmp_path / "a")
    assert [(row["task"], row["run"]) for row in rows] == [("Alien", "base"), ("Pong", "sam")]
    assert "replay_ratio differs" in error
    flags = dict(layer_norm=True, reset_interval=9, sam_rho=0)
    write_run(tmp_path / "c", "Pong", "ln_reset", 1, 1.0, crelu=True, **flags)
    assert "not those of ln_reset" in refused(tmp_path / "c", "--table", "9")
    name = "plastic_drq_rainbow_atari"  # the default, which says nothing of the flags
    write_run(tmp_path / "f", "Pong", name, 1, 1.0, crelu=False, **flags)
    assert table(tmp_path / "f")[0][0][0]["run"] == name
    write_run(tmp_path / "d", "Pong", "ln_reset", 1, 1.0, crelu=False, **flags)
    write_run(tmp_path / "d", "Pong", "ln_reset", 2, 1.0, crelu=False, device="cuda", **flags)
    (rows,), _ = table(tmp_path / "d", "--table", "2", "--allow-missing")
    assert rows[0]["runs"] == 2
    for task, repeat in (("walker-run", 2), ("reacher-easy", 4)):
        write_run(tmp_path / "e", task, "sam", 1, 1.0, DMC, action_repeat=repeat)
    assert len(table(tmp_path / "e", "--table", "10")[0][0]) == 11
    write_run(tmp_path / "e", "walker-run", "sam", 2, 1.0, DMC, action_repeat=2, buffer_size=9)
    assert "buffer_size differs: nan in " in refused(tmp_path / "e", "--table", "10")
    for seed, rho in ((1, 0.01), (2, 5.0)):  # Control's flags by task: within one
        write_run(tmp_path / "g", "walker-run", "sam", seed, 1.0, DMC, sam_rho=rho)
    assert "sam_rho differs: 0.01 in " in refused(tmp_path / "g", "--table", "10")


@pytest.mark.parametrize("flags", [[], ["x", "--scores", "y"], ["x", "--reps", "0"]])
def test_flags_that_make_no_sense(flags):
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(report.Args, args=flags)
    assert exit_info.value.code == 2


SCORES = "method,task,seed,score\n"


def test_scores_are_written_as_they_are_read(tmp_path):
    for seed, score in ((1, 500), (2, 7000.5)):
        write_run(tmp_path, "Alien", "base", seed, score)
    table(tmp_path, "--csv", tmp_path / "scores.csv")
    first, *lines = (tmp_path / "scores.csv").read_text().split()
    assert first == "method,task,seed,score,steps,commit"
    assert lines == ["base,Alien,1,500.0,100000,b", "base,Alien,2,7000.5,100000,b"]
    runs = report.read_scores(tmp_path / "scores.csv", "atari")
    assert runs.score.tolist() == [500, 7000.5] and runs.seed.tolist() == [1, 2]
    write_run(tmp_path, "Alien", "random", 1, 9, eval_epsilon=1)  # no method
    table(tmp_path, "--csv", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text().split()[1:] == lines
    write_run(tmp_path, "walker-run", "base", 1, 9, DMC)  # both benchmarks in one file
    table(tmp_path, "--csv", tmp_path / "both.csv")
    for benchmark, scores in (("atari", [500, 7000.5]), ("dmc", [9])):
        assert report.read_scores(tmp_path / "both.csv", benchmark).score.tolist() == scores
    write_run(tmp_path, "Alien", "base", 3, 9, "plastic_pretrained_finetune.py")  # tasks of Atari
    assert "none of fine-tuning" in refused(tmp_path, "--csv", tmp_path / "again.csv")
    write_run(tmp_path / "a", "Alien", "random", 1, 9, eval_epsilon=1)
    assert "runs of agents" in refused(tmp_path / "a", "--csv", tmp_path / "again.csv")
    for steps in (10_000, 100_000):
        write_run(tmp_path / "b" / str(steps), "Alien", "base", 1, 9, steps=steps)
    assert "length alone" in refused(tmp_path / "b", "--csv", tmp_path / "again.csv")
    for flags in (dict(table="1"), dict(plot=tmp_path)):
        with pytest.raises(ValueError, match="--csv makes neither"):
            report.Args(runs=(tmp_path,), csv=tmp_path / "again.csv", **flags)
    (tmp_path / "scores.csv").write_text("\n".join([first, *lines, "base,Alien,3,9,20000,b"]))
    flags = ("--scores", tmp_path / "scores.csv", "--allow-missing")
    (rows,), error = table(*flags, code=1)
    assert rows[0].get("IQM") is None and "steps differs: 100000 in " in error
    (tmp_path / "scores.csv").write_text(SCORES + "010,Pong,1,20\n10,Pong,2,20\nNA,Pong,1,20\n")
    (rows,), _ = table(*flags)
    assert [row["method"] for row in rows] == ["010", "10", "NA"]


@pytest.mark.parametrize("content, words", [
    ("method,task,score\nbase,Pong,1\n", "needs columns"), (SCORES + "base,P,1,1\n", "line 2"),
    (SCORES + "base,Pong,1,nan\n", "line 2"), (SCORES + "base,Pong,1,x\n", "'x'"),
    (SCORES + "base,Pong,1,1\nbase,Pong,1,2\n", "line 3"), (None, "No such file"),
    ("", "No columns to parse"), (SCORES, "no scores of atari"),
    (SCORES + "base,walker-run,1,1\n", "no scores of atari"),
])  # fmt: skip
def test_scores_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    assert words in refused("--scores", path)


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
    assert error == ""
    ours = atari[0]
    rows = [[normal(task, value) for value in values] for task, values in scores.items()]
    matrix = np.array(rows).T  # [seeds, tasks]
    assert (ours["method"], ours["runs"]) == ("Base", 78)
    assert ours["IQM"][0] == pytest.approx(trim_mean(matrix, 0.25, axis=None))
    assert ours["median over tasks"][0] == pytest.approx(np.median(matrix.mean(0)))
    assert ours["mean"][0] == pytest.approx(matrix.mean())
    assert ours["IQM, paper"] == pytest.approx((0.258, 0.224, 0.292))
    assert ours["mean, paper"] == pytest.approx((0.476, 0.432, 0.52))
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
    ours = report.aggregates(scores, "dmc", reps=4000)
    assert report.aggregates(scores, "dmc", reps=50) == report.aggregates(scores, "dmc", reps=50)
    assert ours.keys() == expected.keys()
    for name, draws in expected.items():
        value, low, high = ours[name]
        ends = np.quantile(draws, [0.025, 0.975])
        assert [low, high] == pytest.approx(ends, abs=0.1 * (ends[1] - ends[0])), name
        assert low < value < high
    assert ours["iqm_tasks"][0] == ours["iqm"][0]
    one_task = report.aggregates(scores[:, :1], "dmc", reps=50)
    for name, (_, low, high) in one_task.items():  # drawn from one task, it would be no interval
        assert np.isnan([low, high]).all() if "tasks" in name else low < high


def test_the_median_over_seeds_draws_whole_seeds():
    """Four seeds at 0 and one at 1: the median of five draws is 1 with probability 0.058, so the
    interval ends at 1. (Seeds drawn within each of 26 tasks would give 0.115 to 0.269 around 0.)"""
    scores = np.zeros((5, 26))
    scores[4] = 1
    assert report.aggregates(scores, "atari", reps=2000)["seed_median"] == (0, 0, 1)


def test_the_papers_tables_by_task_give_its_aggregates(tmp_path):
    """Means and medians to 0.001, but for LN's in Table 7; Table 10's means are truncated."""
    expected = {("atari", row["method"]): row for row in paper("table2_scaling.csv")}
    expected |= {(row["benchmark"], row["method"]): row for row in paper("table1_main.csv")}
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
            printed = expected[benchmark, row["method"].replace("LayerNorm", "LN")]
            if benchmark == "dmc":
                assert int(row["mean, seeds resampled"][0]) == float(printed["mean"])
                assert np.isnan(row["IQM, tasks resampled"][1])  # one seed has no interval
            elif row["method"] != "LayerNorm":
                assert row["mean"][0] == pytest.approx(float(printed["mean"]), abs=0.001)
                median = pytest.approx(float(printed["median"]), abs=0.001)
                assert row["median over tasks"][0] == median
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
    assert "runs of 2 of 26 tasks, none of Amidar, Assault, " in error
    assert "Pong" not in error and "--allow-missing" in error
    assert "runs of 20,000 steps, not of 100,000" in error
    (rows,), error = table(tmp_path, "--table", "2", "--allow-missing", "--runs-per-gpu", "4")
    row = rows[0]
    games, returns = ("Alien", "Pong"), (100, 200)  # the third seed of Pong is cut
    matrix = np.array([[normal(task, score) for task in games] for score in returns])
    assert row["mean"][0] == pytest.approx(matrix.mean())
    assert row["optimality gap"][0] == pytest.approx(np.mean(np.maximum(1 - matrix, 0)))
    assert "the first 2 seeds of each task (of up to 3)" in error and "different" not in error
    assert "runs of 2 of 26 tasks" in error
    assert row["hours a run"] == pytest.approx((2 + 3 + 2 + 3 + 4) / 5 / 4)
    assert row["GPU hours, paper"] == 0.5
    assert row["million parameters"] == 6.8
    write_run(tmp_path, "Pong", "ln_reset", 0, 7.0, steps=20_000)  # seeds 0 and 1, Alien's 1 and 2
    assert "different seeds" in table(tmp_path, "--table", "2", "--allow-missing")[1]
    for task, seeds in (("Alien", [2]), ("Pong", [10, 2])):  # 2 comes before 10
        for seed in seeds:
            write_run(tmp_path / "few", task, "ln_reset", seed, 100.0 * seed)
    (rows,), error = table(tmp_path / "few", "--table", "2", "--allow-missing")
    assert rows[0]["mean"][0] == pytest.approx(np.mean([normal(task, 200) for task in games]))
    assert "different" not in error


def test_the_exit_code_of_a_refused_aggregate(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "Pong", "base", 1, 3.0)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), "--table", "4"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(ROOT / "benchmark/report.py", run_name="__main__")
    assert exit_info.value.code == 1
    assert "| Base | 1 |  | 0.258 [0.224, 0.292] |\n" in capsys.readouterr().out


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
            write_run(tmp_path, "Pong", name, 1, ratio, "plastic_pretrained_finetune.py")
    (rows,), _ = table(tmp_path, "--table", "3", "--allow-missing")
    assert [(row["method"], row["runs"], row["IQM, paper"][0]) for row in rows] == [
        ("RR 2", 1, 0.366), ("RR 2, Reset†", 1, 0.709), ("RR 2, SAM, Reset†", 1, 0.776),
        ("RR 4", 1, 0.243), ("RR 4, Reset†", 1, 0.78), ("RR 4, SAM, Reset†", 1, 0.834),
    ]  # fmt: skip
    iqms = [normal("Pong", ratio) for ratio in (2, 4) for _ in range(3)]
    assert [row["IQM"][0] for row in rows] == pytest.approx(iqms)
    write_run(tmp_path, "Pong", "base", 2, 9.0, "plastic_pretrained_finetune.py")
    (rows,), _ = table(tmp_path, "--table", "4", "--allow-missing")
    assert rows[0]["runs"] == 1  # Table 4 has no fine-tuning


# --- Tables of returns ---


def test_tables_by_task(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "Alien", "plastic_rr8", seed, 1000.0 * seed, replay_ratio=8)
    (rows,), error = table(tmp_path, "--table", "8")
    row = rows[0]
    assert (row["task"], row["PLASTIC:8"], row["PLASTIC:8, runs"]) == ("Alien", 1500, 2)
    assert (row["PLASTIC:8, paper"], row["EfficientZero, paper"]) == (1368.6, 808.5)
    assert np.isnan(row["PLASTIC†:8"]) and (row["PLASTIC†:8, runs"], len(rows)) == (0, 26)
    assert "plastic_rr8: runs of 1 of 26 tasks, none of Amidar, " in error
    assert "not in this table" not in error
    for number in ("7", "4"):  # columns, rows
        _, error = table(tmp_path, "--table", number)
        assert error.endswith("exp-names that are not in this table: plastic_rr8\n")
    (rows,), _ = table(tmp_path, "--table", "9")
    assert rows[0]["PLASTIC:8"] == 1500 and np.isnan(rows[0]["PLASTIC:2"])
    for number, task in (("7", "Alien"), ("10", "acrobot-swingup")):
        (rows,), _ = table(tmp_path, "--table", number)
        assert rows[0]["task"] == task and "LayerNorm, runs" in rows[0]


def curves(evaluations, episodes):
    return {"eval/mean_return": evaluations, "charts/episodic_return": episodes}


def test_returns_and_curves(tmp_path, capsys, figures):
    control = dict(script=DMC, steps=2000, action_repeat=2, image_size=64)
    scalars = curves([(500, 90), (1000, 300)], [(50, 20), (100, 40), (150, 77)])
    write_run(tmp_path, "walker-run", "base", 1, 300.0, scalars=scalars, **control)
    episodes = [(50, 30), (150, 99), (750, 98), (751, 50), (900, 60)]
    scalars = curves([(500, 95), (1000, 400)], episodes)
    write_run(tmp_path, "walker-run", "base", 2, 400.0, scalars=scalars, **control)
    scalars = curves([(1000, 800)], [(120, 97), (200, 101), (201, 7)])
    control["reset_interval"] = 1000  # updates; 2 a step, the first after 100 steps
    write_run(tmp_path, "hopper-hop", "plastic", 1, 800.0, scalars=scalars, **control)
    assert printed(capsys, runs=(tmp_path,), plot=tmp_path) == [
        "| hopper-hop | plastic | 2,000 |  |  |  | 800.0 | 1 | 254.6 | 2.0 |",
        "| walker-run | base | 2,000 | 30.0 (3 episodes) |  | 55.0 (2) | 350.0 [300.0, 400.0] | 2 "
        "| 632.9 | 2.5 [2.0, 3.0] |",
    ]
    assert set(figures) == {"curves.png"}
    hopper, walker = figures["curves.png"].axes[:2]
    assert [axis.get_title() for axis in (hopper, walker)] == ["hopper-hop", "walker-run"]
    lines = [line.get_xydata().tolist() for line in walker.get_lines()]
    assert lines[:2] == [[[1.0, 90.0], [2.0, 300.0]], [[1.0, 95.0], [2.0, 400.0]]]
    assert lines[2][:2] == [[10.0, 24.3], [20.0, 57.9]]  # the public seeds, mean and range
    band = walker.collections[-1].get_paths()[0].vertices.tolist()
    assert [10.0, 21.6] in band and [10.0, 28.8] in band
    assert {y for _, y in lines[3]} == {30.0}
    training, evaluation, reset = [line.get_xydata().tolist() for line in hopper.get_lines()]
    assert (training, evaluation) == ([[0.3, 99.0], [0.5, 7.0]], [[2.0, 800.0]])  # by tenths
    assert {x for x, _ in reset} == {1.198}
    assert ["lines: training" in axis.get_ylabel() for axis in (hopper, walker)] == [True, False]
    assert "D" not in {line.get_marker() for line in walker.get_lines()}  # too short a run
    legend = [text.get_text() for text in figures["curves.png"].legends[0].get_texts()]
    labels = ["PLASTIC", "PLASTIC, resets", "base", "base, ten public seeds", "random policy"]
    assert legend == labels
    # Smaller images than those seeds had: no comparison.
    control["image_size"] = 32
    write_run(tmp_path / "small", "walker-run", "base", 3, 300.0, scalars=scalars, **control)
    report.main(report.Args(runs=(tmp_path / "small",), plot=tmp_path))
    shown = {line.get_label() for line in figures["curves.png"].axes[0].get_lines()}
    assert "base" in shown and "base, ten public seeds" not in shown


def test_policies_that_learn_nothing_are_measured_apart(tmp_path, capsys, figures):
    scalars = curves([(500, 90.0)], [(50, 20.0)])
    for task, seed in (("Krull", 1), ("Pong", 1), ("Pong", 2)):
        write_run(tmp_path, task, "base", seed, 5.0, scalars=scalars)
    for seed, random, constant in ((1, -20.0, -21.0), (2, -17.0, -20.0)):
        write_run(tmp_path / "apart", "Pong", "random", seed, random, eval_epsilon=1.0)
        write_run(tmp_path / "apart", "Pong", "constant", seed, constant, action=seed)
    assert "policies that learn nothing" in refused(tmp_path / "apart")
    write_run(tmp_path, "Pong", "random", 3, 1.0, eval_epsilon=0.001)  # a run named so that learns
    write_run(tmp_path, "Pong", "tuned", 1, 2.0, "plastic_pretrained_finetune.py")
    assert printed(capsys, runs=(tmp_path,), plot=tmp_path) == [
        "| Krull | base | 100,000 | 20.0 (1 episodes) |  |  | 5.0 | 1 | 3612.1 | 2.0 |",
        "| Pong | base | 100,000 | -18.5 (4 episodes) | -20.5 |  | 5.0 [5.0, 5.0] | 2 | -8.8 "
        "| 2.5 [2.0, 3.0] |",
        "| Pong | random | 100,000 | -18.5 (4 episodes) | -20.5 |  | 1.0 | 1 |  | 4.0 |",
        "| Pong | tuned | 100,000 | -18.5 (4 episodes) | -20.5 |  | 2.0 | 1 |  | 2.0 |",
    ]
    krull, pong = figures["curves.png"].axes[:2]
    lines = [set(line.get_ydata()) for line in (krull.get_lines()[-1], *pong.get_lines()[-2:])]
    assert lines == [{20.0}, {-18.5}, {-20.5}]
    diamonds = [line for line in krull.get_lines() if line.get_marker() == "D"]
    assert [line.get_xydata().tolist() for line in diamonds] == [[[100.0, 3612.06]]]  # the paper's


def test_rows_are_of_one_benchmark_and_length(tmp_path, capsys):
    """Figure 4's metrics are medians of each run's second half."""
    eigenvalue, active = "plasticity/hessian_max_eigenvalue", "plasticity/active_units/head"
    scalars = {eigenvalue: [(1, 9.0), (2, 1.0), (3, 3.0)]}
    write_run(tmp_path / "a", "Pong", "base", 1, 1.0, scalars=scalars)
    scalars = {eigenvalue: [(1, 9.0), (2, 2.0), (3, 4.5)], active: [(1, 0.75), (2, 0.25)]}
    write_run(tmp_path / "a", "Pong", "base", 2, 1.0, scalars=scalars)
    write_run(tmp_path / "b", "Pong", "base", 1, 2.0, scalars=scalars, steps=5000)
    write_run(tmp_path / "c", "Pong", "base", 1, 3.0, "plastic_pretrained_finetune.py")
    write_run(tmp_path / "d", "Pong", "base_metrics", 1, 4.0)  # base's, but for the metrics
    assert printed(capsys, runs=(tmp_path,)) == [
        "| Pong | base | 100,000 |  |  |  | 1.0 [1.0, 1.0] | 2 | -8.8 | 2.5 [2.0, 3.0] |",
        "| Pong | base | 5,000 |  |  |  | 2.0 | 1 | -8.8 | 2.0 |",
        "| Pong | base | 100,000 |  |  |  | 3.0 | 1 |  | 2.0 |",
        "| Pong | base_metrics | 100,000 |  |  |  | 4.0 | 1 | -8.8 | 2.0 |",
        "| Pong | base | 100,000 | 2 | 2.5 | 0.25 |  |",
        "| Pong | base | 5,000 | 1 | 3.25 | 0.25 |  |",
    ]


# --- Figures of reinforcement learning ---


def test_figures_4_5_6_1_and_2_show_the_runs(tmp_path, figures):
    tag = "plasticity/hessian_max_eigenvalue"
    for seed, values in ((1, (1.0, 4.0)), (2, (3.0, 8.0))):
        points = list(zip((5000, 10000), values, strict=True))
        write_run(tmp_path, "Pong", "base_metrics", seed, 0.0, scalars={tag: points})
    # Two seeds of Pong count as much as one of Krull: (2 + 8) / 2 and (6 + 10) / 2.
    points = [(5000, 8.0), (10000, 10.0)]
    write_run(tmp_path, "Krull", "base_metrics", 1, 0.0, scalars={tag: points})
    # In no line with these: a run of another length, and runs whose settings differ.
    write_run(tmp_path, "Pong", "base_metrics", 3, 0.0, steps=5000, scalars={tag: [(5000, 99.0)]})
    for size in (16, 32):
        scalars = {tag: [(5000, 5.0)]}
        write_run(tmp_path, "Pong", "crelu_metrics", size, 0.0, scalars=scalars, batch_size=size)
    own = dict(learning_starts=2000, replay_ratio=2)
    scalars = {tag: [(5000, 7.0)]}
    write_run(
        tmp_path, "Pong", "reset_metrics", 1, 0.0, scalars=scalars, reset_interval=65_333, **own
    )
    span = 14.6 + 20.7  # from a random policy's return to a human's
    names = "base sam sam_reused sam_noiseless sam_rho0.3 base_batch64 plastic sam_head"
    for i, name in enumerate(names.split()):
        write_run(tmp_path, "Pong", name, 1, -20.7 + 0.1 * i * span)
        write_run(tmp_path, "walker-run", name, 1, 100.0 * i, DMC, 2_000_000)
    write_run(tmp_path, "walker-run", "sam_actor", 1, 50.0, DMC, 2_000_000, scalars=scalars)
    args = dict(runs=(tmp_path,), table="1", plot=tmp_path, allow_missing=True, reps=50)
    assert report.main(report.Args(**args)) == 0
    numbers = "figure1 figure2 figure4 figure5 figure5_dmc figure6 intervals_atari intervals_dmc"
    assert set(figures) == {f"{name}.png" for name in numbers.split()}
    eigenvalue, active, _ = figures["figure4.png"].axes
    short, mean, *seeds, reset = [line.get_xydata().tolist() for line in eigenvalue.get_lines()[:6]]
    assert short == [[5.0, 99.0]]
    legend = [text.get_text() for text in figures["figure4.png"].legends[0].get_texts()]
    assert legend == ["base, 5,000 steps", "base, 100,000 steps", "Reset", "resets"]
    assert mean == [[5.0, 5.0], [10.0, 8.0]]  # of base; Reset has one run; none of Control
    runs = [[[5.0, 8.0], [10.0, 10.0]], [[5.0, 1.0], [10.0, 4.0]], [[5.0, 3.0], [10.0, 8.0]]]
    assert sorted(seeds) == sorted(runs) and reset == [[5.0, 7.0]]
    assert len(eigenvalue.get_lines()) == 6 + 3  # the resets
    # Two updates a step, from step 2,000 on: update 65,333 is the first of step 34,666's, 130,666
    # the second of 67,332's, 195,999 the first of 99,999's. Base has no resets.
    vertical = [line.get_xdata()[0] for line in active.get_lines()]
    assert vertical == [34.666, 67.332, 99.999]
    assert heights(figures["figure5.png"]) == {
        "noise in SAM's passes": pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-6),
        "SAM on": pytest.approx([0, 0.7, 0.1], abs=1e-6),
    }
    assert heights(figures["figure5_dmc.png"]) == {"SAM on": [0, 50, 100]}
    assert heights(figures["figure6.png"]) == {
        "rho": pytest.approx([0, 0.1, 0.4], abs=1e-6),
        "batch size": pytest.approx([0, 0.5], abs=1e-6),
    }
    for name, method, x, y in (("figure2", "SAM", 0.1, 100), ("figure1", "PLASTIC:2", 2.0, 0.6)):
        (axis,) = figures[f"{name}.png"].axes
        points = {text.get_text(): text.xy for text in axis.texts}  # the paper's first, then ours
        assert points[method] == pytest.approx([x, y], abs=1e-6)
    iqm = figures["intervals_atari.png"].axes[0]  # rliable's plot, the first method at the top
    assert [text.get_text() for text in iqm.get_yticklabels()] == ["PLASTIC", "SAM", "Base"]
    marks = [mark.get_segments()[0][0][0] for mark in iqm.collections]
    assert marks == pytest.approx([0.6, 0.1, 0], abs=1e-6)


def test_figure_2_has_new_images_across_and_new_labels_up(figures):
    late = {("input", "base"): [0.1, 0.3], ("label", "base"): [0.5], ("input", "ln"): [0.4]}
    late |= {("label", "ln"): [0.6, 0.8], ("input", "sam"): [0.9]}  # SAM has one task
    late = {key: pd.Series(values) for key, values in late.items()}
    plot.figure2(late, lambda *_: {}, Path("figure2.png"))
    (axis,) = figures["figure2.png"].axes
    points = {text.get_text(): text.xy for text in axis.texts}
    assert points == {"base": pytest.approx((0.2, 0.5)), "LN": pytest.approx((0.4, 0.7))}
    assert "input" in axis.get_xlabel() and "label" in axis.get_ylabel()


def test_intervals_end_where_they_should(figures):
    """Of one seed there is none."""
    rows = {"A": dict(iqm=(0.5, 0.4, 0.7)), "B": dict(iqm=(0.2, np.nan, np.nan))}
    plot.intervals("", rows, ["iqm"], Path("intervals.png"))
    (axis,) = figures["intervals.png"].axes
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches]
    assert ends == [pytest.approx((0.2, 0.2)), pytest.approx((0.4, 0.7))]  # A is at the top
    bar = dict(panel="", name="", task="", cell=(0.5, 0.4, 0.7), dots=[0.3, 0.8])
    plot.bars([bar], "", Path("bars.png"))
    (axis,) = figures["bars.png"].axes
    assert axis.collections[0].get_segments()[0].tolist() == [[0, 0.4], [0, 0.7]]
    assert axis.get_lines()[0].get_ydata().tolist() == [0.3, 0.8]


def test_a_line_is_the_mean_and_of_six_runs_has_a_band_from_the_lowest_to_the_highest(figures):
    _, (few, many) = plot.panels(2)
    plot.line(few, [np.array([[1000, value]]) for value in (0, 0, 3)], "C0", "")
    plot.line(many, [np.array([[1000, v], [2000, v]]) for v in (0, 0, 0, 0, 0, 6)], "C0", "")
    assert few.get_lines()[0].get_xydata().tolist() == [[1, 1]] and len(few.get_lines()) == 4
    (band,) = many.collections
    assert {y for _, y in band.get_paths()[0].vertices} == {0, 6} and len(many.get_lines()) == 1


@pytest.mark.parametrize("updates_flag", ["replay_ratio", "updates_per_step"])
@pytest.mark.parametrize("per_step", [1, 2, 8])
@pytest.mark.parametrize("repeat", [1, 4])
def test_reset_steps_are_those_of_the_training_loop(updates_flag, per_step, repeat):
    for every in (0, 1, 5, 8, 71, 72, 73, 1000):
        resets, updates, last = [], 0, 12  # in steps of the agent
        for step in range(1, last + 1):
            for _ in range(per_step if step >= 3 else 0):
                updates += 1
                if every > 0 and updates % every == 0 and step < last:
                    resets.append(repeat * step)
        args = {updates_flag: per_step, "action_repeat": repeat, "learning_starts": 3}
        assert plot.reset_steps(args | {"reset_interval": every}, repeat * last).tolist() == resets


def test_methods_have_the_papers_names():
    names = "base ln_sam ln_reset plastic base_rr2 example".split()
    shown = ["base", "LN + SAM", "PLASTIC† (LN + Reset)", "PLASTIC", "base_rr2", "example"]
    assert [plot.method(name) for name in names] == shown


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
    "none", "<!-- report.py RUNS --> <!-- report.py RUNS --> <!-- end of report -->",
    "<!-- report.py RUNS --> <!-- end of report --> <!-- report.py no --> <!-- end of report -->",
])  # fmt: skip
def test_a_file_whose_reports_cannot_be_made_stays(tmp_path, text):
    readme = tmp_path / "README.md"
    write_run(tmp_path / "runs", "Pong", "base", 1, 0.0)
    text = text.replace("RUNS", str(tmp_path / "runs"))
    readme.write_text(text)
    refused("--readme", readme)
    assert readme.read_text() == text


def test_the_results_page_shows_what_its_results_give(tmp_path, monkeypatch, figures):
    """Its tables are those that the results in the repository give; its figures are there.

    So is the file of scores that one of its reports writes.
    """
    results, here = RESULTS, tmp_path / "benchmark" / "results"
    here.mkdir(parents=True)
    for path in results.iterdir():
        if path.name != "scores.csv":
            (here / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    copy = tmp_path / "RESULTS.md"
    copy.write_text(text)
    assert report.main(report.Args(readme=copy)) == 0
    assert copy.read_text() == text
    assert (here / "scores.csv").read_text() == (results / "scores.csv").read_text()
    shown = re.findall(r"\]\((results/[^)]+\.png)\)", text)
    assert shown
    assert all((ROOT / "benchmark" / path).exists() for path in shown)


def test_the_results_page_has_its_gains_by_setting_from_the_sweeps():
    """This table is made by hand: points above base at the same setting, in the last 5 stages.

    One column is over all stages. Bold is the best of a column of all twelve combinations.
    """
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    table = text.split("| learning rate, weight decay |")[1].split("\n\n")[0]
    head, _, *rows = table.splitlines()
    columns = head.strip(" |").split(" | ")
    rows = {name: cells for name, *cells in ([c.strip() for c in r[1:-1].split("|")] for r in rows)}
    directories = {
        "images, 0.01, 0.001": "figure3", "images, 0.001, 0": "released_images",
        "images, 0.001, 0.001": "decay_images", "labels, 0.01, 0.001": "figure3",
        "labels, 0.01, 0.0001": "figure3", "labels, 0.03, 0.0001": "synth_full",
    }  # fmt: skip
    gains, over_all_stages = {}, {}
    for setting, directory in directories.items():
        task, *rates = setting.replace("images", "input").replace("labels", "label").split(", ")
        accuracy, of_all = {}, {}
        num_seeds = int(rows["seeds"][columns.index(setting)])
        for path in (RESULTS / directory).rglob(f"{task}__*__1-{num_seeds}/result.json"):
            for tried in json.loads(path.read_text())["sweep"]:
                if [f"{tried['learning_rate']:g}", f"{tried['weight_decay']:g}"] == rates:
                    curves = np.array(tried["test_accuracy"])
                    assert curves.shape == (num_seeds, 100)
                    method = plot.method(path.parent.name.split("__")[1])
                    assert method not in accuracy
                    accuracy[method] = 100 * curves[:, -5:].mean()
                    of_all[method] = 100 * curves.mean()
        base, base_of_all = accuracy.pop("base"), of_all.pop("base")
        assert rows["base's test accuracy"][columns.index(setting)] == f"{base / 100:.3f}"
        gains[setting] = {method: value - base for method, value in accuracy.items()}
        over_all_stages[setting] = {method: value - base_of_all for method, value in of_all.items()}
    for name, by_setting in (("mean of these five", gains), ("over all stages", over_all_stages)):
        five = [by_setting[setting] for setting in list(directories)[:5]]
        gains[name] = {m: np.mean([gain[m] for gain in five]) for m in five[0]}
    methods = {plot.method(name) for name in report.SYNTHETIC[:12]}
    assert set(columns) == set(gains)
    assert {"base's test accuracy", "seeds", *methods} == {*rows, "base"}
    for setting, gain in gains.items():
        assert set(gain) == methods - {"base"} or setting == "labels, 0.03, 0.0001"
        for method in methods - {"base"}:
            cell = f"{round(gain[method], 6):+.1f}" if method in gain else ""  # 2.35 is one
            if len(gain) == 11 and gain[method] == max(gain.values()):
                cell = f"**{cell}**"
            assert rows[method][columns.index(setting)] == cell


@pytest.mark.parametrize("title, directory, decay", [
    ("new images", "figure3/input", 0.001), ("new labels", "figure3/label", 0.001),
    ("new labels, decay 0.0001", "figure3/**/label", 0.0001),
    ("new images, released", "released_images/input", 0),
    ("new images, decay 0.001", "decay_images/input", 0.001),
])  # fmt: skip
def test_the_results_page_has_what_each_method_adds_to_each_other(title, directory, decay):
    """Tables made by hand: bold if all seeds gain, in brackets if none does."""
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    head, _, *rows = text.split(f"| {title} |")[1].split("\n\n")[0].splitlines()
    columns = head.strip(" |").split(" | ")
    assert [row.split(" | ")[0] for row in rows] == [f"| + {column}" for column in columns[1:]]
    accuracy = {}
    for path in RESULTS.glob(f"{directory}__*__1-3/result.json"):
        for tried in json.loads(path.read_text())["sweep"]:
            if tried["weight_decay"] == decay:
                name = path.parent.name.split("__")[1].replace("plastic", "ln_sam_crelu_reset")
                methods = frozenset(name.split("_")) - {"base"}
                assert methods not in accuracy
                accuracy[methods] = 100 * np.mean(np.array(tried["test_accuracy"])[:, -5:], 1)
    for row in rows:
        name, *gains = (cell.strip() for cell in row[1:-1].split("|"))
        added = name.removeprefix("+ ").lower()
        for column, gain in zip(columns, gains, strict=True):
            to = {column.lower()} - {"base"}
            if to == {added}:
                assert gain == ""
                continue
            above = accuracy[frozenset(to | {added})] - accuracy[frozenset(to)]
            frame = "**{}**" if (above > 0).all() else "({})" if (above < 0).all() else "{}"
            assert gain == frame.format(f"{above.mean():+.1f}")


def test_the_results_page_has_what_stages_cost():
    """That table is made by hand: the accuracy, and in brackets the points above base."""
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    head, _, *rows = text.split("| task, setting |")[1].split("\n\n")[0].splitlines()
    methods = [method.lower() for method in head.strip(" |").split(" | ")]
    directories = {
        "images, 0.01, 0.001, in 100 stages": "figure3/input",
        "images, 0.01, 0.001, at once": "one_stage/input",
        "images, 0.001, 0, in 100 stages": "released_images/input",
        "images, 0.001, 0, at once": "one_stage_released/input",
        "labels, 0.01, 0.001, in 100 stages": "figure3/label",
        "labels, 0.01, 0.001, one labelling": "one_stage/input",  # outputs permuted
        "labels, 0.01, 0.0001, in 100 stages": "figure3/**/label",
        "labels, 0.01, 0.0001, one labelling": "one_labelling/label",
    }
    for row, (label, directory) in zip(rows, directories.items(), strict=True):
        name, *cells = (cell.strip() for cell in row[1:-1].split("|"))
        assert name == label
        accuracy = {}
        for method in methods:
            for path in RESULTS.glob(f"{directory}__{method}__1-3/result.json"):
                result = json.loads(path.read_text())
                assert result["args"]["num_stages"] == (100 if "stages" in label else 1)
                assert result["gradient_updates"] == 50_000
                for tried in result["sweep"]:
                    if f", {tried['learning_rate']:g}, {tried['weight_decay']:g}, " in label:
                        accuracies = np.array(tried["test_accuracy"])
                        assert method not in accuracy and len(accuracies) == 3
                        accuracy[method] = np.mean(accuracies[:, -5:])
        for method, cell in zip(methods, cells, strict=True):
            above = 100 * (accuracy[method] - accuracy["base"])
            gain = "" if method == "base" else f" ({above:+.1f})"
            assert cell == f"{accuracy[method]:.3f}{gain}"


def test_the_results_page_has_what_choices_that_the_paper_leaves_open_change():
    """This table is made by hand, as those of what methods add; here the flags find the runs."""
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    head, _, *rows = text.split("| choice, alone |")[1].split("\n\n")[0].splitlines()
    off = {
        "layer_norm": False, "layer_norm_kind": "sample", "layer_norm_scope": "backbone",
        "crelu": False, "crelu_scope": "head", "sam_rho": 0, "reset_interval": 0,
        "conv_strides": [3, 3, 1], "num_stages": 100, "updates_per_stage": 500, "num_seeds": 3,
    }  # fmt: skip
    choices = {
        "LN over channels and pixels of a sample": dict(layer_norm=True),
        "LN over the channels at each pixel": dict(layer_norm=True, layer_norm_kind="pixel"),
        "LN in the head's hidden layers, too": dict(layer_norm=True, layer_norm_scope="all"),
        "CReLU in the head": dict(crelu=True),
        "CReLU in the convolutions, too": dict(crelu=True, crelu_scope="all"),
        "Reset every 5 stages": dict(reset_interval=5),
        "Reset every 10 stages": dict(reset_interval=10),
        "Reset every 20 stages": dict(reset_interval=20),
    }
    accuracy = {}
    for directory in ("figure3", "decay_images", "left_open"):
        for path in RESULTS.glob(f"{directory}/*/result.json"):
            result = json.loads(path.read_text())
            for name, flags in {"base": {}, **choices}.items():
                if all(result["args"][flag] == value for flag, value in {**off, **flags}.items()):
                    for tried in result["sweep"]:
                        rates = tried["learning_rate"], tried["weight_decay"]
                        run = name, result["args"]["task"], *rates
                        assert run not in accuracy
                        curves = np.array(tried["test_accuracy"])
                        accuracy[run] = 100 * curves[:, -5:].mean(1)
    settings = [("input", 0.01, 0.001), ("input", 0.001, 0.001), ("label", 0.01, 0.001)]
    columns = [column.replace("images", "input") for column in head.strip(" |").split(" | ")]
    assert columns == ["{}, {:g}, {:g}".format(*s).replace("label", "labels") for s in settings]
    for row, name in zip(rows, choices, strict=True):
        first, *cells = (cell.strip() for cell in row[1:-1].split("|"))
        assert first.removesuffix(" (default)") == name
        for setting, cell in zip(settings, cells, strict=True):
            if (name, *setting) not in accuracy:
                assert cell == ""
                continue
            above = accuracy[name, *setting] - accuracy["base", *setting]
            frame = "**{}**" if (above > 0).all() else "({})" if (above < 0).all() else "{}"
            assert cell == frame.format(f"{above.mean():+.1f}")


def test_the_results_page_has_the_search_of_seed_1():
    """This table is made by hand: accuracies of single methods and PLASTIC, here by their flags.

    Bold is a method's best on a task.
    """
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    table = text.split("| test accuracy, seed 1 |")[1].split("\n\n")[0]
    head, _, *rows = table.splitlines()
    methods = {
        "base": (0, 0, 0, 0), "LN": (1, 0, 0, 0), "SAM": (0, 0.1, 0, 0), "CReLU": (0, 0, 1, 0),
        "Reset": (0, 0, 0, 10), "PLASTIC": (1, 0.1, 1, 10),
    }  # fmt: skip
    assert head.strip(" |").split(" | ") == list(methods)
    names = {flags: name for name, flags in methods.items()}
    usual = {
        "layer_norm_kind": "sample", "layer_norm_scope": "backbone", "crelu_scope": "head",
        "conv_strides": [3, 3, 1], "label_change": "permute", "first_seed": 1, "num_stages": 100,
        "updates_per_stage": 500, "shrink_perturb_alpha": 1,
    }  # fmt: skip
    accuracy = {}
    for directory in ("figure3", "released_images", "decay_images", "strong_decay", "search"):
        for path in RESULTS.glob(f"{directory}/**/*__1-*/result.json"):
            result = json.loads(path.read_text())
            args = {"layer_norm_scope": "backbone"} | result["args"]  # older runs lack the flag
            assert {flag: args[flag] for flag in usual} == usual
            on = "layer_norm", "sam_rho", "crelu", "reset_interval"
            name = names.get(tuple(args[flag] for flag in on))
            for tried in result["sweep"] if name else ():
                task = {"input": "images", "label": "labels"}[args["task"]]
                run = f"{task}, {tried['learning_rate']:g}, {tried['weight_decay']:g}", name
                assert run not in accuracy
                accuracy[run] = np.mean(tried["test_accuracy"][0][-5:])
    assert {row[1:-1].split("|")[0].strip() for row in rows} == {setting for setting, _ in accuracy}
    for row in rows:
        setting, *cells = (cell.strip() for cell in row[1:-1].split("|"))
        for name, cell in zip(methods, cells, strict=True):
            if (setting, name) not in accuracy:
                assert cell == ""
                continue
            same = [a for (s, n), a in accuracy.items() if n == name and s[:6] == setting[:6]]
            best = accuracy[setting, name] == max(same)
            assert cell == ("**{:.3f}**" if best else "{:.3f}").format(accuracy[setting, name])


def test_the_results_page_has_the_evaluations_on_deepmind_control():
    """Two tables made by hand, of our runs and the public seeds that the figure has, too."""
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    runs = report.with_curves(report.read_runs([RESULTS / "paper_settings" / "dmc"]))
    runs = runs.set_index(["task", "exp_name"])
    cheetah, *others = [(task, "base") for task in ("cheetah-run", "reacher-easy", "walker-run")]
    columns = [
        [cell for run in (cheetah, *others) for cell in (run, (run[0], "public"))],
        [cheetah, ("cheetah-run", "plastic"), ("cheetah-run", "public")],
    ]
    for table, names in zip(text.split("| environment steps |")[1:], columns, strict=True):
        for row in table.split("\n\n")[0].splitlines()[2:]:
            steps, *cells = (cell.strip() for cell in row[1:-1].split("|"))
            for (task, name), cell in zip(names, cells, strict=True):
                if name == "public":
                    points = runs.loc[task, "base"].public
                    shown = {p[0]: "{:.1f} ({:.1f} to {:.1f})".format(*p[1:]) for p in points}
                else:
                    points = runs.loc[task, name].curves["eval/mean_return"]
                    shown = {step: f"{value:.1f}" for step, value in points}
                assert cell == shown.get(int(steps.replace(",", "")), ""), (task, name, steps)


def test_the_results_page_has_the_figures_of_the_linear_probe():
    """That table is made by hand, too: both seeds of the pretraining; pixels need none."""
    text = (ROOT / "benchmark" / "RESULTS.md").read_text()
    head, _, *rows = text.split("| Breakout |")[1].split("\n\n")[0].splitlines()
    kinds = head.strip(" |").split(" | ")
    paths = sorted((RESULTS / "pretraining").glob("*/probe.json"))
    probes = [json.loads(path.read_text())["r_squared"] for path in paths]
    assert len(probes) == 2 and len(rows) == len(probes[0])
    for row in rows:
        name, *cells = (cell.strip() for cell in row[1:-1].split("|"))
        for kind, cell in zip(kinds, cells, strict=True):
            figures = [f"{probe[name][kind]:.3f}" for probe in probes]
            assert cell == (figures[0] if kind == "pixels" else ", ".join(figures))
