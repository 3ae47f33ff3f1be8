# Included at llama.cpp's project(): give its shared libraries names of our own, once they exist, so
# that those of another llama.cpp in the process cannot be taken for them.
if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR)
  cmake_language(DEFER CALL
    set_target_properties llama ggml ggml-base PROPERTIES PREFIX "libllamacrab-")
endif()
