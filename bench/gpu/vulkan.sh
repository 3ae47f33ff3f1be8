#!/usr/bin/env bash
# Build llamacrab for Vulkan, and run what must hold on a GPU on Mesa's software driver: as root on Debian 12
# or later, no GPU is needed. Takes some minutes on two cores, most of them for compiling shaders.
#
#   bench/gpu/vulkan.sh [FOLDER for the environment and the headers; by default a temporary one]
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"

apt-get update -q > /dev/null
apt-get install -q -y --no-install-recommends mesa-vulkan-drivers libvulkan-dev spirv-headers glslc > /dev/null

include=/usr/include
if ! grep -q VK_EXT_layer_settings "$include/vulkan/vulkan_core.h"; then
  # llama.cpp needs newer headers than Debian 12 has; those of Debian 13 go with its loader and compiler.
  newer=$work/apt
  mkdir -p "$newer/lists/partial" "$newer/archives/partial"
  { cat /etc/apt/sources.list.d/*.sources || true; } \
    | grep -v -e '^#' | sed "s/$(. /etc/os-release && echo "$VERSION_CODENAME")/trixie/g" > "$newer/debian.sources"
  options=(-o "Dir::Etc::sourcelist=$newer/debian.sources" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$newer/lists"
    -o "Dir::Cache=$newer")
  apt-get "${options[@]}" update -q > /dev/null
  (cd "$newer" && apt-get "${options[@]}" download -q libvulkan-dev > /dev/null)
  dpkg -x "$newer"/libvulkan-dev_*.deb "$newer/root"
  include=$newer/root/usr/include
fi

python3 -m venv "$work/venv"
began=$SECONDS
# The folder goes before the system's for the sources that include it, as well as for CMake's search.
CXXFLAGS="-I$include" "$work/venv/bin/pip" install --quiet "$root[test]" \
  -Csetup-args=-Dvulkan=enabled "-Csetup-args=-Dllama-cmake-args=-DVulkan_INCLUDE_DIR=$include"
echo "built in $((SECONDS - began)) s"

# ggml leaves software drivers alone unless it is told which device to use.
export GGML_VK_VISIBLE_DEVICES=0
cd "$root"
"$work/venv/bin/llamacrab" info --devices
"$work/venv/bin/pytest" tests/test_gpu.py --durations=5
