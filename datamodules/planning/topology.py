"""Machines that a plan runs on: nodes of devices, the links inside and between nodes, and what a device can do.

Units: seconds, bytes, floating-point operations. A multiply-add is two operations.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "topology"


class TopologyError(ValueError):
    """A machine that cannot be; the message names the field, its value and the way out."""


@dataclass(frozen=True)
class Link:
    """One link: a message of b bytes takes `latency_s + b / bytes_per_s` seconds."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise TopologyError(f"a link's latency must be 0 or more seconds, got {self.latency_s}")
        if not (self.bytes_per_s > 0 and not math.isnan(self.bytes_per_s)):
            raise TopologyError(
                f"a link's bandwidth must be above 0 bytes/s, got {self.bytes_per_s}: over such a link nothing arrives; "
                "leave the nodes out that cannot be reached, or give the bandwidth that was measured"
            )


@dataclass(frozen=True)
class Topology:
    """Nodes of equal devices.

    `inside` is one device's link within its node, used by collectives; `between` is one node's link to all other nodes, shared
    by the node's devices. `send_inside` and `send_between` are one stream from device to device, where that is slower than what
    collectives reach; by default the same. `flops_per_s` is the peak by dtype, of which `efficiency` is reached; likewise
    `memory_bytes_per_s` and `memory_efficiency`. A plan may use `usable_memory` of `memory_bytes`. `launch_s` is what starting
    one operation costs. `node_sizes` gives the devices of each node where nodes differ. `product_bytes_per_s` is what a matrix
    product takes besides its arithmetic for each byte of its operands and result (a CPU packs them, which few rows do not pay
    for); None where that hides behind the arithmetic.
    """

    name: str
    nodes: int
    devices_per_node: int
    inside: Link
    between: Link
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: int
    launch_s: float = 0.0
    efficiency: float = 1.0
    memory_efficiency: float = 1.0
    usable_memory: float = 0.9
    send_inside: Link | None = None
    send_between: Link | None = None
    node_sizes: tuple[int, ...] | None = None
    product_bytes_per_s: float | None = None
    source: str = field(default="", compare=False)  # where the numbers are from

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise TopologyError(f"topology {self.name}: {name} must be a whole number above 0, got {value!r}")
        for name in ("memory_bytes_per_s", "memory_bytes"):
            if not getattr(self, name) > 0:
                raise TopologyError(f"topology {self.name}: {name} must be above 0, got {getattr(self, name)}")
        for name in ("efficiency", "memory_efficiency", "usable_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise TopologyError(
                    f"topology {self.name}: {name} must be above 0, at most 1, got {getattr(self, name)}"
                )
        if not (math.isfinite(self.launch_s) and self.launch_s >= 0):
            raise TopologyError(f"topology {self.name}: launch_s must be 0 or more seconds, got {self.launch_s}")
        if self.product_bytes_per_s is not None and not self.product_bytes_per_s > 0:
            raise TopologyError(
                f"topology {self.name}: product_bytes_per_s must be above 0, got {self.product_bytes_per_s}; leave it out if "
                "products cost their arithmetic alone"
            )
        if "float32" not in self.flops_per_s:
            raise TopologyError(f"topology {self.name}: flops_per_s must at least say what float32 does")
        for dtype, rate in self.flops_per_s.items():
            if not rate > 0:
                raise TopologyError(f"topology {self.name}: flops_per_s of {dtype} must be above 0, got {rate}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.node_sizes is None:
            return
        if len(self.node_sizes) != self.nodes or min(self.node_sizes) < 1:
            raise TopologyError(
                f"topology {self.name}: node_sizes {list(self.node_sizes)} must give 1 or more devices for each of "
                f"{self.nodes} nodes"
            )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Devices of each node."""
        return self.node_sizes or (self.devices_per_node,) * self.nodes

    @property
    def devices(self) -> int:
        """How many devices there are; they are numbered from 0, node after node."""
        return sum(self.sizes)

    @cached_property
    def _node_of(self) -> tuple[int, ...]:
        return tuple(node for node, size in enumerate(self.sizes) for _ in range(size))

    def node_of(self, device: int) -> int:
        """The node of a device; ValueError for a device that is not there."""
        if not 0 <= device < self.devices:
            raise ValueError(f"topology {self.name} has devices 0 to {self.devices - 1}, not {device}")
        return self._node_of[device]

    def counts(self, devices: Sequence[int]) -> tuple[int, ...]:
        """How many of `devices` each node holds; nodes without any are left out."""
        nodes = [self.node_of(device) for device in devices]
        if len(set(devices)) != len(nodes):
            raise ValueError(f"a device is named twice in {list(devices)}")
        return tuple(nodes.count(node) for node in sorted(set(nodes)))

    @property
    def stream_inside(self) -> Link:
        return self.send_inside or self.inside

    @property
    def stream_between(self) -> Link:
        return self.send_between or self.between

    @property
    def memory_limit(self) -> int:
        """Bytes that a plan may use on one device."""
        return int(self.memory_bytes * self.usable_memory)

    def rate(self, dtype: str) -> float:
        """Attainable operations per second; a dtype without a rate of its own goes at float32's."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"]) * self.efficiency

    @property
    def memory_rate(self) -> float:
        return self.memory_bytes_per_s * self.memory_efficiency

    def meshed(self, nodes: int, devices_per_node: int) -> Topology:
        """The same machine with other counts."""
        if self.nodes == nodes and self.sizes == (devices_per_node,) * nodes:
            return self
        name = f"{self.name}@{nodes}x{devices_per_node}"
        return replace(self, name=name, nodes=nodes, devices_per_node=devices_per_node, node_sizes=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON or YAML values."""
        plain = {key: value for key, value in asdict(self).items() if value is not None}
        if self.node_sizes is not None:
            plain["node_sizes"] = list(self.node_sizes)
        return {**plain, "flops_per_s": dict(self.flops_per_s)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Topology:
        """The inverse of `to_dict`; TopologyError for a missing, unknown or impossible value."""
        known = {f.name for f in fields(cls)}
        unknown = set(values) - known
        name = values.get("name", "?")
        if unknown:
            raise TopologyError(f"topology {name}: unknown {sorted(unknown)}; known: {', '.join(sorted(known))}")
        missing = known - set(values) - {f.name for f in fields(cls) if f.default is not f.default_factory}
        if missing:
            raise TopologyError(f"topology {name}: {', '.join(sorted(missing))} missing")
        plain = {key: _plain(key, value, name) for key, value in values.items()}
        return cls(**plain)


_LINKS = ("inside", "between", "send_inside", "send_between")
_COUNTS = ("nodes", "devices_per_node", "memory_bytes")


def _plain(key: str, value: Any, name: str) -> Any:
    """One field from YAML, where 1e9 without a point is text."""
    try:
        if key in _LINKS:
            return Link(**{part: float(number) for part, number in value.items()}) if value is not None else None
        if key == "flops_per_s":
            return {dtype: float(rate) for dtype, rate in value.items()}
        if key == "node_sizes":
            return tuple(int(size) for size in value) if value is not None else None
        if key == "product_bytes_per_s":
            return float(value) if value is not None else None
        if key in _COUNTS:
            return int(float(value))
        return value if key in ("name", "source") else float(value)
    except TopologyError as error:
        raise TopologyError(f"topology {name}: {key}: {error}") from None
    except (TypeError, ValueError, AttributeError):
        raise TopologyError(f"topology {name}: {key} cannot be {value!r}") from None


def topologies() -> list[str]:
    """Names of the machines that come with the suite."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_topology(name: str | Path) -> Topology:
    """A machine by name (conf/topology/NAME.yaml) or from a YAML file; TopologyError names the nearest there is."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
    if not path.exists():
        near = difflib.get_close_matches(str(name), topologies(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(topologies())}"
        raise TopologyError(f"no topology '{name}': {hint} A YAML file of your own may be named as well")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise TopologyError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise TopologyError(
            f"{path} holds no topology: a mapping with name, nodes, devices_per_node and so on is expected"
        )
    return Topology.from_dict({"name": path.stem, **values})
