"""Several processes on this machine: `python mnist.py --distributed`, on the digits."""

import re
import shutil

import jax
import numpy as np
import pytest
from helpers import (
    DIGITS,
    JOB,
    TINY,
    files,
    free_port,
    n_done,
    run_here,
    same_results,
    script_error,
    start_processes,
    start_script,
    wait_for_a_group,
    wait_for_all,
)

import mnist

FOUR = [*JOB, "--parallel-runs", 4]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The output of one process, this one with its four devices, that does the job."""
    folder = tmp_path_factory.mktemp("alone")
    run_here(*FOUR, "--output-dir", folder)
    return folder


@pytest.mark.parametrize("by_hand", [True, False], ids=["by-hand", "slurm"])
def test_two_processes_give_the_files_of_one(alone, tmp_path, by_hand):
    first, second = tmp_path / "first", tmp_path / "second"
    folders = [first, first] if by_hand else [first, second]  # machines need not share a file system
    processes = start_processes(2, *FOUR, by_hand=by_hand, folders=folders)
    (status, out, err), other = wait_for_all(processes)
    assert status == 0 and "on 4 x cpu" in err and "mean C-score" in out and "100%" in err, err
    assert other[0] == 0 and "C-score" not in other[1] and "JAX" not in other[2] and "%|" not in other[2]
    assert same_results(first, alone) and not second.exists()
    # A device connects to one in each process, at the start: Gloo would not wait for a slow group of runs.
    assert set(re.findall(r"connected peer ranks is : (\d+)", out + err)) == {"1"}
    before = (first / "cscores-checkpoint.npz").stat().st_mtime_ns
    run_here(*FOUR, "--output-dir", first)
    assert same_results(first, alone)
    assert (first / "cscores-checkpoint.npz").stat().st_mtime_ns == before, "nothing is left to train"


@pytest.mark.parametrize("victim, starts", [(0, [2]), (1, [1, 3])])
def test_a_process_dies_and_the_job_is_started_again(alone, tmp_path, victim, starts):
    folder = tmp_path / "first"
    checkpoint = folder / "cscores-checkpoint.npz"
    processes = start_processes(2, *FOUR, folders=[folder] * 2)
    wait_for_a_group(processes[0], checkpoint)
    processes[victim].kill()
    assert all(status != 0 for status, _, _ in wait_for_all(processes, timeout=60))
    assert not (folder / "cscores.npy").exists() and 0 < n_done(checkpoint) < 24

    for then in starts:
        again = shutil.copytree(folder, tmp_path / f"then {then}")
        results = wait_for_all(start_processes(then, *FOUR, folders=[again] * then))
        assert all(status == 0 for status, _, _ in results), results[0][2]
        assert same_results(again, alone)


@pytest.mark.parametrize("option", ["--learning-rate", "--parallel-runs", "--ratios"])
def test_processes_with_different_settings(tmp_path, option):
    address = f"127.0.0.1:{free_port()}"
    common = [*DIGITS, "--runs", 8, "--output-dir", tmp_path]
    values = {
        "--learning-rate": [[0.1], [0.2]],
        "--parallel-runs": [[4], [8]],
        "--ratios": [[0.5], [0.2, 0.5]],
    }
    both = wait_for_all(
        [start_script(*common, option, *values[option][i], "--distributed", address, 2, i) for i in range(2)]
    )
    assert all(status == 1 for status, _, _ in both), both
    assert all("settings or data differ" in err.strip().split("\n")[-1] for _, _, err in both)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "args", [[], ["localhost:9"], ["localhost:9", "2", "one"], ["localhost:9", "2", "1", "0"]], ids=str
)
def test_what_jax_cannot_find_out(tmp_path, args):
    line = script_error(*JOB, "--output-dir", tmp_path, "--distributed", *args)
    assert "--distributed (" in line and "add HOST:PORT P I" in line
    assert list(tmp_path.iterdir()) == []


def test_processes_with_different_numbers_of_devices(tmp_path):
    results = wait_for_all(start_processes(2, *TINY, folders=[tmp_path] * 2, devices=(1, 2)))
    assert all(status == 1 and "Traceback" not in err for status, _, err in results)
    assert any("processes have [1 2] devices" in err for _, _, err in results) and files(tmp_path) == []


@pytest.mark.parametrize("where, method", [(["h:1", "2", "1"], "deactivate"), ([], None)])
def test_started_by_hand_a_process_has_all_gpus(monkeypatch, where, method):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    before = jax.config.jax_enable_preemption_service
    mnist.start_jax(where)
    jax.config.update("jax_enable_preemption_service", before)
    ((args, kwargs),) = calls
    assert args == (("h:1", 2, 1) if where else ()) and kwargs.get("cluster_detection_method") == method


def test_processes_connect_and_wait_for_process_0_before_they_load(tmp_path, monkeypatch):
    calls = []
    real = mnist.load
    monkeypatch.setattr(mnist, "load", lambda *args: calls.append("load") or real(*args))
    monkeypatch.setattr(mnist.multihost_utils, "sync_global_devices", calls.append)
    run_here(*TINY, "--output-dir", tmp_path)
    assert calls == ["connected", "load", "process 0 has loaded"]
    calls.clear()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises((ValueError, IndexError)):  # there is no second process for its runs
        run_here(*TINY, "--output-dir", tmp_path)
    assert calls == ["connected", "process 0 has loaded", "load"]


def test_what_several_processes_need_of_jax_is_there():
    """`jax.experimental.multihost_utils` may change; in one process, they give back the argument."""
    utils = mnist.multihost_utils
    array = np.arange(6).reshape(2, 3)
    assert np.array_equal(utils.process_allgather(array, tiled=True), array)
    assert np.array_equal(utils.broadcast_one_to_all(array), array)
    assert utils.sync_global_devices("name") is None and utils.assert_equal(np.uint32(3), "differs") is None
