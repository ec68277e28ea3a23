"""DMC's captured update: what a CUDA graph needs of the code, on the CPU; its numbers with CUDA."""

import os
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import NoHostSync, stand_in_cuda
from test_dmc import BASE, add_step, fill

import plastic_drq_sac_dmc as dmc

METHODS = {"base": BASE, "plastic": {}}
ENV = SimpleNamespace(episode_steps=50, action_dim=3, frame_shape=(1, 16, 16))


def make(device="cpu", graphs=False, **flags):
    """Agent, replay, update() and act(), the same ones at each call, as graphs or not."""
    sizes = dict(image_size=16, batch_size=4, hidden_dim=16, latent_dim=8, buffer_size=200)
    args = dmc.Args(env_id="cartpole-swingup", device=device, cuda_graph=graphs, **sizes, **flags)
    generators = dmc.make_generators(args)
    if graphs:
        args.device = "cuda"  # with stand-ins for CUDA's part, also where there is none
    agent, replay, update, act = dmc.make_agent(args, ENV, generators)
    fill(replay, 150)
    return agent, replay, update, act


def everything(agent, replay):
    return [*agent.tensors().values(), *replay.tensors().values()]


def trace(*args, **flags):
    """Losses, actions and in the end everything of 12 updates and steps, with a reset between."""
    agent, replay, update, act = make(*args, **flags)
    seen, rng = [], np.random.default_rng(1)
    for step in range(12):
        seen += [loss.clone() for loss in update().values()]
        add_step(replay, rng)
        seen.append(act().clone())
        if step == 5:
            torch.manual_seed(1)
            agent.reset()
    return seen + everything(agent, replay)


@pytest.mark.parametrize("method", METHODS)
def test_update_and_action_do_not_wait_and_everything_stays_where_it_is(method):
    agent, replay, update, act = make(**METHODS[method])

    def pointers():
        gradients = [w.grad for w in agent.weights]
        return [w.data_ptr() for w in [*everything(agent, replay), *gradients]]

    before = pointers()
    for _ in range(3):
        with NoHostSync():
            update()
            act()
        add_step(replay, np.random.default_rng(0))
        replay.start(np.ones((1, 16, 16), np.uint8))
        agent.reset()
    assert pointers() == before
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        agent.log_alpha.item()


@pytest.mark.parametrize("method", METHODS)
def test_a_capture_leaves_no_trace(monkeypatch, method):
    """With stand-ins for CUDA's part, warm-up and capture run for real, on an empty buffer."""
    stand_in_cuda(monkeypatch)
    results = []
    for graphs in (False, True):
        agent, replay, update, act = make(graphs=graphs, **METHODS[method])
        if graphs:  # of the warm-up: nothing is replayed
            assert set(update()) >= {"td_loss", "weight_norm"} and act().shape == (1, 3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            agent.update(replay.sample(4, generator))
        results.append(everything(agent, replay))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_each_update_reads_a_new_batch_and_each_action_the_newest_frames(monkeypatch):
    """As from the agent and the replay buffer themselves, without tensors that stay in place."""
    generators, results = [], []
    make_generators = dmc.make_generators
    spy = lambda args: generators.append(make_generators(args)) or generators[-1]  # noqa: E731
    monkeypatch.setattr(dmc, "make_generators", spy)
    for direct in (False, True):
        agent, replay, update, act = make()
        seen, rng, sampling = [], np.random.default_rng(1), generators[-1]["sampling"]
        for _ in range(4):
            losses = agent.update(replay.sample(4, sampling)) if direct else update()
            seen += [loss.clone() for loss in losses.values()]
            add_step(replay, rng)
            seen.append((agent.act(replay.last_obs()) if direct else act()).clone())
        results.append(seen + everything(agent, replay))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("replay_device", ["cuda", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_captured_and_eager_updates_give_the_same_numbers(method, replay_device):
    flags = dict(replay_device=replay_device) | METHODS[method]
    captured, eager = (trace("cuda", graphs, **flags) for graphs in (True, False))
    torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_eager_update_on_cuda_does_not_wait_either():
    _, _, update, _ = make("cuda")
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
