// The experts of a mixture-of-experts layer, as kernels/experts_cpu.py describes them, at the speed of memory.
//
// One source for every instruction set: flags choose (native.py, experts_cpu.py), and what differs is in vectors.h.
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
#include "amx.h"
#include "scratch.h"

namespace {

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

struct Share {
    int64_t begin, end;

    Share(int64_t total, int64_t unit, int64_t thread, int64_t threads)
        : begin(std::min(total, pieces(total, unit) * thread / threads * unit)),
          end(std::min(total, pieces(total, unit) * (thread + 1) / threads * unit)) {}
};

constexpr int64_t kScratchBytes = 64 << 20;  // of a call, if a token takes no more
constexpr int64_t kGroup = 192;  // tokens of an expert that its rows are multiplied with at once, at most

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
        const int64_t outputs = std::max(2 * First::kBlock, Second::kBlock);
        const int64_t most = std::min(kGroup, call_.num_tokens * call_.top_k);
        const int64_t panel = std::max(
            First::panel_bytes(most, call_.hidden_size), Second::panel_bytes(most, call_.width));
        return {memory.take<Vec>(Rows<Widening<float>>::kBlock * kTokens), memory.take<float>(copied * stride),
                memory.take<char>(panel), memory.take<float>(kGroup * outputs), memory.take<float>(outputs)};
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

    // How many tokens of an expert are multiplied with its weights at once; there are about as many each time.
    int64_t group_of(int64_t expert) const {
        const int64_t tokens = starts_[expert + 1] - starts_[expert];
        return padded(pieces(tokens, pieces(tokens, kGroup)));
    }

    static void wait() {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }

    // mid for the rows of a share; `then` is read next.
    void gate_up(const Share& share, const Room& room, const void* then) const {
        [[maybe_unused]] const typename First::Setup setup;
        const bool in_turn = call_.layout == Layout::kInterleaved, two = two_blocks();
        const int64_t block = in_turn ? First::kBlock / 2 : First::kBlock;
        for (int64_t a = 0; a < num_active_; ++a) {
            const int64_t e = active_[a], group = group_of(e);
            for (int64_t p = starts_[e]; p < starts_[e + 1]; p += group) {
                const int64_t tokens = std::min(group, starts_[e + 1] - p);
                const int64_t following = p + group < starts_[e + 1] ? a : a + 1;
                const void* after = following < num_active_ ? gate_weights(active_[following], share.begin) : then;
                First::gather(xs_ + p, tokens, call_.hidden_size, room.panel);
                for (int64_t i = share.begin; i < share.end; i += block) {
                    const int64_t count = std::min(block, share.end - i);
                    const void* next = i + block < share.end ? gate_weights(e, i + block) : after;
                    const Element *gate = gate_weights(e, i), *up = two ? up_weights(e, i) : nullptr;
                    const int64_t stride = First::stride(gate_size(), call_.hidden_size);
                    Block<Element> of{gate, stride, in_turn ? 2 * count : count, call_.hidden_size, two ? up : next};
                    First::multiply(of, xs_ + p, tokens, room, room.outputs);
                    if (two) {
                        of.weights = up;
                        of.next = next;
                        First::multiply(of, xs_ + p, tokens, room, room.outputs + kGroup * First::kBlock);
                    }
                    gate_up_bias(e, i, count, room.bias);
                    activate(room, p, tokens, i, count);
                }
            }
        }
    }

    // Of the outputs that rows i to i + count have, in `to` as they are in Room.
    void gate_up_bias(int64_t expert, int64_t i, int64_t count, float* to) const {
        const int64_t each = call_.layout == Layout::kInterleaved ? 2 : 1;
        bias(call_.gate_up_bias, expert * gate_size() + each * i, each * count, to);
        if (call_.layout == Layout::kConcatenated)
            bias(call_.gate_up_bias, expert * gate_size() + call_.width + i, count, to + First::kBlock);
        else if (call_.layout == Layout::kSeparate)
            bias(call_.up_bias, expert * call_.width + i, count, to + First::kBlock);
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
        [[maybe_unused]] const typename Second::Setup setup;
        for (int64_t a = 0; a < num_active_; ++a) {
            const int64_t e = active_[a], group = group_of(e);
            for (int64_t p = starts_[e]; p < starts_[e + 1]; p += group) {
                const int64_t tokens = std::min(group, starts_[e + 1] - p);
                const void* after = down_weights(p + group < starts_[e + 1] ? a : a + 1, share.begin);
                Second::gather(mids_ + p, tokens, call_.width, room.panel);
                for (int64_t h = share.begin; h < share.end; h += Second::kBlock) {
                    const int64_t count = std::min(Second::kBlock, share.end - h);
                    const void* next = h + Second::kBlock < share.end ? down_weights(a, h + Second::kBlock) : after;
                    const int64_t stride = Second::stride(H, call_.width);
                    const Block<Element> of{down_weights(a, h), stride, count, call_.width, next};
                    Second::multiply(of, mids_ + p, tokens, room, room.outputs);
                    bias(call_.down_bias, e * H + h, count, room.bias);
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
#ifdef __AMX_BF16__
    using ByRows = std::conditional_t<std::is_same_v<Element, BFloat>, Tiles, Rows<Product<Element>>>;
#else
    using ByRows = Rows<Product<Element>>;
#endif
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
