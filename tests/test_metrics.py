"""Metrics that several scripts have: against closed forms, and on each script's own network."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import plastic_drq_rainbow_atari as atari

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


@pytest.mark.parametrize("features", [[[0.0, 0.0]], [[1.0, math.nan]], [[math.inf, 1.0]]])
def test_features_that_are_all_zero_or_not_all_finite_have_no_rank(features):
    assert all(math.isnan(rank) for rank in ranks(torch.tensor(features)))


def test_norms_by_hand():
    assert atari.feature_metrics(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))["feature_norm"] == 3
    weights = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norms = atari.weight_metrics(weights, [torch.zeros(2), torch.ones(1, 1)])
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


@pytest.fixture(params=["plastic_drq_rainbow_atari", "plastic_drq_sac_dmc"])
def script(request):
    """Imported here: without a renderer, the tests of DeepMind Control fail, and no others."""
    return importlib.import_module(request.param)


def make(script, crelu=True):
    """As a run makes it, the same at each call: agent, and a replay of noise."""
    if script is atari:
        args = atari.Args(device="cpu", hidden_dim=16, n_atoms=11, crelu=crelu)
        agent, replay, *_ = atari.make_agent(args, atari.make_generators(args)["sampling"])
        agent.online.sample_noise(agent.generator)  # as after an update; metrics are without
    else:
        args = script.Args(device="cpu", hidden_dim=16, latent_dim=8, image_size=16, crelu=crelu)
        env = SimpleNamespace(action_dim=2, episode_steps=100, frame_shape=(1, 16, 16))
        agent, replay, *_ = script.make_agent(args, env, script.make_generators(args))
    rng, shape = np.random.default_rng(0), (84, 84) if script is atari else (1, 16, 16)
    frames = rng.integers(256, size=(301, *shape), dtype=np.uint8)
    replay.start(frames[0])
    for frame in frames[1:]:
        action = int(rng.integers(3)) if script is atari else rng.uniform(-1, 1, 2)
        replay.add(action, float(rng.normal()), False, frame)
    return agent, replay


def network(script, agent):
    return agent.online if script is atari else agent.critic


def measure(script, agent, replay):
    draws = torch.Generator().manual_seed(3) if script is atari else 3
    return script.plasticity_metrics(agent, replay, draws)


def test_metrics_change_nothing_and_know_the_initial_weights(script, monkeypatch):
    """The distance is 0 at first; in a process that goes on from a checkpoint it is the same."""
    agent, replay = make(script)
    before = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    torch.rand(5)  # what a run has drawn since
    random_state = torch.random.get_rng_state()
    metrics = measure(script, agent, replay)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.tensors().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    ratios = {f"dormant_ratio/{tau}" for tau in (0, 0.025, 0.1)}
    assert {*RANKS, *ratios, "feature_norm", "hessian_max_eigenvalue"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["weight_distance"] == 0
    weights = list(network(script, agent).parameters())
    norm = sum(float(w.detach().double().square().sum()) for w in weights) ** 0.5
    assert metrics["weight_norm"] == pytest.approx(norm, rel=1e-5)
    monkeypatch.setattr(script, "max_eigenvalue", lambda *_: 0.0)  # it takes long
    weights[0].data[0] += 3.0
    continued, _ = make(script)
    for name, tensor in continued.tensors().items():
        tensor.copy_(agent.tensors()[name])
    distance = pytest.approx(3 * weights[0][0].numel() ** 0.5, rel=1e-5)
    assert measure(script, agent, replay)["weight_distance"] == distance
    assert measure(script, continued, replay)["weight_distance"] == distance


@pytest.mark.parametrize("crelu", [False, True])
def test_features_are_what_the_last_layer_is_given(script, crelu, monkeypatch):
    agent, replay = make(script, crelu)
    weights = list(network(script, agent).parameters())
    seen, generator = {}, torch.Generator().manual_seed(3)

    def gradient_norm(loss, *_):
        gradient = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return float(nn.utils.get_total_norm([g for g in gradient if g is not None]))

    def see(features):
        seen["features"] = features
        return {}

    monkeypatch.setattr(script, "max_eigenvalue", gradient_norm)
    monkeypatch.setattr(script, "feature_metrics", see)
    metrics = measure(script, agent, replay)
    if script is atari:
        replay.sample_uniform(512, generator)  # for the other metrics
        inputs, last = [replay.sample_uniform(1024, generator).obs / 255], "advantage.output"
    else:
        sample = replay.sample(1024, generator)
        inputs, last = [sample.obs / 255, sample.action], "q_functions.0.1"
        norm = pytest.approx(metrics["hessian_max_eigenvalue"], rel=1e-4)
        assert metrics["gradient_norm"] == norm  # Atari's is among the losses
    last_layer = network(script, agent).head.eval().get_submodule(last)
    last_layer.register_forward_pre_hook(lambda module, given: seen.update(given=given[0]))
    network(script, agent)(*inputs)
    assert seen["features"].shape == (1024, 32 if crelu else 16)
    torch.testing.assert_close(seen["features"], seen["given"].detach())


def test_units_are_the_learning_networks_and_sharpness_is_over_all_its_weights(script, monkeypatch):
    """The target network is another one here. Without noise, its scales move no loss."""
    agent, replay = make(script, crelu=False)
    with torch.no_grad():
        for w in agent.target.parameters():
            w += 0.1 * torch.randn_like(w)
    learning, shares, weights = network(script, agent), {}, []
    monkeypatch.setattr(script, "max_eigenvalue", lambda _, ws, __: weights.extend(ws) or 0.0)
    metrics = measure(script, agent, replay)
    moving = [w for name, w in learning.named_parameters() if not name.endswith("_sigma")]
    assert [id(w) for w in weights] == [id(w) for w in moving]
    for name, module in learning.named_modules():
        if isinstance(module, nn.ReLU):
            share = lambda _, __, x, name=name: shares.update({name: (x > 0).double().mean()})  # noqa: E731
            module.register_forward_hook(share)
    generator = torch.Generator().manual_seed(3)
    learning.head.eval()
    if script is atari:
        inputs = [replay.sample_uniform(512, generator).obs / 255]
    else:
        sample = replay.sample(1024, generator)
        inputs = [sample.obs[:512] / 255, sample.action[:512]]
    scores = script.unit_scores(learning, lambda: learning(*inputs))
    assert script.dormant_ratios(scores).items() <= metrics.items()
    assert len(shares) > 4
    for name, share in shares.items():
        assert metrics[f"active_units/{name}"] == pytest.approx(share.item(), abs=1e-4)
