"""Estimate the C-score of every training example of MNIST, or of a data set of your own.

A C-score is the expected accuracy of a model on an example that was held out of its training set, averaged
over training-set sizes (Jiang, Zhang, Talwar, Mozer, ICML 2021, arXiv 2002.03206). A run trains one model on
a random subset of the N examples; the subset's share of them is the subset ratio. The procedure:

    for k, ratio in enumerate(ratios):                          # 0.1 ... 0.9
        for run in range(n_runs):                               # 0 ... 199; in fact, a group of runs at once
            train, heldout = draw_batches(run, N, ratio * N)    # the subset's and the other examples' indices
            correct = heldout_correctness(run, train, heldout)  # int8 [N]: 1 right, 0 wrong, -1 not held out
            n_heldout[k] += correct >= 0
            n_correct[k] += correct == 1
    scores, profile = cscores(n_heldout, n_correct)
"""

import argparse
import hashlib
import inspect
import json
import logging
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm


# === One run: the algorithm =====================================================================
class Training(NamedTuple):  # settings of SGD with momentum; each int or float is a command-line option
    epochs: int = 10  # passes over the subset
    batch_size: int = 128  # examples in a step
    learning_rate: float = 0.1
    momentum: float = 0.9


def draw_batches(run, n_examples, n_subset, training):
    """Draw a run's subset, n_subset of the N examples, and cut it and the rest into batches of batch_size B.
    Returns the indices, int32, in one shape for all ratios, filled up with N (see below): train_batches
    [epochs, ceil(N / B), B], the subset in a new order for each epoch; heldout_batches [ceil(N / B), B]."""
    # As in the authors' code, all ratios of a run share its seed: nested subsets, equal initial weights.
    draws = np.random.RandomState(run)
    subset = draws.choice(n_examples, n_subset, replace=False)  # the start of a permutation, hence nested
    # All ratios share one compilation, hence one shape, with room for N examples; the rest of the room holds
    # the index N, the filler. Batches of filler alone are never visited; in a last batch it does no harm: JAX
    # clamps images[N] to the last image, labels[N] is -1, which `loss` ignores, and `test` drops index N.
    n_batches = math.ceil(n_examples / training.batch_size)
    filled = np.full((training.epochs + 1, n_batches * training.batch_size), n_examples, np.int32)
    filled[:-1, :n_subset] = [subset[draws.permutation(n_subset)] for _ in range(training.epochs)]
    filled[-1, : n_examples - n_subset] = np.delete(np.arange(n_examples), subset)  # held out
    batches = filled.reshape(training.epochs + 1, n_batches, training.batch_size)
    return batches[:-1], batches[-1]


def init(run, image_shape, n_classes, hidden=(512, 256)):
    """The params of a new network: a list of each layer's weights float32 [out, in] and biases float32 [out].
    image_shape: (height, width, channels); hidden: the widths of the layers between image and logits.
    For a network of your own, change this function and `predict`; params may be any pytree of float arrays.
    Dropout and random shifts of the images need a key. In `heldout_correctness`, make jax.random.key(~run)
    (no `init` uses that seed) and hand it to `train`; its `step` hands jax.random.fold_in(key, i) to `loss`,
    which hands it to `predict`; `test` gives `predict` none. (Batch normalization would count the filler.)
    After edits use a new --output-dir: a job refuses the old one, but notices edits only of six functions."""
    glorot = jax.nn.initializers.glorot_normal(in_axis=-1, out_axis=-2)
    widths = [math.prod(image_shape), *hidden, n_classes]
    keys = jax.random.split(jax.random.key(run, impl="threefry2x32"), (len(widths) - 1, 2))
    params = []
    for (key_weights, key_biases), n_in, n_out in zip(keys, widths, widths[1:]):
        weights = glorot(key_weights, (n_out, n_in), jnp.float32)  # [out, in]: measured faster on a CPU
        biases = 0.01 * jax.random.normal(key_biases, (n_out,), jnp.float32)  # as in the authors' code
        params.append((weights, biases))
    return params


def predict(params, images):
    """Logits float32 [B, classes] of images uint8 [B, height, width, channels]."""
    activations = images.reshape(len(images), -1).astype(jnp.float32) / 255
    *hidden, last = params
    for weights, biases in hidden:
        activations = jax.nn.relu(jnp.inner(activations, weights) + biases[None])  # [None]: no rank promotion
    weights, biases = last
    return jnp.inner(activations, weights) + biases[None]


def loss(params, images, labels):
    """Mean cross-entropy of a batch; examples with the label -1, which fill it up, do not count."""
    logits = predict(params, images)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)  # zeros for -1
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / jnp.sum(labels >= 0, dtype=logits.dtype)


def train(params, train_batches, n_train_batches, images, labels, training):
    """The params after SGD with momentum over the first n_train_batches of each epoch, which hold the subset.
    images: uint8 [N, height, width, channels]; labels: int32 [N + 1], the last of them the filler's, -1."""

    def step(i, state):
        params, velocity = state
        batch = train_batches[i // n_train_batches, i % n_train_batches]
        grads = jax.grad(loss)(params, images[batch], labels[batch])
        velocity = jax.tree.map(lambda v, g: training.momentum * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - training.learning_rate * v, params, velocity)
        return params, velocity

    start = params, jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, training.epochs * n_train_batches, step, start)[0]


def heldout_correctness(run, train_batches, heldout_batches, n_subset, images, labels, n_classes, training):
    """Train a run and test it: int8 [N], 1 where it predicts the label, 0 where not, -1 if not held out.
    run and n_subset are traced: all runs and ratios share one compilation. images, labels: as in `train`."""
    n_train_batches = (n_subset + training.batch_size - 1) // training.batch_size  # rounded up
    n_heldout_batches = (len(images) - n_subset + training.batch_size - 1) // training.batch_size
    params = init(run, images.shape[1:], n_classes)
    params = train(params, train_batches, n_train_batches, images, labels, training)

    def test(i, correctness):
        batch = heldout_batches[i]
        logits = predict(params, images[batch])
        finite = jnp.isfinite(logits).all(axis=-1)  # if not, the model has diverged: argmax would be 0
        correct = finite & (logits.argmax(axis=-1) == labels[batch])
        return correctness.at[batch].set(correct.astype(jnp.int8), mode="drop")

    return jax.lax.fori_loop(0, n_heldout_batches, test, jnp.full(len(images), -1, jnp.int8))


def cscores(n_heldout, n_correct):
    """C-scores float64 [N] and consistency profile float64 [K, N] from counts of runs, int [K, N].
    The profile is each example's held-out accuracy at each of K subset ratios (Section 3 of the paper);
    its C-score is the mean over the ratios at which a run held it out. NaN: there is no estimate."""
    with np.errstate(invalid="ignore"):
        profile = n_correct / n_heldout
        return np.nansum(profile, axis=0) / np.sum(n_heldout > 0, axis=0), profile


# === Many runs, on all devices ==================================================================
def draw_groups(sizes, n_done, n_runs, group_size, n_examples, training, mesh):
    """Draw the batches of runs n_done[k] ... n_runs - 1 at each ratio k, for subsets of sizes[k] examples.
    Yields (k, n_real, (runs, train_batches, heldout_batches)): n_real runs in arrays [group_size, ...] split
    over the mesh, that is over all devices. A short group is filled up with copies of its last run."""
    split = partial(jax.make_array_from_process_local_data, jax.NamedSharding(mesh, jax.P("runs")))
    with ThreadPoolExecutor() as drawers:
        for k, n_subset in enumerate(sizes):
            draw = partial(draw_batches, n_examples=n_examples, n_subset=n_subset, training=training)
            for first in range(n_done[k], n_runs, group_size):
                runs = np.minimum(np.arange(first, first + group_size, dtype=np.int32), n_runs - 1)
                own = np.split(runs, jax.process_count())[jax.process_index()]  # the mesh is in process order
                train_batches, heldout_batches = zip(*drawers.map(draw, own))
                arrays = split(own), split(np.stack(train_batches)), split(np.stack(heldout_batches))
                yield k, min(group_size, n_runs - first), arrays


def train_groups(drawn, sizes, images, labels, training, mesh):
    """Train and test groups, each device by itself, then gather. Yields k and correctness, int8 [runs, N], of
    the whole group in every process. images: uint8 [N, height, width, channels]; labels: integers [N]."""
    classes, labels = np.unique(labels, return_inverse=True)
    replicate = partial(jax.make_array_from_process_local_data, jax.NamedSharding(mesh, jax.P()))
    images, labels = replicate(images), replicate(np.append(labels, -1).astype(np.int32))  # -1: the filler's
    one_run = partial(heldout_correctness, n_classes=len(classes), training=training)
    runs_of_a_device = jax.vmap(one_run, in_axes=(0, 0, 0, None, None, None))
    specs = dict(in_specs=(jax.P("runs"),) * 3 + (jax.P(),) * 3, out_specs=jax.P("runs"), check_vma=False)
    all_runs = jax.jit(jax.shard_map(runs_of_a_device, mesh=mesh, **specs))  # check_vma=True bars our loops
    for k, n_real, arrays in drawn:  # host-local arrays gather over links that main's first sync opened
        correctness = all_runs(*arrays, sizes[k], images, labels)
        of_process = multihost_utils.global_array_to_host_local_array(correctness, mesh, jax.P("runs"))
        yield k, multihost_utils.process_allgather(of_process, tiled=True)[:n_real]  # drops the copies


def ahead(items):
    """Yield the items of a generator; a thread makes the next one while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


# === Data =======================================================================================
DATASETS = "FILE.npz, digits (scikit-learn) or a labeled tfds set (TensorFlow, Python < 3.14; internet once)"


class Problem(Exception):
    """Ends the job with one line that says what is wrong and what to do."""


@contextmanager
def explained(what, advice):
    """Whatever goes wrong inside becomes a Problem that also says what was tried and what to do."""
    try:
        yield
    except Exception as error:
        raise Problem(f"{what} ({str(error)[:300] or repr(error)}): {advice}") from error


def load(dataset, data_dir=None):
    """Load the training examples of an .npz file, of scikit-learn's `digits` or of a tfds data set.
    Returns images uint8 [N, height, width, channels]; labels, integers [N]; and original int64 [N], the
    index of each example in the data set's original files, or None where that cannot be known.
    Raises Problem if it cannot be had or is not a set of images of one size, each with a label."""
    with explained(f"cannot load --dataset {dataset}", f"it takes {DATASETS}"):
        if dataset.lower().endswith(".npz"):
            images, labels, original = load_npz(dataset)
        elif dataset == "digits":
            images, labels, original = load_digits()
        else:
            images, labels, original = load_tfds(dataset, data_dir)
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    channels_first = images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]  # as PyTorch has them
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0 or channels_first:
        need = f"images must be uint8 (N, height, width[, channels]), not {images.dtype} {images.shape}"
        raise Problem(f"{need}: try np.uint8(images * 255) or images.transpose(0, 2, 3, 1)")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        need = f"labels must be integers ({len(images)},), not {labels.dtype} {labels.shape}"
        raise Problem(f"{need}: try labels.argmax(axis=1) or np.unique(labels, return_inverse=True)[1]")
    return images.reshape(*images.shape[:3], -1), labels, original  # gray images get their one channel


def load_npz(path):
    """The arrays of a file by the names that Keras or MedMNIST gives them, or named images and labels."""
    with np.load(path) as file:  # which refuses pickles
        for x, y in ("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"):
            if x in file and y in file:
                return file[x], file[y], np.arange(len(file[y]))
        raise ValueError(f"it has {', '.join(file) or 'nothing'}, not images and labels")


def load_digits():
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries."""
    from sklearn import datasets

    digits = datasets.load_digits()  # pixels are 0 ... 16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images, digits.target.astype(np.int32), np.arange(len(images))


def load_tfds(dataset, data_dir):
    """The train split of a data set of tensorflow-datasets, which downloads it to data_dir the first time."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN announces itself at any log level
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # without a network it tells of each of 40 retries
    import tensorflow_datasets as tfds
    from tensorflow import config
    from tensorflow_datasets.core.hashing import Hasher

    with suppress(RuntimeError):  # TensorFlow is in use already, as in a notebook
        config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
    examples = tfds.load(dataset, split="train", as_supervised=True, data_dir=data_dir)
    images, labels = next(iter(tfds.as_numpy(examples.batch(len(examples)))))
    # tfds sorts a split by the hash of each example's key, which for these sets is its original index.
    keyed_by_index = dataset.partition(":")[0] in ("mnist", "fashion_mnist", "kmnist")
    original = np.array(sorted(range(len(labels)), key=Hasher("train").hash_key)) if keyed_by_index else None
    return images, labels.astype(np.int32, casting="same_kind"), original  # same_kind refuses float labels


def subset_sizes(ratios, n_examples, batch_size):
    """Subset sizes, int [K]. Raises Problem if one is 0 or N; warns if a last batch has very few examples."""
    sizes = np.array([round(n_examples * ratio) for ratio in ratios])
    if min(sizes) == 0 or max(sizes) == n_examples:
        raise Problem(f"--ratios: each must leave some of the {n_examples} examples in, and some out")
    rests = zip(ratios, sizes % batch_size)
    small = ", ".join(f"{rest} at ratio {ratio:g}" for ratio, rest in rests if 0 < rest < batch_size / 10)
    if small and jax.process_index() == 0:
        print(f"warning: last batch of {small} can spoil a model: try another --batch-size", file=sys.stderr)
    return sizes


# === Files ======================================================================================
def lock(folder):
    """A file whose lock keeps other jobs out of a folder. Raises Problem if it is taken or cannot be made."""
    with explained(f"cannot write to {folder}", "use another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "cscores.lock", "a")  # noqa: SIM115
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        raise Problem(f"another job is at work in {folder}: use another --output-dir or --distributed") from e
    except (ImportError, OSError):
        pass  # Windows has no fcntl, and some file systems have no locks: there, the user has to see to it
    return file


def write(path, save, *args, **kwargs):
    """Write `path` by save(file, *args, **kwargs); who reads it sees the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(f"cannot write {path}", "use another --output-dir"):
        try:
            with open(temporary, "wb") as file:
                save(file, *args, **kwargs)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # it is there only if something failed


def agreed_settings(args, images, labels, group_size):
    """A dict of what the counts depend on. Raises Problem if processes differ in it, --runs or group_size."""
    source = map(inspect.getsource, (draw_batches, init, predict, loss, train, heldout_correctness))
    settings = dict(dataset=args.dataset_name, ratios=args.ratios, **args.training._asdict())
    settings["content"] = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    settings["algorithm"] = hashlib.sha256("".join(source).encode()).hexdigest()[:16]
    digest = hashlib.sha256(f"{settings} {args.runs} {group_size}".encode()).digest()
    with explained("--distributed", "start all processes with the same settings and data"):
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint32)[0], "settings or data differ")
    return settings


def load_counts(path, settings, shape):
    """The counts in a checkpoint, or zeros if there is none: n_heldout and n_correct, int32 [K, N].
    Only process 0 reads it: others' counts are not used. Raises Problem if it cannot or settings differ."""
    if jax.process_index() > 0 or not path.exists():
        return np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    with explained(f"cannot go on from {path}", "use another --output-dir"), np.load(path) as file:
        old = json.loads(str(file["settings"]))
        differ = [f"{key} {old.get(key)}, not {new}" for key, new in settings.items() if old.get(key) != new]
        if differ:
            raise ValueError(f"made with {'; '.join(differ)}")
        return file["n_heldout"], file["n_correct"]


def draw_figure(images, labels, scores, columns=10):
    """A row per class: its highest-scored examples on the left; on the right its lowest, lowest first.
    images: uint8 [N, height, width, channels]. Returns uint8 [..., 3]; NaN scores are not shown."""
    height, width, channels = images.shape[1:]
    shown = [0, 1, 2] if channels in (3, 4) else [(channels - 1) // 2] * 3  # else the middle one, as gray
    classes = np.unique(labels)
    cells = np.full((len(classes), 2 * columns + 1, height + 2, width + 2, 3), 255, np.uint8)
    for row, label in zip(cells, classes):
        members = np.flatnonzero((labels == label) & ~np.isnan(scores))
        highest = members[np.argsort(-scores[members], kind="stable")][:columns]
        lowest = members[np.argsort(scores[members], kind="stable")][:columns]
        row[: len(highest), 1:-1, 1:-1] = images[highest][..., shown]
        row[columns + 1 :][: len(lowest), 1:-1, 1:-1] = images[lowest][..., shown]
    return cells.transpose(0, 2, 1, 3, 4).reshape(len(classes) * (height + 2), -1, 3)


def write_results(args, images, labels, original, n_heldout, n_correct):
    """Write the scores, in the images' order; all results, in the original order if known; the figure."""
    from matplotlib.image import imsave

    scores, profile = cscores(n_heldout, n_correct)
    results = dict(scores=scores, labels=labels, profile=profile, n_heldout=n_heldout)
    if original is not None:
        results = {name: array[..., np.argsort(original)] for name, array in results.items()}
    figure = f"{args.dataset_name}-examples.pdf"
    ordered = f"cscores-{'tfds' if original is None else 'orig'}-order.npz"
    write(args.output_dir / "cscores.npy", np.save, scores)
    write(args.output_dir / ordered, np.savez_compressed, **results, subset_ratios=np.array(args.ratios))
    write(args.output_dir / figure, imsave, draw_figure(images, labels, scores), format="pdf", dpi=50)
    try:
        print("subset ratio     ", *(f"{ratio:<6g}" for ratio in args.ratios))
        print("held-out accuracy", *(f"{p:.4f}" for p in n_correct.sum(axis=1) / n_heldout.sum(axis=1)))
        print(f"mean C-score {np.nanmean(scores):.4f}; never held out: {np.isnan(scores).sum()} examples")
        print(f"written to {args.output_dir}: cscores.npy, {ordered}, {figure}", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again as it ends
        if not isinstance(error, BrokenPipeError):  # which means that nobody reads on, as after `| head -1`
            raise Problem(f"cannot print the results ({error}): they are in the files") from error


# === The job and its command line ===============================================================
def parse_args(argv=None):
    """The options, plus dataset_name and training (a `Training`). Exits if one is out of range."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--dataset", default="mnist", help=f"{DATASETS} (default %(default)s)")
    add("--data-dir", help="where tfds keeps its data (default $TFDS_DATA_DIR, or ~/tensorflow_datasets)")
    add("--output-dir", type=Path, default=".", help="created if missing (default %(default)s)")
    tenths = [k / 10 for k in range(1, 10)]
    add("--ratios", type=float, nargs="+", default=tenths, help="subset ratios (default 0.1 0.2 ... 0.9)")
    add("--runs", type=int, default=200, help="models at each ratio; may grow later (default %(default)s)")
    for name, x in Training()._asdict().items():
        add("--" + name.replace("_", "-"), type=type(x), default=x, help="of SGD (default %(default)s)")
    add("--parallel-runs", type=int, help="runs at once, job-wide (default: as many as suit the devices)")
    add("--distributed", nargs="*", metavar="HOST:PORT P I", help="process I of P; no value under Slurm etc.")
    args = parser.parse_args(argv)
    if any(n is not None and n < 1 for n in (args.runs, args.epochs, args.batch_size, args.parallel_runs)):
        parser.error("--runs, --epochs, --batch-size and --parallel-runs must be at least 1")
    if not 0 < args.learning_rate < np.inf or not 0 <= args.momentum < 1:
        parser.error("--learning-rate must be above 0, and --momentum from 0 to below 1")
    if not all(0 < ratio < 1 for ratio in args.ratios) or len(set(args.ratios)) < len(args.ratios):
        parser.error("--ratios must be above 0 and below 1, each given once")
    args.training = Training(*(vars(args)[name] for name in Training._fields))
    args.dataset_name = Path(args.dataset).stem.partition(":")[0]  # of DIR/FILE.npz or SET:VERSION
    return args


def start_jax(distributed=None):
    """Start JAX, with each CPU core as a device. Raises Problem if the processes of the job do not meet.
    distributed: None, or [HOST:PORT, P, I] for process I of P, or [] where Slurm or the like tells that."""
    jax.config.update("jax_threefry_partitionable", True)  # as by default; False gives other initial weights
    if jax.config.jax_num_cpu_devices < 0:  # the user has not chosen
        n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        with suppress(RuntimeError):  # JAX is in use already, as in a notebook, and keeps its devices
            jax.config.update("jax_num_cpu_devices", n_cores)
    if distributed is not None:
        jax.config.update("jax_enable_preemption_service", False)  # it keeps SIGTERM from ending a process
        join = partial(jax.distributed.initialize, heartbeat_timeout_seconds=30)  # if one ends, so do all
        with explained("--distributed", "without Slurm or the like, add HOST:PORT P I"):
            if distributed:
                address, n_processes, process = distributed  # below: Slurm detection would leave it 1 GPU
                join(address, int(n_processes), int(process), cluster_detection_method="deactivate")
            else:
                join()


def make_mesh(n_runs, parallel_runs=None):
    """A mesh "runs" of all devices of the job or of as many as a group has runs; and a group's size, in runs:
    parallel_runs or a default, rounded up to fill the mesh. Raises Problem if devices are missing."""
    with explained("no devices", "try JAX_PLATFORMS=cpu; for --distributed, the host's name must resolve"):
        devices = sorted(jax.devices(), key=lambda device: device.process_index)  # grouped by process
    n_devices = np.bincount([device.process_index for device in devices])
    if min(n_devices) < max(n_devices):
        raise Problem(f"--distributed: processes have {n_devices} devices: start all with the same number")
    # On a CPU, two runs per core are no faster; on a GPU, 100 are a guess, not measured yet.
    group_size = min(n_runs, parallel_runs or len(devices) * (1 if devices[0].platform == "cpu" else 100))
    devices = devices[:group_size] if jax.process_count() == 1 else devices  # no more than runs
    mesh = jax.sharding.Mesh(np.array(devices), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    return mesh, mesh.size * math.ceil(group_size / mesh.size)


def with_progress(trained, ratios, n_done, n_runs, work):
    """Pass on trained groups, (k, correctness int8 [R, N]), and show how far the job is. The bar counts work,
    not runs, so that it can tell the time left; work[k] is that of a run at the k-th ratio, in any unit."""
    done, total, warned = sum(n_done), n_runs * len(ratios), False
    layout = "{percentage:3.0f}%|{bar:4}| {remaining} left{postfix}"  # fits into 80 columns
    shown = dict(bar_format=layout, disable=jax.process_index() > 0)
    with tqdm(total=n_runs * sum(work), initial=n_done @ work, **shown) as bar:
        for k, correctness in trained:
            yield k, correctness
            done += len(correctness)
            accuracy = f"held-out accuracy {correctness[correctness >= 0].mean():.4f}"
            bar.set_postfix_str(f"{done} of {total} runs, ratio {ratios[k]:g}, {accuracy}", refresh=False)
            bar.update(len(correctness) * work[k])
            if not (warned or bar.disable) and (correctness < 1).all(axis=1).any():
                warned = True
                what = f"warning: at ratio {ratios[k]:g} a model was wrong on all that it held out"
                bar.write(f"{what}: if it diverged, try a smaller --learning-rate", file=sys.stderr)


def main(argv=None):
    """The job: devices, data, checkpoint, missing runs, results. In one process, nothing communicates."""
    args = parse_args(argv)
    with explained("matplotlib does not work", "pip install -r requirements.txt"):
        import matplotlib.image  # noqa: F401  (now, not after the last run)
    start_jax(args.distributed)
    mesh, group_size = make_mesh(args.runs, args.parallel_runs)
    is_writer = jax.process_index() == 0
    if is_writer:
        print(f"JAX {jax.__version__} on {mesh.size} x {mesh.devices[0].device_kind}", file=sys.stderr)
        lock_file = lock(args.output_dir)
    multihost_utils.sync_global_devices("connected")  # links Gloo within its 30 s; once linked, it waits long
    if not is_writer:
        multihost_utils.sync_global_devices("process 0 has loaded")  # only one can prepare a tfds data set
    images, labels, original = load(args.dataset, args.data_dir)
    if is_writer:
        multihost_utils.sync_global_devices("process 0 has loaded")  # now the others load
    sizes = subset_sizes(args.ratios, len(images), args.training.batch_size)
    settings = agreed_settings(args, images, labels, group_size)
    checkpoint = args.output_dir / "cscores-checkpoint.npz"
    n_heldout, n_correct = load_counts(checkpoint, settings, (len(sizes), len(images)))
    n_out = len(images) - sizes  # examples that a run holds out
    n_done = multihost_utils.broadcast_one_to_all(n_heldout.sum(axis=1) // n_out)  # all do the same groups
    if max(n_done) > args.runs:
        raise Problem(f"{max(n_done)} runs are done: give --runs that many or use another --output-dir")

    drawn = ahead(draw_groups(sizes, n_done, args.runs, group_size, len(images), args.training, mesh))
    trained = ahead(train_groups(drawn, sizes, images, labels, args.training, mesh))  # only it communicates
    work = args.training.epochs * sizes + n_out / 2  # per example, a test costs about half a step
    for k, correctness in with_progress(trained, args.ratios, n_done, args.runs, work):
        n_heldout[k] += (correctness >= 0).sum(axis=0)
        n_correct[k] += (correctness == 1).sum(axis=0)
        if is_writer:
            counts = dict(n_heldout=n_heldout, n_correct=n_correct)
            write(checkpoint, np.savez, settings=json.dumps(settings), **counts)
    if is_writer:
        write_results(args, images, labels, original, n_heldout, n_correct)
        lock_file.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would put Ctrl-C off until the devices are done
    os.environ.pop("MPLBACKEND", None)  # a notebook's, for `!python mnist.py`; the figure needs none
    try:
        main()
    except (Problem, MemoryError, jax.errors.JaxRuntimeError) as error:
        line = " ".join(f"mnist.py: {error}".split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
            line += " (try fewer --parallel-runs)"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)  # sys.exit would wait for the group in training, and for other processes
