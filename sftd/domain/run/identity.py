"""Where a daemon runs, beyond the name of its host and the path of its home: containers and cloned machines share both."""

from __future__ import annotations

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """`boot_id` is the kernel's, new at each boot; `pid_namespace` the inode of the namespace in which the daemon has its pid;
    `home_id` device and inode of its home, as `device:inode`. All empty where an older sftd, or another system than Linux, did
    not record them."""

    boot_id: str = ""
    pid_namespace: str = ""
    home_id: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it was recorded."""
        return bool(self.boot_id)

    def observes(self, other: Identity) -> bool:
        """Whether a process of `other` that is not seen from here has ended: a pid means the same process to both. Of a daemon
        that recorded no identity nothing speaks against it."""
        return not (self.is_known and other.is_known) or (
            (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)
        )

    def is_same(self, other: Identity) -> bool:
        """Whether `other` runs, or ran, where this one does, on the same home."""
        return self.observes(other) and self.has_home_of(other)

    def has_home_of(self, other: Identity) -> bool:
        """Whether both have one and the same folder as their home, within one boot: device numbers may change at the next."""
        return not (self.is_known and other.is_known) or (
            (self.boot_id, self.home_id) == (other.boot_id, other.home_id)
        )

    def rebooted_since(self, other: Identity) -> bool:
        """Whether this may be the machine of `other` after a reboot: another boot, and a home of the same inode. Another machine
        with a copy of the disk looks the same, so only one that is silent as well is known to be gone."""
        return (
            self.is_known
            and other.is_known
            and self.boot_id != other.boot_id
            and self.home_id.rpartition(":")[2] == other.home_id.rpartition(":")[2]
        )
