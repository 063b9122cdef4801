"""`llada-trm push`: a checkpoint with a model card, or `custom_generate`, to the Hub; `scripts/push_to_hub.py` too."""

import os

from ..hub import push_checkpoint, push_custom_generate
from ..hub.push import custom_generate_files, files_to_publish, folder_of
from .command import CommandParser


def run(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="llada-trm push", description="Uploads a checkpoint to the Hugging Face Hub in one commit."
    )
    parser.add_argument(
        "--checkpoint", help="folder of a model, or an older compressor.pt or trm.pt, which is converted"
    )
    parser.add_argument("--repo", help="owner/name; created if it does not exist")
    parser.add_argument(
        "--custom_generate",
        metavar="REPO",
        help="instead of a checkpoint, upload generation by masked diffusion, for other models, to owner/name",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--description", help="a paragraph for the model card")
    parser.add_argument("--revision", help="branch, created if it does not exist")
    parser.add_argument(
        "--base_model", help="owner/name of the model it builds on, if the checkpoint names none, or a folder"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be uploaded, without contacting the Hub"
    )
    options = parser.parse_args(arguments)
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


def _print_sizes(files: dict[str, str | bytes]) -> None:
    for path, content in files.items():
        size = len(content) if isinstance(content, bytes) else os.path.getsize(content)
        print(f"{size:>14,}  {path}")
