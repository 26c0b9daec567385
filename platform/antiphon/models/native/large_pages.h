// Zeroed memory on large pages (hot): for weights and for the KV cache. It is there once it is touched, so that a cache takes no memory and
// no time before its blocks are used. Must not know: what lies in it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace antiphon {

#ifdef __linux__
// Zeroed memory on large pages, cut from regions that live as long as one of their pieces: a read of weights that walks small
// pages loses a tenth of the machine's bandwidth to address translation.
class LargePages {
 public:
  static at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype) {
    static LargePages instance;
    int64_t count = 1;
    for (const int64_t n : sizes) count *= n;
    const size_t bytes = (count * c10::elementSize(dtype) + 4095) & ~size_t{4095};
    const auto [memory, region] = instance.cut(bytes);
    return at::from_blob(memory, sizes, [region = region](void*) mutable { region.reset(); }, at::dtype(dtype));
  }

 private:
  static constexpr size_t kRegion = size_t{64} << 20, kPage = size_t{2} << 20;

  struct Region {
    char* memory;
    size_t size, used = 0;
    explicit Region(size_t bytes) : size(bytes) {
      void* at = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) throw std::bad_alloc();
      mapped = at;
      memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + kPage - 1) & ~(kPage - 1));
      madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: small pages serve as well
    }
    ~Region() { munmap(mapped, size + kPage); }
    void* mapped;
  };

  std::pair<char*, std::shared_ptr<Region>> cut(size_t bytes) {
    if (bytes > kRegion / 4) {
      auto own = std::make_shared<Region>((bytes + kPage - 1) & ~(kPage - 1));
      return {own->memory, own};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Region> region = current_.lock();
    if (region == nullptr || region->used + bytes > region->size) {
      region = std::make_shared<Region>(kRegion);
      current_ = region;
    }
    char* at = region->memory + region->used;
    region->used += bytes;
    return {at, region};
  }

  std::mutex mutex_;
  std::weak_ptr<Region> current_;
};
#else
class LargePages {
 public:
  static at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype) { return at::zeros(sizes, at::dtype(dtype)); }
};
#endif

}  // namespace antiphon
