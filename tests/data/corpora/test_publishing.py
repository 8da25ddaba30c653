"""Cards in the Hub's format, and an upload that does not start where it must not; a fake Hub stands in."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors
import pytest
import yaml
from huggingface_hub import DatasetCard

from diffusers_endora.data.corpora import CORPORA, corpus_class, publishing
from diffusers_endora.data.corpora.publishing import check_may_push, push_to_hub

REPOSITORY = Path(__file__).parents[3]
LICENCES = {"apache-2.0", "cc-by-4.0", "cc-by-nc-sa-4.0", "other"}  # of the Hub's list, those that occur
TASKS = {"video-classification", "object-detection", "depth-estimation", "unconditional-image-generation"}


class FakeHub:
    """What a `HfApi` is asked for, on a Hub with a public and a private repository."""

    def __init__(self, fails: bool = False) -> None:
        self.repositories = {"me/public": False, "me/private": True}
        self.uploads: list[tuple[str, list[str]]] = []
        self.fails = fails

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, repo_id, repo_type):
        assert repo_type == "dataset"
        return repo_id in self.repositories

    def repo_info(self, repo_id, repo_type):
        assert repo_type == "dataset"
        return SimpleNamespace(private=self.repositories[repo_id])

    def create_repo(self, repo_id, repo_type, private, exist_ok):
        assert repo_type == "dataset"
        assert exist_ok
        self.repositories.setdefault(repo_id, private)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path, repo_id, repo_type, commit_message):
        assert repo_type == "dataset"
        if self.fails:
            raise OSError("500 Server Error")  # as a HfHubHTTPError is one
        files = sorted(p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file())
        self.uploads.append((repo_id, files))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").write_bytes(b"rows")
    (tmp_path / "out" / "README.md").write_text("card")
    return tmp_path / "out"


@pytest.mark.parametrize("corpus", [c for c in CORPORA if not corpus_class(c).MAY_BE_PUBLISHED])
def test_a_public_push_against_the_terms_is_refused(corpus):
    hub = FakeHub()
    with pytest.raises(ValueError, match=rf"{corpus} is not pushed publicly: .*--i_have_the_right") as error:
        check_may_push(corpus, "me/new", private=False, has_the_right=False, api=hub)
    assert corpus_class(corpus).TERMS in str(error.value)
    check_may_push(corpus, "me/new", private=False, has_the_right=True, api=hub)
    check_may_push(corpus, "me/new", private=True, has_the_right=False, api=hub)


def test_which_corpora_may_be_published():
    assert {c for c in CORPORA if corpus_class(c).MAY_BE_PUBLISHED} == {"kvasir_capsule", "phantom"}
    for corpus in ("kvasir_capsule", "phantom"):
        check_may_push(corpus, "me/new", private=False, has_the_right=False, api=FakeHub())


def test_a_private_push_does_not_end_in_a_public_repository(folder):
    hub = FakeHub()
    with pytest.raises(ValueError, match="me/public is a public repository; expected a private one"):
        check_may_push("colonoscopic", "me/public", private=True, has_the_right=False, api=hub)
    with pytest.raises(ValueError, match="so nothing was uploaded"):
        push_to_hub(folder, "me/public", private=True, api=hub)
    assert hub.uploads == []
    check_may_push("colonoscopic", "me/private", private=True, has_the_right=False, api=hub)


@pytest.mark.parametrize("private", [True, False])
def test_upload(private, folder):
    hub = FakeHub()
    assert push_to_hub(folder, "me/new", private, api=hub) == "https://huggingface.co/datasets/me/new"
    assert hub.repositories["me/new"] is private
    assert hub.uploads == [("me/new", ["README.md", "data/train-00000-of-00001.parquet"])]


def test_an_upload_that_fails_leaves_the_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "before")
    with pytest.raises(OSError, match="500 Server Error"):
        push_to_hub(folder, "me/new", True, api=FakeHub(fails=True))
    for path in (tmp_path / "before").rglob("*"):
        same = folder / path.relative_to(tmp_path / "before")
        assert same.is_dir() if path.is_dir() else same.read_bytes() == path.read_bytes()
    assert len(list(folder.rglob("*"))) == len(list((tmp_path / "before").rglob("*")))
    hub = FakeHub()
    push_to_hub(folder, "me/new", True, api=hub)
    assert len(hub.uploads) == 1


def test_names_that_are_none():
    with pytest.raises(ValueError, match="Repo id"):
        check_may_push("phantom", "me/a/b", private=True, has_the_right=False, api=FakeHub())


def test_a_hub_that_cannot_be_reached(folder):
    of_http_library = next(kind for kind in huggingface_hub.errors.HfHubHTTPError.mro() if "httpx" in kind.__module__)
    assert not issubclass(of_http_library, OSError)

    class Unreachable(FakeHub):
        def whoami(self):
            raise of_http_library("no route to host")

        def create_repo(self, *_, **__):
            raise of_http_library("no route to host")

    with pytest.raises(ConnectionError, match="the Hub cannot be reached: no route to host"):
        check_may_push("phantom", "me/new", private=True, has_the_right=False, api=Unreachable())
    with pytest.raises(ConnectionError, match="the Hub cannot be reached: no route to host"):
        push_to_hub(folder, "me/new", private=True, api=Unreachable())


# --- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_card_of_a_corpus(corpus):
    path = REPOSITORY / "datasets_scripts" / corpus / "README.md"
    assert path.is_symlink()  # one real file, which is in the wheel
    assert path.resolve() == publishing.CARDS / f"{corpus}.md"
    assert not Path(path.readlink()).is_absolute()
    card = DatasetCard.load(path)
    metadata = card.data.to_dict()
    assert yaml.safe_load(card.content.split("---")[1]) == metadata
    assert metadata["license"] in LICENCES
    assert ("license_link" in metadata) == ("license_name" in metadata) == (metadata["license"] == "other")
    assert set(metadata["task_categories"]) <= TASKS
    assert metadata["size_categories"] == ["n<1K"]
    assert all(re.fullmatch("[a-z0-9-]+", tag) for tag in metadata["tags"])
    builder = corpus_class(corpus)
    config = next(config for config in builder.BUILDER_CONFIGS if config.name == "videos")
    for column in builder.features(config):
        assert f"`{column}`" in card.text
    for heading in ("## Columns", "## Splits", "## Traps", "## Citation"):
        assert heading in card.text
    assert corpus == "phantom" or "## Not verified" in card.text
    assert card.text.count("```bibtex\n@") == 1
    assert f"endora prepare {corpus} " in card.text


def test_terms_are_on_the_cards():
    text = {corpus: (publishing.CARDS / f"{corpus}.md").read_text(encoding="utf-8") for corpus in CORPORA}
    assert "signed request form" in text["cholectriplet"]
    assert "No licence and no terms were found" in text["colonoscopic"]
    assert "prior written permission for competitions and commercial use" in text["kvasir_capsule"]
    assert "states CC BY 4.0 for the HyperKvasir part" in text["polypdiag"]
