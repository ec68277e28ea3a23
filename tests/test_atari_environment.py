"""The environment, the order of data, and evaluation, against ale-py driven by hand and recorded stand-ins."""

import json
from types import SimpleNamespace

import ale_py
import cv2
import numpy as np
import pytest
import torch
from ale_py import Action, ALEInterface, roms

import plastic_drq_rainbow_atari as atari

# --- Preprocessing ----------------------------------------------------------------------------------------------------


class HandDrivenAtari:
    """One game in ale-py: no sticky actions, frame skip 4, the maximum of the last two frames, 84x84 gray."""

    def __init__(self, game, noops):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("frame_skip", 1)
        self.ale.loadROM(roms.get_rom_path(game))
        self.actions = self.ale.getMinimalActionSet()
        self.ale.reset_game()
        for _ in range(noops):
            self.ale.act(Action.NOOP)

    def observe(self, *screens):
        return cv2.resize(np.maximum.reduce(screens), (84, 84), interpolation=cv2.INTER_LINEAR)

    def first(self):
        return self.observe(self.ale.getScreenGrayscale())

    def step(self, action):
        reward, screens = 0, []
        for frame in range(4):
            reward += self.ale.act(self.actions[action])
            if frame >= 2 or self.ale.game_over():
                screens.append(self.ale.getScreenGrayscale())
            if self.ale.game_over():
                break
        return self.observe(*screens[-2:]), reward, self.ale.lives(), self.ale.game_over()


def same_frame(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


ROMS = {"Pong": "pong", "Breakout": "breakout", "RoadRunner": "road_runner", "Alien": "alien"}


@pytest.mark.parametrize("env_id, rom", ROMS.items(), ids=ROMS)
def test_preprocessing_equals_ale_driven_by_hand(env_id, rom):
    """For one number of no-ops from 1 to 30, 200 steps give the same frames, rewards, lives and ends."""
    envs = atari.make_envs(env_id, 1, seed=5)
    frames, info = envs.reset()
    actions = np.random.default_rng(0).integers(envs.action_space.n, size=200)
    recorded, first, first_lives = [], frames[0, 0].copy(), int(info["lives"][0])
    for action in actions:
        frames, rewards, terminated, truncated, info = envs.step(np.array([action], dtype=np.int32))
        recorded.append(
            (frames[0, 0].copy(), float(rewards[0]), int(info["lives"][0]), bool(terminated[0]))
        )
        assert not truncated[0]
        if terminated[0]:
            break
    assert len(recorded) > 100
    assert len({frame.tobytes() for frame, *_ in recorded}) > 50  # something moves

    def agrees(noops):
        game = HandDrivenAtari(rom, noops)
        assert len(game.actions) == envs.action_space.n  # the minimal action set
        if not same_frame(game.first(), first) or game.ale.lives() != first_lives:
            return False
        for action, (frame, *rest) in zip(actions, recorded, strict=False):
            by_hand, *rest_by_hand = game.step(action)
            over = rest[
                -1
            ]  # the frame after game over is not an observation of anything: nobody uses it
            if rest_by_hand != rest or not (over or same_frame(by_hand, frame)):
                return False
        return True

    assert any(agrees(noops) for noops in range(1, 31))


def test_each_environment_has_its_own_seed_and_seeds_repeat():
    def memory(num_envs, seed):
        """The consoles' RAM after the starting no-ops, whose number the seed decides."""
        _, info = atari.make_envs("Breakout", num_envs, seed).reset()
        return info["ram"].copy()

    three = memory(3, 7)
    np.testing.assert_array_equal(three, memory(3, 7))
    for i in range(3):
        np.testing.assert_array_equal(three[i], memory(1, 7 + i)[0])
    assert len({ram.tobytes() for ram in memory(20, 0)}) > 8


def test_reset_after_an_episode_leaves_no_step_that_ignores_its_action():
    envs = atari.make_envs("Breakout", 1, seed=0)
    envs.reset()
    rng, episodes = np.random.default_rng(0), 0
    while episodes < 2:
        *_, terminated, _, info = envs.step(rng.integers(4, size=1).astype(np.int32))
        if terminated[0]:
            episodes += 1
            _, info = envs.reset()
            assert (info["elapsed_step"][0], info["lives"][0]) == (0, 5)
            *_, info = envs.step(np.ones(1, np.int32))
            assert info["elapsed_step"][0] == 1


def test_the_time_limit_truncates():
    """27,000 steps is long; the limit's meaning is read off the configuration and a shorter game of the same kind."""
    config = atari.make_envs("Pong", 1, 0).spec.config
    assert config.max_episode_steps == 27_000
    wanted = dict(
        frame_skip=4, noop_max=30, repeat_action_probability=0.0, stack_num=1, episodic_life=False
    )
    wanted |= dict(
        use_fire_reset=False,
        use_inter_area_resize=False,
        reward_clip=False,
        full_action_space=False,
    )
    assert {name: getattr(config, name) for name in wanted} == wanted


# --- Stand-ins --------------------------------------------------------------------------------------------------------


class ScriptedEnvs:
    """EnvPool's protocol over scripted games: a step after an end ignores the action and returns the next first frame.

    A game is a list of (reward, lives after the step); it ends after its last entry, by time limit where the last
    entry still has lives. Every frame is unique: its first bytes number it. Steps, resets and swallowed actions are
    recorded.
    """

    class ActionSpace:
        n = 3

    action_space = ActionSpace()

    def __init__(self, games_per_env, lives=2):
        self.games = [list(games) for games in games_per_env]
        self.first_lives, self.frame_number = lives, 0
        self.swallowed, self.log = 0, []
        self.over = [True] * len(self.games)
        self.finished = [0] * len(self.games)
        self.steps_after_end = [0] * len(self.games)

    def frame(self):
        self.frame_number += 1
        frame = np.zeros((84, 84), np.uint8)
        frame[0, :4] = np.frombuffer(np.uint32(self.frame_number).tobytes(), np.uint8)
        frame[1:] = 9  # nothing is all zero but the padding
        return frame

    def start(self, i):
        self.game = self.games[i].pop(0) if len(self.games[i]) > 1 else list(self.games[i][0])
        self.over[i], self.position = False, getattr(self, "position", {}) | {i: 0}
        self.current = getattr(self, "current", {}) | {i: self.game}
        return self.frame()

    def reset(self):
        frames = np.stack([self.start(i) for i in range(len(self.games))])[:, None]
        self.log.append(("reset", frames[:, 0].copy()))
        return frames, {"lives": np.full(len(self.games), self.first_lives, np.int32)}

    def step(self, actions, env_ids=None):
        env_ids = np.arange(len(self.games), dtype=np.int32) if env_ids is None else env_ids
        frames, rewards, terminated, truncated, lives = [], [], [], [], []
        for i in env_ids:
            if self.over[i]:
                self.swallowed += 1
                self.steps_after_end[i] += 1
                frames.append(self.start(i))
                rewards.append(0.0)
                terminated.append(False)
                truncated.append(False)
                lives.append(self.first_lives)
                continue
            reward, lives_left = self.current[i][self.position[i]]
            self.position[i] += 1
            self.over[i] = self.position[i] == len(self.current[i])
            self.finished[i] += self.over[i]
            frames.append(self.frame())
            rewards.append(reward)
            lives.append(lives_left)
            terminated.append(self.over[i] and lives_left == 0)
            truncated.append(self.over[i] and lives_left > 0)
        out = (
            np.stack(frames)[:, None],
            np.array(rewards, np.float32),
            np.array(terminated),
            np.array(truncated),
        )
        self.log.append(("step", actions.copy(), *out, np.array(lives)))
        return *out, {"lives": np.array(lives, np.int32), "env_id": env_ids.copy()}


def run_on(monkeypatch, tmp_path, envs, total_timesteps, evaluate=lambda *_: [1.0, 2.0], **flags):
    """train() over scripted environments, with nothing learned; returns the replay buffer and the result."""
    kept = {}

    class KeptReplay(atari.ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            kept["replay"] = self

    class IdleAgent(atari.Agent):
        def update(self, replay):
            kept["updates"] = kept.get("updates", 0) + 1
            return {}

        def reset(self):
            kept["resets"] = kept.get("resets", 0) + 1

    monkeypatch.setattr(atari, "make_envs", lambda env_id, num_envs, seed: envs)
    monkeypatch.setattr(atari, "evaluate", evaluate)
    monkeypatch.setattr(atari, "ReplayBuffer", KeptReplay)
    monkeypatch.setattr(atari, "Agent", IdleAgent)
    flags = dict(learning_starts=10, n_step=5, hidden_dim=4, n_atoms=3, buffer_size=200) | flags
    flags |= dict(device="cpu", run_dir=str(tmp_path), total_timesteps=total_timesteps)
    atari.run(atari.Args(**flags))
    (path,) = tmp_path.glob("*/result.json")
    return kept, json.loads(path.read_text())


# Two lives, then game over; a time limit with a life left; a lost life and a reward in one step; a game that is played
# on with no life left (as BankHeist is).
GAMES = [
    [(1, 2), (5, 2), (0, 1), (-3, 1), (0, 0)],
    [(0, 2), (2, 2)],
    [(7, 1), (0, 1), (0, 0)],
    [(1, 1), (0, 0), (2, 0), (0, 0)],
] * 20


def test_stored_transitions_are_the_environments_and_autoreset_steps_are_not_among_them(
    monkeypatch, tmp_path
):
    envs = ScriptedEnvs([GAMES])
    kept, result = run_on(monkeypatch, tmp_path, envs, total_timesteps=150, n_step=3)
    replay = kept["replay"]
    assert envs.swallowed == 0
    steps = [entry for entry in envs.log if entry[0] == "step"]
    assert len(steps) == 150 == result["env_steps"]
    # Replay the log: the frame acted on, the action, the clipped reward, and whether the return ends.
    newest, lives, slot = None, 2, 0
    for entry in envs.log:
        if entry[0] == "reset":
            newest, lives = entry[1][0], 2
            continue
        _, actions, frames, rewards, terminated, truncated, lives_after = entry
        np.testing.assert_array_equal(replay.frames[slot], newest)
        assert replay.actions[slot] == actions[0]
        assert replay.rewards[slot] == np.sign(rewards[0])
        assert bool(replay.dones[slot]) == bool(
            terminated[0] or truncated[0] or 0 < lives_after[0] < lives
        )
        newest, lives, slot = frames[0, 0], lives_after[0], slot + 1
    assert slot == 150 == replay.cursor
    assert {0, 1} == set(replay.dones[:150].int().tolist())


def test_logged_returns_are_unclipped_and_whole_episodes(monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_on(monkeypatch, tmp_path, ScriptedEnvs([GAMES]), total_timesteps=22)
    events = EventAccumulator(str(next(tmp_path.glob("*"))))
    events.Reload()
    returns = [(e.step, e.value) for e in events.Scalars("charts/episodic_return")]
    lengths = [(e.step, e.value) for e in events.Scalars("charts/episodic_length")]
    assert returns == [(5, 3.0), (7, 2.0), (10, 7.0), (14, 3.0), (19, 3.0), (21, 2.0)]
    assert lengths == [(5, 5.0), (7, 2.0), (10, 3.0), (14, 4.0), (19, 5.0), (21, 2.0)]


@pytest.mark.parametrize("replay_ratio, resets", [(2, 4), (4, 9), (8, 19)])
def test_a_full_run_has_98001_updates_per_replay_ratio_and_so_many_resets(replay_ratio, resets):
    args = atari.Args(replay_ratio=replay_ratio, device="cpu")
    updates = (args.total_timesteps - args.learning_starts + 1) * args.replay_ratio
    due = [n for n in range(1, 1 + updates) if atari.due(args.reset_interval, n)]
    assert (updates, len(due)) == (98_001 * replay_ratio, resets) and due[-1] < updates


@pytest.mark.parametrize("steps, updates, resets", [(19, 20, 0), (20, 22, 1)])
def test_a_reset_is_left_out_on_the_last_step_alone(monkeypatch, tmp_path, steps, updates, resets):
    """Updates at steps 10 to 19, two each: the 20th falls on the last of 19 steps."""
    envs = ScriptedEnvs([GAMES])
    kept, result = run_on(monkeypatch, tmp_path, envs, steps, reset_interval=20)
    assert (kept["updates"], result["resets"], kept.get("resets", 0)) == (updates, resets, resets)
    assert result["gradient_updates"] == updates


def test_speed_is_of_training_alone_and_wall_clock_of_everything(monkeypatch, tmp_path):
    """On a clock of its own: a step takes 1 s, a measurement 300 s, an evaluation 500 s."""
    clock = SimpleNamespace(now=0.0)

    class TimedEnvs(ScriptedEnvs):
        def step(self, actions, env_ids=None):
            clock.now += 1
            return super().step(actions, env_ids)

    def takes(seconds, result):
        def call(*_):
            clock.now += seconds
            return result

        return call

    monkeypatch.setattr(atari, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(atari, "plasticity_metrics", takes(300, {"x": 0.0}))
    flags = dict(metrics_interval=20, eval_interval=20)
    _, result = run_on(monkeypatch, tmp_path, TimedEnvs([GAMES]), 50, takes(500, [1.0]), **flags)
    assert result["wall_clock_seconds"] == 50 + 2 * 300 + 3 * 500
    assert result["env_steps_per_second"] == 1
    assert result["updates_per_second"] == (50 - 10 + 1) * 2 / 50


# --- Evaluation -------------------------------------------------------------------------------------------------------


class ScriptedNetwork:
    """Takes action 1 always and keeps what it was shown."""

    def __init__(self):
        self.support, self.shown, self.head = torch.arange(3.0), [], torch.nn.Identity()

    def __call__(self, images):
        assert not self.head.training  # no noise
        self.shown.append((images * 255).round().to(torch.uint8).numpy())
        return torch.log(
            torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9], [0.8, 0.1, 0.1]])
        ).expand(len(images), 3, 3)

    def q_values(self, log_probs):
        return log_probs.exp() @ self.support


def test_evaluation_plays_exactly_one_full_game_per_environment(monkeypatch):
    games = [[[(1, 2)] * n + [(2, 0)]] for n in (0, 7, 3, 12)]
    envs = ScriptedEnvs(games)
    monkeypatch.setattr(atari, "make_envs", lambda env_id, num_envs, seed: envs)
    network, args = ScriptedNetwork(), atari.Args(eval_episodes=4, eval_epsilon=0.0)
    returns = atari.evaluate(network, args)
    assert returns == [2.0, 9.0, 5.0, 14.0]  # unclipped sums, in the environments' order
    assert network.head.training  # the noise is back
    assert envs.finished == [1, 1, 1, 1]
    assert envs.steps_after_end == [0, 0, 0, 0]
    assert all((entry[1] == 1).all() for entry in envs.log if entry[0] == "step")


def test_evaluation_stacks_four_frames_and_zeroes_them_after_a_lost_life(monkeypatch):
    game = (
        [(0, 2)] * 5 + [(0, 1)] + [(0, 1)] * 4 + [(0, 0)] * 3
    )  # played on for two steps with no life left
    envs, network = ScriptedEnvs([[game]]), ScriptedNetwork()
    monkeypatch.setattr(atari, "make_envs", lambda env_id, num_envs, seed: envs)
    video = []
    atari.evaluate(network, atari.Args(eval_episodes=1, eval_epsilon=0.0), video)
    frames = [envs.log[0][1][0]] + [entry[2][0, 0] for entry in envs.log if entry[0] == "step"]
    assert len(network.shown) == len(video) == len(game)
    for t, shown in enumerate(network.shown):
        life_start = 0 if t < 6 else 6
        for k in range(4):
            expected = frames[t - k] if t - k >= life_start else np.zeros((84, 84))
            np.testing.assert_array_equal(shown[0, 3 - k], expected)
        np.testing.assert_array_equal(video[t], frames[t])


def test_evaluation_explores_with_epsilon(monkeypatch):
    envs = ScriptedEnvs([[[(0, 2)] * 300 + [(0, 0)]]] * 20)
    monkeypatch.setattr(atari, "make_envs", lambda env_id, num_envs, seed: envs)
    atari.evaluate(ScriptedNetwork(), atari.Args(eval_episodes=20, eval_epsilon=0.3))
    actions = np.concatenate([entry[1] for entry in envs.log if entry[0] == "step"])
    assert (
        abs((actions != 1).mean() - 0.3 * 2 / 3) < 0.02
    )  # a random action is the greedy one in one of three cases
    assert set(actions) == {0, 1, 2}


def test_evaluation_seeds_are_not_the_runs_own(monkeypatch):
    seeds = []

    def make_envs(env_id, num_envs, seed):
        seeds.append((env_id, num_envs, seed))
        return ScriptedEnvs([[[(0, 0)]]] * num_envs)

    monkeypatch.setattr(atari, "make_envs", make_envs)
    for seed in (0, 3):
        atari.evaluate(ScriptedNetwork(), atari.Args(seed=seed, eval_episodes=5))
    assert seeds == [("Alien", 5, 10_000), ("Alien", 5, 40_000)]


def test_evaluation_on_real_games_equals_playing_them_one_by_one():
    """Side by side in EnvPool, with finished games left alone, against one environment at a time."""
    args = atari.Args(
        seed=2, eval_episodes=3, eval_epsilon=0.0, hidden_dim=8, n_atoms=3, device="cpu"
    )
    torch.manual_seed(0)
    probe = atari.make_envs("Alien", 1, 0)
    network = atari.QNetwork(int(probe.action_space.n), args)
    network.sample_noise(torch.Generator().manual_seed(0))  # which must not be heard
    returns = atari.evaluate(network, args)
    network.head.eval()
    one_by_one = []
    for i in range(3):
        envs = atari.make_envs("Alien", 1, 30_000 + i)
        frames, info = envs.reset()
        stack, lives, total, over = [frames[0, 0]], info["lives"][0], 0.0, False
        while not over:
            padded = [np.zeros((84, 84), np.uint8)] * (4 - len(stack)) + stack
            images = torch.from_numpy(np.stack(padded)[None]).float() / 255
            with torch.no_grad():
                action = int(network.q_values(network(images)).argmax())
            frames, rewards, terminated, truncated, info = envs.step(np.array([action], np.int32))
            total += float(rewards[0])
            stack = [frames[0, 0]] if 0 < info["lives"][0] < lives else [*stack[-3:], frames[0, 0]]
            lives, over = info["lives"][0], terminated[0] or truncated[0]
        one_by_one.append(total)
    assert returns == one_by_one
