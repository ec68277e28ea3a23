"""The environment, the run and evaluation, beyond what all scripts promise (test_promises.py).

Against ale-py driven by hand, and games whose rewards and lives are written down here.
"""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from ale_py import Action, ALEInterface, LoggerMode, roms
from runs import CASES, Recording, atari, read_result, scalars, start, stop, wait_for

# --- Environment ----------------------------------------------------------------------------------


def play_by_hand(rom, num_noops, actions):
    """Yields (observation, reward, lives, game over), at first those of the start.

    In ale-py: no sticky actions, four frames a step, the maximum of the last two, 84x84 gray.
    """
    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("frame_skip", 1)
    ale.loadROM(roms.get_rom_path(rom))
    ale.reset_game()
    for _ in range(num_noops):
        ale.act(Action.NOOP)
    reward, screens = 0, [ale.getScreenGrayscale()]
    for action in [*actions, None]:
        screen = np.maximum.reduce(screens[-2:])
        observation = cv2.resize(screen, (84, 84), interpolation=cv2.INTER_LINEAR)
        yield observation, reward, ale.lives(), ale.game_over()
        reward, screens = 0, []
        while len(screens) < 4 and not ale.game_over():
            reward += ale.act(ale.getMinimalActionSet()[action])
            screens.append(ale.getScreenGrayscale())


@pytest.mark.parametrize("env_id, rom", [("Breakout", "breakout"), ("Alien", "alien")])
def test_preprocessing_equals_ale_driven_by_hand(env_id, rom):
    """For one number of no-ops from 1 to 30: the same frames, rewards, lives and end."""
    envs = atari.make_envs(env_id, 1, seed=5)
    actions = np.random.default_rng(0).integers(envs.action_space.n, size=200)
    frames, info = envs.reset()
    played = [(frames[0, 0].copy(), 0, info["lives"][0], False)]
    for action in actions:
        frames, rewards, terminated, truncated, info = envs.step(np.array([action], np.int32))
        played.append((frames[0, 0].copy(), rewards[0], info["lives"][0], terminated[0]))
        assert not truncated[0]
        if terminated[0]:
            break
    assert len(played) > 100
    assert len({frame.tobytes() for frame, *_ in played}) > 50  # something moves

    def same(step, step_by_hand):
        (frame, *rest), (frame_by_hand, *rest_by_hand) = step, step_by_hand
        over = rest[-1]  # the frame after game over is not an observation of anything
        return rest == rest_by_hand and (
            over or np.abs(frame.astype(int) - frame_by_hand).max() <= 1
        )

    assert any(
        all(map(same, played, play_by_hand(rom, num_noops, actions))) for num_noops in range(1, 31)
    )


def test_a_game_begins_with_up_to_30_no_ops_and_ends_after_half_an_hour():
    """30 no-ops; 27,000 steps are 108,000 frames, half an hour."""
    config = atari.make_envs("Pong", 1, 0).spec.config
    assert (config.noop_max, config.max_episode_steps) == (30, 27_000)


def test_reset_after_an_episode_leaves_no_step_that_ignores_its_action():
    envs = atari.make_envs("Breakout", 1, seed=0)
    envs.reset()
    rng, terminated = np.random.default_rng(0), [False]
    while not terminated[0]:
        *_, terminated, _, _ = envs.step(rng.integers(4, size=1).astype(np.int32))
    _, info = envs.reset()
    assert (info["elapsed_step"][0], info["lives"][0]) == (0, 5)
    *_, info = envs.step(np.ones(1, np.int32))
    assert info["elapsed_step"][0] == 1


# --- Run ------------------------------------------------------------------------------------------


class ScriptedEnvs:
    """In EnvPool's place, one list of games for each environment; answers in reverse order.

    A game lists (reward, lives after the step). It is over after the last one, by the time limit
    if lives are left; a step after that is an error, as EnvPool would ignore the action and reset.
    Every pixel of the n-th frame is n.
    """

    action_space = SimpleNamespace(n=3)

    def __init__(self, *games_per_env):
        self.games = [iter(games) for games in games_per_env]
        self.num_frames, self.actions = 0, []

    def frames(self, count):
        numbers = self.num_frames + 1 + np.arange(count)
        self.num_frames += count
        return np.full((count, 1, 84, 84), numbers[:, None, None, None], np.uint8)

    def reset(self):
        self.to_come = [list(next(games)) for games in self.games]
        return self.frames(len(self.games)), {"lives": np.full(len(self.games), 2)}

    def step(self, actions, env_ids=(0,)):
        self.actions += list(actions)
        env_ids = np.array(env_ids)[::-1]
        rewards, lives = np.array([self.to_come[i].pop(0) for i in env_ids]).T
        over = np.array([len(self.to_come[i]) == 0 for i in env_ids])
        info = {"lives": lives, "env_id": env_ids}
        return self.frames(len(env_ids)), rewards, over & (lives == 0), over & (lives > 0), info


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(envs, steps, **flags) is a run in which nothing is learned: agent, replay, result."""

    def train(envs, steps, evaluate=lambda *_: [1.0], **flags):
        made, make_agent = [], atari.make_agent

        def make_idle_agent(*call):
            made.extend(make_agent(*call))
            made[0].update = Mock(return_value={})
            return made

        monkeypatch.setattr(atari, "make_envs", lambda *_: envs)
        monkeypatch.setattr(atari, "evaluate", evaluate)
        monkeypatch.setattr(atari, "make_agent", make_idle_agent)
        flags |= dict(learning_starts=10, n_step=3, hidden_dim=4, n_atoms=3, device="cpu")
        atari.run(atari.Args(run_dir=str(tmp_path), total_timesteps=steps, exp_name="x", **flags))
        return *made[:2], read_result(tmp_path / "Alien__x__1")

    return train


# Two lives, then game over; a time limit with a life left; a lost life and a reward in one step; a
# game that is played on with no life left (as BankHeist is).
GAMES = [
    [(1, 2), (5, 2), (0, 1), (-3, 1), (0, 0)],
    [(0, 2), (2, 2)],
    [(7, 1), (0, 1), (0, 0)],
    [(1, 1), (0, 0), (2, 0), (0, 0)],
]


def test_transitions_are_stored_with_clipped_rewards_and_lost_lives_as_ends(train):
    envs = ScriptedEnvs(3 * GAMES)
    _, replay, _ = train(envs, 28)
    assert replay.cursor == 28
    assert replay.actions[:28].tolist() == envs.actions and set(envs.actions) == {0, 1, 2}
    by_game = [  # frames acted on (all but a game's last), rewards, dones
        ([1, 2, 3, 4, 5], [1, 1, 0, -1, 0], [0, 0, 1, 0, 1]),
        ([7, 8], [0, 1], [0, 1]),
        ([10, 11, 12], [1, 0, 0], [1, 0, 1]),
        ([14, 15, 16, 17], [1, 0, 1, 0], [1, 0, 0, 1]),
    ]
    frames, rewards, dones = map(np.concatenate, zip(*by_game, strict=True))
    assert replay.frames[:28, 5, 5].tolist() == [*frames, *(18 + frames)]
    assert replay.rewards[:28].tolist() == [*rewards, *rewards]
    assert replay.dones[:28].tolist() == [*dones, *dones]


def test_each_action_is_chosen_on_the_newest_frames(train, monkeypatch):
    """Steps 11 to 18: the fourth game, whose first step loses a life, and the first one again."""
    shown = []
    spy = lambda _, obs: shown.append(obs[0, :, 5, 5].tolist()) or torch.ones(1)  # noqa: E731
    monkeypatch.setattr(atari.Agent, "act", spy)
    train(ScriptedEnvs(2 * GAMES), 18)
    fourth_game = [[0, 0, 0, 14], [0, 0, 0, 15], [0, 0, 15, 16], [0, 15, 16, 17]]
    first_game = [[0, 0, 0, 19], [0, 0, 19, 20], [0, 19, 20, 21], [0, 0, 0, 22]]
    assert shown == fourth_game + first_game


def test_logged_returns_are_unclipped_and_whole_episodes(train, tmp_path):
    train(ScriptedEnvs(2 * GAMES), 22)
    logged = scalars(tmp_path / "Alien__x__1")
    returns = [(5, 3), (7, 2), (10, 7), (14, 3), (19, 3), (21, 2)]
    lengths = [(5, 5), (7, 2), (10, 3), (14, 4), (19, 5), (21, 2)]
    assert logged["charts/episodic_return"] == returns
    assert logged["charts/episodic_length"] == lengths


def test_speed_is_of_training_alone_and_wall_clock_of_everything(train, monkeypatch):
    """On a clock of its own: a step takes 1 s, a measurement 300 s, an evaluation 500 s."""
    clock = SimpleNamespace(now=0.0)

    def takes(seconds, function):
        def call(*args):
            clock.now += seconds
            return function(*args)

        return call

    envs = ScriptedEnvs(4 * GAMES)
    envs.step = takes(1, envs.step)
    monkeypatch.setattr(atari, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(atari, "plasticity_metrics", takes(300, lambda *_: {"x": 0.0}))
    evaluate = takes(500, lambda *_: [1.0])
    _, _, result = train(envs, 50, evaluate, metrics_interval=20, eval_interval=20)
    assert result["wall_clock_seconds"] == 50 + 2 * 300 + 3 * 500
    assert result["env_steps_per_second"] == 1
    assert result["updates_per_second"] == (50 - 10 + 1) * 2 / 50


@pytest.mark.parametrize("name", ["atari", "finetune"])
def test_a_continued_run_begins_a_new_life_with_other_no_ops(name, play, monkeypatch):
    """Stopped at step 14, the fourth of its episode; the windows that this cuts off (n = 3) are
    never sampled.

    A transition's slot is its step less 1 before the cut and its step after it: slot 14 has the
    frame that nobody acted on. Slots 12 and 13 saw no frame 3 steps on.
    """
    buffers, script = [], CASES[name].script
    begin = script.ReplayBuffer.start
    spy = lambda replay, frame: buffers.append(replay) or begin(replay, frame)  # noqa: E731
    monkeypatch.setattr(script.ReplayBuffer, "start", spy)
    monkeypatch.setattr(Recording, "seeds", [])
    with pytest.raises(SystemExit):
        play(CASES[name], {14: stop})
    play(CASES[name], resume=True)
    # Slot 0 has made room: a run of 30 steps has a buffer of 30.
    assert buffers[-1].cursor == 31
    assert buffers[-1].priorities.nonzero().flatten().tolist() == [*range(1, 12), *range(15, 31)]
    assert Recording.seeds[1] == 1
    assert 10_000 * 200_002 <= Recording.seeds[-1] < 2**31  # above each --seed and evaluation
    with pytest.raises(SystemExit):
        play(CASES[name], {12: stop}, exp_name="y")
    play(CASES[name], resume=True, exp_name="y")
    assert Recording.seeds[-1] != Recording.seeds[3]  # the first continued one's


# --- Evaluation -----------------------------------------------------------------------------------


class ScriptedNetwork:
    """Prefers action 1, by its mean; keeps the numbers of the frames that it is shown."""

    def __init__(self):
        self.support, self.head, self.shown = torch.arange(3.0), torch.nn.Identity(), []

    def __call__(self, images):
        assert not self.head.training  # no noise
        self.shown += (images[:, :, 5, 5] * 255).round().int().tolist()
        probs = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9], [0.8, 0.1, 0.1]])
        return probs.log().expand(len(images), 3, 3)

    def q_values(self, log_probs):
        return log_probs.exp() @ self.support


def evaluate(monkeypatch, *games, video=None, epsilon=0.0):
    """Play a game in each environment; returns returns, environments and network."""
    envs, network = ScriptedEnvs(*([game] for game in games)), ScriptedNetwork()
    make_envs = Mock(return_value=envs)
    monkeypatch.setattr(atari, "make_envs", make_envs)
    args = atari.Args(seed=3, eval_episodes=len(games), eval_epsilon=epsilon)
    returns = atari.evaluate(network, args, video)
    make_envs.assert_called_once_with("Alien", len(games), 40_000)  # seeds that no training has
    return returns, envs, network


def test_evaluation_plays_exactly_one_full_game_per_environment(monkeypatch):
    games = [[(1, 2)] * n + [(2, 0)] for n in (0, 7, 3)] + [[(1, 2)] * 13]
    returns, envs, network = evaluate(monkeypatch, *games)
    assert returns == [2, 9, 5, 13]  # not clipped, in the environments' order
    assert envs.to_come == [[]] * 4
    assert set(envs.actions) == {1}
    assert network.head.training  # the noise is back


def test_evaluation_stacks_four_frames_and_zeroes_them_after_a_lost_life(monkeypatch):
    """The third life is none: the game is played on for two steps."""
    game, video = [(0, 2)] * 3 + [(0, 1)] * 2 + [(0, 0)] * 3, []
    _, _, network = evaluate(monkeypatch, game, video=video)
    second_life = [[0, 0, 0, 5], [0, 0, 5, 6], [0, 5, 6, 7], [5, 6, 7, 8]]
    first_life = [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]
    assert network.shown == first_life + second_life
    assert [frame[5, 5] for frame in video] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_lost_life_empties_the_stack_of_its_own_environment(monkeypatch):
    """Answers come in reverse order; the first game is over after two steps."""
    games = [(0, 2), (0, 0)], [(0, 2)] * 3 + [(0, 1)] * 2 + [(0, 0)]
    _, _, network = evaluate(monkeypatch, *games)
    both = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 2, 3], [0, 0, 1, 4]]
    second = [[0, 2, 3, 6], [2, 3, 6, 7], [0, 0, 0, 8], [0, 0, 8, 9]]
    assert network.shown == both + second


def test_evaluation_explores_with_epsilon(monkeypatch):
    """In the same steps each time."""
    games = [[(0, 2)] * 100] * 20
    envs, again = (evaluate(monkeypatch, *games, epsilon=0.3)[1] for _ in range(2))
    assert envs.actions == again.actions
    shares = np.bincount(envs.actions) / len(envs.actions)
    np.testing.assert_allclose(shares, [0.1, 0.8, 0.1], atol=0.02)


def test_real_games_side_by_side_are_those_played_one_by_one(monkeypatch):
    args = dict(env_id="Asterix", seed=2, eval_epsilon=0.0, hidden_dim=8, n_atoms=3)
    torch.manual_seed(0)
    network = atari.QNetwork(9, atari.Args(**args))
    together = atari.evaluate(network, atari.Args(eval_episodes=3, **args))
    alone = []
    for i in range(3):
        envs = atari.make_envs("Asterix", 1, 30_000 + i)
        with monkeypatch.context() as patch:
            patch.setattr(atari, "make_envs", Mock(return_value=envs))
            alone += atari.evaluate(network, atari.Args(eval_episodes=1, **args))
    assert together == alone and len(set(alone)) > 1


@pytest.mark.soak
def test_memory_stays_flat_for_half_an_hour(tmp_path):
    """PLASTIC at full size, with metrics, evaluations and checkpoints. Prints memory by tenths."""
    run_dir, samples = tmp_path / "Alien__x__1", []
    flags = dict(run_dir=".", exp_name="x", device="cpu", torch_threads=1, learning_starts=20)
    flags |= dict(checkpoint_interval=200, metrics_interval=200, eval_interval=400, eval_episodes=2)
    process = start(CASES["atari"], flags, tmp_path)
    wait_for((run_dir / "checkpoint.pth").exists, process, 600)
    begin = time.monotonic()
    while time.monotonic() - begin < 60 * float(os.environ.get("SOAK_MINUTES", "30")):
        assert process.poll() is None, process.communicate()
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        samples.append(pages * os.sysconf("SC_PAGESIZE") / 2**20)
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    medians = [np.median(part) for part in np.array_split(samples, 10)]
    print("\nresident MiB by tenths:", ", ".join(f"{mib:.0f}" for mib in medians))
    print("steps:", scalars(run_dir)["losses/td_loss"][-1][0])
    assert max(medians[2:]) - medians[1] < 50, medians
