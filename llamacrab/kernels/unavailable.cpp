// Stands in for the kernels in a build against a libllama of the system, which comes without the
// internal headers that a ggml backend needs.
#include "kernels.hpp"
#include "testing/compare_with_ggml.hpp"

namespace llamacrab::kernels {

const char * active_name() { return nullptr; }
bool preferred_over_ggml() { return false; }
void install() {}
double compare_with_ggml(const std::string &, const std::map<std::string, field_value> &) {
    return -1;
}
loading_for::loading_for(cpu_backend) : before(0) {}
loading_for::~loading_for() { (void) before; }

}  // namespace llamacrab::kernels
