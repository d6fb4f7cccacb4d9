// Work that is divided among threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
#include <dlfcn.h>
#include <unistd.h>
#define PROFUSER_FINDS_OPENMP
#endif

namespace profuser {

// Calls work(w) for each w below `workers`, in a thread of its own, and work(0) in the caller's. `work` must not throw: out of a thread,
// that would end the process. Where no more threads can be started, for lack of memory or by a limit of processes, the caller does
// what is left.
template <typename Work>
void in_threads(std::size_t workers, const Work& work) {
    std::vector<std::thread> others;
    std::size_t started = 1;
    try {
        others.reserve(workers);
        for (; started < workers; ++started) {
            others.emplace_back(work, started);
        }
    } catch (const std::exception&) {
    }
    work(0);
    for (; started < workers; ++started) {
        work(started);
    }
    for (std::thread& other : others) {
        other.join();
    }
}

// Calls a function in several threads, one of which is the caller's, with the same argument.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#ifdef PROFUSER_FINDS_OPENMP
inline const pid_t loaded_by = getpid();
#endif

// The parallel region of the OpenMP runtime that torch computes with, or null where there is none that all libraries can call. In a process
// that was forked its threads are gone, and it would wait for them for ever.
inline Parallel openmp() {
#ifdef PROFUSER_FINDS_OPENMP
    if (getpid() == loaded_by) {
        return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    }
#endif
    return nullptr;
}

// As in_threads, but in torch's own threads where they can be had. After each of torch's products they keep their cores busy for some
// milliseconds, in wait for the next one, and other threads would get half of such a core at most.
template <typename Work>
void in_torch_threads(std::size_t workers, const Work& work) {
    const Parallel parallel = workers > 1 ? openmp() : nullptr;
    if (parallel == nullptr) {
        in_threads(workers, work);
        return;
    }
    // There may be fewer threads than were asked for: each takes what is left until nothing is.
    struct Shares {
        const Work& work;
        const std::size_t workers;
        std::atomic<std::size_t> next{0};
    } shares{work, workers};
    const auto take = [](void* of_all) {
        Shares& shares = *static_cast<Shares*>(of_all);
        for (std::size_t w = shares.next++; w < shares.workers; w = shares.next++) {
            shares.work(w);
        }
    };
    parallel(take, &shares, static_cast<unsigned>(workers), 0);
}

}  // namespace profuser
