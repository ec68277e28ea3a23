"""The grids that benchmark/ prints, and what runs them: here, or under Slurm."""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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
    "fig4_metrics": 6 * 26 * 5,
    "fig5_sam": 10 * 26 * 5 + 4 * 11 * 5,
    "fig6_rho_batch": (2 + 4 * 3) * 26 * 5,
}
TASKS = set(
    "acrobot-swingup cartpole-swingup_sparse cheetah-run finger-turn_easy finger-turn_hard hopper-hop quadruped-run "
    "quadruped-walk reacher-easy reacher-hard walker-run".split()
)


def grid(name, **env):
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GAMES", "TASKS", "SEEDS", "METHODS")
    }
    return subprocess.run(
        ["bash", ROOT / f"benchmark/{name}.sh"], capture_output=True, text=True, env=clean | env
    )


def parsed(line):
    """The script, and its flags as resolved."""
    python, script, *flags = shlex.split(line)
    assert python == "python"
    module = MODULES[script]
    args = tyro.cli(module.Args, args=flags)
    return script, module.resolve(args) if hasattr(module, "resolve") else args


def setting(args):
    """What makes a setting: all flags but those that say which run it is, and those that may change in a run."""
    may_change = atari.MAY_CHANGE - {"metrics_interval"}
    fields = {
        name: value for name, value in dataclasses.asdict(args).items() if name not in may_change
    }
    return {
        name: value
        for name, value in fields.items()
        if name not in ("env_id", "task", "seed", "exp_name")
    }


@pytest.fixture(scope="module")
def grids():
    return {name: grid(name).stdout.splitlines() for name in LINES}


@pytest.mark.parametrize("name", LINES)
def test_the_number_of_lines(grids, name):
    assert len(grids[name]) == len(set(grids[name])) == LINES[name]
    assert all(" --resume" in line for line in grids[name])


def test_every_line_is_one_that_its_script_takes_and_a_name_means_one_setting(grids):
    """Lines that differ in game and seed alone are parsed once."""
    settings, games, seeds = {}, {}, {}
    for lines in grids.values():
        for line in lines:
            script, run = line.split()[1], re.sub(r"--seed \d+", "--seed 1", line)
            game = re.search(r"--(?:env-id|task) (\S+)", line)[1]
            games.setdefault(script, set()).add(game)
            seeds.setdefault(script, set()).update(re.findall(r"--seed (\d+)", line))
            run = run.replace(
                game,
                {"plastic_drq_sac_dmc.py": "walker-run"}.get(
                    script, game if "synth" in script else "Alien"
                ),
            )
            if run not in settings:
                settings[run] = None
    by_name = {}
    for run in settings:
        script, args = parsed(run)
        assert by_name.setdefault((script, args.exp_name), setting(args)) == setting(args), run
    names = {}
    for (script, name), value in by_name.items():
        names.setdefault((script, repr(value)), set()).add(name)
    assert all(len(same) == 1 for same in names.values()), "one setting under two names"
    assert (
        games["plastic_drq_rainbow_atari.py"]
        == games["plastic_pretrained_finetune.py"]
        == set(atari.RANDOM_HUMAN)
    )
    assert games["plastic_drq_sac_dmc.py"] == TASKS
    assert seeds["plastic_drq_rainbow_atari.py"] == {str(seed) for seed in range(1, 11)}


METHODS = "base ln sam crelu reset ln_sam ln_crelu ln_reset sam_crelu sam_reset crelu_reset plastic".split()


def test_names_mean_what_they_say():
    lines = grid("table4_ablation", GAMES="Alien", SEEDS="3").stdout.splitlines()
    on = {}
    for line in lines:
        _, args = parsed(line)
        on[args.exp_name] = (args.layer_norm, args.sam_rho > 0, args.crelu, args.reset_interval > 0)
        assert (args.env_id, args.seed, args.replay_ratio) == ("Alien", 3, 2)
        assert args.sam_rho in (0, 0.1) and args.reset_interval in (0, 40_000)
    parts = {"base": "", "plastic": "ln_sam_crelu_reset"}
    expected = {
        m: tuple(p in parts.get(m, m).split("_") for p in ("ln", "sam", "crelu", "reset"))
        for m in METHODS
    }
    assert on == expected


def test_settings_of_the_other_grids():
    def args_of(name, **env):
        runs = [
            parsed(line)[1]
            for line in grid(
                name, GAMES="Alien", TASKS="quadruped-run", SEEDS="1", **env
            ).stdout.splitlines()
        ]
        return {args.exp_name: args for args in runs}

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
    assert all(
        str(a.pretrained_path) == "runs/Alien__pretrain__1/model.pth" and a.freeze_backbone
        for a in runs.values()
    )
    anchored = args_of("table3_pretrained", ANCHOR="pretrained", MODELS="weights/{}.pth")
    assert {n: a.shrink_perturb_anchor for n, a in anchored.items() if "rr2" in n} == {
        "pretrained_base_rr2": "init", "pretrained_reset_rr2_anchored": "pretrained",
        "pretrained_sam_reset_rr2_anchored": "pretrained",
    }  # fmt: skip
    assert {str(a.pretrained_path) for a in anchored.values()} == {"weights/Alien.pth"}
    (line,) = grid(
        "table3_pretrained", GAMES="Pong", STAGE="pretrain", VIDEOS="data/{}/1"
    ).stdout.splitlines()
    assert (
        line
        == "python plastic_pretrained_finetune.py --mode pretrain --env-id Pong --video-dir data/Pong/1 --resume"
    )
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
    assert all(
        a.batch_size == int((re.findall(r"_batch(\d+)", n) or ["32"])[0]) for n, a in runs.items()
    )


def test_a_grid_narrowed():
    env = dict(
        GAMES="Alien Pong\nAlien",
        SEEDS="1 2 1",
        METHODS="base plastic",
        EXTRA="--total-timesteps\n10000",
        rho="5",
    )
    lines = grid("table1_atari", **env).stdout.splitlines()
    runs = [parsed(line)[1] for line in lines]
    assert [(a.seed, a.env_id, a.exp_name) for a in runs] == [
        (seed, game, method)
        for seed in (1, 2)
        for game in ("Alien", "Pong")
        for method in ("base", "plastic")
    ]
    assert all(a.total_timesteps == 10_000 and a.resume and a.sam_rho in (0, 0.1) for a in runs)
    (line,) = grid(
        "table3_pretrained", STAGE="pretrain", GAMES="Pong", VIDEOS="my videos/{}"
    ).stdout.splitlines()
    assert shlex.split(line)[-2] == "my videos/Pong"


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


# --- On this machine --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["parallel", "xargs"])
def run_local(request, tmp_path):
    """run_local.sh as a process on some lines, with GNU parallel or without it."""
    if request.param == "parallel" and shutil.which("parallel") is None:
        pytest.skip("GNU parallel is not installed (Debian: parallel)")
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash sh env grep sha256sum cut mkdir flock wc tr nproc sed cat seq setsid xargs pkill pgrep sleep tail dirname"
    for tool in (
        [*needed.split(), *"mktemp rm comm sort awk mv touch kill".split()]
        if request.param == "xargs"
        else []
    ):
        if shutil.which(tool):
            (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tools / "python").chmod(0o755)

    def start(lines, *flags, **env):
        command = ["bash", ROOT / "benchmark/run_local.sh", "--logs", tmp_path / "logs", *flags]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            errors="surrogateescape",
            env={"PATH": start.path, "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", **env}, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            process.stdin.write("\n".join(lines) + "\n")
            process.stdin.close()
        process.stdin = None
        return process

    start.tools, start.path = (
        tools,
        f"{tools}" if request.param == "xargs" else f"{tools}:{os.environ['PATH']}",
    )
    return start


def logs(tmp_path):
    (directory,) = (tmp_path / "logs").iterdir()
    return {path.name: path.read_text(errors="replace") for path in directory.iterdir()}


def test_a_line_that_fails_is_reported_and_the_others_go_on(run_local, tmp_path):
    lines = [
        "echo a $PWD",
        "",
        "echo 'quoted  text' >&2; exit 3",
        f'echo "$(($(cat {tmp_path}/n) + 1))" > {tmp_path}/n',
        "true",
    ]
    (tmp_path / "n").write_text("0")
    for _ in range(2):
        process = run_local(lines, "-j", "2")
        output, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert output.startswith("3 of 4 lines done")
        first, second = error.strip().splitlines()
        assert first == f"failed, exit code 3: {lines[2]}"
        assert second.endswith("2.log: quoted  text")
    assert logs(tmp_path)["1.log"] == f"a {ROOT}\n"
    assert (tmp_path / "n").read_text() == "1\n"  # what ended well is not run again
    process = run_local(["true"])
    assert (
        process.communicate(timeout=60)[0].startswith("1 of 1 lines done")
        and process.returncode == 0
    )


def test_what_is_done_is_what_ended_with_0(run_local, tmp_path):
    """Whatever the joblog says, or who ran the line; and short lines, many times, do not end the whole too early."""
    lines = [f"echo {i} >> {tmp_path}/ran" for i in range(1, 4)]
    for _ in range(15):
        process = run_local(lines, "-j", "3")
        assert process.communicate(timeout=60)[0].startswith("3 of 3 lines done")
        (directory,) = (tmp_path / "logs").iterdir()
        (directory / "2.exit").write_text("")
        (directory / "joblog").unlink(missing_ok=True)
    assert sorted((tmp_path / "ran").read_text().split()) == sorted(["1", "3", *["2"] * 15])


def test_bytes_that_are_no_text_are_lines_too(run_local, tmp_path):
    process = run_local(["echo a\udcff", "echo c\r"], LC_ALL="C.UTF-8")
    assert process.communicate(timeout=60)[0].startswith("2 of 2 lines done")
    assert logs(tmp_path)["2.log"] == "c\n"


def test_a_driver_that_does_not_work_is_no_gpu(run_local, tmp_path):
    (run_local.tools / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    (run_local.tools / "nvidia-smi").chmod(0o755)
    command = ["bash", ROOT / "benchmark/run_local.sh", "--logs", tmp_path / "logs"]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
        "PATH": run_local.path
    }
    done = subprocess.run(
        command,
        input="echo gpu=$CUDA_VISIBLE_DEVICES",
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
    )
    assert done.returncode == 0 and logs(tmp_path)["1.log"] == "gpu=\n"


def test_lines_take_the_gpus_in_turn(run_local, tmp_path):
    lines = [f"sleep 0.5; echo $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS {i}" for i in range(6)]
    process = run_local(
        lines, "-j", "2", "--no-mps", CUDA_VISIBLE_DEVICES="4,GPU-7,1", OMP_NUM_THREADS="5"
    )
    assert process.wait(timeout=60) == 0
    taken = sorted(logs(tmp_path)[f"{i}.log"].split()[0] for i in range(1, 7))
    assert taken == ["1", "1", "4", "4", "GPU-7", "GPU-7"]
    assert logs(tmp_path)["1.log"].split()[1] == "5"


def test_mps_is_started_and_stopped(run_local, tmp_path):
    """With stand-ins for NVIDIA's tools: two GPUs, and a daemon that notes what it is told."""
    told = tmp_path / "told"
    stand_ins = {
        "nvidia-smi": "echo 0; echo 1",
        "nvidia-cuda-mps-control": f'echo "$* $(test "$1" = -d || cat) $CUDA_MPS_PIPE_DIRECTORY" >> {told}',
    }
    for name, body in stand_ins.items():
        (run_local.tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (run_local.tools / name).chmod(0o755)
    lines = [
        f"sleep 0.5; echo $CUDA_VISIBLE_DEVICES $CUDA_MPS_PIPE_DIRECTORY {i}" for i in range(4)
    ]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
        "PATH": run_local.path
    }
    command = ["bash", ROOT / "benchmark/run_local.sh", "--logs", tmp_path / "logs", "-j", "2"]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, env=env, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    start, stop = told.read_text().splitlines()
    pipe = start.split()[-1]
    assert (start.split(), stop.split()) == (["-d", pipe], ["quit", pipe])
    assert not Path(pipe).exists()
    outputs = [logs(tmp_path)[f"{i}.log"].split() for i in range(1, 5)]
    assert sorted(output[0] for output in outputs) == ["0", "0", "1", "1"] and all(
        o[1] == pipe for o in outputs
    )
    told.unlink()
    done = subprocess.run(
        [*command, "--no-mps"], input="true", capture_output=True, text=True, env=env, timeout=60
    )
    assert done.returncode == 0 and not told.exists()


LONG = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved'), exit(143)));"
LONG += "print('ready', flush=True); time.sleep(600)  # {}"


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_ctrl_c_stops_the_lines_after_their_checkpoints_and_leaves_no_process(
    run_local, tmp_path, signum, code
):
    mark = time.time_ns()
    process = run_local([f'python -c "{LONG.format(mark)}"'] * 2 + ["echo not yet"], "-j", "2")
    end = time.monotonic() + 60
    while (
        sum(
            "ready" in text
            for name, text in (logs(tmp_path) if (tmp_path / "logs").exists() else {}).items()
        )
        < 2
    ):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    second = run_local([f'python -c "{LONG.format(mark)}"'] * 2 + ["echo not yet"], "-j", "2")
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
    assert (process.returncode, output, error.count("\n")) == (2, "", 1) and error.startswith(
        "error: "
    )


# --- Under Slurm ------------------------------------------------------------------------------------------------------


def slurm_works():
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("idle", "mixed")


needs_slurm = pytest.mark.skipif(
    not slurm_works(), reason="no Slurm at work here (Debian: slurm-wlm, munge)"
)


def run_slurm(tmp_path, lines, *flags):
    command = [
        "bash",
        ROOT / "benchmark/run_slurm.sh",
        "--logs",
        tmp_path / "logs",
        "--gpus",
        "0",
        "--cpus",
        "1",
        *flags,
    ]
    return subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, timeout=300
    )


@needs_slurm
def test_a_slurm_array_of_tiny_runs_one_of_them_killed_and_queued_again(tmp_path):
    env = dict(GAMES="Pong", SEEDS="1 2", METHODS="base ln")
    env["EXTRA"] = (
        "--total-timesteps 200 --learning-starts 20 --batch-size 2 --hidden-dim 8 --n-atoms 5 --buffer-size 500 "
        "--replay-ratio 1 --eval-episodes 1 --device cpu --torch-threads 1 --checkpoint-interval 20 "
        f"--run-dir {tmp_path}/runs"
    )
    lines = [
        line.replace("python", sys.executable, 1)
        for line in grid("table1_atari", **env).stdout.splitlines()
    ]
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
        subprocess.run(
            ["scontrol", "update", f"jobid={job}_0", "starttime=now"], capture_output=True
        )
    done = run_slurm(tmp_path, lines, "--per-gpu", "2")
    assert (done.returncode, done.stdout.startswith("all lines are done")) == (0, True), logs(
        tmp_path
    )
    results = {
        path.parent.name: atari.json.loads(path.read_text())
        for path in (tmp_path / "runs").glob("*/result.json")
    }
    assert len(results) == 4
    assert (
        len(results["Pong__base__1"]["resumed_at"]) >= 1
        and results["Pong__base__2"]["resumed_at"] == []
    )


@needs_slurm
def test_a_failing_line_under_slurm(tmp_path):
    done = run_slurm(tmp_path, ["echo fine", "echo wrong; exit 4", "true"], "--wait")
    assert done.returncode == 1 and "2 of 3 lines done" in done.stdout
    assert (
        "failed, exit code 4: echo wrong; exit 4" in done.stderr
        and done.stderr.strip().endswith("2.log: wrong")
    )
    for flags, words in (
        (["--gpus", "a100:1"], "numbers"),
        (["--logs", "a,b"], "path"),
        (["--cpus"], "needs a value"),
    ):
        bad = run_slurm(tmp_path, ["true"], *flags)
        assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (
            2,
            "",
            1,
        ) and words in bad.stderr
    done = run_slurm(tmp_path, ["echo fine", "echo wrong; exit 4", "true"], "--dry-run")
    assert "--array 0-0%64 " in done.stdout


@needs_slurm
def test_a_grid_larger_than_an_array(tmp_path):
    done = run_slurm(
        tmp_path,
        ["true"] * 2500,
        "--dry-run",
        "--per-gpu",
        "1",
        "--jobs",
        "7",
        "--partition",
        "gpu",
        "--time",
        "5",
    )
    first, second, third = done.stdout.splitlines()
    arrays = [re.search(r"--array (\S+) ", line)[1] for line in (first, second, third)]
    assert arrays == ["0-1000%7", "0-1000%7", "0-497%7"]  # MaxArraySize 1001 by default
    assert "dependency" not in first and "afterany:" in second and "GRID_OFFSET=2002," in third
    assert "--partition gpu" in first and "--time 5" in first and "--requeue" in first
