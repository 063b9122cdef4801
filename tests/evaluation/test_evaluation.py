"""`llada-trm evaluate` and `llada-trm compare` from the outside: their files, restarts, refusals and figures."""

import json
import math
import re
from itertools import product
from pathlib import Path

import lm_eval
import pytest
import torch
from conftest import DATA, run_two_processes
from datagen_models import load_model, save_model, tokenizer_with_markers
from tiny_training import SIZES, new_backbone

from llada_trm_hf import LLaDATRMForMaskedDiffusion, RecursiveRefinementHeadConfig
from llada_trm_hf.cli.main import main
from llada_trm_hf.data import byte_tokenizer, load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.evaluation import (
    exact_match_accuracy,
    harness,  # noqa: F401  (registers the adapters)
)
from llada_trm_hf.evaluation.comparison import PairedDifference, compare_results
from llada_trm_hf.evaluation.evaluate import Evaluation
from llada_trm_hf.training import MaskedDiffusionTrainer, MaskedDiffusionTrainingArguments

# Problems of different lengths, with answers a model with random weights gets right now and then.
PROBLEMS = [{"prompt": "x" * (i * 7 % 11) + f"{i}?", "answer": str(i % 10)} for i in range(14)]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> str:
    """A hybrid whose backbone learned two-digit chains for a moment: it gets some of them right, and not all."""
    folder, tokenizer = tmp_path_factory.mktemp("hybrid"), byte_tokenizer()
    backbone = new_backbone(num_hidden_layers=1, max_position_embeddings=64, initializer_range=0.15)
    problems, response = load_reasoning_dataset("arithmetic", "train[:60]", num_terms=2)
    arguments = MaskedDiffusionTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=150,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    samples = tokenize_reasoning(problems, tokenizer, response)
    MaskedDiffusionTrainer(backbone, arguments, train_dataset=samples, processing_class=tokenizer).train()
    head = RecursiveRefinementHeadConfig(hidden_size=32, chunk_size=3, head_hidden_size=8, initializer_range=0.5)
    model = LLaDATRMForMaskedDiffusion.from_backbone(backbone, head, min_confidence=0.9)
    for parameter in model.refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> str:
    digits = {str(digit): 1.6 for digit in range(10)}
    return save_model(tmp_path_factory.mktemp("causal"), favourites={"<|endoftext|>": 2.0, **digits})


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return str(path)


def evaluate(model: str, folder: Path, *flags: str) -> int:
    return main(["evaluate", "--model", model, "--output_dir", str(folder), "--device", "cpu", *flags])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(folder)]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# --- What it finds ---


@pytest.mark.parametrize("refined", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_accuracy_the_demo_would_print(hybrid, tmp_path, refined, steps, capsys):
    chains, response = load_reasoning_dataset("arithmetic", "test[:10]", num_terms=2)
    samples = tokenize_reasoning(chains, byte_tokenizer(), response)
    model = LLaDATRMForMaskedDiffusion.from_pretrained(hybrid).eval()
    expected = exact_match_accuracy(model, samples, num_diffusion_steps=steps, enable_refinement=refined)
    flags = f"--dataset_name arithmetic --split test[:10] --num_terms 2 --num_diffusion_steps {steps} --batch_size 4"
    assert evaluate(hybrid, tmp_path, *flags.split(), *([] if refined else ["--no_refinement"])) == 0
    found = summary(tmp_path)
    assert (found["correct"], found["total"]) == (expected.correct, 10) and 0 < expected.correct < 10
    assert found["interval_95"] == pytest.approx(expected.interval)
    assert found["forward_passes"] == steps and (found["refinement_steps"] > 0) == refined
    assert f"{expected.correct} of 10 right: {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sudoku", "maze"])
def test_the_whole_grid_counts(tmp_path, monkeypatch, name):
    """A model that learned to copy 4x4 clues or mazes for a moment, against its outputs compared cell by cell."""
    flags = {"sudoku": "--puzzle_size 4 --num_clues 14 15", "maze": "--puzzle_size 5"}[name]
    (tmp_path / "small.json").write_text(
        json.dumps({**SIZES, "max_position_embeddings": 64, "initializer_range": 0.15})
    )
    monkeypatch.chdir(tmp_path)
    steps = {"sudoku": 120, "maze": 3}[name]
    run = f"--split train[:200] --max_steps {steps} --batch_size 32 --lr 1e-2 --gradient_checkpointing false"
    run += " --recipe finetune --refiner none --backbone small.json --save_strategy no --use_cpu --disable_tqdm true"
    data = f"--dataset_name {name} {flags}"
    assert main(["train", *f"{data} {run} --max_length 56 --logging_strategy no --output_dir model".split()]) == 0
    length = {"sudoku": 17, "maze": 26}[name]
    asked = f"{data} --split test[:40] --max_new_tokens {length} --num_diffusion_steps 4"
    assert evaluate("model", tmp_path / "results", *asked.split()) == 0
    options = {"sudoku": {"puzzle_size": 4, "num_clues": [14, 15]}, "maze": {"puzzle_size": 5}}[name]
    problems, _ = load_reasoning_dataset(name, "test[:40]", **options)
    found = lines(tmp_path / "results")
    assert [line["prompt"] for line in found] == problems["prompt"]
    for line, answer in zip(found, problems["answer"], strict=True):
        assert line["correct"] == (list(line["output"].strip()) == list(answer))
    right = summary(tmp_path / "results")["correct"]
    assert right == sum(line["correct"] for line in found) and (0 < right < 40 or name == "maze")


def test_the_harness_finds_the_same_accuracy(hybrid, tmp_path):
    """The task as a file of lm-evaluation-harness, the model through the adapter."""
    chains, response = load_reasoning_dataset("arithmetic", "test[:10]", num_terms=2)
    rows = [{"prompt": row["prompt"], "response": response.format(**row)} for row in chains]
    (tmp_path / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "chains",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "chains.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{response}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    arguments = {"pretrained": hybrid, "num_diffusion_steps": 1}
    results = lm_eval.simple_evaluate(
        "llada_trm", arguments, [task], batch_size=4, device="cpu", bootstrap_iters=0, log_samples=False
    )
    flags = "--dataset_name arithmetic --split test[:10] --num_terms 2 --num_diffusion_steps 1"
    assert evaluate(hybrid, tmp_path / "ours", *flags.split()) == 0
    assert results["results"]["chains"]["exact_match,none"] == summary(tmp_path / "ours")["accuracy"] > 0


def test_every_line_against_the_model_alone(causal, problems, tmp_path):
    """Each problem by itself, without padding; read with `in` and not with what is under test."""
    assert evaluate(causal, tmp_path, "--dataset_name", problems, "--max_new_tokens", "16", "--batch_size", "4") == 0
    model, tokenizer = load_model(causal), tokenizer_with_markers()
    found = lines(tmp_path)
    assert [line["index"] for line in found] == list(range(len(PROBLEMS)))
    for line, problem in zip(found, PROBLEMS):
        prompt = tokenizer(problem["prompt"], return_tensors="pt")["input_ids"]
        tokens = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert line["prompt"] == problem["prompt"] and line["answer"] == problem["answer"] and line["output"] == text
        assert line["tokens"] == line["forward_passes"] == len(tokens) and line["seconds"] > 0
        assert line["refinement_steps"] is None
        if line["correct"]:
            assert problem["answer"] in text and float(line["extracted"]) == float(problem["answer"])
    assert len({line["tokens"] for line in found}) > 1
    total = summary(tmp_path)
    assert total["correct"] == sum(line["correct"] for line in found)
    assert total["tokens"] == pytest.approx(sum(line["tokens"] for line in found) / 14)


def test_passes_of_a_row_are_its_own(hybrid, problems, tmp_path):
    """With a threshold, rows of a batch end after different numbers of passes."""
    flags = ["--dataset_name", problems, "--max_new_tokens", "9", "--confidence_threshold", "0.5"]
    assert evaluate(hybrid, tmp_path / "together", *flags, "--batch_size", "14", "--no_refinement") == 0
    assert evaluate(hybrid, tmp_path / "alone", *flags, "--batch_size", "1", "--no_refinement") == 0
    together, alone = untimed(tmp_path / "together"), untimed(tmp_path / "alone")
    assert together == alone and len({line["forward_passes"] for line in alone}) > 1


def test_the_prompt_format(causal, problems, tmp_path):
    flags = ["--dataset_name", problems, "--split", "test[:2]", "--max_new_tokens", "4"]
    assert evaluate(causal, tmp_path / "a", *flags, "--prompt_format", "Solve {prompt} {x}=") == 0
    model, tokenizer = load_model(causal), tokenizer_with_markers()
    prompt = tokenizer(f"Solve {PROBLEMS[1]['prompt']} {{x}}=", return_tensors="pt")["input_ids"]
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    assert lines(tmp_path / "a")[1]["output"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert lines(tmp_path / "a")[1]["prompt"] == PROBLEMS[1]["prompt"]


def test_code_runs_only_if_allowed(causal, tmp_path, capsys):
    rows = [{"prompt": "Say 1.", "answer": "x = 1", "tests": tests} for tests in ("pass", "assert False")]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_name", str(path), "--max_new_tokens", "2"]
    assert evaluate(causal, tmp_path / "a", *flags) == 2
    assert "--allow_code_execution" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert evaluate(causal, tmp_path / "a", *flags, "--allow_code_execution") == 0
    assert [line["reason"] != "" for line in lines(tmp_path / "a")][1]
    assert not lines(tmp_path / "a")[1]["correct"]


# --- Interrupted, resumed, shared ---


@pytest.mark.parametrize("flags", [[], ["--temperature", "1.5"]])
def test_an_interrupted_evaluation_goes_on(causal, problems, tmp_path, monkeypatch, flags):
    flags = ["--dataset_name", problems, "--max_new_tokens", "6", "--batch_size", "4", *flags]
    assert evaluate(causal, tmp_path / "whole", *flags) == 0

    answered = []
    answer = Evaluation.answer

    def interrupted(self, number, batch):
        if number == 2 and not answered.count("again"):
            raise KeyboardInterrupt
        answered.append(number)
        return answer(self, number, batch)

    monkeypatch.setattr(Evaluation, "answer", interrupted)
    folder = tmp_path / "cut"
    assert evaluate(causal, folder, *flags) == 130
    kept = (folder / "problems.jsonl").read_text()
    assert len(kept.splitlines()) == 8 and not (folder / "summary.json").exists()
    # The last line was not finished: its whole batch is answered again, and the lines that are there stay.
    (folder / "problems.jsonl").write_text(kept[: kept.rindex("\n", 0, -1) + 30])
    answered[:] = ["again"]
    assert evaluate(causal, folder, *flags) == 0
    assert answered == ["again", 1, 2, 3]
    assert untimed(folder) == untimed(tmp_path / "whole")
    assert set(kept.splitlines()[:7]) <= set((folder / "problems.jsonl").read_text().splitlines())
    answered[:] = ["again"]
    assert evaluate(causal, folder, *flags) == 0 and answered == ["again"]


def test_changed_settings_are_refused(causal, hybrid, problems, tmp_path, capsys):
    flags = ["--dataset_name", problems, "--max_new_tokens", "4", "--batch_size", "4"]
    assert evaluate(causal, tmp_path, *flags) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changes = {
        "generation": ["--max_new_tokens", "5"],
        "batch_size": ["--batch_size", "5"],
        "seed": ["--seed", "1"],
        "split": ["--split", "test[:3]"],
        "prompt_format": ["--prompt_format", "{prompt}!"],
        "dtype": ["--dtype", "bfloat16"],
    }
    for name, change in changes.items():
        capsys.readouterr()
        assert evaluate(causal, tmp_path, *flags, *change) == 2
        error = capsys.readouterr().err
        assert f"was made with {name}=" in error or (name == "dtype" and "checksum_of_weights=" in error)
    assert evaluate(hybrid, tmp_path, *flags) == 2
    assert "was made with model=" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_under_the_same_name_are_refused(causal, problems, tmp_path, capsys):
    folder = save_model(tmp_path / "model", favourites={})
    flags = ["--dataset_name", problems, "--max_new_tokens", "2"]
    assert evaluate(folder, tmp_path / "results", *flags) == 0
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1e-3
    model.save_pretrained(folder)
    assert evaluate(folder, tmp_path / "results", *flags) == 2
    assert "checksum_of_weights" in capsys.readouterr().err


def test_two_processes_give_the_rows_of_one(hybrid, problems, tmp_path):
    """Five batches, so one process has the last turn to itself; sampled, so random numbers are too."""
    flags = ["--dataset_name", problems, "--max_new_tokens", "5", "--batch_size", "3", "--temperature", "0.7"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert evaluate(hybrid, one, *flags) == 0
    run_two_processes(["evaluate", "--model", hybrid, "--output_dir", str(two), "--device", "cpu", *flags])
    assert untimed(one) == untimed(two)
    assert summary(one)["correct"] == summary(two)["correct"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name", "gsm9k"], "Unknown dataset 'gsm9k' (did you mean 'gsm8k'?)"),
        (["--dataset_name", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--prompt_format", "no place"], "prompt_format has to hold {prompt}"),
        (["--num_diffusion_steps", "0"], "num_diffusion_steps must be an integer of at least 1"),
        (["--max_new_tokens", "60"], "more than the model's context of 64"),
        (["--code_seconds", "0"], "Limits must be above 0"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_are_one_clear_line(hybrid, problems, tmp_path, capsys, flags, message):
    assert evaluate(hybrid, tmp_path / "new", "--dataset_name", problems, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_settings_a_model_has_no_use_for(causal, hybrid, problems, tmp_path, capsys):
    flags = ["--dataset_name", problems]
    assert evaluate(causal, tmp_path / "a", *flags, "--kv_cache", "dual") == 2
    assert "kv_cache means nothing to it" in capsys.readouterr().err
    assert evaluate(causal, tmp_path / "a", *flags, "--top_k", "5") == 2
    assert "top_k and top_p need a temperature" in capsys.readouterr().err
    LLaDATRMForMaskedDiffusion.from_pretrained(hybrid).backbone.save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    assert evaluate(str(tmp_path / "backbone"), tmp_path / "a", *flags, "--no_refinement") == 2
    assert "has no refiner" in capsys.readouterr().err


def test_a_damaged_line_is_named(causal, problems, tmp_path, capsys):
    flags = ["--dataset_name", problems, "--max_new_tokens", "2"]
    assert evaluate(causal, tmp_path, *flags) == 0
    path = tmp_path / "problems.jsonl"
    damaged = path.read_text().splitlines(keepends=True)
    damaged[3] = damaged[3].replace('"index"', '"number"')
    path.write_text("".join(damaged))
    assert evaluate(causal, tmp_path, *flags) == 2
    assert "line 4, is damaged" in capsys.readouterr().err


# --- Comparing ---


def write_results(folder: Path, correct: list[bool], first: int = 0) -> str:
    """What an evaluation leaves of problems `first`, `first + 1`, ..."""
    folder.mkdir()
    rows = [
        {
            "index": i,
            "prompt": f"problem {first + i}",
            "answer": "1",
            "output": "",
            "extracted": None,
            "correct": right,
        }
        | {"reason": "", "forward_passes": 2, "tokens": 4, "seconds": 0.5, "refinement_steps": None}
        for i, right in enumerate(correct)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_comparison(tmp_path, capsys):
    first = write_results(tmp_path / "bare", [True] * 60 + [False] * 40)
    second = write_results(tmp_path / "refined", [True] * 55 + [False] * 5 + [True] * 20 + [False] * 20)
    files = {"--plot": tmp_path / "plot.png", "--output_file": tmp_path / "numbers.json"}
    assert main(["compare", first, second, *[str(part) for pair in files.items() for part in pair]]) == 0
    out = capsys.readouterr().out
    assert "60.0%" in out and "75.0%" in out and "+15.0" in out and "5 : 20" in out and "100 problems" in out
    row = json.loads(files["--output_file"].read_text())["results"][1]
    assert (row["both"], row["only_first"], row["only_second"], row["neither"]) == (55, 5, 20, 20)
    # Two-sided binomial test of 5 in 25, from the definition.
    assert row["p_value"] == pytest.approx(2 * sum(math.comb(25, k) for k in range(6)) / 2**25)
    low, high = row["difference_interval_95"]
    assert 0.04 < low < 0.15 < high < 0.26
    from PIL import Image

    assert Image.open(files["--plot"]).size[0] > 500


def test_plot_writes_its_numbers(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    first = write_results(tmp_path / "bare", [True] * 60 + [False] * 40)
    second = write_results(tmp_path / "ref_$x^{", [True] * 55 + [False] * 5 + [True] * 20 + [False] * 20)
    comparison = compare_results([first, second])
    comparison.plot(str(tmp_path / "plot.png"))
    left, right = drawn[0].axes
    numbers = [number for text in left.texts for number in re.findall(r"[-+.\d]+", text.get_text())]
    expected = [(r.summary.accuracy.value, *r.summary.accuracy.interval) for r in comparison.results]
    assert [float(number) / 100 for number in numbers] == pytest.approx(sum(expected, ()), abs=6e-4)
    difference = comparison.results[1].difference
    (label,) = [text.get_text() for text in right.texts if "to" in text.get_text()]
    numbers = [float(number) / 100 for number in re.findall(r"[-+.\d]+", label)]
    assert numbers == pytest.approx([0.15, *difference.interval], abs=6e-4) and label.startswith("+15.0")
    assert [label.get_text() for label in left.get_yticklabels()] == ["bare", "ref_$x^{"]
    assert "100 problems" in drawn[0].get_suptitle() and "bare" in right.get_title()
    assert left.get_xlabel() and right.get_xlabel() and left.get_title()


def test_different_problems(tmp_path, capsys):
    first = write_results(tmp_path / "a", [True, True, False, False])
    second = write_results(tmp_path / "b", [False, True, True], first=2)
    assert main(["compare", first, second]) == 2
    assert "not of the same problems: a 4, b 3, 2 in common" in capsys.readouterr().err
    assert main(["compare", first, second, "--common_only"]) == 0
    out = capsys.readouterr().out
    assert "2 problems common to all, of 4, 3" in out and "0 : 1" in out
    assert main(["compare", first, write_results(tmp_path / "c", [True], first=9), "--common_only"]) == 2
    assert "no problem in common" in capsys.readouterr().err
    assert main(["compare", first]) == 2 and "at least two" in capsys.readouterr().err
    assert main(["compare", first, str(tmp_path / "nothing")]) == 2
    assert "There is no problems.jsonl" in capsys.readouterr().err
    assert main(["compare", first, second, "--plot", "x.txt"]) == 2 and "has to end in .png" in capsys.readouterr().err


def test_the_same_problem_twice(tmp_path):
    """Rows with the same prompt stay apart: each is compared with its own."""
    paths = []
    for name, correct in (("a", [True, False]), ("b", [False, True])):
        path = write_results(tmp_path / name, correct)
        text = (Path(path) / "problems.jsonl").read_text()
        (Path(path) / "problems.jsonl").write_text(text.replace("problem 1", "problem 0"))
        paths.append(path)
    assert main(["compare", *paths, "--output_file", str(tmp_path / "n.json")]) == 0
    row = json.loads((tmp_path / "n.json").read_text())["results"][1]
    assert (row["both"], row["only_first"], row["only_second"], row["neither"]) == (0, 1, 1, 0)


@pytest.mark.parametrize("shares", [(0.6, 0.1, 0.2, 0.1), (0.3, 0.15, 0.15, 0.4), (0.3, 0.3, 0.3, 0.1)])
def test_the_interval_covers_the_true_difference(shares):
    """Over all outcomes of 20 problems, weighted by their probability: about 95% of the intervals hold the truth."""
    number, truth, covered = 20, shares[2] - shares[1], 0.0
    for a, b, c in product(range(number + 1), repeat=3):
        d = number - a - b - c
        if d < 0:
            continue
        ways = math.factorial(number) / math.prod(map(math.factorial, (a, b, c, d)))
        low, high = PairedDifference(a, b, c, d).interval
        covered += ways * math.prod(s**n for s, n in zip(shares, (a, b, c, d))) * (low <= truth <= high)
    assert 0.93 < covered < 0.98


def test_the_interval_turns_round_with_the_models():
    one, other = PairedDifference(30, 4, 11, 5), PairedDifference(30, 11, 4, 5)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value and one.value == -other.value
    assert PairedDifference(10, 0, 0, 0).p_value == 1 and PairedDifference(10, 0, 0, 0).interval[0] < 0


@pytest.fixture
def gsm8k() -> Path:
    folder = DATA / "gsm8k"
    if not folder.exists():
        pytest.skip(f"no GSM8K in {folder}")
    return folder


def test_real_gsm8k(causal, gsm8k, tmp_path):
    flags = ["--dataset_name", "gsm8k", "--data_files", str(gsm8k / "test.jsonl"), "--split", "test[:3]"]
    folder = save_model(tmp_path / "model", max_position_embeddings=1024)
    assert evaluate(folder, tmp_path / "results", *flags, "--max_new_tokens", "4") == 0
    expected = [json.loads(line)["answer"].split("#### ")[1] for line in (gsm8k / "test.jsonl").open()][:3]
    assert [line["answer"] for line in lines(tmp_path / "results")] == expected
