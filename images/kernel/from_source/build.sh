#!/bin/sh
# Builds the guest kernel from Debian's source package, inside a tree that holds that package and a compiler and is thrown
# away afterwards. Leaves /built/vmlinux and /built/release. Run by atelier.drivers.images.kernel_build.
set -eu

mkdir /built
cd /usr/src
echo "atelier: unpacking the source"
tar -x -f linux-source-*.tar.xz
cd linux-source-*/

# The same source and fragment give the same kernel, whoever builds it.
export KBUILD_BUILD_USER=atelier KBUILD_BUILD_HOST=atelier KBUILD_BUILD_VERSION=1
KBUILD_BUILD_TIMESTAMP="@$(stat -c %Y Makefile)"
export KBUILD_BUILD_TIMESTAMP

KCONFIG_ALLCONFIG=/fragment make -s allnoconfig
lost=$(grep '^CONFIG_' /fragment | grep -vxF -f .config || true)
if [ -n "$lost" ]; then
    echo "the kernel's own rules overrule these lines of the fragment:" $lost >&2
    exit 1
fi
make -s kernelrelease >/built/release
echo "atelier: compiling"
make -j"$(nproc)" vmlinux
strip --strip-debug -o /built/vmlinux vmlinux
