"""The fine-tuning script's runs beyond what all scripts promise (test_promises.py)."""

import gzip
import signal

import numpy as np
import pytest
import torch
from runs import CASES, contents, flags_of, ft, names, read_result, scalars, start, stop, wait_for

TUNE, PRETRAIN = CASES["finetune"], CASES["pretrain"]
RECORD = dict(video_dir=None, collect_steps=17)


def save_array(path, array):
    with gzip.open(path, "wb") as file:
        np.save(file, array)


@pytest.fixture
def videos(tmp_path, data):
    """The session's video, to be changed."""
    for name in ft.RECORDED:
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / name).write_bytes((data / name).read_bytes())
    return tmp_path / "videos"


# --- Fine-tuning ----------------------------------------------------------------------------------


def test_a_pretrained_encoder_is_tuned_and_needed_no_more(play, tmp_path):
    """Shrink & Perturb moves weights, and no statistics; --evaluate and --resume on a finished run
    do without the encoder's file. A continued run has its first weights in the checkpoint."""
    play(PRETRAIN, exp_name="p")
    path = tmp_path / "Alien__p__1" / "model.pth"
    first = torch.load(path, weights_only=True)["model_state_dict"]
    backbone = ft.Backbone().state_dict()
    assert {n: w.shape for n, w in first.items()} == {
        f"backbone.{n}": w.shape for n, w in backbone.items()
    }
    flags = dict(pretrained_path=str(path), reset_interval=15, save_model=True, resume=True)
    play(TUNE, exp_name="init", **flags)
    model = torch.load(tmp_path / "Alien__init__1/model.pth", weights_only=True)
    for key, w in first.items():
        if w.dim() == 4 or "running" in key:
            assert torch.equal(model["target"][key], w) == ("running" in key), key

    flags |= dict(shrink_perturb_anchor="pretrained", freeze_backbone=False)
    tuned = []
    for name in ("whole", "broken"):
        if name == "broken":
            with pytest.raises(SystemExit):
                play(TUNE, {10: stop}, exp_name=name, **flags)
            state = {f"backbone.{n}": w for n, w in backbone.items()}  # another one
            torch.save({"model_state_dict": state}, path)
        play(TUNE, exp_name=name, **flags)
        model = torch.load(tmp_path / f"Alien__{name}__1/model.pth", weights_only=True)
        tuned.append(model["target"])
    assert all(torch.equal(w, tuned[1][key]) for key, w in tuned[0].items())
    path.unlink()
    assert play(TUNE, exp_name="whole", **flags) == 0
    model = str(tmp_path / "Alien__whole__1/model.pth")
    ft.evaluate_saved(ft.Args(evaluate=model, device="cpu", eval_episodes=1))


def test_an_encoder_that_a_run_needs_survives_overwrite(play, tmp_path):
    run_dir = tmp_path / PRETRAIN.dir
    play(PRETRAIN)
    before = contents(run_dir)
    for path in (run_dir / "model.pth", run_dir / ".." / run_dir.name / "model.pth"):
        with pytest.raises(SystemExit, match=r"model.pth: this run would replace it"):
            play(TUNE, overwrite=True, pretrained_path=str(path))
    assert contents(run_dir) == before


# --- Pretraining ----------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_an_intervals_updates(play, tmp_path, monkeypatch):
    losses, update = [], ft.pretrain_update

    def updating(*args):
        losses.append(update(*args))
        return losses[-1]

    monkeypatch.setattr(ft, "pretrain_update", updating)
    play(PRETRAIN, log_interval=5)
    steps, logged = zip(*scalars(tmp_path / PRETRAIN.dir)["losses/pretraining"], strict=True)
    assert steps == (5, 10, 12)
    losses = [float(each["loss"]) for each in losses]
    means = [np.mean(part) for part in (losses[:5], losses[5:10], losses[10:])]
    assert logged == pytest.approx(means)
    assert read_result(tmp_path / PRETRAIN.dir)["final_loss"] == pytest.approx(means[-1])


def test_a_pretraining_goes_on_with_as_many_frames(play, tmp_path, videos):
    with pytest.raises(SystemExit):
        play(PRETRAIN, {5: stop}, video_dir=str(videos))
    before = contents(tmp_path / PRETRAIN.dir)
    save_array(videos / ft.RECORDED[0], np.zeros((14, 84, 84), np.uint8))
    save_array(videos / ft.RECORDED[1], np.zeros(14, np.uint8))
    with pytest.raises(SystemExit, match="videos of 14 frames, not 17"):
        play(PRETRAIN, resume=True, video_dir=str(videos))
    assert contents(tmp_path / PRETRAIN.dir) == before


@pytest.mark.parametrize("given", [True, False])
def test_recorded_videos_survive_overwrite(play, tmp_path, given):
    """Given as --video-dir, or made anew by the same flags: the same bytes."""
    run_dir = tmp_path / PRETRAIN.dir
    play(PRETRAIN, **RECORD)
    (run_dir / "mine.txt").write_text("mine")
    before = contents(run_dir)
    flags = dict(video_dir=str(run_dir)) if given else RECORD
    play(PRETRAIN, overwrite=True, barlow_weight=0.1, **flags)
    after = contents(run_dir)
    assert all(after[name] == before[name] for name in (*ft.RECORDED, "mine.txt"))
    assert after["model.pth"] != before["model.pth"]
    assert len(list(run_dir.glob("events*"))) == 1


def test_a_recording_is_used_where_a_checkpoint_vouches_for_it(play, tmp_path, videos, monkeypatch):
    """Else it may be of other flags: a run that was killed had no checkpoint yet."""
    run_dir = tmp_path / PRETRAIN.dir
    videos.rename(run_dir)
    (run_dir / ".lock").touch()
    before = contents(run_dir)
    with pytest.raises(SystemExit, match="holds an unfinished run; pass --resume or --overwrite"):
        play(PRETRAIN, **RECORD)
    assert contents(run_dir) == before
    with pytest.raises(SystemExit):
        play(PRETRAIN, {1: stop}, resume=True, **RECORD)
    anew = contents(run_dir)
    assert all(anew[name] != before[name] for name in ft.RECORDED)
    monkeypatch.setattr(ft, "record", lambda *_: 1 / 0)
    play(PRETRAIN, resume=True, **RECORD)
    assert all(contents(run_dir)[name] == anew[name] for name in ft.RECORDED)


def test_an_overwrite_that_cannot_begin_loses_nothing(play, tmp_path, videos, data):
    """With spoilt or truncated videos, too short ones, none, or an encoder as the player."""
    play(PRETRAIN)
    before = contents(tmp_path / PRETRAIN.dir)
    observations, terminals = (videos / name for name in ft.RECORDED)
    short = gzip.compress(b"") + b"no array"
    whole = observations.read_bytes(), terminals.read_bytes()
    kinds = [(whole[0], b""), (whole[0][:20_000], whole[1]), (short, whole[1]), None]
    for kind in kinds:
        flags = dict(video_dir=str(videos if kind else tmp_path))
        if kind:
            observations.write_bytes(kind[0])
            terminals.write_bytes(kind[1])
        with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
            play(PRETRAIN, overwrite=True, **flags)
        assert contents(tmp_path / PRETRAIN.dir) == before
    flags = dict(collect_policy="checkpoint", collect_model=str(data / "encoder.pth"))
    with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
        play(PRETRAIN, overwrite=True, **RECORD, **flags)
    assert contents(tmp_path / PRETRAIN.dir) == before


@pytest.mark.parametrize("how", ["a signal", "a full disk"])
def test_a_recording_that_does_not_end_leaves_nothing_that_counts(tmp_path, data, how):
    run_dir, half = tmp_path / PRETRAIN.dir, f"{ft.RECORDED[0]}.tmp"
    flags = flags_of(PRETRAIN, data, run_dir=".", collect_steps=1_000_000)
    del flags["video_dir"]
    shell = 'ulimit -f 100; trap "" XFSZ;' if how == "a full disk" else ""
    process = start(PRETRAIN, flags, tmp_path, shell)
    if how == "a signal":
        wait_for((run_dir / half).exists, process)
        process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    if how == "a signal":
        assert process.returncode == -signal.SIGTERM
    else:
        assert (process.returncode, error) == (1, "error: [Errno 27] File too large\n")
    assert names(run_dir) == {".lock", half}
