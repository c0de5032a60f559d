"""Several processes on this machine: `python mnist.py --distributed`, on the digits."""

import shutil

import pytest
from helpers import (
    DIGITS,
    JOB,
    do,
    ends,
    files,
    free_port,
    launch,
    n_done,
    problem,
    same_results,
    start,
    wait_for_a_group,
)

FOUR = [*JOB, "--parallel-runs", 4]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The output of one process, this one with its four devices, that does the job."""
    folder = tmp_path_factory.mktemp("alone")
    do(*FOUR, "--output-dir", folder)
    return folder


@pytest.mark.parametrize("by_hand", [True, False], ids=["by-hand", "slurm"])
def test_two_processes_give_the_files_of_one(alone, tmp_path, by_hand):
    first, second = tmp_path / "first", tmp_path / "second"
    folders = [first, first] if by_hand else [first, second]  # machines need not share a file system
    processes = launch(2, *FOUR, by_hand=by_hand, devices=2, folders=folders)
    (status, out, err), other = ends(processes)
    assert status == 0 and "on 4 x cpu" in err and "mean C-score" in out and "100%" in err, err
    assert other[0] == 0 and "C-score" not in other[1] and "JAX" not in other[2] and "%|" not in other[2]
    assert same_results(first, alone) and not second.exists()
    before = (first / "cscores-checkpoint.npz").stat().st_mtime_ns
    do(*FOUR, "--output-dir", first)
    assert same_results(first, alone)
    assert (first / "cscores-checkpoint.npz").stat().st_mtime_ns == before, "nothing is left to train"


@pytest.mark.parametrize("victim, starts", [(0, [2]), (1, [1, 2, 3])])
def test_a_process_dies_and_the_job_is_started_again(alone, tmp_path, victim, starts):
    folder = tmp_path / "first"
    checkpoint = folder / "cscores-checkpoint.npz"
    processes = launch(2, *FOUR, devices=2, folders=[folder] * 2)
    wait_for_a_group(processes[0], checkpoint)
    processes[victim].kill()
    assert all(status != 0 for status, _, _ in ends(processes, timeout=60))
    assert not (folder / "cscores.npy").exists() and 0 < n_done(checkpoint) < 24

    for then in starts:
        again = shutil.copytree(folder, tmp_path / f"then {then}")
        results = ends(launch(then, *FOUR, devices=2, folders=[again] * then))
        assert all(status == 0 for status, _, _ in results), results[0][2]
        assert same_results(again, alone)


@pytest.mark.parametrize("option", ["--learning-rate", "--parallel-runs", "--ratios"])
def test_processes_with_different_settings(tmp_path, option):
    address = f"127.0.0.1:{free_port()}"
    common = [*DIGITS, "--runs", 4, "--output-dir", tmp_path]
    values = {
        "--learning-rate": [[0.1], [0.2]],
        "--parallel-runs": [[2], [4]],
        "--ratios": [[0.5], [0.2, 0.5]],
    }
    both = ends(
        [start(*common, option, *values[option][i], "--distributed", address, 2, i) for i in range(2)]
    )
    assert all(status != 0 for status, _, _ in both)
    assert any("different settings" in err.strip().split("\n")[-1] for _, _, err in both)
    assert files(tmp_path) == []


@pytest.mark.parametrize("args", [[], ["localhost:9"], ["localhost:9", "2", "one"]], ids=str)
def test_what_jax_cannot_find_out(tmp_path, args):
    line = problem(*JOB, "--output-dir", tmp_path, "--distributed", *args)
    assert "--distributed (" in line and "add HOST:PORT P I" in line
    assert list(tmp_path.iterdir()) == []
