// Work shared by threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Returns when a number is another one than `old`: spins for about 0.1 ms, then sleeps until the number's notify_*().
inline void wait_while(const std::atomic<int>& number, int old) {
#ifdef __aarch64__
  constexpr int64_t kSpins = 8000;  // isb takes 30 to 40 cycles: github.com/travisdowns/concurrency-hierarchy-bench/issues/3
#else
  constexpr int64_t kSpins = 3000;  // pause: 24 ns measured on Zen 5; 140 cycles on Intel's processors since Skylake
#endif
  for (int64_t spins = 0; number.load(std::memory_order_acquire) == old; spins++) {
#ifdef __aarch64__
    asm volatile("isb");  // not yield, which most processors do not wait for
#elif defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > kSpins) number.wait(old);  // another program has the processor of a thread waited for: give it this one
  }
}

// Where threads wait for each other.
struct Barrier {
  int threads = 1;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};

  void wait() {
    const int current = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(current + 1, std::memory_order_release);
      round.notify_all();
      return;
    }
    wait_while(round, current);
  }
};

// Parts of a piece of work that lie together. Their owner takes them from the front; other threads, which have none left,
// from the back.
class Share {
 public:
  void set(int64_t first, int64_t end) { range_.store(range(first, end), std::memory_order_relaxed); }

  // Returns the index of a part that nobody else gets; or -1 when none is left.
  int64_t take(bool is_from_back) {
    uint64_t now = range_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = now & 0xffffffffu, end = now >> 32;
      if (first == end) return -1;
      const uint64_t next = is_from_back ? range(first, end - 1) : range(first + 1, end);
      if (range_.compare_exchange_weak(now, next, std::memory_order_relaxed)) return is_from_back ? end - 1 : first;
    }
  }

 private:
  static uint64_t range(int64_t first, int64_t end) { return static_cast<uint64_t>(end) << 32 | first; }

  alignas(64) std::atomic<uint64_t> range_{0};
};

// Threads that run one piece of work after another, and spin between them: waking a thread takes as long as a short piece.
class Team {
 public:
  // The team that this thread leads.
  inline static thread_local Team* led = nullptr;

  // Runs body() in this thread, which leads a team meanwhile: in_threads and parallel_for run in it.
  template <typename Body>
  static void lead(int64_t threads, const Body& body) {
    Team team(threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      team.barrier_.threads = omp_get_num_threads();  // OpenMP may give fewer than asked for
      if (const int thread = omp_get_thread_num()) {
        for (team.barrier_.wait(); team.call_; team.barrier_.wait()) {
          team.call_(team.work_, thread, team.barrier_);
          team.barrier_.wait();
        }
      } else {
        led = &team;
        body();
        led = nullptr;
        team.call_ = nullptr;
        team.barrier_.wait();
      }
    }
  }

  // Runs work(thread, barrier) in all threads.
  template <typename Work>
  void run(const Work& work) {
    led = nullptr;
    work_ = &work;
    call_ = [](const void* work, int thread, Barrier& barrier) { (*static_cast<const Work*>(work))(thread, barrier); };
    barrier_.wait();
    work(0, barrier_);
    barrier_.wait();
    led = this;
  }

  int64_t threads() const { return barrier_.threads; }

  // Runs work(part) for parts 0..count. The first `threads` threads of the team own a share of them each. Threads that have
  // none left help others, which are slow, or whose core another program has.
  template <typename Work>
  void share(int64_t count, int64_t threads, const Work& work) {
    for (int64_t t = 0; t < threads; t++) shares_[t].set(count * t / threads, count * (t + 1) / threads);
    run([&](int64_t thread, const Barrier&) {
      for (int64_t i = 0; i < threads; i++)
        for (int64_t part; (part = shares_[(thread + i) % threads].take(i > 0 || thread >= threads)) >= 0;) work(part);
    });
  }

 private:
  explicit Team(int64_t threads) : shares_(threads) {}

  Barrier barrier_;
  std::vector<Share> shares_;
  const void* work_ = nullptr;
  void (*call_)(const void* work, int thread, Barrier& barrier) = nullptr;
};

// Runs work(thread, barrier) in up to `threads` threads; barrier.threads tells how many there are.
template <typename Work>
void in_threads(int64_t threads, const Work& work) {
  if (Team::led) return Team::led->run(work);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier.threads = omp_get_num_threads();  // OpenMP may give fewer than asked for
    work(omp_get_thread_num(), barrier);
  }
}

inline constexpr int64_t kParts = 8;  // of a thread's share, at most: others can take what is not begun

// The same for so many tokens: a part begins with nothing asked for ahead, which with few tokens costs more than waiting.
inline int64_t parts_for(int64_t tokens) { return std::clamp<int64_t>(tokens / 64, 1, kParts); }

// Runs work(begin, end) on parts of 0..count, divided among as many threads as get at least `grain` each. In a team, a
// thread's share has up to `parts_each` parts, and others help.
template <typename Work>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Work& work, int64_t parts_each = kParts) {
  threads = std::min(threads, (count + grain - 1) / grain);
  if (threads <= 1) return work(int64_t{0}, count);
  if (Team* const team = Team::led) {
    threads = std::min(threads, team->threads());
    const int64_t parts = threads * std::clamp<int64_t>((count + grain - 1) / grain / threads, 1, parts_each);
    // Not inlined: in the loop that takes parts, GCC's code of norms took 1.5 times as long.
    return team->share(parts, threads, [&](int64_t part) __attribute__((noinline)) {
      work(count * part / parts, count * (part + 1) / parts);
    });
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), given = omp_get_num_threads();  // may be fewer than asked for
    work(count * thread / given, count * (thread + 1) / given);
  }
}
