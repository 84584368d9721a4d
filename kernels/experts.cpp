// The experts of a mixture-of-experts layer, as kernels/experts_cpu.py describes them, at the speed of memory.
//
// One source for every instruction set: flags choose (native.py, experts_cpu.py), and what differs is in "Vectors".
//
// A denoising step reads each weight once for a few tokens, so the bytes are what costs. Every thread owns a share of
// the rows of *every* expert: all threads are done at the same time, whatever the routing. It reads blocks of rows that
// lie one after another and, while it multiplies one, asks for the next in the order of addresses: rows taken in turn
// defeat the hardware's prefetcher (30 GB/s became 15).
//
//     mid[p]  = act(gate[e] @ x[t]) * (up[e] @ x[t])    first phase, p = (t, e) sorted by expert; rounded once, here
//     out[t] += weight[p] * (down[e] @ mid[p] + bias)   second phase, in fp32 and the order of experts
//
// Equal bits for any number of threads and for a token among any others: a dot product is one thread's, each of its
// lanes is summed in the order of the row, and lanes are added up in one fixed tree. No blocking changes that, because
// a sum that is left for later is stored with its lanes.
//
// T: tokens; k: experts a token; E: experts; H, I: hidden size and expert width; P: routed pairs
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of 16-bit values are taken apart as 32-bit ones");

namespace {

// ---- Vectors: GCC's and clang's own, and the few operations for which an instruction has to be named

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kTokens = 6;  // of a register tile: 24 sums, 4 weights, 1 input and a mask of 32 registers
constexpr int kDepth = 8;   // rows of transposed weights that are added at once, two vectors each
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kTokens = 3;  // 12 sums of 16 registers
constexpr int kDepth = 4;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kTokens = 6;
constexpr int kDepth = 8;
#else
constexpr int kWidth = 4;
constexpr int kTokens = 3;
constexpr int kDepth = 4;
#endif
constexpr int kRows = 4;           // of a register tile
constexpr int kStep = 2 * kWidth;  // elements that a step takes from every row: one load of 16-bit ones
constexpr int kLine = 64;          // bytes

using Vec = float __attribute__((vector_size(4 * kWidth)));
using Bits = uint32_t __attribute__((vector_size(4 * kWidth)));
using Shorts = uint16_t __attribute__((vector_size(2 * kWidth)));

constexpr int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
constexpr int64_t padded(int64_t size, int64_t piece = kStep) { return pieces(size, piece) * piece; }

template <class V = Vec>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class V>
inline void store(void* to, V value) {
    std::memcpy(to, &value, sizeof value);
}

// The first `count` lanes, and zeros. A copy of a size that is not known is a call.
inline Vec load_some(const float* from, int64_t count) {
    if (count == kWidth) return load(from);
    Vec value{};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}

// Writes the first `count` lanes.
template <class V>
inline void copy_some(void* to, V value, int64_t count) {
    if (count == kWidth) return store(to, value);
    std::memcpy(to, &value, count * (sizeof value / kWidth));
}

inline Vec splat(float value) { return value - Vec{}; }
inline Bits splat_bits(uint32_t value) { return value - Bits{}; }

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Returns lanes of a, then of b, as a list of indices into both.
template <int... kLanes>
inline Vec pick(Vec a, Vec b, std::integer_sequence<int, kLanes...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, kLanes...);
#else
    return __builtin_shuffle(a, b, Bits{kLanes...});
#endif
}

// Every second lane of (a, b) from `first` on.
template <int kFirst, int... kLanes>
inline Vec every_other(Vec a, Vec b, std::integer_sequence<int, kLanes...>) {
    return pick(a, b, std::integer_sequence<int, 2 * kLanes + kFirst...>{});
}

template <int kFirst>
inline Vec every_other(Vec a, Vec b) {
    return every_other<kFirst>(a, b, std::make_integer_sequence<int, kWidth>{});
}

// ---- Element types: what they widen to, and how fp32 is rounded to them

struct BFloat {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline Vec widened(Bits bits, BFloat) { return (Vec)(bits << 16); }

inline Vec widened(Bits bits, Half) {
    const Bits magnitude = bits & 0x7fff;
    const Vec value = (Vec)(magnitude << 13) * 0x1p112f;  // exponents are biased by 15 there, by 127 here
    const Bits special = magnitude >= 0x7c00 ? splat_bits(0x7f800000) : Bits{};
    return (Vec)((Bits)value | special | (bits & 0x8000) << 16);
}

inline Bits narrowed(Vec value, BFloat) {
    const Bits bits = (Bits)value;
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

inline Bits narrowed(Vec value, Half) {
    const Bits bits = (Bits)value, magnitude = bits & 0x7fffffff;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Bits subnormal = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000;  // 0.5 has the step of the smallest: 2**-24
    Bits rounded = magnitude < 0x38800000 ? subnormal : normal;
    rounded = magnitude >= 0x477ff000 ? splat_bits(0x7c00) : rounded;
    rounded = magnitude > 0x7f800000 ? splat_bits(0x7e00) : rounded;
    return rounded | (bits >> 16 & 0x8000);
}

template <class Element>
inline float to_float(Element element) {
    if constexpr (std::is_same_v<Element, float>)
        return element;
    else
        return widened(splat_bits(element.bits), Element{})[0];
}

// Rounds to the element type, and returns that as fp32.
template <class Element>
inline Vec rounded(Vec value) {
    if constexpr (std::is_same_v<Element, float>)
        return value;
    else
        return widened(narrowed(value, Element{}), Element{});
}

template <class Element>
inline void store_some(Element* to, Vec value, int64_t count) {
    if constexpr (std::is_same_v<Element, float>)
        copy_some(to, value, count);
    else
        copy_some(to, __builtin_convertvector(narrowed(value, Element{}), Shorts), count);
}

// ---- The two halves of a step's elements, in fp32. 16-bit ones fall into even and odd: a shift and a mask are cheaper
// than to spread them in order. What they meet must lie in the same order; see place().

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool kHalvesInOrder = true;  // there is an instruction for that
#else
constexpr bool kHalvesInOrder = false;
#endif

template <class Element>
constexpr bool kEvenOdd = std::is_same_v<Element, BFloat> || (std::is_same_v<Element, Half> && !kHalvesInOrder);

inline Vec part(const float* step, int half) { return load(step + half * kWidth); }

inline Vec part(const BFloat* step, int half) {
    const Bits both = load<Bits>(step);
    return (Vec)(half ? both & 0xffff0000 : both << 16);
}

inline Vec part(const Half* step, int half) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load<__m256i>(step + half * kWidth));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(load<__m128i>(step + half * kWidth));
#elif defined(__aarch64__)
    return (Vec)vcvt_f32_f16(load<float16x4_t>(step + half * kWidth));
#else
    const Bits both = load<Bits>(step);
    return widened(half ? both >> 16 : both & 0xffff, Half{});
#endif
}

// Where element k of a row is once its steps have been taken apart by part().
template <class Element>
constexpr int64_t place(int64_t k) {
    return kEvenOdd<Element> ? k / kStep * kStep + k % 2 * kWidth + k % kStep / 2 : k;
}

// The last `count` elements of a row, and zeros up to a whole step.
template <class Element>
struct Rest {
    Element elements[kStep] = {};
    Rest(const Element* from, int64_t count) { std::memcpy(elements, from, count * sizeof(Element)); }
};

// Takes a row of `size` elements apart; `to` has room for whole steps.
template <class Element>
void take_apart(const Element* row, int64_t size, float* to) {
    const int64_t whole = size / kStep * kStep;
    for (int64_t k = 0; k < whole; k += kStep)
        for (int half = 0; half < 2; ++half) store(to + k + half * kWidth, part(row + k, half));
    if (whole == size) return;
    const Rest<Element> rest(row + whole, size - whole);
    for (int half = 0; half < 2; ++half) store(to + whole + half * kWidth, part(rest.elements, half));
}

// ---- Functions of vectors. NaN stays NaN, and infinities do what they do in PyTorch

inline Vec exp(Vec x) {
    constexpr float kRounder = 0x1.8p23f;  // added, it leaves the nearest integer in the last bits
    const Vec shifted = fma(x, splat(1.44269504f), splat(kRounder));
    const Vec n = shifted - kRounder;
    const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));  // x - n ln 2, in two parts
    Vec p = splat(1.9875691500e-4f);  // Cephes' expf
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, splat(c));
    Vec y = fma(r * r, p, r + 1.0f);
    y = (Vec)((Bits)y + ((Bits)shifted << 23));
    y = x > 88.37f ? splat(std::numeric_limits<float>::infinity()) : y;  // 2**127.5
    y = x < -87.33f ? Vec{} : y;
    return x != x ? x : y;
}

inline Vec erf(Vec x) {
    const Vec magnitude = (Vec)((Bits)x & 0x7fffffff);
    const Vec t = 1.0f / fma(magnitude, splat(0.3275911f), splat(1.0f));  // Abramowitz and Stegun 7.1.26, as PyTorch's
    Vec p = splat(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fma(p, t, splat(c));
    const Vec y = 1.0f - p * t * exp(-x * x);
    return (Vec)((Bits)y | ((Bits)x & 0x80000000));
}

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSwigluOai };

struct Act {
    Activation kind;
    float alpha, limit;  // of kSwigluOai

    Vec operator()(Vec gate) const {
        switch (kind) {
            case Activation::kSilu: return gate / (1.0f + exp(-gate));
            case Activation::kGelu: return 0.5f * gate * (1.0f + erf(gate * 0.70710678f));
            case Activation::kGeluTanh: {  // 1 + tanh(z) is 2 / (1 + exp(-2z))
                const Vec z = 0.79788456f * fma(0.044715f * gate * gate, gate, gate);
                return gate / (1.0f + exp(-2.0f * z));
            }
            case Activation::kRelu: return positive(gate);
            case Activation::kRelu2: return positive(gate) * positive(gate);
            case Activation::kSwigluOai: break;  // has two arguments
        }
        return gate;
    }

    Vec operator()(Vec gate, Vec up) const {
        if (kind != Activation::kSwigluOai) return (*this)(gate) * up;
        const Vec most = splat(limit);
        gate = gate > most ? most : gate;
        up = up > most ? most : up;
        up = up < -most ? -most : up;
        return (up + 1.0f) * (gate / (1.0f + exp(-alpha * gate)));
    }

  private:
    static Vec positive(Vec x) { return x < Vec{} ? Vec{} : x; }
};

// ---- Sums of lanes: of up to kWidth vectors at once, two permutations and an addition for every two vectors

// The lane of (a, b) that comes to `lane` when groups of 2 * group lanes are cut into halves and the lower (or upper)
// ones are put together, a's before b's; within 128 bits where groups are that small, as instructions do.
constexpr int folded_lane(int lane, int group, bool upper) {
    const int span = group >= 4 ? kWidth : 4;
    const int at = lane % span, within = at % (span / 2);
    const int from = lane / span * span + within / group * 2 * group + within % group + (upper ? group : 0);
    return at < span / 2 ? from : from + kWidth;
}

template <int kGroup, int... kLanes>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, kLanes...>) {
    return pick(a, b, std::integer_sequence<int, folded_lane(kLanes, kGroup, false)...>{}) +
           pick(a, b, std::integer_sequence<int, folded_lane(kLanes, kGroup, true)...>{});
}

// Returns a vector with the sums of kCount vectors, each where sum_lane() says.
template <int kCount, int kGroup = kWidth / 2>
inline Vec lane_sums(Vec* v) {
    if constexpr (kGroup == 0) {
        return v[0];
    } else {
        constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
        UNROLL for (int i = 0; i < kLeft; ++i)
            v[i] = fold<kGroup>(v[i], v[(i + kLeft) % kCount], std::make_integer_sequence<int, kWidth>{});
        return lane_sums<kLeft, kGroup / 2>(v);
    }
}

// The lane of lane_sums<count>() with the sum of vector `index`: the same folds, of names.
constexpr int sum_lane(int count, int index) {
    std::array<std::array<int, kWidth>, kWidth> names{};
    for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < kWidth; ++lane) names[i][lane] = i;
    for (int group = kWidth / 2; group > 0; group /= 2) {
        const int left = count > 1 ? count / 2 : 1;
        for (int i = 0; i < left; ++i) {
            const auto a = names[i], b = names[(i + left) % count];
            for (int lane = 0; lane < kWidth; ++lane) {
                const int from = folded_lane(lane, group, false);
                names[i][lane] = from < kWidth ? a[from] : b[from - kWidth];
            }
        }
        count = left;
    }
    int lane = 0;
    while (names[0][lane] != index) ++lane;
    return lane;
}

// ---- Weights by rows: a dot product for each row and token, in register tiles

// A row of weights, widened to fp32 in registers, and an input that has been taken apart.
template <class Element>
struct Widening {
    using Weight = Element;
    using Input = float;
    static constexpr int kParts = 2;
    static constexpr bool kCopies = !std::is_same_v<Element, float>;  // where a copy in fp32 saves work
    static Vec weight(const Weight* step, int half) { return part(step, half); }
    static Vec input(const Input* step, int half) { return load(step + half * kWidth); }
    static Vec multiply_add(Vec w, Vec x, Vec sum) { return fma(w, x, sum); }
    static void prepare(const Weight* row, int64_t size, Input* to) { take_apart(row, size, to); }
    static void put(Input* row, int64_t at, Vec rounded_values, int64_t count) {
        if constexpr (kEvenOdd<Element>)
            for (int64_t lane = 0; lane < count; ++lane) row[place<Element>(at + lane)] = rounded_values[lane];
        else
            store_some(row + at, rounded_values, count);
    }
};

#ifdef __AVX512BF16__
// bf16 by vdpbf16ps: two products a lane, which takes subnormal values for zero.
struct Pairing {
    using Weight = BFloat;
    using Input = BFloat;
    static constexpr int kParts = 1;
    static constexpr bool kCopies = false;
    static Bits weight(const Weight* step, int) { return load<Bits>(step); }
    static Bits input(const Input* step, int) { return load<Bits>(step); }
    static Vec multiply_add(Bits w, Bits x, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static void prepare(const Weight* row, int64_t size, Input* to) {
        std::memcpy(to, row, size * sizeof(Weight));
        std::memset(to + size, 0, (padded(size) - size) * sizeof(Weight));
    }
    static void put(Input* row, int64_t at, Vec rounded_values, int64_t count) {
        const Shorts bits = __builtin_convertvector((Bits)rounded_values >> 16, Shorts);
        copy_some(row + at, bits, count);
    }
};
template <class Element>
using Product = std::conditional_t<std::is_same_v<Element, BFloat>, Pairing, Widening<Element>>;
#else
template <class Element>
using Product = Widening<Element>;
#endif

// What will be read next, to be asked for evenly while the present block is multiplied.
struct Ahead {
    const char* at;
    const char* end;
    int64_t lines;  // a step
};

template <class Weight>
struct Block {
    const Weight* weights;
    int64_t stride;    // from a row in memory to the next
    int64_t count;     // outputs
    int64_t depth;     // inputs
    const void* next;  // a block of this size that is read next, or null
};

// Of one thread.
struct Room {
    Vec* sums;
    float* copy;     // of a block's weights in fp32
    float* outputs;  // gate's and up's, or down's
    float* bias;
};

template <class Product>
struct Tile {
    using Weight = typename Product::Weight;
    using Input = typename Product::Input;

    const Weight* rows[kRows];
    const Input* const* inputs;
    int64_t begin, end;  // steps of the rows
    int64_t depth;
    Vec* sums;   // of what is before `begin`, and of what is before `end`
    float* out;  // [tokens, stride]
    int64_t stride;

    template <int kCount>
    void multiply(Ahead& ahead) const {
        Vec sum[kCount * kRows];
        UNROLL for (int i = 0; i < kCount * kRows; ++i) sum[i] = begin ? sums[i] : Vec{};
        const Input* x[kCount];
        UNROLL for (int m = 0; m < kCount; ++m) x[m] = inputs[m];
        const Weight* w[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) w[r] = rows[r];
        const auto step = [&](const Weight* const* from, int64_t wk, int64_t k) __attribute__((always_inline)) {
            UNROLL for (int half = 0; half < Product::kParts; ++half) {
                decltype(Product::weight(from[0], 0)) weight[kRows];
                UNROLL for (int r = 0; r < kRows; ++r) weight[r] = Product::weight(from[r] + wk, half);
                UNROLL for (int m = 0; m < kCount; ++m) {
                    const auto input = Product::input(x[m] + k, half);
                    UNROLL for (int r = 0; r < kRows; ++r)
                        sum[m * kRows + r] = Product::multiply_add(weight[r], input, sum[m * kRows + r]);
                }
            }
        };
        const int64_t whole = std::min(end, depth / kStep * kStep);
        const int64_t lines = ahead.at < ahead.end ? ahead.lines : 0;
        const char* at = ahead.at;
        int64_t k = begin;
        for (; k < whole; k += kStep) {
            for (int64_t i = 0; i < lines; ++i, at += kLine) __builtin_prefetch(at, 0, 2);  // into the second level
            step(w, k, k);
        }
        ahead.at = at;
        if (k < end) {
            const int64_t left = depth - k;
            const Rest<Weight> rest[kRows] = {{w[0] + k, left}, {w[1] + k, left}, {w[2] + k, left}, {w[3] + k, left}};
            const Weight* from[kRows];
            UNROLL for (int r = 0; r < kRows; ++r) from[r] = rest[r].elements;
            step(from, 0, k);
        }
        if (end < depth) {
            UNROLL for (int i = 0; i < kCount * kRows; ++i) sums[i] = sum[i];
        } else {
            finish<kCount * kRows, 0>(sum);
        }
    }

  private:
    // Writes the sums of kCount vectors, of which the first is number kFirst.
    template <int kCount, int kFirst>
    void finish(Vec* sum) const {
        constexpr int kPart = kCount >= 16 && kWidth >= 16 ? 16 : kCount >= 8 && kWidth >= 8 ? 8 : 4;
        put<kPart, kFirst>(lane_sums<kPart>(sum), std::make_integer_sequence<int, kWidth>{});
        if constexpr (kCount > kPart) finish<kCount - kPart, kFirst + kPart>(sum + kPart);
    }

    template <int kPart, int kFirst, int... kLane>
    void put(Vec sums, std::integer_sequence<int, kLane...>) const {
        alignas(kLine) float lanes[kWidth];
        store(lanes, pick(sums, sums, std::integer_sequence<int, sum_lane(kPart, kLane % kPart)...>{}));
        UNROLL for (int i = 0; i < kPart; i += kRows)
            std::memcpy(out + (kFirst + i) / kRows * stride, lanes + i, kRows * sizeof(float));
    }
};

template <class Product>
struct Rows {
    using Weight = typename Product::Weight;
    using Input = typename Product::Input;
    static constexpr int64_t kBlock = 32;  // rows: twice a page of 2048 bf16, and two blocks stay in the second level
    static constexpr int64_t kUnit = kRows;
    static constexpr int64_t kCopyFloats = Product::kCopies ? kBlock : 0;  // for each input

    static int64_t stride(int64_t /*outputs*/, int64_t depth) { return depth; }
    static int64_t offset(int64_t row, int64_t depth) { return row * depth; }
    static void prepare(const Weight* row, int64_t size, Input* to) { Product::prepare(row, size, to); }
    static void put(Input* row, int64_t at, Vec values, int64_t count) { Product::put(row, at, values, count); }

    // out[m, i] = row i @ inputs[m]; out is [tokens, kBlock].
    static void multiply(
        const Block<Weight>& block, const Input* const* inputs, int64_t tokens, const Room& room, float* out) {
        const int64_t tiles = pieces(tokens, kTokens);
        if constexpr (Product::kCopies) {
            if (tiles >= kTilesOfCopy) {
                const int64_t stride = copy_stride(block.depth);
                for (int64_t r = 0; r < block.count; ++r)
                    take_apart(block.weights + r * block.stride, block.depth, room.copy + r * stride);
                Block<float> copy{room.copy, stride, block.count, padded(block.depth), nullptr};
                return Rows<Widening<float>>::multiply(copy, inputs, tokens, room, out, ahead_of(block, tiles));
            }
        }
        multiply(block, inputs, tokens, room, out, ahead_of(block, tiles));
    }

    static void multiply(
        const Block<Weight>& block, const Input* const* inputs, int64_t tokens, const Room& room, float* out,
        Ahead ahead) {
        const int64_t tiles = pieces(tokens, kTokens);
        const int64_t slice = tiles > 1 ? kSlice : padded(block.depth);
        for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
            const int64_t count = tokens / tiles + (tile < tokens % tiles);
            for (int64_t begin = 0; begin < block.depth; begin += slice) {
                Tile<Product> at{};
                at.inputs = inputs + first;
                at.begin = begin;
                at.end = std::min(begin + slice, block.depth);
                at.depth = block.depth;
                at.stride = kBlock;
                for (int64_t r = 0; r < block.count; r += kRows) {
                    for (int64_t i = 0; i < kRows; ++i)
                        at.rows[i] = block.weights + std::min(r + i, block.count - 1) * block.stride;
                    at.sums = room.sums + r * kTokens;
                    at.out = out + first * kBlock + r;
                    run(at, count, ahead, std::make_integer_sequence<int, kTokens>{});
                }
            }
            first += count;
        }
    }

    static int64_t copy_stride(int64_t depth) { return padded(depth) + kLine / sizeof(float); }

  private:
    // Longer rows are taken in slices, so that the inputs of a tile stay in the second level (48 KiB): to keep them in
    // the first by shorter ones costs more, by sums that are put away in between, than it saves.
    static constexpr int64_t kSlice = 8192 / sizeof(Input);
    // From so many tiles on, widening each weight once, into a copy, is cheaper than in every tile.
    static constexpr int64_t kTilesOfCopy = 3;

    static Ahead ahead_of(const Block<Weight>& block, int64_t tiles) {
        if (block.next == nullptr) return {};
        const char* at = static_cast<const char*>(block.next);
        const int64_t bytes = block.count * block.depth * static_cast<int64_t>(sizeof(Weight));
        const int64_t steps = tiles * pieces(block.count, kRows) * pieces(block.depth, kStep);
        return {at, at + bytes, pieces(pieces(bytes, kLine), steps)};
    }

    template <int... kCount>
    static void run(const Tile<Product>& tile, int64_t count, Ahead& ahead, std::integer_sequence<int, kCount...>) {
        (void)((count == kCount + 1 && (tile.template multiply<kCount + 1>(ahead), true)) || ...);
    }
};

// ---- Weights by columns, [depth, outputs]: each row of them, times one input of every token, is added to all outputs

template <class Element>
struct Columns {
    using Weight = Element;
    using Input = float;
    static constexpr int64_t kBlock = 512;
    static constexpr int64_t kUnit = kStep;
    static constexpr int64_t kCopyFloats = 0;

    static int64_t stride(int64_t outputs, int64_t /*depth*/) { return outputs; }
    static int64_t offset(int64_t column, int64_t /*depth*/) { return column; }
    static void put(Input* row, int64_t at, Vec values, int64_t count) { store_some(row + at, values, count); }

    static void prepare(const Weight* row, int64_t size, Input* to) {
        for (int64_t k = 0; k < size; k += kStep) {
            float apart[kStep];
            take_apart(row + k, std::min<int64_t>(kStep, size - k), apart);
            in_order(apart, to + k);
        }
    }

    // out[m, i] = column i @ inputs[m]; out is [tokens, kBlock].
    static void multiply(
        const Block<Weight>& block, const Input* const* inputs, int64_t tokens, const Room&, float* out) {
        for (int64_t first = 0; first < tokens; first += kGroup)
            some(block, inputs + first, std::min(kGroup, tokens - first), out + first * kBlock);
    }

  private:
    static constexpr int64_t kGroup = 12;  // tokens whose outputs stay in the first level

    static void some(const Block<Weight>& block, const Input* const* inputs, int64_t tokens, float* out) {
        const int64_t columns = padded(block.count);
        for (int64_t m = 0; m < tokens; ++m) std::fill_n(out + m * kBlock, columns, 0.0f);
        for (int64_t k = 0; k < block.depth; k += kDepth)
            for (int64_t i = 0; i < block.count; i += kStep) {
                Vec weight[kDepth][2];
                UNROLL for (int d = 0; d < kDepth; ++d) {
                    weight[d][0] = weight[d][1] = Vec{};
                    if (k + d >= block.depth) continue;
                    const Weight* from = block.weights + (k + d) * block.stride + i;
                    if (block.count - i >= kStep) {
                        UNROLL for (int half = 0; half < 2; ++half) weight[d][half] = part(from, half);
                    } else {
                        const Rest<Weight> rest(from, block.count - i);
                        UNROLL for (int half = 0; half < 2; ++half) weight[d][half] = part(rest.elements, half);
                    }
                }
                for (int64_t m = 0; m < tokens; ++m) {
                    float* to = out + m * kBlock + i;
                    Vec low = load(to), high = load(to + kWidth);
                    UNROLL for (int d = 0; d < kDepth; ++d) {
                        const Vec x = splat(inputs[m][k + d]);
                        low = fma(weight[d][0], x, low);
                        high = fma(weight[d][1], x, high);
                    }
                    store(to, low);
                    store(to + kWidth, high);
                }
            }
        for (int64_t m = 0; m < tokens; ++m)
            for (int64_t i = 0; i < block.count; i += kStep) {
                float apart[kStep];
                std::copy_n(out + m * kBlock + i, kStep, apart);
                in_order(apart, out + m * kBlock + i);
            }
    }

    static void in_order(const float* apart, float* to) {
        for (int64_t i = 0; i < kStep; ++i) to[i] = apart[::place<Element>(i)];
    }
};

// ---- A layer

enum class Type : int { kFloat, kBFloat, kHalf };
enum class Layout : int { kConcatenated, kInterleaved, kSeparate, kPlain };

// What dmoe::experts_cpu is called with; shapes are there.
struct Call {
    const void* hidden;
    const int64_t* ids;
    const float* weights;
    const void *gate_up, *up, *down, *gate_up_bias, *up_bias, *down_bias;
    void* out;
    int64_t num_tokens, top_k, num_experts, hidden_size, width;
    Type out_type;
    Layout layout;
    Act act;
    int threads;
};

// Memory for calls of one thread, kept for its next: fresh pages for each call would cost a percent or two of it.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    char* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            memory_ = static_cast<char*>(std::aligned_alloc(kLine, bytes));
            size_ = memory_ ? bytes : 0;
        }
        return memory_;
    }

  private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

// Hands out pieces of a Scratch; of null, to learn how much is needed.
class Pieces {
  public:
    explicit Pieces(char* memory) : memory_(memory) {}

    template <class T>
    T* take(int64_t count) {
        T* here = reinterpret_cast<T*>(memory_ + used_);
        used_ += padded(count * static_cast<int64_t>(sizeof(T)), kLine);
        return here;
    }

    size_t used() const { return used_; }

  private:
    char* memory_;
    size_t used_ = 0;
};

struct Share {
    int64_t begin, end;

    Share(int64_t total, int64_t unit, int64_t thread, int64_t threads)
        : begin(std::min(total, pieces(total, unit) * thread / threads * unit)),
          end(std::min(total, pieces(total, unit) * (thread + 1) / threads * unit)) {}
};

constexpr int64_t kScratchBytes = 64 << 20;  // of a call, if a token takes no more
constexpr int64_t kGroup = 192;  // tokens of an expert that a block of rows is multiplied with at once

template <class Element, class First, class Second>
class Layer {
  public:
    explicit Layer(const Call& call)
        : call_(call),
          x_stride_(with_line<typename First::Input>(call.hidden_size)),
          mid_stride_(with_line<typename Second::Input>(call.width)) {}

    static int64_t bytes_of_a_token(const Call& call) {
        const Layer layer(call);
        const int64_t x = layer.x_stride_ * sizeof(typename First::Input) + call.hidden_size * sizeof(float);
        const int64_t mid = layer.mid_stride_ * sizeof(typename Second::Input);
        return x + call.top_k * (mid + 2 * sizeof(void*) + sizeof(int64_t));
    }

    bool run(Scratch& scratch) {
        Pieces size(nullptr);
        lay_out(size);
        char* start = scratch.reserve(size.used());
        if (start == nullptr) return false;
        Pieces memory(start);
        lay_out(memory);
        route();
#ifdef _OPENMP
#pragma omp parallel num_threads(call_.threads)
        work(omp_get_thread_num(), omp_get_num_threads());
#else
        work(0, 1);
#endif
        return true;
    }

  private:
    // A row of inputs: whole steps, and a line more, so that rows don't compete for the same sets of a cache.
    template <class Input>
    static int64_t with_line(int64_t size) {
        return padded(size) + kLine / static_cast<int64_t>(sizeof(Input));
    }

    void lay_out(Pieces& memory) {
        const int64_t tokens = call_.num_tokens, pairs = tokens * call_.top_k;
        starts_ = memory.take<int64_t>(call_.num_experts + 1);
        active_ = memory.take<int64_t>(call_.num_experts);
        pairs_ = memory.take<int64_t>(pairs);
        x_ = memory.take<typename First::Input>(tokens * x_stride_);
        mid_ = memory.take<typename Second::Input>(pairs * mid_stride_);
        xs_ = memory.take<const typename First::Input*>(pairs);
        mids_ = memory.take<const typename Second::Input*>(pairs);
        total_ = memory.take<float>(tokens * call_.hidden_size + kWidth);
        room_ = memory.take<char>(0);
        const size_t before = memory.used();
        room(memory);
        room_bytes_ = memory.used() - before;
        memory.take<char>(room_bytes_ * (call_.threads - 1));
    }

    Room room(Pieces& memory) const {
        const int64_t copied = std::max(First::kCopyFloats, Second::kCopyFloats);
        const int64_t stride = Rows<Widening<float>>::copy_stride(std::max(call_.hidden_size, call_.width));
        const int64_t outputs = kGroup * std::max(2 * First::kBlock, Second::kBlock);
        return {memory.take<Vec>(Rows<Widening<float>>::kBlock * kTokens), memory.take<float>(copied * stride),
                memory.take<float>(outputs), memory.take<float>(std::max(2 * First::kBlock, Second::kBlock))};
    }

    // Sorts pairs by expert. The one place that looks at ids: those outside [0, E) are not routed.
    void route() {
        const int64_t pairs = call_.num_tokens * call_.top_k, experts = call_.num_experts;
        const auto routed = [&](int64_t id) { return id >= 0 && id < experts; };
        std::fill_n(starts_, experts + 1, 0);
        for (int64_t i = 0; i < pairs; ++i)
            if (routed(call_.ids[i])) ++starts_[call_.ids[i] + 1];
        num_active_ = 0;
        for (int64_t e = 0; e < experts; ++e) {
            if (starts_[e + 1] > 0) active_[num_active_++] = e;
            starts_[e + 1] += starts_[e];
        }
        for (int64_t i = 0; i < pairs; ++i) {
            if (!routed(call_.ids[i])) continue;
            const int64_t p = starts_[call_.ids[i]]++;
            pairs_[p] = i;
            xs_[p] = x_ + i / call_.top_k * x_stride_;
            mids_[p] = mid_ + p * mid_stride_;
        }
        std::copy_backward(starts_, starts_ + experts, starts_ + experts + 1);
        starts_[0] = 0;
    }

    void work(int64_t thread, int64_t threads) const {
        Pieces own(room_ + thread * room_bytes_);
        const Room room = this->room(own);
        const Share tokens(call_.num_tokens, 1, thread, threads);
        const auto hidden = static_cast<const Element*>(call_.hidden);
        for (int64_t t = tokens.begin; t < tokens.end; ++t)
            First::prepare(hidden + t * call_.hidden_size, call_.hidden_size, x_ + t * x_stride_);
        wait();
        const Share rows(call_.width, First::kUnit, thread, threads);
        const Share outputs(call_.hidden_size, Second::kUnit, thread, threads);
        if (rows.begin < rows.end) gate_up(rows, room, down_weights(0, outputs.begin));
        wait();
        if (outputs.begin < outputs.end) down(outputs, room);
    }

    static void wait() {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }

    // mid for the rows of a share; `then` is read next.
    void gate_up(const Share& share, const Room& room, const void* then) const {
        const bool in_turn = call_.layout == Layout::kInterleaved, two = two_blocks();
        const int64_t block = in_turn ? First::kBlock / 2 : First::kBlock;
        float* ups = room.outputs + kGroup * First::kBlock;
        for (int64_t a = 0; a < num_active_; ++a) {
            const int64_t e = active_[a];
            for (int64_t i = share.begin; i < share.end; i += block) {
                const int64_t count = std::min(block, share.end - i);
                const bool last = i + block >= share.end;
                const void* next = !last                ? gate_weights(e, i + block)
                                   : a + 1 < num_active_ ? gate_weights(active_[a + 1], share.begin)
                                                         : then;
                const Element *gate = gate_weights(e, i), *up = two ? up_weights(e, i) : nullptr;
                const int64_t outputs = in_turn ? 2 * count : count;
                bias(call_.gate_up_bias, e * gate_size() + (in_turn ? 2 * i : i), outputs, room.bias);
                if (call_.layout == Layout::kConcatenated)
                    bias(call_.gate_up_bias, e * gate_size() + call_.width + i, count, room.bias + First::kBlock);
                else if (two)
                    bias(call_.up_bias, e * call_.width + i, count, room.bias + First::kBlock);
                for (int64_t p = starts_[e]; p < starts_[e + 1]; p += kGroup) {
                    const int64_t tokens = std::min(kGroup, starts_[e + 1] - p);
                    const int64_t stride = First::stride(gate_size(), call_.hidden_size);
                    Block<Element> of{gate, stride, outputs, call_.hidden_size, two ? up : next};
                    First::multiply(of, xs_ + p, tokens, room, room.outputs);
                    if (two) {
                        of.weights = up;
                        of.next = next;
                        First::multiply(of, xs_ + p, tokens, room, ups);
                    }
                    activate(room, p, tokens, i, count);
                }
            }
        }
    }

    // mid[p, i:i + count] of the outputs in `room`.
    void activate(const Room& room, int64_t first, int64_t tokens, int64_t i, int64_t count) const {
        const int64_t end = i + count < call_.width ? i + count : padded(call_.width);  // of it or of its zeros
        for (int64_t m = 0; m < tokens; ++m) {
            const float *gates = room.outputs + m * First::kBlock, *ups = gates + kGroup * First::kBlock;
            typename Second::Input* to = mid_ + (first + m) * mid_stride_;
            for (int64_t j = 0; j < count; j += kWidth) {
                Vec value;
                if (call_.layout == Layout::kInterleaved) {
                    const Vec low = load(gates + 2 * j) + load(room.bias + 2 * j);
                    const Vec high = load(gates + 2 * j + kWidth) + load(room.bias + 2 * j + kWidth);
                    value = call_.act(every_other<0>(low, high), every_other<1>(low, high));
                } else {
                    const Vec gate = load(gates + j) + load(room.bias + j);
                    value = call_.layout == Layout::kPlain
                        ? call_.act(gate)
                        : call_.act(gate, load(ups + j) + load(room.bias + First::kBlock + j));
                }
                Second::put(to, i + j, rounded<Element>(value), std::min<int64_t>(kWidth, count - j));
            }
            for (int64_t k = i + count; k < end; k += kWidth)
                Second::put(to, k, Vec{}, std::min<int64_t>(kWidth, end - k));
        }
    }

    // The layer's result for a share of the hidden size.
    void down(const Share& share, const Room& room) const {
        const int64_t H = call_.hidden_size;
        for (int64_t t = 0; t < call_.num_tokens; ++t)
            std::fill(total_ + t * H + share.begin, total_ + t * H + share.end, 0.0f);
        for (int64_t a = 0; a < num_active_; ++a) {
            const int64_t e = active_[a];
            for (int64_t h = share.begin; h < share.end; h += Second::kBlock) {
                const int64_t count = std::min(Second::kBlock, share.end - h);
                const bool last = h + Second::kBlock >= share.end;
                const void* next = last ? down_weights(a + 1, share.begin) : down_weights(a, h + Second::kBlock);
                bias(call_.down_bias, e * H + h, count, room.bias);
                for (int64_t p = starts_[e]; p < starts_[e + 1]; p += kGroup) {
                    const int64_t tokens = std::min(kGroup, starts_[e + 1] - p);
                    const int64_t stride = Second::stride(H, call_.width);
                    const Block<Element> of{down_weights(a, h), stride, count, call_.width, next};
                    Second::multiply(of, mids_ + p, tokens, room, room.outputs);
                    for (int64_t m = 0; m < tokens; ++m)
                        add(room.outputs + m * Second::kBlock, room.bias, call_.weights[pairs_[p + m]], count,
                            total_ + pairs_[p + m] / call_.top_k * H + h);
                }
            }
        }
        write(share);
    }

    static void add(const float* outputs, const float* bias, float weight, int64_t count, float* total) {
        for (int64_t i = 0; i < count; i += kWidth) {
            const int64_t here = std::min<int64_t>(kWidth, count - i);
            const Vec sum = fma(load(outputs + i) + load(bias + i), splat(weight), load_some(total + i, here));
            store_some(total + i, sum, here);
        }
    }

    void write(const Share& share) const {
        switch (call_.out_type) {
            case Type::kFloat: return write(share, static_cast<float*>(call_.out));
            case Type::kBFloat: return write(share, static_cast<BFloat*>(call_.out));
            case Type::kHalf: return write(share, static_cast<Half*>(call_.out));
        }
    }

    template <class Out>
    void write(const Share& share, Out* out) const {
        for (int64_t t = 0; t < call_.num_tokens; ++t)
            for (int64_t h = share.begin; h < share.end; h += kWidth) {
                const int64_t at = t * call_.hidden_size + h, here = std::min<int64_t>(kWidth, share.end - h);
                store_some(out + at, load_some(total_ + at, here), here);
            }
    }

    // Biases of rows that follow each other, in fp32; zeros where there are none.
    static void bias(const void* of, int64_t first, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = of ? to_float(static_cast<const Element*>(of)[first + i]) : 0.0f;
    }

    bool two_blocks() const { return call_.layout == Layout::kConcatenated || call_.layout == Layout::kSeparate; }

    // Rows of gate_up.
    int64_t gate_size() const {
        const bool both = call_.layout == Layout::kConcatenated || call_.layout == Layout::kInterleaved;
        return both ? 2 * call_.width : call_.width;
    }

    const Element* gate_weights(int64_t expert, int64_t i) const {
        const int64_t row = call_.layout == Layout::kInterleaved ? 2 * i : i;
        return weights<First>(call_.gate_up, expert, gate_size(), call_.hidden_size, row);
    }

    const Element* up_weights(int64_t expert, int64_t i) const {
        if (call_.layout == Layout::kConcatenated) return gate_weights(expert, call_.width + i);
        return weights<First>(call_.up, expert, call_.width, call_.hidden_size, i);
    }

    // Of the active expert of this number; null after the last.
    const Element* down_weights(int64_t active, int64_t row) const {
        if (active >= num_active_) return nullptr;
        return weights<Second>(call_.down, active_[active], call_.hidden_size, call_.width, row);
    }

    template <class Kernel>
    static const Element* weights(const void* bank, int64_t expert, int64_t outputs, int64_t depth, int64_t row) {
        return static_cast<const Element*>(bank) + expert * outputs * depth + Kernel::offset(row, depth);
    }

    const Call& call_;
    int64_t x_stride_, mid_stride_;  // elements
    int64_t num_active_ = 0;
    int64_t* starts_;  // [E + 1], of each expert's pairs among the sorted
    int64_t* active_;  // the experts that have any
    int64_t* pairs_;   // [P], token * k + slot, sorted by expert
    typename First::Input* x_;
    typename Second::Input* mid_;
    const typename First::Input** xs_;  // [P]
    const typename Second::Input** mids_;
    float* total_;  // [T, H]
    char* room_;    // of the first thread
    int64_t room_bytes_;
};

// As many tokens at a time as have room in the scratch memory.
template <class Element, class First, class Second>
bool in_turns(Call call) {
    using Of = Layer<Element, First, Second>;
    thread_local Scratch scratch;
    const int64_t all = call.num_tokens, most = std::max<int64_t>(1, kScratchBytes / Of::bytes_of_a_token(call));
    for (int64_t first = 0; first < all; first += most) {
        call.num_tokens = std::min(most, all - first);
        if (!Of(call).run(scratch)) return false;
        call.hidden = static_cast<const Element*>(call.hidden) + most * call.hidden_size;
        call.ids += most * call.top_k;
        call.weights += most * call.top_k;
        call.out = static_cast<char*>(call.out) + most * call.hidden_size * (call.out_type == Type::kFloat ? 4 : 2);
    }
    return true;
}

template <class Element>
bool run(const Call& call, bool transposed, bool down_transposed) {
    using ByRows = Rows<Product<Element>>;
    using ByColumns = Columns<Element>;
    const auto turns = transposed
        ? (down_transposed ? in_turns<Element, ByColumns, ByColumns> : in_turns<Element, ByColumns, ByRows>)
        : (down_transposed ? in_turns<Element, ByRows, ByColumns> : in_turns<Element, ByRows, ByRows>);
    return turns(call);
}

}  // namespace

// Of hidden and weights: float, BFloat or Half. A library for each, as all three take three times as long to compile.
#ifndef ELEMENT
#define ELEMENT float
#endif

// Returns 0, or 1 where there is not enough memory. Numbers stand for names, in the order of experts_cpu.py's lists.
extern "C" int experts(
    const void* hidden, const int64_t* ids, const float* weights, const void* gate_up, const void* up, const void* down,
    const void* gate_up_bias, const void* up_bias, const void* down_bias, void* out, int64_t num_tokens, int64_t top_k,
    int64_t num_experts, int64_t hidden_size, int64_t width, int out_type, int layout, int transposed,
    int down_transposed, int activation, float alpha, float limit, int threads) {
    const Call call{
        hidden, ids, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias, out, num_tokens, top_k, num_experts,
        hidden_size, width, static_cast<Type>(out_type), static_cast<Layout>(layout),
        {static_cast<Activation>(activation), alpha, limit}, std::max(threads, 1)};
    return !run<ELEMENT>(call, transposed, down_transposed);
}
