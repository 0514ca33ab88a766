"""Attention inside graphs of `torch.compile`, made of one piece."""

import pytest
import torch
from launching import run_python
from torch._dynamo.testing import CompileCounterWithBackend
from torch._logging import warning_once
from torch.utils.checkpoint import checkpoint

from longnet_hpc import LongNet, LongNetConfig, Pattern, SequencePlan, dilated_attention
from longnet_hpc.attention import branch
from longnet_hpc.block import Block
from longnet_hpc.compiler_mark import assume_constant_result
from longnet_hpc.errors import ConfigError
from longnet_hpc.positions import POSITIONS, rotary

PATTERN = (8, 32), (1, 3)
MICRO = LongNetConfig(
    vocab_size=17, layers=3, embed_dim=16, heads=4, kv_heads=2, segment_lengths=(8, 32), dilation_rates=(1, 3)
)
SOFTMAX_SUM = branch.softmax_sum
CHECKPOINTING = {"nothing": (False, True), "all but attention": (True, True), "all": (True, False)}


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_same(function, inputs, tolerance=0.0):
    """Compare output and gradients of a function with those of its compiled form."""
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for form in (function, compiled(function)):
        out = form(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_a_plan_is_one_graph(kv_heads):
    plan = SequencePlan.build(Pattern.from_lists(*PATTERN), 48)
    inputs = [torch.randn(2, 48, heads, 8) for heads in (4, kv_heads, kv_heads)]
    assert_same(lambda q, k, v: plan.attention(q, k, v, causal=True), inputs)


def test_attention_whose_plan_is_there_is_one_graph():
    inputs = [torch.randn(1, 50, 4, 8) for _ in range(3)]
    assert_same(lambda q, k, v: dilated_attention(q, k, v, [9, 31], [1, 2]), inputs)  # the plain form comes first


@pytest.mark.parametrize("recomputed", list(CHECKPOINTING))
def test_block_is_one_graph(recomputed):
    block, plan = Block(MICRO, 0).double(), SequencePlan.build(MICRO.pattern, 48)
    rotation = rotary(0, 48, 48, 4, 1e4, torch.float64, torch.device("cpu"))
    # Rotations are complex products outside of graphs, and real ones within.
    assert_same(lambda x: block(x, plan, rotation, 0, recomputed), [torch.randn(1, 48, 16, dtype=torch.float64)], 1e-12)


@pytest.mark.parametrize("name", list(POSITIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_rotation_equals_the_plain_one(name, dtype):
    rotation = POSITIONS[name](40, 6, 100, 16, 1e4, dtype, torch.device("cpu"))
    q, k = torch.randn(2, 2, 6, 3, 16, dtype=dtype)
    assert_same(lambda q, k: torch.stack(rotation.apply(q, k)), [q, k], 2 * torch.finfo(dtype).eps)


def micro_model(recomputed="nothing", half_residual=False, **changes):
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(**{**vars(MICRO), **changes}))
    model.activation_checkpointing, model.keep_attention = CHECKPOINTING[recomputed]
    model.half_residual = half_residual
    return model


def loss_and_gradients(model, half=False, dropout_seed=0):
    x = torch.randint(0, 17, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.loss(x, x.flip(1), dropout_seed=dropout_seed)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("recomputed", list(CHECKPOINTING))
@pytest.mark.parametrize("half", [False, True])
def test_compiled_model_of_more_layers_than_graphs_are_kept_equals_the_plain_one(recomputed, half):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = (micro_model(recomputed, half_residual=half, layers=10) for _ in range(2))
    model.compile_blocks(counter)
    loss_and_gradients(model, half)
    results = [loss_and_gradients(each, half, dropout_seed=1) for each in (model, plain)]  # as in a second step
    assert counter.frame_count == 2  # of blocks, and of the last norm
    scale = max(float(grad.abs().max()) for grad in results[1])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=scale * (2e-2 if half else 1e-5))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("recomputed", "again"), [("nothing", 0), ("all but attention", 0), ("all", 1)])
def test_checkpointing_computes_attention_again_only_where_it_is_not_kept(recomputed, again, is_compiled, monkeypatch):
    torch.compiler.reset()
    model, plan, calls = micro_model(recomputed), SequencePlan.build(MICRO.pattern, 48), []
    monkeypatch.setattr(branch, "softmax_sum", lambda q: calls.append(q) or SOFTMAX_SUM(q))
    if is_compiled:
        model.compile_blocks("aot_eager")
    x = torch.zeros(1, 48, dtype=torch.int64)
    loss = model.loss(x, x, plan)
    assert len(calls) == MICRO.layers
    loss.backward()
    assert len(calls) == MICRO.layers * (1 + again)


def test_blocks_with_dropout_are_not_compiled():
    with pytest.raises(ConfigError, match=r"dropout cannot be compiled, got 0\.1"):
        micro_model(dropout=0.1).compile_blocks()


def test_compiling_checkpointed_blocks_warns_of_nothing(caplog):
    torch.compiler.reset()
    warning_once.cache_clear()
    model = micro_model("all but attention")
    model.compile_blocks("aot_eager")
    loss_and_gradients(model)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_checkpointed_attention_has_the_same_gradients():
    plan = SequencePlan.build(Pattern.from_lists(*PATTERN), 48)
    inputs = [torch.randn(1, 48, 4, 8, requires_grad=True) for _ in range(3)]
    outs = (
        plan.attention(*inputs, causal=True),
        checkpoint(lambda *x: plan.attention(*x, causal=True), *inputs, use_reentrant=False),
    )
    results = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_operators_keep_the_promises_of_torch_library():
    plan = SequencePlan.build(Pattern.from_lists(*PATTERN), 48)
    inputs = [torch.randn(1, 48, 4, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.longnet_hpc.mixture.default, (*inputs, plan.handle, True, 0.3))


def test_second_derivative_is_refused():
    inputs = [torch.randn(1, 16, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    (grad,) = torch.autograd.grad(dilated_attention(*inputs, [16], [1]).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_log_sum_exp_takes_no_part_in_gradients():
    inputs = [torch.randn(1, 16, 2, 4, requires_grad=True) for _ in range(3)]
    out, lse = dilated_attention(*inputs, [16], [1], return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_graphs_of_plans_that_differ_are_not_taken_for_each_other_by_a_cache_on_disk():
    """A cache knows a graph by its constants; in another process, by counting alone, another plan had this number."""
    plans = [SequencePlan.build(MICRO.pattern, length) for length in (48, 56)]
    contents = {plan.handle >> 20 for plan in plans}
    assert len(contents) == 2
    again = SequencePlan(MICRO.pattern, plans[0].partition, None, "auto")
    assert again.handle >> 20 == plans[0].handle >> 20
    assert again.handle != plans[0].handle


def test_mark_is_that_of_torch():
    assert vars(assume_constant_result(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1))


def test_commands_do_not_load_the_compiler_where_nothing_is_compiled(tmp_path):
    (tmp_path / "text").write_text("long ago " * 100)
    corpus = str(tmp_path / "corpus.h5")
    run, there = str(tmp_path / "run"), ["--corpus", corpus, "--device", "cpu"]
    train = ["train", "--folder", run, "--steps", "1", "--seq-len", "64", *there]
    code = (
        "import sys\nfrom longnet_hpc.run import main\n"
        f"assert main(['prepare', {str(tmp_path / 'text')!r}, '--output', {corpus!r}]) == 0\n"
        f"assert main({train!r}) == 0\nassert main({['eval', '--checkpoint', run, '--stream', *there]!r}) == 0\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
