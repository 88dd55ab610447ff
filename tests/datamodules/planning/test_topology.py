"""Machines: what loads, what is refused, and that a message says the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.planning.topology import Link, Topology, TopologyError, load_topology, topologies


@pytest.mark.parametrize("name", topologies())
def test_every_machine_loads_survives_its_dict_and_numbers_its_devices(name: str) -> None:
    machine = load_topology(name)
    assert machine.name == name
    assert machine.source
    assert Topology.from_dict(machine.to_dict()) == machine
    counted = [machine.node_of(device) for device in range(machine.devices)]
    assert counted == sorted(counted)
    assert [counted.count(node) for node in range(machine.nodes)] == list(machine.sizes)


def test_the_machines_of_the_paper_are_there() -> None:
    sizes = {name: load_topology(name).sizes for name in topologies()}
    assert {sizes[f"v100_{n}x8"] for n in (1, 2, 3, 4)} == {(8,) * n for n in (1, 2, 3, 4)}
    assert sizes["v100_flat_16x1"] == (1,) * 16
    assert sizes["v100_asymmetric_2_1"] == (2, 1)
    assert sizes["loopback_2"] == (2,)
    assert sizes["pcie_1x8"] == (8,)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_link_without_bandwidth_is_refused(rate: float) -> None:
    with pytest.raises(TopologyError, match="bandwidth must be above 0"):
        Link(1e-6, rate)


@pytest.mark.parametrize("latency", [-1.0, float("inf"), float("nan")])
def test_a_link_with_an_impossible_latency_is_refused(latency: float) -> None:
    with pytest.raises(TopologyError, match="latency"):
        Link(latency, 1e9)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nodes": 0}, "nodes"),
        ({"devices_per_node": 2.5}, "devices_per_node"),
        ({"memory_bytes": 0}, "memory_bytes"),
        ({"memory_bytes_per_s": -1.0}, "memory_bytes_per_s"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"usable_memory": 1.5}, "usable_memory"),
        ({"launch_s": -1e-6}, "launch_s"),
        ({"flops_per_s": {"float16": 1e12}}, "float32"),
        ({"flops_per_s": {"float32": 0.0}}, "float32"),
        ({"node_sizes": (8, 8)}, "node_sizes"),
    ],
)
def test_impossible_values_are_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(TopologyError, match=named):
        replace(load_topology("v100_1x8"), **change)


def test_files_that_are_wrong_say_how(tmp_path) -> None:
    plain = load_topology("v100_1x8").to_dict()
    for broken, message in [
        ({**plain, "warp": 9}, "unknown .*warp"),
        ({k: v for k, v in plain.items() if k != "inside"}, "inside missing"),
        ({**plain, "inside": {"latency_s": 0, "bytes_per_s": 0}}, "inside: .*bandwidth"),
        ({**plain, "memory_bytes": "much"}, "memory_bytes cannot be 'much'"),
    ]:
        with pytest.raises(TopologyError, match=message):
            Topology.from_dict(broken)
    with pytest.raises(TopologyError, match="v100_2x8"):
        load_topology("v100_2x9")
    (tmp_path / "own.yaml").write_text("- 1\n")
    with pytest.raises(TopologyError, match="holds no topology"):
        load_topology(tmp_path / "own.yaml")


def test_groups_of_devices_and_other_meshes() -> None:
    machine = load_topology("v100_asymmetric_2_1")
    assert machine.counts([0, 1, 2]) == (2, 1)
    assert machine.counts([2]) == (1,)
    with pytest.raises(ValueError, match="devices 0 to 2"):
        machine.counts([3])
    with pytest.raises(ValueError, match="twice"):
        machine.counts([0, 0])
    other = machine.meshed(3, 4)
    assert other.sizes == (4, 4, 4)
    assert other.inside == machine.inside
    assert load_topology("v100_2x8").meshed(2, 8) == load_topology("v100_2x8")
