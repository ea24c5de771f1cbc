"""Upload to the Hub: one commit for each push, repeated after temporary failures."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from transformers.utils import logging

from ..atomic_files import write_text
from .model_card import model_card, one_line
from .model_code import add_code, add_endpoint

logger = logging.get_logger(__name__)

_PAUSES_SECONDS = (1.0, 4.0, 16.0)  # before each further attempt
_MAX_RETRY_AFTER_SECONDS = 300.0  # the Hub counts requests over five minutes
_Result = TypeVar("_Result")


def push_to_hub(
    model_or_processor: Any,
    repo_id: str,
    *,
    with_code: bool = False,
    endpoint: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] = (),
) -> CommitInfo:
    """Upload a model or an image processor in one commit, a model with a card unless the repository has one.

    The upload is repeated after temporary failures: no connection, too many requests, a server error. A large file that
    has arrived is not sent twice, even by another push.

    Args:
        model_or_processor: The model or image processor.
        repo_id: The repository; it is created if it does not exist.
        with_code: Whether to add the code of this package; see [`add_code`].
        endpoint: Whether to add the handler with which an Inference Endpoint serves the model; see [`add_endpoint`].
        commit_message: "Upload model" or "Upload processor" by default.
        commit_description: Description of the commit.
        private: Whether to create a private repository, or require that it is one; the owner's default if None.
        token: The one that `hf auth login` stored by default.
        revision: Branch; created from `main` if it does not exist.
        create_pr: Whether to open a pull request instead.
        max_shard_size: Largest size of a file of weights.
        tags: Tags for the model card.

    Raises:
        ValueError: `private` is set, but the repository exists and is public.
        OSError: Nothing was uploaded; the message has the reason.
    """
    is_model = hasattr(model_or_processor, "state_dict")
    repo_id = create_repository(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if is_model:
            model_or_processor.save_pretrained(folder, max_shard_size=max_shard_size)
            _write_card(folder, model_or_processor, repo_id, with_code, tags, revision=revision, token=token)
        else:
            model_or_processor.save_pretrained(folder)
        if with_code:
            add_code(folder)
        if endpoint and is_model:
            add_endpoint(folder)
        return upload(
            folder,
            [path for path in folder.rglob("*") if path.is_file()],
            repo_id,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {'model' if is_model else 'processor'}",
            commit_description=commit_description,
        )


def _write_card(
    folder: Path, model: Any, repo_id: str, with_code: bool, tags: Sequence[str], *, revision: Any, token: Any
) -> None:
    """Write a card with the facts that the model itself holds, or add tags to the card of the repository."""
    api = HfApi(token=token)
    if not api.file_exists(repo_id, "README.md", revision=revision):
        has_masks = hasattr(model, "segmentation_head")
        text = model_card(repo_id, model.config, has_masks=has_masks, with_code=with_code, tags=tags)
        write_text(folder / "README.md", text)
    elif tags:
        card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(folder / "README.md")


def create_repository(
    repo_id: str, *, private: bool | None, token: str | bool | None, kept: str = "", repo_type: str = "model"
) -> str:
    """Create a repository unless it exists, and return its id with the owner.

    Raises:
        ValueError: `private` is set, but the repository exists and is public.
        OSError: see [`upload`].
    """
    api = HfApi(token=token)
    settings: dict[str, Any] = {"private": private, "exist_ok": True, "repo_type": repo_type}
    if repo_type == "space":
        settings["space_sdk"] = "gradio"
    repo_id = _retry(lambda: api.create_repo(repo_id, **settings).repo_id, repo_id, kept)
    if private and not _retry(lambda: api.repo_info(repo_id, repo_type=repo_type).private, repo_id, kept):
        raise ValueError(
            f"`private` requires a private repository, but {repo_id} exists and is public. Nothing was uploaded. Make"
            f" it private in its settings on the Hub, or omit `private`. {kept}".rstrip()
        )
    return repo_id


def upload(
    folder: Path,
    files: Sequence[Path],
    repo_id: str,
    *,
    kept: str = "",
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    path_in_repo: str = "",
    repo_type: str = "model",
    **commit: Any,
) -> CommitInfo:
    """Upload files of a folder in one commit: a reader sees all of them or none.

    Args:
        folder: Their paths in the repository are relative to it.
        files: The files.
        repo_id: An existing repository.
        kept: The end of the error, a sentence that says where the files are.
        token: See [`push_to_hub`].
        revision: See [`push_to_hub`].
        create_pr: See [`push_to_hub`].
        path_in_repo: Folder of the repository.
        repo_type: "model", "dataset" or "space".
        **commit: `commit_message`, `commit_description`.

    Raises:
        OSError: The last attempt failed, or another attempt cannot succeed.
    """
    api = HfApi(token=token)

    def attempt() -> CommitInfo:
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        operations = [
            CommitOperationAdd(str(Path(path_in_repo, path.relative_to(folder)).as_posix()), str(path))
            for path in sorted(files)
        ]
        where = {"revision": revision, "create_pr": create_pr, "repo_type": repo_type}
        return api.create_commit(repo_id, operations, **where, **commit)

    return _retry(attempt, repo_id, kept)


def _retry(action: Callable[[], _Result], repo_id: str, kept: str) -> _Result:
    """Return the result of an action, repeated after temporary failures; raise OSError with a remedy."""
    for pause in (*_PAUSES_SECONDS, None):
        try:
            return action()
        except Exception as error:  # huggingface_hub raises its own, its HTTP client's and RuntimeError
            causes = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
            response = next((r for cause in causes if (r := getattr(cause, "response", None)) is not None), None)
            status = getattr(response, "status_code", None)
            reason = one_line(error.__cause__ or error if isinstance(error, RuntimeError) else error)
            lacks_xet = "xet-write-token" in reason and "404" in reason
            if pause is None or lacks_xet or not _is_temporary(status, causes):
                remedy = "Set HF_HUB_DISABLE_XET=1: this Hub has no xet storage." if lacks_xet else _remedy(status)
                raise OSError(f"{repo_id} was not uploaded: {reason} {remedy} {kept}".rstrip()) from error
            retry_after = str(response.headers.get("Retry-After", "")) if response is not None else ""
            pause = min(float(retry_after), _MAX_RETRY_AFTER_SECONDS) if retry_after.isdigit() else pause
            logger.warning(f"{repo_id}: {one_line(error)}; next attempt in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _is_temporary(status: int | None, causes: Iterable[BaseException | None]) -> bool:
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500  # 409, 412: two commits at the same time
    return any(
        isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith("httpx")
        for cause in causes
    )


def _remedy(status: int | None) -> str:
    if status in (401, 403, 404):
        return "Log in with `hf auth login`, or pass a token with write access."
    if status is None or status in (408, 429) or status >= 500:
        return "Push again: files that have arrived are not sent twice."
    return "Correct this and push again."
