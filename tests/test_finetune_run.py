"""The fine-tuning script's runs: their files, and the promises about stopping and bad input.

What train() has word for word from the Atari script is tested there; here, what is of its own.
"""

import gzip
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from filelock import FileLock
from test_atari_run import KEYS, Recording, contents, names, read_result, scalars, wait_for
from test_finetune import NAMES, published_layout, save_encoder, write_video

import plastic_pretrained_finetune as ft

SCRIPT = Path(ft.__file__)
SMALL = dict(buffer_size=300, learning_starts=20, batch_size=4, hidden_dim=4, n_atoms=5)


def make_args(run_dir, **flags):
    encoder = {} if "pretrained_path" in flags else dict(from_scratch=True)
    flags = dict(device="cpu", total_timesteps=60, eval_episodes=1, exp_name="x") | SMALL | flags
    return ft.Args(run_dir=str(run_dir), **encoder | flags)


def pretrain_args(run_dir, **flags):
    flags = dict(pretrain_epochs=2, pretrain_batch_size=2, pretrain_length=3) | flags
    return ft.Args(run_dir=str(run_dir), mode="pretrain", device="cpu", exp_name="x", **flags)


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


# --- Fine-tuning, on a recording ------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch):
    """train(recording, args) -> the agent and the replay buffer as they are at the end."""
    kept = {}

    def keep(cls):
        class Kept(cls):
            def __init__(self, *args):
                super().__init__(*args)
                kept[cls.__name__] = self

        return Kept

    def train(recording, args):
        monkeypatch.setattr(ft, "make_envs", lambda *_: recording)
        ft.run(args)
        return kept["Agent"], kept["ReplayBuffer"]

    for cls in (ft.Agent, ft.ReplayBuffer):
        monkeypatch.setattr(ft, cls.__name__, keep(cls))
    value = lambda network, *_: [float(network.head.value.output.bias_mu.sum())]  # noqa: E731
    monkeypatch.setattr(ft, "evaluate", value)
    return train


def stop_at(step, signum=signal.SIGTERM):
    """A recording in the middle of whose step a signal comes."""
    recording = Recording()
    recording.at[step] = lambda: signal.raise_signal(signum)
    return recording


def stopped_run(tmp_path, train, **flags):
    """A run stopped at step 41; returns its directory."""
    with pytest.raises(SystemExit) as exit_info:
        train(stop_at(41), make_args(tmp_path, **flags))
    assert exit_info.value.code == 143
    return tmp_path / "Alien__x__1"


@pytest.mark.parametrize("anchor", ["init", "pretrained"])
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path, train, anchor):
    """Stopped where an episode ends: there the emulator's state is not missed.

    The encoder moves at resets, from or towards its first weights: a continued run must know them,
    whatever its file has become.
    """
    path = save_encoder(tmp_path / "encoder.pth", ft.Backbone())
    flags = dict(total_timesteps=90, reset_interval=50, shrink_perturb_anchor=anchor, sam_rho=0.1)
    flags |= dict(pretrained_path=path, log_interval=10, eval_interval=40, save_model=True)
    flags |= dict(metrics_interval=50) if anchor == "init" else dict(freeze_backbone=False)
    whole = Recording()
    agent, replay = train(whole, make_args(tmp_path / "whole", **flags))
    tensors = {**agent.tensors(), **replay.tensors()}
    generators = [torch.get_rng_state(), agent.generator.get_state()]

    broken = Recording()
    for step in (30, 60):
        broken.at = {step: lambda: signal.raise_signal(signal.SIGTERM)}
        with pytest.raises(SystemExit):
            train(broken, make_args(tmp_path / "broken", resume=True, **flags))
        assert broken.step_number == step
        torch.manual_seed(999)  # nothing may come from this process
        save_encoder(tmp_path / "encoder.pth", ft.Backbone())  # another one
    agent, replay = train(broken, make_args(tmp_path / "broken", resume=True, **flags))

    assert broken.actions == whole.actions
    for name, tensor in {**agent.tensors(), **replay.tensors()}.items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(agent.generator.get_state(), generators[1])
    runs = [tmp_path / run / "Alien__x__1" for run in ("whole", "broken")]
    logged = [scalars(run) for run in runs]
    for one in logged:
        del one["charts/SPS"]
    assert logged[0] == logged[1]
    results = [read_result(run) for run in runs]
    assert [result.pop("resumed_at") for result in results] == [[], [30, 60]]
    same = ("env_steps", "gradient_updates", "resets", "episode_returns")
    assert all(results[0][key] == results[1][key] for key in same)
    assert names(runs[1]) == {".lock", "events.out", "result.json", "model.pth"}

    (tmp_path / "encoder.pth").unlink()  # a finished run needs it no more
    before = contents(runs[1])
    train(broken, make_args(tmp_path / "broken", resume=True, **flags))
    assert contents(runs[1]) == before


def test_what_is_there_is_neither_taken_up_nor_lost_without_being_told(tmp_path, train):
    run_dir = stopped_run(tmp_path, train)
    (run_dir / "mine.txt").write_text("mine")
    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds an unfinished run; pass --resume or --overwrite"):
        train(Recording(), make_args(tmp_path))
    with pytest.raises(SystemExit, match=r"was made with --sam-rho 0.0; use that"):
        train(Recording(), make_args(tmp_path, resume=True, sam_rho=0.1))
    assert contents(run_dir) == before
    train(Recording(), make_args(tmp_path, overwrite=True))
    assert (read_result(run_dir)["env_steps"], read_result(run_dir)["resumed_at"]) == (60, [])
    assert len(list(run_dir.glob("events*"))) == 1

    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds a finished run; pass --resume or --overwrite, or"):
        train(Recording(), make_args(tmp_path))
    recording = Recording()
    train(recording, make_args(tmp_path, resume=True, log_interval=7))
    assert recording.actions == []
    assert contents(run_dir) == before
    train(Recording(), make_args(tmp_path, overwrite=True, sam_rho=0.2))
    assert read_result(run_dir)["args"]["sam_rho"] == 0.2
    assert names(run_dir) == {".lock", "events.out", "result.json", "mine.txt"}


def test_two_processes_never_work_in_one_directory(tmp_path, train):
    run_dir = tmp_path / "Alien__x__1"
    run_dir.mkdir()
    with FileLock(run_dir / ".lock"):
        for args in (make_args(tmp_path), pretrain_args(tmp_path)):
            with pytest.raises(SystemExit, match=f"another process is at work in {run_dir}"):
                train(Recording(), args)
    assert names(run_dir) <= {".lock"}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


FOREIGN = {
    "text": lambda path: path.write_text("not a checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pickle with code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file with code": lambda path: torch.save({"args": Evil(), "target": Evil()}, path),
    "another torch file": lambda path: torch.save({"weights": torch.ones(3)}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_gets_one_line_runs_no_code_and_stays(tmp_path, train, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = stopped_run(tmp_path, train) / "checkpoint.pth"
    FOREIGN[kind](path)
    before, file = contents(path.parent), str(path)
    for words, call in {
        "not a checkpoint of this script": lambda: train(
            Recording(), make_args(tmp_path, resume=True)
        ),
        "not a model that this script saved": lambda: ft.evaluate_saved(ft.Args(evaluate=file)),
        "not an encoder in SimTPR's layout": lambda: ft.load_pretrained(file),
        "not a model that plastic_drq_rainbow_atari.py saved": lambda: ft.load_player(file, "Pong"),
    }.items():
        with pytest.raises(SystemExit, match=rf"checkpoint.pth: {words} \(\w+") as exit_info:
            call()
        assert exit_info.value.code.count("\n") == 0
    assert contents(path.parent) == before
    assert not (tmp_path / "evil").exists()


# --- Pretraining ----------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """A directory with a video of 100 frames, read in three blocks; recordings are of noise."""
    monkeypatch.setattr(ft, "BLOCK_FRAMES", 40)
    monkeypatch.setattr(ft, "make_envs", lambda *_: Recording())
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos", NAMES[0], 100)
    return str(tmp_path / "videos")


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n): a signal comes in the n-th update of each pretraining from now on."""
    update = ft.pretrain_update

    def stop_after(number, signum=signal.SIGTERM):
        calls = []

        def updating(*args):
            calls.append(0)
            if len(calls) == number:
                signal.raise_signal(signum)
            return update(*args)

        monkeypatch.setattr(ft, "pretrain_update", updating)

    return stop_after


def encoder(run_dir):
    return torch.load(run_dir / "model.pth", weights_only=True)["model_state_dict"]


@pytest.mark.parametrize("stops", [(1,), (4, 3, 2)], ids=str)
def test_a_continued_pretraining_equals_an_unbroken_one_bit_for_bit(
    tmp_path, videos, stop_after, stops
):
    """Wherever it is stopped: in the middle of a block, too."""
    flags = dict(video_dir=videos, log_interval=1)
    ft.run(pretrain_args(tmp_path / "whole", **flags))
    for number in stops:
        stop_after(number)
        with pytest.raises(SystemExit) as exit_info:
            ft.run(pretrain_args(tmp_path / "broken", resume=True, **flags))
        assert exit_info.value.code == 143
        torch.manual_seed(99)  # nothing may come from this process
    stop_after(0)
    ft.run(pretrain_args(tmp_path / "broken", resume=True, **flags))
    runs = [tmp_path / run / "Alien__x__1" for run in ("whole", "broken")]
    assert all(torch.equal(w, encoder(runs[1])[name]) for name, w in encoder(runs[0]).items())
    results = [read_result(run) for run in runs]
    assert [result["resumed_at"] for result in results] == [[], list(np.cumsum(stops))]
    for key in ("frames", "blocks", "gradient_updates", "final_loss"):
        assert results[0][key] == results[1][key]
    assert scalars(runs[0]) == scalars(runs[1])
    assert len(scalars(runs[1])["losses/pretraining"]) == results[0]["blocks"] == 6
    assert names(runs[1]) == {".lock", "events.out", "result.json", "model.pth"}
    shapes = {name: tuple(w.shape) for name, w in encoder(runs[0]).items()}
    assert shapes == published_layout()


def test_the_loss_is_the_mean_over_a_blocks_updates(tmp_path, videos, monkeypatch):
    losses, update = [], ft.pretrain_update

    def updating(*args):
        losses.append(update(*args))
        return losses[-1]

    monkeypatch.setattr(ft, "pretrain_update", updating)
    ft.run(pretrain_args(tmp_path, video_dir=videos, pretrain_epochs=1))
    result = read_result(tmp_path / "Alien__x__1")
    steps = [step for step, _ in scalars(tmp_path / "Alien__x__1")["losses/pretraining"]]
    assert steps[-1] == result["gradient_updates"] == len(losses)
    means = [
        np.mean([float(each["loss"]) for each in losses[first:last]])
        for first, last in zip([0, *steps[:-1]], steps, strict=True)
    ]
    logged = scalars(tmp_path / "Alien__x__1")["losses/pretraining"]
    assert [value for _, value in logged] == pytest.approx(means)
    assert result["final_loss"] == pytest.approx(means[-1])


@pytest.mark.parametrize("interval, blocks", [(0, []), (2, [2, 4, 6]), ("auto", None)])
def test_checkpoints_of_a_pretraining(tmp_path, videos, monkeypatch, interval, blocks):
    """By blocks, or (auto) every 5 minutes, at 100 seconds an update here."""
    saved, save, clock = [], ft.save_checkpoint, time.perf_counter
    updates, update = [], ft.pretrain_update
    monkeypatch.setattr(ft, "pretrain_update", lambda *call: updates.append(0) or update(*call))
    monkeypatch.setattr(ft.time, "perf_counter", lambda: clock() + 100 * len(updates))
    spy = lambda *call: saved.append(call[2].blocks) or save(*call)  # noqa: E731
    monkeypatch.setattr(ft, "save_checkpoint", spy)
    ft.run(pretrain_args(tmp_path, video_dir=videos, checkpoint_interval=interval))
    if interval == "auto":
        assert len(saved) == len(updates) // 3
    else:
        assert saved == blocks


def test_what_a_dead_process_logged_after_its_checkpoint_is_not_shown(
    tmp_path, videos, monkeypatch
):
    flags = dict(video_dir=videos, checkpoint_interval=2)
    ft.run(pretrain_args(tmp_path / "whole", **flags))
    writers, writer, update = [], ft.SummaryWriter, ft.pretrain_update
    keep = lambda *args, **flags: writers.append(writer(*args, **flags)) or writers[-1]  # noqa: E731
    monkeypatch.setattr(ft, "SummaryWriter", keep)
    whole = scalars(tmp_path / "whole/Alien__x__1")
    third = whole["losses/pretraining"][2][0]  # update at the end of block 3
    updates = []

    def updating(*args):
        updates.append(0)
        if len(updates) > third:
            writers[0].close()
            raise ZeroDivisionError
        return update(*args)

    monkeypatch.setattr(ft, "pretrain_update", updating)
    with pytest.raises(ZeroDivisionError):
        ft.run(pretrain_args(tmp_path / "dead", **flags))
    assert len(scalars(tmp_path / "dead/Alien__x__1")["losses/pretraining"]) == 3
    monkeypatch.setattr(ft, "pretrain_update", update)
    ft.run(pretrain_args(tmp_path / "dead", resume=True, **flags))
    assert scalars(tmp_path / "dead/Alien__x__1") == whole


def test_a_second_signal_ends_the_process_at_once(tmp_path, videos, monkeypatch):
    handlers, update = [], ft.pretrain_update

    def updating(*args):
        handlers.append(signal.getsignal(signal.SIGTERM))
        signal.raise_signal(signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGTERM))
        return update(*args)

    monkeypatch.setattr(ft, "pretrain_update", updating)
    with pytest.raises(SystemExit) as exit_info:
        ft.run(pretrain_args(tmp_path, video_dir=videos))
    assert exit_info.value.code == 130
    assert handlers[0] != signal.SIG_DFL and handlers[1] == signal.SIG_DFL


def test_a_pretraining_goes_on_with_its_own_flags_and_videos_alone(tmp_path, videos, stop_after):
    stop_after(3)
    with pytest.raises(SystemExit):
        ft.run(pretrain_args(tmp_path, video_dir=videos))
    before = contents(tmp_path / "Alien__x__1")
    with pytest.raises(SystemExit, match=r"was made with --barlow-weight 0.01; use that"):
        ft.run(pretrain_args(tmp_path, video_dir=videos, resume=True, barlow_weight=0.02))
    write_video(Path(videos), NAMES[0], 60)
    with pytest.raises(SystemExit, match="videos of 60 frames, not 100"):
        ft.run(pretrain_args(tmp_path, video_dir=videos, resume=True))
    assert contents(tmp_path / "Alien__x__1") == before


def test_numbers_that_are_not_finite_end_a_pretraining_before_its_checkpoint(
    tmp_path, videos, monkeypatch
):
    original, calls = ft.pretraining_loss, []

    def faulty(*args):
        calls.append(0)
        return original(*args) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(ft, "pretraining_loss", faulty)
    with pytest.raises(
        SystemExit, match=r"update 5: .* not finite; lower --pretrain-learning-rate"
    ):
        ft.run(pretrain_args(tmp_path, video_dir=videos, checkpoint_interval=1))
    path = tmp_path / "Alien__x__1" / "checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in checkpoint["tensors"].values())
    assert not (path.parent / "model.pth").exists()


@pytest.mark.parametrize("given", [True, False])
def test_recorded_videos_survive_overwrite(tmp_path, videos, given):
    """Given as --video-dir, or made anew by the same flags: the same bytes."""
    flags = dict(collect_steps=60)
    run_dir = tmp_path / "Alien__x__1"
    ft.run(pretrain_args(tmp_path, **flags))
    (run_dir / "mine.txt").write_text("mine")
    before = contents(run_dir)
    flags |= dict(video_dir=str(run_dir)) if given else {}
    ft.run(pretrain_args(tmp_path, overwrite=True, barlow_weight=0.1, **flags))
    after = contents(run_dir)
    assert all(after[name] == before[name] for name in (*ft.RECORDED, "mine.txt"))
    assert after["model.pth"] != before["model.pth"]
    assert len(list(run_dir.glob("events*"))) == 1


def test_a_recording_is_used_where_a_checkpoint_vouches_for_it(
    tmp_path, videos, stop_after, monkeypatch
):
    """Else it may be of other flags: a run that was killed had no checkpoint yet."""
    run_dir, flags = tmp_path / "Alien__x__1", dict(collect_steps=60)
    run_dir.mkdir()
    write_video(run_dir, ft.RECORDED, 60)
    (run_dir / ".lock").touch()
    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds an unfinished run; pass --resume or --overwrite"):
        ft.run(pretrain_args(tmp_path, **flags))
    assert contents(run_dir) == before
    stop_after(1)
    with pytest.raises(SystemExit):
        ft.run(pretrain_args(tmp_path, resume=True, **flags))
    anew = contents(run_dir)
    assert all(anew[name] != before[name] for name in ft.RECORDED)
    stop_after(0)
    monkeypatch.setattr(ft, "record", lambda *_: 1 / 0)
    ft.run(pretrain_args(tmp_path, resume=True, **flags))
    assert all(contents(run_dir)[name] == anew[name] for name in ft.RECORDED)


def test_an_encoder_that_a_run_needs_survives_overwrite(tmp_path, videos, train):
    run_dir = tmp_path / "Alien__x__1"
    ft.run(pretrain_args(tmp_path, video_dir=videos))
    before = contents(run_dir)
    for path in (run_dir / "model.pth", run_dir / ".." / run_dir.name / "model.pth"):
        with pytest.raises(SystemExit, match=r"model.pth: this run would replace it"):
            train(Recording(), make_args(tmp_path, overwrite=True, pretrained_path=str(path)))
    assert contents(run_dir) == before


@pytest.mark.parametrize("kind", ["spoilt", "truncated", "short", "episodes", "empty", "no player"])
def test_an_overwrite_that_cannot_begin_loses_nothing(tmp_path, videos, kind):
    ft.run(pretrain_args(tmp_path, collect_steps=60))
    run_dir, flags = tmp_path / "Alien__x__1", dict(video_dir=videos)
    before = contents(run_dir)
    if kind == "spoilt":
        (Path(videos) / NAMES[0][1]).write_bytes(b"")
    elif kind == "truncated":
        path = Path(videos) / NAMES[0][0]
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "short":
        write_video(Path(videos), NAMES[0], 5)
    elif kind == "episodes":  # too short for a sequence
        with gzip.open(Path(videos) / NAMES[0][1], "wb") as file:
            np.save(file, np.ones(100, np.uint8))
    elif kind == "empty":
        flags = dict(video_dir=str(tmp_path))
    else:
        path = save_encoder(tmp_path / "player.pth", ft.Backbone())
        flags = dict(collect_policy="checkpoint", collect_model=path)
    with pytest.raises(SystemExit, match=r"^error: ") as exit_info:
        ft.run(pretrain_args(tmp_path, overwrite=True, **flags))
    assert exit_info.value.code.count("\n") == 0
    assert contents(run_dir) == before


def test_episodes_that_make_no_batch_end_the_pretraining_with_one_line(tmp_path, videos):
    write_video(Path(videos), NAMES[0], 40)
    with pytest.raises(SystemExit, match="lower --pretrain-length"):
        ft.run(
            pretrain_args(tmp_path, video_dir=videos, pretrain_batch_size=1 + 1, pretrain_length=17)
        )
    assert not (tmp_path / "Alien__x__1" / "model.pth").exists()


# --- Real games -----------------------------------------------------------------------------------

COMMON = "--env-id Pong --device cpu --torch-threads 1"
SIZES = "--pretrain-epochs 2 --pretrain-batch-size 4 --pretrain-length 4"
SHORT = "--total-timesteps 60 --learning-starts 20 --batch-size 4 --buffer-size 200 --hidden-dim 8"
SHORT += " --n-atoms 5 --eval-episodes 1 --log-interval 20"
PRETRAINING_KEYS = """script exp_name env_id seed args frames blocks gradient_updates final_loss
wall_clock_seconds resumed_at git_commit device versions""".split()


def start(directory, flags, shell=""):
    """The script as a process in `directory`, after some words in a shell of its own."""
    command = [sys.executable, str(SCRIPT), *COMMON.split(), *flags.split()]
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *command]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=directory, **pipes)


def script(directory, flags):
    process = start(directory, flags)
    output, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (0, "--evaluate" not in flags), error
    return output


def test_a_short_pretraining_then_fine_tuning_on_pong(tmp_path):
    output = script(tmp_path, f"--mode pretrain --collect-steps 200 {SIZES}")
    pretrained, tuned = tmp_path / "runs/Pong__pretrain__1", tmp_path / "runs/Pong__finetune__1"
    result = read_result(pretrained)
    assert list(result) == PRETRAINING_KEYS
    assert (result["frames"], result["blocks"], result["gradient_updates"]) == (200, 2, 14)
    assert f"loss {result['final_loss']:.3f} after 14 updates; runs/Pong__pretrain__1" in output

    flags = f"{SHORT} --sam-rho 0.1 --reset-interval 30 --metrics-interval 30 --save-model"
    output = script(tmp_path, f"{flags} --pretrained-path runs/Pong__pretrain__1/model.pth")
    result, logged = read_result(tuned), scalars(tuned)
    assert list(result) == KEYS
    assert (result["gradient_updates"], result["resets"]) == (82, 2)
    assert set(result["args"]) == set(ft.Args.__dataclass_fields__)
    assert f"Pong: mean return {result['mean_return']:.1f} over 1 games" in output
    assert [step for step, _ in logged["losses/td_loss"]] == [20, 40, 60]
    assert [step for step, _ in logged["plasticity/hessian_max_eigenvalue"]] == [30, 60]
    weights = torch.load(tuned / "model.pth", weights_only=True)["target"]
    first = encoder(pretrained)
    for name, w in first.items():  # Shrink & Perturb moves weights, and no statistics
        moved = not torch.equal(weights[name], w)
        assert moved == (not name.endswith(("running_mean", "running_var", "batches_tracked")))

    (pretrained / "model.pth").unlink()  # a saved model plays without its encoder's file
    again = script(tmp_path, f"--evaluate {tuned / 'model.pth'} --eval-episodes 1 --seed 9")
    assert output == f"{again.strip()}; runs/Pong__finetune__1/result.json\n"


def test_measuring_changes_nothing_of_what_is_learned(tmp_path):
    weights = []
    flags = dict(env_id="Pong", total_timesteps=45, sam_rho=0.1, reset_interval=20)
    flags |= dict(save_model=True)
    for i, others in enumerate([{}, dict(metrics_interval=30, eval_interval=30, log_interval=1)]):
        ft.run(make_args(tmp_path, **flags | others | dict(exp_name=str(i))))
        path = tmp_path / f"Pong__{i}__1" / "model.pth"
        weights.append(torch.load(path, weights_only=True)["target"])
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())


# --- Processes ------------------------------------------------------------------------------------


def test_a_pretraining_that_is_killed_ends_as_one_that_is_not(tmp_path):
    flags = f"--mode pretrain --collect-steps 60 {SIZES} --pretrain-batch-size 2 --resume"
    flags += " --pretrain-epochs 8 --checkpoint-interval 2"
    runs = [tmp_path / name for name in "ab"]
    for directory in runs:
        directory.mkdir()
    killed = runs[0] / "runs/Pong__pretrain__1"
    process = start(runs[0], flags)
    wait_for((killed / "checkpoint.pth").exists, process)
    process.kill()
    process.communicate()
    assert not (killed / "result.json").exists()
    for directory in runs:
        script(directory, flags)
    a, b = (encoder(directory / "runs/Pong__pretrain__1") for directory in runs)
    assert len(read_result(killed)["resumed_at"]) == 1
    assert all(torch.equal(w, b[name]) for name, w in a.items())


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_last_checkpoint_and_a_pretraining_goes_on(tmp_path, signum, code):
    flags = f"--mode pretrain --collect-steps 60 {SIZES} --pretrain-batch-size 2 --resume"
    flags += " --pretrain-epochs 15"
    run_dir = tmp_path / "runs/Pong__pretrain__1"
    process = start(tmp_path, flags)
    wait_for(lambda: any(p.stat().st_size > 200 for p in run_dir.glob("events*")), process)
    time.sleep(0.5)  # by then, an update is under way
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    update = checkpoint["counters"]["gradient_updates"]
    assert (process.returncode, error.splitlines()[1:]) == (
        code,
        [f"stopped after update {update}"],
    )
    script(tmp_path, flags)
    assert read_result(run_dir)["resumed_at"] == [update]


def test_a_signal_during_the_recording_leaves_nothing_that_counts(tmp_path):
    run_dir = tmp_path / "runs/Pong__pretrain__1"
    process = start(tmp_path, "--mode pretrain --collect-steps 1000000")
    wait_for((run_dir / f"{ft.RECORDED[0]}.tmp").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert names(run_dir) == {".lock", f"{ft.RECORDED[0]}.tmp"}
    script(tmp_path, f"--mode pretrain --collect-steps 60 {SIZES}")
    assert names(run_dir) == {".lock", "events.out", "result.json", "model.pth", *ft.RECORDED}


def test_a_disk_that_is_full_during_the_recording_is_one_line(tmp_path):
    flags = "--mode pretrain --collect-steps 100000"
    process = start(tmp_path, flags, shell='ulimit -f 100; trap "" XFSZ;')
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "error: [Errno 27] File too large\n")
    assert not (tmp_path / "runs/Pong__pretrain__1" / ft.RECORDED[0]).exists()


# --- Bad input ------------------------------------------------------------------------------------

SCRATCH = "--from-scratch"
BAD_FLAGS = {  # and a word that the message must have
    "--mode pretrain --track": "--track is of --mode finetune",
    "--from-scratch --collect-policy checkpoint": "are of --mode pretrain",
    "": "--from-scratch", "--from-scratch --pretrained-path x": "one of them",
    "--pretrained-path missing.pth": "missing.pth",
    "--mode pretrain --from-scratch": "--mode finetune",
    "--mode pretrain --pretrained-path x": "--mode finetune",
    f"{SCRATCH} --video-dir .": "--mode pretrain",
    f"{SCRATCH} --collect-model x": "--mode pretrain",
    "--mode pretrain --collect-policy checkpoint": "--collect-model",
    "--mode pretrain --collect-model x": "--collect-policy",
    "--mode pretrain --collect-policy checkpoint --collect-model x": "x: not a file",
    "--mode pretrain --video-dir . --collect-policy checkpoint --collect-model x": "--video-dir",
    "--mode pretrain --video-dir missing": "missing: not a directory",
    "--mode pretrain --collect-steps 895": "--collect-steps", "--mode train": "--mode",
    "--mode pretrain --pretrain-length 1": "--pretrain-length",
    "--mode pretrain --pretrain-batch-size 1": "--pretrain-batch-size",
    "--mode pretrain --pretrain-epochs 0": "--pretrain-epochs",
    "--mode pretrain --pretrain-learning-rate nan": "--pretrain-learning-rate",
    "--mode pretrain --barlow-weight -1": "--barlow-weight",
    "--mode pretrain --exp-name a/b": "--exp-name", "--mode pretrain --env-id Alein": "Alien",
    f"{SCRATCH} --shrink-perturb-alpha 1.5": "--shrink-perturb-alpha",
    f"{SCRATCH} --shrink-perturb-anchor x": "--shrink-perturb-anchor",
    f"{SCRATCH} --resume --overwrite": "--overwrite", f"{SCRATCH} --seed -1": "--seed",
    f"{SCRATCH} --learning-starts 19": "--n-step", f"{SCRATCH} --v-min 10": "--v-min",
    f"{SCRATCH} --total-timesteps 2000": "--total-timesteps",
    f"{SCRATCH} --sam-rho nan": "--sam-rho",
    f"{SCRATCH} --layer-norm-scope backbone": "--layer-norm-scope",
    "--evaluate missing.pth": "missing.pth",
}  # fmt: skip
if find_spec("wandb") is None:
    BAD_FLAGS[f"{SCRATCH} --track"] = "pip install wandb"


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gets_one_message_and_code_2_and_nothing_is_written(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(ft.Args, args=flags.split())
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert BAD_FLAGS[flags] in error
    assert error.count("For full helptext") == 1  # tyro's box
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(ft.Args, args=["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in ft.Args.__dataclass_fields__)
    lines = SCRIPT.read_text().split("class Args:")[1].split("def __post_init__")[0].splitlines()
    flags = [i for i, line in enumerate(lines) if line[4:5].isalpha() and " = " in line]
    assert len(flags) == len(ft.Args.__dataclass_fields__)
    assert all("  # " in lines[i] or lines[i - 1].startswith("    # ") for i in flags)
