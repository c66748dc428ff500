# Run by mmdebstrap with the unpacked tree as $1, as root of the machine or of a user namespace. Its text is handed over,
# so that the user the namespace runs as need not be able to read this file.
set -eu
root=$1

chroot "$root" useradd --create-home --uid 1000 --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"

# Every sandbox gets an identity of its own.
rm -f "$root"/etc/ssh/ssh_host_*_key "$root"/etc/ssh/ssh_host_*_key.pub
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
printf 'sandbox\n' >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"

# The build machine's name servers and its way through a proxy are none of a sandbox's business.
printf '' >"$root/etc/resolv.conf"
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
sed -i '/^force-unsafe-io$/d' "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
for sources in "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*; do
    [ -f "$sources" ] && sed -i 's#://[^/@ ]*@#://#g' "$sources"
done

# Kept small, and answerable for: apt in a sandbox leaves no copies behind and installs what is asked for.
printf 'APT::Install-Recommends "false";\n' >"$root/etc/apt/apt.conf.d/10sandbox"
# /tmp is left alone: mmdebstrap's configuration of apt lies there until its own clean-up has used it, and without it
# that clean-up would empty the build machine's package lists.
rm -rf "$root"/var/log/*.log "$root"/var/log/apt
mkdir -p "$root/opt/shared" "$root/home/user"
