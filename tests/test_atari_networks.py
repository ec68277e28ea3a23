"""The network's parts against NumPy, hand counts and closed forms."""

import math

import numpy as np
import pytest
import torch

import plastic_drq_rainbow_atari as atari


def make_args(**flags):
    return atari.Args(device="cpu", **flags)


def count(module):
    return sum(w.numel() for w in module.parameters())


def test_pixel_layer_norm_is_over_channels_at_each_pixel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    norm = atari.PixelLayerNorm(5)
    weight, bias = rng.normal(size=(2, 5)).astype(np.float32)
    norm.weight.data, norm.bias.data = torch.tensor(weight), torch.tensor(bias)
    expected = np.empty_like(x)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                pixel = x[b, :, i, j]
                expected[b, :, i, j] = (pixel - pixel.mean()) / np.sqrt(
                    pixel.var() + 1e-6
                ) * weight + bias
    for layout in (torch.contiguous_format, torch.channels_last):
        actual = norm(torch.tensor(x).contiguous(memory_format=layout))
        np.testing.assert_allclose(actual.detach().numpy(), expected, atol=1e-5)


def test_crelu_concatenates_both_signs_along_the_channels():
    x = torch.tensor([[[1.0, -2.0]], [[0.0, 3.0]]])  # [2, 1, 2]
    expected = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 0.0]]])
    assert torch.equal(atari.CReLU()(x), expected)


CONVS = (
    32 * 4 * 64 + 32,
    64 * 32 * 16 + 64,
    64 * 64 * 9 + 64,
)  # weights and biases, counted by hand


def noisy(fan_in, fan_out):
    return 2 * (fan_in * fan_out + fan_out)  # mu and sigma


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            dict(layer_norm=False, crelu=False),
            sum(CONVS) + 2 * noisy(3136, 512) + noisy(512, 51) + noisy(512, 306),
        ),
        (
            dict(layer_norm=True, crelu=False),
            sum(CONVS)
            + 2 * (32 + 64 + 64)
            + 2 * noisy(3136, 512)
            + noisy(512, 51)
            + noisy(512, 306),
        ),
        (
            dict(layer_norm=True, layer_norm_scope="all", crelu=False),
            sum(CONVS)
            + 2 * (32 + 64 + 64)
            + 2 * 2 * 512
            + 2 * noisy(3136, 512)
            + noisy(512, 51)
            + noisy(512, 306),
        ),
        (
            dict(layer_norm=False, crelu=True),
            sum(CONVS) + 2 * noisy(3136, 512) + noisy(1024, 51) + noisy(1024, 306),
        ),
        (
            dict(layer_norm=False, crelu=True, crelu_scope="all"),
            CONVS[0]
            + (64 * 64 * 16 + 64)
            + (64 * 128 * 9 + 64)
            + 2 * noisy(6272, 512)
            + noisy(1024, 51)
            + noisy(1024, 306),
        ),
    ],
)
def test_parameter_counts(flags, expected):
    assert count(atari.QNetwork(6, make_args(**flags))) == expected


def test_parameter_counts_are_the_papers():
    base = count(atari.QNetwork(6, make_args(layer_norm=False, crelu=False)))
    crelu = count(atari.QNetwork(6, make_args(layer_norm=False)))
    assert (round(base / 1e6, 2), round(crelu / 1e6, 2)) == (6.87, 7.23)


def test_layer_norm_stands_between_convolution_and_activation():
    names = [type(m).__name__ for m in atari.make_backbone(make_args())]
    assert names == ["Conv2d", "PixelLayerNorm", "ReLU"] * 3 + ["Flatten"]
    names = [
        type(m).__name__
        for m in atari.make_backbone(make_args(layer_norm=False, crelu_scope="all"))
    ]
    assert names == ["Conv2d", "CReLU"] * 3 + ["Flatten"]


def test_noisy_layer_equals_the_factorised_form():
    """(mu + sigma * outer(out, in)) x = mu x + (sigma (x * in)) * out, one output at a time."""
    torch.manual_seed(0)
    layer = atari.NoisyLinear(7, 3, 0.5)
    layer.weight_sigma.data.uniform_(-1, 1)
    layer.bias_sigma.data.uniform_(-1, 1)
    layer.sample_noise(torch.Generator().manual_seed(0))
    w = {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    noisy, quiet = layer(torch.tensor(x)), layer.eval()(torch.tensor(x))
    for b in range(4):
        for i in range(3):
            mean = w["weight_mu"][i] @ x[b] + w["bias_mu"][i]
            noise = w["weight_sigma"][i] @ (x[b] * w["noise_in"]) + w["bias_sigma"][i]
            expected = mean + noise * w["noise_out"][i]
            assert noisy[b, i].item() == pytest.approx(expected, abs=1e-5)
            assert quiet[b, i].item() == pytest.approx(mean, abs=1e-5)


def test_noise_is_sign_times_root_of_a_gaussian_and_new_at_each_draw():
    layer = atari.NoisyLinear(200_000, 1, 0.5)
    generator = torch.Generator().manual_seed(0)
    layer.sample_noise(generator)
    first = layer.noise_in.clone()
    gaussian = first.sign() * first**2  # undoes f(e) = sign(e) sqrt(|e|)
    assert abs(gaussian.mean()) < 0.01
    assert abs(gaussian.std() - 1) < 0.01
    assert abs((gaussian.abs() < 1).float().mean() - 0.6827) < 0.005
    layer.sample_noise(generator)
    assert not torch.equal(layer.noise_in, first)


def test_a_layers_noises_are_independent():
    layer = atari.NoisyLinear(2_000, 2_000, 0.5)
    layer.sample_noise(torch.Generator().manual_seed(0))
    correlations = torch.stack([layer.noise_in, layer.noise_out]).corrcoef()
    assert abs(correlations[0, 1]) < 0.1  # four standard errors


def test_noisy_initialisation():
    layer = atari.NoisyLinear(400, 100, 0.5)
    for mu in (layer.weight_mu, layer.bias_mu):
        assert mu.abs().max() <= 1 / 20
        assert abs(mu.std() - 1 / 20 / math.sqrt(3)) < 0.005
    assert torch.all(layer.weight_sigma == 0.5 / 20)
    assert torch.all(layer.bias_sigma == 0.5 / 10)


def test_dueling_head_subtracts_the_mean_advantage():
    head = atari.DuelingHead(8, 3, make_args(hidden_dim=4, n_atoms=5))
    x = torch.randn(2, 8)
    value = head.value(x).detach().numpy()
    advantage = head.advantage(x).detach().numpy().reshape(2, 3, 5)
    logits = value[:, None] + advantage - advantage.mean(1, keepdims=True)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(head(x).exp().detach().numpy(), expected, atol=1e-6)


def test_backbone_gradient_is_scaled_and_nothing_else():
    args = make_args(hidden_dim=16, n_atoms=5)
    network = atari.QNetwork(3, args)
    network.sample_noise(torch.Generator().manual_seed(0))
    images = torch.rand(2, 4, 84, 84)
    scaled = network(images)
    plain = network.head(network.backbone(images))
    assert torch.equal(scaled, plain)
    projection = torch.randn_like(plain)
    with_scale = torch.autograd.grad((scaled * projection).sum(), list(network.parameters()))
    without = torch.autograd.grad((plain * projection).sum(), list(network.parameters()))
    num_backbone = len(list(network.backbone.parameters()))
    for i, (a, b) in enumerate(zip(with_scale, without, strict=True)):
        torch.testing.assert_close(
            a, b / math.sqrt(2) if i < num_backbone else b, rtol=1e-4, atol=1e-5
        )


def test_q_values_are_means():
    network = atari.QNetwork(2, make_args(n_atoms=3, v_min=-1.0, v_max=2.0, hidden_dim=4))
    log_probs = torch.tensor([[0.2, 0.3, 0.5]]).log()
    torch.testing.assert_close(
        network.q_values(log_probs), torch.tensor([-1 * 0.2 + 0.5 * 0.3 + 2 * 0.5])
    )
