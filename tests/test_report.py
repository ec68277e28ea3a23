"""The grids that benchmark/ prints, and the tables and figures that it makes of results."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report
import tyro
from torch.utils.tensorboard import SummaryWriter

import synth_cifar_plasticity as synth

ROOT = Path(__file__).parent.parent


def grid(**env):
    command = ["bash", str(ROOT / "benchmark/fig3_synthetic.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def parsed(line):
    python, script, *flags = shlex.split(line)
    assert (python, script) == ("python", "synth_cifar_plasticity.py")
    return synth.resolve(tyro.cli(synth.Args, args=flags))


def test_figure_3_is_12_methods_on_two_tasks():
    runs = [parsed(line) for line in grid().stdout.splitlines()]
    assert len(runs) == len({(args.task, args.exp_name) for args in runs}) == 24
    on = {
        (args.task, args.exp_name): (args.layer_norm, args.sam_rho > 0, args.crelu, args.reset_interval > 0)
        for args in runs
    }
    assert len({(task, *methods) for (task, _), methods in on.items()}) == 24  # 12 different ones of the 16
    assert on["label", "base"] == (False, False, False, False)
    assert on["input", "plastic"] == (True, True, True, True)
    assert on["label", "sam"] == (False, True, False, False)
    assert on["input", "ln_reset"] == (True, False, False, True)
    assert sorted(sum(methods) for methods in on.values()) == [0] * 2 + [1] * 8 + [2] * 12 + [4] * 2
    assert all(
        (args.num_stages, args.updates_per_stage, args.num_seeds, args.resume) == (100, 500, 30, True) for args in runs
    )
    assert all(args.sam_rho in (0, 0.1) and args.reset_interval in (0, 10) for args in runs)


def test_a_grid_narrowed_and_swept():
    lines = grid(METHODS="ln base", TASKS="label", EXTRA="--num-seeds 3", SWEEP="1").stdout.splitlines()
    runs = [parsed(line) for line in lines]
    assert [(args.task, args.exp_name, args.num_seeds) for args in runs] == [("label", "ln", 3), ("label", "base", 3)]
    assert all(args.learning_rate == args.weight_decay == (0.1, 0.01, 0.001, 0.0001, 0.00001) for args in runs)
    assert grid(EXTRA="--num-seeds 3\nrm", TASKS="label", METHODS="base").stdout.count("\n") == 1
    for env, word in (
        ({"METHODS": "base foo"}, "foo"), ({"METHODS": "sam_ln"}, "sam_ln"), ({"METHODS": "*"}, "*"),
        ({"TASKS": "input foo"}, "foo"), ({"SWEEP": "yes"}, "yes"),
    ):  # fmt: skip
        wrong = grid(**env)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.count("\n") == 1 and word in wrong.stderr


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
    write_result(tmp_path, "input", "ln", [[0.1, 0.5, 0.6], [0.1, 0.6, 0.9], [0.9, 0.9, 0.9]], first_seed=2)
    write_result(tmp_path, "label", "plastic", [[0.1, 0.5, 0.6]])
    results = report.read_results(tmp_path)
    assert report.late_accuracy(results["input", "base"], 2) == pytest.approx({1: 0.3, 2: 0.5})
    # Seed 2 alone is in both.
    assert report.gain(results["input", "ln"], results["input", "base"], 2) == pytest.approx([0.55 - 0.5])
    report.print_table(results, 2)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    assert rows[2] == "| base | input | 0.400 [0.300, 0.500] | 0.500 | 0.300 | 0.01, 0.001 | 2 |"
    assert rows[4] == "| PLASTIC | label | 0.550 | 0.600 | 0.400 | 0.01, 0.001 | 1 |"
    report.plot_figure3(results, 2, tmp_path / "plots" / "figure3.png")
    assert (tmp_path / "plots" / "figure3.png").read_bytes().startswith(b"\x89PNG")


def test_bars_stand_for_the_gains(tmp_path, monkeypatch):
    write_result(tmp_path, "label", "base", [[0.2], [0.3]])
    write_result(tmp_path, "label", "sam", [[0.5], [0.5]])
    write_result(tmp_path, "label", "plastic", [[0.1], [0.2]])
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    report.plot_figure3(report.read_results(tmp_path), 5, tmp_path / "figure3.png")
    heights = [[bar.get_height() for bar in axis.patches] for axis in figures[0].axes]
    np.testing.assert_allclose(heights, [[25], [-10]])
    assert [axis.get_title() for axis in figures[0].axes] == ["single methods", "combinations"]


def test_what_cannot_be_compared_or_drawn_gets_one_line(tmp_path, capsys):
    write_result(tmp_path, "input", "base", [[0.1, 0.2]])
    write_result(tmp_path, "label", "ln", [[0.1, 0.2]])
    write_result(tmp_path, "label", "mine", [[0.1, 0.2]])
    results = report.read_results(tmp_path)
    assert "mine" in capsys.readouterr().err  # said, not dropped in silence
    assert set(results) == {("input", "base"), ("label", "ln")}
    with pytest.raises(SystemExit):
        report.plot_figure3(results, 2, tmp_path / "figure3.png")
    write_result(tmp_path, "input", "ln", [[0.1, 0.2]])
    with pytest.raises(SystemExit):
        report.plot_figure3(report.read_results(tmp_path), 2, tmp_path / "label__ln__1-1" / "result.json" / "x.png")
    path = tmp_path / "label__ln__1-1" / "result.json"
    path.write_text(path.read_text().replace('"num_stages": 1', '"num_stages": 2'))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        report.read_results(tmp_path)
    error = capsys.readouterr().err
    assert "num_stages: 1, 2" in error
    path.write_text(
        path.read_text().replace('"num_stages": 2', '"num_stages": 1').replace('"crelu": false', '"crelu": true')
    )
    with pytest.raises(SystemExit):
        report.read_results(tmp_path)
    assert "not those of ln" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"script": "synth_cifar_plasticity.py"}', None])
def test_what_is_no_result_gets_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "result.json").write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        report.read_results(tmp_path)
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- DeepMind Control -------------------------------------------------------------------------------------------------


def control_run(runs, env_id, exp_name, seed, mean_return, evaluations, episodes):
    """A run's directory: `evaluations` and `episodes` [(agent step, return)], each of two environment steps."""
    directory = runs / f"{env_id}__{exp_name}__{seed}"
    with SummaryWriter(str(directory)) as writer:
        for tag, values in (("eval/mean_return", evaluations), ("charts/episodic_return", episodes)):
            for step, value in values:
                writer.add_scalar(tag, value, step)
    result = {"script": "plastic_drq_sac_dmc.py", "env_id": env_id, "exp_name": exp_name, "seed": seed,
              "args": {"action_repeat": 2, "learning_starts": 100}, "mean_return": mean_return, "env_steps": 2000,
              "wall_clock_seconds": 1800.0}  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))
    return directory / "result.json"


def test_returns_and_curves_of_control_runs(tmp_path, capsys, monkeypatch):
    control_run(
        tmp_path, "walker-run", "base", 1, 300.0, [(500, 90.0), (1000, 300.0)], [(50, 20.0), (100, 40.0), (150, 77.0)]
    )
    control_run(tmp_path, "walker-run", "base", 2, 400.0, [(500, 95.0), (1000, 400.0)], [(50, 30.0), (150, 99.0)])
    control_run(tmp_path, "reacher-easy", "plastic", 1, 800.0, [(1000, 800.0)], [(150, 99.0)])
    results = report.read_control_runs(tmp_path)
    report.print_returns(results)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| reacher-easy | plastic | 2,000 |  | 800 | 1 | 0.5 |",
        "| walker-run | base | 2,000 | 30 (3 episodes) | 350 [300, 400] | 2 | 0.5 |",
    ]
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    report.plot_curves(results, tmp_path / "curves.png")
    reacher, walker = figures[0].axes
    assert [axis.get_title() for axis in (reacher, walker)] == ["reacher-easy", "walker-run"]
    lines = [line.get_xydata().tolist() for line in walker.get_lines()]
    assert lines[:2] == [[[1.0, 90.0], [2.0, 300.0]], [[1.0, 95.0], [2.0, 400.0]]]
    assert {y for _, y in lines[2]} == {30.0}
    assert [text.get_text() for text in walker.get_legend().get_texts()] == ["base", "random policy"]
    assert len(reacher.get_lines()) == 1


def test_a_control_run_that_cannot_be_read(tmp_path, capsys):
    path = control_run(tmp_path, "walker-run", "base", 1, 300.0, [(500, 90.0)], [])
    for content in ('{"script": "plastic_drq_sac_dmc.py"}', '{"script": "plastic_drq_sac_dmc.py", "args": 3}'):
        path.write_text(content)
        with pytest.raises(SystemExit) as exit_info:
            report.read_control_runs(tmp_path)
        assert exit_info.value.code == 1
        assert "not a result of plastic_drq_sac_dmc.py" in capsys.readouterr().err
