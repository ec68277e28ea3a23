"""Metrics that several scripts have: against closed forms, and on each script's own network."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import plastic_drq_rainbow_atari as atari
import plastic_drq_sac_dmc as dmc

RANKS = ("effective_rank", "srank", "stable_rank")


def matrix(singular_values, rows=40):
    """A matrix [rows, n] with these n singular values."""
    rng, n = np.random.default_rng(0), len(singular_values)
    left, right = (np.linalg.qr(rng.normal(size=(size, n)))[0] for size in (rows, n))
    return torch.from_numpy(left @ np.diag(singular_values) @ right.T).float()


def ranks(features):
    return tuple(atari.feature_metrics(features)[name] for name in RANKS)


def test_ranks_of_matrices_whose_singular_values_are_known():
    assert ranks(matrix([2.0] * 7)) == pytest.approx((7, 7, 7), rel=1e-5)
    assert ranks(torch.ones(3, 5)) == pytest.approx((1, 1, 1), rel=1e-5)
    # p = 1/2, 1/4, 1/4: exp(ln 2 / 2 + ln 4 / 2) = sqrt 8; 4 + 1 + 1 over 4.
    assert ranks(matrix([2.0, 1.0, 1.0])) == pytest.approx((8**0.5, 3, 1.5), rel=1e-5)
    # 90% and 99.5% of the sum: two of them make 99%; with 98.5% it takes the third.
    assert ranks(matrix([0.9, 0.095, 0.005]))[1] == 2
    assert ranks(matrix([0.9, 0.085, 0.015]))[1] == 3


def test_features_of_which_none_or_not_all_are_numbers_have_no_rank():
    for features in (
        torch.zeros(3, 2),
        torch.tensor([[1.0, math.nan]]),
        torch.full((2, 2), math.inf),
    ):
        assert all(math.isnan(rank) for rank in ranks(features))


def test_norms_by_hand():
    assert atari.feature_metrics(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))["feature_norm"] == 3
    weights, initial = (
        [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])],
        [torch.zeros(2), torch.ones(1, 1)],
    )
    norms = atari.weight_metrics(weights, initial)
    assert norms == pytest.approx({"weight_norm": 5, "weight_distance": 18**0.5})


class HandMade(nn.Module):
    """Two feature maps of mean 3 and 1; three pairs of mean size 5, 0 and 1; a layer of zeros."""

    def __init__(self):
        super().__init__()
        self.maps, self.pairs, self.dead = nn.ReLU(), atari.CReLU(), nn.ReLU()

    def forward(self):
        self.maps(torch.tensor([[[[2.0, 4.0]], [[-9.0, 1.0]]], [[[3.0, 3.0]], [[0.0, 3.0]]]]))
        self.pairs(torch.tensor([[5.0, 0.0, 0.0], [-5.0, 0.0, 2.0]]))
        self.dead(-torch.ones(2, 4))


def test_dormant_units_of_a_hand_made_network():
    network = HandMade()
    scores = atari.unit_scores(network, network)
    assert scores["maps"].tolist() == [1.5, 0.5]
    assert scores["pairs"].tolist() == [2.5, 0, 0.5]
    assert scores["dead"].tolist() == [0] * 4
    assert not any(module._forward_hooks for module in network.modules())
    # At most tau: 0.1 itself is dormant at 0.1, 0.025 at 0.025 and 0.1.
    scores = {"a": torch.tensor([0.0, 0.01, 0.025]), "b": torch.tensor([0.1, 0.11, 2, 2, 2])}
    shares = {"dormant_ratio/0": 1 / 8, "dormant_ratio/0.025": 3 / 8, "dormant_ratio/0.1": 4 / 8}
    assert atari.dormant_ratios(scores) == shares


# --- Each script's own ----------------------------------------------------------------------------


def make_atari(crelu):
    """As a run makes it, with a replay of noise: agent, a function that measures."""
    args = atari.Args(device="cpu", hidden_dim=16, n_atoms=11, seed=5, crelu=crelu)
    agent, replay, *_ = atari.make_agent(args, atari.make_generators(args)["sampling"])
    fill(replay, (84, 84), lambda rng: int(rng.integers(3)))
    generator = torch.Generator().manual_seed(3)
    return agent, lambda: atari.plasticity_metrics(agent, replay, generator)


def make_dmc(crelu):
    args = dmc.Args(device="cpu", hidden_dim=16, latent_dim=8, image_size=16, seed=5, crelu=crelu)
    env = SimpleNamespace(action_dim=2, episode_steps=100, frame_shape=(1, 16, 16))
    agent, replay, *_ = dmc.make_agent(args, env, dmc.make_generators(args))
    fill(replay, (1, 16, 16), lambda rng: rng.uniform(-1, 1, 2))
    return agent, lambda: dmc.plasticity_metrics(agent, replay, 7)


def fill(replay, shape, draw_action):
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(301, *shape), dtype=np.uint8)
    replay.start(frames[0])
    for frame in frames[1:]:
        replay.add(draw_action(rng), float(rng.normal()), False, frame)


SCRIPTS = {"atari": (atari, make_atari), "dmc": (dmc, make_dmc)}
SHARED = [*RANKS, "feature_norm", "weight_norm", "weight_distance", "hessian_max_eigenvalue"]
SHARED += [f"dormant_ratio/{tau}" for tau in (0, 0.025, 0.1)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_change_nothing_and_know_the_initial_weights(script, monkeypatch):
    """The distance is 0 at first; in a process that goes on from a checkpoint it is the same."""
    module, make = SCRIPTS[script]
    agent, measure = make(crelu=True)
    weights = list(agent.online.parameters())
    before = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    torch.rand(5)  # what a run has drawn since
    random_state = torch.random.get_rng_state()
    metrics = measure()
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.tensors().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert set(SHARED) <= set(metrics) and all(math.isfinite(x) for x in metrics.values())
    assert metrics["weight_distance"] == 0
    norm = sum(float(w.detach().double().square().sum()) for w in weights) ** 0.5
    assert metrics["weight_norm"] == pytest.approx(norm, rel=1e-5)
    monkeypatch.setattr(module, "max_eigenvalue", lambda *_: 0.0)  # it takes long
    with torch.no_grad():
        weights[0][0] += 3.0
    distance = 3 * weights[0][0].numel() ** 0.5
    assert measure()["weight_distance"] == pytest.approx(distance, rel=1e-5)
    continued, measure = make(crelu=True)
    for name, tensor in continued.tensors().items():
        tensor.copy_(agent.tensors()[name])
    assert measure()["weight_distance"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize("crelu", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_features_are_what_the_last_hidden_layer_gives_out(script, crelu, monkeypatch):
    module, make = SCRIPTS[script]
    agent, measure = make(crelu)
    samples, seen, original = [], {}, module.feature_metrics
    gather = module.ReplayBuffer.gather
    monkeypatch.setattr(
        module.ReplayBuffer,
        "gather",
        lambda self, index: samples.append(gather(self, index)) or samples[-1],
    )
    spy = lambda features: seen.update(features=features) or original(features)  # noqa: E731
    monkeypatch.setattr(module, "feature_metrics", spy)
    monkeypatch.setattr(module, "max_eigenvalue", lambda loss, *_: seen.update(loss=loss) or 0.0)
    metrics = measure()

    features = seen["features"]
    assert features.shape == (1024, 32 if crelu else 16) and not features.requires_grad
    (sample,) = [sample for sample in samples if len(sample.obs) == 1024]
    images = sample.obs / 255
    with torch.no_grad():
        if script == "dmc":
            q_values = agent.online.head.q_functions[0][1](features)
            torch.testing.assert_close(q_values[:, 0], agent.online(images, sample.action)[:, 0])
        else:
            layer = agent.online.head.advantage.hidden
            x = agent.online.backbone(images) @ layer.weight_mu.T + layer.bias_mu
            expected = torch.cat([x, -x], dim=1) if crelu else x
            torch.testing.assert_close(features, expected.clamp(min=0))
    assert ("gradient_norm" in metrics) == (script == "dmc")  # Atari's is among the losses


def test_the_gradient_of_dmc_is_that_of_the_critics_loss(monkeypatch):
    agent, measure = make_dmc(crelu=True)
    weights = list(agent.online.parameters())

    def backward(loss, *_):
        for w in weights:
            w.grad.zero_()
        loss.backward(retain_graph=True)
        return 0.0

    monkeypatch.setattr(dmc, "max_eigenvalue", backward)
    measured = measure()["gradient_norm"]
    norm = sum(float(w.grad.double().square().sum()) for w in weights) ** 0.5
    assert measured == pytest.approx(norm, rel=1e-4)
