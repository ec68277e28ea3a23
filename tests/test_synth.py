"""The synthetic experiment: data, tasks, replicas against a plain loop, resets, metrics."""

import hashlib
import io
import itertools
import math
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import NoHostSync, stand_in_cuda
from torch import nn
from torch.nn.utils import vector_to_parameters

import synth_cifar_plasticity as synth

FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2, which made the official files, wrote its strings."""

    def save_string(self, data):
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string}


def write_images(directory, per_file=40, seed=0):
    """Generated images in the official format: a bright corner tells the class."""
    rng = np.random.default_rng(seed)
    directory = directory / "cifar-10-batches-py"
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        labels = rng.integers(10, size=per_file)
        images = rng.integers(0, 100, size=(per_file, 3, 32, 32), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label : 3 * label + 3] = 255
        file, batch = io.BytesIO(), {b"labels": labels.tolist(), b"data": images.reshape(-1, 3072)}
        Python2Pickler(file, protocol=2).dump(batch)
        old = file.getvalue().replace(b"numpy._core", b"numpy.core")  # as by an older NumPy
        assert b"numpy.core.multiarray" in old and b"_codecs" not in old
        (directory / name).write_bytes(old)


@pytest.fixture
def data_dir(tmp_path):
    write_images(tmp_path / "data")
    return tmp_path / "data"


def make_args(data_dir, **flags):
    small = dict(num_seeds=2, num_stages=4, updates_per_stage=6, batch_size=8, reset_interval=2)
    small |= dict(device="cpu", run_dir=str(data_dir.parent / "runs"), exp_name="x")
    return synth.Args(data_dir=str(data_dir), **small | flags)


BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
METHODS = {
    "base": BASE,
    "LN": BASE | dict(layer_norm=True),
    "pixel LN, all": BASE | dict(layer_norm=True, layer_norm_kind="pixel", layer_norm_scope="all"),
    "SAM": BASE | dict(sam_rho=0.1),
    "CReLU, all": BASE | dict(crelu=True, crelu_scope="all"),
    "PLASTIC": {},
    "L2 Init, clipped": BASE | dict(l2_init=True, weight_clip=0.5),
    "PLASTIC, L2 Init, clipped, tortoise": dict(
        l2_init=True, weight_clip=1, tortoise_interval=1, tortoise_ema=0.9, momentum=0.5
    ),
}


def test_defaults_are_those_of_section_3():
    """Of what a sweep chooses (learning rate, decay, rho, interval) one value each."""
    table = dict(num_stages=100, updates_per_stage=500, batch_size=128, num_seeds=30)
    table |= dict(sam_rho=0.1, reset_interval=10, layer_norm=True, crelu=True, momentum=0.9)
    table |= dict(redo_interval=0, weight_clip=0, tortoise_interval=0, l2_init=False)
    args = vars(synth.Args())
    assert {name: args[name] for name in table} == table


# --- Data and tasks -------------------------------------------------------------------------------


@pytest.mark.parametrize("subdirectory", ["", "cifar-10-batches-py"])
def test_images_and_labels_are_those_of_the_files(data_dir, subdirectory):
    """Of the directory of the files itself, or of the one that holds it."""
    args = make_args(data_dir / subdirectory, download=False)
    images, labels, test_images, test_labels = synth.load_cifar10(args)
    assert images.shape == (200, 3, 32, 32) and test_images.shape == (40, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    with open(data_dir / "cifar-10-batches-py" / "data_batch_3", "rb") as file:
        third = pickle.load(file, encoding="bytes")
    assert np.array_equal(images[80:120].reshape(40, 3072), third[b"data"])
    assert labels[80:120].tolist() == third[b"labels"]
    assert all((images[i, :, 3 * labels[i]] == 255).all() for i in range(200))
    assert (test_images[7, :, 3 * test_labels[7]] == 255).all()


class Call:
    """Unpickling it makes the call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


EVIL = Call(os.mkdir, ("evil",))
# An array of objects whose addresses the file chooses: using one would crash the process.
POINTERS = Call(np.ndarray, ((40,), "O", b"A" * 320))
IMAGES = np.arange(40 * 3072).reshape(40, -1).astype(np.uint8)
GOOD = {b"labels": [1] * 40, b"data": IMAGES}
BAD_FILES = {
    "truncated": pickle.dumps(GOOD)[:5000],
    "text": b"<html>404</html>",
    "a list": pickle.dumps([1, 2]),
    "code for images": pickle.dumps(GOOD | {b"data": EVIL}),
    "an array of objects": pickle.dumps(GOOD | {b"data": POINTERS}),
    "images column by column": pickle.dumps(GOOD | {b"data": np.asfortranarray(IMAGES)}),
    "more labels than images": pickle.dumps(GOOD | {b"labels": [1] * 41}),
    "a label out of range": pickle.dumps(GOOD | {b"labels": [10] + [1] * 39}),
    "a negative label": pickle.dumps(GOOD | {b"labels": [-1] + [1] * 39}),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_not_cifar_gets_one_line_and_runs_no_code(data_dir, kind, monkeypatch):
    monkeypatch.chdir(data_dir)
    path = data_dir / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps(GOOD | {b"more": EVIL}))  # not read, and not run
    synth.load_cifar10(make_args(data_dir))
    path.write_bytes(BAD_FILES[kind])
    with pytest.raises(SystemExit, match=r"data_batch_2: not a file of cifar-10-batches-py \(\w+"):
        synth.load_cifar10(make_args(data_dir))
    assert not (data_dir / "evil").exists()


def test_no_images_and_no_download(tmp_path):
    with pytest.raises(SystemExit, match="pass --download, or another --data-dir"):
        synth.load_cifar10(make_args(tmp_path / "none", download=False))
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_images(tmp_path / "source", per_file=3)
    archive, data = tmp_path / "archive.tar.gz", tmp_path / "data"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(synth, "URL", archive.as_uri())
    with pytest.raises(SystemExit, match="invalid hash"):
        synth.load_cifar10(make_args(data))
    assert os.listdir(data) == ["cifar-10-batches-py.lock"]
    monkeypatch.setattr(synth, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    images, *_ = synth.load_cifar10(make_args(data))
    assert len(images) == 15
    archive.unlink()
    synth.download(data / "cifar-10-batches-py")  # another process was faster
    assert sorted(os.listdir(data)) == ["cifar-10-batches-py", "cifar-10-batches-py.lock"]
    with pytest.raises(SystemExit, match="--data-dir"):  # as without a network
        synth.load_cifar10(make_args(tmp_path / "other"))


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
        *epochs, rest = [stream[i : i + len(seen)] for i in range(0, len(stream), len(seen))]
        assert all(set(epoch) == seen for epoch in epochs)
        assert len(set(rest)) == len(rest)
        assert epochs[0] != epochs[1]
        streams.append(stream)
    assert streams[0] != streams[1]


def test_labels_of_a_stage_are_a_permutation_of_the_classes(data_dir):
    args = make_args(data_dir, task="label")
    stages = [synth.stage_labels(1, stage, args).tolist() for stage in range(50)]
    assert all(sorted(labels) == list(range(10)) for labels in stages)
    assert len(set(map(tuple, stages))) == 50
    assert stages[3] != synth.stage_labels(2, 3, args).tolist()
    cyclic = make_args(data_dir, task="label", label_change="cyclic")
    assert synth.stage_labels(1, 13, cyclic).tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert synth.stage_labels(1, 13, make_args(data_dir)).tolist() == list(range(10))


# --- Update ---------------------------------------------------------------------------------------


def test_parameters_counted_by_hand(data_dir):
    convolutions = (27 * 32 + 32) + (288 * 64 + 64) + (576 * 64 + 64)
    last = (512 * 128 + 128) + (128 * 10 + 10)
    doubled = (1024 * 128 + 128) + (256 * 10 + 10)
    for flags, parameters in (
        (BASE, convolutions + (64 * 512 + 512) + last),
        (METHODS["LN"], convolutions + 2 * 160 + (64 * 512 + 512) + last),
        (BASE | dict(crelu=True), convolutions + (64 * 512 + 512) + doubled),
        (BASE | dict(conv_strides=(3, 1, 1)), convolutions + (2304 * 512 + 512) + last),
    ):
        network = synth.Network(make_args(data_dir, **flags))
        assert sum(w.numel() for w in network.parameters()) == parameters


@pytest.fixture(params=["one by one", "all at once"])
def grouping(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    original = synth.Replicas.__init__

    def init(self, args, data, device):
        original(self, args, data, torch.device("cpu"))
        self.groups = [slice(len(self.weights))]

    if request.param == "all at once":
        monkeypatch.setattr(synth.Replicas, "__init__", init)
    return request.param


def make_replicas(data_dir, **flags):
    args = make_args(data_dir, **flags)
    replicas, _ = synth.make_replicas(args, synth.load_cifar10(args))
    replicas.start_stage(0)
    return replicas


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def network_of(args, vector):
    network = synth.Network(args)
    vector_to_parameters(vector.clone(), network.parameters())
    return network


@pytest.fixture
def double_precision():
    """In which no ReLU's input is on the other side of zero by a rounding error."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_forward(w, x, args):
    """The network by PyTorch's functions: parameters in their order, [B, 3, 32, 32] -> [B, 10]."""
    w = iter(w)

    def activation(x, crelu):
        return torch.cat([F.relu(x), F.relu(-x)], dim=1) if crelu else F.relu(x)

    for stride in args.conv_strides:
        x = F.conv2d(x, next(w), next(w), stride)
        if args.layer_norm and args.layer_norm_kind == "sample":
            x = F.group_norm(x, 1, next(w), next(w), eps=1e-6)
        elif args.layer_norm:
            x = F.layer_norm(x.movedim(1, 3), x.shape[1:2], next(w), next(w), 1e-6).movedim(3, 1)
        x = activation(x, args.crelu and args.crelu_scope == "all")
    x = x.flatten(1)
    for _ in range(2):
        x = F.linear(x, next(w), next(w))
        if args.layer_norm and args.layer_norm_scope == "all":
            x = F.layer_norm(x, x.shape[1:], next(w), next(w), 1e-6)
        x = activation(x, args.crelu)
    return F.linear(x, next(w), next(w))


def plain_loop(args, seed, learning_rate, weight_decay, num_updates):
    """One replica by torch.optim.SGD and a loop over parameters: weights, slow weights, losses."""
    images, labels, *_ = synth.load_cifar10(args)
    torch.manual_seed(seed)
    w = list(synth.Network(args).parameters())
    initial = slow = flat(w).detach()
    decay, pull = (0.0, weight_decay) if args.l2_init else (weight_decay, 0.0)
    optimizer = torch.optim.SGD(w, learning_rate, args.momentum, weight_decay=decay)
    mean = np.reshape((0.4914, 0.4822, 0.4465), (3, 1, 1))
    std = np.reshape((0.2023, 0.1994, 0.2010), (3, 1, 1))
    losses = []

    def gradient(w, x, y):
        loss = F.cross_entropy(plain_forward(w, x, args), y)
        penalty = pull / 2 * (flat(w) - initial).square().sum()
        return loss.item(), torch.autograd.grad(loss + penalty, w)

    for update in range(num_updates):
        stage, position = divmod(update, args.updates_per_stage)
        index = synth.stage_batches(seed, stage, len(images), args)[position]
        x = torch.from_numpy((images[index] / 255 - mean) / std)
        y = torch.from_numpy(synth.stage_labels(seed, stage, args)[labels[index]])
        loss, g = gradient(w, x, y)
        losses.append(loss)
        if args.sam_rho > 0:
            norm = flat(g).norm()
            perturbed = [p + args.sam_rho * q / norm for p, q in zip(w, g, strict=True)]
            _, g = gradient(perturbed, x, y)
        for p, q in zip(w, g, strict=True):
            p.grad = q
        optimizer.step()
        for layer, bias in itertools.pairwise(w):
            if args.weight_clip > 0 and layer.ndim > 1:
                bound = args.weight_clip * layer[0].numel() ** -0.5
                layer.data.clamp_(-bound, bound)
                bias.data.clamp_(-bound, bound)
        slow = args.tortoise_ema * slow + (1 - args.tortoise_ema) * flat(w).detach()
    return flat(w), slow, losses


@pytest.mark.parametrize("method", METHODS)
def test_every_replica_equals_a_plain_loop(data_dir, grouping, double_precision, method):
    """In two stages of two updates each, with other labels."""
    rates, decays, seeds = (0.03, 0.01), (0.1, 0.0), (5, 6)
    flags = METHODS[method] | dict(learning_rate=rates, weight_decay=decays, first_seed=5)
    replicas = make_replicas(data_dir, task="label", updates_per_stage=2, **flags)
    losses = [replicas.update(), replicas.update()]
    replicas.start_stage(1)
    losses = torch.stack([*losses, replicas.update(), replicas.update()], dim=1)
    assert len(replicas.weights) == 8
    for r, (rate, decay, seed) in enumerate(itertools.product(rates, decays, seeds)):
        weights, slow, plain_losses = plain_loop(replicas.args, seed, rate, decay, 4)
        np.testing.assert_allclose(losses[r], plain_losses, rtol=1e-9)
        torch.testing.assert_close(replicas.weights[r], weights, rtol=1e-8, atol=1e-12)
        if replicas.slow is not None:
            torch.testing.assert_close(replicas.slow[r], slow, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "grouping", ["cuda" if torch.cuda.is_available() else "all at once"], indirect=True
)
@pytest.mark.parametrize("method", ["PLASTIC, L2 Init, clipped, tortoise"])
def test_a_cuda_graph_does_what_the_eager_update_does(data_dir, grouping, method, monkeypatch):
    """Without CUDA by stand-ins: capture() leaves no trace; nothing waits, no tensor moves."""
    capture, ends = synth.capture, []

    def stand_in(function, tensors):
        capture(function, tensors)
        return function

    if grouping != "cuda":
        monkeypatch.setattr(synth, "capture", stand_in)
        stand_in_cuda(monkeypatch)
    for graph in (False, True):
        args = make_args(data_dir, cuda_graph=graph, **METHODS[method])
        args.device = "cuda"
        replicas, update = synth.make_replicas(args, synth.load_cifar10(args))
        tensors = {name: x for name, x in vars(replicas).items() if isinstance(x, torch.Tensor)}
        losses = []
        for stage in (0, 1):
            replicas.reset_heads(stage)
            replicas.recycle(stage)
            replicas.start_stage(stage)
            for _ in range(3):
                with NoHostSync():
                    losses.append(update().clone())
        assert all(getattr(replicas, name) is x for name, x in tensors.items())
        ends.append([*losses, *tensors.values()])
    for eager, captured in zip(*ends, strict=True):
        rtol, atol = (1e-3, 1e-4) if grouping == "cuda" else (0, 0)
        torch.testing.assert_close(captured, eager, rtol=rtol, atol=atol)


# --- Interventions --------------------------------------------------------------------------------


def test_what_happens_when(data_dir, monkeypatch):
    """(r)esets, (d)ormant units, (=) the hare back at the tortoise, (u)pdates, (e)valuations.

    Recycled units learn before they are measured; after the last update there is no recycling.
    """
    happened = []
    for name, letter in dict(reset_heads="r", recycle="d", update="u", evaluate="e").items():
        owner = synth if name == "evaluate" else synth.Replicas
        original = getattr(owner, name)

        def noted(replicas, *arguments, letter=letter, original=original):
            back = letter == "u" and torch.equal(replicas.weights, replicas.slow)
            happened.append("=u" if back else letter)
            return original(replicas, *arguments)

        monkeypatch.setattr(owner, name, noted)
    flags = dict(reset_interval=2, redo_interval=2, tortoise_interval=3)
    synth.run(make_args(data_dir, num_stages=5, updates_per_stage=3, **flags))
    assert "".join(happened) == "=uudue" + "uduue" + "rduudue" + "=uduue" + "rduudue"


def test_each_stage_has_its_labels_its_images_and_its_fresh_head(data_dir, monkeypatch):
    heads, updates, update = [], [], synth.Replicas.update
    args = make_args(data_dir, task="label", num_stages=5, updates_per_stage=3, reset_interval=2,
                     redo_interval=4)  # fmt: skip

    def checked(replicas):
        stage, position = divmod(len(updates), 3)
        updates.append(stage)
        for i, seed in enumerate(replicas.seeds):
            labels = synth.stage_labels(seed, stage, args)
            assert replicas.class_labels[i].tolist() == labels.tolist()
            batches = synth.stage_batches(seed, stage, 200, args)
            assert np.array_equal(replicas.batches[:, i], batches)
        if (stage, position) in ((2, 0), (4, 0)):
            heads.append(replicas.weights[:, replicas.head_start :].clone())
        return update(replicas)

    recycled = []
    monkeypatch.setattr(synth.Replicas, "recycle", lambda _, step: recycled.append(step))
    monkeypatch.setattr(synth.Replicas, "update", checked)
    synth.run(args)
    assert recycled == [4, 8, 12]  # by the updates made: each time other fresh weights
    assert len(updates) == 15 and len(heads) == 2
    assert (heads[0] != heads[1]).float().mean() > 0.99


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_reset_renews_the_head_and_moves_the_backbone_towards_one_fresh_draw(data_dir, alpha):
    """Fast and slow weights alike. The backbone stays where it is without Shrink & Perturb."""
    flags = dict(shrink_perturb_alpha=alpha, tortoise_interval=9, layer_norm_scope="all")
    replicas = make_replicas(data_dir, learning_rate=(0.1, 0.01), **flags)
    replicas.update()
    before = {name: tensor.clone() for name, tensor in replicas.tensors().items()}
    replicas.reset_heads(2)
    fresh = replicas.fresh_weights(synth.RESETS, 2)
    head = len(flat(synth.Network(replicas.args).backbone.parameters()))
    for name in ("weights", "slow"):
        moved, expected = replicas.tensors()[name], alpha * before[name] + (1 - alpha) * fresh
        torch.testing.assert_close(moved[:, :head], expected[:, :head])
        assert torch.equal(moved[:, head:], fresh[:, head:])
    assert torch.equal(replicas.momentum[:, :head], before["momentum"][:, :head])
    assert before["momentum"][:, head:].any() and not replicas.momentum[:, head:].any()
    # The same draw for each seed, whatever the setting; another one each time.
    assert torch.equal(fresh[:2], fresh[2:]) and not torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh, replicas.fresh_weights(synth.RESETS, 4))
    assert not torch.equal(fresh, replicas.fresh_weights(synth.RECYCLED, 2))
    for w in replicas.parameters(fresh).values():
        if w.ndim > 2:
            bound = w[0, 0].numel() ** -0.5  # PyTorch's initialisation is uniform within
            assert 0.9 * bound < w.abs().max() <= bound


@torch.no_grad()
def recycled_by_hand(replicas, r, *rows):
    """ReDo unit by unit on replica r of weights, momentum and fresh weights.

    Its weights and momentum after it, and how many units were dormant.
    """
    networks = [network_of(replicas.args, vectors[r]) for vectors in rows]
    layers, moments, fresh = (nn.Sequential(*n.backbone, *n.head) for n in networks)
    x, dormant = replicas.next_batch(slice(len(replicas.weights)))[0][r], []
    drawn = [k for k, m in enumerate(layers) if isinstance(m, nn.Conv2d | nn.Linear)]
    for into, out in itertools.pairwise(drawn):
        (k,) = [k for k in range(into, out) if isinstance(layers[k], nn.ReLU | synth.CReLU)]
        before = layers[into:k](x)
        h = before if isinstance(layers[k], synth.CReLU) else F.relu(before)  # |x| is x+ and x-
        score = h.abs().transpose(0, 1).flatten(1).mean(1)
        for unit in (score <= replicas.args.redo_tau * score.mean()).nonzero().flatten():
            # The inputs of the next layer that the unit reaches, alone, with either sign.
            probe = torch.zeros_like(before[:2])
            probe[0, unit], probe[1, unit] = 1.0, -1.0
            reached = layers[k:out](probe).transpose(0, 1).flatten(1).any(1)
            dormant.append((into, unit, out, reached))
        x = layers[into:out](x)
    for into, unit, _, _ in dormant:
        layers[into].weight[unit] = fresh[into].weight[unit]
        layers[into].bias[unit] = 0
        moments[into].weight[unit] = moments[into].bias[unit] = 0
    for _, _, out, reached in dormant:
        layers[out].weight[:, reached] = moments[out].weight[:, reached] = 0
    return *(flat(n.parameters()) for n in (layers, moments)), len(dormant)


@pytest.mark.parametrize("flags", [BASE, dict(crelu_scope="all", conv_strides=(3, 1, 1))])
def test_redo_renews_dormant_units_and_touches_nothing_else(data_dir, grouping, flags):
    """Here a unit is dormant up to two thirds of its layer's mean, so that several are."""
    flags = flags | dict(redo_interval=4, redo_tau=2 / 3, learning_rate=(0.1, 0.01))
    replicas = make_replicas(data_dir, **flags)
    for _ in range(3):
        replicas.update()
    replicas.weights[3] = math.nan
    weights, momentum = replicas.weights.clone(), replicas.momentum.clone()
    fresh = replicas.fresh_weights(synth.RECYCLED, 4)
    replicas.recycle(4)
    for r in range(3):
        w, m, count = recycled_by_hand(replicas, r, weights, momentum, fresh)
        assert count > 20
        assert torch.equal(replicas.weights[r], w) and torch.equal(replicas.momentum[r], m)
    assert replicas.weights[3].isnan().all() and torch.equal(replicas.momentum[3], momentum[3])


# --- Evaluation and metrics -----------------------------------------------------------------------


def test_accuracy_by_hand(data_dir, grouping):
    """By the slow weights, where there are some."""
    flags = dict(learning_rate=(0.1, 0.01), tortoise_interval=1, tortoise_ema=0.7)
    replicas = make_replicas(data_dir, task="label", **flags)
    for _ in range(5):
        replicas.update()
    train, test = synth.evaluate(replicas, 0).values()
    images, labels, test_images, test_labels = synth.load_cifar10(replicas.args)
    for r, seed in enumerate((1, 2, 1, 2)):
        network = network_of(replicas.args, replicas.slow[r])
        mapping = synth.stage_labels(seed, 0, replicas.args)
        for x, y, accuracy in ((images, labels, train), (test_images, test_labels, test)):
            predicted = network(replicas.standardise(torch.from_numpy(x))).argmax(1).numpy()
            share = np.mean(predicted == mapping[y])
            assert accuracy[r] == pytest.approx(share, abs=0.011)  # a tie or two


def test_accuracy_counts_the_images_of_a_last_smaller_batch(data_dir):
    replicas = make_replicas(data_dir, batch_size=32)  # of 200 and of 40 images
    replicas.weights[:, -10:] = torch.arange(10) == 0  # the last layer's biases: all are class 0
    replicas.weights[:, -10:] *= 1e9
    train, test = synth.evaluate(replicas, 3).values()
    assert train[0] == pytest.approx((replicas.labels == 0).float().mean().item())
    assert test[0] == pytest.approx((replicas.test_labels == 0).float().mean().item())


def test_one_weight_that_is_not_finite_is_divergence(data_dir):
    replicas = make_replicas(data_dir)
    replicas.weights[1, 5] = math.inf
    assert replicas.diverged().tolist() == [False, True]


def test_the_images_measured_are_drawn_from_all_that_the_stage_trains_on(data_dir, monkeypatch):
    replicas, asked = make_replicas(data_dir), []
    monkeypatch.setattr(synth, "seen_images", lambda *args: np.arange(20_000))
    monkeypatch.setattr(synth, "accuracy", lambda *args: asked.append(args[-1]))
    synth.evaluate(replicas, 0)
    train, test = asked
    assert train.shape == (2, 10_000) and all(len(set(row.tolist())) == 10_000 for row in train)
    assert not torch.equal(train[0], train[1])
    assert 4_700 < (train >= 10_000).sum(1).float().mean() < 5_300
    assert torch.equal(test, torch.arange(40).expand(2, 40))
    synth.evaluate(replicas, 1)
    assert not torch.equal(train, asked[2])


def test_metrics_are_those_of_each_replicas_own_network_images_and_labels(data_dir):
    flags = BASE | dict(task="label", learning_rate=(0.1, 0.01), tortoise_interval=1)
    replicas = make_replicas(data_dir, updates_per_stage=150, **flags)  # 1,200 images
    for _ in range(5):
        replicas.update()
    before = {name: tensor.clone() for name, tensor in replicas.tensors().items()}
    measured = synth.plasticity_metrics(replicas, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in replicas.tensors().items())
    images, labels, *_ = synth.load_cifar10(replicas.args)
    for r, seed in enumerate((1, 2, 1, 2)):
        network, w = network_of(replicas.args, replicas.weights[r]), replicas.weights[r]
        index = synth.stage_batches(seed, 0, len(images), replicas.args).flatten()
        x = replicas.standardise(torch.from_numpy(images[index]))
        y = torch.from_numpy(synth.stage_labels(seed, 0, replicas.args)[labels[index[:32]]])
        hidden = F.relu(network.head[0](network.backbone(x)))
        features = F.relu(network.head[2](hidden))
        loss = F.cross_entropy(network(x[:32]), y)
        parameters = list(network.parameters())
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
        torch.manual_seed(seed)
        initial = flat(synth.Network(replicas.args).parameters())
        for name, value in (
            ("active_units/head", (torch.cat([hidden, features], dim=1)[:512] > 0).float().mean()),
            ("feature_norm", features[:1024].norm(dim=1).mean()),
            ("weight_norm", w.norm()),
            ("weight_distance", (w - initial).norm()),
            ("gradient_norm", gradient.norm()),
        ):
            assert measured[name][r] == pytest.approx(value.item(), rel=1e-4)
        scores = synth.unit_scores(network, lambda network=network, x=x: network(x[:512]))
        for name, share in synth.dormant_ratios(scores).items():
            assert measured[name][r] == share
    # Power iteration on the last one's Hessian + 1, whose largest eigenvalue is so in size, too.
    vector = torch.randn(len(gradient), generator=torch.Generator().manual_seed(9))
    for _ in range(400):
        vector = vector / vector.norm()
        product = flat(torch.autograd.grad(gradient @ vector, parameters, retain_graph=True))
        eigenvalue, vector = (vector @ product).item(), product + vector
    sharpness = measured["hessian_max_eigenvalue"][r]
    assert sharpness == pytest.approx(eigenvalue, rel=0.02, abs=0.02)


# --- Summaries ------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, size=40)
    half = 1.96 * values.std() / 40**0.5
    expected = [values.mean() - half, values.mean() + half]
    assert synth.bootstrap_interval(values) == pytest.approx(expected, abs=0.003)
    assert synth.bootstrap_interval(np.array([0.3])) is None


def test_a_summary_by_hand():
    """Two settings, two seeds, three stages; the last replica diverged in stage 1."""
    test = [[0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, math.nan], [0.5, 0.9, 0.4, math.nan]]
    train = [[x + 0.1 for x in stage] for stage in test]
    metrics = [{"stage": 1, "active_units/head": [1.0, 2.0, 3.0, math.nan]}]
    first, second = synth.summarise([(0.1, 0.0), (0.01, 0.5)], train, test, metrics)
    assert (first["learning_rate"], first["weight_decay"]) == (0.1, 0.0)
    assert (second["learning_rate"], second["weight_decay"]) == (0.01, 0.5)
    assert first["test_accuracy"] == [[0.1, 0.3, 0.5], [0.2, 0.4, 0.9]]
    assert first["train_accuracy"] == [[0.2, 0.4, 0.6], [pytest.approx(0.3), 0.5, 1.0]]
    assert first["final_accuracy"] == first["final_accuracy_interval"] == [0.5, 0.9]
    assert first["final_accuracy_mean"] == pytest.approx(0.7)
    assert first["mean_accuracy"] == pytest.approx([0.3, 0.5])
    assert first["mean_accuracy_mean"] == pytest.approx(0.4)
    assert first["mean_accuracy_interval"] == pytest.approx([0.3, 0.5])
    assert first["metrics"] == [{"stage": 1, "active_units/head": [1.0, 2.0]}]
    assert second["test_accuracy"][0] == [0.3, 0.5, 0.4]
    assert math.isnan(second["final_accuracy_mean"])
    assert second["metrics"][0]["active_units/head"][0] == 3.0
    # The diverged setting loses wherever it stands.
    assert synth.best_setting([first, second]) is synth.best_setting([second, first]) is first
    line = "label: final test accuracy 0.700 [0.500, 0.900] over 2 seeds"
    assert synth.summary("label", first) == f"{line}, learning rate 0.1, weight decay 0"
