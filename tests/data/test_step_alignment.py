"""Reasoning steps in chunks of their own: checked on the finished samples, token by token."""

import json
import random
import re
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import byte_tokenizer, load_reasoning_dataset, tokenize_reasoning
from llada_trm_hf.recipes.masked_diffusion import MaskedDiffusionScriptArguments, run_masked_diffusion
from llada_trm_hf.training import MaskedDiffusionTrainingArguments

RESPONSE = "{reasoning}\n#### {answer}"


def problems(number: int = 60) -> list[dict]:
    """Lines of all lengths, with characters of one and of several bytes."""
    draw = random.Random(0)
    words = ["Thus", "seven", "2+2=4", "is", "naïve", "½", "clips", "x_1", "therefore"]

    def line() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 12)))

    return [
        {"prompt": line(), "reasoning": "\n".join(line() for _ in range(draw.randint(0, 6))), "answer": str(i)}
        for i in range(number)
    ]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, whose tokens begin with the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n\n".join(map(str, row.values())) for row in problems()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


TOKENIZERS = {"bytes": byte_tokenizer(), "words": word_tokenizer()}


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems()))
    return load_reasoning_dataset(str(path))[0]


def text_of(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("chunk_size", [1, 5, 16])
def test_no_chunk_holds_tokens_of_two_steps(dataset, tokenizer, chunk_size):
    plain = tokenize_reasoning(dataset, tokenizer, RESPONSE, 2048)
    aligned = tokenize_reasoning(dataset, tokenizer, RESPONSE, 2048, align_steps_to_chunks=chunk_size)
    (line_break,) = tokenizer("\n")["input_ids"]
    for row, before, after in zip(dataset, plain, aligned, strict=True):
        tokens, start = after["input_ids"], before["prompt_length"]
        for first in range(0, len(tokens), chunk_size):
            # A chunk says a part of one line, or of the prompt, and then nothing but line breaks.
            assert re.fullmatch(r"[^\n]*\n*", text_of(tokenizer, tokens[first : first + chunk_size]))
        # Nothing but line breaks has been added: the tokens are the others in their order.
        rest = iter(tokens)
        assert all(token in rest for token in before["input_ids"])
        added = len(tokens) - len(before["input_ids"])
        assert tokens.count(line_break) - before["input_ids"].count(line_break) == added
        # Never a whole chunk more, neither before the response nor between steps.
        steps = [line for line in row["reasoning"].split("\n") if line] + [row["answer"]]
        assert added <= len(steps) * (chunk_size - 1)
        assert after["prompt_length"] == start and after["index"] == before["index"]
        # The text is the same but for blank lines, and so is the answer.
        response = text_of(tokenizer, tokens[start:])
        assert re.sub(r"\n+", "\n", response).strip() == text_of(tokenizer, before["input_ids"][start:])
        assert response.rpartition("#### ")[2] == row["answer"]
        assert tokens[-1] == tokenizer.eos_token_id


def responses(rows: list[dict], response: str = RESPONSE, chunk_size: int = 64) -> list[list[str]]:
    """What each chunk of a sample says, of steps that are shorter than a chunk."""
    tokenizer = TOKENIZERS["bytes"]
    samples = tokenize_reasoning(Dataset.from_list(rows), tokenizer, response, 4096, chunk_size)
    return [
        [
            text_of(tokenizer, sample["input_ids"][first : first + chunk_size]).strip()
            for first in range(0, len(sample["input_ids"]), chunk_size)
        ]
        for sample in samples
    ]


@pytest.mark.parametrize(
    "reasoning, steps",
    [
        ("a\n\nb\n  c \n", ["a", "b", "c"]),
        (
            "One thing. Then $x$ follows! So what? Nothing, e.g. 2.5 of it.",
            ["One thing.", "Then $x$ follows!", "So what?", "Nothing, e.g. 2.5 of it."],
        ),
        ("First. And second.\nThird.", ["First. And second.", "Third."]),
        (
            "Let\n\\begin{align*}\na &= b\\\\\nc &= d\n\\end{align*}\nthen",
            ["Let", "\\begin{align*}\na &= b\\\\\nc &= d\n\\end{align*}", "then"],
        ),
        ("See\n[asy]\ndraw(A);\ndot(B);\n[/asy]\nhere", ["See", "[asy]\ndraw(A);\ndot(B);\n[/asy]", "here"]),
        ("", []),
    ],
)
def test_what_a_step_is(reasoning, steps):
    (chunks,) = responses([{"prompt": "?", "reasoning": reasoning, "answer": "7"}])
    assert chunks == ["?", *steps, "#### 7"]


def test_an_answer_that_is_written_to_its_reasoning_stays_with_it():
    rows = list(load_reasoning_dataset("arithmetic", "train[:5]", num_terms=6)[0])
    for row, chunks in zip(rows, responses(rows, "{reasoning}{answer}")):
        assert chunks == [row["prompt"], row["reasoning"] + row["answer"]]


def test_code_and_answers_before_their_reasons():
    code = "def f(x):\n\n    return x\n"
    assert responses([{"prompt": "?", "reasoning": "", "answer": code}], "{answer}") == [["?", code.strip()]]
    row = {"prompt": "?", "reasoning": "a\nb", "answer": "7"}
    assert responses([row], "It is {answer}: {reasoning}") == [["?", "It is 7:", "a", "b"]]


def test_a_problem_whose_response_would_start_beyond_the_end_is_dropped(capsys, dataset):
    tokenizer = TOKENIZERS["bytes"]
    longest = 32
    kept = tokenize_reasoning(dataset, tokenizer, RESPONSE, longest, align_steps_to_chunks=16)
    fitting = [i for i, row in enumerate(dataset) if -(-len(row["prompt"].encode()) // 16) * 16 < longest]
    assert 0 < len(fitting) < len(dataset) and kept["index"] == fitting
    assert f"Dropped {len(dataset) - len(fitting)} of {len(dataset)} problems" in capsys.readouterr().out
    assert all(len(tokens) <= longest for tokens in kept["input_ids"])


def test_a_stream_gives_the_same_samples(tmp_path, dataset):
    streamed, _ = load_reasoning_dataset(str(tmp_path / "problems.jsonl"), streaming=True)
    for chunk_size in (None, 8):
        arguments = (TOKENIZERS["words"], RESPONSE, 30, chunk_size)
        assert list(tokenize_reasoning(streamed, *arguments)) == list(tokenize_reasoning(dataset, *arguments))


def test_problems_without_an_answer_are_not_learned():
    tokenizer = TOKENIZERS["bytes"]
    rows = [{"prompt": "?", "reasoning": "", "answer": answer} for answer in ("", "2", " ")]
    assert tokenize_reasoning(Dataset.from_list(rows), tokenizer)["index"] == [1]


def test_tokenizers_and_sizes_that_cannot_do_it(dataset):
    with pytest.raises(ValueError, match="align_steps_to_chunks must be at least 1, got 0"):
        tokenize_reasoning(dataset, TOKENIZERS["bytes"], align_steps_to_chunks=0)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]")
    with pytest.raises(ValueError, match="a token for a line break"):
        tokenize_reasoning(dataset, tokenizer, align_steps_to_chunks=4)


# --- In a training run ---


def files_of_a_run(folder: Path) -> dict[str, str]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    (folder / "small.json").write_text(json.dumps({**sizes, "max_position_embeddings": 512}))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems(16)))
    return {"backbone": str(folder / "small.json"), "dataset_name": str(folder / "train.jsonl")}


def test_the_recipes_flag_takes_the_chunk_size_of_the_model(tmp_path):
    def tokens(run: str, **what) -> list[list[int]]:
        training = MaskedDiffusionTrainingArguments(output_dir=str(tmp_path / run), max_steps=1, use_cpu=True)
        return list(run_masked_diffusion(MaskedDiffusionScriptArguments(**what), training).train_dataset["input_ids"])

    files = files_of_a_run(tmp_path)
    dataset, _ = load_reasoning_dataset(files["dataset_name"])
    expected = list(tokenize_reasoning(dataset, TOKENIZERS["bytes"], RESPONSE, 512, 7)["input_ids"])
    assert tokens("head", **files, chunk_size=7, align_steps_to_chunks=True) == expected
    more = {"checkpoint": str(tmp_path / "head"), "dataset_name": files["dataset_name"]}
    assert tokens("more", **more, align_steps_to_chunks=True) == expected
    assert tokens("plain", **more) == list(tokenize_reasoning(dataset, TOKENIZERS["bytes"], RESPONSE)["input_ids"])


def test_training_on_a_stream(tmp_path, capsys):
    files = files_of_a_run(tmp_path)
    flags = [text for name, value in files.items() for text in (f"--{name}", value)]
    flags += ["--recipe", "warmup", "--streaming", "true", "--split", "train[4:]", "--align_steps_to_chunks", "true"]
    flags += ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--warmup_steps", "0", "--logging_steps", "1"]
    assert main(["train", *flags]) == 2
    assert "max_steps" in capsys.readouterr().err
    assert main(["train", *flags, "--max_steps", "5"]) == 0
    assert len((tmp_path / "run" / "training_metrics.csv").read_text().splitlines()) == 6
