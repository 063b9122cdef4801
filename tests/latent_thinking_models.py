"""Tiny language models that think in latent space, and the same written plainly: one row, no padding, no cache."""

import torch
from conftest import randomise
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from llada_trm_hf.data import byte_tokenizer
from llada_trm_hf.models import DimensionCompressorConfig, LatentThinkingForCausalLM, SequenceTRMConfig

PAD, EOS, OPEN, OPEN_2, CLOSE, LATENT, VOCABULARY = 0, 1, 3, 4, 5, 6, 60
NUM_LATENTS = 3
THOUGHT = [OPEN, OPEN_2, *[LATENT] * NUM_LATENTS, CLOSE]


def make_lm(kind="smollm3", **config):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        **config,
    }
    if kind == "gpt2":  # learned absolute positions, another module tree, tied embeddings
        names = ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id", "bos_token_id")
        small = {name: sizes[name] for name in names}
        small |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **small)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=False)).eval()
    sizes.pop("head_dim")
    # A layer with and one without rotary embeddings, as the real one has.
    return SmolLM3ForCausalLM(SmolLM3Config(**sizes, no_rope_layers=[1, 0])).eval()


def make_model(kind="smollm3", backbone=None, **fields):
    """
    With weights of the thinker large enough that thoughts differ and halt after different numbers of steps, and not so
    large that recursion makes much of rounding.
    """
    sizes = {"hidden_size": 16, "n_heads": 2, "n_latent_steps": 2, "n_deep_recursions": 2, "n_supervision_steps": 4}
    trm = SequenceTRMConfig(**sizes)
    fields = {
        "compressor": DimensionCompressorConfig(hidden_size=32, compressed_size=16),
        "trm": trm,
        "num_latents": NUM_LATENTS,
        "think_start_token_ids": [OPEN, OPEN_2],
        "think_end_token_ids": [CLOSE],
        "latent_token_id": LATENT,
        **fields,
    }
    model = LatentThinkingForCausalLM.from_backbone(backbone or make_lm(kind), **fields).eval()
    randomise(model.thinker)
    with torch.no_grad():
        for parameter in model.thinker.trm.net.parameters():
            parameter.mul_(0.4)
        model.thinker.trm.halt_head.weight.mul_(6)
    return model


def new_tokenizer():
    """Bytes, and the tokens of a thought."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|latent|>"]})
    return tokenizer


def backbone_for(tokenizer, **config):
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    return make_lm(vocab_size=len(tokenizer), **{name: getattr(tokenizer, name) for name in names}, **config)


def reading_lm():
    """A language model that has learned one thing: to answer with the digit that stands between the markers."""
    tokenizer = new_tokenizer()
    model = backbone_for(tokenizer, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = [f"{a}{b}=<think>{c}{c}</think>{c}" for a, b, c in torch.randint(0, 10, (32, 3), generator=generator)]
        input_ids = torch.tensor([[*ids, tokenizer.eos_token_id] for ids in tokenizer(rows)["input_ids"]])
        labels = input_ids.clone()
        labels[:, :-2] = -100
        loss = model(input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model.eval(), tokenizer


def tokens(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, VOCABULARY, (length,), generator=generator).tolist()


def pad_rows(rows, side="left", value=PAD):
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [value] * (width - len(row))
        zeros = [0] * len(fill)
        ids.append(fill + row if side == "left" else row + fill)
        mask.append(zeros + [1] * len(row) if side == "left" else [1] * len(row) + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def plain_embeddings(model, row, max_steps=None):
    """Input embeddings `[1, L, D]` of a row of tokens, its latents thought one thought after the other."""
    config, thinker = model.config, model.thinker
    latent, width = config.latent_token_id, len(config.think_start_token_ids)
    embeddings = model.backbone.get_input_embeddings()(torch.tensor([row])).clone()
    steps = []
    for start in range(len(row)):
        if row[start] != latent or row[start - 1] == latent:
            continue
        prompt = embeddings[:, : start - width]
        states = model.backbone(inputs_embeds=prompt, output_hidden_states=True, use_cache=False).hidden_states[-1]
        thought = thinker.trm.reason(
            states @ thinker.compressor.weight.T,
            max_steps=max_steps or config.max_reasoning_steps,
            halt_threshold=config.halt_threshold,
        )
        y = thought.prediction[0]
        latents = thinker.projector.weight @ (y / (y.square().mean() + 1e-5).sqrt()) + thinker.projector.bias
        embeddings[0, start : start + NUM_LATENTS] = latents.view(NUM_LATENTS, -1)
        steps.append(int(thought.num_steps))
    return embeddings, steps


@torch.no_grad()
def plain_logits(model, row, max_steps=None):
    """`[L, V]`"""
    embeddings, _ = plain_embeddings(model, row, max_steps)
    return model.backbone(inputs_embeds=embeddings, use_cache=False).logits[0]


@torch.no_grad()
def plain_greedy(model, row, num_tokens):
    """What the model writes after `row`, from the whole sequence again for every token."""
    written = []
    while len(written) < num_tokens and EOS not in written:
        logits = plain_logits(model, row + written)[-1]
        logits[LATENT] = -torch.inf
        written.append(int(logits.argmax()))
    return written
