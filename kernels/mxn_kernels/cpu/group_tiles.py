"""Writes the inner loops of the grouped products (4 and 8 bits, a scale per 32 inputs) as C++ text.

One function template per number of rows; the format is its parameter. Why text: see `gemm_tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mxn_kernels.cpu.gemm_tiles import HEADER, PANEL, input_of, row_pointers

GROUP = 32
FLOATS = 16
"""Lanes of a vector of floats, half a panel."""
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
    halves_at_once: int

    def columns(self, half: int) -> range:
        """The registers that hold sixteen channels of a panel."""
        width = FLOATS // self.lanes
        return range(half * width, (half + 1) * width)


SHAPES = (
    Shape(guard="MXN_AVX512", max_rows=6, lanes=16, halves_at_once=2),
    Shape(guard="MXN_AVX2", max_rows=2, lanes=8, halves_at_once=1),
    Shape(guard="MXN_NEON", max_rows=2, lanes=4, halves_at_once=1),
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
    yield "        const half_t* scales = (const half_t*)(w + value_bytes(F));"
    for first in range(0, PANEL // FLOATS, shape.halves_at_once):
        yield from _halves(shape, rows, range(first, first + shape.halves_at_once))
    yield "    }"
    for r in range(rows):
        yield f"    out.store(row + {r}, f{r}_0, f{r}_1);"
    yield "}"


def _halves(shape: Shape, rows: int, halves: range) -> Iterator[str]:
    """A group's sums of some halves of the panel, scaled and added to the row's."""
    columns = [j for half in halves for j in shape.columns(half)]
    for r in range(rows):
        yield "        VecI " + ", ".join(f"c{r}_{j} = set_i(-OFFSET * sum{r})" for j in columns) + ";"
    yield "        if constexpr (F == Q8_0) {"
    for step in range(GROUP // 4):
        yield from _bytes(shape, rows, step, columns)
    yield "        } else {"
    for step in range(GROUP // 8):
        yield from _nibbles(shape, rows, step, columns)
    yield "        }"
    for half in halves:
        yield f"        Vec16 d{half} = load16_half(scales + {half} * LANES);"
        for r in range(rows):
            sums = ", ".join(f"c{r}_{j}" for j in shape.columns(half))
            yield f"        f{r}_{half} = fma(d{half}, real({sums}), f{r}_{half});"
        yield "        if constexpr (F == Q4_1) {"
        yield f"            Vec16 m = load16_half(scales + PANEL + {half} * LANES);"
        for r in range(rows):
            yield f"            f{r}_{half} = fma(m, set16((float)sum{r}), f{r}_{half});"
        yield "        }"


def _bytes(shape: Shape, rows: int, step: int, columns: list[int]) -> Iterator[str]:
    yield "            {"
    for j in columns:
        yield f"                VecI w{j} = load_weights(w + {_STEP_BYTES * step + 4 * shape.lanes * j});"
    for r in range(rows):
        dots = " ".join(f"DOT(c{r}_{j}, w{j}, x{r});" for j in columns)
        yield f"                Inputs x{r} = broadcast_inputs({input_of(r)} + k + {4 * step}); {dots}"
    yield "            }"


def _nibbles(shape: Shape, rows: int, step: int, columns: list[int]) -> Iterator[str]:
    yield "            {"
    for j in columns:
        yield f"                VecI b{j} = load_nibbles(w + {_STEP_BYTES * step + 4 * shape.lanes * j});"
        yield f"                VecI l{j} = low_nibbles(b{j}), h{j} = high_nibbles(b{j});"
    for half, offset in (("l", 4 * step), ("h", GROUP // 2 + 4 * step)):
        for r in range(rows):
            dots = " ".join(f"DOT(c{r}_{j}, {half}{j}, {half}x{r});" for j in columns)
            yield f"                Inputs {half}x{r} = broadcast_inputs({input_of(r)} + k + {offset}); {dots}"
    yield "            }"
