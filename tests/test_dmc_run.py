"""The DeepMind Control script's run beyond what all scripts promise (test_promises.py)."""

from ctypes.util import find_library

import numpy as np
import pytest
from runs import CASES, Scripted, dmc, flags_of, read_result, scalars, start, stop

CASE = CASES["dmc"]


@pytest.fixture
def stored(monkeypatch):
    """(action, terminated) of each transition that goes into the replay buffer."""
    transitions, add = [], dmc.ReplayBuffer.add

    def spy(self, action, reward, terminated, frame):
        transitions.append((action, bool(terminated)))
        add(self, action, reward, terminated, frame)

    monkeypatch.setattr(dmc.ReplayBuffer, "add", spy)
    return transitions


@pytest.mark.parametrize("repeat", [2, 3])
def test_steps_of_the_environment_are_the_agents_times_the_repeats(play, tmp_path, repeat):
    play(CASE, action_repeat=repeat, total_timesteps=30 * repeat)
    result = read_result(tmp_path / CASE.dir)
    assert (result["agent_steps"], result["env_steps"]) == (30, 30 * repeat)


def test_an_action_that_is_not_finite_is_not_played(play, monkeypatch, stored):
    """Also where the losses, which are of the update before, are finite."""
    original, learning_starts = dmc.Agent.act, flags_of(CASE, None)["learning_starts"]

    def act(self, obs):
        return original(self, obs) + (float("nan") if len(stored) >= learning_starts + 3 else 0)

    monkeypatch.setattr(dmc.Agent, "act", act)
    with pytest.raises(SystemExit, match="action is not finite"):
        play(CASE)
    assert all(np.isfinite(action).all() for action, _ in stored)


def test_an_update_comes_before_its_steps_transition(play, monkeypatch):
    """The first one at step learning_starts, on the transitions of the steps before."""
    seen, original = [], dmc.ReplayBuffer.sample

    def sample(self, batch_size, generator):
        seen.append(int(self.valid.sum()))
        assert self.num_slots == 30 + 3 + 3  # of 30 steps in 3 episodes, not of a million
        return original(self, batch_size, generator)

    monkeypatch.setattr(dmc.ReplayBuffer, "sample", sample)
    play(CASE, updates_per_step=2)
    assert seen == [n for step in range(8, 31) for n in (step - 1, step - 1)]


@pytest.mark.parametrize("by_the_task", [False, True])
def test_only_the_tasks_own_end_ends_the_return(play, stored, tmp_path, monkeypatch, by_the_task):
    """Episodes of 10 steps: a time limit is stored as no end at all."""
    step = Scripted.step

    def swapped(self, action):
        frame, reward, terminated, truncated, info = step(self, action)
        return frame, reward, truncated, terminated, info

    if by_the_task:
        monkeypatch.setattr(Scripted, "step", swapped)
    play(CASE)
    assert [end for _, end in stored] == [by_the_task and n % 10 == 0 for n in range(1, 31)]
    logged, sums = scalars(tmp_path / CASE.dir), [float(action.sum()) for action, _ in stored]
    assert logged["charts/episodic_length"] == [(10, 10), (20, 10), (30, 10)]
    returns = [(n, pytest.approx(sum(sums[n - 10 : n]), abs=1e-5)) for n in (10, 20, 30)]
    assert logged["charts/episodic_return"] == returns


def test_the_first_actions_are_uniform(play, stored):
    play(CASE, total_timesteps=1204, learning_starts=600)
    first = np.array([action for action, _ in stored[:600]])
    assert first.shape == (600, 2) and np.abs(first).max() <= 1
    counts, _ = np.histogram(first, bins=4, range=(-1, 1))
    assert np.abs(counts - 300).max() < 5 * 300**0.5


def test_a_continued_run_begins_an_episode_of_its_own(play, monkeypatch):
    with pytest.raises(SystemExit):
        play(CASE, {14: stop})
    monkeypatch.setattr(Scripted, "seeds", [])
    play(CASE, resume=True)
    assert Scripted.seeds[0] >= 10_000 * 200_002  # above each --seed and evaluation
    assert Scripted.seeds[1:] == [None]  # the suite's own stream goes on


def test_values_that_are_auto_or_the_tasks():
    for env_id, *expected in (
        ("quadruped-walk", 0.1, 2, 1_000_000),
        ("cheetah-run", 0.01, 4, 500_000),
        ("reacher-easy", 0.01, 4, 500_000),
        ("reacher-hard", 0.01, 2, 1_000_000),
    ):
        args = dmc.Args(env_id=env_id)
        assert [args.sam_rho, args.action_repeat, args.agent_steps] == expected
    own = dmc.Args(env_id="quadruped-run", sam_rho=0.0, action_repeat=8, device="cpu")
    assert (own.sam_rho, own.action_repeat, own.replay_device) == (0.0, 8, "cpu")


def test_defaults_are_the_papers_table_6():
    table = dict(grayscale=True, image_size=64, frame_stack=3, gamma=0.99, batch_size=512)
    table |= dict(learning_rate=3e-4, latent_dim=50, hidden_dim=256, target_ema=0.995)
    table |= dict(initial_temperature=0.1, updates_per_step=1, buffer_size=1_000_000)
    table |= dict(total_timesteps=2_000_000, reset_interval=100_000)
    table |= dict(eval_episodes=10)  # section 4.1
    table |= dict(learning_starts=1_000, aug_shift=4, render_quality="full")  # not in the paper
    args = vars(dmc.Args())
    assert {name: args[name] for name in table} == table


def test_cheetahs_model_gives_no_warnings(caplog):
    dmc.make_env(dmc.Args(env_id="cheetah-run"))
    assert caplog.text == ""


@pytest.mark.parametrize(
    "renderer", ["osmesa", *(pytest.param(n, marks=pytest.mark.slow) for n in ("glfw", "nonsense"))]
)
def test_a_renderer_that_does_not_work(tmp_path, data, renderer):
    if renderer == "osmesa" and find_library("OSMesa"):
        pytest.skip("libOSMesa is installed")
    shell = f"export MUJOCO_GL={renderer} DISPLAY= PYTHONWARNINGS=ignore;"
    process = start(CASE, flags_of(CASE, data), tmp_path, shell)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, output) == (1, "")
    assert error.startswith(f"error: MuJoCo cannot render with MUJOCO_GL={renderer}: install")
    assert "Traceback" not in error


def test_an_importer_without_a_renderer_gets_an_exception():
    """SystemExit would end pytest, or a notebook's kernel."""
    with pytest.raises(RuntimeError, match=r"^MuJoCo cannot render with .* install"):
        dmc.no_renderer(ImportError("no library"))
