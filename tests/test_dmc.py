"""DrQ-SAC on the DeepMind Control suite: environment, networks, replay, update, resets, short runs."""

import copy
import json
import math
import signal
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import plastic_drq_sac_dmc as dmc

BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
SMALL = dict(
    image_size=16,
    batch_size=8,
    total_timesteps=400,
    learning_starts=20,
    render_quality="fast",
    device="cpu",
)


def make_args(**flags):
    return dmc.resolve(dmc.Args(**dict(env_id="cartpole-swingup_sparse") | SMALL | flags))


def make_agent(action_dim=2, seed=0, **flags):
    torch.manual_seed(seed)
    return dmc.Agent(action_dim, make_args(**flags), torch.Generator().manual_seed(seed))


def make_agent_in_double(**flags):
    """In double precision a ReLU's input does not fall on the other side of zero by a rounding error."""
    torch.set_default_dtype(torch.float64)
    try:
        return make_agent(**flags)
    finally:
        torch.set_default_dtype(torch.float32)


def make_batch(size=8, action_dim=2, seed=0, image=16):
    rng = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randint(256, (2, size, 3, image, image), generator=rng, dtype=torch.uint8)
    action = 2 * torch.rand((size, action_dim), generator=rng) - 1
    terminated = (torch.arange(size) % 3 == 0).float()
    return dmc.Batch(obs, action, torch.randn(size, generator=rng), terminated, next_obs)


# --- Environment ------------------------------------------------------------------------------------------------------


class FakeSuite:
    """Rewards 1, 2, 3, ...; the episode ends with the fifth, with the given discount."""

    def __init__(self, discount=1.0):
        self.count, self.discount, self.actions = 0, discount, []

    def step(self, action):
        self.count += 1
        self.actions.append(action)
        return SimpleNamespace(
            reward=float(self.count), discount=self.discount, last=lambda: self.count == 5
        )


@pytest.mark.parametrize("discount, terminated", [(1.0, False), (0.0, True)])
def test_action_repeat_sums_rewards_and_stops_at_the_end(monkeypatch, discount, terminated):
    env = dmc.DMControl(make_args(action_repeat=3))
    env.env = FakeSuite(discount)
    env.low, env.high = np.array([-1.0, 0.0]), np.array([1.0, 10.0])
    monkeypatch.setattr(env, "render", lambda: None)
    _, reward, *ends, _ = env.step(np.array([0.5, -1.0], dtype=np.float32))
    assert (reward, ends) == (1 + 2 + 3, [False, False])
    np.testing.assert_allclose(env.env.actions, [[0.5, 0.0]] * 3)  # rescaled to the task's bounds
    _, reward, *ends, _ = env.step(np.array([2.0, 0.0]))
    assert (reward, ends) == (4 + 5, [terminated, not terminated])
    np.testing.assert_allclose(env.env.actions[3:], [[1.0, 5.0]] * 2)


def test_an_episode_ends_by_time_and_seeds_tell_episodes_apart():
    env = dmc.DMControl(make_args(env_id="reacher-easy"))  # action repeat 4
    first, _ = env.reset(seed=5)
    length, rewards = 0, 0.0
    while True:
        frame, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        length += 1
        rewards += reward
        if terminated or truncated:
            break
    assert (length, bool(terminated), bool(truncated)) == (250, False, True)
    assert first.shape == frame.shape == (1, 16, 16) and frame.dtype == np.uint8
    again, _ = env.reset(seed=5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, env.reset(seed=6)[0])
    assert not np.array_equal(again, env.reset()[0])


def test_gray_weights_and_cameras(monkeypatch):
    rgb = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    cameras = []
    physics = SimpleNamespace(render=lambda height, width, camera: cameras.append(camera) or rgb)
    for env_id, camera in (("cartpole-balance", 0), ("quadruped-walk", 2)):
        env = dmc.DMControl(make_args(env_id=env_id))
        env.env = SimpleNamespace(physics=physics)
        gray = 0.299 * rgb[..., 0].astype(float) + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]
        assert env.render().shape == (1, 16, 16)
        assert np.abs(env.render()[0] - gray).max() <= 0.5 + 1e-9
        assert cameras.pop() == camera
    env = dmc.DMControl(make_args(grayscale=False))
    env.env = SimpleNamespace(physics=physics)
    assert np.array_equal(env.render(), rgb.transpose(2, 0, 1))
    frame, _ = dmc.DMControl(
        make_args(grayscale=False)
    ).reset()  # a real one: its rows run backwards in memory
    assert torch.from_numpy(frame).shape == (3, 16, 16)


def test_fast_rendering_shows_the_same_scene():
    frames = []
    for quality in ("full", "fast"):
        env = dmc.DMControl(make_args(render_quality=quality, image_size=64))
        frames.append(env.reset(seed=1)[0].astype(float))
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 10


# --- Networks ---------------------------------------------------------------------------------------------------------


def count(module):
    return sum(w.numel() for w in module.parameters())


def test_parameters_of_the_papers_network():
    args = make_args(image_size=64, **BASE)
    critic, actor = dmc.Critic(6, args), dmc.Actor(6, args)
    assert (count(critic.backbone), count(critic.head), count(actor)) == (388_416, 366_232, 286_882)
    assert critic(torch.zeros(2, 3, 64, 64), torch.zeros(2, 6)).shape == (2, 2)
    # LayerNorm: a scale and a shift per channel. CReLU: fan-in 512 for the two layers after one, in three MLPs.
    plastic = make_args(image_size=64)
    critic, actor = dmc.Critic(6, plastic), dmc.Actor(6, plastic)
    assert count(critic.backbone) == 388_416 + 2 * (32 + 64 + 128 + 256)
    assert count(critic.head) == 366_232 + 2 * (256 * 256 + 256)
    assert count(actor) == 286_882 + 256 * 256 + 256 * 12
    scopes = make_args(image_size=64, layer_norm_scope="all", crelu_scope="all")
    assert dmc.Critic(6, scopes)(torch.zeros(2, 3, 64, 64), torch.zeros(2, 6)).shape == (2, 2)


@pytest.mark.parametrize("size", [*range(1, 10), 64, 84])
def test_same_padding_by_its_formula(size):
    conv = dmc.SameConv(2, 3)
    x = torch.randn(2, 2, size, size)
    out = math.ceil(size / 2)
    total = max((out - 1) * 2 + 3 - size, 0)
    padded = torch.zeros(2, 2, size + total, size + total)
    before = total // 2
    padded[:, :, before : before + size, before : before + size] = x
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias, stride=2))
    assert conv(x).shape == (2, 3, out, out)


@pytest.mark.parametrize("size", [16, 17, 31, 33, 84])
def test_any_image_size_fits_the_networks(size):
    args = make_args(image_size=size, frame_stack=2, crelu_scope="all")
    critic = dmc.Critic(1, args)
    features = critic.backbone(torch.zeros(1, 2, size, size))
    assert (
        features.shape
        == (1, dmc.num_features(args))
        == (1, 2 * 256 * {16: 1, 17: 4, 31: 4, 33: 9, 84: 36}[size])
    )
    assert critic.head(features, torch.zeros(1, 1)).shape == (1, 2)


def test_initial_weights():
    torch.manual_seed(0)
    args = make_args(image_size=64, hidden_dim=64)
    critic, actor = dmc.Critic(3, args), dmc.Actor(3, args)
    for layer in (
        critic.backbone[0],
        critic.backbone[3],
        critic.head.q_functions[1][1],
        actor.mean,
        actor.hidden[2],
    ):
        w = layer.weight.flatten(1).double()
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        torch.testing.assert_close(
            gram, 2 * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5
        )
        assert not layer.bias.any()
    w = actor.log_std.weight.double()
    torch.testing.assert_close(w @ w.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)
    latent = actor.latent[0].weight
    assert latent.std().item() == pytest.approx(4096**-0.5, rel=0.02)
    assert latent.abs().max() < 2.3 * 4096**-0.5  # cut at two standard deviations of what was drawn


def test_log_std_lies_between_minus_10_and_2():
    actor = make_agent().actor
    features = torch.randn(5, dmc.num_features(make_args()))
    for bias, expected in ((-100.0, -10.0), (0.0, -4.0), (100.0, 2.0)):
        torch.nn.init.zeros_(actor.log_std.weight)
        torch.nn.init.constant_(actor.log_std.bias, bias)
        torch.testing.assert_close(actor(features)[1], torch.full((5, 2), expected))


def test_log_density_is_that_of_torch_distributions():
    actor = make_agent().actor.double()
    features = torch.randn(50, dmc.num_features(make_args()), dtype=torch.float64)
    noise = torch.randn(50, 2, dtype=torch.float64)
    action, log_prob = actor.sample(features, noise)
    mean, log_std = actor(features)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    torch.testing.assert_close(
        log_prob, Independent(squashed, 1).log_prob(action), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(action, torch.tanh(mean + log_std.exp() * noise))


def test_density_integrates_to_one():
    agent = make_agent(action_dim=1)
    torch.nn.init.constant_(agent.actor.log_std.bias, 1.0)  # wide: much of it lies at the edges
    features = torch.randn(1, dmc.num_features(agent.args)).expand(200_001, -1)
    with torch.no_grad():
        noise = torch.linspace(-8, 8, 200_001)[:, None]
        action, log_prob = agent.actor.double().sample(features.double(), noise.double())
    assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-4)


# --- Replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity, num_episodes", [(100, 6), (30, 20), (7, 30)])
@pytest.mark.parametrize("frame_stack", [1, 3])
def test_replay_against_a_list_of_episodes(capacity, num_episodes, frame_stack):
    """Every transition that can be sampled is one that happened, with stacks as they were; the newest are all there."""
    rng = np.random.default_rng(0)
    replay = dmc.ReplayBuffer(capacity, 5, (1, 2, 2), 1, frame_stack, torch.device("cpu"))
    happened, number = [], 0
    for _ in range(num_episodes):
        frames = [number]
        replay.start(np.full((1, 2, 2), number % 256, dtype=np.uint8))
        number += 1
        for step in range(length := int(rng.integers(1, 12))):
            action, terminated = float(len(happened)), step == length - 1 and rng.random() < 0.5
            frames.append(number)
            replay.add(
                np.array([action], np.float32),
                2 * action,
                terminated,
                np.full((1, 2, 2), number % 256, np.uint8),
            )
            number += 1
            stack = [
                frames[max(i, 0)] % 256
                for i in range(len(frames) - 1 - frame_stack, len(frames) - 1)
            ]
            next_stack = [
                frames[max(i, 0)] % 256 for i in range(len(frames) - frame_stack, len(frames))
            ]
            happened.append((stack, action, 2 * action, float(terminated), next_stack))
            assert replay.newest()[0, :, 0, 0].tolist() == next_stack
    batch = replay.sample(20_000, torch.Generator().manual_seed(0))
    sampled = {}
    for obs, action, reward, terminated, next_obs in zip(*batch, strict=True):
        key = int(action)
        row = (
            obs[:, 0, 0].tolist(),
            float(action),
            float(reward),
            float(terminated),
            next_obs[:, 0, 0].tolist(),
        )
        assert row == happened[key]
        sampled[key] = sampled.get(key, 0) + 1
    assert len(sampled) == int(replay.valid.sum())
    newest = range(len(happened) - len(sampled), len(happened))
    assert set(sampled) == set(newest)
    expected = 20_000 / len(sampled)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in sampled.values())


def test_a_full_run_of_episodes_loses_no_transition():
    replay = dmc.ReplayBuffer(40, 8, (1, 1, 1), 1, 3, torch.device("cpu"))
    for _ in range(5):
        replay.start(np.zeros((1, 1, 1), np.uint8))
        for _ in range(8):
            replay.add(np.zeros(1, np.float32), 0.0, False, np.zeros((1, 1, 1), np.uint8))
    assert int(replay.valid.sum()) == 40


# --- Update -----------------------------------------------------------------------------------------------------------


def test_td_target_by_hand():
    agent, batch = make_agent(gamma=0.9, initial_temperature=0.3), make_batch()
    with torch.no_grad():  # online and target are told apart
        for w in agent.target.parameters():
            w.add_(0.01)
    images, noise = dmc.to_images(batch.next_obs), torch.randn(8, 2)
    target = agent.td_target(batch, images, noise)
    with torch.no_grad():
        features = agent.online.backbone(images)
        mean, log_std = agent.actor(features)
        action = torch.tanh(mean + log_std.exp() * noise)
        squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()])
        log_prob = Independent(squashed, 1).log_prob(action)
        q1, q2 = (q(torch.cat([agent.target.head.latent(agent.target.backbone(images)), action], 1))[:, 0]
                  for q in agent.target.head.q_functions)  # fmt: skip
    for i in range(8):
        expected = batch.reward[i]
        if i % 3 != 0:
            expected = expected + 0.9 * (min(q1[i], q2[i]) - 0.3 * log_prob[i])
        assert target[i].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


def test_td_error_by_hand():
    q_values = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert dmc.td_error(q_values, torch.tensor([2.0, 3.0])).item() == pytest.approx(
        ((1 + 0) + (0 + 4)) / 2
    )


def slow_update(agent, batch, images, next_images, next_noise, noise):
    """Algorithm 2 as the spec orders it, in plain PyTorch on deep copies: critic, target, actor, temperature."""
    args = agent.args
    online, target, actor = (
        copy.deepcopy(network) for network in (agent.online, agent.target, agent.actor)
    )
    log_alpha = copy.deepcopy(agent.log_alpha)
    rho = args.sam_rho
    perturbed = {
        "all": [online, actor, "temperature"], "critic": [online], "actor": [actor], "encoder": [online.backbone],
    }[args.sam_scope]  # fmt: skip

    def descend(loss_function, parameters, scope):
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1.0, foreach=False)
        optimizer.zero_grad()
        loss_function().backward()
        if rho > 0 and scope:
            norm = torch.sqrt(sum(w.grad.square().sum() for w in scope))
            before = [w.detach().clone() for w in scope]
            with torch.no_grad():
                for w in scope:
                    w += rho * w.grad / norm
            optimizer.zero_grad()
            loss_function().backward()
            with torch.no_grad():
                for w, old in zip(scope, before, strict=True):
                    w.copy_(old)
        optimizer.step()

    def policy(features, noise):
        mean, log_std = actor(features)
        x = mean + log_std.exp() * noise
        log_prob = Normal(mean, log_std.exp()).log_prob(x) - torch.log(1 - torch.tanh(x) ** 2)
        return torch.tanh(x), log_prob.sum(1)

    with torch.no_grad():
        next_action, next_log_prob = policy(online.backbone(next_images), next_noise)
        q = target(next_images, next_action)
        value = torch.minimum(q[:, 0], q[:, 1]) - log_alpha.exp() * next_log_prob
        y = batch.reward + args.gamma * (1 - batch.terminated) * value

    def critic_loss():
        q = online(images, batch.action)
        return ((q[:, 0] - y) ** 2).mean() + ((q[:, 1] - y) ** 2).mean()

    scope = [
        w
        for module in perturbed
        if module in (online, online.backbone)
        for w in module.parameters()
    ]
    descend(critic_loss, list(online.parameters()), scope)
    with torch.no_grad():
        for w_target, w in zip(target.parameters(), online.parameters(), strict=True):
            w_target.copy_(args.target_ema * w_target + (1 - args.target_ema) * w)
    with torch.no_grad():
        features = online.backbone(images)
    entropies = []

    def actor_loss():
        action, log_prob = policy(features, noise)
        entropies.append(-log_prob.mean().detach())
        return (
            log_alpha.exp().detach() * log_prob - online.head(features, action).min(1).values
        ).mean()

    descend(
        actor_loss, list(actor.parameters()), list(actor.parameters()) if actor in perturbed else []
    )
    temperature_loss = lambda: log_alpha.exp() * (entropies[0] + 2)  # noqa: E731
    descend(temperature_loss, [log_alpha], [log_alpha] if "temperature" in perturbed else [])
    return online, target, actor, log_alpha


@pytest.mark.parametrize("scope", ["all", "critic", "actor", "encoder", "off"])
def test_an_update_equals_a_slow_one(scope, monkeypatch):
    flags = dict(sam_rho=0.0) if scope == "off" else dict(sam_rho=0.05, sam_scope=scope)
    agent, batch = make_agent_in_double(**flags, learning_rate=1e-3), make_batch()
    for optimizer in agent.optimizers.values():
        optimizer.param_groups[0]["eps"] = (
            1.0  # else Adam's first step tells the gradient's sign alone
        )
    torch.nn.init.constant_(agent.actor.log_std.bias, 0.55)  # an entropy between -|A| and |A|
    batch = dmc.Batch(*(entry if entry.dtype == torch.uint8 else entry.double() for entry in batch))
    generator = torch.Generator().manual_seed(1)
    images, next_images = torch.rand((2, 8, 3, 16, 16), generator=generator).double()
    draws = torch.randn((2, 8, 2), generator=generator).double()
    queue = [images, next_images]
    monkeypatch.setattr(dmc, "augment", lambda *args: queue.pop(0))
    original = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: draws)
    expected = slow_update(agent, batch, images, next_images, *draws)
    agent.update(batch)
    monkeypatch.setattr(torch, "randn", original)
    ours = (agent.online, agent.target, agent.actor)
    for network, slow in zip(ours, expected[:3], strict=True):
        for (name, w), v in zip(network.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(
                w, v, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.testing.assert_close(agent.log_alpha, expected[3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entropy, direction", [(0.0, -1), (-5.0, 1)])  # the target is -2
def test_temperature_falls_where_entropy_is_above_its_target(entropy, direction):
    agent = make_agent(**BASE)
    before = agent.log_alpha.item()
    agent.descend(("temperature",), lambda: (agent.log_alpha.exp() * (entropy + agent.action_dim),))
    assert np.sign(agent.log_alpha.item() - before) == direction


def test_the_actors_loss_never_moves_the_encoder(monkeypatch):
    agent = make_agent()
    after_critic, original = [], dmc.soft_update

    def spy(target, online, rate):
        after_critic.append(copy.deepcopy(online.state_dict()))
        original(target, online, rate)

    monkeypatch.setattr(dmc, "soft_update", spy)
    before = copy.deepcopy(agent.actor.state_dict())
    agent.update(make_batch())
    for name, w in agent.online.state_dict().items():  # neither the encoder nor the Q-functions
        assert torch.equal(w, after_critic[0][name])
    assert any(not torch.equal(w, before[name]) for name, w in agent.actor.state_dict().items())


def test_a_reset_renews_all_but_the_encoder():
    agent = make_agent()
    for seed in range(3):
        agent.update(make_batch(seed=seed))
    before = {name: tensor.clone() for name, tensor in agent.learned().items()}
    pointers = [tensor.data_ptr() for tensor in agent.learned().values()]
    agent.reset()
    after = agent.learned()
    assert pointers == [tensor.data_ptr() for tensor in after.values()]
    for name, tensor in after.items():
        if "backbone" in name or name.startswith("adam.encoder"):
            assert torch.equal(tensor, before[name]), name
        elif name.startswith("adam"):
            assert not tensor.any(), name
        elif name.endswith("weight") and "latent.1" not in name and "norm" not in name:
            assert not torch.equal(tensor, before[name]), name
    for name, w in agent.target.head.named_parameters():
        assert torch.equal(w, dict(agent.online.head.named_parameters())[name])
    assert agent.log_alpha.exp().item() == pytest.approx(0.1)
    assert float(before["adam.encoder.0.step"]) == 3


@pytest.mark.parametrize(
    "where, value", [("reward", math.nan), ("action", math.inf), ("reward", 1e30)]
)
def test_an_update_with_a_gradient_that_is_not_finite_leaves_all_as_it_was(where, value):
    """Nor one whose square is not, which Adam's second moment holds."""
    agent, batch = make_agent(), make_batch()
    agent.update(batch)
    before = {name: tensor.clone() for name, tensor in agent.learned().items()}
    broken = batch._replace(**{where: torch.full_like(getattr(batch, where), value)})
    agent.update(broken)
    for name, tensor in agent.learned().items():
        assert torch.equal(tensor, before[name]), name
    agent.update(batch)
    assert agent.counts.tolist() == [3, 1, 0, 1]
    assert not torch.equal(agent.learned()["actor.mean.weight"], before["actor.mean.weight"])


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_values_that_are_auto_or_the_tasks():
    assert make_args(env_id="quadruped-run", action_repeat=0).sam_rho == 0.1
    cheetah = make_args(env_id="cheetah-run")
    assert (cheetah.sam_rho, cheetah.action_repeat, cheetah.buffer_size) == (0.01, 4, 100)
    assert make_args(sam_rho=0.0).sam_rho == 0.0
    assert make_args().action_repeat == 2


@pytest.mark.parametrize(
    "env_id, updates, resets", [("hopper-hop", 999_001, 9), ("reacher-easy", 499_001, 4)]
)
def test_updates_and_resets_of_a_full_run(env_id, updates, resets):
    args = dmc.resolve(dmc.Args(env_id=env_id, device="cpu"))
    steps = args.total_timesteps // args.action_repeat
    due = [n for n in range(1, 1 + updates) if dmc.due(args.reset_interval, n)]
    assert steps - args.learning_starts + 1 == updates
    assert len(due) == resets and due[-1] < updates


@pytest.fixture
def evaluate_here(monkeypatch):
    """Evaluations in this process: the workers take seconds to start."""
    import gymnasium as gym

    monkeypatch.setattr(
        gym.vector,
        "AsyncVectorEnv",
        lambda envs, context: ClosableEnvs(gym.vector.SyncVectorEnv(envs)),
    )


class ClosableEnvs:
    def __init__(self, envs):
        self.envs = envs

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def close(self):
        self.envs.close()


def result_of(args):
    return json.loads(
        (args.run_dir / f"{args.env_id}__{args.exp_name}__{args.seed}" / "result.json").read_text()
    )


@pytest.mark.parametrize("method", ["base", "plastic"])
def test_equal_seeds_give_equal_runs_past_a_reset(tmp_path, method, evaluate_here):
    flags = BASE if method == "base" else dict(reset_interval=30)
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = make_args(
            total_timesteps=160,
            run_dir=tmp_path,
            exp_name=name,
            seed=seed,
            eval_episodes=2,
            **flags,
        )
        dmc.run(args, dmc.Stop())
        results.append(result_of(args))
    assert (results[0]["gradient_updates"], results[0]["env_steps"], results[0]["agent_steps"]) == (
        61,
        160,
        80,
    )
    assert results[0]["resets"] == (0 if method == "base" else 2)
    assert len(results[0]["episode_returns"]) == 2
    assert results[0]["episode_returns"] == results[1]["episode_returns"]


class ScriptedEnv(dmc.gym.Env):
    """Episodes of 10 steps whose frames and rewards follow from step and action: the same in a continued run."""

    def __init__(self, args):
        self.env = SimpleNamespace(_step_limit=20, control_timestep=lambda: 0.01)
        self.action_space = dmc.gym.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = dmc.gym.spaces.Box(0, 255, (1, 16, 16), np.uint8)

    def frame(self):
        return np.random.default_rng(self.step_number).integers(
            256, size=(1, 16, 16), dtype=np.uint8
        )

    def reset(self, seed=None, options=None):
        self.step_number = 0
        return self.frame(), {}

    def step(self, action):
        self.step_number += 1
        return self.frame(), float(action.sum()), False, self.step_number == 10, {}


@pytest.fixture
def scripted(monkeypatch):
    """train(args, at, done): a run on scripted episodes, stopped by SIGTERM after step `at`; returns its tensors."""
    kept = {}

    class KeptAgent(dmc.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            kept["agent"] = self

    class KeptReplay(dmc.ReplayBuffer):
        def add(self, *args):
            super().add(*args)
            kept["steps"] += 1
            if kept["steps"] == kept["at"]:
                kept["stop"].request(signal.SIGTERM)

    for name, fake in (
        ("DMControl", ScriptedEnv),
        ("Agent", KeptAgent),
        ("ReplayBuffer", KeptReplay),
    ):
        monkeypatch.setattr(dmc, name, fake)
    monkeypatch.setattr(
        dmc, "evaluate", lambda agent, args, video=None: [float(agent.log_alpha.detach().exp())]
    )

    def train(args, at=0, done=0):
        kept.update(at=at - done, steps=0, stop=dmc.Stop())
        dmc.run(args, kept["stop"])
        return kept["agent"].tensors()

    return train


@pytest.mark.parametrize("stops", [(30,), (20, 50, 70), (80,)], ids=str)
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path, scripted, stops):
    """On scripted episodes, stopped where one ends: before learning starts, before and after resets, at the end."""
    flags = dict(
        total_timesteps=160,
        learning_starts=25,
        reset_interval=20,
        eval_interval=40,
        metrics_interval=35,
    )
    flags |= dict(run_dir=tmp_path, resume=True, log_interval=10)
    whole = {
        name: tensor.clone()
        for name, tensor in scripted(make_args(exp_name="whole", **flags)).items()
    }
    broken, done = make_args(exp_name="broken", **flags), 0
    for at in stops:
        with pytest.raises(SystemExit) as exit_info:
            scripted(broken, at, done)
        assert exit_info.value.code == 143
        done = at
        torch.manual_seed(999)
    for name, tensor in scripted(broken).items():
        assert torch.equal(tensor, whole[name]), name
    results = [result_of(make_args(exp_name=name, **flags)) for name in ("whole", "broken")]
    assert results[1]["resumed_at"] == list(stops)
    for key in ("gradient_updates", "resets", "episode_returns", "agent_steps"):
        assert results[0][key] == results[1][key]
    logged = [
        scalars(tmp_path / f"cartpole-swingup_sparse__{name}__1") for name in ("whole", "broken")
    ]
    for one in logged:
        one.pop("charts/SPS")
    assert logged[0] == logged[1]


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), purge_orphaned_data=False)
    events.Reload()
    return {
        tag: sorted((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


def test_no_reset_on_the_last_step(tmp_path, scripted):
    for interval, resets in ((56, 0), (55, 1), (28, 1)):  # 56 updates
        flags = dict(
            total_timesteps=160, learning_starts=25, reset_interval=interval, exp_name=str(interval)
        )
        scripted(args := make_args(run_dir=tmp_path, **flags))
        assert (result_of(args)["gradient_updates"], result_of(args)["resets"]) == (56, resets)


def test_an_update_comes_before_its_steps_transition(tmp_path, scripted, monkeypatch):
    """The first one at step learning_starts, on the transitions of the steps before."""
    seen, original = [], dmc.ReplayBuffer.sample

    def sample(self, batch_size, generator):
        seen.append(int(self.valid.sum()))
        return original(self, batch_size, generator)

    monkeypatch.setattr(dmc.ReplayBuffer, "sample", sample)
    scripted(
        make_args(
            run_dir=tmp_path,
            exp_name="x",
            total_timesteps=60,
            learning_starts=25,
            updates_per_step=2,
        )
    )
    assert seen == [n for step in range(25, 31) for n in (step - 1, step - 1)]


@pytest.mark.parametrize("ended_by_the_task", [False, True])
def test_only_the_tasks_own_end_ends_the_return(tmp_path, scripted, monkeypatch, ended_by_the_task):
    """Episodes of 10 steps: a time limit is stored as no end at all."""
    stored, add, step = [], dmc.ReplayBuffer.add, ScriptedEnv.step

    def spy(self, action, reward, terminated, frame):
        stored.append(bool(terminated))
        add(self, action, reward, terminated, frame)

    def swapped(self, action):
        frame, reward, terminated, truncated, info = step(self, action)
        return frame, reward, truncated, terminated, info

    monkeypatch.setattr(dmc.ReplayBuffer, "add", spy)
    if ended_by_the_task:
        monkeypatch.setattr(ScriptedEnv, "step", swapped)
    scripted(make_args(run_dir=tmp_path, exp_name="x", total_timesteps=80, learning_starts=35))
    assert stored == [ended_by_the_task and n % 10 == 0 for n in range(1, 41)]


def test_the_first_actions_are_uniform(tmp_path, scripted, monkeypatch):
    actions, step = [], ScriptedEnv.step
    monkeypatch.setattr(
        ScriptedEnv, "step", lambda self, action: actions.append(action) or step(self, action)
    )
    scripted(make_args(run_dir=tmp_path, exp_name="x", total_timesteps=1204, learning_starts=600))
    first = np.array(actions[:600])
    assert first.shape == (600, 2) and np.abs(first).max() <= 1
    counts, _ = np.histogram(first, bins=4, range=(-1, 1))
    assert np.abs(counts - 300).max() < 5 * 300**0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_finite_number_is_counted_and_taken_as_0(
    tmp_path, scripted, monkeypatch, value
):
    step = ScriptedEnv.step

    def broken(self, action):
        frame, reward, *rest = step(self, action)
        return frame, value if self.step_number == 5 else reward, *rest

    monkeypatch.setattr(ScriptedEnv, "step", broken)
    scripted(args := make_args(run_dir=tmp_path, exp_name="x", total_timesteps=80))
    result = result_of(args)
    assert (result["nonfinite_rewards"], result["skipped_updates"]) == (4, 0)


class ShortOrLong(ScriptedEnv):
    """Episode of seed s: rewards s, frames full of 10 * (s % 10) + step, and 2 + 3 * (s % 3) steps."""

    asked: ClassVar[list] = []

    def frame(self):
        return np.full((1, 16, 16), 10 * (self.seed % 10) + self.step_number, dtype=np.uint8)

    def reset(self, seed=None, options=None):
        self.seed = seed if seed is not None else self.seed
        if seed is not None:
            self.asked.append(seed)
        return super().reset()

    def step(self, action):
        self.step_number += 1
        return (
            self.frame(),
            float(self.seed),
            False,
            self.step_number >= 2 + 3 * (self.seed % 3),
            {},
        )


def test_an_evaluation_by_hand(monkeypatch, evaluate_here):
    """Three episodes of different length on two environments: seeds, stacks, returns, video."""
    monkeypatch.setattr(dmc, "DMControl", ShortOrLong)
    monkeypatch.setattr(dmc.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(ShortOrLong, "asked", [])
    stacks, video = [], []

    def act_mean(obs):
        stacks.append(obs[:, :, 0, 0].tolist())
        return torch.zeros(len(obs), 2)

    agent = SimpleNamespace(generator=torch.Generator(), act_mean=act_mean)
    returns = dmc.evaluate(agent, make_args(seed=3, eval_episodes=3), video)
    seeds = [40_000, 40_001, 40_002]
    assert ShortOrLong.asked[:3] == seeds
    assert returns == [float(seed * (2 + 3 * (seed % 3))) for seed in seeds]
    # 40,000 % 3 is 1 and 40,001 % 3 is 2: five steps and eight.
    assert [pair[1] for pair in stacks[:4]] == [
        [10, 10, 10],
        [10, 10, 11],
        [10, 11, 12],
        [11, 12, 13],
    ]
    assert [pair[0] for pair in stacks[:3]] == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert [frame[0, 0, 0] for frame in video] == [0, 1, 2, 3, 4]


BAD_FLAGS = {
    "--env-id walker-fly": "walker-run", "--env-id Alien": "closest", "--env-id cartpole": "cartpole-",
    "--seed -1": "--seed",
    "--total-timesteps 0": "--total-timesteps", "--total-timesteps 2000": "--learning-starts",
    "--action-repeat -1": "--action-repeat", "--frame-stack 0": "--frame-stack", "--image-size 8": "--image-size",
    "--updates-per-step 0": "--updates-per-step", "--batch-size 0": "--batch-size", "--learning-starts 0":
    "--learning-starts", "--learning-rate nan": "--learning-rate", "--gamma 1.1": "--gamma", "--target-ema -0.1":
    "--target-ema", "--initial-temperature 0": "--initial-temperature", "--buffer-size 0": "--buffer-size",
    "--aug-shift -1": "--aug-shift", "--sam-rho -0.1": "--sam-rho", "--sam-rho inf": "--sam-rho",
    "--sam-scope head": "--sam-scope", "--render-quality low": "--render-quality", "--reset-interval -1":
    "--reset-interval", "--eval-episodes 0": "--eval-episodes", "--exp-name ..": "--exp-name",
    "--resume --overwrite": "--resume", "--checkpoint-interval soon": "--checkpoint-interval",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_flag_that_makes_no_sense_ends_with_code_2_and_says_so(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        dmc.resolve(tyro.cli(dmc.Args, args=flags.split()))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert BAD_FLAGS[flags] in error
    assert (error.startswith("error: ") and error.count("\n") == 1) or "For full helptext" in error
    assert list(tmp_path.iterdir()) == []


def test_where_the_replay_goes_and_what_does_not_fit(monkeypatch, capsys):
    args = make_args(total_timesteps=2_000_000, image_size=64)
    replay, training = dmc.memory_needed(1, args)
    assert 1_000_000 * 64**2 < replay < 1.05 * 1_000_000 * 64**2
    free = {}
    monkeypatch.setattr(dmc, "memory_available", lambda device: free[device.type])
    gpu = dmc.replace(args, device="cuda")
    for cuda, cpu, expected in ((2 * replay, 0, "cuda"), (replay, 2 * replay, "cpu"), (replay, replay - 1, None),
                                (training - 1, 2 * replay, None)):  # fmt: skip
        free.update(cuda=cuda, cpu=cpu)
        if expected:
            assert dmc.place_replay(1, gpu).type == expected
        else:
            with pytest.raises(SystemExit) as exit_info:
                dmc.place_replay(1, gpu)
            assert exit_info.value.code == 1
            assert "--buffer-size" in capsys.readouterr().err


# --- Files ------------------------------------------------------------------------------------------------------------


def edited(path, edit):
    """Change a file of torch.save: `edit` gets what it holds."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


BAD_CHECKPOINTS = {
    "another script": lambda c: c.update(script="plastic_drq_rainbow_atari.py"),
    "another version": lambda c: c.update(version=0),
    "no events": lambda c: c.pop("events"),
    "events of a word's size": lambda c: c["events"].update(x="x"),
    "seconds that are a word": lambda c: c["counters"].update(seconds="x"),
    "a step that is a fraction": lambda c: c["counters"].update(step=30.5),
    "a step past the end": lambda c: c["counters"].update(step=10**6),
    "no transitions": lambda c: c["tensors"]["replay.valid"].fill_(False),
    "negative counts": lambda c: c["tensors"]["counts"].fill_(-5),
    "weights that are not finite": lambda c: c["tensors"]["actor.mean.weight"].fill_(math.nan),
    "another shape": lambda c: c["tensors"].update(
        {"replay.frames": torch.zeros(3, dtype=torch.uint8)}
    ),
    "a tensor too few": lambda c: c["tensors"].pop("log_alpha"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_gets_one_line_and_stays(tmp_path, scripted, capsys, kind):
    args = make_args(run_dir=tmp_path, resume=True, exp_name="x", total_timesteps=160)
    with pytest.raises(SystemExit):
        scripted(args, at=30)
    path = tmp_path / "cartpole-swingup_sparse__x__1" / "checkpoint.pth"
    edited(path, BAD_CHECKPOINTS[kind])
    before = path.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        scripted(args)
    error = capsys.readouterr().err
    assert (exit_info.value.code, error.count("\n")) == (1, 1)
    assert "not a checkpoint of this version" in error and "--overwrite" in error
    assert path.read_bytes() == before


def test_other_flags_are_refused_by_name(tmp_path, scripted, capsys):
    args = make_args(run_dir=tmp_path, resume=True, exp_name="x", total_timesteps=160)
    with pytest.raises(SystemExit):
        scripted(args, at=30)
    for change, words in (
        (dict(sam_rho=0.3), "--sam-rho 0.01"),
        (dict(crelu=False), "--crelu"),
        (dict(total_timesteps=180, buffer_size=80), "--total-timesteps 160"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            scripted(dmc.replace(args, **change))
        assert exit_info.value.code == 1 and f"was made with {words};" in capsys.readouterr().err
    scripted(
        dmc.replace(args, eval_interval=40, log_interval=7, capture_video=False)
    )  # these may differ
    assert result_of(args)["resumed_at"] == [30]


@pytest.mark.parametrize("name", ["model.pth", "video.gif"])
def test_a_model_without_its_result_is_not_deleted_without_being_told(
    tmp_path, scripted, capsys, name
):
    args = make_args(run_dir=tmp_path, exp_name="x", total_timesteps=160)
    path = tmp_path / "cartpole-swingup_sparse__x__1" / name
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        scripted(args)
    assert exit_info.value.code == 1 and "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "mine"
    (path.parent / "events.out.tfevents.mine").mkdir()
    scripted(dmc.replace(args, overwrite=True))
    assert not path.exists() and (path.parent / "result.json").exists()


def test_images_larger_than_the_suites_screen():
    frame, _ = dmc.DMControl(make_args(image_size=500)).reset()
    assert frame.shape == (1, 500, 500) and frame[0, 490:].any() and frame[0, :, 490:].any()


def test_the_memory_of_metrics_is_counted():
    with_metrics, without = (make_args(batch_size=4, metrics_interval=n) for n in (10, 0))
    as_batch = make_args(batch_size=512)
    assert (
        dmc.memory_needed(1, with_metrics)[1]
        == dmc.memory_needed(1, as_batch)[1]
        > dmc.memory_needed(1, without)[1]
    )
