// Packs weights: float matrices quantised into any format, and blocks of GGUF files taken over as they are.
#include <math.h>
#include <string.h>
#include <algorithm>
#include <atomic>

#include "gemm.h"
#include "half.h"

// The first row that holds NaN or infinity, found by threads in any order.
class FirstBad {
   public:
    explicit FirstBad(int64_t rows) : rows(rows), first(rows) {}
    void note(int64_t row) {
        int64_t seen = first.load();
        while (row < seen && !first.compare_exchange_weak(seen, row)) {}
    }
    int64_t found() const { return first.load() == rows ? -1 : first.load(); }

   private:
    const int64_t rows;
    std::atomic<int64_t> first;
};

// The largest size of `count` values, or infinity if one of them is not finite.
static float largest(const float* x, int64_t count) {
    float peak = 0.f;
    bool finite = true;
    for (int64_t i = 0; i < count; i++) {
        float size = fabsf(x[i]);
        finite &= size < INFINITY;
        peak = size > peak ? size : peak;
    }
    return finite ? peak : INFINITY;
}

// Packs rows of a float matrix with one scale per channel. Returns -1, or the first row that holds NaN or infinity.
extern "C" int64_t mxn_pack_int8(Workspace* space, const float* weight, int64_t n, int64_t k, uint8_t* panels, float* scales) {
    int64_t depth = (k + GROUP - 1) / GROUP * GROUP;
    long count = (n + PANEL - 1) / PANEL;
    FirstBad bad(n);
    Turn turn(space);
    space->team.run(&count, 1, false, [&](int, long p, int) {
        uint8_t* panel = panels + p * PANEL * depth;
        memset(panel, 128, PANEL * depth);
        for (int c = 0; c < PANEL; c++) {
            int64_t row = p * PANEL + c;
            scales[row] = 0.f;
            if (row >= n) continue;
            const float* x = weight + row * k;
            float peak = largest(x, k);
            if (!(peak < INFINITY)) bad.note(row);
            if (!(peak < INFINITY) || peak < SMALLEST) continue;
            float inverse = 127.f / peak;
            for (int64_t i = 0; i < k; i++) panel[i / 4 * (4 * PANEL) + c * 4 + i % 4] = (uint8_t)(128 + (int)rintf(x[i] * inverse));
            scales[row] = peak / 127.f;
        }
    });
    return bad.found();
}

// ---------------------------------------------------------------- groups

// One channel's group: what is stored for it. Codes are those of the format: 0 to 15, or q + 128.
struct Group {
    half_t scale = 0, minimum = 0;
    uint8_t codes[GROUP];
};

static void place(Format format, int channel, const Group& group, uint8_t* to) {
    for (int i = 0; i < (format == Q8_0 ? GROUP : GROUP / 2); i++) {
        uint8_t byte = format == Q8_0 ? group.codes[i] : group.codes[i] | group.codes[i + GROUP / 2] << 4;
        to[i / 4 * (4 * PANEL) + channel * 4 + i % 4] = byte;
    }
    half_t* halves = (half_t*)(to + value_bytes(format));
    halves[channel] = group.scale;
    if (format == Q4_1) halves[PANEL + channel] = group.minimum;
}

// Calls make(row, index of the group, &group) for every group of the matrix; rows beyond n get zeros. `make` answers false for a row
// that is not finite.
template <class Make> static int64_t pack_groups(Workspace* space, int64_t n, int64_t k, Format format, uint8_t* panels, const Make& make) {
    int64_t groups = (k + GROUP - 1) / GROUP;
    long count = (n + PANEL - 1) / PANEL;
    FirstBad bad(n);
    Turn turn(space);
    space->team.run(&count, 1, false, [&](int, long p, int) {
        uint8_t* to = panels + p * groups * group_bytes(format);
        for (int64_t g = 0; g < groups; g++, to += group_bytes(format))
            for (int c = 0; c < PANEL; c++) {
                Group group;
                memset(group.codes, 0, sizeof group.codes);
                if (p * PANEL + c < n && !make(p * PANEL + c, g, &group)) bad.note(p * PANEL + c);
                place(format, c, group, to);
            }
    });
    return bad.found();
}

// Codes for a scale as it will be read back.
static void code(const float* x, float scale, float minimum, int low, int high, uint8_t* codes) {
    float inverse = scale ? 1.f / scale : 0.f;
    for (int i = 0; i < GROUP; i++) codes[i] = (uint8_t)(std::min(std::max((int)rintf((x[i] - minimum) * inverse), low), high) - low);
}

constexpr int TRIES = 9;  // scales tried on either side of the one that the largest value suggests, a tenth of a step apart

// d * q, q from -8 to 7: of some scales the one whose codes fit best, refitted to them by least squares.
static float fit_scale(const float* x, float peak) {
    float best = -1.f, scale = 0.f, widest = 0.f;
    for (int i = 0; i < GROUP; i++)
        if (fabsf(x[i]) == peak) widest = x[i];
    for (int t = -TRIES; t <= TRIES; t++) {
        float inverse = -(8.f + .1f * t) / widest, xq = 0.f, qq = 0.f;
        for (int i = 0; i < GROUP; i++) {
            float q = std::min(std::max(rintf(x[i] * inverse), -8.f), 7.f);
            xq += x[i] * q, qq += q * q;
        }
        if (qq > 0 && xq * xq > best * qq) best = xq * xq / qq, scale = xq / qq;
    }
    return scale;
}

// d * q + m, q from 0 to 15, likewise.
static void fit_range(const float* x, float* scale, float* minimum) {
    float low = *std::min_element(x, x + GROUP), high = *std::max_element(x, x + GROUP), sum = 0.f, best = INFINITY;
    *scale = 0.f, *minimum = low;
    if (high - low < SMALLEST) return;
    for (int i = 0; i < GROUP; i++) sum += x[i];
    for (int t = -TRIES; t <= TRIES; t++) {
        float inverse = (15.f + .1f * t) / (high - low), q1 = 0.f, qq = 0.f, xq = 0.f, q[GROUP];
        for (int i = 0; i < GROUP; i++) {
            q[i] = std::min(std::max(rintf((x[i] - low) * inverse), 0.f), 15.f);
            q1 += q[i], qq += q[i] * q[i], xq += x[i] * q[i];
        }
        float spread = GROUP * qq - q1 * q1;
        if (!(spread > 0)) continue;
        float d = (GROUP * xq - q1 * sum) / spread, m = (sum - d * q1) / GROUP, error = 0.f;
        for (int i = 0; i < GROUP; i++) error += (x[i] - d * q[i] - m) * (x[i] - d * q[i] - m);
        if (error < best) best = error, *scale = d, *minimum = m;
    }
}

static bool quantise_group(const float* values, int count, Format format, Group* group) {
    float x[GROUP] = {};
    memcpy(x, values, sizeof(float) * count);
    float peak = largest(x, GROUP);
    bool is_code_signed = format != Q4_1;
    memset(group->codes, format == Q8_0 ? 128 : is_code_signed ? 8 : 0, sizeof group->codes);
    if (!(peak < INFINITY)) return false;
    if (peak < SMALLEST) return true;
    float scale = peak / 127.f, minimum = 0.f;
    if (format == Q4_0) scale = fit_scale(x, peak);
    if (format == Q4_1) fit_range(x, &scale, &minimum);
    group->scale = to_half(scale), group->minimum = to_half(minimum);
    scale = to_float(group->scale), minimum = to_float(group->minimum);
    if (!(fabsf(scale) < INFINITY && fabsf(minimum) < INFINITY)) return false;
    if (format == Q8_0) {
        code(x, scale, 0.f, -127, 127, group->codes);
        for (uint8_t& c : group->codes) c += 1;  // q + 128
    } else if (format == Q4_0) code(x, scale, 0.f, -8, 7, group->codes);
    else code(x, scale, minimum, 0, 15, group->codes);
    return true;
}

// Quantises rows of a float matrix in groups. Returns -1, or the first row that is not finite or too large for half-precision scales.
extern "C" int64_t mxn_pack_groups(Workspace* space, const float* weight, int64_t n, int64_t k, Format format, uint8_t* panels) {
    return pack_groups(space, n, k, format, panels, [&](int64_t row, int64_t g, Group* group) {
        return quantise_group(weight + row * k + g * GROUP, (int)std::min<int64_t>(GROUP, k - g * GROUP), format, group);
    });
}

// Takes over a GGUF tensor's blocks: [n][k / 32] of half d, for Q4_1 half m, then 32 signed bytes or 16 bytes of two values.
// Returns -1, or the first row with a scale that is not finite.
extern "C" int64_t mxn_take_blocks(Workspace* space, const uint8_t* blocks, int64_t n, int64_t k, Format format, uint8_t* panels) {
    int64_t block_bytes = group_bytes(format) / PANEL;
    return pack_groups(space, n, k, format, panels, [&](int64_t row, int64_t g, Group* group) {
        const uint8_t* from = blocks + (row * (k / GROUP) + g) * block_bytes;
        memcpy(&group->scale, from, sizeof(half_t));
        from += sizeof(half_t);
        if (format == Q4_1) memcpy(&group->minimum, from, sizeof(half_t)), from += sizeof(half_t);
        for (int i = 0; i < GROUP; i++)
            group->codes[i] = format == Q8_0 ? from[i] ^ 128 : i < GROUP / 2 ? from[i] & 15 : from[i - GROUP / 2] >> 4;
        return fabsf(to_float(group->scale)) < INFINITY && fabsf(to_float(group->minimum)) < INFINITY;
    });
}
