#!/usr/bin/env bash
# Build llamacrab for CUDA, show the device code that it holds, and, where there is a GPU, run what must hold on
# one, tune, and measure beside sentence-transformers in half precision. Needs nvcc (12 or later); cuBLAS is
# taken from the package index if the toolkit has none. The build takes about an hour on two cores.
#
#   bench/gpu/cuda.sh [FOLDER for the environment; by default a temporary one]
#
#   CUDAARCHS   what to compile for: by default 90, Hopper
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
export CUDAARCHS=${CUDAARCHS:-90}

python3 -m venv "$work/venv"
pip=$work/venv/bin/pip
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
# What is called nvcc may be a script: ask where the compiler lies.
toolkit=$(dirname "$("$nvcc" -dryrun -x cu -E /dev/null 2>&1 | sed -n 's/.*_HERE_=//p')")
args=(-Csetup-args=-Dcuda=enabled)
found=()
if [ ! -e "$toolkit/lib64/libcublas.so" ]; then
  # A toolkit that has it: links to this one's files, and to the package's, which stays installed beside
  # llamacrab, where the extension looks for it.
  major=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
  if [ "$major" -ge 13 ]; then "$pip" install --quiet nvidia-cublas; else "$pip" install --quiet "nvidia-cublas-cu$major"; fi
  site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  blas=$(dirname "$(find "$site/nvidia" -name cublas_v2.h | head -n 1)")/..
  whole=$work/toolkit
  rm -rf "$whole"
  cp -rsL "$toolkit" "$whole"
  cp -rsf "$blas/include/." "$whole/include"
  for name in cublas cublasLt; do
    library=$(find "$(cd "$blas/lib" && pwd)" -name "lib$name.so.*" | head -n 1)
    for folder in "$whole/lib64" "$whole"/targets/*/lib; do ln -sf "$library" "$folder/lib$name.so"; done
    found+=("-DCUDA_${name}_LIBRARY=$library")
  done
  args+=("-Csetup-args=-Dllama-cmake-args=$(IFS=,; echo "${found[*]}")")
  export CUDA_PATH=$whole CPATH=$whole/include${CPATH:+:$CPATH} LIBRARY_PATH=$whole/lib64${LIBRARY_PATH:+:$LIBRARY_PATH}
fi

began=$SECONDS
"$pip" install --quiet "$root[test]" "${args[@]}"
echo "built in $((SECONDS - began)) s"

cd "$work"
command -v cuobjdump > /dev/null || "$pip" install --quiet nvidia-cuda-cuobjdump
export PATH=$PATH:$(dirname "$(find "$work/venv" -name cuobjdump -type f | head -n 1)")
extension=$("$work/venv/bin/python" -c 'import llamacrab._core as core; print(core.__file__)')
echo "device code: $(cuobjdump --list-elf "$extension" | grep -o 'sm_[0-9a-z]*' | sort | uniq -c | tr -s ' ')"
"$work/venv/bin/llamacrab" versions
"$work/venv/bin/llamacrab" embed "$root/docs/examples/crabs.txt" -o "$work/crabs.npy"
if ! "$work/venv/bin/llamacrab" info --devices | grep -q GPU; then
  echo "no GPU here: what must hold on one has not been run"
  exit
fi

cd "$root"
"$work/venv/bin/pytest" tests/test_gpu.py --durations=5
"$work/venv/bin/llamacrab" tune
"$pip" install --quiet matplotlib
"$work/venv/bin/python" bench/peers/run.py --only "sentence-transformers fp16 on the GPU" --texts 20000 --rounds 5
