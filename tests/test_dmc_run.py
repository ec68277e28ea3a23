"""DMC's script as a process: short real runs, saved models, what kills a run and what does not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plastic_drq_sac_dmc as dmc

SCRIPT = Path(__file__).parent.parent / "plastic_drq_sac_dmc.py"
# Episodes of 125 agent steps.
SMALL = (
    "--env-id cartpole-swingup_sparse --action-repeat 8 --device cpu --exp-name x --learning-starts 20 --image-size 16 "
    "--batch-size 4 --hidden-dim 8 --latent-dim 4 --render-quality fast --torch-threads 1 --log-interval 10"
).split()
NAME = "cartpole-swingup_sparse__x__1"


def start(tmp_path, *flags, limit=None, **options):
    """The script as a process; `limit`: KiB that a file of its may have."""
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path), *SMALL, *flags]
    if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "bash", *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run(tmp_path, *flags, **options):
    process = start(tmp_path, *flags, **options)
    output, error = process.communicate(timeout=300)
    return process.returncode, output, error


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), purge_orphaned_data=False)
    events.Reload()
    return {
        tag: sorted((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids):
    """Whether none of these processes lives on (a zombie does not)."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            pass
    return True


def check_like_unbroken(run_dir, steps):
    """Counters, files and logged steps of a finished run, whatever happened on the way."""
    result = json.loads((run_dir / "result.json").read_text())
    updates = steps - 20 + 1
    assert (result["agent_steps"], result["env_steps"], result["gradient_updates"]) == (
        steps,
        8 * steps,
        updates,
    )
    assert result["skipped_updates"] == result["nonfinite_rewards"] == 0
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"", "events", "result"}
    logged = scalars(run_dir)
    assert [step for step, _ in logged["losses/td_loss"]] == list(range(20, steps + 1, 10))
    assert [step for step, _ in logged["eval/mean_return"]] == [steps]
    episodes = [step for step, _ in logged.get("charts/episodic_return", [])]
    assert episodes == sorted(set(episodes))
    return result


# --- Short runs -------------------------------------------------------------------------------------------------------

METHODS = {
    "base": "--no-layer-norm --no-crelu --sam-rho 0 --reset-interval 0",
    "plastic": "--reset-interval 50 --metrics-interval 60",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_short_real_run_past_resets_and_its_saved_model(tmp_path, method):
    flags = [
        *METHODS[method].split(),
        "--total-timesteps",
        "1200",
        "--eval-episodes",
        "3",
        "--eval-interval",
        "80",
    ]
    code, output, error = run(tmp_path, *flags, "--save-model", "--capture-video")
    assert (code, error) == (0, "")
    run_dir = tmp_path / NAME
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["agent_steps"], result["gradient_updates"]) == (150, 131)
    assert result["resets"] == (0 if method == "base" else 2)
    assert len(result["episode_returns"]) == 3 and all(
        0 <= value <= 1000 for value in result["episode_returns"]
    )
    assert result["mean_return"] == pytest.approx(sum(result["episode_returns"]) / 3)
    assert output.splitlines()[-1].endswith(f"over 3 episodes; {run_dir}/result.json")
    logged = scalars(run_dir)
    assert [step for step, _ in logged["eval/mean_return"]] == [80, 150]
    assert [(step, value) for step, value in logged["charts/episodic_length"]] == [(125, 125)]
    if method == "plastic":
        assert [step for step, _ in logged["plasticity/hessian_max_eigenvalue"]] == [60, 120]
        shares = {tag.removeprefix("plasticity/active_units/"): value[0][1] for tag, value in logged.items()
                  if tag.startswith("plasticity/active_units/")}  # fmt: skip
        assert {"backbone", "head", "backbone.2", "head.q_functions.1.0.3"} <= shares.keys()
        assert 0 < shares["backbone"] < 1
        assert shares["head"] == pytest.approx(0.5, abs=0.01)  # CReLU
    with Image.open(run_dir / "video.gif") as video:
        assert video.size == (16, 16) and 1 < video.n_frames <= 125  # equal frames are one in a GIF
        assert video.info["duration"] % 80 == 0  # eight steps of 10 ms

    evaluate = [
        sys.executable,
        str(SCRIPT),
        "--evaluate",
        str(run_dir / "model.pth"),
        "--device",
        "cpu",
    ]
    evaluate += ["--eval-episodes", "3"]
    done = subprocess.run(evaluate, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"cartpole-swingup_sparse: mean return {result['mean_return']:.1f} over 3 episodes\n"
    )


def test_files_that_are_no_saved_model(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"args": {"env_id": "cartpole-balance"}, "backbone": {}}, other)
    (tmp_path / "text.pth").write_text("no model")
    args = dmc.resolve(dmc.Args(env_id="cartpole-balance", device="cpu", image_size=16))
    agent = dmc.Agent(1, args, torch.Generator())
    networks = {
        "backbone": agent.online.backbone.state_dict(),
        "actor": agent.actor.state_dict(),
        "action_dim": 1,
    }
    flags = json.loads(json.dumps(dmc.asdict(args), default=str))
    torch.save({"args": flags | {"action_repeat": 8.5}, **networks}, tmp_path / "fraction.pth")
    torch.save({"args": flags | {"env_id": "walker-run"}, **networks}, tmp_path / "walker.pth")
    files = {"other": "not a model", "text": "not a model", "no": "No such", "fraction": "not a model",
             "walker": "a model of 1 actions, not of walker-run"}  # fmt: skip
    for path, words in ((tmp_path / f"{name}.pth", words) for name, words in files.items()):
        code, output, error = run(tmp_path, "--evaluate", str(path))
        assert (code, output, error.count("\n")) == (1, "", 1)
        assert words in error and "--evaluate" in error


# --- Faults -----------------------------------------------------------------------------------------------------------


def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    rng, run_dir = random.Random(0), tmp_path / NAME
    flags = "--resume --total-timesteps 6400 --checkpoint-interval 20 --eval-episodes 1".split()
    for _ in range(3):
        process = start(tmp_path, *flags)
        before = (run_dir / "checkpoint.pth").exists() and (
            run_dir / "checkpoint.pth"
        ).stat().st_mtime_ns
        wait_for(lambda before=before: (run_dir / "checkpoint.pth").exists()
                 and (run_dir / "checkpoint.pth").stat().st_mtime_ns != before, process)  # fmt: skip
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        torch.load(run_dir / "checkpoint.pth", weights_only=True)
        assert not (run_dir / "result.json").exists()
    code, _, error = run(tmp_path, *flags)
    assert (code, error) == (0, "")
    resumed_at = check_like_unbroken(run_dir, 800)["resumed_at"]
    assert len(resumed_at) == 3 and resumed_at == sorted(resumed_at)
    assert all(step % 20 == 0 for step in resumed_at)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_last_checkpoint_and_the_run_goes_on_from_there(tmp_path, signum, code):
    run_dir = tmp_path / NAME
    flags = ["--resume", "--total-timesteps", "6400", "--eval-episodes", "1"]
    process = start(tmp_path, *flags)
    wait_for(lambda: any(path.stat().st_size > 2000 for path in run_dir.glob("events*")), process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.count("\n")) == (code, 1)
    assert signum.name in error and "--resume" in error
    step = torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["step"]
    assert 20 <= step < 800
    code, _, error = run(tmp_path, *flags)
    assert (code, error) == (0, "")
    assert check_like_unbroken(run_dir, 800)["resumed_at"] == [step]


@pytest.mark.parametrize("seconds", [0.5, 6])
def test_ctrl_c_during_an_evaluation_is_one_line_and_leaves_no_worker(tmp_path, seconds):
    """Ctrl-C goes to all processes of a terminal: those that play must be silent, starting or started."""
    run_dir = tmp_path / NAME
    process = start(
        tmp_path, "--total-timesteps", "480", "--eval-episodes", "1000", start_new_session=True
    )
    wait_for((run_dir / "checkpoint.pth").exists, process)
    wait_for(lambda: len(children(process.pid)) > 1, process)
    time.sleep(seconds)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "error: stopped by SIGINT; --resume continues the run\n"
    end = time.monotonic() + 20
    while not gone(workers):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["step"] == 60


def test_workers_do_not_outlive_a_run_that_is_killed(tmp_path):
    """Nor do they say anything: the errors that they run into are of no use."""
    process = start(tmp_path, "--total-timesteps", "480", "--eval-episodes", "1000")
    wait_for((tmp_path / NAME / "checkpoint.pth").exists, process)
    wait_for(lambda: len(children(process.pid)) > 1, process)
    time.sleep(6)
    workers = children(process.pid)
    process.kill()
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    end = time.monotonic() + 30
    while not gone(workers):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("seconds", [0, 8])
def test_a_worker_that_is_killed_ends_the_run_with_one_line(tmp_path, seconds):
    process = start(
        tmp_path, "--total-timesteps", "480", "--eval-episodes", "1000", "--torch-threads", "1"
    )
    wait_for((tmp_path / NAME / "checkpoint.pth").exists, process)
    wait_for(lambda: len(children(process.pid)) > 1, process)
    time.sleep(seconds)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("error: a process of the evaluation died") and error.count("\n") == 1
    assert "--resume" in error


def test_two_processes_in_one_directory(tmp_path):
    first = start(tmp_path, "--total-timesteps", "1000000")
    wait_for(
        lambda: any(path.stat().st_size > 2000 for path in (tmp_path / NAME).glob("events*")), first
    )
    code, output, error = run(tmp_path, "--total-timesteps", "1000000")
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert "another process" in error
    first.kill()
    first.communicate()
    code, _, error = run(
        tmp_path, "--total-timesteps", "480", "--overwrite", "--eval-episodes", "1"
    )
    assert (code, error) == (0, "")
    check_like_unbroken(tmp_path / NAME, 60)


def test_a_disk_that_is_full_during_a_checkpoint_costs_only_that_checkpoint(tmp_path):
    """`ulimit -f`: a checkpoint has about 20 MB here, all other files far less."""
    run_dir = tmp_path / NAME
    flags = ["--total-timesteps", "80000", "--resume"]
    process = start(tmp_path, *flags, "--checkpoint-interval", "100")
    wait_for((run_dir / "checkpoint.pth").exists, process)
    process.kill()
    process.communicate()
    before = (run_dir / "checkpoint.pth").read_bytes()
    process = start(tmp_path, *flags, "--checkpoint-interval", "50", limit=2000)
    assert "checkpoint.pth not written: File too large" in (line := process.stderr.readline()), line
    assert line.startswith("warning: ")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (run_dir / "checkpoint.pth").read_bytes() == before


DIVERGES = """
import runpy, sys
from dm_control.rl import control
original, calls = control.Environment.step, [0]
def step(self, action):
    calls[0] += 1
    if calls[0] == 400:
        raise control.PhysicsError("mjWARN_BADQACC")
    return original(self, action)
control.Environment.step = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_simulation_that_diverges_ends_the_run_with_one_line_and_it_goes_on(tmp_path):
    flags = [
        str(SCRIPT),
        "--run-dir",
        str(tmp_path),
        *SMALL,
        "--total-timesteps",
        "480",
        "--checkpoint-interval",
        "10",
    ]
    flags += ["--eval-episodes", "1"]
    done = subprocess.run(
        [sys.executable, "-c", DIVERGES, *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: the simulation diverged (mjWARN_BADQACC); --resume continues the run\n"
    )
    code, _, error = run(tmp_path, "--total-timesteps", "480", "--resume", "--eval-episodes", "1")
    assert (code, error) == (0, "")
    assert check_like_unbroken(tmp_path / NAME, 60)["resumed_at"] == [40]


def test_cheetahs_model_gives_no_warnings(tmp_path):
    flags = ["--env-id", "cheetah-run", "--total-timesteps", "240", "--eval-episodes", "1"]
    assert run(tmp_path, *flags)[::2] == (0, "")


@pytest.mark.parametrize("renderer", ["osmesa", "glfw", "disable", "nonsense"])
def test_a_renderer_that_does_not_work(tmp_path, renderer):
    if renderer == "osmesa" and find_library("OSMesa"):
        pytest.skip("libOSMesa is installed")
    env = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {
        "MUJOCO_GL": renderer
    }
    code, output, error = run(tmp_path / "runs", "--total-timesteps", "480", env=env)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith(
        f"error: MuJoCo cannot render with MUJOCO_GL={renderer}: install libegl1"
    )
    assert not (tmp_path / "runs").exists()


# --- Memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
import numpy as np, torch
import plastic_drq_sac_dmc as dmc
args = dmc.resolve(dmc.Args(device="cpu", buffer_size=10_000, **eval(sys.argv[1])))
env, rest = dmc.make_env(args), (12, args)
torch.randn(64, 64) @ torch.randn(64, 64)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
agent = dmc.Agent(*rest, torch.Generator().manual_seed(0))
frame = np.zeros(env.observation_space.shape, np.uint8)
replay = dmc.ReplayBuffer(args.buffer_size, 500, frame.shape, 12, args.frame_stack, torch.device("cpu"))
for tensor in replay.tensors().values():
    tensor.fill_(0)
replay.start(frame)
for _ in range(100):
    replay.add(np.zeros(12, np.float32), 0.0, False, frame)
for _ in range(2):
    agent.update(replay.sample(args.batch_size, torch.Generator()))
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss is inherited
print((peak - before) / sum(dmc.memory_needed(*rest)))
"""


@pytest.mark.parametrize(
    "flags", [{}, dict(crelu=False, sam_rho=0.0, grayscale=False, image_size=84, batch_size=128)]
)
def test_the_memory_needed_is_about_what_a_run_takes(flags):
    """Peak resident memory of a process that builds all and updates, less that of PyTorch and MuJoCo."""
    command = [sys.executable, "-c", MEASURE, repr(flags)]
    finished = subprocess.run(
        command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert 0.7 < float(finished.stdout) < 1.35


def test_the_replay_buffers_memory_is_counted():
    args = dmc.resolve(dmc.Args(device="cpu", buffer_size=10_000, env_id="walker-run"))
    replay = dmc.ReplayBuffer(10_000, 500, (1, 64, 64), 6, 3, torch.device("cpu"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in replay.tensors().values())
    assert dmc.memory_needed(6, args)[0] == pytest.approx(held, rel=0.01)
