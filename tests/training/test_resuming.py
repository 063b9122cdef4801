"""A run that was cut goes on bit for bit as if it had not been; averages, the best checkpoint, early stopping."""

import csv

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import StopAt, losses, new_hybrid, trainer
from transformers import AutoModelForMaskedLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

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
