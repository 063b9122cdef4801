"""TRMTrainer against a training loop written out in plain PyTorch, and against recorded numbers of llm-trm."""

import copy
import csv
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import metrics, run_two_processes
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig, SequenceTRM, SequenceTRMConfig
from llada_trm_hf.cli.main import main
from llada_trm_hf.hidden_pairs import HiddenPairsCollator
from llada_trm_hf.hub import import_legacy
from llada_trm_hf.hub.files import write_atomically
from llada_trm_hf.recipes.recipe import load_recipe
from llada_trm_hf.training import TRMTrainer, TRMTrainingArguments
from llada_trm_hf.training.trm_trainer import SupervisionSampler

WIDTH, STEPS = 8, 3
SIZES = {"hidden_size": WIDTH, "n_heads": 2, "intermediate_size": 12, "n_latent_steps": 2, "n_deep_recursions": 2}


def make_pairs(number: int = 10, seed: int = 0, width: int = WIDTH) -> list[dict]:
    """Contexts of different lengths; the target is a fixed linear map of the last state, so it can be learned."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    pairs = []
    for index in range(number):
        context = torch.randn(2 + index % 4, width, generator=generator)
        pairs.append({"context": context, "target": context[-1] @ matrix, "id": f"pair-{index}"})
    return pairs


def make_model(seed: int = 0, **config) -> SequenceTRM:
    torch.manual_seed(seed)
    return SequenceTRM(SequenceTRMConfig(**SIZES | {"n_supervision_steps": STEPS, "dropout": 0.0} | config))


def make_trainer(folder: Path, model=None, pairs=None, held_out=None, callbacks=None, optimizers=(None, None), **more):
    arguments = {
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TRMTrainer(
        model if model is not None else make_model(),
        TRMTrainingArguments(output_dir=str(folder), **arguments | more),
        train_dataset=make_pairs() if pairs is None else pairs,
        eval_dataset=held_out,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def logged(trainer: TRMTrainer, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row]


# --- The same in a plain loop ---


def plain_loop(model, batches, arguments: TRMTrainingArguments, max_steps: int, micro_batches: int = 1):
    """Losses, and the weights and their average after `max_steps` supervision steps on groups of micro-batches."""
    model = copy.deepcopy(model).train()
    norms_and_biases = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n.lower()]
    plain = {id(p) for p in norms_and_biases}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in plain], "weight_decay": arguments.weight_decay},
        {"params": norms_and_biases, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, arguments.adam_beta2), eps=1e-8)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, step = [], 0
    for number in range(0, len(batches), micro_batches):
        group = batches[number : number + micro_batches]
        carry = [(None, None)] * len(group)
        for _ in range(model.config.n_supervision_steps):
            if step == max_steps:
                return losses, model, average
            optimizer.zero_grad()
            total = 0.0
            for part, batch in enumerate(group):
                y, z = carry[part]
                outputs = model(batch["context"], batch["mask"], y, z, batch["target"])
                carry[part] = (outputs.y, outputs.z)
                (outputs.loss / len(group)).backward()
                total += outputs.loss.item() / len(group)
            torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
            for parameters in optimizer.param_groups:  # linear decay to zero, counted in optimizer steps
                parameters["lr"] = arguments.learning_rate * (1 - step / max_steps)
            optimizer.step()
            for name, p in model.named_parameters():
                average[name] = arguments.ema_decay * average[name] + (1 - arguments.ema_decay) * p.detach()
            losses.append(total)
            step += 1
    return losses, model, average


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_is_the_plain_loop(tmp_path, micro_batches):
    pairs = make_pairs()
    trainer = make_trainer(
        tmp_path,
        pairs=pairs,
        max_steps=12 if micro_batches == 1 else 6,
        per_device_train_batch_size=4 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=6,
    )
    by_id = {pair["id"]: pair for pair in pairs}
    order = watch(trainer)
    start = copy.deepcopy(trainer.model)
    trainer.train()
    assert len(order) == trainer.state.global_step * micro_batches
    groups = [order[i : i + micro_batches] for i in range(0, len(order), micro_batches)]
    for first in range(0, len(groups), STEPS):  # each group comes STEPS times
        assert groups[first] == groups[first + 1] == groups[first + 2]
    batches = [HiddenPairsCollator()([by_id[i] for i in ids]) for g in groups[::STEPS] for ids in g]
    steps = trainer.state.max_steps
    losses, model, average = plain_loop(start, batches, trainer.args, steps, micro_batches)
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    for name, parameter in trainer.model.named_parameters():  # after training, the model is the average
        torch.testing.assert_close(parameter, average[name], rtol=1e-4, atol=1e-6)
    state = load_file(tmp_path / f"checkpoint-{steps}" / "ema_state.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[f"weights.{name}"], parameter.detach(), rtol=1e-4, atol=1e-6)
    saved = SequenceTRM.from_pretrained(tmp_path / f"checkpoint-{steps}")
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-4, atol=1e-6)
    assert any((average[name] - p).abs().max() > 1e-3 for name, p in model.named_parameters())


def watch(trainer: TRMTrainer) -> list[list[str]]:
    """A list that will hold the ids of every micro-batch the trainer computes a loss for."""
    seen, compute_loss = [], trainer.compute_loss

    def remember(model, inputs, *args, **kwargs):
        seen.append(inputs["ids"])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = remember
    return seen


def test_golden_five_updates(tmp_path, llm_trm):
    """The recorded losses of five updates, through the trainer: AdamW on all parameters, clipping, EMA off."""
    facts = json.loads((llm_trm / "manifest.json").read_text())
    (facts,) = [entry["train"] for entry in facts["trms"]]
    model = import_legacy(llm_trm / "trm_a_legacy.pt", use_ema=False)
    model.config.dropout = 0.0
    model = SequenceTRM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    recorded = load_file(llm_trm / "trm_a_eval.safetensors")
    pairs = [
        {"context": context[:length], "target": target, "id": str(row)}
        for row, (context, length, target) in enumerate(
            zip(recorded["contexts"], recorded["lengths"].tolist(), recorded["targets"])
        )
    ]
    settings = {name: value for name, value in facts["optimizer"].items() if name not in ("name", "clip_norm")}
    trainer = make_trainer(
        tmp_path,
        model,
        pairs,
        optimizers=(torch.optim.AdamW(model.parameters(), **settings), None),
        max_steps=5,
        per_device_train_batch_size=len(pairs),
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=facts["optimizer"]["clip_norm"],
        use_ema=False,
        n_supervision_steps=5,
        bce_halt_loss=True,
        halt_threshold=facts["halt_threshold"],
        halt_loss_weight=facts["halt_loss_weight"],
    )
    trainer.train()
    expected = facts["results"]["updates5_token_refreshed"]
    assert logged(trainer) == pytest.approx(expected["losses"], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx(expected["grad_norms_before_clip"], rel=1e-4)


def test_random_depth_before_the_first_step_of_a_batch(tmp_path):
    """Steps without gradient change the start of a batch, never the steps after its first."""
    settings = {"max_free_steps": 3, "free_steps_probability": 1.0, "dropout": 0.0}
    trainer = make_trainer(tmp_path, make_model(**settings), max_steps=9, learning_rate=0.0)
    calls, forward, per_step = [], trainer.model.net.forward, 2 * (2 + 1)  # recursions of 2 updates of z and one of y
    trainer.model.net.forward = lambda *args: calls.append(trainer.state.global_step) or forward(*args)
    trainer.train()
    counts = [calls.count(step) // per_step for step in range(9)]
    assert len(calls) == per_step * sum(counts)
    assert all(count == 1 for step, count in enumerate(counts) if step % STEPS)
    assert all(2 <= count <= 4 for count in counts[::STEPS]) and len(set(counts[::STEPS])) > 1


# --- Batches and schedule ---


@pytest.mark.parametrize(
    "parts, size, drop_last", [(1, 4, False), (2, 2, False), (4, 1, False), (2, 3, True), (4, 4, False)]
)
def test_sampler_gives_every_process_each_group_again_and_again(parts, size, drop_last):
    sampler = SupervisionSampler(range(10), size, num_parts=parts, num_repeats=STEPS, drop_last=drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    seen = []
    for first in range(0, len(batches), parts * STEPS):
        repeats = [batches[first + s * parts : first + (s + 1) * parts] for s in range(STEPS)]
        assert repeats[0] == repeats[1] == repeats[2]
        assert len({len(batch) for batch in repeats[0]}) == 1
        seen += [index for batch in repeats[0] for index in batch]
    whole = 10 // (parts * size) * parts * size
    assert seen[:whole] == list(range(whole))
    if drop_last:
        assert len(seen) == whole
    else:
        assert set(seen) == set(range(10)) and len(seen) < 10 + parts


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_is_read_once_for_all_its_steps(tmp_path, accumulate):
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    trainer = make_trainer(
        tmp_path,
        pairs=Counted(make_pairs(32)),
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=16 // accumulate,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    assert trainer.state.global_step == 2 * 2 * STEPS and Counted.reads == 2 * 32


def test_steps_epochs_and_schedule_count_optimizer_steps(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2, learning_rate=1.0, max_grad_norm=1e-9)
    trainer.add_callback(rates := Rates())
    trainer.train()
    assert trainer.state.max_steps == 2 * 3 * STEPS  # 10 pairs are 3 batches
    assert rates.values == pytest.approx([1 - (s + 1) / 18 for s in range(18)])
    rows = list(csv.DictReader((tmp_path / "training_metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 19))
    assert all(
        row[name] for row in rows for name in ("mse_loss", "halt_loss", "cosine_similarity", "halt_probability")
    )


class Rates(TrainerCallback):
    """The learning rate after every optimizer step."""

    def __init__(self):
        self.values = []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.values.append(lr_scheduler.get_last_lr()[0])


def test_one_update_per_batch_is_the_mean_over_the_steps(tmp_path):
    pairs = make_pairs(4)
    trainer = make_trainer(tmp_path, pairs=pairs, max_steps=1, per_step_updates=False, use_ema=False)
    model = copy.deepcopy(trainer.model).train()
    batch = HiddenPairsCollator()(pairs)
    y = z = None
    losses = []
    for _ in range(STEPS):
        outputs = model(batch["context"], batch["mask"], y, z, batch["target"])
        y, z = outputs.y, outputs.z
        losses.append(outputs.loss)
    expected = torch.stack(losses).mean()
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    trainer.train()
    assert logged(trainer) == pytest.approx([expected.item()], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([norm.item()], rel=1e-4)
    assert trainer.state.global_step == 1


def test_options_change_the_config_and_are_checked(tmp_path):
    trainer = make_trainer(
        tmp_path,
        bce_halt_loss=False,
        halt_threshold=0.3,
        halt_loss_weight=0.1,
        n_latent_steps=4,
        n_deep_recursions=5,
        n_trained_recursions=2,
        max_free_steps=3,
        free_steps_probability=0.25,
    )
    config = trainer.model.config
    assert (config.n_trained_recursions, config.max_free_steps, config.free_steps_probability) == (2, 3, 0.25)
    assert (config.halt_loss, config.cosine_threshold, config.halt_loss_weight) == ("mse", 0.3, 0.1)
    assert (config.n_latent_steps, config.n_deep_recursions, config.n_supervision_steps) == (4, 5, STEPS)
    for wrong, message in (
        ({"n_supervision_steps": 0}, "n_supervision_steps must be at least 1, got 0"),
        ({"max_free_steps": -1}, "max_free_steps must be 0 or more, got -1"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, got 1.0"),
        ({"halt_threshold": 2.0}, "halt_threshold is a cosine"),
        ({"early_stopping_patience": 2}, "needs evaluations and a metric"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **wrong)


def test_training_learns(tmp_path):
    trainer = make_trainer(
        tmp_path,
        make_model(),
        make_pairs(1000),
        make_pairs(64, seed=1),
        max_steps=900,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        ema_decay=0.98,
        logging_steps=100,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_r2"] > 0.3


# --- Halting threshold ---


def test_threshold_rises_to_the_mean_of_the_epoch(tmp_path):
    """And never falls; with a checkpoint in the middle of the second epoch, a resumed run rises in the same way."""

    def start(folder: str, **more) -> TRMTrainer:
        return make_trainer(
            tmp_path / folder,
            max_steps=27,  # three epochs
            adaptive_halt_threshold=True,
            bce_halt_loss=True,
            halt_threshold=-1.0,
            save_strategy="steps",
            save_steps=13,
            **more,
        )

    whole = start("whole", callbacks=[(seen := Thresholds())])
    whole.train()
    cosines, sizes = logged(whole, "cosine_similarity"), [4, 4, 2]
    expected, threshold = [], -1.0
    for epoch in range(3):
        rows = cosines[9 * epoch : 9 * epoch + 9]
        weights = [size for size in sizes for _ in range(STEPS)]
        mean = sum(c * w for c, w in zip(rows, weights)) / sum(weights)
        threshold = max(threshold, 0.95 * mean)
        expected.append(threshold)
    assert seen.values[8::9] == pytest.approx(expected, abs=1e-5)
    assert seen.values[0] == -1.0 and seen.values[9:17] == [seen.values[8]] * 8
    assert logged(whole, "halt_threshold")[9] == pytest.approx(expected[0], abs=1e-5)

    start("cut", callbacks=[StopAt(15)]).train()
    resumed = start("cut", callbacks=[(again := Thresholds())])
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    assert again.values == seen.values[13:]
    high = make_trainer(
        tmp_path / "high", adaptive_halt_threshold=True, bce_halt_loss=True, halt_threshold=0.99, max_steps=9
    )
    high.train()
    assert high.model.config.cosine_threshold == 0.99


class Thresholds(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.values.append(model.config.cosine_threshold)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# --- Resuming ---


@pytest.mark.parametrize("save_at", [1, 4, 6, 9, 11])  # first and last steps of a batch, the end of an epoch
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_the_middle_of_a_batch(tmp_path, save_at, accumulate):
    def start(folder: str, *callbacks) -> TRMTrainer:
        return make_trainer(
            tmp_path / folder,
            make_model(dropout=0.2),  # so the random numbers have to go on too
            callbacks=callbacks,
            max_steps=14,
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            save_strategy="steps",
            save_steps=save_at,
            ema_decay=0.9,
        )

    whole = start("whole")
    whole.train()
    first = start("cut", StopAt(save_at + 1))
    first.train()
    resumed = start("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{save_at}"))
    assert logged(resumed) == logged(whole)
    for old, new in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(old, new)
    assert whole.state.global_step == resumed.state.global_step == 14


def test_no_pickle_of_ours_in_checkpoints_and_refusal_of_another_layout(tmp_path):
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, **run).train()
    checkpoint = tmp_path / "checkpoint-4"
    assert {"ema_state.safetensors", "supervision_state_0.safetensors"} <= set(os.listdir(checkpoint))
    state = load_file(checkpoint / "supervision_state_0.safetensors")
    assert state["y.0"].shape == state["z.0"].shape and state["y.0"][:, -1].abs().min() > 0
    for change, message in (
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
        ({"n_supervision_steps": 5}, "3 optimizer steps per batch"),
        ({"per_step_updates": False}, "3 optimizer steps per batch"),
        ({"use_ema": False}, "was made with use_ema"),
    ):
        with pytest.raises(ValueError, match=message):
            changed = {**run, "max_steps": 8, "resume_with_changes": True, **change}
            make_trainer(tmp_path, **changed).train(resume_from_checkpoint=str(checkpoint))
    os.remove(checkpoint / "supervision_state_0.safetensors")
    with pytest.raises(ValueError, match="go on with as many processes"):
        make_trainer(tmp_path, **run).train(resume_from_checkpoint=str(checkpoint))


# --- Evaluation ---


def test_held_out_metrics_are_those_of_the_averaged_weights(tmp_path):
    torch.manual_seed(3)
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=12, compressed_size=WIDTH))
    head = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).get_output_embeddings()
    held_out = make_pairs(7, seed=5)
    trainer = make_trainer(tmp_path, make_model(cosine_threshold=0.1, n_supervision_steps=4), ema_decay=0.5)
    trainer.lm_head, trainer.compressor = head, compressor
    trainer.train()
    with torch.no_grad():  # raw weights that are far away, and some samples that halt early
        trainer.averages()["halt_head.bias"].fill_(-1.0)
        trainer.averages()["halt_head.weight"].normal_()
        for parameter in trainer.model.parameters():
            parameter.normal_()
    metrics = trainer.evaluate(held_out)

    model = make_model(cosine_threshold=0.1, n_supervision_steps=4).eval()
    model.load_state_dict(trainer.averages())
    predictions, probabilities, steps = [], [], []
    for pair in held_out:  # one by one
        y = z = None
        step = 0
        while step < 4:
            with torch.no_grad():
                outputs = model(pair["context"][None], y=y, z=z)
            y, z, step = outputs.y, outputs.z, step + 1
            if outputs.halt_probability > 0.5:
                break
        predictions.append(outputs.prediction[0])
        probabilities.append(outputs.halt_probability[0])
        steps.append(step)
    prediction, target = torch.stack(predictions), torch.stack([pair["target"] for pair in held_out])
    solved = cosine_similarity(prediction, target, dim=-1) > 0.1
    assert len(set(steps)) > 1 and 0 < solved.sum() < 7
    right = [(p > 0.5) == s for p, s in zip(probabilities, solved)]
    tokens = [compressor.decompress(states) @ head.weight.T for states in (prediction, target)]
    mean = target.mean(0)
    expected = {
        "loss": (prediction - target).square().mean(),
        "mse": (prediction - target).square().mean(),
        "constant_mse": (mean - target).square().mean(),
        "r2": 1 - (prediction - target).square().sum() / (mean - target).square().sum(),
        "relative_error": (prediction - target).norm() / target.norm(),
        "cosine_similarity": cosine_similarity(prediction, target, dim=-1).mean(),
        "standardised_mse": ((prediction - target) / target.std(0)).square().mean(),
        "halting_accuracy": sum(right) / 7,
        "solved_share": solved.float().mean(),
        "mean_steps": sum(steps) / 7,
        "top_token_agreement": (tokens[0].argmax(-1) == tokens[1].argmax(-1)).float().mean(),
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(value), rel=1e-4), name
    # Evaluating has left the weights alone.
    assert (next(iter(trainer.model.parameters())) - next(iter(trainer.averages().values()))).abs().max() > 0.1


def test_the_best_model_is_the_best_average(tmp_path):
    trainer = make_trainer(
        tmp_path,
        held_out=make_pairs(8, seed=2),
        max_steps=60,
        learning_rate=0.5,  # gets worse
        ema_decay=0.5,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        early_stopping_patience=2,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == min(losses) and trainer.state.global_step < 60
    trainer.save_model()
    saved = make_trainer(tmp_path / "b", SequenceTRM.from_pretrained(tmp_path), use_ema=False)
    assert saved.evaluate(make_pairs(8, seed=2))["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_without_ema_the_weights_themselves(tmp_path):
    trainer = make_trainer(tmp_path, use_ema=False, save_strategy="steps", save_steps=9)
    trainer.train()
    saved = SequenceTRM.from_pretrained(tmp_path / "checkpoint-9")
    for old, new in zip(trainer.model.parameters(), saved.parameters()):
        assert torch.equal(old, new)
    assert not (tmp_path / "checkpoint-9" / "ema_state.safetensors").exists()


def test_bfloat16_autocast_trains(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, learning_rate=1e-3, held_out=make_pairs(4, seed=1))
    trainer.train()
    reference = make_trainer(tmp_path / "b", learning_rate=1e-3)
    reference.train()
    assert logged(trainer) == pytest.approx(logged(reference), rel=0.1)
    assert logged(trainer) != pytest.approx(logged(reference), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


# --- Bad input ---


def test_a_broken_sample_stops_the_run_with_its_id_and_leaves_the_weights(tmp_path):
    pairs = make_pairs()
    pairs[6]["context"][0, 0] = float("nan")
    trainer = make_trainer(tmp_path, pairs=pairs, use_ema=False, max_steps=20)
    with pytest.raises(FloatingPointError, match=r"for 1 of \d samples: pair-6\."):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_lm_head_and_compressor_have_to_fit(tmp_path):
    arguments = TRMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=12, compressed_size=6))
    with pytest.raises(ValueError, match="compressed_size=6, the model hidden_size=8"):
        TRMTrainer(make_model(), arguments, lm_head=torch.nn.Linear(12, 5), compressor=compressor)
    with pytest.raises(ValueError, match="reads states 12 wide, the pairs hold 8"):
        TRMTrainer(make_model(), arguments, lm_head=torch.nn.Linear(12, 5))


# --- Command line and processes ---


@pytest.fixture
def pairs_file(tmp_path) -> str:
    """The older single file of pairs, 12 wide."""
    pairs = make_pairs(23, width=12)
    content = {
        "hidden_pre": [pair["context"] for pair in pairs],
        "hidden_post": torch.stack([pair["target"] for pair in pairs]),
        "seq_lengths": [len(pair["context"]) for pair in pairs],
        "num_thinking_tokens": [5] * 23,
        "problems": ["?"] * 23,
        "hidden_size": 12,
    }
    path = str(tmp_path / "pairs.pt")
    write_atomically(path, lambda temporary: torch.save(content, temporary))
    return path


def trm_command(pairs: str, folder: Path, *more: str) -> list[str]:
    flags = f"train --recipe trm --pairs_dir {pairs} --output_dir {folder} --n_latent_steps 1"
    flags += "" if "--checkpoint" in more else " --n_heads 2 --dropout 0"  # a trained one has its own
    flags += " --n_supervision_steps 3 --num_epochs 2 --batch_size 8 --logging_steps 1 --use_cpu --disable_tqdm true"
    return [*flags.split(), *more]


def test_train_command(tmp_path, pairs_file, capsys):
    config = DimensionCompressorConfig(hidden_size=12, compressed_size=8, backbone_name_or_path="user/lm")
    DimensionCompressor(config).save_pretrained(tmp_path / "compressor")
    more = ["--compressor", str(tmp_path / "compressor")]
    config = LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    assert main(trm_command(pairs_file, tmp_path / "out", *more, "--backbone", str(tmp_path / "lm"))) == 0
    agreement = metrics(tmp_path / "out", "validation_metrics.csv", "eval_top_token_agreement")
    assert len(agreement) == 2 and 0 <= agreement[0] <= 1
    model = SequenceTRM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 8 and model.config.n_supervision_steps == 3
    assert model.config.backbone_name_or_path == "user/lm"
    assert len(metrics(tmp_path / "out", "training_metrics.csv", "mse_loss")) == 2 * 3 * 3  # 21 pairs, batch 8
    assert len(metrics(tmp_path / "out", "validation_metrics.csv", "eval_mean_steps")) == 2
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)  # written by the run above
    assert (saved.adam_beta2, saved.ema_decay, saved.adaptive_halt_threshold) == (0.95, 0.999, True)
    on = [*more, "--resume_from_checkpoint", "true", "--resume_with_changes", "true", "--num_epochs", "3"]
    assert main(trm_command(pairs_file, tmp_path / "out", *on)) == 0
    assert len(metrics(tmp_path / "out", "training_metrics.csv", "mse_loss")) == 27
    again = ["--checkpoint", str(tmp_path / "out"), "--max_steps", "3"]
    capsys.readouterr()
    assert main(trm_command(pairs_file, tmp_path / "again", *again)) == 2
    assert "has hidden_size=8, but the pairs are 12 wide" in capsys.readouterr().err
    assert main(trm_command(pairs_file, tmp_path / "again", *again, *more)) == 0


def test_pairs_that_are_stored_compressed(tmp_path, pairs_file):
    """They train as the same pairs compressed on the fly, and the LM head still reads their states."""
    compressor = DimensionCompressor(DimensionCompressorConfig(hidden_size=12, compressed_size=8))
    compressor.save_pretrained(tmp_path / "compressor")
    config = LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    content = torch.load(pairs_file, weights_only=True)
    with torch.no_grad():
        content["hidden_pre"] = [compressor.compress(states) for states in content["hidden_pre"]]
        content["hidden_post"] = compressor.compress(content["hidden_post"])
    small = str(tmp_path / "small.pt")
    write_atomically(small, lambda temporary: torch.save(content | {"hidden_size": 8}, temporary))
    more = ["--compressor", str(tmp_path / "compressor"), "--backbone", str(tmp_path / "lm")]
    for name, pairs in (("later", pairs_file), ("before", small)):
        assert main(trm_command(pairs, tmp_path / name, *more)) == 0
    for column in ("eval_top_token_agreement", "eval_mse"):
        later, before = (metrics(tmp_path / n, "validation_metrics.csv", column) for n in ("later", "before"))
        assert later == pytest.approx(before, rel=1e-4) and len(later) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (["--pairs_dir", "nowhere"], "There is no file or folder nowhere"),
        (["--compressor", "nowhere"], "nowhere"),
        (["--eval_fraction", "1.5"], "eval_fraction must be at least 0 and below 1"),
        (["--eval_fraction", "0.01"], "of 23 hidden pairs is 0"),
        (["--n_heads", "5"], "must be a multiple of"),
        (["--chunk_size", "4"], "Unknown option --chunk_size"),
        (["--n_supervison_steps", "4"], "did you mean '--n_supervision_steps'"),
        (["--halt_threshold", "3"], "halt_threshold is a cosine"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, pairs_file, capsys, change, message):
    assert main(trm_command(pairs_file, tmp_path / "out", *change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_recipes_know_their_kind(tmp_path):
    assert load_recipe("trm")["kind"] == "trm"
    path = tmp_path / "r.yaml"
    path.write_text("kind: trm\nn_suprvision_steps: 4\n")
    with pytest.raises(ValueError, match=r"unknown key 'n_suprvision_steps' \(did you mean 'n_supervision_steps'\?\)"):
        load_recipe(str(path))
    path.write_text("n_supervision_steps: 4\n")
    assert load_recipe(str(path), "trm") == {"n_supervision_steps": 4}
    with pytest.raises(ValueError, match="unknown key 'n_supervision_steps'"):
        load_recipe(str(path))
    path.write_text("kind: trn\n")
    with pytest.raises(ValueError, match=r"unknown kind 'trn' \(did you mean 'trm'\?\)"):
        load_recipe(str(path))


def test_a_config_changes_a_recipe_of_its_own_kind(tmp_path, pairs_file, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("ema_decay: 5e-1\nmax_steps: 3\n")
    assert main(trm_command(pairs_file, tmp_path / "out", "--config", str(path))) == 0
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)  # written by the run above
    assert (saved.ema_decay, saved.max_steps) == (0.5, 3)
    path.write_text("kind: compressor\n")
    assert main(trm_command(pairs_file, tmp_path / "other", "--config", str(path))) == 2
    assert "trm is a recipe for trm" in capsys.readouterr().err


@pytest.mark.parametrize("per_step_updates", ["true", "false"])
def test_two_processes_give_the_losses_of_one(tmp_path, pairs_file, per_step_updates):
    """Also where a process has accumulated, and after resuming in the middle of a batch."""
    more = ["--lr", "2e-3", "--halt_threshold", "-0.9", "--per_step_updates", per_step_updates, "--max_steps", "14"]
    more += ["--eval_strategy", "steps", "--eval_steps", "7", "--save_strategy", "steps", "--save_steps", "7"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(trm_command(pairs_file, one, *more, "--eval_fraction", "0.13")) == 0

    def launch(*flags: str) -> None:
        split = ["--eval_fraction", "0.13", "--batch_size", "2", "--gradient_accumulation_steps", "2"]
        run_two_processes(trm_command(pairs_file, two, *more, *split, *flags))

    launch()
    for column in ("loss", "mse_loss", "grad_norm", "halt_threshold", "cosine_similarity"):
        expected = metrics(one, "training_metrics.csv", column)
        assert metrics(two, "training_metrics.csv", column) == pytest.approx(expected, rel=1e-3, abs=1e-5), column
    assert len(set(metrics(one, "training_metrics.csv", "halt_threshold"))) > 1
    for column in ("eval_loss", "eval_r2", "eval_mean_steps", "eval_halting_accuracy"):
        expected = metrics(one, "validation_metrics.csv", column)
        assert metrics(two, "validation_metrics.csv", column) == pytest.approx(expected, rel=1e-3), column
    if per_step_updates == "true":
        before = metrics(two, "training_metrics.csv", "loss")
        launch("--resume_from_checkpoint", str(two / "checkpoint-7"))
        assert metrics(two, "training_metrics.csv", "loss") == before
