"""Where a daemon runs: which processes it can see the end of, and whose home it has."""

from __future__ import annotations

import pytest

from sftd.domain.run.identity import Identity

HERE = Identity("boot", "4026", "2049:77")
UNKNOWN = Identity()


@pytest.mark.parametrize(
    ("other", "observes", "has_home", "rebooted"),
    [
        (HERE, True, True, False),
        (Identity("boot", "4026", "2049:78"), True, False, False),
        # Another container on the same machine.
        (Identity("boot", "4027", "2049:77"), False, True, False),
        # The same machine before a reboot: its devices may have other numbers.
        (Identity("before", "4026", "2050:77"), False, False, True),
        (Identity("before", "4026", "2049:78"), False, False, False),
        # An older sftd recorded nothing: nothing speaks against it.
        (UNKNOWN, True, True, False),
        (Identity("", "4027", "1:77"), True, True, False),
    ],
)
def test_what_two_daemons_have_in_common(
    other: Identity, observes: bool, has_home: bool, rebooted: bool
) -> None:
    for one, two in ((HERE, other), (other, HERE)):
        assert one.observes(two) is observes
        assert one.has_home_of(two) is has_home
        assert one.is_same(two) is (observes and has_home)
        assert one.rebooted_since(two) is rebooted
    assert other.is_known is bool(other.boot_id)
