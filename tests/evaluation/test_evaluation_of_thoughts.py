"""`llada-trm evaluate` on a model that thinks in latent space: prompts with a thought, answers of the model alone."""

import json

import pytest
import torch
from tokenizers import AddedToken
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import byte_tokenizer
from llada_trm_hf.evaluation.scoring import score_output
from llada_trm_hf.models import DimensionCompressorConfig, LatentThinkingForCausalLM, SequenceTRMConfig


def make_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<think>", "</think>", "<latent>")])
    return tokenizer


@pytest.fixture
def thinker(tmp_path) -> str:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LatentThinkingForCausalLM.from_backbone(
        SmolLM3ForCausalLM(config),
        compressor=DimensionCompressorConfig(hidden_size=32, compressed_size=16),
        # One pass through the network: a long recursion with random weights makes much of a CPU's rounding.
        trm=SequenceTRMConfig(hidden_size=16, n_heads=2, n_latent_steps=1, n_deep_recursions=1, n_supervision_steps=1),
        num_latents=2,
        think_start_token_ids=tokenizer.convert_tokens_to_ids(["<think>"]),
        think_end_token_ids=tokenizer.convert_tokens_to_ids(["</think>"]),
        latent_token_id=tokenizer.convert_tokens_to_ids("<latent>"),
    )
    model.save_pretrained(tmp_path / "thinker")
    tokenizer.save_pretrained(tmp_path / "thinker")
    return str(tmp_path / "thinker")


@torch.no_grad()
def test_prompts_end_with_a_thought(thinker, tmp_path, capfd):
    rows = [{"prompt": prompt, "answer": "4"} for prompt in ("2+2=", "What is 12 - 8?", "1+3=")]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", thinker, "--dataset_name", str(tmp_path / "problems.jsonl"), "--max_new_tokens", "6"]
    assert main(["evaluate", *flags, "--output_dir", str(tmp_path / "results")]) == 0, capfd.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "results" / "problems.jsonl").read_text().splitlines()]

    model = LatentThinkingForCausalLM.from_pretrained(thinker)
    tokenizer, config = byte_tokenizer(), model.config
    found = {line["prompt"]: line["output"] for line in lines}
    outputs = {True: [], False: []}
    for row in rows:
        context = tokenizer(row["prompt"])["input_ids"]
        for thinks in outputs:
            thought = [*config.think_start_token_ids, *[config.latent_token_id] * 2, *config.think_end_token_ids]
            tokens = torch.tensor([context + (thought if thinks else [])])
            for _ in range(6):
                logits = model(tokens).logits[:, -1]
                logits[:, config.latent_token_id] = -torch.inf  # a model writes no latent tokens
                (first, second), (token, _) = (each[0] for each in logits.topk(2))
                assert first - second > 1e-3, "too close to call on another CPU: choose another seed"
                token = token[None]
                tokens = torch.cat([tokens, token[:, None]], dim=1)
                if token == tokenizer.eos_token_id:
                    break
            answer = tokens[0, len(context) + len(thought) * thinks :].tolist()
            outputs[thinks].append(tokenizer.decode([t for t in answer if t < 259], skip_special_tokens=True))
    assert [found[row["prompt"]] for row in rows] == outputs[True] != outputs[False]


TEMPLATE = (
    "{{ messages[0].content }}<think>{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
)


@torch.no_grad()
def test_no_thinking(thinker, tmp_path, capfd):
    """A language model and a latent thinker answer after the empty thought that their chat template writes."""
    model, tokenizer = LatentThinkingForCausalLM.from_pretrained(thinker), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.backbone.save_pretrained(tmp_path / "lm")
    for folder in (thinker, tmp_path / "lm"):
        tokenizer.save_pretrained(folder)
    prompts = ["2+2=", "What is 12 - 8?"]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "4"}) + "\n" for prompt in prompts))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(f"{prompt}<think></think>")["input_ids"]])
        written = model.backbone.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(written, skip_special_tokens=True))
    flags = ["--dataset_name", str(path), "--max_new_tokens", "6"]
    for folder in (thinker, tmp_path / "lm"):
        outputs = []
        for name, more in (("thought", []), ("none", ["--no_thinking"])):
            results = tmp_path / f"{name}_{folder == thinker}"
            assert main(["evaluate", "--model", str(folder), *flags, *more, "--output_dir", str(results)]) == 0
            lines = [json.loads(line) for line in (results / "problems.jsonl").read_text().splitlines()]
            outputs.append([line["output"] for line in lines])
        assert outputs[1] == expected != outputs[0]
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "chat_template.jinja").unlink()
    command = [
        "evaluate",
        "--model",
        str(tmp_path / "lm"),
        *flags,
        "--no_thinking",
        "--output_dir",
        str(tmp_path / "x"),
    ]
    capfd.readouterr()
    assert main(command) == 2 and "the tokenizer has none" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("output", "right"),
    [("6620", True), ("0", True), ("66=0 62=4</think>0", True), ("662", False), ("1", False), ("0</think>1", False)],
)
def test_chains_are_right_as_a_whole_or_by_the_answer_after_a_thought(output, right):
    problem = {"prompt": "6062=", "reasoning": "662", "answer": "0"}
    assert score_output("response", problem, "6620", output).correct == right
