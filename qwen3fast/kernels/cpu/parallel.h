// Work shared by threads.

#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
#include <unistd.h>

#include <memory>
#include <system_error>
#include <thread>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
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

#ifndef _OPENMP

// The threads that help one thread, which calls them again and again. They end with it.
class Helpers {
 public:
  using Call = void (*)(const void* work, int thread, int threads);

  // Runs call(work, thread, threads) in this thread and in up to threads - 1 others: none where this thread helps in a call
  // already, fewer where the system gives no more. barrier: is told how many; may be null.
  static void run(int64_t threads, Call call, const void* work, Barrier* barrier) noexcept {
    static thread_local Helpers own;
    const bool is_nested = is_working_;
    const int given = is_nested ? 1 : own.start(threads);
    if (barrier) barrier->threads = given;
    for (int t = 1; t < given; t++) own.helpers_[t - 1]->begin({call, work, t, given});
    is_working_ = true;
    call(work, 0, given);
    is_working_ = is_nested;
    for (int t = 1; t < given; t++) wait_while(own.helpers_[t - 1]->state, Helper::kWorks);
  }

 private:
  struct Task {
    Call call;
    const void* work;
    int thread, threads;
  };

  struct Helper {
    enum State { kSleeps, kWorks, kEnds };

    alignas(64) std::atomic<int> state{kSleeps};
    Task task;

    void begin(const Task& next) {
      task = next;
      change(kWorks);
    }

    void change(State next) {
      state.store(next, std::memory_order_release);
      state.notify_one();
    }

    void live() {
      is_working_ = true;
      for (;; change(kSleeps)) {
        wait_while(state, kSleeps);
        if (state.load(std::memory_order_relaxed) == kEnds) return;
        task.call(task.work, task.thread, task.threads);
      }
    }
  };

  ~Helpers() {
    for (const auto& helper : helpers_) helper->change(Helper::kEnds);
  }

  // Returns how many threads a call can have, this one included.
  int start(int64_t threads) {
    if (process_ != getpid()) helpers_.clear(), process_ = getpid();  // after fork(), the parent alone has them
    try {
      for (auto count = static_cast<int64_t>(helpers_.size()) + 1; count < threads; count++) {
        const auto helper = std::make_shared<Helper>();  // its thread keeps it, and may end after this one
        std::thread([helper] { helper->live(); }).detach();
        helpers_.push_back(helper);
      }
    } catch (const std::system_error&) {  // no more threads
    }
    return static_cast<int>(std::clamp<int64_t>(threads, 1, helpers_.size() + 1));
  }

  inline static thread_local bool is_working_ = false;

  std::vector<std::shared_ptr<Helper>> helpers_;
  pid_t process_ = 0;
};

#endif

// Runs work(thread, number) in up to `threads` threads: OpenMP, or the system, may give fewer. barrier: is told how many.
template <typename Work>
void run_threads(int64_t threads, const Work& work, Barrier* barrier = nullptr) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    if (barrier) {
#pragma omp single
      barrier->threads = omp_get_num_threads();
    }
    work(omp_get_thread_num(), omp_get_num_threads());
  }
#else
  const auto call = [](const void* work, int thread, int number) { (*static_cast<const Work*>(work))(thread, number); };
  Helpers::run(threads, call, &work, barrier);
#endif
}

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
    const auto follow = [&](int thread, int) {
      if (thread) {
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
    };
    run_threads(threads, follow, &team.barrier_);
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
  run_threads(threads, [&](int thread, int) { work(thread, barrier); }, &barrier);
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
  run_threads(threads, [&](int64_t thread, int number) {
    work(count * thread / number, count * (thread + 1) / number);
  });
}
