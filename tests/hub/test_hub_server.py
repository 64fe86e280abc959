"""The Hub of the tests answers huggingface_hub as the Hub does."""

import subprocess
import sys

from hub_server import TOKEN, environment_of, hub_server


CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
folder, api = Path(sys.argv[1]), HfApi()
assert api.whoami()["name"] == "me"
for kind in ("model", "dataset"):
    api.create_repo("me/x", repo_type=kind, private=True)
    assert api.create_repo("me/x", repo_type=kind, exist_ok=True).repo_id == "me/x"
    api.create_branch("me/x", branch="next", repo_type=kind)
    api.upload_folder(repo_id="me/x", folder_path=folder, repo_type=kind, revision="next")
    assert api.list_repo_files("me/x", repo_type=kind) == [".gitattributes"]
    found = Path(snapshot_download("me/x", repo_type=kind, revision="next"))
    for path in ("config.json", "a/b/x.lance"):
        assert (found / path).read_bytes() == (folder / path).read_bytes(), path
    assert {ref.name for ref in api.list_repo_refs("me/x", repo_type=kind).branches} == {"main", "next"}
    api.delete_file("a/b/x.lance", "me/x", repo_type=kind, revision="next")
    assert not api.file_exists("me/x", "a/b/x.lance", repo_type=kind, revision="next")
    assert api.repo_info("me/x", repo_type=kind).private
files = HfFileSystem()
api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="a/digits.bin", repo_id="me/x", repo_type="dataset")
assert files.ls("datasets/me/x/a", detail=False) == ["datasets/me/x/a/digits.bin"]
with files.open("datasets/me/x/a/digits.bin", block_size=4) as file:
    file.seek(4)
    assert file.read(3) == b"456"
for name, token, error in (
    ("me/x", False, RepositoryNotFoundError),
    ("me/no", None, RepositoryNotFoundError),
    ("me/gated", None, GatedRepoError),
):
    try:
        hf_hub_download(name, "config.json", token=token)
    except error:
        continue
    raise AssertionError(name)
"""


def test_huggingface_hub_creates_uploads_lists_and_downloads(tmp_path):
    (tmp_path / "files" / "a" / "b").mkdir(parents=True)
    (tmp_path / "files" / "config.json").write_text("{}")
    (tmp_path / "files" / "a" / "b" / "x.lance").write_bytes(bytes(1000))
    with hub_server() as server:
        server.add("me/gated", tmp_path / "files", gated=True)
        environment = environment_of(server, tmp_path / "home")
        command = [sys.executable, "-c", CLIENT, str(tmp_path / "files")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        assert set(server.repositories) == {"me/gated", "me/x", "datasets/me/x"}
