"""The synthetic experiment: data, tasks, replicas against a plain loop, resets, metrics."""

import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import struct
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import synth_cifar_plasticity as synth

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
    small = dict(num_seeds=2, num_stages=4, updates_per_stage=6, batch_size=8, reset_interval=2)
    small |= dict(device="cpu", run_dir=str(data_dir.parent / "runs"), exp_name="x", log_interval=4)
    return synth.Args(data_dir=str(data_dir), **small | flags)


BASE = dict(layer_norm=False, crelu=False, sam_rho=0.0, reset_interval=0)
METHODS = {
    "base": BASE,
    "LN": BASE | dict(layer_norm=True),
    "pixel LN, all": BASE | dict(layer_norm=True, layer_norm_kind="pixel", layer_norm_scope="all"),
    "SAM": BASE | dict(sam_rho=0.1),
    "CReLU, all": BASE | dict(crelu=True, crelu_scope="all"),
    "PLASTIC": {},
    "released strides": dict(conv_strides=(3, 1, 1)),
    "L2 Init, clipped": BASE | dict(l2_init=True, weight_clip=0.5),
    "PLASTIC, L2 Init, clipped, tortoise": dict(l2_init=True, weight_clip=1, tortoise_interval=1),
}


# --- Data and tasks -------------------------------------------------------------------------------


def test_images_and_labels_are_those_of_the_files(data_dir):
    images, labels, test_images, test_labels = synth.load_cifar10(make_args(data_dir))
    assert images.shape == (200, 3, 32, 32) and test_images.shape == (40, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    with open(data_dir / "cifar-10-batches-py" / "data_batch_3", "rb") as file:
        third = pickle.load(file)
    assert np.array_equal(images[80:120].reshape(40, 3072), third[b"data"])
    assert labels[80:120].tolist() == third[b"labels"]
    assert all((images[i, :, 3 * labels[i]] == 255).all() for i in range(200))
    assert (test_images[7, :, 3 * test_labels[7]] == 255).all()


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2, which made the official files, wrote its strings."""

    def save_string(self, data):
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string}


def test_the_official_files_were_pickled_by_python_2_and_an_older_numpy(data_dir):
    path = data_dir / "cifar-10-batches-py" / "test_batch"
    batch = pickle.loads(path.read_bytes())
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(batch)
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old and b"_codecs" not in old
    path.write_bytes(old)
    images, labels = synth.read_batch(path)
    assert np.array_equal(images.reshape(-1, 3072), batch[b"data"])
    assert labels.tolist() == batch[b"labels"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


class Pointers:
    """An array of objects whose addresses the file chooses: using one would crash the process."""

    def __reduce__(self):
        return np.ndarray, ((40,), "O", b"A" * 320)


IMAGES = np.arange(40 * 3072).reshape(40, -1).astype(np.uint8)
BAD_BATCHES = {
    "an array of objects for labels": {b"labels": Pointers(), b"data": IMAGES},
    "an array of objects": {b"labels": [1] * 40, b"data": Pointers()},
    "images column by column": {b"labels": [1] * 40, b"data": np.asfortranarray(IMAGES)},
    "no images": {b"labels": [], b"data": IMAGES[:0]},
    "code for images": {b"labels": [1], b"data": Evil()},
    "code for a label": {b"labels": [1] * 39 + [Evil()], b"data": IMAGES},
    "code in an array": {b"labels": [1], b"data": np.array([Evil()], dtype=object)},
    "code beside the rest": {b"labels": [10], b"data": IMAGES, b"more": Evil()},
    "a list": [1, 2],
    "a label out of range": {b"labels": [10] + [1] * 39, b"data": IMAGES},
    "a negative label": {b"labels": [-1] + [1] * 39, b"data": IMAGES},
    "another shape": {b"labels": [1], b"data": np.zeros((1, 9), np.uint8)},
    "another type": {b"labels": [1], b"data": np.zeros((1, 3072))},
}
BAD_FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    **{
        kind: lambda path, batch=batch: path.write_bytes(pickle.dumps(batch))
        for kind, batch in BAD_BATCHES.items()
    },
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_not_cifar_gets_one_line_and_runs_no_code(data_dir, kind, monkeypatch):
    monkeypatch.chdir(data_dir)
    BAD_FILES[kind](data_dir / "cifar-10-batches-py" / "data_batch_2")
    with pytest.raises(SystemExit, match=r"data_batch_2: not a file of cifar-10-batches-py \(\w+"):
        synth.load_cifar10(make_args(data_dir))
    assert not (data_dir / "evil").exists()


def test_code_in_a_part_that_is_not_read_does_not_run_either(data_dir, monkeypatch):
    monkeypatch.chdir(data_dir)
    path = data_dir / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {b"more": Evil()}))
    synth.load_cifar10(make_args(data_dir))
    assert not (data_dir / "evil").exists()


def test_no_images_and_no_download(tmp_path):
    with pytest.raises(SystemExit, match="pass --download, or another --data-dir"):
        synth.load_cifar10(make_args(tmp_path / "none", download=False))
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_the_files_itself_will_do(data_dir):
    args = make_args(data_dir / "cifar-10-batches-py", download=False)
    assert len(synth.load_cifar10(args)[0]) == 200


def test_a_download_is_checked_and_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_images(tmp_path / "source", per_file=3)
    archive, data = tmp_path / "archive.tar.gz", tmp_path / "data"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(synth, "URL", archive.as_uri())
    names = lambda: {path.name for path in data.iterdir()}  # noqa: E731
    with pytest.raises(SystemExit, match="invalid hash"):
        synth.load_cifar10(make_args(data))
    assert names() == {"cifar-10-batches-py.lock"}
    monkeypatch.setattr(synth, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    images, *_ = synth.load_cifar10(make_args(data))
    assert len(images) == 15
    assert names() == {"cifar-10-batches-py.lock", "cifar-10-batches-py"}
    archive.unlink()
    synth.download(data / "cifar-10-batches-py")  # another process was faster
    assert names() == {"cifar-10-batches-py.lock", "cifar-10-batches-py"}


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


# --- Networks -------------------------------------------------------------------------------------


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


# --- Update ---------------------------------------------------------------------------------------


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
    """In double precision no ReLU's input is on the other side of zero by a rounding error."""
    for name in ("weights", "momentum", "initial", "slow", "clip_bounds"):
        if getattr(replicas, name, None) is not None:
            setattr(replicas, name, getattr(replicas, name).double())
    settings = torch.tensor(replicas.settings, dtype=torch.float64)
    settings = settings.repeat_interleave(len(replicas.seeds), 0)
    replicas.learning_rate, replicas.weight_decay = settings.split(1, dim=1)
    for name, values in (("mean", synth.MEAN), ("std", synth.STD)):
        setattr(replicas, name, 255 * torch.tensor(values, dtype=torch.float64).view(3, 1, 1))
    return replicas


def plain_loop(data_dir, args, seed, learning_rate, weight_decay, stage, num_updates):
    """One replica by nn.Module, torch.optim.SGD and a loop over parameters, in double precision."""
    images, labels, *_ = synth.load_cifar10(args)
    torch.manual_seed(seed)
    network = synth.Network(args).double()
    initial, slow = copy.deepcopy(network), copy.deepcopy(network)
    decay = 0.0 if args.l2_init else weight_decay
    optimizer = torch.optim.SGD(
        network.parameters(), lr=learning_rate, momentum=args.momentum, weight_decay=decay
    )

    def penalty():
        pairs = zip(network.parameters(), initial.parameters(), strict=True)
        moved = sum((w - w_0.detach()).square().sum() for w, w_0 in pairs)
        return weight_decay / 2 * moved if args.l2_init else 0.0

    mean, std = (np.array(x).reshape(3, 1, 1) for x in (synth.MEAN, synth.STD))
    batches = synth.stage_batches(seed, stage, len(images), args)
    mapping = synth.stage_labels(seed, stage, args)
    losses = []
    for index in batches[:num_updates]:
        x = torch.from_numpy((images[index] / 255 - mean) / std)
        y = torch.from_numpy(mapping[labels[index]])
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        (loss + penalty()).backward()
        losses.append(loss.item())
        if args.sam_rho > 0:
            before = copy.deepcopy(network.state_dict())
            norm = sum(w.grad.square().sum() for w in network.parameters()).sqrt()
            with torch.no_grad():
                for w in network.parameters():
                    w += args.sam_rho * w.grad / norm
            optimizer.zero_grad()
            (F.cross_entropy(network(x), y) + penalty()).backward()
            network.load_state_dict(before)
        optimizer.step()
        with torch.no_grad():
            for module in network.modules():
                if args.weight_clip > 0 and isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                    bound = float(np.float32((module.weight.numel() / len(module.weight)) ** -0.5))
                    bound *= args.weight_clip
                    module.weight.clamp_(-bound, bound)
                    module.bias.clamp_(-bound, bound)
            for w_slow, w in zip(slow.parameters(), network.parameters(), strict=True):
                w_slow.copy_(0.999 * w_slow + 0.001 * w)
    return network, losses, slow


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
                network, plain_losses, slow = plain
                np.testing.assert_allclose(losses[:, replica], plain_losses, rtol=1e-9)
                w = torch.nn.utils.parameters_to_vector(network.parameters())
                torch.testing.assert_close(replicas.weights[replica], w, rtol=1e-8, atol=1e-12)
                if replicas.slow is not None:
                    w = torch.nn.utils.parameters_to_vector(slow.parameters())
                    torch.testing.assert_close(replicas.slow[replica], w, rtol=1e-8, atol=1e-12)
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
@pytest.mark.parametrize("weight", [0, 5000, -3000], ids=["first layer", "backbone", "head"])
def test_a_replica_that_diverges_stays_nan_and_the_others_do_not_feel_it(
    data_dir, grouping, sam_rho, weight
):
    flags = dict(num_seeds=3, sam_rho=sam_rho, crelu_scope="all", layer_norm_scope="all")
    whole, broken = (make_replicas(data_dir, **flags) for _ in range(2))
    broken.weights[1, weight] = torch.inf
    for _ in range(3):
        losses, broken_losses = whole.update(), broken.update()
    assert broken.diverged().tolist() == [False, True, False]
    assert broken_losses.isnan().tolist() == [False, True, False]
    for replica in (0, 2):
        torch.testing.assert_close(broken.weights[replica], whole.weights[replica])
        torch.testing.assert_close(broken_losses[replica], losses[replica])
    measured = synth.evaluate(broken, 0) | synth.plasticity_metrics(broken, 0)
    for values in measured.values():
        assert np.isnan(values).tolist() == [False, True, False]


def test_a_reset_renews_the_fully_connected_layers_and_their_momentum_only(data_dir):
    replicas = make_replicas(data_dir, learning_rate=(0.1, 0.01), layer_norm_scope="all")
    replicas.update()
    weights, momentum = replicas.weights.clone(), replicas.momentum.clone()
    pointer = replicas.weights.data_ptr()
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
            bound = w.shape[1] ** -0.5  # PyTorch's initialisation is uniform within
            assert not torch.equal(new[0], new[1])
            assert 0.9 * bound < new.abs().max() <= bound
    weights = replicas.weights.clone()
    replicas.reset_heads(4)
    assert not torch.equal(replicas.weights, weights)  # another draw each time


def test_shrink_and_perturb_moves_the_backbone_towards_one_fresh_draw(data_dir):
    """Fast and slow weights alike, as the Atari script moves the online and the target network."""
    flags = dict(shrink_perturb_alpha=0.6, tortoise_interval=9, learning_rate=(0.1, 0.01))
    replicas = make_replicas(data_dir, **flags)
    replicas.update()
    before = {name: tensor.clone() for name, tensor in replicas.tensors().items()}
    replicas.reset_heads(2)
    head = replicas.head_start
    assert torch.equal(replicas.slow[:, head:], replicas.weights[:, head:])
    assert torch.equal(replicas.momentum[:, :head], before["momentum"][:, :head])
    phis = []
    for name in ("weights", "slow"):
        moved = getattr(replicas, name) - 0.6 * before[name]
        phis.append(moved[:, :head] / 0.4)
    torch.testing.assert_close(phis[0], phis[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(phis[0][:2], phis[0][2:], rtol=1e-4, atol=1e-5)  # of each seed
    first = phis[0][:, : 32 * 27]  # the first convolution: drawn uniformly up to 27 ** -0.5
    assert 0.95 * 27**-0.5 < first.abs().max() < 1.001 * 27**-0.5
    scale = slice(32 * 27 + 32, 32 * 27 + 64)  # its LayerNorm's
    torch.testing.assert_close(phis[0][:, scale], torch.ones(4, 32), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="--shrink-perturb-alpha acts at resets"):
        make_args(data_dir, shrink_perturb_alpha=0.6, reset_interval=0)


@torch.no_grad()
def recycled_by_hand(replicas, r, weights, momentum, fresh):
    """What ReDo makes of replica r, unit by unit: its weights and momentum; how many dormant."""
    network, fresh_network, moment = (synth.Network(replicas.args) for _ in range(3))
    for module, vectors in ((network, weights), (fresh_network, fresh), (moment, momentum)):
        torch.nn.utils.vector_to_parameters(vectors[r].clone(), module.parameters())
    modules = {n: m for n, m in network.named_modules() if not list(m.children())}
    x, changes = replicas.next_batch(slice(len(weights)))[0][r], []
    names = list(modules)
    for position, (name, module) in enumerate(modules.items()):
        before, x = x, module(x)
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            layer = name
        if not isinstance(module, torch.nn.ReLU | synth.CReLU):
            continue
        layers = (torch.nn.Conv2d, torch.nn.Linear)
        following = next(n for n in names[position:] if isinstance(modules[n], layers))
        between = [modules[n] for n in names[position : names.index(following)]]
        h = before if isinstance(module, synth.CReLU) else x  # |x| is that of the pair x+, x-
        score = h.abs().transpose(0, 1).flatten(1).mean(1)
        for unit in (score <= replicas.args.redo_tau * score.mean()).nonzero().flatten().tolist():
            # The inputs of the next layer that the unit reaches, alone, with either sign.
            probe = torch.zeros_like(before[:2])
            probe[0, unit], probe[1, unit] = 1.0, -1.0
            for other in between:
                probe = other(probe)
            reached = probe.transpose(0, 1).flatten(1).any(1).nonzero().flatten()
            changes.append((layer, unit, following, reached))
    for layer, unit, _, _ in changes:
        network.get_submodule(layer).weight[unit] = fresh_network.get_submodule(layer).weight[unit]
        network.get_submodule(layer).bias[unit] = 0
        moment.get_submodule(layer).weight[unit] = moment.get_submodule(layer).bias[unit] = 0
    for _, _, following, inputs in changes:
        for module in (network, moment):
            module.get_submodule(following).weight[:, inputs] = 0
    to_vector = torch.nn.utils.parameters_to_vector
    return to_vector(network.parameters()), to_vector(moment.parameters()), len(changes)


@pytest.mark.parametrize("flags", [BASE, {}, dict(crelu_scope="all", conv_strides=(3, 1, 1))])
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
        assert not torch.equal(w, weights[r])
    assert replicas.weights[3].isnan().all() and torch.equal(replicas.momentum[3], momentum[3])
    assert not torch.equal(fresh, replicas.fresh_weights(synth.RECYCLED, 8))
    assert not torch.equal(fresh[0], fresh[1]) and torch.equal(fresh[0], fresh[2])


def test_hare_and_tortoise(data_dir, monkeypatch):
    """Fast weights come back to the slow ones before stages 2 and 4, by which accuracy is measured."""
    slow, came_back = [], []
    evaluate, start_stage = synth.evaluate, synth.Replicas.start_stage

    def at_the_end(replicas, stage):
        slow.append(replicas.slow.clone())
        return evaluate(replicas, stage)

    def at_the_start(self, stage):
        came_back.append(stage > 0 and torch.equal(self.weights, slow[-1]))
        assert stage == 0 or torch.equal(self.slow, slow[-1])
        start_stage(self, stage)

    monkeypatch.setattr(synth, "evaluate", at_the_end)
    monkeypatch.setattr(synth.Replicas, "start_stage", at_the_start)
    synth.run(make_args(data_dir, num_stages=5, tortoise_interval=2, reset_interval=0))
    assert came_back == [False, False, True, False, True]
    monkeypatch.undo()
    replicas = make_replicas(data_dir, tortoise_interval=2)
    replicas.weights.normal_()
    measured = synth.evaluate(replicas, 0)
    replicas.weights.copy_(replicas.slow)
    assert synth.evaluate(replicas, 0) == measured


NEUTRAL = {
    "redo": dict(redo_interval=1, redo_tau=0.0),  # with CReLU no unit is at 0 always
    "clipping": dict(weight_clip=1e6),
    "tortoise": dict(tortoise_interval=5),
    "shrink": dict(shrink_perturb_alpha=1.0),
}


@pytest.mark.parametrize("kind", NEUTRAL)
def test_a_later_method_with_nothing_to_do_leaves_every_weight_as_it_is(data_dir, kind):
    ends = []
    for flags in ({}, NEUTRAL[kind]):
        replicas = make_replicas(data_dir, crelu_scope="all", **flags)
        for step in (1, 2):
            replicas.update()
            if replicas.args.redo_interval:
                replicas.recycle(step)
        replicas.reset_heads(2)
        ends.append((replicas.weights, replicas.momentum))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def test_recycled_units_have_learned_before_they_are_measured(data_dir, monkeypatch):
    """As a reset does, ReDo waits for the next update; after the last one there is none."""
    happened = []
    for owner, name in (
        (synth.Replicas, "recycle"),
        (synth.Replicas, "update"),
        (synth, "evaluate"),
    ):
        function = getattr(owner, name)

        def noted(*arguments, name=name, function=function):
            happened.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, noted)
    synth.run(make_args(data_dir, redo_interval=2, updates_per_stage=2, num_stages=2))
    assert "".join(name[0] for name in happened).replace("ee", "e") == "uueruue"


def test_all_later_methods_at_once_learn_and_continue_bit_for_bit(data_dir, monkeypatch):
    flags = dict(redo_interval=5, redo_tau=0.3, l2_init=True, weight_clip=3.0, tortoise_interval=2)
    flags |= dict(shrink_perturb_alpha=0.8, metrics_interval=4, resume=True, updates_per_stage=20)
    flags |= dict(tortoise_ema=0.8, batch_size=32, learning_rate=(0.03,))
    results, update = [], synth.Replicas.update

    def stopped(self):
        if int(self.updates) + 1 == 33:
            signal.raise_signal(signal.SIGTERM)
        return update(self)

    for name in ("whole", "broken"):
        args = make_args(data_dir, exp_name=name, **flags)
        if name == "broken":
            monkeypatch.setattr(synth.Replicas, "update", stopped)
            with pytest.raises(SystemExit):
                synth.run(args)
            monkeypatch.setattr(synth.Replicas, "update", update)
        synth.run(args)
        path = data_dir.parent / "runs" / f"input__{name}__1-2" / "result.json"
        results.append(json.loads(path.read_text()))
    assert results[1]["resumed_at"] == [33]
    assert results[0]["sweep"] == results[1]["sweep"]
    assert results[0]["final_accuracy_mean"] > 0.3


def test_resets_come_every_so_many_stages_and_not_at_the_start(data_dir, monkeypatch):
    stages = []
    monkeypatch.setattr(synth.Replicas, "reset_heads", lambda self, stage: stages.append(stage))
    synth.run(make_args(data_dir, num_stages=7, reset_interval=3))
    assert stages == [3, 6]
    synth.run(make_args(data_dir, num_stages=7, reset_interval=0, exp_name="none"))
    assert stages == [3, 6]


def test_accuracy_by_hand(data_dir, grouping):
    replicas = make_replicas(data_dir, task="label", learning_rate=(0.1, 0.01))
    for _ in range(5):
        replicas.update()
    train, test = synth.evaluate(replicas, 0).values()
    images, labels, test_images, test_labels = synth.load_cifar10(replicas.args)
    for replica, seed in enumerate((1, 2, 1, 2)):
        network = synth.Network(replicas.args)
        torch.nn.utils.vector_to_parameters(replicas.weights[replica], network.parameters())
        mapping = synth.stage_labels(seed, 0, replicas.args)
        for x, y, accuracy in ((images, labels, train), (test_images, test_labels, test)):
            predicted = network(replicas.standardise(torch.from_numpy(x))).argmax(1).numpy()
            share = np.mean(predicted == mapping[y])
            assert accuracy[replica] == pytest.approx(share, abs=0.011)  # a tie or two


def test_the_images_measured_are_drawn_from_all_that_the_stage_trains_on(data_dir, monkeypatch):
    replicas = make_replicas(data_dir)
    monkeypatch.setattr(synth, "seen_images", lambda *args: np.arange(20_000))
    asked = []
    monkeypatch.setattr(synth, "accuracy", lambda *args: asked.append(args[-1]))
    synth.evaluate(replicas, 0)
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
        # 48, fewer than 512
        index = synth.stage_batches(seed, 0, len(images), replicas.args).flatten()
        x = replicas.standardise(torch.from_numpy(images[index]))
        hidden = [F.relu(network.head[0](network.backbone(x)))]
        hidden.append(F.relu(network.head[2](hidden[0])))
        active = sum((h > 0).sum().item() for h in hidden) / sum(h.numel() for h in hidden)
        assert metrics["active_units/head"][replica] == pytest.approx(active)
        y = torch.from_numpy(synth.stage_labels(seed, 0, replicas.args)[labels[index[:32]]])
        # Power iteration on the Hessian, shifted so that its largest eigenvalue is the largest in
        # size.
        parameters = list(network.parameters())
        loss = F.cross_entropy(network(x[:32]), y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        gradient = torch.cat([g.flatten() for g in gradients])
        vector, shift = torch.randn(len(gradient), generator=torch.Generator().manual_seed(9)), 1.0
        for _ in range(400):
            vector = vector / vector.norm()
            product = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
            product = torch.cat([g.flatten() for g in product])
            eigenvalue = (vector @ product).item()
            vector = product + shift * vector
        measured = metrics["hessian_max_eigenvalue"][replica]
        assert measured == pytest.approx(eigenvalue, rel=0.02, abs=0.02)


def test_sharpness_of_a_loss_that_is_not_finite_is_nan(data_dir):
    replicas = make_replicas(data_dir)
    replicas.weights[1] *= 1e18
    metrics = synth.plasticity_metrics(replicas, 0)["hessian_max_eigenvalue"]
    assert np.isnan(metrics).tolist() == [False, True]


def test_minibatches_follow_from_the_updates_of_the_whole_run(data_dir):
    """In stages of 2 updates, update 5 takes the second minibatch; no graph's warm-up runs over."""
    replicas = make_replicas(data_dir, updates_per_stage=2)
    for updates, position in ((0, 0), (1, 1), (2, 0), (5, 1)):
        replicas.updates.fill_(updates)
        images, labels = replicas.next_batch(slice(4))
        for seed in (0, 1):
            index = replicas.batches[position, seed]
            assert torch.equal(images[seed], replicas.standardise(replicas.images[index]))
            mapping = replicas.class_labels[seed]
            assert torch.equal(labels[seed], mapping[replicas.labels[index]])
    replicas.update()
    assert replicas.updates.item() == 6


# --- Summaries ------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, size=40)
    low, high = synth.bootstrap_interval(values)
    half = 1.96 * values.std() / 40**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.003)
    assert high == pytest.approx(values.mean() + half, abs=0.003)
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
    assert first["final_accuracy"] == [0.5, 0.9]
    assert first["final_accuracy_mean"] == pytest.approx(0.7)
    assert first["final_accuracy_interval"] == [0.5, 0.9]
    assert first["mean_accuracy"] == pytest.approx([0.3, 0.5])
    assert first["mean_accuracy_mean"] == pytest.approx(0.4)
    assert second["test_accuracy"][0] == [0.3, 0.5, 0.4]
    assert math.isnan(second["final_accuracy_mean"])
    assert first["metrics"] == [{"stage": 1, "active_units/head": [1.0, 2.0]}]
    assert second["metrics"][0]["active_units/head"][0] == 3.0
