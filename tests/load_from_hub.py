"""What stands on the Hub, in a process where the package cannot be imported: `python load_from_hub.py WISHES.json`."""

import contextlib
import io
import json
import re
import sys
import traceback

import torch
import transformers

PAUSE = "-- pause --"  # between two phases, until a line comes


@torch.no_grad()
def outputs(model, inputs):
    """What a model makes of `inputs`, whatever kind it is."""
    ids, states, context = inputs["input_ids"], inputs["hidden_states"], inputs["context"]
    if hasattr(model, "compress"):
        return {"compressed": model.compress(states)}
    if hasattr(model, "reason"):
        return {"thought": model.reason(context).prediction}
    if hasattr(model, "embed_tokens"):
        return {"hidden_states": model(ids).last_hidden_state}
    if hasattr(model, "project_decompressed"):
        return {"latents": model(states).latents}
    if not hasattr(model, "generate"):
        return {"hidden_states": model(states).hidden_states}
    if hasattr(model, "thinker"):
        thought = ids.new_tensor([model.config.thought_token_ids]).expand(len(ids), -1)
        ids = torch.cat([ids, thought], dim=1)
    return {"logits": model(ids).logits, "sequences": model.generate(ids, max_new_tokens=8)}


def card_output(repository):
    """What the code of a model card prints."""
    from huggingface_hub import ModelCard

    (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load(repository).text, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"card of {repository}", "exec"), {})
    return printed.getvalue()


def load(source, auto_class, **arguments):
    """With the config an Auto class finds; from the code beside the weights."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True, **arguments)
    model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True, **arguments).eval()
    for loaded in (config, model.config, model):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    assert type(config).__name__ == type(model.config).__name__, (config, model.config)
    return model


def main(wishes):
    torch.set_num_threads(1)
    inputs, found = torch.load(wishes["inputs"], weights_only=True), {}
    for number, phase in enumerate(wishes["phases"]):
        if number:
            print(PAUSE, flush=True)
            input()
        for label, (source, auto_class, arguments) in phase.items():
            try:
                found[label] = outputs(load(source, auto_class, **arguments), inputs)
                if label in wishes["cards"]:
                    found[label]["printed"] = card_output(source)
            except Exception:
                found[label] = {"error": traceback.format_exc()}
    for label, (source, auto_class, custom_generate, settings) in wishes["custom_generate"].items():
        settings = {**settings, "custom_generate": custom_generate, "trust_remote_code": True}
        model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True).eval()
        found[label] = {"sequences": model.generate(inputs["input_ids"], **settings)}
    for repository in wishes["other cards"]:
        found[f"card of {repository}"] = {"printed": card_output(repository)}
    torch.save(found, wishes["outputs"])


if __name__ == "__main__":
    sys.modules["llada_trm_hf"] = None  # type: ignore[assignment]
    with open(sys.argv[1]) as file:
        main(json.load(file))
