"""The hybrid against its forward pass and losses written plainly, and everything a user does with a model."""

import copy
import json
import os
import re
import sys

import pytest
import torch
from conftest import MASK, PAD
from hybrid_models import AUTO_CLASSES, assert_same_model, random_tokens
from run_programs import run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from llada_trm_hf.models import (
    ChunkLayout,
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    LLaDATRMConfig,
    LLaDATRMForMaskedDiffusion,
    RecursiveRefinementHead,
    RecursiveRefinementHeadConfig,
    SlotTRMRefinerConfig,
)

CHUNK = 4


@pytest.fixture
def batch():
    """Three rows of 22 clean tokens, the noisy ones with masks in most chunks, and which of them is a response."""
    clean = random_tokens(3, 22)
    masked = torch.rand(3, 22, generator=torch.Generator().manual_seed(1)) < 0.6
    masked[:, :5] = False
    labels = clean.clone()
    labels[0, :5], labels[1, :9], labels[2, 8:12] = -100, -100, -100  # in row 2 a chunk without label, but masks
    return clean.masked_fill(masked, MASK), labels


def plain_chunks(real, length):
    """For each row and chunk the columns of its tokens, counted from the first real one."""
    columns = [[i for i in range(length) if row[i]] for row in real.tolist()]
    return [[row[n * CHUNK : (n + 1) * CHUNK] for n in range(-(-length // CHUNK))] for row in columns]


def plain_forward(model, input_ids, attention_mask=None, relevant=None):
    """Logits, chunk confidence and steps, chunk by chunk. Also what the refiner was told and what it returned."""
    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    backbone = model.backbone(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    hidden_states, logits = backbone.hidden_states[-1], backbone.logits
    chunks = plain_chunks(real, input_ids.shape[1])
    confidence = torch.ones(len(chunks), len(chunks[0]))
    active = torch.zeros(confidence.shape, dtype=torch.bool)
    for b, row in enumerate(chunks):
        has_mask = any(input_ids[b, i] == MASK for chunk in row for i in chunk)
        for n, chunk in enumerate(row):
            if relevant is not None:
                to_decide = [i for i in chunk if relevant[b, i]]
            else:
                to_decide = [i for i in chunk if input_ids[b, i] == MASK or not has_mask]
            if to_decide:
                best = [logits[b, i].softmax(-1).max() for i in to_decide]
                confidence[b, n] = sum(best) / len(best)
                low = confidence[b, n] < model.config.min_confidence
                active[b, n] = low or not model.config.refine_low_confidence_only
    refined = model.refiner(hidden_states, active, attention_mask, output_step_hidden_states=True)
    refined_logits = model.backbone.lm_head(refined.hidden_states)
    result = logits.clone()
    for b, row in enumerate(chunks):
        for n, chunk in enumerate(row):
            if active[b, n]:
                result[b, chunk] = refined_logits[b, chunk]
    return result, confidence, active, refined


# --- Forward ---


@pytest.mark.parametrize("low_confidence_only", [True, False])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_forward_equals_plain_one(tiny_hybrid, batch, padding, low_confidence_only):
    tiny_hybrid.config.refine_low_confidence_only = low_confidence_only
    input_ids, mask = batch[0], None
    if padding != "none":
        pad = torch.arange(22) < torch.tensor([[3], [0], [9]])
        mask = (~(pad if padding == "left" else pad.flip(-1))).long()
    outputs = tiny_hybrid(input_ids, attention_mask=mask)
    logits, confidence, active, refined = plain_forward(tiny_hybrid, input_ids, mask)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.chunk_confidence, confidence)
    torch.testing.assert_close(outputs.refiner_confidence, refined.confidence)
    assert torch.equal(outputs.refinement_steps, refined.num_steps)
    assert torch.equal(outputs.refinement_steps > 0, active)
    # What is not refined comes straight from the backbone, bit for bit; what is refined really changes.
    base = tiny_hybrid(input_ids, attention_mask=mask, enable_refinement=False).logits
    real = torch.ones_like(input_ids).bool() if mask is None else mask.bool()
    in_active = real & active.gather(1, ((real.long().cumsum(-1) - 1) // CHUNK).clamp(min=0))
    assert torch.equal(outputs.logits[~in_active], base[~in_active])
    assert ((outputs.logits - base).abs().amax(-1)[in_active] > 0.1).all()
    # The cases that matter are there: refined and not, and several numbers of steps.
    undecided = confidence < 1
    assert active.any() and (low_confidence_only or torch.equal(active, undecided))
    assert not low_confidence_only or (undecided & ~active).any()
    assert len(outputs.refinement_steps[active].unique()) > 2


def test_rows_without_masks_and_chosen_tokens(tiny_hybrid, batch):
    """Without masks every token counts; `relevant_tokens` says which do."""
    clean = random_tokens(3, 22, seed=5)
    tiny_hybrid.config.min_confidence = 0.25
    outputs = tiny_hybrid(clean)
    logits, confidence, _, refined = plain_forward(tiny_hybrid, clean)
    assert (confidence < 1).all() and 0 < (refined.num_steps > 0).sum() < refined.num_steps.numel()
    torch.testing.assert_close(outputs.chunk_confidence, confidence)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-4)
    relevant = torch.zeros_like(clean).bool()
    relevant[:, 6:11] = True
    for input_ids in (clean, batch[0]):
        outputs = tiny_hybrid(input_ids, relevant_tokens=relevant)
        logits, confidence, _, _ = plain_forward(tiny_hybrid, input_ids, relevant=relevant)
        torch.testing.assert_close(outputs.chunk_confidence, confidence)
        torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-4)
        assert not outputs.refinement_steps[:, [0, 3, 4, 5]].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("holes", [False, True])
def test_padding_changes_nothing(tiny_hybrid, batch, side, holes):
    input_ids, widths = batch[0], [0, 3, 7]
    mask = torch.zeros(3, 29, dtype=torch.long)
    padded = torch.full((3, 29), MASK)  # padding that looks like something to decide
    for b, width in enumerate(widths):
        columns = torch.arange(22) + (width if side == "left" else 0)
        if holes:
            columns = columns + (columns > 12).long() * (7 - width)
        mask[b, columns], padded[b, columns] = 1, input_ids[b]
    for enable_refinement in (True, False):
        outputs = tiny_hybrid(padded, attention_mask=mask, enable_refinement=enable_refinement)
        for b in range(3):
            alone = tiny_hybrid(input_ids[b : b + 1], enable_refinement=enable_refinement)
            torch.testing.assert_close(outputs.logits[b, mask[b].bool()], alone.logits[0], atol=2e-5, rtol=1e-4)
            if enable_refinement:
                assert alone.refinement_steps.any()
                assert torch.equal(outputs.refinement_steps[b, :6], alone.refinement_steps[0])
                torch.testing.assert_close(outputs.chunk_confidence[b, :6], alone.chunk_confidence[0])
                torch.testing.assert_close(outputs.refiner_confidence[b, :6], alone.refiner_confidence[0])
                assert not outputs.refinement_steps[b, 6:].any() and (outputs.chunk_confidence[b, 6:] == 1).all()


def test_without_refinement_it_is_the_backbone(tiny_hybrid, batch):
    input_ids, labels = batch
    mask = (torch.arange(22) >= torch.tensor([[3], [0], [9]])).long()
    arguments = {"attention_mask": mask, "labels": labels, "output_hidden_states": True}
    ours = tiny_hybrid(input_ids, enable_refinement=False, **arguments)
    backbone = tiny_hybrid.backbone(input_ids, **arguments)
    assert torch.equal(ours.logits, backbone.logits) and torch.equal(ours.loss, backbone.loss)
    for found, expected in zip(ours.hidden_states, backbone.hidden_states, strict=True):
        assert torch.equal(found, expected)
    assert ours.refinement_steps is None
    settings = {"max_new_tokens": 9, "block_length": 3, "temperature": 1.0}
    torch.manual_seed(0)
    expected = tiny_hybrid.backbone.generate(input_ids[:, :4], **settings)
    torch.manual_seed(0)
    assert torch.equal(tiny_hybrid.generate(input_ids[:, :4], enable_refinement=False, **settings), expected)


def test_untrained_head_hardly_changes_the_logits(make_backbone, batch):
    torch.manual_seed(0)
    model = LLaDATRMForMaskedDiffusion.from_backbone(
        make_backbone(), chunk_size=CHUNK, refine_low_confidence_only=False
    )
    outputs, base = model(batch[0]), model(batch[0], enable_refinement=False).logits
    assert outputs.refinement_steps.any()
    assert 0 < (outputs.logits - base).abs().max() < 0.05 * base.std()


def test_hidden_states_and_steps(tiny_hybrid, batch):
    outputs = tiny_hybrid(batch[0], output_hidden_states=True)
    assert len(outputs.hidden_states) == 4  # embeddings, two layers, refined
    torch.testing.assert_close(
        tiny_hybrid.backbone.lm_head(outputs.hidden_states[-1]), outputs.logits, atol=1e-5, rtol=1e-4
    )
    assert tiny_hybrid(batch[0], max_steps=2).refinement_steps.max() == 2
    assert tiny_hybrid(batch[0]).hidden_states is None
    embeddings = tiny_hybrid.get_input_embeddings()(batch[0])
    relevant = batch[0] == MASK
    torch.testing.assert_close(tiny_hybrid(inputs_embeds=embeddings, relevant_tokens=relevant).logits, outputs.logits)
    logits, *_ = tiny_hybrid(batch[0], return_dict=False)
    assert torch.equal(logits, outputs.logits)


@pytest.mark.parametrize(
    "keep",
    [
        0,
        1,
        5,
        torch.tensor([0, 7, 7, 21]),
        torch.tensor([-1, -22]),
        torch.tensor([], dtype=torch.long),
        torch.tensor([[0, 3], [21, 3], [5, 20]]),
        torch.arange(66).view(3, 22) % 5 == 0,
    ],
    ids=lambda keep: str(keep if isinstance(keep, int) else (keep.dtype, tuple(keep.shape))),
)
def test_logits_at_chosen_positions(tiny_hybrid, batch, keep):
    input_ids = batch[0]
    for model in (tiny_hybrid, tiny_hybrid.backbone):
        logits = model(input_ids).logits
        if isinstance(keep, int):
            expected = logits[:, 22 - keep :] if keep else logits
        elif keep.dtype == torch.bool:
            expected = torch.stack([logits[b, i] for b in range(3) for i in range(22) if keep[b, i]])
        elif keep.ndim == 1:
            expected = logits[:, keep.tolist()]
        else:
            expected = torch.stack([logits[b, columns] for b, columns in enumerate(keep.tolist())])
        found = model(input_ids, logits_to_keep=keep).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    base = tiny_hybrid(input_ids, logits_to_keep=keep, enable_refinement=False).logits
    torch.testing.assert_close(base, found, atol=1e-5, rtol=1e-4)


def test_logits_are_built_where_they_are_asked_for(tiny_hybrid, batch):
    """A `[B, L, V]` tensor is never built in training."""
    sizes = []
    tiny_hybrid.backbone.lm_head.register_forward_hook(lambda _, args, logits: sizes.append(logits.numel() // 50))
    tiny_hybrid.train()
    assert tiny_hybrid(batch[0], labels=batch[1]).logits is None
    counted = int(((batch[0] == MASK) & (batch[1] != -100)).sum())
    assert max(sizes) == counted < 66


# --- Losses ---


def plain_token_losses(logits, input_ids, labels, p_mask):
    """The weighted cross-entropy of each masked and labelled token, by position."""
    losses = {}
    for b in range(len(labels)):
        num_labelled = sum(label != -100 for label in labels[b].tolist())
        for i in range(labels.shape[1]):
            if input_ids[b, i] == MASK and labels[b, i] != -100:
                weight = 1 / (p_mask[b] * num_labelled * len(labels))
                losses[b, i] = cross_entropy(logits[b, i], labels[b, i]) * weight
    return losses


@pytest.mark.parametrize("freeze_backbone", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "linear", "exponential"])
@pytest.mark.parametrize("training", [True, False])
def test_losses_equal_plain_ones(make_hybrid, batch, schedule, freeze_backbone, training):
    input_ids, labels = batch
    mask = (torch.arange(22) >= torch.tensor([[3], [0], [0]])).long()
    labels = labels.masked_fill(mask == 0, -100)
    p_mask = torch.tensor([0.6, 0.3, 0.8])
    fields = {"deep_supervision_schedule": schedule, "freeze_backbone": freeze_backbone, "change_loss_weight": 0.7}
    model = make_hybrid(**fields).train(training)
    outputs = model(input_ids, attention_mask=mask, labels=labels, p_mask=p_mask)

    relevant = (input_ids == MASK) & (labels != -100)
    logits, _, active, refined = plain_forward(model, input_ids, mask, relevant)
    token_losses = plain_token_losses(logits, input_ids, labels, p_mask)
    diffusion = sum(token_losses.values())
    base_logits = model.backbone(input_ids, attention_mask=mask).logits
    backbone = sum(plain_token_losses(base_logits, input_ids, labels, p_mask).values())

    chunks = plain_chunks(mask, 22)
    chunk_of = {(b, i): n for b, row in enumerate(chunks) for n, chunk in enumerate(row) for i in chunk}
    came = model.backbone(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    step_losses, change_losses = [], []
    for states in refined.step_hidden_states:
        for result, read in ((step_losses, states), (change_losses, states - came)):
            losses = plain_token_losses(model.backbone.lm_head(read), input_ids, labels, p_mask)
            result.append(sum(loss for (b, i), loss in losses.items() if active[b, chunk_of[b, i]]))
    weights = {
        "constant": [1.0] * len(step_losses),
        "linear": [float(k + 1) for k in range(len(step_losses))],
        "exponential": [2.0**k for k in range(len(step_losses))],
    }[schedule]
    deep_supervision, change = (
        sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        for losses in (step_losses, change_losses)
    )

    calibration = []
    for b, n in active.nonzero().tolist():
        right = [float(logits[b, i].argmax() == labels[b, i]) for i in chunks[b][n] if relevant[b, i]]
        share, confidence = sum(right) / len(right), refined.confidence[b, n]
        calibration.append(-(share * confidence.log() + (1 - share) * (1 - confidence).log()))
    calibration = sum(calibration) / len(calibration)

    components = {
        "diffusion": diffusion,
        "backbone": backbone,
        "deep_supervision": deep_supervision,
        "change": change,
        "confidence": calibration,
    }
    assert set(outputs.loss_components) == set(components)
    for name, value in components.items():
        torch.testing.assert_close(outputs.loss_components[name], value.detach(), rtol=1e-4, atol=1e-5)
        assert not outputs.loss_components[name].requires_grad
    total = (
        diffusion + 0.3 * deep_supervision + 0.7 * change + 0.05 * calibration + (0 if freeze_backbone else backbone)
    )
    torch.testing.assert_close(outputs.loss, total, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs.refinement_steps > 0, active) and len(step_losses) > 2

    # The gradients too.
    outputs.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text
        )


def test_the_change_is_supervised_by_kind(tiny_backbone):
    """By default where it was measured."""
    kinds = {"trm_refiner": 1.0, "recursive_refinement_head": 0.0, "slot_trm_refiner": 0.0}
    for kind, expected in kinds.items():
        config = LLaDATRMForMaskedDiffusion.from_backbone(tiny_backbone, kind, chunk_size=CHUNK).config
        assert config.change_loss_weight == expected
        assert LLaDATRMConfig.from_dict(config.to_dict()).change_loss_weight == expected
        older = config.to_dict()
        del older["change_loss_weight"]
        assert LLaDATRMConfig.from_dict(older).change_loss_weight == expected


def test_calibration_target_is_the_share_the_head_gets_right(make_hybrid, batch):
    """Random labels are never guessed, so the test above sees shares of 0 only: here every second guess is right."""
    input_ids = batch[0]
    model = make_hybrid(deep_supervision_weight=0.0, min_confidence=1.0)
    outputs = model(input_ids)
    labels = outputs.logits.argmax(-1)
    wrong = torch.arange(22) % 2 == 0
    labels = torch.where(wrong, (labels + 1) % MASK, labels)
    outputs = model(input_ids, labels=labels)
    expected, shares = [], []
    for b, n in (outputs.refinement_steps > 0).nonzero().tolist():
        masked = [i for i in range(n * CHUNK, min(n * CHUNK + CHUNK, 22)) if input_ids[b, i] == MASK]
        shares.append(sum(i % 2 for i in masked) / len(masked))
        confidence = outputs.refiner_confidence[b, n]
        expected.append(-(shares[-1] * confidence.log() + (1 - shares[-1]) * (1 - confidence).log()))
    assert len(set(shares)) > 2
    torch.testing.assert_close(outputs.loss_components["confidence"], torch.stack(expected).mean().detach())
    assert "deep_supervision" not in outputs.loss_components


def test_p_mask_is_the_share_of_masked_labels_by_default(tiny_hybrid, batch):
    input_ids, labels = batch
    counted = (input_ids == MASK) & (labels != -100)
    share = counted.sum(-1) / (labels != -100).sum(-1)
    for model in (tiny_hybrid, tiny_hybrid.backbone):
        expected = model(input_ids, labels=labels, p_mask=share).loss
        torch.testing.assert_close(model(input_ids, labels=labels).loss, expected)


@pytest.mark.parametrize("labelled", ["some chunks", "one row", "nothing", "no mask"])
def test_no_nan_where_nothing_is_labelled(make_hybrid, batch, labelled):
    input_ids, labels = batch
    p_mask = None
    if labelled == "one row":
        labels[1:] = -100
    elif labelled == "nothing":
        labels[:] = -100
    elif labelled == "no mask":
        input_ids, p_mask = random_tokens(3, 22), torch.full((3,), 0.01)  # an unlucky draw
    model = make_hybrid(freeze_backbone=False).train()
    outputs = model(input_ids, labels=labels, p_mask=p_mask)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and all(value.isfinite() for value in outputs.loss_components.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if labelled in ("nothing", "no mask"):
        assert outputs.loss == 0


@pytest.mark.parametrize("weights", [{}, {"confidence_loss_weight": 0.0}, {"deep_supervision_weight": 0.0}])
def test_training_step_when_nothing_is_refined(make_hybrid, batch, weights):
    """A confident batch is an ordinary batch: it can be stepped on, and reports the components of any other."""
    model = make_hybrid(**weights).train()
    usual = model(batch[0], labels=batch[1])
    model.config.min_confidence = 0.0
    outputs = model(batch[0], labels=batch[1])
    assert not outputs.refinement_steps.any()
    torch.testing.assert_close(outputs.loss, outputs.loss_components["diffusion"])
    assert set(outputs.loss_components) == set(usual.loss_components)
    outputs.loss.backward()
    # Every parameter takes part (with a gradient of zero), as distributed training needs.
    assert all(p.grad is not None for p in model.refiner.parameters())


def test_who_trains(make_hybrid, batch):
    frozen, free = make_hybrid().train(), make_hybrid(freeze_backbone=False).train()
    for model in (frozen, free):
        model(batch[0], labels=batch[1]).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.refiner.parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen.backbone.parameters())
    assert all(p.grad.abs().max() > 0 for p in free.backbone.parameters())


def test_relevant_tokens_with_labels(tiny_hybrid, batch):
    """What is relevant decides what is refined, not which tokens are in the loss."""
    input_ids, labels = batch
    relevant = torch.zeros_like(input_ids).bool()
    relevant[:, 6:11] = True
    expected = tiny_hybrid(input_ids, labels=labels, relevant_tokens=relevant).loss
    torch.testing.assert_close(tiny_hybrid.train()(input_ids, labels=labels, relevant_tokens=relevant).loss, expected)


def test_labels_need_tokens(tiny_hybrid, batch):
    embeddings = tiny_hybrid.get_input_embeddings()(batch[0])
    for model in (tiny_hybrid, tiny_hybrid.backbone):
        with pytest.raises(ValueError, match="labels need input_ids"):
            model(inputs_embeds=embeddings, labels=batch[1])
        with pytest.raises(ValueError, match=r"labels.*\(3, 21\).*input_ids.*\(3, 22\)"):
            model(batch[0], labels=batch[1][:, 1:])


# --- Training and dtypes ---


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model(batch[0], labels=batch[1]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_gradient_checkpointing(make_hybrid, batch, freeze_backbone):
    model = make_hybrid(freeze_backbone=freeze_backbone).train()
    expected, runs = gradients(model, batch), []
    model.backbone.model.layers[0].self_attn.register_forward_pre_hook(lambda *args: runs.append(1))
    model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    assert freeze_backbone or len(runs) == 2  # the layer ran again in the backward pass
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(
    "backbone_dtype, head_dtype, autocast",
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
    ],
)
def test_trains_and_generates_in_any_dtype(make_hybrid, make_backbone, batch, backbone_dtype, head_dtype, autocast):
    model = make_hybrid(make_backbone().to(backbone_dtype), freeze_backbone=False)
    model.refiner.to(head_dtype)
    reference = make_hybrid().eval()(*batch[:1], labels=batch[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(batch[0], labels=batch[1])
    outputs.loss.backward()
    optimizer.step()
    assert outputs.loss.dtype == torch.float32
    for name in ("diffusion", "backbone"):
        assert outputs.loss_components[name].item() == pytest.approx(reference.loss_components[name].item(), rel=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
        assert parameter.dtype == before[name].dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sequences = model.eval().generate(batch[0][:, :5], max_new_tokens=9, block_length=3)
    assert sequences.shape == (3, 14) and not (sequences == MASK).any()


def test_training_teaches_the_head(make_hybrid, batch):
    """Only the head moves, and what it was shown it then knows."""
    model = make_hybrid(refine_low_confidence_only=False, head={"head_hidden_size": 64}).train()
    backbone = {name: p.clone() for name, p in model.backbone.named_parameters()}
    optimizer = torch.optim.Adam(model.refiner.parameters(), lr=3e-3)
    losses, confidences = [], []
    for _ in range(150):
        outputs = model(batch[0], labels=batch[1])
        losses.append(outputs.loss_components["diffusion"].item())
        confidences.append(outputs.refiner_confidence[outputs.refinement_steps > 0].mean().item())
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(p, backbone[name]) for name, p in model.backbone.named_parameters())
    guesses = model.eval()(batch[0], relevant_tokens=(batch[0] == MASK) & (batch[1] != -100)).logits.argmax(-1)
    counted = (batch[0] == MASK) & (batch[1] != -100)
    assert (guesses == batch[1])[counted].float().mean() > 0.9
    assert confidences[-1] > 0.7  # and it knows that it knows


def test_casting_equals_loading_in_that_dtype(tiny_hybrid, batch, tmp_path):
    """`model.to(torch.bfloat16)` must leave the rotary frequencies in float32, as loading does."""
    tiny_hybrid.backbone.save_pretrained(tmp_path)
    loaded = LLaDAForMaskedDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = copy.deepcopy(loaded)(batch[0]).logits
    assert torch.equal(tiny_hybrid.backbone.to(torch.bfloat16)(batch[0]).logits, expected)


@pytest.mark.parametrize("source", ["argument", "setter"])
def test_eager_attention_equals_sdpa(tiny_hybrid, batch, tmp_path, source):
    mask = (torch.arange(22) >= torch.tensor([[3], [0], [9]])).long()
    expected = tiny_hybrid(batch[0], attention_mask=mask)
    tiny_hybrid.save_pretrained(tmp_path)
    if source == "argument":
        model = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path, attn_implementation="eager")
    else:
        model = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path)
        model.set_attn_implementation("eager")
    assert tiny_hybrid.backbone.config._attn_implementation == "sdpa"
    assert model.backbone.config._attn_implementation == "eager"
    found = model(batch[0], attention_mask=mask)
    assert torch.equal(found.refinement_steps, expected.refinement_steps)
    assert (found.logits - expected.logits)[mask.bool()].abs().max() < 1e-4


# --- Embeddings ---


def test_tied_embeddings(make_backbone, make_hybrid, batch, tmp_path):
    model = make_hybrid(make_backbone(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "lm_head" in name or "embed" in name] == [  # noqa: SIM118
            "backbone.model.embed_tokens.weight"
        ]
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.backbone.lm_head.weight is loaded.backbone.model.embed_tokens.weight
    torch.testing.assert_close(loaded(batch[0]).logits, model(batch[0]).logits, atol=1e-5, rtol=1e-4)
    loaded.resize_token_embeddings(60)
    assert loaded.backbone.lm_head.weight is loaded.backbone.model.embed_tokens.weight
    assert loaded(batch[0]).logits.shape == (3, 22, 60)


def test_resized_embeddings(tiny_hybrid, batch, tmp_path):
    before = tiny_hybrid(batch[0], enable_refinement=False).logits
    tiny_hybrid.resize_token_embeddings(60)
    after = tiny_hybrid(batch[0], enable_refinement=False).logits
    torch.testing.assert_close(after[..., :50], before)
    assert after.shape[-1] == 60 == tiny_hybrid.config.get_text_config().vocab_size
    assert tiny_hybrid.generate(batch[0][:, :5], max_new_tokens=4, mask_token_id=55).shape == (3, 9)
    tiny_hybrid.save_pretrained(tmp_path)
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded(batch[0], enable_refinement=False).logits, after)


# --- Checkpoints ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_whole_checkpoint(tiny_hybrid, batch, tmp_path, auto_class, dtype):
    tiny_hybrid.to(dtype).save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is LLaDATRMForMaskedDiffusion and not loaded.training
    assert_same_model(loaded, tiny_hybrid, batch[0])
    for name in ("min_confidence", "chunk_size", "mask_token_id", "deep_supervision_schedule"):
        assert getattr(loaded.config, name) == getattr(tiny_hybrid.config, name)


@pytest.mark.parametrize("backbone_dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_keeps_the_dtype_of_each_part(tiny_hybrid, batch, tmp_path, backbone_dtype):
    """A bf16 backbone with the float32 head that training wants, and the reverse."""
    other = torch.float32 if backbone_dtype == torch.bfloat16 else torch.bfloat16
    tiny_hybrid.backbone.to(backbone_dtype)
    tiny_hybrid.refiner.to(other)
    tiny_hybrid.save_pretrained(tmp_path)
    assert_same_model(LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path), tiny_hybrid, batch[0])


@pytest.fixture
def on_disk_backbone(tiny_hybrid, tmp_path):
    folder = tmp_path / "backbone"
    tiny_hybrid.backbone.save_pretrained(folder)
    tiny_hybrid.config.backbone_name_or_path = str(folder)
    return folder


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_head_only_checkpoint(tiny_hybrid, on_disk_backbone, batch, tmp_path, auto_class):
    tiny_hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    with safe_open(tmp_path / "head/model.safetensors", "pt") as file:
        assert all(name.startswith("refiner.") for name in file.keys())  # noqa: SIM118
    loaded = auto_class.from_pretrained(tmp_path / "head")
    assert type(loaded) is LLaDATRMForMaskedDiffusion and not loaded.training
    assert_same_model(loaded, tiny_hybrid, batch[0])
    # It can be saved again, either way.
    loaded.save_pretrained(tmp_path / "whole")
    assert_same_model(LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "whole"), tiny_hybrid, batch[0])
    loaded.save_pretrained(tmp_path / "head again", save_backbone=False)
    assert_same_model(LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head again"), tiny_hybrid, batch[0])


def test_head_only_checkpoint_in_another_dtype(tiny_hybrid, on_disk_backbone, batch, tmp_path):
    tiny_hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    loaded = LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_same_model(loaded, tiny_hybrid.to(torch.bfloat16), batch[0])


def test_head_only_checkpoint_is_hardly_larger_than_the_head(make_hybrid, tmp_path):
    model = make_hybrid(head={"head_hidden_size": 512, "chunk_size": 16}, backbone_name_or_path="somewhere")
    model.save_pretrained(tmp_path, save_backbone=False)
    size = sum(p.numel() * p.element_size() for p in model.refiner.parameters())
    assert size < os.path.getsize(tmp_path / "model.safetensors") < 1.01 * size


def test_head_only_checkpoint_on_another_backbone(tiny_hybrid, make_backbone, on_disk_backbone, tmp_path):
    tiny_hybrid.save_pretrained(tmp_path / "head", save_backbone=False)
    for name, value in (("hidden_size", 64), ("vocab_size", 60)):
        make_backbone(**{name: value}).save_pretrained(tmp_path / name)
        message = f"with {name}={getattr(tiny_hybrid.backbone.config, name)}, but .*{name} has {value}"
        with pytest.raises(ValueError, match=message):
            LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head", backbone_name_or_path=str(tmp_path / name))
    make_backbone(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained on another backbone than .*other"):
        LLaDATRMForMaskedDiffusion.from_pretrained(tmp_path / "head", backbone_name_or_path=str(tmp_path / "other"))
    tiny_hybrid.backbone.save_pretrained(tmp_path / "moved")
    moved = LLaDATRMForMaskedDiffusion.from_pretrained(
        tmp_path / "head", backbone_name_or_path=str(tmp_path / "moved")
    )
    assert torch.equal(moved.backbone.lm_head.weight, tiny_hybrid.backbone.lm_head.weight)
    assert torch.equal(moved.refiner.projector.weight, tiny_hybrid.refiner.projector.weight)


def test_head_only_checkpoint_needs_a_name(tiny_hybrid, tmp_path):
    with pytest.raises(ValueError, match=r"save_backbone=False.*backbone_name_or_path"):
        tiny_hybrid.save_pretrained(tmp_path, save_backbone=False)


@pytest.mark.parametrize("save_backbone", [True, False])
def test_missing_tensors(tiny_hybrid, on_disk_backbone, tmp_path, save_backbone):
    folder = tmp_path / "hybrid"
    tiny_hybrid.save_pretrained(folder, save_backbone=save_backbone)
    tensors = load_file(folder / "model.safetensors")
    del tensors["refiner.projector.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1\b.*projector\.weight"):
        AutoModelForMaskedLM.from_pretrained(folder)


def test_from_backbone_on_disk(tiny_hybrid, on_disk_backbone, tmp_path, batch):
    tiny_hybrid.refiner.save_pretrained(tmp_path / "head")
    model = LLaDATRMForMaskedDiffusion.from_backbone(
        str(on_disk_backbone), refiner=str(tmp_path / "head"), min_confidence=0.25
    )
    assert model.config.backbone_name_or_path == str(on_disk_backbone)
    assert_same_model(model.eval(), tiny_hybrid, batch[0])
    model = LLaDATRMForMaskedDiffusion.from_backbone(tiny_hybrid.backbone, refiner=tiny_hybrid.refiner)
    assert model.backbone is tiny_hybrid.backbone and model.refiner is tiny_hybrid.refiner


def test_from_backbone_passes_the_dtype_on(tiny_hybrid, on_disk_backbone):
    model = LLaDATRMForMaskedDiffusion.from_backbone(str(on_disk_backbone), chunk_size=CHUNK, dtype=torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16


# --- Other backbones ---


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    return BertForMaskedLM(config).eval()


def test_any_masked_language_model_as_backbone(bert, make_hybrid, batch, tmp_path):
    input_ids, labels = batch
    with pytest.raises(ValueError, match=r"\bbert\b.*mask_token_id"):
        make_hybrid(bert)
    bert.save_pretrained(tmp_path / "bert")
    model = make_hybrid(bert, mask_token_id=MASK, backbone_name_or_path=str(tmp_path / "bert"))
    mask = (torch.arange(22) < torch.tensor([[22], [18], [20]])).long()
    expected = bert(input_ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids, attention_mask=mask, enable_refinement=False).logits, expected)
    outputs = model(input_ids, attention_mask=mask, output_hidden_states=True)
    refined = outputs.refinement_steps > 0
    assert 0 < refined.sum() < refined.numel() and len(outputs.hidden_states) == 4
    in_active = refined.repeat_interleave(CHUNK, 1)[:, :22] & mask.bool()
    assert torch.equal(outputs.logits[~in_active], expected[~in_active])
    assert ((outputs.logits - expected).abs().amax(-1)[in_active] > 1e-3).all()
    assert torch.equal(bert(input_ids, attention_mask=mask).logits, expected)  # the hook is gone
    sequences = model.generate(input_ids[:, :4], max_new_tokens=8, block_length=4)
    assert sequences.shape == (3, 12) and not (sequences == MASK).any()
    model.train()(input_ids, labels=labels).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.refiner.parameters())
    for save_backbone in (True, False):
        model.eval().save_pretrained(tmp_path / "hybrid", save_backbone=save_backbone)
        assert_same_model(AutoModelForMaskedLM.from_pretrained(tmp_path / "hybrid"), model, input_ids)


# --- Without this package ---

IN_A_PROCESS_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["llada_trm_hf"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

torch.set_num_threads(1)
inputs, outputs = torch.load("inputs.pt", weights_only=True), {}
for folder in ("hybrid", "head only", "backbone"):
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert "llada_trm_hf" not in type(model).__module__.split("."), type(model).__module__
        outputs[folder, auto_class.__name__] = {
            "logits": model(inputs["input_ids"]).logits.detach(),
            "sequences": model.generate(inputs["input_ids"][:, :5], **inputs["settings"]),
            "settings": model.generation_config.block_length,
        }
head = AutoModel.from_pretrained("head", trust_remote_code=True)
outputs["head"] = {"hidden_states": head(inputs["hidden_states"]).hidden_states.detach()}
AutoModel.from_pretrained("hybrid", trust_remote_code=True).save_pretrained("saved again")
outputs["saved again"] = AutoModelForMaskedLM.from_pretrained("saved again", trust_remote_code=True)(
    inputs["input_ids"]
).logits.detach()
torch.save(outputs, "outputs.pt")
"""


def test_loads_where_the_package_is_not_installed(tiny_hybrid, on_disk_backbone, batch, tmp_path):
    settings = {"max_new_tokens": 9, "num_diffusion_steps": 5, "block_length": 3}
    hidden_states = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    tiny_hybrid.save_pretrained(tmp_path / "hybrid")
    tiny_hybrid.save_pretrained(tmp_path / "head only", save_backbone=False)
    tiny_hybrid.refiner.save_pretrained(tmp_path / "head")
    torch.save({"input_ids": batch[0], "hidden_states": hidden_states, "settings": settings}, tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = run_program(
        [sys.executable, "-c", IN_A_PROCESS_WITHOUT_THE_PACKAGE],
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=False)
    for folder, model in (
        ("hybrid", tiny_hybrid),
        ("head only", tiny_hybrid),
        ("backbone", tiny_hybrid.backbone),
    ):
        for auto_class in ("AutoModelForMaskedLM", "AutoModelForCausalLM"):
            found = outputs[folder, auto_class]
            torch.testing.assert_close(found["logits"], model(batch[0]).logits, atol=1e-5, rtol=1e-4)
            assert torch.equal(found["sequences"], model.generate(batch[0][:, :5], **settings))
    expected = tiny_hybrid.refiner(hidden_states).hidden_states
    torch.testing.assert_close(outputs["head"]["hidden_states"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["saved again"], tiny_hybrid(batch[0]).logits, atol=1e-5, rtol=1e-4)


def test_config_names_the_code(tiny_hybrid, tmp_path):
    for model, names in (
        (tiny_hybrid, {"AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}),
        (tiny_hybrid.backbone, {"AutoModelForMaskedLM", "AutoModelForCausalLM"}),
        (tiny_hybrid.backbone.model, {"AutoModel"}),
        (tiny_hybrid.refiner, {"AutoModel"}),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) == names | {"AutoConfig"}
        for reference in auto_map.values():
            module, name = reference.split(".")
            code = (folder / f"{module}.py").read_text()
            assert re.search(rf"^(class|from \S+ import) {name}\b", code, re.MULTILINE)


# --- Mistakes ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"min_confidence": 1.5}, "min_confidence must be between 0 and 1, got 1.5"),
        ({"min_confidence": -0.1}, "min_confidence must be between 0 and 1"),
        ({"deep_supervision_schedule": "cubic"}, "deep_supervision_schedule must be one of .*got 'cubic'"),
        ({"deep_supervision_weight": -1.0}, "deep_supervision_weight must be 0 or more"),
        ({"confidence_loss_weight": -1.0}, "confidence_loss_weight must be 0 or more"),
        ({"mask_token_id": 50}, r"mask_token_id=50 is outside the vocabulary \(0 to 49\)"),
        ({"refiner": RecursiveRefinementHeadConfig(hidden_size=64)}, "hidden_size=64, the backbone 32"),
        (
            {"refiner": RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=8), "chunk_size": 4},
            "chunk_size=4, but the refiner has chunk_size=8",
        ),
        ({"chunk_sise": 4}, "Unknown argument chunk_sise"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(list(value)),
)
def test_mistakes_have_one_clear_error(make_backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLaDATRMForMaskedDiffusion.from_backbone(make_backbone(), **arguments)


def test_head_of_another_width(make_backbone):
    head = RecursiveRefinementHead(RecursiveRefinementHeadConfig(hidden_size=64, chunk_size=4, head_hidden_size=16))
    with pytest.raises(ValueError, match=r"hidden_size=64.*\b32\b"):
        LLaDATRMForMaskedDiffusion.from_backbone(make_backbone(), refiner=head)


def test_unknown_argument_for_a_backbone_on_disk(tiny_hybrid, on_disk_backbone):
    with pytest.raises((TypeError, ValueError), match="chunk_sise"):
        LLaDATRMForMaskedDiffusion.from_backbone(str(on_disk_backbone), chunk_sise=4)


def test_unknown_refiner(make_backbone, tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        LLaDATRMConfig(backbone_config=LLaDAConfig(), refiner_config={"model_type": "nonsense"})
    make_backbone().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'llada'.*recursive_refinement_head"):
        LLaDATRMForMaskedDiffusion.from_backbone(make_backbone(), refiner=str(tmp_path))


def test_misspelt_refiner(make_backbone):
    """Not a message about the connection to the Hub."""
    with pytest.raises((ValueError, OSError), match=r"recursive_refinment_head.*recursive_refinement_head"):
        LLaDATRMForMaskedDiffusion.from_backbone(make_backbone(), refiner="recursive_refinment_head")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"mask_token_id": 50}, r"mask_token_id=50 is outside the vocabulary \(0 to 49\)"),
        ({"activation_type": "gelu"}, "activation_type='gelu' is not supported"),
        ({"include_qkv_bias": True}, "include_qkv_bias=True is not supported"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_bad_backbone_config(make_backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_backbone(**arguments)


def test_tokens_or_embeddings(make_backbone, batch):
    model = make_backbone()
    embeddings = model.get_input_embeddings()(batch[0])
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(batch[0]).logits)
    for arguments in ({}, {"input_ids": batch[0], "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)
    assert isinstance(model, LLaDAForMaskedDiffusion)


HEAD = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=4, head_hidden_size=16)
SLOTS = SlotTRMRefinerConfig(hidden_size=32, chunk_size=4, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "refiner, integration",
    [(HEAD, None), (SLOTS, None), ([HEAD, SLOTS], "cascade"), ([HEAD, SLOTS], "mix")],
    ids=["head", "slots", "cascade", "mix"],
)
def test_a_step_lays_out_its_chunks_once(make_backbone, monkeypatch, refiner, integration):
    """Confidence, refiners, and remasking by the refiner's confidence all use the same layout."""
    model = LLaDATRMForMaskedDiffusion.from_backbone(
        make_backbone(), refiner=refiner, integration=integration, min_confidence=1.0
    ).eval()
    make, made = ChunkLayout.__init__, []
    monkeypatch.setattr(ChunkLayout, "__init__", lambda self, *args: made.append(self) or make(self, *args))
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9]])
    output = model.generate(
        prompt,
        attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]),
        max_new_tokens=8,
        num_diffusion_steps=4,
        remasking="refiner",
        return_dict_in_generate=True,
    )
    assert len(made) == output.num_forward_passes == 4
