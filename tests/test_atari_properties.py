"""Properties of replay, prioritised sampling and projection for any input (hypothesis), against slow references."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plastic_drq_rainbow_atari as atari

LIMITS = settings(max_examples=60, deadline=None, derandomize=True)
CPU = torch.device("cpu")


def picture(value):
    return np.full((84, 84), value, np.uint8)


# What happens in one interaction: the sign of the reward, and whether a life ends, or the process is cut off after it.
EVENTS = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.sampled_from(["", "", "", "end", "cut"])),
    min_size=1,
    max_size=60,
)


@LIMITS
@given(EVENTS, st.integers(1, 5), st.integers(6, 30), st.sampled_from([0.0, 0.5, 1.0]))
def test_replay_against_a_list_of_all_transitions(events, n, capacity, gamma):
    """Whatever happens, what can be sampled is what is complete and recent, and gather() gives its very numbers."""
    replay = atari.ReplayBuffer(capacity, n, gamma, CPU)
    replay.start(picture(1))
    lives, newest = [], 1  # lives: (first slot, frames, rewards, whether it came to its end)
    first, frames, rewards = 0, [newest], []
    for reward, event in events:
        newest = newest % 250 + 1
        replay.add(0, reward, event == "end", picture(newest))
        frames.append(newest)
        rewards.append(reward)
        if event:
            lives.append((first, frames, rewards, event == "end"))
            first += len(rewards)
            if event == "cut":  # takes a slot for the frame that nobody acted on
                newest = newest % 250 + 1
                replay.start(picture(newest))
                first += 1
            frames, rewards = [newest], []
    lives.append((first, frames, rewards, False))
    cursor = first + len(rewards)

    expected = {}
    for first, frames, rewards, ended in lives:
        for t in range(len(rewards)):
            complete = ended or t + n <= len(rewards)
            if complete and first + t >= cursor - capacity:
                window = rewards[t : t + n]
                alive = t + n <= len(rewards) - ended
                stack = [frames[i] if i >= 0 else 0 for i in range(t - 3, t + 1)]
                next_stack = (
                    [frames[i] if i >= 0 else 0 for i in range(t + n - 3, t + n + 1)]
                    if alive
                    else None
                )
                n_step_return = sum(gamma**k * r for k, r in enumerate(window))
                expected[(first + t) % replay.slots] = (
                    n_step_return,
                    gamma**n * alive,
                    stack,
                    next_stack,
                )
    assert set(replay.priorities.nonzero().flatten().tolist()) == set(expected)
    assert 0 <= replay.cursor == cursor % replay.slots == replay.cursor_tensor.item()
    if expected:
        index = torch.tensor(list(expected))
        batch = replay.gather(index)
        for i, (n_step_return, discount, stack, next_stack) in enumerate(expected.values()):
            assert batch.n_step_return[i].item() == n_step_return
            assert batch.discount[i].item() == discount
            assert batch.obs[i, :, 3, 5].tolist() == stack
            assert next_stack is None or batch.next_obs[i, :, 5, 3].tolist() == next_stack


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
    """Stratified: each is drawn as often as its share says, but for one at either border. Weights by their formula."""
    replay = atari.ReplayBuffer(len(priorities), 1, 0.9, CPU)
    replay.priorities[: len(priorities)] = torch.tensor(priorities)
    batch, weights = replay.sample(
        batch_size, torch.tensor(beta), torch.Generator().manual_seed(seed)
    )
    counts = np.bincount(batch.index.numpy(), minlength=len(priorities))[: len(priorities)]
    share = np.array(priorities, dtype=np.float64) / np.sum(priorities)
    assert counts.sum() == batch_size
    assert np.all(counts[share == 0] == 0)
    assert np.all(np.abs(counts - batch_size * share) < 2 + 1e-6)
    formula = (1 / (len(priorities) * share[batch.index])) ** beta
    np.testing.assert_allclose(weights, formula / formula.max(), rtol=1e-4)
    assert weights.max() == 1


@LIMITS
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8),
    st.integers(2, 60),
    st.integers(0, 2**31),
)
def test_projection_is_a_distribution_with_the_right_mean_and_that_of_a_loop(
    returns, num_atoms, seed
):
    rng = np.random.default_rng(seed)
    support = torch.linspace(-10, 10, num_atoms)
    probs = rng.dirichlet(np.full(num_atoms, 0.3), size=len(returns))
    discount = rng.choice([0.0, 0.9, 1.0], size=len(returns))
    projected = atari.project(
        torch.tensor(probs, dtype=torch.float32),
        torch.tensor(returns),
        torch.tensor(discount, dtype=torch.float32),
        support,
    ).numpy()
    expected, mean = np.zeros_like(probs), np.zeros(len(returns))
    delta = 20 / (num_atoms - 1)
    for b, reward in enumerate(returns):
        for p, z in zip(probs[b], support.double().numpy(), strict=True):
            atom = min(max(reward + discount[b] * z, -10), 10)
            mean[b] += p * atom
            position = (atom + 10) / delta
            low = min(int(position), num_atoms - 2)
            expected[b, low] += p * (low + 1 - position)
            expected[b, low + 1] += p * (position - low)
    np.testing.assert_allclose(projected, expected, atol=2e-5)
    np.testing.assert_allclose(projected.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(projected @ support.numpy(), mean, atol=2e-4)
    assert (projected >= 0).all()


@LIMITS
@given(st.lists(st.floats(2.0**-26, 1e6, width=32), min_size=1, max_size=20), st.integers(0, 2**31))
def test_updated_priorities_are_those_given_and_new_transitions_get_the_largest_ever(
    priorities, seed
):
    replay = atari.ReplayBuffer(50, 1, 0.9, CPU)
    replay.start(picture(0))
    for _ in range(30):
        replay.add(0, 0.0, False, picture(0))
    index = torch.from_numpy(np.random.default_rng(seed).permutation(30)[: len(priorities)])
    replay.update_priorities(index, torch.tensor(priorities))
    assert torch.equal(replay.priorities[index], torch.tensor(priorities))
    replay.update_priorities(index, torch.full_like(replay.priorities[index], 1e-8))
    replay.add(0, 0.0, False, picture(0))
    assert replay.priorities[30] == max(1.0, *torch.tensor(priorities).tolist())
