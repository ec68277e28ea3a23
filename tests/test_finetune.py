"""The fine-tuning script's parts by oracles: encoder, Reset†, evaluation, pretraining, videos."""

import copy
import gzip
import math
from itertools import islice

import numpy as np
import pytest
import torch

import plastic_drq_rainbow_atari as atari
import plastic_pretrained_finetune as ft

SMALL = dict(batch_size=4, hidden_dim=8, n_atoms=5, buffer_size=300, learning_starts=20)
SMALL |= dict(device="cpu", total_timesteps=60, eval_episodes=1)


def make_args(**flags):
    return ft.Args(**SMALL | dict(from_scratch=True) | flags)


def pretrain_args(**flags):
    return ft.Args(**SMALL | dict(mode="pretrain") | flags)


def make_backbone(seed=0):
    """An encoder whose BatchNorm has statistics and scales of its own."""
    torch.manual_seed(seed)
    backbone = ft.Backbone()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)  # 0: all eight may be below zero
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone


def make_agent(**flags):
    args = make_args(**flags)
    backbone = make_backbone()
    torch.manual_seed(1)
    return ft.Agent(backbone, 3, 100, args, torch.Generator().manual_seed(0))


def make_replay(args):
    replay = ft.ReplayBuffer(args.buffer_size, args.n_step, args.gamma, torch.device("cpu"))
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(101, 84, 84), dtype=np.uint8)
    replay.start(frames[0])
    for frame in frames[1:]:
        action, reward, done = rng.integers(3), rng.integers(-1, 2), rng.random() < 0.05
        replay.add(int(action), float(reward), bool(done), frame)
    return replay


# --- Encoder --------------------------------------------------------------------------------------


def published_layout():
    """{key: shape} as the spec has it: nine blocks of three convolutions and BatchNorms.

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
    return layout


def layout_of(backbone):
    return {f"backbone.{name}": tuple(w.shape) for name, w in backbone.state_dict().items()}


def test_the_encoder_has_30_convolutions_and_the_published_layout():
    backbone = ft.Backbone()
    assert sum(isinstance(module, torch.nn.Conv2d) for module in backbone.modules()) == 30
    assert layout_of(backbone) == published_layout()
    assert backbone(torch.zeros(2, 4, 84, 84)).shape == (2, 3136)


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


def save_encoder(path, backbone, change=lambda state: None):
    state = {f"backbone.{name}": w for name, w in backbone.state_dict().items()}
    state["head.weight"] = torch.zeros(3)
    change(state)
    torch.save({"model_state_dict": state}, path)
    return str(path)


def test_published_weights_are_loaded_as_they_are(tmp_path):
    backbone = make_backbone()
    loaded = ft.load_pretrained(save_encoder(tmp_path / "a.pth", backbone))
    x = torch.rand(2, 4, 84, 84)
    assert torch.equal(loaded.eval()(x), backbone.eval()(x))


def remove_rename_and_reshape(state):
    del state["backbone.layers.2.layers.3.weight"]
    state["backbone.layers.9.down.bias"] = torch.zeros(3)
    state["backbone.layers.0.down.weight"] = torch.zeros(32, 4, 2, 2)


def test_all_that_is_wrong_with_an_encoder_is_said_in_one_line(tmp_path):
    path = save_encoder(tmp_path / "keys.pth", ft.Backbone(), remove_rename_and_reshape)
    with pytest.raises(
        SystemExit, match=r"keys.pth: not an encoder in SimTPR's layout"
    ) as exit_info:
        ft.load_pretrained(path)
    error = exit_info.value.code
    assert error.count("\n") == 0
    for word in ("layers.2.layers.3.weight", "layers.9.down.bias", "[32, 4, 2, 2]"):
        assert word in error


# --- Freezing, update, Reset† ---------------------------------------------------------------------


@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_a_frozen_encoder_has_no_gradient_no_optimizer_state_and_never_changes(sam_rho):
    agent = make_agent(sam_rho=sam_rho)
    replay = make_replay(agent.args)
    before = copy.deepcopy(agent.online.backbone.state_dict())
    head = copy.deepcopy(agent.online.head.state_dict())
    for _ in range(3):
        agent.update(replay)
    for network in (agent.online, agent.target):
        for name, w in network.backbone.state_dict().items():
            assert torch.equal(w, before[name])
    assert all(w.grad is None for w in agent.online.backbone.parameters())
    assert len(agent.optimizer.state) == len(list(agent.online.head.parameters()))
    after = agent.online.head.state_dict()
    assert any(not torch.equal(w, head[name]) for name, w in after.items())


@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_features_once_per_update_are_the_same_as_the_encoder_in_each_pass(sam_rho):
    weights = []
    for freeze in (True, False):
        agent = make_agent(sam_rho=sam_rho)
        # After the optimizer is made: the encoder's weights are frozen in both cases.
        agent.args = make_args(sam_rho=sam_rho, freeze_backbone=freeze)
        replay = make_replay(agent.args)
        for _ in range(3):
            agent.update(replay)
        weights.append([*agent.online.head.state_dict().values(), replay.priorities])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_encoder_that_is_not_frozen_is_trained_but_keeps_its_statistics():
    agent = make_agent(freeze_backbone=False, learning_rate=0.1)
    replay = make_replay(agent.args)
    before = copy.deepcopy(agent.online.backbone.state_dict())
    agent.update(replay)
    for name, w in agent.online.backbone.state_dict().items():
        assert torch.equal(w, before[name]) == ("running" in name or "num_batches" in name), name


def test_an_encoder_that_is_trained_gets_its_gradient_over_the_root_of_two():
    agent = make_agent(freeze_backbone=False)
    images = torch.rand(2, 4, 84, 84, generator=torch.Generator().manual_seed(0))
    bias = agent.online.backbone.layers[0].down.bias
    (scaled,) = torch.autograd.grad(agent.online(images)[:, :, 0].sum(), bias)
    head = agent.online.head(agent.online.backbone(images))
    (plain,) = torch.autograd.grad(head[:, :, 0].sum(), bias)
    torch.testing.assert_close(scaled, plain / 2**0.5)


@pytest.mark.parametrize("anchor", ["init", "pretrained"])
def test_reset_dagger_by_hand(anchor):
    agent = make_agent(reset_interval=10, shrink_perturb_alpha=0.6, shrink_perturb_anchor=anchor)
    first = [w.detach().clone() for w in agent.online.backbone.parameters()]
    with torch.no_grad():
        for w in (*agent.online.backbone.parameters(), *agent.target.backbone.parameters()):
            w.add_(1)
    before = [w.detach().clone() for w in agent.online.backbone.parameters()]
    statistics = statistics_of(agent.online)
    head = agent.online.head.value.hidden.weight_mu.clone()
    torch.manual_seed(5)
    agent.reset()
    phi = first
    if anchor == "init":  # drawn after the head
        torch.manual_seed(5)
        for module in copy.deepcopy(agent.online.head).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        phi = [w.detach() for w in ft.Backbone().parameters()]
    for network in (agent.online, agent.target):
        for w, old, towards in zip(network.backbone.parameters(), before, phi, strict=True):
            torch.testing.assert_close(w, 0.6 * old + 0.4 * towards)
    after = statistics_of(agent.online)
    assert all(torch.equal(after[name], value) for name, value in statistics.items())
    assert not torch.equal(head, agent.online.head.value.hidden.weight_mu)


# --- Evaluation and metrics -----------------------------------------------------------------------


def statistics_of(network):
    """What BatchNorm remembers: 27 means, variances and counts."""
    words = ("running_mean", "running_var", "num_batches_tracked")
    items = network.backbone.state_dict().items()
    return {name: value.clone() for name, value in items if name.endswith(words)}


@pytest.mark.parametrize("freeze", [True, False])
def test_neither_evaluation_nor_metrics_move_the_encoders_statistics(freeze):
    """nor turn the noise off: a network.eval() and network.train() around a pass would do both."""
    agent = make_agent(freeze_backbone=freeze, env_id="Pong")
    replay = make_replay(agent.args)
    network = ft.QNetwork(make_backbone(), 6, agent.args)  # Pong has six actions
    measured = (agent.online, agent.target, network)
    before = [statistics_of(each) for each in measured]
    assert [len(statistics) for statistics in before] == [81, 81, 81]
    ft.plasticity_metrics(agent, replay, torch.Generator().manual_seed(0))
    ft.evaluate(network, agent.args)
    agent.update(replay)
    agent.act(replay.last_obs())
    for each, statistics in zip(measured, before, strict=True):
        for name, value in statistics_of(each).items():
            assert torch.equal(value, statistics[name]), name
        assert not each.backbone.training and each.head.training
        assert not any(module.training for module in each.backbone.modules())


def test_sharpness_is_over_what_is_trained():
    """With a frozen encoder, the largest eigenvalue is of the head's mean weights alone."""
    agent = make_agent()
    replay = make_replay(agent.args)
    metrics = ft.plasticity_metrics(agent, replay, torch.Generator().manual_seed(0))
    units = {name for name in metrics if name.startswith("active_units/backbone.")}
    assert len(units) == 18  # two activations in each block
    generator = torch.Generator().manual_seed(0)
    batch = ft.Batch(*(entry[:32] for entry in replay.sample_uniform(512, generator)))
    head = agent.online.head.eval()
    agent.target.head.eval()
    td_target = agent.td_target(batch, ft.to_images(batch.next_obs))
    log_probs = head(agent.online.backbone(ft.to_images(batch.obs)))
    loss = ft.cross_entropy(log_probs, batch.action, td_target).mean()
    means = [w for name, w in head.named_parameters() if name.endswith("_mu")]
    expected = ft.max_eigenvalue(loss, means, generator)
    assert metrics["hessian_max_eigenvalue"] == pytest.approx(expected, rel=1e-6)


# --- Pretraining ----------------------------------------------------------------------------------


def test_the_losses_against_slow_ones():
    generator = torch.Generator().manual_seed(0)
    predictions, one, other = torch.randn(3, 3, 5, 6, generator=generator)
    slow = 0.0
    for p, z in zip(predictions.view(15, 6), one.view(15, 6), strict=True):
        slow += (2 - 2 * float(p @ z) / float(p.norm() * z.norm())) / 15
    assert ft.prediction_loss(predictions, one).item() == pytest.approx(slow, rel=1e-5)
    one, other = (z.view(15, 6) / z.view(15, 6).norm(dim=1, keepdim=True) for z in (one, other))
    # Standard deviations are over 14, the mean of the products over 15.
    correlation = 14 / 15 * np.corrcoef(one.T, other.T)[:6, 6:]
    weights = np.where(np.eye(6), 1, 0.005)
    slow = (weights * (correlation - np.eye(6)) ** 2).sum()
    lengths = torch.rand(15, 1, generator=generator) + 0.5  # normalised away
    loss = ft.barlow_loss((lengths * one).view(3, 5, 6), other.view(3, 5, 6))
    assert loss.item() == pytest.approx(slow, rel=1e-5)


def test_targets_take_no_gradient():
    predictions = torch.randn(2, 3, 4, requires_grad=True)
    projections = torch.randn(2, 3, 4, requires_grad=True)
    ft.prediction_loss(predictions, projections).backward()
    assert predictions.grad.any() and projections.grad is None


def test_the_future_changes_no_prediction_before_it_and_the_past_does():
    torch.manual_seed(0)
    network = ft.SimTPR(width=32).eval()
    images = torch.rand(2, 6, 4, 84, 84)
    with torch.no_grad():
        _, before = network(images)
        images[:, 3] = torch.rand(2, 4, 84, 84)
        _, after = network(images)
    same = [torch.allclose(before[:, t], after[:, t], atol=1e-6) for t in range(5)]
    assert same == [True, True, True, False, False]


def test_positions_by_their_formula():
    angles = [[t / 10_000 ** (2 * i / 8) for i in range(4)] for t in range(5)]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    positions = ft.positions(5, 8, torch.device("cpu")).numpy()
    np.testing.assert_allclose(positions, expected, atol=1e-6)


def random_videos(num, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (num, length, 84, 84), dtype=torch.uint8, generator=generator)


def no_ends(frames):
    return torch.zeros(frames.shape[:2], dtype=torch.bool)


def test_each_view_predicts_the_others_projections():
    torch.manual_seed(0)
    network, args = ft.SimTPR(width=16, heads=2).eval(), pretrain_args()
    frames = random_videos(2, 7)
    generator = torch.Generator().manual_seed(2)
    loss = ft.pretraining_loss(network, frames, no_ends(frames), args, generator)
    generator = torch.Generator().manual_seed(2)
    views = [ft.augment(frames, args.aug_shift, args.aug_intensity, generator) for _ in range(2)]
    stacks = [torch.stack([view[:, t : t + 4] for t in range(4)], dim=1) for view in views]
    (one, from_one), (other, from_other) = (network(stack) for stack in stacks)
    features = network.backbone(stacks[0].flatten(0, 1))
    assert torch.allclose(one, network.projector(features).view(2, 4, 16)[:, 1:], atol=1e-6)

    def distance(prediction, projection):
        pairs = zip(prediction.reshape(-1, 16), projection.reshape(-1, 16), strict=True)
        return torch.stack([(p / p.norm() - z / z.norm()).square().sum() for p, z in pairs]).mean()

    expected = (distance(from_one, other) + distance(from_other, one)) / 2
    expected += 0.01 * ft.barlow_loss(one, other)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(distance(from_one, one) - distance(from_one, other)) > 1e-3


def test_both_views_share_the_statistics_of_one_batch():
    """Of which the encoder's keep a hundredth: to six digits, also before a plain background."""
    args = pretrain_args()
    network = ft.make_simtpr(args)[0]
    frames = random_videos(2, 6)
    frames[..., 10:, :] = 87
    generator = torch.Generator().manual_seed(2)
    views = [ft.augment(frames, args.aug_shift, args.aug_intensity, generator) for _ in range(2)]
    stacks = torch.cat([view[:, t : t + 4] for view in views for t in range(3)])
    hidden = network.backbone.layers[0].layers[0](stacks).double().transpose(0, 1).flatten(1)
    generator = torch.Generator().manual_seed(2)
    ft.pretraining_loss(network, frames, no_ends(frames), args, generator)
    norm = network.backbone.layers[0].layers[1]
    torch.testing.assert_close(norm.running_mean, 0.01 * hidden.mean(1).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var, 0.99 + 0.01 * hidden.var(1).float())
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
    norms = [module for module in network.modules() if isinstance(module, kinds)]
    assert [norm.num_batches_tracked.item() for norm in norms] == 28 * [1]
    assert {norm.momentum for norm in norms[:-1]} == {0.01} and norms[-1].momentum == 0.1


class Eye(torch.nn.Module):
    """Remembers the stacks that it is shown."""

    def forward(self, images):
        self.seen = (images * 255).round().long()
        return torch.randn(2, len(images), images.shape[1] - 1, 8)


def test_before_an_episodes_last_stack_all_is_black():
    """Of sequences of seven frames, thus four stacks: five cases by hand."""
    cases = {  # frames that end an episode: the stacks that stay
        (): [0, 1, 2, 3],
        (2,): [0, 1, 2, 3],  # in the first stack, but not its newest frame
        (3,): [0, 1, 2, 3],
        (5,): [2, 3],
        (3, 6): [3],
    }
    frames, ends = random_videos(5, 7).clamp(min=1), torch.zeros(5, 7, dtype=torch.bool)
    for number, case in enumerate(cases):
        ends[number, list(case)] = True
    eye, args = Eye(), pretrain_args(aug_shift=0, aug_intensity=0.0)
    ft.pretraining_loss(eye, frames, ends, args, torch.Generator().manual_seed(0))
    for number, kept in enumerate([*cases.values()] * 2):  # two views
        for t in range(4):
            expected = frames[number % 5, t : t + 4] if t in kept else torch.zeros(4, 84, 84)
            assert torch.equal(eye.seen[number, t], expected.long()), (number, t)


def test_the_first_weights_are_those_of_simtpr():
    torch.manual_seed(0)
    weights = dict(ft.SimTPR().named_parameters())
    for name, w in weights.items():
        part, last = name.split(".")[0], name.endswith(("1.2.weight", "r.2.weight", "r.3.weight"))
        if part == "backbone":
            continue
        if "norm" in name or name.startswith("predictor.1"):
            assert (w == (1 if name.endswith("weight") else 0)).all(), name
        elif w.dim() == 2 and (part == "transformer" or last):
            assert w.std().item() == pytest.approx(0.02, rel=0.01), name
            assert abs(w.mean().item()) < 1e-4, name
        elif part == "transformer":
            assert not w.any(), name
        else:  # as PyTorch has them
            bound = (3136 if name == "projector.0.weight" else 512) ** -0.5
            assert 0.99 * bound < w.abs().max().item() <= bound, name
    unbiased = ["projector.0", "predictor.0"]
    assert not {f"{name}.bias" for name in unbiased} & set(weights)
    assert not [name for name in weights if name.endswith("in_proj_bias")]
    matrices = [w for w in weights.values() if w.dim() == 2]
    same = [a.shape == b.shape and torch.equal(a, b) for a in matrices for b in matrices]
    assert sum(same) == len(matrices) == 12  # each only itself


def test_an_update_of_the_pretraining_clips_and_steps():
    torch.manual_seed(0)
    network, args = ft.SimTPR(width=16, heads=2), pretrain_args(barlow_weight=10.0)
    before = [w.detach().clone() for w in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for w in network.parameters():
        w.grad = torch.full_like(w, 1e6)  # of an update before, to be forgotten
    generator, frames = torch.Generator().manual_seed(2), random_videos(2, 6)
    ft.pretrain_update(network, optimizer, (frames, no_ends(frames)), args, generator)
    pairs = zip(before, network.parameters(), strict=True)
    step = torch.cat([(old - w.detach()).flatten() for old, w in pairs])
    assert step.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_the_pretraining_loss_is_symmetric_and_learns():
    torch.manual_seed(0)
    args = pretrain_args(aug_shift=0, aug_intensity=0.0, barlow_weight=0.5)
    network, frames = ft.SimTPR(width=32), random_videos(3, 7)
    ends, generator = no_ends(frames), torch.Generator().manual_seed(0)
    stacks = torch.stack([frames[:, t : t + 4] for t in range(4)], dim=1) / 255
    projections, predictions = network(stacks)
    expected = ft.prediction_loss(predictions, projections)
    expected += 0.5 * ft.barlow_loss(projections, projections)
    loss = ft.pretraining_loss(network, frames, ends, args, generator)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = ft.pretraining_loss(network, frames, ends, args, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_optimizer_of_the_pretraining_begins_with_a_state_that_says_nothing():
    """The first step makes it, and must move no weight: weight decay would."""
    args = pretrain_args(seed=7, pretrain_learning_rate=0.5)
    network, optimizer, _, tensors = ft.make_simtpr(args)
    torch.manual_seed(7)
    fresh = ft.SimTPR().state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, fresh[name]), name
        assert tensors[name].data_ptr() == value.data_ptr()
    moments = [value for name, value in tensors.items() if name.startswith("adam.")]
    assert len(moments) == 3 * len(list(network.parameters()))
    assert not any(value.any() for value in moments)
    assert optimizer.param_groups[0]["lr"] == 0.5


# --- Videos ---------------------------------------------------------------------------------------

NAMES = (
    ("observation_1_3.gz", "terminal_1_3.gz"),
    ("$store$_observation_ckpt.4.gz", "$store$_terminal_ckpt.4.gz"),
)


def save_array(path, array):
    with gzip.open(path, "wb", compresslevel=1) as file:
        np.save(file, array)


def write_video(directory, names, num, seed=0):
    rng = np.random.default_rng(seed)
    frames = rng.integers(256, size=(num, 84, 84), dtype=np.uint8)
    terminals = (rng.random(num) < 0.1).astype(np.uint8)
    for name, array in zip(names, (frames, terminals), strict=True):
        save_array(directory / name, array)
    return frames, terminals


@pytest.mark.parametrize("num_frames", [30, 1000])
def test_videos_are_read_up_to_a_number_of_frames_each(tmp_path, num_frames):
    (tmp_path / "reward_1_3.gz").write_bytes(b"not read")
    arrays = [
        write_video(tmp_path, names, num, seed=num)
        for names, num in zip(reversed(NAMES), (25, 40), strict=True)
    ]
    videos = ft.read_videos(ft.video_files(tmp_path), num_frames)
    for video, (frames, terminals) in zip(videos, arrays, strict=True):
        assert np.array_equal(video.frames, frames[:num_frames])
        assert np.array_equal(video.terminals, terminals[:num_frames] == 1)


SPOILT = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-8] + bytes(8)),
    "no gzip": lambda path: path.write_bytes(b"plain"),
    "no array": lambda path: path.write_bytes(gzip.compress(b"plain")),
    "missing": lambda path: path.unlink(),
    "float": lambda path: save_array(path, np.zeros((40, 84, 84), np.float32)),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("half", [0, 1])
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, kind, half):
    write_video(tmp_path, NAMES[0], 4000 if half else 40)
    files = ft.video_files(tmp_path)
    path = tmp_path / NAMES[0][half]
    if kind == "truncated" and half:
        path.write_bytes(path.read_bytes()[:-20])
    else:
        SPOILT[kind](path)
    with pytest.raises(SystemExit, match=f"^error: {path}: ") as exit_info:
        ft.read_videos(files, 1000)
    assert exit_info.value.code.count("\n") == 0


def test_halves_that_do_not_belong_together(tmp_path):
    write_video(tmp_path, NAMES[0], 40)
    save_array(tmp_path / "terminal_1_3.gz", np.zeros(39, bool))
    with pytest.raises(SystemExit, match=r"terminal_1_3.gz: has shape \(39,\), its observations"):
        ft.read_videos(ft.video_files(tmp_path), 1000)


def numbered_videos(*lengths):
    """Each frame is one number, its own; an episode ends at each tenth frame."""
    videos, first = [], 0
    for length in lengths:
        numbers = np.arange(first, first + length)
        videos.append(ft.Video(numbers, numbers % 10 == 9))
        first += length
    return videos


def test_a_sequence_begins_at_every_frame_and_leaves_no_video():
    assert len(ft.every_start(numbered_videos(20_000), 14)) == 19_987
    args = pretrain_args()
    starts = ft.every_start(numbered_videos(*3 * [args.video_frames]), args.video_length)
    updates = args.pretrain_epochs * math.ceil(len(starts) / args.pretrain_batch_size)
    assert updates == 234_370  # SimTPR's, of three files
    args = pretrain_args(pretrain_length=3)
    videos = numbered_videos(20, 4, 30)
    frames, terminals = ft.cut_sequences(videos, ft.every_start(videos, 6), args)
    expected = [range(first, first + 6) for first in (*range(15), *range(24, 49))]
    assert frames.tolist() == [list(each) for each in expected]
    assert torch.equal(terminals, frames % 10 == 9)


def test_each_epoch_has_every_sequence_once_in_an_order_of_its_own():
    """And each call gives the same ones: a continued run goes on in the middle."""
    starts = ft.every_start(numbered_videos(30, 20), 6)  # 25 + 15
    calls = [[*islice(ft.draw_starts(starts, 16, seed), 6)] for seed in (1, 2, 1)]
    for batches in calls:
        assert [len(batch) for batch in batches] == [16, 16, 8, 16, 16, 8]
    epochs = [np.concatenate(calls[0][:3]), np.concatenate(calls[0][3:]), np.concatenate(calls[1])]
    for epoch in epochs[:2]:
        assert sorted(epoch.tolist()) == starts.tolist() != epoch.tolist()
    assert not np.array_equal(*epochs[:2]) and not np.array_equal(epochs[0], epochs[2][:40])
    assert all(np.array_equal(a, b) for a, b in zip(calls[0], calls[2], strict=True))


# --- Recording ------------------------------------------------------------------------------------


def player_file(path, env_id="Pong", **flags):
    """A model of six actions as the Atari script saves it, and its network."""
    args = atari.Args(env_id=env_id, device="cpu", hidden_dim=8, n_atoms=5, **flags)
    torch.manual_seed(0)
    network = atari.QNetwork(6, args)
    network.sample_noise(torch.Generator().manual_seed(0))
    model = {"args": atari.asdict(args), "num_actions": 6, "target": network.state_dict()}
    torch.save(model, path)
    return network


PLAYERS = [{}, dict(crelu=False, layer_norm=False), dict(layer_norm_scope="all")]
PLAYERS += [dict(crelu_scope="all")]


@pytest.mark.parametrize("flags", PLAYERS, ids=str)
def test_a_player_plays_as_the_atari_scripts_network(tmp_path, flags):
    network = player_file(tmp_path / "model.pth", **flags).eval()  # without noise
    player = ft.load_player(str(tmp_path / "model.pth"), "Pong")
    images = torch.rand(5, 4, 84, 84, generator=torch.Generator().manual_seed(1))
    assert torch.equal(player(images), network(images))


@pytest.mark.parametrize("kind, words", [("another game", "plays Alien"), ("text", "not a model")])
def test_a_player_that_cannot_play(tmp_path, kind, words):
    path = tmp_path / "model.pth"
    if kind == "text":
        path.write_text("weights")
    else:
        player_file(path, "Alien")
    with pytest.raises(SystemExit, match=f"^error: {path}: {words}"):
        ft.load_player(str(path), "Pong")


class Games:
    """Games of seven steps, the last of three lives lost at the fifth; each frame is one number."""

    action_space = type("Space", (), {"n": 6})()

    def __init__(self):
        self.games = []

    def reset(self):
        self.games.append(0)
        return np.full((1, 1, 84, 84), 10 * len(self.games), np.uint8), {"lives": [3]}

    def step(self, action):
        self.games[-1] += 1
        step = self.games[-1]
        frame = np.full((1, 1, 84, 84), 10 * len(self.games) + step, np.uint8)
        return frame, None, [step == 7], [False], {"lives": [3 - (step >= 5)]}


class Player:
    """Sees stacks."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append((images[0, :, 0, 0] * 255).round().int().tolist())
        return torch.zeros(1, 6, 5)

    def q_values(self, log_probs):
        return torch.zeros(1, 6)


def test_what_is_recorded_is_what_was_played(tmp_path, monkeypatch):
    """Frames in order, the last of a game marked, then the next one's first; stacks as they should.

    And the same once more, at another time, gives the same bytes.
    """
    clock = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr(gzip.time, "time", lambda: next(clock))
    monkeypatch.setattr(ft, "make_envs", lambda *args: Games())
    args = pretrain_args(collect_steps=30, pretrain_batch_size=2, pretrain_length=3)
    contents = []
    for _ in range(2):
        player = Player()
        ft.record(tmp_path, player, args)
        contents.append([(tmp_path / name).read_bytes() for name in ft.RECORDED])
    ((frames, terminals),) = ft.read_videos(ft.video_files(tmp_path), 100)
    assert frames[:, 0, 0].tolist() == [10 * (1 + i // 7) + i % 7 for i in range(30)]
    assert np.flatnonzero(terminals).tolist() == [6, 13, 20, 27]
    assert all((frame == frame[0, 0]).all() for frame in frames)
    first = [[0, 0, 0, 10], [0, 0, 10, 11], [0, 10, 11, 12], [10, 11, 12, 13]]
    assert player.seen[:4] == first
    assert [0, 0, 0, 20] in player.seen and [0, 0, 0, 15] in player.seen  # a new game, a lost life
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ft.RECORDED)
    assert contents[0] == contents[1]
    for name in ft.RECORDED:  # as other programs read it
        with gzip.open(tmp_path / name) as file:
            assert np.load(file).shape[0] == 30


def test_halves_of_two_recordings_never_meet(tmp_path, monkeypatch):
    """A recording that is cut off before its second half leaves none, or the one before."""
    monkeypatch.setattr(ft, "make_envs", lambda *args: Games())
    args = pretrain_args(collect_steps=30, pretrain_batch_size=2, pretrain_length=3)
    ft.record(tmp_path, None, args)
    before = [(tmp_path / name).read_bytes() for name in ft.RECORDED]
    monkeypatch.setattr(Games, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ft.record(tmp_path, None, args)
    assert [(tmp_path / name).read_bytes() for name in ft.RECORDED] == before
    monkeypatch.undo()
    monkeypatch.setattr(ft, "make_envs", lambda *args: Games())
    monkeypatch.setattr(ft.np, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ft.record(tmp_path, None, args)
    assert not (tmp_path / ft.RECORDED[1]).exists()
