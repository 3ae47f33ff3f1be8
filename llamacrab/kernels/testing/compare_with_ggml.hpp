// For tests: small graphs on random data, computed by this backend and by ggml's.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace llamacrab::kernels {

// The fields of a test case by name: numbers, one for most, or a word.
struct field_value {
    std::vector<int> numbers;
    std::string word;
};

// Return the mean squared difference of the two results relative to the mean square of ggml's, or
// -1 if the backend does not take every node. `kind` names one of the structs in
// compare_with_ggml.cpp. Throws std::invalid_argument if a field is unknown, or is missing.
double compare_with_ggml(const std::string & kind,
                         const std::map<std::string, field_value> & fields);

// What is wrong with how the backend presents itself to llama.cpp, and with views of packed
// weights; empty if nothing is.
std::string complaint_about_backend();

}  // namespace llamacrab::kernels
