from pathlib import Path

import pytest

from relloc.tracking import StoreError, mounts, open_store
from relloc.tracking.mounts import locks_stay_here, shared_file_system

TABLE = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 27 0:40 / /home rw - autofs systemd-1 rw
32 27 0:41 / /home rw,relatime shared:12 master:3 - nfs4 login1:/export/home rw,vers=4.2
33 32 254:1 / /home/ann/local rw - xfs /dev/nvme0n1 rw
34 27 0:43 / /big\\040data rw - lustre 10.0.0.1@o2ib:/big rw
35 27 0:44 / /mnt/ssh rw - fuse.sshfs ann@login1: rw
36 27 0:45 / /mnt/vault rw - fuse.gocryptfs /vault rw
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    monkeypatch.setattr(mounts, "MOUNTS", path)
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/ann/runs", "nfs4"),
        ("/home", "nfs4"),
        ("/home2/ann", None),
        ("/home/ann/local/runs", None),
        ("/big data/runs", "lustre"),
        ("/mnt/ssh/x", "fuse.sshfs"),
        ("/mnt/vault/x", None),
        ("/", None),
    ],
)
@pytest.mark.usefixtures("table")
def test_the_nearest_and_latest_mount_counts(path: str, kind: str | None) -> None:
    assert shared_file_system(Path(path)) == kind


def test_a_link_is_followed(table: Path, tmp_path: Path) -> None:
    table.write_text(f"{TABLE}40 27 0:9 / {tmp_path}/net rw - beegfs beegfs_nodev rw\n")
    (tmp_path / "net").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "net")
    assert shared_file_system(tmp_path / "runs" / "mlflow.db") == "beegfs"


def test_without_a_table_nothing_is_known(table: Path) -> None:
    table.unlink()
    assert shared_file_system(Path("/home/ann")) is None


def test_sqlite_in_a_network_folder_is_refused_unless_asked_for(
    uri: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.write_text(f"{TABLE}40 27 0:9 / {tmp_path}/store rw - nfs login1:/x rw\n")
    with pytest.raises(StoreError, match=r"store is a network folder \(nfs\).*tracking=server"):
        open_store(uri)
    monkeypatch.setenv("RELLOC_SQLITE_ANYWHERE", "1")
    assert open_store(uri).search_experiments()


@pytest.mark.parametrize(
    ("mount", "stay"),
    [
        ("nfs4 login1:/home rw,vers=4.2,local_lock=none", False),
        ("nfs4 login1:/home rw,vers=4.2", False),
        ("nfs login1:/home rw,vers=3,nolock", True),
        ("nfs login1:/home rw,vers=3,local_lock=all", True),
        ("nfs login1:/home rw,vers=3,local_lock=posix", True),
        ("nfs login1:/home rw,vers=3,local_lock=flock", False),  # ours are not those of flock(2)
        ("lustre 10.0.0.1@o2ib:/big rw,localflock", True),
        ("lustre 10.0.0.1@o2ib:/big rw,flock", False),
        ("ext4 /dev/vda rw,nolock", False),
    ],
)
def test_network_folders_whose_locks_stay_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str, stay: bool
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n32 27 0:41 / {tmp_path} rw,relatime - {mount}\n")
    monkeypatch.setattr(mounts, "MOUNTS", table)
    assert locks_stay_here(tmp_path / "run" / "run.lock") is stay
