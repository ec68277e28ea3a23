"""The fine-tuning script's runs beyond what all scripts promise (test_promises.py)."""

import gzip
import math

import numpy as np
import pytest
import torch
from runs import CASES, contents, ft, read_result, scalars, stop

TUNE, PRETRAIN = CASES["finetune"], CASES["pretrain"]
RECORD = dict(video_dir=None, collect_steps=17)


def write_video(directory, length):
    directory.mkdir(exist_ok=True)
    for name, shape in (("observation", (length, 84, 84)), ("terminal", (length,))):
        with gzip.open(directory / f"{name}_1_0.gz", "wb") as file:
            np.save(file, np.zeros(shape, np.uint8))


def test_a_pretrained_encoder_is_tuned_and_needed_no_more(play, tmp_path, monkeypatch):
    """A continued run has its first weights in the checkpoint; --resume on a finished run and
    --evaluate do without the encoder's file."""
    play(PRETRAIN, exp_name="p")
    path = tmp_path / "Alien__p__1" / "model.pth"
    encoder = torch.load(path, weights_only=True)["model_state_dict"]
    flags = dict(pretrained_path=str(path), reset_interval=15, save_model=True)
    flags |= dict(shrink_perturb_anchor="pretrained", freeze_backbone=False)
    play(TUNE, exp_name="whole", **flags)
    with pytest.raises(SystemExit):
        play(TUNE, {10: stop}, exp_name="broken", **flags)
    another = {f"backbone.{name}": w for name, w in ft.Backbone().state_dict().items()}
    torch.save({"model_state_dict": another}, path)
    play(TUNE, exp_name="broken", resume=True, **flags)
    models = [tmp_path / f"Alien__{name}__1/model.pth" for name in ("whole", "broken")]
    whole, broken = (torch.load(model, weights_only=True)["target"] for model in models)
    assert all(torch.equal(w, broken[name]) for name, w in whole.items())
    statistics = [name for name in encoder if "running" in name]  # which stay as they were
    assert all(torch.equal(whole[name], encoder[name]) for name in statistics)
    path.unlink()
    assert play(TUNE, exp_name="whole", resume=True, **flags) == 0
    monkeypatch.setattr(ft, "evaluate", lambda *_: [1.0])
    ft.evaluate_saved(ft.Args(evaluate=str(models[0]), device="cpu"))


def test_an_encoder_that_a_run_needs_survives_overwrite(play, tmp_path):
    run_dir = tmp_path / PRETRAIN.dir
    play(PRETRAIN)
    before = contents(run_dir)
    path = run_dir / ".." / run_dir.name / "model.pth"
    with pytest.raises(SystemExit, match=r"model.pth: this run would replace it"):
        play(TUNE, overwrite=True, pretrained_path=str(path))
    assert contents(run_dir) == before


def test_a_reset_hides_no_number_that_is_not_finite(play, monkeypatch):
    """A fresh head on a frozen encoder would be finite again, the priorities would not."""
    broken, original = [], ft.cross_entropy
    faulty = lambda *call: original(*call) * (math.nan if broken else 1)  # noqa: E731
    monkeypatch.setattr(ft, "cross_entropy", faulty)
    events = {12: lambda: broken.append(0), 13: broken.clear}
    flags = dict(reset_interval=15, buffer_size=16, log_interval=1000, checkpoint_interval=0)
    with pytest.raises(SystemExit, match="step 15: td_loss is not finite"):  # 2 updates from 8 on
        play(TUNE, events, **flags)


# --- Pretraining ----------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_update_that_logs_it(play, tmp_path, monkeypatch):
    losses, loss = [], ft.pretraining_loss
    spy = lambda *args: losses.append(loss(*args)) or losses[-1]  # noqa: E731
    monkeypatch.setattr(ft, "pretraining_loss", spy)
    play(PRETRAIN, log_interval=5)
    newest = [(step, pytest.approx(losses[step - 1].item())) for step in (5, 10, 12)]
    assert scalars(tmp_path / PRETRAIN.dir)["losses/loss"] == newest
    assert read_result(tmp_path / PRETRAIN.dir)["final_loss"] == losses[-1].item()


def test_half_an_epoch_is_half_its_batches_the_smaller_last_one_included(play):
    """Of 12 sequences in batches of 7: two in an epoch, three in one and a half."""
    assert play(PRETRAIN, pretrain_batch_size=7, pretrain_epochs=1.5) == 3


def test_a_pretraining_goes_on_with_as_many_frames(play, tmp_path):
    flags = dict(video_dir=str(tmp_path / "videos"))
    write_video(tmp_path / "videos", 17)
    with pytest.raises(SystemExit):
        play(PRETRAIN, {5: stop}, **flags)
    before = contents(tmp_path / PRETRAIN.dir)
    write_video(tmp_path / "videos", 14)
    with pytest.raises(SystemExit, match="videos of 14 frames, not 17"):
        play(PRETRAIN, resume=True, **flags)
    assert contents(tmp_path / PRETRAIN.dir) == before


def test_files_and_recordings_have_limits_of_their_own(play, tmp_path):
    write_video(tmp_path / "videos", 17)
    limit = dict(video_frames=14)
    for flags, frames in (
        (limit | dict(video_dir=str(tmp_path / "videos")), 14),
        (limit | RECORD, 17),
    ):
        play(PRETRAIN, overwrite=True, **flags)
        assert read_result(tmp_path / PRETRAIN.dir)["frames"] == frames


def test_a_continued_pretraining_records_the_same_frames_again(play, tmp_path, monkeypatch):
    videos, record = [], ft.record
    monkeypatch.setattr(ft, "record", lambda args: videos.append(record(args)) or videos[-1])
    play(PRETRAIN, exp_name="whole", **RECORD)
    with pytest.raises(SystemExit):
        play(PRETRAIN, {5: stop}, exp_name="broken", **RECORD)
    play(PRETRAIN, exp_name="broken", resume=True, **RECORD)
    assert len(videos) == 3 and videos[0].frames.any()
    assert all(map(np.array_equal, videos[0], videos[2]))
    whole, broken = (
        torch.load(tmp_path / f"Alien__{name}__1/model.pth", weights_only=True)["model_state_dict"]
        for name in ("whole", "broken")
    )
    assert all(torch.equal(w, broken[name]) for name, w in whole.items())


def test_an_overwrite_that_cannot_begin_loses_nothing(play, tmp_path):
    """With videos that are too short, or none."""
    play(PRETRAIN)
    before = contents(tmp_path / PRETRAIN.dir)
    write_video(tmp_path / "short", 5)
    for directory in (tmp_path / "short", tmp_path):
        with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
            play(PRETRAIN, overwrite=True, video_dir=str(directory))
        assert contents(tmp_path / PRETRAIN.dir) == before
