"""Model pages on the Hugging Face Hub: publishing a pipeline folder in one commit."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .adapter_page import is_adapter_folder, prepare_adapter_publication
from .model_card import save_model_card
from .publication import Publication, prepare_publication, write_conversion_record

__all__ = [
    "create_repository",
    "full_repo_id",
    "prepare",
    "prepare_publication",
    "publish_folder",
    "save_model_card",
    "upload",
    "write_conversion_record",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# As huggingface_hub repeats the requests that it repeats itself
MAX_RETRIES = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 8.0  # seconds
TEMPORARY = (408, 412, 429, 500, 502, 503, 504)  # 412: somebody else committed in between

# Requests that huggingface_hub has repeated before it gives up; the transfer of files is one more, a RuntimeError
REPEATED_BY_THE_LIBRARY = ("/preupload/", ".git/info/lfs/")


def publish_folder(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    *,
    license: str | None = None,
    report: str | Path | None = None,
    datasets: Sequence[str] = (),
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    overwrite_card: bool = False,
) -> str:
    """Publishes a folder: what `prepare` chooses of it, as `upload` sends it.

    Args:
        folder: a pipeline folder or an adapter's, for example the output of a training.
        repo_id: "owner/model"; made where it does not exist. Without the owner it is the token's.
        token: of the Hub; by default the one of `hf auth login` or `HF_TOKEN`.
        private: for a repository that is made; True also refuses one that is public.
        license, report, datasets, overwrite_card: see `prepare_publication`.
        revision, create_pr, tag: see `upload`.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError, OSError: see `prepare` and `upload`.
    """
    repo_id = full_repo_id(repo_id, token)
    publication = prepare(folder, repo_id, license, report, datasets, overwrite_card, token)
    for note in publication.notes:
        logger.warning(note)
    return upload(publication, repo_id, token, private, revision, create_pr, tag)


def prepare(
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    report: str | Path | None = None,
    datasets: Sequence[str] = (),
    overwrite_card: bool = False,
    token: str | None = None,
) -> Publication:
    """What is to be published of a folder: `prepare_publication`, for an adapter `prepare_adapter_publication`.

    Raises:
        ValueError: no valid name, or see there. An adapter's card has no place for a report.
    """
    validate_repo_id(repo_id)
    if not is_adapter_folder(folder):
        return prepare_publication(folder, repo_id, license, report, datasets, overwrite_card, token)
    if report is not None or datasets:
        raise ValueError(f"{folder}: is an adapter's, whose card shows no report and no datasets; leave them out")
    return prepare_adapter_publication(folder, repo_id, license, overwrite_card, token)


def create_repository(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Makes a model repository unless it exists; finds out, before a training, whether the token may write to it.

    Returns:
        Its id, "owner/model".

    Raises:
        ValueError, OSError: see `upload`.
    """
    repo_id = full_repo_id(repo_id, token)
    api = HfApi(token=token)
    with explained(repo_id):
        make_repository(api, repo_id, private)
        with_retries(lambda: api.auth_check(repo_id, write=True))
    return repo_id


def make_repository(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Makes a repository unless it exists; a ValueError where it exists, is public and should be private."""
    with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True))  # also if it may only be read
    if private and not with_retries(lambda: api.repo_info(repo_id)).private:
        raise ValueError(f"{repo_id} is a public repository; expected a private one, so nothing was uploaded")


def full_repo_id(repo_id: str, token: str | None = None) -> str:
    """The id with its owner, "owner/model"; without one, whose the token is.

    Raises:
        ValueError, OSError: no valid name, or the Hub does not say whose the token is; see `upload`.
    """
    validate_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    with explained(repo_id):
        return f"{with_retries(HfApi(token=token).whoami)['name']}/{repo_id}"


def upload(
    publication: Publication,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> str:
    """Sends a publication in one commit: the repository holds all of it, or is as it was.

    Large files go first; the Hub does not show them before the commit, and an upload that was broken off does not
    send again those that arrived. In the folders of the pipeline, what is not published anew is removed in the same
    commit, so that no part of an earlier model stays. Rate limits (429, by their Retry-After), errors of the server
    and broken connections are tried again with waits that grow; a commit whose answer was lost is not made twice.

    Args:
        repo_id: "owner/model"; made where it does not exist.
        token, private: see `publish_folder`.
        revision: a branch, made from main where it does not exist, or "refs/pr/1" for a pull request that is open.
            With `create_pr` the branch that the pull request is to change.
        create_pr: open a pull request instead of committing to the branch.
        tag: of the commit, for example `"step-10000"`.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError: no valid name, the repository is public and should be private, or the tag is of another commit.
        PermissionError: the token is missing, wrong or expired, or may not write there.
        ConnectionError: the Hub cannot be reached, or keeps failing.
        OSError: the Hub refuses for another reason.
    """
    if create_pr and tag is not None:
        raise ValueError(f"tag={tag!r} with create_pr: a pull request is tagged when it is merged")
    validate_repo_id(repo_id)
    from . import __version__

    api = HfApi(token=token)
    message = f"Upload with diffusers-endora {__version__}" + (f" ({tag})" if tag else "")

    def is_owned(name: str) -> bool:
        folder, slash, _ = name.partition("/")
        return folder in publication.owned_folders if slash else name in publication.owned_files

    def commit() -> Any:
        head = api.repo_info(repo_id, revision=revision).sha
        held = api.list_repo_files(repo_id, revision=head)
        additions = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
        removals = [
            CommitOperationDelete(name, is_folder=False)
            for name in held
            if name not in publication.files and is_owned(name)
        ]
        api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False)
        return api.create_commit(
            repo_id,
            [*additions, *removals],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,  # what was removed and left as it is was decided by this one
        )

    with explained(repo_id, revision):
        # 1. The repository and the branch
        make_repository(api, repo_id, private)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))

        # 2. All files in one commit
        done = with_retries(commit, opens_pull_request=create_pr)

        # 3. The tag
        if tag is not None:
            with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=done.oid, exist_ok=True))
            tagged = {ref.name: ref.target_commit for ref in with_retries(lambda: api.list_repo_refs(repo_id)).tags}
            if tagged.get(tag) != done.oid:
                raise ValueError(
                    f"published as {done.commit_url}, but the tag {tag} was there already, of commit "
                    f"{str(tagged.get(tag))[:8]}; choose another tag and publish again, which uploads nothing twice"
                )
    return str(done.pr_url if create_pr else done.commit_url)


# --- errors ----------------------------------------------------------------------------------------------------------


def with_retries(call: Callable[[], T], opens_pull_request: bool = False) -> T:
    """Calls until it succeeds, for errors that pass; waits 1, 2, 4, 8, 8 s, or as long as the Hub says.

    What huggingface_hub repeats itself is not repeated again. A pull request is not opened again unless the Hub
    refused the first: one whose answer was lost may be there.
    """
    wait = FIRST_WAIT
    for attempt in count(1):
        try:
            return call()
        except Exception as error:
            status, url = status_of(error), url_of(error)
            is_temporary = is_broken_connection(error) or isinstance(error, json.JSONDecodeError)
            is_temporary = is_temporary or status in TEMPORARY
            if not is_temporary or any(part in url for part in REPEATED_BY_THE_LIBRARY) or attempt > MAX_RETRIES:
                raise
            if opens_pull_request and "/commit/" in url and status not in (412, 429):
                raise ConnectionError(
                    f"the connection failed while the pull request was opened ({reason(error)}); look whether it is "
                    "there before you publish again"
                ) from error
            told = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
            pause = float(told) if told.isdecimal() else wait
            logger.warning(f"{reason(error)}; trying again in {pause:g} s ({attempt} of {MAX_RETRIES})")
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError  # the loop has no end


@contextmanager
def explained(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of huggingface_hub and of its HTTP library into one sentence that says what to do."""
    try:
        yield
    except Exception as raised:
        error: BaseException = raised
        if isinstance(raised, RuntimeError):  # of the transfer of files
            error = raised.__cause__ or ConnectionError(
                f"the transfer of files failed ({raised}); publishing again goes on where it stopped"
            )
        status = status_of(error)
        if status == 401:
            raise PermissionError(
                "the Hub does not accept the token: it is missing, wrong or expired; run `hf auth login`, or set "
                "HF_TOKEN to one that may write"
            ) from raised
        if status == 403:
            raise PermissionError(
                f"the token may not write to {repo_id}; choose a repository of yours, or a token with write access "
                "(https://huggingface.co/settings/tokens)"
            ) from raised
        if isinstance(error, RevisionNotFoundError):
            raise OSError(f"{repo_id} has no revision {revision}; expected a branch or refs/pr/NUMBER") from raised
        if status == 404:
            raise OSError(
                f"the Hub has no repository {repo_id}, or hides it from this token; check the name and the token"
            ) from raised
        if is_broken_connection(error) or isinstance(error, json.JSONDecodeError) or status in TEMPORARY:
            raise ConnectionError(
                f"the Hub cannot be reached or keeps failing ({reason(error)}); the repository is not half "
                "published, and publishing again goes on where it stopped"
            ) from raised
        if isinstance(error, HfHubHTTPError):
            raise OSError(f"the Hub refuses: {reason(error)}") from raised
        if error is raised:
            raise
        raise error from raised


def is_broken_connection(error: BaseException) -> bool:
    """Whether there was no answer: an error of httpx or httpx2, by huggingface_hub's version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2") and not isinstance(error, OSError)


def status_of(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def url_of(error: BaseException) -> str:
    """The address of the request that failed; empty where it is not known."""
    try:
        request = error.response.request if isinstance(error, HfHubHTTPError) else error.request  # type: ignore[attr-defined]
        return str(request.url)
    except (AttributeError, RuntimeError):  # httpx raises where an error has none
        return ""


def reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message
        return f"status {error.response.status_code}" + (f": {said}" if said else "")
    return str(error) or type(error).__name__
