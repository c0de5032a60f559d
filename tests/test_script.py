"""`python mnist.py` as a person meets it: a process with files, signals and an exit status."""

import errno
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
    copy_runs,
    correctness_of_runs,
    count,
    count_heldout,
    error_here,
    files,
    load_script,
    messages,
    n_done,
    run_file,
    run_here,
    run_script,
    runs_dir,
    same_results,
    same_runs,
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
        training=mnist.Training(10, 128, 0.1, 0.9, "float32"),
        epochs=10,
        batch_size=128,
        learning_rate=0.1,
        momentum=0.9,
        precision="float32",
        parallel_runs=None,
        part=[0, 1],
        runs_dir=Path("cscores-runs"),
    )


def test_smoke(finished):
    folder, out, err = finished
    assert f"JAX {jax.__version__} on 2 x cpu\n" in err
    assert re.search(r"subset ratio +0.3 +0.8", out) and re.search(r"mean C-score +0\.\d{4}", out)
    assert "held-out accuracy" in out and f"written to {folder}: " in out and "digits-examples.pdf" in out
    assert re.search(r"24/24 .*run/s, accuracy=0\.\d+, failed=0, ratio=0.8\]", err)
    assert "tensorflow" not in (out + err).lower()
    assert files(folder) == ["cscores-orig-order.npz", "cscores.npy", "digits-examples.pdf"]
    assert n_done(folder) == 24


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
    names = "cscores.npy, cscores-orig-order.npz, digits-examples.pdf"
    assert written == f"written to {folder}: {names}"
    assert np.array_equal(count(correctness_of_runs(folder)), [n_heldout, n_correct])


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
    line = r"(\d+)%\|[^|]*\| (\d)/8 \[[^\]]*run[^\]]*, accuracy=(0\.\d+), failed=0, ratio=(\S+)\]"
    found = re.findall(line, capsys.readouterr().err)
    shown, accuracies = [(*each[:2], each[3]) for each in found], [float(each[2]) for each in found]
    assert shown[:3] == [("25", "2", "0.1"), ("50", "4", "0.9"), ("75", "6", "0.1")]
    assert set(shown[3:]) == {("100", "8", "0.9")}
    n_heldout, n_correct = count(correctness_of_runs(tmp_path))
    of_ratio = n_correct.sum(axis=1) / n_heldout.sum(axis=1)
    assert np.mean(accuracies[0:3:2]) == pytest.approx(of_ratio[0], abs=1e-3)
    assert np.mean(accuracies[1:4:2]) == pytest.approx(of_ratio[1], abs=1e-3)


def test_what_is_saved_is_the_correctness_of_single_runs(finished):
    single = np.concatenate([train_digits(range(i, i + 1), 0.3, epochs=2) for i in range(12)])
    saved = correctness_of_runs(finished[0])[0]
    assert saved.dtype == np.int8 and np.array_equal(saved < 0, single < 0)
    assert (saved != single).sum() <= 0.001 * (saved == 1).sum()


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
    assert "accuracy=0, failed=4, ratio=0.5" in capsys.readouterr().err


# --- Saved runs and interruptions ---
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupt_and_resume(finished, tmp_path, sign):
    process = start_script(*JOB, "--output-dir", tmp_path)
    wait_for_a_group(process, tmp_path)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-sign if sign == signal.SIGKILL else 128 + sign) and "Traceback" not in err
    assert 1 <= n_done(tmp_path) < 24, f"it was not interrupted in the middle: {err}"
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
    wait_for_a_group(process, tmp_path)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), sign)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sign and "Traceback" not in err and time.monotonic() - begin < 10
    assert 1 <= n_done(tmp_path) < 24, f"it was not interrupted in the middle: {err}"
    run_here(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])


def test_a_finished_job_only_writes_its_results_again(finished, tmp_path):
    copy_runs(finished[0], tmp_path)
    out, err = run_script(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])
    assert out.replace(str(tmp_path), "") == finished[1].replace(str(finished[0]), "") and "run" not in err


def test_extend_by_more_runs(finished, tmp_path, capsys):
    run_here(*SMALL, "--runs", 4, "--output-dir", tmp_path)
    assert n_done(tmp_path) == 8 and "8/8" in capsys.readouterr().err
    run_here(*JOB, "--output-dir", tmp_path)
    assert "16/16" in capsys.readouterr().err, "the others were there"
    assert same_results(tmp_path, finished[0]) and same_runs(tmp_path, finished[0])
    before = contents(tmp_path)
    assert "of a job of --runs 12 or more" in error_here(*SMALL, "--runs", 11, "--output-dir", tmp_path)
    assert contents(tmp_path) == before


def test_other_settings_than_those_of_the_saved_runs(finished, tmp_path):
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
    assert "dataset" not in line and contents(tmp_path / "out") == contents(finished[0])


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
    assert contents(out) == contents(tiny)


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


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "incomplete", "not its name"])
def test_a_damaged_run(finished, tmp_path, damage):
    copy_runs(finished[0], tmp_path)
    path = run_file(tmp_path, 1, 7)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "incomplete":
        np.savez(path, job=arrays["job"])
    elif damage == "not its name":
        path = path.rename(runs_dir(tmp_path) / "1-7 (copy).npz")
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a run"}[damage])
    before = contents(tmp_path)
    line = error_here(*JOB, "--output-dir", tmp_path)
    assert f"cannot go on from {path} (" in line and "use another --output-dir" in line
    assert contents(tmp_path) == before


def test_what_a_killed_process_leaves_is_no_run(finished, tmp_path):
    copy_runs(finished[0], tmp_path)
    left = runs_dir(tmp_path) / "tmp1234"
    left.mkdir()
    run_file(tmp_path, 0, 3).rename(left / "0-3.npz")
    run_here(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])


def test_disk_full(finished, tmp_path):
    out = tmp_path / "out"
    run_here(*SMALL, "--runs", 2, "--output-dir", out)
    before = contents(out)
    limit = ["bash", "-c", 'ulimit -f 1; exec "$@"', "limit"]  # KiB in one file; a run needs more
    # As on Macs and on Python 3.14, where multiprocessing reports its locks as leaked if a job fails.
    code = "import multiprocessing; multiprocessing.set_start_method('forkserver')"
    (tmp_path / "sitecustomize.py").write_text(code)
    line = script_error(*JOB, "--output-dir", out, through=limit, env={"PYTHONPATH": str(tmp_path)})
    assert "File too large" in line and "mend that and retry" in line and "parallel" not in line
    assert contents(out) == before
    run_here(*JOB, "--output-dir", out)
    assert same_results(out, finished[0])


def watch_the_disk(monkeypatch, folder, fails=None):
    """A list of what happens to files in a folder: ("fsync" or "replace", inode, bytes then, new name). Each
    fsync fails with the error that is given."""
    events, fsync, replace = [], os.fsync, os.replace

    def file_of(inode):
        return next((path for path in folder.rglob("*") if path.stat().st_ino == inode), None)

    def watched_fsync(fd):
        inode = os.fstat(fd).st_ino
        if path := file_of(inode):
            events.append(("fsync", inode, path.read_bytes(), None))
            if fails:
                raise OSError(fails, os.strerror(fails))
        fsync(fd)

    def watched_replace(old, new, **kwargs):
        if Path(new).is_relative_to(folder):
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
    assert names == ["0-0.npz", "0-1.npz", "1-0.npz", "1-1.npz", *RESULTS, "digits-examples.pdf"]
    assert [what for what, *_ in events] == ["fsync", "replace"] * 7
    for (_, inode, content, _), (_, replaced, then, name) in zip(events[::2], events[1::2]):
        assert inode == replaced and content == then, "the very file, complete"
        if name == "0-0.npz":
            with np.load(io.BytesIO(content)) as run:
                assert run["correctness"].shape == (1797,)
    assert contents(tmp_path).keys() == {
        "cscores-runs",
        *(f"cscores-runs/{name}" for name in names[:4]),
        *names[4:],
    }
    events.clear()
    mnist.write(tmp_path / "small", lambda file: file.write(b"in a buffer"))
    assert [content for _, _, content, _ in events] == [b"in a buffer"] * 2


@pytest.mark.parametrize("error", ["EINVAL", "ENOTSUP"])
def test_a_file_system_without_fsync(tiny, tmp_path, monkeypatch, error):
    events = watch_the_disk(monkeypatch, tmp_path, fails=getattr(errno, error))
    run_here(*TINY, "--output-dir", tmp_path)
    assert len(events) == 14 and same_results(tmp_path, tiny)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_does_not_take_the_file(tiny, tmp_path, monkeypatch, error):
    out = shutil.copytree(tiny, tmp_path / "out")
    before = contents(out)
    watch_the_disk(monkeypatch, out, fails=getattr(errno, error))
    line = error_here(*SMALL, "--runs", 4, "--output-dir", out)
    assert line.startswith(f"cannot write {run_file(out, 0, 2)} (")
    assert os.strerror(getattr(errno, error)) in line and line.endswith("mend that and retry")
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
    assert line.startswith(f"cannot use {tmp_path / 'file' / 'cscores-runs'} (") and "Not a directory" in line
    assert line.endswith("use another --output-dir")
    assert (tmp_path / "file").read_text() == "mine" and [file.name for file in tmp_path.iterdir()] == [
        "file"
    ]
    if sys.platform == "linux":
        assert error_here(*SMALL, "--output-dir", "/proc/nowhere").startswith("cannot use /proc/nowhere/")


def test_a_current_folder_that_is_deleted(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    through = ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "gone"]
    assert script_error(*SMALL, through=through, cwd=gone).startswith("mnist.py: cannot use cscores-runs (")


# --- The machine and its environment ---
@pytest.mark.parametrize(
    "env",
    [
        {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
        {"JAX_RANDOM_SEED_OFFSET": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
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
    copy_runs(tiny, tmp_path)  # nothing is left but to print
    words = " ".join(f"'{word}'" for word in [sys.executable, SCRIPT, *TINY, "--output-dir", tmp_path])
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", f"set -o pipefail; {words} {then}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    if "full" in then:
        (line,) = messages(done.stderr)
        assert done.returncode == 1 and line.startswith("mnist.py: ") and "No space left on device" in line
    else:
        assert done.returncode in (0, 141) and messages(done.stderr) == []
        assert done.returncode == 141 or "head" in then, "as if SIGPIPE had ended it"
    assert same_results(tmp_path, tiny)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(tiny, tmp_path, closed):
    if closed != ">&- 2>&-":  # which trains, too; for the others, what it prints is enough
        copy_runs(tiny, tmp_path)
    through = ["bash", "-c", f'exec "$@" {closed}', "closed"]
    out, err = run_script(*TINY, "--output-dir", tmp_path, through=through)
    assert same_results(tmp_path, tiny) and messages(err) == []
    assert ("C-score" in out, "JAX" in err) == (closed == "2>&-", closed == ">&-")


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
        mesh, found = mnist.plan_groups(jax.devices(), n_runs, parallel_runs)
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
    monkeypatch.setattr(sys, "argv", ["mnist.py", *map(str, TINY), "--output-dir", str(tmp_path)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("MPLBACKEND", "agg")  # which the script removes
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (line,) = messages(capfd.readouterr().err)
    assert "Out of memory" in line and "fewer --parallel-runs" in line


def test_help_shows_every_setting(tmp_path):
    out, _ = run_script("--help", cwd=tmp_path)
    follow = {"training", "dataset_name", "runs_dir"}
    for option in vars(mnist.parse_args([])).keys() - follow:
        assert f"--{option.replace('_', '-')} " in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_help(unbuffered):
    command = ["bash", "-c", f"set -o pipefail; '{sys.executable}' '{SCRIPT}' --help | true"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


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
        assert f"needs Python {lowest_python}, JAX {'.'.join(map(str, its_jax[:2]))} or later" in line
        assert f"not {sys.version.split()[0]}, {jax.__version__}" in line


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
