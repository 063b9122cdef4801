"""Pipelines on saved folders in a process without the package: `python run_pipelines.py WISHES.json`."""

import json
import sys

import torch
from transformers import AutoTokenizer, GenerationConfig, TextStreamer, pipeline

CHAT = [{"role": "user", "content": "add two and three"}]
PROMPTS = ["say: ", "a longer prompt than that: ", "x"]
MASKED = ["one <|mdm_mask|> two", "f<|mdm_mask|>ll in the <|mdm_mask|>lanks"]


class Collected(TextStreamer):
    """Keeps the text instead of printing it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True)
        self.text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def texts(outputs):
    """The texts of a call, whatever its nesting."""
    return [texts(output) if isinstance(output, list) else output["generated_text"] for output in outputs]


def generated(folder):
    """What `pipeline("text-generation")` makes of each kind of call."""
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    assert type(pipe.model).__module__.startswith("transformers_modules."), type(pipe.model)
    found = {"repr": repr(pipe), "string": texts(pipe(PROMPTS[0]))}
    for side in ("left", "right"):
        pipe.tokenizer.padding_side = side
        found[f"batch, {side}"] = texts(pipe(PROMPTS, batch_size=2, return_full_text=False))
    found["empty"] = texts(pipe("", return_full_text=False))
    found["new text"] = texts(pipe(PROMPTS[0], return_full_text=False, max_new_tokens=6))
    found["config"] = texts(pipe(PROMPTS[0], generation_config=GenerationConfig(max_new_tokens=6)))
    found["chat"] = texts(pipe(CHAT))
    found["chats"] = texts(pipe([CHAT, [*CHAT, {"role": "assistant", "content": "it is "}]]))
    streamer = Collected(pipe.tokenizer)
    found["streamed"] = [texts(pipe(PROMPTS[0], streamer=streamer, return_full_text=False)), streamer.text]
    torch.manual_seed(0)
    found["sampled"] = texts(pipe(PROMPTS[0], do_sample=True, temperature=0.9, num_return_sequences=3))
    found["stopped"] = texts(pipe(PROMPTS[0], stop_sequence=found["string"][0][-3], return_full_text=False))
    outputs = pipe(PROMPTS[0], return_dict_in_generate=True, output_scores=True, return_tensors=True)
    found["tokens"] = outputs[0]["generated_token_ids"]
    return found


def filled(folder):
    """What `pipeline("fill-mask")` makes of one mask and of two."""
    pipe = pipeline("fill-mask", model=folder, trust_remote_code=True)
    return [pipe(text, top_k=4) for text in MASKED] + [pipe(MASKED, top_k=2, batch_size=2)]


if __name__ == "__main__":
    sys.modules["llada_trm_hf"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        folders, results = json.load(file)
    assert AutoTokenizer.from_pretrained(folders["backbone"]).chat_template
    with open(results, "w") as file:
        json.dump({name: [generated(folder), filled(folder)] for name, folder in folders.items()}, file)
