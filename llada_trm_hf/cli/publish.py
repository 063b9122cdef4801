"""`llada-trm push` (`scripts/push_to_hub.py` too) and `llada-trm export-onnx`."""

import logging
import os
import re
from typing import Any

from .command import CommandParser

# A branch as git allows it, in the characters the Hub's addresses keep as they are.
_BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))[A-Za-z0-9_][A-Za-z0-9_./-]*(?<![./])")


def push(arguments: list[str]) -> None:
    """A checkpoint with a model card, or `custom_generate`, to the Hub."""
    parser = CommandParser(prog="llada-trm push", description="Uploads a checkpoint to the Hub in one commit.")
    add = parser.add_argument
    add("--checkpoint", help="folder of a model, or an older compressor.pt or trm.pt, which is converted")
    add("--repo", help="owner/name; created if it does not exist")
    add("--custom_generate", metavar="REPO", help="upload masked-diffusion generation, for other models, instead")
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--description", help="a paragraph for the model card")
    add("--revision", help="branch, created if it does not exist")
    add("--base_model", help="owner/name of the model it builds on, if the checkpoint names none, or a folder")
    add("--license", help="of the card, as the Hub names it (apache-2.0); by default that of the model it builds on")
    add("--tags", nargs="+", help="more tags for the card")
    add("--commit_message", help="by default, Upload model")
    add("--create_pr", action="store_true", help="open a pull request instead of committing")
    add("--dry_run", action="store_true", help="list what would be uploaded, without contacting the Hub")
    options = parser.parse(arguments)
    if options.revision is not None and not _BRANCH.fullmatch(options.revision):
        raise ValueError(f"--revision {options.revision!r} cannot be the name of a branch: take one such as v2.")
    from ..hub import push_checkpoint, push_custom_generate
    from ..hub.checkpoint_files import files_to_publish
    from ..hub.push import custom_generate_files, folder_of

    card = {name: getattr(options, name) for name in ("description", "revision", "base_model", "license", "tags")}
    commit = {"commit_message": options.commit_message, "create_pr": options.create_pr}
    if options.custom_generate is not None:
        for_checkpoints = ("checkpoint", "repo", "description", "base_model", "license", "tags", *commit)
        refused = [f"--{name}" for name in for_checkpoints if getattr(options, name) not in (None, False)]
        if refused:
            parser.error(f"--custom_generate uploads no checkpoint: leave out {', '.join(refused)}")
        if options.dry_run:
            _print_sizes(custom_generate_files(options.custom_generate))
        else:
            print(push_custom_generate(options.custom_generate, options.private, options.revision).commit_url)
    elif options.checkpoint is None or options.repo is None:
        parser.error("pass --checkpoint and --repo, or --custom_generate")
    elif options.dry_run:
        with folder_of(options.checkpoint) as folder:
            _print_sizes(files_to_publish(folder, options.repo, **card))
    else:
        pushed = push_checkpoint(options.checkpoint, options.repo, options.private, **card, **commit)
        print(pushed.pr_url or pushed.commit_url)


def export_onnx(arguments: list[str]) -> None:
    """The forward pass of a hybrid, a backbone, or the thinker of a latent thinker as an ONNX graph."""
    parser = CommandParser(
        prog="llada-trm export-onnx",
        description="Writes the forward pass of a hybrid, refinement included, of a backbone, of the thinker of a "
        "latent thinker, of a SequenceTRM or of a compressor as an ONNX graph with dynamic batch and length, and "
        "compares it with PyTorch in onnxruntime.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or repository; loaded in float32")
    add("--output", required=True, help="file; weights above 1 GiB go to a second one, OUTPUT.data")
    add("--max_recursive_steps", type=int, help="by default the refiner's or the thinker's own")
    difference = "largest difference from PyTorch that is accepted, in units of the output's largest value"
    add("--tolerance", type=float, help=difference)
    options = parser.parse(arguments)
    from ..hub import onnx

    onnx.check_export(options.output)
    for library in ("torch.onnx", "onnx_ir"):  # warns of optional packages and of its own code
        logging.getLogger(library).setLevel(logging.ERROR)
    model = _load_for_export(options.checkpoint).eval()
    kind, size = type(model).__name__, model.num_parameters()
    print(f"Writing {kind}, {size:,} parameters, and comparing it with PyTorch ...", flush=True)
    tolerance = onnx.TOLERANCE if options.tolerance is None else options.tolerance
    export = onnx.export_onnx(model, options.output, options.max_recursive_steps, tolerance)
    print(f"largest difference from PyTorch: {export.largest_difference:.2g} of the output's largest value")
    if hasattr(model, "refiner"):
        print(f"chunks refined in the comparison: {export.refined_chunks}")
    _print_sizes({file: file for file in export.files})


def _load_for_export(checkpoint: str) -> Any:
    """The model of `checkpoint` in float32; of a latent thinker, its thinker."""
    from transformers import PreTrainedConfig

    from ..models import DimensionCompressor, LatentThinker, SequenceTRM

    model_type = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
    parts = {part.config_class.model_type: part for part in (DimensionCompressor, SequenceTRM)}
    if model_type in parts:
        return parts[model_type].from_pretrained(checkpoint, dtype="float32")
    if model_type == LatentThinker.config_class.model_type:
        return LatentThinker.from_pretrained(checkpoint, dtype="float32", key_mapping={r"^thinker\.": ""})
    from ..evaluation.language_models import load_weights  # not in the base install, which `push` does with

    return load_weights(checkpoint, "float32")


def _print_sizes(files: dict[str, str | bytes]) -> None:
    for path, content in files.items():
        size = len(content) if isinstance(content, bytes) else os.path.getsize(content)
        print(f"{size:>14,}  {path}")
