"""The linear probe measures what it says."""

import json
from types import SimpleNamespace

import linear_probe
import numpy as np
import pytest
import torch

ENVS = np.repeat(np.arange(16), 40)


def test_r_squared_is_the_share_that_is_linear_in_the_features():
    """Values that are linear, linear with as much noise, noise, and quadratic in the features."""
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(640, 5)), rng.normal(size=(2, 640))
    linear = z @ [1.0, -2.0, 3.0, 0.0, 0.5]
    state = np.stack([linear, linear + linear.std() * noise[0], noise[1], z[:, 0] ** 2], axis=1)
    features = z * [1, 10, 0.1, 1, 1] + 3
    result = linear_probe.r_squared(features, 7 * state + 100, ENVS)
    assert result[0] > 0.999
    assert result[1] == pytest.approx(0.5, abs=0.1)
    assert (result[2:] < 0.05).all()


def test_r_squared_against_least_squares():
    """With many samples for few features the penalty hardly counts.

    The fit sees the first ten environments alone."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(640, 5))
    state = features @ rng.normal(size=(5, 2)) + rng.normal(size=(640, 2))
    training, test = ENVS < 10, ENVS >= 12
    state[~training] += 0.5 * features[~training, :1]
    design = np.concatenate([features, np.ones((640, 1))], axis=1)
    weights = np.linalg.lstsq(design[training], state[training], rcond=None)[0]
    residual = state[test] - design[test] @ weights
    expected = 1 - (residual**2).mean(0) / state[test].var(0)
    assert linear_probe.r_squared(features, state, ENVS) == pytest.approx(expected, abs=0.01)
    state[(ENVS >= 10) & (ENVS < 12)] *= -1  # these choose the penalty: now the largest one
    assert (linear_probe.r_squared(features, state, ENVS) < 0.01).all()


def test_the_stacks_and_the_state_belong_together():
    """In Breakout, the bright pixels of the paddle's row move with the paddle's byte of memory."""
    stacks, state, envs = linear_probe.play("Breakout", 320, 0)
    assert stacks.shape == (len(state), 4, 84, 84) and len(envs) == len(state) <= 320
    paddle_row = stacks[:, -1, 76, 6:78].float()  # between the walls, in the newest frame
    seen = (paddle_row * torch.arange(72)).sum(1) / paddle_row.sum(1)
    assert np.corrcoef(seen.numpy(), state[:, 2])[0, 1] > 0.98
    assert (state[:, 1] > 0).all()


def test_in_pong_the_agent_plays_the_right_paddle():
    """In each paddle's columns, what differs from the background moves with its byte of memory."""
    stacks, state, _ = linear_probe.play("Pong", 640, 0)
    newest = stacks[:, -1, 18:79].float()  # between the walls
    bright = (newest - newest.median(0).values).abs()
    names = list(linear_probe.RAM["Pong"])
    for name, columns in ("opponent's paddle y", slice(8, 11)), ("paddle y", slice(73, 76)):
        paddle = bright[..., columns].sum(2)
        drawn = paddle.sum(1) > 0
        seen = (paddle * torch.arange(61)).sum(1)[drawn] / paddle.sum(1)[drawn]
        byte = state[drawn, names.index(name)]
        assert len(byte) > 350 and np.corrcoef(seen.numpy(), byte)[0, 1] > 0.95


def test_stacks_are_of_one_game_that_is_not_over(monkeypatch):
    """Games of five steps, the frame of step t has t everywhere, environment i's memory i + 1."""

    class Envs:
        action_space, step_number = SimpleNamespace(n=2), 0
        ram = np.repeat(np.arange(1, 17, dtype=np.uint8), 128).reshape(16, 128)

        def frames(self):
            return np.full((16, 1, 84, 84), self.step_number, np.uint8)

        def reset(self):
            return self.frames(), {}

        def step(self, actions):
            self.step_number += 1
            elapsed = self.step_number % 5
            info = {"elapsed_step": np.full(16, elapsed), "ram": self.ram}
            over = np.full(16, elapsed == 4)
            return self.frames(), None, over, np.zeros(16, bool), info

    monkeypatch.setattr(linear_probe.script, "make_envs", lambda *_: Envs())
    stacks, state, envs = linear_probe.play("Pong", 80, 0)
    # Of the steps 4, where a game ends, 8, 12, 16, 20.
    expected = [[5, 6, 7, 8], [0, 10, 11, 12], [0, 0, 15, 16], [0, 0, 0, 20]]
    assert stacks[::16, :, 0, 0].tolist() == expected
    assert np.array_equal(state[:, 0], envs + 1)  # by which the fit and its test are told apart


def test_random_blocks_have_the_statistics_of_the_frames_to_five_digits():
    """The encoder comes as encode() leaves it. By hand, in double precision, the first layer."""
    stacks = torch.randint(256, (50, 4, 84, 84), dtype=torch.uint8)
    stacks[..., 10:, :] = 87  # a plain background, as games have it
    encoder = linear_probe.script.Backbone()
    linear_probe.encode(encoder, stacks[:1])
    blocks = linear_probe.random_blocks(encoder, stacks).layers[0].layers
    images = stacks.double() / 255
    hidden = torch.nn.functional.conv2d(images, *(w.double() for w in blocks[0].parameters()))
    hidden = hidden.transpose(0, 1).flatten(1)
    torch.testing.assert_close(blocks[1].running_mean, hidden.mean(1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blocks[1].running_var, hidden.var(1).float(), rtol=1e-4, atol=0)


def test_the_features_of_a_stack_do_not_depend_on_the_others():
    """An encoder comes in training mode, in which BatchNorm has the statistics of the batch."""
    stacks = torch.randint(256, (6, 4, 84, 84), dtype=torch.uint8)
    encoder = linear_probe.random_blocks(linear_probe.script.Backbone(), stacks)
    together, alone = (linear_probe.encode(encoder, part) for part in (stacks, stacks[:1]))
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_the_column_before_pretraining_is_the_encoder_of_that_seed(tmp_path, capsys, monkeypatch):
    """By the sum of the features, which is quicker than a fit."""
    monkeypatch.setattr(linear_probe, "r_squared", lambda x, state, envs: x.sum() * state.mean(0))
    torch.manual_seed(1)
    state = {f"backbone.{n}": w for n, w in linear_probe.script.Backbone().state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "model.pth")
    flags = dict(model=tmp_path / "model.pth", json=tmp_path / "probe.json")
    linear_probe.main(linear_probe.Args(env_id="Breakout", samples=160, **flags))
    figures = json.loads((tmp_path / "probe.json").read_text())["r_squared"]
    assert list(figures) == ["ball x", "ball y", "paddle x"]
    for row in figures.values():
        assert row["pretrained"] == row["before pretraining"] != row["random blocks"]
    assert f"| paddle x | {figures['paddle x']['pretrained']:.3f} |" in capsys.readouterr().out


@pytest.mark.parametrize("flag, value", [("env_id", "Alien"), ("samples", 10)])
def test_bad_flags(flag, value):
    with pytest.raises(ValueError, match=f"--{flag}".replace("_", "-")):
        linear_probe.Args(model="no.pth", **{flag: value})
