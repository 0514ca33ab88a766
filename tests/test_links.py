"""Who exchanges with whom when links are measured: all ranks agree, however they sit on nodes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_hpc.comm.launch import Launch
from longnet_hpc.scaling import links
from longnet_hpc.scaling.links import measure_links, pairs_between, pairs_within


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=12))
def test_what_one_sends_another_receives_however_ranks_sit_on_nodes(nodes):
    within, between = pairs_within(nodes), pairs_between(nodes)
    for pairs, is_within in ((within, True), (between, False)):
        for rank, (to, source) in enumerate(pairs):
            assert (to is None) == (source is None)
            if to is not None:
                assert pairs[to][1] == rank
                assert pairs[source][0] == rank
                assert (nodes[to] == nodes[rank]) == is_within
    for node in set(nodes):
        alone = sum(its is None for its, where in zip((to for to, _ in within), nodes, strict=True) if where == node)
        assert alone == nodes.count(node) % 2
    assert any(to is not None for to, _ in between) == (len(set(nodes)) > 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
def test_links_are_measured_on_any_number_of_nodes(comm, monkeypatch, ranks_per_node):
    node_rank, node = comm.rank % ranks_per_node, comm.rank // ranks_per_node
    node_size = min(comm.size, (node + 1) * ranks_per_node) - node * ranks_per_node
    launch = Launch(comm, comm.rank, comm.size, node_rank, node_size, torch.device("cpu"), None, "an MPI library")
    monkeypatch.setattr(links.socket, "gethostname", lambda: f"node{node}")
    found = measure_links(launch)
    assert len({comm.allgather(found)[0], found}) == 1
    assert ("within nodes are taken" in found.remark) == (ranks_per_node == 1)
    assert ("between nodes are taken" in found.remark) == (ranks_per_node >= comm.size)
