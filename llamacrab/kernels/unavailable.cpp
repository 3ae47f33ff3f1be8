// What stands in for the kernels where they cannot be: a system's libllama comes without the
// internal headers that a ggml backend is written against.
#include "kernels.hpp"
#include "testing/compare_with_ggml.hpp"

namespace llamacrab::kernels {

const char * active_name() { return nullptr; }
bool preferred_over_ggml() { return false; }
void install() {}
double check_kernels(const std::string &, const std::vector<int> &) { return -1; }
loading_for::loading_for(cpu_backend) : before(0) {}
loading_for::~loading_for() { (void) before; }

}  // namespace llamacrab::kernels
