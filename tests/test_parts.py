"""Parts of a job, `python mnist.py --part I P`, which know of each other by the saved runs only."""

import builtins
import errno
import os
import shutil

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
    run_file,
    run_here,
    runs_dir,
    runs_in,
    same_results,
    same_runs,
    start_part,
    start_script,
    wait_for_a_group,
    wait_for_all,
)

import mnist

SEVEN = [*SMALL, "--runs", 7]  # of three parts, one has three runs and two have two
TOGETHER = [*SMALL[:-2], "--runs", 15]  # as many runs at once as each part has devices


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
    runs_dir(folder).mkdir(parents=True)
    for k in 0, 1:
        for run in 0, 3, 6:
            shutil.copy(run_file(parts, k, run), runs_dir(folder))
    return folder


# --- The results are those of a whole job ---
def test_parts_give_the_results_of_a_whole_job(parts, whole):
    assert same_results(parts, whole) and same_runs(parts, whole)
    assert files(parts) == files(whole) == sorted([*RESULTS, "digits-examples.pdf"])
    assert runs_in(parts) == runs_of_both_ratios(*range(7))


@pytest.mark.parametrize("i, runs", [(0, (0, 3, 6)), (1, (1, 4)), (2, (2, 5))])
def test_a_part_does_its_runs(parts, tmp_path, i, runs):
    run_here(*SEVEN, "--output-dir", tmp_path, "--part", i, 3)
    assert runs_in(tmp_path) == runs_of_both_ratios(*runs) and files(tmp_path) == []
    assert all(
        run_file(tmp_path, k, run).read_bytes() == run_file(parts, k, run).read_bytes()
        for k, run in runs_in(tmp_path)
    )


def test_parts_at_once_on_other_devices_one_of_them_killed_and_started_again(tmp_path):
    one, out = tmp_path / "one", tmp_path / "out"
    of_victim = runs_of_both_ratios(*range(1, 15, 3))
    victim = start_part(1, 3, *TOGETHER, folder=out, devices=1)
    wait_for_a_group(victim, out)
    with paused(victim):
        done = n_done(out)
        others = wait_for_all(start_part(i, 3, *TOGETHER, folder=out, devices=2 + i // 2) for i in (0, 2))
        victim.kill()
    victim.communicate()
    assert 0 < done < 10, "it was stopped in the middle"

    assert [status for status, _, _ in others] == [0, 0], others
    printed = "".join(printed for _, printed, _ in others)
    missing = f"{10 - done} of 30 runs are missing"
    assert missing in printed
    assert all("Traceback" not in err and "100%" in err for _, _, err in others)
    assert not set(files(out)) & {*RESULTS} and len(runs_in(out)) == 20 + done

    run_here(*TOGETHER, "--output-dir", out, "--part", 1, 3)
    run_here(*TOGETHER, "--output-dir", one)
    assert same_results(out, one) and same_runs(out, one)
    assert all(run in runs_in(out) for run in of_victim)


def test_a_whole_job_does_what_parts_have_left(whole, tmp_path):
    run_here(*SEVEN, "--output-dir", tmp_path, "--part", 3, 5)
    assert runs_in(tmp_path) == runs_of_both_ratios(3)
    before = run_file(tmp_path, 0, 3).stat().st_mtime_ns
    run_here(*SEVEN, "--output-dir", tmp_path)
    assert same_results(tmp_path, whole) and same_runs(tmp_path, whole)
    assert run_file(tmp_path, 0, 3).stat().st_mtime_ns == before, "it was there"


def test_other_parts_do_what_parts_have_left(first_part, whole):
    before = run_file(first_part, 0, 3).stat().st_mtime_ns
    for i in range(5):
        assert not set(files(first_part)) & {*RESULTS}
        run_here(*SEVEN, "--output-dir", first_part, "--part", i, 5)
    assert same_results(first_part, whole) and same_runs(first_part, whole)
    assert run_file(first_part, 0, 3).stat().st_mtime_ns == before, "it was there"


def test_runs_of_several_folders_make_one_job(whole, tmp_path):
    """As of two machines without a common disk."""
    for i in 0, 1:
        run_here(*SEVEN, "--output-dir", tmp_path / str(i), "--part", i, 2)
    shutil.copytree(runs_dir(tmp_path / "1"), runs_dir(tmp_path / "0"), dirs_exist_ok=True)
    run_here(*SEVEN, "--output-dir", tmp_path / "0")
    assert same_results(tmp_path / "0", whole) and same_runs(tmp_path / "0", whole)


def test_a_job_that_grows(whole, tmp_path):
    for runs in 3, 7:
        for i in range(2):
            run_here(*SMALL, "--runs", runs, "--output-dir", tmp_path, "--part", i, 2)
        assert {*RESULTS} <= set(files(tmp_path))
        assert same_results(tmp_path, whole, RESULTS) == (runs == 7)


def test_a_part_that_was_stopped_between_two_ratios(first_part):
    before = contents(first_part)
    for run in 0, 3, 6:
        run_file(first_part, 0, run).unlink()
    run_here(*SEVEN, "--output-dir", first_part, "--part", 0, 3)
    assert contents(first_part) == before


def test_any_part_that_starts_again_writes_the_results_again(parts, whole, tmp_path, capsys):
    out = shutil.copytree(parts, tmp_path / "out")
    before = [path.stat().st_mtime_ns for path in sorted(runs_dir(out).iterdir())]
    for i, n in ((1, 3), (8, 9)):
        for name in *RESULTS, "digits-examples.pdf":
            (out / name).unlink()
        run_here(*SEVEN, "--output-dir", out, "--part", i, n)
        assert "mean C-score" in capsys.readouterr().out
        assert files(out) == files(parts) and same_results(out, whole)
        after = [path.stat().st_mtime_ns for path in sorted(runs_dir(out).iterdir())]
        assert after == before, "nothing was left to train"


def test_a_part_says_what_is_missing(tmp_path, capsys):
    run_here(*SEVEN, "--output-dir", tmp_path, "--part", 2, 3)
    printed, err = capsys.readouterr()
    assert printed.startswith("10 of 14 runs are missing: ") and printed.count("\n") == 1
    assert "4/4" in err and files(tmp_path) == []


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
        mesh, found = mnist.plan_groups([Gpu() for _ in range(n_devices)], n_runs, parallel_runs)
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

def save_runs(*args):
    save(*args)
    meet("all runs are saved")

def replace(old, new, **kwargs):
    if Path(new).name in RESULTS:
        meet(f"before {Path(new).name}")
    rename(old, new, **kwargs)
    if Path(new).name in RESULTS:
        meet(f"after {Path(new).name}")

begin = time.monotonic()
RESULTS = "cscores.npy", "cscores-orig-order.npz", "digits-examples.pdf"
save, mnist.save_runs = mnist.save_runs, save_runs
rename, os.replace = os.replace, replace
mnist.main(sys.argv[1:])
"""


def test_parts_that_end_together_write_the_same_results(whole, tmp_path):
    """Each reads the last runs of the other, and they write each file at the same time."""
    script, meeting, out = tmp_path / "together.py", tmp_path / "meeting", tmp_path / "out"
    script.write_text(TOGETHER_TO_THE_END)
    meeting.mkdir()
    how = dict(script=script, env={"PYTHONPATH": str(SCRIPT.parent)})
    args = [meeting, *SEVEN, "--output-dir", out, "--part"]
    both = wait_for_all([start_script(*args, i, 2, **how) for i in range(2)])
    assert [status for status, _, _ in both] == [0, 0], both
    assert both[0][1] == both[1][1] and "mean C-score" in both[0][1]
    assert files(out) == sorted([*RESULTS, "digits-examples.pdf"])
    assert same_results(out, whole) and same_runs(out, whole)
    assert len(list(meeting.iterdir())) == 2 + 2 * 2 * 3, "they have met wherever they could"


def test_two_processes_that_do_the_same_runs_at_once(tmp_path):
    """By mistake. Each run counts once, and the one that is stopped takes nothing with it."""
    one, out = tmp_path / "one", tmp_path / "out"
    first = start_script(*JOB, "--output-dir", out)
    wait_for_a_group(first, out)
    with paused(first):
        assert 0 < n_done(out) < 24
        before = n_done(out)
        second, third = (start_script(*JOB, "--output-dir", out) for _ in range(2))
        while n_done(out) == before:
            assert second.poll() is None and third.poll() is None
        third.kill()
        third.communicate()
        (ended,) = wait_for_all([second])
    (late,) = wait_for_all([first])
    run_here(*JOB, "--output-dir", one)
    for status, printed, err in ended, late:
        assert status == 0 and "mean C-score" in printed, err
    assert same_results(out, one) and same_runs(out, one)


# --- What is refused ---
@pytest.mark.parametrize("ends_last", ["the part", "the whole job"])
def test_a_whole_job_beside_a_part(whole, tmp_path, monkeypatch, capsys, ends_last):
    """Both started when no run was done, and do the part's runs both: each counts once."""
    args, part = [*SEVEN, "--output-dir", tmp_path], ["--part", 1, 3]
    first, last = (args, [*args, *part]) if ends_last == "the part" else ([*args, *part], args)
    save_runs = mnist.save_runs

    def save_after_the_other_job(*arguments):
        monkeypatch.setattr(mnist, "save_runs", save_runs)
        run_here(*first)
        save_runs(*arguments)

    monkeypatch.setattr(mnist, "save_runs", save_after_the_other_job)
    run_here(*last)
    printed = capsys.readouterr().out
    assert printed.count("mean C-score") == (2 if first == args else 1)
    assert same_results(tmp_path, whole) and same_runs(tmp_path, whole)


@pytest.mark.parametrize(
    "option, value, difference",
    [
        ("--epochs", 3, "epochs 2, not 3"),
        ("--batch-size", 100, "batch_size 128, not 100"),
        ("--precision", "bfloat16", "precision float32, not bfloat16"),
        ("--runs", 6, "of a job of --runs 7 or more"),
    ],
)
@pytest.mark.parametrize("part", [("--part", 1, 3), ("--part", 0, 3), ("--part", 0, 1)], ids=str)
def test_parts_with_different_settings(first_part, option, value, difference, part):
    before = contents(first_part)
    line = error_here(*SEVEN, option, value, "--output-dir", first_part, *part)
    assert f"cannot go on from {runs_dir(first_part)}" in line and difference in line
    assert contents(first_part) == before


def test_other_ratios_than_those_of_a_part_that_started_at_the_same_time(tmp_path, monkeypatch):
    save_runs = mnist.save_runs

    def save_after_the_other_part(*arguments):
        monkeypatch.setattr(mnist, "save_runs", save_runs)
        run_here(*SEVEN, "--output-dir", tmp_path, "--part", 0, 2)
        save_runs(*arguments)

    monkeypatch.setattr(mnist, "save_runs", save_after_the_other_part)
    line = error_here(*SEVEN, "--ratios", 0.3, 0.7, "--output-dir", tmp_path, "--part", 1, 2)
    assert f"cannot go on from {runs_dir(tmp_path)}" in line and "ratios [0.3, 0.8], not [0.3, 0.7]" in line
    assert files(tmp_path) == [] and all(run in runs_in(tmp_path) for run in runs_of_both_ratios(0, 2, 4, 6))


@pytest.mark.parametrize("part", [("--part", 0, 1), ("--part", 1, 2)], ids=str)
def test_jobs_with_different_settings_that_start_together(tmp_path, monkeypatch, part):
    """Neither takes the place of the other's runs; the slower one ends before it saves its first group."""
    one, out, save_runs, groups = tmp_path / "one", tmp_path / "out", mnist.save_runs, []
    other = [*SEVEN, "--epochs", 3, "--part", *((0, 2) if part[1] else (0, 1)), "--output-dir"]

    def save_after_the_other_job(trained, *arguments):
        monkeypatch.setattr(mnist, "save_runs", save_runs)
        run_here(*other, out)
        save_runs((groups.append(group) or group for group in trained), *arguments)

    monkeypatch.setattr(mnist, "save_runs", save_after_the_other_job)
    line = error_here(*SEVEN, "--output-dir", out, *part)
    assert f"cannot go on from {runs_dir(out)}" in line and "epochs" in line and len(groups) == 1
    run_here(*other, one)
    assert same_runs(out, one), "it has left nothing"
    assert part[1] or same_results(out, one)


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("what", ["a run", "folder"])
@pytest.mark.parametrize("part", [0, 1])
def test_what_cannot_be_read_is_not_taken_for_nothing(first_part, monkeypatch, part, what, error):
    """A run that is there but cannot be read must not be taken for missing."""
    before, path = contents(first_part), run_file(first_part, 1, 3)
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
        line = error_here(*SEVEN, "--output-dir", first_part, "--part", part, 3)
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
