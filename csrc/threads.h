// Work that is divided among threads.
#pragma once

#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

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

}  // namespace profuser
