"""Errors that a person can mend: shown as one message, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something asked for that cannot be done; the message says what and the way out."""
