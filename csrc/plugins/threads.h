// CPU threads of a graph: no more than its work feeds, so that a small model on many cores does not wait for threads.
// engine/threads.py holds the same rule.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <fstream>

namespace greedy::plugin {

// Multiply-adds that feed one thread.
inline constexpr int64_t kGrain = int64_t{1} << 23;

// Whole cores that the container grants (control groups, version 2), at least 1; INT_MAX is no limit.
inline int quota() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    double granted = 0, period = 0;
    if (!(file >> granted >> period) || period <= 0) return INT32_MAX;  // "max 100000" is no number
    return std::max(1, static_cast<int>(std::min(granted / period, 1e6)));
}

// OpenMP and MKL keep a number of threads for each thread that calls them: the rest of the process notices nothing.
class Threads {
  public:
    // Functions that this torch lacks leave its number of threads as it is.
    explicit Threads(void* torch) : quota_(quota()), chosen_(std::getenv("OMP_NUM_THREADS") != nullptr) {
        find(torch, "torch_get_num_threads", current_);
        find(torch, "omp_set_num_threads", set_openmp_);
        find(torch, "MKL_Set_Num_Threads_Local", set_mkl_);
    }

    // A graph's largest product; of all graphs the largest counts.
    void add(int64_t work) {
        int64_t known = work_;
        while (known < work && !work_.compare_exchange_weak(known, work)) {
        }
    }

    // The calling thread's numbers, lowered for a call.
    class Lowered {
      public:
        explicit Lowered(const Threads& threads) : threads_(threads) {
            uint32_t current = 0;
            if (threads.chosen_ || threads.work_ == 0 || !threads.set_openmp_ || !threads.current_) return;
            if (threads.current_(&current)) return;
            const int64_t fed = std::max<int64_t>(1, threads.work_ / kGrain);
            const int64_t count = std::min<int64_t>(fed, threads.quota_);
            if (count >= current) return;
            before_ = static_cast<int>(current);
            threads.set_openmp_(static_cast<int>(count));
            if (threads.set_mkl_) mkl_before_ = threads.set_mkl_(static_cast<int>(count));
        }
        ~Lowered() {
            if (!before_) return;
            threads_.set_openmp_(before_);
            if (threads_.set_mkl_) threads_.set_mkl_(mkl_before_);
        }
        Lowered(const Lowered&) = delete;
        Lowered& operator=(const Lowered&) = delete;

      private:
        const Threads& threads_;
        int before_ = 0, mkl_before_ = 0;
    };

  private:
    template <typename Function>
    static void find(void* library, const char* name, Function& out) {
        out = reinterpret_cast<Function>(dlsym(library, name));
    }

    const int quota_;
    const bool chosen_;  // by the user
    std::atomic<int64_t> work_{0};
    int32_t (*current_)(uint32_t*) = nullptr;  // also makes torch set up the calling thread
    void (*set_openmp_)(int) = nullptr;
    int (*set_mkl_)(int) = nullptr;  // returns the number before; 0 is the process's
};

}  // namespace greedy::plugin
