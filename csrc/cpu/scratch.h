// Reused, 64-byte aligned memory. A fresh block costs a page fault per 4 KiB, which at these sizes
// is more than the arithmetic, so a thread keeps its blocks up to a limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lrk {

class Block {
 public:
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(data_); }

  void* reserve(size_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      if (posix_memalign(&data_, 64, rounded) != 0) throw std::bad_alloc();
      capacity_ = rounded;
    }
    return data_;
  }

  void trim(size_t limit) {
    if (capacity_ <= limit) return;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

// Several arrays in one block: lay them out, then claim.
class Layout {
 public:
  template <typename T>
  size_t add(int64_t count) {
    const size_t offset = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

template <typename T>
T* at(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

constexpr size_t kKeptBytes = size_t{16} << 20;

// What a whole call shares between its tasks; owned by the calling thread for the call's length.
class CallScratch {
 public:
  explicit CallScratch(size_t bytes) : base_(block().reserve(bytes)) {}
  CallScratch(const CallScratch&) = delete;
  CallScratch& operator=(const CallScratch&) = delete;
  ~CallScratch() { block().trim(kKeptBytes); }
  void* base() const { return base_; }

 private:
  static Block& block() {
    static thread_local Block instance;
    return instance;
  }
  void* base_;
};

// What one range of tasks needs for itself; a thread runs one range at a time.
class TaskScratch {
 public:
  explicit TaskScratch(size_t bytes) : base_(block().reserve(bytes)) {}
  TaskScratch(const TaskScratch&) = delete;
  TaskScratch& operator=(const TaskScratch&) = delete;
  ~TaskScratch() { block().trim(kKeptBytes); }
  void* base() const { return base_; }

 private:
  static Block& block() {
    static thread_local Block instance;
    return instance;
  }
  void* base_;
};

}  // namespace lrk
