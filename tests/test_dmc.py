"""DrQ-SAC: environment, networks, replay, update, resets, evaluation, metrics."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import Scripted
from torch.distributions import Normal, TanhTransform

import plastic_drq_sac_dmc as dmc

BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0)
SMALL = dict(env_id="cartpole-swingup_sparse", image_size=16, batch_size=8, total_timesteps=40_000)
SMALL |= dict(learning_starts=20, render_quality="fast", device="cpu")


def make_args(**flags):
    return dmc.Args(**SMALL | flags)


def make_agent(**flags):
    torch.manual_seed(0)
    agent = dmc.Agent(2, make_args(**flags), torch.Generator().manual_seed(0))
    for w in agent.target.parameters():  # online and target are told apart
        w += 0.01
    return agent


def make_batch(size=8):
    rng = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randint(256, (2, size, 3, 16, 16), generator=rng, dtype=torch.uint8)
    action = 2 * torch.rand((size, 2), generator=rng) - 1
    terminated = (torch.arange(size) % 3 == 0).float()
    return dmc.Batch(obs, action, torch.randn(size, generator=rng), terminated, next_obs)


def add_step(replay, rng):
    action = rng.uniform(-1, 1, replay.actions.shape[1]).astype(np.float32)
    frame = rng.integers(256, size=(1, 16, 16), dtype=np.uint8)
    replay.add(action, float(rng.normal()), bool(rng.random() < 0.05), frame)


def fill(replay, steps):
    rng = np.random.default_rng(0)
    replay.start(rng.integers(256, size=(1, 16, 16), dtype=np.uint8))
    for _ in range(steps):
        add_step(replay, rng)


# --- Environment ----------------------------------------------------------------------------------


class FakeSuite:
    """Rewards 1, 2, 3, ...; the episode ends with the fifth, with the given discount."""

    def __init__(self, discount):
        self.count, self.discount, self.actions = 0, discount, []

    def step(self, action):
        self.count += 1
        self.actions.append(action)
        step = dict(reward=float(self.count), discount=self.discount)
        return SimpleNamespace(**step, last=lambda: self.count == 5)


@pytest.mark.parametrize("discount, terminated", [(1.0, False), (0.0, True)])
def test_action_repeat_sums_rewards_and_stops_at_the_end(monkeypatch, discount, terminated):
    env = dmc.DMControl(make_args(action_repeat=3))
    env.env = FakeSuite(discount)
    env.low, env.high = np.array([-1.0, 0.0]), np.array([1.0, 10.0])
    monkeypatch.setattr(env, "frame", lambda: None)
    assert env.step(np.array([0.5, -1.0], np.float32))[1:4] == (1 + 2 + 3, False, False)
    assert env.step(np.array([2.0, 0.0]))[1:4] == (4 + 5, terminated, not terminated)
    # Rescaled to the task's bounds.
    np.testing.assert_allclose(env.env.actions, [[0.5, 0.0]] * 3 + [[1.0, 5.0]] * 2)


def test_actions_reach_the_tasks_own_bounds():
    env = dmc.DMControl(make_args(env_id="quadruped-walk"))  # 0.8, 1 and 1.1
    spec = env.env.action_spec()
    env.reset()
    for unit, bound in ((-1.0, spec.minimum), (1.0, spec.maximum)):
        env.step(np.full(12, unit))
        np.testing.assert_allclose(env.env.physics.control(), bound)


def test_an_episode_ends_by_time_and_seeds_tell_episodes_apart():
    env = dmc.DMControl(make_args(env_id="reacher-easy", action_repeat=300))
    first, _ = env.reset(seed=0)
    assert first.shape == (1, 16, 16) and first.dtype == np.uint8
    ends = [env.step(np.zeros(2))[2:4] for _ in range(env.episode_steps)]
    assert ends == [(False, False)] * 3 + [(False, True)]  # after 1,000 steps
    assert np.array_equal(first, env.reset(seed=0)[0])
    others = env.reset()[0], env.reset(seed=6)[0]
    assert not any(np.array_equal(first, other) for other in others)


def test_gray_is_weighted_and_a_quadruped_has_a_camera_of_its_own():
    rgb = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    weighted = 0.299 * rgb[..., 0].astype(float) + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]
    gray = dmc.DMControl(make_args())
    color = dmc.DMControl(make_args(env_id="quadruped-walk", grayscale=False))
    # PyTorch takes a real one, whose rows run backwards in memory.
    assert torch.from_numpy(color.reset()[0]).shape == (3, 16, 16)
    cameras = []
    physics = SimpleNamespace(render=lambda height, width, camera: cameras.append(camera) or rgb)
    gray.env = color.env = SimpleNamespace(physics=physics)
    assert np.abs(gray.frame()[0] - weighted).max() <= 0.5 + 1e-9
    assert np.array_equal(color.frame(), rgb.transpose(2, 0, 1))
    assert cameras == [0, 2]


def test_fast_rendering_shows_the_same_scene():
    frames = []
    for quality in ("full", "fast"):
        env = dmc.DMControl(make_args(render_quality=quality, image_size=64))
        frames.append(env.reset(seed=1)[0].astype(float))
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 10


def test_images_larger_than_the_suites_screen():
    frame, _ = dmc.make_env(make_args(image_size=700)).reset()
    assert frame.shape == (1, 700, 700) and frame[0, 690:].any() and frame[0, :, 690:].any()


# --- Networks -------------------------------------------------------------------------------------

SCALES = 2 * (32 + 64 + 128 + 256)  # LayerNorm: a scale and a shift per channel
# CReLU doubles the fan-in of the two layers after one, in each of three MLPs; in the encoder, that
# of three convolutions and of what the encoder's output goes into.
HEAD, ACTOR, CONVS = (
    2 * (256 * 256 + 256),
    256 * 256 + 256 * 12,
    9 * (32 * 64 + 64 * 128 + 128 * 256),
)
LATENT = 4096 * 50


@pytest.mark.parametrize(
    "flags, more",
    [
        (BASE, (0, 0, 0)),
        ({}, (SCALES, HEAD, ACTOR)),
        (BASE | dict(layer_norm=True, layer_norm_scope="all"), (SCALES, 4 * 512, 2 * 512)),
        (BASE | dict(crelu=True, crelu_scope="all"), (CONVS, HEAD + LATENT, ACTOR + LATENT)),
    ],
    ids=str,
)
def test_numbers_of_parameters(flags, more):
    """Of encoder, critic's head and actor: the paper's at 6 actions, and how many more."""
    args = make_args(image_size=64, **flags)
    critic, actor = dmc.Critic(6, args), dmc.Actor(6, args)
    parts = zip((critic.backbone, critic.head, actor), (388_416, 366_232, 286_882), strict=True)
    assert tuple(sum(w.numel() for w in part.parameters()) - n for part, n in parts) == more
    assert critic(torch.zeros(2, 3, 64, 64), torch.zeros(2, 6)).shape == (2, 2)


@pytest.mark.parametrize("size", [1, 6, 7])
def test_same_padding_by_its_formula(size):
    conv, x = dmc.SameConv(2, 3), torch.randn(2, 2, size, size)
    out = math.ceil(size / 2)
    total = max((out - 1) * 2 + 3 - size, 0)
    before = total // 2
    padded = F.pad(x, (before, total - before) * 2)
    expected = F.conv2d(padded, conv.weight, conv.bias, stride=2)
    assert expected.shape == (2, 3, out, out)
    torch.testing.assert_close(conv(x), expected)


def test_any_image_size_fits_the_networks():
    for size in (16, 17, 33, 84):
        critic = dmc.Critic(1, make_args(image_size=size, frame_stack=2))
        assert critic(torch.zeros(1, 2, size, size), torch.zeros(1, 1)).shape == (1, 2)


@pytest.mark.parametrize("flags", [BASE, {}, dict(layer_norm_scope="all", crelu_scope="all")])
def test_networks_by_pytorchs_functions(flags):
    """Parameters in their order; moved first, so that scales and shifts are not 1 and 0."""
    agent, args, batch = make_agent(**flags), make_args(**flags), make_batch()
    with torch.no_grad():
        for w in [*agent.critic.parameters(), *agent.actor.parameters()]:
            w += 0.1 * torch.randn_like(w)

    def activation(x, crelu):
        return torch.cat([F.relu(x), F.relu(-x)], dim=1) if crelu else F.relu(x)

    def latent(w, features):
        x = F.linear(features, next(w), next(w))
        return torch.tanh(F.layer_norm(x, (50,), next(w), next(w), 1e-6))

    def hidden(w, x):
        for _ in range(2):
            x = F.linear(x, next(w), next(w))
            if args.layer_norm and args.layer_norm_scope == "all":
                x = F.layer_norm(x, x.shape[1:], next(w), next(w), 1e-6)
            x = activation(x, args.crelu)
        return x

    images = x = batch.obs / 255
    w = iter(agent.critic.parameters())
    for _ in range(4):
        x = F.conv2d(F.pad(x, (0, 1, 0, 1)), next(w), next(w), stride=2)
        if args.layer_norm:
            x = F.layer_norm(x.movedim(1, 3), x.shape[1:2], next(w), next(w), 1e-6).movedim(3, 1)
        x = activation(x, args.crelu and args.crelu_scope == "all")
    features = x.flatten(1)
    x = torch.cat([latent(w, features), batch.action], dim=1)
    q_values = [F.linear(hidden(w, x), next(w), next(w)) for _ in range(2)]
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(agent.critic(images, batch.action), torch.cat(q_values, 1), **close)
    w = iter(agent.actor.parameters())
    x = hidden(w, latent(w, features))
    mean, log_std = (F.linear(x, next(w), next(w)) for _ in range(2))
    expected = mean, -4 + 6 * torch.tanh(log_std)
    torch.testing.assert_close(tuple(agent.actor(features)), expected, **close)


def test_initial_weights():
    torch.manual_seed(0)
    args = make_args(image_size=64, hidden_dim=64)
    critic, actor = dmc.Critic(3, args), dmc.Actor(3, args)
    mlps = [*critic.head.q_functions.modules(), *actor.hidden.modules()]
    layers = [layer for layer in mlps if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 8
    for layer in (*critic.backbone[0:4:3], *layers, actor.mean, actor.log_std):
        w = layer.weight.flatten(1)
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        expected = (1 if layer is actor.log_std else 2) * torch.eye(len(gram))
        torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5)
        assert not layer.bias.any()
    assert not actor.latent[0].bias.any()
    latent = actor.latent[0].weight
    assert latent.std().item() == pytest.approx(4096**-0.5, rel=0.02)
    assert latent.abs().max() < 2.3 * 4096**-0.5  # cut at two standard deviations of what was drawn


def test_log_density_is_that_of_torch_distributions():
    """Also where the tanh is 1 to all digits."""
    actor = make_agent().actor.double()
    torch.nn.init.constant_(actor.log_std.bias, 1.0)
    features = torch.randn(50, dmc.num_features(make_args()), dtype=torch.float64)
    noise = torch.linspace(-20, 20, 100, dtype=torch.float64).view(50, 2)
    action, log_prob = actor.sample(features, noise)
    mean, log_std = actor(features)
    x = mean + log_std.exp() * noise
    log_slope = TanhTransform().log_abs_det_jacobian(x, torch.tanh(x))
    expected = (Normal(mean, log_std.exp()).log_prob(x) - log_slope).sum(1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(action, torch.tanh(x))


# --- Replay ---------------------------------------------------------------------------------------


def tiny(number):
    return np.full((1, 2, 2), number % 256, dtype=np.uint8)


@pytest.mark.parametrize(
    "capacity, num_episodes, frame_stack", [(100, 6, 3), (30, 20, 1), (30, 20, 3), (7, 30, 3)]
)
def test_replay_against_a_list_of_episodes(capacity, num_episodes, frame_stack):
    """What can be sampled happened, with its stacks; the newest transitions are all there."""

    def stack(first, newest):
        """Frames are numbered; `first` begins the episode."""
        return [max(n, first) % 256 for n in range(newest - frame_stack + 1, newest + 1)]

    rng = np.random.default_rng(0)
    replay = dmc.ReplayBuffer(capacity, 5, (1, 2, 2), 1, frame_stack, torch.device("cpu"))
    happened, first = [], 0
    for _ in range(num_episodes):
        replay.start(tiny(first))
        last = first + int(rng.integers(1, 12))
        for n in range(first, last):
            action, terminated = float(len(happened)), n + 1 == last and rng.random() < 0.5
            replay.add(np.array([action], np.float32), 2 * action, terminated, tiny(n + 1))
            happened.append((stack(first, n), action, 2 * action, terminated, stack(first, n + 1)))
            assert replay.last_obs()[0, :, 0, 0].tolist() == stack(first, n + 1)
        first = last + 1
    batch = replay.sample(20_000, torch.Generator().manual_seed(0))
    first_pixels = batch.obs[..., 0, 0], batch.next_obs[..., 0, 0]
    batch = batch._replace(obs=first_pixels[0], action=batch.action[:, 0], next_obs=first_pixels[1])
    rows = list(zip(*(entry.tolist() for entry in batch), strict=True))
    assert all(row == happened[int(row[1])] for row in rows)
    counts = Counter(int(row[1]) for row in rows)
    assert len(counts) == int(replay.valid.sum())
    assert set(counts) == set(range(len(happened) - len(counts), len(happened)))
    expected = len(rows) / len(counts)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())


def test_a_full_run_of_episodes_loses_no_transition():
    replay = dmc.ReplayBuffer(40, 8, (1, 2, 2), 1, 3, torch.device("cpu"))
    for _ in range(5):
        replay.start(tiny(0))
        for _ in range(8):
            replay.add(np.zeros(1, np.float32), 0.0, False, tiny(0))
    assert int(replay.valid.sum()) == 40


# --- Update ---------------------------------------------------------------------------------------


@pytest.fixture
def double(monkeypatch):
    """In double precision no rounding error puts a ReLU's input on the other side of zero."""
    monkeypatch.setattr(dmc, "to_images", lambda obs: obs.double() / 255)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def slow_update(agent, batch):
    """Critic, target, actor, temperature: in plain PyTorch on deep copies, with the same draws."""
    args, generator = agent.args, torch.Generator().manual_seed(0)
    networks = agent.critic, agent.target, agent.actor, agent.log_alpha
    online, target, actor, log_alpha = map(copy.deepcopy, networks)
    images = dmc.augment(batch.obs, args.aug_shift, 0.0, generator)
    next_images = dmc.augment(batch.next_obs, args.aug_shift, 0.0, generator)
    next_noise, noise = torch.randn((2, 8, 2), generator=generator)
    perturbed = {
        "all": {*online.parameters(), *actor.parameters(), log_alpha},
        "critic": {*online.parameters()},
        "actor": {*actor.parameters()},
        "encoder": {*online.backbone.parameters()},
    }[args.sam_scope]

    def descend(loss_function, parameters):
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1.0, foreach=False)
        optimizer.zero_grad()
        loss_function().backward()
        inside = [w for w in parameters if w in perturbed]
        if args.sam_rho > 0 and inside:
            norm = torch.sqrt(sum(w.grad.square().sum() for w in inside))
            before = [w.detach().clone() for w in inside]
            for w in inside:
                w.data += args.sam_rho * w.grad / norm
            optimizer.zero_grad()
            loss_function().backward()
            for w, old in zip(inside, before, strict=True):
                w.data = old
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

    descend(critic_loss, list(online.parameters()))
    tau = args.target_ema
    for w_target, w in zip(target.parameters(), online.parameters(), strict=True):
        w_target.data = tau * w_target + (1 - tau) * w.detach()
    features, entropies = online.backbone(images).detach(), []

    def actor_loss():
        action, log_prob = policy(features, noise)
        entropies.append(-log_prob.mean().detach())
        q_values = online.head(features, action).min(1).values
        return (log_alpha.exp().detach() * log_prob - q_values).mean()

    descend(actor_loss, list(actor.parameters()))
    descend(lambda: log_alpha.exp() * (entropies[0] + 2), [log_alpha])
    return [online, actor, target], log_alpha


@pytest.mark.parametrize("scope", ["all", "critic", "actor", "encoder", "off"])
def test_an_update_equals_a_slow_one(scope, double):
    flags = dict(sam_rho=0.0) if scope == "off" else dict(sam_rho=0.05, sam_scope=scope)
    flags |= dict(learning_rate=1e-3, gamma=0.9, target_ema=0.9)
    agent, batch = make_agent(**flags), make_batch()
    for optimizer in agent.optimizers.values():  # else Adam's first step tells a gradient's sign
        optimizer.param_groups[0]["eps"] = 1.0
    torch.nn.init.constant_(agent.actor.log_std.bias, 0.55)  # an entropy between -|A| and |A|
    networks, log_alpha = slow_update(agent, batch)
    losses = agent.update(batch)
    for network, slow in zip((agent.critic, agent.actor, agent.target), networks, strict=True):
        ours, expected = dict(network.named_parameters()), dict(slow.named_parameters())
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(agent.log_alpha, log_alpha, rtol=1e-9, atol=1e-12)
    # What is not finite anywhere shows in the norm of all that is trained.
    trained = [*agent.critic.parameters(), *agent.actor.parameters(), agent.log_alpha]
    norm = torch.cat([w.detach().flatten() for w in trained]).norm()
    torch.testing.assert_close(losses["weight_norm"], norm)
    assert losses["temperature"].item() == pytest.approx(0.1)  # of before the step


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_the_temperature_begins_as_its_flag_says_and_comes_back_at_a_reset(alpha):
    agent = make_agent(initial_temperature=alpha)
    assert agent.log_alpha.exp().item() == pytest.approx(alpha)
    agent.log_alpha.data.fill_(7.0)
    agent.reset()
    assert agent.log_alpha.exp().item() == pytest.approx(alpha)


def test_a_reset_renews_all_but_the_encoder():
    agent = make_agent()
    agent.update(make_batch())
    before = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    torch.manual_seed(7)
    agent.reset()
    for name, tensor in agent.tensors().items():
        kept = "backbone" in name or name.startswith("adam.encoder")
        assert torch.equal(tensor, before[name]) == kept, name
        assert kept or not (name.startswith("adam") and tensor.any()), name
    torch.manual_seed(7)
    head, actor = dmc.CriticHead(2, agent.args), dmc.Actor(2, agent.args)
    pairs = (agent.critic.head, head), (agent.target.head, head), (agent.actor, actor)
    for ours, fresh in pairs:
        for w, phi in zip(ours.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(w, phi)
    assert agent.log_alpha.exp().item() == pytest.approx(0.1)


def test_adam_steps_on_the_right_weights_whatever_the_gradients_strides():
    """Fused Adam on the CPU reads a gradient as if it lay in memory like its parameter."""
    w = torch.nn.Parameter(torch.zeros(4, 3, 3, 3).to(memory_format=torch.channels_last))
    slope = torch.randn(4, 3, 3, 3)
    loss = (w * slope).sum()
    (gradient,) = torch.autograd.grad(loss, w, retain_graph=True)
    assert gradient.stride() != w.stride()
    agent = SimpleNamespace(args=SimpleNamespace(learning_rate=1.0))
    optimizer = dmc.Agent.make_optimizer(agent, [w])
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    dmc.set_gradient(loss, [w])
    optimizer.step()
    torch.testing.assert_close(w.detach(), -slope.sign())  # Adam's first step


# --- Evaluation and metrics -----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_an_evaluation_by_hand(channels, monkeypatch):
    """Two episodes of ten steps, in which a reward is the sum of the action: 1, 2, ... 20."""
    env, stacks, video = Scripted(lambda: None), [], []
    monkeypatch.setattr(Scripted, "seeds", [])
    monkeypatch.setattr(Scripted, "frame_shape", (channels, 16, 16))
    monkeypatch.setattr(dmc, "make_env", lambda args: env)

    def act_mean(obs):
        stacks.append(obs[0].numpy())
        return torch.full((1, 2), len(stacks) / 2)

    agent = SimpleNamespace(generator=torch.Generator(), act_mean=act_mean)
    returns = dmc.evaluate(agent, make_args(seed=3, eval_episodes=2), video)
    assert env.seeds == [40_000, 40_001]
    assert returns == [sum(range(1, 11)), sum(range(11, 21))]
    for n, stack in enumerate(stacks):
        times = [max(n % 10 - age, 0) for age in (2, 1, 0)]
        assert np.array_equal(stack, np.concatenate([video[time] for time in times]))
    for env.time, frame in enumerate(video):
        assert np.array_equal(frame, env.frame())
    assert len(video) == 10


def test_sharpness_is_of_the_training_loss_without_noise(monkeypatch):
    """On 32 transitions, not augmented."""
    agent, losses = make_agent(), []
    replay = dmc.ReplayBuffer(200, 50, (1, 16, 16), 2, 3, torch.device("cpu"))
    fill(replay, 150)
    monkeypatch.setattr(dmc, "max_eigenvalue", lambda loss, *_: losses.append(loss) or 0.0)
    dmc.plasticity_metrics(agent, replay, 3)
    batch = replay.sample(1024, torch.Generator().manual_seed(3))
    batch = dmc.Batch(*(entry[:32] for entry in batch))
    td_target = agent.td_target(batch, batch.next_obs / 255, torch.zeros(32, 2))
    errors = agent.critic(batch.obs / 255, batch.action) - td_target[:, None]
    torch.testing.assert_close(losses, [errors.square().sum(1).mean()])


def test_the_mean_action_is_that_of_no_noise():
    agent, obs = make_agent(), make_batch().obs
    features = agent.critic.backbone(dmc.to_images(obs))
    expected = agent.actor.sample(features, torch.zeros(8, 2))[0]
    torch.testing.assert_close(agent.act_mean(obs), expected)


def test_the_action_played_has_gaussian_noise():
    agent, obs = make_agent(), make_batch().obs
    noise = torch.randn((8, 2), generator=torch.Generator().manual_seed(0))
    features = agent.critic.backbone(dmc.to_images(obs))
    torch.testing.assert_close(agent.act(obs), agent.actor.sample(features, noise)[0])
