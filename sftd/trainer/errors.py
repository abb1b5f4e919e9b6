"""Why a trainer ends early. The daemon classifies a failure by the class name in torchelastic's error file."""

from __future__ import annotations


class UserError(Exception):
    """What the user gave cannot be trained: bad data, an unsupported model, a layout that does not fit."""


class DataError(UserError):
    """The data files hold something that cannot be trained on."""


class DataNotDecoded(Exception):
    """The decoded rows could not be written: the disk is full, say."""


class NonFiniteLoss(Exception):
    """The loss or the gradient norm is not a finite number."""


class LossSpike(Exception):
    """The loss is far above those of the steps before."""


class GivenUp(Exception):
    """The daemon has given this attempt up, and another may train the run by now: nothing more may be written."""


class CheckpointSaveFailed(Exception):
    """A checkpoint could not be written; the next attempt may be able to."""
