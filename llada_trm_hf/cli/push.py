"""`llada-trm push`: a checkpoint to the Hub, with a model card. Also what `scripts/push_to_hub.py` runs."""

import tempfile

from ..hub.push import files_to_push, push_checkpoint
from .command import CommandParser


def run(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="llada-trm push", description="Uploads a checkpoint to the Hugging Face Hub in one commit."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="folder of a model, or an older compressor.pt or trm.pt, which is converted",
    )
    parser.add_argument("--repo", required=True, help="owner/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--description", help="a paragraph for the model card")
    parser.add_argument("--revision", help="branch, made if it does not exist")
    parser.add_argument(
        "--base_model", help="owner/name of the model it stands on, if the checkpoint does not say, or names a folder"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list what would be uploaded, without contacting the Hub"
    )
    options = vars(parser.parse_args(arguments))
    checkpoint, repo, private = (options.pop(name) for name in ("checkpoint", "repo", "private"))
    if not options.pop("dry_run"):
        print(push_checkpoint(checkpoint, repo, private, **options).commit_url)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for upload in files_to_push(checkpoint, repo, **options, scratch=scratch):
            print(f"{upload.size:>14,}  {upload.path}")
