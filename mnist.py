"""Estimate the C-score of every MNIST training example.

    python mnist.py --dataset digits --runs 20 --batch-size 100 --output-dir digits    # a try, offline
    python mnist.py --runs 3                              # MNIST, a first look
    python mnist.py                                       # MNIST, the full experiment: 9 ratios x 200 runs
    python mnist.py --dataset own.npz --output-dir own    # your own images and labels
    srun python mnist.py --distributed                    # on several machines; README has other ways

A C-score is the expected accuracy of a model on an example that was held out of its training set, averaged
over training-set sizes (Jiang, Zhang, Talwar, Mozer: "Characterizing Structural Regularities of Labeled
Data in Overparameterized Models", ICML 2021, arXiv 2002.03206). A run trains one model on a random subset
of the examples, whose share is the subset ratio. It is a pure function of its number and that ratio, so
`vmap` trains many at once.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import signal
import sys
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


class Problem(Exception):
    """Ends the job with one line that says what is wrong and what to do."""


def load(dataset, data_dir=None):
    """Load the training examples of an .npz file, of scikit-learn's `digits` or of a tfds data set.

    Returns images uint8 [N, height, width, channels]; labels, integers [N]; and original int64 [N], the
    index of each example in the data set's original files, or None where that cannot be known.
    Raises Problem if it cannot be had or is not a set of images of one size, each with a label.
    """
    read = load_npz if dataset.endswith(".npz") else load_digits if dataset == "digits" else load_tfds
    try:
        images, labels, original = read(dataset, data_dir)
        suits = images.dtype == np.uint8 and images.ndim in (3, 4) and images.size > 0
        if not suits or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise ValueError(f"images {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}")
    except Exception as error:  # NumPy, zipfile, tfds and TensorFlow have one for whatever can be wrong
        raise Problem(f"cannot use --dataset {dataset} ({str(error)[:200]}): {read.__doc__}") from error
    return images.reshape(*images.shape[:3], -1), labels, original


def load_npz(path, _):
    """It needs x_train, y_train or images, labels: uint8 (N, height, width[, channels]) and integers (N,)."""
    with np.load(path) as file:  # which refuses pickles
        names = ("x_train", "y_train") if "x_train" in file else ("images", "labels")
        if not set(names) <= set(file):
            raise ValueError(f"it has {', '.join(file) or 'nothing'}")
        images, labels = (file[name] for name in names)
    return images, labels, np.arange(len(images))


def load_digits(*_):
    """It needs scikit-learn, which carries the 1,797 digits."""
    from sklearn import datasets

    digits = datasets.load_digits()  # pixels are 0 ... 16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images, digits.target.astype(np.int32), np.arange(len(images))


def load_tfds(dataset, data_dir):
    """It needs tensorflow-datasets and TensorFlow (Python 3.13 has both), a network the first time, and a
    train split of labeled 8-bit images of one size; --dataset FILE.npz and --dataset digits do not."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN announces itself at any log level
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # without a network it tells of each of 40 retries
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.hashing import Hasher

    data, info = tfds.load(dataset, split="train", as_supervised=True, data_dir=data_dir, with_info=True)
    images, labels = next(iter(tfds.as_numpy(data.batch(len(data)))))
    # tfds sorts a split by the hash of each example's key, which for these sets is its index in the files.
    keyed = info.name in ("mnist", "fashion_mnist", "kmnist")
    original = np.array(sorted(range(len(labels)), key=Hasher("train").hash_key)) if keyed else None
    return images, labels.astype(np.int32, casting="same_kind"), original


# --- The algorithm ------------------------------------------------------------------------------
def draw_batches(run, n_examples, ratio, epochs, batch_size):
    """Draw a run's subset, n = round(N * ratio) of N examples, and the batches that it trains and tests on.

    Returns int32 [epochs + 1, ceil(N / B), B], indices of examples: for each epoch the subset, in a new
    order, and last what is held out. N, which is no example, fills the batches up.
    """
    draws = np.random.RandomState(run)
    n = round(n_examples * ratio)
    subset = draws.choice(n_examples, n, replace=False)
    batches = np.full((epochs + 1, math.ceil(n_examples / batch_size), batch_size), n_examples, np.int32)
    for epoch in batches[:epochs]:
        epoch.flat[:n] = subset[draws.permutation(n)]
    batches[epochs].flat[: n_examples - n] = np.delete(np.arange(n_examples), subset)
    return batches


def init(run, widths):
    """The params of a new run: (weights float32 [out, in], biases float32 [out]) of each layer, a list."""
    glorot = jax.nn.initializers.glorot_normal(in_axis=-1, out_axis=-2)
    keys = jax.random.split(jax.random.key(run), (len(widths) - 1, 2))
    return [
        (glorot(key_w, (n_out, n_in)), 0.01 * jax.random.normal(key_b, (n_out,)))
        for (key_w, key_b), n_in, n_out in zip(keys, widths, widths[1:])
    ]


def predict(params, images):
    """Logits float32 [..., classes] of flattened images uint8 [..., pixels]."""
    *hidden, (weights, biases) = params
    activations = images.astype(jnp.float32) / 255
    for w, b in hidden:
        activations = jax.nn.relu(jnp.inner(activations, w) + b)
    return jnp.inner(activations, weights) + biases


def loss(params, images, labels):
    """Mean cross-entropy of a batch; a label of -1, which is no class, fills it up and does not count."""
    logits = predict(params, images)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / jnp.sum(labels >= 0)


def train(params, batches, n_batches, images, labels, *, epochs, learning_rate, momentum):
    """The params after SGD with momentum over the first n_batches of each epoch.

    batches: from `draw_batches`; images: uint8 [N, pixels]; labels: int32 [N + 1], the last of them -1.
    n_batches is traced, so that all subset ratios share one compilation.
    """

    def step(i, state):
        params, velocity = state
        batch = batches[i // n_batches, i % n_batches]
        grads = jax.grad(loss)(params, images[batch], labels[batch])
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
        return jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity), velocity

    start = params, jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, epochs * n_batches, step, start)[0]


def heldout_correctness(run, batches, n_train, n_test, images, labels, *, n_classes, **sgd):
    """Train a run and test it: int8 [N], 1 where it predicts the label, 0 where not, -1 if not held out.

    The batches of `draw_batches` that are not empty are the first n_train of each epoch, n_test of the last.
    """
    params = train(init(run, (images.shape[1], 512, 256, n_classes)), batches, n_train, images, labels, **sgd)

    def test(i, correctness):
        batch = batches[-1, i]
        correct = predict(params, images[batch]).argmax(axis=-1) == labels[batch]
        return correctness.at[batch].set(correct.astype(jnp.int8))  # N is out of range: ignored

    return jax.lax.fori_loop(0, n_test, test, jnp.full(len(images), -1, jnp.int8))


def cscores(n_heldout, n_correct):
    """C-scores float64 [N] and consistency profile float64 [K, N] from counts of runs, int [K, N].

    The profile is each example's held-out accuracy at each of K subset ratios (Section 3 of the paper);
    its C-score is the mean over the ratios at which a run held it out. NaN: there is no estimate.
    """
    with np.errstate(invalid="ignore"):
        profile = n_correct / n_heldout
        return np.nansum(profile, axis=0) / np.sum(n_heldout > 0, axis=0), profile


# --- The job ------------------------------------------------------------------------------------
def start_mesh(args):
    """Join the other processes, if any; print and return what the job runs on, a mesh of all devices."""
    if jax.config.jax_num_cpu_devices < 0:  # the user has not chosen: each core becomes a device
        n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(n_cores, args.runs))
    if args.distributed is not None:
        jax.config.update("jax_enable_preemption_service", False)  # it keeps SIGTERM from ending a process
        try:
            address, n, i = args.distributed or (None, None, None)
            jax.distributed.initialize(address, n and int(n), i and int(i), heartbeat_timeout_seconds=30)
        except Exception as error:  # one of many kinds, as each environment is read by code of its own
            raise Problem(f"--distributed: {error} (without Slurm or the like, add HOST:PORT N I)") from error
    devices = jax.devices()
    if jax.process_index() == 0:
        print(f"JAX {jax.__version__} on {len(devices)} x {devices[0].device_kind}", flush=True)
        if devices[0].platform == "cpu":
            print('Running on the CPU, as JAX sees no GPU (NVIDIA: pip install "jax[cuda13]")', flush=True)
    return jax.sharding.Mesh(np.array(devices), ("runs",))


def share(mesh, values):
    """The ints [n] that each process gives, int32 [devices, n]; waits until every process has called it."""
    by_run, copied = jax.NamedSharding(mesh, jax.P("runs")), jax.NamedSharding(mesh, jax.P())
    rows = jax.make_array_from_callback((mesh.size, len(values)), by_run, lambda _: np.int32([values]))
    return np.asarray(jax.jit(jnp.copy, out_shardings=copied)(rows))


def load_together(args, mesh):
    """`load` in every process, and what the counts depend on, a dict. Raises Problem if that differs."""
    for turn in range(2):  # process 0 first: tfds cannot prepare a data set twice at the same time
        if turn == min(jax.process_index(), 1):
            images, labels, original = load(args.dataset, args.data_dir)
        share(mesh, [turn])
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    settings = dict(dataset=Path(args.dataset).stem, content=content, ratios=args.ratios, **args.sgd)
    job = hashlib.sha256(f"{settings} {args.runs} {args.parallel_runs}".encode()).hexdigest()
    if len(np.unique(share(mesh, [int(job[:7], 16)]))) > 1:
        raise Problem("the processes were started with different settings or data")
    return images, labels, original, settings


def make_trainer(images, labels, mesh, *, epochs, batch_size, **sgd):
    """The function run_batch(runs, ratio), for images uint8 [N, ...] and labels, integers [N].

    It starts to train and test runs, int [R], in lockstep, spread evenly over the mesh, and returns at
    once: their `heldout_correctness`, int8 [R, N]. All processes have to call it alike.
    """
    by_run, copied = jax.NamedSharding(mesh, jax.P("runs")), jax.NamedSharding(mesh, jax.P())
    classes, labels = np.unique(labels, return_inverse=True)
    data = images.reshape(len(images), -1), np.append(labels, -1).astype(np.int32)
    data = [jax.make_array_from_process_local_data(copied, array) for array in data]
    one = partial(heldout_correctness, n_classes=len(classes), epochs=epochs, **sgd)
    many = jax.vmap(one, in_axes=(0, 0, None, None, None, None))
    # Devices train and test without each other; only several processes exchange results, at the end.
    many = jax.jit(many, out_shardings=by_run if jax.process_count() == 1 else copied)

    def run_batch(runs, ratio):
        n, n_examples = round(len(images) * ratio), len(images)
        draw = partial(draw_batches, n_examples=n_examples, ratio=ratio, epochs=epochs, batch_size=batch_size)
        shape = len(runs), epochs + 1, math.ceil(n_examples / batch_size), batch_size
        # JAX asks for the rows of each device of this process, so every process draws for itself alone.
        batches = jax.make_array_from_callback(shape, by_run, lambda at: np.array([*map(draw, runs[at[0]])]))
        return many(runs, batches, math.ceil(n / batch_size), math.ceil((n_examples - n) / batch_size), *data)

    return run_batch


def write(path, save):
    """Write what `save(file)` makes to `path`; whoever reads it sees the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_counts(path, settings, shape):
    """The counts in a checkpoint, which process 0 reads, or zeros: n_heldout and n_correct, int32 [K, N].

    Raises Problem if `path` cannot be read or was made with other settings. It is left alone.
    """
    if jax.process_index() > 0 or not path.exists():
        return np.zeros((2, *shape), np.int32)
    try:
        with np.load(path) as file:
            old = json.loads(str(file["settings"]))
            differ = [f"{name} {old[name]}, not {new}" for name, new in settings.items() if old[name] != new]
            if "trained" in file and (np.diff(file["trained"].astype(int)) > 0).any():  # an earlier version's
                differ.append("runs out of order")
            if differ:
                raise ValueError(f"made with {'; '.join(differ)}")
            return file["n_heldout"], file["n_correct"]
    except Exception as error:  # a damaged file can make numpy, zipfile and json raise almost anything
        raise Problem(f"cannot go on from {path} ({error}): use another --output-dir") from error


def train_missing(args, mesh, run_batch, n_heldout):
    """Train the runs that n_heldout, int [K, N], does not count yet, in ascending order at each ratio.

    Yields (k, correctness) for each batch of runs: its ratio's row in n_heldout, and int8 [runs, N].
    """
    n_examples = n_heldout.shape[1]
    n_subset = np.rint(n_examples * np.array(args.ratios))
    if not all((n_subset > 0) & (n_subset < n_examples)) or len(set(args.ratios)) < len(args.ratios):
        raise Problem(f"--ratios: each, once, must leave some of {n_examples} examples in and some out")
    done = share(mesh, n_heldout.sum(axis=1) // (n_examples - n_subset))[0]  # process 0 has the checkpoint
    if done.max() > args.runs:
        raise Problem(f"{done.max()} runs are done: give --runs that many or use another --output-dir")
    at_once = args.parallel_runs or mesh.size * (1 if jax.default_backend() == "cpu" else 100)
    width = math.ceil(min(at_once, args.runs) / mesh.size) * mesh.size
    started = (  # the last batch is filled up with its last run
        (k, first, run_batch(np.minimum(np.arange(first, first + width), args.runs - 1), ratio))
        for k, ratio in enumerate(args.ratios)
        for first in range(done[k], args.runs, width)
    )
    work = args.epochs * n_subset + (n_examples - n_subset) / 2  # to test an example is half the work
    hidden, total = jax.process_index() > 0, args.runs * work.sum()
    with tqdm(total=total, initial=done @ work, unit="ex", unit_scale=True, disable=hidden) as bar:
        # A batch is waited for when the next has been started, so that no device waits for the host.
        for (k, first, correctness), _ in pairwise(chain(started, [None])):
            correctness = np.asarray(correctness)[: args.runs - first]
            yield k, correctness
            accuracy = correctness[correctness >= 0].mean()
            bar.set_description(f"ratio {args.ratios[k]:g}, held-out accuracy {accuracy:.4f}", refresh=False)
            bar.update(len(correctness) * work[k])


def draw_figure(images, labels, scores, columns=10):
    """A row per class: its highest-scored examples on the left; on the right its lowest, lowest first.

    images: uint8 [N, height, width, channels]. Returns the picture, uint8 [..., 3]; NaN scores are not shown.
    """
    (height, width, channels), classes = images.shape[1:], np.unique(labels)
    rgb = [0, 1, 2] if channels > 2 else [0, 0, 0]
    cells = np.full((len(classes), 2 * columns + 1, height + 2, width + 2, 3), 255, np.uint8)
    for row, label in zip(cells, classes):
        members = np.flatnonzero((labels == label) & ~np.isnan(scores))
        for start, sign in (0, -1), (columns + 1, 1):
            best = members[np.argsort(sign * scores[members], kind="stable")][:columns]
            row[start : start + len(best), 1:-1, 1:-1] = images[best][..., rgb]
    return cells.transpose(0, 2, 1, 3, 4).reshape(len(classes) * (height + 2), -1, 3)


def write_results(args, images, labels, original, n_heldout, n_correct):
    """Write the scores, the consistency profile and the figure, and print a summary."""
    from matplotlib.image import imsave

    scores, profile = cscores(n_heldout, n_correct)
    kind, order = ("tfds", slice(None)) if original is None else ("orig", np.argsort(original))
    results = dict(scores=scores, labels=labels, profile=profile, n_heldout=n_heldout)
    results = {name: array[..., order] for name, array in results.items()}
    names = "cscores.npy", f"cscores-{kind}-order.npz", f"{Path(args.dataset).stem}-examples.pdf"
    plain, ordered, figure = (args.output_dir / name for name in names)
    write(plain, partial(np.save, arr=scores))
    write(ordered, partial(np.savez_compressed, **results, subset_ratios=np.array(args.ratios)))
    write(figure, partial(imsave, arr=draw_figure(images, labels, scores), format="pdf", dpi=50))
    print("subset ratio      ", *(f"{ratio:<6g}" for ratio in args.ratios))
    print("held-out accuracy ", *(f"{a:.4f}" for a in n_correct.sum(axis=1) / n_heldout.sum(axis=1)))
    print(f"mean C-score       {np.nanmean(scores):.4f} (--runs {args.runs})")
    print("written           ", plain, ordered, figure)
    if missing := np.isnan(scores).sum():
        print(f"warning: {missing} examples, never held out, have no score (NaN): more --runs would fix it")


def parse_args(argv=None):
    """The settings as attributes; exits with one line for those that suit no data set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--dataset", default="mnist", help="FILE.npz, digits (offline) or a tfds set (default %(default)s)")
    add("--data-dir", help="of tfds (default $TFDS_DATA_DIR, or else ~/tensorflow_datasets)")
    add("--output-dir", type=Path, default=".", help="created if missing (default %(default)s)")
    add("--ratios", type=float, nargs="+", help="subset ratios, above 0, below 1 (default 0.1 0.2 ... 0.9)")
    add("--runs", type=int, default=200, help="models at each ratio; may grow later (default %(default)s)")
    add("--epochs", type=int, default=10, help="passes over the subset (default %(default)s)")
    add("--batch-size", type=int, default=128, help="examples in a step of SGD (default %(default)s)")
    add("--learning-rate", type=float, default=0.1, help="step size of SGD (default %(default)s)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (default %(default)s)")
    add("--parallel-runs", type=int, help="runs at once, job-wide (default 1 per CPU core, 100 per GPU)")
    add("--distributed", nargs="*", metavar="HOST:PORT N I", help="process I of N; give nothing under Slurm")
    args = parser.parse_args(argv)
    args.ratios = args.ratios or [k / 10 for k in range(1, 10)]
    args.sgd = {name: vars(args)[name] for name in ("epochs", "batch_size", "learning_rate", "momentum")}
    if min(args.runs, args.epochs, args.batch_size, args.parallel_runs or 1) < 1 or args.parallel_runs == 0:
        parser.error("--runs, --epochs, --batch-size and --parallel-runs must be at least 1")
    if not 0 < args.learning_rate < np.inf or not 0 <= args.momentum < 1:
        parser.error("--learning-rate must be above 0, and --momentum from 0 to below 1")
    return args


def main(argv=None):
    """The whole job: devices, data, checkpoint, the runs that it lacks, results."""
    args = parse_args(argv)
    mesh = start_mesh(args)
    images, labels, original, settings = load_together(args, mesh)
    checkpoint = args.output_dir / "cscores-checkpoint.npz"
    n_heldout, n_correct = load_counts(checkpoint, settings, (len(args.ratios), len(labels)))
    save = partial(np.savez, settings=json.dumps(settings), n_heldout=n_heldout, n_correct=n_correct)
    run_batch = make_trainer(images, labels, mesh, **args.sgd)
    for k, correctness in train_missing(args, mesh, run_batch, n_heldout):
        n_heldout[k] += (correctness >= 0).sum(axis=0)
        n_correct[k] += (correctness == 1).sum(axis=0)
        if jax.process_index() == 0:
            write(checkpoint, save)
    if jax.process_index() == 0:
        write_results(args, images, labels, original, n_heldout, n_correct)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would put Ctrl-C off until the devices are done
    try:
        sys.exit(main())
    except (Problem, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        hint = "" if isinstance(error, Problem) else " (try another --output-dir or fewer --parallel-runs)"
        print(*f"mnist.py: {error}{hint}".split(), file=sys.stderr)
        os._exit(1)  # sys.exit would wait for minutes, for the other processes
