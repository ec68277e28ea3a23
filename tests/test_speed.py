"""The speed benchmark measures what it says."""

import json
import pkgutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import speed
import torch

SPEED = Path(__file__).parent.parent / "benchmark" / "speed.py"


class Work:
    """Parts of known length on a clock of its own."""

    seconds, runs = 0.0, 0

    def inner(self):
        Work.seconds += 0.005

    def outer(self):
        Work.seconds += 0.015
        self.inner()

    def run(self):
        """36 ms: 20 in outer, 5 in inner, 10 in the block, 1 besides. Some calls take 1 s more."""
        self.outer()
        self.inner()
        with sam_perturbed():
            self.inner()
        Work.seconds += 0.001
        # Of 15 calls, 5 to warm up and 10 that count, the first 9.
        Work.seconds += (Work.runs % 15) < 9
        Work.runs += 1


@contextmanager
def sam_perturbed():
    Work.seconds += 0.002
    yield
    Work.seconds += 0.003


def test_medians_and_parts(monkeypatch):
    """Of calls within calls the outer one counts; slow calls and warm-up move no median."""
    monkeypatch.setattr(speed.time, "perf_counter", lambda: Work.seconds)
    names = "Work.inner Work.outer sam_perturbed"
    monkeypatch.setitem(speed.SCRIPTS, __name__, (None, None, names))
    monkeypatch.setattr(Work, "runs", 0)
    work = Work()
    subject = speed.Subject(work.run, {"update_ms": work.run}, updates=100)
    turn = speed.take_turn(subject, __name__, 10, "cpu")
    parts = {"Work.outer": 20, "Work.inner": 5, "sam_perturbed": 10, "other": 1}
    assert turn.pop("parts_ms") == pytest.approx(parts)
    assert turn == pytest.approx({"update_ms": 36, "eager_update_ms": 36})
    with speed.clocked(__name__, names.split(), "cpu") as ms:
        pass
    work.run()  # the clock has left the functions
    assert not ms


def test_what_follows_from_the_turns():
    """Medians of three turns; a run is 100 updates and 50 steps of the environment."""
    subject = speed.Subject(None, {}, updates=100, env_steps=50, seeds=2)
    turns = [
        {"update_ms": ms, "act_ms": 2, "env_step_ms": 4, "parts_ms": {"sample": ms / 2}}
        for ms in (1000, 20, 10)
    ]
    figures = speed.summarise(subject, turns)
    assert (figures["update_ms"], figures["parts_ms"]) == (20, {"sample": 10})
    assert figures["update_ms_per_seed"] == 10
    hours = (100 * 20 + 50 * (2 + 4)) / 1000 / 3600
    assert figures["full_run_hours_without_evaluation"] == pytest.approx(hours)


# What a full run makes: updates, steps of the environment.
RUNS = {
    "plastic_drq_rainbow_atari": (196_002, 100_000),
    "plastic_drq_sac_dmc": (999_001, 1_000_000),
    "plastic_pretrained_finetune": (196_002, 100_000),
    "synth_cifar_plasticity": (50_000, 0),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS if "atari" not in name]


@pytest.mark.parametrize("script", ["plastic_drq_rainbow_atari", *SLOW])
def test_a_quick_run_writes_all_figures(tmp_path, script):
    path = tmp_path / "speed.json"
    command = [sys.executable, str(SPEED), "--quick", "--json", str(path)]
    command += ["--script", f"{script}.py"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert figures["torch"] == torch.__version__
    _, methods, functions = speed.SCRIPTS[script]
    assert list(figures[f"{script}.py"]) == list(methods)
    for method, figure in figures[f"{script}.py"].items():
        parts = {*functions.split(), "other"}
        if "PLASTIC" not in method or "†" in method:
            parts -= {"sam_perturbed"}
        assert set(figure["parts_ms"]) == parts  # each function is still called by this name
        assert all(ms > 0 for ms in figure["parts_ms"].values())
        updates, env_steps = RUNS[script]
        step_ms = figure["act_ms"] + figure["env_step_ms"] if env_steps > 0 else 0
        hours = (updates * figure["update_ms"] + env_steps * step_ms) / 3.6e6
        assert figure["full_run_hours_without_evaluation"] == pytest.approx(hours)
        assert ("render_ms" in figure) == ("dmc" in script)
        assert f"{script} {method} on" in finished.stdout
        if "atari" in script:  # 0.66 GiB of frames, 0.13 of 7 million floats five times
            assert 0.7 < figure["memory_gib"] < 1.5
        if "synth" in script:
            seeds = int(method.split()[1])
            assert figure["update_ms_per_seed"] == pytest.approx(figure["update_ms"] / seeds)


def test_the_functions_that_it_measures_exist():
    for script, (_, _, functions) in speed.SCRIPTS.items():
        for name in functions.split():
            assert callable(pkgutil.resolve_name(f"{script}.{name}"))


def test_a_missing_directory_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        speed.Args(json=tmp_path / "no" / "speed.json")
