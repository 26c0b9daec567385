// Weights that a thread reads next, fetched into its L2 cache while it computes (hot).
//
// A run of addresses is fetched as eight runs side by side, a line of each in turn: a core that walks one page after the other waits
// for each, and reads a half to two thirds of what the memory can give it.

#pragma once

#include <cstdint>

namespace antiphon {

class Prefetch {
 public:
  // Fetch these bytes from now on; what was left of others is given up.
  void start(const char* at, int64_t bytes) {
    at_ = at;
    run_ = (bytes + kRuns * kLine - 1) / (kRuns * kLine) * kLine;
    done_ = 0;
  }
  // The next ``lines`` cache lines, rounded up to a line of every run; none where all are fetched.
  void fetch(int64_t lines) {
    for (; lines > 0 && done_ < run_; lines -= kRuns, done_ += kLine) {
      for (int64_t r = 0; r < kRuns; ++r) __builtin_prefetch(at_ + r * run_ + done_, 0, 2);
    }
  }
  void fetch_all() { fetch(INT64_MAX); }

 private:
  static constexpr int64_t kRuns = 8, kLine = 64;
  const char* at_ = nullptr;
  int64_t run_ = 0, done_ = 0;
};

}  // namespace antiphon
