"""K-quant blocks, read back by gguf-py and compared with llama.cpp's own figures; the types of a mix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kllm.errors import KllmError, UserError
from kllm.export import kquants
from kllm.export.kquants import BLOCK_BYTES, LARGEST, choose_type, quantize

gguf = pytest.importorskip("gguf")
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "kquants.json").read_text())
KINDS = tuple(BLOCK_BYTES)
LEVELS = {"q4_k": 15, "q5_k": 31, "q6_k": 32}
SUB_BLOCK = {"q4_k": 32, "q5_k": 32, "q6_k": 16}
NIBBLES = {"q4_k": slice(16, 144), "q5_k": slice(48, 176), "q6_k": slice(0, 128)}


def distributions() -> dict[str, np.ndarray]:
    """The tensors behind the golden figures; the golden standard deviations prove they are the same."""
    rng = np.random.default_rng(7)
    shape = (16, 1024)

    def normal() -> np.ndarray:
        return rng.standard_normal(shape) * 0.02

    out = {"gaussian": normal(), "student_t": rng.standard_t(3, shape) * 0.02}
    out["outliers"] = normal() * np.where(rng.random(shape) < 0.002, 30, 1)
    out["uniform"] = rng.uniform(-0.05, 0.05, shape)
    out["row_scale"] = normal() * np.exp(1.5 * rng.standard_normal((shape[0], 1)))
    out["column_scale"] = normal() * np.exp(rng.standard_normal((1, shape[1])))
    out["above_zero"] = normal() + 0.05
    out["below_zero"] = normal() - 0.05
    return {name: x.astype(np.float32) for name, x in out.items()}


def read(data: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


TENSORS = distributions()
MATRIX = TENSORS["gaussian"] * 50  # of unit variance


# --- against llama.cpp --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORS)
def test_the_error_is_not_above_llama_cpps(name: str) -> None:
    golden, x = GOLDEN["rmse"][name], TENSORS[name]
    assert float(x.std()) == pytest.approx(golden["std"], rel=1e-5), (
        "numpy's generator has changed: measure again"
    )
    for kind in KINDS:
        ours = rms(read(quantize(x, kind), kind) - x)
        assert ours <= golden["llama.cpp"][kind], kind
        assert ours == pytest.approx(golden["ours"][kind], rel=0.01), (
            f"{kind}: better or worse, say so in golden"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_negative_control_swapped_nibbles_are_seen(kind: str) -> None:
    data = quantize(MATRIX, kind)
    right = rms(read(data, kind) - MATRIX)
    blocks = data.reshape(-1, BLOCK_BYTES[kind])
    part = blocks[:, NIBBLES[kind]]
    blocks[:, NIBBLES[kind]] = (part >> 4) | (part << 4)
    assert rms(read(data, kind) - MATRIX) > 5 * right


@pytest.mark.parametrize("model", GOLDEN["mixes"], ids=lambda m: f"{m['arch']}-{m['layers']}-{m['experts']}")
def test_types_are_llama_cpps(model: dict) -> None:
    facts = {k: model[k] for k in ("experts", "gqa", "tied", "arch")}
    count = 0
    for mix, types in model["types"].items():
        for name, golden in types.items():
            cols, dims = model["tensors"][name]
            for kind, layers in golden.items():
                for layer in range(model["layers"]) if layers == "all" else layers:
                    full = name if layer < 0 else f"blk.{layer}.{name}"
                    chosen = choose_type(mix, full, layer, model["layers"], cols, dims=dims, **facts)
                    assert chosen == kind, (mix, full)
                    count += 1
    assert count > 3 * 10


# --- properties ---------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(1, 256), (3, 256), (1, 768), (2, 2, 512)]))
    x = rng.standard_normal(shape) * draw(st.sampled_from([1e-4, 1e-2, 1.0, 1e3]))
    if draw(st.booleans()):
        x *= np.exp(2 * rng.standard_normal((*shape[:-1], 1)))
    if draw(st.booleans()):
        x[..., rng.integers(0, shape[-1], 3)] *= 20
    if draw(st.booleans()):
        x[..., :64] = 0
    return (x + draw(st.sampled_from([0.0, 0.0, 1.0, -1.0])) * x.std()).astype(np.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tensors(), st.sampled_from(KINDS))
def test_blocks_have_their_form_and_every_weight_is_near(x: np.ndarray, kind: str) -> None:
    data = quantize(x, kind)
    assert data.dtype == np.uint8
    assert data.shape == (*x.shape[:-1], x.shape[-1] // 256 * BLOCK_BYTES[kind])
    back = read(data, kind)
    assert back.shape == x.shape
    assert np.isfinite(back).all()
    # the bound: two steps of the widest sub-block of the super-block, and what float16 loses
    sub = x.reshape(-1, 256 // SUB_BLOCK[kind], SUB_BLOCK[kind])
    low = 0 if kind == "q6_k" else np.minimum(sub.min(-1), 0)
    high = np.abs(sub).max(-1) if kind == "q6_k" else np.maximum(sub.max(-1), 0)
    step = (high - low).max(-1) / LEVELS[kind]
    error = np.abs(back - x).reshape(-1, 256).max(-1)
    assert (error <= 2 * step + 0.02 * np.abs(sub).max((-1, -2)) + 1e-6).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 63), min_size=16, max_size=16))
def test_codes_of_six_bits_come_back(codes: list[int]) -> None:
    both = np.array(codes, np.float32).reshape(2, 8, 1)
    packed = kquants._codes(both[0], both[1])
    scale, low = gguf.quants.Q4_K.get_scale_min(packed)
    assert [*scale[0], *low[0]] == codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TENSORS)
def test_what_was_quantised_before_hardly_changes(name: str, kind: str) -> None:
    x = TENSORS[name]
    once = read(quantize(x, kind), kind)
    assert rms(read(quantize(once, kind), kind) - once) < 0.25 * rms(once - x)


@pytest.mark.parametrize("kind", KINDS)
def test_powers_of_two_pass_through_and_signs_nearly(kind: str) -> None:
    back = read(quantize(MATRIX, kind), kind)
    np.testing.assert_array_equal(read(quantize(MATRIX * 64, kind), kind), back * 64)
    mirrored = rms(read(quantize(-MATRIX, kind), kind) + MATRIX)
    assert mirrored == pytest.approx(rms(back - MATRIX), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_constants_and_extremes(kind: str) -> None:
    x = np.zeros((2, 512), np.float32)
    assert not read(quantize(x, kind), kind).any()
    x[1, :256] = MATRIX[0, :256]
    back = read(quantize(x, kind), kind)
    assert not back[0].any()
    assert not back[1, 256:].any()
    for value in (1.0, -1.0, 0.7, -3e4, 1e-3, LARGEST[kind], -LARGEST[kind]):
        full = np.full((1, 256), value, np.float32)
        np.testing.assert_allclose(read(quantize(full, kind), kind), full, rtol=4e-3)
    for scale in (1e-5, 1e-8, 1e-20, 1e-38, 1e-41):  # no more lost than the smallest float16 step
        tiny = MATRIX * np.float32(scale)
        assert np.abs(read(quantize(tiny, kind), kind) - tiny).max() <= max(0.3 * scale, 2.0**-24)
    huge = MATRIX / np.abs(MATRIX).max() * np.float32(0.999 * LARGEST[kind])
    assert rms(read(quantize(huge, kind), kind) - huge) < 0.1 * rms(huge)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_chunks_and_memory_order_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize(MATRIX, kind)
    np.testing.assert_array_equal(quantize(MATRIX.reshape(2, 8, -1), kind).reshape(whole.shape), whole)
    np.testing.assert_array_equal(quantize(np.asfortranarray(MATRIX), kind), whole)
    monkeypatch.setattr(kquants, "_CHUNK", 7)
    np.testing.assert_array_equal(quantize(MATRIX, kind), whole)
    assert quantize(MATRIX[:0], kind).shape == (0, whole.shape[1])


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (-np.inf, "not finite"), (1e12, "too large")]
)
def test_weights_that_have_no_code_are_refused(value: float, words: str) -> None:
    x = MATRIX.copy()
    x[3, 5] = value
    for kind in KINDS:
        with pytest.raises(KllmError, match=words) as caught:
            quantize(x, kind)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(256,), (2, 100), (2, 384), (0,)])
def test_forms_that_hold_no_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="multiple of 256"):
        quantize(np.zeros(shape, np.float32), "q4_k")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="q3_k"):
        quantize(MATRIX, "q3_k")
    with pytest.raises(UserError, match="q4_k_s"):
        choose_type("q4_k_s", "output.weight", 0, 1, 256)
