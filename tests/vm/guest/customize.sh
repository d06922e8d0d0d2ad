#!/bin/sh
# Runs once, as root inside the new root of the guest: users, Python, the agent's service.
set -eu
here=/opt/vm

# Ids are given out by hand: two users have a range, one has none.
add_user() {
    useradd --create-home --shell /bin/bash --uid "$2" \
        --key SUB_UID_COUNT=0 --key SUB_GID_COUNT=0 "$1"
    mkdir -p /var/lib/systemd/linger
    : > "/var/lib/systemd/linger/$1"
}
add_user ranged 1000
add_user plain 1001
add_user nocpu 1002
for file in /etc/subuid /etc/subgid; do
    printf 'ranged:100000:65536\nnocpu:165536:65536\n' > "$file"
done

# Debian delegates cpu, memory and pids to the managers of users, and plain's has no more than that.
# An empty line takes back what the lines before it gave.
delegate() {
    mkdir -p "/etc/systemd/system/user@$1.service.d"
    printf '[Service]\nDelegate=\nDelegate=%s\n' "$2" \
        > "/etc/systemd/system/user@$1.service.d/delegate.conf"
}
delegate 1000 'cpu cpuset io memory pids'
delegate 1002 'memory pids'

python3 -m venv /opt/venv
/opt/venv/bin/python -m pip install --quiet --no-index --find-links $here/wheels \
    --requirement $here/requirements.txt
rm -r $here/wheels
echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh
# What belongs to root is compiled now, since no ordinary user can keep what they compile.
python3 -m compileall -q /usr/lib/python3.11 >/dev/null || true

install -m 644 $here/agent@.service /etc/systemd/system/agent@.service
for number in 0 1 2 3; do
    systemctl --quiet enable "agent@$number.service"
done

echo vm > /etc/hostname
echo '127.0.0.1 localhost vm' > /etc/hosts
: > /etc/machine-id
# Nothing that the suites need; each costs seconds where qemu has no KVM.
systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-timesyncd.service \
    getty@tty1.service serial-getty@ttyS0.service systemd-update-utmp.service \
    systemd-hwdb-update.service

# The initial file system needs no more than the way to the disk.
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=lz4/' \
    /etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\nvirtio_blk\n' >> /etc/initramfs-tools/modules
update-initramfs -u
