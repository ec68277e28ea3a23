"""DrQ-SAC: environment, networks, replay, update, resets, evaluation, metrics."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import plastic_drq_sac_dmc as dmc

BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
SMALL = dict(image_size=16, batch_size=8, total_timesteps=400, learning_starts=20)
SMALL |= dict(render_quality="fast", device="cpu")


def make_args(**flags):
    return dmc.Args(**dict(env_id="cartpole-swingup_sparse") | SMALL | flags)


def make_agent(action_dim=2, seed=0, **flags):
    torch.manual_seed(seed)
    return dmc.Agent(action_dim, make_args(**flags), torch.Generator().manual_seed(seed))


def make_agent_in_double(**flags):
    """In double precision no rounding error puts a ReLU's input on the other side of zero."""
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


# --- Environment ----------------------------------------------------------------------------------


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
    monkeypatch.setattr(env, "frame", lambda: None)
    _, reward, *ends, _ = env.step(np.array([0.5, -1.0], dtype=np.float32))
    assert (reward, ends) == (1 + 2 + 3, [False, False])
    np.testing.assert_allclose(env.env.actions, [[0.5, 0.0]] * 3)  # rescaled to the task's bounds
    _, reward, *ends, _ = env.step(np.array([2.0, 0.0]))
    assert (reward, ends) == (4 + 5, [terminated, not terminated])
    np.testing.assert_allclose(env.env.actions[3:], [[1.0, 5.0]] * 2)


def test_an_episode_ends_by_time_and_seeds_tell_episodes_apart():
    env = dmc.DMControl(make_args(env_id="reacher-easy"))  # action repeat 4
    first, _ = env.reset(seed=5)
    length, rewards, rng = 0, 0.0, np.random.default_rng(0)
    while True:
        frame, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_dim))
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
        assert env.frame().shape == (1, 16, 16)
        assert np.abs(env.frame()[0] - gray).max() <= 0.5 + 1e-9
        assert cameras.pop() == camera
    env = dmc.DMControl(make_args(grayscale=False))
    env.env = SimpleNamespace(physics=physics)
    assert np.array_equal(env.frame(), rgb.transpose(2, 0, 1))
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


# --- Networks -------------------------------------------------------------------------------------


def count(module):
    return sum(w.numel() for w in module.parameters())


def test_parameters_of_the_papers_network():
    args = make_args(image_size=64, **BASE)
    critic, actor = dmc.Critic(6, args), dmc.Actor(6, args)
    assert (count(critic.backbone), count(critic.head), count(actor)) == (388_416, 366_232, 286_882)
    assert critic(torch.zeros(2, 3, 64, 64), torch.zeros(2, 6)).shape == (2, 2)
    # LayerNorm: a scale and a shift per channel. CReLU: fan-in 512 for the two layers after one,
    # in three MLPs.
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


# --- Replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity, num_episodes", [(100, 6), (30, 20), (7, 30)])
@pytest.mark.parametrize("frame_stack", [1, 3])
def test_replay_against_a_list_of_episodes(capacity, num_episodes, frame_stack):
    """What can be sampled happened, with its stacks; the newest transitions are all there."""
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
            assert replay.last_obs()[0, :, 0, 0].tolist() == next_stack
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


# --- Update ---------------------------------------------------------------------------------------


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
        head = agent.target.head
        x = torch.cat([head.latent(agent.target.backbone(images)), action], 1)
        q1, q2 = (q_function(x)[:, 0] for q_function in head.q_functions)
    for i in range(8):
        expected = batch.reward[i]
        if i % 3 != 0:
            expected = expected + 0.9 * (min(q1[i], q2[i]) - 0.3 * log_prob[i])
        assert target[i].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


def test_td_loss_by_hand():
    q_values = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert dmc.td_loss(q_values, torch.tensor([2.0, 3.0])).item() == pytest.approx(
        ((1 + 0) + (0 + 4)) / 2
    )


def slow_update(agent, batch, images, next_images, next_noise, noise):
    """Critic, target, actor, temperature: in plain PyTorch on deep copies."""
    args = agent.args
    online, target, actor = (
        copy.deepcopy(network) for network in (agent.online, agent.target, agent.actor)
    )
    log_alpha = copy.deepcopy(agent.log_alpha)
    rho = args.sam_rho
    perturbed = {
        "all": [online, actor, "temperature"], "critic": [online], "actor": [actor],
        "encoder": [online.backbone],
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
    monkeypatch.setattr(dmc, "augment", lambda *args, **kwargs: queue.pop(0))
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
    loss = lambda: {"": agent.log_alpha.exp() * (entropy + agent.action_dim)}  # noqa: E731
    agent.descend(("temperature",), loss)
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
    before = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    pointers = [tensor.data_ptr() for tensor in agent.tensors().values()]
    agent.reset()
    after = agent.tensors()
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


def test_adam_steps_on_the_right_weights_whatever_the_gradients_strides():
    """Fused Adam on the CPU reads a gradient as if it lay in memory like its parameter."""
    w = torch.nn.Parameter(torch.zeros(4, 3, 3, 3).to(memory_format=torch.channels_last))
    slope = torch.randn(4, 3, 3, 3)
    loss = (w * slope).sum()
    (gradient,) = torch.autograd.grad(loss, w, retain_graph=True)
    assert gradient.stride() != w.stride()
    agent = SimpleNamespace(args=SimpleNamespace(learning_rate=1.0))
    optimizer = dmc.Agent.make_optimizer(agent, [w])
    dmc.set_gradient(loss, [w])
    optimizer.step()
    torch.testing.assert_close(w.detach(), -slope.sign())  # Adam's first step


@pytest.mark.parametrize("where, value", [("reward", math.nan), ("action", math.inf)])
def test_what_is_not_finite_shows_in_the_norm_of_the_weights(where, value):
    agent, batch = make_agent(), make_batch()
    assert agent.update(batch)["weight_norm"].isfinite()
    broken = batch._replace(**{where: torch.full_like(getattr(batch, where), value)})
    assert not agent.update(broken)["weight_norm"].isfinite()
    assert not agent.act(batch.obs).isfinite().any()  # train() looks at the action, too


def test_the_norm_of_the_weights():
    agent = make_agent()
    losses = agent.update(make_batch())
    weights = [*agent.online.parameters(), *agent.actor.parameters(), agent.log_alpha]
    squares = sum(w.detach().double().square().sum() for w in weights)
    assert losses["weight_norm"].item() == pytest.approx(math.sqrt(squares), rel=1e-6)


# --- Evaluation -----------------------------------------------------------------------------------


class ShortOrLong:
    """Episode of seed s: 2 + 3 * (s % 3) steps, rewards s, frames full of 10 * (s % 10) + step."""

    def __init__(self):
        self.seeds, self.actions, self.frame_shape = [], [], (1, 16, 16)

    def frame(self):
        return np.full((1, 16, 16), 10 * (self.seeds[-1] % 10) + self.step_number, np.uint8)

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.step_number = 0
        return self.frame(), {}

    def step(self, action):
        self.actions.append(action)
        self.step_number += 1
        seed = self.seeds[-1]
        truncated = self.step_number == 2 + 3 * (seed % 3)
        return self.frame(), float(seed), False, truncated, {}


def test_an_evaluation_by_hand(monkeypatch):
    """Three episodes of different length: seeds, stacks, returns, video."""
    env, stacks, video = ShortOrLong(), [], []
    monkeypatch.setattr(dmc, "make_env", lambda args: env)

    def act_mean(obs):
        stacks.append(obs[0, :, 0, 0].tolist())
        return torch.full((1, 2), len(stacks) / 100)

    agent = SimpleNamespace(generator=torch.Generator(), act_mean=act_mean)
    returns = dmc.evaluate(agent, make_args(seed=3, eval_episodes=3), video)
    assert env.seeds == [40_000, 40_001, 40_002]
    # 40,000 % 3 is 1, 40,001 % 3 is 2, 40,002 % 3 is 0.
    assert returns == [5 * 40_000.0, 8 * 40_001.0, 2 * 40_002.0]
    assert stacks[:4] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert stacks[5:8] == [[10, 10, 10], [10, 10, 11], [10, 11, 12]]
    assert stacks[13:] == [[20, 20, 20], [20, 20, 21]]
    np.testing.assert_allclose([a[0] for a in env.actions], np.arange(1, 16) / 100, rtol=1e-6)
    assert [frame[0, 0, 0] for frame in video] == [0, 1, 2, 3, 4]


def test_the_mean_action_is_that_of_no_noise():
    agent, obs = make_agent(), make_batch().obs
    features = agent.online.backbone(dmc.to_images(obs))
    expected = agent.actor.sample(features, torch.zeros(8, 2))[0]
    torch.testing.assert_close(agent.act_mean(obs), expected)
    assert not torch.allclose(agent.act(obs), expected)


def test_metrics_change_nothing_and_count_the_active_units():
    agent = make_agent(hidden_dim=4, latent_dim=2)
    replay = dmc.ReplayBuffer(60, 20, (1, 16, 16), 2, 3, torch.device("cpu"))
    rng = np.random.default_rng(0)
    replay.start(rng.integers(256, size=(1, 16, 16), dtype=np.uint8))
    for _ in range(20):
        frame = rng.integers(256, size=(1, 16, 16), dtype=np.uint8)
        replay.add(rng.uniform(-1, 1, 2).astype(np.float32), rng.normal(), False, frame)
    before = {name: w.clone() for name, w in (agent.tensors() | replay.tensors()).items()}
    state = agent.generator.get_state()
    metrics = dmc.plasticity_metrics(agent, replay, 7)
    assert metrics == dmc.plasticity_metrics(agent, replay, 7)
    assert metrics != dmc.plasticity_metrics(agent, replay, 8)
    assert all(torch.equal(w, before[n]) for n, w in (agent.tensors() | replay.tensors()).items())
    assert torch.equal(agent.generator.get_state(), state)
    batch = replay.sample(512, torch.Generator().manual_seed(7))
    hidden = agent.online.head.q_functions[0][0]
    x = torch.cat([agent.online.head.latent(agent.online.backbone(dmc.to_images(batch.obs))),
                   batch.action], dim=1)  # fmt: skip
    share = (hidden[:2](x) > 0).float().mean().item()
    assert metrics["active_units/head.q_functions.0.0.1"] == pytest.approx(share)
