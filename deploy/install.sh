#!/bin/sh
# Installs Atelier for a whole host, and sets the host up. For root, on Debian 12 or newer.
#
#   deploy/install.sh                          asks what has to be asked
#   deploy/install.sh --config host.toml --yes
#   deploy/install.sh --check                  what `atelier host init` would change
#
# Atelier goes to /opt/atelier, its command to /usr/local/bin/atelier; all arguments are those of `atelier host init`.
# ATELIER_SOURCE: a wheel or a checkout, if not the checkout that this script lies in.
set -eu

if [ "$(id -u)" != 0 ]; then
    echo "install.sh: this changes the machine itself, and that is root's alone: sudo $0 $*" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "install.sh: this host has no apt-get: Atelier's production host is a Debian" >&2
    exit 1
fi

source=${ATELIER_SOURCE:-$(dirname "$0")/..}
prefix=/opt/atelier

if [ -e "$prefix" ] && [ ! -e "$prefix/.installed-by-atelier" ]; then
    echo "install.sh: $prefix is there, and not of Atelier's making: look what it is, and move it away" >&2
    exit 1
fi
if [ -e /usr/local/bin/atelier ] && [ "$(readlink /usr/local/bin/atelier)" != "$prefix/bin/atelier" ]; then
    echo "install.sh: /usr/local/bin/atelier is there, and not of Atelier's making: look what it is, and move it away" >&2
    exit 1
fi
if ! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "install.sh: this takes Python 3.11 with venv: apt-get install python3 python3-venv" >&2
    exit 1
fi

umask 022
mkdir -p "$prefix"
touch "$prefix/.installed-by-atelier"
[ -x "$prefix/bin/python" ] || python3 -m venv "$prefix"
"$prefix/bin/python" -m pip install --quiet --upgrade "$source"
ln -sfn "$prefix/bin/atelier" /usr/local/bin/atelier
echo "install.sh: installed $("$prefix/bin/atelier" --version) in $prefix; setting up the host" >&2
exec "$prefix/bin/atelier" host init "$@"
