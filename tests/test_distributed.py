"""Several processes on this machine: `python mnist.py --distributed`, on the digits."""

import os
import shutil
import socket
import time

import numpy as np
import pytest
from test_script import SMALL, problem, run, same_results, start

JOB = [*SMALL, "--runs", 12]


def free_port(ports=(0,)):
    for port in ports:
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::", port))
            except OSError:
                continue
            return probe.getsockname()[1]


def launch(n, *args, by_hand=True):
    """Start the n processes of a job, by hand or in the environment that Slurm gives them."""
    if by_hand:
        common = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", n]
        return [start(*args, *common, "--process-id", i) for i in range(n)]
    job = free_port(range(61440, 65536)) - 61440  # JAX makes the port from the number of the job
    slurm = dict(SLURM_JOB_ID=str(job), SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=str(n))
    own = [dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(n)]
    return [start(*args, "--distributed", env=os.environ | slurm | ids) for ids in own]


def ends(processes, timeout=120):
    """Wait for the end of the processes: (exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def same_scores(one, other):
    return same_results(one, other, names=("cscores.npy", "cscores-orig-order.npz"))


def trained(folder, process):
    return np.load(folder / f"cscores-checkpoint{['', '-1'][process]}.npz")["trained"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The output of one process that does the job."""
    folder = tmp_path_factory.mktemp("alone")
    run(*JOB, "--output-dir", folder)
    return folder


@pytest.mark.parametrize("by_hand", [True, False], ids=["by-hand", "slurm"])
def test_two_processes_give_the_scores_of_one(alone, tmp_path, by_hand):
    (status, out, err), other = ends(launch(2, *JOB, "--output-dir", tmp_path, by_hand=by_hand))
    assert status == 0 and " in 2 processes" in out and "mean C-score" in out and "100%" in err, err
    assert other[0] == 0 and "JAX" not in other[1] and "C-score" not in other[1] and "ex/s" not in other[2]
    assert same_scores(tmp_path, alone)
    assert trained(tmp_path, 0).sum() == trained(tmp_path, 1).sum() == 12
    assert (trained(tmp_path, 0) ^ trained(tmp_path, 1)).all(), "each run was trained by one of them"

    before = (tmp_path / "cscores-checkpoint-1.npz").read_bytes()
    _, err = run(*JOB, "--output-dir", tmp_path)
    assert "0%|" not in err.replace("100%|", ""), "one process finds nothing left to train"
    assert same_scores(tmp_path, alone)
    assert (tmp_path / "cscores-checkpoint-1.npz").read_bytes() == before


@pytest.mark.parametrize("victim, then", [(0, 2), (1, 2), (1, 1), (1, 3)])
def test_a_process_dies_and_the_job_is_started_again(alone, tmp_path, victim, then):
    processes = launch(2, *JOB, "--output-dir", tmp_path)
    while not (tmp_path / "cscores-checkpoint-1.npz").exists():
        assert processes[1].poll() is None, processes[1].communicate()[1]
        time.sleep(0.002)
    processes[victim].kill()
    begin = time.perf_counter()
    assert all(status != 0 for status, _, _ in ends(processes))
    assert time.perf_counter() - begin < 60
    assert not (tmp_path / "cscores.npy").exists()
    assert 0 < trained(tmp_path, 1).sum() < 24

    results = ends(launch(then, *JOB, "--output-dir", tmp_path))
    assert all(status == 0 for status, _, _ in results), results[0][2]
    assert same_scores(tmp_path, alone)


def test_processes_with_different_settings(tmp_path):
    port = free_port()
    common = [*JOB, "--output-dir", tmp_path, "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2]
    both = ends([start(*common, "--process-id", i, "--learning-rate", 0.1 + i / 10) for i in range(2)])
    assert all(status != 0 for status, _, _ in both)
    assert any("different settings" in err.strip().split("\n")[-1] for _, _, err in both)
    assert list(tmp_path.glob("cscores*")) == []


def test_two_checkpoints_of_the_same_runs(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "out")
    shutil.copy(alone / "cscores-checkpoint.npz", tmp_path / "out" / "cscores-checkpoint-1.npz")
    assert "hold the same run" in problem(*JOB, "--output-dir", tmp_path / "out")
    assert same_scores(tmp_path / "out", alone)


@pytest.mark.parametrize(
    "args", [["--distributed"], ["--coordinator", "localhost:9"], ["--process-id", "1"]], ids=str
)
def test_what_jax_cannot_find_out(tmp_path, args):
    line = problem(*JOB, "--output-dir", tmp_path, *args, status=2)
    assert "--distributed" in line and "--coordinator HOST:PORT --num-processes N --process-id I" in line
    assert list(tmp_path.iterdir()) == []
