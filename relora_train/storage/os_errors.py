"""This project's errors for what the operating system says of a disk."""

from __future__ import annotations

import errno
import os

from relora_train.errors import AccessDeniedError, DiskFullError, StorageError


def disk_error(error: OSError, action: str) -> StorageError:
    """Return an error for each thing a user can do about it. `action` completes "Cannot ...", with the path."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"Cannot {action}: {reason}. Free some space or use another directory, then run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(
            f"Cannot {action}: {reason}. Let this user (uid {os.getuid()}) write there or use another directory."
        )
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return StorageError(
            f"Cannot {action}: {reason}. In a directory no name can be a file and a folder; rename or remove one."
        )
    return StorageError(f"Cannot {action}: {reason}.")
