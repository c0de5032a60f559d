"""Estimate the C-score of every MNIST training example.

    python mnist.py --dataset digits --runs 20 --output-dir digits    # 1,797 digits: all of it, offline
    python mnist.py --runs 3    # MNIST, a first look
    python mnist.py             # MNIST, the full experiment: 9 ratios x 200 runs, on all local devices
    srun python mnist.py --distributed    # the same on several machines; README has other ways

A C-score (Jiang, Zhang, Talwar, Mozer: "Characterizing Structural Regularities of Labeled Data in
Overparameterized Models", ICML 2021, arXiv 2002.03206) is the expected accuracy of a model on an
example that was held out of its training set, averaged over training-set sizes.

A run trains one model on a random subset of the examples; the subset ratio is the subset's share.
Run i is a pure function of i and the ratio, so `vmap` over runs trains many at once. The file reads
in the order that data flows; the algorithm is the part from `draw_subset` to `cscores`.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MNIST_FILES = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"


class Problem(Exception):
    """Problem(message, status=1) ends the job with a line that says what to do; 2 is for wrong usage."""


# --- Load ---------------------------------------------------------------------------------------
def load(dataset, data_dir=None):
    """Load the training examples of scikit-learn's `digits` or of a tfds image-classification set.

    Returns images uint8 [N, height, width, channels]; labels int32 [N]; and original int64 [N], the
    index of each example in the data set's original files, or None where that cannot be known. A
    tfds set is in the order of `tfds.load`, shard after shard if it has several.
    Raises Problem if it cannot be had or is not a set of images of one size, each with a label.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()  # pixels are 0 ... 16
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        return images, digits.target.astype(np.int32), np.arange(len(images))

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN announces itself at any log level
    for noisy in ("absl", "tensorflow", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.hashing import Hasher

    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        image, label = builder.info.features["image"], builder.info.features["label"]
        if None in image.shape or image.np_dtype != np.uint8 or label.shape != ():
            raise ValueError(f"it has {image} and {label}")
        builder.download_and_prepare()
        if builder.info.file_format.value == "array_record":  # as_dataset cannot read it
            examples = builder.as_data_source(split="train")
            images, labels = map(np.array, zip(*((e["image"], e["label"]) for e in examples)))
        else:
            in_order = tfds.ReadConfig(interleave_cycle_length=1)
            data = tfds.as_numpy(builder.as_dataset(split="train", batch_size=-1, read_config=in_order))
            images, labels = data["image"], data["label"]
    except OSError as error:  # no network (requests' ConnectionError is one), no space, no permission
        folder = builder.data_path.parents[len(dataset.split("/"))] / "downloads" / "manual"
        files = " ".join(f"{part}-ubyte.gz" for part in MNIST_FILES)
        raise Problem(
            f"cannot prepare {dataset} ({type(error).__name__}: {str(error)[:80]}); without a network, put "
            f"its files (mnist: {files}) into {folder}, or use --dataset digits, which needs none"
        ) from error
    except Exception as error:  # tfds and TensorFlow have one of their own for whatever can be wrong
        raise Problem(
            f"cannot use --dataset {dataset} ({str(error).splitlines()[0]}): it takes a tfds data set with a "
            "train split whose examples have an 8-bit image, all of one size, and a label, or digits",
            2,
        ) from error
    original = None
    if isinstance(builder, tfds.image_classification.MNIST):
        # tfds sorts a split by the hash of each example's key, for these sets its index in the files.
        original = np.array(sorted(range(len(labels)), key=Hasher("train").hash_key))
    return images, labels.astype(np.int32), original


# --- Draw subsets -------------------------------------------------------------------------------
def draw_subset(run, n_examples, ratio):
    """Draw the subset that a run trains on: int64 [n], n = round(n_examples * ratio).

    Also returns the RandomState that drew it; its next `permutation(n)`s are the run's shuffles.
    """
    draws = np.random.RandomState(run)
    return draws.choice(n_examples, round(n_examples * ratio), replace=False), draws


# --- Train --------------------------------------------------------------------------------------
def init(run, widths):
    """The state in which a run starts: (params, velocity), the velocity zero and shaped like params.

    params: a list of (weights float32 [out, in], biases float32 [out]), one for each layer.
    """
    glorot = jax.nn.initializers.glorot_normal(in_axis=-1, out_axis=-2)
    keys = jax.random.split(jax.random.key(run), (len(widths) - 1, 2))
    params = [
        (glorot(key_w, (n_out, n_in)), 0.01 * jax.random.normal(key_b, (n_out,)))
        for (key_w, key_b), n_in, n_out in zip(keys, widths, widths[1:])
    ]
    return params, jax.tree.map(jnp.zeros_like, params)


def predict(params, images):
    """Logits float32 [..., classes] of flattened images uint8 [..., pixels]."""
    *hidden, (weights, biases) = params
    activations = images.astype(jnp.float32) / 255
    for w, b in hidden:
        activations = jax.nn.relu(jnp.inner(activations, w) + b)
    return jnp.inner(activations, weights) + biases


def loss(params, images, labels, real):
    """Mean cross-entropy over the examples of the batch that are `real` (bool [B]), not padding."""
    logits = predict(params, images)
    targets = jax.nn.one_hot(labels, logits.shape[-1]) * real[:, None]
    return -jnp.sum(targets * jax.nn.log_softmax(logits)) / jnp.sum(real)


def train_epoch(state, order, n, images, labels, *, batch_size, learning_rate, momentum):
    """One epoch of SGD with momentum over the first n entries of `order`; the last batch may be smaller.

    order: int32 [N], indices into images uint8 [N, pixels] and labels int32 [N]. The number of steps is
    a traced value, so that all subset ratios share one compilation.
    """
    order = jnp.pad(order, (0, -len(order) % batch_size))

    def step(i, state):
        params, velocity = state
        batch = lax.dynamic_slice(order, (i * batch_size,), (batch_size,))
        real = i * batch_size + jnp.arange(batch_size) < n
        grads = jax.grad(loss)(params, images[batch], labels[batch], real)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity)
        return params, velocity

    return lax.fori_loop(0, (n + batch_size - 1) // batch_size, step, state)


def evaluate(params, order, n, images, labels, *, block=500):
    """Whether the label of each example in `order` is predicted: bool [N], only the first n of them tested.

    The other arguments are those of `train_epoch`; `block` examples are tested at a time, to bound memory.
    """
    padded = jnp.pad(order, (0, -len(order) % block))

    def test(i, correct):
        batch = lax.dynamic_slice(padded, (i * block,), (block,))
        predicted = predict(params, images[batch]).argmax(axis=-1)
        return lax.dynamic_update_slice(correct, predicted == labels[batch], (i * block,))

    correct = lax.fori_loop(0, (n + block - 1) // block, test, jnp.zeros_like(padded, bool))
    return correct[: len(order)]


class Trainer:
    """Trains and tests `width` runs in lockstep, split evenly over `devices`.

    images: uint8 [N, ...]; labels: int32 [N]. Each function is compiled once, for all subset ratios.
    """

    def __init__(self, images, labels, width, devices, *, epochs, batch_size, learning_rate, momentum):
        mesh = Mesh(np.array(devices), ("runs",))
        split, copied = PartitionSpec("runs"), PartitionSpec()

        def over_runs(function, *specs):
            many = jax.vmap(function, in_axes=[0 if spec == split else None for spec in specs])
            return jax.jit(jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=split))

        images = images.reshape(len(images), -1)
        widths = (images.shape[1], 512, 256, int(labels.max()) + 1)
        sgd = dict(batch_size=batch_size, learning_rate=learning_rate, momentum=momentum)
        self.init = over_runs(partial(init, widths=widths), split)
        self.train_epoch = over_runs(partial(train_epoch, **sgd), split, split, copied, copied, copied)
        self.evaluate = over_runs(evaluate, split, split, copied, copied, copied)
        self.data = jax.device_put((images, labels), NamedSharding(mesh, copied))
        self.by_run = NamedSharding(mesh, split)
        self.width = -(-width // len(devices)) * len(devices)
        self.n_examples, self.epochs = len(labels), epochs

    def run_batch(self, runs, ratio, progress=lambda work: None):
        """Train the given runs (at most `width`) at a subset ratio and test what they held out.

        Returns heldout, bool [runs, N]: the examples outside each run's subset; and correct, bool
        [runs, N]: those of them whose label the trained model predicts. `progress` is called with the
        work just done, in examples trained on; testing an example counts as half of one.
        """
        n_runs, n_spare = len(runs), self.width - len(runs)
        runs = np.pad(runs, (0, n_spare), mode="edge")  # a short batch repeats its last run
        subsets, draws = zip(*(draw_subset(run, self.n_examples, ratio) for run in runs))
        n = len(subsets[0])
        heldout = np.ones((self.width, self.n_examples), bool)
        np.put_along_axis(heldout, np.array(subsets), False, axis=1)

        def on_devices(orders):
            padded = [np.pad(order, (0, self.n_examples - len(order))) for order in orders]
            return jax.device_put(np.array(padded, np.int32), self.by_run)

        def shuffle():
            return on_devices([subset[draw.permutation(n)] for subset, draw in zip(subsets, draws)])

        state, order = self.init(runs), shuffle()
        for epoch in range(1, self.epochs + 1):
            state = self.train_epoch(state, order, n, *self.data)
            # The devices train meanwhile: the call above does not wait for them.
            order = shuffle() if epoch < self.epochs else on_devices(map(np.flatnonzero, heldout))
            jax.block_until_ready(state)
            progress(n * n_runs)
        n_heldout = self.n_examples - n
        correct = np.zeros_like(heldout)
        tested = np.asarray(self.evaluate(state[0], order, n_heldout, *self.data))
        correct[heldout] = tested[:, :n_heldout].ravel()
        progress(n_heldout * n_runs / 2)
        return heldout[:n_runs], correct[:n_runs]


# --- Scores -------------------------------------------------------------------------------------
def cscores(n_heldout, n_correct):
    """C-scores float64 [N] and consistency profile float64 [K, N] from counts of runs, int [K, N].

    The profile is each example's held-out accuracy at each of K subset ratios (Section 3 of the paper);
    its C-score is the mean over the ratios at which a run held it out. NaN: there is no estimate.
    """
    with np.errstate(invalid="ignore"):
        profile = n_correct / n_heldout
        return np.nansum(profile, axis=0) / np.sum(n_heldout > 0, axis=0), profile


# --- Figure -------------------------------------------------------------------------------------
def draw_figure(images, labels, scores, columns=10):
    """One row per class: its highest-scored examples on the left; on the right its lowest, lowest first.

    images: uint8 [N, height, width, channels]. Returns a matplotlib Figure; NaN scores are not shown.
    """
    from matplotlib.figure import Figure

    height, width, channels = images.shape[1:]
    classes = np.unique(labels)
    cells = np.full((len(classes), 2 * columns + 1, height + 2, width + 2, channels), 255, np.uint8)
    for row, label in zip(cells, classes):
        members = np.flatnonzero((labels == label) & ~np.isnan(scores))
        for start, sign in (0, -1), (columns + 1, 1):
            best = members[np.argsort(sign * scores[members], kind="stable")][:columns]
            row[start : start + len(best), 1:-1, 1:-1] = images[best]
    sheet = cells.transpose(0, 2, 1, 3, 4).reshape(len(classes) * (height + 2), -1, channels)
    figure = Figure(figsize=(10, 10 * sheet.shape[0] / sheet.shape[1]), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    return figure


# --- Files --------------------------------------------------------------------------------------
def write(path, save):
    """Write what `save(file)` makes to `path`; whoever reads it sees the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    content = io.BytesIO()
    save(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Problem(f"cannot write {path} ({error.strerror}): make room or use another place") from error


def load_checkpoint(path, settings, n_examples, n_runs):
    """The counts in a checkpoint, or zeros: n_heldout, n_correct int32 [K, N]; trained bool [K, n_runs].

    Raises Problem if `path` cannot be read or was made with other settings. It is left alone.
    """
    if not path.exists():
        n_heldout, n_correct = np.zeros((2, len(settings["ratios"]), n_examples), np.int32)
        trained = np.zeros((len(n_heldout), n_runs), bool)
        return dict(n_heldout=n_heldout, n_correct=n_correct, trained=trained)
    try:
        with np.load(path) as file:
            old = json.loads(str(file["settings"]))
            counts = {name: file[name] for name in ("n_heldout", "n_correct", "trained")}
        differ = [f"{name} {old[name]}, not {new}" for name, new in settings.items() if old[name] != new]
    except Exception as error:  # a damaged file can make numpy, zipfile and json raise almost anything
        raise Problem(f"cannot read {path} ({error}): move it away or use another --output-dir") from error
    if differ:
        raise Problem(f"{path} was made with {'; '.join(differ)}: use its settings or another --output-dir")
    of_runs = 1 + np.flatnonzero(counts["trained"].any(axis=0)).max(initial=-1)
    if of_runs > n_runs:
        raise Problem(f"{path} is of {of_runs} runs: give --runs that many or use another --output-dir")
    counts["trained"] = np.pad(counts["trained"], ((0, 0), (0, n_runs)))[:, :n_runs]
    return counts


# --- Several processes --------------------------------------------------------------------------
def join_processes(coordinator, num_processes, process_id):
    """Join the other processes of the job; JAX finds out what is None from Slurm, Open MPI or Kubernetes.

    Raises Problem if it cannot. When a process dies, the others end within half a minute.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending a process
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=30)
    except Exception as error:  # one of many kinds, as each environment is read by code of its own
        hint = "unless Slurm or the like tells, give --coordinator HOST:PORT --num-processes N --process-id I"
        raise Problem(f"--distributed: {error} ({hint})", 2) from error


def sum_over_processes(counts):
    """The sum, int32, of an int array over all processes; each of them has to call this.

    Raises Problem if one has died.
    """
    one = {device.process_index: device for device in jax.devices()}
    mesh = Mesh(np.array([one[i] for i in range(len(one))]), ("processes",))
    apart, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["processes"], []))
    parts = jax.make_array_from_process_local_data(apart, np.asarray(counts, np.int32)[None])
    try:
        return np.array(jax.jit(lambda parts: parts.sum(axis=0), out_shardings=everywhere)(parts))
    except jax.errors.JaxRuntimeError as error:
        raise Problem(f"lost another process ({error}): start all again, they continue from there") from error


# --- Command line -------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints the usage as well
        raise Problem(f"{message}; see --help", 2)


def parse_args(argv=None):
    """The settings as attributes; raises Problem for those that suit no data set."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="mnist", help="a tfds image set, or digits: small, offline (default mnist)")
    add("--data-dir", help="of tfds (default $TFDS_DATA_DIR, or else ~/tensorflow_datasets)")
    add("--output-dir", type=Path, default=".", help="created if missing (default %(default)s)")
    add("--ratios", type=float, nargs="+", default=RATIOS, help="subset ratios (default 0.1 0.2 ... 0.9)")
    add("--runs", type=int, default=200, help="models at each ratio; may grow later (default %(default)s)")
    add("--epochs", type=int, default=10, help="passes over the subset (default %(default)s)")
    add("--batch-size", type=int, default=128, help="examples in a step of SGD (default %(default)s)")
    add("--learning-rate", type=float, default=0.1, help="step size of SGD (default %(default)s)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (default %(default)s)")
    add("--parallel-runs", type=int, help="runs trained together (default 1 per CPU core, 100 per GPU)")
    add("--figure", type=Path, help="the suffix is the format (default OUTPUT_DIR/DATASET-examples.pdf)")
    add("--distributed", action="store_true", help="one of several processes, which share the runs")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where no Slurm, MPI or Kubernetes tells it")
    add("--num-processes", type=int, metavar="N", help="with --coordinator: how many there are")
    add("--process-id", type=int, metavar="I", help="with --coordinator: which this is, 0 ... N-1")
    args = parser.parse_args(argv)
    args.figure = args.figure or args.output_dir / f"{args.dataset.replace('/', '-')}-examples.pdf"
    if min(args.runs, args.epochs, args.batch_size, args.parallel_runs or 1) < 1 or args.parallel_runs == 0:
        parser.error("--runs, --epochs, --batch-size and --parallel-runs must be at least 1")
    if not all(0 < ratio < 1 for ratio in args.ratios) or len(set(args.ratios)) < len(args.ratios):
        parser.error("--ratios must lie between 0 and 1, each given once")
    if not 0 < args.learning_rate < np.inf or not 0 <= args.momentum < 1:
        parser.error("--learning-rate must be above 0, and --momentum from 0 to below 1")
    if args.figure.suffix not in (".pdf", ".png", ".svg", ".eps", ".jpg"):
        parser.error(f"--figure {args.figure}: use .pdf, .png, .svg, .eps or .jpg")
    args.distributed |= (args.coordinator, args.num_processes, args.process_id) != (None, None, None)
    return args


def make_cores_devices():
    """Have JAX see each CPU core that the process may use as a device, unless the user chose a number."""
    if jax.config.jax_num_cpu_devices < 0:
        n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", n_cores)


def write_results(args, images, labels, original, n_heldout, n_correct):
    """Write the scores, the consistency profile and the figure, and print a summary."""
    scores, profile = cscores(n_heldout, n_correct)
    order = slice(None) if original is None else np.argsort(original)
    results = dict(scores=scores[order], labels=labels[order], subset_ratios=np.array(args.ratios))
    results |= dict(profile=profile[:, order], n_heldout=n_heldout[:, order])
    ordered = args.output_dir / f"cscores-{'tfds' if original is None else 'orig'}-order.npz"
    write(args.output_dir / "cscores.npy", partial(np.save, arr=scores))
    write(ordered, partial(np.savez_compressed, **results))
    write(args.figure, partial(draw_figure(images, labels, scores).savefig, format=args.figure.suffix[1:]))
    print("subset ratio      ", *(f"{ratio:<6g}" for ratio in args.ratios))
    print("held-out accuracy ", *(f"{a:.4f}" for a in n_correct.sum(axis=1) / n_heldout.sum(axis=1)))
    print(f"mean C-score       {np.nanmean(scores):.4f} (--runs {args.runs})")
    print("written           ", args.output_dir / "cscores.npy", ordered, args.figure)
    if missing := np.isnan(scores).sum():
        print(f"warning: {missing} examples, never held out, have no score (NaN): more --runs would fix it")


def estimate(args):
    """The whole job: load, train the runs that the checkpoint lacks, write the results, sum up."""
    start = time.perf_counter()
    make_cores_devices()
    if args.distributed:
        join_processes(args.coordinator, args.num_processes, args.process_id)
    process, n_processes = jax.process_index(), jax.process_count()
    names = ["cscores-checkpoint.npz", *(f"cscores-checkpoint-{i}.npz" for i in range(1, n_processes))]
    path = args.output_dir / names[process]
    for folder in args.output_dir, args.figure.parent:  # before hours of training: can it be written to?
        probe = folder / f".cscores-probe-{process}"
        write(probe, lambda file: None)
        probe.unlink()
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    if process == 0:
        together = f" in {n_processes} processes" if n_processes > 1 else ""
        print(f"JAX {jax.__version__} on {jax.device_count()} x {devices[0].device_kind}{together}")
        if on_cpu:
            print('Running on the CPU: JAX sees no GPU (for one from NVIDIA: pip install "jax[cuda13]")')

    for turn in range(2):  # process 0 first: tfds cannot prepare a data set twice at the same time
        if turn == min(process, 1):
            images, labels, original = load(args.dataset, args.data_dir)
        sum_over_processes(0)
    n_subset = np.array([round(len(labels) * ratio) for ratio in args.ratios])
    if n_subset.min() == 0 or n_subset.max() == len(labels):
        raise Problem(f"--ratios: one leaves none of {len(labels)} examples to train on or to hold out", 2)
    sgd = {name: vars(args)[name] for name in ("epochs", "batch_size", "learning_rate", "momentum")}
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    settings = dict(dataset=args.dataset, content=content, ratios=list(args.ratios), **sgd)
    mine = int(hashlib.sha256(json.dumps([settings, args.runs]).encode()).hexdigest()[:4], 16)
    if sum_over_processes(mine) != n_processes * mine:
        raise Problem("the processes were started with different settings or data")
    # A process adds to its own checkpoint, and reads its share of those that more processes left behind.
    left = sorted(
        each for each in args.output_dir.glob("cscores-checkpoint-[0-9]*.npz") if each.name not in names
    )
    checkpoints = [
        load_checkpoint(each, settings, len(labels), args.runs)
        for each in (path, *left[process::n_processes])
    ]
    counts = checkpoints[0]
    trained = sum_over_processes(sum(each["trained"] for each in checkpoints))
    if trained.max() > 1:
        raise Problem(f"two checkpoints in {args.output_dir} hold the same run: move one of them away")
    missing = [np.array_split(np.flatnonzero(row == 0), n_processes)[process] for row in trained]

    at_once = args.parallel_runs or len(devices) * (1 if on_cpu else 100)
    share = -(-args.runs // n_processes)
    width = -(-share // -(-share // at_once))  # of batches of one size
    trainer = Trainer(images, labels, width, devices[:width], **sgd)
    work = args.epochs * n_subset + (len(labels) - n_subset) / 2  # of one run, as run_batch counts it
    done = trained.sum(axis=1) @ work / n_processes
    total = done + np.array([len(runs) for runs in missing]) @ work
    try:
        with tqdm(total=total, initial=done, unit="ex", unit_scale=True, disable=process > 0) as bar:
            for k, ratio in enumerate(args.ratios):
                bar.set_description(f"ratio {ratio:g}")
                for first in range(0, len(missing[k]), trainer.width):
                    runs = missing[k][first : first + trainer.width]
                    heldout, correct = trainer.run_batch(runs, ratio, bar.update)
                    counts["n_heldout"][k] += heldout.sum(axis=0)
                    counts["n_correct"][k] += correct.sum(axis=0)
                    counts["trained"][k, runs] = True
                    write(path, partial(np.savez, settings=json.dumps(settings), **counts))
                    accuracy = correct.sum() / heldout.sum()
                    bar.set_postfix_str(f"held-out accuracy {accuracy:.4f}", refresh=False)
    except KeyboardInterrupt:
        done = f"{counts['trained'].sum()} of {trained.size} runs are done and in {path}"
        raise KeyboardInterrupt(f"interrupted; {done}: the same command continues from there") from None
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise Problem(f"out of memory: try --parallel-runs {max(1, trainer.width // 2)}") from error
        raise

    n_heldout, n_correct = (
        sum_over_processes(sum(each[name] for each in checkpoints)) for name in ("n_heldout", "n_correct")
    )
    if process == 0:
        write_results(args, images, labels, original, n_heldout, n_correct)
        print(f"wall time          {time.perf_counter() - start:.0f} s")


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        estimate(parse_args(argv))
        return 0
    except Problem as problem:
        message, status = (*problem.args, 1)[:2]
    except KeyboardInterrupt as stop:
        message, status = str(stop) or "interrupted: the same command goes on where this one was", 130
    print("mnist.py:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main()
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(status)  # at once: sys.exit would first wait minutes for the other processes
    sys.exit(status)
