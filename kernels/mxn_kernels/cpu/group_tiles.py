"""Writes the inner loops of the grouped products (4 and 8 bits, a scale per 32 inputs) as C++ text.

One function template per number of rows; the format is its parameter. Why text: see `gemm_tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mxn_kernels.cpu.gemm_tiles import HEADER, PANEL, halves, input_of, row_pointers

GROUP = 32
_STEP_BYTES = 4 * PANEL
SIGNATURE = (
    "template <Format F> static __attribute__((noinline)) void tile_{rows}"
    "(const int8_t* a, int64_t lda, const int32_t* sums, const uint8_t* w, int64_t depth, const Epilogue& out, "
    "int64_t row) {{"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What fits the registers of one instruction set: int32 sums of a group and float sums of the row."""

    guard: str
    max_rows: int
    lanes: int
    columns_at_once: int

    @property
    def columns(self) -> range:
        return range(PANEL // self.lanes)


SHAPES = (
    Shape(guard="MXN_AVX512", max_rows=6, lanes=16, columns_at_once=2),
    Shape(guard="!MXN_AVX512", max_rows=2, lanes=8, columns_at_once=2),
)


def generate() -> str:
    """The whole of group_tiles.inc: for each instruction set its tiles, MAX_TILE_ROWS and a table of functions."""
    lines = [HEADER]
    for shape in SHAPES:
        lines.append(f"#if {shape.guard}")
        for rows in range(1, shape.max_rows + 1):
            lines += _tile(shape, rows)
        names = ", ".join(f"tile_{rows}<F>" for rows in range(1, shape.max_rows + 1))
        lines.append(f"constexpr int MAX_TILE_ROWS = {shape.max_rows};")
        lines.append(f"template <Format F> constexpr Tile* TILES[] = {{nullptr, {names}}};")
        lines.append("#endif")
    return "\n".join(lines) + "\n"


def _tile(shape: Shape, rows: int) -> Iterator[str]:
    yield SIGNATURE.format(rows=rows)
    yield "    constexpr int32_t OFFSET = stored_offset<F>();"
    yield "    const int64_t groups = depth / GROUP;"
    yield from row_pointers(rows)
    for r in range(rows):
        yield f"    Vec16 f{r}_0 = zero16(), f{r}_1 = zero16();"
    yield f"    for (int64_t k = 0; k < depth; k += {GROUP}, w += group_bytes(F)) {{"
    yield "        for (int line = 0; line < group_bytes(F); line += 64) prefetch(w + line + PREFETCH_BYTES);"
    for r in range(rows):
        yield f"        const int32_t sum{r} = sums[{r} * groups + k / GROUP];"
        start = f"set_i(-OFFSET * sum{r})"
        yield "        VecI " + ", ".join(f"c{r}_{j} = {start}" for j in shape.columns) + ";"
    for first in range(0, len(shape.columns), shape.columns_at_once):
        columns = shape.columns[first : first + shape.columns_at_once]
        yield "        if constexpr (F == Q8_0) {"
        for step in range(GROUP // 4):
            yield from _bytes(shape, rows, step, columns)
        yield "        } else {"
        for step in range(GROUP // 8):
            yield from _nibbles(shape, rows, step, columns)
        yield "        }"
    yield "        const half_t* scales = (const half_t*)(w + value_bytes(F));"
    yield "        Vec16 d0 = load16_half(scales), d1 = load16_half(scales + LANES);"
    for r in range(rows):
        left, right = halves([f"c{r}_{j}" for j in shape.columns]).split("), ")
        yield f"        f{r}_0 = fma(d0, {left}), f{r}_0), f{r}_1 = fma(d1, {right}, f{r}_1);"
    yield "        if constexpr (F == Q4_1) {"
    yield "            Vec16 m0 = load16_half(scales + PANEL), m1 = load16_half(scales + PANEL + LANES);"
    for r in range(rows):
        yield f"            Vec16 s{r} = set16((float)sum{r});"
        yield f"            f{r}_0 = fma(m0, s{r}, f{r}_0), f{r}_1 = fma(m1, s{r}, f{r}_1);"
    yield "        }"
    yield "    }"
    for r in range(rows):
        yield f"    out.store(row + {r}, f{r}_0, f{r}_1);"
    yield "}"


def _bytes(shape: Shape, rows: int, step: int, columns: range) -> Iterator[str]:
    yield "            {"
    for j in columns:
        yield f"                VecI w{j} = load_weights(w + {_STEP_BYTES * step + 4 * shape.lanes * j});"
    for r in range(rows):
        dots = " ".join(f"DOT(c{r}_{j}, w{j}, x{r});" for j in columns)
        yield f"                Inputs x{r} = broadcast_inputs({input_of(r)} + k + {4 * step}); {dots}"
    yield "            }"


def _nibbles(shape: Shape, rows: int, step: int, columns: range) -> Iterator[str]:
    yield "            {"
    for j in columns:
        yield f"                VecI b{j} = load_nibbles(w + {_STEP_BYTES * step + 4 * shape.lanes * j});"
        yield f"                VecI l{j} = low_nibbles(b{j}), h{j} = high_nibbles(b{j});"
    for half, offset in (("l", 4 * step), ("h", GROUP // 2 + 4 * step)):
        for r in range(rows):
            dots = " ".join(f"DOT(c{r}_{j}, {half}{j}, {half}x{r});" for j in columns)
            yield f"                Inputs {half}x{r} = broadcast_inputs({input_of(r)} + k + {offset}); {dots}"
    yield "            }"
