"""Who owns the files of a store's folder, who may use them, and how to say so."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from cakekv.errors import BadInput

Mode = Literal["private", "group"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Ownership(NamedTuple):
    """How new files and folders of a store are made."""

    uid: int = -1
    """The user that they are given to; -1: they stay the one's who makes them."""
    gid: int = -1
    """Likewise the group."""
    shared: bool = False
    """Whether the group may read and write them, too, whatever the umask."""

    @classmethod
    def of(cls, folder: Path, shared: bool = False) -> Self:
        """That of a folder that is there: what root makes in it is its owner's, and its group shares what it may write.

        Parameters
        ----------
        folder : Path
            The folder.
        shared : bool
            Whether the group is to share, though it may not write yet.
        """
        status = folder.stat()
        shared = shared or bool(status.st_mode & stat.S_IWGRP)
        uid = status.st_uid if os.geteuid() == 0 else -1
        return cls(uid, status.st_gid if shared or uid != -1 else -1, shared)

    def give(self, descriptor: int) -> None:
        """Make a file or a folder that was just made, private as it is, what it should be."""
        if (self.uid, self.gid) != (-1, -1):
            with suppress(PermissionError):  # of a group that this user is not in
                os.fchown(descriptor, self.uid, self.gid)
        if self.shared:
            os.fchmod(descriptor, 0o2770 if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 0o660)


def parse_mode(text: str) -> Mode:
    """As in `mode=group`.

    Raises
    ------
    BadInput
        There is no such mode.
    """
    for mode in MODES:
        if mode == text:
            return mode
    raise BadInput(f"{text!r} is not one of {', '.join(MODES)}")


def whose(path: Path) -> str:
    """To whom a file belongs, or the folder that hides it."""
    for place in (path, *path.parents):
        try:
            status = place.lstat()
        except OSError:
            continue
        try:
            name = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            name = str(status.st_uid)
        return f"{place} belongs to user {name} and has mode {stat.S_IMODE(status.st_mode):04o}"
    return f"{path} is hidden"


def is_readable(path: Path, status: os.stat_result) -> bool:
    """Whether this user may read a file of that status."""
    user = os.geteuid()
    if user == 0 or status.st_mode & stat.S_IROTH or (status.st_uid == user and status.st_mode & stat.S_IRUSR):
        return True
    return os.access(path, os.R_OK)
