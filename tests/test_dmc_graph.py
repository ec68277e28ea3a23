"""DMC's captured update: what a CUDA graph needs of the code, checked on the CPU; its numbers, where there is CUDA."""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import plastic_drq_sac_dmc as dmc

METHODS = {"base": dict(layer_norm=False, crelu=False, sam_rho=0.0), "plastic": {}}


def make(device="cpu", replay_device=None, **flags):
    """An agent and a filled buffer, the same ones at each call."""
    flags = (
        dict(env_id="cartpole-swingup", image_size=16, batch_size=4, hidden_dim=16, latent_dim=8)
        | flags
    )
    args = dmc.resolve(dmc.Args(device=device, total_timesteps=4000, **flags))
    torch.manual_seed(0)
    agent = dmc.Agent(3, args, torch.Generator(device).manual_seed(0))
    replay = dmc.ReplayBuffer(
        200, 50, (1, 16, 16), 3, args.frame_stack, torch.device(replay_device or device)
    )
    rng = np.random.default_rng(0)
    replay.start(rng.integers(256, size=(1, 16, 16), dtype=np.uint8))
    for _ in range(150):
        add(replay, rng)
    return agent, replay


def add(replay, rng):
    action = rng.uniform(-1, 1, 3).astype(np.float32)
    frame = rng.integers(256, size=(1, 16, 16), dtype=np.uint8)
    replay.add(action, float(rng.normal()), bool(rng.random() < 0.05), frame)


def sampler(agent, replay):
    """As in train(): a batch on the agent's device, from a generator of its own."""
    generator = torch.Generator(replay.valid.device).manual_seed(1)
    device = agent.generator.device
    return lambda: dmc.Batch(
        *(entry.to(device) for entry in replay.sample(agent.args.batch_size, generator))
    )


def everything(agent, replay):
    return [*agent.tensors().values(), *replay.tensors().values()]


@pytest.mark.parametrize("method", METHODS)
def test_everything_stays_where_it_is_through_updates_steps_and_resets(method):
    agent, replay = make(**METHODS[method])
    backups = [*agent.before, *(w for group in agent.sam_backup.values() for w in group)]
    pointers = [tensor.data_ptr() for tensor in [*everything(agent, replay), *backups]]
    for seed in range(3):
        agent.update(replay.sample(4, torch.Generator().manual_seed(seed)))
        add(replay, np.random.default_rng(0))
        replay.start(np.ones((1, 16, 16), np.uint8))
        agent.act(replay.newest())
        agent.reset()
    assert [tensor.data_ptr() for tensor in [*everything(agent, replay), *backups]] == pointers


class NoHostSync(TorchDispatchMode):
    """Fails on the operations that would make the host wait for a GPU."""

    WAITING = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.masked_select",
        "aten.is_nonzero",
        "aten.equal",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_sampling_update_and_action_do_not_wait_for_the_device(method):
    agent, replay = make(**METHODS[method])
    generator = torch.Generator().manual_seed(0)
    with NoHostSync():
        agent.update(replay.sample(4, generator))
        agent.act(replay.newest())
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        agent.counts[0].item()


class StandInGraph:
    """Takes the place of torch.cuda.CUDAGraph where there is no CUDA."""

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        pass


class StandInStream:
    def wait_stream(self, stream):
        pass


@pytest.fixture
def stand_in_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "current_stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("updates_before", [0, 2])
def test_a_capture_leaves_no_trace(stand_in_cuda, method, updates_before):
    """With stand-ins for CUDA's part, warm-up and capture run for real: afterwards, training goes on as if not."""
    results = []
    for captured in (False, True):
        agent, replay = make(**METHODS[method])
        next_batch = sampler(agent, replay)
        for _ in range(updates_before):
            agent.update(next_batch())
        before = [tensor.clone() for tensor in everything(agent, replay)]
        if captured:
            # A batch is drawn for the warm-up; which one must not matter to what follows but for the generator's turn.
            update, act = dmc.capture_all(agent, sampler(agent, replay), replay)
            assert update().shape == (5,) and act().shape == (1, 3)
        assert all(
            torch.equal(a, b) for a, b in zip(before, everything(agent, replay), strict=True)
        )
        for _ in range(3):
            agent.update(next_batch())
        results.append(everything(agent, replay))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_captured_update_gets_a_new_batch_and_a_captured_action_the_newest_frames(
    stand_in_cuda, monkeypatch
):
    """What the graphs read, at each call: on the CPU, with a capture that runs the function each time."""
    monkeypatch.setattr(dmc, "capture", lambda function, tensors, generators: function)
    (agent, replay), (other, other_replay) = make(), make()
    next_batch = sampler(other, other_replay)
    update, act = dmc.capture_all(agent, sampler(agent, replay), replay)
    next_batch()  # the one that gave the shapes
    rng, other_rng = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(3):
        assert torch.equal(update(), other.update(next_batch()))
        add(replay, rng)
        add(other_replay, other_rng)
        assert torch.equal(act(), other.act(other_replay.newest()))
    for a, b in zip(everything(agent, replay), everything(other, other_replay), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("replay_device", ["cuda", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_captured_and_eager_updates_give_the_same_numbers(method, replay_device):
    results = []
    for captured in (False, True):
        agent, replay = make("cuda", replay_device, **METHODS[method])
        next_batch, rng = sampler(agent, replay), np.random.default_rng(2)
        if captured:
            update, act = dmc.capture_all(agent, next_batch, replay)
        else:
            next_batch()
            update = lambda agent=agent, next_batch=next_batch: agent.update(next_batch())  # noqa: E731
            act = lambda agent=agent, replay=replay: agent.act(replay.newest().to("cuda"))  # noqa: E731
        trace = []
        for step in range(12):
            trace += [update().clone(), act().clone()]
            add(replay, rng)
            if step == 5:
                torch.manual_seed(1)
                agent.reset()
        results.append(trace + everything(agent, replay))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_eager_update_on_cuda_does_not_wait_either():
    agent, replay = make("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    agent.update(replay.sample(4, generator))
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(replay.sample(4, generator))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_update_skips_a_gradient_that_is_not_finite():
    agent, replay = make("cuda")
    update, _ = dmc.capture_all(agent, sampler(agent, replay), replay)
    update()
    rewards, before = (
        replay.rewards.clone(),
        {name: w.clone() for name, w in agent.learned().items()},
    )
    replay.rewards.fill_(torch.nan)
    update()
    assert agent.counts.tolist() == [2, 1, 1, 1]
    assert all(torch.equal(w, before[name]) for name, w in agent.learned().items())
    replay.rewards.copy_(rewards)
    update()
    assert agent.counts.tolist() == [3, 1, 0, 1]
