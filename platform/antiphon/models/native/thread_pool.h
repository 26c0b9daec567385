// Threads that compute together (hot): the parts of a piece of work are taken one by one, by the thread that has it and by helpers.
//
//     asleep ──called──► looking ──there is work──► taking parts ──none is left──► looking
//        ▲                  │
//        └──── kSpinTimeout ───┘      looking offers the processor to others at every turn
//
// The thread that has the work waits for nothing but parts that a helper has begun. So a helper whose processor others use costs what it
// would have done and no more: workers that take turns (attention waits while FFN computes, and the other way round) may share their
// processors, each helping itself to those that the other leaves idle. Helpers on shared processors are of the scheduler's idle class:
// whoever else wakes there runs at once. One that was interrupted within a part and doesn't come back for kLate is lifted out of that
// class until it has done the part, and the thread_pool then rests for a while, since somebody else needs the processor.
//
// A ticket is (threads that may take part << 48) | (parts << 24) | next part. Taking a part is one exchange of it, and what the work
// is is read after that: then its owner waits for the part and cannot have begun another.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <utility>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace antiphon {

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  static constexpr int64_t kMaxThreads = 1024, kMaxParts = (1 << 24) - 1;

  // Of this process: where the linker does not unite libraries' inline functions, of this library. Never freed: its helpers end with
  // the process.
  static ThreadPool& here() {
    static ThreadPool& thread_pool = *new ThreadPool;
    return thread_pool;
  }

  // Which of the threads of the present work this one is: 0 its owner, then helpers.
  static int64_t& thread() {
    static thread_local int64_t index = 0;
    return index;
  }

  // work(part) for every part of [0, parts), on at most ``threads`` threads; the lowest parts are begun first. Where another thread
  // has the thread_pool, on this one alone. Throws what a part threw.
  template <typename Work>
  void run(int64_t parts, int64_t threads, const Work& work) {
    const bool has_pool = parts > 1 && threads > 1 && parts <= kMaxParts && !busy_.test_and_set(std::memory_order_acquire);
    if (!has_pool || is_resting()) {
      if (has_pool) busy_.clear(std::memory_order_release);
      for (int64_t part = 0; part < parts; ++part) work(part);
      return;
    }
    call_ = [](const void* w, int64_t part) { (*static_cast<const Work*>(w))(part); };
    work_ = &work;
    done_.store(0, std::memory_order_relaxed);
    hire(std::min(threads, kMaxThreads) - 1);
    ticket_.store(static_cast<uint64_t>(threads) << 48 | static_cast<uint64_t>(parts) << 24, std::memory_order_seq_cst);
    if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
      num_calls_.fetch_add(1, std::memory_order_relaxed);
      num_calls_.notify_all();
    }
    take_parts(0);
    await(parts);
    const std::exception_ptr error = std::exchange(error_, nullptr);
    has_error_.clear(std::memory_order_relaxed);
    busy_.clear(std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

  // Pin helpers to processors: the first to cores[1], and so on. Where others ``share`` these, helpers run when nobody else would; so
  // they also keep a processor from halting, which a virtual machine takes long to get back from. How many could not be pinned.
  int64_t pin(at::IntArrayRef cores, bool share) {
    int64_t num_failed = 0;
#ifdef __linux__
    if (busy_.test_and_set(std::memory_order_acquire)) return 0;
    hire(std::min<int64_t>(at::get_num_threads(), cores.size()) - 1);
    for (int64_t i = 0; i < num_helpers_; ++i) {
      const int64_t core = cores[(i + 1) % cores.size()];
      cpu_set_t set;
      CPU_ZERO(&set);
      if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &set);
      num_failed += pthread_setaffinity_np(helpers_[i], sizeof(set), &set) != 0;
    }
    shares_ = share && may_leave_idle_class();
    if (shares_) set_class(SCHED_IDLE);
    busy_.clear(std::memory_order_release);
#endif
    return num_failed;
  }

 private:
  static constexpr int64_t kTurnsAlone = 256;
  using Clock = std::chrono::steady_clock;
  static constexpr auto kSpinTimeout = std::chrono::milliseconds(10);  // longer than the pauses between layers, and between steps
  static constexpr auto kLate = std::chrono::microseconds(500);    // longer than a part takes
  static constexpr int kRests = 4;                                 // times the wait for a late helper

  ThreadPool() = default;

  bool is_resting() const { return shares_ && Clock::now() < rests_until_; }

  // Wait until all parts are done.
  void await(int64_t parts) {
    Clock::time_point since{};
    bool lifted = false;
    for (int64_t turn = 0; done_.load(std::memory_order_acquire) < parts; ++turn) {
      breathe();
      if (turn < kTurnsAlone) continue;
      std::this_thread::yield();  // a helper that has begun may wait for this very processor
      if (!shares_ || lifted) continue;
      if (since == Clock::time_point{}) since = Clock::now();
      if (Clock::now() - since > kLate) lifted = true, set_class(SCHED_OTHER);
    }
    if (lifted) {
      set_class(SCHED_IDLE);
      rests_until_ = Clock::now() + kRests * (Clock::now() - since);
    }
  }

#ifdef __linux__
  void set_class(int policy) {
    const sched_param none{};
    for (int64_t i = 0; i < num_helpers_; ++i) pthread_setschedparam(helpers_[i], policy, &none);
  }

  // Everybody may enter the idle class; leaving it takes a privilege.
  static bool may_leave_idle_class() {
    bool may = false;
    std::thread([&] {
      const sched_param none{};
      may = pthread_setschedparam(pthread_self(), SCHED_IDLE, &none) == 0 && pthread_setschedparam(pthread_self(), SCHED_OTHER, &none) == 0;
    }).join();
    return may;
  }
#else
  static constexpr int SCHED_IDLE = 0, SCHED_OTHER = 0;
  void set_class(int) {}
#endif

  void hire(int64_t count) {
    for (; num_helpers_ < count; ++num_helpers_) {
      std::thread helper([this, index = num_helpers_ + 1] { help(index); });
#ifdef __linux__
      helpers_[num_helpers_] = helper.native_handle();
#endif
      helper.detach();
    }
  }

  [[noreturn]] void help(int64_t index) {
    thread() = index;
    for (;;) {
      auto since = Clock::now();
      while (Clock::now() - since < kSpinTimeout) {
        if (take_parts(index)) since = Clock::now();
        for (int turn = 0; turn < 16 && !has_parts(ticket_.load(std::memory_order_relaxed), index); ++turn) breathe();
        if (!has_parts(ticket_.load(std::memory_order_relaxed), index)) std::this_thread::yield();
      }
      const uint32_t seen = num_calls_.load(std::memory_order_acquire);
      num_asleep_.fetch_add(1, std::memory_order_seq_cst);
      if (!has_parts(ticket_.load(std::memory_order_seq_cst), index)) num_calls_.wait(seen, std::memory_order_acquire);
      num_asleep_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  static bool has_parts(uint64_t ticket, int64_t index) {
    return (ticket & kMaxParts) < (ticket >> 24 & kMaxParts) && index < static_cast<int64_t>(ticket >> 48);
  }

  // Whether there was any.
  bool take_parts(int64_t index) {
    bool any = false;
    for (uint64_t ticket = ticket_.load(std::memory_order_acquire); has_parts(ticket, index);) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      any = true;
      try {
        call_(work_, static_cast<int64_t>(ticket & kMaxParts));
      } catch (...) {
        if (!has_error_.test_and_set(std::memory_order_relaxed)) error_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_acq_rel);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    return any;
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> num_calls_{0};
  std::atomic<int32_t> num_asleep_{0};
  std::atomic_flag busy_;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* work_ = nullptr;
  std::atomic_flag has_error_;
  std::exception_ptr error_;
  bool shares_ = false;
  Clock::time_point rests_until_{};
  int64_t num_helpers_ = 0;
#ifdef __linux__
  pthread_t helpers_[kMaxThreads];
#endif
};

// work(begin, end) over runs of [begin, end), so many a thread, none shorter than ``grain``, and none longer than another by more than one.
// More than one a thread serve long work: a helper that comes late or is called away then leaves less undone.
template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work, int64_t runs_a_thread = 1) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain)), threads = std::min<int64_t>(at::get_num_threads(), most);
  const int64_t runs = threads == 1 ? 1 : std::min(threads * runs_a_thread, most), run = count / runs, longer = count % runs;
  ThreadPool::here().run(runs, threads, [&](int64_t part) {
    const int64_t from = begin + part * run + std::min(part, longer);
    work(from, from + run + (part < longer ? 1 : 0));
  });
}

// A thread's memory for what a kernel makes on its way. It only grows, with zeros, and starts at a cache line: a vector that lies across
// two takes twice as long to load.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }
  template <typename T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 4095) & ~size_t{4095};
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(4096, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      std::memset(memory_, 0, bytes);
      size_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace antiphon
