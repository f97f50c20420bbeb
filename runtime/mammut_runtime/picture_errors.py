"""What is said about picture files that cannot be used, in one voice for all formats."""

from __future__ import annotations

from mammut_runtime.errors import InputError


def cut_short(name: str, why: str) -> InputError:
    """The error for a file that ends before its picture does."""
    return InputError(f"{name}: the picture is cut short ({why}); copy or download the file again")


def damaged(name: str, what: str) -> InputError:
    """The error for a file that contradicts its own format."""
    return InputError(f"{name}: {what}; the file is damaged, copy or download it again")


def unsupported(name: str, what: str) -> InputError:
    """The error for a form of a known format that this software does not decode."""
    return InputError(f"{name}: {what} cannot be read; save the picture as an ordinary PNG or JPEG")
