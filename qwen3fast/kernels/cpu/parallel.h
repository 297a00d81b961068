// Work shared by threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

struct Range {
  int64_t begin, end;
};

// The share of thread `thread` of `threads` in `count` things.
inline Range share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

inline double seconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Where threads wait for each other.
struct Barrier {
  // Seconds that this thread has slept because others had not arrived: it had no need of its processor.
  inline static thread_local double slept = 0;

  int threads = 1;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};

  void wait() {
    const int current = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      if (sleeping_.load(std::memory_order_relaxed)) complete_.store(seconds(CLOCK_MONOTONIC), std::memory_order_relaxed);
      round.store(current + 1, std::memory_order_release);
      round.notify_all();
      return;
    }
    for (int64_t spins = 0; round.load(std::memory_order_acquire) == current; spins++) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (spins > kSpins) sleep(current);  // another program has the processor of a thread waited for: give it this one
    }
  }

 private:
  static constexpr int64_t kSpins = 3000;  // about 0.1 ms

  void sleep(int current) {
    sleeping_.fetch_add(1, std::memory_order_relaxed);
    const double begin = seconds(CLOCK_MONOTONIC);
    round.wait(current, std::memory_order_acquire);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    // Not until now: since then, this thread may have waited for a processor.
    slept += std::max(0., complete_.load(std::memory_order_relaxed) - begin);
  }

  std::atomic<int> sleeping_{0};
  std::atomic<double> complete_{0};  // when the last thread arrived, if others slept
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
