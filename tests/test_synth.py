"""The synthetic experiment: data, tasks, replicas against a plain loop, resets, files, stopping and continuing."""

import copy
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import synth_cifar_plasticity as synth

SCRIPT = Path(__file__).parent.parent / "synth_cifar_plasticity.py"
FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_images(directory, per_file=40, seed=0):
    """Generated images in the official format: a bright corner tells the class."""
    rng = np.random.default_rng(seed)
    (directory / "cifar-10-batches-py").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        labels = rng.integers(10, size=per_file)
        images = rng.integers(0, 100, size=(per_file, 3, 32, 32), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label : 3 * label + 3] = 255
        batch = {b"labels": labels.tolist(), b"data": images.reshape(per_file, 3072)}
        (directory / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))


@pytest.fixture
def data_dir(tmp_path):
    write_images(tmp_path / "data")
    return tmp_path / "data"


def make_args(data_dir, **flags):
    small = dict(
        num_seeds=2,
        num_stages=4,
        updates_per_stage=6,
        batch_size=8,
        reset_interval=2,
        log_interval=4,
    )
    flags = (
        dict(device="cpu", data_dir=data_dir, run_dir=data_dir.parent / "runs", exp_name="x")
        | small
        | flags
    )
    return synth.resolve(synth.Args(**flags))


BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
METHODS = {
    "base": BASE,
    "LN": BASE | dict(layer_norm=True),
    "pixel LN, all": BASE | dict(layer_norm=True, layer_norm_kind="pixel", layer_norm_scope="all"),
    "SAM": BASE | dict(sam_rho=0.1),
    "CReLU, all": BASE | dict(crelu=True, crelu_scope="all"),
    "PLASTIC": {},
    "released strides": dict(conv_strides=(3, 1, 1)),
}


# --- Data and tasks ---------------------------------------------------------------------------------------------------


def test_images_and_labels_are_those_of_the_files(data_dir):
    images, labels, test_images, test_labels = synth.load_cifar10(make_args(data_dir))
    assert images.shape == (200, 3, 32, 32) and test_images.shape == (40, 3, 32, 32)
    with open(data_dir / "cifar-10-batches-py" / "data_batch_3", "rb") as file:
        third = pickle.load(file)
    assert np.array_equal(images[80:120].reshape(40, 3072), third[b"data"])
    assert labels[80:120].tolist() == third[b"labels"]
    assert all((images[i, :, 3 * labels[i]] == 255).all() for i in range(200))
    assert (test_images[7, :, 3 * test_labels[7]] == 255).all()


def test_the_official_files_were_pickled_by_an_older_numpy(data_dir):
    path = data_dir / "cifar-10-batches-py" / "test_batch"
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    # In protocol 4, a short string carries its length in a byte, and a frame its length in eight.
    batch = pickle.loads(data)
    old = pickle.dumps(batch, protocol=2).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )
    path.write_bytes(old)
    images, labels = synth.read_batch(path)
    assert np.array_equal(images.reshape(-1, 3072), batch[b"data"])
    assert labels.tolist() == batch[b"labels"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


class Pointers:
    """An array of objects whose addresses the file chooses: using one would crash the process, or run code."""

    def __reduce__(self):
        return np.ndarray, ((40,), "O", b"A" * 320)


BAD_FILES = {
    "an array of objects for labels": lambda path: path.write_bytes(
        pickle.dumps({b"labels": Pointers(), b"data": np.zeros((40, 3072), np.uint8)})
    ),
    "an array of objects": lambda path: path.write_bytes(
        pickle.dumps({b"labels": [1] * 40, b"data": Pointers()})
    ),
    "images column by column": lambda path: path.write_bytes(
        pickle.dumps(
            {
                b"labels": [1] * 40,
                b"data": np.asfortranarray(np.arange(40 * 3072).reshape(40, -1) % 256, np.uint8),
            }
        )
    ),
    "no images": lambda path: path.write_bytes(
        pickle.dumps({b"labels": [], b"data": np.zeros((0, 3072), np.uint8)})
    ),
    "a crafted pickle": lambda path: path.write_bytes(
        pickle.dumps({b"labels": [1], b"data": Evil()})
    ),
    "a crafted array": lambda path: path.write_bytes(
        pickle.dumps({b"data": np.array([Evil()], dtype=object)})
    ),
    "a truncated file": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("<html>404</html>"),
    "a list": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "labels out of range": lambda path: path.write_bytes(
        pickle.dumps({b"labels": [10], b"data": np.zeros((1, 3072), np.uint8)})
    ),
    "another shape": lambda path: path.write_bytes(
        pickle.dumps({b"labels": [1], b"data": np.zeros((1, 9), np.uint8)})
    ),
    "another type": lambda path: path.write_bytes(
        pickle.dumps({b"labels": [1], b"data": np.zeros((1, 3072))})
    ),
    "nothing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_not_cifar_gets_one_line_and_runs_no_code(
    data_dir, capsys, kind, monkeypatch
):
    monkeypatch.chdir(data_dir)
    BAD_FILES[kind](data_dir / "cifar-10-batches-py" / "data_batch_2")
    with pytest.raises(SystemExit) as exit_info:
        synth.run(make_args(data_dir), synth.Stop())
    error = capsys.readouterr().err
    assert exit_info.value.code == 1
    assert error.startswith("error: ") and error.count("\n") == 1 and "data_batch_2" in error
    assert not (data_dir / "evil").exists()
    assert not (data_dir.parent / "runs").exists()


def test_no_images_and_no_download(tmp_path, capsys):
    with pytest.raises(SystemExit):
        synth.run(make_args(tmp_path / "none", download=False), synth.Stop())
    assert "--download" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Response:
    """A stand-in for the server."""

    def __init__(self, data):
        self.data, self.headers = data, {"Content-Length": str(len(data))}

    def read(self, size):
        part, self.data = self.data[:size], self.data[size:]
        return part

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_a_download_is_checked_and_appears_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    import hashlib
    import tarfile

    write_images(tmp_path / "source", per_file=3)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    archive = (tmp_path / "archive.tar.gz").read_bytes()
    asked = []

    def break_off(url, timeout):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(synth.urllib.request, "urlopen", break_off)
    with pytest.raises(SystemExit):
        synth.load_cifar10(make_args(tmp_path / "data"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Connection reset" in error and "--data-dir" in error
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(
        synth.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Response(archive)
    )
    args = make_args(tmp_path / "data")
    with pytest.raises(SystemExit):
        synth.load_cifar10(args)
    assert "checksum" in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(synth, "SHA256", hashlib.sha256(archive).hexdigest())
    images, *_ = synth.load_cifar10(args)
    assert len(images) == 15
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"] * 2
    synth.download(args.data_dir)  # as if another process had been faster
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]


def test_stages_of_the_input_task_see_one_chunk_more_each(data_dir):
    args = make_args(data_dir, num_stages=10)
    orders = [synth.seen_images(seed, 9, 205, args) for seed in (1, 2)]
    for stage in range(10):
        seen = synth.seen_images(1, stage, 205, args)
        assert len(set(seen.tolist())) == (stage + 1) * 20
        assert np.array_equal(seen, orders[0][: len(seen)])
    assert not np.array_equal(*orders)
    label = synth.seen_images(1, 0, 205, make_args(data_dir, num_stages=10, task="label"))
    assert sorted(label.tolist()) == list(range(205))


@pytest.mark.parametrize("task", ["input", "label"])
def test_minibatches_are_cut_from_shuffled_epochs_without_replacement(data_dir, task):
    args = make_args(data_dir, num_stages=5, updates_per_stage=30, batch_size=16, task=task)
    streams = []
    for stage in (1, 2):
        batches = synth.stage_batches(3, stage, 100, args)
        assert batches.shape == (30, 16)
        seen = set(synth.seen_images(3, stage, 100, args).tolist())
        stream = batches.flatten().tolist()
        epochs = [stream[i : i + len(seen)] for i in range(0, len(stream), len(seen))]
        assert all(set(epoch) == seen for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]
        streams.append(stream)
    assert streams[0] != streams[1]


def test_labels_of_a_stage_are_a_permutation_of_the_classes(data_dir):
    args = make_args(data_dir, task="label")
    stages = [synth.stage_labels(1, stage, args).tolist() for stage in range(50)]
    assert all(sorted(labels) == list(range(10)) for labels in stages)
    assert all(a != b for a, b in itertools.pairwise(stages))
    assert stages[3] != synth.stage_labels(2, 3, args).tolist()
    cyclic = make_args(data_dir, task="label", label_change="cyclic")
    assert synth.stage_labels(1, 13, cyclic).tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert synth.stage_labels(1, 13, make_args(data_dir)).tolist() == list(range(10))


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_layer_norm_by_sample_is_group_norm_with_one_group():
    norm = synth.SampleLayerNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(4, 6, 5, 5) + 2
    expected = F.group_norm(x, 1, norm.weight, norm.bias, eps=1e-6)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags, parameters",
    [
        # 3*3*3*32+32, 3*3*32*64+64, 3*3*64*64+64; 64*512+512, 512*128+128, 128*10+10
        (BASE, 896 + 18496 + 36928 + 33280 + 65664 + 1290),
        (BASE | dict(layer_norm=True), 896 + 18496 + 36928 + 2 * 160 + 33280 + 65664 + 1290),
        (
            BASE | dict(crelu=True),
            896 + 18496 + 36928 + 33280 + (1024 * 128 + 128) + (256 * 10 + 10),
        ),
        (
            BASE | dict(conv_strides=(3, 1, 1)),
            896 + 18496 + 36928 + (2304 * 512 + 512) + 65664 + 1290,
        ),
    ],
)
def test_parameters_counted_by_hand(data_dir, flags, parameters):
    network = synth.Network(make_args(data_dir, **flags))
    assert sum(w.numel() for w in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# --- Update -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one by one", "all at once"])
def grouping(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    if request.param == "all at once":
        original = synth.Replicas.__init__

        def init(self, *args):
            original(self, *args)
            self.groups = [slice(len(self.weights))]

        monkeypatch.setattr(synth.Replicas, "__init__", init)


def make_replicas(data_dir, **flags):
    args = make_args(data_dir, **flags)
    replicas = synth.Replicas(args, synth.load_cifar10(args), torch.device("cpu"))
    replicas.start_stage(0)
    return replicas


def in_double(replicas):
    """In double precision a ReLU's input does not fall on the other side of zero by a rounding error."""
    for name in ("weights", "momentum"):
        setattr(replicas, name, getattr(replicas, name).double())
    settings = torch.tensor(replicas.settings, dtype=torch.float64).repeat_interleave(
        len(replicas.seeds), 0
    )
    replicas.learning_rate, replicas.weight_decay = settings.split(1, dim=1)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (synth.MEAN, synth.STD)
    )
    replicas.mean, replicas.std = 255 * mean, 255 * std
    return replicas


def plain_loop(data_dir, args, seed, learning_rate, weight_decay, stage, num_updates):
    """One replica by nn.Module, torch.optim.SGD and a loop over its parameters, in double precision."""
    images, labels, *_ = synth.load_cifar10(args)
    torch.manual_seed(seed)
    network = synth.Network(args).double()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=learning_rate, momentum=args.momentum, weight_decay=weight_decay
    )
    mean, std = (np.array(x).reshape(3, 1, 1) for x in (synth.MEAN, synth.STD))
    batches, mapping = (
        synth.stage_batches(seed, stage, len(images), args),
        synth.stage_labels(seed, stage, args),
    )
    losses = []
    for index in batches[:num_updates]:
        x = torch.from_numpy((images[index] / 255 - mean) / std)
        y = torch.from_numpy(mapping[labels[index]])
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        losses.append(loss.item())
        if args.sam_rho > 0:
            before = copy.deepcopy(network.state_dict())
            norm = sum(w.grad.square().sum() for w in network.parameters()).sqrt()
            with torch.no_grad():
                for w in network.parameters():
                    w += args.sam_rho * w.grad / norm
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            network.load_state_dict(before)
        optimizer.step()
    return network, losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["input", "label"])
def test_every_replica_equals_a_plain_loop(data_dir, grouping, method, task):
    flags = METHODS[method] | dict(
        task=task, learning_rate=(0.03, 0.01), weight_decay=(0.1, 0.0), first_seed=5
    )
    replicas = in_double(make_replicas(data_dir, **flags))
    losses = torch.stack([replicas.update() for _ in range(4)])
    replica = 0
    for learning_rate in (0.03, 0.01):
        for weight_decay in (0.1, 0.0):
            for seed in (5, 6):
                plain = plain_loop(data_dir, replicas.args, seed, learning_rate, weight_decay, 0, 4)
                network, plain_losses = plain
                np.testing.assert_allclose(losses[:, replica], plain_losses, rtol=1e-9)
                w = torch.nn.utils.parameters_to_vector(network.parameters())
                torch.testing.assert_close(replicas.weights[replica], w, rtol=1e-8, atol=1e-12)
                replica += 1
    assert replica == len(replicas.weights) == 8


def test_sam_uses_the_norm_of_each_replica(data_dir, grouping):
    """One replica's weights made a thousand times larger leave the others' updates as they are."""
    moved = []
    for scale in (1.0, 1000.0):
        replicas = make_replicas(data_dir, num_seeds=3)
        replicas.weights[1] *= scale
        replicas.update()
        moved.append(replicas.weights)
    for replica in (0, 2):
        torch.testing.assert_close(moved[0][replica], moved[1][replica], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(moved[0][1], moved[1][1])


@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_a_replica_whose_gradient_is_not_finite_is_skipped_and_the_others_are_not(
    data_dir, grouping, sam_rho
):
    whole, broken = (make_replicas(data_dir, num_seeds=3, sam_rho=sam_rho) for _ in range(2))
    broken.weights[1, -3000] = torch.inf  # a weight of the head
    before = broken.weights[1].clone()
    for _ in range(3):
        whole.update()
        broken.update()
    assert broken.skipped.tolist() == [0, 3, 0]
    assert torch.equal(broken.weights[1], before)
    assert not broken.momentum[1].any()
    for replica in (0, 2):
        torch.testing.assert_close(
            broken.weights[replica], whole.weights[replica], rtol=1e-5, atol=1e-7
        )


def test_a_reset_renews_the_fully_connected_layers_and_their_momentum_only(data_dir):
    replicas = make_replicas(data_dir, learning_rate=(0.1, 0.01), layer_norm_scope="all")
    replicas.update()
    weights, momentum, pointer = (
        replicas.weights.clone(),
        replicas.momentum.clone(),
        replicas.weights.data_ptr(),
    )
    replicas.reset_heads(2)
    assert replicas.weights.data_ptr() == pointer
    start = 0
    for name, w in synth.Network(replicas.args).named_parameters():
        columns = slice(start, start := start + w.numel())
        if name.startswith("backbone."):
            assert torch.equal(replicas.weights[:, columns], weights[:, columns])
            assert torch.equal(replicas.momentum[:, columns], momentum[:, columns])
            continue
        assert momentum[:, columns].any() and not replicas.momentum[:, columns].any()
        new = replicas.weights[:, columns]
        assert not torch.equal(new, weights[:, columns])
        assert torch.equal(new[:2], new[2:])  # the same for each seed, whatever the setting
        if w.ndim == 2:
            bound = (
                w.shape[1] ** -0.5
            )  # PyTorch's initialisation of a linear layer is uniform within
            assert not torch.equal(new[0], new[1])
            assert 0.9 * bound < new.abs().max() <= bound
    weights = replicas.weights.clone()
    replicas.reset_heads(4)
    assert not torch.equal(replicas.weights, weights)  # another draw each time


def test_resets_come_every_so_many_stages_and_not_at_the_start(data_dir, monkeypatch):
    stages = []
    monkeypatch.setattr(synth.Replicas, "reset_heads", lambda self, stage: stages.append(stage))
    synth.run(make_args(data_dir, num_stages=7, reset_interval=3), synth.Stop())
    assert stages == [3, 6]
    synth.run(make_args(data_dir, num_stages=7, reset_interval=0, exp_name="none"), synth.Stop())
    assert stages == [3, 6]


def test_accuracy_by_hand(data_dir, grouping):
    replicas = make_replicas(data_dir, task="label", learning_rate=(0.1, 0.01))
    for _ in range(5):
        replicas.update()
    train, test = replicas.evaluate(0)
    images, labels, test_images, test_labels = synth.load_cifar10(replicas.args)
    for replica, seed in enumerate((1, 2, 1, 2)):
        network = synth.Network(replicas.args)
        torch.nn.utils.vector_to_parameters(replicas.weights[replica], network.parameters())
        mapping = synth.stage_labels(seed, 0, replicas.args)
        for x, y, accuracy in ((images, labels, train), (test_images, test_labels, test)):
            predicted = network(replicas.standardise(torch.from_numpy(x))).argmax(1).numpy()
            assert accuracy[replica] == pytest.approx(
                np.mean(predicted == mapping[y]), abs=0.011
            )  # a tie or two


def test_the_images_measured_are_drawn_from_all_that_the_stage_trains_on(data_dir, monkeypatch):
    replicas = make_replicas(data_dir)
    monkeypatch.setattr(synth, "seen_images", lambda *args: np.arange(20_000))
    asked = []
    monkeypatch.setattr(replicas, "accuracy", lambda images, labels, index: asked.append(index))
    replicas.evaluate(0)
    train, test = asked
    assert train.shape == (2, 10_000) and all(len(set(row.tolist())) == 10_000 for row in train)
    assert not torch.equal(train[0], train[1])
    assert 4_700 < (train >= 10_000).sum(1).float().mean() < 5_300
    assert torch.equal(test, torch.arange(40).expand(2, 40))


def test_metrics_are_those_of_each_replicas_own_network_images_and_labels(data_dir):
    replicas = make_replicas(data_dir, task="label", learning_rate=(0.1, 0.01), **BASE)
    for _ in range(5):
        replicas.update()
    before = {name: tensor.clone() for name, tensor in replicas.tensors().items()}
    metrics = synth.plasticity_metrics(replicas, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in replicas.tensors().items())
    images, labels, *_ = synth.load_cifar10(replicas.args)
    for replica, seed in enumerate((1, 2, 1, 2)):
        network = synth.Network(replicas.args)
        torch.nn.utils.vector_to_parameters(replicas.weights[replica].clone(), network.parameters())
        index = synth.stage_batches(
            seed, 0, len(images), replicas.args
        ).flatten()  # 48, fewer than 512
        x = replicas.standardise(torch.from_numpy(images[index]))
        hidden = [F.relu(network.head[0](network.backbone(x)))]
        hidden.append(F.relu(network.head[2](hidden[0])))
        active = sum((h > 0).sum().item() for h in hidden) / sum(h.numel() for h in hidden)
        assert metrics["active_units/head"][replica] == pytest.approx(active)
        y = torch.from_numpy(synth.stage_labels(seed, 0, replicas.args)[labels[index[:32]]])
        # Power iteration on the Hessian, shifted so that its largest eigenvalue is the largest in size.
        parameters = list(network.parameters())
        loss = F.cross_entropy(network(x[:32]), y)
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
        )
        vector, shift = torch.randn(len(gradient), generator=torch.Generator().manual_seed(9)), 1.0
        for _ in range(400):
            vector = vector / vector.norm()
            product = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
            product = torch.cat([g.flatten() for g in product])
            eigenvalue = (vector @ product).item()
            vector = product + shift * vector
        assert metrics["hessian_max_eigenvalue"][replica] == pytest.approx(
            eigenvalue, rel=0.02, abs=0.02
        )


def test_a_metric_that_is_not_finite_is_none(data_dir):
    replicas = make_replicas(data_dir)
    replicas.weights[1] *= 1e18
    metrics = synth.plasticity_metrics(replicas, 0)["hessian_max_eigenvalue"]
    assert metrics[0] is not None and metrics[1] is None


def test_updates_past_the_stage_begin_it_again(data_dir):
    """As the graph's warm-up runs them, where a stage has few."""
    replicas = make_replicas(data_dir, updates_per_stage=2)
    first, _, again = (replicas.next_batch(slice(1)) for replicas.position[0] in range(3))
    assert torch.equal(first[0], again[0])
    replicas.position.fill_(5)
    assert replicas.update().isfinite().all()


# --- Runs -------------------------------------------------------------------------------------------------------------


def result_of(args):
    directory = args.run_dir / f"{args.task}__{args.exp_name}__{args.first_seed}-{args.num_seeds}"
    return json.loads((directory / "result.json").read_text())


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), purge_orphaned_data=False)
    events.Reload()
    return {
        tag: sorted((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("task", ["input", "label"])
def test_seeds_in_one_process_give_what_processes_of_their_own_give(data_dir, task):
    together = make_args(
        data_dir, task=task, num_seeds=3, first_seed=7, learning_rate=(0.05, 0.01), num_stages=3
    )
    synth.run(together, synth.Stop())
    for i, seed in enumerate((7, 8, 9)):
        for j, learning_rate in enumerate((0.05, 0.01)):
            flags = dict(
                task=task,
                num_seeds=1,
                first_seed=seed,
                learning_rate=(learning_rate,),
                num_stages=3,
            )
            alone = make_args(data_dir, exp_name=f"alone_{j}", **flags)
            synth.run(alone, synth.Stop())
            for key in ("test_accuracy", "train_accuracy"):
                one, of_many = result_of(alone)[key][0], result_of(together)["sweep"][j][key][i]
                np.testing.assert_allclose(one, of_many, atol=0.03)  # an image on the edge or two


def test_a_run_learns_and_its_result_is_complete(data_dir):
    flags = dict(
        learning_rate=(0.02, 1e-6),
        updates_per_stage=40,
        metrics_interval=2,
        num_seeds=3,
        reset_interval=0,
    )
    args = make_args(data_dir, **flags)
    synth.run(args, synth.Stop())
    result = result_of(args)
    assert list(result["args"]) == list(synth.Args.__dataclass_fields__)
    assert (result["gradient_updates"], result["num_seeds"], result["task"]) == (160, 3, "input")
    assert [setting["learning_rate"] for setting in result["sweep"]] == [0.02, 1e-6]
    assert result["learning_rate"] == 0.02  # the better one
    assert np.shape(result["test_accuracy"]) == np.shape(result["train_accuracy"]) == (3, 4)
    assert result["final_accuracy"] == [seed[-1] for seed in result["test_accuracy"]]
    np.testing.assert_allclose(result["mean_accuracy"], np.mean(result["test_accuracy"], axis=1))
    assert result["final_accuracy_mean"] == pytest.approx(np.mean(result["final_accuracy"]))
    assert result["final_accuracy_mean"] > 0.8 > 0.3 > result["sweep"][1]["final_accuracy_mean"]
    low, high = result["final_accuracy_interval"]
    assert low <= result["final_accuracy_mean"] <= high
    assert [one["stage"] for one in result["metrics"]] == [1, 3]
    names = {"hessian_max_eigenvalue", "active_units/backbone", "active_units/head"}
    assert all(
        len(one[name]) == 3
        for setting in result["sweep"]
        for one in setting["metrics"]
        for name in names
    )
    assert result["metrics"] == result["sweep"][0]["metrics"] != result["sweep"][1]["metrics"]
    run_dir = args.run_dir / "input__x__1-3"
    logged = scalars(run_dir)
    assert [step for step, _ in logged["test_accuracy/lr_0.02_decay_0.001"]] == [40, 80, 120, 160]
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"", "events", "result"}


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, size=40)
    low, high = synth.bootstrap_interval(values)
    half = 1.96 * values.std() / 40**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.003)
    assert high == pytest.approx(values.mean() + half, abs=0.003)
    assert synth.bootstrap_interval(np.array([0.3])) is None


# --- Stopping and continuing ------------------------------------------------------------------------------------------


@pytest.fixture
def stopping(monkeypatch):
    """train(args, at): a run that gets SIGTERM during update `at` (never for 0); returns its replicas's tensors."""
    kept, original = {}, synth.Replicas.update

    class KeptReplicas(synth.Replicas):
        def __init__(self, *args):
            super().__init__(*args)
            kept["replicas"] = self

        def update(self):
            kept["updates"] += 1
            if kept["updates"] == kept["at"]:
                kept["stop"].request(signal.SIGTERM)
            return original(self)

    monkeypatch.setattr(synth, "Replicas", KeptReplicas)

    def train(args, at=0, done=0):
        kept.update(at=at - done, updates=0, stop=synth.Stop())
        synth.run(args, kept["stop"])
        return kept["replicas"].tensors()

    return train


@pytest.mark.parametrize("task", ["input", "label"])
@pytest.mark.parametrize("stops", [(1,), (6, 12), (7, 13, 22), (24,)], ids=str)
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(data_dir, stopping, task, stops):
    """Stopped in the middle of stages and between them (6 updates each), before resets and at the end."""
    flags = dict(task=task, resume=True, learning_rate=(0.05, 0.01), metrics_interval=3)
    whole = make_args(data_dir, exp_name="whole", **flags)
    tensors = {name: tensor.clone() for name, tensor in stopping(whole).items()}
    broken = make_args(data_dir, exp_name="broken", **flags)
    done = 0
    for at in stops:
        with pytest.raises(SystemExit) as exit_info:
            stopping(broken, at, done)
        assert exit_info.value.code == 143
        done = at
        torch.manual_seed(999)
    for name, tensor in stopping(broken).items():
        assert torch.equal(tensor, tensors[name]), name
    results = [result_of(args) for args in (whole, broken)]
    assert results[1]["resumed_at"] == list(stops)
    for key in ("sweep", "gradient_updates"):
        assert results[0][key] == results[1][key]
    logged = [scalars(args.run_dir / f"{task}__{args.exp_name}__1-2") for args in (whole, broken)]
    for one in logged:
        one.pop("charts/updates_per_second")
    assert logged[0] == logged[1]


def test_a_signal_during_an_evaluation_ends_it_at_once_and_loses_nothing(data_dir, monkeypatch):
    stop, args = synth.Stop(), make_args(data_dir)
    monkeypatch.setattr(
        synth.Replicas, "evaluate", lambda self, stage: stop.request(signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as exit_info:
        synth.run(args, stop)
    assert exit_info.value.code == 143
    checkpoint = torch.load(args.run_dir / "input__x__1-2" / "checkpoint.pth", weights_only=True)
    assert checkpoint["counters"]["updates"] == 6


def test_which_runs_are_refused_continued_or_left_alone(data_dir, stopping, capsys):
    args = make_args(data_dir)
    with pytest.raises(SystemExit):
        stopping(args, 9)
    run_dir = args.run_dir / "input__x__1-2"

    def refused(**flags):
        before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            stopping(make_args(data_dir, **flags))
        error = capsys.readouterr().err
        assert (exit_info.value.code, error.count("\n")) == (1, 1)
        assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
        return error

    assert "--resume" in refused()
    assert "--sam-rho 0.1" in refused(resume=True, sam_rho=0.2)
    write_images(data_dir, seed=1)
    assert "other images" in refused(resume=True)
    write_images(data_dir)
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    for change in (
        {"script": "plastic_drq_rainbow_atari.py"},
        {"version": synth.CHECKPOINT_VERSION + 1},
        {"tensors": {}},
        {"counters": {"updates": 10**6}},
        {"counters": {"updates": "1"}},
        {"counters": {**checkpoint["counters"], "updates": 20}},
        {"counters": {**checkpoint["counters"], "test_accuracy": [[0.5]]}},
        {"counters": {**checkpoint["counters"], "test_accuracy": [0.5, 0.5]}},
        {"counters": {**checkpoint["counters"], "train_accuracy": [[0.5, 1.5]]}},
        {"counters": {**checkpoint["counters"], "seconds": float("nan")}},
    ):
        torch.save(checkpoint | change, run_dir / "checkpoint.pth")
        assert "not a checkpoint" in refused(resume=True)
    (run_dir / "checkpoint.pth").write_bytes(b"PK")
    assert "not a checkpoint" in refused(resume=True)
    torch.save(checkpoint, run_dir / "checkpoint.pth")
    stopping(make_args(data_dir, resume=True))
    assert "--overwrite" in refused()
    assert "--momentum 0.9" in refused(resume=True, momentum=0.5)
    assert "--conv-strides 3 3 1;" in refused(resume=True, conv_strides=(3, 1, 1))
    capsys.readouterr()
    stopping(
        make_args(data_dir.parent / "nowhere", run_dir=args.run_dir, resume=True, download=False)
    )
    assert capsys.readouterr().out == f"{run_dir}: finished already\n"
    stopping(make_args(data_dir, overwrite=True))
    assert result_of(args)["resumed_at"] == []


def test_a_diverged_run_goes_on_and_its_result_is_json(data_dir, stopping):
    flags = BASE | dict(sam_rho=1e7, learning_rate=(1e9, 0.01), metrics_interval=2, resume=True)
    args = make_args(data_dir, **flags)
    with pytest.raises(SystemExit):
        stopping(args, 14)
    tensors = stopping(args, done=14)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    text = (args.run_dir / "input__x__1-2" / "result.json").read_text()
    result = json.loads(
        text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")
    )
    assert result["resumed_at"] == [14]
    assert min(result["sweep"][0]["skipped_updates"]) > 0


def test_memory_that_runs_out_while_a_checkpoint_is_read_is_no_foreign_file(
    data_dir, stopping, monkeypatch, capsys
):
    args = make_args(data_dir, resume=True)
    with pytest.raises(SystemExit):
        stopping(args, 9)
    capsys.readouterr()

    def load(error):
        def raise_it(*args, **kwargs):
            raise error

        return raise_it

    for error in (
        MemoryError(),
        RuntimeError("unable to mmap 1024 bytes: Cannot allocate memory (12)"),
    ):
        monkeypatch.setattr(synth.torch, "load", load(error))
        with pytest.raises(type(error)):
            stopping(args)
    monkeypatch.setattr(synth.torch, "load", load(OSError(5, "Input/output error")))
    with pytest.raises(SystemExit):
        stopping(args)
    assert "checkpoint.pth: Input/output error" in capsys.readouterr().err


def start(data_dir, *flags):
    small = "--num-seeds 2 --num-stages 4 --updates-per-stage 200 --batch-size 8 --torch-threads 1 --exp-name x".split()
    command = [
        sys.executable,
        str(SCRIPT),
        "--data-dir",
        str(data_dir),
        "--device",
        "cpu",
        *small,
        *flags,
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=data_dir.parent, **pipes)


def test_a_real_run_is_killed_stopped_and_continued(data_dir):
    run_dir = data_dir.parent / "runs/input__x__1-2"
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(data_dir, "--resume", "--checkpoint-interval", "10", "--num-stages", "100")
        before = (
            (run_dir / "checkpoint.pth").stat().st_mtime_ns
            if (run_dir / "checkpoint.pth").exists()
            else 0
        )
        end = time.monotonic() + 60
        while (
            not (run_dir / "checkpoint.pth").exists()
            or (run_dir / "checkpoint.pth").stat().st_mtime_ns == before
        ):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code
        assert error.count("\n") == (code > 0)
    updates = torch.load(run_dir / "checkpoint.pth", weights_only=True)["counters"]["updates"]
    assert updates > 20
    process = start(data_dir, "--overwrite")
    output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert "2 replicas of 223,690 parameters, 800 updates, on cpu, 1 threads" in output
    assert "input: final test accuracy " in output


BAD_FLAGS = {
    "--task both": "--task", "--num-seeds 0": "--num-seeds", "--first-seed -1": "--first-seed",
    "--num-stages 0": "--num-stages", "--updates-per-stage 0": "--updates-per-stage", "--batch-size 0": "--batch-size",
    "--learning-rate 0.1 0.1": "--learning-rate", "--weight-decay 0 0.1 0": "--weight-decay",
    "--data-dir a\x01b": "--data-dir", "--learning-rate 0": "--learning-rate",
    "--learning-rate 0.1 nan": "--learning-rate",
    "--weight-decay -1": "--weight-decay", "--momentum 1.1": "--momentum", "--conv-strides 3 3": "--conv-strides",
    "--conv-strides 3 3 0": "--conv-strides", "--conv-strides 10 10 1": "--conv-strides", "--sam-rho -1": "--sam-rho",
    "--sam-rho inf": "--sam-rho", "--reset-interval -1": "--reset-interval", "--log-interval 0": "--log-interval",
    "--metrics-interval -1": "--metrics-interval", "--checkpoint-interval soon": "--checkpoint-interval",
    "--checkpoint-interval -5": "--checkpoint-interval", "--exp-name a/b": "--exp-name", "--resume --overwrite":
    "--resume", "--layer-norm-kind batch": "--layer-norm-kind", "--no-such-flag": "no-such-flag",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_flag_that_makes_no_sense_ends_with_code_2_and_says_so(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        synth.resolve(tyro.cli(synth.Args, args=flags.split()))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert BAD_FLAGS[flags] in error
    assert (error.startswith("error: ") and error.count("\n") == 1) or "For full helptext" in error
    assert list(tmp_path.iterdir()) == []


def test_more_stages_than_images_and_more_replicas_than_memory(data_dir, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_info:
        synth.run(make_args(data_dir, num_stages=201), synth.Stop())
    assert exit_info.value.code == 2
    assert "--num-stages 201" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        synth.run(make_args(data_dir, num_seeds=100_000), synth.Stop())
    assert exit_info.value.code == 1
    assert "--num-seeds" in capsys.readouterr().err
    assert not (data_dir.parent / "runs").exists()
