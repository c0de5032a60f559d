"""What the tests share: the script as a process, alone and several at a time, and runs on the digits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import mnist

SCRIPT = Path(mnist.__file__)
DIGITS = ["--dataset", "digits"]
SMALL = [*DIGITS, "--ratios", "0.3", "0.8", "--epochs", "2", "--parallel-runs", "2"]
TINY = [*SMALL, "--runs", 2]
JOB = [*SMALL, "--runs", 12]
RESULTS = ("cscores.npy", "cscores-orig-order.npz")
TFDS = os.environ.get("TFDS_DATA_DIR", "")
HAS_MNIST = find_spec("tensorflow_datasets") is not None and os.path.isdir(os.path.join(TFDS, "mnist"))
needs_mnist = pytest.mark.skipif(not HAS_MNIST, reason="TFDS_DATA_DIR does not hold the real MNIST")


# --- The script in a process of its own ---
def start_script(*args, script=SCRIPT, through=(), devices=2, env=None, **kwargs):
    """Start the script, or a changed copy of it, on so many CPU devices."""
    # A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [*through, sys.executable, str(script), *map(str, args)]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | (env or {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, **pipes, **kwargs)


def run_script(*args, status=0, **kwargs):
    """Run the script to its end; returns what it printed, (stdout, stderr)."""
    process = start_script(*args, **kwargs)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


def script_error(*args, status=1, **kwargs):
    """Run the script, which must fail; returns its one line, the last on stderr."""
    _, err = run_script(*args, status=status, **kwargs)
    (line,) = messages(err)
    assert line.startswith("mnist.py: ") and err.endswith(line + "\n"), err
    return line


def messages(err):
    """The lines on stderr, apart from the devices and the progress bar."""
    return [line for line in err.splitlines() if line and "%|" not in line and not line.startswith("JAX ")]


def start_part(i, n, *args, folder, devices):
    """Start a part of a job in a folder."""
    return start_script(*args, "--output-dir", folder, "--part", i, n, devices=devices)


@contextmanager
def paused(process):
    """Stop a process for a while, so that it does not end before others have started or ended."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def wait_for_all(processes, timeout=120):
    """Wait for the end of the processes: (exit status, stdout, stderr) of each."""
    processes = list(processes)
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


# --- The job in this process, which takes a third of the time ---
def run_here(*args):
    mnist.main([*map(str, args)])


def error_here(*args):
    """The line with which this process refuses a job."""
    with pytest.raises(mnist.Problem) as caught:
        run_here(*args)
    return str(caught.value)


def changed_script(folder, *changes):
    """A copy of the script with changes, pairs of (old, new)."""
    text = SCRIPT.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mnist.py"
    path.write_text(text)
    return path


def load_script(path):
    """A changed copy of the script as a module of this process; without bytecode, which can be too old."""
    module = ModuleType("changed")
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module


# --- What a job leaves ---
def runs_dir(folder):
    return folder / "cscores-runs"


def run_file(folder, k, run):
    return runs_dir(folder) / f"{k}-{run}.npz"


def runs_in(folder):
    """The runs that a folder holds, [[ratio's index, run], ...]."""
    paths = runs_dir(folder).glob("*.npz")  # nothing if there is no such folder
    return sorted([int(part) for part in path.stem.split("-")] for path in paths)


def n_done(folder):
    return len(runs_in(folder))


def correctness_of_runs(folder, n_ratios=2):
    """The saved correctness of the runs 0, 1, ... at each ratio, int8 [K, runs, N]."""
    runs = runs_in(folder)
    of_ratios = [
        [np.load(run_file(folder, k, run))["correctness"] for k, run in runs if k == i]
        for i in range(n_ratios)
    ]
    return np.array(of_ratios)


def copy_runs(one, other):
    """What makes a job in another folder go on from this one."""
    shutil.copytree(runs_dir(one), runs_dir(other))


def same_results(one, other, names=RESULTS):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def same_runs(one, other):
    """Whether both hold the same runs, apart from the tmp*/ that a killed process may leave."""
    ours, theirs = (
        {path.name: path.read_bytes() for path in runs_dir(each).glob("*.npz")} for each in (one, other)
    )
    return ours == theirs


def files(folder):
    """The files that a job has left in its folder, apart from the runs."""
    return sorted(file.name for file in folder.iterdir() if file.name != "cscores-runs")


def contents(folder):
    """The bytes of all that a job has left in its folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def wait_for_a_group(process, folder):
    """Wait until the process has saved its first run."""
    while n_done(folder) < 1:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def count_heldout(n_examples, ratio, n_runs):
    """How many of the runs hold each example out, counted by brute force."""
    n_heldout = np.zeros(n_examples, int)
    for run in range(n_runs):
        subset = np.random.RandomState(run).choice(n_examples, round(n_examples * ratio), replace=False)
        n_heldout += ~np.isin(np.arange(n_examples), subset)
    return n_heldout


# --- Runs on the digits, without a job ---
def train_digits(runs, ratio, devices=1, labels=None, parallel_runs=None, **settings):
    """The `train_and_test` of a range of runs on the digits, [runs, 1797]; by default they are one group."""
    images, digits, _ = mnist.load("digits")
    labels = digits if labels is None else labels
    training, sizes = mnist.Training(**settings), [round(len(images) * ratio)]
    of_group = parallel_runs or len(runs)
    mesh, group_size = mnist.plan_groups(mnist.start_jax()[:devices], len(runs), of_group)
    assert group_size == of_group and mesh.size == min(devices, of_group)
    drawn = mnist.draw_groups([[*runs]], sizes, len(images), training, group_size, mesh)
    trained = [*mnist.train_groups(drawn, sizes, images, labels, training, mesh)]
    assert [run for _, group, _ in trained for run in group] == [*runs]
    return np.concatenate([correctness for *_, correctness in trained])


def count(correctness):
    """n_heldout and n_correct, int [..., N], of correctness int8 [..., runs, N]."""
    return [(correctness >= 0).sum(axis=-2), (correctness == 1).sum(axis=-2)]
