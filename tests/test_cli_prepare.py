"""`endora prepare` and the scripts of `datasets_scripts`: one implementation; options, errors, output."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from diffusers_endora import cli
from diffusers_endora.data.corpora import CORPORA, commands, corpus_class, publishing

SCRIPTS = Path(__file__).parents[1] / "datasets_scripts"
PHANTOM = ["--num_videos", "3", "--num_frames", "4", "--height", "16", "--width", "24", "--seed", "7"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `endora ...`, or a script: `run(*arguments) -> (exit code, stdout, stderr without progress bars)`."""

    def run_(*arguments, script: str | None = None) -> tuple[int, str, str]:
        name = "endora" if script is None else str(SCRIPTS / script / f"{script}.py")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            if script is None:
                cli.main()
            else:
                runpy.run_path(name, run_name="__main__")
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, output.out, re.sub(r"\r.*(?:video/s|s/video)\]\n?|\r", "", output.err)

    return run_


@pytest.fixture
def refused(run):
    """Runs `endora ...`, which has to fail with one line on stderr; returns that line."""

    def refused_(*arguments, script: str | None = None) -> str:
        code, out, err = run(*arguments, script=script)
        assert code == 1
        assert out == ""
        assert err.startswith(f"{'endora' if script is None else script + '.py'}: error: ")
        assert err.count("\n") == 1
        return err

    return refused_


@pytest.fixture
def hub(monkeypatch):
    """A Hub that takes note of what is asked of it, in place of the real one."""
    calls = []

    class Hub:
        def whoami(self):
            calls.append("whoami")

        def repo_exists(self, *_, **__):
            return False

        def create_repo(self, repo_id, private, **_):
            calls.append(("create", repo_id, private))
            return type("Url", (), {"repo_id": repo_id})

        def repo_info(self, *_, **__):
            return type("Info", (), {"private": True})

        def upload_folder(self, folder_path, **_):
            calls.append(("upload", sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(publishing, "HfApi", Hub)
    return calls


def test_the_summary(run, tmp_path):
    code, out, err = run("prepare", "phantom", "--output-dir", tmp_path / "out", *PHANTOM)
    assert code == 0
    assert err == ""
    *lines, last = out.splitlines()
    assert lines == [
        "train: 1 videos, 1 rows, 4 frames, 0.5 s",
        "  label: polyp 1",
        "validation: 1 videos, 1 rows, 4 frames, 0.5 s",
        "  label: instrument 1",
        "test: 1 videos, 1 rows, 4 frames, 0.5 s",
        "  label: lumen 1",
    ]
    assert re.fullmatch(
        rf"{tmp_path}/out: 3 videos, 3 rows, 12 frames, 1\.5 s, 0\.\d MB, written in [0-9.]+ seconds", last
    )
    code, again, _ = run("prepare", "phantom", "--output_dir", tmp_path / "out", *PHANTOM)
    assert code == 0
    assert again.splitlines()[:-1] == lines
    assert again.endswith("was there already\n")


def test_a_script_is_the_same(run, tmp_path):
    run("prepare", "phantom", "--output_dir", tmp_path / "command", *PHANTOM, "--format", "webdataset")
    code, out, err = run("--output_dir", tmp_path / "script", *PHANTOM, "--format", "webdataset", script="phantom")
    assert (code, err) == (0, "")
    assert "3 videos" in out
    names = sorted(path.relative_to(tmp_path / "script") for path in (tmp_path / "script").rglob("*.*"))
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "script" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()


def test_every_option_reaches_the_corpus(run, monkeypatch, tmp_path):
    seen = {}

    def prepare_corpus(corpus, data_dir, output_dir, config_name, file_format, num_proc, **options):
        seen.update(corpus=corpus, places=(data_dir, output_dir), config_name=config_name, file_format=file_format)
        seen.update(num_proc=num_proc, options=options)
        raise ValueError("seen")

    monkeypatch.setattr("diffusers_endora.data.corpora.prepare.prepare_corpus", prepare_corpus)
    options = {"config": "clips", "clip_length": 16, "transcode": 64, "quality": "lossless", "format": "webdataset"}
    options |= {"num_proc": 3, "split_protocol": "cholect50-crossval", "fold": 4}
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    run("prepare", "cholectriplet", "--data_dir", "raw", "--output_dir", "out", *given)
    assert seen == {
        "corpus": "cholectriplet",
        "places": (Path("raw"), Path("out")),
        "config_name": "clips",
        "file_format": "webdataset",
        "num_proc": 3,
        "options": {
            "clip_length": 16,
            "short_side": 64,
            "quality": "lossless",
            "split_protocol": "cholect50-crossval",
            "fold": 4,
        },
    }
    run("prepare", "phantom", "--output_dir", "out", *PHANTOM)
    assert seen["options"] == {"num_videos": 3, "num_frames": 4, "height": 16, "width": 24, "seed": 7}


def test_options_of_one_corpus_are_those_of_its_config():
    for option, corpus in commands.ONLY_FOR.items():
        for name in CORPORA:
            config = corpus_class(name).BUILDER_CONFIGS[0]
            assert (option in config.options()) == (name == corpus)


def test_one_line_for_each_error(refused, tmp_path):
    out = tmp_path / "out"
    line = refused("prepare", "colonoscopy", "--output_dir", out)
    assert line.endswith("colonoscopy: is no corpus; expected one of " + ", ".join(CORPORA) + ".\n")
    line = refused("prepare", "polypdiag", "--output_dir", out, "--fold", "2")
    assert line.endswith("--fold: is an option of cholectriplet alone; leave it out for polypdiag.\n")
    assert "--data_dir" in refused("prepare", "polypdiag", "--output_dir", out)
    assert "there is no such folder" in refused(
        "--data_dir", tmp_path / "raw", "--output_dir", out, script="polypdiag"
    )
    assert "takes no folder" in refused("prepare", "phantom", "--data_dir", tmp_path / "raw", "--output_dir", out)
    assert "polypdiag has videos, clips, labelled_40" in refused(
        "--data_dir", tmp_path / "raw", "--output_dir", out, "--config", "frames", script="polypdiag"
    )
    assert "fold=9" in refused("--data_dir", tmp_path, "--output_dir", out, "--fold", "9", script="cholectriplet")
    assert not out.exists()


@pytest.mark.parametrize("script", [None, *CORPORA])
def test_help_has_an_example_and_no_options_of_others(script, run):
    code, out, _ = run(*(["prepare"] if script is None else []), "--help", script=script)
    assert code == 0
    example = out[out.index("Example:") :].splitlines()[1].split()
    if script is None:
        assert example[:3] == ["endora", "prepare", "colonoscopic"]
        return
    assert example[:2] == ["python", f"datasets_scripts/{script}/{script}.py"]
    assert (SCRIPTS.parent / example[1]).is_file()
    assert ("--fold" in out) == (script == "cholectriplet")
    assert ("--num_videos" in out) == (script == "phantom")
    assert ("--data_dir" in out) == (script != "phantom")
    options = {word for word in example if word.startswith("--")}
    assert options <= set(re.findall(r"--\w+", out[out.index("Options:") :]))


def test_push(run, hub, tmp_path):
    code, out, _ = run("prepare", "phantom", "--output_dir", tmp_path / "out", *PHANTOM, "--push_to_hub", "me/phantom")
    assert code == 0
    assert out.endswith("https://huggingface.co/datasets/me/phantom\n")
    files = ["README.md", "data", "prepared.json", "rejected.jsonl"]
    assert hub == ["whoami", ("create", "me/phantom", True), ("upload", files)]  # private unless told otherwise
    run("prepare", "phantom", "--output_dir", tmp_path / "out", *PHANTOM, "--push_to_hub", "me/x", "--no-private")
    assert hub[4] == ("create", "me/x", False)


def test_a_public_push_is_refused_before_the_work(run, refused, hub, monkeypatch, tmp_path):
    def prepare_corpus(*_, **__):
        raise ValueError("worked")

    monkeypatch.setattr("diffusers_endora.data.corpora.prepare.prepare_corpus", prepare_corpus)
    arguments = ["--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--push_to_hub", "me/x", "--no_private"]
    for corpus in ("colonoscopic", "cholectriplet", "polypdiag"):
        assert f"{corpus} is not pushed publicly" in refused(*arguments, script=corpus)
    assert hub == []
    assert refused(*arguments, "--i_have_the_right", script="colonoscopic").endswith("worked\n")
    assert refused(*arguments, script="kvasir_capsule").endswith("worked\n")
