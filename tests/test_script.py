"""`python mnist.py` as a person meets it: a process with files, signals and an exit status."""

import errno
import fcntl
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    DIGITS,
    JOB,
    SCRIPT,
    SMALL,
    TINY,
    count,
    count_heldout,
    error_here,
    files,
    messages,
    n_done,
    run_here,
    run_script,
    same_results,
    script_error,
    start_script,
    train_digits,
    wait_for_a_group,
)

import mnist


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of a small job that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run_script(*JOB, "--output-dir", folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The output of a smaller job."""
    folder = tmp_path_factory.mktemp("tiny")
    run_here(*TINY, "--output-dir", folder)
    return folder


# --- What it computes, prints and writes ---
def test_the_defaults_are_those_of_the_experiment():
    assert vars(mnist.parse_args([])) == dict(
        dataset="mnist",
        dataset_name="mnist",
        data_dir=None,
        output_dir=Path("."),
        ratios=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        runs=200,
        training=mnist.Training(epochs=10, batch_size=128, learning_rate=0.1, momentum=0.9),
        epochs=10,
        batch_size=128,
        learning_rate=0.1,
        momentum=0.9,
        parallel_runs=None,
        distributed=None,
    )


def test_smoke(finished):
    folder, out, err = finished
    assert f"JAX {jax.__version__} on 2 x cpu\n" in err
    assert re.search(r"subset ratio +0.3 +0.8", out) and re.search(r"mean C-score +0\.\d{4}", out)
    assert "held-out accuracy" in out and f"written to {folder}: " in out and "digits-examples.pdf" in out
    assert "24 of 24 runs, ratio 0.8" in err and "tensorflow" not in (out + err).lower()
    assert files(folder) == [
        "cscores-checkpoint.npz",
        "cscores-orig-order.npz",
        "cscores.npy",
        "digits-examples.pdf",
    ]


def test_outputs(finished):
    folder = finished[0]
    scores = np.load(folder / "cscores.npy")
    assert scores.shape == (1797,) and scores.dtype == np.float64
    with np.load(folder / "cscores-orig-order.npz") as results:
        assert set(results) == {"scores", "labels", "subset_ratios", "profile", "n_heldout"}
        assert np.array_equal(results["scores"], scores, equal_nan=True)
        assert results["labels"].shape == (1797,) and results["labels"].dtype.kind == "i"
        assert results["subset_ratios"].tolist() == [0.3, 0.8]
        profile, n_heldout = results["profile"], results["n_heldout"]
    assert profile.shape == n_heldout.shape == (2, 1797) and profile.dtype == np.float64
    known = scores[~np.isnan(scores)]
    assert len(known) > 1700 and known.min() >= 0 and known.max() == 1 and 0.8 < known.mean() < 1
    assert np.array_equal(n_heldout, [count_heldout(1797, ratio, 12) for ratio in (0.3, 0.8)])
    assert np.array_equal(np.isnan(profile), n_heldout == 0)


def test_what_is_printed_is_what_is_written(finished):
    folder, out, _ = finished
    with np.load(folder / "cscores-orig-order.npz") as results:
        n_heldout, profile, scores = results["n_heldout"], results["profile"], results["scores"]
    n_correct = np.rint(np.nan_to_num(profile) * n_heldout)
    ratios, accuracies, mean, written = out.splitlines()
    assert ratios.split() == ["subset", "ratio", "0.3", "0.8"]
    expected = [f"{each:.4f}" for each in n_correct.sum(axis=1) / n_heldout.sum(axis=1)]
    assert accuracies.split() == ["held-out", "accuracy", *expected]
    assert mean == f"mean C-score {np.nanmean(scores):.4f}; never held out: {np.isnan(scores).sum()} examples"
    assert written == f"written to {folder}: cscores.npy, cscores-orig-order.npz, digits-examples.pdf"
    with np.load(folder / "cscores-checkpoint.npz") as counts:
        assert np.array_equal(counts["n_correct"], n_correct)


def test_a_last_group_that_is_not_full_counts_each_run_once(tmp_path):
    args = ["--ratios", 0.3, "--epochs", 1, "--runs", 5, "--parallel-runs", 2]
    run_here(*DIGITS, *args, "--output-dir", tmp_path)
    with np.load(tmp_path / "cscores-orig-order.npz") as results:
        assert np.array_equal(results["n_heldout"][0], count_heldout(1797, 0.3, 5))


def test_the_bar_counts_work(tmp_path, capsys):
    run_here(*DIGITS, "--ratios", 0.1, 0.9, "--runs", 2, "--parallel-runs", 2, "--output-dir", tmp_path)
    bar = capsys.readouterr().err
    few, many = (10 * n + (1797 - n) / 2 for n in (180, 1617))  # a test counts half
    percent, accuracy = re.search(
        r"(\d+)%\|[^|]*\| \S+ left, 2 of 4 runs, ratio 0.1, held-out accuracy (\S+)", bar
    ).groups()
    assert int(percent) == round(100 * few / (few + many))
    with np.load(tmp_path / "cscores-checkpoint.npz") as counts:
        assert accuracy[:6] == f"{counts['n_correct'][0].sum() / counts['n_heldout'][0].sum():.4f}"


def test_the_counts_are_those_of_single_runs(finished):
    single = np.concatenate([train_digits(range(i, i + 1), 0.3, epochs=2) for i in range(12)])
    n_heldout, n_correct = count(single)
    with np.load(finished[0] / "cscores-checkpoint.npz") as counts:
        assert np.array_equal(counts["n_heldout"][0], n_heldout)
        assert np.abs(counts["n_correct"][0] - n_correct).sum() <= 0.001 * n_correct.sum()


def test_figure(finished):
    pdf = (finished[0] / "digits-examples.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"%%EOF" in pdf[-8:]
    width, height = 21 * 10 * 72 / 50, 10 * 10 * 72 / 50  # cells of 10 pixels, 50 of which make an inch
    assert b"/MediaBox [ 0 0 %g %g ]" % (width, height) in pdf


def test_examples_never_held_out_are_nan_and_said(tmp_path, capsys):
    run_here(*DIGITS, "--ratios", 0.9, "--runs", 2, "--epochs", 1, "--output-dir", tmp_path)
    out = capsys.readouterr().out
    missing = np.isnan(np.load(tmp_path / "cscores.npy")).sum()
    assert missing > 1000 and f"never held out: {missing} examples" in out


def test_models_that_diverge_predict_nothing(tmp_path, capsys):
    args = [*DIGITS, "--ratios", 0.3, 0.5, "--epochs", 2, "--runs", 2, "--batch-size", 100]
    run_here(*args, "--learning-rate", 1e30, "--output-dir", tmp_path)
    assert np.nanmax(np.load(tmp_path / "cscores.npy")) == 0
    err = capsys.readouterr().err
    assert err.count("warning: at ratio 0.3 a model was wrong on all") == 1 and err.count("warning") == 1
    assert "--learning-rate" in err


def test_small_last_batches_are_warned_of(tmp_path, capsys):
    run_here(*DIGITS, "--ratios", 0.3, 0.5, "--epochs", 1, "--runs", 1, "--output-dir", tmp_path)
    err = capsys.readouterr().err
    assert (
        err.count("warning") == 1
        and "2 at ratio 0.5" in err
        and "--batch-size" in err
        and "0.3 can" not in err
    )
    assert err.index("warning") < err.index("0%|"), "before training"
    defaults = mnist.parse_args([])
    sizes = mnist.subset_sizes(defaults.ratios, 60000, defaults.training.batch_size)
    rests = sizes % defaults.training.batch_size
    assert capsys.readouterr().err == "" and min(rests[rests > 0]) == 16, "MNIST needs no warning"
    mnist.subset_sizes([0.1, 0.4], 60000, 128 - 3)
    assert capsys.readouterr().err == "", "nothing is left of 6,000 and 24,000 examples in batches of 125"


# --- Checkpoints and interruptions ---
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupt_and_resume(finished, tmp_path, sign):
    process = start_script(*JOB, "--output-dir", tmp_path)
    checkpoint = tmp_path / "cscores-checkpoint.npz"
    wait_for_a_group(process, checkpoint)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -sign and "Traceback" not in err
    assert 2 <= n_done(checkpoint) < 24, f"it was not interrupted in the middle: {err}"
    assert not (tmp_path / "cscores.npy").exists()
    run_here(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])


def test_a_finished_job_only_writes_its_results_again(finished, tmp_path):
    shutil.copy(finished[0] / "cscores-checkpoint.npz", tmp_path)
    out, err = run_script(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0]) and out.replace(str(tmp_path), "") == finished[1].replace(
        str(finished[0]), ""
    )
    assert "100%" in err and " 0%" not in err


def test_extend_by_more_runs(finished, tmp_path, capsys):
    run_here(*SMALL, "--runs", 4, "--output-dir", tmp_path)
    assert n_done(tmp_path / "cscores-checkpoint.npz") == 8
    assert re.search(r"\b0%", capsys.readouterr().err)
    run_here(*JOB, "--output-dir", tmp_path)
    bar = capsys.readouterr().err
    assert re.search(r"\b33%", bar) and not re.search(r"\b0%", bar), "it starts where the shorter job ended"
    assert same_results(tmp_path, finished[0])
    before = (tmp_path / "cscores-checkpoint.npz").read_bytes()
    assert "12 runs" in error_here(*SMALL, "--runs", 11, "--output-dir", tmp_path)
    assert (tmp_path / "cscores-checkpoint.npz").read_bytes() == before


def test_other_settings_than_the_checkpoints(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    other = ["--epochs", 3, "--batch-size", 64, "--momentum", 0.5, "--learning-rate", 1]
    line = error_here(*DIGITS, "--ratios", 0.3, *other, "--runs", 12, "--output-dir", tmp_path / "out")
    for difference in (
        "ratios [0.3, 0.8], not [0.3]",
        "epochs 2, not 3",
        "batch_size 128, not 64",
        "momentum 0.9, not 0.5",
        "learning_rate 0.1, not 1.0",
    ):
        assert difference in line
    assert "dataset" not in line and same_results(tmp_path / "out", finished[0])


@pytest.mark.parametrize(
    "old, new, same", [("jax.nn.relu", "jax.nn.gelu", False), ("held-out accuracy ", "accuracy ", True)]
)
def test_another_algorithm_is_refused_another_command_line_is_not(tiny, tmp_path, old, new, same):
    shutil.copytree(tiny, tmp_path / "out")
    changed = tmp_path / "mnist.py"
    assert old in SCRIPT.read_text()
    changed.write_text(SCRIPT.read_text().replace(old, new))
    args = [*TINY, "--output-dir", tmp_path / "out"]
    _, err = run_script(*args, script=changed, status=0 if same else 1)
    assert ("made with algorithm " in err) == (not same)
    assert same_results(tmp_path / "out", tiny)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "incomplete"])
def test_a_damaged_checkpoint(finished, tmp_path, damage):
    path, whole = tmp_path / "cscores-checkpoint.npz", (finished[0] / "cscores-checkpoint.npz").read_bytes()
    if damage == "incomplete":
        np.savez(path, settings="{}")
    else:
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage]
        )
    before = path.read_bytes()
    line = error_here(*SMALL, "--output-dir", tmp_path)
    assert f"cannot go on from {path} (" in line and "use another --output-dir" in line
    assert path.read_bytes() == before


def test_disk_full(finished, tmp_path):
    run_here(*SMALL, "--runs", 2, "--output-dir", tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    limit = ["bash", "-c", 'ulimit -f 20; exec "$@"', "limit"]  # KiB in one file; the checkpoint needs 29
    line = script_error(*JOB, "--output-dir", tmp_path, through=limit)
    assert "File too large" in line and "use another --output-dir" in line and "parallel" not in line
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    run_here(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])


@pytest.mark.parametrize(
    "args, says",
    [
        (["--ratios"], "--ratios"),
        (["--ratios", "0.5", "1"], "--ratios"),
        (["--ratios", "0"], "--ratios"),
        (["--ratios", "-0.5"], "--ratios"),
        (["--ratios", "nan"], "--ratios"),
        (["--ratios", "inf"], "--ratios"),
        (["--ratios", "0.5", "0.50"], "--ratios"),
        (["--runs", "0"], "--runs"),
        (["--epochs", "-1"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--parallel-runs", "0"], "--parallel-runs"),
        (["--runs", "many"], "--runs"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--momentum", "1"], "--momentum"),
        (["--figure", "a.pdf"], "--figure"),
    ],
)
def test_wrong_usage(tmp_path, capsys, args, says):
    with pytest.raises(SystemExit) as caught:
        run_here(*DIGITS, "--output-dir", tmp_path, *args)
    line = capsys.readouterr().err
    assert caught.value.code == 2 and says in line and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", [0.0001, 0.9999])
def test_ratios_that_do_not_suit_the_data(tmp_path, ratio):
    line = error_here(*DIGITS, "--output-dir", tmp_path, "--ratios", 0.5, ratio)
    assert "--ratios: each must leave some of the 1797 examples in, and some out" in line
    assert files(tmp_path) == []


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    line = error_here(*SMALL, "--output-dir", tmp_path / "file")
    assert line.startswith(f"cannot write to {tmp_path / 'file'} (") and "File exists" in line
    assert line.endswith(": use another --output-dir") and "job" not in line
    assert (tmp_path / "file").read_text() == "mine" and [file.name for file in tmp_path.iterdir()] == [
        "file"
    ]
    if sys.platform == "linux":
        line = error_here(*SMALL, "--output-dir", "/proc/nowhere")
        assert line.startswith("cannot write to /proc/nowhere (") and "job" not in line


def test_a_current_folder_that_is_deleted(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    through = ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "gone"]
    line = script_error(*SMALL, through=through, cwd=gone)
    assert line.startswith("mnist.py: cannot write to . (") and "job" not in line


# --- One folder is for one job ---
def test_a_second_job_in_the_same_folder_ends_and_the_first_goes_on(tmp_path):
    first = start_script(*JOB, "--output-dir", tmp_path)
    wait_for_a_group(first, tmp_path / "cscores-checkpoint.npz")
    first.send_signal(signal.SIGSTOP)  # it shall not end before the others start
    for other in JOB, TINY:
        line = error_here(*other, "--output-dir", tmp_path)
        assert f"another job is at work in {tmp_path}" in line and "--distributed" in line
    first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=120)[0] and first.returncode == 0
    assert "cscores.npy" in files(tmp_path)
    run_here(*JOB, "--output-dir", tmp_path)


def test_the_lock_goes_with_the_process(tmp_path):
    process = start_script(*JOB, "--output-dir", tmp_path)
    wait_for_a_group(process, tmp_path / "cscores-checkpoint.npz")
    process.kill()
    process.communicate()
    assert set(files(tmp_path)) <= {"cscores-checkpoint.npz", "cscores-checkpoint.npz.tmp"}
    run_here(*JOB, "--output-dir", tmp_path)


def test_the_lock_goes_with_the_job(tmp_path):
    run_here(*TINY, "--output-dir", tmp_path)
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "cscores.lock"], check=True)


NO_LOCKS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
static int no_locks(const char *name, int fd, int command, void *arg) {
    if (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW) {
        errno = atoi(getenv("LOCK_ERROR"));
        return -1;
    }
    return ((int (*)(int, int, void *))dlsym(RTLD_NEXT, name))(fd, command, arg);
}
#define WRAP(name) int name(int fd, int command, ...) { \
    va_list list; va_start(list, command); void *arg = va_arg(list, void *); va_end(list); \
    return no_locks(#name, fd, command, arg); }
WRAP(fcntl)
WRAP(fcntl64)
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory):
    """A library that, preloaded, makes each try to lock a file fail with the error $LOCK_ERROR."""
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs gcc on Linux")
    source = tmp_path_factory.mktemp("no-locks") / "no_locks.c"
    source.write_text(NO_LOCKS)
    library = source.with_suffix(".so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks(no_locks, tiny, tmp_path, error):
    env = {"LD_PRELOAD": no_locks, "LOCK_ERROR": str(getattr(errno, error))}
    run_script(*TINY, "--output-dir", tmp_path, env=env)
    assert same_results(tmp_path, tiny)


@pytest.mark.parametrize("error", ["EAGAIN", "EACCES"])
def test_a_lock_that_somebody_holds(monkeypatch, tmp_path, error):
    def held(*_):
        raise OSError(getattr(errno, error), "held")

    monkeypatch.setattr(fcntl, "lockf", held)
    assert f"another job is at work in {tmp_path}" in error_here(*TINY, "--output-dir", tmp_path)


# --- The machine and its environment ---
@pytest.mark.parametrize(
    "env",
    [
        {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0"},
        {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
        {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error::ResourceWarning"},
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "no such backend"},
    ],
    ids=lambda env: " ".join(env),
)
def test_what_a_shell_sets_changes_nothing(tiny, tmp_path, env):
    _, err = run_script(*TINY, "--output-dir", tmp_path, env=env)
    assert same_results(tmp_path, tiny) and messages(err) == []
    assert (tmp_path / "digits-examples.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("then", ["| true", "| head -1", "> /dev/full"])
def test_nobody_reads_the_output(tiny, tmp_path, unbuffered, then):
    words = " ".join(f"'{word}'" for word in [sys.executable, SCRIPT, *TINY, "--output-dir", tmp_path])
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", f"set -o pipefail; {words} {then}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    if "full" in then:
        (line,) = messages(done.stderr)
        assert done.returncode == 1 and line.startswith("mnist.py: ") and "No space left on device" in line
    else:
        assert done.returncode == 0 and messages(done.stderr) == []
    assert same_results(tmp_path, tiny)


def test_a_platform_that_is_not_there(tmp_path):
    line = script_error(*TINY, "--output-dir", tmp_path, env={"JAX_PLATFORMS": "cuda"})
    assert "no devices" in line and "JAX_PLATFORMS=cpu" in line


def test_a_broken_matplotlib_is_found_before_the_first_run(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('broken')")
    line = script_error(*TINY, "--output-dir", tmp_path / "out", env={"PYTHONPATH": str(tmp_path)})
    assert "matplotlib does not work (broken)" in line and not (tmp_path / "out").exists()


def test_few_runs_use_few_devices():
    for n_runs, parallel_runs, devices, group_size in (
        (3, None, 3, 3),
        (200, None, 4, 4),
        (9, 2, 2, 2),
        (9, 5, 4, 8),
    ):
        mesh, found = mnist.make_mesh(n_runs, parallel_runs)
        assert (mesh.size, found) == (devices, group_size)


def test_a_notebook_that_uses_jax_first_and_does_several_jobs(tmp_path):
    code = """if True:
        import jax, os, sys
        if sys.argv.pop(1) == "before":
            jax.devices()
        import mnist
        for runs in "1", "2":
            mnist.main([*sys.argv[1:], "--runs", runs])
        print("devices", jax.device_count(), "of", len(os.sched_getaffinity(0)))
    """
    args = SMALL[: SMALL.index("--parallel-runs")]
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    env |= {"PYTHONPATH": str(SCRIPT.parent)}
    for when, devices in ("before", 1), ("after", len(os.sched_getaffinity(0))):
        command = [sys.executable, "-c", code, when, *args, "--output-dir", str(tmp_path / when)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert f"devices {devices} of" in done.stdout, done.stderr
        assert "cscores.npy" in files(tmp_path / when)


CONVOLUTION = """
    kernel, layout = params[0][0][0, :9].reshape(3, 3, 1, 1), ("NHWC", "HWIO", "NHWC")
    images = jax.lax.conv_general_dilated(images / 255, kernel, (1, 1), "SAME", dimension_numbers=layout)
    activations = images.reshape(len(images), -1)
"""


@pytest.mark.parametrize("network", ["perceptron", "convolution"])
def test_devices_of_one_process_do_not_communicate(tmp_path, network):
    """No program that a whole job compiles has a collective in it, whatever the network."""
    script = SCRIPT.read_text()
    if network == "convolution":
        first = "    activations = images.reshape(len(images), -1).astype(jnp.float32) / 255\n"
        assert first in script
        script = script.replace(first, CONVOLUTION)
    (tmp_path / "mnist.py").write_text(script)
    env = {"XLA_FLAGS": f"--xla_dump_to={tmp_path / 'xla'} --xla_dump_hlo_as_text"}
    run_script(*TINY, "--output-dir", tmp_path / "out", script=tmp_path / "mnist.py", env=env)
    programs = [path.read_text() for path in (tmp_path / "xla").glob("*after_optimizations.txt")]
    assert any("while(" in program for program in programs)
    assert any("convolution(" in program for program in programs) == (network == "convolution")
    talking = re.compile(r"all-gather|all-reduce|all-to-all|collective|reduce-scatter")
    assert not any(talking.search(program) for program in programs)


def test_out_of_memory(tmp_path, capfd, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", fail)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setenv("MPLBACKEND", "agg")  # which the script removes
    monkeypatch.setattr(sys, "argv", ["mnist.py", *map(str, TINY), "--output-dir", str(tmp_path)])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    signal.signal(signal.SIGINT, handler)
    (line,) = messages(capfd.readouterr().err)
    assert "Out of memory" in line and "fewer --parallel-runs" in line


def test_help_shows_every_setting(tmp_path):
    out, _ = run_script("--help", cwd=tmp_path)
    for option in vars(mnist.parse_args([])).keys() - {"training", "dataset_name"}:
        assert f"--{option.replace('_', '-')} " in out
    assert list(tmp_path.iterdir()) == []


def test_pytest_finds_the_module_by_itself():
    command = [Path(sys.executable).with_name("pytest"), "--collect-only", "-q", "tests/test_published.py"]
    subprocess.run(command, cwd=SCRIPT.parent, check=True, capture_output=True, timeout=240)


def test_importing_has_no_side_effects(tmp_path):
    code = (
        "import sys, mnist, jax; "
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; jax.config.update('jax_num_cpu_devices', 2); assert jax.device_count() == 2"
    )
    env = {"PYTHONPATH": str(SCRIPT.parent), "JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
    assert list(tmp_path.iterdir()) == []
