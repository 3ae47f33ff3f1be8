#!/usr/bin/env bash
# Compile the generic kernels for 64-bit ARM, where their vectors are NEON's, and run them under qemu. As root on
# Debian; about a minute.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for package in g++-aarch64-linux-gnu qemu-user; do
  dpkg -s "$package" > /dev/null 2>&1 || apt-get install -q -y --no-install-recommends "$package" > /dev/null
done
# The flags are those of llamacrab/meson.build.
aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=fast -fno-math-errno -static -DLLAMACRAB_KERNEL_TABLE=generic_kernels \
  "$root/tests/native/kernels_elsewhere.cpp" "$root/llamacrab/kernels/simd/kernels.cpp" -o "$work/check"
echo "NEON multiply-adds: $(aarch64-linux-gnu-objdump -d "$work/check" | grep -c 'fmla.*v[0-9]*\.4s')"
qemu-aarch64 "$work/check"
