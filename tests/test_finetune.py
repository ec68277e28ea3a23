"""The fine-tuning script's parts by oracles: encoder, Reset†, evaluation, pretraining, videos."""

import copy
import gzip
import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import Recording
from test_atari_update import slow_project

import plastic_drq_rainbow_atari as atari
import plastic_pretrained_finetune as ft

SMALL = dict(batch_size=4, hidden_dim=8, n_atoms=5, buffer_size=300, learning_starts=20)
SMALL |= dict(device="cpu", total_timesteps=60, eval_episodes=1)


def make_args(**flags):
    return ft.Args(**SMALL | dict(from_scratch=True) | flags)


def pretrain_args(**flags):
    return ft.Args(**SMALL | dict(mode="pretrain") | flags)


def make_backbone():
    """An encoder whose BatchNorm has statistics and scales of its own."""
    torch.manual_seed(0)
    backbone = ft.Backbone()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)  # 0: all eight may be below zero
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone


def make_agent(**flags):
    """An agent, and a replay of 100 steps of noise."""
    args, backbone, rng = make_args(**flags), make_backbone(), np.random.default_rng(0)
    torch.manual_seed(1)
    agent = ft.Agent(backbone, 3, 100, args, torch.Generator().manual_seed(0))
    replay = ft.ReplayBuffer(args.buffer_size, args.n_step, args.gamma, torch.device("cpu"))
    frames = rng.integers(256, size=(101, 84, 84), dtype=np.uint8)
    replay.start(frames[0])
    for frame in frames[1:]:
        action, reward, done = rng.integers(3), rng.integers(-1, 2), rng.random() < 0.05
        replay.add(int(action), float(reward), bool(done), frame)
    return agent, replay


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_fine_tuning_does_not_say_is_as_for_atari():
    """Section 4.4's base has none of the interventions."""
    ours, theirs = vars(ft.Args(from_scratch=True)), vars(atari.Args())
    own = dict(exp_name="finetune", learning_rate=3e-5, layer_norm=False, crelu=False, sam_rho=0.0)
    own |= dict(reset_interval=0, shrink_perturb_alpha=0.6)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 35
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared} | own
    assert ft.RANDOM_HUMAN == atari.RANDOM_HUMAN and ft.MAY_CHANGE == atari.MAY_CHANGE


def test_layer_norm_is_in_the_heads_hidden_layers():
    head = ft.QNetwork(ft.Backbone(), 3, make_args(layer_norm=True)).head
    norms = [m for m in head.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [norm.normalized_shape for norm in norms] == [(8,), (8,)]


# --- Encoder --------------------------------------------------------------------------------------


def save_encoder(path, backbone):
    state = {f"backbone.{name}": w for name, w in backbone.state_dict().items()}
    torch.save({"model_state_dict": state | {"head.weight": torch.zeros(3)}}, path)
    return {name: tuple(w.shape) for name, w in state.items()}


def test_weights_in_the_published_layout_are_loaded_as_they_are(tmp_path):
    """As the spec has it: nine blocks of three convolutions and BatchNorms.

    The first block of each group is strided, with a convolution beside.
    """
    layout = {}
    for block in range(9):
        group, first = block // 3, block % 3 == 0
        outputs = (32, 64, 64)[group]
        inputs = (4, 32, 64)[group] if first else outputs
        hidden, prefix = 2 * inputs, f"backbone.layers.{block}."
        shapes = {0: (hidden, inputs, 1, 1), 3: (hidden, 1, 3, 3), 6: (outputs, hidden, 1, 1)}
        convolutions = {f"layers.{i}": shape for i, shape in shapes.items()}
        if first:
            stride = (3, 2, 2)[group]
            convolutions["down"] = (outputs, inputs, stride, stride)
        for name, shape in convolutions.items():
            layout[f"{prefix}{name}.weight"], layout[f"{prefix}{name}.bias"] = shape, shape[:1]
        for i, shape in shapes.items():
            for name in ("weight", "bias", "running_mean", "running_var"):
                layout[f"{prefix}layers.{i + 1}.{name}"] = shape[:1]
            layout[f"{prefix}layers.{i + 1}.num_batches_tracked"] = ()
    backbone, images = make_backbone(), torch.rand(2, 4, 84, 84)
    assert save_encoder(tmp_path / "a.pth", backbone) == layout
    features = ft.load_pretrained(str(tmp_path / "a.pth")).eval()(images)
    assert features.shape == (2, 3136) and torch.equal(features, backbone.eval()(images))


def test_all_that_is_wrong_with_an_encoder_is_said_in_one_line(tmp_path):
    backbone, path = ft.Backbone(), tmp_path / "a.pth"
    del backbone.layers[2].layers[3]
    backbone.layers[0].down = torch.nn.Conv2d(4, 32, 2, 2)
    save_encoder(path, backbone)
    words = rf"^error: {path}: not an encoder.*layers\.2\.layers\.7.*\[32, 4, 2, 2\][^\n]*$"
    with pytest.raises(SystemExit, match=words):
        ft.load_pretrained(str(path))


def test_initial_weights_and_a_block_that_starts_as_what_is_beside_it():
    torch.manual_seed(0)
    backbone = ft.Backbone().eval()
    for conv, fan_out, scale in (
        (backbone.layers[4].layers[0], 128, 12**-0.25),
        (backbone.layers[4].layers[3], 128 * 9, 12**-0.25),
        (backbone.layers[6].down, 64 * 4, 1),
    ):
        assert conv.weight.std().item() == pytest.approx(scale * (2 / fan_out) ** 0.5, rel=0.06)
    x = torch.randn(2, 4, 84, 84)
    torch.testing.assert_close(backbone.layers[0](x), backbone.layers[0].down(x))
    x = torch.randn(2, 32, 28, 28)
    torch.testing.assert_close(backbone.layers[1](x), x)


def test_the_encoder_by_hand():
    """MobileNetV2's blocks: the stride is that of the depthwise convolution, no ReLU at the end."""
    backbone = make_backbone().double().eval()
    w, images = backbone.state_dict(), torch.rand(2, 4, 84, 84, generator=generator()).double()

    def conv(x, name, **options):
        weight, bias = (w[f"layers.{name}.{key}"] for key in ("weight", "bias"))
        return torch.nn.functional.conv2d(x, weight, bias, **options)

    def norm(x, name):
        keys = "running_mean running_var weight bias".split()
        mean, variance, scale, shift = (w[f"layers.{name}.{key}"][:, None, None] for key in keys)
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = images
    for i, stride in enumerate((3, 1, 1, 2, 1, 1, 2, 1, 1)):
        hidden = norm(conv(x, f"{i}.layers.0"), f"{i}.layers.1").clamp(min=0)
        options = dict(stride=stride, padding=1, groups=hidden.shape[1])
        hidden = norm(conv(hidden, f"{i}.layers.3", **options), f"{i}.layers.4").clamp(min=0)
        hidden = norm(conv(hidden, f"{i}.layers.6"), f"{i}.layers.7")
        x = (conv(x, f"{i}.down", stride=stride) if stride > 1 else x) + hidden
    torch.testing.assert_close(backbone(images), x.flatten(1))


# --- Freezing, update, Reset† ---------------------------------------------------------------------

SAM = {"off": {}, "on": dict(sam_rho=0.1)}
STAY = "running_mean", "running_var", "num_batches_tracked", "support"


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("sam", SAM)
def test_an_update_is_the_atari_scripts_and_a_frozen_encoder_never_changes(sam, freeze):
    """Whose update runs the encoder in each pass. Statistics stay in any case."""
    flags = SAM[sam] | dict(freeze_backbone=freeze, learning_rate=1e-3)
    (agent, replay), (other, other_replay) = make_agent(**flags), make_agent(**flags)
    first = copy.deepcopy(agent.online.state_dict())
    other.sam_parameters, other.args.sam_noise = other.parameters, "independent"
    for _ in range(3):
        losses = agent.update(replay)
        expected = atari.Agent.update(other, other_replay)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(replay.priorities, other_replay.priorities, rtol=1e-4, atol=1e-6)
    for ours, theirs in ((agent.online, other.online), (agent.target, other.target)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=2e-6)
        for name, w in ours.state_dict().items():
            kept = name.endswith(STAY) or (freeze and "backbone" in name)
            assert torch.equal(w, first[name]) == kept, name
    if freeze:
        assert all(w.grad is None for w in agent.online.backbone.parameters())
        assert len(agent.optimizer.state) == len(list(agent.online.head.parameters()))


def test_target_and_action_against_slow_ones():
    """Another head in the target than in the online network: which of them chooses, which rates."""
    agent, replay = make_agent(freeze_backbone=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for w in agent.target.head.parameters():
            w += 0.3 * torch.randn_like(w)
    batch = replay.gather(replay.priorities.nonzero().flatten()[:40])
    images, support = ft.to_images(batch.next_obs), torch.linspace(-10, 10, 5)
    online, target = (network(images).detach().exp() for network in (agent.online, agent.target))
    best = [(probs * support).sum(-1).argmax(1) for probs in (online, target)]
    assert not torch.equal(*best)
    chosen = target[torch.arange(40), best[0]]
    expected = slow_project(chosen, batch.n_step_return, batch.discount, support)
    td_target = agent.td_target(batch, images).double()
    torch.testing.assert_close(td_target, expected, rtol=0, atol=1e-4)
    assert torch.equal(agent.act(batch.next_obs), best[1])


def test_an_encoder_that_is_trained_gets_its_gradient_over_the_root_of_two():
    agent, _ = make_agent(freeze_backbone=False)
    images = torch.rand(2, 4, 84, 84, generator=generator())
    bias = agent.online.backbone.layers[0].down.bias
    (scaled,) = torch.autograd.grad(agent.online(images)[:, :, 0].sum(), bias)
    log_probs = agent.online.head(agent.online.backbone(images))
    (plain,) = torch.autograd.grad(log_probs[:, :, 0].sum(), bias)
    torch.testing.assert_close(scaled, plain / 2**0.5)


@pytest.mark.parametrize("anchor", ["init", "pretrained"])
def test_reset_dagger_by_hand(anchor):
    agent, _ = make_agent(shrink_perturb_alpha=0.6, shrink_perturb_anchor=anchor)
    phi, head = dict(make_backbone().named_parameters()), copy.deepcopy(agent.online.head)
    with torch.no_grad():
        for w in (*agent.online.backbone.parameters(), *agent.target.backbone.parameters()):
            w.add_(1)
    expected = copy.deepcopy(agent.online.backbone.state_dict())
    torch.manual_seed(5)
    agent.reset()
    torch.manual_seed(5)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if anchor == "init":
        phi = dict(ft.Backbone().named_parameters())  # drawn after the head
    for name, w in phi.items():  # and no statistics
        expected[name] = 0.6 * expected[name] + 0.4 * w.detach()
    for network in (agent.online, agent.target):
        torch.testing.assert_close(dict(network.backbone.state_dict()), dict(expected))
        for w, fresh in zip(network.head.parameters(), head.parameters(), strict=True):
            assert torch.equal(w, fresh)


# --- Evaluation and metrics -----------------------------------------------------------------------


def play_one_step(*_):
    """An environment whose games have one step."""
    frames, lives, yes = np.ones((1, 1, 84, 84), np.uint8), np.array([1]), np.array([True])
    step = frames, np.array([2.0]), yes, ~yes, {"lives": lives, "env_id": np.array([0])}
    space = SimpleNamespace(n=3)
    reset = lambda: (frames, {"lives": lives})  # noqa: E731
    return SimpleNamespace(action_space=space, reset=reset, step=lambda *_: step)


@pytest.mark.parametrize("freeze", [True, False])
def test_neither_evaluation_nor_metrics_move_the_encoders_statistics(freeze, monkeypatch):
    """nor turn the noise off: a network.eval() and network.train() around a pass would do both.

    And sharpness is over the mean weights of what is trained.
    """
    agent, replay = make_agent(freeze_backbone=freeze)
    networks, sharpness = (agent.online, agent.target), []
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    monkeypatch.setattr(ft, "make_envs", play_one_step)
    monkeypatch.setattr(ft, "max_eigenvalue", lambda *call: sharpness.append(call) or 7.0)
    metrics = ft.plasticity_metrics(agent, replay, generator())
    assert ft.evaluate(agent.target, agent.args) == [2.0]
    agent.act(replay.last_obs())
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(w, state[name]) for name, w in network.state_dict().items())
        assert not any(module.training for module in network.backbone.modules())
        assert all(module.training for module in network.head.modules())

    units = [name for name in metrics if name.startswith("active_units/backbone.")]
    assert (len(units), metrics["hessian_max_eigenvalue"]) == (18, 7)  # two layers in each block
    ((loss, weights, _),) = sharpness
    batch = ft.Batch(*(entry[:32] for entry in replay.sample_uniform(512, generator())))
    for network in networks:
        network.head.eval()
    td_target = agent.td_target(batch, ft.to_images(batch.next_obs))
    log_probs = agent.online(ft.to_images(batch.obs))
    expected = ft.cross_entropy(log_probs, batch.action, td_target).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = dict(
        agent.online.head.named_parameters() if freeze else agent.online.named_parameters()
    )
    means = [w for name, w in trained.items() if "sigma" not in name]
    assert all(a is b for a, b in zip(weights, means, strict=True))


# --- Pretraining ----------------------------------------------------------------------------------


def test_the_losses_against_slow_ones():
    predictions, one, other = torch.randn(3, 3, 5, 6, generator=generator())
    slow = 0.0
    for p, z in zip(predictions.view(15, 6), one.view(15, 6), strict=True):
        slow += (2 - 2 * float(p @ z) / float(p.norm() * z.norm())) / 15
    assert ft.prediction_loss(predictions, one).item() == pytest.approx(slow, rel=1e-5)
    one, other = (z.view(15, 6) / z.view(15, 6).norm(dim=1, keepdim=True) for z in (one, other))
    # Standard deviations are over 14, the mean of the products over 15.
    correlation = 14 / 15 * np.corrcoef(one.T, other.T)[:6, 6:]
    weights = np.where(np.eye(6), 1, 0.005)
    slow = (weights * (correlation - np.eye(6)) ** 2).sum()
    lengths = torch.rand(15, 1) + 0.5  # normalised away
    loss = ft.barlow_loss((lengths * one).view(3, 5, 6), other.view(3, 5, 6))
    assert loss.item() == pytest.approx(slow, rel=1e-5)


def test_targets_take_no_gradient():
    predictions, projections = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    ft.prediction_loss(predictions, projections).backward()
    assert predictions.grad.any() and projections.grad is None


def test_simtprs_transformer_by_hand():
    """Pre-norm blocks with GELU, eight heads that see no future, and four times the width between;
    before it a projector and after it a predictor."""
    torch.manual_seed(0)
    network = ft.SimTPR(width=32).eval()
    with torch.no_grad():
        for w in network.parameters():  # scales and shifts away from 1 and 0
            w += 0.1 * torch.randn_like(w)
    images = torch.rand(2, 5, 4, 84, 84)
    features = network.backbone(images.flatten(0, 1)).detach()
    network.double()
    w = {name: value.detach() for name, value in network.named_parameters()}
    num, length, width, heads = 2, 4, 32, 8

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def attend(x, name):
        q, k, v = (x @ w[f"{name}.in_proj_weight"].T).split(width, dim=-1)
        out = torch.zeros_like(x)
        for n in range(num):
            for h in range(heads):
                own = slice(h * width // heads, (h + 1) * width // heads)
                for t in range(length):
                    score = k[n, : t + 1, own] @ q[n, t, own] / (width // heads) ** 0.5
                    out[n, t, own] = score.softmax(0) @ v[n, : t + 1, own]
        return linear(out, f"{name}.out_proj")

    projections = linear(linear(features.double(), "projector.0").clamp(min=0), "projector.2")
    projections = projections.view(num, length + 1, width)
    x = projections[:, :-1] + ft.positions(length, width, torch.device("cpu"))
    for block in ("transformer.layers.0", "transformer.layers.1"):
        x = x + attend(norm(x, f"{block}.norm1"), f"{block}.self_attn")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.linear1")
        assert hidden.shape[-1] == 4 * width
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2  # GELU
        x = x + linear(hidden, f"{block}.linear2")
    hidden = linear(x, "predictor.0")  # BatchNorm1d's statistics are 0 and 1
    hidden = hidden / (1 + 1e-5) ** 0.5 * w["predictor.1.weight"] + w["predictor.1.bias"]
    predictions = linear(hidden.clamp(min=0), "predictor.3")
    network.float()
    actual = network(images)
    torch.testing.assert_close(actual[0].double(), projections[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[1].double(), predictions, rtol=1e-4, atol=1e-4)


def test_positions_by_their_formula():
    angles = [[t / 10_000 ** (2 * i / 8) for i in range(4)] for t in range(5)]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    positions = ft.positions(5, 8, torch.device("cpu")).numpy()
    np.testing.assert_allclose(positions, expected, atol=1e-6)


def random_videos(num, length):
    """Frames of videos without an end, and where they end."""
    frames = torch.randint(256, (num, length, 84, 84), dtype=torch.uint8, generator=generator(1))
    return frames, torch.zeros(num, length, dtype=torch.bool)


def stacks_of_two_views(frames, args):
    """As pretraining_loss() sees them with generator(2): [N, T, 4, 84, 84] each."""
    draws = generator(2)
    for _ in range(2):
        view = ft.augment(frames, args.aug_shift, args.aug_intensity, draws)
        yield torch.stack([view[:, t : t + 4] for t in range(frames.shape[1] - 3)], dim=1)


def test_each_view_predicts_the_others_projections():
    torch.manual_seed(0)
    network = ft.SimTPR(width=16, heads=2).eval()
    args = pretrain_args(aug_intensity=2.0)  # by which the views differ
    frames, ends = random_videos(2, 7)
    loss = ft.pretraining_loss(network, frames, ends, args, generator(2))
    stacks = list(stacks_of_two_views(frames, args))
    (one, from_one), (other, from_other) = (network(stack) for stack in stacks)
    features = network.backbone(stacks[0].flatten(0, 1))
    assert torch.allclose(one, network.projector(features).view(2, 4, 16)[:, 1:], atol=1e-6)
    expected = (ft.prediction_loss(from_one, other) + ft.prediction_loss(from_other, one)) / 2
    expected += 0.01 * ft.barlow_loss(one, other)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_both_views_share_the_statistics_of_one_batch():
    """Of which the encoder's keep a hundredth: to six digits, also before a plain background."""
    args = pretrain_args()
    network = ft.make_simtpr(args)[0]
    frames, ends = random_videos(2, 6)
    frames[..., 10:, :] = 87
    stacks = torch.cat([stack.flatten(0, 1) for stack in stacks_of_two_views(frames, args)])
    hidden = network.backbone.layers[0].layers[0](stacks).double().transpose(0, 1).flatten(1)
    ft.pretraining_loss(network, frames, ends, args, generator(2))
    norm = network.backbone.layers[0].layers[1]
    torch.testing.assert_close(norm.running_mean, 0.01 * hidden.mean(1).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var, 0.99 + 0.01 * hidden.var(1).float())
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
    norms = [module for module in network.modules() if isinstance(module, kinds)]
    assert [norm.num_batches_tracked.item() for norm in norms] == 28 * [1]
    assert [norm.momentum for norm in norms] == 27 * [0.01] + [0.1]


def test_before_an_episodes_last_stack_all_is_black():
    """Of sequences of seven frames, thus four stacks: cases by hand."""
    cases = {  # frames that end an episode: the stacks that stay
        (2,): [0, 1, 2, 3],  # in the first stack, but not its newest frame
        (3,): [0, 1, 2, 3],
        (5,): [2, 3],
        (3, 6): [3],
    }
    frames, ends = random_videos(4, 7)
    for number, case in enumerate(cases):
        ends[number, list(case)] = True
    seen = []

    def network(stacks):
        seen.extend((stacks * 255).round())
        return torch.randn(2, len(stacks), 3, 8)

    args = pretrain_args(aug_shift=0, aug_intensity=0.0)
    ft.pretraining_loss(network, frames, ends, args, generator())
    for number, kept in enumerate([*cases.values()] * 2):  # two views
        for t in range(4):
            expected = frames[number % 4, t : t + 4] * (t in kept)
            assert torch.equal(seen[number][t], expected.float()), (number, t)


def test_the_first_weights_are_those_of_simtpr():
    torch.manual_seed(0)
    weights = {n: w for n, w in ft.SimTPR().named_parameters() if not n.startswith("backbone.")}
    for name, w in weights.items():
        if "norm" in name or name.startswith("predictor.1"):
            assert (w == (1 if name.endswith("weight") else 0)).all(), name
        elif w.dim() == 2 and name not in ("projector.0.weight", "predictor.0.weight"):
            assert w.std().item() == pytest.approx(0.02, rel=0.01), name
            assert abs(w.mean().item()) < 1e-4, name
        elif name.startswith("transformer"):
            assert not w.any(), name
        else:  # as PyTorch has them
            bound = (3136 if name == "projector.0.weight" else 512) ** -0.5
            assert 0.99 * bound < w.abs().max().item() <= bound, name
    assert not {"projector.0.bias", "predictor.0.bias"} & set(weights)
    assert not [name for name in weights if name.endswith("in_proj_bias")]
    matrices = [w for w in weights.values() if w.dim() == 2]
    assert len(matrices) == len({w.sum().item() for w in matrices}) == 12  # no two are the same


def test_an_update_of_the_pretraining_clips_and_steps():
    torch.manual_seed(0)
    network, args = ft.SimTPR(width=16, heads=2), pretrain_args(barlow_weight=10.0)
    before = {name: w.detach().clone() for name, w in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for w in network.parameters():
        w.grad = torch.full_like(w, 1e6)  # of an update before, to be forgotten
    ft.pretrain_update(network, optimizer, random_videos(2, 6), args, generator())
    steps = {name: before[name] - w.detach() for name, w in network.named_parameters()}
    step = torch.cat([step.flatten() for step in steps.values()])
    assert step.norm().item() == pytest.approx(0.5, rel=1e-3)
    assert step.std() > 10 * step.mean().abs()  # with 1e6 they would be alike
    moved = {name.split(".")[0] for name, step in steps.items() if step.any()}
    assert moved == {"backbone", "projector", "transformer", "predictor"}


def test_the_optimizer_of_the_pretraining_begins_with_a_state_that_says_nothing():
    """The first step makes it, and must move no weight: weight decay would."""
    network, optimizer, *_ = ft.make_simtpr(pretrain_args(seed=7, pretrain_learning_rate=0.5))
    torch.manual_seed(7)
    fresh = ft.SimTPR().state_dict()
    assert all(torch.equal(w, fresh[name]) for name, w in network.state_dict().items())
    states = optimizer.state.values()
    assert len(states) == len(list(network.parameters()))
    assert not any(value.any() for state in states for value in state.values())
    group = optimizer.param_groups[0]
    settings = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
    assert settings == [0.5, (0.9, 0.95), 1.5e-4, 1e-5]
    defaults = ft.Args(mode="pretrain")
    assert (defaults.pretrain_learning_rate, defaults.pretrain_length) == (3e-4, 11)


# --- Videos ---------------------------------------------------------------------------------------

NAMES = (
    ("$store$_observation_ckpt.4.gz", "$store$_terminal_ckpt.4.gz"),
    ("observation_1_3.gz", "terminal_1_3.gz"),
)


def save_array(path, array):
    with gzip.open(path, "wb", compresslevel=1) as file:
        np.save(file, array)


def write_video(directory, names, num):
    rng = np.random.default_rng(num)
    frames = rng.integers(256, size=(num, 84, 84), dtype=np.uint8)
    terminals = (rng.random(num) < 0.1).astype(np.uint8)
    for name, array in zip(names, (frames, terminals), strict=True):
        save_array(directory / name, array)
    return frames, terminals


def test_videos_are_read_up_to_a_number_of_frames_each(tmp_path):
    (tmp_path / "reward_1_3.gz").write_bytes(b"not read")
    arrays = [write_video(tmp_path, *video) for video in zip(NAMES, (25, 40), strict=True)]
    videos = ft.read_videos(ft.video_files(tmp_path), 30)
    for video, (frames, terminals) in zip(videos, arrays, strict=True):
        assert np.array_equal(video.frames, frames[:30])
        assert np.array_equal(video.terminals, terminals[:30] == 1)


SPOILT = {
    "truncated": (0, lambda path: path.write_bytes(path.read_bytes()[:-1000])),
    "flipped": (1, lambda path: path.write_bytes(path.read_bytes()[:-8] + bytes(8))),
    "missing": (1, lambda path: path.unlink()),
    "float": (0, lambda path: save_array(path, np.zeros((40, 84, 84), np.float32))),
    "another number of frames": (1, lambda path: save_array(path, np.zeros(39, bool))),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, kind):
    write_video(tmp_path, NAMES[1], 40)
    files, (half, spoil) = ft.video_files(tmp_path), SPOILT[kind]
    path = tmp_path / NAMES[1][half]
    spoil(path)
    with pytest.raises(SystemExit, match=rf"^error: {path}: [^\n]+$"):
        ft.read_videos(files, 1000)


def numbered_videos(*lengths):
    """Each frame is one number, its own; an episode ends at each tenth frame."""
    videos, first = [], 0
    for length in lengths:
        numbers = np.arange(first, first + length)
        videos.append(ft.Video(numbers, numbers % 10 == 9))
        first += length
    return videos


def test_a_sequence_begins_at_every_frame_and_leaves_no_video():
    args = pretrain_args()
    starts = ft.every_start(numbered_videos(*3 * [args.video_frames]), args.sequence_frames)
    updates = args.pretrain_epochs * math.ceil(len(starts) / args.pretrain_batch_size)
    assert updates == 234_370  # SimTPR's, of three files
    args, videos = pretrain_args(pretrain_length=3), numbered_videos(20, 4, 30)
    frames, terminals = ft.cut_sequences(videos, ft.every_start(videos, 6), args)
    expected = [range(first, first + 6) for first in (*range(15), *range(24, 49))]
    assert frames.tolist() == [list(each) for each in expected]
    assert torch.equal(terminals, frames % 10 == 9)


def test_each_epoch_has_every_sequence_once_in_an_order_of_its_own():
    """And each call gives the same ones: a continued run goes on in the middle."""
    starts = ft.every_start(numbered_videos(30, 20), 6)  # 25 + 15
    calls = [[*islice(ft.draw_starts(starts, 16, seed), 6)] for seed in (1, 2, 1)]
    epochs = []
    for batches in calls:
        assert [len(batch) for batch in batches] == [16, 16, 8, 16, 16, 8]
        epochs += [np.concatenate(half).tolist() for half in (batches[:3], batches[3:])]
    assert all(sorted(epoch) == starts.tolist() != epoch for epoch in epochs)
    assert epochs[:2] == epochs[4:]
    assert epochs[0] not in epochs[1:4]


# --- Recording ------------------------------------------------------------------------------------


def test_what_is_recorded_is_what_was_played(monkeypatch):
    """Of a game in which each 10th step is the last; its three actions are equally frequent."""
    actions, step = [], Recording.step
    spy = lambda env, action: actions.append(int(action[0])) or step(env, action)  # noqa: E731
    monkeypatch.setattr(Recording, "step", spy)
    monkeypatch.setattr(ft, "make_envs", lambda *_: Recording(lambda: None, 0))
    args = pretrain_args(collect_steps=3_000)
    video, again = ft.record(args), ft.record(args)
    played = np.concatenate([Recording.frames[:10, 0, 0]] * 300)
    assert np.array_equal(video.frames, played)
    assert np.flatnonzero(video.terminals).tolist() == list(range(9, 3_000, 10))
    assert all(map(np.array_equal, video, again)) and actions[:3_000] == actions[3_000:]
    assert np.abs(np.bincount(actions[:3_000], minlength=3) - 1_000).max() < 150


def test_each_seed_of_a_pretraining_has_draws_of_its_own(monkeypatch):
    """Of the game, of the actions and of the augmentation."""
    actions, draws, step = [], set(), Recording.step
    spy = lambda env, action: actions.append(int(action[0])) or step(env, action)  # noqa: E731
    monkeypatch.setattr(Recording, "step", spy)
    monkeypatch.setattr(Recording, "seeds", [])
    monkeypatch.setattr(ft, "make_envs", lambda env_id, n, seed: Recording(lambda: None, seed))
    for seed in (1, 2):
        args = pretrain_args(collect_steps=50, seed=seed)
        ft.record(args)
        _, _, augmentation, _ = ft.make_simtpr(args)
        draws.add(torch.rand((), generator=augmentation).item())
    assert Recording.seeds == [1, 2]
    assert actions[:50] != actions[50:] and len(draws) == 2
