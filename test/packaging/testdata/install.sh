#!/bin/bash
# install.sh PACKAGE -- runs inside mount, pid and network namespaces of its own.
# Every line it prints is a step that passed.
set -euo pipefail
package=$1
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/{upper,work,system}
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/system
mount -t proc proc /mnt/system/proc
mount --bind /dev /mnt/system/dev
mount -t tmpfs tmpfs /mnt/system/run
cp "$package" /mnt/system/root/a.deb
cat >/mnt/system/root/steps.sh <<'END'
set -euo pipefail
cd /root
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
fail() { echo "FAILED: $*"; exit 1; }
dpkg -P ashlar >/dev/null 2>&1 || true

dpkg -i a.deb >log 2>&1 || { cat log; fail 'it does not install'; }
echo 'ok it installs without a service manager'
[ "$(command -v ashlar)" = /usr/bin/ashlar ] && ashlar version >/dev/null || fail 'the binary does not run'
echo 'ok the binary runs'
[ "$(stat -c '%a %U' /etc/ashlar/serve.yaml)" = '640 root' ] || fail 'the config file is readable for all'
for f in $(dpkg -L ashlar); do [ -e "$f" ] || fail "$f is not there"; done
man -w ashlar-serve >/dev/null 2>&1 || [ -e /usr/share/man/man1/ashlar-serve.1.gz ] || fail 'no man page'
bash -n /usr/share/bash-completion/completions/ashlar
modules=$(sed '/^#/d' /usr/lib/modules-load.d/ashlar.conf | xargs)
[ "$modules" = 'ublk_drv nbd loop' ] || fail "the modules loaded at boot are: $modules"
grep -q "modprobe -a $modules;" /var/lib/dpkg/info/ashlar.postinst || fail 'the package tells of other modules'
echo 'ok files, man pages and completions are in place'
if command -v systemd-analyze >/dev/null; then
	systemd-analyze verify /lib/systemd/system/ashlar.service /lib/systemd/system/ashlar-keeper.service 2>log || true
	if grep -v "Command 'man" log | grep -q 'ashlar.*service'; then cat log; fail 'a unit has faults'; fi
	echo 'ok the units verify'
fi
mkdir -p /tmp/data
ashlar serve --config /etc/ashlar/serve.yaml --data-dir /tmp/data --socket /tmp/control.sock --nbd-socket /tmp/nbd.sock &
daemon=$!
for i in $(seq 100); do ashlar pool list --server unix:/tmp/control.sock >/dev/null 2>&1 && break || sleep 0.1; done
kill -0 $daemon || fail 'the daemon does not run with the config file of the package'
[ -S /tmp/nbd.sock ] || fail 'the daemon does not listen'
echo 'ok the daemon runs with the config file of the package'

# A service manager that says what it is asked, and that the daemon is running.
mkdir -p /run/systemd/system /usr/local/bin
printf '#!/bin/sh\necho "$*" >>/root/asked\ncase "$*" in *is-active*) exit $(cat /root/active) ;; esac\n' >/usr/local/bin/systemctl
chmod +x /usr/local/bin/systemctl
export PATH=/usr/local/bin:$PATH
echo 0 >active

dpkg-deb -R a.deb next
sed -i 's/^Version: .*/&+next/' next/DEBIAN/control
dpkg-deb -Znone --root-owner-group -b next b.deb >/dev/null
echo '# mine' >>/etc/ashlar/serve.yaml
dpkg -i b.deb >log 2>&1 || { cat log; fail 'it does not upgrade'; }
kill -0 $daemon || fail 'the upgrade ended the daemon'
! grep -v -e daemon-reload -e is-active asked || fail "the upgrade asked for: $(cat asked)"
grep -q 'systemctl reload ashlar' log || fail 'the upgrade does not say that the old version runs'
grep -q '# mine' /etc/ashlar/serve.yaml || fail 'the upgrade changed the config file'
echo 'ok an upgrade touches neither the daemon nor the config file'

! dpkg -r ashlar >log 2>&1 || fail 'it was removed under a running daemon'
grep -q 'systemctl disable --now ashlar' log || fail 'the refusal does not say what to do'
kill -0 $daemon || fail 'the refused removal ended the daemon'
echo 'ok it is not removed under a running daemon'
kill $daemon
wait $daemon
echo 3 >active
mkdir -p /var/lib/ashlar && echo data >/var/lib/ashlar/pools
dpkg -P ashlar >log 2>&1 || { cat log; fail 'it does not purge'; }
[ ! -e /etc/ashlar/serve.yaml ] && [ ! -e /usr/bin/ashlar ] || fail 'purge left files'
[ "$(cat /var/lib/ashlar/pools)" = data ] || fail 'purge removed data'
echo 'ok purge leaves data alone'
END
chroot /mnt/system /bin/bash /root/steps.sh
