"""Finds out on which kind of file system a path lies, from the system's table of mounts."""

import os
from pathlib import Path

import psutil

# Types of file systems that several machines may write to at the same time.
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
# Most FUSE file systems belong to one machine (encrypted or merged folders); these do not.
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
    """Return the type of the network file system that a path lies on, such as "nfs4".

    None means that it lies on a local one, or that the system does not say.
    """
    kind, _ = _mount_of(path)
    if kind in _SHARED:
        return kind
    # The table calls them fuse.sshfs and so on.
    if kind.startswith("fuse.") and kind.removeprefix("fuse.") in _SHARED_FUSE:
        return kind
    return None


def locks_stay_here(path: Path) -> bool:
    """Return whether other machines don't see locks that are taken on this path.

    That depends on the options of the mount: `nolock` or `local_lock=` of NFS (see nfs(5)), and
    `localflock` of Lustre (see mount.lustre(8)).
    """
    kind, options = _mount_of(path)
    if kind in ("nfs", "nfs4"):
        return not {"nolock", "local_lock=all", "local_lock=posix"}.isdisjoint(options)
    return kind == "lustre" and "localflock" in options


def _mount_of(path: Path) -> tuple[str, list[str]]:
    """Return type and options of the file system that is mounted at or above a path."""
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:  # no table of mounts
        return "", []
    real = Path(os.path.realpath(path))
    nearest, kind, options = 0, "", ""
    # The deepest mount point counts, and of several at the same folder the last one (hence >=).
    for mount in mounts:
        if real.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= nearest:
            nearest, kind, options = len(mount.mountpoint), mount.fstype, mount.opts
    return kind, options.split(",")
