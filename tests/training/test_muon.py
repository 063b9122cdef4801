"""Muon and AdamW as one optimizer."""

import copy

import pytest
import torch
from tiny_training import losses, new_backbone, new_hybrid, trainer

from llada_trm_hf.training import set_trainable
from llada_trm_hf.training.muon import CPUMuon, MuonWithAdamW, hidden_matrices, orthogonalize


def test_muon_gets_the_matrices_of_the_hidden_layers():
    model = new_hybrid(freeze_backbone=False)
    chosen = set(hidden_matrices(model))
    for name, parameter in model.named_parameters():
        outer = "embed_tokens" in name or "lm_head" in name
        assert (name in chosen) == (parameter.ndim == 2 and not outer), name
    assert {"backbone.model.layers.0.self_attn.q_proj.weight", "refiner.projector.weight"} <= chosen
    tied = new_backbone(tie_word_embeddings=True)
    assert not any("lm_head" in name or "embed" in name for name in hidden_matrices(tied))
    frozen = new_hybrid()
    assert all(name.startswith("refiner.") for name in hidden_matrices(frozen))


def test_each_parameter_is_updated_by_its_own_optimizer(tmp_path, samples, monkeypatch):
    """Three steps with a schedule against the two optimizers apart; torch's Muon in float32, as ours on a CPU."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    arguments = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 3, "max_grad_norm": 0.0}
    arguments |= {"use_muon": True, "muon_learning_rate": 3e-2, "optim": "adamw_torch"}
    run = trainer(new_hybrid(freeze_backbone=False), tmp_path, samples, **arguments)
    plain = copy.deepcopy(run.model).train()
    matrices = {n for n, p in hidden_matrices(plain).items()}
    rest = [(n, p) for n, p in plain.named_parameters() if n not in matrices]
    decayed = [p for n, p in rest if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
    others = [p for n, p in rest if not n.endswith(("embed_tokens.weight", "lm_head.weight"))]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    muon = torch.optim.Muon(
        [p for n, p in plain.named_parameters() if n in matrices], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    batches = list(run.get_train_dataloader())
    expected = []
    for step in range(3):
        decay = 1 - step / 3
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * decay
        for group in muon.param_groups:
            group["lr"] = 3e-2 * decay
        loss = plain(**batches[step]).loss
        loss.backward()
        expected.append(loss.item())
        for optimizer in (adamw, muon):
            optimizer.step()
            optimizer.zero_grad()
    run.get_train_dataloader = lambda: batches
    run.train()
    assert list(losses(run).values()) == pytest.approx(expected, rel=1e-5)
    for (name, ours), theirs in zip(run.model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_the_loss_falls(tmp_path, samples):
    arguments = {"max_steps": 120, "per_device_train_batch_size": 64, "logging_steps": 40}
    run = trainer(new_backbone(), tmp_path, samples, use_muon=True, **arguments)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_in_full_precision_muon_does_what_torch_does_in_bfloat16(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = CPUMuon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    orthogonal = orthogonalize(torch.randn(shape), (1.5, -0.5, 0.0), steps=40, epsilon=1e-7)  # Newton-Schulz, cubic
    small = orthogonal if shape[0] <= shape[1] else orthogonal.mT
    torch.testing.assert_close(small @ small.mT, torch.eye(min(shape)), rtol=0, atol=1e-4)


def test_state_goes_to_both_optimizers(tmp_path):
    def build() -> tuple[torch.nn.Linear, MuonWithAdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 4)
        muon = torch.optim.Muon([layer.weight], lr=0.1)
        return layer, MuonWithAdamW(torch.optim.AdamW([layer.bias], lr=0.2), muon)

    def step(layer, optimizer, seed):
        layer(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = build()
    for seed in range(4):
        step(whole, optimizer, seed)
    first, optimizer = build()
    for seed in range(2):
        step(first, optimizer, seed)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, optimizer = build()
    again.load_state_dict(first.state_dict())
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(2, 4):
        step(again, optimizer, seed)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
    optimizer.param_groups[1]["lr"] = 0.0  # as a schedule does
    before = again.weight.detach().clone(), again.bias.detach().clone()
    step(again, optimizer, 5)
    assert torch.equal(again.weight, before[0]) and not torch.equal(again.bias, before[1])


def test_mistakes(tmp_path, samples):
    model = new_hybrid()
    set_trainable(model, ["refiner.projector.bias"])
    with pytest.raises(ValueError, match="no matrix of a hidden layer trains"):
        trainer(model, tmp_path, samples, use_muon=True).train()
