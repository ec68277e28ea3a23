"""Replay and augmentation against slow references, exact probabilities and hand-computed values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plastic_drq_rainbow_atari as atari

LIMITS = settings(max_examples=60, deadline=None, derandomize=True)
FRAMES = np.random.default_rng(0).integers(1, 256, size=(130, 84, 84), dtype=np.uint8)
FRAMES[0] = 0  # what is seen before a life's first frame


def make_replay(capacity, n_step=1, gamma=0.99):
    return atari.ReplayBuffer(capacity, n_step, gamma, torch.device("cpu"))


def make_full(capacity):
    """One-step transitions and no ends; with indices in place of transitions, which take long."""
    replay = make_replay(capacity)
    replay.start(FRAMES[0])
    for _ in range(capacity):
        replay.add(0, 0.0, False, FRAMES[0])
    replay.gather = lambda index: index
    return replay


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Transitions ----------------------------------------------------------------------------------

# What happens in one interaction: the sign of the reward, and whether a life ends, or the process
# is cut off after it.
EVENTS = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.sampled_from(["", "", "", "end", "cut"])),
    min_size=1,
    max_size=60,
)


@LIMITS
@given(EVENTS, st.integers(1, 5), st.integers(6, 30), st.sampled_from([0.0, 0.5, 1.0]))
def test_replay_against_a_list_of_all_transitions(events, n, capacity, gamma):
    """What can be sampled is what is complete and recent, and gather() gives its very numbers."""
    replay = make_replay(capacity, n, gamma)
    replay.start(FRAMES[1])
    newest = 1  # frames are told by their numbers
    lives, life = [], (0, [newest], [], [])  # first slot, frames, rewards, whether it has ended
    for reward, event in events:
        first, frames, rewards, ended = life
        newest += 1
        replay.add(newest % 6, reward, event == "end", FRAMES[newest])
        frames.append(newest)
        rewards.append(reward)
        if event:
            ended.append(event == "end")
            lives.append(life)
            first += len(rewards)
            if event == "cut":  # takes a slot for the frame that nobody acted on
                newest += 1
                replay.start(FRAMES[newest])
                first += 1
            life = (first, [newest], [], [])
    lives.append(life)
    cursor = life[0] + len(life[2])

    def stack(frames, t):
        return FRAMES[[frames[i] if i >= 0 else 0 for i in range(t - 3, t + 1)]]

    expected = {}
    for first, frames, rewards, ended in lives:
        for t in range(len(rewards)):
            complete = any(ended) or t + n <= len(rewards)
            if complete and first + t >= cursor - capacity:
                alive = t + n <= len(rewards) - any(ended)
                expected[(first + t) % replay.num_slots] = (
                    stack(frames, t),
                    frames[t + 1] % 6,
                    sum(gamma**k * r for k, r in enumerate(rewards[t : t + n])),
                    gamma**n * alive,
                    stack(frames, t + n) if alive else None,
                )
    assert set(replay.priorities.nonzero().flatten().tolist()) == set(expected)
    assert 0 <= replay.cursor == cursor % replay.num_slots == replay.cursor_tensor.item()
    np.testing.assert_array_equal(replay.last_obs()[0], stack(life[1], len(life[2])))
    batch = replay.gather(torch.tensor(list(expected), dtype=torch.int64))
    for i, (obs, action, n_step_return, discount, next_obs) in enumerate(expected.values()):
        np.testing.assert_array_equal(batch.obs[i], obs)
        assert batch.action[i] == action
        assert batch.n_step_return[i] == n_step_return
        assert batch.discount[i] == discount
        if next_obs is not None:
            np.testing.assert_array_equal(batch.next_obs[i], next_obs)


# --- Sampling -------------------------------------------------------------------------------------


@LIMITS
@given(
    st.lists(
        st.one_of(st.just(0.0), st.floats(2.0**-26, 1e4, width=32)), min_size=1, max_size=40
    ).filter(any),
    st.integers(1, 64),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_prioritised_sampling_gives_each_transition_its_share(priorities, batch_size, beta, seed):
    """Stratified: each is drawn as often as its share says, but for one at either border."""
    replay = make_full(len(priorities))
    replay.priorities[: len(priorities)] = torch.tensor(priorities)
    index, weights = replay.sample(batch_size, torch.tensor(beta), seeded(seed))
    counts = np.bincount(index, minlength=len(priorities))
    share = np.array(priorities, dtype=np.float64) / np.sum(priorities)
    assert counts.sum() == batch_size
    assert np.all(counts[share == 0] == 0)
    assert np.all(np.abs(counts - batch_size * share) < 2 + 1e-6)
    formula = (1 / (len(priorities) * share[index])) ** beta
    np.testing.assert_allclose(weights, formula / formula.max(), rtol=1e-4)


def assert_drawn(draws, probabilities):
    """By a chi-square test; the limit is the 99.9th percentile for 63 degrees of freedom."""
    expected = probabilities.double() / probabilities.double().sum() * len(draws)
    observed = torch.bincount(draws, minlength=len(probabilities))
    assert observed[probabilities == 0].sum() == 0
    assert (((observed - expected) ** 2 / expected)[probabilities > 0]).sum() < 103.4


def test_draws_are_by_priority_or_uniform():
    replay, generator = make_full(64), seeded()
    replay.update_priorities(torch.arange(64), torch.rand(64, generator=seeded()) ** 2 + 0.01)
    draws = [replay.sample(8, torch.tensor(1.0), generator)[0] for _ in range(4000)]
    assert_drawn(torch.cat(draws), replay.priorities)
    assert_drawn(replay.sample_uniform(20_000, generator), (replay.priorities > 0).float())


def test_each_stratum_has_a_draw_of_its_own():
    """64 strata of 100 equal slots: one draw in each, at places that differ."""
    replay = make_full(6400)
    index, _ = replay.sample(64, torch.tensor(1.0), seeded())
    assert (index // 100).tolist() == list(range(64))
    assert len(set((index % 100).tolist())) > 30  # 47 are expected, of 64


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_on_sampleable_slots(draw, monkeypatch):
    replay = make_full(300)
    replay.priorities[:3] = 0  # as after a wrap-around: a draw of 0 must not land on them
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full((size,), draw))
    index, weights = replay.sample(32, torch.tensor(0.4), seeded())
    assert (replay.priorities[index] > 0).all() and weights.isfinite().all()


def test_priorities_that_are_not_finite_lead_to_no_slot_beyond_the_buffer():
    replay = make_full(50)
    replay.priorities[5:9] = math.nan
    index, weights = replay.sample(8, torch.tensor(0.5), seeded())
    assert index.max() < replay.num_slots
    assert not weights.isfinite().all()


def test_new_transitions_get_the_running_maximum():
    replay = make_full(2)
    assert replay.priorities[:2].tolist() == [1, 1]
    replay.update_priorities(torch.tensor([1, 0]), torch.tensor([3.0, 2.0]))
    replay.update_priorities(torch.tensor([1]), torch.tensor([0.5]))  # the maximum stays
    assert replay.priorities[:2].tolist() == [2.0, 0.5]
    replay.add(0, 0.0, False, FRAMES[0])
    assert replay.priorities[1:3].tolist() == [0.5, 3.0]


# --- Augmentation ---------------------------------------------------------------------------------


def test_shift_equals_padding_and_cropping():
    obs = torch.from_numpy(FRAMES[:128].reshape(32, 4, 84, 84)).repeat(2, 1, 1, 1)
    images = (atari.augment(obs, 4, 0.0, seeded()) * 255).round().to(torch.uint8).numpy()
    padded = np.pad(obs, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    found = []
    for image, large in zip(images, padded, strict=True):
        offsets = [(y, x) for y in range(9) for x in range(9)]
        crops = [large[:, y : y + 84, x : x + 84] for y, x in offsets]
        (match,) = [i for i, crop in enumerate(crops) if np.array_equal(crop, image)]
        found.append(offsets[match])  # the same one for the four frames
    assert len(set(found)) > 30
    assert {y for y, _ in found} == {x for _, x in found} == set(range(9))


def test_intensity_is_one_clipped_gaussian_factor_per_sample():
    obs = torch.full((4000, 4, 2, 2), 255, dtype=torch.uint8)
    factors = atari.augment(obs, 0, 0.05, seeded())
    assert torch.all(factors == factors[:, :1, :1, :1])
    z = (factors[:, 0, 0, 0] - 1).abs() / 0.05
    assert z.max() < 2 + 1e-4
    # The mass beyond two sigma, which is clipped, and that within one.
    assert (z > 1.9999).float().mean() == pytest.approx(0.0455, abs=0.012)
    assert (z < 1).float().mean() == pytest.approx(0.6827, abs=0.025)


def test_augmentation_off_changes_nothing_and_draws_nothing():
    obs, generator = torch.from_numpy(FRAMES[:8].reshape(2, 4, 84, 84)), seeded()
    assert torch.equal(atari.augment(obs, 0, 0.0, generator), obs.float() / 255)
    assert torch.equal(generator.get_state(), seeded().get_state())
