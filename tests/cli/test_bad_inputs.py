"""What a newcomer gets wrong: one line that names the thing, exit code 2, no traceback, and nothing half-written."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import IN_TWO_PROCESSES, ROOT
from run_programs import run_program
from safetensors.torch import load_file, save_file
from tiny_training import SIZES, new_backbone
from transformers import LlamaConfig, LlamaForCausalLM

from llada_trm_hf import (
    DimensionCompressor,
    DimensionCompressorConfig,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHeadConfig,
    SequenceTRM,
    SequenceTRMConfig,
)
from llada_trm_hf.cli.main import main
from llada_trm_hf.data import byte_tokenizer

LATIN_1 = "caf\xe9\n".encode("latin-1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of models of every kind, whole and broken, and of other things."""
    place, tokenizer = tmp_path_factory.mktemp("place"), byte_tokenizer()
    torch.manual_seed(0)
    backbone = new_backbone(num_hidden_layers=1, max_position_embeddings=64)
    backbone.save_pretrained(place / "backbone")
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=8)
    hybrid = LLaDATRMForMaskedDiffusion.from_backbone(backbone, head)
    hybrid.save_pretrained(place / "hybrid")
    for name, path in (("head", "runs/bb"), ("lost", "../bb")):
        hybrid.config.backbone_name_or_path = path
        hybrid.save_pretrained(place / name, save_backbone=False)
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)).save_pretrained(
        place / "lm"
    )
    DimensionCompressor(DimensionCompressorConfig(hidden_size=32, compressed_size=8)).save_pretrained(
        place / "compressor"
    )
    SequenceTRM(SequenceTRMConfig(hidden_size=8, n_heads=2, n_layers=1)).save_pretrained(place / "trm")
    for name in ("backbone", "hybrid", "lm", "head"):
        tokenizer.save_pretrained(place / name)
    (place / "empty").mkdir()
    (place / "pairs").mkdir()
    (place / "pairs/datagen_config.json").write_text("{}")
    (place / "unfinished/checkpoint-40").mkdir(parents=True)
    _broken(place, "list", "config.json", lambda text: "[]")
    _broken(place, "gellu", "config.json", lambda text: text.replace('"silu"', '"gellu"'))
    _broken(place, "rope", "config.json", lambda text: text.replace('"default"', '"spiral"'))
    _broken(place, "tokens", "tokenizer.json", lambda text: json.dumps({**json.loads(text), "added_tokens": None}))
    shutil.copytree(place / "hybrid", place / "hot")
    (place / "hot/generation_config.json").write_text('{"temperature": Infinity}')
    shutil.copytree(place / "backbone", place / "whole_numbers")
    weights = load_file(place / "backbone/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].int()
    save_file(weights, place / "whole_numbers/model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(1)
    type(backbone)(backbone.config).save_pretrained(place / "other")
    shutil.copytree(place / "head", place / "moved")
    config = json.loads((place / "moved/config.json").read_text())
    (place / "moved/config.json").write_text(json.dumps({**config, "backbone_name_or_path": "../other"}))
    (place / "small.json").write_text(json.dumps(SIZES))
    (place / "typo.json").write_text(json.dumps({**SIZES, "hiden_size": 32}))
    (place / "nan.json").write_text(json.dumps({**SIZES, "rms_norm_eps": float("nan")}))
    rows = [{"prompt": f"{n}=", "reasoning": "", "answer": str(n)} for n in range(8)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "latin.txt").write_bytes(LATIN_1)
    (place / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "reasoning": "", "answer": "1"}\n')
    (place / "latin.yaml").write_bytes(b"# caf\xe9\nseed: 1\n")
    (place / "twice.yaml").write_text("seed: 1\nlearning_rate: 1e-3\nseed: 2\n")
    (place / "file").write_text("precious")
    return place


def _broken(place, name, file, change):
    """A copy of the backbone in which one file is not what it should be."""
    shutil.copytree(place / "backbone", place / name)
    text = (place / name / file).read_text()
    assert change(text) != text
    (place / name / file).write_text(change(text))


GENERATE = "generate --prompt 1= --device cpu --max_new_tokens 4 --checkpoint "
WARMUP = "train --recipe warmup --use_cpu --max_steps 1 --output_dir OUT "
TRAIN = WARMUP + "--backbone small.json "
ONE_A = "train --recipe compressor_1a --use_cpu --output_dir OUT --dataset_name train.jsonl "
TRM = "train --recipe trm --use_cpu --output_dir OUT --pairs_dir pairs "
ANSWER = "train --recipe latent_answer --use_cpu --output_dir OUT "
EVALUATE = "evaluate --device cpu --output_dir OUT --dataset_name arithmetic --split test[:4] --model "
DATAGEN = "datagen --device cpu --output_dir OUT --dataset arithmetic --split train[:4] --model "
PUSH = "push --dry_run --repo owner/name --checkpoint "


@pytest.mark.parametrize(
    "command, named",
    [
        # Models that are not there, or of another kind.
        (GENERATE + "no/such/folder", "no/such/folder"),
        (GENERATE + "nowhere", "nowhere"),
        (GENERATE + "file", "file is a file"),
        (GENERATE + "empty", "empty is empty"),
        (GENERATE + "pairs", "pairs holds hidden pairs"),
        (GENERATE + "unfinished", "checkpoint-40"),
        (GENERATE + "compressor", "compressor holds a compressor"),
        (GENERATE + "lm", "lm is a LlamaForCausalLM, which does not generate by diffusion"),
        (GENERATE + "list", "config.json must hold a JSON object, got a list"),
        (GENERATE + "gellu", "hidden_act 'gellu' (did you mean 'gelu'?)"),
        (GENERATE + "rope", "rope_type 'spiral'"),
        (GENERATE + "tokens", "The tokenizer of tokens cannot be read"),
        (WARMUP + "--backbone nowhere", "--backbone: There is no folder nowhere"),
        (WARMUP + "--backbone compressor", "--backbone: compressor holds a compressor"),
        (WARMUP + "--backbone hybrid", "--backbone: hybrid holds a hybrid"),
        (WARMUP + "--backbone lm", "lm is a llama model without a mask token"),
        (WARMUP + "--backbone pairs", "--backbone: pairs holds hidden pairs"),
        (WARMUP + "--backbone nowhere.json", "There is no config file nowhere.json"),
        (WARMUP + "--checkpoint backbone", "--checkpoint: backbone holds a llada model"),
        (TRAIN + "--tokenizer nowhere", "--tokenizer: There is no folder nowhere"),
        (TRAIN + "--refiner recursive_refinment_head", "did you mean 'recursive_refinement_head'?"),
        (ONE_A + "--backbone trm", "--backbone: trm holds a SequenceTRM"),
        (ONE_A + "--backbone lm --init checkpoint --compressor lm", "--compressor: lm holds a llama model"),
        (TRM + "--compressor nowhere", "--compressor: There is no folder nowhere"),
        (TRM + "--checkpoint compressor", "--checkpoint: compressor holds a compressor"),
        (TRM, "pairs holds an unfinished run of datagen"),
        (ANSWER + "--backbone lm --trm compressor", "--trm: compressor holds a compressor"),
        (ANSWER + "--backbone empty", "--backbone: empty is empty"),
        ("train --recipe grpo --output_dir OUT --checkpoint lm", "--checkpoint: lm holds a llama model"),
        (EVALUATE + "empty", "empty is empty"),
        (EVALUATE + "trm", "trm holds a SequenceTRM"),
        (DATAGEN + "compressor", "--model: compressor holds a compressor"),
        (DATAGEN + "lm --compressor trm", "--compressor: trm holds a SequenceTRM"),
        (PUSH + "empty", "empty"),
        (PUSH + "nowhere", "nowhere"),
        ("export-onnx --output model.onnx --checkpoint pairs", "pairs"),
        (GENERATE + "head", "head holds no backbone, but names one: There is no folder runs/bb"),
        (GENERATE + "lost", "lost holds no backbone, and the folder of the one it names is not there: ../bb"),
        # Two sources for one thing.
        (WARMUP + "--checkpoint hybrid --backbone backbone", "has its own backbone"),
        (WARMUP + "--checkpoint hybrid --chunk_size 8", "has its own chunk_size"),
        (WARMUP + "--checkpoint hybrid --min_confidence 0.5", "has its own min_confidence"),
        (TRM + "--checkpoint trm --n_layers 3", "has its own n_layers"),
        (GENERATE + "hybrid --max_length 9", "--max_length and --max_new_tokens"),
        (GENERATE + "hybrid --remask_budget 2", "--remask_budget has no effect without --remask_committed"),
        # Numbers.
        (TRAIN + "--weight_decay nan", "must be a finite number, got 'nan'"),
        (TRAIN + "--learning_rate inf", "--learning_rate"),
        (TRAIN + "--learning_rate -1", "learning_rate must be at least 0, got -1"),
        (TRAIN + "--max_steps -5", "max_steps must be at least 1"),
        (TRAIN + "--max_steps 0", "max_steps must be at least 1"),
        (TRAIN + "--num_train_epochs -1", "num_train_epochs must be above 0"),
        (TRAIN + "--gradient_accumulation_steps 0", "gradient_accumulation_steps must be at least 1, got 0"),
        (TRAIN + "--logging_steps -1", "logging_steps must be at least 0, got -1"),
        (TRAIN + "--batch_size 0", "per_device_train_batch_size must be at least 1"),
        (TRAIN + "--seed 4294967296", "seed must be between 0 and 4294967295"),
        (TRAIN + "--seed 99999999999999999999", "--seed: must be a number of at most 64 bits"),
        (TRAIN + "--save_steps 0", "save_steps must be above 0"),
        (TRAIN + "--max_length 32 --chunk_size 64", "chunk_size=64 is more than the longest sample, max_length=32"),
        (TRAIN + "--seed one", "--seed: must be a whole number, got 'one'"),
        (TRAIN + "--dtype float23", "dtype must be one of"),
        (ONE_A + "--backbone lm --compressed_size 0", "compressed_size must be at least 1, got 0"),
        (GENERATE + "hybrid --temperature inf", "--temperature: must be a finite number"),
        (GENERATE + "hot", "temperature=inf, which is no finite number"),
        (GENERATE + "hybrid --cfg_scale inf", "--cfg_scale: must be a finite number"),
        (GENERATE + "whole_numbers", "as I32, which no weight can be"),
        (GENERATE + "moved", "moved was trained on another backbone than"),
        (GENERATE + "hybrid --seed -1", "--seed must be between 0 and"),
        (GENERATE + "hybrid --dtype float23", "--dtype"),
        ("demo --output_dir OUT --seed -1", "--seed must be between 0 and"),
        # Devices, places.
        (GENERATE.replace("cpu", "toaster") + "hybrid", "--device toaster"),
        (GENERATE.replace("cpu", "cuda:77") + "hybrid", "--device cuda:77"),
        (EVALUATE.replace("cpu", "toaster") + "hybrid", "--device toaster"),
        (DATAGEN.replace("cpu", "toaster") + "lm", "--device toaster"),
        (TRAIN + "--device toaster", "--device toaster"),
        (TRAIN.replace("OUT", "'' "), "--output_dir is empty"),
        (TRAIN.replace("OUT", "file"), "file is a file: choose another --output_dir"),
        (EVALUATE.replace("OUT", "file/below") + "hybrid", "file is a file: choose another --output_dir"),
        (GENERATE + "hybrid --output_file empty", "'empty' is a folder: name a file"),
        (GENERATE + "hybrid --import_module nowhere.py", "--import_module: there is no file nowhere.py"),
        (GENERATE + "hybrid --import_module no_such_module", "there is no module no_such_module"),
        (PUSH + "hybrid --revision ..", "--revision '..' cannot be the name of a branch"),
        # Data and settings from files.
        (GENERATE.replace("1=", "caf\udce9") + "hybrid", "Prompt 1 is not a text in UTF-8: 'caf\\udce9'"),
        (GENERATE.replace("--prompt 1=", "--prompts_file latin.txt") + "hybrid", "latin.txt is not a text in UTF-8"),
        (TRAIN + "--dataset_name latin.jsonl", "latin.jsonl is not valid json"),
        (TRAIN + "--dataset_name train.jsonl --split trian", "no split 'trian' (did you mean 'train'?)"),
        (TRAIN + "--dataset_name train.jsonl --eval_split tset", "what is trained on"),
        (TRAIN + "--dataset_name train.jsonl --eval_split test", "what is trained on"),
        (
            TRAIN + "--dataset_name train.jsonl --split train[:4] --eval_split test[2:6]",
            "--eval_split test[2:6] of train.jsonl holds what is trained on (--split train[:4])",
        ),
        (TRAIN + "--split train[:100] --eval_split train[50:150]", "holds what is trained on"),
        (TRAIN + "--split train[:100] --eval_split train", "holds what is trained on"),
        (
            TRAIN + "--dataset_name train.jsonl --split train[2:] --eval_split tset[:2]",
            "no split 'tset' (did you mean 'test'?)",
        ),
        (TRAIN + "--dataset_name trian.jsonl", "There is no file trian.jsonl"),
        (TRAIN + "--split test[5000000:6000000]", "Making 6,000,000 different test chains of 8 digits takes minutes"),
        (TRAIN + "--num_terms 2", "There are fewer than 50,000 different train chains of 2 digits"),
        (TRAIN + "--dataset_name sudoku --puzzle_size 5", "puzzle_size of a sudoku must be 4, 6 or 9, got 5"),
        (TRAIN + "--dataset_name sudoku --num_clues 99", "num_clues must be a number from 4 to 15"),
        (TRAIN + "--dataset_name maze --streaming true --max_steps 1 --num_clues 3", "maze takes no num_clues"),
        (WARMUP + "--backbone typo.json", "unknown field 'hiden_size' (did you mean 'hidden_size'?)"),
        (WARMUP + "--backbone nan.json", "rms_norm_eps must be a finite number"),
        ("train --output_dir OUT --backbone small.json --config twice.yaml", "the key 'seed' stands twice"),
        ("train --output_dir OUT --backbone small.json --config latin.yaml", "latin.yaml is not a text in UTF-8"),
        (TRAIN + "--lerning_rate 1", "Unknown option --lerning_rate (did you mean '--learning_rate'?)"),
    ],
)
def test_one_line_names_the_mistake(place, monkeypatch, capfd, command, named):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main([word.strip("'") for word in command.split()]) == 2
    error = capfd.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("llada-trm ")]
    assert len(lines) == 1 and named in lines[0], error
    assert "Traceback" not in error and error.splitlines()[-1] == lines[0]
    assert sorted(place.rglob("*")) == before and (place / "file").read_text() == "precious"


def test_processes_that_do_not_know_of_each_other_are_refused(place, tmp_path):
    """Two, launched for GPUs where there are none: each would take itself for the only one."""
    command = f"{TRAIN} --split train[:8] --num_terms 4".replace("--use_cpu", "").replace("OUT", str(tmp_path / "OUT"))
    result = run_program(
        [*IN_TWO_PROCESSES, "-m", "llada_trm_hf.cli", *command.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=place,
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("llada-trm train: ")]
    assert result.returncode and "llada_trm_hf" in result.stderr and lines, result.stderr
    for line in lines:  # of each process that was not ended before by the launcher, for the other's sake
        assert "2 processes were launched" in line and "examples/accelerate/cpu.yaml" in line
    assert not (tmp_path / "OUT").exists()


def test_a_missing_extra_names_what_to_install(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["trace", "--checkpoint", "hybrid", "--prompt", "1=", "--device", "cpu"]) == 2
    assert "pip install 'llada-trm-hf[" in capsys.readouterr().err


def test_no_pairs_are_a_failure(place, tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "1=", "reasoning": "", "answer": "1"}) + "\n")
    flags = ["--model", str(place / "lm"), "--device", "cpu", "--output_dir", str(tmp_path / "pairs")]
    flags += ["--dataset", str(problems), "--max_new_tokens", "2"]
    assert main(["datagen", *flags]) == 1
    assert "No problem has a complete thought" in capsys.readouterr().err
