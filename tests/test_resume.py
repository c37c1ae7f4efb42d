"""Runs that are continued, extended, interrupted or refused."""

import dataclasses
import os
import re
import shlex
from pathlib import Path

import conftest
import pytest
import torch
from test_train import FAST, assert_equal_runs, interrupt_in, read_json, refused, rows

import train
from recipes import RECIPES
from training import device
from training.checkpoint import load_checkpoint


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def edit_checkpoint(path, edit):
    checkpoint = torch.load(path)
    edit(checkpoint)
    torch.save(checkpoint, path)


def test_one_command_starts_a_run_and_continues_it(job, monkeypatch):
    command = [*FAST, "--epochs", 3, "--output-dir", "run", "--resume"]
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch", number=3)
        status, out, _ = job(*command)
    assert status == 130 and len(rows("run")) == 2
    printed = shlex.split(out.splitlines()[-1])
    assert printed == ["resume", "python", "train.py", *map(str, command)]
    assert job(*command)[0] == 0 and len(rows("run")) == 3
    status, out, err = job(*command)  # nothing is left to train
    assert (status, err) == (0, "") and "result" in out and len(rows("run")) == 3
    assert job(*[*FAST, "--epochs", 3, "--output-dir", "reference"])[0] == 0
    assert_equal_runs("run", "reference")


def test_a_directory_may_have_foreign_files_but_no_other_run(job):
    Path("run").mkdir()
    Path("run/slurm.out").write_text("mine")
    assert job(*FAST, "--output-dir", "run")[0] == 0
    before = contents("run")
    assert "--resume" in refused(job, 1, *FAST, "--seed", 1, "--output-dir", "run")
    refused(job, 2, *FAST, "--seed", 1, "--output-dir", "run", "--resume")
    assert contents("run") == before and before["slurm.out"] == b"mine"


def test_bare_resume_continues_the_run_that_was_saved_last_whatever_the_times_of_files(
    job, monkeypatch
):
    for name in ("older", "newer"):
        with monkeypatch.context() as patch:
            interrupt_in(patch, train, "train_epoch", number=2)
            assert job(*FAST, "--epochs", 2, "--output-dir", f"runs/{name}")[0] == 130
    for flags in ("--output-dir runs/finished", "--dry-run"):
        assert job(*FAST, *flags.split())[0] == 0
    for i, name in enumerate(["fast-dry-run", "finished", "newer", "older"]):  # as after a copy
        os.utime(f"runs/{name}/last.pt", (i, i))
    out = job("--resume", "", "--eval-only")[1]  # what a shell makes of "$RUN" if it is not set
    assert out.startswith("run      runs/finished/last.pt")
    for name in ("newer", "older"):
        assert f"saved    runs/{name}\n" in job("--resume")[1] and len(rows(f"runs/{name}")) == 2
    refused(job, 1, "--resume")
    assert "saved    runs/older\n" in job("--resume", "--epochs", 3)[1]


def test_a_run_whose_recipe_has_changed_is_not_continued(job, monkeypatch):
    assert job(*FAST, "--output-dir", "run")[0] == 0
    before = contents("run")
    for change in ({"lr": 0.5}, {"encoder": conftest.toy}, None):
        with monkeypatch.context() as patch:
            if change:
                changed = dataclasses.replace(RECIPES["fast"], **change)
                patch.setitem(RECIPES, "fast", changed)
            else:
                patch.delitem(RECIPES, "fast")
            refused(job, 2, "--resume", "run", "--epochs", 2)
        assert contents("run") == before
    changed = dataclasses.replace(RECIPES["fast"], description="faster", epochs=2)
    monkeypatch.setitem(RECIPES, "fast", changed)
    assert job("--resume", "run")[0] == 0 and len(rows("run")) == 2


def test_an_older_checkpoint_is_refused_before_training(job, monkeypatch):
    assert job(*FAST, "--output-dir", "run")[0] == 0
    edit_checkpoint("run/last.pt", lambda checkpoint: checkpoint.pop("format"))
    before = contents("run")
    monkeypatch.setattr(train, "train_epoch", None)
    for flags in ("--epochs 2", "--eval-only"):
        assert "run/last.pt" in refused(job, 1, "--resume", "run", *flags.split())
        assert contents("run") == before


def test_the_precision_is_kept_unless_a_flag_changes_it(job, toy_recipe, monkeypatch):
    def resume(*flags):
        epochs = len(rows("runs/toy")) + 1
        assert job("--resume", "runs/toy", "--epochs", epochs, *flags)[0] == 0
        return read_json("runs/toy")["flags"]["precision"]

    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    job("--recipe", "toy", "--batch-size", 100, "--device", "cpu", "--epochs", 1)
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: True)
    assert resume() == "fp32" and resume("--precision", "bf16") == "bf16" and resume() == "bf16"


def test_the_memory_layout_of_a_saved_optimizer_does_not_matter(job, monkeypatch):
    def make_contiguous(checkpoint):  # as a device saves it that has no other layout
        for state in checkpoint["optimizer"]["state"].values():
            for name, value in state.items():
                changed.append(not value.is_contiguous())
                state[name] = value.contiguous()

    flags = [*FAST, "--dry-run", "--epochs", 2, "--output-dir"]
    assert job(*flags, "uninterrupted")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch", number=2)
        assert job(*flags, "moved")[0] == 130
    changed = []
    edit_checkpoint("moved/last.pt", make_contiguous)
    assert any(changed) and job("--resume", "moved")[0] == 0
    assert_equal_runs("uninterrupted", "moved")


def test_a_run_from_a_gpu_continues_on_the_cpu(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patch:  # files written on a GPU name it for each tensor
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        assert job(*FAST, "--output-dir", "run")[0] == 0
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load("run/last.pt")
    assert job("--resume", "run", "--epochs", 2)[0] == 0


def test_a_run_finds_its_data_from_another_directory_or_says_where_it_was(
    job, workdir, monkeypatch
):
    assert job(*FAST, "--quiet", "--output-dir", "run")[0] == 0
    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir(workdir / "elsewhere")
    result = job("--resume", "../run", "--eval-only")
    assert result[::2] == (0, "")
    assert result[1].startswith("run      ../run/last.pt, epoch 1\nresult   test: digit ")
    (workdir / "data").rename("moved")
    assert job("--resume", "../run", "--eval-only", "--data-dir", "moved") == result
    for flags in (["--eval-only"], ["--epochs", 2]):
        err = refused(job, 1, "--resume", "../run", *flags)
        assert "--data-dir" in err and str(workdir / "data") in err
    assert not (workdir / "data").exists() and len(rows("../run")) == 1


def test_results_belong_to_the_last_checkpoint_when_an_extension_is_interrupted(job, monkeypatch):
    assert job(*FAST)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch", number=2)
        status, out, _ = job("--resume", "runs/fast", "--epochs", 3)
    assert status == 130 and len(rows("runs/fast")) == 2
    assert not Path("runs/fast/results.json").exists()
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["resume", "python", "train.py"] and job(*command[3:])[0] == 0
    assert read_json("runs/fast")["recipe"]["epochs"] == 3


# Signals


@pytest.mark.parametrize("number", range(1, 8))  # of the file that is written
def test_ctrl_c_while_an_epoch_is_saved_reports_the_epoch_that_is_saved(job, monkeypatch, number):
    interrupt_in(monkeypatch, os, "replace", number)
    status, out, _ = job(*FAST, "--epochs", 3, "--output-dir", "run")
    saved = len(load_checkpoint("run")["history"]) if Path("run/last.pt").exists() else 0
    assert status == 130 and f" {saved}/3" in re.search("interrupted.*", out)[0]
    assert ("resume   python" in out) == (saved > 0)


def test_after_an_early_ctrl_c_the_directory_is_there_and_can_be_used(job, monkeypatch):
    Path("mine").mkdir()
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "train_epoch")
        status, out, _ = job(*FAST, "--output-dir", "mine")
    assert status == 130 and "resume" not in out and "saved" not in out and Path("mine").is_dir()
    assert job(*FAST, "--output-dir", "mine")[0] == 0
