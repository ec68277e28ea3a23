"""The Atari script's run beyond what all scripts promise (test_promises.py)."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from runs import CASES, Recording, atari, scalars, start, stop, wait_for


def test_a_life_that_was_cut_off_ends_and_its_windows_are_never_sampled(play, monkeypatch):
    """Stopped at step 14, the fourth of its episode, and continued with a new one; n = 3.

    A transition's slot is its step less 1 before the cut and its step after it: slot 14 has the
    frame that nobody acted on. Slots 12 and 13 saw no frame 3 steps on.
    """
    kept = []

    class Kept(atari.ReplayBuffer):
        def start(self, frame):
            kept.append(self)
            super().start(frame)

    monkeypatch.setattr(atari, "ReplayBuffer", Kept)
    with pytest.raises(SystemExit):
        play(CASES["atari"], {14: stop})
    play(CASES["atari"], resume=True)
    replay = kept[-1]
    # Slot 0 has made room: a run of 30 steps has a buffer of 30.
    assert replay.cursor == 31
    assert replay.priorities.nonzero().flatten().tolist() == [*range(1, 12), *range(15, 31)]


@pytest.mark.parametrize("name", ["atari", "finetune"])
def test_a_continued_run_begins_with_other_no_ops_than_any_before(name, play, monkeypatch):
    monkeypatch.setattr(Recording, "seeds", [])
    with pytest.raises(SystemExit):
        play(CASES[name], {14: stop})
    play(CASES[name], resume=True)
    assert Recording.seeds[1] == 1
    assert Recording.seeds[-1] not in (1, *range(20_000, 30_000))  # of the evaluation


def test_any_of_envpools_atari_games_is_allowed():
    for game in ("Alien", "Tetris", "Adventure", "UpNDown"):
        assert atari.Args(env_id=game).env_id == game


@pytest.mark.soak
def test_memory_stays_flat_for_half_an_hour(tmp_path):
    """PLASTIC at full size, with metrics, evaluations and checkpoints. Prints memory by tenths."""
    run_dir, samples = tmp_path / "Alien__x__1", []
    flags = dict(run_dir=".", exp_name="x", device="cpu", torch_threads=1, learning_starts=20)
    flags |= dict(checkpoint_interval=200, metrics_interval=200, eval_interval=400, eval_episodes=2)
    process = start(CASES["atari"], flags, tmp_path)
    wait_for((run_dir / "checkpoint.pth").exists, process, 600)
    begin = time.monotonic()
    while time.monotonic() - begin < 60 * float(os.environ.get("SOAK_MINUTES", "30")):
        assert process.poll() is None, process.communicate()
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        samples.append(pages * os.sysconf("SC_PAGESIZE") / 2**20)
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    medians = [np.median(part) for part in np.array_split(samples, 10)]
    print("\nresident MiB by tenths:", ", ".join(f"{mib:.0f}" for mib in medians))
    print("steps:", scalars(run_dir)["losses/td_loss"][-1][0])
    assert max(medians[2:]) - medians[1] < 50, medians
