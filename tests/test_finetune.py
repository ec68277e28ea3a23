"""The pretrained encoder: its layout, loading, freezing, Reset†, its pretraining and videos, short real runs."""

import contextlib
import copy
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import plastic_drq_rainbow_atari as atari
import plastic_pretrained_finetune as ft

SCRIPT = Path(__file__).parent.parent / "plastic_pretrained_finetune.py"
SMALL = dict(
    batch_size=4, hidden_dim=8, n_atoms=5, buffer_size=300, learning_starts=20, total_timesteps=60
)
SMALL |= dict(device="cpu", from_scratch=True, eval_episodes=1)


def make_args(**flags):
    return ft.resolve(ft.Args(**SMALL | flags))


def make_backbone(seed=0):
    """An encoder whose BatchNorm has statistics and scales of its own."""
    torch.manual_seed(seed)
    backbone = ft.Backbone()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(
                module.running_mean, std=0.1
            )  # else all of eight channels may be below zero
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
        replay.add(
            int(rng.integers(3)), float(rng.integers(-1, 2)), bool(rng.random() < 0.05), frame
        )
    return replay


# --- Encoder ----------------------------------------------------------------------------------------------------------


def published_layout():
    """{key: shape} as the spec has it: nine blocks of three convolutions and BatchNorms, three strided ones beside."""
    layout = {}
    for block in range(9):
        group, first = block // 3, block % 3 == 0
        outputs = (32, 64, 64)[group]
        inputs = (4, 32, 64)[group] if first else outputs
        hidden = 2 * inputs
        prefix = f"backbone.layers.{block}."
        if first:
            stride = (3, 2, 2)[group]
            layout[prefix + "down.weight"], layout[prefix + "down.bias"] = (
                (outputs, inputs, stride, stride),
                (outputs,),
            )
        shapes = {0: (hidden, inputs, 1, 1), 3: (hidden, 1, 3, 3), 6: (outputs, hidden, 1, 1)}
        for i, shape in shapes.items():
            layout[f"{prefix}layers.{i}.weight"], layout[f"{prefix}layers.{i}.bias"] = (
                shape,
                shape[:1],
            )
            for name in ("weight", "bias", "running_mean", "running_var"):
                layout[f"{prefix}layers.{i + 1}.{name}"] = shape[:1]
            layout[f"{prefix}layers.{i + 1}.num_batches_tracked"] = ()
    return layout


def test_the_encoder_has_30_convolutions_and_the_published_layout():
    backbone = ft.Backbone()
    assert sum(isinstance(module, torch.nn.Conv2d) for module in backbone.modules()) == 30
    assert {
        f"backbone.{name}": tuple(w.shape) for name, w in backbone.state_dict().items()
    } == published_layout()
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


# --- Loading ----------------------------------------------------------------------------------------------------------


def saved(path, backbone, change=lambda state: None):
    state = {f"backbone.{name}": w for name, w in backbone.state_dict().items()} | {
        "head.weight": torch.zeros(3)
    }
    change(state)
    torch.save({"model_state_dict": state}, path)
    return path


def test_published_weights_are_loaded_as_they_are(tmp_path):
    backbone, other = make_backbone(), ft.Backbone()
    other.load_state_dict(ft.load_pretrained(saved(tmp_path / "a.pth", backbone)))
    x = torch.rand(2, 4, 84, 84)
    assert torch.equal(other.eval()(x), backbone.eval()(x))


def remove_and_rename(state):
    del state["backbone.layers.2.layers.3.weight"]
    state["backbone.layers.9.down.bias"] = torch.zeros(3)
    state["backbone.layers.0.down.weight"] = torch.zeros(32, 4, 2, 2)


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path, capsys):
    files = {
        saved(tmp_path / "keys.pth", ft.Backbone(), remove_and_rename): (
            "missing layers.2.layers.3.weight", "extra 'layers.9.down.bias'", "(32, 4, 2, 2), not (32, 4, 3, 3)",
        ),
        saved(tmp_path / "nan.pth", ft.Backbone(), lambda s: s["backbone.layers.0.down.bias"].fill_(torch.nan)): (
            "not finite",
        ),
        saved(tmp_path / "variance.pth", ft.Backbone(), lambda s: s["backbone.layers.0.layers.1.running_var"].neg_()): (
            "features are not finite",
        ),
        saved(tmp_path / "double.pth", ft.Backbone(), lambda s: s.update(
            {"backbone.layers.0.down.bias": torch.full((32,), 1e300, dtype=torch.float64)})): ("not finite",),
        saved(tmp_path / "int.pth", ft.Backbone(), lambda s: s.update(
            {"backbone.layers.0.down.bias": torch.zeros(32, dtype=torch.int32)})): ("layers.0.down.bias is int32",),
        tmp_path / "none.pth": ("No such file",),
    }  # fmt: skip
    (tmp_path / "text.pth").write_text("weights")
    torch.save([1], tmp_path / "list.pth")
    data = bytearray(saved(tmp_path / "flipped.pth", ft.Backbone()).read_bytes())
    data[100_000:100_400] = bytes(400)
    (tmp_path / "flipped.pth").write_bytes(data)
    files |= {
        tmp_path / f"{name}.pth": ("not a file of weights",) for name in ("text", "list", "flipped")
    }
    for path, words in files.items():
        with pytest.raises(SystemExit) as exit_info:
            ft.load_pretrained(path)
        error = capsys.readouterr().err
        assert exit_info.value.code == 1 and error.count("\n") == 1
        assert all(word in error for word in words), error


# --- Freezing, update, Reset† -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_a_frozen_encoder_has_no_gradient_no_optimizer_state_and_never_changes(sam_rho):
    agent = make_agent(sam_rho=sam_rho)
    replay = make_replay(agent.args)
    before = copy.deepcopy(agent.online.backbone.state_dict())
    head = copy.deepcopy(agent.online.head.state_dict())
    for _ in range(3):
        agent.update(replay)
    for network in (agent.online, agent.target):
        assert all(
            torch.equal(w, before[name]) for name, w in network.backbone.state_dict().items()
        )
    assert all(w.grad is None for w in agent.online.backbone.parameters())
    assert len(agent.optimizer.state) == len(list(agent.online.head.parameters()))
    assert any(not torch.equal(w, head[name]) for name, w in agent.online.head.state_dict().items())


@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_features_once_per_update_are_the_same_as_the_encoder_in_each_pass(sam_rho):
    weights = []
    for freeze in (True, False):
        agent = make_agent(sam_rho=sam_rho)
        agent.args = ft.replace(agent.args, freeze_backbone=freeze)  # after the optimizer is made
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
    statistics = [
        w.clone() for name, w in agent.online.backbone.state_dict().items() if "running" in name
    ]
    head = agent.online.head.value.hidden.weight_mu.clone()
    torch.manual_seed(5)
    agent.reset()
    if anchor == "init":
        torch.manual_seed(5)
        copy.deepcopy(agent.online.head).apply(
            lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else 0
        )
        phi = [w.detach() for w in ft.Backbone().parameters()]
    else:
        phi = first
    for network in (agent.online, agent.target):
        for w, old, towards in zip(network.backbone.parameters(), before, phi, strict=True):
            torch.testing.assert_close(w, 0.6 * old + 0.4 * towards)
    after = [w for name, w in agent.online.backbone.state_dict().items() if "running" in name]
    assert all(torch.equal(a, b) for a, b in zip(statistics, after, strict=True))
    assert not torch.equal(head, agent.online.head.value.hidden.weight_mu)


# --- Pretraining ------------------------------------------------------------------------------------------------------


def test_the_losses_against_slow_ones():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(3, 4, 6, generator=generator)
    one, other = torch.randn(2, 3, 5, 6, generator=generator)
    slow = 0.0
    for n in range(3):
        for t in range(4):
            p, z = predictions[n, t], one[n, t + 1]
            slow += (2 - 2 * float(p @ z) / float(p.norm() * z.norm())) / 12
    assert ft.prediction_loss(predictions, one).item() == pytest.approx(slow, rel=1e-5)
    columns = []
    for z in (one, other):
        rows = np.array([row / np.linalg.norm(row) for row in z.reshape(15, 6).numpy()])
        columns.append((rows - rows.mean(0)) / rows.std(0))
    slow = 0.0
    for i in range(6):
        for j in range(6):
            correlation = sum(columns[0][b, i] * columns[1][b, j] for b in range(15)) / 15
            slow += (correlation - 1) ** 2 if i == j else 0.005 * correlation**2
    assert ft.barlow_loss(one, other).item() == pytest.approx(slow, rel=1e-4)


def test_targets_take_no_gradient():
    predictions, projections = (
        torch.randn(2, 3, 4, requires_grad=True),
        torch.randn(2, 4, 4, requires_grad=True),
    )
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
    expected = np.array(
        [
            [f(t / 10_000 ** (2 * (i // 2) / 8)) for i, f in enumerate([np.sin, np.cos] * 4)]
            for t in range(5)
        ]
    )
    np.testing.assert_allclose(ft.positions(5, 8, torch.device("cpu")).numpy(), expected, atol=1e-6)


def test_each_view_predicts_the_others_projections():
    torch.manual_seed(0)
    network, args = (
        ft.SimTPR(width=16, heads=2).eval(),
        make_args(mode="pretrain", from_scratch=False),
    )
    frames = torch.randint(
        256, (2, 6, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    loss = ft.pretraining_loss(network, frames, args, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    views = [ft.augment(frames, args.aug_shift, args.aug_intensity, generator) for _ in range(2)]
    stacks = [torch.stack([view[:, t : t + 4] for t in range(3)], dim=1) for view in views]
    (one, from_one), (other, from_other) = (network(stack) for stack in stacks)

    def distance(prediction, projection):
        pairs = zip(prediction.reshape(-1, 16), projection[:, 1:].reshape(-1, 16), strict=True)
        return torch.stack([(p / p.norm() - z / z.norm()).square().sum() for p, z in pairs]).mean()

    expected = (distance(from_one, other) + distance(from_other, one)) / 2 + 0.01 * ft.barlow_loss(
        one, other
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(distance(from_one, one) - distance(from_one, other)) > 1e-3


def test_an_update_of_the_pretraining_clips_and_steps():
    torch.manual_seed(0)
    network, args = (
        ft.SimTPR(width=16, heads=2),
        make_args(mode="pretrain", from_scratch=False, barlow_weight=10.0),
    )
    before = [w.detach().clone() for w in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    frames = torch.randint(
        256, (2, 6, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    for w in network.parameters():
        w.grad = torch.full_like(w, 1e6)  # of an update before, to be forgotten
    ft.pretrain_update(network, optimizer, frames, args, torch.Generator().manual_seed(2))
    steps = torch.cat(
        [(b - w.detach()).flatten() for b, w in zip(before, network.parameters(), strict=True)]
    )
    assert steps.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_the_pretraining_loss_is_symmetric_and_learns():
    torch.manual_seed(0)
    network, args = (
        ft.SimTPR(width=32),
        make_args(aug_shift=0, aug_intensity=0.0, barlow_weight=0.5),
    )
    frames = torch.randint(256, (3, 7, 84, 84), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    stacks = torch.stack([frames[:, t : t + 4] for t in range(4)], dim=1) / 255
    projections, predictions = network(stacks)
    expected = ft.prediction_loss(predictions, projections) + 0.5 * ft.barlow_loss(
        projections, projections
    )
    torch.testing.assert_close(
        ft.pretraining_loss(network, frames, args, generator), expected, rtol=1e-4, atol=1e-4
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = ft.pretraining_loss(network, frames, args, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- Videos -----------------------------------------------------------------------------------------------------------

NAMES = (
    ("observation_1_3.gz", "terminal_1_3.gz"),
    ("$store$_observation_ckpt.4.gz", "$store$_terminal_ckpt.4.gz"),
)


def write_video(directory, names, num, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.integers(256, size=(num, 84, 84), dtype=np.uint8),
        (rng.random(num) < 0.1).astype(np.uint8),
    )
    for name, array in zip(names, arrays, strict=True):
        with gzip.open(directory / name, "wb") as file:
            np.save(file, array)
    return arrays


def test_videos_are_read_block_by_block_of_every_file(tmp_path):
    """Of two files with 25 and 40 frames, 8 of each at a time; what is read together ends as an episode does."""
    (tmp_path / "reward_1_3.gz").write_bytes(b"not read")
    arrays = [
        write_video(tmp_path, names, num, seed=num)
        for names, num in zip(reversed(NAMES), (25, 40), strict=True)
    ]
    files = ft.video_files(tmp_path)
    assert ft.count_frames(files) == 65
    blocks = list(ft.read_videos(files, 16))
    assert [len(frames) for frames, _ in blocks] == [16, 16, 16, 9, 8]
    for k, (frames, ends) in enumerate(blocks):
        parts = [
            (array[8 * k : 8 * k + 8], last[8 * k : 8 * k + 8].copy()) for array, last in arrays
        ]
        for _, last in parts:
            last[-1:] = 1
        assert np.array_equal(frames, np.concatenate([array for array, _ in parts]))
        assert np.array_equal(ends, np.concatenate([last for _, last in parts]) == 1)


def with_header(path, header):
    """A file of numpy's with this text as its header."""
    with gzip.open(path, "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())


def with_array(path, array):
    with gzip.open(path, "wb") as file:
        np.save(file, array)


SHAPE = "'fortran_order': False, 'shape': (40, 84, 84)"
SPOILT = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "flipped": lambda path: path.write_bytes(
        path.read_bytes()[:5000] + bytes(100) + path.read_bytes()[5100:]
    ),
    "no gzip": lambda path: path.write_bytes(b"plain"),
    "missing": lambda path: path.unlink(),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "long": lambda path: path.write_bytes(path.read_bytes() + gzip.compress(b"more")),
    "brace": lambda path: with_header(path, "{"),
    "descr": lambda path: with_header(path, "{'descr': (), " + SHAPE + "}"),
    "negative": lambda path: with_header(
        path, "{'descr': '|u1', " + SHAPE.replace("40", "-40") + "}"
    ),
    "colour": lambda path: with_array(path, np.zeros((40, 84, 84, 3), np.uint8)),
    "float": lambda path: with_array(path, np.zeros((40, 84, 84), np.float32)),
    "bool": lambda path: with_array(path, np.zeros((40, 84, 84), bool)),
    "Fortran": lambda path: with_array(path, np.zeros((84, 84, 40), np.uint8).T),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, kind, capsys):
    write_video(tmp_path, NAMES[0], 40)
    files = ft.video_files(tmp_path)
    SPOILT[kind](tmp_path / NAMES[0][0])
    with pytest.raises(SystemExit) as exit_info:
        assert ft.count_frames(files) == 40  # the header tells, or else the reading
        list(ft.read_videos(files, 16))
    error = capsys.readouterr().err
    assert exit_info.value.code == 1 and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path}/observation_1_3.gz: ") and len(error) < 500
    assert ("Fortran" in error) == (kind == "Fortran")


def test_halves_that_do_not_belong_together(tmp_path, capsys):
    write_video(tmp_path, NAMES[0], 40)
    with_array(tmp_path / "terminal_1_3.gz", np.zeros(39, bool))
    with pytest.raises(SystemExit):
        ft.count_frames(ft.video_files(tmp_path))
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/terminal_1_3.gz: holds 39 values, and its other half 40 frames\n"
    )


def test_videos_never_cross_an_episodes_end():
    terminals = np.zeros(200, bool)
    terminals[[10, 11, 50, 150, 199]] = True
    frames, seen = np.zeros((200, 1, 1)), set()
    for seed in range(50):
        starts = ft.draw_videos(frames, terminals, 8, np.random.default_rng(seed))
        assert len(starts) == len(set(starts)) == 25
        seen |= set(starts.tolist())
    expected = {s for s in range(193) if not terminals[s : s + 7].any()}
    assert seen == expected
    assert len(ft.draw_videos(frames[:5], terminals[:5], 8, np.random.default_rng(0))) == 0


def player_file(path, env_id="Pong", **flags):
    """A model of six actions as the Atari script saves it, and its network."""
    args = atari.Args(env_id=env_id, device="cpu", hidden_dim=8, n_atoms=5, **flags)
    torch.manual_seed(0)
    network = atari.QNetwork(6, args)
    network.sample_noise(torch.Generator().manual_seed(0))
    model = {"args": atari.asdict(args), "num_actions": 6, "target": network.state_dict()}
    torch.save(model, path)
    return network


@pytest.mark.parametrize(
    "flags", [{}, dict(crelu=False, layer_norm=False), dict(layer_norm_scope="all")], ids=str
)
def test_a_player_plays_as_the_atari_scripts_network(tmp_path, flags):
    network = player_file(tmp_path / "model.pth", **flags).eval()  # without noise
    player = ft.load_player(tmp_path / "model.pth", "Pong")
    images = torch.rand(5, 4, 84, 84, generator=torch.Generator().manual_seed(1))
    assert torch.equal(player(images), network(images))


@pytest.mark.parametrize("kind", ["missing", "another game", "no model", "CReLU everywhere"])
def test_a_player_that_cannot_play(tmp_path, capsys, kind):
    path = tmp_path / "model.pth"
    if kind == "no model":
        torch.save([1], path)
    elif kind != "missing":
        player_file(path, "Alien" if kind == "another game" else "Pong", crelu_scope="all")
    with pytest.raises(SystemExit) as exit_info:
        ft.load_player(path, "Pong")
    error = capsys.readouterr().err
    assert (
        exit_info.value.code == 1
        and error.count("\n") == 1
        and error.startswith(f"error: --collect-model '{path}': ")
    )


def test_what_is_recorded_is_what_was_played(tmp_path, monkeypatch):
    """Frames in order, the last of a game marked, the first of the next one after it; the player sees its own stack."""
    num_frames, games = 30, []

    class Envs:
        action_space = type("Space", (), {"n": 6})()

        def reset(self):
            games.append(0)
            return np.full((1, 1, 84, 84), 10 * len(games), np.uint8), {"lives": [3]}

        def step(self, action):
            games[-1] += 1
            frame = np.full((1, 1, 84, 84), 10 * len(games) + games[-1], np.uint8)
            return frame, None, [games[-1] == 7], [False], {"lives": [3 - (games[-1] >= 5)]}

    seen = []

    class Player:
        def __call__(self, images):
            seen.append((images[0, :, 0, 0] * 255).round().int().tolist())
            return torch.zeros(1, 6, 5)

        def q_values(self, log_probs):
            return torch.zeros(1, 6)

    monkeypatch.setattr(ft, "make_envs", lambda *args: Envs())
    ft.record(
        tmp_path, Player(), make_args(mode="pretrain", from_scratch=False, collect_steps=num_frames)
    )
    ((frames, terminals),) = ft.read_videos(ft.video_files(tmp_path), 100)
    assert frames[:, 0, 0].tolist() == [10 * (1 + i // 7) + i % 7 for i in range(num_frames)]
    assert np.flatnonzero(terminals).tolist() == [6, 13, 20, 27, 29]  # and the last of a block
    assert all((frame == frame[0, 0]).all() for frame in frames)
    first = [[0, 0, 0, 10], [0, 0, 10, 11], [0, 10, 11, 12], [10, 11, 12, 13]]
    assert (
        seen[:4] == first and [0, 0, 0, 20] in seen and [0, 0, 0, 15] in seen
    )  # a new game, a lost life
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ft.RECORDED)


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_continued_pretraining_equals_an_unbroken_one(tmp_path, monkeypatch):
    write_video(tmp_path, NAMES[0], 100)
    monkeypatch.setattr(ft, "BLOCK_FRAMES", 40)
    flags = dict(
        mode="pretrain", from_scratch=False, video_dir=tmp_path, run_dir=tmp_path, pretrain_epochs=2
    )
    flags |= dict(
        pretrain_batch_size=2,
        pretrain_length=3,
        checkpoint_interval=1,
        resume=True,
        torch_threads=1,
    )
    ft.run(make_args(exp_name="whole", **flags), ft.Stop())
    stop, save = ft.Stop(), ft.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        if args[2].step == 4:
            raise SystemExit(143)

    monkeypatch.setattr(ft, "save_checkpoint", save_and_stop)
    with pytest.raises(SystemExit):
        ft.run(make_args(exp_name="broken", **flags), stop)
    monkeypatch.setattr(ft, "save_checkpoint", save)
    torch.manual_seed(99)
    ft.run(make_args(exp_name="broken", **flags), stop)
    results, models = [], []
    for name in ("whole", "broken"):
        run_dir = tmp_path / f"Alien__{name}__1"
        results.append(json.loads((run_dir / "result.json").read_text()))
        models.append(torch.load(run_dir / "model.pth", weights_only=True)["model_state_dict"])
    assert (results[0]["blocks"], results[1]["blocks"], results[1]["resumed_at"]) == (6, 6, [4])
    assert results[0]["gradient_updates"] == results[1]["gradient_updates"] > 10
    assert all(torch.equal(w, models[1][name]) for name, w in models[0].items())
    assert {name: tuple(w.shape) for name, w in models[0].items()} == published_layout()


def test_every_block_of_every_epoch_is_drawn_anew(tmp_path, monkeypatch):
    write_video(tmp_path, NAMES[0], 80)
    monkeypatch.setattr(ft, "BLOCK_FRAMES", 40)
    draws, draw = [], ft.draw_videos

    def draw_videos(frames, terminals, length, rng):
        draws.append(rng.random())
        return draw(frames, terminals, length, rng)

    monkeypatch.setattr(ft, "draw_videos", draw_videos)
    flags = dict(
        mode="pretrain", from_scratch=False, video_dir=tmp_path, run_dir=tmp_path, pretrain_epochs=2
    )
    for seed in (1, 2):
        ft.run(make_args(pretrain_batch_size=2, pretrain_length=3, seed=seed, **flags), ft.Stop())
    assert len(draws) == len(set(draws)) == 8


def test_videos_that_lie_in_the_runs_directory_survive_overwrite(tmp_path):
    run_dir = tmp_path / "Alien__x__1"
    run_dir.mkdir()
    write_video(run_dir, ft.RECORDED, 30)
    before = [(run_dir / name).read_bytes() for name in ft.RECORDED]
    flags = dict(
        mode="pretrain",
        from_scratch=False,
        video_dir=run_dir,
        run_dir=tmp_path,
        exp_name="x",
        overwrite=True,
    )
    ft.run(
        make_args(pretrain_epochs=1, pretrain_batch_size=2, pretrain_length=3, **flags), ft.Stop()
    )
    assert [(run_dir / name).read_bytes() for name in ft.RECORDED] == before


def script(tmp_path, *flags):
    command = [
        sys.executable,
        str(SCRIPT),
        "--env-id",
        "Pong",
        "--device",
        "cpu",
        "--torch-threads",
        "1",
        *flags,
    ]
    return subprocess.run(
        [*command, "--run-dir", str(tmp_path)], capture_output=True, text=True, timeout=300
    )


def test_a_short_pretraining_then_fine_tuning_on_pong(tmp_path):
    sizes = "--collect-steps 200 --pretrain-epochs 1 --pretrain-batch-size 4 --pretrain-length 4".split()
    done = script(tmp_path, "--mode", "pretrain", *sizes)
    assert (done.returncode, done.stderr) == (0, "")
    model = tmp_path / "Pong__pretrain__1" / "model.pth"
    flags = "--total-timesteps 60 --learning-starts 20 --batch-size 4 --buffer-size 200 --hidden-dim 8 --n-atoms 5".split()
    flags += "--eval-episodes 1 --sam-rho 0.1 --reset-interval 30 --metrics-interval 30 --save-model".split()
    done = script(tmp_path, "--pretrained-path", str(model), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    run_dir = tmp_path / "Pong__finetune__1"
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["gradient_updates"], result["resets"], len(result["episode_returns"])) == (
        82,
        2,
        1,
    )
    weights, first = (
        torch.load(run_dir / "model.pth", weights_only=True)["target"],
        ft.load_pretrained(model),
    )
    assert torch.equal(
        weights["backbone.layers.0.layers.1.running_mean"], first["layers.0.layers.1.running_mean"]
    )
    assert not torch.equal(
        weights["backbone.layers.0.down.weight"], first["layers.0.down.weight"]
    )  # Shrink & Perturb
    done = script(tmp_path, "--evaluate", str(run_dir / "model.pth"), "--eval-episodes", "1")
    assert (done.returncode, done.stderr) == (0, "") and "Pong: mean return" in done.stdout


def snapshot(directory):
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if not path.name.startswith(".")
    }


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(collect_policy="checkpoint", collect_model="nowhere"), "--collect-model"),
        (dict(video_dir="spoilt"), "observation_1_3.gz: "),
        (dict(collect_steps=5), "--pretrain-batch-size"),
        (
            dict(collect_policy="checkpoint", collect_model="runs/Pong__x__1/model.pth"),
            "--overwrite empties",
        ),
    ],
    ids=str,
)
def test_an_overwrite_that_cannot_begin_loses_nothing(tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spoilt").mkdir()
    write_video(tmp_path / "spoilt", NAMES[0], 40)
    (tmp_path / "spoilt" / NAMES[0][0]).write_bytes(b"")
    own = dict(
        mode="pretrain", env_id="Pong", from_scratch=False, run_dir=Path("runs"), exp_name="x"
    )
    own |= dict(pretrain_epochs=1, pretrain_batch_size=2, pretrain_length=3)
    ft.run(make_args(collect_steps=60, **own), ft.Stop())
    before = snapshot(Path("runs/Pong__x__1"))
    paths = {
        name: Path(value) for name, value in flags.items() if name in ("video_dir", "collect_model")
    }
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        ft.run(make_args(overwrite=True, **own | flags | paths), ft.Stop())
    error = capsys.readouterr().err
    assert exit_info.value.code == 1 and words in error and error.count("\n") == 1
    after = snapshot(Path("runs/Pong__x__1"))
    if "collect_steps" in flags:  # the recording itself is replaced
        before, after = (
            {k: v for k, v in files.items() if k not in ft.RECORDED} for files in (before, after)
        )
    assert before == after


def test_a_fine_tuning_does_not_overwrite_its_own_encoder(tmp_path, capsys):
    (tmp_path / "Pong__x__1").mkdir()
    path = saved(tmp_path / "Pong__x__1" / "model.pth", ft.Backbone())
    flags = dict(
        env_id="Pong", exp_name="x", run_dir=tmp_path, pretrained_path=path, from_scratch=False
    )
    with pytest.raises(SystemExit):
        ft.run(make_args(overwrite=True, **flags), ft.Stop())
    assert "--overwrite empties" in capsys.readouterr().err and path.exists()


def test_videos_of_ones_own_in_the_runs_directory_are_kept(tmp_path, capsys):
    run_dir = tmp_path / "Pong__x__1"
    run_dir.mkdir()
    write_video(run_dir, ft.RECORDED, 60)
    before = snapshot(run_dir)
    own = dict(
        mode="pretrain",
        env_id="Pong",
        from_scratch=False,
        run_dir=tmp_path,
        exp_name="x",
        collect_steps=50,
    )
    own |= dict(pretrain_epochs=1, pretrain_batch_size=2, pretrain_length=3)
    for resume, words in ((False, "without its result"), (True, "60 frames, not 50")):
        with pytest.raises(SystemExit):
            ft.run(make_args(resume=resume, **own), ft.Stop())
        assert words in capsys.readouterr().err and snapshot(run_dir) == before
    ft.run(
        make_args(resume=True, **own | dict(collect_steps=60)), ft.Stop()
    )  # a recording that is there is used
    after = snapshot(run_dir)
    assert {name: after[name] for name in before} == before
    (run_dir / "model.pth").unlink()
    with pytest.raises(SystemExit):
        ft.run(make_args(resume=True, **own | dict(collect_steps=60)), ft.Stop())
    assert "without its model.pth" in capsys.readouterr().err


def test_a_pretraining_goes_on_with_its_own_videos_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ft, "BLOCK_FRAMES", 40)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos", NAMES[0], 100)
    flags = dict(
        mode="pretrain",
        from_scratch=False,
        video_dir=tmp_path / "videos",
        run_dir=tmp_path,
        resume=True,
    )
    flags |= dict(
        pretrain_epochs=2, pretrain_batch_size=2, pretrain_length=3, checkpoint_interval=1
    )
    save = ft.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise SystemExit(143)

    monkeypatch.setattr(ft, "save_checkpoint", save_and_stop)
    with pytest.raises(SystemExit):
        ft.run(make_args(**flags), ft.Stop())
    write_video(tmp_path / "videos", NAMES[0], 60)
    with pytest.raises(SystemExit) as exit_info:
        ft.run(make_args(**flags), ft.Stop())
    assert exit_info.value.code == 1 and "60 frames, not 100" in capsys.readouterr().err


def test_weights_that_no_one_can_use_are_not_saved(tmp_path, capsys):
    flags = dict(
        mode="pretrain", env_id="Pong", from_scratch=False, run_dir=tmp_path, collect_steps=12
    )
    flags |= dict(
        pretrain_epochs=1, pretrain_batch_size=2, pretrain_length=2, pretrain_learning_rate=1e9
    )
    with pytest.raises(SystemExit):
        ft.run(make_args(**flags), ft.Stop())
    assert "lower --pretrain-learning-rate" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/model.pth"))


PRETRAIN = "--mode pretrain --collect-steps 200 --pretrain-batch-size 2 --pretrain-length 2 --resume".split()


def start(tmp_path, *flags, limit=None):
    """The script as a process; `limit`: KiB that a file of its may have."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--env-id",
        "Pong",
        "--device",
        "cpu",
        "--torch-threads",
        "1",
        *flags,
    ]
    command += ["--run-dir", str(tmp_path)]
    if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit}; trap "" XFSZ; exec "$@"', "bash", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def started(condition, *args):
    """The process of start(), once the condition holds."""
    process, end = start(*args), time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def test_a_pretraining_that_is_killed_ends_as_one_that_is_not(tmp_path):
    flags = [
        *PRETRAIN,
        "--collect-steps",
        "60",
        "--pretrain-epochs",
        "8",
        "--checkpoint-interval",
        "2",
    ]
    run_dir, models = tmp_path / "a" / "Pong__pretrain__1", []
    with started((run_dir / "checkpoint.pth").exists, tmp_path / "a", *flags) as process:
        process.kill()
    assert not (run_dir / "result.json").exists()
    for name in "ab":
        _, error = (process := start(tmp_path / name, *flags)).communicate(timeout=300)
        assert (process.returncode, error) == (0, "")
        models.append(
            torch.load(tmp_path / name / "Pong__pretrain__1" / "model.pth", weights_only=True)
        )
    a, b = (model["model_state_dict"] for model in models)
    assert json.loads((run_dir / "result.json").read_text())["resumed_at"] in ([2], [4], [6])
    assert all(torch.equal(w, b[name]) for name, w in a.items())


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_recording_leaves_nothing(tmp_path, signum, code):
    run_dir = tmp_path / "Pong__pretrain__1"
    flags = [*PRETRAIN, "--collect-steps", "1000000"]
    with started((run_dir / f"{ft.RECORDED[0]}.tmp").exists, tmp_path, *flags) as process:
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, f"error: stopped by {signum.name}\n")
    assert not run_dir.exists()


def test_a_signal_during_pretraining_names_the_way_on(tmp_path):
    run_dir = tmp_path / "Pong__pretrain__1"
    flags = [*PRETRAIN, "--pretrain-epochs", "10000", "--checkpoint-interval", "1"]
    with started((run_dir / "checkpoint.pth").exists, tmp_path, *flags) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (
        143,
        "error: stopped by SIGTERM; --resume continues the run\n",
    )


def test_a_disk_that_is_full_during_the_recording_is_one_line(tmp_path):
    process = start(tmp_path, *PRETRAIN, "--collect-steps", "100000", limit=100)
    _, error = process.communicate(timeout=60)
    path = tmp_path / "Pong__pretrain__1" / ft.RECORDED[0]
    assert (process.returncode, error) == (1, f"error: cannot write {path}: File too large\n")
    assert not path.parent.exists()


def test_a_signal_during_fine_tuning_and_the_run_goes_on(tmp_path):
    flags = "--from-scratch --learning-starts 20 --batch-size 4 --buffer-size 200 --hidden-dim 8 --n-atoms 5".split()
    flags += "--total-timesteps 150 --eval-episodes 1 --log-interval 10 --resume".split()
    run_dir = tmp_path / "Pong__finetune__1"

    def logged():
        return any(path.stat().st_size > 3000 for path in run_dir.glob("events*"))

    with started(logged, tmp_path, *flags) as process:
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (
        143,
        "error: stopped by SIGTERM; --resume continues the run\n",
    )
    step = torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["step"]
    _, error = (process := start(tmp_path, *flags)).communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["resumed_at"], result["gradient_updates"], result["env_steps"]) == (
        [step],
        262,
        150,
    )


# --- Memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from pathlib import Path
import numpy as np, torch
import plastic_pretrained_finetune as ft
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
flags = json.loads(sys.argv[1])
args = ft.resolve(ft.Args(device="cpu", **flags))
torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
before, generator = peak(), torch.Generator().manual_seed(0)
if args.mode == "pretrain":
    network = ft.SimTPR().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for frames, _ in ft.read_videos(ft.video_files(Path(sys.argv[2])), ft.BLOCK_FRAMES):
        videos = torch.from_numpy(frames[: args.pretrain_batch_size * 14].reshape(-1, 14, 84, 84).copy())
        optimizer.zero_grad()
        ft.pretraining_loss(network, videos, args, generator).backward()
        optimizer.step()
else:
    agent = ft.Agent(ft.Backbone(), 18, 10, args, generator)
    replay = ft.ReplayBuffer(args.buffer_size, args.n_step, args.gamma, torch.device("cpu"))
    replay.frames.fill_(1)
    for step in range(100):
        replay.add(0, 0.0, step % 50 == 49, np.zeros((84, 84), np.uint8))
    agent.update(replay), agent.update(replay)
print((peak() - before) / ft.memory_needed(18, args))
"""


@pytest.mark.parametrize(
    "flags",
    [
        dict(mode="pretrain", pretrain_batch_size=8),
        dict(mode="pretrain", pretrain_batch_size=32),
        dict(from_scratch=True, buffer_size=50_000),
        dict(
            from_scratch=True,
            buffer_size=50_000,
            batch_size=256,
            freeze_backbone=False,
            sam_rho=0.1,
        ),
    ],
    ids=str,
)
def test_the_memory_needed_is_about_what_a_run_takes(flags, tmp_path):
    """Above what PyTorch itself takes; a pretraining reads two full blocks and a rest."""
    for name, shape in zip(ft.RECORDED, ((42_000, 84, 84), (42_000,)), strict=True):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for _ in range(42):
                file.write(bytes(1000 * (84 * 84 if len(shape) == 3 else 1)))
    command = [sys.executable, "-c", PEAK, json.dumps(flags), str(tmp_path)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.75 < float(done.stdout) < 1.25


def test_a_pretraining_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ft, "memory_available", lambda device: 2**32)
    with pytest.raises(SystemExit):
        ft.run(
            make_args(mode="pretrain", from_scratch=False, run_dir=tmp_path, collect_steps=100),
            ft.Stop(),
        )
    error = capsys.readouterr().err
    assert "--pretrain-batch-size" in error and "GiB of memory, and cpu has 4.0 free" in error
    assert list(tmp_path.iterdir()) == []


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "--from-scratch"),
        ("--from-scratch --pretrained-path x", "one of them"),
        ("--mode pretrain --collect-policy checkpoint", "--collect-model"),
        ("--mode pretrain --video-dir nowhere", "--video-dir"),
        ("--mode pretrain --video-dir .", "no observation_"),
        ("--from-scratch --shrink-perturb-alpha 1.5", "--shrink-perturb-alpha"),
        ("--mode pretrain --pretrain-length 1", "--pretrain-length"),
        ("--mode pretrain --from-scratch", "--mode finetune"),
        ("--mode pretrain --pretrained-path x", "--mode finetune"),
        ("--from-scratch --video-dir .", "--mode pretrain"),
        (
            "--mode pretrain --video-dir . --collect-policy checkpoint --collect-model x",
            "one of them",
        ),
        ("--pretrained-path a\udcff.pth", "printable"),
    ],
)
def test_a_flag_that_makes_no_sense(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        ft.resolve(ft.tyro.cli(ft.Args, args=flags.split()))
    assert exit_info.value.code in (1, 2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
