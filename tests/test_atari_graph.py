"""The captured update: what a CUDA graph needs of the code, on the CPU; its numbers, with CUDA.

Of plastic_drq_rainbow_atari.py, and of the same update on a pretrained encoder.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import NoHostSync, stand_in_cuda

import plastic_drq_rainbow_atari as atari
import plastic_pretrained_finetune as finetune

REPOSITORY = Path(__file__).parent.parent
METHODS = {
    "plastic": {},
    "frozen": dict(freeze_backbone=True, sam_rho=0.1, shrink_perturb_anchor="pretrained"),
    "not frozen": dict(freeze_backbone=False),
}
EACH_METHOD = pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def make(device="cpu", graphs=False, **flags):
    """Agent and empty buffer, the same at each call, with update() and act(), as graphs or not."""
    sizes = dict(hidden_dim=16, n_atoms=11, batch_size=4, buffer_size=300, shrink_perturb_alpha=0.6)
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    script = atari
    if "freeze_backbone" in flags:
        script, flags = finetune, flags | dict(from_scratch=True)
    args = script.Args(device=device, env_id="Pong", cuda_graph=graphs, **sizes, **flags)
    args.device = "cuda"  # with stand-ins for CUDA's part, also where there is none
    return script.make_agent(args, generator)


def fill(replay):
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(251, 84, 84), dtype=np.uint8)  # less than the buffer holds
    replay.start(frames[0])
    for frame in frames[1:]:
        action, reward, done = rng.integers(3), rng.integers(-1, 2), rng.random() < 0.05
        replay.add(int(action), float(reward), bool(done), frame)


def everything(agent, replay):
    return [*agent.tensors().values(), replay.priorities, replay.max_priority]


@EACH_METHOD
def test_everything_stays_where_it_is_through_updates_steps_and_resets(flags):
    agent, replay, update, act = make(**flags)
    fill(replay)

    def pointers():
        tensors = [*agent.tensors().values(), *replay.tensors().values()]
        return [tensor.data_ptr() for tensor in tensors]

    before = pointers()
    for _ in range(3):
        update()
        replay.add(0, 1.0, False, np.ones((84, 84), np.uint8))
        act()
        agent.reset()
    assert pointers() == before


@EACH_METHOD
def test_the_update_does_not_wait_for_the_device(flags):
    _, replay, update, act = make(**flags)
    fill(replay)
    with NoHostSync():
        update()
        act()
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        replay.max_priority.item()


@EACH_METHOD
def test_a_capture_leaves_no_trace(monkeypatch, flags):
    """With stand-ins for CUDA's part, warm-up and capture run for real: training goes on as if not.

    The buffer is empty then, so that the warm-up's weights become nan.
    """
    stand_in_cuda(monkeypatch)
    results = []
    for graphs in (False, True):
        agent, replay, update, act = make(graphs=graphs, **flags)
        if graphs:
            assert len(update()) == 3 and act().shape == (1,)  # of the warm-up: nothing is replayed
        fill(replay)
        losses = [loss for _ in range(3) for loss in agent.update(replay).values()]
        results.append(losses + everything(agent, replay))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(tensor.isfinite().all() for tensor in results[0])


@NEEDS_CUDA
@EACH_METHOD
def test_captured_and_eager_updates_give_the_same_numbers(flags):
    results = []
    for graphs in (False, True):
        agent, replay, update, act = make("cuda", graphs, **flags)
        fill(replay)
        trace = []
        for step in range(12):
            trace += [*(loss.clone() for loss in update().values()), act().clone()]
            replay.add(step % 3, 1.0, step == 7, np.full((84, 84), step, np.uint8))
            if step == 5:
                torch.cuda.manual_seed(1)
                agent.reset()
        results.append(trace + everything(agent, replay))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


@NEEDS_CUDA
@pytest.mark.parametrize("script, flags", [(atari, ""), (finetune, ", from_scratch=True")])
def test_a_fresh_process_finds_the_generator_of_the_device(script, flags):
    """PyTorch has no CUDA generators until something needs CUDA: in a run, make_generators()."""
    code = f"import {script.__name__} as script\n"
    code += f"print(*script.make_generators(script.Args(device='cuda'{flags})))"
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert finished.stdout.split() == ["torch", "sampling", "metrics", "cuda"], finished.stderr
