"""Parts of a job, `python mnist.py --part I P`, which know of each other by their checkpoints only."""

import builtins
import errno
import os
import shutil

import numpy as np
import pytest
from helpers import (
    DIGITS,
    JOB,
    RESULTS,
    SCRIPT,
    SMALL,
    contents,
    error_here,
    files,
    n_done,
    paused,
    run_here,
    runs_in,
    same_results,
    start_parts,
    start_script,
    wait_for_a_group,
    wait_for_all,
)

import mnist

SEVEN = [*SMALL, "--runs", 7]  # of three parts, one has three runs and two have two
TOGETHER = [*SMALL[:-2], "--runs", 15]  # as many runs at once as each part has devices


def checkpoint(folder, i, n):
    return folder / f"cscores-checkpoint-part-{i}-of-{n}.npz"


def runs_of_both_ratios(*runs):
    return [[k, run] for k in (0, 1) for run in runs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of a job that is not in parts."""
    folder = tmp_path_factory.mktemp("whole")
    run_here(*SEVEN, "--output-dir", folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The output of the same job in three parts, one after the other."""
    folder = tmp_path_factory.mktemp("parts")
    for i in 2, 0, 1:
        run_here(*SEVEN, "--output-dir", folder, "--part", i, 3)
    return folder


@pytest.fixture
def first_part(parts, tmp_path):
    """A folder in which only the first of three parts has been done."""
    folder = tmp_path / "first-part"
    folder.mkdir()
    shutil.copy(checkpoint(parts, 0, 3), folder)
    return folder


# --- The results are those of a whole job ---
def test_parts_give_the_results_of_a_whole_job(parts, whole):
    assert same_results(parts, whole, RESULTS)
    assert [runs_in(checkpoint(parts, i, 3)) for i in range(3)] == [
        runs_of_both_ratios(0, 3, 6),
        runs_of_both_ratios(1, 4),
        runs_of_both_ratios(2, 5),
    ]
    of_parts = [f"cscores-checkpoint-part-{i}-of-3.npz" for i in range(3)]
    assert files(parts) == sorted([*of_parts, *RESULTS, "digits-examples.pdf"])


def test_parts_at_once_on_other_devices_one_of_them_killed_and_started_again(tmp_path):
    one, out = tmp_path / "one", tmp_path / "out"
    processes = start_parts(3, *TOGETHER, folder=out, devices=(2, 1, 3))
    victim = processes.pop(1)
    wait_for_a_group(victim, checkpoint(out, 1, 3))
    with paused(victim):
        others = wait_for_all(processes)
        done = n_done(checkpoint(out, 1, 3))
        victim.kill()
    victim.communicate()
    assert 0 < done < 10, "it was stopped in the middle"

    assert [status for status, _, _ in others] == [0, 0], others
    printed = "".join(printed for _, printed, _ in others)
    missing = f"{10 - done:.0f} of 30 runs are missing", "10 of 30 runs are missing"  # they may end before it
    assert any(each in printed for each in missing)
    assert all("Traceback" not in err and "100%" in err for _, _, err in others)
    assert not set(files(out)) & {*RESULTS}

    run_here(*TOGETHER, "--output-dir", out, "--part", 1, 3)
    run_here(*TOGETHER, "--output-dir", one)
    assert same_results(out, one, RESULTS)
    assert runs_in(checkpoint(out, 1, 3)) == runs_of_both_ratios(*range(1, 15, 3))


def test_a_whole_job_does_what_parts_have_left(whole, tmp_path):
    run_here(*SEVEN, "--output-dir", tmp_path, "--part", 3, 5)
    run_here(*SEVEN, "--output-dir", tmp_path)
    assert same_results(tmp_path, whole, RESULTS)
    assert runs_in(checkpoint(tmp_path, 3, 5)) == runs_of_both_ratios(3)
    assert runs_in(tmp_path / "cscores-checkpoint.npz") == runs_of_both_ratios(0, 1, 2, 4, 5, 6)


def test_other_parts_do_what_parts_have_left(first_part, whole):
    for i in range(5):
        assert not set(files(first_part)) & {*RESULTS}
        run_here(*SEVEN, "--output-dir", first_part, "--part", i, 5)
    assert same_results(first_part, whole, RESULTS)
    assert [runs_in(checkpoint(first_part, i, 5)) for i in (1, 2, 4)] == [
        runs_of_both_ratios(1),
        runs_of_both_ratios(2),
        runs_of_both_ratios(4),
    ]
    assert runs_in(checkpoint(first_part, 0, 5)) == runs_of_both_ratios(5)
    assert not checkpoint(first_part, 3, 5).exists(), "run 3 was there"


def test_a_job_that_grows(whole, tmp_path):
    for runs in 3, 7:
        for i in range(2):
            run_here(*SMALL, "--runs", runs, "--output-dir", tmp_path, "--part", i, 2)
        assert {*RESULTS} <= set(files(tmp_path))
        assert same_results(tmp_path, whole, RESULTS) == (runs == 7)


def test_a_part_that_was_stopped_between_two_ratios(first_part):
    path = checkpoint(first_part, 0, 3)
    with np.load(path) as file:
        before, counts = path.read_bytes(), dict(file)
    counts["runs"] = counts["runs"][counts["runs"][:, 0] == 1]
    counts["n_heldout"][0] = counts["n_correct"][0] = 0
    np.savez(path, **counts)
    run_here(*SEVEN, "--output-dir", first_part, "--part", 0, 3)
    assert path.read_bytes() == before


def test_any_part_that_starts_again_writes_the_results_again(parts, whole, tmp_path, capsys):
    out = shutil.copytree(parts, tmp_path / "out")
    of_parts = [checkpoint(out, i, 3) for i in range(3)]
    before = [path.stat().st_mtime_ns for path in of_parts]
    for i, n in ((1, 3), (8, 9)):
        for name in *RESULTS, "digits-examples.pdf":
            (out / name).unlink()
        run_here(*SEVEN, "--output-dir", out, "--part", i, n)
        assert "mean C-score" in capsys.readouterr().out
        assert files(out) == files(parts) and same_results(out, whole, RESULTS)
        assert [path.stat().st_mtime_ns for path in of_parts] == before, "nothing was left to train"


def test_a_part_says_what_is_missing(tmp_path, capsys):
    run_here(*SEVEN, "--output-dir", tmp_path, "--part", 2, 3)
    printed, err = capsys.readouterr()
    assert printed.startswith("10 of 14 runs are missing: ") and printed.count("\n") == 1
    assert "4 of 4 runs" in err and files(tmp_path) == [checkpoint(tmp_path, 2, 3).name]


def test_a_part_without_runs(tmp_path, capsys):
    run_here(*SEVEN, "--output-dir", tmp_path, "--part", 7, 8)
    printed, err = capsys.readouterr()
    assert printed.startswith("14 of 14 runs are missing: ") and printed.count("\n") == 1
    assert "Traceback" not in err and files(tmp_path) == []


def test_a_group_has_the_size_of_the_parts_runs(tmp_path, monkeypatch):
    """It is filled up only so that all devices have as many: on a GPU, a copy costs as much as a run."""
    groups = []

    def look_at_groups(drawn, *_):
        groups.extend((k, runs, filled.tolist(), len(batches)) for k, runs, (filled, batches, _) in drawn)
        return iter(())

    monkeypatch.setattr(mnist, "train_groups", look_at_groups)
    args = [*DIGITS, "--ratios", 0.3, 0.8, "--epochs", 1, "--parallel-runs", 100, "--output-dir", tmp_path]
    for part, n_runs, runs, filled in (
        ((0, 3), 9, [0, 3, 6], [0, 3, 6]),
        ((1, 3), 20, [1, 4, 7, 10, 13, 16, 19], [1, 4, 7, 10, 13, 16, 19, 19]),  # two for each of 4 devices
    ):
        groups.clear()
        run_here(*args, "--runs", n_runs, "--part", *part)
        assert groups == [(k, runs, filled, len(filled)) for k in (0, 1)]


def test_a_group_on_gpus_has_the_size_of_the_parts_runs():
    class Gpu:
        platform = "gpu"

    for n_devices, n_runs, parallel_runs, group_size in (
        (1, 200, None, 100),
        (1, 25, None, 25),
        (4, 200, None, 200),
        (8, 25, None, 32),
        (8, 3, None, 3),
        (4, 25, 8, 8),
    ):
        mesh, found = mnist.split_group([Gpu() for _ in range(n_devices)], n_runs, parallel_runs)
        assert (mesh.size, found) == (min(n_devices, n_runs), group_size)


# --- Parts that meet ---
TOGETHER_TO_THE_END = """
import os, sys, time
from pathlib import Path
import mnist

meeting, me, other = Path(sys.argv.pop(1)), sys.argv[-2], str(1 - int(sys.argv[-2]))

def meet(where):
    (meeting / f"{where} {me}").touch()
    while not (meeting / f"{where} {other}").exists():
        time.sleep(0.01)
        assert time.monotonic() - begin < 60, f"{me} waits at {where}"

def count_groups(*args):
    count(*args)
    meet("all runs are counted")

def replace(old, new, **kwargs):
    if "checkpoint" not in str(new):
        meet(f"before {Path(new).name}")
    rename(old, new, **kwargs)
    if "checkpoint" not in str(new):
        meet(f"after {Path(new).name}")

begin = time.monotonic()
count, mnist.count_groups = mnist.count_groups, count_groups
rename, os.replace = os.replace, replace
mnist.main(sys.argv[1:])
"""


def test_parts_that_end_together_write_the_same_results(whole, tmp_path):
    """Each reads the last checkpoint of the other, and they write each file at the same time."""
    script, meeting, out = tmp_path / "together.py", tmp_path / "meeting", tmp_path / "out"
    script.write_text(TOGETHER_TO_THE_END)
    meeting.mkdir()
    how = dict(script=script, env={"PYTHONPATH": str(SCRIPT.parent)})
    args = [meeting, *SEVEN, "--output-dir", out, "--part"]
    both = wait_for_all([start_script(*args, i, 2, **how) for i in range(2)])
    assert [status for status, _, _ in both] == [0, 0], both
    assert both[0][1] == both[1][1] and "mean C-score" in both[0][1]
    of_parts = [f"cscores-checkpoint-part-{i}-of-2.npz" for i in range(2)]
    assert files(out) == sorted([*of_parts, *RESULTS, "digits-examples.pdf"])
    assert same_results(out, whole, RESULTS)
    assert len(list(meeting.iterdir())) == 2 + 2 * 2 * 3, "they have met wherever they could"


def test_the_lock_is_the_parts(tmp_path):
    """Two parts work in a folder at once, but not two processes at a part, nor a whole job twice."""
    args = [*JOB, "--output-dir", tmp_path]
    first = start_script(*args, "--part", 0, 2)
    wait_for_a_group(first, checkpoint(tmp_path, 0, 2))
    with paused(first):
        before = contents(tmp_path)
        line = error_here(*args, "--part", 0, 2)
        assert f"another job is at work in {tmp_path}" in line and "--part" in line
        assert contents(tmp_path) == before
        run_here(*args, "--part", 1, 2)
        assert n_done(checkpoint(tmp_path, 1, 2)) == 12 and n_done(checkpoint(tmp_path, 0, 2)) < 12
    printed, err = first.communicate(timeout=120)
    assert first.returncode == 0 and "mean C-score" in printed, err
    assert n_done(checkpoint(tmp_path, 0, 2)) == 12


# --- What is refused ---
def test_the_same_run_in_two_checkpoints(first_part, whole):
    one, other = checkpoint(first_part, 0, 3), first_part / "cscores-checkpoint.npz"
    shutil.copy(whole / other.name, first_part)
    before = contents(first_part)
    for part in ["--part", 0, 3], ["--part", 1, 3], []:
        line = error_here(*SEVEN, "--output-dir", first_part, *part)
        assert one.name in line and other.name in line and "same runs" in line and "\n" not in line
        assert contents(first_part) == before


@pytest.mark.parametrize("ends_last", ["the part", "the whole job"])
def test_a_whole_job_beside_a_part(tmp_path, monkeypatch, capsys, ends_last):
    """Both started when no run was done. The one that ends first is right, the other one notices."""
    args, part = [*SEVEN, "--output-dir", tmp_path], ["--part", 1, 3]
    first, last = (args, [*args, *part]) if ends_last == "the part" else ([*args, *part], args)
    count_groups = mnist.count_groups

    def count_after_the_other_job(*arguments):
        monkeypatch.setattr(mnist, "count_groups", count_groups)
        run_here(*first)
        count_groups(*arguments)

    monkeypatch.setattr(mnist, "count_groups", count_after_the_other_job)
    line = error_here(*last)
    names = ["cscores-checkpoint.npz", checkpoint(tmp_path, 1, 3).name]
    assert all(name in line for name in names) and "same runs" in line
    printed = capsys.readouterr().out
    assert ("mean C-score" in printed, "missing" in printed) == (ends_last == "the part", first != args)
    results = [*RESULTS, "digits-examples.pdf"] if first == args else []
    assert files(tmp_path) == sorted(names + results)
    assert runs_in(tmp_path / names[0]) == runs_of_both_ratios(*range(7))
    assert runs_in(tmp_path / names[1]) == runs_of_both_ratios(1, 4)


@pytest.mark.parametrize(
    "option, value, difference",
    [
        ("--epochs", 3, "epochs 2, not 3"),
        ("--batch-size", 100, "batch_size 128, not 100"),
        ("--precision", "bfloat16", "precision float32, not bfloat16"),
        ("--runs", 6, "7 runs: give --runs"),
    ],
)
@pytest.mark.parametrize("part", [("--part", 1, 3), ("--part", 0, 3), ("--part", 0, 1)], ids=str)
def test_parts_with_different_settings(first_part, option, value, difference, part):
    before = contents(first_part)
    line = error_here(*SEVEN, option, value, "--output-dir", first_part, *part)
    assert f"cannot go on from {checkpoint(first_part, 0, 3)} (" in line and difference in line
    assert contents(first_part) == before


def test_settings_that_differ_only_at_the_end(tmp_path, monkeypatch):
    """Parts that started together with different settings: the one that ends last notices."""
    count_groups = mnist.count_groups

    def count_after_the_other_part(*arguments):
        monkeypatch.setattr(mnist, "count_groups", count_groups)
        run_here(*SEVEN, "--output-dir", tmp_path, "--part", 0, 2)
        count_groups(*arguments)

    monkeypatch.setattr(mnist, "count_groups", count_after_the_other_part)
    line = error_here(*SEVEN, "--ratios", 0.3, 0.7, "--output-dir", tmp_path, "--part", 1, 2)
    assert (
        f"cannot go on from {checkpoint(tmp_path, 0, 2)} (" in line
        and "ratios [0.3, 0.8], not [0.3, 0.7]" in line
    )
    assert files(tmp_path) == [checkpoint(tmp_path, i, 2).name for i in range(2)]


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("what", ["own checkpoint", "another checkpoint", "folder"])
def test_what_cannot_be_read_is_not_taken_for_nothing(first_part, monkeypatch, what, error):
    """A checkpoint that is there but cannot be read must not be counted as zeros, and overwritten."""
    before, path = contents(first_part), checkpoint(first_part, 0, 3)
    really_open, failed = builtins.open, []

    def fail(*_):
        failed.append(what)
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        if what == "folder":
            for name in "listdir", "scandir":
                patch.setattr(os, name, fail)
        else:
            open_or_fail = lambda file, *args, **kwargs: (  # noqa: E731
                fail() if str(file) == str(path) else really_open(file, *args, **kwargs)
            )
            for module in builtins, __import__("io"):
                patch.setattr(module, "open", open_or_fail)
        part = ["--part", 1, 3] if what == "another checkpoint" else ["--part", 0, 3]
        line = error_here(*SEVEN, "--output-dir", first_part, *part)
    assert failed and os.strerror(error) in line and str(first_part) in line and "--output-dir" in line
    assert contents(first_part) == before


@pytest.mark.parametrize(
    "part",
    [("2", "2"), ("-1", "3"), ("0", "0"), ("0", "-1"), ("x", "2"), ("1",), ("0", "1", "2"), ("0.5", "2")],
)
def test_parts_that_there_are_not(tmp_path, capsys, part):
    with pytest.raises(SystemExit) as caught:
        run_here(*SEVEN, "--output-dir", tmp_path / "out", "--part", *part)
    line = capsys.readouterr().err
    assert caught.value.code == 2 and line.count("\n") == 1
    assert "--part" in line or "unrecognized arguments: 2" in line
    assert not (tmp_path / "out").exists()
