// The two limits of kernels/experts.cpp on this machine: how fast all threads read memory, and how fast they multiply.
// For dmoe_compile/bench/experts.py, which takes them in turn with the kernel: machines drift.
#include <cstdint>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")  // else sums are in memory, and the probe is slower than the kernel
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kSums = kWidth == 16 ? 24 : 12;  // more than an addition takes cycles, times two a cycle
constexpr int kLine = 64;                      // bytes

using Vec = float __attribute__((vector_size(4 * kWidth)));
using Line = uint64_t __attribute__((vector_size(kLine), aligned(1), may_alias));

}  // namespace

// Reads `count` ranges of memory, each thread its share of every one, in the order of addresses; returns what it has
// seen, so that it has to look.
extern "C" uint64_t read(const char* const* ranges, const int64_t* sizes, int64_t count, int threads) {
    uint64_t seen = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : seen) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Line sums[4] = {};
        for (int64_t r = 0; r < count; ++r) {
            const int64_t lines = sizes[r] / kLine, end = lines * (thread + 1) / threads;
            const Line* line = reinterpret_cast<const Line*>(ranges[r]);
            int64_t i = lines * thread / threads;
            for (; i + 4 <= end; i += 4)
                UNROLL for (int j = 0; j < 4; ++j) sums[j] ^= line[i + j];
            for (; i < end; ++i) sums[0] ^= line[i];
        }
        const Line sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        for (int lane = 0; lane < kLine / 8; ++lane) seen ^= sum[lane];
    }
    return seen;
}

// Multiplies and adds `steps` times in every thread, by tdpbf16ps or vdpbf16ps where `pairs` says so and there is that;
// returns floating-point operations.
extern "C" double multiply(int64_t steps, int pairs, int threads) {
#ifdef __AMX_BF16__
    if (pairs) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; ++thread) {
            struct {
                uint8_t palette = 1, unused[15] = {};
                uint16_t bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
            } config;
            asm volatile("" : : "r"(&config) : "memory");
            _tile_loadconfig(&config);
            for (int64_t step = 0; step < steps; ++step) {
                _tile_dpbf16ps(0, 4, 5);
                _tile_dpbf16ps(1, 4, 5);
                _tile_dpbf16ps(2, 4, 5);
                _tile_dpbf16ps(3, 4, 5);
            }
            _tile_release();
        }
        return static_cast<double>(steps) * threads * 4 * (16 * 16 * 32 * 2);
    }
#endif
    bool paired = false;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Vec sums[kSums] = {}, a = {}, b = {};
#define EACH(change)                                \
    for (int64_t step = 0; step < steps; ++step)    \
        UNROLL for (int i = 0; i < kSums; ++i) {    \
            sums[i] = change;                       \
            asm volatile("" : "+" REGISTER(sums[i])); \
        }
#if defined(__x86_64__)
#define REGISTER(x) "v"(x)
#else
#define REGISTER(x) "w"(x)
#endif
#ifdef __AVX512BF16__
        if (pairs) {
            paired = true;
            EACH(_mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)b))
            continue;
        }
#endif
        EACH(a * b + sums[i])
    }
    return static_cast<double>(steps) * threads * kSums * kWidth * (paired ? 4 : 2);
}
