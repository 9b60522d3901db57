#!/usr/bin/env bash
# Runs the tests of the NPU runtime's ABI as an aarch64 program, under qemu: an aarch64 Python with its own ctypes and
# libffi against the stand-in compiled for aarch64. It shows that structures, calls and callbacks are right by that
# architecture's calling convention; it says nothing about Rockchip's hardware. Debian or Ubuntu, about 5 minutes:
#
#   apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user && scripts/test_rkllm_aarch64.sh
#
# Everything is downloaded into a folder of its own (the first argument, or a temporary one); nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
mkdir -p "$work"/{lists,cache,debs,root,wheels,site}
pip=(.venv/bin/python -m pip)
python=3.11

apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State::lists="$work/lists"
    -o Dir::Cache="$work/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work/debs" && "${apt[@]}" download "python$python-minimal" "libpython$python-minimal" "libpython$python-stdlib" \
    libc6 libffi8 zlib1g libexpat1 libssl3 libgcc-s1 libstdc++6 libuuid1 libbz2-1.0 liblzma5)
for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$work/root"; done

"${pip[@]}" download --quiet --no-deps --only-binary=:all: --platform manylinux2014_aarch64 \
    --python-version "$python" --implementation cp --dest "$work/wheels" msgspec pytest pluggy iniconfig packaging pygments
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done

printf '#!/bin/sh\nexec qemu-aarch64 -L %q %q "$@"\n' "$work/root" "$work/root/usr/bin/python$python" >"$work/python"
chmod +x "$work/python"
CC=aarch64-linux-gnu-gcc PYTHONHOME="$work/root/usr" PYTHONPATH="$work/site:$PWD/src:$PWD/tests/helpers" "$work/python" - <<END
import platform, sys, pytest
assert platform.machine() == "aarch64"
sys.executable = "$work/python"
tests = ["$PWD/tests/engine/test_rkllm_abi.py", "$PWD/tests/engine/test_rkllm_runtime.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "$work", "--noconftest", *tests]))
END
