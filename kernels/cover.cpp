// What kernels/cover.py chooses on a CPU: sums in double, so that it is the reference to the last bit.
#include <cstddef>
#include <cstdint>
#include <vector>

// ids [N, L, k], weights [N, L, k], voting [N, L] -> inside [N, E], which starts as false.
// Returns 0, or 1 where an id is not in [0, E).
extern "C" int cover(
    const int64_t* ids, const float* weights, const bool* voting, bool* inside,
    int64_t num_blocks, int64_t num_tokens, int64_t top_k, int64_t num_experts,
    double mass, int64_t max_experts, double served) {
    std::vector<double> need(num_tokens), least(num_tokens), popular(num_experts), gain(num_experts);
    std::vector<int64_t> open;  // tokens that need more
    for (int64_t n = 0; n < num_blocks; ++n) {
        const int64_t* block_ids = ids + n * num_tokens * top_k;
        const float* block_weights = weights + n * num_tokens * top_k;
        bool* chosen = inside + n * num_experts;
        open.clear();
        popular.assign(num_experts, 0.0);
        for (int64_t t = 0; t < num_tokens; ++t) {
            double whole = 0.0;
            for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
                if (block_ids[i] < 0 || block_ids[i] >= num_experts) return 1;
                if (!voting[n * num_tokens + t]) continue;
                whole += block_weights[i];
                popular[block_ids[i]] += block_weights[i];
            }
            need[t] = mass * whole;
            least[t] = served * need[t];
            if (need[t] > 0.0) open.push_back(t);
        }
        for (int64_t step = 0; step < max_experts && !open.empty(); ++step) {
            gain.assign(num_experts, 0.0);
            for (int64_t t : open)
                for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i)
                    if (!chosen[block_ids[i]])
                        gain[block_ids[i]] += block_weights[i] < need[t] ? block_weights[i] : need[t];
            int64_t best = 0;
            for (int64_t e = 1; e < num_experts; ++e)
                if (gain[e] > gain[best] || (gain[e] == gain[best] && popular[e] > popular[best])) best = e;
            if (!(gain[best] > 0.0)) break;
            chosen[best] = true;
            std::size_t left = 0;
            for (int64_t t : open) {
                for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i)
                    if (block_ids[i] == best) need[t] -= block_weights[i];
                if (need[t] > least[t]) open[left++] = t;
            }
            open.resize(left);
        }
    }
    return 0;
}
