"""A loss that would be another than the model's own, or nothing, is refused or said."""

import warnings

import pytest
import torch
from conftest import HostCopies
from datasets import Dataset
from tiny_training import SIZES, TOKENIZER, new_backbone, new_hybrid, trainer
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from llada_trm_hf import (
    LLaDAMoEConfig,
    LLaDAMoEForMaskedDiffusion,
    LLaDATRMForMaskedDiffusion,
    MaskedDiffusionCollator,
)
from llada_trm_hf.models.modeling_masked_diffusion import masked_targets

MASK = TOKENIZER.mask_token_id


def new_moe():
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ids = {"vocab_size": 300, "mask_token_id": MASK, "pad_token_id": 0, "eos_token_id": 1}
    return LLaDAMoEForMaskedDiffusion(LLaDAMoEConfig(**SIZES | experts | ids))


def hybrid_with(*refiners, integration=None):
    several = {} if integration is None else {"integration": integration}
    kind = list(refiners) if several else refiners[0]
    return LLaDATRMForMaskedDiffusion.from_backbone(new_backbone(), kind, chunk_size=5, **several)


HEAD, SLOTS = "recursive_refinement_head", "slot_trm_refiner"
MODELS = {"llada": new_backbone, "llada_moe": new_moe, "hybrid": new_hybrid}
HYBRIDS = {
    "head": lambda: hybrid_with(HEAD),
    "slots": lambda: hybrid_with(SLOTS),
    "cascade": lambda: hybrid_with(HEAD, SLOTS, integration="cascade"),
    "mix": lambda: hybrid_with(HEAD, SLOTS, integration="mix"),
    "all trains": lambda: new_hybrid(freeze_backbone=False),
}


@pytest.fixture
def clean():
    return torch.randint(5, 200, (2, 13), generator=torch.Generator().manual_seed(0))


def stock_trainer(model, folder, collator, rows, **arguments):
    settings = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, **arguments}
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
    )


def masked_batch(samples):
    """What someone's own collator gives: masks and labels, and no p_mask."""
    batch = MaskedDiffusionCollator(MASK, TOKENIZER.pad_token_id, mask_epsilon=0.9)(samples)
    return {name: batch[name] for name in ("input_ids", "labels")}


@pytest.mark.parametrize("name", MODELS)
def test_a_causal_collator_is_refused(tmp_path, name, clean):
    collator = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    rows = [{"input_ids": row} for row in clean.tolist()]
    with pytest.raises(ValueError, match=rf"the mask token \({MASK}\).*use MaskedDiffusionTrainer"):
        stock_trainer(MODELS[name](), tmp_path, collator, rows).train()
    model = MODELS[name]().eval()
    with pytest.raises(ValueError, match="pass p_mask"):
        model(input_ids=clean, labels=clean)
    assert model(input_ids=clean, labels=torch.full_like(clean, -100)).loss == 0  # nothing to learn, and none asked
    noisy = clean.clone()
    noisy[1, 3] = MASK  # one of a batch is enough
    assert model(input_ids=noisy, labels=clean).loss > 0


def test_the_check_asks_the_device_for_nothing_more(clean):
    noisy = clean.clone()
    noisy[:, 6:] = MASK
    with HostCopies() as copies:
        masked_targets(noisy, clean, MASK)
    assert copies.count == 2  # tokens and weights at the masked positions


def test_our_collator_draws_batches_without_masks_and_they_train_nothing(tmp_path, samples):
    """A row's `t` may be small, and a response short: as in LLaDA's algorithm, such a draw counts as 0."""
    collator = MaskedDiffusionCollator(MASK, TOKENIZER.pad_token_id)
    empty = 0
    for epoch in range(200):
        collator.set_epoch(epoch)
        batch = collator([samples[0]])
        if not (batch["input_ids"] == MASK).any():
            empty += 1
            assert new_backbone().train()(**batch).loss == 0
    length = len(samples[0]["input_ids"]) - samples[0]["prompt_length"]
    expected = 200 / (length + 1)  # the integral of (1 - t) ** length
    assert abs(empty - expected) < 5 * expected**0.5
    run = trainer(new_backbone(), tmp_path, samples, per_device_train_batch_size=1, max_steps=30)
    run.train()
    assert any(row["loss"] == 0 for row in run.state.log_history if "loss" in row)


@pytest.mark.parametrize("name", [*HYBRIDS, "llada", "llada_moe"])
def test_a_batch_without_masks_gives_every_weight_a_gradient(tmp_path, name, clean):
    """DDP waits for a gradient of every parameter; those that nothing is learned from get zeros."""
    model = {**HYBRIDS, **MODELS}[name]().train()
    model.config.orthogonality_weight = 0.0  # slots repel each other whatever the batch
    if name == "llada_moe":
        model.config.router_aux_loss_coef = 0.0
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):  # a parameter left out in one step is an error in the next
            loss = parallel(input_ids=clean, labels=clean, p_mask=torch.full((2,), 1e-3)).loss
            loss.backward()
    finally:
        distributed.destroy_process_group()
    assert loss == 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_label_smoothing_of_the_stock_trainer(tmp_path, name, samples):
    """It takes the labels away: refused where the model can tell (`p_mask` is left), said where it cannot."""
    rows = samples.select(range(8)).to_list()
    smooth = {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 4}
    collator = MaskedDiffusionCollator(MASK, TOKENIZER.pad_token_id)
    with pytest.raises(ValueError, match=r"p_mask without labels.*label_smoothing_factor"):
        stock_trainer(MODELS[name](), tmp_path, collator, rows, **smooth).train()
    with pytest.warns(UserWarning, match=r"gets no labels.*label_smoothing_factor"):
        stock_trainer(MODELS[name](), tmp_path, masked_batch, rows, **smooth).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gets no labels")
        for batches in (collator, masked_batch):  # without smoothing, the stock Trainer is a trainer like any other
            stock_trainer(MODELS[name](), tmp_path, batches, rows, per_device_train_batch_size=4).train()


def test_logits_without_labels_are_not_warned_of_where_nothing_trains(clean):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_hybrid().eval()(input_ids=clean)
        with torch.no_grad():
            new_hybrid().train()(input_ids=clean)


# --- Inputs ---


@pytest.mark.parametrize("make", [new_backbone, new_hybrid])
def test_inputs_of_the_wrong_kind(make):
    model, tokens = make().eval(), torch.randint(10, 200, (2, 6))
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    expected = model(tokens, attention_mask=mask.long()).logits
    assert torch.equal(model(tokens, attention_mask=mask).logits, expected)  # floats of 0 and 1 are a mask
    for wrong in (torch.nan, 0.5, -1.0):
        with pytest.raises(ValueError, match="must hold 1 for real tokens and 0 for padding"):
            model(tokens, attention_mask=torch.where(mask == 0, wrong, mask))
    for ids in (tokens.float(), tokens > 50):
        with pytest.raises(TypeError, match=f"must be whole numbers, got {ids.dtype}"):
            model(ids)
        with pytest.raises(TypeError, match=f"must be whole numbers, got {ids.dtype}"):
            model.generate(ids, max_new_tokens=2)
