"""`python mnist.py` as a person meets it: a process with files, signals and an exit status."""

import json
import re
import runpy
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import (
    DIGITS,
    JOB,
    SCRIPT,
    SMALL,
    count,
    digits_trainer,
    do,
    errors,
    files,
    n_done,
    problem,
    refused,
    run,
    same_results,
    start,
    wait_for_a_group,
)

import mnist


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of a small job that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run(*JOB, "--output-dir", folder)


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
    brute = np.zeros_like(n_heldout)
    for k, ratio in enumerate((0.3, 0.8)):
        for i in range(12):
            subset = set(np.random.RandomState(i).choice(1797, round(1797 * ratio), replace=False))
            brute[k] += [example not in subset for example in range(1797)]
    assert np.array_equal(n_heldout, brute)
    assert np.array_equal(np.isnan(profile), n_heldout == 0)


def test_the_counts_are_those_of_single_runs(finished):
    train = digits_trainer(epochs=2)
    n_heldout, n_correct = count(np.concatenate([train([i], 0.3) for i in range(12)]))
    with np.load(finished[0] / "cscores-checkpoint.npz") as counts:
        assert np.array_equal(counts["n_heldout"][0], n_heldout)
        assert np.abs(counts["n_correct"][0] - n_correct).sum() <= 0.001 * n_correct.sum()


def test_figure(finished):
    pdf = (finished[0] / "digits-examples.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"%%EOF" in pdf[-8:]
    width, height = 21 * 10 * 72 / 50, 10 * 10 * 72 / 50  # cells of 10 pixels, 50 of which make an inch
    assert b"/MediaBox [ 0 0 %g %g ]" % (width, height) in pdf


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupt_and_resume(finished, tmp_path, sign):
    process = start(*JOB, "--output-dir", tmp_path)
    checkpoint = tmp_path / "cscores-checkpoint.npz"
    wait_for_a_group(process, checkpoint)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -sign and "Traceback" not in err
    assert 2 <= n_done(checkpoint) < 24, f"it was not interrupted in the middle: {err}"
    assert not (tmp_path / "cscores.npy").exists()
    do(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0])


def test_a_finished_job_only_writes_its_results_again(finished, tmp_path):
    shutil.copy(finished[0] / "cscores-checkpoint.npz", tmp_path)
    out, err = run(*JOB, "--output-dir", tmp_path)
    assert same_results(tmp_path, finished[0]) and out.replace(str(tmp_path), "") == finished[1].replace(
        str(finished[0]), ""
    )
    assert "100%" in err and " 0%" not in err


def test_extend_by_more_runs(finished, tmp_path, capsys):
    do(*SMALL, "--runs", 4, "--output-dir", tmp_path)
    assert n_done(tmp_path / "cscores-checkpoint.npz") == 8
    assert re.search(r"\b0%", capsys.readouterr().err)
    do(*JOB, "--output-dir", tmp_path)
    bar = capsys.readouterr().err
    assert re.search(r"\b33%", bar) and not re.search(r"\b0%", bar), "it starts where the shorter job ended"
    assert same_results(tmp_path, finished[0])
    before = (tmp_path / "cscores-checkpoint.npz").read_bytes()
    assert "12 runs" in refused(*SMALL, "--runs", 11, "--output-dir", tmp_path)
    assert (tmp_path / "cscores-checkpoint.npz").read_bytes() == before


def test_other_settings_than_the_checkpoints(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    other = ["--epochs", 3, "--batch-size", 64, "--momentum", 0.5, "--learning-rate", 1]
    line = refused(*DIGITS, "--ratios", 0.3, *other, "--runs", 12, "--output-dir", tmp_path / "out")
    for difference in (
        "ratios [0.3, 0.8], not [0.3]",
        "epochs 2, not 3",
        "batch_size 128, not 64",
        "momentum 0.9, not 0.5",
        "learning_rate 0.1, not 1.0",
    ):
        assert difference in line
    assert "dataset" not in line and same_results(tmp_path / "out", finished[0])


def test_other_data_than_the_checkpoints(finished, tmp_path):
    with np.load(finished[0] / "cscores-checkpoint.npz") as file:
        contents = dict(file)
    settings = json.loads(str(contents["settings"]))
    settings["content"] = "0" * 64
    np.savez(tmp_path / "cscores-checkpoint.npz", **contents | {"settings": json.dumps(settings)})
    assert "content 0000" in refused(*JOB, "--output-dir", tmp_path)


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
    line = refused(*SMALL, "--output-dir", tmp_path)
    assert f"cannot go on from {path} (" in line and "use another --output-dir" in line
    assert path.read_bytes() == before


def test_disk_full(finished, tmp_path):
    do(*SMALL, "--runs", 2, "--output-dir", tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    limit = ["bash", "-c", 'ulimit -f 20; exec "$@"', "limit"]  # KiB in one file; the checkpoint needs 29
    line = problem(*JOB, "--output-dir", tmp_path, through=limit)
    assert "File too large" in line and "use another --output-dir" in line and "parallel" not in line
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    do(*JOB, "--output-dir", tmp_path)
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
        do(*DIGITS, "--output-dir", tmp_path, *args)
    line = capsys.readouterr().err
    assert caught.value.code == 2 and says in line and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", [0.0001, 0.9999])
def test_ratios_that_do_not_suit_the_data(tmp_path, ratio):
    line = refused(*DIGITS, "--output-dir", tmp_path, "--ratios", 0.5, ratio)
    assert "--ratios: each must leave some of the 1797 examples in, and some out" in line
    assert files(tmp_path) == []


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    line = problem(*SMALL, "--output-dir", tmp_path / "file")
    assert f"File exists: '{tmp_path / 'file'}'" in line and "use another --output-dir" in line
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_out_of_memory(tmp_path, capfd, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", fail)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(sys, "argv", ["mnist.py", *DIGITS, "--output-dir", str(tmp_path)])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    signal.signal(signal.SIGINT, handler)
    (line,) = errors(capfd.readouterr().err)
    assert "Out of memory" in line and "fewer --parallel-runs" in line


def test_examples_never_held_out_are_nan_and_said(tmp_path, capsys):
    do(*DIGITS, "--ratios", 0.9, "--runs", 2, "--epochs", 1, "--output-dir", tmp_path)
    out = capsys.readouterr().out
    missing = np.isnan(np.load(tmp_path / "cscores.npy")).sum()
    assert missing > 1000 and f"examples that no run held out: {missing}" in out


def test_help_shows_every_setting(tmp_path):
    out, _ = run("--help", cwd=tmp_path)
    for option in vars(mnist.parse_args([])).keys() - {"training", "name"}:
        assert f"--{option.replace('_', '-')} " in out
    assert list(tmp_path.iterdir()) == []


def test_importing_has_no_side_effects(tmp_path):
    code = (
        "import sys, mnist, jax; "
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; jax.config.update('jax_num_cpu_devices', 2); assert jax.device_count() == 2"
    )
    env = {"PYTHONPATH": str(SCRIPT.parent), "JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
    assert list(tmp_path.iterdir()) == []
