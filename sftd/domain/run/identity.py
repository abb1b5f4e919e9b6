"""Identity of a daemon's place, because containers and cloned machines can share the host name and the path of the home."""

from __future__ import annotations

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """`boot_id` is the kernel's id of the current boot, `pid_namespace` the inode of the daemon's pid namespace, `home_id` its
    home as `device:inode`. All are empty if an older sftd, or a system other than Linux, did not record them."""

    boot_id: str = ""
    pid_namespace: str = ""
    home_id: str = ""

    @property
    def is_known(self) -> bool:
        """Whether the identity was recorded."""
        return bool(self.boot_id)

    def observes(self, other: Identity) -> bool:
        """Whether a pid names the same process for both, so that a process of `other` that is not visible here has ended.
        True if either identity is unknown."""
        return not (self.is_known and other.is_known) or (
            (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)
        )

    def is_same(self, other: Identity) -> bool:
        """Whether `other` shares this boot, pid namespace and home. True if either identity is unknown."""
        return self.observes(other) and self.has_home_of(other)

    def has_home_of(self, other: Identity) -> bool:
        """Whether both have the same home folder. Only within one boot, because device numbers may change at the next boot."""
        return not (self.is_known and other.is_known) or (
            (self.boot_id, self.home_id) == (other.boot_id, other.home_id)
        )

    def rebooted_since(self, other: Identity) -> bool:
        """Whether this may be the machine of `other` after a reboot: another boot, and a home with the same inode. A machine
        with a copy of the disk looks the same, so a caller must also check that `other` is silent."""
        return (
            self.is_known
            and other.is_known
            and self.boot_id != other.boot_id
            and self.home_id.rpartition(":")[2] == other.home_id.rpartition(":")[2]
        )
