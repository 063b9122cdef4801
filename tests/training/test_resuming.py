"""A run that was cut goes on bit for bit as if it had not been; averages, the best checkpoint, early stopping."""

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import StopAt, losses, new_hybrid, trainer
from transformers import AutoModelForMaskedLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from llada_trm_hf.recipes.run_setup import checkpoint_to_resume
from llada_trm_hf.training import MaskedDiffusionTrainingArguments

EVERYTHING = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 8,
    "use_ema": True,
    "ema_decay": 0.8,
    "use_muon": True,
    "random_length_probability": 0.3,
    "learn_padding": False,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
}


@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["plain", "everything"])
def test_resuming_gives_the_losses_and_weights_of_an_uninterrupted_run(tmp_path, samples, arguments):
    def start(folder: str, **more):
        model = new_hybrid(freeze_backbone=not arguments, attention_dropout=0.2 if arguments else 0.0)
        return trainer(model, tmp_path / folder, samples, max_steps=30, **arguments, **more)  # 20 steps an epoch

    whole = start("whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 13}
    first = start("cut", **saving)
    first.add_callback(StopAt(17))
    first.train()
    second = start("cut", **saving)
    second.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    assert losses(second) == losses(whole)
    for (name, resumed), uninterrupted in zip(second.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(resumed, uninterrupted), name
    rows = list(csv.DictReader((tmp_path / "cut" / "training_metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))


class Weights(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


def test_the_average_is_evaluated_and_saved(tmp_path, samples):
    model, weights = new_hybrid(), Weights()
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    exact = dict(average)
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6, "use_ema": True, "ema_decay": 0.7}
    run = trainer(model, tmp_path, samples, eval_strategy="steps", eval_steps=6, **arguments)
    run.add_callback(weights)
    run.train()
    for seen in weights.seen:
        average = {name: 0.7 * average[name] + 0.3 * seen[name] for name in average}
        exact = {name: exact[name].lerp(seen[name], 1 - 0.7) for name in exact}
    saved = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-6")
    saved.backbone.requires_grad_(False)
    state = load_file(tmp_path / "checkpoint-6" / "ema_state.safetensors")
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, average[name], msg=name)
        torch.testing.assert_close(saved.get_parameter(name), average[name], msg=name)
        assert (f"average.{name}" in state) == name.startswith("refiner."), name  # what is frozen has no average
        if name.startswith("refiner."):
            assert torch.equal(state[f"weights.{name}"], weights.seen[-1][name])
            assert torch.equal(state[f"average.{name}"], exact[name])
    logged = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert logged == [pytest.approx(trainer(saved, tmp_path / "again", samples).evaluate()["eval_loss"], rel=1e-5)]
    raw = new_hybrid()
    raw.load_state_dict(weights.seen[-1])
    assert logged[0] != pytest.approx(trainer(raw, tmp_path / "raw", samples).evaluate()["eval_loss"], rel=1e-4)


def test_the_average_of_bfloat16_weights_is_float32(tmp_path, samples):
    model, weights = new_hybrid().bfloat16(), Weights()
    average = {name: parameter.detach().float() for name, parameter in model.refiner.named_parameters()}
    run = trainer(model, tmp_path, samples, max_steps=3, use_ema=True, ema_decay=0.9)
    run.add_callback(weights)
    run.train()
    for seen in weights.seen:
        average = {name: average[name].lerp(seen[f"refiner.{name}"].float(), 1 - 0.9) for name in average}
    assert set(run.averages()) == {f"refiner.{name}" for name in average}
    for name, parameter in model.refiner.named_parameters():
        assert torch.equal(run.averages()[f"refiner.{name}"], average[name])
        assert torch.equal(parameter, average[name].bfloat16())


def test_another_choice_of_what_is_averaged_is_refused(tmp_path, samples):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(new_hybrid(), tmp_path, samples, use_ema=True, **arguments).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    arguments |= {"max_steps": 4, "resume_with_changes": True}
    with pytest.raises(ValueError, match="was made with use_ema"):
        trainer(new_hybrid(), tmp_path, samples, **arguments).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="other weights trainable"):
        trainer(new_hybrid(freeze_backbone=False), tmp_path, samples, use_ema=True, **arguments).train(
            resume_from_checkpoint=checkpoint
        )


class Worse(TrainerCallback):
    """Evaluations that get worse after the second one, as far as the Trainer knows."""

    def __init__(self, values):
        self.values = iter(values)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = next(self.values)


@pytest.mark.parametrize("more", [{}, {"use_ema": True, "ema_decay": 0.5}, {"save_backbone": False}])
def test_best_checkpoint_and_early_stopping(tmp_path, samples, more):
    new_hybrid().backbone.save_pretrained(tmp_path / "backbone")

    def start(folder: str, steps: int, values: list[float], patience: int = 2):
        model = new_hybrid()
        model.config.backbone_name_or_path = str(tmp_path / "backbone")
        run = trainer(
            model,
            tmp_path / folder,
            samples,
            max_steps=steps,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            early_stopping_patience=patience,
            early_stopping_threshold=0.1,
            **more,
        )
        run.callback_handler.callbacks.insert(0, Worse(values))
        return run

    run = start("run", 20, [3.0, 2.0, 2.5, 1.95, 1.0])  # 1.95 is no improvement of 0.1: patience of 2 ends
    run.train()
    assert run.state.global_step == 8
    assert run.state.best_metric == 1.95
    best = AutoModelForMaskedLM.from_pretrained(run.state.best_model_checkpoint)
    assert run.state.best_model_checkpoint.endswith("checkpoint-8")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, best.get_parameter(name)), name

    cut = start("cut", 20, [3.0, 2.0, 2.5])
    cut.add_callback(StopAt(6))
    cut.train()
    resumed = start("cut", 20, [2.6, 1.0, 1.0])
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    assert resumed.state.global_step == 8  # the bad evaluation before the cut counts
    assert resumed.state.best_model_checkpoint.endswith("checkpoint-4")
    best = AutoModelForMaskedLM.from_pretrained(resumed.state.best_model_checkpoint)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, best.get_parameter(name)), name

    again = start("cut", 20, [])
    again.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    assert again.state.global_step == 8  # it has stopped, and does not go on


# --- Damaged checkpoints, changed settings, full disks ---

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("run")
    trainer(new_hybrid(), folder, samples, **SAVING).train()
    return folder


@pytest.fixture
def copied_run(saved_run, tmp_path):
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed"])
def test_a_missing_or_damaged_file_is_named(copied_run, samples, name, damage):
    path = copied_run / "checkpoint-2" / name
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:half] + bytes(255 - byte for byte in content[half : half + 64]) + content[half + 64 :]
        path.write_bytes({"empty": b"", "cut": content[:half], "changed": flipped}[damage])
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} is (missing|damaged).*start a new run"):
        trainer(new_hybrid(), copied_run, samples, **SAVING).train(resume_from_checkpoint=f"{copied_run}/checkpoint-2")


def test_a_weights_file_that_is_cut_short_is_named(copied_run, samples):
    path = copied_run / "checkpoint-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint-2/model.safetensors is damaged or cut short"):
        trainer(new_hybrid(), copied_run, samples, **SAVING).train(resume_from_checkpoint=f"{copied_run}/checkpoint-2")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 1e-3}, r"learning_rate=0.003 \(now 0.001\)"),
        ({"per_device_train_batch_size": 8}, r"batch_size=16 \(now 8\)"),
        ({"seed": 1}, r"seed=42 \(now 1\)"),
        ({"max_steps": 6}, r"max_steps=4 \(now 6\)"),
        ({"weight_decay": 0.5}, r"weight_decay=0.0 \(now 0.5\)"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type='linear' \(now 'cosine'\)"),
        ({"random_length_probability": 0.5}, r"random_length_probability=0.0 \(now 0.5\)"),
        ({"samples": 10}, r"training data='320 rows, \w+' \(now '320 rows, \w+'\)"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(saved_run, tmp_path, samples, change, message):
    if "samples" in change:
        rows = samples.to_list()
        rows[10] = {**rows[10], "input_ids": list(reversed(rows[10]["input_ids"]))}
        samples, change = Dataset.from_list(rows), {}
    run = trainer(new_hybrid(), tmp_path, samples, **{**SAVING, **change})
    with pytest.raises(ValueError, match=f"was made with {message}.*--resume_with_changes"):
        run.train(resume_from_checkpoint=f"{saved_run}/checkpoint-2")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_last_checkpoint_is_resumed_takes_no_step_more(saved_run, tmp_path, samples):
    run = trainer(new_hybrid(), tmp_path, samples, **SAVING)
    run.train(resume_from_checkpoint=f"{saved_run}/checkpoint-4")
    assert run.state.global_step == 4
    for name, tensor in load_file(saved_run / "checkpoint-4" / "model.safetensors").items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


def test_what_does_not_change_the_weights_may_change(saved_run, tmp_path, samples):
    more = {"logging_steps": 2, "save_steps": 1, "save_total_limit": 1, "dataloader_num_workers": 0}
    run = trainer(new_hybrid(), tmp_path, samples, **{**SAVING, **more, "eval_strategy": "steps", "eval_steps": 2})
    run.train(resume_from_checkpoint=f"{saved_run}/checkpoint-2")
    assert run.state.global_step == 4


def test_a_changed_learning_rate_that_is_allowed_is_used(saved_run, tmp_path, samples):
    change = {"learning_rate": 5e-4, "weight_decay": 0.3, "max_steps": 8, "resume_with_changes": True}
    run = trainer(new_hybrid(), tmp_path, samples, **{**SAVING, **change})
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))

    run.add_callback(Rates())
    run.train(resume_from_checkpoint=f"{saved_run}/checkpoint-2")
    # Linear decay over 8 steps; 2 are done.
    assert [rate for rate, _ in rates] == pytest.approx([5e-4 * (8 - step) / 8 for step in range(2, 8)])
    assert {decay for _, decay in rates} == {0.3}


def test_a_checkpoint_of_an_earlier_version_tells_less(copied_run, tmp_path, samples):
    path = copied_run / "checkpoint-2" / "training_settings.json"
    settings = json.loads(path.read_text())
    del settings["run"]
    path.write_text(json.dumps(settings))
    resume = {"resume_from_checkpoint": f"{copied_run}/checkpoint-2"}
    for change in ({"learning_rate": 1e-3}, {"per_device_train_batch_size": 8}, {"seed": 1}, {"max_steps": 6}):
        with pytest.raises(ValueError, match="was made with"):
            trainer(new_hybrid(), tmp_path / "on", samples, **{**SAVING, **change}).train(**resume)
    run = trainer(new_hybrid(), tmp_path / "on", samples, **SAVING)
    run.train(**resume)
    assert run.state.global_step == 4


def test_the_last_complete_checkpoint_is_resumed(copied_run, samples, caplog):
    """Incomplete ones as earlier versions left them, and what a save that was killed leaves now."""
    (copied_run / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    shutil.copytree(copied_run / "checkpoint-2", copied_run / "checkpoint-10")
    (copied_run / "checkpoint-10" / "trainer_state.json").unlink()
    (copied_run / ".unfinished" / "checkpoint-3").mkdir(parents=True)
    (copied_run / "trainer_state.json").write_text("")
    arguments = MaskedDiffusionTrainingArguments(output_dir=str(copied_run), resume_from_checkpoint="true")
    with caplog.at_level("WARNING"):
        chosen = checkpoint_to_resume(arguments)
        assert chosen == str(copied_run / "checkpoint-2")
        run = trainer(new_hybrid(), copied_run, samples, **SAVING)
        run.train(resume_from_checkpoint=True)
    for name in ("checkpoint-4/trainer_state.json is damaged", "checkpoint-10/trainer_state.json is missing"):
        assert f"{name}" in caplog.text
    assert "while it saved checkpoint-3" in caplog.text
    assert run.state.global_step == 4 and not (copied_run / ".unfinished").exists()
    assert json.loads((copied_run / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    assert (copied_run / "checkpoint-10").is_dir()  # left alone


def test_a_failed_save_leaves_no_checkpoint_and_names_the_disk(tmp_path, samples, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = trainer(new_hybrid(), tmp_path, samples, **SAVING)
    monkeypatch.setattr(run, "_save_scaler", full)
    with pytest.raises(OSError, match=rf"could not write {tmp_path}/checkpoint-2: No space left") as caught:
        run.train()
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["training_metrics.csv"]
