"""Answers after latent thoughts: samples, collator, trainer, the recipe, and other trainers that take the model."""

import json

import pytest
import torch
from conftest import metrics, run_two_processes
from datasets import Dataset
from latent_thinking_models import backbone_for, make_model, new_tokenizer, plain_embeddings, reading_lm
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import (
    LatentAnswerCollator,
    latent_thinking_prompt,
    load_reasoning_dataset,
    tokenize_latent_answers,
)
from llada_trm_hf.models import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LatentThinkingForCausalLM,
    SequenceTRM,
    SequenceTRMConfig,
    thought_token_ids,
)
from llada_trm_hf.training import LatentAnswerTrainer, LatentAnswerTrainingArguments


@pytest.fixture
def speaking():
    tokenizer = new_tokenizer()
    return make_model(backbone=backbone_for(tokenizer), **thought_token_ids(tokenizer)), tokenizer


@pytest.fixture
def samples(speaking):
    model, tokenizer = speaking
    rows = [{"prompt": "39=", "answer": "6"}, {"prompt": "1+22=", "answer": "230"}, {"prompt": "7=", "answer": "17"}]
    return tokenize_latent_answers(Dataset.from_list(rows), tokenizer, model.config, "{reasoning}\n#### {answer}", 40)


def arguments(folder, **changes):
    defaults = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    return {"output_dir": str(folder), "disable_tqdm": True} | defaults | changes


# --- Samples and batches ---


def test_samples(speaking, samples, capsys):
    model, tokenizer = speaking
    first = samples[0]
    text = tokenizer.decode(first["prompt_ids"] + first["answer_ids"])
    assert text == "39=<think><|latent|><|latent|><|latent|></think>#### 6<|endoftext|>"
    problems, response = load_reasoning_dataset("arithmetic", "train[:20]", num_terms=4)
    shorter = tokenize_latent_answers(problems, tokenizer, model.config, response)
    assert tokenizer.decode(shorter[0]["answer_ids"]) == problems[0]["answer"] + "<|endoftext|>"
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in samples]
    assert len(tokenize_latent_answers(problems.select(range(2)), tokenizer, model.config, response, 12)) == 2
    with pytest.raises(ValueError, match="more than max_length=11"):
        tokenize_latent_answers(problems, tokenizer, model.config, response, 11)
    assert lengths[0] < lengths[1]


def test_batches_align_the_thoughts(speaking, samples):
    model, _ = speaking
    batch = LatentAnswerCollator(model.config.pad_token_id)(list(samples))
    width = batch["labels"].shape[1]
    for b, row in enumerate(samples):
        real = batch["attention_mask"][b].bool()
        assert batch["input_ids"][b, real].tolist() == row["prompt_ids"] + row["answer_ids"]
        answer = row["answer_ids"] + [-100] * (width - 1 - len(row["answer_ids"]))
        assert batch["labels"][b].tolist() == [-100, *answer]
    assert batch["logits_to_keep"] == width
    starts = (batch["input_ids"] == model.config.latent_token_id).int().argmax(-1)
    assert len(set(starts.tolist())) == 1


# --- Trainer ---


def test_a_step_is_that_of_the_plain_loop(speaking, samples, tmp_path):
    """Cross-entropy per answer token, over all micro-batches of the step, with plain gradient descent."""
    model, _ = speaking
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.halt_threshold = 1.0
    losses, count = [], 0
    for row in samples:
        ids = row["prompt_ids"] + row["answer_ids"]
        logits = model.backbone(inputs_embeds=plain_embeddings(model, ids)[0], use_cache=False).logits[0]
        answers = len(row["answer_ids"])
        losses.append(cross_entropy(logits[-answers - 1 : -1], torch.tensor(row["answer_ids"]), reduction="sum"))
        count += answers
    loss = sum(losses) / count
    names = [
        "projector.weight",
        "compressor.weight",
        "trm.reasoning_token",
        "trm.net.layers.0.self_attn.in_proj.weight",
    ]
    parameters = [model.thinker.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(loss, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    settings = arguments(
        tmp_path,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        lr_scheduler_type="constant",
    )
    trainer = LatentAnswerTrainer(model, LatentAnswerTrainingArguments(**settings), train_dataset=samples)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    for name, parameter, old, gradient in zip(names, parameters, before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient, atol=1e-5, rtol=1e-3, msg=name)
        assert gradient.abs().max() > 1e-4, name
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, backbone[name])


def test_checkpoints_leave_out_a_frozen_backbone(speaking, samples, tmp_path):
    model, tokenizer = speaking
    settings = LatentAnswerTrainingArguments(**arguments(tmp_path / "run", save_backbone=False))
    with pytest.raises(ValueError, match="backbone_name_or_path"):
        LatentAnswerTrainer(model, settings, train_dataset=samples)
    model.config.backbone_name_or_path = str(tmp_path / "backbone")
    model.backbone.save_pretrained(tmp_path / "backbone")
    model.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="would lose what the backbone learns"):
        LatentAnswerTrainer(model, settings, train_dataset=samples)
    model.backbone.requires_grad_(False)
    tokenizer.chat_template = template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    trainer = LatentAnswerTrainer(model, settings, train_dataset=samples, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    messages = [{"role": "user", "content": "39="}]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [*tokenizer("[39=]")["input_ids"], *model.config.thought_token_ids]
    assert tokenizer.chat_template == template
    with safe_open(tmp_path / "run/model.safetensors", "pt") as file:
        assert all(name.startswith("thinker.") for name in file.keys())  # noqa: SIM118 (it is no dictionary)
    loaded = LatentThinkingForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = torch.tensor([samples[0]["prompt_ids"]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=0)


# --- Recipe ---


@pytest.fixture
def lm_folder(tmp_path):
    tokenizer = new_tokenizer()
    folder = tmp_path / "lm"
    backbone_for(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def problems_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{n}?", "answer": str(3 * n % 10)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(folder, *options):
    common = ["--recipe", "latent_answer", "--output_dir", str(folder), "--device", "cpu", "--report_to", "none"]
    return main(["train", *common, "--logging_steps", "5", "--disable_tqdm", "true", *options])


@pytest.fixture
def reading_lm_folder(tmp_path):
    model, tokenizer = reading_lm()
    model.save_pretrained(tmp_path / "reading")
    tokenizer.save_pretrained(tmp_path / "reading")
    return str(tmp_path / "reading")


def test_recipe_from_scratch_learns_the_answers(tmp_path, reading_lm_folder, capsys):
    """The frozen model can say what it reads in a thought, and cannot calculate: that the thinker has to learn."""
    folder = tmp_path / "run"
    data = ["--dataset_name", "arithmetic", "--split", "train[:8]", "--num_terms", "2", "--max_length", "40"]
    options = ["--n_heads", "2", "--n_latent_steps", "2", "--n_deep_recursions", "1", "--n_supervision_steps", "2"]
    options += ["--num_latents", "4", "--dropout", "0", "--max_steps", "80", "--lr", "1e-3", "--batch_size", "8"]
    options += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "5"]
    problems, _ = load_reasoning_dataset("arithmetic", "train[:8]", num_terms=2)
    problems.to_json(tmp_path / "problems.jsonl")  # whether they are learned by heart
    options += ["--eval_data_files", str(tmp_path / "problems.jsonl")]
    options += ["--eval_strategy", "steps", "--eval_steps", "40"]
    assert train(folder, "--backbone", reading_lm_folder, *data, *options) == 0, capsys.readouterr().err
    losses = metrics(folder, "training_metrics.csv", "loss")
    assert losses[0] > 1 and losses[-1] < 0.1
    assert metrics(folder, "validation_metrics.csv", "eval_answer_accuracy")[-1] == 1.0
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert all(name.startswith("thinker.") for name in file.keys())  # noqa: SIM118 (it is no dictionary)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [latent_thinking_prompt(row["prompt"], tokenizer, model.config) for row in problems]
    output = model.generate(torch.tensor(rows), max_new_tokens=3, do_sample=False)[:, len(rows[0]) :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    assert texts == [row["answer"] for row in problems]

    # A checkpoint goes on where it stopped.
    more = ["--checkpoint", str(folder), *data, "--max_steps", "1", "--logging_steps", "1", "--lr", "1e-5"]
    assert train(tmp_path / "more", *more) == 0, capsys.readouterr().err
    assert metrics(tmp_path / "more", "training_metrics.csv", "loss")[0] < losses[0] / 2


def test_recipe_from_trained_parts(tmp_path, lm_folder, problems_file, capsys):
    DimensionCompressor(DimensionCompressorConfig(hidden_size=32, compressed_size=8)).save_pretrained(tmp_path / "c")
    SequenceTRM(SequenceTRMConfig(hidden_size=8, n_heads=2, halt_loss="mse")).save_pretrained(tmp_path / "trm")
    options = ["--backbone", lm_folder, "--dataset_name", problems_file, "--max_steps", "1", "--max_length", "40"]
    options += ["--compressor", str(tmp_path / "c"), "--trm", str(tmp_path / "trm"), "--lr", "0", "--dropout", "0.3"]
    assert train(tmp_path / "run", *options) == 0, capsys.readouterr().err
    model = LatentThinkingForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.trm_config.halt_loss == "mse" and model.config.trm_config.dropout == 0.3
    for part, folder in ((model.thinker.compressor, "c"), (model.thinker.trm, "trm")):
        saved = type(part).from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in part.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--backbone"),
        (["--backbone", "LM", "--checkpoint", "x/y"], "either --backbone"),
        (["--backbone", "LM", "--trm", "/nowhere"], "There is no folder /nowhere"),
        (["--checkpoint", "/nowhere"], "There is no folder /nowhere"),
        (["--backbone", "LM", "--max_length", "4"], "more than max_length=4"),
        (["--backbone", "LM", "--max_length", "4000"], "the model's context of 128"),
        (["--backbone", "LM", "--num_latents", "0"], "num_latents must be at least 1"),
        (["--backbone", "LM", "--freeze_backbone", "false"], "would lose what the backbone learns"),
        (["--backbone", "LM", "--compressed_size", "64"], "compressed_size must be between"),
        (["--checkpoint", "x/y", "--n_latent_steps", "2"], "has its own n_latent_steps"),
        (["--backbone", "LM", "--num_latent", "3"], "did you mean '--num_latents'"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, lm_folder, problems_file, capsys, options, message):
    options = [lm_folder if option == "LM" else option for option in options]
    limits = [] if "--max_length" in options else ["--max_length", "40"]
    folder = tmp_path / "run"
    assert train(folder, *options, *limits, "--dataset_name", problems_file) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("llada-trm train: ")
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path, lm_folder, problems_file, capsys):
    options = ["--backbone", lm_folder, "--dataset_name", problems_file, "--max_steps", "4", "--max_length", "40"]
    options += ["--n_supervision_steps", "2", "--n_heads", "2", "--logging_steps", "1", "--dropout", "0"]
    assert train(tmp_path / "one", *options, "--batch_size", "4") == 0, capsys.readouterr().err
    common = ["train", "--recipe", "latent_answer", "--device", "cpu", "--report_to", "none", *options]
    run_two_processes([*common, "--output_dir", str(tmp_path / "two"), "--batch_size", "2"])
    one, two = (metrics(tmp_path / name, "training_metrics.csv", "loss") for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-3)


# --- Other trainers ---


def test_hf_trainer(speaking, samples, tmp_path):
    """The plain Trainer, with right-padded rows whose thoughts stand in different columns, and evaluation."""
    model, tokenizer = speaking

    def collate(rows):
        ids = [torch.tensor(row["prompt_ids"] + row["answer_ids"]) for row in rows]
        labels = [torch.tensor([-100] * len(row["prompt_ids"]) + row["answer_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": mask,
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    settings = TrainingArguments(
        **arguments(
            tmp_path, max_steps=8, learning_rate=1e-2, remove_unused_columns=False, lr_scheduler_type="constant"
        )
    )
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=samples, eval_dataset=samples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    assert trainer.predict(samples).predictions.shape[::2] == (3, len(tokenizer))


def prompt_texts(model, tokenizer):
    return [latent_thinking_prompt(f"{n}+1=", tokenizer, model.config, tokenize=False) for n in range(4)]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trl_sft(speaking, tmp_path, gradient_checkpointing):
    import trl  # (takes seconds: not at the top)

    model, tokenizer = speaking
    rows = [{"prompt": text, "completion": str(n + 1)} for n, text in enumerate(prompt_texts(model, tokenizer))]
    settings = trl.SFTConfig(
        **arguments(tmp_path, max_steps=2, bf16=False, gradient_checkpointing=gradient_checkpointing, max_length=40)
    )
    before = model.thinker.projector.weight.detach().clone()
    trainer = trl.SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.thinker.trm.config.dropout = 0.0
    expected = model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    # The log-probabilities that TRL takes from the hidden states are those of the logits.
    found = model(**{**batch, "fused_lm_head": True}).loss
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    trainer.train()
    assert not torch.equal(model.thinker.projector.weight, before)
    assert all(p.grad is None for p in model.backbone.parameters())


def test_trl_grpo(speaking, tmp_path):
    import trl  # (takes seconds: not at the top)

    model, tokenizer = speaking
    rows = [{"prompt": text} for text in prompt_texts(model, tokenizer)]
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(len(text)) + n for n, text in enumerate(completions)]

    settings = trl.GRPOConfig(
        **arguments(
            tmp_path,
            max_steps=2,
            bf16=False,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=5,
            learning_rate=1e-2,
            beta=0.0,
        )
    )
    before = model.thinker.projector.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model, reward, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    assert len(seen) == 8
    assert not torch.equal(model.thinker.projector.weight, before)
    assert all(p.grad is None for p in model.backbone.parameters())
