"""Every error a user of this software can meet, in one small tree.

    MammutError                 exit code 2 in the commands
    ├── InputError              a picture, text or option that was given cannot be used
    ├── BundleError             a bundle is damaged, edited, of another version, or not a bundle
    ├── CheckpointError         a checkpoint is damaged, of an unknown form, or of other shapes than its config
    ├── EngineError             an engine library is missing, too old, or does not take a graph
    └── VerificationError       numbers differ from what was promised (parity, canary)   exit code 1

A message says what was expected, what came, and what to do next; it is meant to be read without a traceback.
"""

from __future__ import annotations


class MammutError(Exception):
    """Root of the tree: catch this to catch everything the software reports about its input or surroundings."""

    exit_code = 2


class InputError(MammutError):
    """A picture, text or option that was given cannot be used."""


class BundleError(MammutError):
    """A bundle is damaged, edited, made by another format version, or not a bundle at all."""


class CheckpointError(MammutError):
    """A checkpoint is damaged, of an unknown form, or its tensors do not fit its config."""


class EngineError(MammutError):
    """An engine library is missing, too old, or refuses a graph."""


class VerificationError(MammutError):
    """Measured numbers differ from the promised ones by more than the stated tolerance."""

    exit_code = 1
