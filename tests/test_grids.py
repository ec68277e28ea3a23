"""The grids that benchmark/ prints, and what runs them: here, or under Slurm."""

import contextlib
import dataclasses
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
import plastic_drq_sac_dmc as dmc
import plastic_pretrained_finetune as finetune
import synth_cifar_plasticity as synth

ROOT = Path(__file__).parent.parent
MODULES = {f"{module.__name__}.py": module for module in (atari, dmc, finetune, synth)}
LINES = {  # of each grid: 26 games, 11 tasks, 10 or 5 seeds
    "table1_atari": 6 * 26 * 10,
    "table1_dmc": 6 * 11 * 10,
    "table2_scaling": 2 * 3 * 26 * 5,
    "table3_pretrained": 6 * 26 * 5,
    "table4_ablation": 12 * 26 * 10,
    "fig3_synthetic": 12 * 2,
    "fig3_beyond": 10 * 2,
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
    return script, tyro.cli(MODULES[script].Args, args=flags)


def setting(args):
    """All flags but those that say which run it is, and those that may change in a run."""
    which = {"env_id", "task", "seed", "exp_name"} | atari.MAY_CHANGE - {"metrics_interval"}
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in which}


@pytest.fixture(scope="module")
def grids():
    return {name: grid(name).stdout.splitlines() for name in LINES}


@pytest.mark.parametrize("name", LINES)
def test_the_number_of_lines(grids, name):
    assert len(grids[name]) == len(set(grids[name])) == LINES[name]
    assert all(" --resume" in line for line in grids[name])


def test_every_line_is_one_that_its_script_takes_and_a_name_means_one_setting(grids):
    """Lines that differ in game and seed alone are parsed once."""
    runs, games, seeds = set(), {}, {}
    for line in (line for lines in grids.values() for line in lines):
        script, game = line.split()[1], re.search(r"--(?:env-id|task) (\S+)", line)[1]
        games.setdefault(script, set()).add(game)
        seeds.setdefault(script, set()).update(re.findall(r"--seed (\d+)", line))
        one = {"plastic_drq_sac_dmc.py": "walker-run", "synth_cifar_plasticity.py": game}
        runs.add(re.sub(r"--seed \d+", "--seed 1", line.replace(game, one.get(script, "Alien"))))
    by_name, names = {}, {}
    for run in sorted(runs):
        script, args = parsed(run)
        assert by_name.setdefault((script, args.exp_name), setting(args)) == setting(args), run
        names.setdefault((script, repr(setting(args))), set()).add(args.exp_name)
    assert all(len(same) == 1 for same in names.values()), "one setting under two names"
    assert {name for script, name in by_name if "synth" in script} == set(report.SYNTHETIC)
    atari_games = games["plastic_drq_rainbow_atari.py"]
    assert atari_games == games["plastic_pretrained_finetune.py"] == set(atari.RANDOM_HUMAN)
    assert games["plastic_drq_sac_dmc.py"] == set(report.CONTROL)
    assert seeds["plastic_drq_rainbow_atari.py"] == {str(seed) for seed in range(1, 11)}


def test_names_mean_what_they_say():
    lines = grid("table4_ablation", GAMES="Alien", SEEDS="3").stdout.splitlines()
    on = {}
    for line in lines:
        _, args = parsed(line)
        on[args.exp_name] = (args.layer_norm, args.sam_rho > 0, args.crelu, args.reset_interval > 0)
        assert (args.env_id, args.seed, args.replay_ratio) == ("Alien", 3, 2)
        assert args.sam_rho in (0, 0.1) and args.reset_interval in (0, 40_000)
    pairs = "ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset".split()
    expected = {"base": "", "plastic": "ln_sam_crelu_reset"}
    expected |= {name: name for name in ["ln", "sam", "crelu", "reset", *pairs]}
    order = ("ln", "sam", "crelu", "reset")
    assert on == {name: tuple(p in parts for p in order) for name, parts in expected.items()}


def test_settings_of_the_other_grids():
    def args_of(name, **env):
        lines = grid(name, GAMES="Alien", TASKS="quadruped-run", SEEDS="1", **env).stdout
        return {args.exp_name: args for _, args in map(parsed, lines.splitlines())}

    runs = args_of("table2_scaling")
    assert {n: (a.replay_ratio, a.shrink_perturb_alpha, a.crelu, a.sam_rho, a.layer_norm) for n, a in runs.items()} == {
        "ln_reset": (2, 1.0, False, 0, True), "plastic": (2, 1.0, True, 0.1, True),
        "ln_reset_rr4": (4, 0.6, False, 0, True), "plastic_rr4": (4, 0.6, True, 0.1, True),
        "ln_reset_rr8": (8, 0.6, False, 0, True), "plastic_rr8": (8, 0.6, True, 0.1, True),
    }  # fmt: skip
    runs = args_of("table3_pretrained")
    assert {n: (a.replay_ratio, a.sam_rho, a.reset_interval, a.shrink_perturb_anchor) for n, a in runs.items()} == {
        f"pretrained_{method}_rr{ratio}": (ratio, rho, interval, "init")
        for ratio in (2, 4)
        for method, rho, interval in (("base", 0, 0), ("reset", 0, 40_000), ("sam_reset", 0.1, 40_000))
    }  # fmt: skip
    paths = {str(a.pretrained_path) for a in runs.values() if a.freeze_backbone}
    assert paths == {"runs/Alien__pretrain__1/model.pth"}
    anchored = args_of("table3_pretrained", ANCHOR="pretrained", MODELS="weights/{}.pth")
    assert {n: a.shrink_perturb_anchor for n, a in anchored.items() if "rr2" in n} == {
        "pretrained_base_rr2": "init", "pretrained_reset_rr2_anchored": "pretrained",
        "pretrained_sam_reset_rr2_anchored": "pretrained",
    }  # fmt: skip
    assert {str(a.pretrained_path) for a in anchored.values()} == {"weights/Alien.pth"}
    pretrain = dict(GAMES="Pong", STAGE="pretrain", VIDEOS="my videos/{}/1")
    (line,) = grid("table3_pretrained", **pretrain).stdout.splitlines()
    flags = [
        "--mode",
        "pretrain",
        "--env-id",
        "Pong",
        "--video-dir",
        "my videos/Pong/1",
        "--resume",
    ]
    assert shlex.split(line) == ["python", "plastic_pretrained_finetune.py", *flags]
    runs = args_of("fig4_metrics")
    assert list(runs) == [f"{m}_metrics" for m in "base sam ln crelu reset plastic".split()]
    assert {a.metrics_interval for a in runs.values()} == {5000}
    runs = args_of("fig5_sam", BENCHMARKS="atari")
    assert {n: (a.sam_noise, a.sam_scope, a.reset_interval > 0) for n, a in runs.items() if a.sam_rho > 0} == {
        "sam": ("independent", "all", False), "sam_reused": ("reused", "all", False),
        "sam_noiseless": ("none", "all", False),
        "sam_backbone": ("independent", "backbone", False), "sam_head": ("independent", "head", False),
        "sam_reset": ("independent", "all", True), "sam_reset_backbone": ("independent", "backbone", True),
        "sam_reset_head": ("independent", "head", True),
    }  # fmt: skip
    runs = args_of("fig5_sam", BENCHMARKS="dmc")
    assert {n: (a.sam_rho, a.sam_scope) for n, a in runs.items()} == {
        "base": (0, "all"), "sam": (0.1, "all"), "sam_critic": (0.1, "critic"), "sam_actor": (0.1, "actor")
    }  # fmt: skip
    runs = args_of("fig6_rho_batch")
    assert {n: a.sam_rho for n, a in runs.items() if "_batch" not in n and "sam" in n} == {
        "sam": 0.1, "sam_rho0.03": 0.03, "sam_rho0.3": 0.3, "sam_reset": 0.1
    }  # fmt: skip
    assert {a.batch_size for a in runs.values()} == {16, 32, 64}
    for name, args in runs.items():
        assert args.batch_size == int(name.partition("_batch")[2] or 32)


def test_plastic_as_released():
    """RELEASE.md's command has the release's 3.66M parameters (6 actions)."""
    page = (ROOT / "benchmark/RELEASE.md").read_text()
    _, args = parsed(re.search(r"^python plastic_drq_rainbow_atari.py .*", page, re.MULTILINE)[0])
    parameters = sum(w.numel() for w in atari.QNetwork(6, args).parameters())
    assert f"{parameters / 1e6:.2f}M" == "3.66M" and "3.66M" in page
    assert (args.sam_scope, args.sam_rho, args.learning_rate) == ("backbone", 0.1, 1.414e-4)


def test_a_grid_narrowed():
    env = dict(GAMES="Alien Pong\nAlien", SEEDS="1 2 1", METHODS="base plastic", rho="5")
    env |= dict(EXTRA="--total-timesteps\n10000")
    runs = [parsed(line)[1] for line in grid("table1_atari", **env).stdout.splitlines()]
    assert [(a.seed, a.env_id, a.exp_name) for a in runs] == [
        (seed, game, method)
        for seed in (1, 2)
        for game in ("Alien", "Pong")
        for method in ("base", "plastic")
    ]
    assert all(a.total_timesteps == 10_000 and a.resume and a.sam_rho in (0, 0.1) for a in runs)


@pytest.mark.parametrize(
    "name, env, word",
    [
        ("table1_atari", {"GAMES": "Alien Pongg"}, "Pongg"), ("table1_dmc", {"TASKS": "*"}, "*"),
        ("table2_scaling", {"RATIOS": "3"}, "RATIOS"), ("table3_pretrained", {"ANCHOR": "no"}, "ANCHOR"),
        ("table4_ablation", {"METHODS": "sam_ln"}, "sam_ln"), ("table1_atari", {"SEEDS": "1 x"}, "SEEDS"),
        ("fig3_synthetic", {"SWEEP": "yes"}, "SWEEP"), ("fig5_sam", {"BENCHMARKS": "synth"}, "synth"),
        ("fig6_rho_batch", {"METHODS": "sam_batch32"}, "sam_batch32"), ("table1_atari", {"METHODS": " "}, "METHODS"),
        ("table1_atari", {"SEEDS": "01"}, "01"), ("table3_pretrained", {"STAGE": "finetune pretrain"}, "STAGE"),
    ],
)  # fmt: skip
def test_what_a_grid_does_not_have(name, env, word):
    wrong = grid(name, **env)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith("error: ") and word in wrong.stderr


# --- On this machine ---


@pytest.fixture
def run_local(tmp_path):
    """run_local.sh as a process on some lines."""
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_in(tools, "python", f'exec "{sys.executable}" "$@"')

    def start(lines, *flags, **env):
        command = ["bash", ROOT / "benchmark/run_local.sh", "--logs", tmp_path / "logs", *flags]
        path = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            errors="surrogateescape", env=path | env, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            process.stdin.write("\n".join(lines) + "\n")
            process.stdin.close()
        process.stdin = None
        return process

    start.tools = tools
    return start


def stand_in(directory, name, body):
    """A program of this name."""
    (directory / name).write_text(f"#!/bin/sh\n{body}\n")
    (directory / name).chmod(0o755)


def logs(tmp_path):
    (directory,) = (tmp_path / "logs").iterdir()
    return {path.name: path.read_text(errors="replace") for path in directory.iterdir()}


def test_a_line_that_fails_is_reported_and_the_others_go_on(run_local, tmp_path):
    lines = [
        "echo a $PWD",
        "",
        "echo 'quoted  text' >&2; exit 255",
        f"echo again >> {tmp_path}/ran",
        "true",
    ]
    for _ in range(2):
        process = run_local(lines, "-j", "2")
        output, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert output.startswith("3 of 4 lines done")
        first, second = error.strip().splitlines()
        assert first == f"failed, exit code 255: {lines[2]}"
        assert second.endswith("2.log: quoted  text")
    assert logs(tmp_path)["1.log"] == f"a {ROOT}\n"
    assert (tmp_path / "ran").read_text() == "again\n"  # what ended well is not run again


def test_short_lines_do_not_end_the_whole_too_early(run_local, tmp_path):
    lines = [f"echo {i} >> {tmp_path}/ran" for i in range(1, 4)]
    for _ in range(15):
        process = run_local(lines, "-j", "3")
        assert process.communicate(timeout=60)[0].startswith("3 of 3 lines done")
        (directory,) = (tmp_path / "logs").iterdir()
        (directory / "2.exit").write_text("")  # as if it had been killed
    assert sorted((tmp_path / "ran").read_text().split()) == sorted(["1", "3", *["2"] * 15])


def test_bytes_that_are_no_text_are_lines_too(run_local, tmp_path):
    process = run_local(["echo a\udcff", "echo c\r"], LC_ALL="C.UTF-8")
    assert process.communicate(timeout=60)[0].startswith("2 of 2 lines done")
    assert logs(tmp_path)["2.log"] == "c\n"


def test_a_driver_that_does_not_work_is_no_gpu(run_local, tmp_path):
    stand_in(run_local.tools, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert run_local(["echo gpu=$CUDA_VISIBLE_DEVICES"]).wait(timeout=60) == 0
    assert logs(tmp_path)["1.log"] == "gpu=\n"


def test_lines_take_the_gpus_in_turn(run_local, tmp_path):
    lines = [f"sleep 0.5; echo $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS {i}" for i in range(6)]
    env = dict(CUDA_VISIBLE_DEVICES="4,GPU-7,1", OMP_NUM_THREADS="5")
    assert run_local(lines, "-j", "2", "--no-mps", **env).wait(timeout=60) == 0
    taken = sorted(logs(tmp_path)[f"{i}.log"].split()[0] for i in range(1, 7))
    assert taken == ["1", "1", "4", "4", "GPU-7", "GPU-7"]
    assert logs(tmp_path)["1.log"].split()[1] == "5"


def test_mps_is_started_and_stopped(run_local, tmp_path):
    """With stand-ins for NVIDIA's tools: two GPUs, and a daemon that notes what it is told."""
    told = tmp_path / "told"
    note = f'echo "$* $(test "$1" = -d || cat) $CUDA_MPS_PIPE_DIRECTORY" >> {told}'
    stand_in(run_local.tools, "nvidia-smi", "echo 0; echo 1")
    stand_in(run_local.tools, "nvidia-cuda-mps-control", note)
    line = "sleep 0.5; echo $CUDA_VISIBLE_DEVICES $CUDA_MPS_PIPE_DIRECTORY"
    process = run_local([f"{line} {i}" for i in range(4)], "-j", "2")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    start, stop = told.read_text().splitlines()
    pipe = start.split()[-1]
    assert (start.split(), stop.split()) == (["-d", pipe], ["quit", pipe])
    assert not Path(pipe).exists()
    outputs = [logs(tmp_path)[f"{i}.log"].split() for i in range(1, 5)]
    assert sorted(output[:2] for output in outputs) == [[gpu, pipe] for gpu in "0011"]
    told.unlink()
    assert run_local(["true"], "-j", "2", "--no-mps").wait(timeout=60) == 0 and not told.exists()
    line = "true plastic_drq_sac_dmc.py"  # which renders
    assert run_local([line], "-j", "2").wait(timeout=60) == 0 and not told.exists()


LONG = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved'), exit(143)));"
LONG += "print('ready', flush=True); time.sleep(600)  # {}"


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_ctrl_c_stops_the_lines_after_their_checkpoints_and_leaves_no_process(
    run_local, tmp_path, signum, code
):
    mark = time.time_ns()
    lines = [f'python -c "{LONG.format(mark)}"'] * 2 + ["echo not yet"]
    process = run_local(lines, "-j", "2")
    end = time.monotonic() + 60
    while not (tmp_path / "logs").exists() or list(logs(tmp_path).values()).count("ready\n") < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    second = run_local(lines, "-j", "2")
    assert "another run_local.sh" in second.communicate(timeout=60)[1] and second.returncode == 1
    os.kill(process.pid, signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on" in error
    assert logs(tmp_path)["1.log"] == logs(tmp_path)["2.log"] == "ready\nsaved\n"
    assert "3.log" not in logs(tmp_path)
    assert subprocess.run(["pgrep", "-f", str(mark)], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(
    "flags, lines",
    [(["-j", "0"], ["true"]), (["-j"], ["true"]), (["--jobs"], ["true"]), ([], [""])],
)
def test_bad_input(run_local, flags, lines):
    process = run_local(lines, *flags)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")


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


def run_slurm(tmp_path, lines, *flags, **env):
    command = ["bash", ROOT / "benchmark/run_slurm.sh", "--logs", tmp_path / "logs"]
    return subprocess.run(
        [*command, "--gpus", "0", "--cpus", "1", *flags], input="\n".join(lines),
        capture_output=True, text=True, timeout=300, env=os.environ | env,
    )  # fmt: skip


@needs_slurm
def test_a_slurm_array_of_tiny_runs_one_of_them_killed_and_queued_again(tmp_path):
    env = dict(GAMES="Pong", SEEDS="1 2", METHODS="base ln")
    env["EXTRA"] = (
        "--total-timesteps 200 --learning-starts 20 --batch-size 2 --hidden-dim 8 --n-atoms 5 --buffer-size 500 "
        "--replay-ratio 1 --eval-episodes 1 --device cpu --torch-threads 1 --checkpoint-interval 20 "
        f"--run-dir {tmp_path}/runs"
    )
    lines = grid("table1_atari", **env).stdout.splitlines()
    lines = [line.replace("python", sys.executable, 1) for line in lines]
    assert len(lines) == 4
    done = run_slurm(tmp_path, lines, "--per-gpu", "2", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    job = re.search(r"array (\d+), 2 tasks", done.stdout)[1]
    again = run_slurm(tmp_path, lines, "--per-gpu", "2")
    assert again.returncode == 1 and "queued or running" in again.stderr
    checkpoint = tmp_path / "runs" / "Pong__base__1" / "checkpoint.pth"
    end = time.monotonic() + 300
    while not checkpoint.exists():
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.05)
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    name = f"grid-{next((tmp_path / 'logs').iterdir()).name}"
    end = time.monotonic() + 600
    while subprocess.run(["squeue", "-h", "-n", name], capture_output=True, text=True).stdout:
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.5)
        # Slurm would hold a requeued task back for two minutes.
        now = ["scontrol", "update", f"jobid={job}_0", "starttime=now"]
        subprocess.run(now, capture_output=True)
    done = run_slurm(tmp_path, lines, "--per-gpu", "2")
    assert done.returncode == 0 and done.stdout.startswith("all lines are done"), logs(tmp_path)
    paths = (tmp_path / "runs").glob("*/result.json")
    resumed_at = {path.parent.name: json.loads(path.read_text())["resumed_at"] for path in paths}
    assert len(resumed_at) == 4
    assert len(resumed_at["Pong__base__1"]) >= 1 and resumed_at["Pong__base__2"] == []


@needs_slurm
def test_a_failing_line_under_slurm(tmp_path):
    lines = ["echo fine", "echo wrong; exit 4", "true"]
    done = run_slurm(tmp_path, lines, "--wait")
    assert done.returncode == 1 and "2 of 3 lines done" in done.stdout
    assert "failed, exit code 4: echo wrong; exit 4" in done.stderr
    assert done.stderr.strip().endswith("2.log: wrong")
    for flags, words in (
        (["--gpus", "a100:1"], "numbers"),
        (["--logs", "a,b"], "path"),
        (["--cpus"], "needs a value"),
    ):
        bad = run_slurm(tmp_path, ["true"], *flags)
        assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
        assert words in bad.stderr
    assert "--array 0-0%64 " in run_slurm(tmp_path, lines, "--dry-run").stdout


@needs_slurm
def test_a_grid_larger_than_an_array(tmp_path):
    flags = "--dry-run --per-gpu 1 --jobs 7 --partition gpu --time 5".split()
    done = run_slurm(tmp_path, ["true"] * 2500, *flags)
    first, second, third = done.stdout.splitlines()
    arrays = [re.search(r"--array (\S+) ", line)[1] for line in (first, second, third)]
    assert arrays == ["0-1000%7", "0-1000%7", "0-497%7"]  # MaxArraySize 1001 by default
    assert "dependency" not in first and "afterany:" in second and "GRID_OFFSET=2002," in third
    assert "--partition gpu" in first and "--time 5" in first and "--requeue" in first


def test_a_limit_of_queued_jobs(tmp_path):
    """With stand-ins for Slurm: one that takes a single array of 10, or what --submit says."""
    for name, body in {
        "squeue": "",
        "scontrol": "echo MaxArraySize = 10",
        "sbatch": f"test -e {tmp_path}/full && exit 1; touch {tmp_path}/full; echo 7",
    }.items():
        stand_in(tmp_path, name, body)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = run_slurm(tmp_path, ["true"] * 50, "--per-gpu", "2", **env)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "10 of 25 tasks are submitted, the same command goes on" in done.stderr
    (tmp_path / "full").unlink()
    done = run_slurm(tmp_path, ["true"] * 50, "--per-gpu", "2", "--submit", "8", **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "array 7, 8 tasks\n8 of 25 tasks are submitted, the same" in done.stdout
