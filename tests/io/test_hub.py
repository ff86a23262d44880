"""Names to folders, without a network."""

from pathlib import Path

import pytest

from engine.errors import CheckpointError, InputError
from engine.io import hub


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    for name in ("tiny-a", "tiny-b", "__pycache__"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "config.json").write_text("{}")
    (tmp_path / "zoo" / "unfinished").mkdir()
    monkeypatch.setattr(hub, "_zoo", lambda: tmp_path / "zoo")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo"


def test_the_shipped_zoo_is_listed():
    assert hub._zoo() is not None and isinstance(hub.zoo_names(), list)


def test_rules_in_order(zoo, tmp_path):
    (tmp_path / "tiny-a").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.zoo_names() == ["tiny-a", "tiny-b"]
    assert hub.resolve("tiny-a") == zoo / "tiny-a"
    assert hub.resolve("./tiny-a") == Path("tiny-a") == hub.resolve(Path("tiny-a"))
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "name", ["nothing", "", "a/b/c", "../x/y", "-a/b", "a/b c", "\0", Path("tiny-b"), "~/nothing-here", "."]
)
def test_unknown_names_list_the_zoo(zoo, name):
    if name == ".":
        assert hub.resolve(name) == Path(".")
        return
    with pytest.raises(InputError, match="tiny-a, tiny-b"):
        hub.resolve(name)


def test_a_file_and_a_useless_revision_are_refused(zoo, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        hub.resolve("model.safetensors")
    with pytest.raises(InputError, match="revision"):
        hub.resolve("tiny-a", revision="main")


def test_hub_ids_fetch_no_code(zoo, tmp_path, monkeypatch):
    seen = {}

    def snapshot_download(repo, **kwargs):
        seen.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert (
        hub.resolve("org/name", revision="v1", token="t", cache_dir=tmp_path / "c", local_files_only=True) == tmp_path
    )
    assert (seen["repo"], seen["revision"], seen["token"]) == ("org/name", "v1", "t")
    assert seen["local_files_only"] is True and seen["cache_dir"] == str(tmp_path / "c")
    assert not [p for p in seen["allow_patterns"] if p.endswith((".py", ".bin", ".pt", "*", ".pkl"))]
    hub.resolve("org/name", allow_patterns=["vae/*.safetensors"])
    assert seen["allow_patterns"] == ["vae/*.safetensors"]
    for bad in ("*.py", "*", "model.bin", "*.pkl"):
        with pytest.raises(InputError, match="is not fetched"):
            hub.resolve("org/name", allow_patterns=[bad])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "tiny-a"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "go online once"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
        ("Surprise", "could not be fetched"),
    ],
)
def test_failures_say_what_to_do(zoo, monkeypatch, kind, says):
    def snapshot_download(*_, **__):
        raise type(kind, (Exception,), {})("details")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=says):
        hub.resolve("org/name")


def test_offline_with_an_empty_cache(zoo, tmp_path):
    with pytest.raises(CheckpointError, match="go online once"):
        hub.resolve("org/name", local_files_only=True, cache_dir=tmp_path / "cache")
