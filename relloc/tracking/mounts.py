"""Which file system a path lies on, by the system's table of mounts."""

import os
from pathlib import Path

import psutil

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
    found = _mount_of(path)[0]
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


def _mount_of(path: Path) -> tuple[str, list[str]]:
    """The type and the options of the mount that a path is below; of mounts at one place the last one counts."""
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:  # no table of mounts
        return "", []
    real, nearest, kind, options = Path(os.path.realpath(path)), 0, "", ""
    for mount in mounts:
        if real.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= nearest:
            nearest, kind, options = len(mount.mountpoint), mount.fstype, mount.opts
    return kind, options.split(",")
