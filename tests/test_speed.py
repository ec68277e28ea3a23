"""The speed benchmark measures what it says."""

import json
import pkgutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import speed

SPEED = Path(__file__).parent.parent / "benchmark" / "speed.py"


class Work:
    """Parts of known length on a clock of its own."""

    seconds, runs = 0.0, 0

    def inner(self):
        Work.seconds += 0.005

    def outer(self):
        Work.seconds += 0.015
        self.inner()

    @contextmanager
    def block(self):
        Work.seconds += 0.002
        yield
        Work.seconds += 0.003

    def run(self):
        """36 ms: 20 in outer, 5 in inner, 10 in the block, 1 besides. Some calls take 1 s more."""
        self.outer()
        self.inner()
        with self.block():
            self.inner()
        Work.seconds += 0.001
        # Of 15 calls, 5 to warm up and 10 that count, the first 9.
        Work.seconds += (Work.runs % 15) < 9
        Work.runs += 1


def test_medians_and_parts(monkeypatch):
    """Of calls within calls the outer one counts; slow calls and warm-up move no median."""
    monkeypatch.setattr(speed.time, "perf_counter", lambda: Work.seconds)
    work = Work()
    subject = speed.Subject(work.run, {"update_ms": work.run}, updates=100, seeds=2)
    functions = {"inner": "Work.inner", "outer": "Work.outer", "sam": "Work.block"}
    functions = {label: f"{__name__}.{name}" for label, name in functions.items()}
    monkeypatch.setattr(Work, "runs", 0)
    turn = speed.take_turn(subject, functions, 10, "cpu")
    parts = {"outer": 20, "inner": 5, "sam": 10, "other": 1}
    assert turn.pop("parts_ms") == pytest.approx(parts)
    assert turn == pytest.approx({"update_ms": 36, "eager_update_ms": 36})
    with speed.clocked(functions, "cpu") as ms:
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
    assert (figures["updates_per_second"], figures["update_ms_per_seed"]) == (50, 10)
    assert figures["env_steps_per_second"] == 250
    hours = (100 * 20 + 50 * (2 + 4)) / 1000 / 3600
    assert figures["full_run_hours_without_evaluation"] == pytest.approx(hours)


# What a full run makes, updates and steps of the environment, and the methods.
SCRIPTS = {
    "plastic_drq_rainbow_atari": (196_002, 100_000, ["base", "PLASTIC†", "PLASTIC"]),
    "plastic_drq_sac_dmc": (999_001, 1_000_000, ["base", "PLASTIC", "PLASTIC, fast rendering"]),
    "plastic_pretrained_finetune": (196_002, 100_000, ["base", "SAM, Reset†", "base, not frozen"]),
    "synth_cifar_plasticity": (
        *(50_000, 0),
        ["base, 1 seeds", "base, 3 seeds", "SAM, 1 seeds", "SAM, 3 seeds"],
    ),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS if "atari" not in name]


@pytest.mark.parametrize("script", ["plastic_drq_rainbow_atari", *SLOW])
def test_a_quick_run_writes_all_figures(tmp_path, script):
    path = tmp_path / "speed.json"
    command = [sys.executable, str(SPEED), "--device", "cpu", "--quick", "--json", str(path)]
    command += ["--script", f"{script}.py"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert figures["torch"] == torch.__version__
    updates, env_steps, methods = SCRIPTS[script]
    assert list(figures[f"{script}.py"]) == methods
    for method, figure in figures[f"{script}.py"].items():
        parts = {*speed.SCRIPTS[script][2], "other"}
        if method not in ("PLASTIC", "PLASTIC, fast rendering"):
            parts -= {"sam"}
        assert set(figure["parts_ms"]) == parts  # each function is still called by this name
        assert all(ms > 0 for ms in figure["parts_ms"].values())
        step_ms = figure["act_ms"] + figure["env_step_ms"] if env_steps > 0 else 0
        hours = (updates * figure["update_ms"] + env_steps * step_ms) / 3.6e6
        assert figure["full_run_hours_without_evaluation"] == pytest.approx(hours)
        assert ("render_ms" in figure) == (script == "plastic_drq_sac_dmc")
        assert f"{script} {method} on" in finished.stdout
        if "atari" in script:  # 0.66 GiB of frames, 0.13 of 7 million floats five times
            assert 0.7 < figure["memory_gib"] < 1.5
        if "synth" in script:
            seeds = int(method.split()[1])
            assert figure["update_ms_per_seed"] == pytest.approx(figure["update_ms"] / seeds)


def test_the_functions_that_it_measures_exist():
    for script, (_, _, functions) in speed.SCRIPTS.items():
        for name in functions.values():
            assert callable(pkgutil.resolve_name(f"{script}.{name}"))


def test_a_missing_directory_is_said_before_anything_is_measured(tmp_path):
    command = [sys.executable, str(SPEED), "--json", str(tmp_path / "no" / "speed.json")]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "no such directory" in finished.stderr
