"""The fast layers give what PyTorch's give: numbers, gradients, dropout, files; and they stay out of what is saved."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from kallos.core.devices import Device, has_bf16_products, trainer_kwargs
from kallos.models import recurrent
from kallos.models.recurrent import (
    MIXED_FROM,
    FastGRU,
    FastLayers,
    FastLSTM,
    MixedGRU,
    MixedLSTM,
    use_fast_layers,
    use_plain_layers,
)

FAST = {nn.GRU: FastGRU, nn.LSTM: FastLSTM}
MIXED = {nn.GRU: MixedGRU, nn.LSTM: MixedLSTM}
KINDS = pytest.mark.parametrize("kind", FAST)
MIXES = pytest.mark.skipif(not has_bf16_products(), reason="this processor has no products of bf16 (AVX512-BF16)")


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's own sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list:
    """Grows by one with each call of a layer that takes the fast path."""
    calls, run = [], recurrent._run
    monkeypatch.setattr(recurrent, "_run", lambda *given: calls.append(given) or run(*given))
    return calls


def pair(kind: type, *sizes: int, **more: object) -> tuple[nn.RNNBase, nn.RNNBase]:
    """PyTorch's layer and the fast one, with the same weights."""
    plain, fast = kind(*sizes, **more), FAST[kind](*sizes, **more)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


class Stack(nn.Module):
    """PyTorch's single layers with the weights of a stack, and between them the masks that the fast layers draw."""

    def __init__(self, stack: nn.RNNBase):
        super().__init__()
        more = {"bias": stack.bias, "batch_first": stack.batch_first}
        sizes = [stack.input_size, *[stack.hidden_size] * stack.num_layers]
        self.layers = nn.ModuleList([type(stack)(*pair, **more) for pair in itertools.pairwise(sizes)])
        self.dropout, self.batch_first = stack.dropout, stack.batch_first
        for own, known in zip(self.parameters(), stack.parameters(), strict=True):
            own.data = known.detach().clone()

    def forward(self, x: torch.Tensor, first: torch.Tensor | tuple | None) -> tuple:
        x, lasts = x.transpose(0, 1) if self.batch_first else x, []
        for n, layer in enumerate(self.layers):
            layer.batch_first = False
            x = recurrent._dropout(x, self.dropout, True) if n else x
            states = None if first is None else [state[n : n + 1].contiguous() for state in flat(first)]
            states = states[0] if states and isinstance(layer, nn.GRU) else states and tuple(states)
            x, last = layer(x, states)
            lasts.append(flat(last))
        together = tuple(torch.cat(tensors) for tensors in zip(*lasts, strict=True))
        return x.transpose(0, 1) if self.batch_first else x, together[0] if len(together) == 1 else together


def flat(states: torch.Tensor | tuple) -> list[torch.Tensor]:
    return [states] if isinstance(states, torch.Tensor) else list(states)


def results(layer: nn.RNNBase, x: torch.Tensor, states: tuple = (), seed: int = 0) -> list[torch.Tensor]:
    """Outputs, last states, and the gradients of a loss that weighs every one of them differently."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x, *states = (tensor.clone().requires_grad_() for tensor in (x, *states))
    first = (states[0] if len(states) == 1 else tuple(states)) if states else None
    output, last = layer(x, first)
    outputs = [output, *flat(last)]
    weigh = torch.Generator().manual_seed(seed + 1)
    loss = sum((torch.randn(one.shape, generator=weigh, dtype=one.dtype) * one).sum() for one in outputs)
    loss.backward()
    gradients = [tensor.grad for tensor in (x, *states, *layer.parameters()) if tensor.grad is not None]
    return [tensor.detach().clone() for tensor in (*outputs, *gradients)]


def difference(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    assert [one.shape for one in ones] == [other.shape for other in others]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in zip(ones, others, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(list(FAST)),
    hidden=st.integers(1, 70),
    inputs=st.integers(1, 20),
    n_layers=st.integers(1, 3),
    batch=st.integers(1, 20),
    steps=st.integers(1, 12),
    bias=st.booleans(),
    batch_first=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    with_states=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_pytorch(kind, hidden, inputs, n_layers, batch, steps, bias, batch_first, dropout, with_states, seed):
    torch.manual_seed(seed)
    more = {"bias": bias, "batch_first": batch_first, "dropout": dropout if n_layers > 1 else 0.0}
    plain, fast = pair(kind, inputs, hidden, n_layers, **more)
    layers = Stack(plain) if more["dropout"] else plain, fast
    x = torch.randn((batch, steps, inputs) if batch_first else (steps, batch, inputs))
    n_states = (1 if kind is nn.GRU else 2) * with_states
    states = [torch.randn(n_layers, batch, hidden) for _ in range(n_states)]
    plain, fast = (results(layer, x, states, seed) for layer in layers)
    assert difference(fast, plain) < 1e-5
    double = [
        results(copy.deepcopy(layer).double(), x.double(), [s.double() for s in states], seed) for layer in layers
    ]
    assert difference(*double) < 1e-11


@KINDS
def test_gradients_stand_up_to_finite_differences(kind):
    torch.manual_seed(0)
    layer = FAST[kind](3, 5, 2, batch_first=True).double()
    shapes = [(3, 4, 3), *[(2, 3, 5)] * (1 if kind is nn.GRU else 2)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def outputs(x, *states):
        output, last = layer(x, *states) if kind is nn.GRU else layer(x, states)
        return output, *flat(last)

    assert torch.autograd.gradcheck(outputs, tensors)
    weights = [*layer.parameters()]
    assert torch.autograd.gradcheck(lambda *_: outputs(*[tensor.detach() for tensor in tensors]), weights)


@KINDS
def test_the_sizes_of_the_search_space(kind):
    torch.manual_seed(0)
    for hidden, n_layers, batch, steps in ((32, 4, 32, 70), (97, 2, 64, 30), (256, 1, 128, 40)):
        layers = pair(kind, 6, hidden, n_layers, batch_first=True)
        plain, fast = (results(layer, torch.randn(batch, steps, 6, generator=torch.Generator().manual_seed(1)))
                       for layer in layers)  # fmt: skip
        assert difference(fast, plain) < 1e-5


@KINDS
def test_two_runs_are_equal_to_the_bit(kind):
    _, layer = pair(kind, 6, 40, 2, dropout=0.5)
    x = torch.randn(30, 33, 6)
    assert all(torch.equal(a, b) for a, b in zip(results(layer, x), results(layer, x), strict=True))


@KINDS
def test_dropout_is_that_of_pytorch_but_for_its_random_numbers(kind):
    """Mean and spread over many masks."""
    layers = pair(kind, 6, 24, 2, dropout=0.5)
    x = torch.randn(7, 3, 6)
    means, spreads = [], []
    for layer in layers:
        with torch.no_grad():
            draws = torch.stack([layer(x)[0] for _ in range(4000)])
        means.append(draws.mean(0))
        spreads.append(draws.std(0))
    errors = (spreads[0] ** 2 + spreads[1] ** 2).div(4000).sqrt()
    assert ((means[0] - means[1]).abs() < 5 * errors + 1e-6).all()
    torch.testing.assert_close(spreads[0], spreads[1], rtol=0.1, atol=1e-3)
    assert torch.equal(layers[1].eval()(x)[0], layers[1](x)[0])


@KINDS
def test_two_forwards_before_a_backward(kind):
    plain, fast = pair(kind, 6, 24, 2)
    one, two = torch.randn(2, 9, 7, 6)
    sums = []
    for layer in (plain, fast):
        layer.zero_grad()
        first, second = layer(one)[0], layer(two)[0]
        (first * second).sum().backward(retain_graph=True)
        once = [p.grad.clone() for p in layer.parameters()]
        (first * second).sum().backward()
        assert difference([p.grad / 2 for p in layer.parameters()], once) < 1e-6
        sums.append(once)
    assert difference(*sums) < 1e-5


@KINDS
def test_a_step_before_the_backward_is_refused_or_changes_nothing(kind):
    _, fast = pair(kind, 8, 24)
    x = torch.randn(9, 7, 8)
    output = fast(x)[0]
    with torch.no_grad():
        fast.weight_hh_l0 += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@KINDS
def test_frozen_parameters_and_strided_inputs(kind):
    layers = pair(kind, 6, 20, 2, batch_first=True)
    for layer in layers:
        layer.weight_hh_l0.requires_grad_(False)
        layer.bias_ih_l1.requires_grad_(False)
    wide = torch.randn(2, 9, 12, 8)
    for x in (wide[0, :, ::2, 1:7], wide.transpose(1, 2)[1, ..., :6], torch.randn(9, 1, 6).expand(9, 12, 6)):
        plain, fast = (results(layer, x) for layer in layers)
        assert difference(fast, plain) < 1e-5
    assert layers[1].weight_hh_l0.grad is None


@KINDS
def test_without_gradients(kind, taken: list):
    plain, fast = pair(kind, 6, 33, 2, batch_first=True)
    x = torch.randn(10, 20, 6)
    with torch.no_grad():
        ones, others = ([output, *flat(last)] for output, last in (layer.eval()(x) for layer in (fast, plain)))
    assert difference(ones, others) < 1e-6
    assert len(taken) == 1
    assert not any(one.requires_grad for one in ones)


@KINDS
@pytest.mark.parametrize(
    ("more", "change"),
    [
        ({"bidirectional": True}, lambda layer, x: (layer, x)),
        ({}, lambda layer, x: (layer, x[0])),
        ({}, lambda layer, x: (layer, x[:, :0])),
        ({}, lambda layer, x: (layer.bfloat16(), x.bfloat16())),
        ({}, lambda layer, x: (layer, pack_sequence(list(x)))),
    ],
    ids=["two directions", "no batch", "empty batch", "bfloat16", "packed"],
)
def test_what_is_not_covered_goes_to_pytorch(kind, more, change, taken: list):
    outputs = []
    for layer in pair(kind, 6, 8, **more):
        layer, x = change(layer, torch.linspace(-1, 1, 5 * 3 * 6).view(5, 3, 6))
        outputs.append(layer(x)[0])
    plain, fast = (output if isinstance(output, torch.Tensor) else output.data for output in outputs)
    assert torch.equal(plain, fast)
    assert not taken


def test_projections_and_autocast_go_to_pytorch(taken: list):
    x = torch.randn(5, 3, 6)
    plain, fast = pair(nn.LSTM, 6, 8, proj_size=4)
    assert torch.equal(plain(x)[0], fast(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        pair(nn.GRU, 6, 8)[1](x)
    assert not taken


@KINDS
@pytest.mark.parametrize("states", [torch.zeros(1, 3, 9), torch.zeros(2, 3, 8), torch.zeros(1, 4, 8)])
def test_wrong_arguments_are_named_by_pytorch(kind, states):
    given = states if kind is nn.GRU else (states, states)
    messages = []
    for layer in pair(kind, 6, 8):
        for x, first in ((torch.randn(5, 3, 6), given), (torch.randn(5, 3, 7), None)):
            with pytest.raises(RuntimeError) as error:
                layer(x, first)
            messages.append(str(error.value))
    assert messages[:2] == messages[2:]


@KINDS
def test_traced_and_exported(kind, taken: list):
    plain, fast = pair(kind, 6, 8, batch_first=True)
    x = torch.randn(3, 5, 6)
    traced = torch.jit.trace(fast.eval(), x, check_trace=False)
    program = torch.export.export(fast, (x,)).module()
    assert not taken
    for other in (traced, program):
        torch.testing.assert_close(other(x)[0], plain.eval()(x)[0])


@KINDS
def test_copies_and_state_dicts(kind):
    plain, fast = pair(kind, 6, 8, 2)
    x = torch.randn(5, 3, 6)
    assert list(fast.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fast.state_dict())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)):
        assert type(other) is FAST[kind]
        assert torch.equal(other(x)[0], fast(x)[0])


@KINDS
def test_nan_and_infinity_come_out(kind):
    _, fast = pair(kind, 6, 12)
    for value in (torch.nan, torch.inf):
        x = torch.randn(5, 3, 6)
        x[1, 2, 3] = value
        output = fast(x)[0]
        assert output[:, :2].isfinite().all()
        if value is torch.nan:
            assert output[1:, 2].isnan().all()
    with torch.no_grad():
        fast.weight_hh_l0[0, 0] = torch.nan
    assert fast(torch.randn(5, 3, 6))[0].isnan().any()


# Mixed precision


def mixed_pair(kind: type, *sizes: int, **more: object) -> tuple[nn.RNNBase, nn.RNNBase]:
    """The fast layer and the one of mixed precision, with the same weights."""
    fast, mixed = FAST[kind](*sizes, **more), MIXED[kind](*sizes, **more)
    mixed.load_state_dict(fast.state_dict())
    return fast, mixed


def rounded(layer: nn.RNNBase) -> nn.RNNBase:
    """A copy whose weights are rounded to bf16."""
    other = copy.deepcopy(layer)
    for weight in other.parameters():
        weight.data = weight.data.bfloat16().float()
    return other


@MIXES
@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(list(MIXED)),
    hidden=st.integers(1, 140),
    n_layers=st.integers(1, 3),
    batch=st.integers(1, 20),
    steps=st.integers(1, 12),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_mixed_precision_rounds_factors_and_nothing_else(kind, hidden, n_layers, batch, steps, bias, dropout, seed):
    torch.manual_seed(seed)
    fast, mixed = mixed_pair(kind, 6, hidden, n_layers, bias=bias, dropout=dropout if n_layers > 1 else 0.0)
    x = torch.randn(steps, batch, 6)
    full, found = (results(layer, x, seed=seed) for layer in (fast, mixed))
    assert difference(found, full) < 5e-2
    assert all(torch.equal(a, b) for a, b in zip(results(mixed, x, seed=seed), found, strict=True))


@MIXES
@KINDS
def test_what_training_is_given_is_not_rounded(kind):
    """The input's own products are in full, so that two prices which bf16 cannot tell apart stay apart."""
    torch.manual_seed(0)
    _, mixed = mixed_pair(kind, 6, 24)
    x = torch.ones(1, 3, 6)
    nearly = x * (1 + 2**-12)
    assert torch.equal(nearly.bfloat16(), x.bfloat16())
    outputs = [mixed(one)[0] for one in (x, nearly)]
    assert not torch.equal(*outputs)
    full = [FAST[kind].forward(mixed.eval(), one)[0] for one in (x, nearly)]
    torch.testing.assert_close(outputs[1] - outputs[0], full[1] - full[0], rtol=1e-2, atol=1e-6)


@MIXES
@KINDS
def test_the_states_are_rounded_in_training_alone(kind):
    torch.manual_seed(0)
    fast, mixed = mixed_pair(kind, 6, 24, 2)
    x = torch.randn(9, 5, 6)
    assert not torch.equal(mixed(x)[0], fast(x)[0])
    assert torch.equal(mixed.eval()(x)[0], fast.eval()(x)[0])
    assert torch.equal(mixed.double().train()(x.double())[0], fast.double().train()(x.double())[0])


@MIXES
@KINDS
def test_weights_of_bf16_are_multiplied_exactly(kind):
    """With weights that bf16 holds and first states of zero, the first step of the first layer rounds nothing."""
    torch.manual_seed(0)
    fast, mixed = map(rounded, mixed_pair(kind, 6, 40))
    x = torch.randn(1, 7, 6)
    assert torch.equal(mixed(x)[0], fast(x)[0])
    state = torch.randn(1, 7, 40).bfloat16().float()
    states = state if kind is nn.GRU else (state, state)
    torch.testing.assert_close(mixed(x, states)[0], fast(x, states)[0], rtol=0, atol=1e-6)


@MIXES
@KINDS
def test_nan_comes_out_of_mixed_products(kind):
    _, mixed = mixed_pair(kind, 6, 16, 2)
    x = torch.randn(5, 3, 6)
    x[1, 2, 3] = torch.nan
    output = mixed(x)[0]
    assert output[:, :2].isfinite().all() and output[1:, 2].isnan().all()


def test_small_layers_stay_in_full():
    network = nn.ModuleList([nn.GRU(2, MIXED_FROM - 1), nn.GRU(2, MIXED_FROM), nn.LSTM(2, MIXED_FROM)])
    use_fast_layers(network, mixed=True)
    assert [type(layer) for layer in network] == [FastGRU, MixedGRU, MixedLSTM]
    use_plain_layers(network)
    assert [type(layer) for layer in network] == [nn.GRU, nn.GRU, nn.LSTM]


# In a fit


class Record(pl.Callback):
    """Losses of all batches, and the kinds of layers that gave them."""

    def __init__(self, fail: BaseException | None = None):
        self.losses, self.kinds, self.network, self.fail = [], set(), None, fail

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.network = pl_module
        self.losses.append(float(outputs["loss"]))
        self.kinds |= layer_kinds(pl_module)
        if self.fail:
            raise self.fail


def layer_kinds(network: nn.Module) -> set[type]:
    return {type(layer) for layer in network.modules() if isinstance(layer, nn.RNNBase)}


WALK = TimeSeries.from_values(np.cumsum(np.random.default_rng(0).normal(size=(120, 1)), axis=0).astype("float32"))


def darts_model(folder: Path, kind: str, *callbacks: pl.Callback, hidden: int = 18, **more: object) -> BlockRNNModel:
    kwargs = trainer_kwargs(Device()) | {"callbacks": [*callbacks]}
    return BlockRNNModel(
        20, 1, model=kind, hidden_dim=hidden, n_rnn_layers=2, dropout=0.0, n_epochs=2, batch_size=16, random_state=0,
        pl_trainer_kwargs=kwargs, work_dir=str(folder), **more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_darts_fit(kind: str, saved: bool, tmp_path: Path):
    plain, fast = Record(), Record()
    more = [{"model_name": name, "save_checkpoints": saved} for name in ("plain", "fast")]
    models = [
        darts_model(tmp_path, kind, *callbacks, **names).fit(WALK[:90], val_series=WALK[60:])
        for callbacks, names in zip(((plain,), (fast, FastLayers())), more, strict=True)
    ]
    own = getattr(nn, kind)
    assert (plain.kinds, fast.kinds) == ({own}, {FAST[own]})
    np.testing.assert_allclose(fast.losses, plain.losses, rtol=1e-4)
    assert layer_kinds(models[1].model) == {own}
    forecasts = [model.predict(3, verbose=False).values() for model in models]
    np.testing.assert_allclose(*forecasts, rtol=1e-3)
    models[1].save(str(tmp_path / "model.pt"), clean=True)
    loaded = BlockRNNModel.load(str(tmp_path / "model.pt"))
    assert layer_kinds(loaded.model) == {own}
    assert (loaded.predict(3, series=WALK[:90], verbose=False).values() == forecasts[1]).all()
    if saved:
        best = BlockRNNModel.load_from_checkpoint("fast", work_dir=str(tmp_path), best=False, trusted=True)
        assert layer_kinds(best.model) == {own}


@MIXES
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_darts_fit_in_mixed_precision(kind: str, tmp_path: Path):
    own, plain, mixed = getattr(nn, kind), Record(), Record()
    models = [
        darts_model(tmp_path, kind, record, *fast, hidden=MIXED_FROM).fit(WALK[:90], val_series=WALK[60:])
        for record, fast in ((plain, ()), (mixed, (FastLayers(mixed=True),)))
    ]
    assert mixed.kinds == {MIXED[own]} and layer_kinds(models[1].model) == {own}
    np.testing.assert_allclose(mixed.losses, plain.losses, rtol=2e-2)
    assert mixed.losses != plain.losses
    network, windows = models[1].model.eval(), torch.randn(8, 20, 1)
    with torch.no_grad():
        before = network.rnn(windows)[0]
    models[1].save(str(tmp_path / "model.pt"), clean=True)
    loaded = BlockRNNModel.load(str(tmp_path / "model.pt"))
    assert layer_kinds(loaded.model) == {own}
    with torch.no_grad():
        assert torch.equal(loaded.model.eval().rnn(windows)[0], before)


@pytest.mark.parametrize("fail", [ValueError("stopped"), KeyboardInterrupt()])
def test_a_fit_that_fails_leaves_plain_layers(fail: BaseException, tmp_path: Path):
    record = Record(fail)
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        darts_model(tmp_path, "GRU", record, FastLayers()).fit(WALK)
    assert record.kinds == {FastGRU}
    assert layer_kinds(record.network) == {nn.GRU}


def test_subclasses_are_left_alone():
    class Own(nn.GRU):
        pass

    network = nn.ModuleList([Own(2, 3), nn.GRU(2, 3)])
    use_fast_layers(network)
    assert [type(layer) for layer in network] == [Own, FastGRU]


def test_the_callback_can_be_copied():
    for other in (copy.deepcopy(FastLayers(mixed=True)), pickle.loads(pickle.dumps(FastLayers(mixed=True)))):
        assert type(other) is FastLayers and other.mixed


HASHES = """
import hashlib, time, torch
from kallos.core.devices import has_bf16_products
from kallos.models.recurrent import FastGRU, FastLSTM, MixedGRU
torch.set_num_threads(1)
begun, found = time.time(), hashlib.sha256()
cases = [(FastGRU, (6, 44, 2), 32), (FastGRU, (6, 110, 1), 20), (FastLSTM, (6, 44, 1), 32)]
for kind, sizes, batch in cases + [(MixedGRU, (6, 44, 2), 31)] * has_bf16_products():
    torch.manual_seed(0)
    layer, x = kind(*sizes, dropout=0.3 * (sizes[2] > 1)), torch.randn(30, batch, 6, requires_grad=True)
    output = layer(x)[0]
    output[-1].square().sum().backward()
    for tensor in (output, x.grad, *(weights.grad for weights in layer.parameters())):
        found.update(tensor.detach().contiguous().numpy().tobytes())
print(found.hexdigest(), time.time() - begun)
"""


@pytest.mark.slow
def test_the_process_that_compiles_and_the_next_give_the_same_bits(root: Path, tmp_path: Path):
    """What one process compiled is on disk, so that the next takes a moment only, and computes the same."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    how = {"capture_output": True, "text": True, "check": True, "cwd": root, "env": environment}
    said = [subprocess.run([sys.executable, "-c", HASHES], **how).stdout.split() for _ in range(2)]
    assert said[0][0] == said[1][0]
    assert float(said[1][1]) < float(said[0][1])
