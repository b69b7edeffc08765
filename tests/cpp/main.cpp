// What Python's tests run of the library itself:
//   neck-tests engine PLAN
//   neck-tests checks PLAN FOLDER
//   neck-tests pool PLAN THREADS REQUESTS [SECONDS]
//   neck-tests share PLAN                        two threads in one context, which the fake must see
// with a plan of float32 (1 to 4, 3, 2, 2) in, float16 and float32 of 5 channels out; and
//   neck-tests half                              65536 float32: every half
//   neck-tests image FILE                      uint8 pixels, then float32 normalized
//   neck-tests resize HEIGHT WIDTH THREADS FILE...   uint8 pixels of that size
//   neck-tests safetensors|plan|images|memory FILE... one line for each: what is in it, or the error
//   neck-tests allocations KIND FILE LEAST       the same with every allocation of so many bytes failing in its turn
//   neck-tests threads                           a resize in a process that may start no thread
//   neck-tests limits|log FILE                   an image under several limits; what reading it reports to the log
//   neck-tests leak|overflow                     does wrong what the sanitizers and the fakes must see
#include <cstdlib>

#include "expect.hpp"
#include "tests.hpp"

int main(int count, char** values) {
    const std::string kind = count > 1 ? values[1] : "";
    if (kind == "engine" && count == 3) {
        test_engine(values[2]);
    } else if (kind == "checks" && count == 4) {
        test_checks(values[2], values[3]);
    } else if (kind == "share" && count == 3) {
        share_a_context(values[2]);
    } else if (kind == "pool" && count > 4) {
        test_pool(values[2], std::atoi(values[3]), std::atoi(values[4]),
                  std::chrono::seconds(count > 5 ? std::atoi(values[5]) : 0));
    } else {
        return kind.empty() ? 2 : probe(count, values);
    }
    return failures == 0 ? 0 : 1;
}
