"""Writes the inner loops of the int8 matrix product as C++ text, one function per number of rows.

Why text: GCC 12 spills accumulators that are held in arrays, which halves the rate of the widest loops. Named variables
and an inline-assembly dot product stay in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PANEL = 32
"""Output channels per weight panel; the packed layout is [panel][k / 4][32 channels][4]."""

HEADER = "// Written by gemm_tiles.py; do not edit.\n"
SIGNATURE = (
    "static __attribute__((noinline)) void tile_{rows}"
    "(const int8_t* a, int64_t lda, const uint8_t* w, int64_t depth, const Epilogue& out, int64_t row) {{"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What fits the registers of one instruction set."""

    guard: str
    max_rows: int
    lanes: int
    prefetch_rows: int

    @property
    def columns(self) -> range:
        return range(PANEL // self.lanes)

    def unroll(self, rows: int) -> tuple[int, int]:
        """(independent accumulator sets, steps of four inputs per turn): few rows need more chains to hide latency."""
        if self.lanes < 16:
            return (2, 2) if rows == 1 else (1, 2)
        return (4, 4) if rows <= 2 else (2, 2) if rows <= 5 else (1, 2)


SHAPES = (
    Shape(guard="MXN_AVX512", max_rows=12, lanes=16, prefetch_rows=8),
    Shape(guard="MXN_AVX2 && defined(__AVXVNNI__)", max_rows=3, lanes=8, prefetch_rows=3),
    Shape(guard="MXN_AVX2 && !defined(__AVXVNNI__)", max_rows=2, lanes=8, prefetch_rows=2),
    Shape(guard="MXN_NEON", max_rows=3, lanes=4, prefetch_rows=3),
)


def generate() -> str:
    """The whole of gemm_tiles.inc: for each instruction set its tiles, MAX_TILE_ROWS and a table of functions."""
    lines = [HEADER]
    for shape in SHAPES:
        lines.append(f"#if {shape.guard}")
        for rows in range(1, shape.max_rows + 1):
            lines += _tile(shape, rows)
        names = ", ".join(f"tile_{rows}" for rows in range(1, shape.max_rows + 1))
        lines.append(f"constexpr int MAX_TILE_ROWS = {shape.max_rows};")
        lines.append(f"static constexpr Tile* const TILES[] = {{nullptr, {names}}};")
        lines.append("#endif")
    return "\n".join(lines) + "\n"


def _tile(shape: Shape, rows: int) -> Iterator[str]:
    chains, steps = shape.unroll(rows)
    yield SIGNATURE.format(rows=rows)
    for chain in range(chains):
        for r in range(rows):
            yield "    VecI " + ", ".join(f"c{chain}_{r}_{j} = zero_i()" for j in shape.columns) + ";"
    yield from row_pointers(rows)
    yield f"    for (int64_t k = 0; k < depth; k += {4 * steps}, w += {steps * 4 * PANEL}) {{"
    for step in range(steps):
        yield from _step(shape, rows, step, step % chains)
    yield "    }"
    for r in range(rows):
        for chain in range(1, chains):
            for j in shape.columns:
                yield f"    c0_{r}_{j} = add_i(c0_{r}_{j}, c{chain}_{r}_{j});"
        yield f"    VecI surplus{r} = set_i(out.row_surplus[row + {r}]);"
        sums = [f"sub_i(c0_{r}_{j}, surplus{r})" for j in shape.columns]
        yield f"    out.store(row + {r}, {halves(sums)});"
    yield "}"


def halves(sums: list[str]) -> str:
    """Sums of a panel's lanes as two vectors of sixteen floats."""
    middle = len(sums) // 2
    return f"real({', '.join(sums[:middle])}), real({', '.join(sums[middle:])})"


def _step(shape: Shape, rows: int, step: int, chain: int) -> Iterator[str]:
    offset = 4 * PANEL * step
    weight_bytes = 4 * shape.lanes
    yield "        {"
    if rows <= shape.prefetch_rows:
        for line in range(0, 4 * PANEL, 64):
            yield f"            prefetch(w + {offset + line} + PREFETCH_BYTES);"
    loads = [f"VecI w{j} = load_weights(w + {offset + weight_bytes * j});" for j in shape.columns]
    inputs = [f"Inputs x{r} = broadcast_inputs({input_of(r)} + k + {4 * step});" for r in range(rows)]
    if shape.lanes == 16:  # registers to spare: hold the weights, walk the rows
        yield "            " + " ".join(loads)
        for r in range(rows):
            yield f"            {inputs[r]} " + " ".join(f"DOT(c{chain}_{r}_{j}, w{j}, x{r});" for j in shape.columns)
    else:  # hold the inputs, walk the weights
        yield "            " + " ".join(inputs)
        for j in shape.columns:
            yield f"            {loads[j]} " + " ".join(f"DOT(c{chain}_{r}_{j}, w{j}, x{r});" for r in range(rows))
    yield "        }"


def row_pointers(rows: int) -> Iterator[str]:
    """One for every third row; addressing modes reach the two after it."""
    for r in range(0, rows, 3):
        yield f"    const int8_t* a{r} = a + {r} * lda;"


def input_of(row: int) -> str:
    """The address of a row's first input."""
    base, offset = row - row % 3, row % 3
    return f"a{base}" + ("", " + lda", " + 2 * lda")[offset]
