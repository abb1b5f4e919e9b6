"""Errors that end a trainer. The daemon classifies a failure by the class name in torchelastic's error file."""

from __future__ import annotations


class UserError(Exception):
    """The user's input cannot be trained: bad data, an unsupported model, a layout that does not fit."""


class DataError(UserError):
    """A data file has unusable contents."""


class DataNotDecoded(Exception):
    """The decoded rows could not be written, for example because the disk is full."""


class NonFiniteLoss(Exception):
    """The loss or the gradient norm is not a finite number."""


class LossSpike(Exception):
    """The loss is far above the losses of the previous steps."""


class GivenUp(Exception):
    """The daemon gave this attempt up. It must write nothing more: another attempt may train the run by now."""


class CheckpointSaveFailed(Exception):
    """A checkpoint could not be written. The next attempt may succeed."""
