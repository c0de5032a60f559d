"""Time mnist.py against a loop that trains one model at a time, and against the machine's limits.

    python tests/benchmark.py --ratio 0.3                      # MNIST
    python tests/benchmark.py --ratio 0.3 --dataset mnist.npz  # MNIST, without tensorflow-datasets
    python tests/benchmark.py --ratio 0.3 --precision bfloat16 # in both precisions
    python tests/benchmark.py --dataset digits                 # a quick try

All train the same runs on the same data, in turns; the times are medians. `sequential` dispatches one
jitted step for each batch, gathered on the host, in float32, and is compiled before the clock starts.
"""

import argparse
import resource
import statistics
import sys
import time
from functools import partial
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


def product_peak(devices, precision):
    """FLOP/s of products alone, of factors of that type, all devices together."""
    n = 2048 if devices[0].platform == "cpu" else 8192
    mesh = jax.sharding.Mesh(devices, ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("devices"))
    matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)
    specs = dict(in_specs=(split.spec, split.spec), out_specs=split.spec)
    product = jax.jit(jax.shard_map(matmul, mesh=mesh, **specs))
    factor = jax.device_put(np.ones((len(devices), n, n), jnp.dtype(precision)), split)
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
    precision = dict(choices=["float32", "bfloat16"], default="float32", help="bfloat16: time both")
    parser.add_argument("--precision", **precision)
    parser.add_argument("--full", action="store_true", help="also train 200 runs at each of 9 ratios")
    args = parser.parse_args()

    mesh, group_size = mnist.plan_groups(mnist.start_jax(), SETTINGS.runs, args.runs)
    devices = mesh.devices
    on_cpu = devices[0].platform == "cpu"
    images, labels, _ = mnist.load(args.dataset)
    classes, labels = np.unique(labels, return_inverse=True)  # as `train_groups` numbers them
    n, n_subset = len(labels), round(len(labels) * args.ratio)
    precisions = [*dict.fromkeys(["float32", args.precision])]

    def train_groups(sizes, n_runs, precision):
        training, missing = TRAINING._replace(precision=precision), [[*range(n_runs)]] * len(sizes)
        drawn = mnist.draw_groups(missing, sizes, n, training, group_size, mesh)
        return mnist.train_groups(drawn, sizes, images, labels, training, mesh)

    # Each step of a generator draws and trains one group; the first ones are small, and one is compiled.
    groups, compilation, memory = {}, {}, {}
    for precision in precisions:
        sizes = [n // 100] * 2 + [n_subset] * (args.repeats + 1)
        groups[precision] = train_groups(sizes, group_size, precision)
        first = seconds(next, groups[precision])
        compilation[precision] = first - seconds(next, groups[precision])
        memory[precision] = 0 if on_cpu else devices[0].memory_stats()["peak_bytes_in_use"]
    sequential(images, labels, 0, n_subset)
    times, peaks = {name: [] for name in ["sequential", *precisions]}, {name: [] for name in precisions}
    for repeat in range(args.repeats):
        times["sequential"].append(seconds(sequential, images, labels, repeat, n_subset))
        for precision in precisions:
            times[precision].append(seconds(next, groups[precision]) / group_size)
            peaks[precision].append(product_peak(devices, precision))
    times, peaks = ({name: statistics.median(x) for name, x in each.items()} for each in (times, peaks))
    peaks["sequential"] = peaks["float32"]
    expected = sequential(images, labels, 0, n_subset)
    same = {}
    for precision in precisions:
        _, _, correctness = next(groups[precision])
        same[precision] = np.mean((correctness[0] == 1)[correctness[0] >= 0] == expected)

    ratios = SETTINGS.ratios
    params = mnist.init(0, images.shape[1:], len(classes))
    first_layer, *others = (weights.size for weights, _ in params)
    training, testing = 4 * first_layer + 6 * sum(others), 2 * (first_layer + sum(others))
    flop = TRAINING.epochs * n_subset * training + (n - n_subset) * testing
    # The work of a run is proportional to its FLOP.
    work = sum(TRAINING.epochs * round(n * r) * training + (n - round(n * r)) * testing for r in ratios)

    def row(name, cell, of=times):
        print(f"{name:34}", *(f"{cell(key) if key in of else '':>14}" for key in times))

    print(f"{args.dataset}, ratio {args.ratio:g}, mnist.py with {group_size} runs at once")
    row("", lambda key: key)
    row("seconds per run", lambda key: f"{times[key]:.3f}")
    row("speed, sequential = 1", lambda key: f"{times['sequential'] / times[key]:.2f}")
    if len(precisions) > 1:
        row("speed, float32 = 1", lambda key: f"{times['float32'] / times[key]:.2f}", precisions)
    row("GFLOP/s", lambda key: f"{flop / times[key] / 1e9:.0f}")
    row("GFLOP/s of products alone", lambda key: f"{peaks[key] / 1e9:.0f}")
    row("share of that", lambda key: f"{flop / times[key] / peaks[key]:.0%}")
    if not on_cpu:
        # Each step reads or writes the weights, gradients and momenta about seven times in all.
        moved = 7 * 4 * (first_layer + sum(others)) * TRAINING.epochs * -(-n_subset // TRAINING.batch_size)
        bandwidth = copy_bandwidth(devices[0]) * len(devices)
        row("GB/s of copying alone", lambda key: f"{bandwidth / 1e9:.0f}")
        row("share of that, at least", lambda key: f"{moved / times[key] / bandwidth:.0%}")
        # The peak of the process so far: that of bfloat16 shows only if it is higher.
        row("peak device memory", lambda key: f"{memory[key] / 1e9:.2f} GB", memory)
    row("compilation", lambda key: f"{compilation[key]:.1f} s", compilation)
    row("full job, projected", lambda key: f"{200 * times[key] * work / flop / 60:.1f} min")
    row("predictions as sequential's, run 0", lambda key: f"{same[key]:.2%}", same)
    if args.full:
        full, sizes = {}, [round(ratio * n) for ratio in ratios]
        for precision in precisions:
            start = time.perf_counter()
            for _ in mnist.ahead(train_groups(sizes, 200, precision)):
                pass
            full[precision] = time.perf_counter() - start
        row("full job, measured", lambda key: f"{full[key] / 60:.1f} min", full)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"peak host memory {host:.2f} GB, all methods and the data together")


if __name__ == "__main__":
    main()
