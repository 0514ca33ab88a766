"""Sequence parallelism beside torch's own parallelism: a mesh of ranks, DistributedDataParallel, FSDP2."""

import pytest
import torch
from parallel_case import assert_all_close, cut
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from longnet_hpc import LongNet, LongNetConfig, SequencePlan
from longnet_hpc.comm import allgather_objects
from longnet_hpc.comm.mesh import split
from longnet_hpc.comm.process_group import init_process_group
from longnet_hpc.errors import LaunchError, ShapeError

pytestmark = pytest.mark.mpi(min_size=2)

SEQ = 48


@pytest.fixture
def process_group(comm):
    init_process_group(comm)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def mesh(comm):
    """Two ranks a sequence, or all where they are not even."""
    made = split(comm, sequence=comm.size if comm.size % 2 else 2)
    yield made
    for its in made:
        its.Free()


def micro_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "layers": 2, "embed_dim": 16, "heads": 4}
    return LongNet(LongNetConfig(**sizes, segment_lengths=(8, 32), dilation_rates=(1, 3)))


class Step:
    """Tokens and targets of one step, a sequence for each group of ranks; this rank's part; the right gradients."""

    def __init__(self, comm, mesh):
        x, y = (
            torch.randint(0, 17, (mesh.data.size, SEQ), generator=torch.Generator().manual_seed(seed))
            for seed in range(2)
        )
        lengths = cut(SEQ, mesh.sequence.size, 1)
        own = slice(mesh.data.rank, mesh.data.rank + 1)
        self.tokens, self.targets = (each[own].split(lengths, 1)[mesh.sequence.rank] for each in (x, y))
        model = micro_model()
        self.plan = SequencePlan.build(model.config.pattern, lengths[mesh.sequence.rank], comm=mesh.sequence)
        # Data parallelism of torch takes the mean over all ranks, of what is each rank's share of a sum.
        self.factor = comm.size / x.numel()
        (model.loss(x, y) / x.numel()).backward()
        self.expected = [parameter.grad for parameter in model.parameters()]


@pytest.mark.usefixtures("process_group")
def test_data_parallel_model_has_the_gradients_of_one_process(comm, mesh):
    step, model = Step(comm, mesh), DistributedDataParallel(micro_model())
    for _ in range(2):  # the second step has other buckets
        model.zero_grad()
        logits = model(step.tokens, step.plan)
        loss = F.cross_entropy(logits.flatten(0, 1), step.targets.flatten(), reduction="sum")
        (loss * step.factor).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert_all_close(comm, list(zip(grads, step.expected, strict=True)), 1e-6)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("replicated", [False, True])
def test_fully_sharded_model_has_the_gradients_of_one_process(comm, mesh, replicated):
    step, model = Step(comm, mesh), micro_model()
    shape, names = ((mesh.data.size, mesh.sequence.size), ("data", "sequence")) if replicated else ((comm.size,), None)
    devices = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=devices)
    fully_shard(model, mesh=devices)
    register_fsdp_forward_method(model, "loss")
    for _ in range(2):
        model.zero_grad()
        (model.loss(step.tokens, step.targets, step.plan) * step.factor).backward()
        grads = [parameter.grad.full_tensor() for parameter in model.parameters()]
        assert_all_close(comm, list(zip(grads, step.expected, strict=True)), 1e-6)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < model.parameter_count


def test_mesh_has_neighbours_in_a_sequence(comm):
    made = split(comm, sequence=comm.size)
    assert (made.sequence.rank, made.data.size) == (comm.rank, 1)
    alone = split(comm, sequence=1)
    assert (alone.sequence.size, alone.data.rank) == (1, comm.rank)
    for its in (*made, *alone):
        its.Free()
    if comm.size == 4:
        pairs = split(comm, sequence=2)
        assert allgather_objects(pairs.sequence, comm.rank) == [comm.rank // 2 * 2, comm.rank // 2 * 2 + 1]
        assert allgather_objects(pairs.data, comm.rank) == [comm.rank % 2, comm.rank % 2 + 2]
        for its in pairs:
            its.Free()
    assert split(None, sequence=1) == (None, None)


@pytest.mark.parametrize("wrong", [0, -1, 5, True, "2"])
def test_ranks_of_a_sequence_that_do_not_divide_all_are_one_clear_error(comm, wrong):
    with pytest.raises(LaunchError, match="must divide the .* ranks there are, got"):
        split(comm, sequence=wrong)


def test_meshes_that_differ_between_ranks_are_an_error_on_all(comm):
    with pytest.raises(ShapeError, match=f"ranks that share a sequence 1 is not {comm.size}"):
        split(comm, sequence=1 if comm.rank == 1 else comm.size)


def test_process_group_has_the_ranks_of_its_communicator(comm, mesh):
    init_process_group(mesh.data)
    try:
        assert (distributed.get_rank(), distributed.get_world_size()) == (mesh.data.rank, mesh.data.size)
        total = torch.tensor([float(comm.rank)])
        distributed.all_reduce(total)
        assert total.item() == sum(allgather_objects(mesh.data, comm.rank))
        with pytest.raises(LaunchError, match="has a process group already"):
            init_process_group(mesh.data)
    finally:
        distributed.destroy_process_group()


def test_device_that_is_not_there_on_one_rank_is_an_error_on_all(comm):
    with pytest.raises(LaunchError, match="device must be cpu, or cuda where torch sees a GPU, got 'abacus'"):
        init_process_group(comm, device="abacus" if comm.rank == 1 else "cpu")
    assert not distributed.is_initialized()
