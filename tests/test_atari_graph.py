"""The captured update: what a CUDA graph needs of the code, checked on the CPU; its numbers, where there is CUDA.

Of plastic_drq_rainbow_atari.py, and of the same update on a pretrained encoder.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import plastic_drq_rainbow_atari as atari
import plastic_pretrained_finetune as finetune

METHODS = {
    "base": dict(layer_norm=False, crelu=False, sam_rho=0.0),
    "dagger": dict(crelu=False, sam_rho=0.0),
    "plastic": {},
    "frozen": dict(freeze_backbone=True),
    "frozen, SAM": dict(freeze_backbone=True, sam_rho=0.1, shrink_perturb_anchor="pretrained"),
    "not frozen": dict(freeze_backbone=False, sam_rho=0.1),
}


def make(device="cpu", **flags):
    """An agent and a filled buffer, the same ones at each call."""
    sizes = dict(
        device=device,
        hidden_dim=16,
        n_atoms=11,
        batch_size=4,
        buffer_size=300,
        shrink_perturb_alpha=0.6,
    )
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    if "freeze_backbone" in flags:
        args = finetune.resolve(finetune.Args(from_scratch=True, **sizes, **flags))
        agent = finetune.Agent(finetune.Backbone(), 3, 100, args, generator)
    else:
        args = atari.resolve(atari.Args(**sizes, **flags))
        agent = atari.Agent(3, 100, args, generator)
    replay = atari.ReplayBuffer(args.buffer_size, args.n_step, args.gamma, torch.device(device))
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(401, 84, 84), dtype=np.uint8)
    replay.start(frames[0])
    for frame in frames[1:]:
        replay.add(
            int(rng.integers(3)), float(rng.integers(-1, 2)), bool(rng.random() < 0.05), frame
        )
    return agent, replay


def everything(agent, replay):
    return [*agent.tensors().values(), replay.priorities, replay.max_priority]


def captured_update(agent, replay):
    return atari.capture(
        lambda: agent.update(replay), everything(agent, replay), (agent.generator,)
    )


def captured_act(agent, replay):
    return atari.capture(
        lambda: agent.act(replay.newest()), everything(agent, replay), (agent.generator,)
    )


def pointers(agent, replay):
    tensors = [
        *everything(agent, replay),
        replay.frames,
        replay.actions,
        replay.rewards,
        replay.ends,
    ]
    tensors += [replay.newest_slot, replay.gammas, agent.optimizer.found_inf, *agent.sam_backup]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("method", METHODS)
def test_everything_stays_where_it_is_through_updates_steps_and_resets(method):
    agent, replay = make(**METHODS[method])
    before = pointers(agent, replay)
    for _ in range(3):
        agent.update(replay)
        replay.add(0, 1.0, False, np.ones((84, 84), np.uint8))
        agent.act(replay.newest())
        agent.reset()
    assert pointers(agent, replay) == before


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
def test_the_update_does_not_wait_for_the_device(method):
    agent, replay = make(**METHODS[method])
    with NoHostSync():
        agent.update(replay)
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
        for _ in range(updates_before):
            agent.update(replay)
        before = [tensor.clone() for tensor in everything(agent, replay)]
        if captured:
            output = atari.capture(
                lambda agent=agent, replay=replay: agent.update(replay),
                everything(agent, replay),
                (agent.generator,),
            )()
            assert output.shape == (3,)
        assert all(
            torch.equal(a, b) for a, b in zip(before, everything(agent, replay), strict=True)
        )
        for _ in range(3):
            agent.update(replay)
        results.append(everything(agent, replay))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_captured_and_eager_updates_give_the_same_numbers(method):
    results = []
    for captured in (False, True):
        agent, replay = make("cuda", **METHODS[method])
        update = (
            atari.capture(
                lambda a=agent, r=replay: a.update(r), everything(agent, replay), (agent.generator,)
            )
            if captured
            else None
        )
        act = (
            atari.capture(
                lambda a=agent, r=replay: a.act(r.newest()),
                everything(agent, replay),
                (agent.generator,),
            )
            if captured
            else None
        )
        trace = []
        for step in range(12):
            trace.append((update() if captured else agent.update(replay)).clone())
            trace.append((act() if captured else agent.act(replay.newest())).clone())
            replay.add(step % 3, 1.0, step == 7, np.full((84, 84), step, np.uint8))
            if step == 5:
                torch.cuda.manual_seed(1)
                agent.reset()
        results.append(trace + everything(agent, replay))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_eager_update_on_cuda_does_not_wait_either():
    agent, replay = make("cuda")
    agent.update(replay)
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(replay)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_update_skips_a_non_finite_gradient():
    agent, replay = make("cuda")
    update = captured_update(agent, replay)
    update()
    rewards, before = (
        replay.rewards.clone(),
        [tensor.clone() for tensor in everything(agent, replay)],
    )
    replay.rewards.fill_(torch.nan)
    update()
    assert agent.counts.tolist() == [2, 1, 1, 1]
    learned = [
        agent.optimizer.state[w][name]
        for w in agent.parameters
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert all(
        bool(tensor.isfinite().all()) for tensor in [*agent.parameters, *learned, replay.priorities]
    )
    pairs = zip(before, everything(agent, replay), strict=True)
    moved = sum(not torch.equal(a, b) for a, b in pairs)
    assert moved == 1 + 2 * 8  # the counts, and the noise of the eight noisy layers
    replay.rewards.copy_(rewards)
    update()
    assert agent.counts.tolist() == [3, 1, 0, 1]
