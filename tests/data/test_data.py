"""Datasets, tokenizer and masking."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA

from llada_trm_hf.data import (
    MaskedDiffusionCollator,
    byte_tokenizer,
    difference_chains,
    load_reasoning_dataset,
    prompt_tokens,
    tokenize_reasoning,
)
from llada_trm_hf.data.masking import stateless_uniform
from llada_trm_hf.data.rows import slices_overlap


@pytest.fixture(scope="module")
def gsm8k() -> str:
    path = DATA / "gsm8k" / "train.jsonl"
    if not path.exists():
        pytest.skip("no GSM8K file")
    return str(path)


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_difference_chains_are_right_and_splits_share_nothing():
    train, test = (list(difference_chains(300, 6, split)) for split in ("train", "test"))
    for problem in train + test:
        digits = [int(digit) for digit in problem["prompt"].rstrip("=")]
        values = [digits[0]]
        for digit in digits[1:]:
            values.append(abs(values[-1] - digit))
        assert problem["reasoning"] + problem["answer"] == "".join(map(str, values))
    assert len({problem["prompt"] for problem in train}) == 300
    assert not {problem["prompt"] for problem in train} & {problem["prompt"] for problem in test}
    assert list(difference_chains(5, 6)) == train[:5]


def test_chains_written_as_equations():
    plain, written = (list(difference_chains(200, 7, equations=equations)) for equations in (False, True))
    for short, long in zip(plain, written, strict=True):
        assert (short["prompt"], short["answer"]) == (long["prompt"], long["answer"])
        steps = long["reasoning"].split()
        assert [step[1] for step in steps] == list(long["prompt"][1:-1])
        assert all(step[2] == "=" and abs(int(step[0]) - int(step[1])) == int(step[3]) for step in steps)
        assert "".join(step[0] for step in steps) == short["reasoning"] and steps[-1][3] == short["answer"]


def test_prompts_say_whether_to_think():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="the tokenizer has none"):
        prompt_tokens("1+1=", tokenizer, enable_thinking=False)
    tokenizer.chat_template = (
        "{{ messages[0].content }}"
        "{{ '' if enable_thinking is not defined else '(yes)' if enable_thinking else '(no)' }}"
    )
    texts = [tokenizer.decode(prompt_tokens("1+1=", tokenizer, thinking)) for thinking in (None, True, False)]
    assert texts == ["1+1=", "1+1=(yes)", "1+1=(no)"]


def test_difference_chains_say_when_there_are_too_few():
    with pytest.raises(ValueError, match="fewer than 500 different train chains of 2 digits"):
        list(difference_chains(500, 2))


def test_byte_tokenizer_round_trips_any_text():
    tokenizer = byte_tokenizer()
    text = "naïve 3 ÷ 4\n\t“quote” 漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.mask_token_id


def test_gsm8k_rows_become_the_schema(gsm8k):
    dataset, response = load_reasoning_dataset("gsm8k", "train[:50]", data_files=gsm8k)
    assert len(dataset) == 50 and set(dataset.column_names) == {"prompt", "reasoning", "answer"}
    raw = [json.loads(line) for line in Path(gsm8k).read_text().splitlines()[:50]]
    for row, original in zip(dataset, raw):
        assert row["prompt"] == original["question"].strip()
        assert row["answer"] == original["answer"].split("#### ")[1]
        assert "<<" not in row["reasoning"] and "####" not in row["reasoning"]
    assert "Natalia sold 48/2 = 24 clips in May." in response.format(**dataset[0])
    assert response.format(**dataset[0]).endswith("#### 72")


def test_a_local_file_is_recognised_by_its_columns(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}])
    assert load_reasoning_dataset(path)[0][0] == {"prompt": "1+1?", "reasoning": "1+1=2", "answer": "2"}
    path = write_lines(tmp_path / "y.jsonl", [{"q": "1+1?", "a": "2"}])
    mapped, _ = load_reasoning_dataset(path, columns={"prompt": "q", "answer": "a"})
    assert mapped[0]["prompt"] == "1+1?" and mapped[0]["answer"] == "2"


@pytest.mark.parametrize(
    "rows, arguments, message",
    [
        (None, {}, "There is no file"),
        ([], {}, "is empty"),
        ([{"a": "1", "b": "2"}], {}, "lacks the columns prompt, answer; it has a, b"),
        ([{"a": "1"}], {"columns": {"prompt": "q"}}, "no such column: prompt=q. It has a"),
        ([{"question": "?", "answer": "no separator"}], {}, "ends with '#### result'"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, arguments, message):
    path = str(tmp_path / "rows.jsonl")
    if rows is not None:
        write_lines(Path(path), rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_reasoning_dataset(path, **arguments)


def test_malformed_json_and_unknown_names(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer"\n')
    with pytest.raises(ValueError, match=r"broken.jsonl is not valid json"):
        load_reasoning_dataset(str(tmp_path / "broken.jsonl"))
    with pytest.raises(ValueError, match=r"Unknown dataset 'gsm8'.*did you mean 'gsm8k'"):
        load_reasoning_dataset("gsm8")


def test_tokenize_ends_with_eos_and_drops_what_does_not_fit(capsys):
    tokenizer = byte_tokenizer()
    dataset, response = load_reasoning_dataset("arithmetic", "train[:20]", num_terms=4)
    samples = tokenize_reasoning(dataset, tokenizer, response)
    for sample, problem in zip(samples, dataset):
        text = tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
        assert text == problem["prompt"] + problem["reasoning"] + problem["answer"]
        assert sample["input_ids"][-1] == tokenizer.eos_token_id and sample["prompt_length"] == 5
    assert all(len(sample["input_ids"]) == 7 for sample in tokenize_reasoning(dataset, tokenizer, response, 7))
    with pytest.raises(ValueError, match="raise max_length"):
        tokenize_reasoning(dataset, tokenizer, response, 5)


def test_a_chat_template_formats_the_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    dataset, response = load_reasoning_dataset("arithmetic", "train[:1]", num_terms=4)
    sample = tokenize_reasoning(dataset, tokenizer, response)[0]
    prompt = tokenizer.decode(sample["input_ids"][: sample["prompt_length"]])
    assert prompt == f"<user>{dataset[0]['prompt']}<assistant>"


def test_stateless_uniform_is_uniform_and_depends_on_each_part():
    index = np.arange(2000)
    draws = stateless_uniform(1, 2, index, 50)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 45  # 19 degrees of freedom: 0.1% above 43.8
    for axis in (0, 1):  # neighbouring samples and neighbouring columns are uncorrelated
        a, b = np.take(draws, range(0, draws.shape[axis] - 1), axis), np.take(draws, range(1, draws.shape[axis]), axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    for other in (stateless_uniform(0, 2, index, 50), stateless_uniform(1, 3, index, 50)):
        assert not np.any(other == draws)
    assert np.array_equal(stateless_uniform(1, 2, index[7:9], 20), draws[7:9, :20])


def samples(lengths: list[tuple[int, int]]) -> list[dict]:
    return [
        {"input_ids": list(range(10, 10 + prompt + response)), "prompt_length": prompt, "index": i}
        for i, (prompt, response) in enumerate(lengths)
    ]


def test_collator_masks_responses_only_with_the_stated_probability():
    collator = MaskedDiffusionCollator(mask_token_id=1, pad_token_id=0, learn_padding=False)
    batch = collator(samples([(5, 40)] * 1 + [(3, 30)] * 1))
    rows = [{"input_ids": list(range(10, 50)), "prompt_length": 8, "index": i} for i in range(3000)]
    batch = collator(rows)
    masked = batch["input_ids"] == 1
    assert not masked[:, :8].any() and (batch["labels"][:, :8] == -100).all()
    assert torch.equal(batch["labels"][:, 8:], torch.arange(18, 50).expand(3000, -1))
    assert torch.equal(batch["input_ids"][~masked], torch.arange(10, 50).expand(3000, -1)[~masked])
    share, p_mask = masked[:, 8:].float().mean(1), batch["p_mask"]
    assert p_mask.min() >= 1e-3 and p_mask.max() <= 1 and abs(p_mask.mean() - 0.5) < 0.02
    z = (share - p_mask) / (p_mask * (1 - p_mask) / 32).sqrt().clamp(min=1e-3)
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


def test_collator_learns_padding_as_the_end_or_hides_it():
    rows = samples([(2, 3), (2, 8)])
    learned = MaskedDiffusionCollator(mask_token_id=1, pad_token_id=0)(rows)
    assert "attention_mask" not in learned
    assert learned["labels"][0].tolist() == [-100, -100, 12, 13, 14, 0, 0, 0, 0, 0]
    hidden = MaskedDiffusionCollator(mask_token_id=1, pad_token_id=0, learn_padding=False)(rows)
    assert hidden["attention_mask"].tolist() == [[1] * 5 + [0] * 5, [1] * 10]
    assert hidden["labels"][0].tolist() == [-100, -100, 12, 13, 14] + [-100] * 5
    assert (hidden["input_ids"][0, 5:] == 0).all()


def test_masks_depend_on_sample_and_epoch_only():
    rows = samples([(2, 30), (2, 30), (2, 20), (2, 30)])
    collator = MaskedDiffusionCollator(mask_token_id=1, pad_token_id=0, seed=3)
    together = collator(rows)["input_ids"]
    alone = torch.cat([collator([row])["input_ids"] for row in (rows[3], rows[0])])
    assert torch.equal(alone, together[[3, 0]])
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["input_ids"], together)
    fixed = MaskedDiffusionCollator(mask_token_id=1, pad_token_id=0, seed=3, fixed=True)
    fixed.set_epoch(1)
    assert torch.equal(fixed(rows)["input_ids"], together)


def test_random_lengths_cut_the_stated_share_of_rows():
    collator = MaskedDiffusionCollator(mask_token_id=1, pad_token_id=0, random_length_probability=0.25)
    batch = collator([{"input_ids": list(range(10, 50)), "prompt_length": 0, "index": i} for i in range(4000)])
    lengths = batch["attention_mask"].sum(1)
    cut = lengths < 40
    assert abs(cut.float().mean() - 0.25 * 39 / 40) < 0.03
    assert lengths.min() >= 1 and abs(lengths[cut].float().mean() - 20) < 1.5
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("first", ["", "[:5]", "[5:]", "[2:7]", "[7:9]", "[3:3]"])
@pytest.mark.parametrize("second", ["[:5]", "[4:6]", "[6:]", "[:2]"])
def test_overlapping_slices_are_those_that_share_rows(first, second):
    def rows(piece):
        start, stop = (piece.strip("[]") or ":").split(":")
        return set(range(10)[slice(int(start or 0), int(stop or 10))])

    if rows(first):
        assert slices_overlap(first, second) == slices_overlap(second, first) == bool(rows(first) & rows(second))
    assert slices_overlap("[:50%]", "[40%:]") and not slices_overlap("[:50%]", "[50%:]")
    assert not slices_overlap("[:50%]", "[:10]")  # not known without the number of rows
