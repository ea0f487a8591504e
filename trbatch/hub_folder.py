"""A folder of a dataset on the Hugging Face hub, by its own client.

Each file is a commit of its own. fsspec's way to the hub copies a file once more beside it and
leaves that copy behind when a push fails, so what is written goes to the client directly.
"""

from __future__ import annotations

import sys
from typing import Any

from trbatch.errors import Unreachable
from trbatch.masking import mask_text, mask_url
from trbatch.object_storage import RemoteFolder

_LET_IN = "set HF_TOKEN to a token that may write there, or log in with `hf auth login`"
_MAKE_IT = "make it with `hf repos create NAME/DATASET --repo-type dataset`"
_HINTS = {401: _LET_IN, 403: _LET_IN, 404: f"{_MAKE_IT}; if it is there, {_LET_IN}"}


class HubFolder(RemoteFolder):
    """A folder below `hf://…`, e.g. `hf://datasets/me/answers`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        # The client remembers for good that a dataset is absent, even one that was made since.
        self._files.invalidate_cache()

    def _put(self, source: str, at: str) -> None:
        self._upload(source, at)

    def _pipe(self, data: bytes, at: str) -> None:
        self._upload(data, at)

    def _upload(self, content: str | bytes, at: str) -> None:
        """Content is bytes, or the path of a local file."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        if not sys.stderr.isatty():
            disable_progress_bars()  # they would stand among the lines of a log
        to = self._files.resolve_path(at)
        api = HfApi(endpoint=self._files.endpoint, token=self._files.token)
        if at.startswith("buckets/"):
            api.batch_bucket_files(to.bucket_id, add=[(content, to.path)])
        else:
            api.upload_file(
                path_or_fileobj=content, path_in_repo=to.path_in_repo, repo_id=to.repo_id,
                repo_type=to.repo_type, revision=to.revision,
            )  # fmt: skip
        self._files.invalidate_cache(at)

    def _failure(self, verb: str, name: str, error: Exception) -> Unreachable:
        found = error.__cause__ if isinstance(error, FileNotFoundError) else error
        status = getattr(getattr(found, "response", None), "status_code", None)
        if status is None:
            return super()._failure(verb, name, error)
        words = f"{status}, {_said(found)}"
        if isinstance(error, FileNotFoundError):  # 401 for whom the hub does not know
            status = 404
            words = "the hub has no such dataset or revision, or none for this token"
        told = f"cannot {verb} {mask_url(self.join(name))}: {mask_text(words)}"
        return Unreachable(told, hint=_HINTS.get(status))


def _said(error: Any) -> str:
    """The hub's own words, else the status in words."""
    return str(getattr(error, "server_message", None) or error.response.reason_phrase)
