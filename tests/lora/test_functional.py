import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora import (
    Int8Linear,
    LoRAFusedLinear,
    LoRALinear,
    draw_dropped,
    functional,
    keep_base_in,
    merge_lora,
    start_at_principal,
)
from lora.dropout import TAPE
from lora.functional import _LoRALinearFunction

CPU = torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


BLOCKS = {
    "one block": {"key": 1},
    "first block": {"query": 0},
    "last block": {"value": 2},
    "first two blocks": {"query": 0, "key": 1},
    "last two blocks": {"key": 1, "value": 2},
    "two blocks": {"value": 2, "query": 0},
    "all blocks": {"query": 0, "key": 1, "value": 2},
}
KINDS = ["plain", "rslora", "pissa", *BLOCKS, "unequal blocks"]


def make_layer(kind, dropout=0.0, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Linear(5, 12, bias=bias, dtype=dtype)
    if kind in BLOCKS:
        layer = LoRAFusedLinear(base, BLOCKS[kind], 3, 2, 3, dropout)
    elif kind == "unequal blocks":
        ranks, alphas = {"query": 1, "key": 4, "value": 2}, {"query": 5, "key": 3, "value": 1}
        layer = LoRAFusedLinear(base, BLOCKS["all blocks"], 3, ranks, alphas, dropout)
    else:
        layer = LoRALinear(base, 2, 3, dropout, rslora=kind == "rslora")
    if kind == "pissa":
        start_at_principal(layer)
    for _, pair in layer.pairs():
        nn.init.normal_(pair.lora_B)
    return layer


def test_a_batch_of_none_has_outputs_of_none():
    layer, x = make_layer("plain"), torch.zeros(0, 3, 5, dtype=torch.float64)
    assert layer(x).shape == (0, 3, 12)


def keep_mask(x, p):
    """What the next `draw_dropped` will keep; leaves the generator as it found it."""
    state = torch.get_rng_state()
    keep = torch.ones_like(x)
    keep.view(-1)[draw_dropped(x.numel(), p, x.device)] = 0
    torch.set_rng_state(state)
    return keep


def gradients(y, layer, x):
    trainable = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), [x, *trainable])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
def test_output_and_gradients_are_those_of_plain_autograd(kind, dropout, bias, shape):
    layer = make_layer(kind, dropout, bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    keep = keep_mask(x, dropout) if dropout else None
    y, expected = layer(x), layer.reference_forward(x, keep)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, layer, x), gradients(expected, layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "two blocks", "unequal blocks"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_over_a_base_in_8_bits_they_are_too(kind, dropout):
    layer = make_layer(kind, dropout, dtype=torch.float32)
    layer.base_layer = Int8Linear(layer.base_layer)
    x = torch.randn(7, 5, requires_grad=True)
    keep = keep_mask(x, dropout) if dropout else None
    y, expected = layer(x), layer.reference_forward(x, keep)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, layer, x), gradients(expected, layer, x))


def test_input_need_not_be_contiguous():
    layer = make_layer("two blocks", 0.3)
    x = torch.randn(5, 4, dtype=torch.float64).T.requires_grad_()
    keep = keep_mask(x.detach().contiguous(), 0.3)
    y, expected = layer(x), layer.reference_forward(x, keep)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, layer, x), gradients(expected, layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropped", [None, [0, 3, 11], "mask"])
def test_gradcheck(dropped):
    def fresh(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    if dropped == "mask":
        dropped = torch.arange(20) % 3 == 0
    elif dropped:
        dropped = torch.tensor(dropped)
    weight, bias = fresh(6, 5).detach(), fresh(6).detach()
    base = functional.Frozen(weight, bias)

    def layer(x, lora_A, lora_B):
        return _LoRALinearFunction.apply(x, lora_A, lora_B, base, dropped, None)

    assert torch.autograd.gradcheck(layer, (fresh(4, 5), fresh(4, 5), fresh(6, 4)))


def test_torch_compile_passes_over_what_is_kept_in_onednns_layout():
    model = nn.Sequential(LoRALinear(nn.Linear(64, 64), 2, 3), nn.GELU(), LoRALinear(nn.Linear(64, 4), 2, 3))
    x = torch.randn(40, 64, requires_grad=True)
    expected = gradients(model(x), model, x)
    keep_base_in(model, torch.float32)
    actual = gradients(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    merged = merge_lora(model)
    keep_base_in(merged, torch.float32)
    with torch.inference_mode():
        actual = torch.compile(merged, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(actual, merged(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_torch_compile_sees_a_whole_model(dropout, dora, monkeypatch):
    torch.manual_seed(0)
    layers = [LoRALinear(nn.Linear(*sizes), 2, 3, dropout, dora=dora) for sizes in ((6, 8), (8, 4))]
    layers.insert(1, nn.GELU())
    model = nn.Sequential(nn.LayerNorm(6), *layers).double()
    for layer in layers[::2]:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    found = gradients(y, model, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: dropout > 0)  # it drops what the compiler is told to
    torch.manual_seed(1)
    expected = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients(expected, model, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_torch_compile_sees_a_layer_in_8_bits_whole(dropout, monkeypatch):
    layer = make_layer("two blocks", dropout, dtype=torch.float32)
    layer.base_layer = Int8Linear(layer.base_layer)
    x = torch.randn(40, 5, requires_grad=True)
    torch.manual_seed(1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    found = gradients(compiled, layer, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: dropout > 0)  # it drops what the compiler is told to
    torch.manual_seed(1)
    expected = layer(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(found, gradients(expected, layer, x))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_what_a_compiled_layer_drops(device):
    """With W = 0 and A and B of ones on their diagonals, zeros of y and of x's gradient are what dropout made."""
    torch.compiler.reset()
    layers = nn.Sequential(*(LoRALinear(nn.Linear(64, 64, bias=False), 64, 64, dropout=0.5) for _ in range(2)))
    for layer in layers:
        layer.base_layer.weight.data.zero_()
        layer.lora_A.data, layer.lora_B.data = torch.eye(64), torch.eye(64)
    layers = layers.to(device)

    @torch.compile
    def run(first, second):
        return layers[0](first), layers[1](second)

    def masks(seed=None, rows=50):
        if seed is not None:
            torch.manual_seed(seed)
        inputs = [torch.ones(rows, 64, device=device, requires_grad=True) for _ in layers]
        outputs = run(*inputs)
        back = torch.autograd.grad(sum(y.sum() for y in outputs), inputs)
        for y, dx in zip(outputs, back, strict=True):
            assert torch.equal(y != 0, dx != 0), "the same in both directions"
            assert torch.equal(y, dx), "and scaled alike"
            assert abs((y != 0).float().mean() - 0.5) < 4 * 0.5 / y.numel() ** 0.5
        return [y != 0 for y in outputs]

    first, second = masks(seed=1)
    later, _ = masks()
    assert not torch.equal(first, second), "layers differ"
    assert not torch.equal(first, later), "calls differ"
    assert torch.equal(first, masks(seed=1)[0]), "a seed repeats"
    masks(rows=30)  # another shape
    assert torch.equal(first, masks(seed=1)[0])


def test_a_copy_of_a_compiled_layer_computes_by_itself():
    layer, x = make_layer("plain"), torch.randn(3, 5, dtype=torch.float64)
    layer.compile(backend="aot_eager")
    copied = copy.deepcopy(layer)
    copied.lora_B.data.zero_()
    torch.testing.assert_close(copied(x), layer.base_layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_input_without_gradient_still_trains_the_pair(compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    layer = make_layer("plain", 0.0 if compiled else 0.3)
    x = torch.randn(7, 5, dtype=torch.float64)
    keep = None if compiled else keep_mask(x, 0.3)
    pair = [layer.lora_A, layer.lora_B]
    expected = torch.autograd.grad(layer.reference_forward(x, keep).square().sum(), pair)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), pair), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_half_a_pair_can_be_frozen(frozen, compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    layer = make_layer("plain")
    getattr(layer, frozen).requires_grad_(False)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gradients(layer(x), layer, x), gradients(layer.reference_forward(x), layer, x))


@pytest.mark.parametrize("needed", ["x", "lora_A", "lora_B"])
def test_only_what_is_asked_for_is_computed(needed):
    """Of the products with W, A, B, x and h in the backward pass, counted where the dispatcher sees them."""
    layer = make_layer("plain", bias=False)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=needed == "x")
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).requires_grad_(needed == name)
    loss = layer(x).sum()
    with Counted() as products:
        loss.backward()
    # dh and dh A and dy W; dh and dhᵀ x; dyᵀ h
    assert len(products.seen) == {"x": 3, "lora_A": 2, "lora_B": 1}[needed]


class Counted(TorchDispatchMode):
    """Which matrix products are made while it is entered."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "_linear_pointwise"):
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_keeps_one_copy_of_the_input():
    saved = []
    layer = make_layer("plain", 0.3)
    x = torch.randn(7, 5, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert [tuple(t.shape) for t in saved if t.numel() == x.numel()] == [(7, 5)]
    weight = layer.base_layer.weight
    assert y.grad_fn.next_functions[0][0].base.weight.data_ptr() == weight.data_ptr(), "the weight is kept by reference"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_as_large_as_the_input_is_kept_in_fp32_under_autocast(dropout):
    layer, saved = make_layer("two blocks", dropout, dtype=torch.float32), []
    x = torch.randn(64, 5, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(x)
    assert [t.dtype for t in saved if t.numel() >= x.numel()] == [torch.bfloat16]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast(dropout):
    layer = make_layer("two blocks", dropout, dtype=torch.float32)
    x = torch.randn(4, 5, requires_grad=True)
    keep = keep_mask(x, dropout) if dropout else None
    expected = layer.reference_forward(x, keep)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    for actual, exact in zip(gradients(y.float(), layer, x), gradients(expected, layer, x), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("kept", [False, True])
def test_the_backward_pass_may_be_under_another_autocast_than_the_forward_pass(kept):
    layer, x = make_layer("two blocks", 0.0, dtype=torch.float32), torch.randn(4, 5, requires_grad=True)
    expected = gradients(layer(x), layer, x)
    if kept:
        keep_base_in(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = layer(x)
        torch.testing.assert_close(gradients(y, layer, x), expected)


def test_the_mask_of_a_gpu_drops_that_share_and_hides_the_same_in_both_directions(monkeypatch):
    def draw(numel, p, device):
        return torch.empty(numel, dtype=torch.bool).bernoulli_(p)  # as `draw_dropped` does off the CPU

    monkeypatch.setattr(functional, "draw_dropped", draw)
    layer, x = make_layer("plain", 0.3), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    keep = (~draw(x.numel(), 0.3, CPU)).view_as(x).double()
    torch.set_rng_state(state)
    expected = gradients(layer.reference_forward(x, keep), layer, x)
    torch.testing.assert_close(gradients(layer(x), layer, x), expected)


@pytest.mark.parametrize("kind", ["plain", "one block", "two blocks", "all blocks"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_the_compiler_is_given_is_plain_autograd_too(kind, bias, dropout, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer = make_layer(kind, dropout, bias)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    keep = functional.hide(torch.ones_like(x), functional.draw_marks(x), dropout) if dropout else None
    torch.set_rng_state(state)
    y, expected = layer(x), layer.reference_forward(x, keep)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, layer, x), gradients(expected, layer, x), rtol=1e-12, atol=1e-12)


def dropped_mask(shape, p):
    mask = torch.zeros(math.prod(shape))
    mask[draw_dropped(mask.numel(), p, CPU)] = 1
    return mask.view(shape)


def hashed_mask(shape, p):
    seen = torch.ones(shape)
    return 1 - functional.hide(seen, functional.draw_marks(seen), p)


@pytest.mark.parametrize("draw", [dropped_mask, hashed_mask])
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("columns", [301, 768])
def test_dropout_statistics(p, draw, columns):
    torch.manual_seed(0)
    rows = 1000
    mask = draw((rows, columns), p)
    sigma = math.sqrt(p * (1 - p))
    assert abs(mask.mean() - p) < 4 * sigma / math.sqrt(rows * columns)
    # no column, first and last included, and no half of the rows is favoured
    assert (mask.mean(0) - p).abs().max() < 5 * sigma / math.sqrt(rows) + 3 / rows
    assert abs(mask[: rows // 2].mean() - mask[rows // 2 :].mean()) < 4 * sigma * math.sqrt(4 / (rows * columns))
    z = (mask - p) / sigma
    for a, b in [(z[:, 1:], z[:, :-1]), (z[:, 2:], z[:, :-2]), (z[1:], z[:-1]), (z[4:], z[:-4]), (z[8:], z[:-8])]:
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel()), "neighbours are independent"
    another = (draw((rows, columns), p) - p) / sigma
    assert abs((z * another).mean()) < 4 / math.sqrt(z.numel()), "so are draws"


def test_dropout_of_more_elements_than_the_tape_has():
    torch.manual_seed(0)
    numel = 2 * TAPE + 1000
    dropped = draw_dropped(numel, 0.05, CPU)
    assert (dropped.diff() > 0).all() and dropped[0] >= 0 and dropped[-1] < numel
    mask = torch.zeros(numel).index_fill_(0, dropped.long(), 1)
    first, second = ((mask[start : start + TAPE] - 0.05) / math.sqrt(0.05 * 0.95) for start in (0, TAPE))
    assert abs(first.mean()) < 1e-3 and abs(second.mean()) < 1e-3, "each is the whole tape, from another place on"
    assert abs((first * second).mean()) < 4 / math.sqrt(TAPE)
    assert 0 < mask[2 * TAPE :].sum() < 100


def test_dropout_of_few_elements():
    torch.manual_seed(0)
    counts = torch.tensor([len(draw_dropped(3, 0.3, CPU)) for _ in range(4000)])
    expected = torch.tensor([math.comb(3, k) * 0.3**k * 0.7 ** (3 - k) for k in range(4)])
    assert (torch.bincount(counts, minlength=4) / 4000 - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)
    assert len(draw_dropped(0, 0.3, CPU)) == 0


@pytest.mark.parametrize("draw", [dropped_mask, hashed_mask])
def test_dropout_is_new_each_time_and_follows_the_seed(draw):
    torch.manual_seed(0)
    first, second = draw((50, 50), 0.3), draw((50, 50), 0.3)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw((50, 50), 0.3))


def test_dropout_preserves_the_mean():
    layer = make_layer("plain", 0.3)
    x = torch.ones(20_000, 5, dtype=torch.float64)
    trained = layer(x)
    spread = trained.std(0) / math.sqrt(len(x))
    assert ((trained.mean(0) - layer.eval()(x)[0]).abs() < 4 * spread).all()


def test_no_dropout_in_eval_mode():
    layer = make_layer("plain", 0.3).eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def onednn(monkeypatch):
    """Also on a CPU where products are left to torch."""
    monkeypatch.setattr(functional, "ONEDNN", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50])
def test_products_by_onednn_are_those_of_torch(onednn, rows, dtype):
    """The tests above are in fp64, which it does not compute."""
    torch.manual_seed(0)
    shapes = (rows, 24), (40, 24), (40,), (rows, 40)
    x, weight, bias, onto = (torch.randn(shape).to(dtype) for shape in shapes)
    assert functional._fits_onednn(x, weight) == (dtype is torch.float32 or functional.ONEDNN_BF16)
    torch.testing.assert_close(functional.linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(functional.linear(x, weight.T.contiguous().T), F.linear(x, weight))
    torch.testing.assert_close(functional.linear(x, weight, onto=onto.clone()), torch.addmm(onto, x, weight.T))


def test_products_with_a_gradient_or_of_another_dtype_stay_with_torch(onednn):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    assert not functional._fits_onednn(x, weight)
    assert functional.linear(x, weight).requires_grad
    assert not functional._fits_onednn(x.detach().double(), weight.double())
    with torch.no_grad():
        assert functional._fits_onednn(x, weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(x, weight).dtype == torch.bfloat16
            narrow = x.bfloat16(), weight.bfloat16()
            assert functional._fits_onednn(*narrow) == functional.ONEDNN_BF16, "nothing is left for autocast to choose"
            assert torch.equal(functional.linear(*narrow), F.linear(*narrow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50, 394])
def test_a_packed_weight_gives_what_a_plain_one_gives(onednn, rows, dtype):
    torch.manual_seed(0)
    x, weight, bias, onto = (torch.randn(shape).to(dtype) for shape in ((rows, 48), (72, 48), (72,), (rows, 48)))
    packed = functional.pack(functional.Frozen(weight, bias), for_gradients=True)
    packs = dtype is torch.float32 or functional.ONEDNN_BF16
    assert packed.weight.is_mkldnn == packs
    y = functional.linear(x, weight, bias)
    torch.testing.assert_close(functional.linear(x, packed.weight, bias), y)
    assert (packed.transposed is not None) == packs
    if packs:
        dx = functional.linear(y, weight.T, onto=onto.clone())
        torch.testing.assert_close(functional.linear(y, packed.transposed, onto=onto.clone()), dx)


def test_what_onednn_does_not_compute_is_not_packed():
    for weight in torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.int8):
        assert functional.pack(functional.Frozen(weight)).weight is weight
