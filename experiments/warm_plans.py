"""Imported once by the server that paper 5's cells are forked from: tianshou and the planner take seconds to import.

Numba's kernels of the cost model are compiled, or read from its cache, by pricing a small model once.
"""

from __future__ import annotations

import datamodules.auto_map  # noqa: F401  (what is imported here, cells need not import)
import lit_modules.auto_map_search  # noqa: F401
from datamodules.planning.stages import Pipeline, load_profile
from datamodules.planning.topology import load_topology
from lit_modules.plan_agent import preload

preload()
Pipeline(load_profile("bert48_v100", 64), load_topology("v100_2x8"), 4).length((24,), (8,))
