// Cases of test_parallel_cases.py: parallel.h as kernels use it. Ends with 0 if the case named on the command line passes.

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <string>
#include <thread>

#include "../../qwen3fast/kernels/cpu/parallel.h"

namespace {

void check(bool is_true, const char* what) {
  if (is_true) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::_Exit(1);
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Each thread works once, and after a barrier sees what the others have written before it.
void call(int64_t threads, bool are_fewer = false) {
  std::vector<int> written(threads), seen(threads);
  int given = 0;
  in_threads(threads, [&](int thread, Barrier& barrier) {
    written[thread]++;
    if (thread == 0) given = barrier.threads;
    barrier.wait();
    seen[thread] = std::accumulate(written.begin(), written.end(), 0);
  });
  check(are_fewer ? given >= 1 && given < threads : given == threads, "the number of threads");
  for (int64_t t = 0; t < threads; t++) {
    check(written[t] == (t < given), "each thread works once");
    check(seen[t] == (t < given ? given : 0), "each thread sees what all have written");
  }
  std::vector<int> parts(1000);
  parallel_for(1000, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) parts[i]++;
  });
  check(std::count(parts.begin(), parts.end(), 1) == 1000, "each part is done once");
}

void calls() {
  for (int i = 0; i < 600; i++) {
    call(i % 5 + 1);
    if (i % 100 == 0) sleep_ms(2);  // all sleep
  }
}

// Calls in a call run in the thread that makes them.
void nested() {
  std::atomic<int> inner{0};
  run_threads(3, [&](int, int) {
    run_threads(4, [&](int thread, int number) {
      check(thread == 0 && number == 1, "an inner call is of one thread");
      inner++;
    });
  });
  check(inner == 3, "each thread makes the inner call");
  call(3);
}

void team() {
  for (int i = 0; i < 10; i++) {
    Team::lead(3, [&] {
      check(Team::led && Team::led->threads() == 3, "the team is led");
      std::vector<int> parts(1000);
      for (int round = 1; round <= 20; round++) {
        parallel_for(1000, 1, 3, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) parts[i]++;
          parallel_for(10, 1, 3, [&](int64_t first, int64_t last) { check(last - first == 10, "an inner loop is whole"); });
        });
        check(std::count(parts.begin(), parts.end(), round) == 1000, "each part is done once per round");
        call(3);
        if (round % 10 == 0) sleep_ms(1);
      }
    });
    check(!Team::led, "no team is led");
  }
}

// On other systems than Linux they are not counted.
int64_t system_threads() {
  std::error_code none;
  const std::filesystem::directory_iterator tasks("/proc/self/task", none);
  return std::distance(begin(tasks), end(tasks));
}

// Several threads call at once. Their helpers end with them.
void leaders() {
  const int64_t before = system_threads();
  std::vector<std::thread> all;
  for (int t = 0; t < 4; t++)
    all.emplace_back([t] {
      for (int i = 0; i < 100; i++) call(t % 3 + 2);
      sleep_ms(t);
    });
  for (std::thread& thread : all) thread.join();
  for (int i = 0; i < 5000 && system_threads() > before; i++) sleep_ms(1);
  check(system_threads() == before, "threads end with those that called them");
}

// A forked process has threads of its own, and its parent keeps its own.
void forked() {
  call(3);
  for (int i = 0; i < 5; i++) {
    const pid_t child = fork();
    call(3);
    call(4);
    if (child == 0) std::exit(0);
    int status = 1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "the forked process ends well");
  }
}

// A thread that sleeps at a barrier notes how long; one that arrives late does not.
void slept() {
  for (int i = 0; i < 100; i++) {
    double early = 0, late = 0;
    Barrier barrier;
    run_threads(2, [&](int thread, int number) {
      check(number == 2, "the number of threads");
      const double before = Barrier::slept;
      while (thread == 0 && barrier.arrived == 0) sleep_ms(1);
      if (thread == 0) sleep_ms(20);
      barrier.wait();
      (thread ? early : late) = Barrier::slept - before;
    }, &barrier);
    check(late == 0, "the last thread has not waited");
    if (early > 0.005) return;  // usually at once; it may have been stopped while it spun
  }
  check(false, "the time asleep is noted");
}

// The system has no memory for the stacks of as many threads.
void refused() {
  const rlimit limit{100 << 20, 100 << 20};
  setrlimit(RLIMIT_AS, &limit);
  call(256, true);
  call(3);
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  alarm(60);
  if (name == "calls") calls();
  else if (name == "nested") nested();
  else if (name == "team") team();
  else if (name == "leaders") leaders();
  else if (name == "forked") forked();
  else if (name == "refused") refused();
  else if (name == "slept") slept();
  else if (name == "exit asleep") call(4), sleep_ms(5);
  else if (name == "exit awake") call(4);
  else check(false, "a case of this name");
}
