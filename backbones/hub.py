"""Files of Hugging Face repositories."""

from __future__ import annotations

from pathlib import Path

from plumbing.flags import UserError


def from_hub(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Download some files of a repository, or take them from the local cache: the folder they are in.

    Raises: UserError that says where they may be put instead.
    """
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the library's errors have many unrelated base classes
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"can't fetch {patterns} of {repository} from the hub ({type(error).__name__}: {reason}); "
            "download it where there is network and pass the local path"
        ) from None
