"""What every process that another one started does for itself."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import wait


def die_with_parent() -> None:
    """End this process when the one that started it is gone, so that no orphan is left; for a thread of its own.

    A process that a fork server made is no child of the one that asked for it, so the system does not see to this.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
