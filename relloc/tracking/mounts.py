"""Which file system a path lies on, by Linux's table of mounts."""

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# Types of file systems that several machines write at once.
_SHARED = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "panfs",
    "wekafs",
    "pvfs2",
}
# Many of FUSE are one machine's own (encrypted or merged folders): only these are not.
_SHARED_FUSE = {
    "sshfs",
    "glusterfs",
    "ceph",
    "ceph-fuse",
    "juicefs",
    "s3fs",
    "rclone",
    "mfs",
    "dfuse",
    "lustre",
    "beegfs",
}


def shared_file_system(path: Path) -> str | None:
    """The type of the network file system that holds a path, such as "nfs4"; None if none does or nobody can say."""
    found = _type_of(path)
    fuse = found.removeprefix("fuse.")
    return found if found in _SHARED or (fuse != found and fuse in _SHARED_FUSE) else None


def locks_stay_here(path: Path) -> bool:
    """Whether a path lies in a network folder that is mounted so that other machines see no lock taken here.

    NFS by `nolock` or `local_lock=` (nfs(5)), Lustre by `localflock` (mount.lustre(8)).
    """
    kind, options = _mount_of(path)
    if kind in ("nfs", "nfs4"):
        return not {"nolock", "local_lock=all", "local_lock=posix"}.isdisjoint(options)
    return kind == "lustre" and "localflock" in options


def _type_of(path: Path) -> str:
    return _mount_of(path)[0]


def _mount_of(path: Path) -> tuple[str, list[str]]:
    """The type and the options of the mount that a path is below; of mounts at one place the last one counts.

    A line is "ID PARENT MAJOR:MINOR ROOT PLACE OPTIONS [FIELDS] - TYPE SOURCE OPTIONS" (proc(5)).
    """
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return "", []
    real, nearest, kind, options = Path(os.path.realpath(path)), -1, "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        place = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4]))
        if real.is_relative_to(place) and len(place.parts) >= nearest:
            nearest, kind, options = len(place.parts), after.split(" ")[0], after.rpartition(" ")[2]
    return kind, options.split(",")
