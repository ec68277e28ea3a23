"""The network's parts against NumPy, hand counts and closed forms.

Their composition, the dueling head and the scaled gradient are in test_atari_update.py.
"""

import math

import numpy as np
import pytest
import torch

import plastic_drq_rainbow_atari as atari


def make_network(num_actions=6, **flags):
    return atari.QNetwork(num_actions, atari.Args(device="cpu", **flags))


def test_pixel_layer_norm_is_over_channels_at_each_pixel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 5)).astype(np.float32)
    norm = atari.PixelLayerNorm(5)
    norm.load_state_dict(dict(weight=torch.tensor(weight), bias=torch.tensor(bias)))
    centred = x - x.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
    expected = expected * weight[:, None, None] + bias[:, None, None]
    for layout in (torch.contiguous_format, torch.channels_last):
        actual = norm(torch.tensor(x).contiguous(memory_format=layout))
        np.testing.assert_allclose(actual.detach(), expected, atol=1e-5)


def test_crelu_concatenates_both_signs_along_the_channels():
    x = torch.tensor([[[1.0, -2.0]], [[0.0, 3.0]]])  # [2, 1, 2]
    expected = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 0.0]]])
    assert torch.equal(atari.CReLU()(x), expected)


CONVOLUTIONS = (32 * 4 * 64 + 32) + (64 * 32 * 16 + 64) + (64 * 64 * 9 + 64)  # weights and biases
CRELU_CONVOLUTIONS = (32 * 4 * 64 + 32) + (64 * 64 * 16 + 64) + (64 * 128 * 9 + 64)
NORMS, HEAD_NORMS = 2 * (32 + 64 + 64), 2 * 2 * 512


def head(features, fan_in):
    """Two hidden layers of 512, outputs of 51 and of 6 times 51 atoms; mu and sigma of each."""
    return 2 * (2 * (features + 1) * 512 + (fan_in + 1) * 7 * 51)


def count(**flags):
    return sum(w.numel() for w in make_network(**flags).parameters())


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(layer_norm=False, crelu=False), CONVOLUTIONS + head(3136, 512)),
        (dict(crelu=False), CONVOLUTIONS + NORMS + head(3136, 512)),
        (
            dict(crelu=False, layer_norm_scope="all"),
            CONVOLUTIONS + NORMS + HEAD_NORMS + head(3136, 512),
        ),
        (dict(layer_norm=False), CONVOLUTIONS + head(3136, 1024)),
        (dict(layer_norm=False, crelu_scope="all"), CRELU_CONVOLUTIONS + head(6272, 1024)),
    ],
    ids=str,
)
def test_parameters_counted_by_hand(flags, expected):
    assert count(**flags) == expected


def test_parameters_are_the_papers_6_87_and_7_23_million():
    counts = [count(layer_norm=False, crelu=crelu) for crelu in (False, True)]
    assert np.round(np.array(counts) / 1e6, 2).tolist() == [6.87, 7.23]


def test_noisy_layer_equals_the_factorised_form():
    """(mu + sigma * outer(out, in)) x = mu x + (sigma (x * in)) * out."""
    torch.manual_seed(0)
    layer = atari.NoisyLinear(7, 3, 0.5)
    layer.weight_sigma.data.uniform_(-1, 1)
    layer.bias_sigma.data.uniform_(-1, 1)
    layer.sample_noise(torch.Generator().manual_seed(0))
    w = {name: value.double().numpy() for name, value in layer.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(4, 7))
    mean = x @ w["weight_mu"].T + w["bias_mu"]
    noise = (x * w["noise_in"]) @ w["weight_sigma"].T + w["bias_sigma"]
    inputs = torch.tensor(x, dtype=torch.float32)
    actual = layer(inputs).detach(), layer.eval()(inputs).detach()
    np.testing.assert_allclose(actual[0], mean + noise * w["noise_out"], atol=1e-5)
    np.testing.assert_allclose(actual[1], mean, atol=1e-5)


def test_noise_is_sign_times_root_of_a_gaussian_independent_and_new_at_each_draw():
    layer, generator = atari.NoisyLinear(2_000, 2_000, 0.5), torch.Generator().manual_seed(0)
    layer.sample_noise(generator)
    noise = torch.stack([layer.noise_in, layer.noise_out])
    gaussian = noise.sign() * noise**2  # undoes f(e) = sign(e) sqrt(|e|)
    assert gaussian.mean() == pytest.approx(0, abs=0.05)
    assert gaussian.std() == pytest.approx(1, abs=0.05)
    assert (gaussian.abs() < 1).float().mean() == pytest.approx(0.6827, abs=0.02)
    assert noise.corrcoef()[0, 1] == pytest.approx(0, abs=0.1)  # four standard errors
    layer.sample_noise(generator)
    assert not torch.equal(layer.noise_in, noise[0])


def test_every_noisy_layer_has_noise_of_its_own():
    network = make_network(hidden_dim=4)
    network.sample_noise(torch.Generator().manual_seed(0))
    noise = [e[0].item() for name, e in network.named_buffers() if "noise" in name]
    assert len(set(noise)) == 2 * 4 and 0 not in noise


def test_noisy_initialisation():
    layer = atari.NoisyLinear(400, 100, 0.5)
    for mu in (layer.weight_mu, layer.bias_mu):
        assert mu.abs().max() <= 1 / 20
        assert abs(mu.std() - 1 / 20 / math.sqrt(3)) < 0.005
    assert torch.all(layer.weight_sigma == 0.5 / 20)
    assert torch.all(layer.bias_sigma == 0.5 / 10)


def test_q_values_are_means():
    network = make_network(2, n_atoms=3, v_min=-1.0, v_max=2.0, hidden_dim=4)
    q_values = network.q_values(torch.tensor([[0.2, 0.3, 0.5]]).log())
    assert q_values.tolist() == pytest.approx([-1 * 0.2 + 0.5 * 0.3 + 2 * 0.5])
