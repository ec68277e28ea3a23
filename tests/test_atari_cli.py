"""The script as a user runs it: real short runs, their files, and bad input."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plastic_drq_rainbow_atari as atari

SCRIPT = Path(__file__).parent.parent / "plastic_drq_rainbow_atari.py"
SHORT = "--device cpu --total-timesteps 45 --learning-starts 20 --buffer-size 200 --eval-episodes 2".split()
BASE = "--no-layer-norm --no-crelu --sam-rho 0".split()
DAGGER = "--no-crelu --sam-rho 0".split()


def run(tmp_path, *flags, env=None):
    """Run the script from an empty directory; returns the finished process."""
    command = [sys.executable, str(SCRIPT), *flags]
    environment = os.environ | {"PYTHONWARNINGS": "error"} | (env or {})
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )


def read_result(tmp_path):
    (path,) = tmp_path.glob("runs/*/result.json")
    return json.loads(path.read_text())


KEYS = """script exp_name env_id seed args env_steps gradient_updates resets skipped_updates nonfinite_rewards
resumed_at parameters episode_returns mean_return human_normalized_score wall_clock_seconds env_steps_per_second
updates_per_second device versions git_commit""".split()


METHODS = {"base": [*BASE, "--reset-interval", "0"], "dagger": DAGGER, "plastic": []}


@pytest.mark.parametrize("method, flags", METHODS.items(), ids=METHODS)
def test_a_short_real_run_past_learning_starts_and_resets(tmp_path, method, flags):
    extra = [
        "--replay-ratio",
        "4",
        "--exp-name",
        method,
        "--log-interval",
        "20",
        "--metrics-interval",
        "30",
    ]
    resets = [] if method == "base" else ["--reset-interval", "30"]
    finished = run(tmp_path, *SHORT, *extra, *resets, *flags)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # no bar where there is no terminal, no warning, no traceback
    assert (tmp_path / f"runs/Alien__{method}__1").is_dir()
    result = read_result(tmp_path)
    assert list(result) == KEYS
    assert result["script"] == "plastic_drq_rainbow_atari.py"
    assert result["env_steps"] == 45
    assert result["gradient_updates"] == (45 - 20 + 1) * 4
    assert result["resets"] == (0 if method == "base" else 3)  # at updates 30, 60, 90 of 104
    assert result["skipped_updates"] == 0
    assert result["args"]["shrink_perturb_alpha"] == (1.0 if method == "base" else 0.6)
    assert set(result["args"]) == {field for field in atari.Args.__dataclass_fields__}
    assert len(result["episode_returns"]) == 2
    assert result["mean_return"] == sum(result["episode_returns"]) / 2
    assert result["human_normalized_score"] == pytest.approx(
        (result["mean_return"] - 227.8) / (7127.7 - 227.8)
    )
    assert result["versions"]["torch"] == torch.__version__
    assert math.isclose(result["updates_per_second"] / result["env_steps_per_second"], 104 / 45)

    events = EventAccumulator(str(tmp_path / f"runs/Alien__{method}__1"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/SPS", "losses/td_loss", "losses/q_values", "losses/gradient_norm"} <= tags
    assert {
        "eval/mean_return",
        "eval/human_normalized_score",
        "plasticity/hessian_max_eigenvalue",
    } <= tags
    assert {"plasticity/active_units/head", "plasticity/active_units/backbone"} <= tags
    assert [e.step for e in events.Scalars("losses/td_loss")] == [20, 40, 45]
    assert [e.step for e in events.Scalars("plasticity/active_units/head")] == [30]
    assert events.Scalars("eval/mean_return")[-1].value == pytest.approx(result["mean_return"])
    assert all(math.isfinite(e.value) for tag in tags for e in events.Scalars(tag))
    if method == "plastic":  # CReLU: of each pair, one is above 0
        assert events.Scalars("plasticity/active_units/head")[0].value == pytest.approx(
            0.5, abs=1e-3
        )


def short_args(tmp_path, **flags):
    flags = (
        dict(
            total_timesteps=45,
            learning_starts=20,
            buffer_size=200,
            eval_episodes=2,
            save_model=True,
        )
        | flags
    )
    return atari.resolve(atari.Args(device="cpu", run_dir=tmp_path, **flags))


def weights(tmp_path, args):
    path = tmp_path / f"Alien__{args.exp_name}__{args.seed}" / "model.pth"
    return torch.load(path, weights_only=True)["target"]


def test_equal_seeds_give_equal_runs_and_measuring_changes_nothing(tmp_path):
    runs = [
        dict(exp_name="a"),
        dict(exp_name="b"),
        dict(exp_name="c", metrics_interval=10, eval_interval=30, log_interval=1),
        dict(exp_name="d", seed=2),
    ]
    kept = []
    for flags in runs:
        args = short_args(tmp_path, reset_interval=20, hidden_dim=16, n_atoms=11, **flags)
        atari.run(args, atari.Stop())
        kept.append(weights(tmp_path, args))
    a, b, c, d = kept
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], c[name]) for name in a)
    assert not torch.equal(a["backbone.0.weight"], d["backbone.0.weight"])


def test_a_finished_run_is_kept_unless_overwrite(tmp_path):
    first = run(tmp_path, *SHORT, *BASE, "--hidden-dim", "8", "--save-model", "--capture-video")
    assert first.returncode == 0, first.stderr
    (directory,) = tmp_path.glob("runs/*")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    refused = run(tmp_path, *SHORT, *BASE)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.count("\n") == 1
    assert "--overwrite" in refused.stderr
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before

    # The saved model plays the run's games again.
    again = run(
        tmp_path, "--evaluate", str(directory / "model.pth"), "--eval-episodes", "2", "--seed", "9"
    )
    assert again.returncode == 0, again.stderr
    mean_return = read_result(tmp_path)["mean_return"]
    assert f"Alien: mean return {mean_return:.1f} over 2 games" in again.stdout
    assert first.stdout.splitlines()[-1].startswith(again.stdout.strip())
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    with Image.open(directory / "video.gif") as video:
        assert (video.size, video.n_frames > 10) == ((84, 84), True)

    replaced = run(tmp_path, *SHORT, *BASE, "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    assert (directory / "result.json").read_bytes() != before["result.json"]
    assert len(list(directory.glob("events*"))) == 1
    assert {path.name.split(".")[0] for path in directory.iterdir()} == {"", "events", "result"}


def test_an_evaluation_of_a_saved_model_takes_the_files_game_and_network(tmp_path):
    args = short_args(
        tmp_path, env_id="MsPacman", hidden_dim=8, n_atoms=7, crelu=False, layer_norm_scope="all"
    )
    atari.run(args, atari.Stop())
    path = tmp_path / "MsPacman__plastic_drq_rainbow_atari__1" / "model.pth"
    evaluated = run(
        tmp_path,
        "--evaluate",
        str(path),
        "--eval-episodes",
        "1",
        "--device",
        "cpu",
        "--capture-video",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.startswith("MsPacman: mean return")
    gif = path.with_name("model.pth.gif")
    before = gif.read_bytes()
    refused = run(tmp_path, "--evaluate", str(path), "--capture-video")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert gif.read_bytes() == before


def test_an_evaluation_of_a_saved_model_keeps_its_seed_and_takes_the_commands_episodes(
    tmp_path, monkeypatch
):
    played = []
    monkeypatch.setattr(atari, "evaluate", lambda *call: played.append(call) or [1.0])
    atari.run(short_args(tmp_path, hidden_dim=4, n_atoms=3, seed=5), atari.Stop())
    path = tmp_path / "Alien__plastic_drq_rainbow_atari__5" / "model.pth"
    flags = dict(
        evaluate=path, seed=9, env_id="Pong", eval_episodes=7, eval_epsilon=0.25, device="cpu"
    )
    atari.evaluate_saved(atari.resolve(atari.Args(**flags)))
    network, env_id, args, video = played[-1]
    assert (env_id, args.seed, args.eval_episodes, args.eval_epsilon, video) == (
        "Alien",
        5,
        7,
        0.25,
        None,
    )
    for name, value in weights(tmp_path, args).items():
        assert torch.equal(network.state_dict()[name], value)


def test_torch_threads_is_obeyed(tmp_path):
    assert run(tmp_path, *SHORT, *BASE, "--hidden-dim", "4", "--torch-threads", "3").returncode == 0
    assert read_result(tmp_path)["device"] == "cpu, 3 threads"


# --- Bad input --------------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--env-id Alein": "Alien",
    "--env-id alien": "Alien",
    "--env-id Ant": "no such Atari game",
    "--env-id ../x": "no such Atari game",
    "--env-id x\\n": "no such Atari game",
    "--exp-name a\udcff": "--exp-name",
    "--run-dir a\udcff": "--run-dir",
    "--seed -1": "--seed",
    "--seed 200001": "--seed",
    "--exp-name a/b": "--exp-name",
    "--exp-name ..": "--exp-name",
    "--replay-ratio 0": "--replay-ratio",
    "--batch-size 0": "--batch-size",
    "--learning-starts 9": "--n-step",
    "--learning-starts 100000": "--total-timesteps",
    "--total-timesteps 0": "--total-timesteps",
    "--learning-rate 0": "--learning-rate",
    "--learning-rate -1": "--learning-rate",
    "--learning-rate nan": "--learning-rate",
    "--adam-eps -1": "--adam-eps",
    "--max-grad-norm 0": "--max-grad-norm",
    "--gamma 1.01": "--gamma",
    "--n-step 0": "--n-step",
    "--n-atoms 1": "--n-atoms",
    "--v-min 10": "--v-min",
    "--v-max inf": "--v-max",
    "--v-min nan": "--v-min",
    "--adam-eps 0": "--adam-eps",
    "--per-alpha 65": "--per-alpha",
    "--batch-size 100000000": "--batch-size",
    "--total-timesteps 10000000000000000000000": "--total-timesteps",
    "--hidden-dim 0": "--hidden-dim",
    "--noisy-std -0.1": "--noisy-std",
    "--buffer-size 10": "--buffer-size",
    "--per-alpha -1": "--per-alpha",
    "--per-beta 1.1": "--per-beta",
    "--target-ema 1.1": "--target-ema",
    "--aug-shift 84": "--aug-shift",
    "--aug-intensity -1": "--aug-intensity",
    "--sam-rho -0.1": "--sam-rho",
    "--sam-rho inf": "--sam-rho",
    "--reset-interval -1": "--reset-interval",
    "--shrink-perturb-alpha 1.1": "--shrink-perturb-alpha",
    "--shrink-perturb-alpha -0.1": "--shrink-perturb-alpha",
    "--shrink-perturb-alpha 0.5 --reset-interval 0": "--reset-interval",
    "--eval-episodes 0": "--eval-episodes",
    "--eval-epsilon 2": "--eval-epsilon",
    "--eval-interval -1": "--eval-interval",
    "--metrics-interval -1": "--metrics-interval",
    "--log-interval 0": "--log-interval",
    "--torch-threads -1": "--torch-threads",
    "--max-grad-norm inf": "--max-grad-norm",
    "--checkpoint-interval -1": "--checkpoint-interval",
    "--checkpoint-interval often": "--checkpoint-interval",
    "--resume --overwrite": "--resume",
    "--n-atoms 100001": "--n-atoms",
    "--hidden-dim 1000001": "--hidden-dim",
    "--no-such-flag 1": "no-such-flag",
    "--replay-ratio two": "--replay-ratio",
    "--sam-scope foot": "--sam-scope",
    "--shrink-perturb-alpha often": "--shrink-perturb-alpha",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_flag_that_makes_no_sense_ends_with_code_2_and_says_so(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        atari.resolve(tyro.cli(atari.Args, args=flags.split()))
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert BAD_FLAGS[flags] in output.err
    ours = output.err.startswith("error: ") and output.err.count("\n") == 1
    assert ours or "For full helptext" in output.err  # tyro's own box
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("game", ["Alien", "Tetris", "Adventure", "UpNDown"])
def test_any_of_envpools_atari_games_is_allowed(game):
    assert atari.resolve(atari.Args(env_id=game)).env_id == game


@pytest.mark.parametrize(
    "flags, code, words",
    [
        ("--env-id Braekout", 2, "Breakout"),
        ("--run-dir file/runs", 1, "file"),
        ("--run-dir /proc/runs", 1, "/proc/runs"),
        ("--evaluate missing.pth", 1, "No such file"),
        ("--track", 1, "pip install wandb"),
        ("--evaluate file", 1, "--save-model"),
        ("--evaluate foreign.pth", 1, "--save-model"),
        ("--evaluate .", 1, "Is a directory"),
        ("--evaluate nan.pth", 1, "--save-model"),
        ("--evaluate truncated.pth", 1, "--save-model"),
        ("--evaluate seed.pth", 1, "--save-model"),
        ("--evaluate large_seed.pth", 2, "--seed"),
        ("--buffer-size 1000000000", 1, "GiB of memory"),
        ("--hidden-dim 1000000 --n-atoms 100000", 1, "--hidden-dim"),
        ("--batch-size 65536 --n-atoms 1000", 1, "--batch-size"),
        pytest.param(
            "--device cuda",
            1,
            "CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_the_script_ends_with_one_line_no_traceback_and_nothing_written(
    tmp_path, flags, code, words
):
    (tmp_path / "file").write_text("not a directory, not a model")
    torch.save({"target": {}}, tmp_path / "foreign.pth")
    args = atari.Args(hidden_dim=1, n_atoms=2)
    model = {"args": json.loads(json.dumps(asdict(args), default=str)), "num_actions": 3}
    weights = atari.QNetwork(3, args).state_dict()
    torch.save(
        model | {"target": weights | {"backbone.0.bias": torch.full((32,), math.nan)}},
        tmp_path / "nan.pth",
    )
    torch.save(model | {"target": weights}, tmp_path / "whole.pth")
    for name, seed in (("seed", "x"), ("large_seed", 10**30)):
        torch.save(
            model | {"target": weights, "args": model["args"] | {"seed": seed}},
            tmp_path / f"{name}.pth",
        )
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:20_000])
    before = sorted(path.name for path in tmp_path.iterdir())
    finished = run(tmp_path, *flags.split())
    assert finished.returncode == code
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: ")
    assert words in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_costs_the_model_not_the_result(tmp_path):
    """`ulimit -f` in blocks of 1 KiB: room for everything but the model (7 million floats)."""
    flags = ["--run-dir", str(tmp_path), "--save-model", *SHORT, *BASE]
    command = [
        "bash",
        "-c",
        'ulimit -f 2000; trap "" XFSZ; exec "$@"',
        "bash",
        sys.executable,
        str(SCRIPT),
        *flags,
    ]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    warning, error = finished.stderr.splitlines()
    assert finished.returncode == 1
    assert (
        warning.startswith("warning: ") and "checkpoint.pth" in warning
    )  # the one before the evaluation
    assert error.startswith("error: ") and "model.pth" in error
    (directory,) = tmp_path.glob("Alien*")
    assert {path.name.split(".")[0] for path in directory.iterdir()} == {"", "events", "result"}
    assert len(json.loads((directory / "result.json").read_text())["episode_returns"]) == 2


def test_a_hundred_skipped_updates_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        atari, "td_error", lambda log_probs, action, td_target: log_probs.sum((1, 2)) * math.nan
    )
    args = short_args(tmp_path, total_timesteps=200, log_interval=10, hidden_dim=4, n_atoms=3)
    with pytest.raises(SystemExit) as exit_info:
        atari.run(args, atari.Stop())
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "step 70: 102 updates in a row had a non-finite gradient" in error
    )  # 2 a step from step 20 on
    assert not list(tmp_path.glob("*/result.json"))


def test_a_run_with_a_few_skipped_updates_goes_on_and_counts_them(tmp_path, monkeypatch):
    original, calls = atari.td_error, []

    def sometimes_nan(log_probs, action, td_target):
        calls.append(len(calls))
        return original(log_probs, action, td_target) * (
            math.nan if len(calls) in (5, 6, 20) else 1.0
        )

    monkeypatch.setattr(atari, "td_error", sometimes_nan)
    atari.run(short_args(tmp_path, sam_rho=0.0, hidden_dim=4, n_atoms=3), atari.Stop())
    (path,) = tmp_path.glob("*/result.json")
    result = json.loads(path.read_text())
    assert (result["skipped_updates"], result["gradient_updates"]) == (3, 52)


def test_weights_and_biases_is_imported_only_when_tracking(tmp_path):
    """With a stand-in for the package that records how it is called."""
    stand_in = """
import json, types
class Error(Exception): pass
def init(**kwargs):
    if kwargs["entity"] == "nobody": raise Error("no such\\nentity")
    open("tracked.json", "w").write(json.dumps(kwargs, default=str))
    return types.SimpleNamespace(id="id7")
"""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(stand_in)
    env = {"PYTHONPATH": str(tmp_path / "site")}
    flags = [*SHORT, *BASE, "--hidden-dim", "4", "--wandb-project-name", "p", "--wandb-entity", "e"]
    assert run(tmp_path, *flags, env=env).returncode == 0
    assert not (tmp_path / "tracked.json").exists()
    assert run(tmp_path, *flags, "--track", "--seed", "2", env=env).returncode == 0
    tracked = json.loads((tmp_path / "tracked.json").read_text())
    assert (tracked["project"], tracked["entity"], tracked["name"]) == (
        "p",
        "e",
        "Alien__plastic_drq_rainbow_atari__2",
    )
    assert tracked["sync_tensorboard"] is True
    assert tracked["config"]["sam_rho"] == 0
    assert (tracked["id"], tracked["resume"]) == (None, "allow")
    refused = run(
        tmp_path, *SHORT, *BASE, "--track", "--seed", "3", "--wandb-entity", "nobody", env=env
    )
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: --track: Weights & Biases says: no such entity\n",
    )
    assert not (tmp_path / "runs/Alien__plastic_drq_rainbow_atari__3").exists()


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(atari.Args, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in atari.Args.__dataclass_fields__:
        flag = "--" + name.replace("_", "-")
        assert flag in text
    source = SCRIPT.read_text().split("class Args:")[1].split("# fmt: on")[0]
    settings = [
        line
        for line in source.splitlines()
        if line.startswith("    ") and ": " in line and " = " in line
    ]
    assert len([s for s in settings if not s.strip().startswith("#")]) == len(
        atari.Args.__dataclass_fields__
    )
