"""
Every kind of model saved with one version of transformers and loaded with another, where the package cannot be
imported: `python load_across_versions.py save FOLDER` in one environment, `... load FOLDER` in the other.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

# Before transformers is imported: an environment finds no code of the other's.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[1]


def save(folder):
    """A folder for each model, and what the models make of some inputs."""
    sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests/models")]
    import custom_refiner
    from test_hub_model import CASES, PARTS, TOKENIZER, new_inputs, new_models, outputs

    models, inputs = new_models(custom_refiner), new_inputs()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    models["latent"].backbone.save_pretrained(folder / "lm")
    TOKENIZER.save_pretrained(folder / "lm")
    for part, (name, base) in PARTS.items():
        models[part] = models[name]
        models[part].config.backbone_name_or_path = str(folder / Path(base).name)
        models[part].save_pretrained(folder / part, save_backbone=False)
    cases = {name: CASES[PARTS.get(name, (name,))[0]][0] for name in models}
    (folder / "cases.json").write_text(json.dumps(cases))
    expected = {name: outputs(model, inputs) for name, model in models.items()}
    torch.save({"inputs": inputs, "expected": expected}, folder / "outputs.pt")
    print(f"Saved {len(models)} models with transformers {transformers.__version__}, torch {torch.__version__}.")


def load(folder):
    sys.modules["llada_trm_hf"] = None  # type: ignore[assignment]
    from load_from_hub import load, outputs

    torch.set_num_threads(1)
    cases, saved = json.loads((folder / "cases.json").read_text()), torch.load(folder / "outputs.pt")
    for name, auto_classes in cases.items():
        for auto_class in auto_classes:
            found = outputs(load(str(folder / name), auto_class), saved["inputs"])
            for part, value in saved["expected"][name].items():
                label = f"{part} of {name}, {auto_class}"
                if part == "sequences":  # which of two tokens as good as equal is chosen depends on the last bits
                    assert found[part].shape == value.shape, label
                else:
                    torch.testing.assert_close(found[part], value, atol=1e-4, rtol=1e-3, msg=f"{label} differ")
    print(f"Loaded {len(cases)} models with transformers {transformers.__version__}, torch {torch.__version__}.")


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]).resolve())
