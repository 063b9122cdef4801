"""The calibration error against the definition written out, and over a whole evaluation set."""

import copy

import pytest
import torch
from conftest import metrics
from tiny_training import TOKENIZER, new_backbone, new_hybrid, trainer

from llada_trm_hf.data import MaskedDiffusionCollator
from llada_trm_hf.training.masked_diffusion_trainer import expected_calibration_error


def plain_error(confidence: list[float], accuracy: list[float], num_bins: int) -> float:
    error = 0.0
    for number in range(num_bins):
        low, high = number / num_bins, (number + 1) / num_bins
        inside = [i for i, c in enumerate(confidence) if low <= c < high or (number == num_bins - 1 and c == 1)]
        if inside:
            mean_accuracy, mean_confidence = (sum(v[i] for i in inside) / len(inside) for v in (accuracy, confidence))
            error += len(inside) / len(confidence) * abs(mean_accuracy - mean_confidence)
    return error


@pytest.mark.parametrize("num_bins", [1, 2, 10])
def test_the_definition(num_bins):
    generator = torch.Generator().manual_seed(0)
    confidence, accuracy = torch.rand(200, generator=generator), torch.rand(200, generator=generator).round()
    confidence[:2] = torch.tensor([0.0, 1.0])
    expected = plain_error(confidence.tolist(), accuracy.tolist(), num_bins)
    assert expected > 0.01
    assert expected_calibration_error(confidence, accuracy, num_bins) == pytest.approx(expected, abs=1e-6)


def test_known_values():
    assert expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.75]), torch.tensor([1.0, 1, 1, 0])) == 0
    assert expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1
    with pytest.raises(ValueError, match="at least one"):
        expected_calibration_error(torch.empty(0), torch.empty(0))


class AllOverTheBins(torch.nn.Module):
    """A chunk's confidence, before the sigmoid."""

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return 3 * (30 * codes.sum(-1, keepdim=True)).sin()


@torch.no_grad()
def chunks_of(model, samples, batch_size: int) -> tuple[list[float], list[float]]:
    """Confidence and accuracy of every refined chunk, token by token from the logits."""
    collator = MaskedDiffusionCollator(TOKENIZER.mask_token_id, TOKENIZER.pad_token_id, seed=42, fixed=True)
    size, confidence, accuracy = model.config.chunk_size, [], []
    for start in range(0, len(samples), batch_size):
        batch = collator([samples[i] for i in range(start, min(start + batch_size, len(samples)))])
        outputs = model(**batch, logits_to_keep=0)
        best = outputs.logits.argmax(-1)
        for row in range(len(best)):
            for chunk in range(-(-best.shape[1] // size)):
                columns = range(chunk * size, min((chunk + 1) * size, best.shape[1]))
                masked = [c for c in columns if batch["labels"][row, c] != -100]
                masked = [c for c in masked if batch["input_ids"][row, c] == TOKENIZER.mask_token_id]
                if outputs.refinement_steps[row, chunk]:
                    right = [bool(best[row, c] == batch["labels"][row, c]) for c in masked]
                    accuracy.append(sum(right) / len(right))
                    confidence.append(outputs.refiner_confidence[row, chunk].item())
    return confidence, accuracy


@pytest.mark.parametrize("batch_size", [80, 32])  # 32: the last batch is smaller
def test_over_the_whole_evaluation_set(tmp_path, samples, batch_size):
    model = new_hybrid(freeze_backbone=False)
    run = trainer(model, tmp_path, samples, max_steps=60, per_device_eval_batch_size=batch_size)
    run.train()
    model.refiner.confidence = AllOverTheBins()
    reported = run.evaluate()["eval_expected_calibration_error"]
    model = copy.deepcopy(run.model).eval()
    confidence, accuracy = chunks_of(model, run.eval_dataset, batch_size)
    assert len(confidence) > 20 and 0 < sum(accuracy) < len(accuracy)
    assert len({int(10 * c) for c in confidence}) > 5
    assert reported == pytest.approx(plain_error(confidence, accuracy, 10), abs=1e-5)
    assert metrics(tmp_path, "validation_metrics.csv", "eval_expected_calibration_error") == pytest.approx([reported])


def test_nothing_is_reported_without_refined_chunks(tmp_path, samples):
    hybrid = new_hybrid()
    hybrid.config.min_confidence = 0.0
    for model in (new_backbone(), hybrid):
        reported = trainer(model, tmp_path, samples).evaluate()
        assert "eval_loss" in reported and "eval_expected_calibration_error" not in reported
