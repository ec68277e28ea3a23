"""Replay and augmentation against a brute-force simulator, exact probabilities and hand-computed values."""

import numpy as np
import pytest
import torch

import plastic_drq_rainbow_atari as atari

CPU = torch.device("cpu")


def fill(replay, num_steps, seed, end_probability=0.08):
    """A random stream of frames, actions, rewards and ends, put into the buffer; returns the stream."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(1, 256, size=(num_steps + 1, 84, 84), dtype=np.uint8)
    actions = rng.integers(6, size=num_steps)
    rewards = rng.integers(-1, 2, size=num_steps).astype(float)
    ends = rng.random(num_steps) < end_probability
    replay.start(frames[0])
    for t in range(num_steps):
        replay.add(int(actions[t]), float(rewards[t]), bool(ends[t]), frames[t + 1])
    return frames, actions, rewards, ends


def slow_stack(frames, ends, t):
    """The frames t-3 .. t, zeros from before the life that holds t."""
    stack = np.zeros((4, 84, 84), dtype=np.uint8)
    for k in range(4):
        if t - k < 0 or any(ends[t - j] for j in range(1, k + 1)):
            break
        stack[3 - k] = frames[t - k]
    return stack


def slow_transition(stream, t, n_step, gamma):
    """(obs, action, return, discount, next_obs) from step t, one step at a time; None if not complete yet."""
    frames, actions, rewards, ends = stream
    total = 0.0
    for k in range(n_step):
        if t + k >= len(actions):
            return None
        total += gamma**k * rewards[t + k]
        if ends[t + k]:
            return slow_stack(frames, ends, t), actions[t], total, 0.0, None
    return (
        slow_stack(frames, ends, t),
        actions[t],
        total,
        gamma**n_step,
        slow_stack(frames, ends, t + n_step),
    )


@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("num_steps", [5, 39, 40, 41, 97, 333])
def test_transitions_equal_a_brute_force_simulation(n_step, num_steps):
    """Ends stand for lost lives, game over and time limit alike; 40 slots wrap around up to eight times."""
    capacity, gamma = 40, 0.9
    replay = atari.ReplayBuffer(capacity, n_step, gamma, CPU)
    stream = fill(replay, num_steps, seed=num_steps)
    sampleable = {}
    for t in range(max(0, num_steps - capacity), num_steps):
        expected = slow_transition(stream, t, n_step, gamma)
        if expected is not None:
            sampleable[t % replay.slots] = expected
    assert set(torch.nonzero(replay.priorities).flatten().tolist()) == set(sampleable)
    assert len(sampleable) > 0 or num_steps <= n_step
    if sampleable:
        batch = replay.gather(torch.tensor(sorted(sampleable)))
        for row, slot in enumerate(sorted(sampleable)):
            obs, action, n_step_return, discount, next_obs = sampleable[slot]
            np.testing.assert_array_equal(batch.obs[row], obs)
            assert batch.action[row] == action
            np.testing.assert_allclose(batch.n_step_return[row], n_step_return, atol=1e-5)
            np.testing.assert_allclose(batch.discount[row], discount, atol=1e-6)
            if next_obs is not None:
                np.testing.assert_array_equal(batch.next_obs[row], next_obs)
    np.testing.assert_array_equal(replay.last_obs()[0], slow_stack(stream[0], stream[3], num_steps))


def test_the_whole_run_fits_and_the_oldest_leaves_first():
    replay = atari.ReplayBuffer(30, 3, 0.99, CPU)
    fill(replay, 30, seed=0, end_probability=0.0)
    assert (
        replay.priorities > 0
    ).sum() == 28  # all but the two whose next observation is still to come
    replay.add(0, 0.0, False, np.zeros((84, 84), np.uint8))
    assert replay.priorities[0] == 0
    assert replay.priorities[1] > 0


def test_episode_tails_are_stored():
    replay = atari.ReplayBuffer(30, 10, 0.5, CPU)
    frame = np.zeros((84, 84), np.uint8)
    replay.start(frame)
    for t in range(4):  # a life of 4 steps, shorter than n
        replay.add(0, 1.0, t == 3, frame)
    batch = replay.gather(torch.arange(4))
    assert torch.all(replay.priorities[:4] > 0)
    assert batch.n_step_return.tolist() == [1.875, 1.75, 1.5, 1.0]
    assert batch.discount.tolist() == [0.0] * 4


def test_sampling_frequencies_are_the_priorities():
    replay = atari.ReplayBuffer(64, 1, 0.99, CPU)
    fill(replay, 64, seed=1)
    index = torch.nonzero(replay.priorities).flatten()
    priorities = torch.rand(len(index), generator=torch.Generator().manual_seed(0)) ** 2 + 0.01
    replay.update_priorities(index, priorities)
    generator = torch.Generator().manual_seed(2)
    draws = torch.cat(
        [replay.sample(8, torch.tensor(1.0), generator)[0].index for _ in range(4000)]
    )
    observed = torch.bincount(draws, minlength=replay.slots)
    assert observed.sum() == observed[index].sum()  # never a slot without priority
    expected = priorities.double() / priorities.double().sum() * len(draws)
    chi_square = float(((observed[index] - expected) ** 2 / expected).sum())
    # 99.9th percentile of chi-square with 63 degrees of freedom; stratification only lowers the statistic.
    assert len(index) == 64
    assert chi_square < 103.4


def test_sampling_is_stratified():
    replay = atari.ReplayBuffer(16, 1, 0.99, CPU)
    fill(replay, 16, seed=1)  # 16 equal priorities, 16 strata: one draw each
    batch, _ = replay.sample(16, torch.tensor(0.5), torch.Generator().manual_seed(0))
    assert batch.index.tolist() == torch.nonzero(replay.priorities).flatten().tolist()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_on_sampleable_slots(draw, monkeypatch):
    replay = atari.ReplayBuffer(1000, 5, 0.99, CPU)
    fill(replay, 300, seed=3)
    index = torch.nonzero(replay.priorities).flatten()
    replay.update_priorities(
        index, torch.rand(len(index), generator=torch.Generator().manual_seed(0))
    )
    replay.priorities[:3] = 0  # as after a wrap-around: a draw of 0 must not land on them
    monkeypatch.setattr(
        torch, "rand", lambda size, **_: torch.full((size,), draw, dtype=torch.float32)
    )
    batch, weights = replay.sample(32, torch.tensor(0.4), torch.Generator())
    assert torch.all(replay.priorities[batch.index] > 0)
    assert torch.all(weights.isfinite())


def test_importance_weights_by_hand():
    replay = atari.ReplayBuffer(4, 1, 0.99, CPU)
    fill(replay, 4, seed=0)
    replay.update_priorities(torch.arange(4), torch.tensor([1.0, 2.0, 1.0, 4.0]))
    batch, weights = replay.sample(8, torch.tensor(0.4), torch.Generator().manual_seed(0))
    # p = 1/8, 2/8, 1/8, 4/8 and N = 4, so (1 / (N p)) ** 0.4 = 2 ** 0.4, 1, 2 ** 0.4, 0.5 ** 0.4.
    by_slot = {0: 2**0.4, 1: 1.0, 2: 2**0.4, 3: 0.5**0.4}
    by_hand = np.array([by_slot[i] for i in batch.index.tolist()])
    np.testing.assert_allclose(weights, by_hand / by_hand.max(), rtol=1e-6)
    assert len(set(batch.index.tolist())) == 4


def test_new_transitions_get_the_running_maximum():
    replay = atari.ReplayBuffer(20, 1, 0.99, CPU)
    frame = np.zeros((84, 84), np.uint8)
    replay.start(frame)
    replay.add(0, 0.0, False, frame)
    assert replay.priorities[0] == 1
    replay.update_priorities(torch.tensor([0]), torch.tensor([3.0]))
    replay.update_priorities(torch.tensor([0]), torch.tensor([0.5]))  # the maximum stays
    replay.add(0, 0.0, False, frame)
    assert replay.priorities[:2].tolist() == [0.5, 3.0]


def test_uniform_sampling_ignores_priorities_and_reaches_every_transition():
    replay = atari.ReplayBuffer(50, 3, 0.99, CPU)
    fill(replay, 50, seed=0)
    index = torch.nonzero(replay.priorities).flatten()
    replay.update_priorities(index, torch.linspace(0.001, 100, len(index)))
    draws = replay.sample_uniform(20_000, torch.Generator().manual_seed(0)).index
    observed = torch.bincount(draws, minlength=replay.slots)
    assert set(torch.nonzero(observed).flatten().tolist()) == set(index.tolist())
    expected = len(draws) / len(index)
    assert (
        float(((observed[index] - expected) ** 2 / expected).sum()) < 90
    )  # 47 degrees of freedom, 99.98%


def test_shift_equals_padding_and_cropping():
    obs = torch.randint(
        0, 256, (64, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = atari.augment(obs, 4, 0.0, torch.Generator().manual_seed(1))
    padded = np.pad(obs.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    found = set()
    for b in range(64):
        crops = {(y, x): padded[b, :, y : y + 84, x : x + 84] for y in range(9) for x in range(9)}
        actual = (images[b] * 255).round().to(torch.uint8).numpy()
        matches = [offset for offset, crop in crops.items() if np.array_equal(crop, actual)]
        assert len(matches) == 1  # the same offset for the four frames
        found.add(matches[0])
    assert len(found) > 30
    assert {y for y, _ in found} == {x for _, x in found} == set(range(9))


def test_intensity_is_one_clipped_gaussian_factor_per_sample():
    obs = torch.full((4000, 4, 2, 2), 255, dtype=torch.uint8)
    factors = atari.augment(obs, 0, 0.05, torch.Generator().manual_seed(0))
    assert torch.all(factors == factors[:, :1, :1, :1])
    z = (factors[:, 0, 0, 0] - 1) / 0.05
    assert z.abs().max() < 2 + 1e-4
    assert (
        abs((z.abs() > 1.9999).float().mean() - 0.0455) < 0.012
    )  # the mass beyond two sigma, clipped
    assert abs((z.abs() < 1).float().mean() - 0.6827) < 0.025


def test_augmentation_off_changes_nothing_and_draws_nothing():
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(atari.augment(obs, 0, 0.0, generator), obs.float() / 255)
    assert torch.equal(generator.get_state(), before)
