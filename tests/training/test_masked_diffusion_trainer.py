"""The trainer learns, evaluates with fixed masks, and says what trains."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import SIZES, TOKENIZER, losses, new_backbone, new_hybrid, trainer
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, HfArgumentParser

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import sudoku_puzzles
from llada_trm_hf.recipes.recipe import load_recipe, load_settings, parse_recipe
from llada_trm_hf.rl import LatentGRPOTrainingArguments
from llada_trm_hf.training import (
    CompressorTrainingArguments,
    LatentAnswerTrainingArguments,
    MaskedDiffusionTrainer,
    MaskedDiffusionTrainingArguments,
    TRMTrainingArguments,
    set_trainable,
)
from llada_trm_hf.training.freezing import last_layers


def test_training_learns_the_task(tmp_path, samples):
    run = trainer(new_backbone(), tmp_path, samples, max_steps=250, per_device_train_batch_size=64, logging_steps=50)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.6 * before


def test_evaluation_uses_the_same_masks_whatever_the_batch(tmp_path, samples):
    model = new_hybrid()
    first = trainer(model, tmp_path, samples, per_device_eval_batch_size=80).evaluate()
    again = trainer(model, tmp_path, samples, per_device_eval_batch_size=16).evaluate()
    assert first["eval_loss"] == pytest.approx(again["eval_loss"], rel=1e-5)
    assert first["eval_backbone_loss"] == pytest.approx(again["eval_backbone_loss"], rel=1e-5)


def test_only_the_head_trains_and_every_metric_is_in_the_csv(tmp_path, samples):
    model = new_hybrid()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(model, tmp_path, samples, eval_strategy="steps", eval_steps=6)
    run.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
    rows = list(csv.DictReader((tmp_path / "training_metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [float(row["loss"]) for row in rows] == pytest.approx(list(losses(run).values()))
    names = {"loss", "learning_rate", "grad_norm", "diffusion_loss", "backbone_loss", "deep_supervision_loss"}
    names |= {"confidence_loss", "refined_share", "refinement_steps", "chunk_confidence", "refiner_confidence"}
    assert names <= set(rows[0]) and all(rows[0][name] for name in names)
    validation = list(csv.DictReader((tmp_path / "validation_metrics.csv").open()))
    assert [int(row["step"]) for row in validation] == [6, 12] and validation[0]["eval_refinement_steps"]


def test_gradient_accumulation_equals_the_large_batch(tmp_path, samples):
    large = trainer(new_hybrid(), tmp_path / "a", samples, max_steps=5)
    small = trainer(
        new_hybrid(),
        tmp_path / "b",
        samples,
        max_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    large.train()
    small.train()
    # Deep supervision and calibration are means over what a micro-batch refines; the diffusion loss is the same.
    diffusion = [[row["diffusion_loss"] for row in run.state.log_history if "loss" in row] for run in (large, small)]
    assert diffusion[0] == pytest.approx(diffusion[1], rel=1e-2)


def test_a_checkpoint_reloads_with_its_tokenizer(tmp_path, samples):
    run = trainer(new_hybrid(), tmp_path, samples, max_steps=2)
    run.train()
    run.save_model()
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer("3942=", return_tensors="pt")
    expected = run.model.eval().generate(**batch, max_new_tokens=5)
    assert torch.equal(model.generate(**batch, max_new_tokens=5), expected)


def test_checkpoints_without_backbone_are_small_and_resume(tmp_path, samples):
    new_backbone().save_pretrained(tmp_path / "backbone")

    def start() -> MaskedDiffusionTrainer:
        hybrid = new_hybrid()
        hybrid.config.backbone_name_or_path = str(tmp_path / "backbone")
        return trainer(
            hybrid, tmp_path / "run", samples, max_steps=6, save_strategy="steps", save_steps=3, save_backbone=False
        )

    whole = start()
    whole.train()
    head = sum(parameter.numel() * 4 for parameter in whole.model.refiner.parameters())
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert head <= (checkpoint / "model.safetensors").stat().st_size < 1.2 * head + 10_000
    resumed = start()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    batch = TOKENIZER("3942=", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(reloaded(batch).logits, whole.model.eval()(batch).logits)
    with pytest.raises(ValueError, match="save_backbone=False needs a hybrid"):
        trainer(new_backbone(), tmp_path / "none", samples, save_backbone=False)


def test_nan_stops_the_run_with_a_reason(tmp_path, samples):
    model = new_backbone()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="loss became nan"):
        trainer(model, tmp_path, samples).train()


def test_nan_in_one_micro_batch_stops_before_the_optimizer_step(tmp_path, samples):
    """The losses of all micro-batches are checked together, once per optimizer step."""
    run = trainer(new_hybrid(), tmp_path, samples, max_steps=4, gradient_accumulation_steps=3)
    batches, checks, compute_loss, reduce = [], [], run.compute_loss, run.accelerator.reduce

    def broken_loss(model, inputs, return_outputs=False, **options):
        loss, outputs = compute_loss(model, inputs, return_outputs=True, **options)
        batches.append((inputs["input_ids"], [parameter.detach().clone() for parameter in model.parameters()]))
        loss = loss * torch.nan if len(batches) == 5 else loss  # the second of the second step
        return (loss, outputs) if return_outputs else loss

    run.compute_loss = broken_loss
    run.accelerator.reduce = lambda *arguments: checks.append(1) or reduce(*arguments)
    with pytest.raises(FloatingPointError, match="loss became nan in step 2"):
        run.train()
    assert len(checks) == 2
    assert len(batches) == 7 and torch.equal(batches[6][0], batches[4][0])  # it was run again to find the module
    assert not all(map(torch.equal, batches[0][1], batches[3][1]))
    assert all(map(torch.equal, batches[3][1], run.model.parameters()))


def test_leaving_out_a_backbone_that_trains_is_refused(tmp_path, samples):
    model = new_hybrid(freeze_backbone=False)
    model.config.backbone_name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="would lose what the backbone learns"):
        trainer(model, tmp_path, samples, save_backbone=False)


@pytest.mark.parametrize(
    "arguments",
    [
        MaskedDiffusionTrainingArguments,
        CompressorTrainingArguments,
        TRMTrainingArguments,
        LatentAnswerTrainingArguments,
        LatentGRPOTrainingArguments,
    ],
)
def test_label_smoothing_is_refused(tmp_path, arguments):
    """The Trainer would smooth the labels of all tokens, unshifted, or of hidden states that have none."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert arguments(**settings).label_smoothing_factor == 0
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 would replace the model's own loss"):
        arguments(**settings, label_smoothing_factor=0.1)


def test_set_trainable_reports_and_refuses_a_pattern_that_matches_nothing(capsys):
    model = new_hybrid()
    report = set_trainable(model, ["refiner", "backbone.model.layers.1.*"], train_layer_norms=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, _ in model.named_parameters():
        expected = name.startswith(("refiner.", "backbone.model.layers.1.")) or "norm" in name
        assert (name in trainable) == expected, name
    assert report.total == model.num_parameters() and 0 < report.percent < 100
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{report.trainable:,} of {report.total:,}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"'refinr' matches no module of the model. It has: .*refiner"):
        set_trainable(model, ["refinr"])


@pytest.mark.parametrize(
    "name, values",
    [
        ("warmup", {"freeze_backbone": True, "learning_rate": "1e-4", "num_train_epochs": 3, "max_length": 512}),
        ("finetune", {"freeze_backbone": False, "learning_rate": "5e-5", "gradient_checkpointing": True}),
        (
            "cot_specialized",
            {
                "freeze_backbone": False,
                "learning_rate": "1e-5",
                "num_train_epochs": 10,
                "per_device_train_batch_size": 1,
                "max_length": 1024,
                "chunk_size": 12,
                "max_recursive_steps": 12,
            },
        ),
    ],
)
def test_recipes_of_the_package_load(name, values):
    recipe = load_recipe(name)
    assert {key: recipe[key] for key in values} == values


@pytest.mark.parametrize("size", [4, 6])
def test_the_sudoku_recipes_train_all_of_a_new_model_on_whole_grids(tmp_path, config_file, size, capsys):
    flags = f"--backbone {config_file} --split train[:8] --max_steps 2 --batch_size 4 --logging_steps 1"
    flags += f" --output_dir {tmp_path / 'out'}"
    assert main(["train", "--recipe", f"sudoku_{size}", *flags.split()]) == 0
    assert "(100.00%)" in capsys.readouterr().out  # backbone and refiner
    rows = list(csv.DictReader((tmp_path / "out" / "training_metrics.csv").open()))
    assert all(float(row["refined_share"]) == 1 for row in rows)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    puzzle = next(sudoku_puzzles(1, size, split="test"))["prompt"]
    prompt = TOKENIZER(puzzle, return_tensors="pt").input_ids
    canvas = torch.cat([prompt, torch.full_like(prompt, TOKENIZER.mask_token_id)], dim=1)
    steps = model(canvas).refinement_steps
    assert steps.tolist() == [[0, model.refiner.config.max_recursive_steps]]  # the solution, as one chunk
    assert canvas.shape[1] == load_recipe(f"sudoku_{size}")["max_length"]


def test_every_value_of_a_recipe_gets_the_type_of_its_field_and_flags_override_it(tmp_path):
    settings = "learning_rate: 1e-4\nweight_decay: 1\nmax_length: '64'\nlearn_padding: false\nuse_cpu: true\n"
    settings += "trainable: [refiner]\npreset: null\nbf16: false\nsave_backbone: true\nmin_confidence: 0.9\n"
    (tmp_path / "r.yaml").write_text(f"{settings}output_dir: {tmp_path}\n")
    method, values = load_settings(config=str(tmp_path / "r.yaml"))
    parser = HfArgumentParser((method.script_arguments, method.training_arguments))
    flags = ["--no_save_backbone", "--min_confidence", "1", "--lr=2e-4", "--trainable", "a", "b"]
    for arguments, changed in (([], {}), (flags, {"save_backbone": False, "min_confidence": 1.0})):
        script_args, training_args = parse_recipe(parser, arguments, values)
        found = {**vars(script_args), **vars(training_args)}
        expected = {"weight_decay": 1.0, "max_length": 64, "learn_padding": False, "use_cpu": True, "preset": None}
        expected |= {"save_backbone": True, "min_confidence": 0.9, **changed}
        expected |= {"learning_rate": 2e-4 if changed else 1e-4, "trainable": ["a", "b"] if changed else ["refiner"]}
        assert {name: found[name] for name in expected} == expected
        assert all(type(found[name]) is type(value) for name, value in expected.items())
    with pytest.raises(ValueError, match=r"--max_lenght.*--max_length"):
        parse_recipe(parser, ["--max_lenght", "3"], values)


def test_recipe_errors(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rte: 1e-4\n")
    with pytest.raises(ValueError, match=r"unknown key 'learning_rte' \(did you mean 'learning_rate'\?\)"):
        load_recipe(str(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"r.yaml is not valid YAML"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_last_layers_of_the_backbone_train(tmp_path):
    report = set_trainable(model := new_hybrid(), ["refiner", *last_layers(model, 1)])
    assert report.trainable == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith(("refiner.", "backbone.model.layers.1."))
    )
    assert last_layers(new_backbone(), 2) == ["model.layers.0", "model.layers.1"]
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(vocab_size=20, **sizes))
    assert last_layers(bert, 1) == ["bert.encoder.layer.2"]
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and the 2 layers of the backbone, got {number}"):
            last_layers(model, number)


@pytest.fixture
def config_file(tmp_path) -> str:
    (tmp_path / "small.json").write_text(json.dumps(SIZES))
    return str(tmp_path / "small.json")


def test_the_train_command_trains_the_last_layer_and_says_so(tmp_path, config_file, capsys):
    folder = tmp_path / "out"
    assert main(train_command(config_file, folder, "--train_last_layers", "1", "--max_steps", "2")) == 0
    printed = capsys.readouterr().out
    model = AutoModelForMaskedLM.from_pretrained(folder)
    trains = [p.numel() for n, p in model.named_parameters() if n.startswith(("refiner.", "backbone.model.layers.1."))]
    assert f"trainable parameters: {sum(trains):,} of {model.num_parameters():,}" in printed


def test_tensorboard_shows_what_the_csv_files_say(tmp_path, samples):
    run = trainer(
        new_hybrid(),
        tmp_path / "run",
        samples,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        report_to="tensorboard",
    )
    run.train()
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out.tfevents.*"))))
    events.Reload()
    for file, group in (("training_metrics.csv", "train"), ("validation_metrics.csv", "eval")):
        rows = list(csv.DictReader((tmp_path / "run" / file).open()))
        columns = {column for column in rows[0] if column not in ("step", "epoch")}
        shown = {tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith(f"{group}/")}
        assert {column.removeprefix("eval_") for column in columns} <= shown
        for column in columns:
            scalars = events.Scalars(f"{group}/{column.removeprefix('eval_')}")
            written = {int(row["step"]): float(row[column]) for row in rows if row[column]}
            assert {scalar.step: scalar.value for scalar in scalars} == pytest.approx(written, rel=1e-5), column
        assert {"refinement_steps", "chunk_confidence", "refiner_confidence", "refined_share"} <= shown


def train_command(config_file: str, folder: Path, *more: str) -> list[str]:
    flags = f"--recipe warmup --backbone {config_file} --dataset_name arithmetic --split train[:64] --num_terms 4"
    flags += " --refiner recursive_refinement_head --head_hidden_size 16 --chunk_size 5 --max_steps 4"
    flags += f" --logging_steps 1 --use_cpu --output_dir {folder}"
    return ["train", *flags.split(), *more]


def test_train_command_with_recipe_values_typed_and_overridden(tmp_path, config_file, capsys):
    (tmp_path / "mine.yaml").write_text("lr_scheduler_type: constant\nweight_decay: 5e-2\nmin_confidence: 0.9\n")
    folder = tmp_path / "out"
    more = ("--config", str(tmp_path / "mine.yaml"), "--batch_size", "8", "--save_steps", "2")
    assert main(train_command(config_file, folder, *more)) == 0
    saved = torch.load(folder / "training_args.bin", weights_only=False)  # written by the run above
    assert (saved.learning_rate, saved.weight_decay, saved.per_device_train_batch_size) == (1e-4, 0.05, 8)
    assert saved.lr_scheduler_type == "constant"
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.config.min_confidence == 0.9 and model.config.chunk_size == 5
    assert "trainable parameters" in capsys.readouterr().out

    assert main(train_command(config_file, folder)) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert (
        main(
            train_command(
                config_file,
                folder,
                "--resume_from_checkpoint",
                "true",
                "--resume_with_changes",
                "true",
                "--max_steps",
                "6",
            )
        )
        == 0
    )
    assert len(list(csv.DictReader((folder / "training_metrics.csv").open()))) == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (["--backbone", "nowhere.json"], "There is no config file nowhere.json"),
        (["--chunk_size", "0"], "chunk_size must be at least 1, got 0"),
        (["--dataset_name", "gsm"], "did you mean 'gsm8k'"),
        (["--max_length", "9999"], "max_length=9999 is more than the model's context of 512"),
        (["--max_length", "4"], "max_length=4: raise max_length, or make chunk_size smaller"),
        (["--max_length", "4", "--chunk_size", "4"], "raise max_length"),
        (["--trainable", "refinr"], "'refinr' matches no module"),
        (["--train_last_layers", "3"], "between 1 and the 2 layers of the backbone, got 3"),
        (["--train_last_layers", "1", "--freeze_backbone", "false"], "everything trains: leave out train_last_layers"),
        (["--muon_learning_rate", "1e-3"], "has no effect without use_muon"),
        (["--ema_decay", "1"], "ema_decay must be at least 0 and below 1"),
        (["--learning_rte", "1"], "did you mean '--learning_rate'"),
        (["--resume_from_checkpoint", "nowhere"], "trainer_state.json is missing"),
        (["--lr", "fast"], "must be a finite number, got 'fast'"),
        (["--deep_supervision_schedule", "cubic"], "must be one of"),
        (["--label_smoothing_factor", "0.1"], "would replace the model's own loss"),
    ],
)
def test_train_command_mistakes_leave_nothing_behind(tmp_path, config_file, capsys, change, message):
    folder = tmp_path / "out"
    assert main(train_command(config_file, folder, *change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not folder.exists() or not os.listdir(folder)


def test_profile_leaves_a_table_and_a_trace_of_the_steps(tmp_path, config_file):
    folder = tmp_path / "out"
    assert main(train_command(config_file, folder, "--max_steps", "6", "--profile_steps", "2")) == 0
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    # One step is left out, one warms up; the third and fourth of six are recorded.
    assert sorted({name for name in names if name.startswith("ProfilerStep")}) == ["ProfilerStep#2", "ProfilerStep#3"]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert {"aten::addmm", "aten::layer_norm", "aten::embedding", "aten::scaled_dot_product_attention"} <= set(names)
    table = (folder / "profile.txt").read_text()
    assert table.startswith("2 training steps") and "aten::addmm" in table and "Self CPU time total" in table


def test_profile_needs_enough_steps(tmp_path, config_file, capsys):
    folder = tmp_path / "out"
    assert main(train_command(config_file, folder, "--profile_steps", "3")) == 2
    assert "profile_steps=3 needs 5 training steps" in capsys.readouterr().err
    assert not folder.exists() or not [name for name in os.listdir(folder) if name.startswith("profile")]
    assert main(train_command(config_file, folder, "--profile_steps", "0")) == 2
    assert "profile_steps must be at least 1, got 0" in capsys.readouterr().err


def test_two_runs_on_one_folder(tmp_path, config_file, capsys):
    from filelock import FileLock

    folder = tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / ".training.lock"):
        assert main(train_command(config_file, folder)) == 1
    assert "Another run is writing to" in capsys.readouterr().err
