"""Estimate the C-score of every training example of MNIST, or of a data set of your own.

A C-score is the expected accuracy of a model on an example that was held out of its training set, averaged
over training-set sizes (Jiang, Zhang, Talwar, Mozer, ICML 2021, arXiv 2002.03206). A run trains one model on
a random subset of the N examples; the subset's share of them is the subset ratio. The procedure:

    for k, ratio in enumerate(ratios):                          # 0.1 ... 0.9
        for run in range(n_runs):                               # 0 ... 199; in fact, many runs at once
            train, heldout = draw_batches(run, N, ratio * N)    # indices of the subset and of all others
            correctness = train_and_test(run, train, heldout)   # int8 [N]: 1 right, 0 wrong, -1 not held out
            n_heldout[k] += correctness >= 0
            n_correct[k] += correctness == 1
    scores, profile = cscores(n_heldout, n_correct)
"""

import argparse
import errno
import hashlib
import json
import logging
import math
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


# === One run: the algorithm =====================================================================
class Training(NamedTuple):  # settings of SGD with momentum; each is a command-line option
    epochs: int = 10  # passes over the subset
    batch_size: int = 128  # examples in a step
    learning_rate: float = 0.1
    momentum: float = 0.9
    precision: str = "float32"  # of matrix products: float32 (JAX's default; TF32 on a GPU) or bfloat16


def draw_batches(run, n_examples, n_subset, training):
    """Draw a run's subset, n_subset of the N examples, and cut it and the rest into batches of batch_size B.
    Returns indices, int32: train_batches [epochs, ceil(N / B), B], the subset in a new order for each epoch;
    heldout_batches [ceil(N / B), B], all other examples. Both are filled up with the index N, the filler."""
    # The seed is the run's number alone, as in the authors' code: run 7's subset at 0.2 contains that at 0.1.
    draws = np.random.RandomState(run)
    subset = draws.permutation(n_examples)[:n_subset]
    # Room for N examples in both, whatever the ratio: one shape, hence one compilation, for all ratios.
    shape = math.ceil(n_examples / training.batch_size), training.batch_size
    train_batches = np.full((training.epochs, *shape), n_examples, np.int32)
    heldout_batches = np.full(shape, n_examples, np.int32)
    for batches in train_batches:
        batches.flat[:n_subset] = draws.permutation(subset)
    heldout_batches.flat[: n_examples - n_subset] = np.delete(np.arange(n_examples), subset)
    return train_batches, heldout_batches


def init(run, image_shape, n_classes, hidden=(512, 256)):
    """The params of a new network: a list of each layer's weights float32 [out, in] and biases float32 [out].
    run: int32, traced; image_shape: (height, width, channels); hidden: the widths of the layers in between.
    For a network of your own, replace `init` and `predict`; its params may be any pytree of floats."""
    glorot = jax.nn.initializers.glorot_normal(in_axis=-1, out_axis=-2)  # [out, in]: faster on a CPU
    widths = [math.prod(image_shape), *hidden, n_classes]
    keys = jax.random.split(jax.random.key(run), (len(widths) - 1, 2))
    params = []
    for (key_weights, key_biases), n_in, n_out in zip(keys, widths, widths[1:]):
        weights = glorot(key_weights, (n_out, n_in), jnp.float32)
        biases = 0.01 * jax.random.normal(key_biases, (n_out,), jnp.float32)  # as in the authors' code
        params.append((weights, biases))
    return params


def predict(params, images, key=None):
    """Logits float32 [B, classes] of images uint8 [B, height, width, channels]. No image may change another's
    logits: some are fillers. key: for dropout or random shifts, new for each step; None when testing."""
    activations = images.reshape(len(images), -1).astype(jnp.float32) / 255
    *hidden, last = params
    for weights, biases in hidden:
        activations = jax.nn.relu(linear(activations, weights) + biases)  # = activations @ weights.T
    weights, biases = last
    return linear(activations, weights) + biases


def loss(params, images, labels, key=None):
    """Mean cross-entropy of a batch; examples with the label -1, the filler, do not count."""
    logits = predict(params, images, key)
    targets = jax.nn.one_hot(labels, logits.shape[-1])  # zeros for -1
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / jnp.sum(labels >= 0)


def train(params, key, train_batches, n_train_batches, images, labels, training):
    """The params after SGD with momentum over the first n_train_batches of each epoch; the others are filler.
    images: uint8 [N, height, width, channels]; labels: int32 [N]; n_train_batches: traced."""

    def step(i, state):
        params, velocity = state
        batch = train_batches[i // n_train_batches, i % n_train_batches]
        images_of_batch = images.at[batch].get(mode="clip")  # for the filler N, the last image
        labels_of_batch = labels.at[batch].get(mode="fill", fill_value=-1)  # for the filler, -1
        grads = jax.grad(loss)(params, images_of_batch, labels_of_batch, jax.random.fold_in(key, i))
        velocity = jax.tree.map(lambda v, g: training.momentum * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - training.learning_rate * v, params, velocity)
        return params, velocity

    start = params, jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, training.epochs * n_train_batches, step, start)[0]


def train_and_test(run, train_batches, heldout_batches, n_subset, images, labels, n_classes, training):
    """Train a run and test it: int8 [N], 1 where it predicts the label, 0 where not, -1 if not held out.
    run, n_subset: traced, for one compilation; images, labels: as in `train`."""
    n_train_batches = (n_subset + training.batch_size - 1) // training.batch_size  # rounded up
    n_heldout_batches = (len(images) - n_subset + training.batch_size - 1) // training.batch_size
    # JAX's precision setting. A GPU obeys it; a CPU does not, so `linear` (below) looks it up and rounds.
    with jax.default_matmul_precision("bfloat16" if training.precision == "bfloat16" else None):
        params = init(run, images.shape[1:], n_classes)
        key = jax.random.key(-1 - run)  # other seeds than those of `init`
        params = train(params, key, train_batches, n_train_batches, images, labels, training)

        def test(i, correctness):
            batch = heldout_batches[i]
            logits = predict(params, images.at[batch].get(mode="clip"))
            finite = jnp.isfinite(logits).all(axis=-1)  # else the model has diverged, and argmax says class 0
            correct = finite & (logits.argmax(axis=-1) == labels[batch])  # for the filler, anything
            return correctness.at[batch].set(correct.astype(jnp.int8), mode="drop")  # drops the filler

        return jax.lax.fori_loop(0, n_heldout_batches, test, jnp.full(len(images), -1, jnp.int8))


def cscores(n_heldout, n_correct):
    """C-scores float64 [N] and consistency profile float64 [K, N] from counts of runs, int [K, N].
    The profile is each example's held-out accuracy at each of K subset ratios (Section 3 of the paper);
    its C-score is the mean over the ratios at which a run held it out. NaN: there is no estimate."""
    with np.errstate(invalid="ignore"):
        profile = n_correct / n_heldout
        return np.nansum(profile, axis=0) / np.sum(n_heldout > 0, axis=0), profile  # nanmean would warn


def linear(x, weights):
    """x @ weights.T, float32 [B, out] of [B, in] and [out, in]. With --precision bfloat16 it rounds both and,
    in the backward pass, the gradient. On a CPU only `linear` rounds: so use it in a network of your own."""
    if jax.config.jax_default_matmul_precision != "bfloat16":  # set by the `with` in `train_and_test`
        return jnp.inner(x, weights)
    to_float32 = dict(preferred_element_type=jnp.float32)

    def forward(x, weights):
        rounded = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
        return jnp.inner(*rounded, **to_float32), rounded

    def backward(rounded, gradient):
        x, weights = rounded
        gradient = gradient.astype(jnp.bfloat16)  # JAX's own derivative would leave it float32
        # gradient.T by a gather: with a plain .T, XLA on a CPU runs the product in float32, which is slow.
        transposed = gradient.ravel()[jnp.arange(gradient.size).reshape(gradient.shape).T]
        return jnp.matmul(gradient, weights, **to_float32), jnp.matmul(transposed, x, **to_float32)

    product = jax.custom_vjp(lambda x, weights: forward(x, weights)[0])
    product.defvjp(forward, backward)
    return product(x, weights)


# === Many runs, on all devices ==================================================================
def plan_groups(devices, most_missing, parallel_runs=None):
    """Plan groups of runs that train at once: the mesh of devices (on a CPU: its cores) that they need, and a
    group's size. most_missing: the most runs missing at any ratio; parallel_runs: the size asked for."""
    # Two runs on one core are no faster than one by one; on a GPU, 100 are a guess, not measured yet.
    per_device = 1 if devices[0].platform == "cpu" else 100
    n_at_once = min(parallel_runs or per_device * len(devices), max(most_missing, 1))
    mesh = jax.sharding.Mesh(devices[:n_at_once], "runs")
    return mesh, math.ceil(n_at_once / mesh.size) * mesh.size  # rounded up: as many on each device


def draw_groups(missing, sizes, n_examples, training, group_size, mesh):
    """Draw the batches of groups, each of one ratio. missing[k]: a list of the runs to do at the k-th ratio;
    sizes[k]: a subset's size there. Yields (k, runs, arrays): arrays of run numbers, train_batches and
    heldout_batches, [group_size, ...], split over the mesh; copies of the last run fill up a short group."""
    for first in range(0, max(map(len, missing)), group_size):
        for k, n_subset in enumerate(sizes):  # a group of each ratio in turn: so tqdm's time left is right
            if runs := missing[k][first : first + group_size]:
                filled = runs + runs[-1:] * (group_size - len(runs))
                batches = [draw_batches(run, n_examples, n_subset, training) for run in filled]
                arrays = (np.array(filled, np.int32), *map(np.stack, zip(*batches)))
                yield k, runs, jax.device_put(arrays, jax.NamedSharding(mesh, jax.P("runs")))


def train_groups(drawn, sizes, images, labels, training, mesh):
    """Train and test groups; each device does its own runs. Yields (k, runs, correctness int8 [runs, N]).
    images: uint8 [N, height, width, channels]; labels: integers [N]."""
    classes, labels = np.unique(labels, return_inverse=True)
    by_run, to_all = jax.P("runs"), jax.P()  # of an array, each device has a share, or all
    data = jax.device_put((images, np.int32(labels)), jax.NamedSharding(mesh, to_all))

    def train_on_device(arrays, n_subset, data):  # arrays: of this device's runs
        def one_run(run, *batches):  # batches: train_batches, heldout_batches; data: images, labels
            return train_and_test(run, *batches, n_subset, *data, len(classes), training)

        return jax.vmap(one_run)(*arrays)

    # check_vma=False: else JAX refuses loops that start from constants (velocity, correctness).
    specs = dict(in_specs=(by_run, to_all, to_all), out_specs=by_run, check_vma=False)
    train_group = jax.jit(jax.shard_map(train_on_device, mesh=mesh, **specs))
    for k, runs, arrays in drawn:
        correctness = np.asarray(train_group(arrays, sizes[k], data))
        yield k, runs, correctness[: len(runs)]  # without the copies


def ahead(items):
    """Yield the items of a generator; a thread makes the next one while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


# === The command line ===========================================================================
def parse_args(argv=None):
    """The options, and what follows from them: training (a `Training`), dataset_name, runs_dir."""
    parser = argparse.ArgumentParser(description="Estimate C-scores: see README.md.", usage=argparse.SUPPRESS)
    parser.print_help = lambda: print(parser.format_help(), flush=True)  # argparse's hides BrokenPipeError
    add = parser.add_argument
    add("--dataset", default="mnist", help="FILE.npz, digits or a labeled set of tfds (default %(default)s)")
    add("--data-dir", help="where tfds keeps its data (default $TFDS_DATA_DIR, or ~/tensorflow_datasets)")
    add("--output-dir", type=Path, default=".", help="for runs and results (default %(default)s)")
    add("--ratios", type=float, nargs="+", default=[k / 10 for k in range(1, 10)], help="of subsets (.1-.9)")
    add("--runs", type=int, default=200, help="models at each ratio; may grow later (default %(default)s)")
    for name, default in Training()._asdict().items():
        how = dict(choices=("float32", "bfloat16")) if name == "precision" else dict(type=type(default))
        add("--" + name.replace("_", "-"), default=default, help="of training (default %(default)s)", **how)
    add("--parallel-runs", type=int, help="runs at once, in equal shares (default: 1 a core, 100 a GPU)")
    add("--part", type=int, nargs=2, metavar=("I", "P"), default=[0, 1], help="only runs r with r mod P = I")
    args = parser.parse_args(argv)
    if any(n is not None and n < 1 for n in (args.runs, args.epochs, args.batch_size, args.parallel_runs)):
        parser.error("--runs, --epochs, --batch-size and --parallel-runs must be at least 1")
    if not 0 < args.learning_rate < np.inf or not 0 <= args.momentum < 1:
        parser.error("--learning-rate must be above 0, and --momentum from 0 to below 1")
    if not all(0 < ratio < 1 for ratio in args.ratios) or len(set(args.ratios)) < len(args.ratios):
        parser.error("--ratios must be above 0 and below 1, each given once")
    if not 0 <= args.part[0] < args.part[1]:
        parser.error("the I of --part I P must be from 0 to P - 1")
    args.training = Training(*(vars(args)[name] for name in Training._fields))
    args.dataset_name = Path(args.dataset.split(":")[0]).stem  # of DIR/FILE.npz, SET or SET:VERSION
    args.runs_dir = args.output_dir / "cscores-runs"
    return args


# === Data =======================================================================================
class Problem(Exception):
    """Ends the job with one line that says what is wrong and what to do."""


@contextmanager
def explained(what, advice):
    """Whatever goes wrong inside becomes a Problem that also says what was tried and what to do."""
    try:
        yield
    except Exception as error:
        raise Problem(f"{what} ({str(error)[:500] or repr(error)}): {advice}") from error


def load(dataset, data_dir=None):
    """Load the training examples of an .npz file, of scikit-learn's `digits` or of a tfds data set.
    Returns images uint8 [N, height, width, channels]; labels, integers [N]; and original int64 [N], the index
    of each in the original files, or None if unknown. Raises Problem if it cannot be had or does not suit."""
    takes = "it takes FILE.npz, digits or a labeled tfds set (TensorFlow, Python < 3.14; internet once)"
    with explained(f"cannot load --dataset {dataset}", takes):
        if dataset.lower().endswith(".npz"):
            pairs = ("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")
            with np.load(dataset) as file:  # which refuses pickles
                names = next((pair for pair in pairs if pair[0] in file), pairs[-1])
                images, labels = (file[name] for name in names)
            original = np.arange(len(images))
        elif dataset == "digits":
            from sklearn.datasets import load_digits

            digits = load_digits()  # pixels are 0 ... 16
            images, labels = np.round(digits.images * (255 / 16)), digits.target.astype(np.int32)
            original = np.arange(len(images))
        else:
            images, labels, original = load_tfds(dataset, data_dir)
    return check_images(images), check_labels(labels, len(images)), original


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
    in_order = tfds.ReadConfig(interleave_cycle_length=1)  # one file of the split after the other
    read = dict(split="train", as_supervised=True, data_dir=data_dir, read_config=in_order)
    try:
        examples = tfds.load(dataset, **read)
    except Exception:  # if another process has prepared the set meanwhile, a second try works
        if not tfds.builder(dataset, data_dir=data_dir).is_prepared():
            raise
        examples = tfds.load(dataset, **read)
    images, labels = next(iter(tfds.as_numpy(examples.batch(len(examples)))))
    # tfds sorts by the hash of a key. In these sets, keys are the original indices: argsort gives its order.
    by_index = ("mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "cmaterdb")
    known = dataset.split(":")[0].split("/")[0] in by_index
    original = np.argsort([Hasher("train").hash_key(key) for key in range(len(labels))]) if known else None
    return images, labels.astype(np.int32, casting="same_kind"), original  # same_kind: no regression targets


def check_images(images):
    """The images as uint8 [N, height, width, channels]. Raises Problem if that would change a picture."""
    found = f"not {images.dtype} {images.shape}"
    if images.dtype.kind not in "biuf" or images.size == 0 or not np.isfinite(images).all():
        raise Problem(f"images must be finite numbers, {found}")
    if images.ndim not in (3, 4):
        raise Problem(f"images must be single pictures, {found}: try images.reshape(N, height, width)")
    if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        raise Problem(f"images must have their channels last, {found}: try images.transpose(0, 2, 3, 1)")
    low, high = float(images.min()), float(images.max())
    if images.dtype != np.uint8 and (low < 0 or high > 255 or high <= 1 or (images % 1 != 0).any()):
        advice = f"np.uint8(np.round(np.interp(images, [{min(low, 0)}, {max(high, 1)}], [0, 255])))"
        advice = ("images.view(np.uint8), if bytes, or " if images.dtype == np.int8 else "") + advice
        raise Problem(f"images must be whole, 0 to 255, {found} from {low:g} to {high:g}: try {advice}")
    if high < 128:
        print(f"warning: no pixel is above {high:g}: scale them so that white is 255", file=sys.stderr)
    return images.astype(np.uint8, copy=False).reshape(*images.shape[:3], -1)  # gray images get one channel


def check_labels(labels, n_examples):
    """The labels as integers [N]. Raises Problem if they are not whole numbers of several classes."""
    need = f"labels must be {n_examples} whole numbers, not {labels.dtype} {labels.shape}"
    labels = labels.ravel() if labels.shape in ((n_examples, 1), (1, n_examples)) else labels  # MATLAB's
    if labels.shape != (n_examples,):
        one_hot = labels.ndim == 2 and len(labels) == n_examples
        raise Problem(need + (": try labels.argmax(axis=1), if each row has one 1" if one_hot else ""))
    if labels.dtype.kind in "bf" and (np.abs(labels) < 2.0**63).all() and (labels % 1 == 0).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iu":
        raise Problem(f"{need}: try np.unique(labels, return_inverse=True)[1], without unlabeled examples")
    if (labels == labels[0]).all():
        raise Problem(f"labels must be of several classes, not all {labels[0]}: every score would be 1")
    return labels


# === Saved runs =================================================================================
def describe_job(args, images, labels, sizes):
    """What all saved runs of a job agree in, a dict: settings; "content", a hash of the data; "algorithm", a
    hash of one run's batches and of the program that JAX makes of the run (so comments do not count)."""
    batches = draw_batches(1, len(images), sizes[0], args.training)  # NumPy's, so not in `program` below
    one_run = jax.jit(partial(train_and_test, n_classes=len(np.unique(labels)), training=args.training))
    traced = one_run.trace(np.int32(1), *batches, np.int32(sizes[0]), images, labels.astype(np.int32))
    program = traced.lower(lowering_platforms=("cpu",)).as_text().encode()  # also on a GPU: the same hash
    algorithm = hashlib.sha256(b"".join([program, *batches])).hexdigest()[:16]  # arrays join as bytes
    content = hashlib.sha256(images)  # the bytes alone: `program` has their shape
    content.update(labels.astype("<i8"))
    hashes = dict(content=content.hexdigest()[:16], algorithm=algorithm)
    return dict(dataset=args.dataset_name, ratios=args.ratios, **args.training._asdict(), **hashes)


def read_runs(args, job, n_examples):
    """Count the saved runs, files k-run.npz, of all parts: done bool [K, n_runs]; n_heldout, n_correct, int32
    [K, N]. Raises Problem if a file cannot be read, is of another job, or is beyond --runs."""
    done = np.zeros((len(args.ratios), args.runs), bool)
    n_heldout, n_correct = np.zeros((2, len(args.ratios), n_examples), np.int32)
    with explained(f"cannot use {args.runs_dir}", "use another --output-dir"):
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        names = os.listdir(args.runs_dir)  # glob would hide errors
    for path in (args.runs_dir / name for name in names if name.endswith(".npz")):
        with explained(f"cannot go on from {path}", "use another --output-dir"), np.load(path) as file:
            old = json.loads(str(file["job"]))
            differ = [f"{key} {old.get(key)}, not {job[key]}" for key in job if old.get(key) != job[key]]
            if differ:
                raise ValueError(f"made with {'; '.join(differ)} (if just 'algorithm': other code or JAX)")
            k, run = map(int, path.stem.split("-"))
            if run >= args.runs:
                raise ValueError(f"it is of a job of --runs {run + 1} or more")
            done[k, run], correctness = True, file["correctness"]
            n_heldout[k] += correctness >= 0
            n_correct[k] += correctness == 1
    return done, n_heldout, n_correct


def write(path, save):
    """Write `path` by save(file), whole or not at all, even if the power fails; a kill may leave a tmp*/."""
    with explained(f"cannot write {path}", "mend that and retry"), TemporaryDirectory(dir=path.parent) as new:
        with open(Path(new, path.name), "wb") as file:
            save(file)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # these mean: no fsync here
                    raise
        Path(new, path.name).replace(path)


def save_runs(trained, args, job, n_missing):
    """Save each run in a file k-run.npz, as groups are trained; show how many of all n_missing are saved."""
    n_failed = 0
    with tqdm(total=n_missing, unit="run", smoothing=0, disable=not n_missing) as bar:
        for k, runs, correctness in trained:
            if bar.n == 0:  # before the first save: has a job of other settings saved here meanwhile?
                read_runs(args, job, correctness.shape[1])  # raises Problem if so
            for run, of_run in zip(runs, correctness):
                path = args.runs_dir / f"{k}-{run}.npz"
                if not path.exists():  # else another process has saved this run since `read_runs`
                    write(path, partial(np.savez_compressed, correctness=of_run, job=json.dumps(job)))
            n_failed += (correctness < 1).all(axis=1).sum()  # models wrong on all that they held out
            accuracy = correctness[correctness >= 0].mean()
            bar.set_postfix(ratio=args.ratios[k], accuracy=accuracy, failed=n_failed, refresh=False)
            bar.update(len(runs))


# === Results ====================================================================================
def draw_figure(images, labels, scores, classes, columns=10):
    """A row for each of the classes: left its highest-scored examples; right its lowest, the lowest first.
    images: uint8 [N, height, width, channels]. Returns uint8 [..., 3]; NaN scores are not shown."""
    stride = math.ceil(max(images.shape[1:3]) / 100)
    images = images[:, ::stride, ::stride]  # larger ones would fill the memory
    height, width, channels = images.shape[1:]
    shown = [0, 1, 2] if channels in (3, 4) else [(channels - 1) // 2] * 3  # else the middle channel, as gray
    cells = np.full((len(classes), 2 * columns + 1, height + 2, width + 2, 3), 255, np.uint8)
    for row, label in zip(cells, classes):
        members = np.flatnonzero((labels == label) & ~np.isnan(scores))
        highest = members[np.argsort(-scores[members], kind="stable")][:columns]
        lowest = members[np.argsort(scores[members], kind="stable")][:columns]
        row[: len(highest), 1:-1, 1:-1] = images[highest][..., shown]
        row[columns + 1 :][: len(lowest), 1:-1, 1:-1] = images[lowest][..., shown]
    return np.vstack([np.hstack(row) for row in cells])


def write_results(args, images, labels, original, n_heldout, n_correct, imsave):
    """Write cscores.npy in the order of `images`, the .npz in original order, if known, and the figure."""
    scores, profile = cscores(n_heldout, n_correct)
    known = original is not None  # else the .npz, too, is in the order of tfds
    order = np.argsort(original) if known else np.arange(len(images))
    results = dict(scores=scores[order], labels=labels[order], profile=profile[:, order])
    results |= dict(n_heldout=n_heldout[:, order], subset_ratios=args.ratios)
    figure = draw_figure(images, labels, scores, np.unique(labels)[:50])  # more can hardly be looked at
    saves = {
        "cscores.npy": partial(np.save, arr=scores),
        f"cscores-{'orig' if known else 'tfds'}-order.npz": partial(np.savez_compressed, **results),
        f"{args.dataset_name}-examples.pdf": partial(imsave, arr=figure, format="pdf", dpi=50),
    }
    for name, save in saves.items():
        write(args.output_dir / name, save)
    print("subset ratio     ", *(f"{ratio:<6g}" for ratio in args.ratios))
    print("held-out accuracy", *(f"{p:.4f}" for p in n_correct.sum(axis=1) / n_heldout.sum(axis=1)))
    print(f"mean C-score {np.nanmean(scores):.4f}; never held out: {np.isnan(scores).sum()} examples")
    print(f"written to {args.output_dir}: {', '.join(saves)}", flush=True)


# === The job ====================================================================================
def start_jax():
    """Start JAX, with each CPU core as a device, and return the devices. Raises Problem if there are none.
    Some JAX flags change scores or stop the job: they get their defaults, whatever the environment says."""
    if sys.version_info < (3, 11) or jax.__version_info__ < (0, 9):
        raise Problem(f"needs Python 3.11, JAX 0.9 or later, not {sys.version.split()[0]}, {jax.__version__}")
    flags = dict(enable_x64=False, threefry_partitionable=True, default_prng_impl="threefry2x32")
    flags |= dict(random_seed_offset=0, numpy_dtype_promotion="standard", numpy_rank_promotion="allow")
    for flag, default in flags.items():
        jax.config.update(f"jax_{flag}", default)
    if jax.config.jax_num_cpu_devices < 0:  # not set by JAX_NUM_CPU_DEVICES
        n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        with suppress(RuntimeError):  # JAX is in use already, as in a notebook, and keeps its devices
            jax.config.update("jax_num_cpu_devices", n_cores)
    with explained("no devices", "try JAX_PLATFORMS=cpu"):
        return jax.devices()


def main(argv=None):
    """Train and save the missing runs of a part; then, if no part's runs are missing, write the results."""
    args = parse_args(argv)
    with explained("matplotlib does not work", "pip install -r requirements.txt"):
        from matplotlib.image import imsave  # now, not after the last run
    devices = start_jax()
    print(f"JAX {jax.__version__} on {len(devices)} x {devices[0].device_kind}", file=sys.stderr)
    images, labels, original = load(args.dataset, args.data_dir)
    images = np.asarray(jax.device_put(images))  # an aligned copy, which cores can share in `train_groups`
    sizes = np.array([round(len(images) * ratio) for ratio in args.ratios])
    if min(sizes) == 0 or max(sizes) == len(images):
        raise Problem(f"--ratios: each must leave some of the {len(images)} examples in, and some out")
    job = describe_job(args, images, labels, sizes)
    done, _, _ = read_runs(args, job, len(images))
    first, step = args.part
    missing = [[run for run in range(first, args.runs, step) if not row[run]] for row in done]
    mesh, group_size = plan_groups(devices, max(map(len, missing)), args.parallel_runs)
    drawn = ahead(draw_groups(missing, sizes, len(images), args.training, group_size, mesh))
    trained = ahead(train_groups(drawn, sizes, images, labels, args.training, mesh))
    save_runs(trained, args, job, sum(map(len, missing)))  # draws and trains, too: the above are lazy
    done, n_heldout, n_correct = read_runs(args, job, len(images))
    if done.all():
        write_results(args, images, labels, original, n_heldout, n_correct, imsave)
    else:
        print(f"{(~done).sum()} of {done.size} runs are missing: do all parts, or omit --part", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # else Ctrl-C would wait, and a container ignore SIGTERM
        signal.signal(number, lambda signum, frame: os._exit(128 + signum))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (None if it is closed)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    tqdm.set_lock(threading.RLock())  # its default holds a multiprocessing lock, which os._exit would leak
    os.environ.pop("MPLBACKEND", None)  # a notebook's, for `!python mnist.py`; the figure needs none
    try:
        main()
    except BrokenPipeError:
        os._exit(141)  # nobody reads on, as after `| head -1`; 141: as if SIGPIPE had ended it
    except (Problem, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        advice = "" if isinstance(error, Problem | OSError) else " (out of memory? try fewer --parallel-runs)"
        print(" ".join(f"mnist.py: {error}{advice}".split()), file=sys.stderr, flush=True)
        os._exit(1)  # sys.exit would wait for the group in training
