from types import SimpleNamespace
from typing import Any

import pytest
import torch
from truth import poisoned

from lora_kernels.nf4 import (
    NestedMaxima,
    Nf4Arguments,
    Nf4Weight,
    dequantize_nf4,
    nf4_arguments,
)

# the interpreter cuts fp32 to bf16 instead of rounding it
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)
# units of 64, 32, 8 and 2 elements; maxima that end within a row; more than 256 maxima
SIZES = [(64, 128), (7, 96), (3, 40), (5, 6), (700, 64), (0, 64), (1, 64)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _quantized(
    num_rows: int, num_columns: int, device: str, *, is_nested: bool, block_size: int = 64
) -> Nf4Arguments:
    """Any bits are a weight."""
    num_blocks = -(-num_rows * num_columns // block_size)
    packed = torch.randint(256, (num_rows * num_columns // 2,), dtype=torch.uint8, device=device)
    code = torch.randn(16, device=device)
    shape = (num_rows, num_columns)
    if not is_nested:
        absmax = torch.rand(num_blocks, device=device)
        return Nf4Arguments(packed, absmax, code, block_size, shape)
    codes = torch.randint(256, (num_blocks,), dtype=torch.uint8, device=device)
    nested = NestedMaxima(
        torch.rand(-(-num_blocks // 256), device=device),
        torch.randn(256, device=device),
        torch.tensor(0.7, device=device),
        256,
    )
    return Nf4Arguments(packed, codes, code, block_size, shape, nested)


def _dequantized(weight: Nf4Arguments, dtype: torch.dtype) -> torch.Tensor:
    absmax, nested = weight.absmax, weight.nested
    if nested is not None:
        scales = nested.absmax.repeat_interleave(nested.block_size)[: absmax.shape[0]]
        absmax = nested.code[absmax.long()] * scales + nested.offset
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], 1).reshape(-1).long()
    scales = absmax.repeat_interleave(weight.block_size)[: nibbles.shape[0]]
    return (weight.code[nibbles] * scales).to(dtype).reshape(weight.shape)


def _assert_writes(weight: Nf4Arguments | Nf4Weight, expected: torch.Tensor) -> None:
    num_rows, num_columns = expected.shape
    wide = poisoned(
        num_rows + 1, num_columns + 32, dtype=expected.dtype, device=str(expected.device)
    )
    out = wide[:num_rows, 16 : 16 + num_columns]
    if isinstance(weight, Nf4Weight):
        weight.write(out)
    else:
        dequantize_nf4(weight, out)
    # the same roundings in the same order: nothing to choose
    assert torch.equal(out, expected)
    out.fill_(float("nan"))
    assert wide.isnan().all(), "wrote beside the output"


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_any_size(
    device: str, dtype: torch.dtype, num_rows: int, num_columns: int, is_nested: bool
) -> None:
    weight = _quantized(num_rows, num_columns, device, is_nested=is_nested)
    _assert_writes(weight, _dequantized(weight, dtype))


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_any_block_size(device: str, dtype: torch.dtype, block_size: int) -> None:
    weight = _quantized(65, 96, device, is_nested=True, block_size=block_size)
    _assert_writes(weight, _dequantized(weight, dtype))


def _params_4bit(values: torch.Tensor, **options: Any) -> Any:
    # not through a layer's forward, which may re-pack the weight for a CPU kernel
    nn = pytest.importorskip("bitsandbytes").nn
    return nn.Params4bit(values.cpu(), quant_type="nf4", **options).to(values.device)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [(64, 128), (7, 64), (300, 64)])
def test_same_bits_as_bitsandbytes(
    device: str, dtype: torch.dtype, size: tuple[int, int], double: bool, storage: torch.dtype
) -> None:
    values = torch.randn(size, dtype=dtype, device=device)
    weight = _params_4bit(values, compress_statistics=double, quant_storage=storage)
    functional = pytest.importorskip("bitsandbytes").functional
    expected = functional.dequantize_4bit(weight.data, weight.quant_state)
    arguments = nf4_arguments(weight)
    assert arguments.shape == size
    assert (arguments.nested is not None) == double
    _assert_writes(arguments, expected)
    _assert_writes(Nf4Weight(weight), expected)
    assert Nf4Weight(weight).shape == size


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_size_of_bitsandbytes(device: str, dtype: torch.dtype, block_size: int) -> None:
    values = torch.randn(48, 128, dtype=dtype, device=device)
    weight = _params_4bit(values, blocksize=block_size)
    functional = pytest.importorskip("bitsandbytes").functional
    _assert_writes(
        nf4_arguments(weight), functional.dequantize_4bit(weight.data, weight.quant_state)
    )


@pytest.mark.parametrize("double", [False, True])
def test_blocks_over_two_rows(device: str, dtype: torch.dtype, double: bool) -> None:
    # bitsandbytes 0.50.2 itself dequantizes these wrongly on CPUs with AVX512
    values = torch.randn(48, 96, dtype=dtype, device=device)
    arguments = nf4_arguments(_params_4bit(values, compress_statistics=double))
    _assert_writes(arguments, _dequantized(arguments, dtype))
    out = torch.empty_like(values)
    dequantize_nf4(arguments, out)
    # half the widest gap between codes is 0.152; some for the maxima's own quantization
    assert (out - values).abs().max() < 0.17 * values.abs().max()


def test_arguments_are_the_weights_own(device: str) -> None:
    weight = _params_4bit(torch.randn(64, 128, device=device))
    arguments = nf4_arguments(weight)
    assert type(arguments.packed) is torch.Tensor
    assert arguments.packed.data_ptr() == weight.data_ptr()
    assert arguments.nested is not None
    assert arguments.nested.offset is weight.quant_state.offset


def test_other_weights_are_refused() -> None:
    state = SimpleNamespace(quant_type="nf4", shape=(4, 8), nested=False)
    with pytest.raises(ValueError, match="no quantized weight"):
        nf4_arguments(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="no quantized weight"):
        nf4_arguments(SimpleNamespace(quant_state=None))
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="fp4"):
        nf4_arguments(SimpleNamespace(quant_state=state))
    state.quant_type, state.shape = "nf4", (4, 8, 2)
    with pytest.raises(ValueError, match="expected a matrix"):
        nf4_arguments(SimpleNamespace(quant_state=state))
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="re-packed"):
        nf4_arguments(SimpleNamespace(quant_state=state))


def test_wrong_arguments_are_refused(device: str) -> None:
    weight = _quantized(8, 64, device, is_nested=True)
    nested = weight.nested
    assert nested is not None
    out = torch.empty(8, 64, device=device)
    with pytest.raises(ValueError, match="out_NK"):
        dequantize_nf4(weight, out[:7])
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_nf4(weight, out.T.contiguous().T)
    for wrong in (out.double(), out.int()):
        with pytest.raises(ValueError, match="out_NK"):
            dequantize_nf4(weight, wrong)
    with pytest.raises(ValueError, match="two rows"):
        dequantize_nf4(weight._replace(shape=(8, 63)), out[:, :63])
    for block_size in (0, 1, 48):
        with pytest.raises(ValueError, match="power of two"):
            dequantize_nf4(weight._replace(block_size=block_size), out)
    for name, value in (
        ("packed", weight.packed[1:]),
        ("absmax", weight.absmax.float()),
        ("code", weight.code[:8]),
        ("absmax", weight.absmax[1:]),
    ):
        with pytest.raises(ValueError, match=name):
            dequantize_nf4(weight._replace(**{name: value}), out)
    for name, value in (
        ("absmax", nested.absmax.double()),
        ("code", nested.code[:16]),
        ("offset", nested.offset.double()),
    ):
        wrong = weight._replace(nested=nested._replace(**{name: value}))
        with pytest.raises(ValueError, match=f"nested.{name}"):
            dequantize_nf4(wrong, out)
