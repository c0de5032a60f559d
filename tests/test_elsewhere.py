"""What other people's machines, shells, networks and data do to a job."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import (
    DIGITS,
    JOB,
    SCRIPT,
    SMALL,
    digits_trainer,
    do,
    files,
    problem,
    run,
    same_results,
    start,
    wait_for_a_group,
)

import mnist

TINY = [*SMALL, "--runs", 2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    do(*TINY, "--output-dir", folder)
    return folder


def test_what_a_shell_sets_for_jax_changes_nothing(tiny, tmp_path):
    run(*TINY, "--output-dir", tmp_path, env={"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"})
    assert same_results(tmp_path, tiny)


def test_a_second_job_in_the_same_folder_ends_and_the_first_goes_on(tmp_path):
    first = start(*JOB, "--output-dir", tmp_path)
    wait_for_a_group(first, tmp_path / "cscores-checkpoint.npz")
    first.send_signal(signal.SIGSTOP)  # it shall not end before the others start
    for other in JOB, TINY:
        line = problem(*other, "--output-dir", tmp_path)
        assert f"another job is at work in {tmp_path}" in line and "--distributed" in line
    first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=120)[0] and first.returncode == 0
    assert "cscores.npy" in files(tmp_path)
    do(*JOB, "--output-dir", tmp_path)


def test_the_lock_goes_with_the_process(tmp_path):
    process = start(*JOB, "--output-dir", tmp_path)
    wait_for_a_group(process, tmp_path / "cscores-checkpoint.npz")
    process.kill()
    process.communicate()
    assert set(files(tmp_path)) <= {"cscores-checkpoint.npz", "cscores-checkpoint.npz.tmp"}
    do(*JOB, "--output-dir", tmp_path)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_output(tiny, tmp_path, unbuffered):
    words = " ".join(f"'{word}'" for word in [sys.executable, SCRIPT, *TINY, "--output-dir", tmp_path])
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", f"set -o pipefail; {words} | head -1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "mnist.py:" not in done.stderr and "Traceback" not in done.stderr
    assert same_results(tmp_path, tiny)


def test_a_platform_that_is_not_there(tmp_path):
    line = problem(*TINY, "--output-dir", tmp_path, env={"JAX_PLATFORMS": "cuda"})
    assert "no devices" in line and "JAX_PLATFORMS=cpu" in line


def test_a_broken_matplotlib_is_found_before_the_first_run(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('broken')")
    line = problem(*TINY, "--output-dir", tmp_path / "out", env={"PYTHONPATH": str(tmp_path)})
    assert "matplotlib does not work (broken)" in line and not (tmp_path / "out").exists()


def test_few_runs_use_few_devices():
    for n_runs, parallel_runs, devices, width in (
        (3, None, 3, 3),
        (200, None, 4, 4),
        (9, 2, 2, 2),
        (9, 5, 4, 8),
    ):
        mesh, found = mnist.start_mesh(n_runs, parallel_runs)
        assert (mesh.size, found) == (devices, width)


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


def test_models_that_diverge_predict_nothing(tmp_path, capsys):
    args = [*DIGITS, "--ratios", 0.3, 0.5, "--epochs", 2, "--runs", 2]
    do(*args, "--learning-rate", 1e30, "--output-dir", tmp_path)
    assert np.nanmax(np.load(tmp_path / "cscores.npy")) == 0
    err = capsys.readouterr().err
    assert err.count("warning: at ratio 0.3 a model was wrong on all") == 1 and err.count("warning") == 1
    assert "--learning-rate" in err


def test_a_model_that_collapses_is_a_result():
    digits = mnist.load("digits")[1]
    correctness = digits_trainer(epochs=1, learning_rate=0.5, labels=np.where(digits == 3, 3, 4))([0], 0.5)
    assert (correctness == 1).any()


def test_another_algorithm_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "out")
    changed = tmp_path / "mnist.py"
    changed.write_text(SCRIPT.read_text().replace("jax.nn.relu", "jax.nn.gelu"))
    command = [sys.executable, changed, *map(str, TINY), "--output-dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "made with algorithm " in done.stderr
    assert same_results(tmp_path / "out", tiny)


def test_another_command_line_is_the_same_algorithm(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "out")
    changed = tmp_path / "mnist.py"
    changed.write_text(SCRIPT.read_text().replace("held-out accuracy ", "accuracy"))
    command = [sys.executable, changed, *map(str, TINY), "--output-dir", tmp_path / "out"]
    subprocess.run(command, capture_output=True, timeout=240, check=True)


@pytest.mark.parametrize(
    "dataset, name",
    [("mnist:3.0.1", "mnist"), ("a/own.npz", "own"), ("FILE.NPZ", "FILE"), ("emnist/letters", "letters")],
)
def test_results_are_named_after_the_data_set(dataset, name):
    assert mnist.parse_args(["--dataset", dataset]).name == name


def test_an_npz_in_capitals(tmp_path):
    np.savez(tmp_path / "own.npz", images=np.zeros((4, 3, 3), np.uint8), labels=np.arange(4))
    (tmp_path / "own.npz").rename(tmp_path / "OWN.NPZ")
    assert mnist.load(str(tmp_path / "OWN.NPZ"))[0].shape == (4, 3, 3, 1)


def test_tensorflow_gets_no_gpu(monkeypatch):
    tensorflow = pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    calls = []
    monkeypatch.setattr(tensorflow.config, "set_visible_devices", lambda *args: calls.append(args))
    monkeypatch.setattr(tfds, "load", lambda *args, **kwargs: calls.append("load"))
    with pytest.raises(mnist.Problem):
        mnist.load("mnist")
    assert calls == [([], "GPU"), "load"]


@pytest.mark.parametrize("where, method", [(["h:1", "2", "1"], "deactivate"), ([], None)])
def test_started_by_hand_a_process_has_all_gpus(monkeypatch, where, method):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    before = jax.config.jax_enable_preemption_service
    mnist.start_mesh(1, distributed=where)
    jax.config.update("jax_enable_preemption_service", before)
    ((args, kwargs),) = calls
    assert args == (("h:1", 2, 1) if where else (None,)) and kwargs.get("cluster_detection_method") == method


def test_processes_connect_before_they_load(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mnist, "all_gather", lambda mesh, values: calls.append("gather") or np.int32([values])
    )
    real = mnist.load
    monkeypatch.setattr(mnist, "load", lambda *args: calls.append("load") or real(*args))
    mnist.load_together(mnist.parse_args(DIGITS), None)
    assert calls[:2] == ["gather", "load"]


def test_the_host_draws_while_a_launch_blocks(monkeypatch):
    """As on a GPU, where the call of a jitted loop returns when the loop is done."""

    def slow_jit(function, **kwargs):
        def call(runs, *_):
            time.sleep(0.1)
            return np.zeros((len(runs), 8), np.int8)

        return call

    def slow_draws(*args, **kwargs):
        time.sleep(0.1)
        return np.zeros((2, 1, 8), np.int32)

    def job():
        mesh, width = mnist.start_mesh(1)
        data = np.zeros((8, 2, 2, 1), np.uint8), np.arange(8)
        sgd = dict(epochs=1, batch_size=8, learning_rate=0.1, momentum=0.9)
        train_group = mnist.make_trainer(*data, mesh, **sgd)
        begin = time.perf_counter()
        assert len(list(mnist.train_missing(train_group, [4], [0], 8, width))) == 8
        return time.perf_counter() - begin

    monkeypatch.setattr(jax, "jit", slow_jit)
    monkeypatch.setattr(mnist, "draw_batches", slow_draws)
    overlapped = job()

    class Inline:
        def submit(self, function, *args):
            result = function(*args)
            return SimpleNamespace(result=lambda: result)

        map = map

    monkeypatch.setattr(mnist, "ThreadPoolExecutor", lambda *_: Inline())
    assert overlapped < 0.75 * job()
