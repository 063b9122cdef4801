"""The likelihood bound against plain enumeration, and the adapters of lm-evaluation-harness on local tasks."""

import itertools
import json
import math
from pathlib import Path

import lm_eval
import pytest
import torch
from conftest import MASK
from datagen_models import load_model, save_model
from latent_thinking_models import make_lm, make_model
from lm_eval.tasks import TaskManager
from tiny_training import new_backbone

from llada_trm_hf import LLaDAForMaskedDiffusion, latent_thinking_tokenizer
from llada_trm_hf.data import byte_tokenizer, latent_thinking_prompt
from llada_trm_hf.evaluation import harness as adapters  # noqa: F401  (registers them)
from llada_trm_hf.evaluation.likelihood import is_greedy_response, likelihood_bounds, response_masks
from llada_trm_hf.models.latent_thinking.thought_tokens import thought_token_ids


@torch.no_grad()
def plain_bound(model, prompt: list[int], response: list[int]) -> float:
    """The definition: every number of masks, every choice of them, one sequence at a time."""
    length, bound = len(response), 0.0
    for number in range(1, length + 1):
        choices = list(itertools.combinations(range(length), number))
        for chosen in choices:
            canvas = [model.config.mask_token_id if i in chosen else token for i, token in enumerate(response)]
            logits = model(torch.tensor([[*prompt, *canvas]])).logits[0].double()
            log_p = sum(logits[len(prompt) + i].log_softmax(-1)[response[i]].item() for i in chosen)
            bound += length / number * log_p / (length * len(choices))
    return bound


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14], [15, 16, 17, 18]]
RESPONSES = [[20, 21, 22, 23], [24], [25, 26, 27], [28, 29], [30, 31, 32, 33]]


@pytest.mark.parametrize("kind", ["backbone", "hybrid"])
def test_exact_where_all_masks_are_taken(kind, tiny_backbone, make_hybrid):
    model = tiny_backbone if kind == "backbone" else make_hybrid(min_confidence=1.0)
    expected = [plain_bound(model, *pair) for pair in zip(PROMPTS, RESPONSES)]
    for batch_size in (1, 4, 100):
        bounds = likelihood_bounds(model, PROMPTS, RESPONSES, num_samples=15, batch_size=batch_size)
        assert bounds == pytest.approx(expected, rel=1e-4), batch_size


def test_golden_model_against_enumeration(goldens):
    model = LLaDAForMaskedDiffusion.from_pretrained(goldens / "dense_mha/checkpoint").eval()
    expected = [plain_bound(model, *pair) for pair in zip(PROMPTS, RESPONSES)]
    assert likelihood_bounds(model, PROMPTS, RESPONSES) == pytest.approx(expected, rel=1e-4)


def test_the_estimate_is_unbiased_and_as_precise_as_it_should_be(tiny_backbone):
    """14 of 15 masks would be too few for enumeration: the mean over many seeds is the exact bound."""
    prompts, responses = PROMPTS[:1], RESPONSES[:1]
    exact = plain_bound(tiny_backbone, prompts[0], responses[0])
    estimates = torch.tensor(
        [likelihood_bounds(tiny_backbone, prompts, responses, 14, seed)[0] for seed in range(150)], dtype=torch.float64
    )
    error = estimates.std() / math.sqrt(len(estimates))
    assert 0 < error < 0.05 * abs(exact)
    assert abs(estimates.mean() - exact) < 4 * error


def test_one_seed_one_bound_whatever_the_batch(tiny_backbone):
    responses = [[20 + i % 25 for i in range(length)] for length in (12, 9, 12, 20, 3)]
    bounds = likelihood_bounds(tiny_backbone, PROMPTS, responses, 32, seed=1, batch_size=7)
    assert likelihood_bounds(tiny_backbone, PROMPTS, responses, 32, seed=1, batch_size=64) == pytest.approx(bounds)
    assert likelihood_bounds(tiny_backbone, PROMPTS, responses, 32, seed=2)[0] != pytest.approx(bounds[0])
    alone = [likelihood_bounds(tiny_backbone, [p], [r], 32, seed=1)[0] for p, r in zip(PROMPTS, responses)]
    assert alone == pytest.approx(bounds, rel=1e-4)


@pytest.mark.parametrize("length, num_samples", [(3, 7), (12, 64), (5, 30)])
def test_masks(length, num_samples):
    masks, weights = response_masks(length, num_samples, 0)
    assert len(masks) == num_samples and masks.any(-1).all()
    # Every position counts once: the bound of a model that gives each token probability 1/e is -L.
    assert (weights * masks.sum(-1)).sum().item() == pytest.approx(length)


def test_the_greedy_response(tiny_backbone):
    responses = [
        tiny_backbone.generate(torch.tensor([prompt]), max_new_tokens=length)[0, len(prompt) :].tolist()
        for prompt, length in zip(PROMPTS, (4, 1, 4, 2, 3))
    ]
    assert is_greedy_response(tiny_backbone, PROMPTS, responses, batch_size=2) == [True] * 5
    others = [[(token + 1) % MASK, *rest] for token, *rest in responses]
    assert is_greedy_response(tiny_backbone, PROMPTS, others) == [False] * 5


def test_bad_input(tiny_backbone):
    with pytest.raises(ValueError, match="prompt is empty"):
        likelihood_bounds(tiny_backbone, [[]], [[1]])
    with pytest.raises(ValueError, match="num_samples and batch_size must be at least 1"):
        likelihood_bounds(tiny_backbone, [[1]], [[1]], num_samples=0)
    assert likelihood_bounds(tiny_backbone, [[1]], [[]]) == [0.0]


# --- lm-evaluation-harness ---


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory) -> str:
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("diffusion")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    new_backbone(num_hidden_layers=1, initializer_range=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """Tasks over a local file in GSM8K's format, one for each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{a} + {b} =", "answer": f"#### {a + b}", "other": str(a)} for a in (1, 2) for b in (3, 40)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/problems.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
    generate = "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['Z'], max_gen_toks: 6, do_sample: false}\n"
    kinds = {
        "generate": f"output_type: generate_until\n{generate}metric_list: [{{metric: exact_match}}]\n",
        "choose": "output_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: '{{[other, answer]}}'\n"
        "metric_list: [{metric: acc}]\n",
        "roll": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: word_perplexity}]\n",
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{common}{text}")
    return str(folder)


def harness(model: str, arguments: str, tasks: str, names: list[str], **options) -> dict[str, list]:
    """The samples of each task, as the harness logs them."""
    manager = TaskManager(include_path=tasks, include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, arguments, names, task_manager=manager, device="cpu", bootstrap_iters=0, log_samples=True, **options
    )
    return results["samples"]


def test_harness_of_a_diffusion_model(diffusion_model, tasks):
    arguments = f"pretrained={diffusion_model},num_diffusion_steps=3,num_samples=16,max_length=64"
    names = ["local_generate", "local_choose", "local_roll"]
    samples = harness("llada_trm", arguments, tasks, names, batch_size=3)
    model, tokenizer = LLaDAForMaskedDiffusion.from_pretrained(diffusion_model).eval(), byte_tokenizer()
    for sample in samples["local_generate"]:
        prompt = tokenizer(sample["doc"]["question"], return_tensors="pt")["input_ids"]
        tokens = model.generate(prompt, max_new_tokens=6, num_diffusion_steps=3)[0, prompt.shape[1] :].tolist()
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        assert sample["resps"][0][0] == tokenizer.decode(tokens, skip_special_tokens=True).split("Z")[0]
    for sample in samples["local_choose"]:
        prompt = tokenizer(sample["doc"]["question"])["input_ids"]
        for choice, (bound, is_greedy) in zip(("other", "answer"), (r[0] for r in sample["resps"])):
            response = tokenizer(" " + sample["doc"][choice])["input_ids"]
            if 2 ** len(response) - 1 <= 16:
                expected = plain_bound(model, prompt, response)
            else:
                expected = likelihood_bounds(model, [prompt], [response], 16)[0]
            assert float(bound) == pytest.approx(expected, rel=1e-4)
            assert str(is_greedy) == str(is_greedy_response(model, [prompt], [response])[0])
    for sample in samples["local_roll"]:
        text = tokenizer(sample["doc"]["question"])["input_ids"]
        assert len(text) < 64
        expected = likelihood_bounds(model, [[tokenizer.bos_token_id]], [text], 16)[0]
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-4)


def test_harness_with_a_chat_template(diffusion_model, tasks):
    arguments = f"pretrained={diffusion_model},num_diffusion_steps=2"
    samples = harness("llada_trm", arguments, tasks, ["local_generate"], batch_size=4, apply_chat_template=True)
    for sample in samples["local_generate"]:
        assert sample["arguments"][0][0] == f"<user>{sample['doc']['question']}<assistant>"


THOUGHT = [7, 8, 8, 9]


@torch.no_grad()
def exact_log_likelihood(model, prompt: list[int], response: list[int]) -> float:
    log_p = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
    return sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def test_harness_of_a_model_with_thoughts(tasks, tmp_path):
    """A causal model with the tokens of a thought in its config: they follow every context, and nothing else."""
    folder = save_model(tmp_path / "causal", favourites={})
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**config, "thought_token_ids": THOUGHT}))
    names = ["local_generate", "local_choose", "local_roll"]
    samples = harness("latent_thinking", f"pretrained={folder}", tasks, names, batch_size=3)
    model, tokenizer = load_model(folder), byte_tokenizer()
    for sample in samples["local_generate"]:
        prompt = torch.tensor([tokenizer(sample["doc"]["question"])["input_ids"] + THOUGHT])
        tokens = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("Z")[0]
    for sample in samples["local_choose"]:
        prompt = tokenizer(sample["doc"]["question"])["input_ids"] + THOUGHT
        for choice, (value, _) in zip(("other", "answer"), (r[0] for r in sample["resps"])):
            response = tokenizer(" " + sample["doc"][choice])["input_ids"]
            assert float(value) == pytest.approx(exact_log_likelihood(model, prompt, response), rel=1e-4)
    for sample in samples["local_roll"]:
        text = tokenizer(sample["doc"]["question"])["input_ids"]
        expected = exact_log_likelihood(model, [tokenizer.bos_token_id], text)
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ending", "whole"), [("", False), ("<think>", False), ("<think>\\n", False), ("", True)])
def test_harness_of_a_latent_thinker_with_a_chat_template(tasks, tmp_path, ending, whole):
    """The harness answers what `latent_thinking_prompt` asks, whether the template opens the thought, or writes it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|latent|>"]})
    tokenizer.chat_template = f"{{% for m in messages %}}[{{{{ m['content'] }}}}]{{% endfor %}}{{{{ '{ending}' }}}}"
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    backbone = make_lm(vocab_size=len(tokenizer), **{name: getattr(tokenizer, name) for name in names})
    model = make_model(backbone=backbone, **thought_token_ids(tokenizer))
    for part in (model, latent_thinking_tokenizer(tokenizer, model.config) if whole else tokenizer):
        part.save_pretrained(tmp_path)
    options = {"batch_size": 4, "apply_chat_template": True}
    samples = harness("latent_thinking", f"pretrained={tmp_path}", tasks, ["local_generate"], **options)
    written = []
    for sample in samples["local_generate"]:
        message = [{"role": "user", "content": sample["doc"]["question"]}]
        prompt = latent_thinking_prompt(message, tokenizer, model.config)
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        written.append(tokenizer.decode(tokens, skip_special_tokens=True).split("Z")[0])
    assert [sample["resps"][0][0] for sample in samples["local_generate"]] == written and len(set(written)) > 1


def test_the_harness_refuses_other_models(tasks, tmp_path, diffusion_model):
    causal = save_model(tmp_path / "causal")
    with pytest.raises(ValueError, match="LlamaForCausalLM, which does not generate by diffusion"):
        harness("llada_trm", f"pretrained={causal}", tasks, ["local_generate"])
    with pytest.raises(ValueError, match="LLaDAForMaskedDiffusion, which has no latent thoughts"):
        harness("latent_thinking", f"pretrained={diffusion_model}", tasks, ["local_generate"])
