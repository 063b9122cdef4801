"""How well a refiner's confidence predicts its accuracy."""

import torch
from transformers import EvalPrediction

NUM_BINS = 10
NOT_REFINED = -100.0  # in place of an accuracy; the Trainer also pads with -100 where a batch has fewer chunks


def expected_calibration_error(confidence: torch.Tensor, accuracy: torch.Tensor, num_bins: int = NUM_BINS) -> float:
    """
    The expected calibration error (Guo et al., arXiv 1706.04599, equation 3): the distance between mean confidence and
    mean accuracy in each of `num_bins` bins of equal width, weighted by the share of predictions in the bin.

    Args:
        confidence: `[M]` in [0, 1], of each prediction.
        accuracy: `[M]` in [0, 1], of each prediction.
        num_bins: the bins are `[0, 1/n), [1/n, 2/n), ..., [(n - 1)/n, 1]`.

    Raises:
        ValueError: without a prediction.
    """
    if not len(confidence):
        raise ValueError("A calibration error needs at least one prediction.")
    gap = (confidence - accuracy).double()
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    # A bin's weight times the distance of its means is the distance of its sums over the number of predictions.
    return (gap.new_zeros(num_bins).index_add(0, bins, gap).abs().sum() / len(gap)).item()


def chunk_calibration(outputs: EvalPrediction) -> dict[str, float]:
    """
    The calibration error of the chunks that were refined; nothing if none was.

    Args:
        outputs: the refiner's confidence as predictions `[R, N]`, the accuracy or NOT_REFINED as labels `[R, N]`.
    """
    confidence, accuracy = torch.from_numpy(outputs.predictions), torch.from_numpy(outputs.label_ids)
    refined = accuracy != NOT_REFINED
    if not refined.any():
        return {}
    return {"expected_calibration_error": expected_calibration_error(confidence[refined], accuracy[refined])}
