// Memory that a kernel's calls share, and how one of them cuts it up.
#ifndef DMOE_SCRATCH_H
#define DMOE_SCRATCH_H

#include "vectors.h"

namespace {

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

}  // namespace

#endif  // DMOE_SCRATCH_H
