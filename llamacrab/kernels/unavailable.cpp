// Stands in for the kernels in a build against a libllama of the system, which comes without the
// internal headers that a ggml backend needs.
#include "kernels.hpp"
#include "testing/compare_with_ggml.hpp"

namespace llamacrab::kernels {

const char * active_name() { return nullptr; }
bool have_int8() { return false; }
bool have_bf16() { return false; }
bool can_pack(int) { return false; }
bool preferred_over_ggml() { return false; }
void install() {}
double compare_with_ggml(const std::string &, const std::map<std::string, field_value> &) {
    return -1;
}
std::string complaint_about_backend() { return ""; }
loading_for::loading_for(cpu_backend) : before(0), int8_before(0) {}
loading_for::~loading_for() { (void) before; }
int loading_for::n_int8_matrices() const { return int8_before; }
extra_threads::extra_threads(int) : before(0) {}
extra_threads::~extra_threads() { (void) before; }
int extra_threads::allowed() { return 0; }

}  // namespace llamacrab::kernels
