// AMX's tiles in plain C++, for processors without them: `-include` it, and kernels/amx.h is compiled with it.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::read
#define _tile_stored emulated::write
#define _tile_dpbf16ps emulated::multiply

namespace emulated {

using Bits = uint32_t __attribute__((vector_size(64)));
using Row = float __attribute__((vector_size(64)));

struct Tile {
    int rows = 0, bytes = 0;
    Bits at[16];
};
inline thread_local Tile tiles[8];

inline Tile& tile(int which) {
    if (tiles[which].rows == 0) std::abort();  // as the processor does: it has not been configured
    return tiles[which];
}

inline void configure(const void* config) {
    const auto bytes = static_cast<const uint8_t*>(config);
    if (bytes[0] != 1) std::abort();
    for (int t = 0; t < 8; ++t) {
        uint16_t width;
        std::memcpy(&width, bytes + 16 + 2 * t, 2);
        tiles[t] = {bytes[48 + t], width, {}};
    }
}

inline void release() {
    for (Tile& each : tiles) each = {};
}

inline void zero(int which) { std::memset(&tile(which).at, 0, sizeof tile(which).at); }

inline void read(int which, const void* from, int64_t stride) {
    zero(which);
    for (int r = 0; r < tile(which).rows; ++r)
        std::memcpy(&tile(which).at[r], static_cast<const char*>(from) + r * stride, tile(which).bytes);
}

inline void write(int which, void* to, int64_t stride) {
    for (int r = 0; r < tile(which).rows; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, &tile(which).at[r], tile(which).bytes);
}

// The upper halves of `bits`, which are bf16; subnormal ones count as zero.
inline Row values(Bits bits) { return (Row)((bits & 0x7f800000) != 0 ? bits & 0xffff0000 : Bits{}); }

inline void multiply(int sum, int a, int b) {
    for (int m = 0; m < tile(sum).rows; ++m) {
        Row total = (Row)tile(sum).at[m];
        for (int k = 0; k < tile(a).bytes / 4; ++k) {
            const Bits x = tile(a).at[m][k] - Bits{}, y = tile(b).at[k];
            total += values(x << 16) * values(y << 16) + values(x) * values(y);
        }
        tile(sum).at[m] = (Bits)total;
    }
}

}  // namespace emulated
