"""Training slot refiners: recipes, metrics, settings."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import DATA, metrics
from tiny_training import SIZES, TOKENIZER, new_backbone, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM

from llada_trm_hf import (
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RefinerCascade,
    RefinerMix,
    SlotTRMRefiner,
    SlotTRMRefinerConfig,
)
from llada_trm_hf.cli.main import main
from llada_trm_hf.recipes.recipe import load_recipe

STATISTICS = {
    *(
        f"{kind}_{slot}"
        for kind in ("slot_norm", "gate")
        for slot in ("context", "reasoning", "refinement", "confidence")
    ),
    *(f"orthogonality_{pair}" for pair in ("context_reasoning", "context_refinement", "reasoning_refinement")),
    "delta_norm",
    "token_confidence",
    "similarity",
}
COLUMNS = {
    *STATISTICS,
    *(f"{name}_loss" for name in ("diffusion", "backbone", "deep_supervision", "confidence", "orthogonality")),
    *("loss", "refined_share", "refinement_steps", "chunk_confidence", "refiner_confidence"),
}


def columns(folder: Path, name: str) -> dict[str, list[str]]:
    with (folder / name).open() as file:
        rows = list(csv.DictReader(file))
    return {column: [row[column] for row in rows] for column in rows[0]}


@pytest.fixture
def config_file(tmp_path) -> str:
    (tmp_path / "small.json").write_text(json.dumps(SIZES))
    return str(tmp_path / "small.json")


def command(config_file: str, folder: Path, recipe: str, *more: str) -> list[str]:
    flags = f"--recipe {recipe} --backbone {config_file} --dataset_name arithmetic --split train[:64] --num_terms 4"
    flags += f" --chunk_size 5 --logging_steps 1 --use_cpu --disable_tqdm true --output_dir {folder}"
    return ["train", *flags.split(), *more]


def test_slot_warmup_cpu_learns_and_reports_everything(tmp_path, config_file):
    more = "--max_steps 30 --gradient_accumulation_steps 2 --batch_size 8 --lr 1e-2 --delta_scale 1"
    more += " --eval_split test[:32] --eval_strategy steps --eval_steps 15 --eval_on_start true"
    assert main(command(config_file, tmp_path / "out", "slot_warmup_cpu", *more.split())) == 0
    training = columns(tmp_path / "out", "training_metrics.csv")
    assert set(training) >= COLUMNS and all(all(training[name]) for name in COLUMNS)
    assert all(float(value) == float(value) for name in COLUMNS for value in training[name]), "NaN"
    steps = metrics(tmp_path / "out", "training_metrics.csv", "refinement_steps")
    assert steps[0] == 1 and steps[-1] > 1.9  # an untrained refiner has nothing to add; 2 are the recipe's
    validation = columns(tmp_path / "out", "validation_metrics.csv")
    assert set(validation) >= {f"eval_{name}" for name in COLUMNS} and len(validation["eval_loss"]) == 3
    refined = metrics(tmp_path / "out", "validation_metrics.csv", "eval_diffusion_loss")
    backbone = metrics(tmp_path / "out", "validation_metrics.csv", "eval_backbone_loss")
    assert backbone[0] == pytest.approx(backbone[-1]) and refined[0] == pytest.approx(backbone[0], rel=1e-3)
    assert refined[-1] < 0.9 * refined[0]
    assert metrics(tmp_path / "out", "training_metrics.csv", "orthogonality_loss")[-1] > 0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model.refiner) is SlotTRMRefiner and model.refiner.config.num_hidden_layers == 2


def test_metrics_are_those_the_model_reports(tmp_path, samples):
    refiner = SlotTRMRefinerConfig(hidden_size=32, chunk_size=5, preset="tiny")
    model = LLaDATRMForMaskedDiffusion.from_backbone(new_backbone(), refiner, min_confidence=0.9)
    run = trainer(model, tmp_path, samples, max_steps=1, per_device_eval_batch_size=80)
    found, batch = run.evaluate(), next(iter(run.get_eval_dataloader()))
    outputs = model.eval()(**batch, logits_to_keep=1)
    expected = outputs.refiner_statistics
    assert set(expected) == STATISTICS
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value.nanmean().item(), rel=1e-3, abs=1e-5, nan_ok=True), name
    assert found["eval_orthogonality_loss"] == pytest.approx(outputs.loss_components["orthogonality"].item(), rel=1e-4)


def test_statistics_do_not_read_the_device(samples):
    """Not one number more is brought to the host with them than without: no hidden synchronisation in a step."""

    class HostReads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    refiner = SlotTRMRefiner(
        SlotTRMRefinerConfig(hidden_size=32, chunk_size=5, preset="tiny", convergence_threshold=0)
    )
    states, counts = torch.randn(2, 20, 32), []
    for statistics in (False, True):
        with HostReads() as reads:
            refiner(states, output_statistics=statistics)
        counts.append(reads.count)
    assert counts[0] == counts[1] == 1 + 3  # which rows there are, and after each step but the last which go on


# --- Recipes ---


@pytest.mark.parametrize(
    "name, values",
    [
        (
            "slot_warmup",
            {
                "freeze_backbone": True,
                "learning_rate": "5e-4",
                "num_train_epochs": 5,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "max_recursive_steps": 4,
                "deep_supervision_weight": 0.3,
                "orthogonality_weight": 0.01,
            },
        ),
        (
            "slot_warmup_cpu",
            {
                "freeze_backbone": True,
                "learning_rate": "5e-4",
                "num_train_epochs": 2,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 16,
                "split": "train[:1000]",
                "max_length": 256,
                "max_recursive_steps": 2,
                "dataloader_num_workers": 0,
                "dataloader_pin_memory": False,
            },
        ),
        (
            "slot_finetune",
            {
                "learning_rate": "1e-5",
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "train_last_layers": 2,
            },
        ),
        ("slot_full", {"freeze_backbone": False, "learning_rate": "1e-6", "max_steps": 3000}),
    ],
)
def test_slot_recipes_load(name, values):
    recipe = load_recipe(name)
    assert {key: recipe[key] for key in values} == values and recipe["refiner"] == "slot_trm_refiner"


def trained(folder: Path) -> set[str]:
    """The parts of the model that one step has changed, as prefixes of names."""
    before, after = (AutoModelForMaskedLM.from_pretrained(folder / name) for name in ("checkpoint-1", "checkpoint-2"))
    moved = [name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    return {
        name.split(".layers.")[0] + name.split(".layers.")[1][:1] if ".layers." in name else name for name in moved
    }


@pytest.mark.parametrize(
    "recipe, more, expected",
    [
        ("slot_warmup", [], set()),
        ("slot_finetune", ["--train_last_layers", "1"], {"backbone.model1"}),
        (
            "slot_full",
            [],
            {"backbone.model0", "backbone.model1", "backbone.lm_head.weight", "backbone.model.norm.weight"},
        ),
    ],
)
def test_what_a_slot_recipe_trains(tmp_path, config_file, recipe, more, expected):
    more = [*more, "--max_steps", "2", "--save_steps", "1", "--batch_size", "4", "--gradient_accumulation_steps", "1"]
    more += ["--preset", "tiny", "--lr", "1e-3", "--warmup_steps", "0", "--lr_scheduler_type", "constant"]
    assert main(command(config_file, tmp_path / "out", recipe, *more)) == 0
    found = trained(tmp_path / "out")
    assert any(name.startswith("refiner") for name in found)
    backbone = {name for name in found if name.startswith("backbone")}
    assert backbone - {"backbone.model.embed_tokens.weight"} == expected


@pytest.mark.parametrize("integration, model_class", [("cascade", RefinerCascade), ("mix", RefinerMix)])
def test_refiners_that_work_together(tmp_path, config_file, integration, model_class):
    settings = "--refiner recursive_refinement_head,slot_trm_refiner --head_hidden_size 16 --preset tiny --dropout 0.1"
    settings += f" --context_slot_size 12 --use_gating false --max_steps 2 --integration {integration}"
    assert main(command(config_file, tmp_path / "out", "slot_warmup", *settings.split())) == 0
    refiner = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").refiner
    assert type(refiner) is model_class
    head, slots = refiner.refiners
    assert type(head) is RecursiveRefinementHead and type(slots) is SlotTRMRefiner
    assert head.config.head_hidden_size == 16 and head.config.step_size == 0.1
    assert (slots.config.context_slot_size, slots.config.use_gating, slots.config.dropout) == (12, False, 0.1)
    assert head.config.max_recursive_steps == slots.config.max_recursive_steps == 4  # the recipe's
    names = columns(tmp_path / "out", "training_metrics.csv")
    assert {"slot_norm_context", "similarity", "orthogonality_loss"} <= set(names)
    assert ("mix_share_1" in names) == (integration == "mix") and "gate_context" not in names


@pytest.mark.parametrize(
    "change, message",
    [
        (["--head_hidden_size", "8"], "head_hidden_size: not a setting of slot_trm_refiner"),
        (
            ["--refiner", "recursive_refinement_head", "--preset", "tiny"],
            "preset: not a setting of recursive_refinement",
        ),
        (["--refiner", "slot_refiner"], "did you mean 'slot_trm_refiner'"),
        (["--preset", "huge"], "preset must be one of tiny, base, large, got 'huge'"),
        (["--context_slot_size", "40"], "slots are 60 wide together"),
        (["--integration", "mix"], "integration='mix', but there is only one refiner"),
        (["--refiner", "slot_trm_refiner,recursive_refinement_head"], "2 refiners, but integration=None"),
        (["--integration", "stack"], "integration must be one of replace, cascade, mix"),
        (["--orthogonality_weight", "-1"], "orthogonality_weight must be 0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_leave_nothing_behind(tmp_path, config_file, capsys, change, message):
    assert main(command(config_file, tmp_path / "out", "slot_warmup", *change)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_slot_warmup_cpu_on_gsm8k(tmp_path, config_file):
    if not (DATA / "gsm8k/train.jsonl").exists():
        pytest.skip(f"no GSM8K in {DATA}")
    more = "--dataset_name gsm8k --split train[:8] --max_steps 2 --gradient_accumulation_steps 2 --chunk_size 16"
    more += f" --data_files {DATA / 'gsm8k/train.jsonl'} --max_length 400"
    assert main(command(config_file, tmp_path / "out", "slot_warmup_cpu", *more.split())) == 0
    assert set(columns(tmp_path / "out", "training_metrics.csv")) >= COLUMNS
    assert len(TOKENIZER) == AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.get_text_config().vocab_size
