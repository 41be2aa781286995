from pathlib import Path

import psutil
import pytest

from relloc.tracking import StoreError, open_store
from relloc.tracking.mounts import locks_stay_here, shared_file_system

TABLE = """\
/dev/vda / ext4 rw,relatime 0 0
systemd-1 /home autofs rw 0 0
login1:/export/home /home nfs4 rw,relatime,vers=4.2 0 0
/dev/nvme0n1 /home/ann/local xfs rw 0 0
10.0.0.1@o2ib:/big /big\\040data lustre rw 0 0
ann@login1: /mnt/ssh fuse.sshfs rw 0 0
/vault /mnt/vault fuse.gocryptfs rw 0 0
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_table(TABLE, tmp_path, monkeypatch)


def write_table(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as /proc, with this table of mounts (fstab(5)), for psutil to look into."""
    path = folder / "proc" / "self" / "mounts"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(folder / "proc"))
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
    table.write_text(f"{TABLE}beegfs_nodev {tmp_path}/net beegfs rw 0 0\n")
    (tmp_path / "net").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "net")
    assert shared_file_system(tmp_path / "runs" / "mlflow.db") == "beegfs"


def test_without_a_table_nothing_is_known(table: Path) -> None:
    table.unlink()
    assert shared_file_system(Path("/home/ann")) is None


def test_sqlite_in_a_network_folder_is_refused_unless_asked_for(
    uri: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.write_text(f"{TABLE}login1:/x {tmp_path}/store nfs rw 0 0\n")
    with pytest.raises(StoreError, match=r"store .*\(nfs\).*tracking=server"):
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
    kind, source, options = mount.split(" ")
    table = f"/dev/vda / ext4 rw 0 0\n{source} {tmp_path} {kind} {options} 0 0\n"
    write_table(table, tmp_path, monkeypatch)
    assert locks_stay_here(tmp_path / "run" / "run.lock") is stay
