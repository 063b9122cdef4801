"""What a latent thinker returns on request, as other models do: against its backbone fed with the final embeddings."""

import pytest
import torch
from latent_thinking_models import CLOSE, THOUGHT, make_lm, make_model, pad_rows, plain_embeddings, tokens

ROW = tokens(5, 1) + THOUGHT + tokens(3, 2) + THOUGHT + tokens(2, 3)
PROMPT = tokens(7, 4) + THOUGHT
CLOSE_TO = {"atol": 1e-5, "rtol": 1e-5}
BOTH = {"output_attentions": True, "output_hidden_states": True}


@pytest.fixture(scope="module")
def model():
    return make_model(backbone=make_lm(attn_implementation="eager")).double()


@torch.no_grad()
def reference(model, row, **wanted):
    """The backbone alone, in one pass without a cache."""
    return model.backbone(inputs_embeds=plain_embeddings(model, row)[0], use_cache=False, **wanted)


@pytest.mark.parametrize("use_cache", [True, False])
def test_attentions_and_hidden_states(model, use_cache):
    expected = reference(model, ROW, **BOTH)
    found = model(torch.tensor([ROW]), use_cache=use_cache, **BOTH)
    for name, number in (("attentions", 2), ("hidden_states", 3)):
        assert len(found[name]) == number
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE_TO)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attentions_of_generation(model, cache):
    """Those of the prompt, then a row for each token, as in one pass over all of it; logits likewise."""
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    settings |= {**BOTH, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [1]}
    output = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, **settings)
    sequence = output.sequences[0].tolist()
    assert len(sequence) == len(PROMPT) + 4
    expected, start = reference(model, sequence, **BOTH), 0
    for step, (attentions, states, logits) in enumerate(
        zip(output.attentions, output.hidden_states, output.logits, strict=True)
    ):
        end = len(PROMPT) + step
        for layer in range(2):
            weights = expected.attentions[layer][:, :, start:end]
            torch.testing.assert_close(attentions[layer][..., :end], weights[..., :end], **CLOSE_TO)
            assert attentions[layer][..., end:].abs().sum() == 0  # a static cache has room to spare
        for ours, theirs in zip(states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs[:, start:end], **CLOSE_TO)
        torch.testing.assert_close(logits.double(), expected.logits[:, end - 1], **CLOSE_TO)
        start = end


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("selection, kept", [(1, {1}), ([1], {1}), ([0, -1], {0, 2}), ([7], set())])
def test_selected_hidden_states(model, selection, kept, use_cache):
    """As in today's transformers: the others are None. (To older versions, a number meant something else.)"""
    every = model(torch.tensor([ROW]), use_cache=use_cache, output_hidden_states=True).hidden_states
    found = model(torch.tensor([ROW]), use_cache=use_cache, output_hidden_states=selection).hidden_states
    assert {layer for layer, states in enumerate(found) if states is not None} == kept
    assert all(torch.equal(found[layer], every[layer]) for layer in kept)


@pytest.mark.parametrize("row", [ROW, tokens(6, 5)])
def test_asked_for_by_the_config(model, row):
    asked = make_model(backbone=model.backbone)
    asked.config.output_hidden_states = asked.config.output_attentions = True
    by_config, by_argument = asked(torch.tensor([row])), asked(torch.tensor([row]), **BOTH)
    for name in ("attentions", "hidden_states"):
        assert all(map(torch.equal, by_config[name], by_argument[name])) and by_config[name]
        assert asked.base_model(torch.tensor([row]))[name]
    off = asked(torch.tensor([row]), output_hidden_states=False, output_attentions=False)
    assert off.hidden_states is None and off.attentions is None


def test_tuples(model):
    """In the order of the fields, so that the loss comes first."""
    labels = torch.tensor([ROW])
    labels[:, : ROW.index(CLOSE)] = -100
    arguments = {"labels": labels, **BOTH}
    expected = model(torch.tensor([ROW]), **arguments)
    found = model(torch.tensor([ROW]), return_dict=False, **arguments)
    assert isinstance(found, tuple) and len(found) == 7
    assert torch.equal(found[0], expected.loss) and torch.equal(found[1], expected.logits)
    assert found[2].get_seq_length() == len(ROW)
    assert torch.equal(found[3][1], expected.hidden_states[1]) and torch.equal(found[4][1], expected.attentions[1])
    assert torch.equal(found[5], expected.reasoning_steps)
    model.config.return_dict = False
    try:
        assert torch.equal(model(torch.tensor([ROW]))[0], expected.logits)
        assert model.generate(torch.tensor([PROMPT]), max_new_tokens=2).shape == (1, len(PROMPT) + 2)
    finally:
        model.config.return_dict = True
    states = model.base_model(torch.tensor([ROW]), return_dict=False)[0]
    assert torch.equal(states, model.base_model(torch.tensor([ROW])).last_hidden_state)


def test_no_continuous_batching(model):
    prompts = [PROMPT, tokens(4, 6)]
    for refused in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"reads its whole prompt: pad the prompts on the left and call generate"):
            refused(prompts)
    input_ids, mask = pad_rows(prompts)
    assert model.generate(input_ids, attention_mask=mask, max_new_tokens=2).shape == (2, input_ids.shape[1] + 2)
