"""The synthetic script's run beyond what all scripts promise (test_promises.py)."""

import json
from itertools import pairwise

import numpy as np
import pytest
from runs import CASES, contents, scalars, stop, synth
from test_synth import write_images

CASE = CASES["synth"]


def read_result(tmp_path, name="x"):
    """Strictly JSON, which has no NaN."""
    not_json = lambda constant: pytest.fail(f"{constant} is not JSON")  # noqa: E731
    (path,) = tmp_path.glob(f"*__{name}__*/result.json")
    return json.loads(path.read_text(), parse_constant=not_json)


def test_a_run_learns_and_its_result_is_that_of_the_best_setting(play, tmp_path):
    flags = dict(learning_rate=(1e-6, 0.02), updates_per_stage=40, metrics_interval=4)
    play(CASE, num_seeds=3, reset_interval=0, log_interval=4, **flags)
    result = read_result(tmp_path)
    worse, best = result["sweep"]
    assert (result["num_seeds"], result["task"], result["learning_rate"]) == (3, "input", 0.02)
    assert {**result, **best} == result and result["metrics"] != worse["metrics"]
    assert best["final_accuracy_mean"] > 0.8 > 0.3 > worse["final_accuracy_mean"]
    assert np.shape(result["test_accuracy"]) == np.shape(result["train_accuracy"]) == (3, 4)
    for (measured,) in (best["metrics"], worse["metrics"]):
        assert measured.pop("stage") == 3
        assert {"hessian_max_eigenvalue", "active_units/backbone"} <= set(measured)
        assert {len(values) for values in measured.values()} == {3}
    assert 0 < result["training_seconds"] < result["wall_clock_seconds"]
    assert result["updates_per_second"] == pytest.approx(160 / result["training_seconds"])

    logged, name = scalars(tmp_path / "input__x__1-3"), "lr_0.02_decay_0.001"
    means = np.mean(result["test_accuracy"], axis=0)
    steps = zip((40, 80, 120, 160), means, strict=True)
    assert logged[f"test_accuracy/{name}"] == [(step, pytest.approx(mean)) for step, mean in steps]
    assert [step for step, _ in logged[f"losses/{name}"]] == list(range(4, 161, 4))
    assert [step for step, _ in logged[f"plasticity/active_units/head/{name}"]] == [160]


def test_many_seeds_and_settings_give_what_a_process_of_its_own_gives(play, tmp_path):
    play(CASE, task="label", num_seeds=2, first_seed=7, learning_rate=(0.05, 0.01))
    play(CASE, task="label", num_seeds=1, first_seed=8, exp_name="alone")
    assert {p.name for p in tmp_path.glob("label*")} == {"label__x__7-8", "label__alone__8-8"}
    alone, of_many = read_result(tmp_path, "alone"), read_result(tmp_path)["sweep"][1]
    for key in ("test_accuracy", "train_accuracy"):  # but for an image on the edge or two
        np.testing.assert_allclose(alone[key][0], of_many[key][1], atol=0.03)


def test_other_methods_learn_and_continue_bit_for_bit(play, tmp_path):
    """As the others do in test_promises.py, in the middle of a stage."""
    flags = dict(redo_interval=5, redo_tau=0.3, l2_init=True, weight_clip=3.0, resume=True)
    flags |= dict(tortoise_interval=2, tortoise_ema=0.8, shrink_perturb_alpha=0.8)
    flags |= dict(updates_per_stage=20, batch_size=32, learning_rate=(0.03,), metrics_interval=4)
    play(CASE, exp_name="whole", **flags)
    with pytest.raises(SystemExit):
        play(CASE, {33: stop}, **flags)
    play(CASE, **flags)
    broken, whole = read_result(tmp_path), read_result(tmp_path, "whole")
    assert broken["resumed_at"] == [33] and broken["sweep"] == whole["sweep"]
    assert whole["final_accuracy_mean"] > 0.3


def test_a_diverged_replica_is_null_in_the_result_and_never_the_best(play, tmp_path, capsys):
    """Learning rate 1e9 diverges; the run is stopped with nan in its checkpoint, and continued."""
    flags = dict(layer_norm=False, crelu=False, reset_interval=0, metrics_interval=2, resume=True)
    with pytest.raises(SystemExit):
        play(CASE, {14: stop}, learning_rate=(1e9, 0.01), **flags)
    play(CASE, learning_rate=(1e9, 0.01), **flags)
    play(CASE, exp_name="alone", **flags)
    result = read_result(tmp_path)
    diverged, finite = result["sweep"]
    assert diverged["test_accuracy"] == diverged["train_accuracy"] == [[None] * 4] * 2
    assert diverged["final_accuracy_mean"] is None
    assert diverged["final_accuracy_interval"] == [None, None]
    assert diverged["metrics"][0]["active_units/head"] == [None, None]
    assert result["learning_rate"] == 0.01
    assert [finite] == read_result(tmp_path, "alone")["sweep"]
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


def test_a_stages_accuracies_are_of_its_own_images_and_stay_apart(play, tmp_path, monkeypatch):
    """An accuracy here tells which images it is of: how many, and from which half of the files."""
    asked = []

    def accuracy(replicas, images, labels, index):
        test = images is replicas.test_images
        asked.append((test, [set(row.tolist()) for row in index]))
        return [len(row) / 1000 + (0.5 if test else 0) for row in index]

    monkeypatch.setattr(synth, "accuracy", accuracy)
    play(CASE)  # of 200 images in four stages, 40 for the test
    result = read_result(tmp_path)
    assert result["train_accuracy"] == [pytest.approx([0.05, 0.1, 0.15, 0.2])] * 2
    assert result["test_accuracy"] == [pytest.approx([0.54] * 4)] * 2
    trained = [rows for test, rows in asked if not test]
    for early, late in pairwise(trained):  # the images before are there, too
        assert all(a < b for a, b in zip(early, late, strict=True))


def test_the_best_setting_is_the_one_that_ends_best(play, tmp_path, monkeypatch):
    """Not the one that is better on the way: the first one is, and the second ends higher."""
    curves = iter([[0.8, 0.1], [0.8, 0.1], [0.8, 0.2], [0.3, 0.4]])
    measured = lambda *_: dict.fromkeys(("train_accuracy", "test_accuracy"), next(curves))  # noqa: E731
    monkeypatch.setattr(synth, "evaluate", measured)
    play(CASE, num_seeds=1, learning_rate=(0.05, 0.01))
    result = read_result(tmp_path)
    assert (result["learning_rate"], result["final_accuracy_mean"]) == (0.01, 0.4)
