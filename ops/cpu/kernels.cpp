// What a step computes on a CPU with AVX512-BF16, in loops of its own: attention, the gradients of weights, the loss, norms and
// gates. build.py compiles this file and calls it; the definitions are in the files named below. An instruction adds
// a_0 b_0 + a_1 b_1 of a pair of bf16 to each of 16 fp32 sums, so the factors of a product lie in pairs, in panels of 16:
//
//     across   X (rows, n) as [rows / 16][n / 2][16 rows]       pairs of neighbouring columns, for products with Xᵀ
//     along    X (rows, n) as [n / 16][rows / 2][16 columns]    pairs of neighbouring rows, for products with X
//
// Each result is summed by one thread in an order of its own, however many threads there are: the same bits in every run.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using pair = uint32_t;      // two bf16
using bf16 = uint16_t;

constexpr int STRIP = 12, PANEL = 16;       // rows of one product, and columns of one instruction

// ---------------------------------------------------------------------------------------------------------------------
// Products

// C (MR, NP · 16) = A B, or += with `add`, over `count` pairs: A's pair k of row m at a[m · am + k · ak], B's panels `bn` apart,
// C's rows `cm`.
template <int MR, int NP>
inline void product(const pair* a, int64_t am, int64_t ak, const pair* b, int64_t bn, int64_t count, float* c, int64_t cm, bool add) {
    __m512 sums[MR][NP];
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NP; n++) {
            sums[m][n] = _mm512_setzero_ps();
            if (add) _mm_prefetch((const char*)(c + m * cm + n * PANEL), _MM_HINT_T0);
        }
    const pair* rows[(MR + 2) / 3];
    for (int m = 0; m < MR; m += 3) rows[m / 3] = a + m * am;
    for (int64_t k = 0; k < count; k++) {
        __m512bh right[NP];
        for (int n = 0; n < NP; n++) right[n] = (__m512bh)_mm512_loadu_si512(b + n * bn + k * PANEL);
        for (int m = 0; m < MR; m++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(rows[m / 3][m % 3 * am]);
            for (int n = 0; n < NP; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], left, right[n]);
        }
        for (auto& row : rows) row += ak;
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NP; n++) {
            float* to = c + m * cm + n * PANEL;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[m][n]) : sums[m][n]);
        }
}

// A strip's rows, `am` pairs apart, times `width` panels of B.
inline void strip_product(const pair* a, int64_t am, const pair* b, int64_t bn, int64_t count, float* c, int64_t cm, int width, bool add) {
    int n = 0;
    for (; n + 2 <= width; n += 2) product<STRIP, 2>(a, am, 1, b + n * bn, bn, count, c + n * PANEL, cm, add);
    if (n < width) product<STRIP, 1>(a, am, 1, b + n * bn, bn, count, c + n * PANEL, cm, add);
}

inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            t[8 * j + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + 4 + i], 0x88);
            t[8 * j + 4 + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

inline __m512i load16(const bf16* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)); }
inline __m512i paired(__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
inline __m512 low_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 high_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))); }
inline __m512 load(const bf16* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(load16(x), 16)); }
inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, rounded(x)); }

// One panel of rows `across`: row i at x + i · stride, those from `rows` on zero.
void across(const bf16* x, int64_t stride, int rows, int H, pair* to) {
    for (int h = 0; h < H; h += 32) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_loadu_si512(x + i * stride + h) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (h / 2 + i) * PANEL, r[i]);
    }
}

// A pair of rows `along`; either may be missing. Panels of columns are `apart`.
inline void along(const bf16* low, const bf16* high, int H, pair* to, int64_t apart) {
    for (int h = 0; h < H; h += PANEL, to += apart)
        _mm512_storeu_si512(to, paired(low ? load16(low + h) : _mm512_setzero_si512(), high ? load16(high + h) : _mm512_setzero_si512()));
}

// 2^x; NaN of NaN, which is why x is the second operand.
inline __m512 exp2(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(127.f), _mm512_max_ps(_mm512_set1_ps(-150.f), x));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

constexpr float LOG2_E = 1.44269504f;

// ---------------------------------------------------------------------------------------------------------------------
// Attention (ops/attention.py). The rows of a product are the G query heads that share a kv head, of one token after the
// other. A block of queries (a row of `Tables.queries`) is cut into strips of such rows, the keys into panels, from multiples of
// 16 on: no product goes further than 16 keys beyond what a strip sees at either end, and what lies between two products stays in
// the cache. Scores are summed in fp32. K and V are laid out across for S = Q Kᵀ and dP = dO Vᵀ, along for O = P V and dQ = dS K;
// dO and Q of a block along for dV = Pᵀ dO and dK = dSᵀ Q. P and dS of a block lie as [panels][rows / 2][16 keys], pairs of rows.
//
// One loop over blocks gives O and P; in the backward pass one over blocks gives dS and dQ, one over keys dK and dV.

struct Span {
    int lo, hi;
    int size() const { return hi - lo; }
};

// The panels in which keys lie.
inline Span panels(Span keys) { return keys.size() > 0 ? Span{keys.lo / PANEL, (keys.hi + PANEL - 1) / PANEL} : Span{0, 0}; }

// Which of a panel's keys lie within these.
inline __mmask16 inside(int panel, Span keys) {
    const int lo = std::clamp(keys.lo - panel * PANEL, 0, PANEL), hi = std::clamp(keys.hi - panel * PANEL, 0, PANEL);
    return lo < hi ? ((1u << hi) - 1) & ~((1u << lo) - 1) : 0;
}

// What Python fills in; the tables are those of `Tables`.
struct Call {
    int64_t N, K, H, keys, first_query, blocks;     // query heads, kv heads, head dim; all keys; the first query's place among them
    const int32_t (*queries)[6];
    const int32_t* seen;
    float scale;

    int G() const { return N / K; }
    int key_panels() const { return (keys + PANEL - 1) / PANEL; }
    int64_t laid_out() const { return (int64_t)key_panels() * PANEL / 2 * H; }      // pairs of one kv head's K or V

    Span own(int token) const { return {seen[first_query + token], (int)first_query + token + 1}; }
    Span old(int token) const { return {seen[keys + first_query + token], seen[2 * keys + first_query + token]}; }
};

// A block of queries of one kv head.
struct Block {
    const Call& call;
    int head, first, count, rows, strips, pairs;    // its first token and how many; pairs of rows, the last strip complete
    Span own, old;                                  // the panels of its own run that any token sees, and of the beginning that it continues

    Block(const Call& call, int head, int number) : call(call), head(head) {
        const int32_t* row = call.queries[number];
        first = row[0], count = row[1], own = panels({row[2], row[3]}), old = panels({row[4], row[5]});
        rows = count * call.G(), strips = (rows + STRIP - 1) / STRIP, pairs = strips * STRIP / 2;
    }

    int width() const { return old.size() + own.size(); }
    int token(int row) const { return first + row / call.G(); }
    int64_t at(int row) const { return ((int64_t)token(row) * call.N + head * call.G() + row % call.G()) * call.H; }     // in q, dO and O

    // The panels of its own run that a strip's rows see.
    Span seen_by(int strip) const {
        Span all{INT32_MAX, 0};
        for (int t = token(strip * STRIP); t <= token(std::min(rows, strip * STRIP + STRIP) - 1); t++) {
            const Span one = panels(call.own(t));
            all.lo = std::min(all.lo, one.lo), all.hi = std::max(all.hi, one.hi);
        }
        return all;
    }
};

// Where the blocks' parts lie, one kv head's after the other's, in pairs.
struct Places {
    std::vector<int64_t> weights, rows;             // of P and dS, of dO and Q `along`; one more than there are blocks
    int widest = 1;                                 // panels of a block

    explicit Places(const Call& call) : weights(call.blocks + 1), rows(call.blocks + 1) {
        for (int b = 0; b < call.blocks; b++) {
            const Block block(call, 0, b);
            weights[b + 1] = weights[b] + (int64_t)block.width() * block.pairs * PANEL;
            rows[b + 1] = rows[b] + block.pairs * call.H;
            widest = std::max(widest, block.width());
        }
    }
    int64_t of_weights(int head, int b) const { return head * weights.back() + weights[b]; }
    int64_t of_rows(int head, int b) const { return head * rows.back() + rows[b]; }
};

// A strip on its way through a thread: its rows, its scores or dP, P or dS row by row, and O or dQ.
struct Strip {
    const Call& call;
    std::vector<float> scores, sums;
    std::vector<bf16> rows, weights;
    Span old, own;
    int first, count, columns;                      // rows, and panels that they see
    int64_t width;                                  // keys

    Strip(const Call& call, int widest)
        : call(call), scores(STRIP * widest * PANEL), sums(STRIP * call.H), rows(STRIP * call.H), weights(STRIP * widest * PANEL) {}

    // Take rows of q or dO and multiply them with K or V: scores (STRIP, width), the beginning's columns first.
    void take(const Block& block, int strip, const bf16* x, const pair* across) {
        first = strip * STRIP, count = std::min(STRIP, block.rows - first);
        old = block.old, own = block.seen_by(strip), columns = old.size() + own.size(), width = columns * PANEL;
        for (int i = 0; i < STRIP; i++)
            if (i < count) memcpy(&rows[i * call.H], x + block.at(first + i), call.H * sizeof(bf16));
            else memset(&rows[i * call.H], 0, call.H * sizeof(bf16));
        const int64_t panel = PANEL / 2 * call.H;
        const pair* a = (const pair*)rows.data();
        strip_product(a, call.H / 2, across + old.lo * panel, panel, call.H / 2, &scores[0], width, old.size(), false);
        strip_product(a, call.H / 2, across + own.lo * panel, panel, call.H / 2, &scores[old.size() * PANEL], width, own.size(), false);
    }

    // Where the block's P or dS has a column's panel for two of the strip's rows.
    int64_t place(const Block& block, int column, int row) const {
        const int64_t panel = column < old.size() ? column : column + own.lo - block.own.lo;
        return (panel * block.pairs + (first + row) / 2) * PANEL;
    }

    // Keep two rows of a column's panel, row by row, and give them as pairs.
    __m512i keep(int row, int column, __m512 low, __m512 high) {
        const __m256i a = rounded(low), b = rounded(high);
        _mm256_storeu_si256((__m256i*)&weights[row * width + column * PANEL], a);
        _mm256_storeu_si256((__m256i*)&weights[(row + 1) * width + column * PANEL], b);
        return paired(_mm512_cvtepu16_epi32(a), _mm512_cvtepu16_epi32(b));
    }

    // Multiply what was kept with V or K, and write the rows of O or dQ.
    void give(const Block& block, const pair* along, float scale, bf16* x) {
        const int64_t panel = call.laid_out() / call.H * PANEL, half = PANEL / 2;
        const pair* a = (const pair*)weights.data();
        const int wide = call.H / PANEL;
        strip_product(a, width / 2, along + old.lo * half * PANEL, panel, old.size() * half, &sums[0], call.H, wide, false);
        strip_product(a + old.size() * half, width / 2, along + own.lo * half * PANEL, panel, own.size() * half, &sums[0], call.H, wide,
                      true);
        for (int i = 0; i < count; i++)
            for (int h = 0; h < call.H; h += PANEL)
                store(x + block.at(first + i) + h, _mm512_mul_ps(_mm512_loadu_ps(&sums[i * call.H + h]), _mm512_set1_ps(scale)));
    }
};

// K or V of all kv heads, in one of the layouts.
void lay_out(const Call& call, const bf16* x, bool is_across, pair* to) {
    const int panels = call.key_panels();
    const int64_t stride = call.K * call.H;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < call.K * panels; i++) {
        const int head = i / panels, first = i % panels * PANEL, there = std::min<int64_t>(PANEL, call.keys - first);
        const bf16* rows = x + first * stride + head * call.H;
        pair* mine = to + head * call.laid_out();
        if (is_across) across(rows, stride, there, call.H, mine + first / 2 * call.H);
        else
            for (int j = 0; j < PANEL; j += 2)
                along(j < there ? rows + j * stride : nullptr, j + 1 < there ? rows + (j + 1) * stride : nullptr, call.H,
                      mine + (first + j) / 2 * PANEL, call.laid_out() / call.H * PANEL);
    }
}

// Sums (H, 16 keys) as rows of dK or dV.
void store_columns(const Call& call, const float* sums, float scale, bf16* x, int panel, int head) {
    for (int h = 0; h < call.H; h += PANEL) {
        __m512i r[16];
        for (int j = 0; j < PANEL; j++) r[j] = _mm512_loadu_si512(sums + (h + j) * PANEL);
        transpose(r);
        for (int j = 0; j < std::min<int64_t>(PANEL, call.keys - panel * PANEL); j++)
            store(x + ((int64_t)(panel * PANEL + j) * call.K + head) * call.H + h,
                  _mm512_mul_ps(_mm512_castsi512_ps(r[j]), _mm512_set1_ps(scale)));
    }
}

}  // namespace

extern "C" {

// Pairs of room for P, and for what a pass lays out.
int64_t attention_weights(const Call* call) { return call->K * Places(*call).weights.back(); }
int64_t attention_room(const Call* call, bool backward) {
    const Places places(*call);
    return call->K * (2 * call->laid_out() + backward * (2 * places.rows.back() + places.weights.back()));
}

// O, and P unless that is null.  q and out (queries, N, H), k and v (keys, K, H), all bf16.
void attention_forward(const Call* given, const bf16* q, const bf16* k, const bf16* v, bf16* out, pair* p, pair* room) {
    const Call& call = *given;
    const Places places(call);
    pair *k_across = room, *v_along = room + call.K * call.laid_out();
    lay_out(call, k, true, k_across);
    lay_out(call, v, false, v_along);
    const __m512 scale = _mm512_set1_ps(call.scale * LOG2_E);                // scores are in powers of two
#pragma omp parallel
    {
        Strip strip(call, places.widest);
#pragma omp for schedule(dynamic)
        for (int i = 0; i < call.blocks * call.K; i++) {
            const Block block(call, i % call.K, i / call.K);
            pair* mine = p ? p + places.of_weights(block.head, i / call.K) : nullptr;
            for (int number = 0; number < block.strips; number++) {
                strip.take(block, number, q, k_across + block.head * call.laid_out());
                float shares[STRIP] = {};
                for (int r = 0; r < strip.count; r++) {                     // exp(s score − top), not yet divided by their sum
                    float* scores = &strip.scores[r * strip.width];
                    const int token = block.token(strip.first + r);
                    auto mask = [&](int column) {
                        return column < strip.old.size() ? inside(strip.old.lo + column, call.old(token))
                                                         : inside(strip.own.lo + column - strip.old.size(), call.own(token));
                    };
                    __m512 top = _mm512_set1_ps(-3e38f), total = _mm512_setzero_ps();
                    for (int c = 0; c < strip.columns; c++) {
                        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + c * PANEL), scale);
                        _mm512_storeu_ps(scores + c * PANEL, x);
                        top = _mm512_mask_max_ps(top, mask(c), top, x);
                    }
                    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
                    for (int c = 0; c < strip.columns; c++) {
                        const __m512 x = _mm512_maskz_mov_ps(mask(c), exp2(_mm512_sub_ps(_mm512_loadu_ps(scores + c * PANEL), top)));
                        _mm512_storeu_ps(scores + c * PANEL, x);
                        total = _mm512_add_ps(total, x);
                    }
                    shares[r] = 1 / _mm512_reduce_add_ps(total);
                }
                for (int r = 0; r < STRIP; r += 2)
                    for (int c = 0; c < strip.columns; c++) {
                        const float* scores = &strip.scores[r * strip.width + c * PANEL];
                        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(scores), _mm512_set1_ps(shares[r]));
                        const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(scores + strip.width), _mm512_set1_ps(shares[r + 1]));
                        const __m512i pairs = strip.keep(r, c, low, high);
                        if (mine) _mm512_storeu_si512(mine + strip.place(block, c, r), pairs);
                    }
                strip.give(block, v_along + block.head * call.laid_out(), 1, out);
            }
        }
    }
}

// dQ, dK and dV of dO and of the P that the forward pass gave; all bf16.
void attention_backward(const Call* given, const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const pair* p, bf16* dq, bf16* dk,
                        bf16* dv, pair* room) {
    const Call& call = *given;
    const Places places(call);
    const int H = call.H, panels = call.key_panels();
    pair *v_across = room, *k_along = v_across + call.K * call.laid_out(), *q_along = k_along + call.K * call.laid_out();
    pair *dout_along = q_along + call.K * places.rows.back(), *ds = dout_along + call.K * places.rows.back();
    lay_out(call, v, true, v_across);
    lay_out(call, k, false, k_along);
#pragma omp parallel
    {
        Strip strip(call, places.widest);
#pragma omp for schedule(dynamic)
        for (int i = 0; i < call.blocks * call.K; i++) {                    // dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = s dS K
            const Block block(call, i % call.K, i / call.K);
            const int64_t start = places.of_weights(block.head, i / call.K);
            for (int number = 0; number < block.strips; number++) {
                strip.take(block, number, dout, v_across + block.head * call.laid_out());
                for (int r = 0; r < STRIP; r += 2) {
                    const float *dp_low = &strip.scores[r * strip.width], *dp_high = dp_low + strip.width;
                    __m512 low = _mm512_setzero_ps(), high = low;
                    for (int c = 0; c < strip.columns; c++) {
                        const __m512i pairs = _mm512_loadu_si512(p + start + strip.place(block, c, r));
                        low = _mm512_fmadd_ps(low_half(pairs), _mm512_loadu_ps(dp_low + c * PANEL), low);
                        high = _mm512_fmadd_ps(high_half(pairs), _mm512_loadu_ps(dp_high + c * PANEL), high);
                    }
                    low = _mm512_set1_ps(_mm512_reduce_add_ps(low)), high = _mm512_set1_ps(_mm512_reduce_add_ps(high));
                    for (int c = 0; c < strip.columns; c++) {
                        const int64_t at = start + strip.place(block, c, r);
                        const __m512i pairs = _mm512_loadu_si512(p + at);
                        const __m512 a = _mm512_mul_ps(low_half(pairs), _mm512_sub_ps(_mm512_loadu_ps(dp_low + c * PANEL), low));
                        const __m512 b = _mm512_mul_ps(high_half(pairs), _mm512_sub_ps(_mm512_loadu_ps(dp_high + c * PANEL), high));
                        _mm512_storeu_si512(ds + at, strip.keep(r, c, a, b));
                    }
                }
                strip.give(block, k_along + block.head * call.laid_out(), call.scale, dq);
            }
            for (int r = 0; r < block.pairs; r++)
                for (auto [x, to] : {std::pair(q, q_along), std::pair(dout, dout_along)})
                    along(2 * r < block.rows ? x + block.at(2 * r) : nullptr, 2 * r + 1 < block.rows ? x + block.at(2 * r + 1) : nullptr, H,
                          to + places.of_rows(block.head, i / call.K) + r * PANEL, (int64_t)block.pairs * PANEL);
        }

        constexpr int GROUP = 4;                                            // panels at once: a block's dO and Q are then in the cache
        const int groups = (panels + GROUP - 1) / GROUP;
        std::vector<float> dk_sums(GROUP * PANEL * H), dv_sums(GROUP * PANEL * H);
#pragma omp for schedule(dynamic)
        for (int i = 0; i < groups * call.K; i++) {                         // dVᵀ = dOᵀ P, dKᵀ = s Qᵀ dS
            const int head = i / groups, lo = i % groups * GROUP, hi = std::min(panels, lo + GROUP);
            std::fill(dk_sums.begin(), dk_sums.end(), 0.f);
            std::fill(dv_sums.begin(), dv_sums.end(), 0.f);
            for (int b = 0; b < call.blocks; b++) {
                const Block block(call, head, b);
                auto add = [&](int panel, int column, int strip, int end) {
                    const int64_t at = places.of_weights(head, b) + ((int64_t)column * block.pairs + strip * STRIP / 2) * PANEL;
                    for (int h = 0; h < H; h += PANEL) {
                        const int64_t rows = places.of_rows(head, b) + (int64_t)h * block.pairs + strip * STRIP / 2 * PANEL;
                        const int64_t sums = ((panel - lo) * H + h) * PANEL, count = (end - strip) * STRIP / 2;
                        product<PANEL, 1>(dout_along + rows, 1, PANEL, p + at, 0, count, &dv_sums[sums], PANEL, true);
                        product<PANEL, 1>(q_along + rows, 1, PANEL, ds + at, 0, count, &dk_sums[sums], PANEL, true);
                    }
                };
                for (int panel = std::max(lo, block.old.lo); panel < std::min(hi, block.old.hi); panel++)
                    add(panel, panel - block.old.lo, 0, block.strips);
                for (int panel = std::max(lo, block.own.lo); panel < std::min(hi, block.own.hi); panel++) {
                    auto sees = [&](int strip) {
                        const Span own = block.seen_by(strip);
                        return own.lo <= panel && panel < own.hi;
                    };
                    int strip = 0, end = block.strips;
                    while (strip < end && !sees(strip)) strip++;
                    while (strip < end && !sees(end - 1)) end--;
                    if (strip < end) add(panel, block.old.size() + panel - block.own.lo, strip, end);
                }
            }
            for (int panel = lo; panel < hi; panel++) {
                store_columns(call, &dk_sums[(panel - lo) * H * PANEL], call.scale, dk, panel, head);
                store_columns(call, &dv_sums[(panel - lo) * H * PANEL], 1, dv, panel, head);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights' gradients and the loss (ops/cross_entropy.py)

// dW (O, I) fp32 = dYᵀ X of dY (M, O), whose rows lie dy_row apart, and X (M, I), or += with `add`; O and I multiples of 16.
void weight_gradient(const bf16* dy, const bf16* x, float* dw, int64_t dy_row, int64_t M, int64_t O, int64_t I, bool add) {
    constexpr int64_t ROWS = 1024, OUTPUTS = 64;
    std::vector<pair> room(std::min(ROWS, M + 1) / 2 * I);
    for (int64_t first = 0; first == 0 || first < M; first += ROWS) {
        const int64_t count = std::min(ROWS, M - first), pairs = (count + 1) / 2;
        auto lay = [&](const bf16* from, int64_t stride, int64_t columns, int64_t r, pair* to) {
            from += (first + 2 * r) * stride;
            along(from, 2 * r + 1 < count ? from + stride : nullptr, columns, to + r * PANEL, pairs * PANEL);
        };
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < pairs; r++) lay(x, I, I, r, room.data());
            std::vector<pair> mine(OUTPUTS * pairs);
#pragma omp for schedule(dynamic)
            for (int64_t o = 0; o < O; o += OUTPUTS) {
                const int64_t outputs = std::min(OUTPUTS, O - o);
                for (int64_t r = 0; r < pairs; r++) lay(dy + o, dy_row, outputs, r, mine.data());
                for (int64_t i = 0; i < I / PANEL; i += 3)
                    for (int64_t w = 0; w < outputs; w += 8) {
                        const pair *a = mine.data() + w / PANEL * pairs * PANEL + w % PANEL, *b = room.data() + i * pairs * PANEL;
                        auto multiply = I / PANEL - i == 1 ? product<8, 1> : I / PANEL - i == 2 ? product<8, 2> : product<8, 3>;
                        multiply(a, 1, PANEL, b, pairs * PANEL, pairs, dw + (o + w) * I + i * PANEL, I, add || first);
                    }
            }
        }
    }
}

// logits (M, V) = h Wᵀ rounded to bf16, h (M, D), W (V, D), and log_sums (M) = log Σ exp of them; V a multiple of 16, D of 32.
void loss_logits(const bf16* h, const bf16* w, bf16* logits, float* log_sums, int64_t M, int64_t V, int64_t D) {
    constexpr int64_t SPAN = 4096, WORDS = 64;
    const int64_t strips = (M + STRIP - 1) / STRIP, rows = strips * STRIP, spans = (V + SPAN - 1) / SPAN;
    std::vector<bf16> padded(rows * D, 0);
    memcpy(padded.data(), h, M * D * sizeof(bf16));
    std::vector<float> tops(spans * M, -3e38f), totals(spans * M, 0);       // of a span's scores in powers of two, row by row
#pragma omp parallel
    {
        std::vector<pair> words(WORDS * D / 2);
        std::vector<float> scores(STRIP * WORDS);
#pragma omp for schedule(dynamic)
        for (int64_t span = 0; span < spans; span++)
            for (int64_t word = span * SPAN; word < std::min(V, (span + 1) * SPAN); word += WORDS) {
                const int wide = std::min(WORDS, V - word) / PANEL;
                for (int n = 0; n < wide; n++) across(w + (word + n * PANEL) * D, D, PANEL, D, &words[n * PANEL * D / 2]);
                for (int64_t first = 0; first < M; first += STRIP) {
                    const pair* strip = (const pair*)&padded[first * D];
                    strip_product(strip, D / 2, words.data(), PANEL * D / 2, D / 2, scores.data(), WORDS, wide, false);
                    for (int64_t r = first; r < std::min(M, first + STRIP); r++) {
                        __m512 x[WORDS / PANEL], top = _mm512_set1_ps(-3e38f), total = _mm512_setzero_ps();
                        for (int n = 0; n < wide; n++) {
                            bf16* to = logits + r * V + word + n * PANEL;
                            store(to, _mm512_loadu_ps(&scores[(r - first) * WORDS + n * PANEL]));
                            x[n] = _mm512_mul_ps(load(to), _mm512_set1_ps(LOG2_E));
                            top = _mm512_max_ps(top, x[n]);
                        }
                        float &highest = tops[span * M + r], &sum = totals[span * M + r];
                        const float higher = std::max(highest, _mm512_reduce_max_ps(top));
                        for (int n = 0; n < wide; n++) total = _mm512_add_ps(total, exp2(_mm512_sub_ps(x[n], _mm512_set1_ps(higher))));
                        sum = sum * std::exp2(highest - higher) + _mm512_reduce_add_ps(total), highest = higher;
                    }
                }
            }
    }
    for (int64_t r = 0; r < M; r++) {
        float top = -3e38f;
        double total = 0;
        for (int64_t span = 0; span < spans; span++) top = std::max(top, tops[span * M + r]);
        for (int64_t span = 0; span < spans; span++) total += totals[span * M + r] * std::exp2((double)tops[span * M + r] - top);
        log_sums[r] = (top + std::log2(total)) / (double)LOG2_E;
    }
}

// In the logits' place softmax − onehot(target); zeros where the target is negative.
void loss_gradient(bf16* logits, const float* log_sums, const int64_t* targets, int64_t M, int64_t V) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < M; r++) {
        bf16* row = logits + r * V;
        if (targets[r] < 0) {
            memset(row, 0, V * sizeof(bf16));
            continue;
        }
        const uint32_t bits = (uint32_t)row[targets[r]] << 16;
        float logit;
        memcpy(&logit, &bits, sizeof logit);
        for (int64_t word = 0; word < V; word += PANEL)
            store(row + word, exp2(_mm512_mul_ps(_mm512_sub_ps(load(row + word), _mm512_set1_ps(log_sums[r])), _mm512_set1_ps(LOG2_E))));
        _mm_storeu_si16(row + targets[r], (__m128i)_mm_cvtneps_pbh(_mm_set1_ps(std::expm1(logit - log_sums[r]))));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms (ops/rms_norm.py): rows of D, a multiple of 32, `heads` of them side by side, which lie `x_row` apart in x and are
// row-major elsewhere. cos and sin (rows / heads, D), whose halves are alike. residual, cos and sin, dskip and dw may be null.

void norm_forward(const bf16* x, const float* w, const bf16* residual, const bf16* cos, const bf16* sin, bf16* y, float* r, float eps,
                  int64_t x_row, int64_t heads, int64_t M, int64_t D) {
    const __m512 one = _mm512_set1_ps(1);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < M; row++) {
        const bf16 *from = x + row / heads * x_row + row % heads * D, *c = cos + row / heads * D, *s = sin + row / heads * D;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < D; i += PANEL) squares = _mm512_fmadd_ps(load(from + i), load(from + i), squares);
        r[row] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps);
        const __m512 scale = _mm512_set1_ps(r[row]);
        auto normed = [&](int64_t i) {
            return _mm512_mul_ps(_mm512_mul_ps(load(from + i), scale), _mm512_add_ps(one, _mm512_loadu_ps(w + i)));
        };
        bf16* to = y + row * D;
        if (cos)
            for (int64_t i = 0, j = D / 2; i < D / 2; i += PANEL, j += PANEL) {
                const __m512 low = normed(i), high = normed(j);
                store(to + i, _mm512_fmsub_ps(low, load(c + i), _mm512_mul_ps(high, load(s + i))));
                store(to + j, _mm512_fmadd_ps(high, load(c + i), _mm512_mul_ps(low, load(s + i))));
            }
        else
            for (int64_t i = 0; i < D; i += PANEL)
                store(to + i, residual ? _mm512_add_ps(normed(i), load(residual + row * D + i)) : normed(i));
    }
}

void norm_backward(const bf16* x, const float* w, const bf16* cos, const bf16* sin, const bf16* dy, const bf16* dskip, const float* r,
                   bf16* dx, float* dw, int64_t x_row, int64_t heads, int64_t M, int64_t D) {
    constexpr int64_t ROWS = 256;                                           // that add up their share of dw
    const int64_t parts = (M + ROWS - 1) / ROWS;
    std::vector<float> shares(dw ? parts * D : 0, 0);
#pragma omp parallel
    {
        std::vector<float> dn(D);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++)
            for (int64_t row = part * ROWS; row < std::min(M, (part + 1) * ROWS); row++) {
                const bf16 *from = x + row / heads * x_row + row % heads * D, *c = cos + row / heads * D, *s = sin + row / heads * D;
                const bf16* d = dy + row * D;
                for (int64_t i = 0, j = D / 2; i < D / 2; i += PANEL, j += PANEL) {
                    const __m512 low = load(d + i), high = load(d + j);
                    _mm512_storeu_ps(&dn[i], cos ? _mm512_fmadd_ps(low, load(c + i), _mm512_mul_ps(high, load(s + i))) : low);
                    _mm512_storeu_ps(&dn[j], cos ? _mm512_fmsub_ps(high, load(c + i), _mm512_mul_ps(low, load(s + i))) : high);
                }
                const __m512 scale = _mm512_set1_ps(r[row]);
                __m512 along = _mm512_setzero_ps();
                for (int64_t i = 0; i < D; i += PANEL) {
                    const __m512 n = _mm512_loadu_ps(&dn[i]), unit = _mm512_mul_ps(load(from + i), scale);
                    if (dw) _mm512_storeu_ps(&shares[part * D + i], _mm512_fmadd_ps(n, unit, _mm512_loadu_ps(&shares[part * D + i])));
                    const __m512 g = _mm512_fmadd_ps(n, _mm512_loadu_ps(w + i), n);
                    along = _mm512_fmadd_ps(g, unit, along);
                    _mm512_storeu_ps(&dn[i], g);
                }
                along = _mm512_set1_ps(_mm512_reduce_add_ps(along) / D);
                for (int64_t i = 0; i < D; i += PANEL) {
                    const __m512 unit = _mm512_mul_ps(load(from + i), scale);
                    const __m512 d = _mm512_mul_ps(scale, _mm512_fnmadd_ps(unit, along, _mm512_loadu_ps(&dn[i])));
                    store(dx + row * D + i, dskip ? _mm512_add_ps(d, load(dskip + row * D + i)) : d);
                }
            }
    }
    if (dw)
        for (int64_t i = 0; i < D; i++) {
            dw[i] = 0;
            for (int64_t part = 0; part < parts; part++) dw[i] += shares[part * D + i];
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gates (ops/geglu.py): rows of F, a multiple of 16, which lie gate_row and up_row apart; h or dh row-major, dgate and dup
// halves of rows of 2 F. h or dh is null.

void geglu(const bf16* gate, const bf16* up, bf16* h, const bf16* dh, bf16* made, int64_t gate_row, int64_t up_row, int64_t M, int64_t F) {
    const __m512 one = _mm512_set1_ps(1), cubic = _mm512_set1_ps(0.044715f), steep = _mm512_set1_ps(1.5957691216057308f);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < M; row++)
        for (int64_t i = 0; i < F; i += PANEL) {
            const __m512 g = load(gate + row * gate_row + i), u = load(up + row * up_row + i);
            const __m512 bent = _mm512_mul_ps(cubic, _mm512_mul_ps(g, g));
            const __m512 twice = _mm512_mul_ps(steep, _mm512_fmadd_ps(g, bent, g));                                             // 2z
            const __m512 share = _mm512_div_ps(one, _mm512_add_ps(one, exp2(_mm512_mul_ps(twice, _mm512_set1_ps(-LOG2_E)))));   // σ(2z)
            const __m512 value = _mm512_mul_ps(g, share);
            if (h) store(h + row * F + i, _mm512_mul_ps(value, u));
            if (!dh) continue;
            const __m512 d = load(dh + row * F + i), rise = _mm512_mul_ps(steep, _mm512_fmadd_ps(_mm512_set1_ps(3), bent, one));
            const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(value, rise), _mm512_sub_ps(one, share), share);
            store(made + row * 2 * F + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
            store(made + row * 2 * F + F + i, _mm512_mul_ps(d, value));
        }
}
}
