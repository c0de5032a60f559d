"""Estimate the C-score of every training example of MNIST, or of a data set of your own.

A C-score is the expected accuracy of a model on an example that was held out of its training set, averaged
over training-set sizes (Jiang, Zhang, Talwar, Mozer, ICML 2021, arXiv 2002.03206). A run trains one model on
a random subset of the N examples; the subset's share of them is the subset ratio. The procedure:

    for k, ratio in enumerate(ratios):                        # 0.1 ... 0.9
        for run in range(n_runs):                             # 0 ... 199; in fact, a group of runs at once
            batches = draw_batches(run, N, ratio * N, ...)    # indices of examples, trained on and held out
            correct = heldout_correctness(run, batches, ...)  # int8 [N]: 1 right, 0 wrong, -1 trained on
            n_heldout[k] += correct >= 0
            n_correct[k] += correct == 1
    scores, profile = cscores(n_heldout, n_correct)
"""

import argparse
import hashlib
import json
import logging
import math
import os
import signal
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


class Problem(Exception):
    """Ends the job with one line that says what is wrong and what to do."""


@contextmanager
def explained(what, advice):
    """Whatever goes wrong inside becomes a Problem that also says what was tried and what to do."""
    try:
        yield
    except Exception as error:
        raise Problem(f"{what} ({str(error)[:300] or repr(error)}): {advice}") from error


# === Data =======================================================================================
DATASETS = "FILE.npz, digits (scikit-learn) or a labeled tfds set (TensorFlow, Python < 3.14; once a network)"


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
    if labels.shape == (*images.shape[:1], 1):
        labels = labels[:, 0]
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
        for images, labels in ("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"):
            if images in file and labels in file:
                return file[images], file[labels], np.arange(len(file[labels]))
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


# === One run: the algorithm =====================================================================
def draw_batches(run, n_examples, n_subset, epochs, batch_size):
    """Draw a run's subset, n_subset of the N examples, and its batches, as indices of examples: int32
    [epochs + 1, ceil(N / B), B]. A row for each epoch is the subset in a new order; the last row is what is
    held out. So that every ratio has this shape, rows are filled up with the index N, which is no example's:
    its label is -1, which `loss` ignores; its image is the last one, as JAX clamps indices (beware: batch
    normalization would count it); and what `heldout_correctness` gets for it is dropped."""
    draws = np.random.RandomState(run)  # the same seed at every ratio gives the authors' own subsets
    subset = draws.choice(n_examples, n_subset, replace=False)
    heldout = np.delete(np.arange(n_examples), subset)

    n_batches = math.ceil(n_examples / batch_size)
    orders = np.full((epochs + 1, n_batches * batch_size), n_examples, np.int32)
    for epoch in range(epochs):
        orders[epoch, :n_subset] = subset[draws.permutation(n_subset)]
    orders[epochs, : len(heldout)] = heldout
    return orders.reshape(epochs + 1, n_batches, batch_size)


def init(run, image_shape, n_classes, hidden=(512, 256)):
    """The params of a new network: a list of each layer's weights float32 [out, in] and biases float32 [out].
    image_shape: (height, width, channels); hidden: the widths of the layers between image and logits.
    For a network of your own, change this function and `predict`; params may be any pytree of float arrays.
    `predict` serves training and test alike: dropout or augmentation need a key in `loss` and `train`."""
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
        activations = jax.nn.relu(jnp.inner(activations, weights) + biases)
    weights, biases = last
    return jnp.inner(activations, weights) + biases


def loss(params, images, labels):
    """Mean cross-entropy of a batch; examples with the label -1, which fill it up, do not count."""
    logits = predict(params, images)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)  # zeros for -1
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / jnp.sum(labels >= 0)


def train(params, batches, n_train_batches, images, labels, *, epochs, learning_rate, momentum):
    """The params after SGD with momentum over the first n_train_batches of each epoch.
    batches: from `draw_batches`; images: uint8 [N, height, width, channels]; labels: int32 [N + 1], the
    last of them -1. n_train_batches is traced, so that all subset ratios share one compilation."""

    def step(i, state):
        params, velocity = state
        batch = batches[i // n_train_batches, i % n_train_batches]
        grads = jax.grad(loss)(params, images[batch], labels[batch])
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity)
        return params, velocity

    at_rest = jax.tree.map(jnp.zeros_like, params)
    params, _ = jax.lax.fori_loop(0, epochs * n_train_batches, step, (params, at_rest))
    return params


def heldout_correctness(run, batches, n_train_batches, n_test_batches, images, labels, *, n_classes, **sgd):
    """Train a run and test it: int8 [N], 1 where it predicts the label, 0 where not, -1 if not held out.
    sgd: epochs, learning_rate, momentum; what is held out fills n_test_batches of the last row of batches."""
    params = init(run, images.shape[1:], n_classes)
    params = train(params, batches, n_train_batches, images, labels, **sgd)

    def test(i, correctness):
        batch = batches[-1, i]
        logits = predict(params, images[batch])
        finite = jnp.isfinite(logits).all(axis=-1)  # if not, the model has diverged: argmax would be 0
        correct = finite & (logits.argmax(axis=-1) == labels[batch])
        return correctness.at[batch].set(correct.astype(jnp.int8), mode="drop")

    return jax.lax.fori_loop(0, n_test_batches, test, jnp.full(len(images), -1, jnp.int8))


def cscores(n_heldout, n_correct):
    """C-scores float64 [N] and consistency profile float64 [K, N] from counts of runs, int [K, N].
    The profile is each example's held-out accuracy at each of K subset ratios (Section 3 of the paper);
    its C-score is the mean over the ratios at which a run held it out. NaN: there is no estimate."""
    with np.errstate(invalid="ignore"):
        profile = n_correct / n_heldout
        return np.nansum(profile, axis=0) / np.sum(n_heldout > 0, axis=0), profile


# === Many runs, on all devices ==================================================================
def start_mesh(n_runs, parallel_runs=None, distributed=None):
    """Start JAX, with each CPU core as a device. Returns a mesh "runs" of all devices of all processes, and
    the size of a group of runs, which train at once: parallel_runs or a default, rounded up to fill the mesh.
    distributed: None, or [HOST:PORT, P, I] for process I of P, or [] where Slurm or the like tells that."""
    if jax.config.jax_num_cpu_devices < 0:  # the user has not chosen
        n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        with suppress(RuntimeError):  # JAX is in use already, as in a notebook, and keeps its devices
            jax.config.update("jax_num_cpu_devices", n_cores)
    if distributed is not None:
        jax.config.update("jax_enable_preemption_service", False)  # it keeps SIGTERM from ending a process
        address, *numbers = distributed or [None]
        # JAX's cluster detection (e.g. Slurm's) gives a process one GPU; switched off, a process takes all.
        method = "deactivate" if distributed else None
        how = dict(cluster_detection_method=method, heartbeat_timeout_seconds=30)
        with explained("--distributed", "without Slurm or the like, add HOST:PORT P I"):
            jax.distributed.initialize(address, *map(int, numbers), **how)
    with explained("no devices", "try JAX_PLATFORMS=cpu; for --distributed, a host name that resolves"):
        devices = sorted(jax.devices(), key=lambda device: device.process_index)  # grouped by process
    default = len(devices) * (1 if devices[0].platform == "cpu" else 100)  # 2 per core are no faster
    group_size = min(n_runs, parallel_runs or default)
    if jax.process_count() == 1:
        devices = devices[:group_size]  # few runs need few devices
    if jax.process_index() == 0:
        print(f"JAX {jax.__version__} on {len(devices)} x {devices[0].device_kind}", file=sys.stderr)
    mesh = jax.sharding.Mesh(np.array(devices), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    return mesh, mesh.size * math.ceil(group_size / mesh.size)


def all_gather(mesh, values):
    """int32 [devices, n]: each device's row has its process's ints [n]; [1, n] if alone. Waits for all."""
    if jax.process_count() == 1:
        return np.int32([values])
    split, copied = jax.NamedSharding(mesh, jax.P("runs")), jax.NamedSharding(mesh, jax.P())
    rows = jax.make_array_from_callback((mesh.size, len(values)), split, lambda _: np.int32([values]))
    return np.asarray(jax.jit(jnp.copy, out_shardings=copied)(rows))


def load_together(args, mesh):
    """`load` in every process, and a dict of all that the counts depend on. Problem if processes disagree."""
    all_gather(mesh, [0])  # connect: Gloo waits 30 s for that, and process 0 may download for longer
    if jax.process_index() == 0:
        images, labels, original = load(args.dataset, args.data_dir)
    all_gather(mesh, [0])  # wait for process 0, as tfds cannot prepare a data set twice at the same time
    if jax.process_index() > 0:
        images, labels, original = load(args.dataset, args.data_dir)
    source = Path(__file__).read_text()  # an edit of the algorithm, even of a comment, voids checkpoints
    algorithm = source[source.index("def draw_batches") : source.index("def cscores")]
    settings = dict(dataset=args.name, ratios=args.ratios, **args.training)  # name: no path; training: SGD's
    settings["content"] = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    settings["algorithm"] = hashlib.sha256(algorithm.encode()).hexdigest()[:16]
    job = hashlib.sha256(f"{settings} {args.runs} {args.parallel_runs}".encode()).digest()
    jobs = all_gather(mesh, np.frombuffer(job, np.int32))
    if (jobs != jobs[0]).any():
        raise Problem("the processes were started with different settings or data")
    return images, labels, original, settings


def make_trainer(images, labels, mesh, *, batch_size, **sgd):
    """Put images, uint8 [N, height, width, channels], and labels, integers [N], on all devices. Returns
    train_group(runs, n_subset), which starts these runs, int32 [R], spread over the mesh, each on n_subset
    examples, and returns a future of `heldout_correctness`, int8 [R, N]. All processes call it alike."""
    split, copied = jax.NamedSharding(mesh, jax.P("runs")), jax.NamedSharding(mesh, jax.P())
    n_examples = len(images)
    classes, labels = np.unique(labels, return_inverse=True)
    images = jax.make_array_from_process_local_data(copied, images)
    labels = jax.make_array_from_process_local_data(copied, np.append(labels, -1).astype(np.int32))

    one_run = partial(heldout_correctness, n_classes=len(classes), **sgd)
    many_runs = jax.vmap(one_run, in_axes=(0, 0, None, None, None, None))  # run, batches; the rest is shared
    # As batches are sharded by run, each device trains its own runs, alone; processes exchange the results.
    many_runs = jax.jit(many_runs, out_shardings=split if jax.process_count() == 1 else copied)
    launcher = ThreadPoolExecutor(1)  # on a GPU, the call of a jitted loop blocks until the loop ends
    drawers = ThreadPoolExecutor()
    draw = partial(draw_batches, n_examples=n_examples, epochs=sgd["epochs"], batch_size=batch_size)

    def train_group(runs, n_subset):
        own_runs = np.split(runs, jax.process_count())[jax.process_index()]  # of this process's devices
        batches = np.stack([*drawers.map(partial(draw, n_subset=n_subset), own_runs)])
        batches = jax.make_array_from_process_local_data(split, batches)  # now of all runs, sharded by run
        n_train_batches = math.ceil(n_subset / batch_size)
        n_test_batches = math.ceil((n_examples - n_subset) / batch_size)
        return launcher.submit(many_runs, runs, batches, n_train_batches, n_test_batches, images, labels)

    return train_group


def one_ahead(items):
    """Yield each item after taking the next one, which in `train_missing` starts the next group of runs."""
    for item, _ in pairwise(chain(items, [None])):
        yield item


def train_missing(train_group, sizes, n_done, n_runs, group_size):
    """Train runs n_done[k] ... n_runs - 1 at each ratio k, on subsets of sizes[k] examples, in groups that
    train at once. Yields (k, correctness int8 [R, N]) of each group."""

    def start_all():
        for k, n_subset in enumerate(sizes):
            for first in range(n_done[k], n_runs, group_size):
                runs = np.arange(first, first + group_size, dtype=np.int32)
                runs = np.minimum(runs, n_runs - 1)  # the last group is filled up with copies of the last run
                yield k, min(group_size, n_runs - first), train_group(runs, n_subset)

    for k, n_real, group in one_ahead(start_all()):
        yield k, np.asarray(group.result())[:n_real]


def with_progress(trained, ratios, n_done, n_runs, work):
    """Pass on trained groups, (k, correctness int8 [R, N]), and show how far the job is. The bar is in units
    of work, so that it can tell the time left; work[k] is that of a run at the k-th ratio."""
    done, quiet = sum(n_done), jax.process_index() > 0
    layout = "{percentage:3.0f}%|{bar:4}| {remaining} left{desc}"  # fits into 80 columns
    with tqdm(total=n_runs * sum(work), initial=n_done @ work, bar_format=layout, disable=quiet) as bar:
        for k, correctness in trained:
            yield k, correctness
            done += len(correctness)
            accuracy = correctness[correctness >= 0].mean()
            status = f"runs, ratio {ratios[k]:g}, held-out accuracy {accuracy:.4f}"
            bar.set_description_str(f", {done} of {len(work) * n_runs} {status}", refresh=False)
            bar.update(len(correctness) * work[k])
            if not quiet and (correctness < 1).all(axis=1).any():
                quiet = True  # it is enough to hear it once
                what = f"warning: at ratio {ratios[k]:g} a model was wrong on all that it held out"
                bar.write(f"{what}: if it diverged, try a smaller --learning-rate", file=sys.stderr)


# === Files ======================================================================================
def lock(folder):
    """The lock of a folder, to be closed; the system frees it with the process. Raises Problem if taken."""
    what = f"another job is at work in {folder}, or it cannot be written"
    with explained(what, "use another --output-dir, or --distributed for several processes of one job"):
        folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(folder / "cscores.lock", timeout=0)  # SQLite can lock on any system
        connection.executescript("PRAGMA journal_mode = OFF; BEGIN EXCLUSIVE")
    return connection


def write(path, save, *args, **kwargs):
    """Write `path` by save(file, *args, **kwargs); who reads it sees the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(f"cannot write {path}", "use another --output-dir"), ExitStack() as in_the_end:
        in_the_end.callback(temporary.unlink, missing_ok=True)  # it is there only if something failed
        with open(temporary, "wb") as file:
            save(file, *args, **kwargs)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def load_counts(path, settings, shape):
    """The counts in a checkpoint, or zeros if there is none: n_heldout and n_correct, int32 [K, N].
    Only process 0 reads it. Raises Problem if it cannot be read or was made with other settings."""
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
    shown = [0, 1, 2] if channels in (3, 4) else [(channels - 1) // 2] * 3  # gray, or a volume's middle slice
    classes = np.unique(labels)
    cells = np.full((len(classes), 2 * columns + 1, height + 2, width + 2, 3), 255, np.uint8)
    for row, label in zip(cells, classes):
        members = np.flatnonzero((labels == label) & ~np.isnan(scores))
        highest = members[np.argsort(-scores[members], kind="stable")][:columns]
        lowest = members[np.argsort(scores[members], kind="stable")][:columns]
        row[: len(highest), 1:-1, 1:-1] = images[highest][..., shown]
        row[columns + 1 :][: len(lowest), 1:-1, 1:-1] = images[lowest][..., shown]
    return cells.transpose(0, 2, 1, 3, 4).reshape(len(classes) * (height + 2), -1, 3)


def write_results(args, imsave, images, labels, original, n_heldout, n_correct):
    """Write scores in the images' order; all results, in the original order if it is known; the figure."""
    scores, profile = cscores(n_heldout, n_correct)
    results = dict(scores=scores, labels=labels, profile=profile, n_heldout=n_heldout)
    if original is not None:
        results = {name: array[..., np.argsort(original)] for name, array in results.items()}
    ordered = f"cscores-{'tfds' if original is None else 'orig'}-order.npz"
    figure = draw_figure(images, labels, scores)
    write(args.output_dir / "cscores.npy", np.save, scores)
    write(args.output_dir / ordered, np.savez_compressed, **results, subset_ratios=np.array(args.ratios))
    write(args.output_dir / f"{args.name}-examples.pdf", imsave, figure, format="pdf", dpi=50)
    print("subset ratio     ", *(f"{ratio:<6g}" for ratio in args.ratios))
    print("held-out accuracy", *(f"{each:.4f}" for each in n_correct.sum(axis=1) / n_heldout.sum(axis=1)))
    print(f"mean C-score {np.nanmean(scores):.4f}; examples that no run held out: {np.isnan(scores).sum()}")
    print(f"written to {args.output_dir}: cscores.npy, {ordered}, {args.name}-examples.pdf")


# === The job and its command line ===============================================================
def parse_args(argv=None):
    """The options, plus name (of the data set) and training (for SGD). Exits if one is out of range."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--dataset", default="mnist", help=f"{DATASETS} (default %(default)s)")
    add("--data-dir", help="where tfds keeps its data (default $TFDS_DATA_DIR, or ~/tensorflow_datasets)")
    add("--output-dir", type=Path, default=".", help="created if missing (default %(default)s)")
    add("--ratios", type=float, nargs="+", help="subset ratios, above 0, below 1 (default 0.1 0.2 ... 0.9)")
    add("--runs", type=int, default=200, help="models at each ratio; may grow later (default %(default)s)")
    add("--epochs", type=int, default=10, help="passes over the subset (default %(default)s)")
    add("--batch-size", type=int, default=128, help="examples in a step of SGD (default %(default)s)")
    add("--learning-rate", type=float, default=0.1, help="step size of SGD (default %(default)s)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (default %(default)s)")
    add("--parallel-runs", type=int, help="runs at once, job-wide (default: as many as suit the devices)")
    add("--distributed", nargs="*", metavar="HOST:PORT P I", help="process I of P; nothing under Slurm etc.")
    args = parser.parse_args(argv)
    counts = args.runs, args.epochs, args.batch_size, args.parallel_runs
    if any(count is not None and count < 1 for count in counts):
        parser.error("--runs, --epochs, --batch-size and --parallel-runs must be at least 1")
    if not 0 < args.learning_rate < np.inf or not 0 <= args.momentum < 1:
        parser.error("--learning-rate must be above 0, and --momentum from 0 to below 1")
    args.ratios = args.ratios or [k / 10 for k in range(1, 10)]
    if not all(0 < ratio < 1 for ratio in args.ratios) or len(set(args.ratios)) < len(args.ratios):
        parser.error("--ratios must be above 0 and below 1, each given once")
    args.training = {name: vars(args)[name] for name in ("epochs", "batch_size", "learning_rate", "momentum")}
    args.name = Path(Path(args.dataset).name.partition(":")[0]).stem  # of FILE.npz or of SET:VERSION
    return args


def main(argv=None):
    """The whole job: devices, data, checkpoint, the runs that it lacks, results."""
    args = parse_args(argv)
    with explained("matplotlib does not work", "pip install -r requirements.txt"):
        from matplotlib.image import imsave  # now, not after the last run
    mesh, group_size = start_mesh(args.runs, args.parallel_runs, args.distributed)
    with closing(lock(args.output_dir)) if jax.process_index() == 0 else nullcontext():
        images, labels, original, settings = load_together(args, mesh)
        n_examples = len(images)
        sizes = np.rint(n_examples * np.array(args.ratios)).astype(int)
        if min(sizes) == 0 or max(sizes) == n_examples:
            raise Problem(f"--ratios: each must leave some of the {n_examples} examples in, and some out")
        checkpoint = args.output_dir / "cscores-checkpoint.npz"
        n_heldout, n_correct = load_counts(checkpoint, settings, (len(sizes), n_examples))
        n_done = n_heldout.sum(axis=1) // (n_examples - sizes)  # a run holds n_examples - sizes[k] out
        n_done = all_gather(mesh, n_done)[0]  # process 0's, which alone has read the checkpoint
        if max(n_done) > args.runs:
            raise Problem(f"{max(n_done)} runs are done: give --runs that many or use another --output-dir")

        train_group = make_trainer(images, labels, mesh, **args.training)
        trained = train_missing(train_group, sizes, n_done, args.runs, group_size)
        work = args.epochs * sizes + (n_examples - sizes) / 2  # to test an example is half the work
        for k, correctness in with_progress(trained, args.ratios, n_done, args.runs, work):
            n_heldout[k] += (correctness >= 0).sum(axis=0)
            n_correct[k] += (correctness == 1).sum(axis=0)
            if jax.process_index() == 0:
                counts = dict(n_heldout=n_heldout, n_correct=n_correct)
                write(checkpoint, np.savez, settings=json.dumps(settings), **counts)
        if jax.process_index() == 0:
            with suppress(BrokenPipeError):  # nobody reads its summary to the end, as after `| head -1`
                write_results(args, imsave, images, labels, original, n_heldout, n_correct)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would put Ctrl-C off until the devices are done
    try:
        main()
    except (Problem, MemoryError, jax.errors.JaxRuntimeError) as error:
        line = " ".join(f"mnist.py: {error}".split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
            line += " (try fewer --parallel-runs)"
        print(line, file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            os._exit(1)  # sys.exit would wait for minutes, for the other processes
        sys.exit(1)
