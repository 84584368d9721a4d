// Products of bf16 weights by rows and tokens in AMX's tiles, for experts.cpp: 16 rows of weights, as they lie, times 16
// tokens, 32 inputs at once, 16 times as many products an instruction as vdpbf16ps has.
//
// A tile of tokens has inputs 2k and 2k + 1 of every token in its row k, so an expert's tokens are turned once, before
// its weights are read. What comes out has a row of weights in each of its rows, and is turned back.
#ifndef DMOE_AMX_H
#define DMOE_AMX_H

#include "products.h"

#ifdef __AMX_BF16__
namespace {

// Transposes 16 vectors of 16 lanes: halves of every 2 * kSpan lanes are exchanged between vectors kSpan apart.
template <int kSpan = 8, int... kLanes>
inline void transpose(Vec* v, std::integer_sequence<int, kLanes...> lanes) {
    UNROLL for (int i = 0; i < 16; ++i) {
        if (i & kSpan) continue;
        const Vec a = v[i], b = v[i + kSpan];
        v[i] = pick(a, b, std::integer_sequence<int, (kLanes & kSpan ? kLanes - kSpan + 16 : kLanes)...>{});
        v[i + kSpan] = pick(a, b, std::integer_sequence<int, (kLanes & kSpan ? kLanes + 16 : kLanes + kSpan)...>{});
    }
    if constexpr (kSpan > 1) transpose<kSpan / 2>(v, lanes);
}

struct Tiles : Rows<Pairing> {
    static constexpr int64_t kSide = 16;  // rows of a tile, each of kLine bytes
    static constexpr int64_t kCopyFloats = kBlock / 2;
    static_assert(kBlock == 2 * kSide);

    // A thread's tiles are its own from here to the end of a phase.
    struct Setup {
        Setup() = default;
        Setup(const Setup&) = delete;
        Setup& operator=(const Setup&) = delete;
        ~Setup() { _tile_release(); }
    };

    static int64_t panel_bytes(int64_t tokens, int64_t depth) { return padded(tokens, kSide) * padded(depth) * 2; }

    // Turns an expert's tokens: panel is [tokens / 16, depth / 32] tiles, of fewer columns where there are fewer tokens.
    static void gather(const Input* const* inputs, int64_t tokens, int64_t depth, char* panel) {
        const int64_t columns = std::min(tokens, kSide);
        const auto mask = static_cast<__mmask16>((1u << columns) - 1);
        configure(columns);
        for (int64_t first = 0; first < tokens; first += kSide) {
            const Input* rows[kSide];
            for (int64_t i = 0; i < kSide; ++i) rows[i] = inputs[std::min(first + i, tokens - 1)];
            for (int64_t k = 0; k < depth; k += kStep) {
                Vec v[kSide];
                UNROLL for (int i = 0; i < kSide; ++i) v[i] = load(rows[i] + k);
                transpose(v, std::make_integer_sequence<int, kWidth>{});
                UNROLL for (int i = 0; i < kSide; ++i, panel += 4 * columns) _mm512_mask_storeu_ps(panel, mask, v[i]);
            }
        }
    }

    // out[m, i] = row i @ the panel's token m; out is [tokens, kBlock].
    static void multiply(
        Block<Weight> block, const Input* const* /*inputs*/, int64_t tokens, const Room& room, float* out) {
        const int64_t tiles = pieces(tokens, kSide), steps = pieces(block.depth, kStep);
        const int64_t width = 4 * std::min(tokens, kSide);
        Ahead ahead = ahead_of(block, pieces(tiles, 2) * steps);
        const bool rows = block.count > kSide;
        if (block.count < kBlock || block.depth % kStep) copy_whole(block, reinterpret_cast<Weight*>(room.copy));
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const Tile at{block.weights, block.stride, steps, room.panel + tile * steps * kTile, width, room.sums};
            const bool columns = tile + 1 < tiles;
            rows ? (columns ? at.multiply<true, true>(ahead) : at.multiply<true, false>(ahead))
                 : (columns ? at.multiply<false, true>(ahead) : at.multiply<false, false>(ahead));
            for (int64_t part = 0; part <= rows; ++part)
                for (int64_t side = 0; side <= columns; ++side) {
                    Vec v[kSide];
                    UNROLL for (int i = 0; i < kSide; ++i) v[i] = room.sums[(2 * part + side) * kSide + i];
                    transpose(v, std::make_integer_sequence<int, kWidth>{});
                    UNROLL for (int i = 0; i < kSide; ++i)  // some may be nobody's; there is room for whole tiles
                        store(out + ((tile + side) * kSide + i) * kBlock + part * kSide, v[i]);
                }
        }
    }

  private:
    static constexpr int64_t kTile = kSide * kLine;  // bytes

    // Two tiles of weights, each times two of tokens: four sums, in tiles 0 to 3.
    struct Tile {
        const Weight* weights;
        int64_t stride, steps;
        const char* panel;
        int64_t width;  // bytes of a row of tokens
        Vec* sums;

        template <bool kTwoOfRows, bool kTwoOfTokens>
        void multiply(Ahead& ahead) const {
            const Weight *low = weights, *high = weights + kSide * stride;
            const char *first = panel, *second = panel + steps * kTile;
            const int64_t lines = ahead.at < ahead.end ? ahead.lines : 0, bytes = stride * 2;
            const char* at = ahead.at;
            barrier();
            _tile_zero(0);
            if constexpr (kTwoOfTokens) _tile_zero(1);
            if constexpr (kTwoOfRows) _tile_zero(2);
            if constexpr (kTwoOfRows && kTwoOfTokens) _tile_zero(3);
            for (int64_t k = 0; k < steps; ++k) {
                for (int64_t i = 0; i < lines; ++i, at += kLine) __builtin_prefetch(at, 0, 2);
                _tile_loadd(4, low + k * kStep, bytes);
                _tile_loadd(6, first + k * kSide * width, width);
                _tile_dpbf16ps(0, 4, 6);
                if constexpr (kTwoOfTokens) {
                    _tile_loadd(7, second + k * kTile, kLine);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if constexpr (kTwoOfRows) {
                    _tile_loadd(5, high + k * kStep, bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    if constexpr (kTwoOfTokens) _tile_dpbf16ps(3, 5, 7);
                }
            }
            ahead.at = at;
            _tile_stored(0, sums, kLine);
            if constexpr (kTwoOfTokens) _tile_stored(1, sums + kSide, kLine);
            if constexpr (kTwoOfRows) _tile_stored(2, sums + 2 * kSide, kLine);
            if constexpr (kTwoOfRows && kTwoOfTokens) _tile_stored(3, sums + 3 * kSide, kLine);
            barrier();
        }
    };

    // Tiles 0 to 3 and 6 and 7 have as many columns as there are tokens.
    static void configure(int64_t columns) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16];
            uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
        } config;
        const uint16_t c = static_cast<uint16_t>(4 * columns);
        const uint16_t all[16] = {c, c, c, c, kLine, kLine, c, c};
        std::memcpy(config.bytes, all, sizeof all);
        barrier();
        _tile_loadconfig(&config);
    }

    // Tiles are read whole: what has no whole ones is copied, with zeros behind it.
    static void copy_whole(Block<Weight>& block, Weight* copy) {
        const int64_t stride = padded(block.depth);
        for (int64_t r = 0; r < kBlock; ++r) {
            Weight* to = copy + r * stride;
            const int64_t size = r < block.count ? block.depth : 0;
            std::memcpy(to, block.weights + r * block.stride, size * sizeof(Weight));
            std::memset(to + size, 0, (stride - size) * sizeof(Weight));
        }
        block.weights = copy;
        block.stride = stride;
    }

    // The compiler does not know that tiles are read from memory and written to it.
    static void barrier() { asm volatile("" ::: "memory"); }
};

}  // namespace
#endif

#endif  // DMOE_AMX_H
