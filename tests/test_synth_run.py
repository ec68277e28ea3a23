"""The synthetic script's run beyond what all scripts promise (test_promises.py)."""

import json

import numpy as np
import pytest
from runs import CASES, contents, names, scalars, stop, synth
from test_synth import write_images

CASE = CASES["synth"]


def read_result(tmp_path, name="x"):
    """Strictly JSON, which has no NaN."""
    not_json = lambda constant: pytest.fail(f"{constant} is not JSON")  # noqa: E731
    (path,) = tmp_path.glob(f"*__{name}__*/result.json")
    return json.loads(path.read_text(), parse_constant=not_json)


def test_a_run_learns_and_its_result_is_complete(play, tmp_path):
    flags = dict(learning_rate=(0.02, 1e-6), updates_per_stage=40, metrics_interval=4)
    play(CASE, num_seeds=3, reset_interval=0, log_interval=4, **flags)
    result = read_result(tmp_path)
    assert (result["gradient_updates"], result["num_seeds"], result["task"]) == (160, 3, "input")
    assert [setting["learning_rate"] for setting in result["sweep"]] == [0.02, 1e-6]
    assert result["learning_rate"] == 0.02  # the better one
    assert np.shape(result["test_accuracy"]) == np.shape(result["train_accuracy"]) == (3, 4)
    assert {**result, **result["sweep"][0]} == result
    assert result["final_accuracy"] == [seed[-1] for seed in result["test_accuracy"]]
    np.testing.assert_allclose(result["mean_accuracy"], np.mean(result["test_accuracy"], axis=1))
    assert result["final_accuracy_mean"] == pytest.approx(np.mean(result["final_accuracy"]))
    assert result["final_accuracy_mean"] > 0.8 > 0.3 > result["sweep"][1]["final_accuracy_mean"]
    low, high = result["final_accuracy_interval"]
    assert low <= result["final_accuracy_mean"] <= high
    assert [one["stage"] for one in result["metrics"]] == [3]
    measured = {"hessian_max_eigenvalue", "active_units/backbone", "active_units/head"}
    for one in [one for setting in result["sweep"] for one in setting["metrics"]]:
        assert all(len(one[name]) == 3 for name in measured)
    assert result["metrics"] != result["sweep"][1]["metrics"]
    assert 0 < result["training_seconds"] < result["wall_clock_seconds"]
    assert result["updates_per_second"] == pytest.approx(160 / result["training_seconds"])

    (run_dir,) = tmp_path.glob("input*")
    logged, name = scalars(run_dir), "lr_0.02_decay_0.001"
    steps, means = zip(*logged[f"test_accuracy/{name}"], strict=True)
    assert steps == (40, 80, 120, 160)
    assert means == pytest.approx(np.mean(result["test_accuracy"], axis=0))
    assert [step for step, _ in logged[f"losses/{name}"]] == list(range(4, 161, 4))
    assert [step for step, _ in logged[f"plasticity/active_units/head/{name}"]] == [160]
    assert names(run_dir) == {".lock", "events.out", "result.json"}


@pytest.mark.parametrize("task", ["input", "label"])
def test_seeds_in_one_process_give_what_processes_of_their_own_give(play, tmp_path, task):
    flags, rates, seeds = dict(task=task, num_stages=3), (0.05, 0.01), (7, 8)
    play(CASE, num_seeds=2, first_seed=7, learning_rate=rates, **flags)
    for i, seed in enumerate(seeds):
        for j, rate in enumerate(rates):
            alone = dict(num_seeds=1, first_seed=seed, learning_rate=(rate,), exp_name=f"{i}{j}")
            play(CASE, **flags, **alone)
            for key in ("test_accuracy", "train_accuracy"):
                one = read_result(tmp_path, f"{i}{j}")[key][0]
                of_many = read_result(tmp_path)["sweep"][j][key][i]
                np.testing.assert_allclose(one, of_many, atol=0.03)  # an image on the edge or two


def test_a_diverged_replica_is_null_in_the_result_and_never_the_best(play, tmp_path, capsys):
    """Learning rate 1e9 diverges; the run is stopped with nan in its checkpoint, and continued."""
    flags = dict(layer_norm=False, crelu=False, reset_interval=0, metrics_interval=2, resume=True)
    with pytest.raises(SystemExit):
        play(CASE, {14: stop}, learning_rate=(1e9, 0.01), **flags)
    play(CASE, learning_rate=(1e9, 0.01), **flags)
    result = read_result(tmp_path)
    assert result["resumed_at"] == [14]
    diverged, finite = result["sweep"]
    assert diverged["test_accuracy"] == diverged["train_accuracy"] == [[None] * 4] * 2
    assert diverged["final_accuracy_mean"] is None
    assert diverged["final_accuracy_interval"] == [None, None]
    assert diverged["metrics"][0]["active_units/head"] == [None, None]
    assert result["learning_rate"] == 0.01
    play(CASE, exp_name="alone", learning_rate=(0.01,), **flags)
    assert read_result(tmp_path, "alone")["sweep"] == [finite]
    play(CASE, exp_name="all", learning_rate=(1e9,), **flags)
    assert "input: final test accuracy nan [nan, nan] over 2 seeds" in capsys.readouterr().out


def test_other_images_are_refused(play, tmp_path):
    with pytest.raises(SystemExit):
        play(CASE, {9: stop})
    before = contents(tmp_path / CASE.dir)
    write_images(tmp_path / "others", seed=1)
    with pytest.raises(SystemExit, match="was made with other images"):
        play(CASE, resume=True, data_dir=str(tmp_path / "others"))
    assert contents(tmp_path / CASE.dir) == before


def test_a_signal_during_an_evaluation_lets_it_end_and_loses_nothing(play, tmp_path, monkeypatch):
    original, stages = synth.evaluate, []

    def evaluate(replicas, stage):
        stages.append(stage)
        if stages == [0, 1]:
            stop()
        return original(replicas, stage)

    monkeypatch.setattr(synth, "evaluate", evaluate)
    with pytest.raises(SystemExit) as exit_info:
        play(CASE)
    assert exit_info.value.code == 143
    play(CASE, resume=True)
    assert stages == [0, 1, 2, 3]
    assert read_result(tmp_path)["resumed_at"] == [12]
