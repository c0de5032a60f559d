"""`python mnist.py` as a person meets it: a process with files, signals and an exit status."""

import errno
import fcntl
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    DIGITS,
    JOB,
    RESULTS,
    SCRIPT,
    SMALL,
    TINY,
    changed_script,
    contents,
    count,
    count_heldout,
    error_here,
    files,
    is_locked,
    load_script,
    messages,
    n_done,
    paused,
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
        runs_of_part=range(200),
        training=mnist.Training(10, 128, 0.1, 0.9, "float32"),
        epochs=10,
        batch_size=128,
        learning_rate=0.1,
        momentum=0.9,
        precision="float32",
        parallel_runs=None,
        part=[0, 1],
        checkpoint=Path("cscores-checkpoint.npz"),
        lock=Path("cscores.lock"),
        temporary=Path("cscores.tmp"),
    )


def test_smoke(finished):
    folder, out, err = finished
    assert f"JAX {jax.__version__} on 2 x cpu\n" in err
    assert re.search(r"subset ratio +0.3 +0.8", out) and re.search(r"mean C-score +0\.\d{4}", out)
    assert "held-out accuracy" in out and f"written to {folder}: " in out and "digits-examples.pdf" in out
    assert re.search(r"24 of 24 runs, \S+ left, ratio 0.8", err) and "tensorflow" not in (out + err).lower()
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


def test_the_bar_counts_runs_of_all_ratios_in_turn(tmp_path, capsys, monkeypatch):
    """So that the time left is right: runs at a high ratio take longer than those at a low one."""

    class EveryLine(mnist.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, mininterval=0, miniters=1)

    monkeypatch.setattr(mnist, "tqdm", EveryLine)
    run_here(*DIGITS, "--ratios", 0.1, 0.9, "--runs", 4, "--parallel-runs", 2, "--output-dir", tmp_path)
    line = r" *(\d+)%\|.{4}\| (\d) of 8 runs, \d\d:\d\d left, ratio (\S+), held-out accuracy (\d\.\d{4})"
    found = re.findall(line, capsys.readouterr().err)
    shown, accuracies = [each[:3] for each in found], [float(each[3]) for each in found]
    assert shown[:3] == [("25", "2", "0.1"), ("50", "4", "0.9"), ("75", "6", "0.1")]
    assert set(shown[3:]) == {("100", "8", "0.9")}
    with np.load(tmp_path / "cscores-checkpoint.npz") as counts:
        of_ratio = counts["n_correct"].sum(axis=1) / counts["n_heldout"].sum(axis=1)
    assert np.mean(accuracies[0:3:2]) == pytest.approx(of_ratio[0], abs=1e-4)
    assert np.mean(accuracies[1:4:2]) == pytest.approx(of_ratio[1], abs=1e-4)


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


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_as_process_1(finished, tmp_path, sign):
    """As in a container; there, a signal without a handler does nothing."""
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, and the right to")
    process = start_script(*JOB, "--output-dir", tmp_path, through=alone)
    checkpoint = tmp_path / "cscores-checkpoint.npz"
    wait_for_a_group(process, checkpoint)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), sign)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sign and "Traceback" not in err and time.monotonic() - begin < 10
    assert 2 <= n_done(checkpoint) < 24, f"it was not interrupted in the middle: {err}"
    run_here(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])


def test_a_finished_job_only_writes_its_results_again(finished, tmp_path):
    shutil.copy(finished[0] / "cscores-checkpoint.npz", tmp_path)
    out, err = run_script(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0]) and out.replace(str(tmp_path), "") == finished[1].replace(
        str(finished[0]), ""
    )
    assert "100%" in err and " 0%" not in err and "24 of 24 runs" in err


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


DROPOUT = [
    ("def predict(", "DROPOUT = 0.2\n\n\ndef predict("),
    (
        "    weights, biases = last\n",
        """    if key is not None:
        kept = jax.random.bernoulli(key, 1 - DROPOUT, activations.shape)
        activations = jnp.where(kept, activations / (1 - DROPOUT), 0)
    weights, biases = last
""",
    ),
]


@pytest.mark.parametrize(
    "old, new",
    [
        ("jax.nn.relu", "jax.nn.gelu"),
        ("hidden=(512, 256)", "hidden=(512, 255)"),
        (
            "return jnp.inner(x, weights)\n",
            "return jnp.inner(x, 0.99 * weights)\n",
        ),  # in what `predict` calls
        ("training.momentum * v + g", "training.momentum * (v + g)"),
        ("np.random.RandomState(run)", "np.random.RandomState(run + 1)"),  # other subsets
        ("draws.permutation(subset)", "subset"),  # the same subsets in another order
    ],
)
def test_another_algorithm_is_refused(tiny, tmp_path, old, new):
    out = shutil.copytree(tiny, tmp_path / "out")
    changed = load_script(changed_script(tmp_path, (old, new)))
    with pytest.raises(changed.Problem, match=r"made with algorithm [0-9a-f]+, not ") as caught:
        changed.main([*map(str, TINY), "--output-dir", str(out)])
    assert str(caught.value).count(", not ") == 1, "nothing else differs"
    assert same_results(out, tiny)


def test_another_rate_of_dropout_is_refused(tiny, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    load_script(changed_script(tmp_path, *DROPOUT)).main([*map(str, TINY), "--output-dir", str(first)])
    assert not same_results(first, tiny), "there is dropout"
    shutil.copytree(first, again)
    args = [*map(str, TINY), "--output-dir", str(again)]
    load_script(changed_script(tmp_path, *DROPOUT)).main(args)
    other = load_script(changed_script(tmp_path, *DROPOUT, ("DROPOUT = 0.2", "DROPOUT = 0.3")))
    with pytest.raises(other.Problem, match="made with algorithm "):
        other.main(args)
    assert same_results(again, first)


def test_edits_that_train_the_same_go_on(finished, tmp_path, capsys):
    run_here(*TINY, "--output-dir", tmp_path / "out")
    edits = [
        ("  # as in the authors' code", ""),
        ("    activations = images.reshape", "    # Pixels from 0 to 1.\n\n    activations = images.reshape"),
        ('"held-out accuracy"', '"accuracy"'),
        ("activations", "hidden_units"),  # in `predict`
    ]
    changed = load_script(changed_script(tmp_path, *edits))
    changed.main([*map(str, JOB), "--output-dir", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "accuracy" in out.splitlines()[-3] and "held-out" not in out.splitlines()[-3]
    assert same_results(tmp_path / "out", finished[0])


def test_a_script_from_stdin_goes_on_with_what_a_file_began(finished, tmp_path):
    run_here(*TINY, "--output-dir", tmp_path)
    with open(SCRIPT) as source:
        run_script(*JOB, "--output-dir", tmp_path, script="-", stdin=source)
    assert same_results(tmp_path, finished[0])


def test_a_file_that_is_edited_while_the_job_loads(tiny, tmp_path):
    """The job is that of the program that was started, and so is what its checkpoint says."""
    module = load_script(changed_script(tmp_path))
    changed_script(tmp_path, ("jax.nn.relu", "jax.nn.gelu"))
    module.main([*map(str, TINY), "--output-dir", str(tmp_path / "out")])
    assert same_results(tmp_path / "out", tiny)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "incomplete", "before parts"])
def test_a_damaged_checkpoint(finished, tmp_path, damage):
    path, whole = tmp_path / "cscores-checkpoint.npz", (finished[0] / "cscores-checkpoint.npz").read_bytes()
    with np.load(finished[0] / "cscores-checkpoint.npz") as file:
        counts = dict(file)
    if damage == "incomplete":
        np.savez(path, job=counts["job"], runs=counts["runs"], n_heldout=counts["n_heldout"])
    elif damage == "before parts":
        np.savez(path, settings=counts["job"], n_heldout=counts["n_heldout"], n_correct=counts["n_correct"])
    else:
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage]
        )
    before = path.read_bytes()
    line = error_here(*SMALL, "--output-dir", tmp_path)
    assert f"cannot go on from {path} (" in line and "use another --output-dir" in line
    assert path.read_bytes() == before


def test_disk_full(finished, tmp_path):
    out = tmp_path / "out"
    run_here(*SMALL, "--runs", 2, "--output-dir", out)
    before = contents(out)
    limit = ["bash", "-c", 'ulimit -f 20; exec "$@"', "limit"]  # KiB in one file; the checkpoint needs 29
    # As on Macs and on Python 3.14, where multiprocessing reports its locks as leaked if a job fails.
    code = "import multiprocessing; multiprocessing.set_start_method('forkserver')"
    (tmp_path / "sitecustomize.py").write_text(code)
    line = script_error(*JOB, "--output-dir", out, through=limit, env={"PYTHONPATH": str(tmp_path)})
    assert "File too large" in line and "use another --output-dir" in line and "parallel" not in line
    assert contents(out) == before
    run_here(*JOB, "--output-dir", out)
    assert same_results(out, finished[0])


def watch_the_disk(monkeypatch, folder, fails=None):
    """A list of what happens to files in a folder: ("fsync" or "replace", inode, bytes then, new name). Each
    fsync fails with the error that is given."""
    events, fsync, replace = [], os.fsync, os.replace

    def file_of(inode):
        return next((path for path in folder.iterdir() if path.stat().st_ino == inode), None)

    def watched_fsync(fd):
        inode = os.fstat(fd).st_ino
        if path := file_of(inode):
            events.append(("fsync", inode, path.read_bytes(), None))
            if fails:
                raise OSError(fails, os.strerror(fails))
        fsync(fd)

    def watched_replace(old, new, **kwargs):
        if Path(new).parent == folder:
            events.append(("replace", Path(old).stat().st_ino, Path(old).read_bytes(), Path(new).name))
        replace(old, new, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return events


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    """Else, after a power cut, neither need be there."""
    events = watch_the_disk(monkeypatch, tmp_path)
    run_here(*TINY, "--output-dir", tmp_path)
    names = [name for what, _, _, name in events if what == "replace"]
    assert names == ["cscores-checkpoint.npz"] * 2 + [*RESULTS, "digits-examples.pdf"]
    assert [what for what, *_ in events] == ["fsync", "replace"] * 5
    for (_, inode, content, _), (_, replaced, then, name) in zip(events[::2], events[1::2]):
        assert inode == replaced and content == then, "the very file, complete"
        if name == "cscores-checkpoint.npz":
            with np.load(io.BytesIO(content)) as counts:
                assert counts["n_correct"].shape == (2, 1797)
    assert contents(tmp_path).keys() == set(names)
    events.clear()
    mnist.write(tmp_path / "small", tmp_path / "small.tmp", lambda file: file.write(b"in a buffer"))
    assert [content for _, _, content, _ in events] == [b"in a buffer"] * 2


@pytest.mark.parametrize("error", ["EINVAL", "ENOTSUP"])
def test_a_file_system_without_fsync(tiny, tmp_path, monkeypatch, error):
    events = watch_the_disk(monkeypatch, tmp_path, fails=getattr(errno, error))
    run_here(*TINY, "--output-dir", tmp_path)
    assert len(events) == 10 and same_results(tmp_path, tiny)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_does_not_take_the_file(tiny, tmp_path, monkeypatch, error):
    out = shutil.copytree(tiny, tmp_path / "out")
    before = contents(out)
    watch_the_disk(monkeypatch, out, fails=getattr(errno, error))
    line = error_here(*SMALL, "--runs", 4, "--output-dir", out)
    assert line.startswith(f"cannot write {out / 'cscores-checkpoint.npz'} (")
    assert os.strerror(getattr(errno, error)) in line and line.endswith("use another --output-dir")
    assert contents(out) == before


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
        (["--precision", "float16"], "--precision"),
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
    with paused(first):
        for other in JOB, TINY:
            line = error_here(*other, "--output-dir", tmp_path)
            assert f"another job is at work in {tmp_path}" in line and "--part" in line
    assert first.communicate(timeout=120)[0] and first.returncode == 0
    assert "cscores.npy" in files(tmp_path)
    run_here(*JOB, "--output-dir", tmp_path)


def test_the_lock_goes_with_the_process(tmp_path):
    process = start_script(*JOB, "--output-dir", tmp_path)
    wait_for_a_group(process, tmp_path / "cscores-checkpoint.npz")
    process.kill()
    process.communicate()
    assert set(files(tmp_path)) <= {"cscores-checkpoint.npz", "cscores.tmp"}
    run_here(*JOB, "--output-dir", tmp_path)


def test_the_lock_goes_with_the_job(tmp_path):
    run_here(*TINY, "--output-dir", tmp_path)
    assert not is_locked(tmp_path / "cscores.lock")


@pytest.mark.parametrize("where", ["load", "draw_batches", "write_results"])
def test_a_notebook_whose_job_failed_does_not_keep_the_lock(tmp_path, monkeypatch, where):
    held = []

    def fail(*_, **__):
        held.append(is_locked(tmp_path / "cscores.lock"))
        raise mnist.Problem("failed")

    monkeypatch.setattr(mnist, where, fail)
    with pytest.raises(mnist.Problem, match="failed") as caught:
        run_here(*TINY, "--output-dir", tmp_path)
    assert set(held) == {True} and not is_locked(tmp_path / "cscores.lock")
    assert caught.tb, "as in a notebook, the frames of the job are still there"


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
        {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
        {"JAX_RANDOM_SEED_OFFSET": "1"},
        {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_LEGACY_PRNG_KEY": "error"},
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
    shutil.copy(tiny / "cscores-checkpoint.npz", tmp_path)  # nothing is left but to print
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


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(tiny, tmp_path, closed):
    if closed != ">&- 2>&-":  # which trains, too; for the others, what it prints is enough
        shutil.copy(tiny / "cscores-checkpoint.npz", tmp_path)
    through = ["bash", "-c", f'exec "$@" {closed}', "closed"]
    out, err = run_script(*TINY, "--output-dir", tmp_path, through=through)
    assert same_results(tmp_path, tiny) and messages(err) == []
    assert ("C-score" in out, "100%" in err) == (closed == "2>&-", closed == ">&-")


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
        (5, 100, 4, 8),
        (0, None, 1, 1),
    ):
        mesh, found = mnist.split_group(jax.devices(), n_runs, parallel_runs)
        assert (mesh.size, found) == (devices, group_size)
        assert list(mesh.devices) == jax.devices()[:devices]


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

    monkeypatch.setattr(jax, "device_put", fail)
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
    follow = {"training", "dataset_name", "runs_of_part", "checkpoint", "lock", "temporary"}
    for option in vars(mnist.parse_args([])).keys() - follow:
        assert f"--{option.replace('_', '-')} " in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_help(unbuffered):
    command = ["bash", "-c", f"set -o pipefail; '{sys.executable}' '{SCRIPT}' --help | true"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_too_old_a_python_or_jax_is_told_the_lowest_versions(monkeypatch):
    lowest_python = re.search(r"Python (3\.\d+) or later", (SCRIPT.parent / "README.md").read_text())[1]
    lowest_jax = re.search(r"^jax>=([\d.]+)$", (SCRIPT.parent / "requirements.txt").read_text(), re.M)[1]
    python, its_jax = (tuple(map(int, version.split("."))) for version in (lowest_python, lowest_jax))
    before_python, before_jax = ((*version[:1], version[1] - 1, 99) for version in (python, its_jax))

    def start(python, its_jax):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "version_info", python)
            patch.setattr(jax, "__version_info__", its_jax)
            return mnist.start_jax()

    assert start((*python, 0), its_jax) == jax.devices()
    for versions in (before_python, its_jax), ((*python, 0), before_jax):
        with pytest.raises(mnist.Problem) as caught:
            start(*versions)
        line = str(caught.value)
        assert f"Python {lowest_python} and JAX {'.'.join(map(str, its_jax[:2]))} or later" in line
        assert f"not Python {sys.version.split()[0]} and JAX {jax.__version__}" in line


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
