"""Predictions without the logits of all tokens at once."""

import pytest
import torch
from conftest import MASK

from llada_trm_hf.models import modeling_masked_diffusion
from llada_trm_hf.models.modeling_masked_diffusion import score_tokens


@pytest.mark.parametrize("num_tokens", [0, 1, 6, 7, 20, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_all_logits_at_once(num_tokens, dtype, monkeypatch):
    monkeypatch.setattr(modeling_masked_diffusion, "TOKENS_AT_ONCE", 7)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, dtype=dtype)
    states = torch.randn(num_tokens, 8, dtype=dtype, requires_grad=True)
    tokens = torch.randint(0, 30, (num_tokens,))
    tokens[::3] = -100
    scores = score_tokens(states, head, tokens)

    probabilities = head(states).float().softmax(-1)
    labelled = tokens != -100
    losses = -probabilities.gather(1, tokens.clamp(min=0)[:, None])[:, 0].log() * labelled
    torch.testing.assert_close(scores.losses, losses)
    assert torch.equal(scores.best, probabilities.argmax(-1))
    torch.testing.assert_close(scores.probability, probabilities.amax(-1).detach())
    assert not scores.probability.requires_grad

    weights = torch.rand(num_tokens)
    gradients = [
        torch.autograd.grad((loss * weights).sum(), (states, *head.parameters())) for loss in (scores.losses, losses)
    ]
    for found, expected in zip(*gradients):
        tolerance = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("family", ["backbone", "hybrid", "hybrid that trains its backbone"])
def test_training_never_holds_all_logits(tiny_backbone, make_hybrid, family, monkeypatch):
    """The LM head sees at most so many tokens at a time, forward and backward, and the loss is the same."""
    hybrid = make_hybrid(tiny_backbone, min_confidence=1.0, freeze_backbone=not family.endswith("backbone"))
    model = (tiny_backbone if family == "backbone" else hybrid).train()
    ids = torch.randint(0, MASK, (3, 20))
    noisy = ids.masked_fill(torch.rand(ids.shape) < 0.9, MASK)
    sizes, results = [], []
    hook = tiny_backbone.lm_head.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:-1].numel()))
    for tokens_at_once in (1000, 9):
        monkeypatch.setattr(modeling_masked_diffusion, "TOKENS_AT_ONCE", tokens_at_once)
        sizes.clear()
        model.zero_grad()
        outputs = model(noisy, labels=ids)
        outputs.loss.backward()
        assert outputs.logits is None
        assert max(sizes) == min(int((noisy == MASK).sum()), tokens_at_once)
        results.append([outputs.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    hook.remove()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
