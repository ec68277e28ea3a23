"""The speed benchmark measures what it says."""

import json
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
    """Parts of known length on a clock of its own; the outer one, 20 ms, calls the inner one, 5 ms."""

    seconds = 0.0

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
        self.outer()
        self.inner()
        with self.block():
            self.inner()


def test_parts_are_attributed_to_the_outer_label_and_add_up(monkeypatch):
    monkeypatch.setattr(speed.time, "perf_counter", lambda: Work.seconds)
    work, clock = Work(), speed.Clock("cpu")
    subject = speed.Subject(
        update=work.run,
        eager_update=work.run,
        act=lambda: 0,
        env_step=lambda: None,
        parameters=0,
        env_steps=0,
        updates=0,
        parts={"inner": (Work, "inner"), "outer": (Work, "outer")},
        blocks={"block": (Work, "block")},
    )
    with speed.instrumented(subject, clock):
        work.run()
        work.run()
    # "inner": the calls on its own, neither those inside outer nor those inside the block.
    assert clock.collect() == pytest.approx({"outer": 40, "inner": 10, "block": 20})
    assert clock.collect() == {}
    work.run()  # the instruments are gone
    assert clock.collect() == {}
    assert speed.median_ms(work.run, 5, "cpu") == pytest.approx(35)


def test_a_quick_run_writes_all_figures(tmp_path):
    path = tmp_path / "speed.json"
    command = [sys.executable, str(SPEED), "--device", "cpu", "--quick", "--json", str(path)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())
    assert figures["torch"] == torch.__version__
    methods = figures["plastic_drq_rainbow_atari.py"]
    others = ["two products", "contiguous", "loop Adam", "plain"]
    assert list(methods) == [
        "base",
        *(f"base, {o}" for o in others),
        "PLASTIC†",
        "PLASTIC",
        "PLASTIC, plain",
    ]
    for name, figure in methods.items():
        parts = figure["parts_ms"]
        assert set(parts) >= {
            "sample",
            "augment",
            "td_target",
            "forward",
            "backward",
            "optimizer",
            "ema",
            "other",
        }
        assert ("sam" in parts) == (name.startswith("PLASTIC") and "†" not in name)
        assert all(ms > 0 for ms in parts.values())
        assert figure["floor_ms"] > 0
        assert (
            0.7 < figure["memory_gib"] < 1.5
        )  # 0.66 GiB of frames, 0.13 of 7 million floats five times
        hours = 100_000 * (figure["act_ms"] + figure["env_step_ms"]) + 196_002 * figure["update_ms"]
        assert abs(figure["full_run_hours_without_evaluation"] * 3.6e6 / hours - 1) < 1e-6
    methods = figures["plastic_drq_sac_dmc.py"]
    assert list(methods) == ["base", "PLASTIC", "PLASTIC, fast rendering"]
    for name, figure in methods.items():
        names = {"sample", "augment", "td_target", "critic forward", "actor forward", "backward"}
        names |= {"optimizers", "ema", "other"}
        names |= {"sam"} if name.startswith("PLASTIC") else set()
        assert set(figure["parts_ms"]) == names
        hours = (
            1_000_000 * (figure["act_ms"] + figure["env_step_ms"]) + 999_001 * figure["update_ms"]
        )
        assert abs(figure["full_run_hours_without_evaluation"] * 3.6e6 / hours - 1) < 1e-6
    methods = figures["plastic_pretrained_finetune.py"]
    assert list(methods) == [
        "base",
        "SAM, Reset†",
        *(f"base, {o}" for o in ("each pass", "contiguous", "not frozen")),
    ]
    for figure in methods.values():
        parts = {
            "sample",
            "augment",
            "encoder",
            "head",
            "noise",
            "backward",
            "optimizer",
            "ema",
            "priorities",
            "other",
        }
        assert set(figure["parts_ms"]) == parts | {"clip"}
        hours = 100_000 * (figure["act_ms"] + figure["env_step_ms"]) + 196_002 * figure["update_ms"]
        assert abs(figure["full_run_hours_without_evaluation"] * 3.6e6 / hours - 1) < 1e-6
    methods = figures["synth_cifar_plasticity.py"]
    cases = ("plain loop", "1 seeds", "3 seeds")
    assert list(methods) == [f"{method}, {case}" for method in ("base", "SAM") for case in cases]
    for name, figure in methods.items():
        seeds = 1 if "plain" in name else int(name.split()[1])
        assert figure["update_ms_per_seed"] == figure["update_ms"] / seeds > 0
        if "plain" not in name:
            assert set(figure["parts_ms"]) == {"batch", "forward", "backward", "sgd", "other"}


VARIANTS = {
    "atari": [
        "base, two products",
        "base, contiguous",
        "base, loop Adam",
        "base, plain",
        "PLASTIC, plain",
    ],
    "finetune": ["base, each pass", "base, contiguous"],
}


@pytest.mark.parametrize("script", VARIANTS)
def test_the_variants_compute_the_same_update(monkeypatch, script):
    """One choice made the other way changes the time, not the numbers."""
    weights = {}
    module = getattr(speed, f"{script}_script")
    original = module.Agent

    class KeptAgent(original):
        def __init__(self, *args):
            torch.manual_seed(0)
            super().__init__(*args)
            KeptAgent.last = self

    monkeypatch.setattr(module, "Agent", KeptAgent)
    for name, prepare in getattr(speed, script)("cpu", quick=True).items():
        subject = prepare()
        with speed.patched(subject):
            for _ in range(2):
                subject.update()
        weights[name] = torch.cat([w.detach().flatten() for w in KeptAgent.last.parameters])
    for name in VARIANTS[script]:
        torch.testing.assert_close(weights[name], weights[name.split(",")[0]], rtol=0, atol=1e-5)


def test_a_missing_directory_is_said_before_anything_is_measured(tmp_path):
    command = [sys.executable, str(SPEED), "--json", str(tmp_path / "no" / "speed.json")]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "no such directory" in finished.stderr
