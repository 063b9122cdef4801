"""`llada-trm push` (`scripts/push_to_hub.py` too) and `llada-trm export-onnx`."""

import logging
import os
import re

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
    add("--private", action="store_true", help="make a new repository private")
    add("--description", help="a paragraph for the model card")
    add("--revision", help="branch, created if it does not exist")
    add("--base_model", help="owner/name of the model it builds on, if the checkpoint names none, or a folder")
    add("--dry_run", action="store_true", help="list what would be uploaded, without contacting the Hub")
    options = parser.parse(arguments)
    if options.revision is not None and not _BRANCH.fullmatch(options.revision):
        raise ValueError(f"--revision {options.revision!r} cannot be the name of a branch: take one such as v2.")
    from ..hub import push_checkpoint, push_custom_generate
    from ..hub.push import custom_generate_files, files_to_publish, folder_of

    card = {"description": options.description, "revision": options.revision, "base_model": options.base_model}
    if options.custom_generate is not None:
        for_checkpoints = ("checkpoint", "repo", "description", "base_model")
        refused = [f"--{name}" for name in for_checkpoints if getattr(options, name) is not None]
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
        print(push_checkpoint(options.checkpoint, options.repo, options.private, **card).commit_url)


def export_onnx(arguments: list[str]) -> None:
    """The forward pass of a hybrid or a backbone as an ONNX graph."""
    parser = CommandParser(
        prog="llada-trm export-onnx",
        description="Writes the forward pass of a hybrid, refinement included, or of a backbone as an ONNX graph with "
        "dynamic batch and length, and compares it with PyTorch in onnxruntime.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or repository; loaded in float32")
    add("--output", required=True, help="file; weights above 1 GiB go to a second one, OUTPUT.data")
    add("--max_recursive_steps", type=int, help="by default the refiner's own")
    add("--tolerance", type=float, help="largest difference from PyTorch that is accepted")
    options = parser.parse(arguments)
    from ..hub import onnx

    onnx.check_export(options.output)
    from ..evaluation.language_models import load_weights  # not in the base install, which `push` does with

    for library in ("torch.onnx", "onnx_ir"):  # warns of optional packages and of its own code
        logging.getLogger(library).setLevel(logging.ERROR)
    model = load_weights(options.checkpoint, "float32").eval()
    kind, size = type(model).__name__, model.num_parameters()
    print(f"Writing {kind}, {size:,} parameters, and comparing it with PyTorch ...", flush=True)
    tolerance = onnx.TOLERANCE if options.tolerance is None else options.tolerance
    export = onnx.export_onnx(model, options.output, options.max_recursive_steps, tolerance)
    print(f"largest difference from PyTorch: {export.largest_difference:.2g}")
    if hasattr(model, "refiner"):
        print(f"chunks refined in the comparison: {export.refined_chunks}")
    _print_sizes({file: file for file in export.files})


def _print_sizes(files: dict[str, str | bytes]) -> None:
    for path, content in files.items():
        size = len(content) if isinstance(content, bytes) else os.path.getsize(content)
        print(f"{size:>14,}  {path}")
