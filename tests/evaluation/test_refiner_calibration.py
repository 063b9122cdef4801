"""The curves of `calibrate_refiner` against what the hybrid itself gets right with each setting."""

import json

import pytest
import torch
from conftest import randomise
from tiny_training import TOKENIZER, new_backbone, new_samples

from llada_trm_hf import LLaDATRMForMaskedDiffusion, MaskedDiffusionCollator, TRMRefinerConfig
from llada_trm_hf.cli.main import main
from llada_trm_hf.evaluation.refiner_calibration import calibrate_refiner

CHUNK = 3


@pytest.fixture
def hybrid():
    torch.manual_seed(0)
    config = TRMRefinerConfig(
        hidden_size=32, chunk_size=CHUNK, recursion_size=16, max_recursive_steps=5, convergence_threshold=0.3
    )
    model = LLaDATRMForMaskedDiffusion.from_backbone(new_backbone(initializer_range=0.3), config).eval()
    randomise(model.refiner)
    return model


@torch.no_grad()
def what_it_gets_right(model, samples, min_confidence, threshold):
    """Of all masked tokens; the share of chunks refined; mean steps of these."""
    model.config.min_confidence, model.refiner.config.convergence_threshold = min_confidence, threshold
    collator = MaskedDiffusionCollator(TOKENIZER.mask_token_id, TOKENIZER.pad_token_id, fixed=True)
    right, number, steps, undecided = 0, 0, [], 0
    for i in range(len(samples)):
        batch = collator([samples[i]])
        masked = (batch["input_ids"] == TOKENIZER.mask_token_id) & (batch["labels"] != -100)
        if not masked.any():
            continue
        outputs = model(batch["input_ids"], relevant_tokens=masked)
        right += int((outputs.logits.argmax(-1) == batch["labels"])[masked].sum())
        number += int(masked.sum())
        steps += [taken for taken in outputs.refinement_steps.flatten().tolist() if taken]
        undecided += len({position // CHUNK for position in masked[0].nonzero().flatten().tolist()})
    return right / number, len(steps) / undecided, sum(steps) / max(len(steps), 1)


def test_curves_are_what_the_hybrid_does(hybrid):
    samples = new_samples().select(range(60))
    found = calibrate_refiner(hybrid, samples, TOKENIZER.pad_token_id, batch_size=16)
    assert hybrid.refiner.config.convergence_threshold == 0.3  # as it was
    costs = [point.cost for point in found.by_min_confidence]
    assert costs == sorted(costs) and costs[0] == 0 and costs[-1] == 1 and len(set(costs)) > 3
    for point in found.by_min_confidence[:4]:
        accuracy, refined, _ = what_it_gets_right(hybrid, samples, point.setting, threshold=0.0)
        assert (point.accuracy, point.cost) == pytest.approx((accuracy, refined), abs=1e-6)
    steps = [point.cost for point in found.by_convergence_threshold]
    assert steps == sorted(steps, reverse=True) and steps[0] == 5 and len(set(steps)) > 2
    hybrid.config.refine_low_confidence_only = False
    for point in found.by_convergence_threshold[-5:]:
        accuracy, refined, taken = what_it_gets_right(hybrid, samples, 0.5, point.setting)
        assert refined == 1 and (point.accuracy, point.cost) == pytest.approx((accuracy, taken), abs=1e-6)


def test_the_cheapest_within_the_tolerance(hybrid):
    samples = new_samples().select(range(40))
    for tolerance in (0.0, 0.02, 0.9):
        found = calibrate_refiner(hybrid, samples, TOKENIZER.pad_token_id, tolerance=tolerance)
        for chosen, points in (
            (found.min_confidence, found.by_min_confidence),
            (found.convergence_threshold, found.by_convergence_threshold),
        ):
            best = max(point.accuracy for point in points)
            good = {p.setting: p.cost for p in points if p.accuracy >= best - tolerance}
            assert good[chosen] == min(good.values())
    assert found.min_confidence == 0.0  # where anything may be lost, nothing is refined


def test_the_command_saves_what_it_chose(hybrid, tmp_path, capsys):
    hybrid.save_pretrained(tmp_path / "hybrid")
    TOKENIZER.save_pretrained(tmp_path / "hybrid")
    before = (tmp_path / "hybrid/config.json").read_text()
    command = f"calibrate --checkpoint {tmp_path}/hybrid --dataset_name arithmetic --num_terms 4 --split test[:40]"
    assert main([*command.split(), "--device", "cpu", "--dry_run"]) == 0
    assert (tmp_path / "hybrid/config.json").read_text() == before
    assert main([*command.split(), "--device", "cpu"]) == 0
    assert "min_confidence" in capsys.readouterr().out
    config = json.loads((tmp_path / "hybrid/config.json").read_text())
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "hybrid")
    assert loaded.config.min_confidence == config["min_confidence"] != 0.5
    assert loaded.refiner.config.convergence_threshold == config["refiner_config"]["convergence_threshold"] != 0.3
    changed = json.loads(before)
    changed["min_confidence"] = config["min_confidence"]
    changed["refiner_config"]["convergence_threshold"] = config["refiner_config"]["convergence_threshold"]
    assert config == changed  # and nothing else


def test_bad_input(hybrid, tmp_path, capsys):
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        calibrate_refiner(hybrid, new_samples().select(range(2)), TOKENIZER.pad_token_id, tolerance=-1)
    assert main(["calibrate", "--checkpoint", str(tmp_path / "none")]) == 2
    new_backbone().save_pretrained(tmp_path / "backbone")
    TOKENIZER.save_pretrained(tmp_path / "backbone")
    assert main(["calibrate", "--checkpoint", str(tmp_path / "backbone"), "--dataset_name", "arithmetic"]) == 2
    assert "only hybrids have a refiner" in capsys.readouterr().err
