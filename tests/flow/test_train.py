"""The main job from start to end on the embedded photographs."""

import json
import math
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from commands import Hold, start
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny import TINY

from relloc.results import read_results
from relloc.tracking import read_journal, search


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "backbone.safetensors")


def test_the_whole_run(relloc, tmp_path):
    run_dir = tmp_path / "out"
    done = relloc("train", *TINY, "eval=[linear_fast,knn]", f"hydra.run.dir={run_dir}", fresh=True)
    assert done.code == 0, done.text

    rows = read_results(run_dir)
    pretext = [row for row in rows if row.eval == "pretext"]
    assert [(row.metric, row.split) for row in pretext] == [("top1", "held_out")]
    assert pretext[0].low is not None
    assert pretext[0].high is not None
    assert pretext[0].low <= pretext[0].value <= pretext[0].high
    five = {f"feature{number}" for number in range(1, 6)}
    for who in ("random", str(run_dir / "backbone.safetensors")):
        assert {
            row.layer for row in rows if row.eval == "linear_fast" and row.checkpoint == who
        } == five
        nearest = [row for row in rows if row.eval == "knn" and row.checkpoint == who]
        assert {row.layer for row in nearest} == five | {"avgpool"}
        assert "top1_k10" in {row.metric for row in nearest}
        assert "top1_k200" not in {row.metric for row in nearest}  # the bank has fewer images
    assert all(0 <= row.value <= 100 and row.n > 0 for row in rows)
    assert {(row.kind, row.protocol) for row in rows} == {
        ("pretext", "1.1"),
        ("frozen", "3.3"),
        ("frozen", "3.7"),
    }

    journal = read_journal(run_dir)
    losses = {
        entry.step: entry.metrics["train/loss"]
        for entry in journal
        if "train/loss" in entry.metrics
    }
    assert list(losses) == list(range(2, 17, 2))
    assert all(math.isfinite(loss) for loss in losses.values())
    monitored = [entry for entry in journal if "monitor/pretext/top1" in entry.metrics]
    assert monitored[0].step == 8  # the first epoch
    assert {"monitor/knn/feature4/top1_k20", "monitor/rankme/avgpool"} <= set(monitored[0].metrics)

    assert (run_dir / "patches.png").stat().st_size > 10_000
    assert (run_dir / "confusion" / "step_000000008.png").stat().st_size > 10_000
    assert set(weights(run_dir))
    for words in ("chance is 12.5 %", "pretrained", "random", "mlflow server", str(run_dir)):
        assert words in done.text

    (tracked,) = search(f"sqlite:///{tmp_path}/runs/mlflow.db", "relloc")
    assert tracked["metrics"]["linear_fast/feature4/top1"] == pytest.approx(
        next(row.value for row in rows if row.tracked_name == "linear_fast/feature4/top1")
    )
    assert "linear_fast_random/feature4/top1" in tracked["metrics"]
    assert tracked["params"]["grid.gap_px"] == 4
    assert tracked["status"] == "FINISHED"
    assert {"relloc.kind", "version.torch"} <= set(tracked["tags"])

    again = relloc("train", *TINY, "eval=[linear_fast,knn]", f"hydra.run.dir={run_dir}")
    assert again.code == 0, again.text
    assert read_results(run_dir) == rows  # nothing is trained, evaluated or written twice


def test_the_next_command_measures_what_the_training_measured(relloc, tmp_path):
    run_dir, after = tmp_path / "out", tmp_path / "after"
    own = ("seed=1", "eval=knn", "eval.knn.layers=[feature5]", "eval.knn.k=[5]")
    done = relloc("train", *TINY, *own, "tracking=none", f"hydra.run.dir={run_dir}")
    assert done.code == 0, done.text
    proposed = [line for line in done.text.splitlines() if line.startswith("next: ")][-1]
    module, *words = shlex.split(proposed)[3:]
    assert module == "relloc.evaluate"
    assert {"view.short_px=64", "view.crop_px=56", "seed=1"} <= set(words)

    # The fingerprint of a row covers the images, their view, the weights and the settings.
    alike = ("batch_norm=as_trained", "tracking=none", f"hydra.run.dir={after}")
    done = relloc("evaluate", *words, *alike)
    assert done.code == 0, done.text
    measured = {row.fingerprint for row in read_results(run_dir) if row.eval == "knn"}
    assert {row.fingerprint for row in read_results(after)} == measured
    assert len(measured) == 2  # trained and random weights


def test_seed_and_neutral_settings(relloc, tmp_path):
    base = (*TINY, "eval=[]", "tracking=none")
    relloc("train", *base, f"hydra.run.dir={tmp_path / 'a'}")
    relloc(
        "train",
        *base,
        f"hydra.run.dir={tmp_path / 'b'}",
        "workers=2",
        "report_every_steps=5",
        "save_every_s=0",
    )
    relloc("train", *base, f"hydra.run.dir={tmp_path / 'c'}", "seed=1")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert [row.eval for row in read_results(tmp_path / "a")] == ["pretext"]  # eval=[]


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_weights(relloc, tmp_path):
    small = (
        "model.backbone.widths=[8,8,8,8,8]",
        "model.head.hidden_dim=16",
        "monitor.every_epochs=null",
    )
    line = (*TINY, *small, "eval=[]", "tracking=none", "schedule.epochs=12", "report_every_steps=1")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert relloc("train", *line, f"hydra.run.dir={straight}").code == 0

    # 12 epochs of 8 steps, of which it does not end the last before the signal
    hold = Hold(function="relloc.tracking.journal:Journal.log", of="step", least=90)
    command = start("relloc.train", *line, f"hydra.run.dir={stopped}", folder=tmp_path, hold=hold)
    # Until the second step is reported. The report of the first comes just before the training
    # begins to wait for signals: one in between ends the run at once, with nothing to save.
    assert command.wait_for(lambda: len(read_journal(stopped)) >= 2), command.text
    os.kill(command.pid, signal.SIGINT)
    command.go_on()
    assert command.wait() == 130, command.text
    assert "everything is saved" in command.text
    assert not (stopped / "backbone.safetensors").exists()
    assert json.loads((stopped / "status.json").read_text())["status"] == "KILLED"

    resumed = relloc("train", *line, f"hydra.run.dir={stopped}")
    assert resumed.code == 0, resumed.text
    assert "resume" in resumed.text
    a, b = weights(straight), weights(stopped)
    assert all(torch.equal(a[name], b[name]) for name in a)

    other = relloc("train", *line, f"hydra.run.dir={stopped}", "grid.gap_px=5")
    assert other.code == 2
    assert "grid.gap_px was 4, now 5" in other.text
    assert (
        json.loads((stopped / "status.json").read_text())["status"] == "FINISHED"
    )  # the refusal changed nothing
    assert json.loads((stopped / "run.json").read_text())["params"]["grid.gap_px"] == 4


def test_a_dead_server_costs_nothing_and_sync_sends_the_rest(relloc, tmp_path):
    run_dir = tmp_path / "out"
    server = ("tracking=server", "tracking.uri=http://127.0.0.1:9")
    done = relloc("train", *TINY, "eval=[knn]", *server, f"hydra.run.dir={run_dir}")
    assert done.code == 0, done.text
    assert "python -m relloc.sync" in done.text
    assert {row.eval for row in read_results(run_dir)} == {"pretext", "knn"}

    store = f"sqlite:///{tmp_path}/later.db"
    sent = relloc("sync", str(run_dir), "--uri", store)
    assert sent.code == 0, sent.text
    (tracked,) = search(store, "relloc")
    assert "knn/avgpool/top1_k10" in tracked["metrics"]
    assert tracked["status"] == "FINISHED"


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(relloc, tmp_path):
    run_dir = tmp_path / "out"
    line = (*TINY, "eval=[]", "tracking=none", f"hydra.run.dir={run_dir}", "save_every_s=0")
    assert relloc("train", *line, "schedule.epochs=1", "schedule.milestone_epochs=[]").code == 0
    saved = sorted((run_dir / "checkpoints").iterdir())
    for file in ("backbone.safetensors", "results.jsonl"):
        (run_dir / file).unlink()

    def small_files_only() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    full = relloc(
        "train",
        *line,
        "schedule.epochs=1",
        "schedule.milestone_epochs=[]",
        fresh=True,
        preexec_fn=small_files_only,
    )
    assert full.code == 2, full.text
    assert "could not be written" in full.text
    assert "hydra.run.dir" in full.text
    assert sorted((run_dir / "checkpoints").iterdir()) == saved
    assert relloc("train", *line, "schedule.epochs=1", "schedule.milestone_epochs=[]").code == 0


def test_a_finished_run_writes_a_damaged_backbone_anew(relloc, tmp_path):
    run_dir = tmp_path / "out"
    line = (
        *TINY,
        "eval=[]",
        "tracking=none",
        f"hydra.run.dir={run_dir}",
        "schedule.epochs=1",
        "schedule.milestone_epochs=[]",
    )
    assert relloc("train", *line).code == 0
    file, note = run_dir / "backbone.safetensors", run_dir / "backbone.safetensors.sha256"
    whole, hashed = file.read_bytes(), note.read_bytes()
    others = {name: tensor + 1 for name, tensor in weights(run_dir).items()}
    with safe_open(file, framework="pt") as opened:
        of_others = save(others, metadata=opened.metadata())
    for content, noted in (
        (b"", hashed),
        (whole[: len(whole) // 2], None),
        (of_others, None),
        (whole, None),
    ):
        file.write_bytes(content)
        note.unlink()
        if noted:
            note.write_bytes(noted)
        again = relloc("train", *line)
        assert again.code == 0, again.text
        assert ("written anew" in again.text) == (content != whole)
        assert (file.read_bytes(), note.read_bytes()) == (whole, hashed)


def test_two_processes_share_one_run_folder(relloc, tmp_path):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    line = (*TINY, "recipe.images_per_batch_norm=8", "eval=[knn]", "tracking=none")
    done = relloc("train", *line, through=torchrun, fresh=True)
    assert done.code == 0, done.text
    (run_dir,) = (tmp_path / "runs").iterdir()  # named after the clock of one
    assert (run_dir / "backbone.safetensors").exists()
    assert done.text.count("chance is 12.5 %") == 1  # one of them speaks

    alone = tmp_path / "alone"
    relloc("train", *line, f"hydra.run.dir={alone}")
    together, accumulated = weights(run_dir), weights(alone)
    learned = [name for name in together if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(together[name], accumulated[name]) for name in learned)


def test_help_lists_groups_and_members_without_loading_torch_or_mlflow(relloc, environment):
    environment["PYTHONPROFILEIMPORTTIME"] = "1"
    for command in ("train", "evaluate"):
        done = relloc(command, "--help", fresh=True)
        assert done.code == 0
        assert "data: cityscapes, coco2017, folder, imagenette, in1k, inat18, " in done.text
        loaded = {
            line.rpartition("|")[2].strip()
            for line in done.text.splitlines()
            if "import time:" in line
        }
        assert "hydra" in loaded
        assert not loaded & {"torch", "torchvision", "mlflow", "matplotlib"}


def test_mistakes_end_in_one_message_before_anything_is_trained(relloc, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (["grid.gap_pxx=3"], "there is no setting grid.gap_pxx. Did you mean grid.gap_px?"),
        (["mdoel=resnet50"], "there is no setting mdoel. Did you mean model?"),
        (["data.root=/x"], "data.root here. It belongs to data=folder, data=cityscapes, "),
        (["data=in1k", "data.rot=/x"], "there is no setting data.rot. Did you mean data.root?"),
        (["pretext_batch_norm=sync"], "pretext_batch_norm is sync: give one of"),
        (["report_every_steps=0"], "report_every_steps is 0: give a whole number of 1 or more"),
        (["recipe.images_per_step=many"], "recipe.images_per_step=many is not a number"),
        (["eval.knn.layers=[stage4]"], "eval.knn.layers is ['stage4']"),
        (["optimizer.learning_rate=1"], "Did you mean optimizer.lr?"),
        (["grid=mmselfsupp"], "there is no grid=mmselfsupp. Did you mean mmselfsup?"),
        (["eval=[svm]"], "there is no eval=svm. There are card, card_classification, "),
        (["grid.gap_px=300"], "grid needs 813 px"),
        (["grid.gap_px=-1"], "grid.gap_px is -1"),
        (["data=in1k"], "set the environment variable RELLOC_IN1K"),
        (["data=folder", "data.root=/nowhere"], "data.root=/nowhere is not a folder"),
        (["data=folder", f"data.root={tmp_path / 'empty'}"], "there is no image to train on"),
        (
            ["recipe.images_per_step=100000", "recipe.images_per_batch_norm=1000"],
            "recipe.images_per_step=6000",
        ),
        (["schedule.milestone_epochs=[99]"], "never reached"),
        (["eval.knn.k=[]"], "eval.knn.k is []"),
        (["data.source.tiles=0.4"], "data.source.tiles is 0.4: give a list, [0.4]"),
        (["seed=-1"], "seed is -1: give a whole number"),
        (["workers=many"], "workers is many: give a whole number"),
        (["view.crop_px=300"], "view.crop_px 300 is larger than view.short_px 256"),
        (["device=tpu"], "device is tpu: give one of"),
        (["precision=bf16", "device=cpu"], "precision=bf16 is for GPUs"),
        (["images_per_forward=3"], "images_per_forward is 3, not a multiple of 64"),
        (["milestones=[99]"], "the run has no epoch 99"),
        (["batch_norm=frozen"], "batch_norm is ['frozen']: give a list of some of"),
    ]
    if not torch.cuda.is_available():
        cases.append((["device=cuda"], "torch finds no GPU"))
    for arguments, message in cases:
        done = relloc("train", *arguments, "tracking=none")
        assert done.code == 2, (arguments, done.text)
        assert message in done.text
        assert "Traceback" not in done.text
        assert "pretrain " not in done.text
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
