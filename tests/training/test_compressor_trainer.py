"""CompressorTrainer: what it trains on, what it reports, and how near it comes to PCA, which nothing can beat."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import metrics, run_two_processes
from datasets import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig
from llada_trm_hf.cli.main import main
from llada_trm_hf.data import TextCollator, byte_tokenizer, load_text_dataset, tokenize_texts
from llada_trm_hf.recipes.recipe import load_recipe
from llada_trm_hf.training import CompressorTrainer, CompressorTrainingArguments
from llada_trm_hf.training.compressor_trainer import last_layer_states
from llada_trm_hf.training.reconstruction_metrics import compare_next_tokens, reconstruction_metrics

TOKENIZER = byte_tokenizer()
WIDTH, SIZE = 16, 4
WORDS = ["recursion", "hidden", "state", "chunk", "token", "latent", "answer", "seven", "of", "is", "the", "42"]


def make_texts(number: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (number,), generator=generator).tolist()
    return [" ".join(WORDS[w] for w in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def make_lm(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(TOKENIZER), "initializer_range": 0.3}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=128, **sizes))
    else:
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            **sizes,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():  # channels of different sizes, as in trained models
        for name, parameter in model.named_parameters():
            if name.endswith(("model.norm.weight", "ln_f.weight")):
                parameter.copy_(torch.linspace(0.2, 3.0, WIDTH))
    return model


def make_samples(number: int, seed: int = 0) -> Dataset:
    return tokenize_texts(Dataset.from_dict({"text": make_texts(number, seed)}), TOKENIZER, 64)


def make_trainer(folder: Path, train=None, held_out=None, lm=None, size: int = SIZE, callbacks=None, **more):
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    torch.manual_seed(1)
    return CompressorTrainer(
        DimensionCompressor(DimensionCompressorConfig(hidden_size=WIDTH, compressed_size=size)),
        CompressorTrainingArguments(output_dir=str(folder), **arguments | more),
        make_lm() if lm is None else lm,
        train_dataset=make_samples(48) if train is None else train,
        eval_dataset=make_samples(12, seed=7) if held_out is None else held_out,
        callbacks=callbacks,
    )


def logged(trainer: CompressorTrainer, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def states_one_by_one(lm, samples) -> torch.Tensor:
    """What the LM head of `lm` reads at every token of every sample: `[N, D]`."""
    rows = []
    for sample in samples:
        outputs = lm(torch.tensor([sample["input_ids"]]), output_hidden_states=True)
        states = outputs.hidden_states[-1]
        torch.testing.assert_close(outputs.logits, lm.get_output_embeddings()(states))
        rows.append(states[0])
    return torch.cat(rows)


# --- Hidden states ---


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_are_those_the_lm_head_reads_and_the_head_does_nothing(kind):
    lm, samples = make_lm(kind).eval(), make_samples(6)
    batch = TextCollator()(list(samples))
    computed = []
    lm.get_output_embeddings().register_forward_hook(lambda module, args, output: computed.append(output.numel()))
    states = last_layer_states(lm, **batch)
    assert sum(computed) == 0 and not states.requires_grad
    torch.testing.assert_close(states[batch["attention_mask"].bool()], states_one_by_one(lm, samples))
    assert (batch["attention_mask"] == 0).any()


def test_language_model_is_frozen_and_stays_out_of_checkpoints(tmp_path):
    lm = make_lm()
    lm.save_pretrained(tmp_path / "lm")
    lm = LlamaForCausalLM.from_pretrained(tmp_path / "lm")
    before = {name: parameter.clone() for name, parameter in lm.named_parameters()}
    trainer = make_trainer(tmp_path / "out", lm=lm.train(), save_strategy="steps", save_steps=8)
    trainer.train()
    assert not lm.training
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and not parameter.requires_grad
    checkpoint = tmp_path / "out" / "checkpoint-8"
    assert (checkpoint / "model.safetensors").stat().st_size < 4 * WIDTH * SIZE + 1000
    saved = DimensionCompressor.from_pretrained(checkpoint)
    assert torch.equal(saved.weight, trainer.model.weight)
    assert saved.config.backbone_name_or_path == str(tmp_path / "lm")


# --- Training ---


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_is_the_plain_loop(tmp_path, accumulate):
    """Every real token counts the same, however a batch is cut; AdamW, clipping, linear schedule."""
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.05,
        learning_rate=1e-2,
    )
    weight = trainer.model.weight.detach().clone().requires_grad_()
    seen, get_batch_samples = [], trainer.get_batch_samples

    def remember(*args):
        batches, number = get_batch_samples(*args)
        seen.append(torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]))
        rows = [r[m.bool()].tolist() for b in batches for r, m in zip(b["input_ids"], b["attention_mask"])]
        seen[-1] = [{"input_ids": row} for row in rows]
        return batches, number

    trainer.get_batch_samples = remember
    trainer.train()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.01)
    losses = []
    for step, samples in enumerate(seen):
        states = states_one_by_one(trainer.language_model, samples)
        loss = (states @ weight.T @ weight - states).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 0.05)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 8)
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 8
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(trainer.model.weight, weight, rtol=1e-4, atol=1e-5)


def test_training_approaches_pca_and_never_beats_it(tmp_path):
    samples = make_samples(64)
    trainer = make_trainer(
        tmp_path,
        train=samples,
        held_out=samples,  # on the data PCA has seen it is the optimum
        max_steps=400,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        weight_decay=0.0,
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=50,
    )
    trainer.train()
    trained = [row["eval_mse"] for row in trainer.state.log_history if "eval_mse" in row]
    states = states_one_by_one(trainer.language_model, samples).double()
    eigenvalues = torch.linalg.eigvalsh(states.T @ states / len(states))
    optimum = eigenvalues[:-SIZE].sum().item() / WIDTH
    assert all(mse >= optimum * (1 - 1e-5) for mse in trained)
    assert trained[-1] < 1.02 * optimum < 0.95 * trained[0]
    fit = trainer.fit_pca()
    assert fit.num_samples == len(states) and fit.mse == pytest.approx(optimum, rel=1e-5)
    assert trainer.evaluate()["eval_mse"] == pytest.approx(optimum, rel=1e-4)
    few = trainer.fit_pca(num_batches=1)
    assert few.num_samples == len(states)  # a batch holds all 64
    assert logged(trainer)[0] > logged(trainer)[-1]


def test_resuming_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    def start(folder: str, *callbacks) -> CompressorTrainer:
        arguments = {"max_steps": 14, "save_strategy": "steps", "save_steps": 5}
        return make_trainer(tmp_path / folder, callbacks=callbacks, gradient_accumulation_steps=2, **arguments)

    whole = start("whole")
    whole.train()
    start("cut", StopAt(7)).train()
    resumed = start("cut")
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    assert logged(resumed) == logged(whole)
    assert torch.equal(resumed.model.weight, whole.model.weight)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_early_stopping_keeps_the_best(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=200,
        learning_rate=1.0,  # gets worse after a while, if not at once
        lr_scheduler_type="constant",
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        early_stopping_patience=2,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.global_step < 200 and losses.index(min(losses)) == len(losses) - 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_a_stream_trains_as_the_dataset_does(tmp_path):
    samples = make_samples(48)
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": s["input_ids"]} for s in samples]))
    streamed = make_trainer(tmp_path / "a", train=stream, max_steps=5)
    streamed.train()
    listed = make_trainer(tmp_path / "b", train=samples, max_steps=5, train_sampling_strategy="sequential")
    listed.train()
    assert logged(streamed) == pytest.approx(logged(listed), rel=1e-5)
    assert streamed.fit_pca().num_samples == listed.fit_pca().num_samples
    assert streamed.fit_pca(2).num_samples == sum(len(s["input_ids"]) for s in samples.select(range(16)))


# --- Evaluation ---


@pytest.mark.parametrize("batch_size", [3, 12])
def test_held_out_metrics(tmp_path, batch_size):
    held_out = make_samples(12, seed=7)
    trainer = make_trainer(tmp_path, held_out=held_out, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    states = states_one_by_one(trainer.language_model, held_out)
    weight = trainer.model.weight.detach()
    rebuilt = states @ weight.T @ weight
    head = trainer.language_model.get_output_embeddings().weight
    before, after = (rows @ head.T for rows in (states, rebuilt))
    same, divergences = 0, []
    for old, new in zip(before, after):
        p, q = old.softmax(-1).double(), new.softmax(-1).double()
        divergences.append((p * (p / q).log()).sum().item())
        same += int(old.argmax() == new.argmax())
    expected = {
        **reconstruction_metrics(rebuilt, states),
        "loss": (rebuilt - states).square().mean().item(),
        "top_token_agreement": same / len(states),
        "kl_divergence": sum(divergences) / len(states),
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    assert 0 < metrics["eval_top_token_agreement"] < 1
    perfect = make_trainer(tmp_path, held_out=held_out, size=WIDTH)  # a rotation: nothing is lost
    metrics = perfect.evaluate()
    assert metrics["eval_top_token_agreement"] == 1 and metrics["eval_kl_divergence"] == pytest.approx(0, abs=1e-5)


def test_comparison_in_chunks_is_the_comparison():
    head = torch.nn.Linear(WIDTH, 30, bias=False).requires_grad_(False)
    before, after = torch.randn(2, 11, WIDTH)
    for whole, chunked in zip(compare_next_tokens(head, before, after), compare_next_tokens(head, before, after, 3)):
        torch.testing.assert_close(whole, chunked)
    half = compare_next_tokens(head.bfloat16(), before, after)
    assert half[1].dtype == torch.float32 and half[0].shape == (11,)


def test_sizes_have_to_fit(tmp_path):
    with pytest.raises(ValueError, match="are 16 wide, the compressor takes hidden_size=20"):
        CompressorTrainer(
            DimensionCompressor(DimensionCompressorConfig(hidden_size=20, compressed_size=4)),
            CompressorTrainingArguments(output_dir=str(tmp_path), use_cpu=True),
            make_lm(),
        )


# --- Text ---


def test_texts_of_every_format(tmp_path):
    texts = ["one", "two words", "three more words"]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t, "n": 1}) + "\n" for t in texts))
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"{t},1\n" for t in texts))
    assert load_text_dataset(str(tmp_path / "a.txt"))["text"][:] == texts
    assert load_text_dataset(str(tmp_path / "a.csv")).column_names == ["text"]
    named = load_text_dataset("owner/name", "train[:2]", str(tmp_path / "a.jsonl"), text_column="body")
    assert named["text"][:] == texts[:2]
    with pytest.raises(ValueError, match="has no column 'text', it has body, n"):
        load_text_dataset(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"Unknown text 'fineweb'"):
        load_text_dataset("fineweb")
    with pytest.raises(ValueError, match="cannot be fetched from the Hub"):
        load_text_dataset("HuggingFaceFW/fineweb-edu", streaming=True)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        load_text_dataset(str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match=r"There is no file nowhere.txt"):
        load_text_dataset("nowhere.txt")


def test_tokens_are_cut_and_empty_texts_left_out():
    samples = tokenize_texts(Dataset.from_dict({"text": ["abc", "", "  ", None, "d" * 20]}), TOKENIZER, 8)
    assert [len(ids) for ids in samples["input_ids"]] == [3, 8] and samples.column_names == ["input_ids"]
    batch = TextCollator()(list(samples))
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 8]
    with pytest.raises(ValueError, match="all empty"):
        tokenize_texts(Dataset.from_dict({"text": ["", " "]}), TOKENIZER)


# --- Command line and processes ---


@pytest.fixture
def lm_folder(tmp_path) -> str:
    make_lm().save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(60)))
    return str(tmp_path / "lm")


def command(lm: str, folder: Path, *more: str, recipe: str = "compressor_1a") -> list[str]:
    flags = f"train --recipe {recipe} --backbone {lm} --output_dir {folder} --max_length 64 --batch_size 8"
    flags += " --max_steps 6 --logging_steps 1 --eval_steps 3 --save_steps 3 --num_eval_samples 12 --use_cpu"
    flags += " --disable_tqdm true"
    if recipe == "compressor_1a":
        flags += f" --dataset_name {Path(lm).parent / 'texts.txt'} --compressed_size 4"
    else:
        flags += " --dataset_name arithmetic --split train[:60] --num_terms 4"
    return [*flags.split(), *more]


def test_recipes_1a_then_1b(tmp_path, lm_folder, capsys):
    assert main(command(lm_folder, tmp_path / "1a")) == 0
    first = DimensionCompressor.from_pretrained(tmp_path / "1a")
    assert first.weight.shape == (4, WIDTH) and first.config.backbone_name_or_path == lm_folder
    assert len(metrics(tmp_path / "1a", "training_metrics.csv", "loss")) == 6
    assert len(metrics(tmp_path / "1a", "validation_metrics.csv", "eval_kl_divergence")) == 2
    saved = torch.load(tmp_path / "1a" / "training_args.bin", weights_only=False)  # written by the run above
    assert (saved.learning_rate, saved.weight_decay, saved.max_grad_norm) == (1e-3, 0.01, 1.0)
    assert saved.load_best_model_at_end and saved.early_stopping_patience == 5

    more = ["--compressor", str(tmp_path / "1a"), "--learning_rate", "1e-9"]
    flags = command(lm_folder, tmp_path / "1b", *more, recipe="compressor_1b")
    named = flags.index("--backbone")
    assert main(flags[:named] + flags[named + 2 :]) == 0  # on the model that 1a was made for
    second = DimensionCompressor.from_pretrained(tmp_path / "1b")
    torch.testing.assert_close(second.weight, first.weight)

    capsys.readouterr()
    assert main(command(lm_folder, tmp_path / "pca", "--init", "pca", "--learning_rate", "0")) == 0
    assert "PCA of" in capsys.readouterr().out
    pca = DimensionCompressor.from_pretrained(tmp_path / "pca")
    torch.testing.assert_close(pca.weight @ pca.weight.T, torch.eye(4), atol=1e-5, rtol=0)
    mse = [metrics(tmp_path / run, "validation_metrics.csv", "eval_mse")[-1] for run in ("pca", "1a")]
    assert mse[0] < mse[1]


def test_sweep_puts_pca_and_trained_side_by_side(tmp_path, lm_folder, capsys):
    flags = [flag for flag in command(lm_folder, tmp_path / "out") if flag not in ("--compressed_size", "4")]
    flags += ["--compressed_sizes", "2", "8"]
    assert main(flags) == 0
    with (tmp_path / "out" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["compressed_size"], row["method"]) for row in rows] == [
        ("2", "trained"),
        ("2", "pca"),
        ("8", "trained"),
        ("8", "pca"),
    ]
    mse = [float(row["mse"]) for row in rows]
    assert mse[0] > mse[1] > mse[3] and mse[2] > mse[3]
    names = {"r2", "constant_mse", "standardised_mse", "variance_ratio", "top_token_agreement", "kl_divergence"}
    assert names <= set(rows[0])
    samples = tokenize_texts(Dataset.from_dict({"text": make_texts(60)}), TOKENIZER, 64)
    trainer = make_trainer(tmp_path / "x", samples.select(range(12, 60)), samples.select(range(12)), size=2)
    trainer.fit_pca()
    assert trainer.evaluate()["eval_mse"] == pytest.approx(mse[1], rel=1e-4)
    trained = DimensionCompressor.from_pretrained(tmp_path / "out" / "compressed_size_8")
    assert trained.config.compressed_size == 8

    # A sweep that was interrupted goes on: finished sizes are measured again, not trained again.
    capsys.readouterr()
    assert main(flags) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    weights = tmp_path / "out" / "compressed_size_2" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    flags[flags.index("8", flags.index("--compressed_sizes"))] = "5"
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    assert weights.stat().st_mtime_ns == before
    with (tmp_path / "out" / "sweep.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [row["compressed_size"] for row in again] == ["2", "2", "5", "5"]
    assert [float(row["mse"]) for row in again[:2]] == pytest.approx(mse[:2], rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--backbone", "/nowhere"], "nowhere"),
        (["--dataset_name", "nowhere.txt"], "There is no file nowhere.txt"),
        (["--text_column", "body"], "has no column 'body', it has text"),
        (["--init", "zeros"], "init must be one of orthogonal, pca, checkpoint"),
        (["--init", "checkpoint"], "name it with --compressor"),
        (["--compressor", "somewhere"], "got init=orthogonal"),
        (["--init", "checkpoint", "--compressor", "/nowhere"], "There is no folder /nowhere"),
        (["--compressed_size", "17"], "compressed_size must be between 1 and hidden_size=16, got 17"),
        (["--compressed_sizes", "2", "4"], "leave out compressed_size"),
        (["--init", "pca", "--pca_batches", "0"], "pca_batches must be at least 1"),
        (["--num_eval_samples", "60"], "num_eval_samples=60 of 60 samples leaves none"),
        (["--num_eval_samples", "-1"], "must not be negative"),
        (["--max_length", "999"], "more than the model's context of 128"),
        (["--early_stopping_patience", "0"], "early_stopping_patience must be at least 1"),
        (["--n_layers", "2"], "Unknown option --n_layers"),
    ],
)
def test_mistakes_are_one_clear_line_and_leave_nothing_behind(tmp_path, lm_folder, capsys, change, message):
    assert main(command(lm_folder, tmp_path / "out", *change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["compressor_1a", "compressor_1b"])
def test_recipes_load(recipe):
    settings = load_recipe(recipe)
    assert settings["kind"] == "compressor" and settings["max_grad_norm"] == 1.0


def test_two_processes_give_the_losses_of_one(tmp_path, lm_folder):
    """PCA first, each process on its share of the text; then steps on texts of different lengths."""
    more = ["--init", "pca", "--lr", "1e-2", "--pca_batches", "6"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command(lm_folder, one, *more)) == 0
    halves = ["--batch_size", "4", "--pca_batches", "12", "--per_device_eval_batch_size", "4"]
    run_two_processes(command(lm_folder, two, *more, *halves))
    for column in ("loss", "grad_norm"):
        expected = metrics(one, "training_metrics.csv", column)
        assert metrics(two, "training_metrics.csv", column) == pytest.approx(expected, rel=1e-3), column
    for column in ("eval_mse", "eval_r2", "eval_kl_divergence", "eval_top_token_agreement"):
        expected = metrics(one, "validation_metrics.csv", column)
        assert metrics(two, "validation_metrics.csv", column) == pytest.approx(expected, rel=1e-3), column
