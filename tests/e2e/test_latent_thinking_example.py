"""examples/latent_thinking: its problems, and the whole pipeline at a size that proves nothing but that it runs."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from run_programs import run_program

from llada_trm_hf import LatentThinkingForCausalLM
from llada_trm_hf.cli.main import main

EXAMPLE = ROOT / "examples" / "latent_thinking"


@pytest.mark.slow
def test_the_whole_pipeline(tmp_path):
    tmp_path = tmp_path / "a folder with spaces"
    sizes = {"PROBLEMS": 2000, "LM_STEPS": 100, "PAIRS": 600, "TRM_EPOCHS": 1, "ANSWER_STEPS": 20, "GRPO_STEPS": 4}
    settings = {name: str(value) for name, value in sizes.items()} | {"OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", str(EXAMPLE / "run.sh"), str(tmp_path), "3"]
    run_program(command, seconds=3000, check=True, env={**os.environ, **settings, "PATH": path})
    rows = [json.loads(line) for line in (tmp_path / "lm" / "train.jsonl").read_text().splitlines()]
    lengths = [len(row["prompt"]) - 1 for row in rows]
    assert len(rows) == 2000 and all(abs(lengths.count(n) - 2000 / 7) < 1 for n in range(2, 9))
    held_out = {json.loads(line)["prompt"] for line in (tmp_path / "lm" / "test.jsonl").read_text().splitlines()}
    assert len(held_out) == 1000 and not held_out & {row["prompt"] for row in rows}

    models = {name: LatentThinkingForCausalLM.from_pretrained(tmp_path / name) for name in ("answers", "grpo")}
    lm = models["answers"].backbone.state_dict()
    assert all(torch.equal(lm[name], value) for name, value in models["grpo"].backbone.state_dict().items())
    weights = [model.thinker.projector.weight for model in models.values()]
    assert not torch.equal(*weights)
    flags = [
        "--dataset_name",
        "arithmetic",
        "--data_files",
        str(tmp_path / "lm" / "test.jsonl"),
        "--split",
        "train[:20]",
    ]
    for name, more in (("lm", ["--no_thinking"]), ("lm", []), ("grpo", [])):
        output = str(tmp_path / f"{name}{len(more)}")
        command = ["evaluate", "--model", str(tmp_path / name), *flags, "--max_new_tokens", "50", *more]
        assert main([*command, "--output_dir", output]) == 0
        assert len((Path(output) / "problems.jsonl").read_text().splitlines()) == 20
