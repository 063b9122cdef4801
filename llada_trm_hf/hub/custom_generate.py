"""Masked-diffusion generation as a repository of its own, for any model that predicts masked tokens in place."""

import os
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard

from ..cards import publish
from ..cards.publishing import Upload, check_repo_id
from ..models.generate import generate
from ..models.modeling_hub import write_code

CARD = """---
library_name: transformers
tags:
- custom_generate
- masked-diffusion
- llada-trm-hf
---

# {name}

Text generation by masked diffusion: the new tokens start as masks, and each denoising step commits the most confident
ones. It works with models that predict masked tokens in place, such as encoders with an LM head.

## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, GenerationMixin

tokenizer = AutoTokenizer.from_pretrained("{example_model}")
model = AutoModelForMaskedLM.from_pretrained("{example_model}")
generate = GenerationMixin().load_custom_generate("{repo_id}", trust_remote_code=True)

input_ids = tokenizer("The capital of France is", add_special_tokens=False, return_tensors="pt")["input_ids"]
output = generate(model, input_ids, mask_token_id=tokenizer.mask_token_id, max_new_tokens=16)
print(tokenizer.decode(output[0]))
```

A model with a `generate` method takes it as `model.generate(input_ids, custom_generate="{repo_id}",
trust_remote_code=True, mask_token_id=...)`. Settings such as `block_length`, `num_diffusion_steps`, `remasking` and
`confidence_threshold` are described in `custom_generate/configuration_masked_diffusion_generation.py`.
"""
EXAMPLE_MODEL = "answerdotai/ModernBERT-base"


def export_custom_generate(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Writes masked-diffusion generation into `folder`, as transformers loads it: `custom_generate/generate.py`, the
    files it imports, and a card.

    Args:
        folder: created if need be.
        repo_id: where it will be, for the code in the card; the folder by default.
    """
    write_code(Path(folder, "custom_generate"), generate)
    name = repo_id or os.fspath(folder)
    card = ModelCard(CARD.format(name=Path(name).name, repo_id=name, example_model=EXAMPLE_MODEL))
    card.save(Path(folder, "README.md"))


def custom_generate_files(repo_id: str) -> list[Upload]:
    """
    What `push_custom_generate` uploads, without contacting the Hub.

    Raises:
        ValueError: for an impossible name.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        export_custom_generate(folder, repo_id)
        paths = sorted(path for path in Path(folder).glob("**/*") if path.is_file())
        return [Upload(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def push_custom_generate(
    repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Uploads masked-diffusion generation in one commit; then `model.generate(..., custom_generate=repo_id,
    trust_remote_code=True)` runs it.

    Args:
        repo_id, private, revision, token: see `publish`.

    Raises:
        ValueError: for an impossible name, without a token, or if the repository is public although `private` is set.
        HfHubHTTPError: if the Hub refuses.
    """
    return publish(custom_generate_files(repo_id), repo_id, private, revision, token, "Upload custom_generate")
