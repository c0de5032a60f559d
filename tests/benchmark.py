"""Time mnist.py against a loop that trains one model at a time, and against the machine's limits.

    python tests/benchmark.py --ratio 0.3                      # MNIST
    python tests/benchmark.py --ratio 0.3 --dataset mnist.npz  # MNIST, without tensorflow-datasets
    python tests/benchmark.py --dataset digits                 # a quick try

Both train the same runs on the same data, in turns; the times are medians. `sequential` dispatches one
jitted step for each batch, gathered on the host, and is compiled before the clock starts.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import mnist

SETTINGS = mnist.parse_args([])
TRAINING = SETTINGS.training


@jax.jit
def step(params, velocity, images, labels):
    grads = jax.grad(mnist.loss)(params, images, labels)
    velocity = jax.tree.map(lambda v, g: TRAINING.momentum * v + g, velocity, grads)
    return jax.tree.map(lambda p, v: p - TRAINING.learning_rate * v, params, velocity), velocity


@jax.jit
def predicts(params, images, labels):
    return mnist.predict(params, images).argmax(axis=1) == labels


def sequential(images, labels, run, n_subset):
    """One run: whether each held-out example's label is predicted, bool [held out]."""
    train_batches, heldout_batches = mnist.draw_batches(run, len(labels), n_subset, TRAINING)
    params = mnist.init(run, images.shape[1:], int(labels.max()) + 1)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for batch in np.concatenate(train_batches):
        examples = batch[batch < len(labels)]
        if len(examples):
            params, velocity = step(params, velocity, images[examples], labels[examples])
    heldout = heldout_batches[heldout_batches < len(labels)]
    return np.asarray(predicts(params, images[heldout], labels[heldout]))


def seconds(function, *args):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def median_seconds(function, *args, repeats=5):
    seconds(function, *args)
    return statistics.median(seconds(function, *args) for _ in range(repeats))


def matmul_peak(devices, n=2048):
    """FLOP/s of float32 products at the default precision, all devices together."""
    mesh = jax.make_mesh((len(devices),), ("devices",), (jax.sharding.AxisType.Auto,), devices=devices)
    split = jax.sharding.PartitionSpec("devices")
    product = jax.jit(jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(split, split), out_specs=split))
    factor = jax.device_put(
        np.ones((len(devices), n, n), np.float32), jax.sharding.NamedSharding(mesh, split)
    )
    return 2 * n**3 * len(devices) / median_seconds(product, factor, factor)


def copy_bandwidth(device):
    """Bytes per second that one device reads and writes in x + 1."""
    x = jax.device_put(np.zeros(2**27, np.float32), device)
    return 2 * x.nbytes / median_seconds(jax.jit(lambda x: x + 1), x)


def main():
    parser = argparse.ArgumentParser(description="Time mnist.py against a loop over single models.")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--ratio", type=float, default=0.3, help="subset ratio (default %(default)s)")
    parser.add_argument("--runs", type=int, help="trained together (default: as mnist.py has it)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default %(default)s)")
    parser.add_argument("--full", action="store_true", help="also train 200 runs at each of 9 ratios")
    args = parser.parse_args()

    mnist.start_jax()
    mesh, group_size = mnist.make_mesh(SETTINGS.runs, args.runs)
    devices = mesh.devices
    on_cpu = devices[0].platform == "cpu"
    images, labels, _ = mnist.load(args.dataset)
    n, n_subset = len(labels), round(len(labels) * args.ratio)

    def train_groups(sizes, n_runs):
        drawn = mnist.draw_groups(sizes, [0] * len(sizes), n_runs, group_size, n, TRAINING, mesh)
        return mnist.train_groups(drawn, sizes, images, labels, TRAINING, mesh)

    # Each step of the generator draws and trains one group; the first one is small, and compiled.
    groups = train_groups([n // 100] * 2 + [n_subset] * (args.repeats + 1), group_size)
    first = seconds(next, groups)
    compilation = first - seconds(next, groups)
    sequential(images, labels, 0, n_subset)
    alone, together, peak = [], [], []
    for repeat in range(args.repeats):
        alone.append(seconds(sequential, images, labels, repeat, n_subset))
        together.append(seconds(next, groups) / group_size)
        peak.append(matmul_peak(devices))
    alone, together, peak = map(statistics.median, (alone, together, peak))
    _, correctness = next(groups)
    same = np.mean(correctness[0][correctness[0] >= 0] == sequential(images, labels, 0, n_subset))

    ratios = SETTINGS.ratios
    params = mnist.init(0, images.shape[1:], int(labels.max()) + 1)
    first_layer, *others = (weights.size for weights, _ in params)
    training, testing = 4 * first_layer + 6 * sum(others), 2 * (first_layer + sum(others))
    flop = TRAINING.epochs * n_subset * training + (n - n_subset) * testing

    def projected(per_run):  # the work of a run is proportional to its FLOP
        work = sum(TRAINING.epochs * round(n * r) * training + (n - round(n * r)) * testing for r in ratios)
        return f"{200 * per_run * work / flop / 60:.1f} min"

    def table(*cells):
        print(f"{cells[0]:34}", *(f"{cell:>14}" for cell in cells[1:]))

    print(f"{args.dataset}, ratio {args.ratio:g}")
    table("", "sequential", f"mnist.py x{group_size}")
    table("seconds per run", f"{alone:.3f}", f"{together:.3f}")
    table("ratio to sequential", "1.00", f"{alone / together:.2f}")
    table("GFLOP/s", f"{flop / alone / 1e9:.0f}", f"{flop / together / 1e9:.0f}")
    table(
        f"share of {peak / 1e9:.0f} GFLOP/s of matmul",
        f"{flop / alone / peak:.0%}",
        f"{flop / together / peak:.0%}",
    )
    if not on_cpu:
        # Each step reads or writes the weights, gradients and momenta about seven times in all.
        moved = 7 * 4 * (first_layer + sum(others)) * TRAINING.epochs * -(-n_subset // TRAINING.batch_size)
        bandwidth = copy_bandwidth(devices[0]) * len(devices)
        share = [f"{moved / per_run / bandwidth:.0%}" for per_run in (alone, together)]
        table(f"share of {bandwidth / 1e9:.0f} GB/s of copying", *share)
        table("peak device memory", "", f"{devices[0].memory_stats()['peak_bytes_in_use'] / 1e9:.2f} GB")
    table("compilation", "", f"{compilation:.1f} s")
    table("full job, projected", projected(alone), projected(together))
    if args.full:
        start = time.perf_counter()
        sizes = mnist.subset_sizes(ratios, n, TRAINING.batch_size)
        for _ in mnist.ahead(train_groups(sizes, 200)):
            pass
        table("full job, measured", "", f"{(time.perf_counter() - start) / 60:.1f} min")
    table("predictions in common, run 0", "", f"{same:.2%}")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"peak host memory {host:.2f} GB, both methods and the data together")


if __name__ == "__main__":
    main()
