// Products of weights and tokens for experts.cpp: weights by rows, in register tiles, and by columns.
#ifndef DMOE_PRODUCTS_H
#define DMOE_PRODUCTS_H

#include "vectors.h"

namespace {

// What products take that read tokens as they lie.
struct Unturned {
    struct Setup {};
    static int64_t panel_bytes(int64_t /*tokens*/, int64_t /*depth*/) { return 0; }
    static void gather(const void* /*inputs*/, int64_t /*tokens*/, int64_t /*depth*/, char* /*panel*/) {}
};

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

// Asks for the next block within so many steps of the present one.
template <class Weight>
Ahead ahead_of(const Block<Weight>& block, int64_t steps) {
    if (block.next == nullptr) return {};
    const char* at = static_cast<const char*>(block.next);
    const int64_t bytes = block.count * block.depth * static_cast<int64_t>(sizeof(Weight));
    return {at, at + bytes, pieces(pieces(bytes, kLine), steps)};
}

// Of one thread.
struct Room {
    Vec* sums;
    float* copy;     // of a block's weights
    char* panel;     // tokens, turned
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
struct Rows : Unturned {
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
        const Ahead ahead = ahead_of(block, tiles * pieces(block.count, kRows) * pieces(block.depth, kStep));
        if constexpr (Product::kCopies) {
            if (tiles >= kTilesOfCopy) {
                const int64_t stride = copy_stride(block.depth);
                for (int64_t r = 0; r < block.count; ++r)
                    take_apart(block.weights + r * block.stride, block.depth, room.copy + r * stride);
                Block<float> copy{room.copy, stride, block.count, padded(block.depth), nullptr};
                return Rows<Widening<float>>::multiply(copy, inputs, tokens, room, out, ahead);
            }
        }
        multiply(block, inputs, tokens, room, out, ahead);
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

    template <int... kCount>
    static void run(const Tile<Product>& tile, int64_t count, Ahead& ahead, std::integer_sequence<int, kCount...>) {
        (void)((count == kCount + 1 && (tile.template multiply<kCount + 1>(ahead), true)) || ...);
    }
};

// ---- Weights by columns, [depth, outputs]: each row of them, times one input of every token, is added to all outputs

template <class Element>
struct Columns : Unturned {
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

}  // namespace

#endif  // DMOE_PRODUCTS_H
