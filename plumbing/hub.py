"""Files of Hugging Face repositories, from there and to there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from plumbing.flags import UserError

REVISIONS = {  # taken where none is asked for: the ones that public code pins
    "rail-berkeley/octo-small-1.5": "dc9aa3019f764726c770814b27e4ab0fc6e32a58",
    "rail-berkeley/octo-base-1.5": "ee3c10e8edd6ce2e8b1e8744d3c6fba4097bed48",
}


def from_hub(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Download some files of a repository, or take them from the local cache: the folder they are in.

    Raises: UserError that says where they may be put instead, or that a file isn't what the hub says it is.
    """
    revision = revision or REVISIONS.get(repository)
    try:
        import huggingface_hub

        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the library's errors have many unrelated base classes
        reason = one_line(error)
        if "Gated" in reason:
            raise UserError(
                f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, then `hf auth login`"
            ) from None
        raise UserError(
            f"can't fetch {repository} from the hub ({reason}); "
            f"download {', '.join(patterns)} where there is network and pass the folder"
        ) from None
    check_sums(folder)
    return folder


def check_sums(folder: Path) -> None:
    """Compare large files with the sha256 that the hub names them by in its cache. Raises: UserError."""
    for path in folder.rglob("*"):
        stored = path.resolve()
        known = stored.name
        if stored.parent.name != "blobs" or len(known) != 64:  # small files have git's sha1
            continue
        with stored.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != known:
            raise UserError(f"{path} has sha256 {found}, the hub says {known}: delete {stored} and start again")


def local(source: str, patterns: list[str]) -> Path:
    """A folder, or those files of "hf://owner/name[@revision]". Raises: UserError."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if match:
        return from_hub(match[1], match[2], patterns)
    if not Path(source).is_dir():
        raise UserError(f"no folder {source}: pass a local folder or hf://owner/name[@revision]")
    return Path(source)


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder as owner/name, which is made if it isn't there: the address of the commit. Raises: UserError."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push {repository}: it takes owner/name")
    try:
        import huggingface_hub

        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload policy"))
    except Exception as error:  # the library's errors have many unrelated base classes
        advice = "log in by `hf auth login` with a token that may write"
        raise UserError(f"can't push to {repository} ({one_line(error)}); {advice}, and push again") from error


def one_line(error: Exception) -> str:
    words = str(error).split()
    return f"{type(error).__name__}: {' '.join(words)[:200]}"
