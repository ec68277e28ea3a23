"""Fixtures of several files, and what holds for all tests.

One thread per process: the networks are small, and other work may share the cores. Ctrl-C and
hang-up as a terminal has them: background jobs and nohup ignore them, which children inherit.
"""

import functools
import gzip
import os
import signal

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Event files of one second are read in the order of their names, which end with a counter: 99 comes
# after 100. Runs have a process each; tests make many files in one.
from tensorboard.summary.writer import event_file_writer  # noqa: E402

event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000)


@pytest.fixture(autouse=True)
def signal_handlers():
    """pytest's own come back after a run that caught signals."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A directory with CIFAR-10's files, a video of 17 frames, and a random encoder."""
    import torch
    from test_synth import write_images

    from plastic_pretrained_finetune import Backbone

    directory = tmp_path_factory.mktemp("data")
    write_images(directory)
    frames = np.random.default_rng(0).integers(256, size=(17, 84, 84), dtype=np.uint8)
    ends = np.arange(17) == 8
    for name, array in (("observation", frames), ("terminal", ends.astype(np.uint8))):
        with gzip.open(directory / f"{name}_1_0.gz", "wb") as file:
            np.save(file, array)
    state = {f"backbone.{name}": w for name, w in Backbone().state_dict().items()}
    torch.save({"model_state_dict": state}, directory / "encoder.pth")
    return directory


@pytest.fixture
def play(monkeypatch, tmp_path, data):
    """play(case, {n: what happens in its n-th step}, **flags) makes a run in this process.

    Returns how many steps it made; its directory is tmp_path / case.dir.
    """
    import runs

    small = functools.partial(runs.ft.SimTPR, width=32, layers=1, heads=2)
    monkeypatch.setattr(runs.ft, "SimTPR", small)

    def play(case, events=None, **flags):
        steps = []

        def happen():
            steps.append(0)
            (events or {}).get(len(steps), lambda: None)()

        with monkeypatch.context() as patch:
            runs.replace(patch, case, happen)
            flags = dict(run_dir=str(tmp_path)) | flags
            case.script.run(case.script.Args(**runs.flags_of(case, data, **flags)))
        return len(steps)

    return play
