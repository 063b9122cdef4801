"""GRPO: rewards, the policy that is sampled and trained, curriculum, resuming, the recipe."""

import csv
import json
import sys

import pytest
import torch
from conftest import metrics
from datasets import Dataset
from latent_thinking_models import (
    backbone_for,
    make_model,
    new_tokenizer,
    plain_greedy,
    plain_logits,
    reading_lm,
)
from run_programs import run_program
from safetensors import safe_open
from tiny_training import StopAt
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import LatentAnswerCollator, latent_thinking_prompt, tokenize_latent_answers
from llada_trm_hf.models import (
    DimensionCompressorConfig,
    LatentThinkingForCausalLM,
    SequenceTRMConfig,
    thought_token_ids,
)

PROBLEMS = [{"prompt": f"{n}" * (n % 3 + 1) + "=", "answer": str(n)} for n in range(8)]


def speaking_model(**fields):
    """Random weights; thoughts halt after different numbers of steps, and there is dropout where it can be."""
    tokenizer = new_tokenizer()
    model = make_model(
        backbone=backbone_for(tokenizer, attention_dropout=0.2), **thought_token_ids(tokenizer), **fields
    )
    model.thinker.trm.config.dropout = 0.3
    return model, tokenizer


def length_reward(completions, **columns):
    """Something that differs between samples."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def grpo(model, tokenizer, folder, reward=length_reward, problems=PROBLEMS, eval_problems=None, **changes):
    from llada_trm_hf.rl import LatentGRPOTrainer, LatentGRPOTrainingArguments

    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return LatentGRPOTrainer(
        model,
        reward,
        LatentGRPOTrainingArguments(output_dir=str(folder), **settings | changes),
        Dataset.from_list(problems),
        None if eval_problems is None else Dataset.from_list(eval_problems),
        processing_class=tokenizer,
    )


# --- Rewards ---


def test_rewards_for_answers():
    from llada_trm_hf.rl import correctness_reward

    completions = ["#### 12", "so it is 1,200.", "", "13", "the answer is 0.50"]
    answers = ["12", "1200", "3", "12", "1/2"]
    found = correctness_reward()(prompts=["?"] * 5, completions=completions, answer=answers, reasoning=["x"] * 5)
    assert found == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_rewards_for_grids():
    """All of the text, and nothing as a number."""
    from llada_trm_hf.rl import correctness_reward

    grid = "1234341221434321"
    completions = [
        grid,
        f" {grid}\n",
        grid[:-1] + "2",
        f"0{grid}",
        f"The answer is {grid}",
        "1.234341221434321e15",
        "",
    ]
    found = correctness_reward("response")(["?"] * 7, completions, [grid] * 7, reasoning=[""] * 7)
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_rewards_for_programs():
    from llada_trm_hf.rl import correctness_reward

    head = 'def double(x):\n    """Twice."""\n'
    completions = [
        "    return 2 * x",
        "    return x",
        "```python\ndef double(x):\n    return x + x\n```",
        "    return 1 / 0",
    ]
    found = correctness_reward("code")(
        prompts=[head] * 4,
        completions=completions,
        answer=[""] * 4,
        tests=["assert double(3) == 6"] * 4,
        entry_point=["double"] * 4,
    )
    assert found == [1.0, 0.0, 1.0, 0.0]


# --- The policy ---


def test_answers_are_those_of_the_model_as_it_generates(tmp_path):
    """Nearly without temperature the samples are the greedy answers, written one row at a time."""
    model, tokenizer = speaking_model()
    trainer = grpo(model, tokenizer, tmp_path, temperature=1e-4)
    prompts = [latent_thinking_prompt(row["prompt"], tokenizer, model.config) for row in PROBLEMS]
    expected = [plain_greedy(model, row, 3) for row in prompts]
    model.train()
    answers, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    assert answers == expected
    assert model.training


def test_the_chat_template_that_is_saved_writes_the_thought(tmp_path):
    model, tokenizer = speaking_model()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    grpo(model, tokenizer, tmp_path).save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "5="}]
    ids = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [*tokenizer("[5=]")["input_ids"], *model.config.thought_token_ids]


def test_log_probabilities_are_those_of_the_answers_and_the_ratio_is_one(tmp_path):
    model, tokenizer = speaking_model()
    trainer = grpo(model, tokenizer, tmp_path, num_iterations=2, temperature=0.7, beta=0.1)
    model.train()
    batch = [row for row in PROBLEMS[1:3] for _ in range(4)]
    inputs = trainer._prepare_inputs(batch)
    new = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].shape[1],
    )[0]
    real = inputs["completion_mask"].bool()
    ratio = (new - inputs["old_per_token_logps"]).exp()[real]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs["ref_per_token_logps"][real], new[real], atol=1e-6, rtol=0)
    assert new.requires_grad and model.training

    steps = set()
    for row in range(len(batch)):
        prompt = inputs["prompt_ids"][row, inputs["prompt_mask"][row].bool()].tolist()
        answer = inputs["completion_ids"][row, real[row]].tolist()
        logits = plain_logits(model.eval(), prompt + answer)[len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[range(len(answer)), answer]
        torch.testing.assert_close(new[row, real[row]].detach(), expected, atol=1e-4, rtol=1e-4)
        steps.add(int(model(torch.tensor([prompt])).reasoning_steps))
    assert len(steps) > 1  # they halt, each on its own


def test_only_the_thinker_learns_and_the_reference_stays(tmp_path):
    model, tokenizer = speaking_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.thinker.trm.halt_head.requires_grad_(False)
    trainer = grpo(model, tokenizer, tmp_path, beta=0.5)
    backbone, shared = (list(m.backbone.parameters()) for m in (model, trainer.ref_model))
    assert all(ours is theirs for ours, theirs in zip(backbone, shared, strict=True))
    trainer.train()
    after = model.state_dict()
    for name, value in before.items():
        learns = name.startswith("thinker.") and "halt_head" not in name
        assert torch.equal(value, after[name]) != learns, name
    for name, value in trainer.ref_model.thinker.state_dict().items():
        assert torch.equal(value, before[f"thinker.{name}"]), name
    divergence = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[-1] > 1e-3


def test_held_out_reward_rises(tmp_path):
    """Trained to answer 1 or 8, the thinker learns from rewards alone that only one of them is right."""
    from llada_trm_hf.rl import correctness_reward

    backbone, tokenizer = reading_lm()
    torch.manual_seed(0)
    trm = SequenceTRMConfig(hidden_size=16, n_heads=2, n_latent_steps=2, n_deep_recursions=1, n_supervision_steps=2)
    compressor = DimensionCompressorConfig(hidden_size=32, compressed_size=16)
    model = LatentThinkingForCausalLM.from_backbone(backbone, compressor, trm, tokenizer, num_latents=4)
    numbers = [(a, b) for a in range(8) for b in range(8)]
    rows = [{"prompt": f"{a}{b}=", "answer": "1" if b < 4 else "8"} for a, b in numbers]
    samples = tokenize_latent_answers(Dataset.from_list(rows), tokenizer, model.config, "{reasoning}{answer}")
    batch = LatentAnswerCollator(0)(list(samples))
    optimizer = torch.optim.AdamW(model.thinker.parameters(), lr=1e-3)
    for _ in range(20):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = [{**row, "answer": "8"} for row in rows]
    held_out = rows[::5]
    settings = {"max_steps": 40, "learning_rate": 2e-3, "max_completion_length": 2, "num_generations": 8}
    settings |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 8 * len(held_out)}
    problems = [row for row in rows if row not in held_out]
    trainer = grpo(model, tokenizer, tmp_path, correctness_reward(), problems, held_out, **settings)
    before, again = trainer.evaluate()["eval_reward"], trainer.evaluate()["eval_reward"]
    assert before == again < 0.75
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 0.9


# --- Curriculum ---


class KnownRates:
    """Solves problem n in n of 8 samples, whatever the model writes; remembers what it was asked."""

    __name__ = "known_rates"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, answer, **columns):
        self.seen.append(list(dict.fromkeys(prompts)))
        return [float(i % 8 < int(a)) for i, a in enumerate(answer)]


def test_curriculum_goes_from_easy_to_hard(tmp_path):
    model, tokenizer = speaking_model()
    reward = KnownRates()
    settings = {"num_generations": 8, "per_device_eval_batch_size": 16, "max_steps": 8, "curriculum": True}
    trainer = grpo(model, tokenizer, tmp_path, reward, **settings)
    state = torch.random.get_rng_state()
    rates = trainer.pass_rates(trainer.train_dataset, 8)
    assert rates == [n / 8 for n in range(8)]
    assert torch.equal(torch.random.get_rng_state(), state)
    reward.seen.clear()
    trainer.train()
    prompts = [row["prompt"] for row in PROBLEMS]
    assert sorted(p for batch in reward.seen[:4] for p in batch) == sorted(prompts)  # measured, two at a time
    assert reward.seen[4:] == [[prompt] for prompt in reversed(prompts)]
    saved = json.loads((tmp_path / "pass_rates.json").read_text())
    assert sorted(saved["rates"]) == rates and saved["num_samples"] == 8

    # Only what the run will see is measured; what teaches nothing is left out.
    few = grpo(model, tokenizer, tmp_path / "few", KnownRates(), **settings | {"max_steps": 3})
    few.train()
    assert len(few.train_dataset) == 3
    useful = grpo(model, tokenizer, tmp_path / "useful", KnownRates(), drop_uninformative=True, **settings)
    useful.train()
    assert useful.train_dataset["answer"][:] == [str(n) for n in range(7, 0, -1)]


def test_pass_rates_are_those_of_samples(tmp_path):
    """A problem whose two most likely first tokens share nearly all of the probability, at a known ratio."""
    model, tokenizer = speaking_model()
    prompt = latent_thinking_prompt("5=", tokenizer, model.config)
    logits = plain_logits(model, prompt)[-1]
    logits[model.config.latent_token_id] = -torch.inf
    best = int(logits.argmax())

    def first_token_is_best(completion_ids, **columns):
        return [float(ids[0] == best) for ids in completion_ids]

    trainer = grpo(model, tokenizer, tmp_path, first_token_is_best, per_device_eval_batch_size=200, temperature=2.0)
    (rate,) = trainer.pass_rates(Dataset.from_list([{"prompt": "5=", "answer": ""}]), 2000)
    expected = float((logits / 2).softmax(-1)[best])
    assert 0.02 < expected < 0.98
    assert rate == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


# --- Resuming ---


@pytest.mark.parametrize("more", [{}, {"curriculum": True, "beta": 0.3, "gradient_accumulation_steps": 2}])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, more):
    """Cut in the second epoch, while the answers of an earlier step are still in use."""

    def start(folder, **saving):
        model, tokenizer = speaking_model()
        settings = {"num_iterations": 3, "max_steps": 19, **more, **saving}
        return grpo(model, tokenizer, tmp_path / folder, **settings)

    whole = start("whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 14}
    cut = start("cut", **saving)
    cut.add_callback(StopAt(15))
    cut.train()
    resumed = start("cut", **saving)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    steps = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (whole, resumed)]
    assert len(steps[0]) == 19 and steps[0] == steps[1]
    for (name, value), expected in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(value, expected), name


def test_a_curriculum_of_other_problems_is_refused(tmp_path):
    model, tokenizer = speaking_model()
    saving = {"save_strategy": "steps", "save_steps": 2, "resume_with_changes": True}
    grpo(model, tokenizer, tmp_path, max_steps=2, **saving).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="the run had no curriculum"):
        grpo(model, tokenizer, tmp_path, curriculum=True, **saving).train(resume_from_checkpoint=checkpoint)
    grpo(model, tokenizer, tmp_path / "other", max_steps=2, curriculum=True, **saving).train()
    changed = [{**row, "answer": "9"} for row in PROBLEMS]
    with pytest.raises(ValueError, match="about other problems"):
        trainer = grpo(model, tokenizer, tmp_path / "other", problems=changed, curriculum=True, **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))


# --- Recipe ---


@pytest.fixture
def folders(tmp_path):
    """A latent-thinking model, saved without its backbone, and the backbone."""
    tokenizer = new_tokenizer()
    backbone_for(tokenizer).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    model = make_model(backbone=backbone_for(tokenizer), **thought_token_ids(tokenizer))
    model.config.backbone_name_or_path = str(tmp_path / "lm")
    model.save_pretrained(tmp_path / "answers", save_backbone=False)
    tokenizer.save_pretrained(tmp_path / "answers")
    return {"MODEL": str(tmp_path / "answers"), "LM": str(tmp_path / "lm")}


def train(folder, *options):
    common = ["--recipe", "grpo", "--output_dir", str(folder), "--device", "cpu", "--report_to", "none"]
    common += ["--disable_tqdm", "true", "--logging_steps", "1", "--max_steps", "4"]
    return main(["train", *common, *options])


SMALL = ["--num_terms", "2", "--split", "train[:20]", "--max_length", "60", "--max_completion_length", "3"]
SMALL += ["--num_generations", "4", "--batch_size", "8", "--per_device_eval_batch_size", "8"]


def test_recipe(tmp_path, folders, capsys):
    options = ["--checkpoint", folders["MODEL"], *SMALL, "--eval_split", "test[:2]", "--eval_strategy", "steps"]
    options += ["--eval_steps", "2", "--save_steps", "2"]
    assert train(tmp_path / "run", *options) == 0, capsys.readouterr().err
    assert "pass rate" in capsys.readouterr().out
    rewards = metrics(tmp_path / "run", "training_metrics.csv", "reward")
    assert len(rewards) == 4 and all(0 <= reward <= 1 for reward in rewards)
    assert len(metrics(tmp_path / "run", "validation_metrics.csv", "eval_reward")) == 2
    assert metrics(tmp_path / "run", "training_metrics.csv", "kl")[0] == pytest.approx(0, abs=1e-6)
    with safe_open(tmp_path / "run/model.safetensors", "pt") as file:
        assert all(name.startswith("thinker.") for name in file.keys())  # noqa: SIM118 (it is no dictionary)
    start, end = (LatentThinkingForCausalLM.from_pretrained(path) for path in (folders["MODEL"], tmp_path / "run"))
    assert end.generation_config.to_dict() == start.generation_config.to_dict()
    assert end.config.halt_threshold == start.config.halt_threshold

    assert train(tmp_path / "run", *options) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    longer = ["--resume_from_checkpoint", "true", "--resume_with_changes", "true", "--max_steps", "5"]
    assert train(tmp_path / "run", *options, *longer) == 0
    rows = list(csv.DictReader((tmp_path / "run/training_metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--checkpoint with a latent-thinking model"),
        (["--checkpoint", "/nowhere"], "There is no folder /nowhere"),
        (["--checkpoint", "LM"], "holds a smollm3 model"),
        (["--checkpoint", "MODEL", "--num_generations", "1"], "num_generations must be at least 2"),
        (["--checkpoint", "MODEL", "--batch_size", "6"], "must be divisible by num_generations"),
        (["--checkpoint", "MODEL", "--batch_size", "800"], "There are 20 problems to train on, and a batch takes 200"),
        (["--checkpoint", "MODEL", "--max_length", "4000"], "the model's context of 128"),
        (["--checkpoint", "MODEL", "--max_length", "10"], "No prompt of arithmetic [train[:20]] leaves room"),
        (["--checkpoint", "MODEL", "--gradient_checkpointing", "true"], "gradient_checkpointing does not work"),
        (["--checkpoint", "MODEL", "--use_vllm", "true"], "use_vllm does not work"),
        (["--checkpoint", "MODEL", "--streaming", "true"], "leave out streaming"),
        (["--checkpoint", "MODEL", "--curriculum", "false", "--drop_uninformative", "true"], "no effect without"),
        (["--checkpoint", "MODEL", "--curriculum_samples", "0"], "curriculum_samples must be at least 1"),
        (["--checkpoint", "MODEL", "--code_seconds", "0"], "Limits must be above 0"),
        (["--checkpoint", "MODEL", "--num_generation", "3"], "did you mean '--num_generations'"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, folders, capsys, options, message):
    given = [folders.get(option, option) for option in options]
    assert train(tmp_path / "run", *SMALL, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("llada-trm train: ")
    assert not list(tmp_path.glob("run/**/*.safetensors"))


def test_programs_run_only_if_that_is_allowed(tmp_path, folders, capsys):
    row = {"prompt": "def f(x):\n", "reasoning": "", "answer": "", "tests": "assert f(1) == 1", "entry_point": "f"}
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({**row, "prompt": f"# {n}\n"}) + "\n" for n in range(2)))
    options = ["--checkpoint", folders["MODEL"], *SMALL, "--dataset_name", str(tmp_path / "code.jsonl")]
    options += ["--split", "train", "--max_steps", "1", "--curriculum", "false"]
    assert train(tmp_path / "run", *options) == 2
    assert "--allow_code_execution" in capsys.readouterr().err
    assert train(tmp_path / "run", *options, "--allow_code_execution", "true") == 0, capsys.readouterr().err
    assert metrics(tmp_path / "run", "training_metrics.csv", "reward") == [0.0]


def test_what_cannot_be_trained(tmp_path):
    model, tokenizer = speaking_model()
    model.config.noise_std = 0.1
    with pytest.raises(ValueError, match=r"noise_std=0\.1"):
        grpo(model, tokenizer, tmp_path)
    model.config.noise_std = 0.0
    with pytest.raises(ValueError, match="backbone_name_or_path"):
        grpo(model, tokenizer, tmp_path, save_backbone=False)
    model.backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze the backbone"):
        grpo(model, tokenizer, tmp_path)


def test_weights_that_become_nan_stop_the_run(tmp_path):
    model, tokenizer = speaking_model()
    with pytest.raises(FloatingPointError, match=r"After step 1 the probabilities"):
        grpo(model, tokenizer, tmp_path, learning_rate=1e38, optim="sgd", max_grad_norm=0.0).train()


# --- Without TRL ---


def test_without_trl(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("llada_trm_hf.rl", "llada_trm_hf.recipes.grpo"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert train(tmp_path / "run", "--checkpoint", "x/y") == 2
    assert "pip install 'llada-trm-hf[rl]'" in capsys.readouterr().err


def test_nothing_else_imports_trl():
    code = "import sys, llada_trm_hf.training, llada_trm_hf.cli.train; sys.exit('trl' in sys.modules)"
    assert run_program([sys.executable, "-c", code]).returncode == 0
