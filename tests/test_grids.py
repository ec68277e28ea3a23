"""The grids that benchmark/ prints, and what runs them: here, or under Slurm."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import report
import tyro

import plastic_drq_rainbow_atari as atari

ROOT = Path(__file__).parent.parent
LINES = {  # of each grid: 26 games, 11 tasks, 10 or 5 seeds
    "table1_atari": 6 * 26 * 10,
    "table1_dmc": 6 * 11 * 10,
    "table2_scaling": 2 * 3 * 26 * 5,
    "table3_pretrained": 6 * 26 * 5,
    "table4_ablation": 12 * 26 * 10,
    "fig3_synthetic": 12 * 2,
    "fig3_beyond": 11 * 2,
    "fig4_metrics": 6 * 26 * 5,
    "fig5_sam": 10 * 26 * 5 + 4 * 11 * 5,
    "fig6_rho_batch": (2 + 4 * 3) * 26 * 5,
}


def grid(name, **env):
    narrow = ("GAMES", "TASKS", "SEEDS", "METHODS")
    clean = {key: value for key, value in os.environ.items() if key not in narrow}
    command = ["bash", ROOT / f"benchmark/{name}.sh"]
    return subprocess.run(command, capture_output=True, text=True, env=clean | env)


def parsed(line):
    """The script, and its flags as resolved."""
    python, script, *flags = shlex.split(line)
    assert python == "python"
    return script, tyro.cli(importlib.import_module(script[:-3]).Args, args=flags)


def settings(name, flags, **env):
    """{exp_name: values of these flags} of a grid's lines for one game or task and one seed."""
    task = "input" if name.startswith("fig3") else "quadruped-run"
    one = dict(GAMES="Alien", TASKS=task, SEEDS="1")
    runs = [parsed(line)[1] for line in grid(name, **one | env).stdout.splitlines()]
    return {args.exp_name: tuple(getattr(args, flag) for flag in flags.split()) for args in runs}


def test_what_the_report_ignores_is_what_a_continued_run_may_change():
    """And what tells runs of one setting apart."""
    dmc = importlib.import_module("plastic_drq_sac_dmc")
    own = {"env_id", "seed", "exp_name", "pretrained_path"}
    assert own | atari.MAY_CHANGE | dmc.MAY_CHANGE == report.APART


def test_each_line_is_one_that_its_script_takes_and_a_name_means_one_setting():
    """Lines that differ in game and seed alone are parsed once."""
    grids = {name: grid(name).stdout.splitlines() for name in LINES}
    assert {name: len(set(lines)) for name, lines in grids.items()} == LINES
    runs, games, seeds = set(), {}, {}
    for line in (line for lines in grids.values() for line in lines):
        assert " --resume" in line
        script, game = line.split()[1], re.search(r"--(?:env-id|task) (\S+)", line)[1]
        games.setdefault(script, set()).add(game)
        seeds.setdefault(script, set()).update(re.findall(r"--seed (\d+)", line))
        one = {"plastic_drq_sac_dmc.py": "walker-run", "synth_cifar_plasticity.py": game}
        runs.add(re.sub(r"--seed \d+", "--seed 1", line.replace(game, one.get(script, "Alien"))))
    which = {"env_id", "task", "seed", "exp_name"} | atari.MAY_CHANGE - {"metrics_interval"}
    by_name, by_setting = {}, {}
    for run in sorted(runs):
        script, args = parsed(run)
        flags = {k: v for k, v in dataclasses.asdict(args).items() if k not in which}
        assert by_name.setdefault((script, args.exp_name), flags) == flags, run
        assert by_setting.setdefault((script, repr(flags)), args.exp_name) == args.exp_name, run
    assert {name for script, name in by_name if "synth" in script} == set(report.SYNTHETIC)
    atari_games = games["plastic_drq_rainbow_atari.py"]
    assert atari_games == games["plastic_pretrained_finetune.py"] == set(atari.RANDOM_HUMAN)
    assert games["plastic_drq_sac_dmc.py"] == set(report.CONTROL)
    assert seeds["plastic_drq_rainbow_atari.py"] == {str(seed) for seed in range(1, 11)}


SIX = "base sam ln crelu reset plastic"
TWELVE = f"{SIX} ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset"
SCALED = "ln_reset plastic ln_reset_rr4 plastic_rr4 ln_reset_rr8 plastic_rr8"


@pytest.mark.parametrize(
    "name, methods, interval",
    [
        ("table1_dmc", SIX, 100_000),
        ("table2_scaling", SCALED, 40_000),
        ("table4_ablation", TWELVE, 40_000),
        ("fig3_synthetic", TWELVE, 10),
        ("fig4_metrics", SIX.replace(" ", "_metrics ") + "_metrics", 40_000),
    ],
)
def test_names_mean_what_they_say(name, methods, interval):
    expected = {}
    for method in methods.split():
        parts = method.replace("plastic", "ln_sam_crelu_reset").split("_")
        ln, crelu, sam, reset = (part in parts for part in ("ln", "crelu", "sam", "reset"))
        expected[method] = (ln, crelu, 0.1 * sam, interval * reset)
    assert settings(name, "layer_norm crelu sam_rho reset_interval") == expected


# Of a grid, its environment before it: some flags, and their values by exp-name.
SETTINGS = """
table2_scaling: replay_ratio shrink_perturb_alpha
    ln_reset 2 1.0 | plastic 2 1.0 | ln_reset_rr4 4 0.6 | plastic_rr8 8 0.6
table3_pretrained: replay_ratio sam_rho reset_interval shrink_perturb_anchor
    pretrained_base_rr2 2 0.0 0 init | pretrained_reset_rr2 2 0.0 40000 init
    pretrained_sam_reset_rr4 4 0.1 40000 init
table3_pretrained: freeze_backbone pretrained_path
    pretrained_base_rr2 True runs/Alien__pretrain__1/model.pth
ANCHOR=pretrained MODELS=weights/{}.pth table3_pretrained: shrink_perturb_anchor pretrained_path
    pretrained_base_rr2 init weights/Alien.pth
    pretrained_reset_rr4_anchored pretrained weights/Alien.pth
STAGE=pretrain VIDEOS='my {}/1' table3_pretrained: mode env_id seed video_dir
    pretrain pretrain Alien 1 my Alien/1
fig4_metrics: metrics_interval
    base_metrics 5000
BENCHMARKS=atari fig5_sam: sam_rho sam_noise sam_scope reset_interval
    base 0.0 independent all 0 | sam 0.1 independent all 0 | sam_reused 0.1 reused all 0
    sam_noiseless 0.1 none all 0 | sam_backbone 0.1 independent backbone 0
    sam_head 0.1 independent head 0 | sam_reset 0.1 independent all 40000
    sam_reset_backbone 0.1 independent backbone 40000
    sam_reset_head 0.1 independent head 40000
BENCHMARKS=dmc fig5_sam: sam_rho sam_scope
    base 0.0 all | sam 0.1 all | sam_critic 0.1 critic | sam_actor 0.1 actor
fig6_rho_batch: sam_rho batch_size reset_interval
    sam_rho0.03 0.03 32 0 | sam_rho0.3 0.3 32 0 | sam 0.1 32 0 | base_batch16 0.0 16 0
    reset_batch64 0.0 64 40000 | sam_reset_batch16 0.1 16 40000
"""


@pytest.mark.parametrize("head, rows", re.findall(r"(\S.*)\n((?: .*\n)+)", SETTINGS))
def test_what_a_grid_sets(head, rows):
    command, _, flags = head.partition(": ")
    *env, name = shlex.split(command)
    found = settings(name, flags, **dict(pair.split("=") for pair in env))
    for row in re.split(r"[|\n]", rows.strip()):
        exp_name, *values = row.split()
        assert " ".join(map(str, found[exp_name])).split() == values


def test_plastic_as_released():
    """RELEASE.md's command has the release's 3.66M parameters (6 actions)."""
    page = (ROOT / "benchmark/RELEASE.md").read_text()
    _, args = parsed(re.search(r"^python plastic_drq_rainbow_atari.py .*", page, re.MULTILINE)[0])
    parameters = sum(w.numel() for w in atari.QNetwork(6, args).parameters())
    assert f"{parameters / 1e6:.2f}M" == "3.66M" and "3.66M" in page
    assert (args.sam_scope, args.sam_rho, args.learning_rate) == ("all", 0.1, 1.414e-4)


def test_a_grid_narrowed():
    env = dict(GAMES="Alien\nPong", SEEDS="1 2", METHODS="base plastic", rho="5")
    env |= dict(EXTRA="--total-timesteps\n10000")
    runs = [parsed(line)[1] for line in grid("table1_atari", **env).stdout.splitlines()]
    order = [(a.seed, a.env_id, a.exp_name) for a in runs]
    games = [("Alien", "base"), ("Alien", "plastic"), ("Pong", "base"), ("Pong", "plastic")]
    assert order == [(seed, *game) for seed in (1, 2) for game in games]
    assert all(a.total_timesteps == 10_000 and a.resume and a.sam_rho in (0, 0.1) for a in runs)


@pytest.mark.parametrize(
    "name, variable, value",
    [
        ("table1_atari", "GAMES", "Alien Pongg"),
        ("table1_dmc", "TASKS", "*"),
        ("table4_ablation", "METHODS", "base ln_plastic"),
        ("table3_pretrained", "STAGE", "finetune pretrain"),
        ("fig5_sam", "METHODS", "sam_critic"),  # of DeepMind Control
    ],
)
def test_what_a_grid_does_not_have(name, variable, value):
    wrong = grid(name, BENCHMARKS="atari", **{variable: value})
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith(f"error: {variable}") and value.split(" ")[-1] in wrong.stderr


# --- On this machine ---


def start(script, tmp_path, lines, *flags, **env):
    """run_local.sh or run_slurm.sh as a process, with programs of tmp_path before all others."""
    (tmp_path / "lines").write_text("\n".join(lines), errors="surrogateescape")
    command = ["bash", ROOT / f"benchmark/{script}.sh", "--logs", "logs", *flags]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "lines") as stdin:
        return subprocess.Popen(command, stdin=stdin, cwd=tmp_path, env=env, **pipes)


def run(*arguments, **env):
    """The exit code, the output, the messages."""
    process = start(*arguments, **env)
    output, error = process.communicate(timeout=300)
    return process.returncode, output, error


def stand_in(directory, name, body):
    """A program of this name."""
    (directory / name).write_text(f"#!/bin/sh\n{body}\n")
    (directory / name).chmod(0o755)


def logs(tmp_path):
    (directory,) = (tmp_path / "logs").iterdir()
    return {path.name: path.read_text(errors="replace") for path in directory.iterdir()}


def test_lines_that_failed_or_were_killed_run_again_and_no_others(tmp_path):
    lines = [f"echo {name} $PWD >> {tmp_path}/ran" for name in "ab"]
    lines += ["", "echo 'quoted  text' >&2; exit 255", "echo not text \udcff", "echo c\r"]
    for _ in range(2):
        code, output, error = run("run_local", tmp_path, lines, "-j", "2", LC_ALL="C.UTF-8")
        assert code == 1 and output.startswith("4 of 5 lines done")
        first, second = error.strip().splitlines()
        assert first == f"failed, exit code 255: {lines[3]}"
        assert second.endswith("3.log: quoted  text")
        (directory,) = (tmp_path / "logs").iterdir()
        (directory / "2.exit").write_text("")  # as a kill leaves it
    assert sorted((tmp_path / "ran").read_text().split()) == sorted(
        ["a", "b", "b", *[str(ROOT)] * 3]
    )
    assert logs(tmp_path)["5.log"] == "c\n"


def test_lines_take_the_gpus_in_turn(tmp_path):
    lines = [f"sleep 0.5; echo $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS {i}" for i in range(6)]
    env = dict(CUDA_VISIBLE_DEVICES="4,GPU-7,1", OMP_NUM_THREADS="5")
    assert run("run_local", tmp_path, lines, "-j", "2", "--no-mps", **env)[0] == 0
    taken = [logs(tmp_path)[f"{i}.log"].split()[:2] for i in range(1, 7)]
    assert sorted(taken) == [[gpu, "5"] for gpu in ("1", "1", "4", "4", "GPU-7", "GPU-7")]


def test_a_driver_that_does_not_work_is_no_gpu(tmp_path):
    stand_in(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert run("run_local", tmp_path, ["echo gpu=$CUDA_VISIBLE_DEVICES"])[0] == 0
    assert logs(tmp_path)["1.log"] == "gpu=\n"


def test_mps_is_started_and_stopped(tmp_path):
    """With stand-ins for NVIDIA's tools: two GPUs, and a daemon that notes what it is told.

    It would number the GPUs of CUDA_VISIBLE_DEVICES anew, so it does not see that variable.
    """
    told, seen = tmp_path / "told", tmp_path / "seen"
    note = f'echo "$* $(test "$1" = -d || cat) $CUDA_MPS_PIPE_DIRECTORY" >> {told}'
    note += f'; test "$1" != -d || echo $CUDA_VISIBLE_DEVICES > {seen}'
    stand_in(tmp_path, "nvidia-smi", "echo 0; echo 1")
    stand_in(tmp_path, "nvidia-cuda-mps-control", note)
    line = "sleep 0.5; echo $CUDA_VISIBLE_DEVICES $CUDA_MPS_PIPE_DIRECTORY"
    code, _, error = run("run_local", tmp_path, [f"{line} {i}" for i in range(4)], "-j", "2")
    assert (code, error) == (0, "")
    begun, stopped = (words.split() for words in told.read_text().splitlines())
    pipe = begun[-1]
    assert (begun, stopped) == (["-d", pipe], ["quit", pipe]) and not Path(pipe).exists()
    outputs = [logs(tmp_path)[f"{i}.log"].split() for i in range(1, 5)]
    assert sorted(output[:2] for output in outputs) == [[gpu, pipe] for gpu in "0011"]
    run("run_local", tmp_path, [f"{line} again"], "-j", "2", CUDA_VISIBLE_DEVICES="1")
    assert seen.read_text() == "\n"
    told.unlink()
    run("run_local", tmp_path, ["true"], "-j", "2", "--no-mps")
    run("run_local", tmp_path, ["true"])  # a line at a time
    run("run_local", tmp_path, ["true plastic_drq_sac_dmc.py"], "-j", "2")  # which renders
    assert not told.exists()


LONG = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print("saved"), sys.exit(143)))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_lines_write_their_checkpoints_and_leaves_no_process(tmp_path, signum, code):
    program = tmp_path / "long.py"
    program.write_text(LONG)
    lines = [f"{sys.executable} {program}"] * 2 + ["echo not yet"]
    process = start("run_local", tmp_path, lines, "-j", "2")
    end = time.monotonic() + 60
    while not (tmp_path / "logs").exists() or list(logs(tmp_path).values()).count("ready\n") < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    code_of_another, _, error = run("run_local", tmp_path, lines, "-j", "2")
    assert code_of_another == 1 and "another run_local.sh" in error
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on" in error
    assert logs(tmp_path)["1.log"] == logs(tmp_path)["2.log"] == "ready\nsaved\n"
    assert "3.log" not in logs(tmp_path)
    assert subprocess.run(["pgrep", "-f", program], capture_output=True).stdout == b""


@pytest.mark.parametrize(
    "script, flags, line, word",
    [
        ("run_local", "-j 0", "true", "number"),
        ("run_local", "-j", "true", "needs a value"),
        ("run_local", "", "", "no lines"),
        ("run_slurm", "--jobs 1.5", "true", "numbers"),
        ("run_slurm", "--logs a%j", "true", "another --logs"),
        ("run_slurm", "--cpus", "true", "needs a value"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(tmp_path, script, flags, line, word):
    stand_in(tmp_path, "sbatch", "")
    code, output, error = run(script, tmp_path, [line], *flags.split())
    assert (code, output, error.count("\n"), error[:7]) == (2, "", 1, "error: ")
    assert word in error


# --- Under Slurm ---


def slurm_works():
    command = ["sinfo", "-h", "-o", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("idle", "mixed")


needs_slurm = pytest.mark.skipif(
    not slurm_works(), reason="no Slurm at work here (Debian: slurm-wlm, munge)"
)
SLURM = ("--cpus", "1", "--per-gpu", "2")


@needs_slurm
def test_a_slurm_array_of_tiny_runs_one_of_them_killed_and_queued_again(tmp_path):
    env = dict(GAMES="Pong", SEEDS="1 2", METHODS="base ln")
    env["EXTRA"] = (
        "--total-timesteps 200 --learning-starts 20 --batch-size 2 --hidden-dim 8 --n-atoms 5 "
        "--buffer-size 500 --replay-ratio 1 --eval-episodes 1 --device cpu --torch-threads 1 "
        f"--checkpoint-interval 20 --run-dir {tmp_path}/runs"
    )
    lines = grid("table1_atari", **env).stdout.splitlines()
    lines = [line.replace("python", sys.executable, 1) for line in lines]
    assert len(lines) == 4
    code, output, error = run("run_slurm", tmp_path, lines, *SLURM, "--jobs", "1")
    assert code == 0, error
    assert output.startswith("submitting 2 of 2 tasks")
    job = re.search(r"Submitted batch job (\d+)", output)[1]
    code, _, error = run("run_slurm", tmp_path, lines, *SLURM)
    assert code == 1 and "queued or running" in error
    end, name = time.monotonic() + 600, f"grid-{next((tmp_path / 'logs').iterdir()).name}"
    while not (tmp_path / "runs/Pong__base__1/checkpoint.pth").exists():
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.05)
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    while subprocess.run(["squeue", "-h", "-n", name], capture_output=True).stdout:
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.5)
        # Slurm would hold a requeued task back for two minutes.
        now = ["scontrol", "update", f"jobid={job}_0", "starttime=now"]
        subprocess.run(now, capture_output=True)
    code, output, _ = run("run_slurm", tmp_path, lines, *SLURM)
    assert code == 0 and output.startswith("all lines are done"), logs(tmp_path)
    paths = (tmp_path / "runs").glob("*/result.json")
    resumed_at = {path.parent.name: json.loads(path.read_text())["resumed_at"] for path in paths}
    assert len(resumed_at) == 4
    assert len(resumed_at["Pong__base__1"]) >= 1 and resumed_at["Pong__base__2"] == []


@needs_slurm
def test_a_failing_line_under_slurm(tmp_path):
    lines = ["echo fine $OMP_NUM_THREADS", "echo wrong; exit 4", "true"]
    code, output, error = run("run_slurm", tmp_path, lines, *SLURM, "--wait")
    assert (code, error) == (1, "") and output.startswith("submitting 2 of 2 tasks")
    assert [logs(tmp_path)[f"{i}.log"] for i in (1, 2, 3)] == ["fine 1\n", "wrong\n", ""]
    assert [logs(tmp_path)[f"{i}.exit"] for i in (1, 2, 3)] == ["0\n", "4\n", "0\n"]
    # What has failed is named, and left to do.
    code, output, error = run("run_slurm", tmp_path, lines, *SLURM, "--dry-run")
    assert code == 0 and "--array 0-0%64 " in output and output.endswith("# 1 of 1 tasks\n")
    first, second = error.strip().splitlines()
    assert first == f"failed before, exit code 4: {lines[1]}" and second.endswith("2.log: wrong")


@needs_slurm
def test_a_line_that_ended_is_not_run_again_when_its_task_is(tmp_path):
    """Queued again, then cancelled: each time SIGTERM stops the other line of the task.

    Next time, lines not begun come before that one.
    """
    program = tmp_path / "long.py"
    program.write_text(LONG)
    lines = ["echo once", f"{sys.executable} {program}", "true"]
    _, output, _ = run("run_slurm", tmp_path, lines, *SLURM, "--submit", "1")
    task = re.search(r"Submitted batch job (\d+)", output)[1] + "_0"
    end, name = time.monotonic() + 240, f"grid-{next((tmp_path / 'logs').iterdir()).name}"
    while logs(tmp_path).get("2.log") != "ready\n" or "1.exit" not in logs(tmp_path):
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.1)
    subprocess.run(["scontrol", "requeue", task], check=True)
    while logs(tmp_path)["2.log"] != "ready\nsaved\nready\n":
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.5)
        now = ["scontrol", "update", f"jobid={task}", "starttime=now"]
        subprocess.run(now, capture_output=True)
    subprocess.run(["scancel", "-n", name], check=True)
    while subprocess.run(["squeue", "-h", "-n", name], capture_output=True).stdout:
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.1)
    found = logs(tmp_path)
    assert (found["1.exit"], found["1.log"]) == ("0\n", "once\n")
    assert found["2.log"] == "ready\nsaved\nready\nsaved\n"
    assert found["2.exit"] == "143\n" and "3.exit" not in found
    assert run("run_slurm", tmp_path, lines, *SLURM, "--submit", "1", "--hold")[0] == 0
    subprocess.run(["scancel", "-n", name], check=True)
    assert logs(tmp_path)["todo"] == "3\n2\n"


def test_arrays_of_slurm(tmp_path):
    """With stand-ins for it, whose arrays have 10 tasks at most; --submit says fewer."""
    lines, told = ["true"] * 50, tmp_path / "told"
    stand_in(tmp_path, "squeue", "")
    stand_in(tmp_path, "scontrol", "echo MaxArraySize = 10")
    stand_in(tmp_path, "sbatch", f'echo "$@" > {told}; echo Submitted batch job 7')
    for flags, array in ((("--submit", "8"), "0-7%7"), ((), "0-9%7")):
        others = "--jobs 7 --partition gpu --gres gpu:1 --time 5".split()
        code, output, error = run("run_slurm", tmp_path, lines, *SLURM, *others, *flags)
        assert (code, error) == (0, "") and output.endswith("Submitted batch job 7\n")
        assert output.startswith(f"submitting {8 if flags else 10} of 25 tasks; logs in")
        assert told.read_text().startswith("--partition gpu --gres gpu:1 --time 5 --job-name grid-")
        assert f" --array {array} --requeue " in told.read_text()
        assert "--cpus-per-task 2 " in told.read_text()
    told.unlink()
    dry_run = run("run_slurm", tmp_path, lines, *SLURM, "--dry-run")
    assert dry_run[0] == 0 and dry_run[1].startswith("sbatch --job-name grid-")
    assert dry_run[1].endswith("\n# 10 of 25 tasks\n")
    assert not told.exists()
    stand_in(tmp_path, "squeue", "echo 7")
    code, output, error = run("run_slurm", tmp_path, lines, *SLURM)
    assert (code, output) == (1, "") and "queued or running" in error
    stand_in(tmp_path, "squeue", "")
    stand_in(tmp_path, "sbatch", "echo too many jobs >&2; exit 3")
    code, _, error = run("run_slurm", tmp_path, lines, *SLURM)
    assert (code, error) == (3, "too many jobs\n")
