// Work shared by threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

// Where threads wait for each other.
struct Barrier {
  int threads = 1;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};

  // Returns whether the thread slept.
  bool wait() {
    const int current = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(current + 1, std::memory_order_release);
      round.notify_all();
      return false;
    }
    int64_t spins = 0;
    for (; round.load(std::memory_order_acquire) == current; spins++) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (spins > kSpins) round.wait(current);  // another program has the processor of a thread waited for: give it this one
    }
    return spins > kSpins;
  }

 private:
  static constexpr int64_t kSpins = 3000;  // about 0.1 ms
};

// Threads that run one piece of work after another, and spin between them: waking a thread takes as long as a short piece.
class Team {
 public:
  // The team that this thread leads.
  inline static thread_local Team* led = nullptr;

  // Runs body() in this thread, which leads a team meanwhile: in_threads and parallel_for run in it.
  template <typename Body>
  static void lead(int64_t threads, const Body& body) {
    Team team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      team.barrier_.threads = omp_get_num_threads();  // OpenMP may give fewer than asked for
      if (const int thread = omp_get_thread_num()) {
        for (team.barrier_.wait(); team.call_; team.barrier_.wait()) {
          team.call_(team.work_, thread, team.barrier_);
          team.end_piece();
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
    uneven_ = slept_.exchange(false, std::memory_order_relaxed) ? kUneven : std::max(uneven_ - 1, 0);
    barrier_.wait();
    work(0, barrier_);
    end_piece();
    led = this;
  }

  // Whether threads had to sleep lately because one of them was late: work is better taken in small parts then.
  bool is_uneven() const { return uneven_ > 0; }

 private:
  static constexpr int kUneven = 64;  // pieces of work for which threads count as uneven after one had to be waited for

  void end_piece() {
    if (barrier_.wait()) slept_.store(true, std::memory_order_relaxed);
  }

  Barrier barrier_;
  std::atomic<bool> slept_{false};
  int uneven_ = 0;
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

// Runs work(begin, end) on parts of 0..count, in as many threads as have at least `grain` things to do.
template <typename Work>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const Work& work) {
  threads = std::min(threads, (count + grain - 1) / grain);
  if (threads <= 1) return work(int64_t{0}, count);
  const auto run_part = [&](int64_t thread, int64_t given) {
    work(count * thread / given, count * (thread + 1) / given);
  };
  if (Team* const team = Team::led) {
    if (!team->is_uneven())
      return team->run([&](int64_t thread, const Barrier& barrier) {
        if (thread < threads) run_part(thread, std::min<int64_t>(threads, barrier.threads));
      });
    std::atomic<int64_t> next{0};
    const int64_t parts = std::min(8 * threads, (count + grain - 1) / grain);
    return team->run([&](int64_t, const Barrier&) {
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) run_part(part, parts);
    });
  }
#pragma omp parallel num_threads(threads)
  run_part(omp_get_thread_num(), omp_get_num_threads());  // may be fewer than asked for
}
