"""On a GPU: the same results as the oracle, on one rank and, under mpirun, on several that may share the GPU."""

import oracle
import pytest
import torch
from cases import HOPPER_CASES, Case, cases
from hypothesis import given, settings
from parallel_case import assert_all_close, cut, own_slice
from streamed import STREAMED_CASES, streamed_attention
from torch.nn import functional as F

from longnet_hpc import LongNetConfig, dilated_attention
from longnet_hpc.comm import all_reduce_sum, transport
from longnet_hpc.comm.buffers import start_alltoallv
from longnet_hpc.comm.launch import start
from longnet_hpc.config import TrainConfig
from longnet_hpc.data import Corpus, prepare
from longnet_hpc.gelu_norm import gelu_norm
from longnet_hpc.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def on_gpu(case, dtype, lengths=(None,), rank=0, comm=None, backend="auto"):
    q, k, v, dout = case.tensors(dtype)
    expected = oracle.attention_with_gradients(q, k, v, dout, *case.pattern, case.causal)
    if comm is not None:
        q, k, v, dout, *expected = (own_slice(x, lengths, rank) for x in (q, k, v, dout, *expected))
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(
        *leaves, *case.pattern, causal=case.causal, comm=comm, backend=backend, return_lse=True
    )
    grads = torch.autograd.grad(out, leaves, dout.cuda())
    return [x.detach().cpu() for x in (out, lse, *grads)], expected


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_random_cases_equal_the_oracle(dtype, case):
    for actual, expected in zip(*on_gpu(case, dtype), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_library_kernels_equal_the_oracle_with_merged_statistics(dtype, causal, head_dim):
    case = Case(2, 515, 6, 3, head_dim, (128, 300, 515), (1, 2, 6), causal, seed=head_dim)
    for actual, expected in zip(*on_gpu(case, dtype, backend="library"), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_cudnn_kernels_equal_the_oracle_with_merged_statistics(dtype, causal, head_dim, kv_heads):
    case = Case(2, 1090, 6, kv_heads, head_dim, (300, 545, 1090), (1, 2, 4), causal, seed=head_dim)
    for actual, expected in zip(*on_gpu(case, dtype, backend="cudnn"), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", HOPPER_CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper_kernels_equal_the_oracle(dtype, causal, head_dim, name):
    needs_hopper()
    batch, seq, heads, kv_heads, *pattern = HOPPER_CASES[name]
    case = Case(batch, seq, heads, kv_heads, head_dim, *pattern, causal, seed=head_dim)
    for actual, expected in zip(*on_gpu(case, dtype, backend="hopper"), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", STREAMED_CASES)
@pytest.mark.parametrize("backend", ["hopper", "cudnn", "library"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_equal_the_oracle(dtype, backend, name):
    needs_hopper()
    batch, seq, heads, kv_heads, w, r, bounds = STREAMED_CASES[name]
    tensors = [x.cuda() for x in Case(batch, seq, heads, kv_heads, 64, w, r, True, seed=4).tensors(dtype)]
    actual = streamed_attention(*tensors, (w, r), bounds, backend=backend)
    expected = oracle.attention_with_gradients(*(x.cpu() for x in tensors), w, r, True)
    for ours, right in zip(actual, (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(ours.double().cpu(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["hopper", "library"])
def test_deterministic_algorithms_give_the_same_bits(backend):
    if backend == "hopper":
        needs_hopper()
    x = torch.randn(4, 1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            leaves = [part.clone().requires_grad_() for part in x[:3]]
            out = dilated_attention(*leaves, [512, 4096], [1, 3], causal=True, backend=backend)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, x[3])])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_training_has_the_same_bits_twice(tmp_path, dtype):
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(2000)))
    model = LongNetConfig(layers=2, embed_dim=128, heads=2, segment_lengths=(512, 4096), dilation_rates=(1, 3))
    config = TrainConfig(model=model, seq_len=4096, steps=4, dtype=dtype, deterministic=True)
    results = []
    try:
        with Corpus(prepare([tmp_path / "text.txt"], tmp_path / "corpus.h5")) as corpus:
            for _ in range(2):
                trainer = Trainer(config, start(device="cuda"), corpus)
                lines = [trainer.step() for _ in range(config.steps)]
                trainer.close()
                results.append(([line["loss"] for line in lines], trainer.optimizer.state()))
    finally:
        torch.use_deterministic_algorithms(False)
    (losses, state), (other_losses, other_state) = results
    assert losses == other_losses
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_forward_is_captured_in_a_graph():
    needs_hopper()
    x = torch.randn(3, 2, 1024, 4, 64, device="cuda", dtype=torch.bfloat16)

    def attention():
        return dilated_attention(*x, [256, 1024], [1, 4], causal=True, backend="hopper")

    expected = attention()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["hopper", "library"])
def test_a_training_step_is_captured_in_a_graph(backend):
    needs_hopper()
    q, k, v, dout = torch.randn(4, 2, 1024, 4, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def gradients():
        out = dilated_attention(*leaves, [256, 1024], [1, 4], causal=True, backend=backend)
        return torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the first time everything is compiled and cached
        gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        for leaf, new in zip(leaves, (k, v, q), strict=True):
            leaf.copy_(new)
    graph.replay()
    for actual, expected in zip(captured, gradients(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def needs_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def test_layouts_of_output_and_gradient_may_change_between_equal_queries():
    """Torch looks cuDNN's plans up by the layouts of q, k and v alone."""
    case = Case(2, 600, 4, 4, 64, (600,), (1,), True, seed=0)
    q, k, v, dout = (x.cuda() for x in case.tensors(torch.bfloat16))
    expected = oracle.attention_with_gradients(*(x.cpu() for x in (q, k, v, dout)), *case.pattern, case.causal)[2:]
    for lay_out in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*leaves, *case.pattern, causal=True, backend="cudnn")
        for actual, right in zip(torch.autograd.grad(out, leaves, lay_out(dout)), expected, strict=True):
            torch.testing.assert_close(actual.double().cpu(), right, atol=6e-2, rtol=6e-2)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", list(transport.Transport))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_on_gpus_equal_the_oracle(comm, dtype, way, monkeypatch):
    if way is transport.Transport.DIRECT and transport.decide_transport(comm) is not way:
        pytest.skip("this MPI does not take device memory")
    monkeypatch.setattr(transport, "_decided", way)
    torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    for seed in range(12):
        case = Case(1 + seed % 2, 200 + seed, 4, 2, 8 * (1 + seed % 2), (64, 150, 4096), (1, 2, 5), seed % 3 > 0, seed)
        lengths = cut(case.seq, comm.size, seed)
        actual, expected = on_gpu(case, dtype, lengths, comm.rank, comm)
        assert_all_close(comm, zip(actual, expected, strict=True), TOLERANCE[dtype])
    total = all_reduce_sum(comm, torch.full((3,), comm.rank + 1.0, device="cuda", dtype=dtype))
    assert_all_close(comm, [(total.cpu(), torch.full((3,), comm.size * (comm.size + 1) / 2).to(dtype))], 0.0)


def test_a_rank_computes_beside_the_default_stream():
    before = torch.cuda.current_stream()
    try:
        start(device="cuda")
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
    finally:
        torch.cuda.set_stream(before)


@pytest.mark.mpi(min_size=2)
def test_exchange_is_over_before_kernels_that_were_launched_after_its_rows(comm):
    """On CUDA's default stream it would wait for them: a rank computes on another (see `launch`)."""
    if transport.decide_transport(comm) is not transport.Transport.DIRECT:
        pytest.skip("this MPI does not take device memory")
    torch.cuda.set_device(comm.rank % torch.cuda.device_count())
    counts, starts = [4096] * comm.size, [0] * comm.size
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = torch.full((4096, 64), float(comm.rank), device="cuda")
        for warmed_up in (False, True):
            comm.Barrier()
            pending = start_alltoallv(comm, rows, counts, starts, counts, when_ready=True)
            kernel = torch.cuda.Event()
            torch.cuda._sleep(10**9)  # more than half a second
            kernel.record()
            while not pending.test():
                assert not (warmed_up and kernel.query())
            torch.cuda.synchronize()
        received = pending.finish().view(comm.size, -1).cpu()
    assert (received == torch.arange(float(comm.size)).unsqueeze(1)).all()


def check_close(x, pattern, **options):
    """Compare with float64 on the CPU."""
    leaves = [part.detach().requires_grad_() for part in x]
    out = dilated_attention(*leaves, *pattern, **options)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    wide = [part.detach().double().cpu().requires_grad_() for part in x]
    expected = dilated_attention(*wide, *pattern, **options)
    expected_grads = torch.autograd.grad(expected.sum(), wide)
    for actual, right in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.double().cpu(), right, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_pieces_than_a_launch_may_have_are_computed(dtype):
    x = torch.randn(3, 1, 4 * 70000, 1, 8, device="cuda", dtype=dtype)
    check_close(x, ([4], [1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_kernels_cannot_load_as_they_lie_are_copied(dtype):
    shapes = {
        "odd offset in each row": torch.randn(3, 1, 100, 2, 9, device="cuda", dtype=dtype)[..., 1:],
        "odd stride": torch.randn(3, 1, 100, 2, 12, device="cuda", dtype=dtype)[..., :8],
        "odd storage offset": torch.randn(3 * 1600 + 1, device="cuda", dtype=dtype)[1:].view(3, 1, 100, 2, 8),
    }
    for x in shapes.values():
        check_close(x, ([16, 100], [1, 2]), causal=True)


def test_row_strides_beyond_32_bits_are_reached():
    x = torch.randn(3, 1, 2, 1, 4, device="cuda")
    far = torch.as_strided(torch.randn(2**31 + 64, device="cuda"), (1, 2, 1, 4), (0, 2**31, 0, 1))
    check_close([far, x[1], x[2]], ([2], [1]))


@pytest.mark.parametrize("rows", [1, 100, 70001])
@pytest.mark.parametrize("features", [3, 100, 1024, 3072, 4096, 6144, 10240, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_norm_of_gelu_equals_float64(dtype, features, rows, is_compiled):
    if rows * features > 300_000_000 or (is_compiled and rows > 1):
        pytest.skip("seen with fewer")
    torch.compiler.reset()
    h, dout = torch.randn(2, rows, features, device="cuda").to(dtype)
    weight, bias = torch.randn(2, features, device="cuda")
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    out = (torch.compile(gelu_norm, fullgraph=True) if is_compiled else gelu_norm)(*leaves, 1e-5)
    grads = torch.autograd.grad(out, leaves, dout)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = F.layer_norm(F.gelu(wide[0]), (features,), wide[1], wide[2], 1e-5)
    expected_grads = torch.autograd.grad(expected, wide, dout.double())
    for actual, right in zip((out, *grads), (expected, *expected_grads), strict=True):
        bound = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[actual.dtype]
        bound *= max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(actual.double(), right, atol=bound, rtol=0)
