"""DMC's captured update: what a CUDA graph needs of the code, on the CPU; its numbers with CUDA."""

import contextlib
import os
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import plastic_drq_sac_dmc as dmc

METHODS = {"base": dict(layer_norm=False, crelu=False, sam_rho=0.0), "plastic": {}}
ENV = SimpleNamespace(episode_steps=50, action_dim=3, frame_shape=(1, 16, 16))


def make(device="cpu", graphs=False, replay_device="auto", **flags):
    """Agent and empty buffer, the same ones at each call; update() and act(), as graphs or not."""
    sizes = dict(image_size=16, batch_size=4, hidden_dim=16, latent_dim=8, buffer_size=200)
    flags = dict(env_id="cartpole-swingup", replay_device=replay_device) | sizes | flags
    args = dmc.Args(device=device, cuda_graph=graphs, **flags)
    generators = dmc.make_generators(args)
    if graphs:
        args.device = "cuda"  # with stand-ins for CUDA's part, also where there is none
    return dmc.make_agent(args, ENV, generators)


def add(replay, rng):
    action = rng.uniform(-1, 1, 3).astype(np.float32)
    frame = rng.integers(256, size=(1, 16, 16), dtype=np.uint8)
    replay.add(action, float(rng.normal()), bool(rng.random() < 0.05), frame)


def fill(replay):
    rng = np.random.default_rng(0)
    replay.start(rng.integers(256, size=(1, 16, 16), dtype=np.uint8))
    for _ in range(150):
        add(replay, rng)


def everything(agent, replay):
    return [*agent.tensors().values(), *replay.tensors().values()]


@pytest.mark.parametrize("method", METHODS)
def test_everything_stays_where_it_is_through_updates_steps_and_resets(method):
    agent, replay, update, act = make(**METHODS[method])
    fill(replay)

    def pointers():
        gradients = [w.grad for w in agent.weights]
        backups = [w for group in agent.sam_backup.values() for w in group]
        return [w.data_ptr() for w in [*everything(agent, replay), *gradients, *backups]]

    before = pointers()
    for _ in range(3):
        update()
        add(replay, np.random.default_rng(0))
        replay.start(np.ones((1, 16, 16), np.uint8))
        act()
        agent.reset()
    assert pointers() == before


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
    agent, replay, update, act = make(**METHODS[method])
    fill(replay)
    with NoHostSync():
        update()
        act()
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        agent.log_alpha.item()


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
def test_a_capture_leaves_no_trace(stand_in_cuda, method):
    """With stand-ins for CUDA's part, warm-up and capture run for real, on an empty buffer."""
    results = []
    for graphs in (False, True):
        agent, replay, update, act = make(graphs=graphs, **METHODS[method])
        fill(replay)
        if graphs:  # of the warm-up: nothing is replayed
            assert set(update()) >= {"td_loss", "weight_norm"} and act().shape == (1, 3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            agent.update(replay.sample(4, generator))
        results.append(everything(agent, replay))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_graphs_read_a_new_batch_and_the_newest_frames(monkeypatch):
    """With a capture that runs the function each time, updates and actions are those without."""
    monkeypatch.setattr(dmc, "capture", lambda function, tensors, generators: function)
    (agent, replay, update, act), (other, other_replay, *plain) = make(graphs=True), make()
    fill(replay)
    fill(other_replay)
    rng, other_rng = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(3):
        assert update() == plain[0]()
        add(replay, rng)
        add(other_replay, other_rng)
        assert torch.equal(act(), plain[1]())
    pairs = zip(everything(agent, replay), everything(other, other_replay), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("replay_device", ["cuda", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_captured_and_eager_updates_give_the_same_numbers(method, replay_device):
    results = []
    for graphs in (False, True):
        agent, replay, update, act = make("cuda", graphs, replay_device, **METHODS[method])
        fill(replay)
        trace, rng = [], np.random.default_rng(2)
        for step in range(12):
            trace += [*(loss.clone() for loss in update().values()), act().clone()]
            add(replay, rng)
            if step == 5:
                torch.manual_seed(1)
                agent.reset()
        results.append(trace + everything(agent, replay))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_eager_update_on_cuda_does_not_wait_either():
    _, replay, update, _ = make("cuda")
    fill(replay)
    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "visible, asked, rendering",
    [("3,1", None, "3"), ("3,1", "0", "0"), ("", None, None), ("GPU-8932", None, None)],
)
def test_frames_are_rendered_on_the_gpu_that_computes(monkeypatch, visible, asked, rendering):
    asked = {"MUJOCO_EGL_DEVICE_ID": asked} if asked else {}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible} | asked
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(dmc.Path, "exists", lambda path: True)  # every /dev/nvidia*
    runpy.run_path(dmc.__file__)
    assert environment.get("MUJOCO_EGL_DEVICE_ID") == rendering
