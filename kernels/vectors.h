// Vectors of fp32, the element types that widen to them, activations and sums: what experts.cpp multiplies with.
//
// GCC's and clang's own vectors, and the few operations for which an instruction has to be named.
#ifndef DMOE_VECTORS_H
#define DMOE_VECTORS_H

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

}  // namespace

#endif  // DMOE_VECTORS_H
