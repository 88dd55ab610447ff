"""What communication costs: alpha-beta times of collectives on a group of devices.

Symbols: n ranks, b bytes of the FULL logical tensor, alpha seconds a message, B bytes/s. A tensor that is split holds b / n on
each rank. Ring and tree forms are the usual ones (ring all-reduce 2(n-1) alpha + 2(n-1)/n b/B); a group that spans nodes may
also work in two storeys: reduce-scatter inside, across, and back. A node's link to the others is shared by everything that the
node sends at once, so two storeys save messages, not bytes on that link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.planning.topology import Link, Topology

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Algorithm = Literal["best", "ring", "tree", "hierarchical"]
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ALGORITHMS = ("ring", "tree", "hierarchical")
BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: how many each node holds, and how many such groups share a node's outer link at once."""

    counts: tuple[int, ...]
    sharing: int = 1

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1 or self.sharing < 1:
            raise ValueError(f"a group needs 1 or more ranks a node and sharing of 1 or more, got {self}")

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def spans(self) -> bool:
        """Whether the group crosses nodes."""
        return len(self.counts) > 1

    @property
    def even(self) -> bool:
        return min(self.counts) == max(self.counts)


def group_of(topology: Topology, devices: Sequence[int], sharing: int = 1) -> Group:
    """The group of these devices; `sharing` counts the groups that use one node's outer link at the same time."""
    return Group(topology.counts(devices), sharing)


def collective(kind: Kind, size_bytes: float, group: Group, topology: Topology, algorithm: Algorithm = "best") -> float:
    """Seconds of a collective on `size_bytes` of the full logical tensor; 0 for one rank.

    `best` takes the fastest of the algorithms that the group allows. ValueError for negative bytes, an unknown kind, or two
    storeys on a group that has one, or nodes that differ.
    """
    if not (size_bytes >= 0 and math.isfinite(size_bytes)):
        raise ValueError(f"{kind} of {size_bytes} bytes")
    if kind not in KINDS:
        raise ValueError(f"unknown collective {kind!r}; there are {', '.join(KINDS)}")
    if group.size == 1:
        return 0.0
    if kind == "all_to_all":
        return _all_to_all(size_bytes, group, topology)
    passes = 2 if kind == "all_reduce" else 1
    if algorithm != "best":
        return _one_way(algorithm, size_bytes, group, topology, passes)
    return min(_one_way(name, size_bytes, group, topology, passes) for name in _possible(group))


def _possible(group: Group) -> tuple[Algorithm, ...]:
    two_storeys = group.spans and group.even and group.counts[0] > 1
    return ("ring", "tree", "hierarchical") if two_storeys else ("ring", "tree")


def _slowest(group: Group, topology: Topology) -> tuple[float, float]:
    """(alpha, B) of a ring through the group: the slowest of its links sets the pace."""
    if not group.spans:
        return topology.inside.latency_s, topology.inside.bytes_per_s
    shared = topology.between.bytes_per_s / group.sharing
    if max(group.counts) == 1:
        return topology.between.latency_s, shared
    return max(topology.between.latency_s, topology.inside.latency_s), min(topology.inside.bytes_per_s, shared)


def _one_way(algorithm: Algorithm, size_bytes: float, group: Group, topology: Topology, passes: int) -> float:
    """`passes` times a reduce-scatter or all-gather; an all-reduce is one of each."""
    n = group.size
    alpha, rate = _slowest(group, topology)
    if algorithm == "ring":
        return passes * ((n - 1) * alpha + (n - 1) / n * size_bytes / rate)
    if algorithm == "tree":
        # All-reduce as a tree up and down, pipelined: every byte passes each link once a way. Gathering by doubling instead.
        moved = 1.0 if passes == 2 else (n - 1) / n
        return passes * (math.ceil(math.log2(n)) * alpha + moved * size_bytes / rate)
    if algorithm != "hierarchical":
        raise ValueError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    if "hierarchical" not in _possible(group):
        raise ValueError(f"two storeys need equal nodes of more than one rank each, got {group.counts}")
    g, s, inner, outer = group.counts[0], len(group.counts), topology.inside, topology.between
    within = (g - 1) * inner.latency_s + (g - 1) / g * size_bytes / inner.bytes_per_s
    across = (s - 1) * outer.latency_s + (s - 1) / s * size_bytes * group.sharing / outer.bytes_per_s
    return passes * (within + across)


def _all_to_all(size_bytes: float, group: Group, topology: Topology) -> float:
    """Every rank sends 1/n of its b/n to each other rank; a node's outgoing bytes share its link."""
    n, inner, outer = group.size, topology.inside, topology.between
    most = max(group.counts)
    within = (most - 1) / n**2 * size_bytes / inner.bytes_per_s if most > 1 else 0.0
    alpha = inner.latency_s if most > 1 else 0.0
    if not group.spans:
        return alpha + within
    leaving = max(count * (n - count) for count in group.counts) / n**2 * size_bytes
    return max(alpha, outer.latency_s) + max(within, leaving * group.sharing / outer.bytes_per_s)


def send(size_bytes: float, topology: Topology, sender: int, receiver: int) -> float:
    """Seconds to send `size_bytes` from one device to another; 0 to itself."""
    if sender == receiver:
        return 0.0
    same = topology.node_of(sender) == topology.node_of(receiver)
    return _alone(size_bytes, topology.stream_inside if same else topology.stream_between)


def transfer(size_bytes: float, topology: Topology, senders: Sequence[int], receivers: Sequence[int]) -> float:
    """Seconds to hand a tensor, cut evenly among `senders`, to `receivers` that hold it cut evenly too.

    Streams run side by side, at most one a device; what leaves a node shares the node's link. Where a piece may stay in its
    node it does. Departs from the DAPPLE planner's constants, which take a node's collective bandwidth for whole tensors.
    """
    if not senders or not receivers:
        raise ValueError("a transfer needs a sender and a receiver")
    leaving, arriving = _shares(topology, senders), _shares(topology, receivers)
    staying = sum(min(share, arriving.get(node, 0.0)) for node, share in leaving.items())
    streams = min(len(senders), len(receivers))
    within = size_bytes * staying
    seconds = within / streams / topology.stream_inside.bytes_per_s
    alpha = topology.stream_inside.latency_s if staying > 0 else 0.0
    crossing = size_bytes * (1 - staying)
    if staying < 1 - 1e-12:
        out = max(max(share - arriving.get(node, 0.0), 0.0) for node, share in leaving.items()) * size_bytes
        into = max(max(share - leaving.get(node, 0.0), 0.0) for node, share in arriving.items()) * size_bytes
        alone = crossing / streams / topology.stream_between.bytes_per_s
        seconds = max(seconds, alone, max(out, into) / topology.between.bytes_per_s)
        alpha = max(alpha, topology.stream_between.latency_s)
    return alpha + seconds


def _shares(topology: Topology, devices: Sequence[int]) -> dict[int, float]:
    shares: dict[int, float] = {}
    for device in devices:
        node = topology.node_of(device)
        shares[node] = shares.get(node, 0.0) + 1 / len(devices)
    return shares


def _alone(size_bytes: float, link: Link) -> float:
    if size_bytes < 0:
        raise ValueError(f"a message of {size_bytes} bytes")
    return link.latency_s + size_bytes / link.bytes_per_s


def groups_of(topology: Topology, lines: Sequence[Sequence[int]]) -> tuple[Group, ...]:
    """The distinct groups of devices that communicate at the same time, each knowing how many share a node's outer link."""
    nodes = [{topology.node_of(device) for device in line} for line in lines]
    found = []
    for line, mine in zip(lines, nodes, strict=True):
        sharing = (
            max(sum(node in others and len(others) > 1 for others in nodes) for node in mine) if len(mine) > 1 else 1
        )
        found.append(group_of(topology, line, sharing))
    return tuple(dict.fromkeys(found))


def slowest(kind: Kind, size_bytes: float, groups: Sequence[Group], topology: Topology) -> float:
    """Seconds until the last of the groups has finished."""
    return max(collective(kind, size_bytes, group, topology) for group in groups)


def bucketed(
    kind: Kind, size_bytes: float, groups: Sequence[Group], topology: Topology, bucket: float = BUCKET
) -> float:
    """Seconds that a gradient adds where gradients travel in buckets: its bytes, and its share of a bucket's latency."""
    alone, latency = slowest(kind, size_bytes, groups, topology), slowest(kind, 0.0, groups, topology)
    return alone - latency * (1 - min(1.0, size_bytes / bucket))
